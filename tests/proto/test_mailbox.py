"""From: and Sender: as specified, so that no other program reads other addresses in them."""

import email
import inspect
import re
from email import policy
from email.utils import getaddresses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relaymta.auth.identity import Identity
from relaymta.proto import mailbox
from relaymta.proto.mailbox import LONGEST, MOST, Malformed, addresses, authors, domains
from tests.conftest import PROVE
from tests.support.postfix_sendmail import PostfixSendmail

REFUSED = None

# Value, what it means (None: malformed), and its RFC section, or the program that shows it otherwise.
ROWS: list[tuple[str | bytes, list[str] | None, str]] = [
    # Plain ones
    ("ann@shop.test", ["ann@shop.test"], "5322 3.4.1"),
    ("<ann@shop.test>", ["ann@shop.test"], "5322 3.4 angle-addr"),
    (" <ann@shop.test> ", ["ann@shop.test"], "5322 3.4 angle-addr"),
    ("Ann <ann@shop.test>", ["ann@shop.test"], "5322 A.1.1"),
    ("Ann<ann@shop.test>", ["ann@shop.test"], "5322 3.4 name-addr"),
    ("Ann Other-Name <Ann@Shop.Test>", ["Ann@shop.test"], "the domain in lower case, the local part as it stands"),
    ('"Ann, Other" <ann@shop.test>', ["ann@shop.test"], "5322 A.1.2"),
    ('"ceo@bank.test" <ann@shop.test>', ["ann@shop.test"], "a quoted name is a name"),
    ('"Ann \\"the\\" Other" <ann@shop.test>', ["ann@shop.test"], "5322 A.1.2"),
    ('"x\\\\" <ann@shop.test>', ["ann@shop.test"], "5322 3.2.4"),
    ('"<ceo@bank.test>, x" <ann@shop.test>', ["ann@shop.test"], "5322 3.2.4"),
    ('"(" <ann@shop.test>', ["ann@shop.test"], "5322 3.2.4"),
    ("ann+tag@shop.test", ["ann+tag@shop.test"], "5322 3.2.3"),
    ("a!#$%&'*+/?=^_`{|}~-@shop.test", ["a!#$%&'*+/?=^_`{|}~-@shop.test"], "5322 3.2.3"),
    ("ann@[192.0.2.1]", ["ann@[192.0.2.1]"], "5321 4.1.3"),
    ("ann@[IPv6:2001:db8::1]", ["ann@[ipv6:2001:db8::1]"], "5321 4.1.3"),
    ("<ann@[192.0.2.1]>", ["ann@[192.0.2.1]"], "5321 4.1.3"),
    ("ann@localhost", ["ann@localhost"], "a domain of one label"),
    ("ann@a_b.shop.test", ["ann@a_b.shop.test"], "it is in the DNS"),
    # Lists
    ("a@shop.test, b@shop.test", ["a@shop.test", "b@shop.test"], "5322 3.4 mailbox-list"),
    ("Ann <a@shop.test>,Bob <ceo@bank.test>", ["a@shop.test", "ceo@bank.test"], "5322 3.4 mailbox-list"),
    ("a@shop.test,, ,b@shop.test", ["a@shop.test", "b@shop.test"], "5322 4.4 obs-mbox-list"),
    (",a@shop.test", ["a@shop.test"], "5322 4.4 obs-mbox-list"),
    ("a@shop.test,", ["a@shop.test"], "5322 4.4 obs-mbox-list"),
    ("a@shop.test\r\n ,ceo@bank.test", ["a@shop.test", "ceo@bank.test"], "5322 2.2.3"),
    ("a@shop.test; b@shop.test", REFUSED, "Outlook's separator is none"),
    ("a@shop.test b@shop.test", REFUSED, "no comma"),
    ("<a@shop.test> <ceo@bank.test>", REFUSED, "no comma"),
    ("<a@shop.test>ceo@bank.test", REFUSED, "no comma"),
    ("Ann <a@shop.test> Other", REFUSED, "a name behind it"),
    ("Other, Ann <ann@shop.test>", ["Other", "ann@shop.test"], "an unquoted comma: two, one of them local"),
    # Groups
    ("us: a@shop.test, <b@shop.test>;", ["a@shop.test", "b@shop.test"], "5322 A.1.3"),
    ("us:;", [], "6854: nobody"),
    ("us:,,;", [], "5322 4.4 obs-group-list"),
    ('"us all": a@shop.test;', ["a@shop.test"], "5322 3.4 group"),
    ("us: a@shop.test;, them: ceo@bank.test;", ["a@shop.test", "ceo@bank.test"], "5322 3.4 address-list"),
    ("us: a@shop.test;, ceo@bank.test", ["a@shop.test", "ceo@bank.test"], "5322 3.4 address-list"),
    ("us: a@shop.test; ceo@bank.test", REFUSED, "no comma behind the group"),
    ("us: a@shop.test", REFUSED, "no end"),
    ("us: them: a@shop.test;;", REFUSED, "groups have no groups"),
    (": a@shop.test;", REFUSED, "no name"),
    ("a@shop.test;", REFUSED, "no group"),
    (";ceo@bank.test", REFUSED, "no group"),
    ("ceo@bank.test: a@shop.test;", REFUSED, "the name of a group is none"),
    ("ceo@bank.test:a@shop.test;", REFUSED, "the name of a group is none"),
    ("x@:ann@shop.test;", REFUSED, "no domain"),
    ("...@:ann@shop.test;", REFUSED, "who logs in as one sends as another"),
    ("us: @:ann@shop.test;", REFUSED, "neither group nor route"),
    # Comments
    ("ann@shop.test (Ann)", ["ann@shop.test"], "5322 3.2.2"),
    ("(Ann) ann@shop.test", ["ann@shop.test"], "5322 3.2.2"),
    ("(ceo@bank.test) ann@shop.test", ["ann@shop.test"], "5322 3.2.2"),
    ("(<ceo@bank.test>) <ann@shop.test>", ["ann@shop.test"], "5322 3.2.2"),
    ("(a(b(c)d)e) ann@shop.test", ["ann@shop.test"], "5322 3.2.2, nested"),
    ("(a\\)<ceo@bank.test>) ann@shop.test", ["ann@shop.test"], "5322 3.2.2, a quoted pair"),
    ("(a\\\\)ann@shop.test", ["ann@shop.test"], "5322 3.2.2, a quoted pair"),
    ('(") ann@shop.test (")', ["ann@shop.test"], "a quote in a comment is none"),
    ("ann(x)@(y)shop(z).(z)test", ["ann@shop.test"], "5322 A.6.3"),
    ("Pete(A nice \\) chap) <pete(his account)@silly.test(his host)>", ["pete@silly.test"], "5322 A.5"),
    (
        "A Group(Some people)\r\n     :Chris Jones <c@(Chris's host.)public.example>,\r\n         joe@example.org,\r\n"
        "  John <jdoe@one.test> (my dear friend); (the end of the group)",
        ["c@public.example", "joe@example.org", "jdoe@one.test"],
        "5322 A.5",
    ),
    ("(Empty list)(start)Hidden recipients  :(nobody(that I know))  ;", [], "5322 A.5"),
    ("Joe Q. Public <john.q.public@example.com>", ["john.q.public@example.com"], "5322 A.6.1, a dot in a phrase"),
    ("Mary Smith <@node.test:mary@example.net>, , jdoe@test  . example", ["mary@example.net", "jdoe@test.example"], "A.6.1"),
    ("John Doe <jdoe@machine(comment).  example>", ["jdoe@machine.example"], "5322 A.6.3"),
    ("Mary Smith\r\n  \r\n          <mary@example.net>", ["mary@example.net"], "5322 A.6.3"),
    ("ann@shop.test(", REFUSED, "a comment without an end"),
    ("ann@shop.test (a(b)", REFUSED, "a comment without an end"),
    ("ann@shop.test(<ceo@bank.test>", REFUSED, "who logs in as one sends as another"),
    ("ann@shop.test)", REFUSED, "a comment without a beginning"),
    ("(x)) ann@shop.test", REFUSED, "a comment without a beginning"),
    ("(x\\) ann@shop.test", REFUSED, "a comment without an end"),
    ("ceo@bank.test(x)evil.test", REFUSED, "was judged as bank.testevil.test"),
    ("ceo@bank(x)evil.test", REFUSED, "a comment is a blank"),
    ("ce(x)o@bank.test", REFUSED, "a comment is a blank"),
    # Blanks and folds within an address
    ("ann @ shop.test", ["ann@shop.test"], "5322 4.4 obs-addr-spec"),
    ("ann@ bank.test", ["ann@bank.test"], "passed DMARC unjudged"),
    ("ann@bank .test", ["ann@bank.test"], "passed DMARC unjudged"),
    ("ann@bank. test", ["ann@bank.test"], "5322 4.4 obs-domain"),
    ("ann . other @ shop . test", ["ann.other@shop.test"], "5322 4.4 obs-local-part"),
    ("<ann@\tbank.test>", ["ann@bank.test"], "5322 4.4"),
    ("< ann@bank.test >", ["ann@bank.test"], "5322 3.2.2"),
    ("<ann@\r\n bank.test>", ["ann@bank.test"], "passed DMARC unjudged"),
    ("<ann@(x(y)z)bank.test>", ["ann@bank.test"], "passed DMARC unjudged"),
    ("\r\n Ann\r\n <ann@shop.test>", ["ann@shop.test"], "5322 2.2.3"),
    ("ann@shop\r\n .test", REFUSED, "email.utils shows ann@shop"),
    ("ann@shop.\r\n test", REFUSED, "email.utils shows ann@shop."),
    ("ann\r\n @shop.test", REFUSED, "email.utils"),
    ("ann\r\n .other@shop.test", REFUSED, "email.utils"),
    ("(a\r\n ceo@bank.test) ann@shop.test", REFUSED, "email.utils takes a line's end for a comment's"),
    ("ann@(a\r\n b)shop.test", REFUSED, "email.utils shows ann@b"),
    ('"Ann\r\n Other" <ann@shop.test>', ["ann@shop.test"], "5322 2.2.3"),
    ('"Ann\r\n <ceo@bank.test>" <ann@shop.test>', REFUSED, "email.utils shows ceo@bank.test"),
    ('"\r\n a\\"b"@shop.test', REFUSED, "email.utils shows another local part"),
    ('"Ann\r\n <ceo" <ann@shop.test>', REFUSED, 'email.utils shows ceo" <ann@shop.test>"'),
    ('us: "Ann\r\n ceo<" <ann@shop.test>;', REFUSED, "the same"),
    ('"Ann <x\r\n Oth>" <annshop.test>,ann@shop.test', REFUSED, "the same"),
    ('"Ann, (x)\r\n Other, (of; us:)" <ann@shop.test>', ["ann@shop.test"], "5322 2.2.3"),
    ('"Ann, (x)\r\n Other, (of; us:)" <ann@shop.test>,root', REFUSED, "email.utils shows another local part"),
    ('"Ann \\"th(x\r\n y)" Othe  <ann@shop.test>', REFUSED, "the same"),
    ('"Ann\r\n y" Other <ann@shop.test>', REFUSED, "the same"),
    ('"\r\n us all":\r\n  a@shop.test;', REFUSED, "email.utils shows another local part"),
    ('"all\r\n of us": a@shop.test, b@shop.test;', REFUSED, "email.utils shows another local part"),
    ("all\r\n of us: a@shop.test;", ["a@shop.test"], "5322 2.2.3"),
    # A string on two lines, and an address in a comment, a local part or a route: email.utils shows that one.
    ('"x\r\n y" <ann@shop.test> (" <ceo@bank.test>)', REFUSED, "email.utils shows ceo@bank.test"),
    ('"x\r\n y" (",<ceo@bank.test>,") <ann@shop.test>', REFUSED, "the same"),
    ('"x\r\n y" <"<ceo@bank.test>"@shop.test>', REFUSED, "the same"),
    ('"x\r\n y" <", ceo@bank.test"@shop.test>', REFUSED, "the same"),
    ('"x\r\n "(",<ceo@bank.test>,")<ann@shop.test>', REFUSED, "the same"),
    ('"x\r\n y" <@bank.test:ann@shop.test>', REFUSED, "email.utils shows x"),
    ('"x\r\n y" <\r\n ann@shop.test>', REFUSED, "email.utils shows another local part"),
    ('\r\n "A long\r\n name (of a list)"\r\n <ann@shop.test>', ["ann@shop.test"], "5322 2.2.3"),
    ('"a\r\n b"@shop.test', REFUSED, "a local part on two lines"),
    ("ann@bank test", REFUSED, "no dot"),
    ("an n@shop.test", REFUSED, "no dot"),
    # Local parts
    ('"ann"@shop.test', ["ann@shop.test"], "5321 4.1.2: the same as without quotes"),
    ('"a b"@shop.test', ['"a b"@shop.test'], "5322 3.4.1"),
    ('"ceo@bank.test"@shop.test', ['"ceo@bank.test"@shop.test'], "5322 3.4.1: somebody at shop.test"),
    ('"a\\"b"@shop.test', ['"a\\"b"@shop.test'], "5322 3.4.1"),
    ('a."b c".d@shop.test', ['"a.b c.d"@shop.test'], "5322 4.4 obs-local-part"),
    ('""@shop.test', ['""@shop.test'], "5322 3.4.1"),
    ('"a"b@shop.test', REFUSED, "no dot"),
    ("a..b@shop.test", REFUSED, "5322 3.4.1"),
    (".a@shop.test", REFUSED, "5322 3.4.1"),
    ("a.@shop.test", REFUSED, "5322 3.4.1"),
    ("@shop.test", REFUSED, "no local part"),
    ("<@shop.test>", REFUSED, "no local part"),
    ("()@shop.test", REFUSED, "no local part"),
    # Domains
    ("ann@", REFUSED, "no domain"),
    ("ann@shop.test.", REFUSED, "5322 3.4.1: nothing behind the last dot"),
    ("ann@.shop.test", REFUSED, "5322 3.4.1"),
    ("ann@shop..test", REFUSED, "5322 3.4.1"),
    ("ann@shop/bank.test", REFUSED, "nothing that the DNS has"),
    ("ann@shop.test%bank.test", REFUSED, "nothing that the DNS has"),
    ("ann@shop.test!bank.test", REFUSED, "nothing that the DNS has"),
    ('ann@"shop.test"', REFUSED, "no quotes in a domain"),
    ("ann@[shop.test]", REFUSED, "no address in the literal"),
    ("ann@[192.0.2.1", REFUSED, "a literal without an end"),
    ("ann@[192.0.2.1].test", REFUSED, "more behind a literal"),
    ("ann@" + "a" * 64 + ".test", REFUSED, "1035 2.3.4"),
    ("ann@" + "abc." * 70 + "test", REFUSED, "1035 2.3.4"),
    ("ceo@bank.test@shop.test", REFUSED, "two domains"),
    ("<ceo@bank.test>@shop.test", REFUSED, "two domains"),
    ("ann@shop.test@", REFUSED, "two domains"),
    ("ceo@@bank.test", REFUSED, "two domains"),
    ("ceo@bank.test@, ann@shop.test", REFUSED, "who logs in as one sends as another"),
    ("ceo@bank.test,@shop.test", REFUSED, "no local part"),
    # Angles and routes
    ("<@a.test:ceo@bank.test>", ["ceo@bank.test"], "5322 4.4 obs-route says nothing"),
    ("x <@ a . test :ceo@bank.test>", ["ceo@bank.test"], "5322 4.4"),
    ("<@a.test,@b.test:ceo@bank.test>", REFUSED, "email.utils shows @b.test"),
    ("<,@a.test:ceo@bank.test>", REFUSED, "email.utils shows @a.test"),
    ("<@a.test ceo@bank.test>", REFUSED, "a route without an end"),
    ("<@a.test:>", REFUSED, "no address"),
    ("@a.test:ceo@bank.test", REFUSED, "a route outside of <>"),
    ("<>", REFUSED, "no address"),
    ("Ann <>", REFUSED, "no address"),
    ("<<ann@shop.test>>", REFUSED, "5322 3.4"),
    ("<ann@shop.test", REFUSED, "no end"),
    ("ann@shop.test>", REFUSED, "no beginning"),
    ("<a@shop.test, b@shop.test>", REFUSED, "a list in <>"),
    ("a@shop.test <ceo@bank.test>", REFUSED, "a name that is an address"),
    ("ceo@bank.test <a@shop.test>", REFUSED, "a name that is an address"),
    ("<ceo@bank.test> <a@shop.test>", REFUSED, "a name that is an address"),
    (". <ann@shop.test>", REFUSED, "5322 4.1 obs-phrase"),
    ("[x] <ann@shop.test>", REFUSED, "5322 3.2.3"),
    # Strings
    ('"ann <ceo@bank.test>', REFUSED, "a string without an end"),
    ('"x\\" <ann@shop.test>', REFUSED, "a string without an end"),
    ('"x\\" <a@shop.test>" <ceo@bank.test>', ["ceo@bank.test"], "5322 3.2.4"),
    ('ann@shop.test"', REFUSED, "a string without an end"),
    ("\\ann@shop.test", REFUSED, "a quoted pair outside of quotes"),
    ("ann\\@bank.test@shop.test", REFUSED, "a quoted pair outside of quotes"),
    # Without a domain
    ("root", ["root"], "cron's"),
    ("<root>", ["root"], "cron's"),
    ("root (Cron Daemon)", ["root"], "cron's"),
    ("ann.other", ["ann.other"], "a local address"),
    ("Ann Other", REFUSED, "a name alone"),
    ('"ceo@bank.test"', REFUSED, "Postfix shows ceo@bank.test"),
    ("ceo%bank.test", REFUSED, "Postfix shows ceo@bank.test (allow_percent_hack)"),
    ("bank.test!ceo", REFUSED, "Postfix shows ceo@bank.test (swap_bangpath)"),
    ("", REFUSED, "5322 3.6.2"),
    (" ", REFUSED, "5322 3.6.2"),
    (",", REFUSED, "5322 3.6.2"),
    ("()", REFUSED, "5322 3.6.2"),
    # Encoded words
    ("=?utf-8?q?J=C3=B6rg?= <ann@shop.test>", ["ann@shop.test"], "2047 5"),
    ("=?utf-8?q?a?= =?utf-8?b?YQ==?= x <ann@shop.test>", ["ann@shop.test"], "2047 5"),
    ("=?utf-8?q?ceo=40bank.test?= <ann@shop.test>", ["ann@shop.test"], "2047 5: a name"),
    ('"=?utf-8?q?J=C3=B6rg?=" <ann@shop.test>', ["ann@shop.test"], "against 2047 5, and frequent"),
    ("=?utf-8?q?Shop.test_=3C=3E?= <ann@shop.test>", ["ann@shop.test"], "a dot, against 2047 5, and frequent"),
    ("=?utf-8?q?a?==?utf-8?q?b?= <ann@shop.test>", ["ann@shop.test"], "2047 5"),
    ("=?utf-8?q?a,<ceo@bank.test>?= <ann@shop.test>", REFUSED, "2047 5: Postfix shows both"),
    ("=?utf-8?q?a@bank.test?= <ann@shop.test>", REFUSED, "2047 5: Postfix shows both"),
    ("=?utf-8*en?q?a?= <ann@shop.test>", ["ann@shop.test"], "2231 5"),
    ("=?utf-8?q?ceo=40bank.test?=", REFUSED, "2047 5: in no address"),
    ("=?utf-8?q?ceo?=@bank.test", REFUSED, "2047 5: email shows ceo@bank.test"),
    ("=?utf-8?q?ceo=40bank.test=3E?=@shop.test", REFUSED, "2047 5: email decodes it"),
    ("ann@=?utf-8?q?bank.test?=", REFUSED, "2047 5: email decodes it"),
    ('"=?utf-8?q?ceo?="@shop.test', REFUSED, "2047 5: email decodes it"),
    ('=?utf-8?q?"?= <ceo@bank.test>, "x" <ann@shop.test>', REFUSED, "email reads on to ?="),
    ('"=?utf-8?q?x" <ann@shop.test>, "?=" <a@shop.test>', REFUSED, "email reads on to ?="),
    ("=?utf-8?q?a b?= <ann@shop.test>", REFUSED, "2047 2: no blanks"),
    ("x=?utf-8?q?a?= <ann@shop.test>", REFUSED, "2047 5: a word of its own"),
    # Octets
    ("Jörg <jörg@dömain.test>", ["jörg@dömain.test"], "6532"),
    ("ann@DÖMAIN.test", ["ann@dömain.test"], "6532"),
    ("ceo＠bank.test@shop.test", ["ceo＠bank.test@shop.test"], "U+FF20 is no @"),
    (b"J\xf6rg <ann@shop.test>", ["ann@shop.test"], "a name in Latin-1"),
    (b'"J\xf6rg" <ann@shop.test>', ["ann@shop.test"], "a name in Latin-1"),
    (b"(J\xf6rg) ann@shop.test", ["ann@shop.test"], "a name in Latin-1"),
    (b"j\xf6rg@shop.test", REFUSED, "not UTF-8"),
    (b"ann@sh\xf6p.test", REFUSED, "not UTF-8"),
    ("\u212aim@shop.test", REFUSED, "the sign of Kelvin: kim in lower case"),
    ("ann@shop.\u212aim", ["ann@shop.kim"], "UTS 46"),
    ("ann\u200b@shop.test", REFUSED, "what nobody sees"),
    ("ann\u00a0@shop.test", REFUSED, "no blank, and looks like one"),
    ("ann@shop\u00a0.test", REFUSED, "not in the DNS"),
    ("ann@shop.\u202etest", REFUSED, "not in the DNS"),
    (b"ann@shop.test\0", REFUSED, "NUL"),
    (b"ann\0@shop.test", REFUSED, "NUL"),
    (b'"\0" <ann@shop.test>', REFUSED, "NUL"),
    (b'"\\\0" <ann@shop.test>', REFUSED, "NUL"),
    (b"(\x0b) ann@shop.test", REFUSED, "a control character"),
    (b"ann@shop.test\x7f", REFUSED, "a control character"),
    (b"ann@shop.test\nSender: ceo@bank.test", REFUSED, "a bare LF"),
    (b"ann@shop.test\rSender: ceo@bank.test", REFUSED, "a bare CR"),
    (b"ann@shop.test\r", REFUSED, "a bare CR"),
    (b'"a\\\r\n b" <ann@shop.test>', REFUSED, "a quoted CR"),
]


