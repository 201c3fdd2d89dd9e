"""Mail of unauthenticated clients: the SPF suite of RFC 7208, DKIM signatures, DMARC, and the Authentication-Results field."""

import asyncio
import base64
import os
import smtplib
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import dkim
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from relaymta.config import Dkim
from relaymta.dns import DnsFailure, NoSuchName, Resolver
from relaymta.filter import dmarc, spf
from relaymta.filter.dmarc import Dmarc, organizational
from relaymta.filter.keys import load_key, record
from relaymta.filter.signatures import Keys, Verified, arc, claims, keys_of, verify
from relaymta.filter.spf import Spf
from relaymta.filter.verify import _field
from relaymta.proto.authres import without_forged
from relaymta.proto.dkim import BodyHashes
from relaymta.proto.header import header_end
from tests.filter.test_signing import MESSAGE, PAIRS, keys, sign, write_key
from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.resolver import nameserver_with
from tests.support.zone import Zone, nameserver

PYSPF = "pyspf==2.0.14"


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> list[dict]:
    """The test suite of RFC 7208, out of pyspf's source distribution."""
    folder = tmp_path_factory.mktemp("pyspf")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder), PYSPF]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    archives = list(folder.glob("pyspf-*.tar.gz"))
    if not archives:
        reason = f"pyspf's source distribution is not to be had: {done.stderr.strip()[-200:]}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with tarfile.open(archives[0]) as archive:
        member = next(name for name in archive.getnames() if name.endswith("/rfc7208-tests.yml"))
        file = archive.extractfile(member)
        assert file is not None
        return list(yaml.safe_load_all(file.read().decode()))


@pytest.mark.parametrize("servfail", [True, False], ids=["SERVFAIL", "silence"])
async def test_the_suite_of_rfc_7208(suite, servfail, monkeypatch):
    """Through our resolver, over the wire: what a zone does not answer gets SERVFAIL, or nothing at all."""
    monkeypatch.setattr("relaymta.dns.SECONDS", 2.0)  # for the few queries without an answer
    wrong, counts = [], []

    async def play(scenario: dict) -> None:
        async with nameserver(Zone(scenario["zonedata"]), servfail) as address:
            resolver = Resolver([address])
            for name, case in scenario["tests"].items():
                found = await spf.check(resolver, case["host"], case["mailfrom"] or "", case["helo"])
                expected = case["result"] if isinstance(case["result"], list) else [case["result"]]
                counts.append(1)
                if found.result not in expected:
                    wrong.append((name, case.get("spec"), expected, found))
            await resolver.close()

    await asyncio.gather(*map(play, suite))
    assert wrong == [] and len(counts) == 203


def outcomes(message: bytes, keys: Keys) -> tuple[list[Verified], str]:
    """The results of a message's signatures, and of its ARC chain."""
    end = header_end(message)
    said = claims(message[:end])
    hashes = BodyHashes(said.forms())
    hashes.feed(message[end:])
    bodies = hashes.finish()
    return verify(said, bodies, keys, 1_795_000_100), arc(said, bodies, keys)


def verified(message: bytes, settings: list[Dkim], **changes: str) -> list[Verified]:
    records: dict = {f"{one.selector}._domainkey.{one.domain}": record(load_key(one)) for one in settings}
    return outcomes(message, records | changes)[0]


@pytest.mark.parametrize("pair", PAIRS)
def test_good_signatures_pass_and_spoiled_ones_fail(tmp_path, pair):
    settings = keys(tmp_path, canonicalization=pair)
    message = sign(MESSAGE, settings)
    assert [one.result for one in verified(message, settings)] == ["pass", "pass"]
    assert [one.result for one in verified(message.replace(b"end", b"END"), settings)] == ["fail", "fail"]
    assert [one.result for one in verified(message.replace(b"Ann", b"Eve"), settings)] == ["fail", "fail"]


def test_the_example_of_rfc_8463_passes():
    message = b"""DKIM-Signature: v=1; a=ed25519-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=brisbane; t=1528637909; h=from : to :
 subject : date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11Bus
 Fa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw==
From: Joe SixPack <joe@football.example.com>
To: Suzie Q <suzie@shopping.example.net>
Subject: Is dinner ready?
Date: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)
Message-ID: <20030712040037.46341.5F8J@football.example.com>

Hi.

We lost the game.  Are you hungry yet?

Joe.
""".replace(b"\n", b"\r\n")
    key = {"brisbane._domainkey.football.example.com": "v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="}
    assert [one.result for one in outcomes(message, key)[0]] == ["pass"]
    assert [one.result for one in outcomes(message.replace(b"dinner", b"supper"), key)[0]] == ["fail"]


