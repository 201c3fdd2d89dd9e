"""SPF (RFC 7208): which domains and names are looked up, what they are compared with, and what is ignored. The suite of the RFC
is in test_verify.py."""

import pytest

from relaymta.dns import Resolver
from relaymta.filter import spf
from tests.support.zone import Zone, nameserver

CLIENT = "192.0.2.9"


async def checked(data: dict[str, list], sender: str, helo: str = "helo.test") -> tuple[spf.Spf, list[tuple[str, str]]]:
    """The result with a zone, over the wire, and the queries."""
    zone = Zone(data)
    async with nameserver(zone, servfail=True) as address:
        resolver = Resolver([address])
        try:
            return await spf.check(resolver, CLIENT, sender, helo), zone.asked
        finally:
            await resolver.close()


LONG = "x" * 64
DEEP = ".".join(["abcdefghi"] * 26)  # 259 characters
NO_DOMAIN = [
    # (domain, source)
    ("localhost", "RFC 7208 4.3: not a multi-label domain name"), ("test", "4.3"), ("localhost.", "4.3"),
    ("[192.0.2.1]", "4.3, suite: helo-domain-literal"), ("[IPv6:2001:db8::1]", "4.3"), ("[192.0.2.1", "4.3"),
    ("192.0.2.1", "RFC 1123 2.1"),
    ("a..example", "4.3: zero-length label"), (".example", "4.3"), ("a.example..", "4.3"), ("..", "4.3"), (".", "4.3"),
    (f"{LONG}.example", "4.3: a label longer than 63 characters"), (f"a.{LONG}", "4.3"), (DEEP, "RFC 1035 2.3.4: 255 octets"),
    ("${domain}", "a template"), ("${domain}.example", "a template"), ("{{helo}}.example", "a template"),
    ("%h.example", "a template"),
    ("<host>.example", "a template"), ("a+b.example", "RFC 5321 2.3.5"), ("a=b.example", "RFC 5321 2.3.5"),
    ("a!b.example", "RFC 5321 2.3.5"), ("a@b.example", "RFC 5321 2.3.5"), ("a:b.example", "RFC 5321 2.3.5"),
    ("a'b.example", "RFC 5321 2.3.5"), ("a/b.example", "RFC 5321 2.3.5"), ("*.example", "RFC 5321 2.3.5"),
    ("a\\.b.example", "RFC 5321 2.3.5"), ("\u2603.example", "RFC 5891: not in IDNA 2008"), ("xn--\u00e4.example", "RFC 5891"),
]  # fmt: skip


@pytest.mark.parametrize(("domain", "source"), NO_DOMAIN)
async def test_what_is_no_domain_has_no_policy_and_is_not_looked_up(domain, source):
    for sender, helo in ((f"ann@{domain}", "helo.test"), ("", domain)):
        if sender.count("@") > 1:
            continue  # its domain is what is behind the last @
        found, asked = await checked({}, sender, helo)
        assert (found.result, asked) == ("none", []), source


@pytest.mark.parametrize(
    "domain", ["b.test", "B.TEST", "b.test.", "x_y.test", "_spf.test", "a-.test", "1.b2.test", "xn--bcher-kva.test"]
)
async def test_what_is_a_domain_is_looked_up(domain):
    for sender, helo in ((f"ann@{domain}", "helo.test"), ("", domain)):
        found, asked = await checked({domain.rstrip("."): [{"TXT": "v=spf1 -all"}]}, sender, helo)
        assert (found.result, found.domain) == ("fail", domain.lower().rstrip(".")) and len(asked) == 1


# Local parts of senders: the label, or labels, that exists:%{l} asks for (RFC 7208 7.2, 7.3).
LOCAL_PARTS = [
    "bounce+ann=shop.test", "bounces+1234-ann=shop.test", "prvs=0123456789=ann", "SRS0=HHH=TT=shop.test=ann", "ann+tag",
    "a=b", "a%b", "a'b",
    "a!b", "a#b", "a$b", "a&b", "a*b", "a/b", "a?b", "a^b", "a`b", "a{b", "a|b", "a}b", "a~b", "a-b", "a_b", "a.b", "-", "+",
    '"a b"', '"a@b"', '"a:b"', '"a,b"', '"a;b"', '"a<b>"', '"[192.0.2.1]"', '"a(b)"', '"a\\"b"', '"a\\\\b"',
    '"x@evil.test"', '"@"', '" "',
]  # fmt: skip


