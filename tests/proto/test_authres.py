"""Authentication-Results (RFC 8601): what we write, and which fields in received mail claim to be ours."""

import email
import email.policy
import re
import sys
import unicodedata

import authres
import pytest

from relaymta.proto.authres import _folded, field, mailbox, result, value, without_forged

# (address, as it is written, source)
ADDRESSES = [
    ("ann@shop.test", "ann@shop.test", "RFC 8601 2.2: [ local-part ] @ domain-name"),
    ("Ann.B@Shop.Test", "Ann.B@Shop.Test", "2.2"),
    ("bounce+ann=shop.test@shop.test", "bounce+ann=shop.test@shop.test", "RFC 5321 4.1.2: Dot-string"),
    ("a!#$%&'*+-/=?^_`{|}~b@shop.test", "a!#$%&'*+-/=?^_`{|}~b@shop.test", "5321 4.1.2"),
    ("a/b@shop.test", "a/b@shop.test", "5321 4.1.2"),
    ('"a b"@shop.test', '"a b"@shop.test', "5321 4.1.2: Quoted-string"), ('"a@b"@shop.test', '"a@b"@shop.test', "5321 4.1.2"),
    ('"a;b"@shop.test', '"a;b"@shop.test', "5321 4.1.2"), ('"a\\"b"@shop.test', '"a\\"b"@shop.test', "5321 4.1.2"),
    ('"a\\\\b"@shop.test', '"a\\\\b"@shop.test', "5321 4.1.2"), ('"a(b)"@shop.test', '"a(b)"@shop.test', "5321 4.1.2"),
    ('"; dkim=pass"@shop.test', '"; dkim=pass"@shop.test', "5321 4.1.2"), ('""@shop.test', '""@shop.test', "5321 4.1.2"),
    ("ann@[192.0.2.1]", '"ann@[192.0.2.1]"', "RFC 8601 2.2: no domain-name, so a value"),
    ("ann@[IPv6:2001:db8::1]", '"ann@[IPv6:2001:db8::1]"', "2.2"),
    ("ann@localhost", '"ann@localhost"', "RFC 6376 3.5: domain-name has a dot"),
    ("ann@x_y.test", '"ann@x_y.test"', "RFC 5321 4.1.2: no sub-domain"), ("ann@-a.test", '"ann@-a.test"', "5321 4.1.2"),
    ("ann@a-.test", '"ann@a-.test"', "5321 4.1.2"), ("ann@shop.test.", '"ann@shop.test."', "5321 4.1.2"),
    ("ann@a+b.test", '"ann@a+b.test"', "5321 4.1.2"),
    ("ann@${domain}", '"ann@${domain}"', "5321 4.1.2"),
    ('"a b"@[192.0.2.1]', '"\\"a b\\"@[192.0.2.1]"', "RFC 5322 3.2.4: quoted-pair"),
    ('"a\\"b"@localhost', '"\\"a\\\\\\"b\\"@localhost"', "5322 3.2.4"),
    ("\u00e4nn@shop.test", "\u00e4nn@shop.test", "RFC 6532 3.2"),
    ("ann@b\u00fccher.test", "ann@xn--bcher-kva.test", "RFC 8616"),
    ('"\u00e4 b"@b\u00fccher.test', '"\u00e4 b"@xn--bcher-kva.test', "6532 3.2"),
    ("a\u2028b@shop.test", '"a?b@shop.test"', "not printable"), ("a\x85b@shop.test", '"a?b@shop.test"', "not printable"),
]  # fmt: skip

# (text, as it is written, source)
VALUES = [
    ("shop.test", "shop.test", "RFC 2045 5.1: token"), ("x_y.test", "x_y.test", "2045 5.1"),
    ("rsa-sha256", "rsa-sha256", "2045 5.1"),
    ("localhost", "localhost", "2045 5.1"), ("a+b", "a+b", "2045 5.1"), ("${domain}", "${domain}", "2045 5.1"),
    ("a'b", "a'b", "2045 5.1"),
    ("[192.0.2.1]", '"[192.0.2.1]"', "2045 5.1: tspecials"), ("[IPv6:2001:db8::1]", '"[IPv6:2001:db8::1]"', "2045 5.1"),
    ("a@b", '"a@b"', "2045 5.1"), ("a b", '"a b"', "2045 5.1"), ("a;b", '"a;b"', "2045 5.1"), ("a=b", '"a=b"', "2045 5.1"),
    ("a/b", '"a/b"', "2045 5.1"),
    ("a?b", '"a?b"', "2045 5.1"), ("a,b", '"a,b"', "2045 5.1"), ("a:b", '"a:b"', "2045 5.1"), ("<a>", '"<a>"', "2045 5.1"),
    ("(a)", '"(a)"', "2045 5.1"), ('a"b', '"a\\"b"', "RFC 5322 3.2.4"), ("a\\b", '"a\\\\b"', "5322 3.2.4"),
    ('"', '"\\""', "5322 3.2.4"),
    ("\\", '"\\\\"', "5322 3.2.4"), ("; spf=pass", '"; spf=pass"', "5322 3.2.4"),
    ("a\r\nb", '"a??b"', "5322 3.2.4: no line ends"),
    ("a\x00b", '"a?b"', "5322 3.2.4"), ("a\tb", '"a?b"', "not printable"), ("\u00e4", '"\u00e4"', "RFC 6532 3.2"),
    ("\udcff", '"?"', "not UTF-8"),
    ("", "", "no property"),
]  # fmt: skip