def test_restrictions_of_keys_and_signatures_are_enforced(tmp_path):
    settings = keys(tmp_path)[:1]
    message, key = sign(MESSAGE, settings), record(load_key(settings[0]))
    name = "rsa._domainkey.shop.test"
    cases = {
        "": "permerror", key.replace("v=DKIM1", "v=DKIM2"): "permerror", key + "; h=sha1": "permerror",
        key + "; h=sha1:sha256": "pass", key.replace("k=rsa", "k=ed25519"): "permerror", "v=DKIM1; p=": "permerror",
        key + "; s=tlsrpt": "permerror", key + "; s=email": "pass", key + "; t=s": "pass", key[:60]: "permerror",
        "nonsense": "permerror",
    }  # fmt: skip
    assert {text: verified(message, settings, **{name: text})[0].result for text in cases} == cases
    found, _ = outcomes(message, {name: DnsFailure("no answer")})
    assert found[0].result == "temperror"
    small = Dkim(domain="shop.test", selector="rsa", key=str(write_key(tmp_path / "small.pem", "rsa", 1024)))
    assert verified(sign(MESSAGE, [small]), [small])[0].result == "pass"
    short = Dkim(domain="shop.test", selector="rsa", key=settings[0].key, expires="1s")
    assert verified(sign(MESSAGE, [short]), [short])[0].result == "fail"
    for number, (bits, exponent) in enumerate(((512, 65537), (8192, 65537), (2048, (1 << 40) + 15))):
        numbers = rsa.RSAPublicNumbers(exponent, (1 << (bits - 1)) + 1)  # not a real key; it is not even tried
        der = numbers.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        odd = f"v=DKIM1; p={base64.b64encode(der).decode()}"
        assert verified(message, settings, **{name: odd})[0].result == "permerror", number
    sha1 = message.replace(b"a=rsa-sha256", b"a=rsa-sha1")
    assert verified(sha1, settings)[0].result == "policy"
    partial = dkim.sign(MESSAGE, b"rsa", b"shop.test", _pkcs1(Path(settings[0].key).read_bytes()), length=True) + MESSAGE
    assert verified(partial, settings)[0].result == "pass"
    assert verified(partial + b"and more\r\n", settings)[0].result == "policy"


@pytest.mark.parametrize("name", [b"From:", b"from :"])
def test_a_signature_does_not_cover_a_from_that_was_added(name, tmp_path):
    """Most sign From: once: with one such message, another author of the same domain could be added in front of it."""
    settings = keys(tmp_path)[:1]
    pem = _pkcs1(Path(settings[0].key).read_bytes())
    once = dkim.sign(MESSAGE, b"rsa", b"shop.test", pem, include_headers=[b"from", b"subject"]) + MESSAGE
    twice = dkim.sign(MESSAGE, b"rsa", b"shop.test", pem, include_headers=[b"from", b"from"]) + MESSAGE
    added = name + b" ceo@shop.test\r\n"
    assert [verified(text, settings)[0].result for text in (once, twice)] == ["pass", "pass"]
    assert verified(added + once, settings)[0].result == "policy"
    assert verified(added + twice, settings)[0].result == "fail"


@pytest.mark.parametrize(
    "header",
    [b" first line\r\n", b"", b"DKIM-Signature:\r\n", b"DKIM-Signature: v=1; a=rsa-sha256; b=!; bh=x; d=d; h=from; s=s\r\n",
     b"DKIM-Signature: " + b"x=" * 5000 + b"\r\n", b"no colon\r\n", b"DKIM-Signature: v=1;;; = ;\r\n", b"\xff:\r\n",
     b"DKIM-Signature: v=a" + b" " * 100_000 + b"b\r\n", b"DKIM-Signature: v=a" + b"\r\n " * 30_000 + b"b\r\n"],
)  # fmt: skip
def test_hostile_messages_are_reported_and_do_no_harm(header, tmp_path):
    signed = b"DKIM-Signature: v=1; a=rsa-sha256; b=AA; bh=x; d=d; h=from; s=s\r\n"
    message = header + signed + b"From: a@b.test\r\n\r\n" + b" " * 200_000 + b"\r\n"
    found, _ = outcomes(message, {"s._domainkey.d": record(load_key(keys(tmp_path)[0]))})
    assert all(one.result in ("permerror", "fail") for one in found)


@pytest.mark.parametrize("blank", [b" ", b"\r\n "], ids=["blanks", "folds"])
def test_hostile_signatures_cost_linear_time(blank, tmp_path):
    """Eight times the octets: quadratic would be 64 times the work."""
    known = {"s._domainkey.d": record(load_key(keys(tmp_path)[0]))}

    def seconds(count: int) -> float:
        message = b"DKIM-Signature: v=a" + blank * count + b"b\r\nFrom: a@b.test\r\n\r\nx\r\n"
        best = 1e9
        for _ in range(5):
            began = time.process_time()
            outcomes(message, known)
            best = min(best, time.process_time() - began)
        return best

    assert seconds(32_000) < 24 * seconds(4_000) + 0.02


def test_what_would_take_long_to_verify_is_not_verified(tmp_path):
    settings = keys(tmp_path)[:1]
    names = b":".join(b"x%d" % number for number in range(300))
    assert verified(sign(MESSAGE, settings).replace(b"h=", b"h=" + names + b":"), settings)[0].result == "policy"
    many = b"".join(b"X%d: y\r\n" % number for number in range(600))
    assert verified(many + sign(MESSAGE, settings), settings)[0].result == "policy"


