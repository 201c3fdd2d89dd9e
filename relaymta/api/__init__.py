"""The HTTP API and the page for operators: a process of its own, which supervisor/http_api.py starts when somebody connects.

It asks the relay over the control socket, as the command line does, and has no other way to it: routes.py is the table of what it
can, verbs.py does it, models.py are arguments and answers, openapi.py describes them. access.py: who may do what; connections.py:
limits; serving.py: the process. page.py is the page.
"""

__all__ = ["main"]


def main() -> None:
    """Serve on the sockets that the supervisor passes, until it closes standard input."""
    import json
    import os
    import socket
    import sys

    from relaymta.api.serving import serve
    from relaymta.config import Config

    line = b""
    while not line.endswith(b"\n"):  # no octet more: the rest belongs to the event loop
        piece = os.read(0, 1 << 16)
        if not piece:
            sys.exit(0)
        line += piece
    given = json.loads(line)
    config = Config.model_validate_json(given["config"])
    serve(config, {kind: socket.socket(fileno=number) for kind, number in given["sockets"].items()})
