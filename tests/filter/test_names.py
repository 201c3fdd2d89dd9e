"""Mail of unauthenticated clients whose names cannot exist: the answer is permanent, never 451, over the wire and with
`verify.dmarc = "enforce"`; and what Authentication-Results says of it."""

import asyncio

import pytest

from relaymta.config import Verify
from relaymta.dns import NoSuchName, Resolver
from relaymta.filter.verify import FIRST_SECONDS, SECONDS, Verdict, Verifier
from tests.filter.test_signatures import KEY, PLAIN, signed, text_of
from tests.support.zone import Zone, nameserver

ZONE = {
    "bank.test": [{"TXT": "v=spf1 exists:%{l}._u.%{d} exists:%{h}._h.%{d} -all"}],
    "_dmarc.bank.test": [{"TXT": "v=DMARC1; p=reject"}],
    "v+ann=shop.test._u.bank.test": [{"A": "127.0.0.2"}],
    "xn--bcher-kva.test": [{"TXT": "v=spf1 ip4:192.0.2.9 -all"}],
    "_dmarc.xn--bcher-kva.test": [{"TXT": "v=DMARC1; p=reject"}],
}
LONG = "x" * 64


async def verdict(helo: str, sender: str, author: str) -> Verdict:
    message = b"From: " + author.encode() + b"\r\nSubject: x\r\n\r\nx\r\n"
    async with nameserver(Zone(ZONE), servfail=True) as address:
        resolver = Resolver([address])
        verifier = Verifier(Verify(results=True, dmarc="enforce"), "relay.example", resolver, lambda: 1_795_000_000, untimed)
        look = verifier.look(message)
        assert look is not None
        try:
            return await verifier.check("192.0.2.9", helo, sender, look, message[look.end :])
        finally:
            await resolver.close()


def untimed(seconds: float) -> None:
    """What is not signed takes no time."""
    raise AssertionError


# (EHLO, MAIL FROM, From:, the reply's code ("" for none), what is in the field)
CASES = [
    ("[192.0.2.9]", "", "a@quiet.test", "", 'spf=none smtp.helo="[192.0.2.9]"'),
    ("[IPv6:2001:db8::1]", "", "a@quiet.test", "", 'spf=none smtp.helo="[ipv6:2001:db8::1]"'),
    ("192.0.2.9", "", "a@quiet.test", "", "spf=none smtp.helo=192.0.2.9"),
    ("localhost", "", "a@quiet.test", "", "spf=none smtp.helo=localhost"),
    ("${domain}", "", "a@quiet.test", "", "spf=none smtp.helo=${domain}"),
    ("a..example", "", "a@quiet.test", "", "spf=none smtp.helo=a..example"),
    (f"{LONG}.example", "", "a@quiet.test", "", f"spf=none smtp.helo={LONG}.example"),
    ("a_b.test", "", "a@quiet.test", "", "spf=none smtp.helo=a_b.test"),
    ("client.test", "ann@[192.0.2.9]", "a@quiet.test", "", 'spf=none smtp.mailfrom="ann@[192.0.2.9]"'),
    ("client.test", "ann@${domain}", "a@quiet.test", "", 'spf=none smtp.mailfrom="ann@${domain}"'),
    ("client.test", "ann@${domain}.test", "a@quiet.test", "", "spf=none"),
    ("client.test", "ann@a+b.test", "a@quiet.test", "", "spf=none"),
    ("client.test", f"ann@{LONG}.test", "a@quiet.test", "", "spf=none"),
    ("client.test", "ann@localhost", "a@quiet.test", "", "spf=none"),
    ("client.test", "ann@a_b.test", "a@quiet.test", "", "spf=none"),
    ("client.test", '"a b"@quiet.test', "a@quiet.test", "", 'spf=none smtp.mailfrom="a b"@quiet.test'),
    # Without a domain in From: the envelope's sender is judged.
    ("client.test", "ann@${domain}", "ann", "", "dmarc=none"), ("client.test", "ann@a+b.test", "ann", "", "dmarc=none"),
    ("client.test", f"ann@{LONG}.test", "ann", "", "dmarc=none"), ("client.test", "ann@[192.0.2.9]", "ann", "", "dmarc=none"),
    ("client.test", "ann@a=b.bank.test", "ann", "550", "dmarc=fail"),
    ("client.test", "ann@bank.test", "ann@[192.0.2.9]", "550", "dmarc=fail"),
    # Names of macros that c-ares refuses
    ("[192.0.2.9]", "v+ann=shop.test@bank.test", "a@bank.test", "", "spf=pass smtp.mailfrom=v+ann=shop.test@bank.test"),
    ("[192.0.2.9]", "v+eve=shop.test@bank.test", "a@bank.test", "550", "spf=fail"),
    ("[192.0.2.9]", '"a b"@bank.test', "a@bank.test", "550", "spf=fail"),
    ("${domain}", "ann@bank.test", "a@bank.test", "550", "spf=fail"), ("a'b", "ann@bank.test", "a@bank.test", "550", "spf=fail"),
    ("a..b", "ann@bank.test", "a@bank.test", "550", "spf=fail"), (LONG, "ann@bank.test", "a@bank.test", "550", "spf=fail"),
    ("b\u00fccher", "ann@bank.test", "a@bank.test", "550", "spf=fail"),
    ("client.test", "\u00e4nn@bank.test", "a@bank.test", "550", "spf=fail"),
    # U-labels
    ("client.test", "ann@b\u00fccher.test", "a@b\u00fccher.test", "", "spf=pass smtp.mailfrom=ann@xn--bcher-kva.test"),
    ("client.test", "ann@xn--bcher-kva.test", "a@b\u00fccher.test", "", "dmarc=pass header.from=xn--bcher-kva.test"),
    ("client.test", "ann@b\u00fccher.test", "a@xn--bcher-kva.test", "", "dmarc=pass header.from=xn--bcher-kva.test"),
    ("client.test", "ann@B\u00dcCHER.test", "a@mail.b\u00fccher.test", "", "dmarc=pass header.from=mail.xn--bcher-kva.test"),
    ("client.test", "ann@evil.test", "a@b\u00fccher.test", "550",
    "dmarc=fail header.from=xn--bcher-kva.test policy.dmarc=reject"),
    # Authors that cannot exist
    ("client.test", "ann@quiet.test", "a@${domain}", "550", "dmarc=permerror"),
    ("client.test", "ann@quiet.test", f"a@{LONG}.test", "550", "dmarc=permerror"),
    ("client.test", "ann@quiet.test", "a@b..test", "550", "dmarc=permerror"),
    ("client.test", "ann@quiet.test", "a@x_y.test", "", "dmarc=none header.from=x_y.test"),
    ("client.test", "ann@quiet.test", f"a@{'.'.join([LONG[4:]] * 4)}.test", "", "dmarc=none"),
    ("client.test", "ann@quiet.test", "a@localhost", "", "dmarc=none"),
]  # fmt: skip


