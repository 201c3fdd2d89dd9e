"""Signatures as others make them, verified: each row is a DKIM-Signature (or key record, or ARC set), the result, and whose word
that is. What signs here is a naive implementation of RFC 6376; opendkim and dkimpy have the second word."""

import base64
import hashlib
import itertools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import dkim
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from relaymta.dns import NoSuchName
from relaymta.filter.signatures import Keys, Verified, arc, claims, keys_of, verify
from relaymta.proto.dkim import BodyHashes
from relaymta.proto.header import header_end
from tests.support.programs import need

KEY, OTHER = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)
EDWARDS = ed25519.Ed25519PrivateKey.generate()
NOW = 1_795_000_100
MESSAGE = (
    b"From: Ann <ann@shop.test>\r\nSubject: one\r\nTo: bob@far.test\r\nX-A: 1\r\nX-A:  2 \r\n"
    b"Date: Wed, 25 Nov 2026 22:00:00 +0000\r\n\r\nHello \t there  \r\n\r\nend\r\n\r\n"
)
PLAIN = "DKIM-Signature: v=1; a=rsa-sha256; d=shop.test; s=s; h=from:subject:from; bh={bh}; b={b}"


def text_of(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> str:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return f"v=DKIM1; k=ed25519; p={base64.b64encode(raw).decode()}"
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"v=DKIM1; k=rsa; p={base64.b64encode(der).decode()}"


def relaxed(field: bytes) -> bytes:
    """RFC 6376 3.4.2."""
    name, _, value = field.partition(b":")
    return name.strip().lower() + b":" + re.sub(rb"[ \t]+", b" ", value.replace(b"\r\n", b"")).strip(b" ")


def relaxed_body(body: bytes) -> bytes:
    """RFC 6376 3.4.4."""
    lines = [re.sub(rb"[ \t]+", b" ", line).rstrip(b" ") for line in body.split(b"\r\n")]
    return b"\r\n".join(lines).rstrip(b"\r\n") + b"\r\n"


def simple_body(body: bytes) -> bytes:
    return re.sub(rb"(\r\n)*\Z", b"\r\n", body, count=1)


def fields_of(message: bytes) -> list[bytes]:
    return re.split(rb"\r\n(?![ \t])", message.partition(b"\r\n\r\n")[0])


def signed(template: str, message: bytes = MESSAGE, key: rsa.RSAPrivateKey = KEY, names: str = "from:subject:from") -> bytes:
    """The message with the DKIM-Signature of a template in front, in which {bh} and {b} are replaced. `names`: those of h=."""
    form = re.search(r"\bc=(\w+)(?:/(\w+))?", template)
    head, body = (form[1], form[2] or "simple") if form else ("simple", "simple")
    octets = message.partition(b"\r\n\r\n")[2]
    octets = relaxed_body(octets) if body == "relaxed" else simple_body(octets)
    own = template.replace("{bh}", base64.b64encode(hashlib.sha256(octets).digest()).decode())
    fields = fields_of(message)
    chosen = []
    for name in names.split(":"):
        found = [field for field in fields if field.partition(b":")[0].strip().lower() == name.encode()]
        if found:
            chosen.append(found[-1])
            fields = [field for field in fields if field is not found[-1]]
    chosen.append(re.sub(r"\s*\{b\}\s*", "", own).encode())  # RFC 6376 3.7: with all white space around it
    data = b"\r\n".join(map(relaxed, chosen) if head == "relaxed" else chosen)
    value = base64.b64encode(key.sign(data, padding.PKCS1v15(), hashes.SHA256())).decode()
    return own.replace("{b}", value).encode() + b"\r\n" + message


def outcomes(message: bytes, keys: Keys) -> tuple[list[Verified], str]:
    end = header_end(message)
    said = claims(message[:end])
    bodies = BodyHashes(said.forms())
    bodies.feed(message[end:])
    found = bodies.finish()
    return verify(said, found, keys, NOW), arc(said, found, keys, NOW)


def result(message: bytes, text: str = text_of(KEY), name: str = "s._domainkey.shop.test") -> str:
    return outcomes(message, {name: text})[0][0].result


def opendkim(folder: Path, message: bytes, text: str = text_of(KEY), name: str = "s._domainkey.shop.test") -> bool:
    """Whether opendkim accepts the first signature."""
    (folder / "public").write_text(f"{name} {text}\n")
    (folder / "conf").write_text(f"Mode v\nTestPublicKeys {folder}/public\nSyslog no\n")
    (folder / "message").write_bytes(message)
    command = [need("opendkim"), "-x", str(folder / "conf"), "-t", str(folder / "message"), "-vv"]
    found = subprocess.run(command, capture_output=True, text=True)
    return "verification (s=" in found.stdout and ") succeeded" in found.stdout


COPY = "|".join(f"X-{number}:{'a=20' * 30}" for number in range(40))  # z= of 5 kB
FOLDED_COPY = "From:ann=40shop.test|\r\n\tb=3Dx|Subject:=20\r\n b=3DAAAA|\r\n\tbh=3DBBBB"
BASE = "v=1; a=rsa-sha256; d=shop.test; s=s; h=from:subject:from; bh={bh}"

# The signature, and who says that it is valid: each in all four canonicalizations.
VALID = [
    (f"DKIM-Signature: {BASE}; b={{b}}", "RFC 6376 3.5"),
    (f"DKIM-Signature: {BASE}; b={{b}};", "3.2: a semicolon at the end"),
    (f"DKIM-Signature: b={{b}}; {BASE}", "3.2: any order"),
    (f"DKIM-Signature:b={{b}};{BASE}", "3.2: no white space is needed"),
    (f"DKIM-Signature:\r\n\tb={{b}};\r\n\t{BASE}", "3.2"),
    (f"DKIM-Signature: {BASE};b={{b}};t=1795000000", "3.2"),
    (f"DKIM-Signature: {BASE}; b= {{b}} ; t=1795000000", "3.7: white space around the value is deleted with it"),
    (f"dkim-signature : {BASE}; b={{b}}", "RFC 5322 4.5.8"),
    (f"DKIM-Signature: {BASE}; z={COPY}; b={{b}}", "3.5: z= may be long"),
    (f"DKIM-Signature: {BASE}; b={{b}}; z={COPY}", "3.5"),
    (f"DKIM-Signature: z={FOLDED_COPY}; {BASE}; b={{b}}", "3.7: the b= tag is meant, not b= in another"),
    (f"DKIM-Signature: {BASE}; b={{b}}; z={FOLDED_COPY}", "3.7"),
    (f"DKIM-Signature: {BASE}; y=b=1; b={{b}}", "3.2: unknown tags are ignored"),
]
# Valid, too, but opendkim does not find b= in them.
OTHERS = [
    (f"DKIM-Signature: {BASE}; b =\r\n\t {{b}} \r\n\t; t=1795000000", "3.7"),
    (f"DKIM-Signature: {BASE};\r\n\tb\r\n\t = {{b}}", "3.2: white space around ="),
    (f"DKIM-Signature: {BASE}; xb=b=1; b={{b}}", "3.2"),
]


@pytest.mark.parametrize("form", ["simple/simple", "simple/relaxed", "relaxed/simple", "relaxed"])
@pytest.mark.parametrize(("template", "source"), [*VALID, *OTHERS], ids=range(len(VALID) + len(OTHERS)))
def test_a_signature_is_valid_however_its_tags_are_written(template, source, form):
    message = signed(template.replace("v=1;", f"v=1; c={form};"))
    assert result(message) == "pass", source
    assert result(message.replace(b"end", b"END")) == "fail"
    assert result(message.replace(b"one", b"two")) == "fail"
    assert result(b"Subject: two\r\n" + message) == "pass" and result(b"From: eve@evil.test\r\n" + message) == "fail"
    changed = message.replace(b"s=s;", b"s=s; n=1;").replace(b"=3Dx", b"=3Dy")  # the rest of the field is signed
    assert result(changed) == "fail"


@pytest.mark.parametrize("template", [template for template, _ in VALID], ids=range(len(VALID)))
def test_opendkim_says_the_same_of_them(template, tmp_path):
    form = "simple/simple" if template.startswith("DKIM-Signature: ") else "relaxed/relaxed"  # it writes the blank itself
    assert opendkim(tmp_path, signed(template.replace("v=1;", f"v=1; c={form};")))


@pytest.mark.parametrize(
    ("change", "expected", "source"),
    [
        (("v=1;", "v=1; q=dns/txt;"), "pass", "RFC 6376 3.5"), (("v=1;", "v=1; q=dns/txt:x/y;"), "pass", "3.5: a list"),
        (("v=1;", "v=1; q=x : dns/txt;"), "pass", "3.5"), (("v=1;", "v=1; q=x:\r\n\tdns/txt;"), "pass", "3.5: [FWS] around :"),
        (("v=1;", "v=1; q=x/y;"), "fail", "3.5: unknown methods are ignored"), (("v=1;", "v=1; q=dns/txtx;"), "fail", "3.5"),
        (("v=1;", "v=1; i=@shop.test;"), "pass", "3.5"), (("v=1;", "v=1; i=ann@shop.test;"), "pass", "3.5"),
        (("v=1;", "v=1; i=ann@a.shop.test;"), "pass", "3.5: a subdomain of d="),
        (("v=1;", "v=1; i=ann@A.SHOP.test;"), "pass", "3.5"),
        (("v=1;", "v=1; i=ann=40shop.test;"), "pass", "2.11: dkim-quoted-printable"),
        (("v=1;", "v=1; i=ann@shop=2Etest;"), "pass", "2.11"), (("v=1;", "v=1; i=a=3Bb=3Dc@shop.test;"), "pass", "2.11"),
        (("v=1;", "v=1; i=ann@\r\n\tshop.test;"), "pass", "2.11: white space is ignored"),
        (("v=1;", "v=1; i=ann+a=b@shop.test;"), "pass", "an = that is not encoded, as many write it"),
        (("v=1;", "v=1; i=\"a@b\"@shop.test;"), "pass", "RFC 5321 4.1.2"),
        (("v=1;", "v=1; i=@evil.test;"), "fail", "3.5, 6.1.1: MUST be d= or a subdomain"),
        (("v=1;", "v=1; i=ann@workshop.test;"), "fail", "3.5"), (("v=1;", "v=1; i=ann@test;"), "fail", "3.5"),
        (("v=1;", "v=1; i=ann@shop.test=40evil.test;"), "fail", "2.11"),
        (("v=1;", "v=1; i=shop.test;"), "fail", "3.5: the @ is needed"),
        (("v=1;", "v=1; i=;"), "fail", "3.5"), (("v=1;", "v=1; i=ann@shop=test;"), "fail", "2.11"),
        (("h=from:subject:from", "h=From : SUBJECT\r\n\t:from"), "pass", "3.5: [FWS] around :"),
        (("v=1;", "v=1; x=1795000200;"), "pass", "3.5"), (("v=1;", "v=1; x=1795000000;"), "fail", "3.5: expired"),
        (("v=1;", "v=1; x=" + "9" * 5000 + ";"), "pass", "3.5: never"), (("v=1;", "v=1; x=soon;"), "fail", "3.5"),
        (("v=1;", "v=1; t=1795000300; x=1795000200;"), "fail", "3.5: x= is before t="),
        (("v=1;", "v=2;"), "fail", "6.1.1"), (("v=1;", "v=1; c=relaxed/relaxed/simple;"), "permerror", "3.5"),
        (("v=1;", "v=1; b=AAAA;"), "permerror", "3.2: a tag occurs once"), (("v=1;", "v=1; x;"), "permerror", "3.2"),
        (("v=1;", "v=1; 1=x;"), "permerror", "3.2"), (("d=shop.test", "d=shop .test"), "permerror", "3.5: no key there"),
    ],
)  # fmt: skip
def test_what_a_tag_of_a_signature_means(change, expected, source):
    assert PLAIN.replace(*change) != PLAIN and result(signed(PLAIN.replace(*change))) == expected, source


@pytest.mark.parametrize(
    ("tags", "expected", "source"),
    [
        ("", "pass", "RFC 6376 3.6.1"), ("s=email;", "pass", "3.6.1"), ("s=email:web;", "pass", "3.6.1: a list"),
        ("s=web:email;", "pass", "3.6.1"), ("s= web : email ;", "pass", "3.6.1: [FWS] around :"), ("s=*;", "pass", "3.6.1"),
        ("s=web:*;", "pass", "3.6.1"), ("s=web;", "permerror", "3.6.1"), ("s=emails;", "permerror", "3.6.1"),
        ("s=tlsrpt;", "permerror", "RFC 8460 3"), ("s=tlsrpt:email;", "pass", "RFC 8460 3"),
        ("h=sha256;", "pass", "3.6.1"), ("h=sha1:sha256;", "pass", "3.6.1"), ("h=sha1 : sha256 ;", "pass", "3.6.1"),
        ("h=sha1;", "permerror", "3.6.1"), ("h=sha256x;", "permerror", "3.6.1"),
        ("t=y;", "pass", "3.6.1"), ("t=y:s;", "pass", "3.6.1: i= is of d= itself"), ("n=a note=b;", "pass", "3.6.1"),
        ("x=unknown;", "pass", "3.6.1"), ("s=email;s=web;", "permerror", "3.2: a tag occurs once"),
    ],
)  # fmt: skip
def test_what_a_tag_of_a_key_means(tags, expected, source):
    assert result(signed(PLAIN), text_of(KEY).replace("k=rsa;", f"k=rsa; {tags}")) == expected, source


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("t=s;", "permerror"), ("t=y : s;", "permerror"), ("t=s:y;", "permerror"), ("t=y;", "pass"), ("", "pass")],
)
def test_a_key_may_exclude_subdomains(flags, expected):
    """RFC 6376 3.6.1, t=s, however i= is written."""
    text = text_of(KEY).replace("k=rsa;", f"k=rsa; {flags}")
    for identity in ("ann@a.shop.test", "ann=40a=2Eshop.test"):
        assert result(signed(PLAIN.replace("v=1;", f"v=1; i={identity};")), text) == expected