def parsed(written: str) -> authres.AuthenticationResultsHeader:
    """A field, as the reference implementation reads it."""
    octets = field("relay.example", [result("spf", "pass", {"smtp.mailfrom": written})])
    text = octets.decode()
    assert text.endswith("\r\n") and max(map(len, octets.split(b"\r\n"))) <= 998 and re.search(r"\r\n(?!\t|\Z)", text) is None
    return authres.AuthenticationResultsHeader.parse(text.replace("\r\n", ""))


@pytest.mark.parametrize(("address", "expected", "source"), ADDRESSES)
def test_how_an_address_is_written(address, expected, source):
    assert mailbox(address) == expected, source
    if address.isascii() and '""' not in address:  # authres reads no others
        found = parsed(expected)
        assert found.authserv_id == "relay.example" and [one.result for one in found.results] == ["pass"]
        (written,) = (one.value for one in found.results[0].properties)
        assert written.replace("\\", "") == address.replace("\\", "")


@pytest.mark.parametrize(("text", "expected", "source"), VALUES)
def test_how_a_value_is_written(text, expected, source):
    assert value(text) == expected, source
    if text and text.isprintable() and text.isascii():
        (written,) = (one.value for one in parsed(expected).results[0].properties)
        assert written.replace("\\", "") == text.replace("\\", "")


@pytest.mark.parametrize("text", ["a" * 5000, '"' * 5000, "\u4f8b" * 5000, "a b " * 2000])
def test_a_line_is_never_too_long(text):
    """RFC 5322 2.1.1: 998 octets. Several properties get a line each when they are long."""
    many = result("dkim", "permerror", {f"header.{name}": value(text) for name in "dsa"}, reason=text)
    octets = field("relay.example", [result("spf", "none", {"smtp.helo": value(text)}), many])
    assert max(map(len, octets.split(b"\r\n"))) <= 998 and b"\r\n\r\n" not in octets
    octets.decode()


def test_short_results_are_on_a_line_each():
    results = [
        result("spf", "pass", {"smtp.mailfrom": mailbox("ann@shop.test")}),
        result("dkim", "none", {}),
        result("dmarc", "none", {"x.y": ""}),
    ]
    assert field("relay.example", results) == (
        b"Authentication-Results: relay.example;\r\n\tspf=pass smtp.mailfrom=ann@shop.test;\r\n\tdkim=none;\r\n\tdmarc=none\r\n"
    )