def octets(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


@pytest.mark.parametrize(("value", "expected", "source"), ROWS)
def test_what_a_field_means(value, expected, source):
    if expected is None:
        with pytest.raises(Malformed):
            addresses(octets(value))
    else:
        assert [str(one) for one in addresses(octets(value))] == expected
        # ... with one space, with several lines, and with a comment as well.
        for more in (b"  %s", b"\r\n\t%s", b"%s \r\n ", b"(x) %s (y)"):
            assert [str(one) for one in addresses(more % octets(value))] == expected


def test_a_field_has_a_length_and_a_number_of_addresses():
    """Each of the domains may have to be converted; no real field has so many."""
    assert len(addresses(b",".join(b"a@shop.test" for _ in range(MOST)))) == MOST
    for value in (b",".join(b"a@shop.test" for _ in range(MOST + 1)), b"(" + b"x" * LONGEST + b") a@shop.test"):
        with pytest.raises(Malformed):
            addresses(value)
    with pytest.raises(Malformed):
        authors((b"From: (" + b"x" * 1000 + b") a@shop.test\r\n") * 40 + b"\r\n")
    assert len(addresses(",".join("a@schön.test" for _ in range(MOST // 10)).encode())) == MOST // 10
    with pytest.raises(Malformed):  # ten times as much work
        addresses(",".join("a@schön.test" for _ in range(MOST // 10 + 1)).encode())


@pytest.mark.parametrize("value", ["a@b", "a", "x:;", "a@ä", "a@ä.ö, a@ü", ",".join(["a@ä"] * 20)])
def test_several_fields_do_not_evade_that(monkeypatch, value):
    """Short ones, whose domains have to be converted, blocked the event loop for 100 ms."""
    converted: list[str] = []
    monkeypatch.setattr(mailbox, "normalize_domain", lambda domain: converted.append(domain) or domain)
    with pytest.raises(Malformed):
        authors(f"From:{value}\r\n".encode() * 2000 + b"\r\n")
    assert sum(10 if not domain.isascii() else 1 for domain in converted) <= 2 * MOST


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"From: a@shop.test\r\nSubject: From: b@shop.test\r\n\r\n", ["a@shop.test"]),
        (b"FROM : a@shop.test\r\nfrom\t:b@shop.test\r\n", ["a@shop.test", "b@shop.test"]),
        (b"X: y\r\n From: a@shop.test\r\nFrom: b@shop.test\r\n\r\n", ["b@shop.test"]),
        (b"From: a@shop.test\r\nFrom:\r\n\r\n", REFUSED),
        (b"From: a@shop.test\r\nFrom: <\r\n\r\n", REFUSED),
        (b"From\r\nSubject: x\r\n\r\n", []),
        (b"Subject: x\r\n\r\n", []),
        (b"", []),
        (b"Resent-From: a@shop.test\r\nX-From: b@shop.test\r\nFrom.: c@shop.test\r\n\r\n", []),
        (b"Subject: x\rFrom: ceo@bank.test\r\nFrom: a@shop.test\r\n\r\n", REFUSED),
        (b"Subject: x\nFrom: ceo@bank.test\r\nFrom: a@shop.test\r\n\r\n", REFUSED),
        (b"Subject: x\n\rFrom: ceo@bank.test\r\nFrom: a@shop.test\r\n\r\n", REFUSED),
        (b"From: a@shop.test\r\nSubject: \0\r\n\r\n", REFUSED),
        (b"From\0: ceo@bank.test\r\nFrom: a@shop.test\r\n\r\n", REFUSED),
        (b"From\r\n : ceo@bank.test\r\nFrom: a@shop.test\r\n\r\n", REFUSED),  # shown by programs that unfold first
        (b"X: y\r\n\x0bFrom\x01: ceo@bank.test\r\n\r\n", REFUSED),  # shown by programs that trim, as JavaMail
    ],
)
def test_the_authors_of_a_message(block, expected):
    if expected is None:
        with pytest.raises(Malformed):
            authors(block)
    else:
        assert [str(one) for one in authors(block)] == expected


def test_domains_are_a_labels():
    found = addresses("a@Shop.Test, b@shop.test, root, c@[192.0.2.1], d@dömain.test, e@xn--dmain-jua.test, f@shop。test".encode())
    assert domains(found) == ["shop.test", "xn--dmain-jua.test"]


@pytest.mark.parametrize(("value", "expected", "source"), ROWS)
def test_no_user_writes_as_another(value, expected, source):
    """A user who may write as shop.test only."""
    shop = Identity("shop", senders=("@shop.test",))
    try:
        found = [str(one) for one in authors(b"Subject: x\r\nFrom: " + octets(value) + b"\r\n\r\n", (b"from", b"sender"))]
    except Malformed:
        found = None
    if found is not None and all(map(shop.may_send_as, found)):
        assert expected is not None and all(one.endswith("@shop.test") for one in expected)


# What other programs show


# How getaddresses can be called in this version of Python; strict is the default where it exists.
PARSERS = [{"strict": True}, {"strict": False}] if "strict" in inspect.signature(getaddresses).parameters else [{}]


def shown_by_python(value: bytes) -> set[str]:
    """By all of its parsers, in a message and as a string."""
    found: set[str] = set()
    raw = b"From:" + value + b"\r\n\r\nx"
    texts = [value.decode("utf-8", "surrogateescape")]
    try:
        message = email.message_from_bytes(raw, policy=policy.default)
        for field in message.get_all("from") or []:
            texts.append(str(field))
            found |= {one.addr_spec for one in field.addresses}
    except Exception:  # an error of theirs: they show nothing
        pass
    texts += [str(field) for field in email.message_from_bytes(raw).get_all("from") or []]
    for text in {*texts[:1], *texts[2:]}:
        for options in PARSERS:
            try:
                found |= {address for _, address in getaddresses([text], **options)}
            except (RecursionError, IndexError):
                pass
    return {one for one in found if "@" in one and "\ufffd" not in one}


def as_meant(address: str) -> tuple[str, str]:
    """Local part without its quotes, and domain, of an address that a program shows; without a route."""
    text = address.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    local, _, domain = re.sub(r"^@[^:]*:", "", text).rpartition("@")
    unquoted = re.sub(r'"((?:[^"\\]|\\.)*)"', lambda m: re.sub(r"\\(.)", r"\1", m[1], flags=re.S), local, flags=re.S)
    return unquoted.strip(), domain.strip().lower()


def hidden(value: bytes, shown: set[str]) -> set[str]:
    """Addresses that a program shows, and we neither find nor refuse. What is around one in brackets is not part of it: a string
    on two lines makes email.utils show ` <ann@shop.test>`, before Python 3.11.4 with what follows, too."""
    try:
        found = {as_meant(str(one)) for one in addresses(value)}
    except Malformed:
        return set()
    return {one for one in shown if as_meant(one) not in found and as_meant(_within_brackets(one)) not in found}


def _within_brackets(shown: str) -> str:
    within = re.fullmatch(r"[ \t]*<([^<>]*)>.*", shown, re.S)
    return within[1] if within else shown.strip(" \t<>")


_PIECES = [
    b"ann@shop.test", b"ceo@bank.test", b"<ann@shop.test>", b"<ceo@bank.test>", b"ann", b"shop.test", b"ceo", b"test", b"@",
    b"<", b">", b",", b";", b":", b".", b"(", b")", b'"', b"\\", b" ", b"\t", b"\r\n ", b"\r\n\t", b"(x)", b"((x)y)", b'"x"',
    b"[", b"]",
    b"[192.0.2.1]", b"=?utf-8?q?", b"?=", b"=?utf-8?q?ceo=40bank.test?=", b"=?utf-8?b?PGNlb0BiYW5rLnRlc3Q+?=", b"\xc3\xa4",
    b"\xff", b"%", b"!", b"us:", b"'", b"=", b"?", b"\x01", b"\x0b", b"\xc2\xa0", b'\\"', b"\\)", b"\\\\", b"@x.test:",
    b"@shop.test,@x.test:", b"..", b"Ann Other ", b"\xc2\x85", b"\xe2\x80\xa8", b"(x\r\n y)", b'"x\r\n y"',
]  # fmt: skip
_GOOD = [octets(value) for value, expected, _ in ROWS if expected]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Good ones, of which pieces are replaced: most that are made of pieces alone are malformed."""
    value = draw(st.sampled_from(_GOOD))
    if draw(st.booleans()):
        value += draw(st.sampled_from([b",", b", ", b" "])) + draw(st.sampled_from(_GOOD))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(value)))
        value = value[:at] + draw(st.sampled_from(_PIECES)) + value[at + draw(st.integers(0, 2)) :]
    return value


VALUES = st.one_of(st.lists(st.sampled_from(_PIECES), max_size=9).map(b"".join), mutated())


@settings(max_examples=3000 if PROVE else 600, deadline=None)
@given(VALUES)
@example(b'"A,nn, O\r\n\tceo@bank.test" <ann@shop.test>, ceo@bank.test')
@example(b'"Ann, Oth(x\r\n y)" <ann@shop.test>')
def test_python_shows_no_address_that_is_hidden_from_us(value):
    assert hidden(value, shown_by_python(value)) == set()


@pytest.mark.parametrize("value", [octets(row[0]) for row in ROWS])
def test_python_shows_none_of_the_rows_otherwise(value):
    assert hidden(value, shown_by_python(value)) == set()


class Postfix(PostfixSendmail):
    """Its `sendmail -t`, which reads To: by the parser that its cleanup rewrites From: with."""

    def shown(self, value: bytes) -> set[str]:
        self.run("-t", "-i", "-f", "s@h.test", given=b"To:" + value.replace(b"\r\n", b"\n") + b"\n\nx\n")
        return {one.decode("utf-8", "surrogateescape") for one in self.recipients}


def test_postfix_shows_no_address_that_is_hidden_from_us(tmp_path):
    postfix = Postfix(tmp_path)
    assert postfix.shown(b"ann@shop.test, (x) ceo@bank.test") == {"ann@shop.test", "ceo@bank.test"}
    wrong = {row[0]: found for row in ROWS if (found := hidden(octets(row[0]), postfix.shown(octets(row[0])) - {"root"}))}
    assert {value: found for value, found in wrong.items() if any("@" in one for one in found)} == {}

    @settings(max_examples=1000 if PROVE else 40, deadline=None)
    @given(mutated())
    def run(value: bytes) -> None:
        assert {one for one in hidden(value, postfix.shown(value)) if "@" in one} == set()

    run()