@pytest.mark.parametrize(("helo", "sender", "author", "code", "shown"), CASES)
async def test_names_that_cannot_exist_have_permanent_answers(helo, sender, author, code, shown):
    found = await verdict(helo, sender, author)
    text = found.field.decode()
    assert (found.refusal or b"")[:3].decode() == code, text
    assert shown in text and "temperror" not in text and text.startswith("Authentication-Results: relay.example;\r\n\tspf=")


FOREIGN = signed(PLAIN.replace("shop", "esp").replace("s=s", "s=k")).partition(b"From:")[0]
CHAIN = (
    b"ARC-Seal: i=1; a=rsa-sha256; cv=none; d=esp.test; s=k; b=AAAA\r\n"
    b"ARC-Message-Signature: i=1; a=rsa-sha256; d=esp.test; s=k; h=from; bh=AAAA; b=AAAA\r\n"
    b"ARC-Authentication-Results: i=1; esp.test; spf=pass\r\n"
)
WEAK = FOREIGN.replace(b"sha256", b"sha1").replace(b"esp.test", b"weak.test")

# (what is silent, fields in front, the reply's code, what is in the field)
SILENT = [
    ("bounce.test", b"", "", ["spf=temperror", "dkim=pass", "dmarc=pass"]),
    ("esp.test", FOREIGN, "", ["spf=pass", "dkim=temperror", "dkim=pass", "dmarc=pass"]),
    ("esp.test", CHAIN, "", ["spf=pass", "dkim=pass", "arc=temperror", "dmarc=pass"]),
    ("esp.test", FOREIGN + WEAK, "", ["spf=pass", "dkim=temperror", "dkim=policy", "dkim=pass", "dmarc=pass"]),
    ("_domainkey.shop.test", b"", "", ["spf=pass", "dkim=temperror", "dmarc=pass"]),
    ("_dmarc.shop.test", b"", "451", ["spf=pass", "dkim=pass", "dmarc=temperror"]),
]


@pytest.mark.parametrize(("silent", "front", "code", "shown"), SILENT)
async def test_a_domain_whose_servers_are_silent_hides_nothing_else(monkeypatch, silent, front, code, shown):
    """RFC 7489 4.2: one aligned pass is enough; what was evaluated is reported."""
    monkeypatch.setattr("relaymta.filter.verify.FIRST_SECONDS", 0.2)
    monkeypatch.setattr("relaymta.filter.verify.SECONDS", 0.4)
    message = front + signed(PLAIN)
    records = {
        "s._domainkey.shop.test": [text_of(KEY)], "_dmarc.shop.test": ["v=DMARC1; p=reject"],
        "shop.test": ["v=spf1 ip4:192.0.2.9 -all"],
    }  # fmt: skip

    class Slow:
        async def txt(self, name: str) -> list[str]:
            if name.endswith(silent):
                await asyncio.sleep(60)
            if name not in records:
                raise NoSuchName(name)
            return records[name]

        async def values(self, name: str, kind: str) -> list[str]:
            return await self.txt(name)

    sender = "x@bounce.test" if silent == "bounce.test" else "x@shop.test"
    for wanted in ("enforce", "report"):
        took: list[float] = []
        settings = Verify(results=True, dmarc=wanted)
        verifier = Verifier(settings, "relay.example", Slow(), lambda: 1_795_000_000, took.append)  # type: ignore[arg-type]
        look = verifier.look(message)
        assert look is not None
        found = await verifier.check("192.0.2.9", "c.test", sender, look, message[look.end :])
        assert (found.refusal or b"")[:3].decode() == (code if wanted == "enforce" else "")
        results = [line.split()[0].rstrip(";") for line in found.field.decode().split("\r\n\t")[1:]]
        assert results == shown
        assert len(took) == 1


def test_spf_has_the_time_that_it_must_have():
    """RFC 7208 4.6.4: at least 20 seconds."""
    assert 20 <= FIRST_SECONDS < SECONDS