GOOD, WRONG = text_of(KEY), text_of(OTHER)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([GOOD], "pass"), ([WRONG], "fail"), ([GOOD, WRONG], "pass"), ([GOOD, "v=spf1 -all"], "pass"),
        ([GOOD, "v=DKIM1; p="], "pass"), ([GOOD, WRONG, "nonsense"], "pass"), ([GOOD, text_of(EDWARDS)], "pass"),
        ([WRONG, "v=DKIM1; p="], "fail"), (["v=DKIM1; p=", text_of(EDWARDS)], "permerror"), (["v=spf1 -all", "x"], "permerror"),
        ([GOOD.replace("k=rsa;", "k=rsa; s=web;"), WRONG], "fail"), ([], "permerror"), (["v=DKIM2; p=x", GOOD], "pass"),
    ],
)  # fmt: skip
async def test_several_texts_at_a_selector_have_one_result(texts, expected):
    """RFC 6376 6.1.2: any of them may be the key; 3.6.2.2: there should be one. The DNS gives them in any order."""
    message = signed(PLAIN)
    said = claims(message[: header_end(message)])
    bodies = BodyHashes(said.forms())
    bodies.feed(message[header_end(message) :])
    hashed = bodies.finish()
    found = set()
    for order in itertools.permutations(texts):

        class Answers:
            async def txt(self, name: str, order: tuple[str, ...] = order) -> list[str]:
                if not order:
                    raise NoSuchName(name)
                return list(order)

        found.add(verify(said, hashed, await keys_of(Answers(), said), NOW)[0])  # type: ignore[arg-type]
    assert len(found) == 1 and found.pop().result == expected


