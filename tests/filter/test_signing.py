"""Signed mail, verified by dkimpy and opendkim."""

import functools
import json
import os
import re
import signal
import smtplib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import dkim
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from relaymta.cli import main
from relaymta.config import Dkim
from relaymta.errors import ConfigError
from relaymta.filter.keys import load_key, record
from relaymta.filter.signatory import sign_hash
from relaymta.filter.signatures import Verified, claims, verify
from relaymta.filter.signing import Draft, Signer, SigningKey, Unsignable
from relaymta.metrics import Counters
from relaymta.proto.dkim import BodyHashes, signed, split_fields
from relaymta.proto.header import header_end
from relaymta.shm import Shared
from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need
from tests.support.resolver import nameserver_with

MESSAGE = (
    b"From: Ann <ann@Shop.test>\r\nTo: bob@far.test,\r\n\tcat@far.test\r\nSubject: many   spaces \r\n"
    b"Date: Wed, 25 Nov 2026 22:00:00 +0000\r\nReceived: from x by y; z\r\nReceived: from u by v; w\r\n"
    b"X-Other: not signed\r\n\r\nHello \t there  \r\n\r\n. a dot\r\n \r\nend\r\n\r\n\r\n"
)
PAIRS = ["relaxed/relaxed", "relaxed/simple", "simple/relaxed", "simple/simple"]


@functools.cache
def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """The same in all tests: making one takes long."""
    return rsa.generate_private_key(65537, bits)


def write_key(path: Path, kind: str, bits: int = 2048) -> Path:
    private = rsa_key(bits) if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return path


def keys(folder: Path, **others: object) -> list[Dkim]:
    return [
        Dkim(domain="shop.test", selector=kind, key=str(write_key(folder / f"{kind}.pem", kind)), **others)
        for kind in ("rsa", "ed25519")
    ]


def verified(message: bytes, settings: list[Dkim]) -> list[bool]:
    """dkimpy's result for each signature, in order."""
    records = {f"{one.selector}._domainkey.{one.domain}.".encode(): record(load_key(one)).encode() for one in settings}
    count = len(re.findall(rb"(?mi)^dkim-signature:", message))
    return [
        dkim.DKIM(message).verify(idx=number, dnsfunc=lambda name, timeout=5: records.get(name, b"")) for number in range(count)
    ]


def sign(message: bytes, settings: list[Dkim]) -> bytes:
    """A message signed without a relay."""
    end = header_end(message)
    draft = Draft(split_fields(message[:end]), [load_key(one) for one in settings], end, 1_795_000_000)
    draft.body.feed(message)
    return b"".join(signed(one.own, sign_hash(one.key.private, one.hashed)) for one in draft.unsigned()) + message


@pytest.mark.parametrize("pair", PAIRS)
def test_dkimpy_accepts_both_algorithms_and_all_forms(tmp_path, pair):
    settings = keys(tmp_path, canonicalization=pair)
    message = sign(MESSAGE, settings)
    assert verified(message, settings) == [True, True]
    spoiled = [
        message.replace(b"end\r\n", b"end!\r\n"), message.replace(b"Ann <ann@", b"Eve <ann@"),
        message.replace(b"X-Other", b"From: eve@evil.test\r\nX-Other"),  # and no From can be added,
        message.replace(b"X-Other", b"Reply-To: eve@evil.test\r\nX-Other"),  # nor a field that was absent
    ]  # fmt: skip
    for changed in spoiled:
        try:
            assert verified(changed, settings) == [False, False]
        except dkim.ValidationError as error:
            assert "body hash mismatch" in str(error)


@pytest.mark.parametrize("pair", PAIRS)
def test_opendkim_accepts_both_algorithms_and_all_forms(tmp_path, pair):
    program = need("opendkim")
    settings = keys(tmp_path, canonicalization=pair)
    (tmp_path / "public").write_text(
        "".join(f"{one.selector}._domainkey.{one.domain} {record(load_key(one))}\n" for one in settings)
    )
    (tmp_path / "conf").write_text(f"Mode v\nTestPublicKeys {tmp_path}/public\nSyslog no\n")
    for number, one in enumerate(settings):  # it reports the first signature only
        path = tmp_path / f"message{number}"
        for message, expected in ((sign(MESSAGE, [one]), True), (sign(MESSAGE, [one]).replace(b"end", b"END"), False)):
            path.write_bytes(message)
            command = [program, "-x", str(tmp_path / "conf"), "-t", str(path), "-vv"]
            found = subprocess.run(command, capture_output=True, text=True)
            assert ("verification (s=" in found.stdout and ") succeeded" in found.stdout) is expected, found.stdout


