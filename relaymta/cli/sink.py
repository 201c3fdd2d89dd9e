"""`relaymta sink`: a smart host for tests that accepts every message, prints a line about it, and discards it."""

import asyncio
import sys

import click

from relaymta.cli.console import say
from relaymta.config import parse_hostport
from relaymta.proto import reply
from relaymta.proto.smtp_server import Host, Limits, ServerSession, Transaction

__all__ = ["Sink", "sink"]


class Sink(asyncio.Protocol):
    """One connection."""

    count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the greeting."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.session = ServerSession("sink.invalid", Host(Limits(long_lines=True)))
        transport.write(self.session.greet())

    def data_received(self, data: bytes) -> None:
        """Accept every message."""
        out = self.session.receive(data)
        while self.session.complete is not None or self.session.behind:
            if self.session.complete is None:
                out += self.session.receive(b"")
                continue
            self._show(self.session.complete)
            out += self.session.finish(reply.format_reply(250, "2.0.0", f"Accepted by the sink as number {Sink.count}"))
        self.transport.write(out)
        if self.session.closing:
            self.transport.close()

    def _show(self, mail: Transaction) -> None:
        Sink.count += 1
        data = b"".join(mail.take())
        subject = next((line for line in data.split(b"\r\n") if line.lower().startswith(b"subject:")), b"(no subject)")
        shown = subject.decode("utf-8", "replace")[:60]
        say(f"sink: {Sink.count}: <{mail.sender}> -> <{', '.join(mail.recipients)}> {mail.size} octets, {shown}")


async def _run(host: str, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Sink, host, port, backlog=500)
    say(f"sink: accepting mail on {host}:{port}")
    await server.serve_forever()


@click.command()
@click.option("--listen", default="127.0.0.1:2526", show_default=True, metavar="HOST:PORT", help="Address to accept mail on.")
def sink(listen: str) -> None:
    """Run a smart host for tests: it accepts every message, prints a line about it, and discards it."""
    try:
        host, port = parse_hostport(listen)
    except ValueError as error:
        say(f"--listen {error}", err=True)
        sys.exit(64)
    try:
        asyncio.run(_run(host, port))
    except KeyboardInterrupt:
        pass
    except OSError as error:
        say(f"{listen}: {error.strerror}", err=True)
        sys.exit(78)