IDN = "DKIM-Signature: v=1; a=rsa-sha256; d={d}; s={s}; {i}h=from; bh={{bh}}; b={{b}}"


@pytest.mark.parametrize(
    ("d", "s", "i"),
    [("dömain.test", "s", ""), ("xn--dmain-jua.test", "s", ""), ("DÖMAIN.test", "S", ""),
     ("dömain.test", "s", "i=@dömain.test; "),
     ("dömain.test", "s", "i=ann@xn--dmain-jua.test; "), ("xn--dmain-jua.test", "s", "i=ann@a.dömain.test; "),
     ("xn--dmain-jua.test", "s", "i=ann@d=C3=B6main.test; "), ("dömain.test", "é", ""), ("xn--dmain-jua.test", "é", ""),
     ("shop.test", "é", ""), ("shop.test", "S", "")],
)  # fmt: skip
async def test_the_domain_of_a_signature_is_the_same_in_u_labels_and_a_labels(d, s, i):
    """RFC 8616 5: U-labels are allowed in d=, s= and i= of a header in UTF-8; the DNS is asked for A-labels."""
    message = signed(IDN.format(d=d, s=s, i=i), names="from")
    asked = []

    class Answers:
        async def txt(self, name: str) -> list[str]:
            asked.append(name)
            return [text_of(KEY)]

    keys = await keys_of(Answers(), claims(message[: header_end(message)]))  # type: ignore[arg-type]
    (found,), _ = outcomes(message, keys)
    domain = "shop.test" if d == "shop.test" else "xn--dmain-jua.test"
    assert asked == [f"{'xn--9ca' if s == 'é' else 's'}._domainkey.{domain}"]
    assert (found.result, found.domain, found.selector) == ("pass", domain, "xn--9ca" if s == "é" else s)
    foreign = signed(IDN.format(d=d, s=s, i="i=@evil.test; "), names="from")
    assert outcomes(foreign, keys)[0][0].result == "fail"