def opendkim(folder: Path, message: bytes, one: Dkim) -> bool:
    """Whether opendkim accepts the first signature."""
    (folder / "public").write_text(f"{one.selector}._domainkey.{one.domain} {record(load_key(one))}\n")
    (folder / "conf").write_text(f"Mode v\nTestPublicKeys {folder}/public\nSyslog no\n")
    (folder / "message").write_bytes(message)
    command = [need("opendkim"), "-x", str(folder / "conf"), "-t", str(folder / "message"), "-vv"]
    found = subprocess.run(command, capture_output=True, text=True)
    return "verification (s=" in found.stdout and ") succeeded" in found.stdout


def signed_names(message: bytes) -> list[str]:
    """The names in h= of the first signature."""
    found = re.search(rb"\sh=([^;]*);", message)
    assert found is not None
    return [name.strip().decode() for name in found[1].split(b":")]


@pytest.mark.parametrize("form", ["relaxed/relaxed", "simple/simple"])
@pytest.mark.parametrize(
    ("over", "signed"),
    [(["x-a"], []), (["From", "X-A", "x-a"], []), (["x-a", "received"], []), (["x-a"], ["x-a"]), (["subject"], ["x-a"]),
     (["list-id", "x-a"], []), (["to"], [])],
)  # fmt: skip
@pytest.mark.parametrize("count", range(4))
def test_an_oversigned_field_is_signed_once_more_than_it_occurs(count, over, signed, form, tmp_path):
    """RFC 6376 5.4, 8.15; with From: in any case (5.4)."""
    own = Dkim(domain="shop.test", selector="s", key=str(write_key(tmp_path / "s.pem", "ed25519")),
               oversigned=over, signed=signed, canonicalization=form)  # fmt: skip
    fields = [b"X-A: %d\r\n" % number for number in range(count)]
    message = sign(b"".join(fields[:2]) + MESSAGE.replace(b"\r\n\r\n", b"\r\n" + b"".join(fields[2:]) + b"\r\n", 1), [own])
    assert verified(message, [own]) == [True] and opendkim(tmp_path, message, own)
    names = signed_names(message)
    for name in dict.fromkeys(map(str.lower, over)):
        there = len(re.findall(rf"(?mi)^{name}:".encode(), message.partition(b"\r\n\r\n")[0]))
        assert names.count(name) == there + 1, names
        added = message.replace(b"From: Ann", name.encode() + b": another\r\nFrom: Ann", 1)
        assert verified(added, [own]) == [False]
    assert names.count("x-a") == ("x-a" in [*over, *signed]) * count + ("x-a" in over) and "from" in names


@pytest.mark.parametrize("form", ["relaxed/relaxed", "simple/simple", "simple/relaxed"])
@pytest.mark.parametrize("field", [b"Subject : one", b"SUBJECT  : one ", b"Subject :one", b"X : y\r\nSubject: one"])
def test_a_field_with_white_space_in_front_of_its_colon_is_signed(field, form, tmp_path):
    """RFC 5322 4.5: the obsolete syntax of the same field. Simple canonicalization keeps the white space (RFC 6376 3.4.1)."""
    key = str(write_key(tmp_path / "s.pem", "ed25519"))
    own = Dkim(domain="shop.test", selector="s", key=key, canonicalization=form)
    message = sign(b"From: ann@shop.test\r\n" + field + b"\r\n\r\nx\r\n", [own])
    assert signed_names(message).count("subject") == 2 and signed_names(message).count("from") == 2
    assert b":one" in field or opendkim(tmp_path, message, own)  # -t writes `: ` itself
    assert [one.result for one in by_us(message, own)] == ["pass"]
    assert [one.result for one in by_us(b"Subject : two\r\n" + message, own)] == ["fail"]
    assert [one.result for one in by_us(message.replace(b"one", b"two"), own)] == ["fail"]
    author = sign(message.replace(b"From:", b"From\t:"), [own])  # which opendkim does not take for From:
    assert signed_names(author).count("from") == 2 and by_us(author, own)[0].result == "pass"


