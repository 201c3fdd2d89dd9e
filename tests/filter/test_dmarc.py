"""DMARC (RFC 7489; RFC 9989, which obsoletes it): how records are read, which domains are aligned, whose mail is judged."""

import itertools

import pytest

from relaymta.dns import DnsFailure, NoSuchName
from relaymta.filter import dmarc
from relaymta.filter.signatures import claims

NONE = "none none"
NO_POLICY = "fail none"
BROKEN = "permerror none"
REJECT, QUARANTINE = "fail reject", "fail quarantine"
RUA = "rua=mailto:a@b.test"


class Texts:
    """A resolver with the DMARC records of some domains. `asked`: the names so far."""

    def __init__(self, known: dict[str, list[str] | Exception]) -> None:
        self.known = {f"_dmarc.{domain}": found for domain, found in known.items()}
        self.asked: list[str] = []

    async def txt(self, name: str) -> list[str]:
        self.asked.append(name)
        found = self.known.get(name, NoSuchName(name))
        if isinstance(found, Exception):
            raise found
        return found


# (record, result for bank.test, the result for a.bank.test where it is another, source)
RECORDS = [
    ("v=DMARC1; p=reject", REJECT, "", "RFC 7489 6.3"), ("v=DMARC1; p=quarantine", QUARANTINE, "", "7489 6.3"),
    ("v=DMARC1; p=none", NO_POLICY, "", "7489 6.3"), ("v=DMARC1;p=reject;", REJECT, "", "7489 6.4: dmarc-sep at the end"),
    # What is ignored
    ("v=DMARC1;; p=reject", REJECT, "", "RFC 9989 4.8: syntax errors are discarded"),
    ("v=DMARC1; p=reject;;", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; ;", REJECT, "", "9989 4.8"), ("v=DMARC1;;;; p=reject;;;;", REJECT, "", "9989 4.8"),
    ("v=DMARC1; ; p=reject", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; x=1", REJECT, "", "9989 4.7: unknown tags"),
    ("v=DMARC1; x=1; p=reject", REJECT, "", "9989 4.7"), ("v=DMARC1; x; p=reject", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; unknown", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; =x", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; x=", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; =", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; x=a=b", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; \u00e4=1", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; a b=1", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; v=DMARC2", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; v=DMARC1", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject\t", REJECT, "", "7489 6.4: WSP"),
    ("v=DMARC1; p=reject\n", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject\r\n", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject;\t", REJECT, "", "7489 6.4"), ("v=DMARC1; p=reject;\n", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject ", REJECT, "", "7489 6.4"), ("v=DMARC1; p=reject ; ", REJECT, "", "7489 6.4"),
    ("v=DMARC1 ;p=reject", REJECT, "", "7489 6.4"), ("v = DMARC1 ; p = reject", REJECT, "", "7489 6.4"),
    ("v\t=\tDMARC1\t;\tp\t=\treject", REJECT, "", "7489 6.4"),
    ("v=DMARC1;\r\n p=reject;\r\n\tsp=none", REJECT, NO_POLICY, "RFC 6376 3.2: FWS"),
    ("v=DMARC1; p=REJECT", REJECT, "", "RFC 5234 2.3: strings are case-insensitive"),
    ("v=DMARC1; P=Reject", REJECT, "", "5234 2.3"),
    ("V=DMARC1; p=reject", REJECT, "", "5234 2.3"), (f"v=DMARC1; p=reject; {RUA}", REJECT, "", "7489 6.3"),
    ("v=DMARC1; p=reject; rua=?", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; rua=", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; ruf=mailto:a@b.test; fo=1:d:s; rf=afrf; ri=3600", REJECT, "", "7489 6.3"),
    ("v=DMARC1; p=reject; fo=9; rf=x; ri=x", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; adkim=x; aspf=x", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; pct=x", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; pct=", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; pct=-1", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; pct=101", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; pct=0.5", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; pct=0", QUARANTINE, "", "7489 6.6.4"),
    ("v=DMARC1; p=quarantine; pct=0", NO_POLICY, "", "7489 6.6.4"), ("v=DMARC1; p=reject; pct=100", REJECT, "", "7489 6.6.4"),
    ("v=DMARC1; p=reject; pct=100%", REJECT, "", "9989 4.8"), ("v=DMARC1; p=reject; t=y", QUARANTINE, "", "9989 4.7"),
    ("v=DMARC1; p=reject; t=n", REJECT, "", "9989 4.7"), ("v=DMARC1; p=reject; t=x", REJECT, "", "9989 4.8"),
    ("v=DMARC1; p=reject; psd=u", REJECT, "", "9989 4.7"), ("v=DMARC1; p=reject; psd=?", REJECT, "", "9989 4.8"),
    ("v=DMARC1; x=1; y=2; z=3; p=reject", REJECT, "", "9989 4.7: p= need not be the second tag"),
    ("v=DMARC1; sp=none; p=reject", REJECT, NO_POLICY, "9989 4.8"),
    # Policies of sub-domains
    ("v=DMARC1; p=reject; sp=none", REJECT, NO_POLICY, "7489 6.3"),
    ("v=DMARC1; p=none; sp=reject", NO_POLICY, REJECT, "7489 6.3"),
    ("v=DMARC1; p=none; sp=Quarantine ", NO_POLICY, QUARANTINE, "7489 6.3"),
    ("v=DMARC1; p=reject;; sp=none;;", REJECT, NO_POLICY, "9989 4.8"),
    ("v=DMARC1; p=none; sp=reject; x", NO_POLICY, REJECT, "9989 4.8"),
    ("v=DMARC1; p=none; sp=reject\n", NO_POLICY, REJECT, "9989 4.8"),
    ("v=DMARC1; p=reject; np=none", REJECT, "", "9989 4.7: of domains that do not exist"),
    # p= is missing or invalid
    (f"v=DMARC1; {RUA}", NO_POLICY, "", "7489 6.6.3, 9989 4.10.1"),
    (f"v=DMARC1; sp=reject; {RUA}", NO_POLICY, "", "7489 6.6.3: as if p=none"),
    (f"v=DMARC1; p=; {RUA}", NO_POLICY, "", "7489 6.6.3"), (f"v=DMARC1; p=rejected; {RUA}", NO_POLICY, "", "7489 6.6.3"),
    (f"v=DMARC1; p=reject.; {RUA}", NO_POLICY, "", "7489 6.6.3"),
    (f"v=DMARC1; p=bogus; sp=reject; {RUA}", NO_POLICY, "", "7489 6.6.3"),
    (f"v=DMARC1; p={RUA}", BROKEN, "", "7489 6.6.3"), (f"v=DMARC1; p; {RUA}", NO_POLICY, "", "9989 4.7"),
    (f"v=DMARC1;; {RUA};;", NO_POLICY, "", "7489 6.6.3"),
    ("v=DMARC1; p=bogus; rua=mailto:a@b.test!10m", NO_POLICY, "", "7489 6.6.3"),
    ("v=DMARC1; p=bogus; rua=x, https://b.test/dmarc", NO_POLICY, "", "7489 6.6.3: at least one valid URI"),
    ("v=DMARC1; p=bogus; rua=mailto:a@b.test ,mailto:b@b.test", NO_POLICY, "", "7489 6.6.3"),
    ("v=DMARC1; p=bogus", BROKEN, "", "7489 6.6.3: no DMARC processing"), ("v=DMARC1; p=bogus; rua=", BROKEN, "", "7489 6.6.3"),
    ("v=DMARC1; p=bogus; rua=a@b.test", BROKEN, "", "7489 6.6.3: no URI"),
    ("v=DMARC1; p=bogus; ruf=mailto:a@b.test", BROKEN, "", "7489 6.6.3"),
    ("v=DMARC1", NO_POLICY, "", "9989 4.7: as if p=none"), ("v=DMARC1;", NO_POLICY, "", "9989 4.7"),
    ("v=DMARC1; ;", NO_POLICY, "", "9989 4.7"), ("v=DMARC1; sp=none", NO_POLICY, "", "9989 4.7"),
    # sp= or np= is invalid
    (f"v=DMARC1; p=reject; sp=bogus; {RUA}", NO_POLICY, "", "7489 6.6.3, 9989 4.10.1"),
    (f"v=DMARC1; p=reject; sp=; {RUA}", NO_POLICY, "", "7489 6.6.3"),
    (f"v=DMARC1; p=reject; np=bogus; {RUA}", NO_POLICY, "", "9989 4.10.1"),
    ("v=DMARC1; p=reject; sp=bogus", BROKEN, "", "7489 6.6.3"),
    ("v=DMARC1; p=reject; np=bogus", BROKEN, "", "9989 4.10.1"),
    # No DMARC record: the first tag is not v=DMARC1
    ("v=dmarc1; p=reject", NONE, "", "7489 6.3: the value is case-sensitive"), ("v=DMARC2; p=reject", NONE, "", "7489 6.3"),
    ("v=DMARC1x; p=reject", NONE, "", "7489 6.3"), ("v=DMARC1 p=reject", NONE, "", "7489 6.3"),
    ("p=reject; v=DMARC1", NONE, "", "7489 6.3"),
    ("p=reject", NONE, "", "7489 6.3"), ("; v=DMARC1; p=reject", NONE, "", "7489 6.3"),
    (" v=DMARC1; p=reject", NONE, "", "9989 4.8"),
    ('"v=DMARC1; p=reject"', NONE, "", "7489 6.3"), ("v=spf1 -all", NONE, "", "7489 6.6.3"), ("", NONE, "", "7489 6.6.3"),
    ("v=DMARC1; p=reject; x=" + "y" * 5000, NONE, "", "above our limit"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected", "below", "source"), RECORDS)
async def test_how_a_record_is_read(record, expected, below, source):
    for others in ([], ["v=spf1 -all"], ["", "x"]):  # other texts at the same name are no records (RFC 7489 6.6.3)
        for author, wanted in (("bank.test", expected), ("a.bank.test", below or expected), ("a.b.bank.test", below or expected)):
            texts = Texts({"bank.test": [*others, record]})
            found = await dmarc.check(texts, [author], ("evil.test", "pass"), [])  # type: ignore[arg-type]
            assert (f"{found.result} {found.policy}", found.domain) == (wanted, author), source


@pytest.mark.parametrize(
    ("records", "author", "expected", "source"),
    [({"bank.test": ["v=DMARC1; p=reject", "v=DMARC1; p=none"]}, "bank.test", NONE, "RFC 7489 6.6.3: more than one are none"),
     ({"bank.test": ["v=DMARC1; p=reject", "v=DMARC1; p=reject"]}, "bank.test", NONE, "7489 6.6.3"),
     ({"bank.test": ["v=DMARC1; p=reject", "v=DMARC1; p=none"]}, "a.bank.test", NONE, "7489 6.6.3"),
     ({"a.bank.test": ["v=DMARC1; p=none", "v=DMARC1; p=none"], "bank.test": ["v=DMARC1; p=reject"]}, "a.bank.test", REJECT,
      "7489 6.6.3: as if there were none"),
     ({"a.bank.test": ["v=DMARC1; p=none"], "bank.test": ["v=DMARC1; p=reject"]}, "a.bank.test", NO_POLICY, "7489 6.6.3"),
     ({"a.bank.test": ["v=DMARC1; p=none; sp=reject"]}, "a.bank.test", NO_POLICY, "7489 6.3: no sp= here"),
     ({"a.bank.test": ["v=DMARC1; p=bogus"], "bank.test": ["v=DMARC1; p=reject"]}, "a.bank.test", BROKEN, "7489 6.6.3"),
     ({"a.bank.test": ["v=spf1 -all"], "bank.test": ["v=DMARC1; p=reject"]}, "a.bank.test", REJECT, "7489 6.6.3"),
     ({"bank.test": DnsFailure("x")}, "bank.test", "temperror reject", "7489 6.6.3"),
     ({"bank.test": DnsFailure("x")}, "a.bank.test", "temperror reject", "7489 6.6.3"),
     ({}, "bank.test", NONE, "7489 6.6.3"), ({"test": ["v=DMARC1; p=reject"]}, "bank.test", NONE, "7489 6.6.3")],
)  # fmt: skip
async def test_which_record_is_used(records, author, expected, source):
    found = await dmarc.check(Texts(records), [author], ("evil.test", "pass"), [])  # type: ignore[arg-type]
    assert f"{found.result} {found.policy}" == expected, source


# (tags, author, authenticated domain, whether they are aligned, source)
ALIGNMENTS = [
    ("", "bank.test", "bank.test", True, "RFC 7489 3.1"), ("", "a.bank.test", "bank.test", True, "3.1"),
    ("", "bank.test", "a.bank.test", True, "3.1"),
    ("", "a.bank.test", "b.bank.test", True, "3.1"), ("", "bank.test", "xbank.test", False, "3.1"),
    ("", "bank.test", "bank.test.evil.test", False, "3.1"),
    ("", "BANK.test", "bank.TEST", True, "RFC 4343"), ("", "bank.test", "bank.test.", True, "RFC 1034 3.1"),
    ("", "shop.co.uk", "mail.shop.co.uk", True, "3.2"),
    ("", "shop.co.uk", "co.uk", False, "3.1.1: a public suffix is aligned with nothing"),
    ("", "shop.co.uk", "uk", False, "3.1.1"), ("", "shop.co.uk", "evil.co.uk", False, "3.2"),
    ("", "co.uk", "shop.co.uk", False, "3.1.1"),
    ("", "co.uk", "co.uk", False, "3.1.1"), ("", "com", "com", False, "3.1.1: d=com would never be aligned"),
    ("", "shop.com", "com", False, "3.1.1"),
    ("", "a.github.io", "b.github.io", False, "3.2"), ("", "github.io", "github.io", False, "3.1.1"),
    ("", "a.ck", "a.ck", False, "3.2: *.ck"),
    ("", "www.ck", "www.ck", True, "3.2: !www.ck"), ("s", "bank.test", "bank.test", True, "3.1"),
    ("s", "a.bank.test", "bank.test", False, "3.1"),
    ("s", "bank.test", "a.bank.test", False, "3.1"), ("s", "co.uk", "co.uk", False, "3.1.1"),
    ("r", "a.bank.test", "bank.test", True, "3.1"),
    ("x", "a.bank.test", "bank.test", True, "RFC 9989 4.8: the default"),
    ("S", "a.bank.test", "bank.test", False, "RFC 5234 2.3"),
    ("", "b\u00fccher.test", "xn--bcher-kva.test", True, "RFC 8616 6, RFC 9989 5.3.1"),
    ("", "xn--bcher-kva.test", "b\u00fccher.test", True, "8616 6"),
    ("", "b\u00fccher.test", "b\u00fccher.test", True, "8616 6"),
    ("", "B\u00dcCHER.test", "a.XN--BCHER-KVA.test", True, "8616 6"),
    ("", "a.b\u00fccher.test", "b.xn--bcher-kva.test", True, "8616 6"),
    ("s", "b\u00fccher.test", "xn--bcher-kva.test", True, "8616 6"),
    ("s", "a.b\u00fccher.test", "xn--bcher-kva.test", False, "8616 6"), ("", "b\u00fccher.test", "bucher.test", False, "8616 6"),
    ("", "\u4f8b.\u516c\u53f8.cn", "xn--55qx5d.cn", False, "3.1.1: a public suffix in A-labels"),
    ("", "\u516c\u53f8.cn", "xn--55qx5d.cn", False, "3.1.1"),
    ("", "\u4f8b.\u516c\u53f8.cn", "mail.xn--fsq.xn--55qx5d.cn", True, "3.2"), ("", "bank.test", "", False, "3.1"),
    ("", "bank.test", "[192.0.2.1]", False, "3.1"), ("", "bank.test", "a..bank.test", False, "RFC 1035 2.3.4"),
]  # fmt: skip


PUBLISHED = (
    "bank.test", "shop.co.uk", "co.uk", "com", "shop.com", "a.github.io", "github.io", "a.ck", "www.ck", "xn--bcher-kva.test",
    "xn--fsq.xn--55qx5d.cn", "xn--55qx5d.cn",
)  # fmt: skip


@pytest.mark.parametrize(("tags", "author", "domain", "aligned", "source"), ALIGNMENTS)
async def test_which_domains_are_aligned(tags, author, domain, aligned, source):
    for kind, case in itertools.product(("spf", "dkim"), ("pass", "temperror")):
        record = f"v=DMARC1; p=reject; a{kind}={tags}" if tags else "v=DMARC1; p=reject"
        texts = Texts({name: [record] for name in PUBLISHED})
        spf, signatures = (domain if kind == "spf" else "", case), [(domain, case)] if kind == "dkim" else []
        found = await dmarc.check(texts, [author], spf, signatures)  # type: ignore[arg-type]
        assert found.result == (case if aligned else "fail"), (source, found)


@pytest.mark.parametrize(
    ("author", "asked"),
    [(".".join([*("x" * 60 for _ in range(4)), "test"]), ["_dmarc." + "x" * 60 + ".test"]),  # with _dmarc. too long
     ("x_y.bank.test", ["_dmarc.x_y.bank.test", "_dmarc.bank.test"]), ("x" * 64 + ".bank.test", ["_dmarc.bank.test"]),
     ("a..bank.test", []), ("\u2603.test", []), ("", [])],
)  # fmt: skip
async def test_a_name_that_cannot_exist_is_not_asked_for_and_no_temporary_failure(author, asked):
    texts = Texts({})
    found = await dmarc.check(texts, [author], ("evil.test", "pass"), [])  # type: ignore[arg-type]
    assert (found.result, found.policy) == ("none", "none") and texts.asked == asked


# From: (value, authors' domains or None where it is malformed, source)
FROM = [
    ("ann@bank.test", "bank.test", "RFC 5322 3.4"), ("<ann@bank.test>", "bank.test", "3.4"),
    ("Ann <ann@bank.test>", "bank.test", "3.4"),
    ('"Ann" <ann@bank.test>', "bank.test", "3.4"), ('"Ann, B." <ann@bank.test>', "bank.test", "3.4"),
    ("Ann B. <ann@bank.test>", "bank.test", "4.1"),
    ('"eve@evil.test" <ann@bank.test>', "bank.test", "3.4: a display name"),
    ('"<eve@evil.test>" <ann@bank.test>', "bank.test", "3.4"),
    ("=?utf-8?q?Ann?= <ann@bank.test>", "bank.test", "RFC 2047 5"),
    ("=?utf-8?b?QW5u?= =?utf-8?q?B?= <ann@bank.test>", "bank.test", "2047 5"),
    ("Ann (ann@evil.test) <ann@bank.test>", "bank.test", "3.2.2: a comment"), ("ann@bank.test (Ann)", "bank.test", "3.2.2"),
    ("(x) ann (y) @ (z) bank . test (w)", "bank.test", "4.4: obs-addr-spec"), ("ann@bank. test", "bank.test", "4.4"),
    ("<@evil.test:ann@bank.test>", "bank.test", "4.4: obs-route"), ("ann@BANK.Test", "bank.test", "RFC 4343"),
    ("ann+tag=x@bank.test", "bank.test", "3.4.1"), ('"a@b"@bank.test', "bank.test", "3.4.1"),
    ('"a b"@bank.test', "bank.test", "3.4.1"),
    ("ann@a.bank.test", "a.bank.test", "3.4.1"), ("ann@x_y.bank.test", "x_y.bank.test", "names in use"),
    ("ann@[192.0.2.1]", "", "3.4.1: an address literal has no policy"), ("ann@[IPv6:2001:db8::1]", "", "3.4.1"),
    ("ann", "", "no domain"), ("Ann <ann>", "", "no domain"), ("root", "", "no domain"),
    ("<ann@localhost>", "localhost", "3.4.1"),
    ("ann@b\u00fccher.test", "xn--bcher-kva.test", "RFC 6532 3.2, RFC 9989 5.3.1"),
    ("ann@B\u00dcCHER.test", "xn--bcher-kva.test", "RFC 5891, UTS 46"),
    ("\u00c4nn <\u00e4nn@b\u00fccher.test>", "xn--bcher-kva.test", "6532 3.2"),
    ("ann@xn--bcher-kva.test", "xn--bcher-kva.test", "RFC 5890 2.3.2.1"),
    ("ann@XN--BCHER-KVA.test", "xn--bcher-kva.test", "5890 2.3.2.1"), ("ann@stra\u00dfe.test", "xn--strae-oqa.test", "RFC 5891"),
    ("ann@\u4f8b.test", "xn--fsq.test", "RFC 5891"),
    ("ann@bank.test, bob@shop.test", "bank.test shop.test", "3.6.2: mailbox-list"),
    ("ann@bank.test, bob@bank.test", "bank.test", "3.6.2"), (",ann@bank.test,,", "bank.test", "4.4: obs-mbox-list"),
    ("us: ann@bank.test, bob@shop.test;", "bank.test shop.test", "RFC 6854"), ("us:;", "", "RFC 6854"),
    ("ann@b\u00fccher.test, bob@xn--bcher-kva.test", "xn--bcher-kva.test", "one domain"),
    ("ann@bank.test <eve@evil.test>", None, "two addresses that programs choose between"), ("ann@bank.test bob", None, "3.4"),
    ("ann@@bank.test", None, "3.4"), ("@bank.test", None, "3.4"), ("ann@", None, "3.4"), ("<ann@bank.test", None, "3.4"),
    ("<ann@bank.test>>", None, "3.4"), ("ann@bank..test", None, "3.4.1"), ("ann@.bank.test", None, "3.4.1"),
    ("ann@bank.test.", None, "3.4.1"),
    ("", None, "3.6.2"), ("   ", None, "3.6.2"), ('"Ann <ann@bank.test>', None, "3.2.4"), ("(Ann <ann@bank.test>", None, "3.2.2"),
    (f"ann@{'x' * 64}.test", None, "RFC 1035 2.3.4"), (f"ann@{'x.' * 130}test", None, "RFC 1035 2.3.4"),
    ("ann@${domain}", None, "a template"), ("ann@{{domain}}", None, "a template"), ("ann@a+b.test", None, "RFC 5321 2.3.5"),
    ("ann@a!b.test", None, "RFC 5321 2.3.5"), ("ann@[bank.test]", None, "RFC 5321 4.1.3"), ("bank.test!ann", None, "a route"),
    ("ann%bank.test", None, "a route"), ('"ann@bank.test"', None, "an address within quotes"),
    ("ann@\u2603.test", None, "RFC 5891"),
    ("=?utf-8?q?ann=40bank.test?=", None, "2047 5: no encoded address"), ("ann@bank.test;bob@shop.test", None, "3.4"),
    ("ann@bank.test\x00", None, "3.2"), ("ann@ba\x7fnk.test", None, "3.2"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected", "source"), FROM)
async def test_whose_policy_is_asked_for(value, expected, source):
    """Whatever From: is, the answer is permanent where the DNS answers."""
    found = claims(b"Subject: x\r\nFrom: " + value.encode() + b"\r\nTo: c@d.test\r\n\r\n")
    assert (None if found.malformed else " ".join(found.authors)) == expected, source
    texts = Texts({})
    judged = await dmarc.check(texts, found.authors, ("evil.test", "pass"), [])  # type: ignore[arg-type]
    assert judged.result == "none" and {name.partition(".")[0] for name in texts.asked} <= {"_dmarc"}