SUBJECTS = [b"Subject : evil", b"Subject\t: evil", b"SUBJECT  \t: evil", b"Subject :\r\n\tevil", b"subject : evil"]


@pytest.mark.parametrize("form", ["simple/simple", "relaxed/relaxed"])
@pytest.mark.parametrize("field", SUBJECTS)
def test_white_space_in_front_of_the_colon_makes_no_other_field(field, form, tmp_path):
    """RFC 5322 4.5: it is the obsolete syntax of the same field, which is what other programs show."""
    over = PLAIN.replace("v=1;", f"v=1; c={form};").replace("h=from:subject:from", "h=from:subject:subject:from")
    names = "from:subject:subject:from"
    message = signed(over, names=names)
    assert result(message) == "pass"
    assert result(field + b"\r\n" + message) == "fail"
    own = MESSAGE.replace(b"Subject: one", field)
    message = signed(over, own, names=names)
    assert result(message) == "pass" and result(message.replace(b"evil", b"good")) == "fail"
    if b"\t:" not in field and b"\r\n" not in field:  # opendkim takes a tab for the end of the header; -t writes `: ` itself
        assert opendkim(tmp_path, message)


# ARC


def chain(sets: int, change: Callable[[str, int], str] = lambda field, number: field) -> bytes:
    """A message with so many ARC sets (RFC 8617 5.1). `change`: of each template, before it is signed."""
    message, sealed = MESSAGE, b""
    for number in range(1, sets + 1):
        results = change(f"ARC-Authentication-Results: i={number}; relay.test; arc=none", number).encode()
        tags = "a=rsa-sha256; c=relaxed/relaxed; d=shop.test; s=s; h=from:subject; bh={bh}; b={b}"
        own = f"ARC-Message-Signature: i={number}; {tags}"
        own = change(own, number)
        message = signed(own, message, names=own.partition("h=")[2].partition(";")[0])
        cv = "none" if number == 1 else "pass"
        seal = change(f"ARC-Seal: i={number}; a=rsa-sha256; cv={cv}; d=shop.test; s=s; b={{b}}", number)
        parts = [*filter(None, sealed.split(b"\r\n")), relaxed(results), relaxed(fields_of(message)[0])]
        empty = relaxed(re.sub(r"\s*\{b\}\s*", "", seal).encode())
        value = base64.b64encode(KEY.sign(b"\r\n".join([*parts, empty]), padding.PKCS1v15(), hashes.SHA256())).decode()
        whole = seal.replace("{b}", value).encode()
        sealed = b"\r\n".join([*parts, relaxed(whole)])
        message = whole + b"\r\n" + results + b"\r\n" + message
    return message