def by_us(message: bytes, one: Dkim) -> list[Verified]:
    said = claims(message[: header_end(message)])
    bodies = BodyHashes(said.forms())
    bodies.feed(message[header_end(message) :])
    name = f"{one.selector}._domainkey.{one.domain}"
    return verify(said, bodies.finish(), {name: record(load_key(one))}, 1_795_000_100)


def signer_of(*settings: Dkim) -> Signer:
    shared = Shared.create()
    signer = Signer(Counters(shared.counters(0)), None, lambda: 1_795_000_000)  # type: ignore[arg-type]
    signer.watched = [SigningKey(one) for one in settings]
    for key in signer.watched:
        key.refresh()
    return signer


@pytest.mark.parametrize(
    "written", ["dömain.test", "xn--dmain-jua.test", "DÖMAIN.test.", "XN--DMAIN-JUA.TEST", "do\u0308main.test"]
)
@pytest.mark.parametrize("author", ["dömain.test", "xn--dmain-jua.test", "DÖMAIN.TEST", "XN--dmain-jua.test", "dömain。test"])
async def test_a_domain_is_the_same_in_u_labels_and_a_labels(written, author, tmp_path):
    """RFC 6376 3.5: d= is written in A-labels, which all verifiers read (RFC 8616 5)."""
    own = Dkim(domain=written, selector="s", key=str(write_key(tmp_path / "s.pem", "ed25519")))
    other = Dkim(domain="far.test", selector="s", key=own.key)
    below = Dkim(domain="esp.test", selector="s", key=own.key, authors=["." + written])
    signer = signer_of(own, other, below)
    message = f"From: Änn <ann@{author}>\r\nSubject: x\r\n\r\nx\r\n".encode()
    whole = signer.signatures(message) + message
    assert whole.count(b"DKIM-Signature:") == 1 and b" d=xn--dmain-jua.test;" in whole
    assert verified(whole, [own]) == [True]
    message = f"From: ann@shop.{author}\r\n\r\nx\r\n".encode()
    whole = signer.signatures(message) + message
    assert whole.count(b"DKIM-Signature:") == 1 and b" d=esp.test;" in whole


def test_a_text_without_a_header_has_a_good_signature_or_none(peer, tmp_path):
    """What is without From: cannot be signed (RFC 6376 5.4); and behind what is no field all is body, whatever it looks like."""
    own = Dkim(domain="shop.test", selector="s", key=str(write_key(tmp_path / "s.pem", "rsa")))
    everybody = Dkim(domain="esp.test", selector="s", key=own.key, authors=["*"], application=["news"])
    networks = 'network=[{networks=["127.0.0.2/32"],application="news"}]'
    texts = ["Hello\r\n", "Hello\r\n\r\nworld\r\n", "Hello\r\nFrom: ann@shop.test\r\n\r\nworld\r\n", "", "\r\nHello\r\n",
             "\r\nFrom: ann@shop.test\r\n\r\nHello\r\n", "Subject: x\r\n\r\nHello\r\n", "From:\r\n\r\nHello\r\n",
             "Hello\r\n" + "y" * 70 + "\r\n\r\n" + ("z" * 70 + "\r\n") * 20_000]  # fmt: skip
    rows = {f"{number}.{source}@far.test": (f"127.0.0.{source}", text) for source in (1, 2) for number, text in enumerate(texts)}
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", toml([own, everybody]), networks) as relay:
        for to, (address, text) in rows.items():
            if text.startswith("From:"):
                with pytest.raises(smtplib.SMTPDataError) as refused:
                    relay.send_from(address, text, (to,))
                assert refused.value.smtp_code == 550, to  # who signs it, is unknown
            else:
                relay.send_from(address, text, (to,))
        wait_for(lambda: len(peer.messages) == 2 * (len(texts) - 1))
    arrived = {to[0]: message for _, to, message in peer.messages}
    for to, (_, text) in rows.items():
        if not text.startswith("From:"):
            message = arrived.pop(to)
            assert all(verified(message, [own, everybody])), (to, text[:50])
            assert b"DKIM-Signature" not in message, (to, text[:50])
            assert message.endswith(text.encode()), (to, text[:50])
    assert not arrived


