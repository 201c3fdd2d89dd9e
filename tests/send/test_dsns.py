"""DSNs: one message, whatever the original message holds, and nothing in it that only operators may read."""

import asyncio
import base64
import contextlib
import email
import email.message
import quopri
import re
import smtplib
import socket
import ssl
import threading
from email import policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from aiosmtplib import SMTPAuthenticationError, SMTPConnectTimeoutError, SMTPHeloError, SMTPResponseException
from aiosmtplib.errors import SMTPConnectResponseError

from relaymta.config import OAuth
from relaymta.errors import Failure, redacted, told, without
from relaymta.proto.dsn import failure_dsn
from relaymta.proto.envelope import Attempt, Envelope, RecipientState, decode_recipient, encode
from relaymta.proto.smtp_client import stuff
from relaymta.send.connect import Peer, _failure
from relaymta.send.login import LoginFailed
from relaymta.send.oauth import Exchanges, TokenError
from tests.speedups import oracle
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx

EVIL = "Subject: x\r\n.\r\nMAIL FROM:<ceo@bank.example>\r\nRCPT TO:<victim@d.example>\r\nDATA\r\nSubject: forged\r\n"
CHUNKING = {"EHLO": b"250-fake\r\n250-PIPELINING\r\n250 CHUNKING\r\n"}


def send_raw(relay: Relay, domain: str, header: str, body: str = "x\r\n") -> None:
    """From and to a domain: the DSN, too, is for its route."""
    with smtplib.SMTP("127.0.0.1", relay.port) as client:
        client.sendmail(f"a@{domain}", [f"nobody@{domain}"], (header + "\r\n" + body).encode())


def routes_to(peers: dict[str, FakeMx]) -> str:
    """The domain NAME.test has a route of its own, to the peer of this name."""
    rows = (f'{{name="{name}",recipient_domain=["{name}.test"],hosts=["127.0.0.1:{peer.port}"]}}' for name, peer in peers.items())
    return f"route=[{','.join(rows)}]"