def chained(message: bytes, *texts: str) -> str:
    return outcomes(message, {"s._domainkey.shop.test": texts or (text_of(KEY),)})[1]


def moved(field: str, number: int) -> str:
    """i= at the end, in the two that are tag lists."""
    return field if field.startswith("ARC-A") else field.replace(f" i={number};", "", 1) + f"; i={number}"


@pytest.mark.parametrize(
    ("change", "source"),
    [
        (lambda field, number: field, "RFC 8617 4.1"),
        (lambda field, number: field.replace(": i=", ":i=", 1), "RFC 6376 3.2: no white space is needed"),
        (lambda field, number: field.replace(": i=", ":\ti=", 1), "3.2"),
        (lambda field, number: field.replace(": i=", ":\r\n i=", 1), "3.2"),
        (lambda field, number: field.replace(": i=", ": i = ", 1), "3.2"),
        (lambda field, number: field.replace(f"i={number};", f"i={number} ;", 1), "3.2"),
        (lambda field, number: field.lower() if field.startswith("ARC-A") else field.replace("ARC-", "arc-"), "RFC 5322 1.2.2"),
        (lambda field, number: field.replace(": i=", " : i=", 1), "RFC 5322 4.5"),
        (lambda field, number: field.replace(": i=", ": (x) i=", 1) if field.startswith("ARC-A") else field, "RFC 8617 4.1.1"),
        (moved, "RFC 6376 3.2: any order"),
    ],
)  # fmt: skip
def test_a_chain_is_the_same_however_its_instances_are_written(change, source):
    for sets in (1, 3):
        message = chain(sets, change)
        assert chained(message) == "pass", source
        assert chained(message, WRONG, GOOD) == "pass" and chained(message, WRONG) == "fail"
        assert chained(message.replace(b"end", b"END")) == "fail" and chained(message.replace(b"one", b"two")) == "fail"
        changed = re.sub(rb"(?i)(relay\.test; arc=)none", rb"\1pass", message, count=1)
        assert changed != message and chained(changed) == "fail"


