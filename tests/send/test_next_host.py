"""The next host of a site in the same attempt (RFC 5321 5.1; Postfix 3.7 smtp(8)): who goes on, how far, and what stays when the
attempt is cut; replies of odd form; BDAT that is offered and not implemented; TLS that fails and is wanted."""

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from relaymta.proto.envelope import EIGHT_BIT, PERMANENT, SMTPUTF8, SUCCESS, TRANSIENT, UTF8_HEADER
from relaymta.send import trust
from relaymta.send.session import Session
from relaymta.send.trail import HOSTS
from tests.send.test_outcomes import LINES, OFFERS, Peer, hosted, message, outcome

LATER, NO = b"450 4.2.1 later\r\n", b"550 5.1.1 no\r\n"


async def finished(dispatcher: Any, count: int) -> list[tuple[Any, Any, int]]:
    async with asyncio.timeout(60):
        while len(dispatcher.queue.finished) < count:
            await asyncio.sleep(0.001)
    return dispatcher.queue.finished  # type: ignore[no-any-return]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [row for row in rows if row["event"] == name]


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
async def test_only_recipients_refused_for_now_go_on(tmp_path, protocol):
    first = Peer(OFFERS, {"RCPT": [b"250 ok\r\n", LATER, NO]}, lmtp=protocol == "lmtp")
    second = Peer(OFFERS, {}, lmtp=protocol == "lmtp")
    async with hosted(tmp_path, "two smart hosts", [first, second], protocol, tls="off") as (dispatcher, _):
        found = await outcome(dispatcher, message(1, "a@d.test", "b@d.test", "c@d.test"))
        (_, results, _) = dispatcher.queue.finished[0]
    assert found == {0: SUCCESS, 1: SUCCESS, 2: PERMANENT}
    assert second.asked == ["b@d.test"]
    assert (first.taken, second.taken) == (1, 1)
    assert [results[i].peer for i in range(3)] == ["127.0.0.1", "127.0.0.2", "127.0.0.1"]


async def test_each_lmtp_recipient_has_its_own_next_host(tmp_path):
    first = Peer(OFFERS, {"dot": [b"250 ok\r\n", b"452 4.2.2 full\r\n"]}, lmtp=True)
    second = Peer(OFFERS, {}, lmtp=True)
    async with hosted(tmp_path, "two smart hosts", [first, second], "lmtp", tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message(1, "a@d.test", "b@d.test")) == {0: SUCCESS, 1: SUCCESS}
    assert second.asked == ["b@d.test"]


async def test_two_hosts_are_asked_in_one_attempt_and_those_that_cannot_be_reached_do_not_count(tmp_path):
    peers = [
        Peer(OFFERS, {"RCPT": LATER}),
        Peer(OFFERS, {"banner": b"421 busy\r\n"}),
        Peer(OFFERS, {"MAIL": LATER}),
        Peer(OFFERS, {}),
    ]
    async with hosted(tmp_path, "four smart hosts", peers, tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: TRANSIENT}
        ((_, results, _),) = dispatcher.queue.finished
    assert [peer.connections for peer in peers] == [1, 1, 1, 0]
    assert HOSTS == 2
    assert results[0].peer == "127.0.0.3" and results[0].phase == "mail"
    assert "later (rcpt, 127.0.0.1)" in results[0].cause and "before that" not in results[0].whole