@pytest.mark.parametrize("local", LOCAL_PARTS)
async def test_a_name_made_of_a_local_part_is_asked_for(local):
    policy = [{"TXT": "v=spf1 exists:%{l}._u.%{d} -all"}]
    for there in (True, False):
        data = {"b.test": policy} | ({f"{local}._u.b.test": [{"A": "127.0.0.2"}]} if there else {})
        found, asked = await checked(data, f"{local}@b.test")
        assert found.result == ("pass" if there else "fail"), found
        assert asked == [("b.test", "TXT"), (f"{local.lower()}._u.b.test", "A")]


@pytest.mark.parametrize(
    ("local", "source"),
    [('"a..b"', "RFC 1035 2.3.4: an empty label"), ("x" * 64, "RFC 1035 2.3.4: 63 octets"), ("\u00e4", "RFC 8616 4"),
     ("ann\u2603", "RFC 8616 4"), ('"\u00e4 b"', "RFC 8616 4")],
)  # fmt: skip
async def test_a_local_part_that_no_name_can_have_matches_nothing(local, source):
    for policy, expected in (("exists:%{l}._u.%{d} -all", "fail"), ("a:%{l}._u.%{d} ?all", "neutral")):
        found, asked = await checked({"b.test": [{"TXT": f"v=spf1 {policy}"}]}, f"{local}@b.test")
        assert (found.result, len(asked)) == (expected, 1), source


@pytest.mark.parametrize(
    "kind", ["include:%{l}.b.test", "a:%{l}.b.test", "mx:%{l}.b.test", "exists:%{l}.b.test", "redirect=%{l}.b.test"]
)
@pytest.mark.parametrize("row", [[{"TXT": "v=spf1 +all"}, {"A": CLIENT}, {"MX": [1, "x+y.test"]}], ["TIMEOUT"], []])
async def test_each_mechanism_may_ask_for_an_odd_name(kind, row):
    data = {"b.test": [{"TXT": f"v=spf1 {kind}"}], "v+ann=shop.b.test": row, "x+y.test": [{"A": CLIENT}]}
    found, _ = await checked(data, "v+ann=shop@b.test")
    none = "permerror" if kind[:7] in ("include", "redirec") else "neutral"
    assert found.result == {"TIMEOUT": "temperror"}.get(str(row[0]), "pass") if row else none


@pytest.mark.parametrize(
    ("terms", "expected", "source"),
    [("x=1 x=2 -all", "fail", "RFC 7208 6: unknown modifiers are ignored, no matter how often"),
     ("x=1 X=2 -all", "fail", "6"), ("a=b.test a=b.test -all", "fail", "6"), ("-all x=1 x=1 x=1", "fail", "6"),
     ("op=a op=b -all", "fail", "6"), ("default=pass default=fail -all", "fail", "6"),
     ("x= x= -all", "fail", "6: macro-string may be empty"),
     ("x=%{d} x=%{l} -all", "fail", "6"), ("x=%{z} -all", "permerror", "4.6.1: a syntax error"),
     ("x=1 x=%{z} -all", "permerror", "4.6.1"),
     ("x=% x=1 -all", "permerror", "4.6.1"), ("exp=e.test exp=f.test -all", "permerror", "6: exp= at most once"),
     ("EXP=e.test exp=f.test -all", "permerror", "6, names are case-insensitive (4.6.1)"),
     ("redirect=r.test redirect=r.test", "permerror", "6: redirect= at most once"),
     ("redirect=r.test Redirect=r.test", "permerror", "6"), ("Redirect=r.test", "softfail", "6.1"),
     ("REDIRECT=r.test x=1 x=1", "softfail", "6.1"),
     ("redirect=r.test", "softfail", "6.1"), ("moo -all", "permerror", "4.6.1: an unknown mechanism"),
     ("x.y-z_1=2 x.y-z_1=3 -all", "fail", "4.6.1"),
     ("1x=1 -all", "permerror", "4.6.1: a name begins with a letter"), ("=a -all", "permerror", "4.6.1")],
)  # fmt: skip
async def test_which_modifiers_are_ignored(terms, expected, source):
    data = {"b.test": [{"TXT": f"v=spf1 {terms}"}], "r.test": [{"TXT": "v=spf1 ~all"}]}
    found, _ = await checked(data, "ann@b.test")
    assert found.result == expected, (source, found)