def test_a_dot_ends_nothing(tmp_path):
    """A next hop must not execute as commands what follows a dot in the original header (SMTP smuggling). Each row: the peer's
    extensions, and the size of a message that is in memory or streamed. And a large message has dots at the borders of its
    pieces."""
    rows = {
        f"{name}-{how}": (rules, size)
        for name, size in (("memory", 1), ("streamed", 1_500_000))
        for how, rules in (("data", {}), ("bdat", CHUNKING))
    }
    dots = "".join("." * (n % 5) + "y" * (n % 97) + "\r\n" for n in range(30_000))
    with contextlib.ExitStack() as stack:
        peers = {
            name: stack.enter_context(FakeMx(rules | {"RCPT": {f"nobody@{name}.test": b"550 5.1.1 no\r\n"}}))
            for name, (rules, _) in rows.items()
        }
        large = stack.enter_context(FakeMx({}))
        relay = stack.enter_context(Relay(tmp_path, None, routes_to(peers | {"large": large})))
        send_raw(relay, "large.test", "Subject: large\r\n", dots)
        for name, (_, size) in rows.items():
            send_raw(relay, f"{name}.test", EVIL, ("x" * 70 + "\r\n") * (size // 72 + 1))
        wait_for(lambda: all(peer.messages for peer in peers.values()), what=f"a DSN of each: {rows.keys()}")
        for name in rows:
            relay.send("Subject: the next\r\n\r\n.\r\n..\r\n", f"a@{name}.test", f"c@{name}.test")
        wait_for(lambda: all(len(peer.messages) >= 2 for peer in peers.values()) and relay.summary() == [])
        for name, peer in peers.items():
            sender, to, data = peer.messages[0]
            assert (sender, to) == ("", [f"a@{name}.test"]), name
            assert EVIL.encode() in data, (name, "unchanged")
            recipients = [to for _, to, _ in peer.messages]
            assert recipients == [[f"a@{name}.test"], [f"c@{name}.test"]], (name, "nobody else got anything")
            assert peer.messages[1][2].endswith(b"\r\n\r\n.\r\n..\r\n"), name
            chunked = "BDAT" in {command[:4] for command in peer.commands}
            assert chunked == name.endswith("bdat"), (name, peer.commands)
        ((_, _, data),) = large.messages
        assert data.endswith(b"Subject: large\r\n\r\n" + dots.encode()), "large"


NASTY = ["\r\n.\r\nQUIT\r\n", "a\rb", "a\nb", "a\0b", "\n.\n", "\r.\r", "\u2028x\x85y\x0bz", "ü" * 600, "x" * 3000]


@pytest.mark.parametrize("nasty", NASTY, ids=repr)
@pytest.mark.parametrize("where", ["header", "recipient", "reply", "phase", "peer", "enhanced", "sender", "inside"])
@pytest.mark.parametrize("utf8", [False, True])
def test_no_line_of_a_dsn_holds_what_ends_a_line(nasty, where, utf8):
    given = {name: nasty if name == where else "x" for name in ("recipient", "reply", "phase", "peer", "enhanced", "inside")}
    attempt = Attempt(
        0, "permanent", given["phase"], given["peer"], 550, given["enhanced"], given["reply"], "kept inside " + given["inside"]
    )
    envelope = Envelope(nasty if where == "sender" else "a@b", [], 1, 0, 0, 0)
    address = given["recipient"] + ("@ü" if utf8 else "@d")
    header = b"Subject: " + (nasty.encode() if where == "header" else b"x") + b"\r\n"
    data = failure_dsn(
        envelope, [(address, attempt, False)], header, hostname="relay.example", ident="I", original_ident="O", seconds=0
    )
    lines = data.split(b"\r\n")
    assert all(not re.search(rb"[\r\n\0]", line) and len(line) <= 998 for line in lines)
    assert lines[-1] == b"" and not any(b"kept inside" in line for line in lines)
    assert oracle.unstuff(b"".join(stuff([data]))) == (data, b""), "and the receiver gets it unchanged"
    report = email.message_from_bytes(data, policy=policy.default)
    assert report.get_content_type() == "multipart/report" and len(list(report.iter_parts())) == 3
    assert report["To"] is not None and report["Auto-Submitted"] == "auto-replied"


def test_the_returned_header_cannot_end_its_part():
    attempt = Attempt(0, "permanent", "rcpt", "mx", 550, "5.1.1", "no")
    data = failure_dsn(
        Envelope("a@b", [], 1, 0, 0, 0), [("c@d", attempt, False)], b"Subject: x\r\n--=_I\r\nContent-Type: text/html\r\n",
        hostname="relay.example", ident="I", original_ident="O", seconds=0,
    )  # fmt: skip
    assert len(list(email.message_from_bytes(data, policy=policy.default).iter_parts())) == 3


REPLIES = [
    "no such user", "x " * 1500, "y" * 2000, "Benutzer unbekannt: müller", "nein\u202e\x1b[31m\x00\r\n.\r\nQUIT", "caf\ufffd", "",
    "=?x", "--=_I", "a\tb   c", "日本語 " * 300,
]  # fmt: skip
HEADERS = {
    "ascii": b"Subject: x\r\nTo: c@d\r\n",
    "UTF-8": "Subject: grün\r\n".encode(),
    "latin-1": b"Subject: gr\xfcn\r\n",
    "long lines": b"Subject: " + b"x" * 3000 + b"\r\n",
    "none": b"",
}


@pytest.mark.parametrize("reply", REPLIES, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("sender", ["a@b.example", "ä@b.example"])
@pytest.mark.parametrize("recipient", ["c@d.example", "ü@d.example"])
def test_a_dsn_is_mime_by_its_content(reply, header, sender, recipient):
    """RFC 2045, 3464, 6522, 6533: charset and encoding are those of the content; only a sender with a UTF-8 address, whose host
    therefore offers 8BITMIME, gets 8-bit octets."""
    attempt = Attempt(0, "permanent", "rcpt", "mx.d.example", 550, "5.1.1", reply)
    data = failure_dsn(
        Envelope(sender, [], 1, 0, 0, 0), [(recipient, attempt, False)], header,
        hostname="relay.example", ident="I", original_ident="O", seconds=0,
    )  # fmt: skip
    utf8 = not sender.isascii()
    assert utf8 or data.isascii(), "7-bit for 7-bit hosts"
    assert all(len(line) <= 998 and not re.search(rb"[\0\r\n]", line) for line in data.split(b"\r\n"))
    report = email.message_from_bytes(data, policy=policy.SMTPUTF8)
    text, status, returned = report.iter_parts()
    assert not any(part.defects for part in (report, text, status, returned))
    assert str(report["To"]).strip("<>") == sender
    encodings = {str(part["Content-Transfer-Encoding"]) for part in (text, status, returned)}
    assert ("8bit" in encodings) == (str(report["Content-Transfer-Encoding"]) == "8bit") == (b"8bit" in data)
    assert encodings <= ({"7bit", "8bit", "quoted-printable"} if utf8 else {"7bit", "quoted-printable"})
    shown = text.get_content()
    assert shown.isascii() == (text.get_content_charset() == "us-ascii")
    words = " ".join("".join(c if c.isprintable() else " " for c in reply[:4096]).split())
    assert words.replace(" ", "") in "".join(shown.split()), "people can read the whole reply"
    assert status.get_content_type() == f"message/{'' if recipient.isascii() else 'global-'}delivery-status"
    fields = email.message_from_bytes(_decoded(status, data).split(b"\r\n\r\n", 1)[1], policy=policy.SMTPUTF8)
    kind = "rfc822" if recipient.isascii() else "utf-8"
    assert (fields["Action"], str(fields["Final-Recipient"]), fields["Status"]) == ("failed", f"{kind}; {recipient}", "5.1.1")
    known = words if kind == "utf-8" else words.encode("ascii", "replace").decode()
    assert str(fields["Diagnostic-Code"]).replace(" ", "") == f"smtp; 550 5.1.1 {known}".replace(" ", "")
    expected = "message/global-headers" if header == HEADERS["UTF-8"] else "text/rfc822-headers"
    assert returned.get_content_type() == expected
    lines = [line[:998] for line in header.split(b"\r\n")]
    assert _decoded(returned, data).rstrip() == b"\r\n".join(lines).rstrip()


def _decoded(part: email.message.EmailMessage, data: bytes) -> bytes:
    """The content of a part without its transfer encoding; the parser does not decode message/ types."""
    begin = data.index(f"Content-Type: {part.get_content_type()}".encode())
    raw = data[data.index(b"\r\n\r\n", begin) + 4 :].split(b"\r\n--=_I")[0]
    return quopri.decodestring(raw) if part["Content-Transfer-Encoding"] == "quoted-printable" else raw


def test_a_long_reply_is_folded_between_words():
    attempt = Attempt(0, "permanent", "rcpt", "mx", 550, "5.7.1", "this is why " * 60)
    data = failure_dsn(
        Envelope("a@b", [], 1, 0, 0, 0), [("c@d", attempt, False)], b"", hostname="h", ident="I", original_ident="O", seconds=0
    )
    assert all(len(line) <= 78 for line in data.split(b"\r\n"))


# The sender's local part, the options of its MAIL, what the peer offers, and the options of the MAIL of the DSN.
NEEDS = {
    "full": ("a", "", "8BITMIME SMTPUTF8", ""),
    "bare": ("a", "", "", ""),
    "ascii": ("a", " SMTPUTF8", "8BITMIME SMTPUTF8", ""),  # RFC 6531 3.2: nothing in the DSN needs it
    "utf8": ("ä", " SMTPUTF8", "8BITMIME SMTPUTF8", " BODY=8BITMIME SMTPUTF8"),
}


def test_what_a_dsn_needs_is_said_to_the_peer(tmp_path):
    """A reply in UTF-8 and an 8-bit header; a 7-bit host, too, accepts the DSN about them."""
    peers = {}
    with contextlib.ExitStack() as stack:
        for name, (_, _, offers, _) in NEEDS.items():
            ehlo = "".join(f"250-{word}\r\n" for word in ("fake", *offers.split())) + "250 PIPELINING\r\n"
            rules = {"EHLO": ehlo.encode(), "RCPT": {f"nobody@{name}.test": "550 5.1.1 unbekannt: müller\r\n".encode()}}
            peers[name] = stack.enter_context(FakeMx(rules))
        relay = stack.enter_context(Relay(tmp_path, None, routes_to(peers)))
        for name, (local, options, _, _) in NEEDS.items():
            with smtplib.SMTP("127.0.0.1", relay.port) as client:
                client.command_encoding = "utf-8"
                client.ehlo()
                client.docmd("MAIL", f"FROM:<{local}@{name}.test>{options}")
                client.docmd("RCPT", f"TO:<nobody@{name}.test>")
                code, text = client.data(b"Subject: plain\r\n\r\nx\r\n")
                assert code == 250, (name, text)
        wait_for(lambda: all(peer.messages for peer in peers.values()), what=f"a DSN of each: {NEEDS.keys()}")
        for name, (local, _, offers, expected) in NEEDS.items():
            ((_, to, data),) = peers[name].messages
            assert to == [f"{local}@{name}.test"], name
            assert data.isascii() == (not expected), name
            said = "MAIL FROM:<>" + (f" SIZE={len(data)}" if "SIZE" in offers else "") + expected
            assert peers[name].mails[-1] == said, name


# The text for the sender and the cause for operators


def test_an_attempt_with_and_without_a_cause_is_read():
    """One of this version, and one of a version that stored no cause."""
    now = encode(RecipientState(0, [Attempt(1, "transient", "auth", "mx", 0, "4.4.1", "logging in failed", "password_file /x")]))
    state = decode_recipient(now)
    assert (state.attempts[0].whole, state.attempts[0].cause) == ("4.4.1 logging in failed", "4.4.1 password_file /x")
    old = encode([0, [[1, "transient", "rcpt", "mx", 450, "4.2.0", "busy"]]])
    assert decode_recipient(old).attempts[0].cause == "450 4.2.0 busy"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token endpoint https://id.example/token?key=abc&x=1: 401", "token endpoint https://id.example/token?***: 401"),
        ("look-up at http://user:pa%2Fss@10.0.0.1:80/r: refused", "look-up at http://***@10.0.0.1:80/r: refused"),
        ("https://a:b@c@d.example/x#frag end", "https://***@d.example/x?*** end"),
        ('{"access_token": "abc.def", "x": 1}', '{"access_token": "***", "x": 1}'),
        ("client_secret=hunter2&grant_type=x", "client_secret=***&grant_type=x"),
        ("password = hunter2", "password = ***"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ("refused Bearer abcdef123", "refused Bearer ***"),
        ("the token eyJhbGciOiJub25lIn0.eyJhIjoxfQ.c2ln is old", "the token *** is old"),
        ("the host offers AUTH PLAIN LOGIN, not SCRAM-SHA-256", "the host offers AUTH PLAIN LOGIN, not SCRAM-SHA-256"),
        ("password_file /etc/x: No such file", "password_file /etc/x: No such file"),
    ],
)
def test_secrets_are_hidden_from_operators_too(text, shown):
    assert redacted(text) == shown
    assert str(Failure("public", text)) == shown
    assert Failure("public", text).cause == shown
    assert Failure(text).public == text, "a public text may hold a link"


def test_hiding_secrets_takes_linear_time():
    for text in ("://" * 100_000, "://@" * 100_000, "eyJ" * 100_000, "password=" * 100_000):
        assert len(redacted(text)) <= 2000


def test_only_a_failure_is_public():
    assert told("ours") == ("ours", "")
    assert told(Failure("public", "cause")) == ("public", "cause")
    assert told(KeyError("/etc/secret"))[0] == "internal error"


HOST = Peer("mail.example", "192.0.2.1", 587)
SOCKET = Peer("unix:/run/secret/lmtp", "", 0, "/run/secret/lmtp")


@pytest.mark.parametrize(
    ("peer", "phase", "error", "public", "cause"),
    [
        (HOST, "auth", TokenError("token endpoint https://x.example/t?k=hunter2: 401"), "mail.example: no access", "/t?***: 401"),
        (HOST, "auth", LoginFailed("password_file /etc/secret: gone"), "mail.example: logging in", "/etc/secret"),
        (HOST, "auth", SMTPAuthenticationError(535, "5.7.8 no: password=hunter2"), "mail.example: logging in", "535 5.7.8 no"),
        (HOST, "connect", SMTPConnectResponseError(554, "5.7.1 see bl.example:?p=1"), "see bl.example:?p=1", "554 5.7.1 see bl"),
        (HOST, "ehlo", SMTPHeloError(451, "caf\udce9"), "caf\ufffd", "451 caf"),
        (HOST, "connect", ConnectionRefusedError(111, "Connect failed ('192.0.2.1', 587)"), "mail.example: Connection", "587"),
        (HOST, "connect", OSError("Multiple exceptions: [Errno 111] ('192.0.2.1', 1)"), "mail.example: no usable", "192.0.2.1"),
        (HOST, "connect", SMTPConnectTimeoutError("Timed out: 192.0.2.1 on port 587"), "mail.example: timed out", "587"),
        (HOST, "starttls", ssl.SSLCertVerificationError("CN=secret (_ssl.c:1006)"), "mail.example: its certificate", "_ssl.c"),
        (HOST, "connect", socket.gaierror(-2, "Name or service not known"), "mail.example: its name", "Name or service"),
        (HOST, "ehlo", SMTPResponseException(-1, "Malformed SMTP response"), "mail.example: it sent an invalid", "Malformed"),
        (SOCKET, "connect", FileNotFoundError(2, "gone", "/run/secret/lmtp"), "a local socket: No such file", "/run/secret"),
        (HOST, "ehlo", KeyError("/opt/x.py"), "mail.example: no usable connection", "/opt/x.py"),
    ],
)  # fmt: skip
def test_each_failure_to_connect_has_a_public_text(peer, phase, error, public, cause):
    failure = _failure(phase, peer, error)
    assert failure.public.startswith(public) and cause in str(failure)
    answered = failure.said is not None  # a greeting of 554 is the peer's fault, not the network's
    ours = phase == "auth" or isinstance(error, FileNotFoundError)
    assert failure.fault == ("us" if ours else "peer" if answered or phase != "connect" else "network")
    assert "hunter2" not in str(failure) + failure.public + (failure.said.whole if failure.said is not None else "")
    for secret in ("/", "192.0.2.1", "_ssl", "[Errno", "password"):
        assert secret not in failure.public
    assert (failure.said is not None) == (isinstance(error, SMTPResponseException) and error.code > 0)


class Refuses(BaseHTTPRequestHandler):
    """A look-up or token endpoint that quotes what it received."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400)
        self.end_headers()
        self.wfile.write(b'{"error_description": "you sent ' + sent.replace(b"=", b" ") + b'"}')

    def log_message(self, *args: object) -> None:
        """Log nothing."""


def test_what_a_token_endpoint_quotes_is_hidden(tmp_path):
    (tmp_path / "secret").write_text("hunter2")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/t?qu3ry=1"
    settings = OAuth(token_url=url, client_id="me", client_secret_file=str(tmp_path / "secret"))
    with pytest.raises(TokenError) as failure:
        asyncio.run(Exchanges(lambda name: "", lambda name, token: asyncio.sleep(0)).get(settings))
    server.shutdown()
    assert "you sent client_id me" in str(failure.value)
    assert failure.value.public == "no access token for the next host is available now"
    assert "hunter2" not in str(failure.value) and "qu3ry" not in str(failure.value)


SECRETS = ("://", "hunter2", "qu3ry", "s3cr3t", "hush", "Traceback", ".py:", "/secret", "[Errno", "passwords/")


# Where mail for NAME.test goes, and what operators read of why that failed.
LEAKS = {
    "look-up": (
        'lookup="http://hush:hunter2@127.0.0.1:{http}/r?qu3ry=1"',
        "look-up of look-up.test at http://***@127.0.0.1:{http}/r?***: 503",
    ),
    "connect": ('hosts=["127.0.0.1:{closed}"]', "127.0.0.1: "),
    "socket": ('hosts=["unix:{folder}/secret/lmtp"],protocol="lmtp"', "/secret/lmtp"),
}


def test_a_dsn_holds_no_secrets(tmp_path):
    """The DSN of an expired message quotes its last attempt."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    values = {"{http}": str(server.server_port), "{closed}": str(free_port()), "{folder}": str(tmp_path)}

    def filled(text: str) -> str:
        for name, value in values.items():
            text = text.replace(name, value)
        return text

    with FakeMx({}) as back:
        routes = [f'{{name="{name}",recipient_domain=["{name}.test"],{filled(route)}}}' for name, (route, _) in LEAKS.items()]
        routes.insert(0, f'{{name="back",sender=[""],hosts=["127.0.0.1:{back.port}"]}}')
        settings = (f"route=[{','.join(routes)}]", "delivery.first_retry=0.3", "queue.max_age=1")
        with Relay(tmp_path, None, *settings) as relay:
            for name in LEAKS:
                send_raw(relay, f"{name}.test", "Subject: x\r\n")
            deferred = wait_for(lambda: found if len(found := events_by_domain(relay, "deferred")) == len(LEAKS) else None)
            explained = {
                name: relay.cli("message", "explain", deferred[name]["id"], check=False).stdout for name in LEAKS
            }  # fmt: skip
            wait_for(lambda: len(back.messages) == len(LEAKS), what=f"a DSN of each: {LEAKS.keys()}")
            dsns = {to[0].removeprefix("a@").removesuffix(".test"): data for _, to, data in back.messages}
            bounced = wait_for(lambda: found if len(found := events_by_domain(relay, "bounced")) == len(LEAKS) else None)
            for name, (_, cause) in LEAKS.items():
                assert filled(cause) in bounced[name]["reply"], (name, "operators read the cause")
                assert bounced[name]["expired"] is True and bounced[name]["sender"] == f"a@{name}.test"
                told_to_sender, data = dsns[name].partition(b"Content-Type: text/rfc822-headers")[0], dsns[name]
                for secret in SECRETS:
                    assert secret.encode() not in told_to_sender, (name, secret, data.decode())
                for secret in ("hunter2", "qu3ry", "hush"):
                    assert secret not in relay.log.read_text() + explained[name], (name, secret)
    server.shutdown()


def events_by_domain(relay: Relay, name: str) -> dict[str, dict[str, str]]:
    """The first event of this name about each domain NAME.test, by NAME."""
    found: dict[str, dict[str, str]] = {}
    for event in relay.events(name):
        found.setdefault(event["recipient"].rpartition("@")[2].removesuffix(".test"), event)
    return found


def test_parts_of_a_secret_are_hidden_too():
    secret = base64.b64encode(b"\0joe\0hunter2secret").decode()
    for text in (secret, secret.rstrip("="), secret[:-7], secret.upper(), "hunter2secr", f"{secret[:12]}\n{secret[12:]}"):
        assert "***" in without(f"unknown: AUTH PLAIN {text}", ["hunter2secret", secret]), text
        assert text not in without(f"unknown: AUTH PLAIN {text}", ["hunter2secret", secret])
    assert without("535 5.7.8 authentication failed", ["hunter2secret", secret]) == "535 5.7.8 authentication failed"


def test_a_dsn_about_many_recipients_is_bounded():
    attempt = Attempt(1, "permanent", "rcpt", "mx", 550, "5.1.1", "\u00e9" * 4096)
    for count, most in ((1, 40_000), (64, 2_000_000), (1000, 5_000_000)):
        failed = [(f"a{number}@b.example", attempt, False) for number in range(count)]
        envelope = Envelope(sender="s@x.example", recipients=[row[0] for row in failed], size=1, flags=0, arrived=1, deadline=2)
        data = failure_dsn(envelope, failed, b"", hostname="r.example", ident="1", original_ident="2", seconds=1)
        assert len(data) < most, count