async def test_the_log_tells_what_the_first_host_has_said(tmp_path):
    peers = [Peer(OFFERS, {"RCPT": LATER}), Peer(OFFERS, {})]
    async with hosted(tmp_path, "two MX", peers, tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: SUCCESS}
    async with asyncio.timeout(30):
        while not (told := events(tmp_path, "next_host")):
            await asyncio.sleep(0.01)
    ((peer, phase, reply, recipients),) = [(e["peer"], e["phase"], e["reply"], e["recipients"]) for e in told]
    assert (peer, phase, reply, recipients) == ("mx1.test", "rcpt", "450 4.2.1 later", ["c@d.test"])


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("how", ["450", "421", "both"])
async def test_a_backlog_goes_on_within_the_limit_of_connections(tmp_path, how, connections):
    """Each message is offered to both hosts; where both refuse it, it ends as one attempt."""
    count = 6 if how == "421" else 30  # a rate is learned from 421
    script = {"450": {"MAIL": LATER}, "421": {"MAIL": b"421 4.3.2 bye\r\n"}, "both": {"RCPT": LATER}}[how]
    peers = [Peer(OFFERS, dict(script)), Peer(OFFERS, {"RCPT": LATER} if how == "both" else {})]
    async with hosted(tmp_path, "two smart hosts", peers, tls="off", connections=connections) as (dispatcher, _):
        for number in range(count):
            dispatcher.offer(message(number + 1))
        rows = await finished(dispatcher, count)
        assert len(dispatcher.queue.finished) == count
        kinds = {SUCCESS if results is None else results[0].kind for _, results, _ in rows}
        assert not dispatcher.connections.pools["r"].needy
    assert kinds == {TRANSIENT if how == "both" else SUCCESS}
    assert peers[1].taken == (0 if how == "both" else count)
    assert max(peer.most_open for peer in peers) <= connections


@pytest.mark.parametrize("partly", [True, False])
async def test_what_was_answered_is_recorded_when_the_attempt_is_cut_between_two_hosts(tmp_path, partly):
    first = Peer(OFFERS, {"RCPT": [b"250 ok\r\n" if partly else LATER, LATER]})
    second = Peer(OFFERS, {"banner": "silence"})
    async with hosted(tmp_path, "two smart hosts", [first, second], tls="off") as (dispatcher, _):
        dispatcher.offer(message(1, "a@d.test", "b@d.test"))
        async with asyncio.timeout(60):
            await second.silent.wait()
        await dispatcher.drain(0, 0)
        ((_, results, _),) = dispatcher.queue.finished
        assert [results[i].kind for i in range(2)] == [SUCCESS if partly else TRANSIENT, TRANSIENT]
        assert dispatcher.queue.returned == []
        assert dispatcher.room._limits.taken("out") == 0


async def test_a_stop_begins_nothing_at_the_next_host(tmp_path):
    peers = [Peer(OFFERS, {"RCPT": LATER}), Peer(OFFERS, {})]
    async with hosted(tmp_path, "two smart hosts", peers, tls="off") as (dispatcher, _):
        dispatcher.offer(message())
        async with asyncio.timeout(60):
            while not peers[0].asked:
                await asyncio.sleep(0)
        dispatcher.connections.draining = True
        await finished(dispatcher, 1)
    assert peers[1].connections == 0


async def test_a_host_that_has_just_failed_is_not_tried_for_each_message(tmp_path):
    peers = [Peer(OFFERS, {"RCPT": LATER}), Peer(OFFERS, {"banner": b"554 no\r\n"})]
    async with hosted(tmp_path, "two MX", peers, tls="off", connections=1) as (dispatcher, _):
        for number in range(10):
            dispatcher.offer(message(number + 1))
        rows = await finished(dispatcher, 10)
    assert {results[0].code for _, results, _ in rows} == {450}
    assert all("then 554 no" in results[0].cause for _, results, _ in rows)
    assert peers[1].connections < 10


# The code decides