@pytest.fixture
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


def toml(settings: list[Dkim]) -> str:
    rows = []
    for one in settings:
        keys = one.model_dump(exclude_defaults=True)
        rows.append(", ".join(f"{key}={json.dumps(value)}" for key, value in keys.items()))
    return "dkim=[" + ", ".join("{" + row + "}" for row in rows) + "]"


def test_mail_through_the_relay_is_signed_by_its_authors_and_the_applications_keys(peer, tmp_path):
    own = keys(tmp_path)
    everybody = Dkim(domain="esp.test", selector="s", key=own[0].key, authors=["*"], application=["news"])
    below = Dkim(domain="corp.test", selector="s", key=own[1].key, authors=[".corp.test"])
    settings = [*own, everybody, below]
    networks = 'network=[{networks=["127.0.0.2/32"],application="news"},{networks=["127.0.0.3/32"],relay=false}]'
    more = (toml(settings), networks, 'relay.domains=["far.test"]')
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", *more) as relay:
        for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            relay.send_from(source, MESSAGE.decode(), ("bob@far.test",))
            wait_for(lambda source=source: len(peer.messages) == int(source[-1]))
        relay.send_from("127.0.0.1", "From: x@a.corp.test\r\n\r\nx\r\n", ("bob@far.test",))
        wait_for(lambda: len(peer.messages) == 4)
        messages = [message for _, _, message in peer.messages]
        assert [verified(message, settings) for message in messages] == [[True, True], [True] * 3, [], [True]]
        assert b"Received: from" in messages[0].partition(b"bh=")[2]  # the signatures are in front
        assert relay.metric("relaymta_dkim_signatures_total") == 6
        assert relay.metric('relaymta_dkim_seconds_count{op="sign"}') == 3  # messages
        assert relay.metric('relaymta_dkim_seconds_sum{op="sign"}') > 0


def test_a_dsn_is_signed_by_our_own_key(tmp_path):
    with FakeMx({"RCPT": {"nobody@far.test": b"550 5.1.1 no such user\r\n"}}) as peer:
        own = Dkim(domain="relay.example", selector="s", key=str(write_key(tmp_path / "s.pem", "rsa")))
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", toml([own])) as relay:
            relay.send(MESSAGE.decode(), "ann@shop.test", "nobody@far.test")
            ((sender, to, message),) = wait_for(lambda: peer.messages)
            assert (sender, to) == ("", ["ann@shop.test"]) and verified(message, [own]) == [True]
            assert relay.metric('relaymta_dkim_seconds_count{op="sign"}') == 1


class Submission(Relay):
    """Its listener is for submission."""

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], *found[at + 2 :], "--set", f'listener=[{{address="127.0.0.1:{self.port}", submission=true}}]']


CHANGED = [
    (b"Bcc: q@far.test\r\nFrom: root\r\n\r\n", b"\r\nFrom: root@relay.example\r\n\r\n"),
    (b"no header\r\n\r\n", b"+0000\r\n\r\nno header\r\n\r\n"),
    (b"From x Mon\r\nFrom: a@b\r\n\r\n", b"+0000\r\nX-Mailbox-Line: From x Mon\r\nFrom: a@b\r\n\r\n"),
]


def test_what_is_changed_in_a_message_is_changed_before_it_is_signed(peer, tmp_path):
    """In one that is in memory, and in a large one."""
    everybody = Dkim(domain="shop.test", selector="s", key=str(write_key(tmp_path / "s.pem", "rsa")), authors=["*"])
    line = b"x" * 900 + b"\r\n"
    rows = [(start, expected, line * count) for count in (1, 1_500) for start, expected in CHANGED]
    with Submission(tmp_path, f"127.0.0.1:{peer.port}", toml([everybody])) as relay:
        for number, (start, expected, body) in enumerate(rows, 1):
            with smtplib.SMTP("127.0.0.1", relay.port) as client:
                assert client.sendmail("ann@shop.test", ["bob@far.test"], start + body) == {}
            wait_for(lambda number=number: len(peer.messages) == number)
            _, _, message = peer.messages[-1]
            row = (start, len(body))
            assert message.endswith(expected + body) and b"Bcc" not in message, row
            assert verified(message, [everybody]) == ([True] if b"From:" in message[: -len(body)] else []), row