async def test_the_length_of_an_spf_policy_is_limited():
    """Each of its records would be parsed again for each of the queries."""
    asked = []

    class Long:
        async def values(self, name: str, kind: str) -> list[str]:
            asked.append(name)
            return [f"v=spf1 {'ip4:192.0.2.1 ' * 200} include:i{len(asked)}.test -all"]

    found = await spf.check(Long(), "192.0.2.9", "a@b.test", "helo.test")  # type: ignore[arg-type]
    assert found.result == "permerror" and "octets" in found.reason and len(asked) == 4

    class Twisted:
        async def values(self, name: str, kind: str) -> list[str]:
            return [f"v=spf1 exists:{'%{l99r-}' * 60}.b.test -all"]

    found = await spf.check(Twisted(), "192.0.2.9", "a@b.test", "helo.test")  # type: ignore[arg-type]
    assert found.result == "permerror" and "macros" in found.reason


class Many:
    """A resolver with so many records of a type; it never waits, as one with everything in its cache."""

    def __init__(self, policy: str, **counts: int) -> None:
        self.policy, self.counts = policy, counts
        self.asked: list[str] = []

    async def values(self, name: str, kind: str) -> list:
        self.asked.append(f"{kind} {name}")
        count = self.counts.get(kind, 0)
        if kind == "TXT":
            own = self.policy if name == "b.test" else f"v=spf1 {'ip4:10.0.0.1 ' * self.counts.get('terms', 0)}?all"
            return [f"text {number}" for number in range(count)] + [own]
        if kind == "MX":
            return [(number, f"m{number}.{name}") for number in range(count)]
        if kind == "PTR":
            return [f"p{number}.test" for number in range(count)]
        return [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(count)] if kind == "A" else []


HOSTS = " ".join(f"a:a{number}.test" for number in range(10))
EXCHANGES = " ".join(f"mx:x{number}.test" for number in range(10))
INCLUDES = " ".join(f"include:i{number}.test" for number in range(10))


@pytest.mark.parametrize(
    ("policy", "counts", "expected", "most"),
    [
        (f"v=spf1 {HOSTS} -all", {"A": 2000}, "permerror", 2), (f"v=spf1 {HOSTS} -all", {"A": 100}, "permerror", 7),
        (f"v=spf1 {HOSTS} -all", {"A": 40}, "fail", 11), ("v=spf1 mx -all", {"MX": 5000, "A": 1}, "permerror", 2),
        ("v=spf1 mx -all", {"MX": 10, "A": 5}, "fail", 12), ("v=spf1 ptr -all", {"PTR": 5000, "A": 2}, "fail", 12),
        ("v=spf1 ptr:b.test -all", {"PTR": 10, "A": 2}, "fail", 12), ("v=spf1 -all", {"TXT": 5000}, "fail", 1),
        ("v=spf1 exp=e.test -all", {"TXT": 5000}, "fail", 2),
        ("v=spf1 " + " ".join(f"x{number}=y" for number in range(1200)) + " -all", {}, "permerror", 1),
        ("v=spf1 " + "a " * 4000, {"A": 1}, "permerror", 1), (f"v=spf1 {INCLUDES} -all", {"terms": 60}, "fail", 11),
        (f"v=spf1 {INCLUDES} -all", {"terms": 90}, "permerror", 10),
        (f"v=spf1 {EXCHANGES} -all", {"MX": 10, "A": 1}, "fail", 111),  # as many as 4.6.4 allows
        (f"v=spf1 {EXCHANGES} mx:one.more.test -all", {"MX": 10, "A": 1}, "permerror", 111),
    ],
)  # fmt: skip
async def test_the_cost_of_an_spf_policy_is_limited(policy, counts, expected, most):
    many = Many(policy, **counts)
    found = await spf.check(many, "192.0.2.9", "a@b.test", "helo.test")  # type: ignore[arg-type]
    assert found.result == expected and len(many.asked) <= most, (found, many.asked)


async def test_of_a_long_answer_only_a_part_is_parsed_for_each_query():
    many = Many("v=spf1 -all", A=5000, MX=5000, PTR=5000, TXT=5000)
    for kind, most in (("A", spf.ADDRESSES + 1), ("MX", 11), ("PTR", 10), ("TXT", 4)):
        assert len(await spf._asked(many, "b.test", kind)) <= most  # type: ignore[arg-type,arg-type]


async def test_a_long_policy_does_not_block_the_event_loop():
    """When the resolver has everything in its cache, nothing else would yield to the event loop."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    many = Many(f"v=spf1 {INCLUDES} -all", terms=60)
    assert (await spf.check(many, "192.0.2.9", "a@b.test", "helo.test")).result == "fail"  # type: ignore[arg-type]
    task.cancel()
    assert turns >= 5


async def test_a_sender_is_judged_by_the_domain_behind_its_last_at():
    """pyspf queried evil.test"@b.test: a forged sender had no policy, instead of the one of its domain."""
    for sender in ('"x@evil.test"@b.test', '"@"@b.test', '"a@b"@b.test'):
        many = Many("v=spf1 exists:%{l}.%{o}.x.test -all")
        found = await spf.check(many, "192.0.2.9", sender, "evil.test")  # type: ignore[arg-type]
        assert (found.result, found.domain, many.asked[0]) == ("fail", "b.test", "TXT b.test")
        assert many.asked[1:] == [f"A {sender.rpartition('@')[0]}.b.test.x.test"]