ODD = {
    "no blank": b"250ok\r\n",
    "nothing behind": b"250\r\n",
    "an enhanced code at once": b"2502.0.0 ok\r\n",
    "several codes": b"250-ok\r\n550 no\r\n",
    "5,000 octets": b"250 " + b"x" * 5000 + b"\r\n",
    "an empty line": b"250-ok\r\n\r\n250 ok\r\n",
    "a line without a code": b"250-ok\r\nqueued\r\n250 ok\r\n",
    "not UTF-8": b"250 \xe9\xff\r\n",
    "LF only": b"250 ok\n",
    "many lines": b"250-x\r\n" * 300 + b"250 ok\r\n",
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("phase", ["MAIL", "RCPT", "dot", "BDAT"])
async def test_an_odd_reply_has_its_code(tmp_path, phase, name):
    """RFC 5321 4.2.1. One copy is sent."""
    peer = Peer(OFFERS + (b"CHUNKING\r\n" if phase == "BDAT" else b""), {phase: ODD[name]})
    async with hosted(tmp_path, "one host", [peer], tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: SUCCESS}
    assert (peer.taken, peer.connections) == (1, 1)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("code", [450, 550])
async def test_an_odd_refusal_of_message_data_has_its_code(tmp_path, code, name):
    peer = Peer(OFFERS, {"dot": ODD[name].replace(b"250", b"%d" % code, 1)})
    async with hosted(tmp_path, "one host", [peer], tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: TRANSIENT if code == 450 else PERMANENT}
        assert dispatcher.queue.finished[0][1][0].code == code


@pytest.mark.parametrize(
    ("cut", "kind"),
    [
        (b"250 ok", SUCCESS),
        (b"250-ok\r\n", SUCCESS),
        (b"250-ok\r\n25", SUCCESS),
        (b"550 no", PERMANENT),
        (b"451-no\r\n", TRANSIENT),
        (b"25", "in doubt"),
        (b"", "in doubt"),
    ],
)
@pytest.mark.parametrize("end", ["close", "silence"])
async def test_a_reply_to_message_data_that_is_cut_has_its_code(tmp_path, monkeypatch, cut, kind, end):
    monkeypatch.setitem(LINES, end, cut)
    heard = bytearray()
    receive = Session.data_received

    def received(session: Session, data: bytes) -> None:
        heard.extend(data)
        receive(session, data)

    monkeypatch.setattr(Session, "data_received", received)
    peer = Peer(OFFERS, {"dot": end})
    async with hosted(tmp_path, "one host", [peer], tls="off") as (dispatcher, _):
        dispatcher.offer(message())
        async with asyncio.timeout(60):
            while not dispatcher.queue.finished:
                await asyncio.sleep(0.001)
                if peer.silent.is_set() and heard.endswith(b"\r\n" + cut):
                    dispatcher.connections.tick(dispatcher.loop.time() + 1e6, dispatcher.queue.clock.now())
        ((_, results, _),) = dispatcher.queue.finished
    found = SUCCESS if results is None else "in doubt" if "in doubt" in results[0].text else results[0].kind
    assert found == kind


@pytest.mark.parametrize("said", [b"550 5.7.1 refused\r\n", b"450 4.2.0 later\r\n", b"250 ok\r\n"])
@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
async def test_a_reply_that_comes_with_the_354_leaves_no_doubt(tmp_path, protocol, said):
    peers = [Peer(OFFERS, {"DATA": b"354 go\r\n" + said}, lmtp=protocol == "lmtp"), Peer(OFFERS, {}, lmtp=protocol == "lmtp")]
    async with hosted(tmp_path, "two smart hosts", peers, protocol, tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: PERMANENT if said.startswith(b"5") else SUCCESS}
    assert (peers[0].taken, peers[1].taken) == (0, not said.startswith(b"5"))


@pytest.mark.parametrize("said", [b"554 5.7.1 blocked by policy\r\n", b"451 4.7.1 later\r\n"])
async def test_what_the_next_host_says_before_mail_has_its_code(tmp_path, said):
    """The first one cannot accept the message: it is 8-bit."""
    peers = [Peer(b"peer\r\nPIPELINING\r\n", {}), Peer(OFFERS, {"EHLO": said})]
    async with hosted(tmp_path, "two smart hosts", peers, tls="off") as (dispatcher, _):
        entry = message()
        entry.envelope.flags |= EIGHT_BIT
        assert await outcome(dispatcher, entry) == {0: TRANSIENT}
        attempt = dispatcher.queue.finished[0][1][0]
    assert attempt.whole == said.decode().strip() and attempt.phase == "ehlo" and attempt.because == "policy"


@pytest.mark.parametrize(("flags", "offers", "kind"), [
    (SMTPUTF8 | UTF8_HEADER, b"", PERMANENT), (SMTPUTF8 | UTF8_HEADER, b"SMTPUTF8\r\n", SUCCESS), (SMTPUTF8, b"", SUCCESS),
])  # fmt: skip
async def test_a_header_in_utf8_needs_smtputf8(tmp_path, flags, offers, kind):
    """RFC 6531 3.2. (Mail that was given without SMTPUTF8 is passed on as it is.)"""
    async with hosted(tmp_path, "one host", [Peer(OFFERS + offers, {})], tls="off") as (dispatcher, _):
        entry = message()
        entry.envelope.flags |= flags
        assert await outcome(dispatcher, entry) == {0: kind}


@pytest.mark.parametrize(("line", "taken"), [(b"8BITMIME\tx\r\n", 1), (b"8bitmime \t \r\n", 1), (b"8BITMIMEX\r\n", 0)])
async def test_a_tab_ends_a_keyword_of_ehlo(tmp_path, line, taken):
    peer = Peer(b"peer\r\nPIPELINING\r\n" + line, {})
    async with hosted(tmp_path, "one host", [peer], tls="off") as (dispatcher, _):
        entry = message()
        entry.envelope.flags |= EIGHT_BIT
        assert await outcome(dispatcher, entry) == {0: SUCCESS if taken else PERMANENT}
    assert peer.taken == taken


@pytest.mark.parametrize("said", [b"550 5.7.1 your address is blocked\r\n", b"502 5.5.1 no LMTP here\r\n"])
async def test_the_reply_to_lhlo_is_reported_as_it_is(tmp_path, said):
    async with hosted(tmp_path, "one host", [Peer(OFFERS, {"LHLO": said})], "lmtp", tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: TRANSIENT}
        assert dispatcher.queue.finished[0][1][0].whole == said.decode().strip()


@pytest.mark.parametrize("phase", ["banner", "EHLO", "STARTTLS"])
@pytest.mark.parametrize("code", [b"220", b"250", b"421", b"451", b"554", b"150", b"999"])
async def test_text_that_is_not_utf8_before_mail_is_a_reply_like_others(tmp_path, phase, code):
    """It goes on, or the next host gets the message; the text is kept as it can be shown."""
    peers = [Peer(OFFERS + b"STARTTLS\r\n", {phase: code + b" n\xe9\xff\r\n"}), Peer(OFFERS, {})]
    tls = "may" if phase == "STARTTLS" else "off"
    async with hosted(tmp_path, "two smart hosts", peers, tls=tls) as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: SUCCESS}
        assert not [e for e in events(tmp_path, "warning") if "internal error" in e["text"]]
    assert peers[0].taken + peers[1].taken == 1