@pytest.mark.parametrize(
    ("sender", "asked"),
    [("ann@b.test", "ann.ann@b.test.b.test"), ('"x@evil.test"@b.test', '"x@evil.test"."x@evil.test"@b.test.b.test'),
     ('"@"@b.test', '"@"."@"@b.test.b.test'), ('"a@b"@B.test', '"a@b"."a@b"@b.test.b.test')],
)  # fmt: skip
async def test_macros_take_the_local_part_in_front_of_the_last_at(sender, asked):
    found, queries = await checked({"b.test": [{"TXT": "v=spf1 exists:%{l}.%{s}.%{o} -all"}]}, sender)
    assert (found.result, found.domain, queries[-1]) == ("fail", "b.test", (asked, "A"))


@pytest.mark.parametrize(
    "domain", ["b\u00fccher.test", "B\u00dcCHER.test", "b\u00fccher\u3002test", "xn--bcher-kva.test", "XN--BCHER-KVA.TEST"]
)
async def test_u_labels_are_looked_up_as_a_labels(domain):
    """RFC 8616 4: in the first query, and in macros."""
    policy = {"xn--bcher-kva.test": [{"TXT": "v=spf1 exists:%{o}.o.%{d} -all"}]}
    data = policy | {"xn--bcher-kva.test.o.xn--bcher-kva.test": [{"A": "127.0.0.2"}]}
    for sender, helo in ((f"ann@{domain}", "helo.test"), ("", domain)):
        found, _ = await checked(data, sender, helo)
        assert (found.result, found.domain) == ("pass", "xn--bcher-kva.test")


async def test_a_name_that_is_too_long_loses_as_many_labels_as_necessary():
    """RFC 7208 7.3: from the left, until it has 253 characters at most."""
    label = "a" * 60
    policy = f"v=spf1 exists:%{{l}}.{label}.{label}.{label}.%{{d}} -all"
    local, domain = "b" * 30 + "." + "c" * 30, "d" * 50 + ".test"
    found, asked = await checked({domain: [{"TXT": policy}]}, f"{local}@{domain}")
    assert found.result == "fail" and asked[1:] == [(f"{label}.{label}.{label}.{domain}", "A")]


async def test_an_odd_name_of_a_domain_that_does_not_answer_is_a_temporary_failure():
    found, _ = await checked({"b.test": [{"TXT": "v=spf1 exists:%{l}.x.test -all"}]}, "error.a+b@b.test")
    assert found.result == "temperror"


NO_ANSWER = ["TIMEOUT"]
REVERSE = "9.2.0.192.in-addr.arpa"


@pytest.mark.parametrize(
    ("policy", "names", "expected", "source"),
    [
        ("ptr -all", None, "fail", "RFC 7208 5.5: a DNS error at the PTR look-up: no match"),
        ("ptr -all", [("a.b.test", None)], "fail", "5.5: at the look-up of a name: it is skipped"),
        ("ptr -all", [("a.b.test", None), ("c.b.test", CLIENT)], "pass", "5.5: and the next one is tried"),
        ("ptr -all", [("a.b.test", CLIENT)], "pass", "5.5"), ("ptr -all", [("a.b.test", "192.0.2.8")], "fail", "5.5"),
        ("ptr -all", [], "fail", "5.5"),
        ("exists:%{p}.x.test -all", None, "pass", "7.3: unknown"), ("exists:%{p}.y.test -all", None, "fail", "7.3: unknown"),
        ("ip4:192.0.2.9 a:%{p}.x.test -all", None, "pass", "7.3"), ("ip4:192.0.2.9 x=%{p} -all", None, "pass", "7.3"),
        ("ip4:192.0.2.9 redirect=%{p}.x.test", None, "pass", "7.3"),
        ("a:gone.test -all", [], "temperror", "4.4: of the policy's own names an error is one"),
    ],
)  # fmt: skip
async def test_the_clients_reverse_zone_decides_nothing_by_failing(policy, names, expected, source):
    data: dict = {"b.test": [{"TXT": f"v=spf1 {policy}"}], "unknown.x.test": [{"A": "127.0.0.1"}], "gone.test": NO_ANSWER}
    data[REVERSE] = NO_ANSWER if names is None else [{"PTR": name} for name, _ in names]
    for name, address in names or []:
        data[name] = NO_ANSWER if address is None else [{"A": address}]
    found, asked = await checked(data, "ann@b.test")
    assert found.result == expected, (source, found, asked)


TEN = [f"include:i{number}.test" for number in range(10)]