@pytest.mark.parametrize("sets", [1, 2])
def test_a_chain_signs_each_author(sets):
    """RFC 8617 4.1.2, 5.2; RFC 6376 5.4, 8.15: or the sealer's result would stand for another author."""
    message = chain(sets)
    for where in (0, message.index(b"From:")):
        added = message[:where] + b"From: eve@evil.test\r\n" + message[where:]
        assert chained(added) == "fail"
        assert dkim.ARC(added).verify(dnsfunc=lambda name, timeout=5: text_of(KEY).encode())[0] != b"pass"


def test_a_chain_signs_the_author():
    """RFC 6376 5.4: a signature that does not cover From: says nothing about the author."""
    assert chained(chain(1)) == "pass"
    assert chained(chain(1, lambda field, number: field.replace("h=from:subject", "h=subject"))) == "fail"


@pytest.mark.parametrize(
    ("value", "authorless"),
    [
        (b'"a b"@b.test <', False), (b'"x" <a@b.test', False), (b'"\\"" a@b.test <', False), (b"(x (y) ) a@b.test <", False),
        (b'"a@b.test" <', True), (b"(a@b.test) <", True), (b"((x) a@b.test) <", True), (b"(\\) a@b.test) <", True),
        (b'"a@b.test', False), (b"(a@b.test <", False), (b") a@b.test <", False),
        # a name that is not ended, and comments (RFC 5322 3.2.2: quotes mean nothing in them)
        (b"Sad :( <ann@b.test>", False), (b"Ann (sales <ann@b.test>", False), (b'( "(" ) ceo@bank.test ) <>', True),
        (b'( (x) "ceo@bank.test <', False), (b'( "ceo@bank.test" <', True),
        # 4.4: white space around the @
        (b"ann @b.test <", False), (b"ann @ b.test <", False), (b"Sales @ Acme <", True), (b"ann@b <", False),
        (b"ann@_x.b.test <", False), (b"ann@[192.0.2.1] <", False), ("ann@bücher.test <".encode(), False),
        # names with an @ in them
        (b'"ceo@bank.test"@ <>', True), (b"=?utf-8?q?ceo@bank.test?= <>", True), (b"=?utf-8?B?ceo@bank.test?= <>", True),
        (b"@ <", True), (b"@@ <", True), (b"<@> <", True), (b"a@ <", True), (b"@b.test <", True),
        (b")" * 9000 + b" <a@b.test>", False), (b")" * 8000, True),
    ],
)  # fmt: skip
def test_what_is_no_address_list_may_have_an_address_in_it(value, authorless):
    found = claims(b"From: " + value + b"\r\n\r\n")
    assert found.malformed and found.authorless == authorless
    several = claims(b"From: x <\r\nFrom: " + value + b"\r\n\r\n")
    assert several.malformed and several.authorless == authorless


def test_dkimpy_says_the_same_of_a_chain():
    for sets in (1, 3):
        found, _, reason = dkim.ARC(chain(sets)).verify(dnsfunc=lambda name, timeout=5: text_of(KEY).encode())
        assert found == b"pass", reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"ARC-Seal: i=3", b"X: i=3"), (b"ARC-Seal: i=1", b"X: i=1"), (b"ARC-Message-Signature: i=2", b"X: i=2"),
        (b"ARC-Authentication-Results: i=1", b"X: i=1"), (b"ARC-Seal: i=2", b"ARC-Seal: i=1"),
        (b"ARC-Seal: i=3", b"ARC-Seal: i=4"),
        (b"cv=none", b"cv=pass"), (b"i=3; a=rsa-sha256; cv=pass", b"i=3; a=rsa-sha256; cv=fail"),
        (b"ARC-Seal: i=2; ", b"ARC-Seal: i=2; h=from; "), (b"ARC-Seal: i=2; a=rsa-sha256", b"ARC-Seal: i=2; a=rsa-sha1"),
        (b"ARC-Seal: i=3", b"ARC-Seal: i=x"), (b"ARC-Seal: i=3;", b"ARC-Seal: i=3; i=3;"),
        (b"h=from:subject", b"h=from:arc-seal"),
    ],
)  # fmt: skip
def test_a_broken_chain_fails(old, new):
    """RFC 8617 5.2."""
    message = chain(3)
    assert old in message and chained(message.replace(old, new, 1)) == "fail"