# BDAT


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("code", [b"500", b"502"])
async def test_bdat_that_is_not_implemented_is_remembered(tmp_path, knows, code):
    peer = Peer(OFFERS + b"CHUNKING\r\n", {"BDAT": code + b" 5.5.1 not implemented\r\n"}, knows_bdat=knows)
    async with hosted(tmp_path, "one host", [peer], tls="off", messages_per_connection=2) as (dispatcher, _):
        for number in range(6):
            dispatcher.offer(message(number + 1, "a@d.test", "b@d.test"))
        rows = await finished(dispatcher, 6)
        assert [results for _, results, _ in rows] == [None] * 6
        before = peer.commands.count("BDAT")
        dispatcher.offer(message(9))
        await finished(dispatcher, 7)
    assert peer.taken == 7
    assert peer.commands.count("BDAT") == before


async def test_recipients_that_were_answered_before_bdat_failed_stay_answered(tmp_path):
    script = {"RCPT": [b"250 ok\r\n", NO], "BDAT": b"500 5.5.2 what?\r\n"}
    peer = Peer(OFFERS + b"CHUNKING\r\n", script, knows_bdat=False)
    async with hosted(tmp_path, "one host", [peer], tls="off") as (dispatcher, _):
        assert await outcome(dispatcher, message(1, "a@d.test", "b@d.test")) == {0: SUCCESS, 1: PERMANENT}
    assert peer.asked == ["a@d.test", "b@d.test", "a@d.test"]


# TLS that fails


@pytest.mark.parametrize("tls", ["may", "encrypt"])
@pytest.mark.parametrize(
    ("said", "phase", "cause"),
    [
        (b"554 5.7.1 blocked\r\n", "ehlo", "policy"),
        (b"451 4.3.0 later\r\n", "ehlo", "reply"),
        (b"421 4.3.2 busy\r\n", "ehlo", "421"),
        (b"hello?\r\n", "ehlo", "reply"),
    ],
)
async def test_a_refusal_within_tls_is_no_failure_of_tls(tmp_path, monkeypatch, contexts, tls, said, phase, cause):
    """And the message is not sent in the clear."""
    server, _ = contexts
    made = trust.Context(ssl.PROTOCOL_TLS_CLIENT)
    made.sessions = {}
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    monkeypatch.setattr(trust, "context_of", lambda *args: made)
    peer = Peer(OFFERS, {"EHLO": [b"", said]}, server)
    async with hosted(tmp_path, "one host", [peer], tls=tls) as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: TRANSIENT}
        attempt = dispatcher.queue.finished[0][1][0]
    assert (attempt.phase, attempt.because) == (phase, cause)
    assert peer.connections == 1 and not peer.taken


