"""The POP3 session over sockets, as poplib and curl use it."""

import asyncio
import contextlib
import poplib
import ssl
from collections.abc import AsyncIterator, Callable

import pytest
import trustme

from relaymta.proto.pop3_server import Offers, ServerSession
from relaymta.proto.pop3_session import TLS
from tests.support.pop3 import Caller, Mailbox
from tests.support.programs import need

ONE = b"Subject: one\r\n\r\n.dots\r\n..\r\n.\r\nend\r\n"
TWO = b"Subject: two\r\n\r\n" + b"x" * 70 + b"\r\n" + b".\r\n" * 100_000
OFFERS = Offers(starttls=True, mechanisms=("PLAIN", "LOGIN"), clear=True)


class Server:
    """Serves one mailbox at a free port of the loopback interface."""

    def __init__(self, mailbox: Mailbox, offers: Offers) -> None:
        self.mailbox, self.offers = mailbox, offers
        self.authority = trustme.CA()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert("localhost").configure_cert(self.context)
        self.port = 0
        self.commands = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = Caller(ServerSession("mx.example", self.offers), self.mailbox, 1000)
        session = caller.session
        writer.write(session.greet())
        while not session.closing:
            if session.state == TLS:
                await writer.drain()
                await writer.start_tls(self.context)
                session.tls_started()
            elif session.state or session.behind:
                writer.write(caller.step())
                await writer.drain()
            else:
                data = await reader.read(65536)
                self.commands += data
                if not data:
                    break
                writer.write(session.receive(data))
        caller.drop()
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(*messages: bytes, offers: Offers = OFFERS) -> AsyncIterator[Server]:
    made = Server(Mailbox(*messages), offers)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made


def joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\r\n" for line in lines)


def whole_dialogue(port: int) -> None:
    client = poplib.POP3("localhost", port, timeout=10)
    assert client.capa()["EXPIRE"] == ["NEVER"] and "STLS" in client.capa()
    assert client.user("bob").startswith(b"+OK")
    assert client.pass_("secret").startswith(b"+OK 2 messages")
    assert client.stat() == (2, len(ONE) + len(TWO))
    assert client.list()[1] == [b"1 %d" % len(ONE), b"2 %d" % len(TWO)]
    assert client.uidl()[1] == [b"1 7.10", b"2 7.20"] and client.uidl(2) == b"+OK 2 7.20"
    assert joined(client.retr(1)[1]) == ONE
    assert joined(client.retr(2)[1]) == TWO
    assert joined(client.top(1, 1)[1]) == b"Subject: one\r\n\r\n.dots\r\n"
    assert client.dele(1).startswith(b"+OK") and client.rset().startswith(b"+OK 2") and client.noop().startswith(b"+OK")
    assert client.dele(2).startswith(b"+OK")
    with pytest.raises(poplib.error_proto, match="has been deleted"):
        client.retr(2)
    other = poplib.POP3("localhost", port, timeout=10)
    other.user("bob")
    with pytest.raises(poplib.error_proto, match=r"\[IN-USE\]"):
        other.pass_("secret")
    other.close()
    assert client.quit() == b"+OK 1 message deleted; bye"


async def test_poplib():
    async with serving(ONE, TWO) as server:
        await asyncio.to_thread(whole_dialogue, server.port)
        assert list(server.mailbox.messages) == [10] and server.mailbox.seen == {10, 20}


def over_tls(port: int, trust: Callable[[ssl.SSLContext], None]) -> None:
    context = ssl.create_default_context()
    trust(context)
    client = poplib.POP3("localhost", port, timeout=10)
    with pytest.raises(poplib.error_proto, match="issue STLS first"):
        client.user("bob")
    assert client.stls(context).startswith(b"+OK")
    assert "STLS" not in client.capa()
    client.utf8()
    client.user("bob")
    with pytest.raises(poplib.error_proto, match=r"\[AUTH\]"):
        client.pass_("wrong")
    client.user("bob")
    client.pass_("secret")
    assert joined(client.retr(1)[1]) == TWO
    client.dele(1)
    client.close()  # without QUIT


async def test_poplib_over_tls():
    async with serving(TWO, offers=Offers(starttls=True, mechanisms=("PLAIN",))) as server:
        await asyncio.to_thread(over_tls, server.port, server.authority.configure_trust)
        for _ in range(100):
            if server.mailbox.session is None:
                break
            await asyncio.sleep(0.05)
        assert list(server.mailbox.messages) == [10] and server.mailbox.seen == {10}


async def curl(server: Server, path: str = "", *options: str) -> tuple[bytes, bytes]:
    """What curl writes of a maildrop, and the commands that it has sent."""
    server.commands = b""
    url = f"pop3://127.0.0.1:{server.port}/{path}"
    process = await asyncio.create_subprocess_exec(
        *("curl", "-v", "-m", "10", "--noproxy", "*", "--user", "bob:secret", *options, url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, said = await process.communicate()
    assert process.returncode == 0, said
    return out, server.commands


async def test_curl():
    need("curl")
    async with serving(ONE, TWO) as server:
        out, sent = await curl(server)
        assert out == b"1 %d\r\n2 %d\r\n" % (len(ONE), len(TWO))
        assert sent.startswith(b"CAPA\r\nAUTH PLAIN\r\n") and sent.endswith(b"LIST\r\nQUIT\r\n")
        out, sent = await curl(server, "1", "--sasl-ir")
        assert out == ONE and b"AUTH PLAIN AGJvYgBzZWNyZXQ=\r\nRETR 1\r\nQUIT\r\n" in sent
        assert (await curl(server, "2", "--login-options", "AUTH=LOGIN"))[0] == TWO
        assert (await curl(server, "", "-X", "UIDL"))[0] == b"1 7.10\r\n2 7.20\r\n"
        assert (await curl(server, "", "-X", "TOP 1 0"))[0] == b"Subject: one\r\n\r\n"
        await curl(server, "1", "-X", "DELE", "-I")
        assert list(server.mailbox.messages) == [20] and server.mailbox.seen == {10, 20}
