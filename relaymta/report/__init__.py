"""Reports of what has become of mail: a process that follows the journals of events of all shards and tells webhooks.

It only reads what workers have committed, and mail never waits for it. shards.py follows one journal; streams.py hands events of
one shard to one consumer, in order, each batch again until it is taken, and knows from places.py where it was; webhook.py is a
consumer, another one is an object with the same methods (`streams.Consumer`); replays.py are streams over events of before;
serving.py is the process, which supervisor/reports.py starts.
"""

__all__ = ["main"]


def main() -> None:
    """Report until the supervisor closes the socket whose descriptor is the argument."""
    import socket
    import sys

    from relaymta.report.serving import serve

    serve(socket.socket(fileno=int(sys.argv[1])))