async def test_a_policy_of_many_queries_does_not_either():
    """36 of them, and never more than 170 terms at once: the event loop did not run in between."""
    most = 0

    class Known(Many):
        async def values(self, name: str, kind: str) -> list:
            nonlocal most
            most = max(most, len(self.asked) + 1)
            return await super().values(name, kind)

    async def others() -> None:
        while True:
            many.asked.clear()
            await asyncio.sleep(0)

    terms = " ".join(f"ip4:10.0.0.{number}" for number in range(160))
    many = Known(f"v=spf1 {terms} mx:a.test mx:b.test mx:c.test -all", MX=9, A=1)
    task = asyncio.create_task(others())
    await asyncio.sleep(0)
    assert (await spf.check(many, "192.0.2.9", "a@b.test", "helo.test")).result == "fail"  # type: ignore[arg-type]
    task.cancel()
    assert most <= 3


def test_a_chain_of_arc_sets_is_followed(tmp_path):
    pytest.importorskip("authres")
    settings = keys(tmp_path)[0]
    pem = Path(settings.key).read_bytes()
    records = {"rsa._domainkey.shop.test": record(load_key(settings))}
    message = b"Authentication-Results: relay.example; spf=pass smtp.mailfrom=a@b.test\r\n" + MESSAGE
    pem = _pkcs1(pem)
    once = b"".join(dkim.arc_sign(message, b"rsa", b"shop.test", pem, b"relay.example")) + message

    def result(message: bytes) -> str:
        return outcomes(message, records)[1]

    again = once.replace(b"Authentication-Results: relay.example; spf=pass smtp.mailfrom=a@b.test\r\nFrom", b"From")
    for _ in range(5):  # as many hops as mail has
        seen = b"Authentication-Results: relay.example; arc=pass\r\n" + again
        again = b"".join(dkim.arc_sign(seen, b"rsa", b"shop.test", pem, b"relay.example")) + again
    assert [result(message) for message in (MESSAGE, once, again)] == ["none", "pass", "pass"]
    assert result(once.replace(b"end\r\n", b"END\r\n")) == "fail"
    assert result(once.replace(b"cv=none", b"cv=pass")) == "fail"
    assert outcomes(once, {"rsa._domainkey.shop.test": DnsFailure("no answer")})[1] == "temperror"
    other = b"DKIM-Signature: v=1; a=rsa-sha256; d=far.test; s=x; h=from; bh=x; b=x\r\n" + once
    assert outcomes(other, records | {"x._domainkey.far.test": DnsFailure("no answer")})[1] == "pass"


def _pkcs1(pem: bytes) -> bytes:
    """A key as dkimpy reads it."""
    private = serialization.load_pem_private_key(pem, None)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def test_the_organizational_domain():
    assert [organizational(d) for d in ("a.b.example.co.uk", "example.com", "a.example.com", "com")] == [
        "example.co.uk", "example.com", "example.com", "com",
    ]  # fmt: skip


def test_forged_results_are_removed_and_no_others():
    block = (
        b"Authentication-Results: relay.example; dkim=pass\r\nFrom: a@b\r\n"
        b'authentication-results:\r\n\t(x) "RELAY.example" 1;\r\n spf=pass\r\n'
        b"Authentication-Results: other.example; dkim=pass\r\nSubject: Authentication-Results: relay.example\r\n\r\n"
    )
    assert without_forged(block, "relay.example") == (
        b"From: a@b\r\nAuthentication-Results: other.example; dkim=pass\r\nSubject: Authentication-Results: relay.example\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("value", "removed"),
    [(b"relay.example; spf=pass", True), (b" RELAY.example.; x", True), (b"relay.example", True), (b"relay.example 1; x", True),
     (b'"relay.example"; x', True), (b'"relay\\.example"; x', True), (b'"relay.example" 1 (x); x', True),
     (b"(a (b) c) relay.example; x", True), (b"(\\)) relay.example; x", True), (b"relay.example(x); x", True),
     (b"relay(x).example; x", True), (b"relay.example/1; x", True), (b"relay .example; x", True), (b"(relay.example; x", True),
     (b"", True), (b";", True), (b"other.example (relay.example); x", False), (b"other.example; x", False),
     (b'"other.example" 1; relay.example', False), (b"xrelay.example; x", False), (b"relay.example.com; x", False),
     (b"()" * 60 + b"other.example; x", True), (b"()" * 10 + b"other.example; x", False),
     (b"none", False), (b"spf=pass (sender IP) smtp.mailfrom=relay.example; dkim=none", False)],
)  # fmt: skip
def test_which_fields_of_results_are_forged(value, removed):
    block = b"Subject: x\r\nAuthentication-Results:" + value + b"\r\nTo: y\r\n\r\n"
    assert (without_forged(block, "relay.example") != block) is removed


@pytest.fixture
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


@pytest.mark.parametrize(
    ("hostname", "shown"),
    [("relay.example", b"relay.example"), ("[192.0.2.1]", b'"[192.0.2.1]"'), ("[IPv6:2001:db8::1]", b'"[IPv6:2001:db8::1]"')],
)
def test_our_authserv_id_is_a_token_or_quoted(hostname, shown):
    """RFC 8601 2.2, RFC 2045 5.1."""
    field = _field(hostname, Spf("none", "b.test", ""), "a@b.test", [], "none", Dmarc("none", "none", "b.test"))
    assert field.startswith(b"Authentication-Results: " + shown + b";\r\n\t")
    assert without_forged(field, hostname) == b""


