"""`relaymta sink`: a smart host for tests that accepts every message and prints a line about it; it can show and save them."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import click

from relaymta.cli.console import say, say_message
from relaymta.cli.options import Configuration, absolute, configured, fail, folders
from relaymta.config import parse_hostport
from relaymta.proto import reply
from relaymta.proto.smtp_server import Host, Limits, ServerSession, Transaction

__all__ = ["Maildir", "Sink", "sink"]

Store = Callable[[str, list[str], bytes], None]


class Maildir:
    """Saves messages in a maildir, which is created: each is written to tmp/, synced, and then moved to new/. OSError."""

    def __init__(self, folder: Path) -> None:
        from mailbox import Maildir as Folder

        for name in ("tmp", "new", "cur"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = Folder(folder, create=False)

    def __call__(self, sender: str, recipients: list[str], data: bytes) -> None:
        """Save one, with its envelope in front: Return-Path (RFC 5321 4.4), and Delivered-To for each recipient."""
        envelope = [f"Return-Path: <{sender}>", *(f"Delivered-To: {address}" for address in recipients)]
        head = "".join(line + "\n" for line in envelope).encode("utf-8", "surrogateescape")
        self._folder.add(head + data.replace(b"\r\n", b"\n"))  # local files have the system's line ends


class Sink(asyncio.Protocol):
    """One connection. `show`: the messages are printed; `save`: what is done with each before it is accepted, OSError rejects it
    temporarily."""

    count = 0

    def __init__(self, show: bool = False, save: Store | None = None) -> None:
        self._shown = show
        self._save = save

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
            out += self.session.finish(self._take(self.session.complete))
        self.transport.write(out)
        if self.session.closing:
            self.transport.close()

    def _take(self, mail: Transaction) -> bytes:
        """The reply to a message."""
        data = b"".join(mail.take())
        if self._save is not None:
            try:
                self._save(mail.sender, list(mail.recipients), data)
            except OSError as error:
                say(f"sink: not saved: {error}", err=True)
                return reply.format_reply(451, "4.3.0", "The sink could not save the message")
        Sink.count += 1
        subject = next((line for line in data.split(b"\r\n") if line.lower().startswith(b"subject:")), b"(no subject)")
        shown = subject.decode("utf-8", "replace")[:60]
        say(f"sink: {Sink.count}: <{mail.sender}> -> <{', '.join(mail.recipients)}> {mail.size} octets, {shown}")
        if self._shown:
            say_message([data])
            say("")
        return reply.format_reply(250, "2.0.0", f"Accepted by the sink as number {Sink.count}")


async def _run(host: str, port: int, show: bool, save: Store | None) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Sink(show, save), host, port, backlog=500)
    say(f"sink: accepting mail on {host}:{port}")
    await server.serve_forever()


@click.command()
@click.option("--listen", default="127.0.0.1:2526", show_default=True, metavar="HOST:PORT", help="Address to accept mail on.")
@click.option("--show", is_flag=True, help="Print each message, too.")
@click.option(
    "--maildir", type=click.Path(path_type=Path), metavar="DIR", shell_complete=folders, help="Save each message in this maildir."
)
@configured
def sink(read: Configuration, listen: str, show: bool, maildir: Path | None) -> None:
    """Run a smart host for tests: it accepts every message, prints a line about it, and (without --maildir) discards it."""
    try:
        host, port = parse_hostport(listen)
    except ValueError as error:
        fail(64, f"--listen {error}")
    try:
        save = Maildir(maildir) if maildir is not None else None
    except OSError as error:
        fail(73, f"--maildir {absolute(error.filename or maildir or '')}: {error.strerror}")
    try:
        asyncio.run(_run(host, port, show, save))
    except KeyboardInterrupt:
        pass
    except OSError as error:
        fail(78, f"--listen {listen}: {os.strerror(error.errno) if error.errno else error}")