OURS, OTHERS = True, False
# (field, whether it claims to be of relay.example, source)
FORGED = [
    (b"Authentication-Results: relay.example; spf=pass", OURS, "RFC 8601 5"),
    (b"authentication-results: relay.example; spf=pass", OURS, "RFC 5322 1.2.2"),
    (b"AUTHENTICATION-RESULTS: relay.example; spf=pass", OURS, "5322 1.2.2"),
    (b"AuthEntication-ReSults:relay.example; none", OURS, "2.2: [CFWS]"),
    (b"Authentication-Results : relay.example; none", OURS, "5322 4.5: *WSP before the colon"),
    (b"Authentication-Results\t \t: relay.example; none", OURS, "4.5"),
    (b"Authentication-Results\r\n : relay.example; none", OURS, "a fold before the colon, which some parsers accept"),
    (b"Authentication-Results: RELAY.Example; none", OURS, "2.2: compared without case"),
    (b"Authentication-Results: relay.example.; none", OURS, "RFC 1034 3.1"),
    (b"Authentication-Results:\r\n relay.example; none", OURS, "2.2: FWS"),
    (b"Authentication-Results:\r\n\t \r\n relay.example\r\n ; none", OURS, "FWS"),
    (b"Authentication-Results: relay.example\t;\tnone", OURS, "FWS"),
    (b"Authentication-Results: (x) relay.example (y); none", OURS, "CFWS"),
    (b"Authentication-Results: (a (b) c)(d)relay.example; none", OURS, "CFWS: comments nest"),
    (b"Authentication-Results: (\\)) relay.example; none", OURS, "CFWS"),
    (b"Authentication-Results: (relay\r\n .example) relay.example; none", OURS, "CFWS"),
    (b"Authentication-Results: (\\() relay.example; none", OURS, "CFWS"),
    (b'Authentication-Results: "relay.example"; none', OURS, "2.2: value = token / quoted-string"),
    (b'Authentication-Results: "RELAY.example" 1; none', OURS, "2.2"),
    (b'Authentication-Results: "relay\\.example"; none', OURS, "5322 3.2.4: quoted-pair"),
    (b'Authentication-Results: "\\r\\e\\l\\a\\y.example"; none', OURS, "3.2.4"),
    (b'Authentication-Results: "relay.example.";none', OURS, "3.2.4"),
    (b'Authentication-Results: " relay.example "; none', OURS, "white space within"),
    (b'Authentication-Results: "relay.\r\n example"; none', OURS, "FWS within"),
    (b'Authentication-Results:(x)"relay.example"(y)1(z);none', OURS, "CFWS"),
    (b"Authentication-Results: relay.example 1; spf=pass", OURS, "2.2: authres-version"),
    (b"Authentication-Results: relay.example 1 ; none", OURS, "2.2"),
    (b"Authentication-Results: relay.example 2; spf=pass", OURS, "2.2"),
    (b"Authentication-Results: relay.example (v) 1 (w); none", OURS, "2.2"),
    (b"Authentication-Results: relay.example/1; none", OURS, "RFC 5451 2.2"),
    (b"Authentication-Results: relay.example", OURS, "no results"),
    (b"Authentication-Results: relay.example;", OURS, "no results"),
    (b"Authentication-Results: relay.example spf=pass", OURS, "no semicolon"),
    (b"Authentication-Results: relay.example, other.example; none", OURS, "cannot be determined"),
    (b"Authentication-Results: relay .example; none", OURS, "same"),
    (b"Authentication-Results: relay(x).example; none", OURS, "cannot be determined"),
    (b"Authentication-Results: (relay.example; none", OURS, "same"),
    (b'Authentication-Results: "relay.example; none', OURS, "cannot be determined"), (b"Authentication-Results:", OURS, "same"),
    (b"Authentication-Results: ;", OURS, "cannot be determined"),
    (b"Authentication-Results: <relay.example>; none", OURS, "same"),
    (b"Authentication-Results: \x0brelay.example; none", OURS, "cannot be determined"),
    (b"Authentication-Results: relay.example\x00; none", OURS, "same"),
    ("Authentication-Results: \uff52elay.example; none".encode(), OURS, "UTS 46: a fullwidth r"),
    *(
        (f"Authentication-Results: relay{char}.example{char}; none".encode(), OURS, f"UTS 46 4: U+{ord(char):04X} is ignored")
        for char in "\xad\u034f\u180b\u200b\u200d\u2060\u2064\ufe0f\ufeff\U000e0100"
    ),
    ("Authentication-Results: \u200brelay.example; none".encode(), OURS, "UTS 46 4"),
    ('Authentication-Results: "relay\u200b.example"; none'.encode(), OURS, "UTS 46 4"),
    (f"Authentication-Results: relay{chr(0x200B) * 500}.example; none".encode(), OURS, "UTS 46 4"),
    ("Authentication-Results: relay\u200b.example.com; none".encode(), OTHERS, "another's"),
    (b"Authentication-Results: \xff; none", OTHERS, "no domain"),
    ("Authentication-Results: relay\u3002example; none".encode(), OURS, "UTS 46: an ideographic full stop"),
    (b'Authentication-Results: "relay.example"=; dmarc=pass', OURS, "a quoted string is no method"),
    (b"Authentication-Results: relay.example=; dmarc=pass", OURS, "same"),
    (b"Authentication-Results: relay.example==1", OURS, "same"),
    (b"Authentication-Results: relay.example\x7f; dmarc=pass", OURS, "RFC 2045 5.1: a control character"),
    (b"Authentication-Results: \x7frelay.example; dmarc=pass", OURS, "same"),
    (b'Authentication-Results: "relay.example\x7f"; dmarc=pass', OURS, "same, in a quoted string"),
    (b'Authentication-Results: "relay.example\x00"; dmarc=pass', OURS, "same"),
    (b'Authentication-Results: "relay\\\x01.example"; dmarc=pass', OURS, "same"),
    (b"Authentication-Results\x7f: relay.example; dmarc=pass", OURS, "a control character in front of the colon"),
    (b"Authentication-Results\x01: relay.example; dmarc=pass", OURS, "same"),
    *(
        (f"Authentication-Results: relay{char}.example{char}; none".encode(), OURS, f"U+{ord(char):04X} cannot be seen")
        for char in "\x80\x90\u115f\u1160\u17b4\u3164\uffa0\ufff9\U0001d173\u0600"
    ),
    (b'Authentication-Results: "spf"=pass', OURS, "a quoted string is no method"),
    (b"Authentication-Results: other.example; spf=pass", OTHERS, "RFC 8601 5: another's"),
    (b"Authentication-Results: xrelay.example; none", OTHERS, "5"),
    (b"Authentication-Results: relay.example.com; none", OTHERS, "5"),
    (b"Authentication-Results: mail.relay.example; none", OTHERS, "5"),
    (b"Authentication-Results: relay-example; none", OTHERS, "5"),
    (b'Authentication-Results: "other.example" 1; none', OTHERS, "5"),
    (b"Authentication-Results: other.example (relay.example); none", OTHERS, "a comment"),
    (b"Authentication-Results: (relay.example) other.example; none", OTHERS, "same"),
    (b"Authentication-Results: other.example; spf=pass smtp.helo=relay.example", OTHERS, "a property"),
    (b"Authentication-Results: other.example; relay.example; none", OTHERS, "not the authserv-id"),
    (b"Authentication-Results: none", OTHERS, "not ours"),
    (b"Authentication-Results: spf=pass smtp.mailfrom=relay.example; dkim=none", OTHERS, "no authserv-id, as some write it"),
    (b"ARC-Authentication-Results: i=1; relay.example; spf=pass", OTHERS, "RFC 8617 4.1.1: sealed"),
    (b"X-Authentication-Results: relay.example; none", OTHERS, "other name"),
    (b"Authentication-Results-X: relay.example; none", OTHERS, "other name"),
    (b"Subject: Authentication-Results: relay.example; none", OTHERS, "a value"),
    (b"Subject: x\r\n Authentication-Results: relay.example; none", OTHERS, "a folded value"),
    (b"Authentication- Results: relay.example; none", OTHERS, "no name"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "ours", "source"), FORGED)