def test_mail_of_unauthenticated_clients_arrives_with_its_results(peer, tmp_path):
    settings = keys(tmp_path)
    records = [f'{one.selector}._domainkey.{one.domain}. TXT "{_halves(record(load_key(one)))}"' for one in settings]
    records += [
        'shop.test. TXT "v=spf1 ip4:127.0.0.4 -all"', '_dmarc.shop.test. TXT "v=DMARC1; p=reject"',
        '_dmarc.bank.test. TXT "v=DMARC1; p=quarantine"', 'bank.test. TXT "v=spf1 -all"', 'quiet.test. A 127.0.0.1',
    ]  # fmt: skip
    with nameserver_with(tmp_path, records) as nameserver:
        more = ('relay.networks=["127.0.0.9/32"]', 'relay.domains=["ours.test"]', f'delivery.nameservers=["{nameserver}"]',
                "verify.results=true", 'verify.dmarc="enforce"', "intake.tarpit=0")  # fmt: skip
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *more) as relay:

            def send(source: str, sender: str, message: bytes) -> int:
                with smtplib.SMTP("127.0.0.1", relay.port, "client.test", source_address=(source, 0)) as client:
                    try:
                        client.sendmail(sender, ["bob@ours.test"], message)
                    except smtplib.SMTPDataError as error:
                        return error.smtp_code
                return 250

            forged = b"Authentication-Results: relay.example; dkim=pass header.d=bank.test\r\n"
            assert send("127.0.0.4", "ann@shop.test", forged + sign(MESSAGE, settings)) == 250
            ((_, _, arrived),) = wait_for(lambda: peer.messages)
            field = arrived.split(b"\r\nReceived:")[0].decode()
            assert field.startswith("Authentication-Results: relay.example;\r\n\tspf=pass smtp.mailfrom=ann@shop.test;")
            assert field.count("dkim=pass header.d=shop.test") == 2 and field.endswith("dmarc=pass header.from=shop.test")
            assert arrived.lower().count(b"authentication-results:") == 1
            # Neither SPF nor DKIM passes: the domain's policy is applied.
            assert send("127.0.0.5", "eve@shop.test", MESSAGE) == 550
            assert send("127.0.0.5", "eve@evil.test", b"From: a@bank.test\r\n\r\nx\r\n") == 250
            wait_for(lambda: [row["held"] for row in relay.summary()] == [1])
            assert "  DMARC: it fails, and bank.test asks for quarantine\n" in relay.cli("queue", "list", "--held").stdout
            # However From: is written, and when it cannot be parsed.
            for value, code in ((b"a@ shop.test", 550), (b"a@(b (c))shop . test", 550), (b"<a@\r\n shop.test>", 550),
                                (b"a@shop.test(x)evil.test", 550), (b"a@quiet.test, <a@shop.test", 550), (b"", 550)):  # fmt: skip
                assert send("127.0.0.5", "eve@evil.test", b"Subject: x\r\nFrom: " + value + b"\r\n\r\nx\r\n") == code, value
            # Also when the next host would write the envelope's sender into it.
            for header in (b"Subject: x\r\n", b"From: eve\r\n", b"From: us:;\r\n", b""):
                assert send("127.0.0.5", "eve@shop.test", header + b"\r\nx\r\n") == 550, header
                assert send("127.0.0.5", '"@x.test"@shop.test', header + b"\r\nx\r\n") == 550, header
            wait_for(lambda: [event["reply"][:9] for event in relay.events("rejected")].count("550 5.6.0") == 3)
            assert send("127.0.0.5", "eve@quiet.test", b"From: a@quiet.test\r\n\r\nx\r\n") == 250
            wait_for(lambda: len(peer.messages) == 2)
            field = peer.messages[1][2].split(b"\r\nReceived:")[0].decode()
            assert "spf=none smtp.mailfrom=eve@quiet.test" in field and "dkim=none" in field and "dmarc=none" in field
            assert send("127.0.0.9", "eve@shop.test", MESSAGE) == 250  # of our own network: not verified
            wait_for(lambda: len(peer.messages) == 3)
            assert b"Authentication-Results" not in peer.messages[2][2]
            counts = [relay.metric(f'relaymta_dmarc_total{{result="{word}"}}') for word in ("pass", "fail", "none")]
            assert counts == [1, 13, 1] and relay.metric('relaymta_dmarc_total{result="permerror"}') == 3
            assert relay.metric('relaymta_dkim_seconds_count{op="verify"}') == 1  # the others have no signature
            assert relay.metric('relaymta_rejections_total{phase="data",reply="5xx"}') == len(relay.events("rejected"))


