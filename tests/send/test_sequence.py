"""Every reply in every phase, over real sockets: a peer that answers each command with each class of reply, in and out of
sequence. What counts as delivered was accepted by the peer; only what was in doubt is sent twice."""

import asyncio
from collections import Counter

import pytest
from aiosmtplib import SMTPException

from relaymta.config import OAuth, Route
from relaymta.proto.sequence import HELO_AFTER
from relaymta.proto.smtp_client import ClientSession, Mail, classify
from relaymta.route.ourselves import Ourselves
from relaymta.send.connect import ConnectFailed, Peer, Via, _client, _greet, connect
from relaymta.send.greeting import Unsolicited
from relaymta.send.login import LoginFailed, log_in
from relaymta.send.oauth import Tokens
from relaymta.send.session import Session

GOOD = {
    "banner": b"220 peer\r\n", "HELO": b"250 peer\r\n", "MAIL": b"250 2.1.0 ok\r\n", "RCPT": b"250 2.1.5 ok\r\n",
    "DATA": b"354 go\r\n", "dot": b"250 2.0.0 taken\r\n", "RSET": b"250 2.0.0 ok\r\n", "QUIT": b"221 2.0.0 bye\r\n",
}  # fmt: skip
EHLO = {
    "pipelining": b"250-peer\r\n250-PIPELINING\r\n250 8BITMIME\r\n",
    "one by one": b"250-peer\r\n250 8BITMIME\r\n",
    "chunking": b"250-peer\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 CHUNKING\r\n",
}
LINES = {
    "1xx": b"150 wait\r\n",
    "another 2xx": b"251 2.0.0 fine\r\n",
    "3xx": b"399 more\r\n",
    "354": b"354 go\r\n",
    "4xx": b"450 4.2.0 no\r\n",
    "421": b"421 4.3.2 bye\r\n",
    "5xx": b"550 5.1.1 no\r\n",
    "garbage": b"hello?\r\n",
    "nothing": b"\r\n",
}
BODY = b"\r\n\r\n.\r\n..x\r\n.QUIT\r\n"