def test_which_fields_claim_to_be_ours(line, ours, source):
    for before, behind in ((b"Subject: x\r\n", b"To: y\r\n\r\n"), (b"", b"\r\n"), (b"From: a@b.test\r\n", b"")):
        block = before + line + b"\r\n" + behind
        kept = without_forged(block, "relay.example")
        assert kept == (before + behind if ours else block), source
        assert ours or kept is block
    twice = without_forged((line + b"\r\n") * 2 + b"To: y\r\n\r\n", "relay.example")
    assert twice.count(b"\r\n") == (2 if ours else 2 + 2 * (line.count(b"\r\n") + 1))


def test_all_that_cannot_be_seen_is_left_out():
    unseen = [char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char) in ("Cc", "Cf")]
    assert [char for char in unseen if _folded(f"a{char}b") != "ab"] == []


def test_a_long_name_is_recognized_in_each_of_its_forms():
    """RFC 5891 5.3, UTS 46 4.1: NFD, too; of a name that the DNS can have."""
    label = "\uac01" * 44
    for hostname in (f"{label}.{label}.example", "xn--" + label.encode("punycode").decode() + ".example"):
        shown = hostname if label in hostname else f"{label}.example"
        for form in ("NFC", "NFD"):
            written = unicodedata.normalize(form, shown)
            assert without_forged(f"Authentication-Results: {written}; dmarc=pass\r\n".encode(), hostname) == b""


def test_of_a_header_full_of_odd_names_the_first_are_read():
    one = ("Authentication-Results: a" + "\u0301\u0316" * 490 + "; x=pass\r\n").encode()
    assert without_forged(one * (131072 // len(one)), "relay.example").count(b"\r\n") == 10
    other = b"Authentication-Results: other.example; none\r\n"
    assert without_forged(one * 20 + other, "relay.example").endswith(other)


def test_an_authserv_id_may_be_written_in_u_labels():
    block = "Authentication-Results: b\u00fccher.example; spf=pass\r\n\r\n".encode()
    assert without_forged(block, "xn--bcher-kva.example") == b"\r\n"
    assert without_forged(block, "bucher.example") is block


@pytest.mark.parametrize("line", [line for line, ours, _ in FORGED if ours])
def test_what_remains_is_not_taken_for_ours_by_another_parser(line):
    """The email package, of the fields that remain."""
    kept = without_forged(line + b"\r\nTo: y\r\n\r\n", "relay.example")
    message = email.message_from_bytes(kept, policy=email.policy.compat32)
    assert message.get_all("Authentication-Results") is None and message["To"] == "y"


@pytest.mark.parametrize("hostname", ["mx.xn--exmple-cua.org", "mx.exämple.org"])
@pytest.mark.parametrize("written", ["mx.xn--exmple-cua.org", "MX.XN--EXMPLE-CUA.org.", "mx.exämple.org", "mx.EXÄMPLE.org"])
def test_our_name_is_ours_in_a_labels_and_u_labels(hostname, written):
    assert without_forged(f"Authentication-Results: {written}; dmarc=pass\r\n".encode(), hostname) == b""