def given(client: smtplib.SMTP, message: bytes, piece: int = 0) -> tuple[int, bytes]:
    """The last reply to a message of ann@shop.test, by DATA, or by BDAT in pieces of so many octets."""
    client.ehlo()
    client.mail("ann@shop.test")
    client.rcpt("bob@far.test")
    if not piece:
        return client.data(message)
    assert client.sock is not None
    for start in range(0, len(message), piece):
        part = message[start : start + piece]
        last = start + piece >= len(message)
        client.sock.sendall(f"BDAT {len(part)}{' LAST' if last else ''}\r\n".encode() + part)
        answer = client.getreply()
        assert last or answer[0] == 250
    return answer


def test_a_large_message_is_signed_as_well(peer, tmp_path):
    settings = keys(tmp_path)
    filler = b"of many " * 12
    body = b"".join(b"line %d %s \r\n" % (number, filler) for number in range(14_000))
    message = MESSAGE + body
    with (
        Relay(tmp_path, f"127.0.0.1:{peer.port}", toml(settings)) as relay,
        smtplib.SMTP("127.0.0.1", relay.port) as client,
    ):  # fmt: skip
        for number, piece in enumerate((0, 300_001), 1):
            assert given(client, message, piece)[0] == 250, piece
            wait_for(lambda number=number: len(peer.messages) == number)
            _, _, found = peer.messages[-1]
            assert found.endswith(message) and verified(found, settings) == [True, True], piece
            assert relay.metric('relaymta_dkim_seconds_count{op="sign"}') == number


@pytest.mark.parametrize("matters", [True, False], ids=["From: matters", "it does not"])
def test_a_message_whose_signer_cannot_be_determined_is_refused(peer, tmp_path, matters):
    """Neither sent unsigned, nor signed for another author."""
    own, others = keys(tmp_path)[0], Dkim(domain="far.test", selector="s", key=str(tmp_path / "ed25519.pem"), application=["x"])
    long = b"X: " + b"x" * 900 + b"\r\n"
    rows = [  # the message, and the reply where From: matters; where it does not, all are accepted
        (b"From: ann@ok.test, <ann@shop.test\r\n\r\nx\r\n", b"550 5.6.0"),
        (b"Subject: x\r\nFrom: a@b.test(x)shop.test\r\n\r\nx\r\n", b"550 5.6.0"),
        (MESSAGE[:-2] + b"x" * 100 + b"\r\n", b"250"),
        (b"From: ann@shop.test\r\n" + long * 1300, b"554 5.6.0"),  # a large message whose header has no end
        (b"From: ann@shop.test\r\n" + long * 1300 + b"\r\nx\r\n", b"554 5.6.0"),
        (b"From: ann@shop.test\r\n" + long * 150 + b"\r\nx\r\n", b"554 5.6.0"),
        (b"From: ann@shop.test\r\n" + b"X:\r\n" * 5500 + b"\r\nx\r\n", b"554 5.6.0"),  # too many fields
        (b"From: ann@shop.test\r\n" + long * 100, b"250"),  # all of it is header
        (b"From: ann@shop.test\r\n\r\n" + long * 1300, b"250"),
    ]
    relay = Relay(tmp_path, f"127.0.0.1:{peer.port}", toml([own if matters else others]), 'relay.domains=["far.test"]')
    with relay, smtplib.SMTP("127.0.0.1", relay.port) as client:
        for chunked in (False, True):
            for message, expected in rows:
                code, said = given(client, message, len(message) if chunked else 0)
                assert (b"%d %s" % (code, said)).startswith(expected if matters else b"250"), (chunked, message[:60])
        wait_for(lambda: len(peer.messages) == 2 * (3 if matters else len(rows)))
    if matters:
        assert [verified(message, [own]) for _, _, message in peer.messages] == [[True]] * 6
    else:
        assert not any(b"DKIM-Signature" in message for _, _, message in peer.messages)