class Cut(Peer):
    """A host that closes the connection behind its reply to one command within TLS. `clear`: whether it was sent MAIL in the
    clear."""

    def __init__(self, phase: str, script: dict[str, Any], context: ssl.SSLContext) -> None:
        super().__init__(OFFERS, script, context)
        self.phase = phase
        self.clear = False

    async def _answer(self, writer: asyncio.StreamWriter, phase: str, good: bytes = b"") -> bytes:
        within = writer.get_extra_info("ssl_object") is not None
        self.clear |= phase == "MAIL" and not within
        line = await super()._answer(writer, phase, good)
        if within and phase == self.phase:
            await writer.drain()
            raise ConnectionError
        return line


@pytest.mark.parametrize(
    ("phase", "script"),
    [
        ("HELO", {"EHLO": [b"", b"502 5.5.1 no\r\n"]}),
        ("EHLO", {"EHLO": [b"", b"250-peer\r\n"]}),
        ("EHLO", {"EHLO": [b"", b"55"]}),
        ("EHLO", {"EHLO": [b"", b"hello?"]}),
    ],
)
async def test_a_host_that_has_spoken_within_tls_is_not_sent_mail_in_the_clear(tmp_path, monkeypatch, contexts, phase, script):
    made = trust.Context(ssl.PROTOCOL_TLS_CLIENT)
    made.sessions = {}
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    monkeypatch.setattr(trust, "context_of", lambda *args: made)
    peer = Cut(phase, script, contexts[0])
    async with hosted(tmp_path, "one host", [peer], tls="may") as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: TRANSIENT}
        assert dispatcher.queue.finished[0][1][0].phase == "ehlo"
    assert peer.connections == 1 and not peer.clear


async def test_a_host_that_speaks_early_is_down_like_one_that_does_not_answer(tmp_path):
    """RFC 5321 4.3.1: one greeting."""
    peers = [Peer(OFFERS, {"banner": b"220 hi\r\n250 more\r\n"}), Peer(OFFERS, {})]
    async with hosted(tmp_path, "two smart hosts", peers, tls="off") as (dispatcher, site):
        for number in range(3):
            dispatcher.offer(message(number + 1))
            await finished(dispatcher, number + 1)
            for session in list(dispatcher.connections.pools["r"].idle):
                dispatcher.connections._sessions.retire(session)
        assert len(dispatcher.connections._opener.down(site.route)) == 1
    assert [peer.connections for peer in peers] == [1, 3]


@pytest.mark.parametrize(
    ("tls", "said", "kind"),
    [
        ("may", b"530 5.7.0 Must issue a STARTTLS command first\r\n", TRANSIENT),
        ("may", b"530\r\n", TRANSIENT),
        ("may", b"523 5.7.10 encryption needed\r\n", TRANSIENT),
        ("may", b"554 5.7.1 TLS required\r\n", TRANSIENT),
        ("may", b"550 5.7.1 connection must be encrypted\r\n", TRANSIENT),
        ("may", b"550 5.1.1 no such user\r\n", PERMANENT),
        ("off", b"530 5.7.0 Must issue a STARTTLS command first\r\n", PERMANENT),
    ],
)
@pytest.mark.parametrize("phase", ["MAIL", "RCPT", "DATA"])
async def test_what_wants_tls_after_tls_failed_is_temporary(tmp_path, phase, tls, said, kind):
    """RFC 3207 4. The handshake is cut: the host has no certificate."""
    peer = Peer(OFFERS + b"STARTTLS\r\n", {phase: said, "STARTTLS": [b"220 go\r\n"]})
    async with hosted(tmp_path, "one host", [peer], tls=tls) as (dispatcher, _):
        assert await outcome(dispatcher, message()) == {0: kind}
    assert peer.connections == (2 if tls == "may" else 1)