def test_large_mail_of_unauthenticated_clients_is_verified_as_well(peer, tmp_path):
    settings = keys(tmp_path)
    filler = b"of many " * 12
    large = MESSAGE + b"".join(b"line %d %s \r\n" % (number, filler) for number in range(14_000))
    records = [f'{one.selector}._domainkey.{one.domain}. TXT "{_halves(record(load_key(one)))}"' for one in settings]
    records += ['shop.test. TXT "v=spf1 -all"', '_dmarc.shop.test. TXT "v=DMARC1; p=reject"']
    with nameserver_with(tmp_path, records) as nameserver:
        more = ('relay.networks=["127.0.0.9/32"]', 'relay.domains=["ours.test"]', f'delivery.nameservers=["{nameserver}"]',
                "verify.results=true", 'verify.dmarc="enforce"')  # fmt: skip
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *more) as relay:

            def send(message: bytes) -> tuple[int, bytes]:
                with smtplib.SMTP("127.0.0.1", relay.port, "client.test", source_address=("127.0.0.4", 0)) as client:
                    client.ehlo()
                    client.mail("ann@shop.test")
                    client.rcpt("bob@ours.test")
                    return client.data(message)

            forged = b"Authentication-Results: relay.example; dkim=pass header.d=bank.test\r\n"
            assert send(forged + sign(large, settings))[0] == 250
            ((_, _, arrived),) = wait_for(lambda: peer.messages)
            field = arrived.split(b"\r\nReceived:")[0].decode()
            assert field.count("dkim=pass header.d=shop.test") == 2 and field.endswith("dmarc=pass header.from=shop.test")
            assert arrived.count(b"Authentication-Results:") == 1 and arrived.endswith(sign(large, settings))
            assert send(large)[0] == 550  # without a signature: refused, as a short one is
            assert send(sign(large, settings).replace(b"line 13999 ", b"line 14000 "))[0] == 550
            # Nor does it help to hide From: behind a long header, or another author.
            assert send(b"X-Long: " + b"x" * 900 + b"\r\n" + (b" " + b"x" * 900 + b"\r\n") * 1300 + large)[0] == 554
            assert send(b"From: eve@quiet.test\r\n" + large)[0] == 550
            assert relay.metric('relaymta_dkim_seconds_count{op="verify"}') == 2
            wait_for(lambda: not list((relay.spool / "shard-0" / "bodies" / "big").iterdir()))


def test_a_dead_dns_temporarily_rejects_mail_under_a_policy_and_nothing_else(peer, tmp_path):
    networks = 'relay.networks=["127.0.0.9/32"]'
    more = (networks, 'relay.domains=["ours.test"]', 'delivery.nameservers=["127.0.0.1:1"]', "verify.results=true")

    def send(relay: Relay, source: str) -> int:
        with smtplib.SMTP("127.0.0.1", relay.port, "client.test", source_address=(source, 0)) as client:
            client.ehlo()
            client.mail("ann@shop.test")
            client.rcpt("bob@ours.test")
            return client.data(MESSAGE)[0]

    with Relay(tmp_path, f"127.0.0.1:{peer.port}", *more, 'verify.dmarc="enforce"') as relay:
        assert [send(relay, "127.0.0.4"), send(relay, "127.0.0.9")] == [451, 250]
        assert relay.metric('relaymta_messages_refused_total{reason="filter"}') == 1
        (event,) = wait_for(lambda: relay.events("rejected"))
        assert event["reply"].startswith("451 4.4.3 The message could not be authenticated")
        assert relay.metric('relaymta_rejections_total{phase="data",reply="4xx"}') == 1
        assert relay.stop() == 0
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", *more) as relay:
        assert send(relay, "127.0.0.4") == 250  # no policy is applied
        wait_for(lambda: len(peer.messages) == 2)
        field = peer.messages[1][2].split(b"\r\nReceived:")[0]
        assert b"spf=temperror" in field and b"dmarc=temperror" in field


class Texts:
    """A resolver with the DMARC records of some domains."""

    def __init__(self, known: dict[str, list[str]]) -> None:
        self.known = known

    async def txt(self, name: str) -> list[str]:
        found = self.known.get(name.removeprefix("_dmarc."))
        if found is None or not name.startswith("_dmarc."):
            raise NoSuchName(name)
        return found


@pytest.mark.parametrize(
    ("authors", "expected"),
    [(["good.test"], "pass none"), (["good.test", "bank.test"], "fail reject"), (["bank.test", "good.test"], "fail reject"),
     ([], "none none"), ([f"d{number}.test" for number in range(6)], "permerror reject")],
)  # fmt: skip
async def test_no_author_hides_behind_another(authors, expected):
    texts = Texts({"bank.test": ["v=DMARC1; p=reject"], "good.test": ["v=DMARC1; p=none"]})
    found = await dmarc.check(texts, authors, ("good.test", "pass"), [])  # type: ignore[arg-type]
    assert f"{found.result} {found.policy}" == expected


@pytest.mark.parametrize(
    ("tags", "author", "sender", "signature", "expected"),
    [("", "a.shop.co.uk", "b.shop.co.uk", "", "pass"), ("aspf=s", "a.shop.co.uk", "shop.co.uk", "", "fail"),
     ("", "shop.co.uk", "evil.co.uk", "", "fail"), ("", "shop.co.uk", "evil.test", "mail.shop.co.uk", "pass"),
     ("adkim=s", "shop.co.uk", "evil.test", "mail.shop.co.uk", "fail"),
     ("adkim=s", "shop.co.uk", "evil.test", "shop.co.uk", "pass")],
)  # fmt: skip
async def test_which_identifiers_are_aligned_with_the_author(tags, author, sender, signature, expected):
    texts = Texts({"shop.co.uk": [f"v=DMARC1; p=reject; {tags}"]})
    signatures = [(signature, "pass"), ("shop.co.uk.evil.test", "pass"), ("", "permerror")] if signature else []
    found = await dmarc.check(texts, [author], (sender, "pass"), signatures)  # type: ignore[arg-type]
    assert found.result == expected