@pytest.mark.parametrize(
    ("terms", "expected", "source"),
    [
        ([*TEN, "-all", "redirect=pass.test"], "fail", "RFC 7208 6.1: redirect= is ignored where all is there"),
        ([*TEN, "ip4:192.0.2.9", "redirect=none.test"], "pass", "6.1: where a mechanism matches"),
        ([*TEN[1:], "include:pass.test", "redirect=none.test"], "pass", "6.1"),
        ([*TEN[1:], "redirect=pass.test"], "pass", "4.6.4: the tenth look-up"),
        ([*TEN, "redirect=pass.test"], "permerror", "4.6.4: the eleventh"),
        (["redirect=pass.test", *TEN], "permerror", "6: the position of a modifier does not matter"),
        ([*TEN[2:], "redirect=two.test"], "pass", "4.6.4: redirect and include: ten"),
        ([*TEN[1:], "redirect=two.test"], "permerror", "4.6.4: eleven"),
        ([*TEN[2:], "include:two.test"], "pass", "4.6.4: include within include: ten"),
        ([*TEN[1:], "include:two.test"], "permerror", "4.6.4: eleven"),
        ([*TEN[2:], "include:redirects.test"], "pass", "4.6.4: redirect within include: ten"),
        ([*TEN[1:], "include:redirects.test"], "permerror", "4.6.4: eleven"),
        ([*TEN, "a"], "permerror", "4.6.4"),
    ],
)
async def test_a_redirect_counts_where_it_is_followed(terms, expected, source):
    data: dict = {f"i{number}.test": [{"TXT": "v=spf1 ?all"}] for number in range(10)}
    data |= {"b.test": [{"TXT": f"v=spf1 {' '.join(terms)}"}], "pass.test": [{"TXT": "v=spf1 +all"}]}
    data |= {"two.test": [{"TXT": "v=spf1 include:pass.test"}], "redirects.test": [{"TXT": "v=spf1 redirect=pass.test"}]}
    found, _ = await checked(data, "ann@b.test")
    assert found.result == expected, (source, found)


@pytest.mark.parametrize(
    "term",
    ["exists:%{d0}.test", "exists:%{d00}.test", "exists:%{d2x}.x.test", "exists:%{dr2}.x.test", "exists:%{d-r}.x.test",
     "exists:%{d.r}.x.test", "exists:%{d1.5}.x.test", "exists:%{dd}.x.test", "exists:%{d{}.x.test", "exists:%{l*}.x.test",
     "exists:%%%(x.test", "a:%(d}.test", "include:%{d", "x=%{d", "x=%{dr", "x=%{d0}", "x=%%%a", "x=a\tb", "x=\x7f", "x=%",
     "redirect=%{d00}.test", "exp=%{dr2}.test"],
)  # fmt: skip
async def test_what_is_no_macro_is_a_syntax_error(term):
    """RFC 7208 7.1; 4.6: anywhere in the record."""
    found, asked = await checked({"b.test": [{"TXT": f"v=spf1 {term} -all"}]}, "ann@b.test")
    assert (found.result, asked) == ("permerror", [("b.test", "TXT")]), found


@pytest.mark.parametrize(
    ("term", "asked"),
    [("exists:a.%%.test", "a.%.test"), ("exists:%{d2r}.x.test", "test.b.x.test"), ("exists:%{d03}.x.test", "b.test.x.test"),
     ("exists:%{lr-}.x.test", "b.a.x.test"), ("exists:%{l1-+,/_=.}.x.test", "b.x.test"), ("exists:%{D}.x.test", "b.test.x.test"),
     ("x=%%", None), ("x=a.%%", None), ("x=%_%-%%", None), ("x=!\"#$&'()*+,/:;<=>?@[]^_`{|}~", None), ("x=%{d1r+-}", None)],
)  # fmt: skip
async def test_what_is_a_macro_is_expanded(term, asked):
    found, queries = await checked({"b.test": [{"TXT": f"v=spf1 {term} -all"}]}, "a-b@b.test")
    assert found.result == "fail", found
    assert queries == [("b.test", "TXT"), *([(asked, "A")] if asked else [])]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("others", [("v=spf10 x", "v=spf1x"), ("v=spf1.1", "v=spf1;-all"), ("v=spf", "V=SPF11 -all")])
async def test_texts_that_begin_like_a_policy_are_none(order, others):
    """RFC 7208 4.5: the version is followed by a blank or the end."""
    texts = [*others, "v=spf1 +all"]
    found, _ = await checked({"b.test": [{"TXT": texts[number]} for number in order]}, "ann@b.test")
    assert found.result == "pass", found