def test_a_broken_key_changes_nothing(peer, tmp_path):
    settings = keys(tmp_path)[:1]
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", toml(settings)) as relay:
        kept = Path(settings[0].key).read_text()
        Path(settings[0].key).write_text("broken")
        wait_for(lambda: relay.metric("relaymta_dkim_key_errors") == 1)
        relay.send(MESSAGE.decode())
        wait_for(lambda: peer.messages)
        Path(settings[0].key).write_text(kept)
        assert verified(peer.messages[0][2], settings) == [True]
        wait_for(lambda: relay.metric("relaymta_dkim_key_errors") == 0)


def test_mail_is_never_sent_unsigned_because_a_worker_could_not_read_the_key(peer, tmp_path):
    """The worker starts while the key's file is broken. Another key of the same domain will do."""
    two = keys(tmp_path)
    alone = Dkim(domain="alone.test", selector="s", key=two[0].key)
    spare = Dkim(domain=two[1].domain, selector="spare", key=str(tmp_path / "spare"))
    Path(spare.key).write_bytes(Path(two[1].key).read_bytes())
    settings = [alone, two[1], spare]
    messages = {domain: f"From: a@{domain}\r\n\r\nx\r\n" for domain in ("alone.test", two[1].domain, "nobody.test")}
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", toml(settings)) as relay:
        kept = Path(alone.key).read_bytes()
        for key in (alone.key, two[1].key):
            Path(key).write_text("broken")
        wait_for(lambda: relay.metric("relaymta_dkim_key_errors") == 2)
        (worker,) = relay.worker_pids()
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: any("no earlier version" in row["text"] for row in relay.events("warning")))
        for body in ("", "y" * 70 + "\r\n"):  # in memory, and in a file of its own
            with pytest.raises(smtplib.SMTPDataError) as refused:
                relay.send(messages["alone.test"] + body * 20_000)
            assert refused.value.smtp_code == 451 and refused.value.smtp_error.startswith(b"4.7.5")
        relay.send(messages[spare.domain])
        relay.send(messages["nobody.test"])
        wait_for(lambda: len(peer.messages) == 2)
        Path(alone.key).write_bytes(kept)
        wait_for(lambda: relay.metric("relaymta_dkim_key_errors") == 1)
        relay.send(messages["alone.test"])
        wait_for(lambda: len(peer.messages) == 3)
    by_author = {message.rpartition(b"From: a@")[2].partition(b"\r")[0]: message for _, _, message in peer.messages}
    assert verified(by_author[b"alone.test"], [alone]) == [True]
    assert verified(by_author[spare.domain.encode()], [spare]) == [True]
    assert verified(by_author[b"nobody.test"], []) == []


async def test_a_dsn_is_signed_by_the_keys_that_can_be_read(tmp_path):
    own, _ = keys(tmp_path)
    own = own.model_copy(update={"authors": ["*"]})
    missing = Dkim(domain="esp.test", selector="s", key=str(tmp_path / "none"), authors=["*"])
    shared = Shared.create()
    signer = Signer(Counters(shared.counters(0)), None, lambda: 1_795_000_000)  # type: ignore[arg-type]
    signer.watched = [SigningKey(one) for one in (own, missing)]
    for key in signer.watched:
        key.refresh()
    message = b"From: postmaster@relay.test\r\n\r\nx\r\n"
    assert verified(signer.signatures(message) + message, [own]) == [True]
    with pytest.raises(Unsignable, match="451"):
        signer.draft(b"", message, "")