@pytest.mark.parametrize(
    ("tags", "spf", "signatures", "expected"),
    [("", ("evil.test", "temperror"), [], "fail"), ("", ("evil.test", "fail"), [("evil.test", "temperror")], "fail"),
     ("", ("", "temperror"), [("", "temperror"), ("..", "temperror"), ("x" * 300, "temperror")], "fail"),
     ("", ("evil.test", "pass"), [("bank.test.evil.test", "temperror"), ("evil.test", "pass")], "fail"),
     ("", ("bank.test", "temperror"), [], "temperror"), ("", ("a.bank.test", "temperror"), [], "temperror"),
     ("aspf=s", ("a.bank.test", "temperror"), [], "fail"), ("adkim=s", ("", ""), [("a.bank.test", "temperror")], "fail"),
     ("adkim=s", ("", ""), [("a.bank.test", "temperror"), ("bank.test", "temperror")], "temperror"),
     ("", ("evil.test", "fail"), [("evil.test", "temperror"), ("m.bank.test", "temperror")], "temperror"),
     ("", ("bank.test", "pass"), [("bank.test", "temperror")], "pass")],
)  # fmt: skip
async def test_a_temporary_failure_matters_where_it_could_help(tags, spf, signatures, expected):
    """Otherwise a signature of a domain whose DNS does not answer gets a temporary rejection instead of a permanent one."""
    texts = Texts({"bank.test": [f"v=DMARC1; p=reject; {tags}"]})
    found = await dmarc.check(texts, ["bank.test"], spf, signatures)  # type: ignore[arg-type]
    assert (found.result, found.policy) == (expected, "none" if expected == "pass" else "reject")


async def test_a_key_with_an_invalid_name_does_not_exist(tmp_path):
    class Silent:
        async def txt(self, name: str) -> list[str]:
            raise DnsFailure(name)

    message = sign(MESSAGE, keys(tmp_path)[:1])
    cases = {b"s=rsa": "temperror", b"s=" + b"a" * 64: "permerror", b"s=a..b": "permerror", "s=ä".encode(): "temperror",
             b"s=" + b"a." * 130 + b"a": "permerror", b"s=.": "permerror", b"s=a\tb": "permerror", b"s=a\x01b": "permerror",
             b"s=a\r\n b": "permerror", b"s=a\x1b": "permerror", b"s=a\x7f": "permerror", b"s=a b": "permerror"}  # fmt: skip
    for selector, expected in cases.items():
        changed = message.replace(b"s=rsa", selector)
        end = header_end(changed)
        said = claims(changed[:end])
        hashes = BodyHashes(said.forms())
        hashes.feed(changed[end:])
        bodies = hashes.finish()
        found = await keys_of(Silent(), said)  # type: ignore[arg-type]
        assert verify(said, bodies, found, 1_795_000_100)[0].result == expected, selector
    # Nor is it a temporary failure when no key could make the signature valid.
    assert outcomes(message.replace(b"end\r\n", b"END\r\n"), {"rsa._domainkey.shop.test": DnsFailure("x")})[0][0].result == "fail"


@pytest.mark.parametrize(
    ("record", "author", "policy"),
    [("p=reject; sp=none", "bank.test", "reject"), ("p=reject; sp=none", "a.bank.test", "none"),
     ("p=none; sp=quarantine", "a.bank.test", "quarantine"), ("p=reject", "a.bank.test", "reject"),
     ("p=reject; pct=0", "bank.test", "quarantine"), ("p=quarantine; pct=0", "bank.test", "none"),
     ("p=reject; t=y", "bank.test", "quarantine"), ("p=reject; pct=100", "bank.test", "reject"),
     ("sp=reject", "bank.test", "none"), ("p=reject; aspf=x; rua=?; unknown", "bank.test", "reject"),
     ("p=reject; aspf=x; rua=?; unknown=1", "bank.test", "reject")],
)  # fmt: skip
async def test_the_policy_of_the_authors_domain(record, author, policy):
    texts = Texts({"bank.test": ["v=spf1 -all", f"v = DMARC1; {record}"]})
    found = await dmarc.check(texts, [author], ("evil.test", "pass"), [])  # type: ignore[arg-type]
    assert found.policy == policy
    signatures = [("bank.test", "temperror")]  # which may be valid: it is not refused permanently
    found = await dmarc.check(texts, [author], ("evil.test", "pass"), signatures)  # type: ignore[arg-type]
    assert found.policy == policy and found.result in ("temperror", "permerror")


def _halves(text: str) -> str:
    """A long record as strings of a zone file."""
    return '" "'.join(text[i : i + 200] for i in range(0, len(text), 200))