class Scripted:
    """A peer. `script[verb]`: its reply to the first command of that kind; all others get the ordinary reply. `taken`: the number
    of complete messages with a recipient that it accepted, by subject."""

    def __init__(self, kind: str, script: dict[str, bytes]) -> None:
        self.ehlo = EHLO[kind]
        self.script = script
        self.taken: Counter[bytes] = Counter()
        self.sender = True  # MAIL was accepted: else no RCPT counts, whatever its reply
        self.has_recipient = False
        self.messages: list[bytes] = []
        self.commands: list[str] = []

    def answer(self, verb: str) -> bytes:
        self.commands.append(verb)
        return self.script.pop(verb, self.ehlo if verb == "EHLO" else GOOD[verb])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.answer("banner"))
        while line := await reader.readline():
            verb = line.decode("latin-1")[:4].upper()
            if verb == "BDAT":
                self._message(writer, await reader.readexactly(int(line.split()[1])))
                continue
            said = self.answer(verb)
            writer.write(said)
            if verb == "MAIL":
                self.sender, self.has_recipient = not said.startswith((b"4", b"5")), False
            elif verb == "RCPT":
                self.has_recipient = self.sender and not said.startswith((b"4", b"5"))
            if said.startswith(b"421") or verb == "QUIT":
                return
            if verb == "DATA" and b"354" in said:
                data = b""
                while (line := await reader.readuntil(b"\r\n")) != b".\r\n":
                    data += line.removeprefix(b".")
                self._message(writer, data)

    def _message(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        said = self.answer("dot")
        subject = data.partition(b"\r\n")[0]
        self.messages.append(data)
        if said.startswith(b"2") and self.has_recipient:
            self.taken[subject] += 1
        writer.write(said)


class Sender:
    """Sends its messages over one connection after another until each is delivered or has failed, as the dispatcher does."""

    def __init__(self, count: int) -> None:
        self.left = [self.mail(number) for number in range(count)]
        self.delivered: list[bytes] = []
        self.refused: list[bytes] = []
        self.doubts: set[bytes] = set()
        self.again: list[Mail] = []
        self.over = asyncio.Event()

    @staticmethod
    def mail(number: int) -> Mail:
        data = b"Subject: %d" % number + BODY
        return Mail(data.partition(b"\r\n")[0], "a@b", [(0, "c@d")], [data], len(data), False, False)

    async def send(self, port: int) -> None:
        self.over.clear()
        try:
            session = await connect(Peer("127.0.0.1", "127.0.0.1", port), VIA, TOKENS, self.make, 100)
        except ConnectFailed:
            return
        self.idle(session)
        async with asyncio.timeout(5):
            await self.over.wait()

    def make(self, core: ClientSession, peer: str) -> Session:
        return Session(core, peer, asyncio.get_running_loop().time, self.idle, self.finished, self.lost)

    def idle(self, session: Session) -> None:
        if self.left:
            session.send(self.left.pop(0))
        elif session.core.idle:
            session.quit()
            self.over.set()

    def finished(self, session: Session, mail: Mail) -> None:
        said = mail.said.get(0)
        result = "success" if mail.all_sent else classify(said) if said is not None else "nothing"
        assert result != "nothing"
        self.settle(mail, result)

    def lost(self, session: Session, reason: str) -> None:
        assert session.core.last_said is None or session.core.last_said.code == 421
        for mail in session.core.under_way():
            if mail.data_sent:
                self.doubts.add(mail.cargo)
            self.settle(mail, classify(mail.said[0]) if 0 in mail.said else "transient")
        self.over.set()

    def settle(self, mail: Mail, result: str) -> None:
        if result == "transient":
            self.again.append(self.mail(int(mail.cargo.split()[1])))
        else:
            (self.delivered if result == "success" else self.refused).append(mail.cargo)


VIA = Via(Route(), "relay.example", 5.0, 5.0, "off", Ourselves(set()))
ENCRYPTED = Via(Route(), "relay.example", 5.0, 5.0, "encrypt", Ourselves(set()))
TOKENS = Tokens(lambda name: "", lambda name, token: None)


def run(kind: str, script: dict[str, bytes], count: int) -> tuple[Scripted, Sender]:
    async def main() -> tuple[Scripted, Sender]:
        peer, sender = Scripted(kind, script), Sender(count)
        server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
        async with server:
            for _ in range(5):
                await sender.send(server.sockets[0].getsockname()[1])
                sender.left, sender.again = sender.left + sender.again, []
                if not sender.left:
                    break
        return peer, sender

    return asyncio.run(main())


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("verb", ["banner", "EHLO", "MAIL", "RCPT", "DATA", "dot", "RSET", "QUIT"])
@pytest.mark.parametrize("kind", EHLO)
@pytest.mark.parametrize("extra", ["instead", "before", "behind"])
def test_no_message_is_lost_and_none_is_sent_twice_unless_in_doubt(kind, verb, line, extra):
    """`instead` of the ordinary reply, or one more `before` or `behind` it, while three messages are sent."""
    count = 3
    good = EHLO[kind] if verb == "EHLO" else GOOD[verb]
    said = {"instead": LINES[line], "before": LINES[line] + good, "behind": good + LINES[line]}[extra]
    peer, sender = run(kind, {verb: said}, count)
    subjects = {b"Subject: %d" % number for number in range(count)}
    assert not sender.left and sorted(sender.delivered + sender.refused) == sorted(subjects), "each has one outcome"
    for subject in sender.delivered:
        assert peer.taken[subject], "the peer accepted it"
        assert subject + BODY in peer.messages
    for subject in subjects:
        assert peer.taken[subject] <= 1 or subject in sender.doubts, "accepted twice without doubt"
    if sender.refused:
        assert LINES[line].startswith(b"5") or (line, extra) == ("354", "before"), "failed without a 5xx reply"
        assert len(sender.refused) == 1, "the reply was applied to several messages"
    assert all(data == b"" or (data.endswith(BODY) and data.count(b"Subject: ") == 1) for data in peer.messages), "mixed data"


@pytest.mark.parametrize(
    "code",
    [200, 220, 221, 250, 251, 299, 334, 354, 399, *range(420, 430), 450, 451, 452, *range(499, 506), *range(549, 556), 571],
)
def test_helo_is_sent_only_to_a_peer_that_does_not_implement_ehlo(code):
    """RFC 5321 4.1.4: with HELO there is no 8BITMIME, and 8-bit mail bounces."""

    async def main() -> None:
        peer = Scripted("pipelining", {"EHLO": b"%d what\r\n" % code})
        async with await asyncio.start_server(peer.serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            try:
                session = await connect(Peer("127.0.0.1", "127.0.0.1", port), VIA, TOKENS, Sender(0).make, 100)
            except ConnectFailed as error:
                assert (error.phase, error.said.code) == ("ehlo", code)
                assert code != 250 and code not in HELO_AFTER
            else:
                session.quit()
                assert code == 250 or code in HELO_AFTER
                assert ("HELO" in peer.commands) == (code != 250)

    asyncio.run(main())


def test_an_extra_reply_after_ehlo_is_not_read_as_that_to_starttls():
    async def main() -> None:
        peer = Scripted("pipelining", {"EHLO": b"250-peer\r\n250 STARTTLS\r\n220 go\r\n"})
        async with await asyncio.start_server(peer.serve, "127.0.0.1", 0) as server:
            host = Peer("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
            with pytest.raises(ConnectFailed, match="an unexpected reply") as failure:
                await connect(host, ENCRYPTED, TOKENS, Sender(0).make, 100)
            assert failure.value.phase == "ehlo" and "STAR" not in peer.commands

    asyncio.run(main())


def test_a_cancelled_connect_closes_its_connection():
    async def main() -> None:
        gone = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 peer\r\n")
            await reader.read(100)
            task.cancel()
            await reader.read(100)
            gone.set()
            writer.close()

        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            host = Peer("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
            task = asyncio.ensure_future(connect(host, VIA, TOKENS, Sender(0).make, 100))
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(10):
                await gone.wait()

    asyncio.run(main())


@pytest.mark.parametrize("mechanism", ["plain", "login", "cram-md5", "scram-sha-256"])
@pytest.mark.parametrize("line", [*LINES.values(), b"220 hello\r\n", b"250 2.0.0 ok\r\n", b"503 5.5.1 again\r\n", b"334 \r\n"])
def test_only_235_is_a_login(mechanism, line, monkeypatch):
    monkeypatch.setenv("RELAY_PASSWORD", "secret")

    class Offers(Scripted):
        def answer(self, verb: str) -> bytes:
            self.commands.append(verb)
            return {"banner": GOOD["banner"], "EHLO": b"250-peer\r\n250 AUTH " + mechanism.upper().encode() + b"\r\n"}.get(
                verb, line
            )

    async def main() -> None:
        peer = Offers("pipelining", {})
        route = Route(hosts=["127.0.0.1"], tls="verify", username="me", password_env="RELAY_PASSWORD", auth=mechanism)
        async with await asyncio.start_server(peer.serve, "127.0.0.1", 0) as server:
            host = Peer("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
            client = _client(host, Via(route, "relay.example", 5.0, 5.0, "off", Ourselves(set())))
            await client.connect()
            await _greet(client)
            with pytest.raises((LoginFailed, SMTPException)):
                await log_in(client, route, TOKENS)
            client.close()

    asyncio.run(main())


USER, PASSWORD = b"bWU=\r\n", b"c2VjcmV0\r\n"  # "me", "secret"


@pytest.mark.parametrize(
    ("replies", "answers"),
    [
        ([b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6", b"235 ok"], [USER, PASSWORD]),
        ([b"334 VXNlciBOYW1lAA==", b"334 UGFzc3dvcmQA", b"235 ok"], [USER, PASSWORD]),
        ([b"334 Username:", b"334 Password:", b"235 ok"], [USER, PASSWORD]),
        ([b"334 ", b"334 ", b"235 ok"], [USER, PASSWORD]),
        ([b"334 d2hv", b"334 d2hhdA==", b"235 ok"], [USER, PASSWORD]),  # "who", "what"
        ([b"334 TG9naW46", b"334 UGFzc3dvcmQ6", b"235 ok"], [USER, PASSWORD]),  # "Login:"
        ([b"334 VXNlcm5hbWU6", b"235 ok"], [USER]),
        ([b"334 VXNlcm5hbWU6", b"334 VXNlcm5hbWU6", b"501 ok"], [USER, b"*\r\n"]),  # it asks for the user again
        ([b"334 UGFzc3dvcmQ6", b"501 ok"], [b"*\r\n"]),
        ([b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6", b"334 UGFzc3dvcmQ6", b"501 ok"], [USER, PASSWORD, b"*\r\n"]),
        ([b"334 UGFzc3dvcmQ", b"501 ok"], [b"*\r\n"]),  # without padding
        ([b"334 TW90IGRlIHBhc3NlIOk6", b"501 ok"], [b"*\r\n"]),  # in Latin-1
        ([b"334 VXNlcm5hbWU6\r\n334 UGFzc3dvcmQ6"], []),  # before the user was sent
        ([b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6\r\n235 ok"], [USER]),
        ([b"504 no"], []),
        ([b"334 VXNlcm5hbWU6", b"535 no"], [USER]),
        ([b"334 VXNlcm5hbWU6", b"334 UGFzc3dvcmQ6", b"535 no"], [USER, PASSWORD]),
    ],
)
def test_login_answers_each_prompt_by_what_it_asks_for(replies, answers, monkeypatch):
    monkeypatch.setenv("RELAY_PASSWORD", "secret")
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 peer\r\n")
        left = list(replies)
        while line := await reader.readline():
            if line.startswith(b"EHLO"):
                writer.write(b"250-peer\r\n250 AUTH LOGIN\r\n")
                continue
            heard.append(line)
            writer.write(left.pop(0) + b"\r\n")
        writer.close()

    async def main() -> bool:
        route = Route(hosts=["127.0.0.1"], tls="verify", username="me", password_env="RELAY_PASSWORD", auth="login")
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host = Peer("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
            client = _client(host, Via(route, "relay.example", 5.0, 5.0, "off", Ourselves(set())))
            await client.connect()
            await _greet(client)
            try:
                await log_in(client, route, TOKENS)
            except (Unsolicited, LoginFailed, SMTPException):
                return False
            finally:
                client.close()
        return True

    assert asyncio.run(main()) == replies[-1].startswith(b"235")
    assert heard == [b"AUTH LOGIN\r\n", *answers]


def test_plain_is_sent_again_where_the_initial_response_was_ignored(monkeypatch):
    """RFC 4954 4."""
    monkeypatch.setenv("RELAY_PASSWORD", "secret")
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 peer\r\n")
        replies = [b"250-peer\r\n250 AUTH PLAIN\r\n", b"334 \r\n", b"235 ok\r\n"]
        while line := await reader.readline():
            heard.append(line)
            writer.write(replies.pop(0))
        writer.close()

    async def main() -> None:
        route = Route(hosts=["127.0.0.1"], tls="verify", username="me", password_env="RELAY_PASSWORD")
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host = Peer("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
            client = _client(host, Via(route, "relay.example", 5.0, 5.0, "off", Ourselves(set())))
            await client.connect()
            await _greet(client)
            await log_in(client, route, TOKENS)
            client.close()

    asyncio.run(main())
    assert heard[1:] == [b"AUTH PLAIN AG1lAHNlY3JldA==\r\n", b"AG1lAHNlY3JldA==\r\n"]


@pytest.mark.parametrize(
    ("replies", "closes", "refused"),
    [
        ([b"454 4.7.0 later"], False, 0), ([b"421 4.7.0 too many"], True, 0), ([b"535 5.7.8 no", b"235 ok"], False, 1),
        ([b"535 5.7.8 no"], True, 1), ([b"535 5.7.8 no", b"535 5.7.8 no"], False, 1),
    ],
)  # fmt: skip
def test_only_a_refusal_for_good_costs_the_token(replies, closes, refused):
    """RFC 4954 6: 454 is temporary; RFC 5321 3.8: 421 closes."""
    left, heard = list(replies), []

    class Tokens:
        refusals = 0

        async def get(self, oauth: object) -> str:
            return f"token-{self.refusals}-long"

        def refused(self, oauth: object, token: str) -> None:
            self.refusals += 1

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 peer\r\n")
        while line := await reader.readline():
            if line.startswith(b"EHLO"):
                writer.write(b"250-peer\r\n250 AUTH XOAUTH2\r\n")
                continue
            heard.append(line)
            writer.write(left.pop(0) + b"\r\n")
            if closes and not left:
                break
        writer.close()

    async def main() -> int:
        tokens = Tokens()
        oauth = OAuth(token_url="https://t.example/", client_id="c")
        route = Route(hosts=["127.0.0.1"], tls="verify", username="me", oauth=oauth)
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host = Peer("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
            client = _client(host, Via(route, "relay.example", 5.0, 5.0, "off", Ourselves(set())))
            await client.connect()
            await _greet(client)
            if replies[-1].startswith(b"235"):
                await log_in(client, route, tokens)
            else:
                with pytest.raises(SMTPException) as failed:
                    await log_in(client, route, tokens)
                assert not closes or failed.value.code == int(replies[-1][:3])
            client.close()
        return tokens.refusals

    assert asyncio.run(main()) == refused
    assert len(heard) == len(replies)


@pytest.mark.parametrize("line", [line for line in LINES.values() if not line.startswith(b"220")])
def test_only_220_starts_tls(line):
    """With `tls = "encrypt"` there is no fallback."""

    async def main() -> None:
        peer = Scripted("pipelining", {"STAR": line})
        peer.ehlo = b"250-peer\r\n250 STARTTLS\r\n"
        async with await asyncio.start_server(peer.serve, "127.0.0.1", 0) as server:
            host = Peer("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
            with pytest.raises(ConnectFailed) as failure:
                await connect(host, ENCRYPTED, TOKENS, Sender(0).make, 100)
            assert failure.value.phase == "starttls"
            assert "MAIL" not in peer.commands

    asyncio.run(main())