def test_without_the_signing_process_a_thread_signs(peer, tmp_path):
    settings = keys(tmp_path)
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", toml(settings)) as relay:
        (worker,) = relay.worker_pids()
        first = wait_for(lambda: children(worker))
        for number, fault in ((1, signal.SIGKILL), (2, signal.SIGSTOP)):
            os.kill(first[0], fault)
            relay.send(MESSAGE.decode())  # while it is down; after it, once the wait for it has timed out
            wait_for(lambda number=number: len(peer.messages) == number)
            first = wait_for(lambda first=first: [pid for pid in children(worker) if pid not in first], 30)
            assert verified(peer.messages[-1][2], settings) == [True, True]
        relay.send(MESSAGE.decode())
        wait_for(lambda: len(peer.messages) == 3)
        assert verified(peer.messages[-1][2], settings) == [True, True] and children(worker) == first
        assert [event["text"] for event in relay.events("warning") if "signing process has ended" in event["text"]]
        assert relay.stop() == 0
        wait_for(lambda: not running(first[0]))


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def called(*words: str) -> Result:
    """A verb's exit status and output: in this process, where all that it imports is there already."""
    done = CliRunner().invoke(main, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_the_doctor_reports_whether_mail_from_here_would_pass(tmp_path):
    own = Dkim(domain="shop.test", selector="s", key=str(write_key(tmp_path / "s.pem", "ed25519")))
    records = [
        f's._domainkey.shop.test. TXT "{record(load_key(own))}"', 'shop.test. TXT "v=spf1 ip4:11.0.0.1 -all"',
        '_dmarc.shop.test. TXT "v=DMARC1; p=reject"', '_dmarc.bare.test. TXT "v=DMARC1; p=reject"', "mail.test. A 11.0.0.1",
    ]  # fmt: skip
    with nameserver_with(tmp_path, records, '  local-zone: "11.in-addr.arpa." static\n') as nameserver:

        def found(domain: str, address: str) -> tuple[int, dict[str, str]]:
            done = called(
                "doctor", "domain", domain, "--address", address, "--json", "--set", f'delivery.nameservers=["{nameserver}"]',
                "--set", toml([own]), "--set", "hostname=mail.test", "--spool", str(tmp_path / "spool"),
            )  # fmt: skip
            states = {row["check"].split(" ")[0]: row["state"] for row in map(json.loads, done.stdout.splitlines())}
            return done.exit_code, states

        assert found("shop.test", "11.0.0.1") == (1, {"PTR": "wrong", "SPF": "ok", "DKIM": "ok", "DMARC": "ok"})
        assert found("shop.test", "11.0.0.2") == (1, {"PTR": "wrong", "SPF": "wrong", "DKIM": "ok", "DMARC": "ok"})
        bare = {"address": "warning", "SPF": "warning", "DKIM": "warning", "DMARC": "wrong"}
        assert found("bare.test", "10.0.0.1") == (1, bare)
        assert found("none.test", "10.0.0.1")[0] == 0


@pytest.mark.parametrize(
    "values",
    [{"domain": "shop.test\r\nX: y"}, {"domain": "shop test"}, {"domain": ""}, {"domain": "a..b"}, {"domain": "shop.test;"},
     {"selector": "s\r\nX: y"}, {"selector": "s\t"}, {"selector": ""}, {"selector": "s;d=x"}, {"selector": "a" * 64},
     {"authors": ["shop.test", "x\r\n"]}, {"authors": ["."]}, {"signed": ["a:b"]}, {"signed": ["a\r\nb"]},
     {"oversigned": ["a b"]}, {"signed": ["a;b"]}, {"oversigned": [";"]}],
)  # fmt: skip
def test_what_cannot_be_in_a_signature_is_refused_in_the_configuration(values):
    with pytest.raises(ValueError, match=r"is not (a valid domain|the) name"):
        Dkim(**{"domain": "shop.test", "selector": "s", "key": "k", **values})


def test_what_each_signature_adds_cannot_be_oversigned():
    with pytest.raises(ValueError, match="each further signature"):
        Dkim(domain="shop.test", selector="s", key="k", oversigned=["From", "DKIM-Signature"])


@pytest.mark.parametrize(
    ("domain", "authors", "author", "signs"),
    [("Shop.Test", [], "shop.test", True), ("shop.test.", [], "shop.test", True), ("SHOP.test", [], "a.shop.test", False),
     ("esp.test", ["Shop.Test"], "shop.test", True), ("esp.test", [".Shop.Test"], "a.shop.test", True),
     ("esp.test", [".Shop.Test"], "shop.test", False), ("esp.test", [".shop.test"], "workshop.test", False),
     ("dömain.test", [], "xn--dmain-jua.test", True), ("esp.test", ["*"], "", True), ("shop.test", [], "", False)],
)  # fmt: skip
def test_a_key_is_for_a_domain_however_that_is_written(domain, authors, author, signs):
    assert Dkim(domain=domain, selector="s", key="k", authors=authors).signs(author) is signs


def test_wrong_keys_are_named(tmp_path):
    (tmp_path / "no.pem").write_text("nonsense")
    write_key(tmp_path / "small.pem", "rsa", 1024).write_bytes((tmp_path / "small.pem").read_bytes())
    for name, expected in (("none.pem", "No such file"), ("no.pem", "no private key in PEM form")):
        with pytest.raises(ConfigError, match=expected):
            load_key(Dkim(domain="d.test", selector="s", key=str(tmp_path / name)))
    assert load_key(Dkim(domain="d.test", selector="s", key=str(tmp_path / "small.pem"))).private.key_size == 1024


def test_keys_are_made_checked_and_replaced(tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text('[[listener]]\naddress = "127.0.0.1:1"\n')
    relay = Relay(tmp_path, None)

    def run(*words: str, nameserver: str = "127.0.0.1:1") -> tuple[int, str]:
        resolver = f'delivery.nameservers=["{nameserver}"]'
        found = called("dkim", *words, "--config", str(config), "--set", resolver, "--spool", str(tmp_path / "spool"))
        return found.exit_code, found.stdout + found.stderr

    status, said = run("keygen", "shop.test", "--selector", "one", "--out", str(tmp_path / "one.pem"))
    assert status == 0 and (tmp_path / "one.pem").stat().st_mode & 0o777 == 0o600
    line, _, table = said.partition("\n")
    (tmp_path / "conf.d").mkdir()
    keys = tmp_path / "conf.d/keys.toml"  # of several files, that which has the key is changed
    keys.write_text(table + "\n# a remark\n[limits]\nconnections = 9\n")
    first = config.read_text()
    create = ("app", "create", "shop", "--sender", "@shop.test", "--config", str(config))
    made = relay.cli(*create, "--set", f"accounts.file={tmp_path}/accounts.toml").stdout
    assert 'shop.test. TXT "v=spf1 a:' in made and line in made  # the record of its key
    assert run("keygen", "x.test", "--selector", "one", "--out", str(tmp_path / "one.pem"))[0] == 73  # never over another
    status, said = run("check")
    assert status == 1 and "the DNS look-up failed" in " ".join(said.split())

    with nameserver_with(tmp_path, []) as nameserver:
        assert "no record" in run("check", nameserver=nameserver)[1]
        status, said = run("rotate", "shop.test", "--selector", "two", "--out", str(tmp_path / "two.pem"), nameserver=nameserver)
        assert status == 1 and "the old key stays in use: no record" in said
        second = said.splitlines()[0]
    records = [line, second]
    with nameserver_with(tmp_path, records) as nameserver:
        assert run("check", nameserver=nameserver)[0] == 0
        status, said = run("rotate", "shop.test", "--selector", "two", "--out", str(tmp_path / "two.pem"), nameserver=nameserver)
        assert status == 0 and "remove one._domainkey.shop.test" in said
        text = keys.read_text()
        assert config.read_text() == first and said.splitlines()[1].startswith(f"{keys}: shop.test uses the selector two now")
        assert 'selector = "two"' in text and "two.pem" in text and "one.pem" not in text and "# a remark" in text
        assert run("check", nameserver=nameserver)[0] == 0
    # What lets no signature be verified: the same key by other names, each with a record of its own.
    spoilt = {"hash": ("v=DKIM1; ", "h=sha1; "), "service": ("v=DKIM1; ", "s=a; "), "version": ("DKIM1", "DKIM2"),
              "kind": ("k=rsa", "k=dsa")}  # fmt: skip
    used = keys.read_text()
    _, mark, table = used.partition("[[dkim]]")
    table = mark + table.partition("\n[")[0]
    assert 'selector = "two"' in table
    others = [table.replace('selector = "two"', f'selector = "{name}"') for name in spoilt]
    keys.write_text(used + "\n" + "\n".join(others))
    zone = [second, *(second.replace("two.", f"{name}.", 1).replace(*change) for name, change in spoilt.items())]
    with nameserver_with(tmp_path, zone) as nameserver:
        status, said = run("check", "--json", nameserver=nameserver)
        states = {row["record"].partition(".")[0]: row["state"] for row in map(json.loads, said.splitlines())}
        assert status == 1 and states.pop("two") == "ok"
        assert states.keys() == spoilt.keys()
        for name, state in states.items():
            assert "the record lets no signature be verified" in state, name
    keys.write_text(used)
    with nameserver_with(tmp_path, [records[0].replace("one.", "two.")]) as nameserver:
        assert "the record is another key's" in run("check", "--json", nameserver=nameserver)[1]