# The header, whether there is an author, and whose word that is.
HEADERS = [
    (b"Subject: x\r\n", False, "RFC 5322 3.6: From: is missing"), (b"", False, "3.6"), (b"Reply-To: a@b.test\r\n", False, "3.6"),
    (b"From:\r\n", False, "3.6.2"), (b"From: \r\n \r\n", False, "3.6.2"), (b"From: <>\r\n", False, "3.6.2"),
    (b'From: "Ann" <>\r\n', False, "3.6.2"), (b"From: us:;\r\n", False, "RFC 6854: an empty group has no author to speak of"),
    (b"From: nobody known:;\r\n", False, "RFC 6854"), (b"From: ann\r\n", False, "3.4.1: an address has a domain"),
    (b"From: Ann Smith\r\n", False, "3.4.1"), (b"From: Ann <ann>\r\n", False, "3.4.1"),
    (b"From: a@b.test\r\n", True, "3.6.2"), (b"From : a@b.test\r\n", True, "4.5"), (b"FROM:\r\n\ta@b.test\r\n", True, "2.2.3"),
    (b"From: a@[192.0.2.1]\r\n", True, "3.4.1"), (b"From: us: a@b.test;\r\n", True, "RFC 6854"),
    (b"From: us:;, a@b.test\r\n", True, "3.6.2"), (b"From: ann, a@b.test\r\n", True, "3.6.2: one of several"),
    (b"From: a@b.test\r\nFrom: us:;\r\n", True, "RFC 7489 6.6.1"), (b"From:\r\nFrom:\r\n", False, "3.6.2"),
    ("From: ann@dömain.test\r\n".encode(), True, "RFC 6532"), (b"Hello\r\nFrom: a@b.test\r\n", False, "2.1: all of it is body"),
    (b"From: a@b.test, <c\r\n", True, "malformed, but with an address"),
    (b'From: "ceo@bank.test" <>\r\n', False, "3.4: a name"), (b"From: @\r\n", False, "3.4.1"),
    (b"From: (a@b.test) <>\r\n", False, "3.2.2: a comment"), (b"From: ((x) a@b.test (y)) <>\r\n", False, "3.2.2"),
    (b"From: <a@>\r\n", False, "3.4.1"), (b"From: ceo@\r\n", False, "3.4.1"), (b'From: "ceo@bank.test"\r\n', False, "3.4"),
]  # fmt: skip
NO_AUTHOR = b"550 5.7.1 Refused: there is no From: with an address (RFC 5322 3.6.2)"


def sent(relay: Relay, message: bytes, source: str = "127.0.0.4") -> bytes:
    """The reply to a message of eve@quiet.test."""
    with smtplib.SMTP("127.0.0.1", relay.port, "client.test", source_address=(source, 0)) as client:
        client.ehlo()
        client.mail("eve@quiet.test")
        client.rcpt("bob@ours.test")
        code, said = client.data(message)
        return b"%d %s" % (code, said)


RESULTS = ("verify.results=true",)


@pytest.mark.parametrize("more", [RESULTS, (), (*RESULTS, 'verify.dmarc="enforce"')], ids=["results", "", "enforced"])
def test_mail_without_an_author_may_be_refused(more, peer, tmp_path):
    """Messages in memory, and, where that is another way, large ones."""
    enforced = "enforce" in str(more)
    small, large = b"\r\nx\r\n", b"\r\n" + (b"y" * 900 + b"\r\n") * 1_200
    rows = [(*row, small) for row in HEADERS] + ([] if enforced else [(*row, large) for row in HEADERS[::5]])
    with nameserver_with(tmp_path, ["quiet.test. A 127.0.0.1"]) as nameserver:
        common = ('relay.networks=["127.0.0.9/32"]', 'relay.domains=["ours.test"]', f'delivery.nameservers=["{nameserver}"]')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *common, *more, 'verify.no_author="reject"') as relay:
            for header, there, source, body in rows:
                answer = sent(relay, header + body)
                malformed = enforced and source.startswith("malformed")
                expected = b"550 5.6.0 " if malformed else b"250 " if there else NO_AUTHOR
                assert answer.startswith(expected), (header, len(body), answer)
            accepted = sum(there for _, there, _, _ in rows) - enforced
            wait_for(lambda: len(peer.messages) == accepted)
            results = [b"\r\nAuthentication-Results: " in b"\r\n" + message for _, _, message in peer.messages]
            assert sum(results) == (accepted if more else 0)
            assert all(event["reply"].encode().startswith((NO_AUTHOR, b"550 5.6.0")) for event in relay.events("rejected"))
            verified = sum(relay.metric(f'relaymta_dmarc_total{{result="{word}"}}') for word in ("none", "permerror"))
            assert verified == (accepted + enforced if more else 0)
            for body in (small, large):  # of our own network
                assert sent(relay, b"Subject: x\r\n" + body, "127.0.0.9").startswith(b"250 "), len(body)


def test_mail_without_an_author_is_accepted_by_default(peer, tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", 'relay.networks=["127.0.0.9/32"]', 'relay.domains=["ours.test"]',
               'delivery.nameservers=["127.0.0.1:1"]', "verify.results=true") as relay:  # fmt: skip
        for header, _, _ in HEADERS:
            assert sent(relay, header + b"\r\nx\r\n").startswith(b"250 "), header
        wait_for(lambda: len(peer.messages) == len(HEADERS))
