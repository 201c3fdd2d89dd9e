"""Addresses in MAIL and RCPT: what is accepted, and the one form that all spellings of an address have in common.

Each row was tried with Postfix 3.7 (its default, strict_rfc821_envelopes = no): what it accepts, and the address that it sends
to the next hop. Rows marked "stricter" are accepted by it, but not here.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.control.filters import Filter
from relaymta.proto.address import (
    LONGEST_LOCAL,
    DomainError,
    comparable,
    compared,
    domain_of,
    in_u_labels,
    mail_argument,
    normalize_domain,
    plain,
    quoted_if_needed,
    rcpt_argument,
)
from relaymta.proto.envelope import Envelope

DOMAIN = "ours.example"

# (path behind FROM: or TO:, the address; None: a syntax error)
PATHS = [
    ("<a@b.example>", "a@b.example"),
    (" <a@b.example>", "a@b.example"),
    ("\t<a@b.example>", "a@b.example"),
    ("< a@b.example >", "a@b.example"),
    ("<a@b.example >", "a@b.example"),
    ("a@b.example", "a@b.example"),
    (" a@b.example", "a@b.example"),
    ("<<a@b.example>>", "a@b.example"),
    ("<a@b.example>>", "a@b.example"),
    ("a@b.example>", "a@b.example"),
    ("<a@b.example", None),
    ("<@x:a@b.example>", "a@b.example"),
    ("<@x,@y:a@b.example>", "a@b.example"),
    ("<@x:@y:a@b.example>", "a@b.example"),
    ("<@ x :a@b.example>", "a@b.example"),
    ("@x:a@b.example", "a@b.example"),
    ("<a@b.example>(comment)", "a@b.example"),
    ("<a(comment)@b.example>", "a@b.example"),
    ("<(comment)a@b.example(comment)>", "a@b.example"),
    ("<a@b.example>SIZE=10", None),
    ("<a(one (two (three)) \\) four)@b.example>", "a@b.example"),  # RFC 5322 3.2.2
    ("<(a(b)@b.example>", None),
    ("<a)@b.example>", None),
    ("<a@b.example>;", "a@b.example"),
    ("<a@b.example>;;", "a@b.example"),
    ("a@b.example;", "a@b.example"),
    ("<a@b.example>(one (two) \\) three);", "a@b.example"),
    ("<a@b.example>(one (two)", None),
    ("<a@[192.0.2.1].>", "a@[192.0.2.1]"),
    ("<a@[192.0.2.1]..>", None),
    ("<a@[192.0.2.1].b>", None),
    ("", None),
    (" ", None),
    ("<a@>", None),
    ("<@>", None),
    ("<@@>", None),
    ("<@b.example>", None),  # stricter: ""@b.example
    ("<a @ b.example>", "a@b.example"),
    ("<a@b .example>", "a@b.example"),
    ("<a@b example>", None),
    ("<a b@b.example>", None),
    ("<a@b.example.>", "a@b.example"),
    ("<a@b.example..>", None),
    ("<a@b..example>", None),
    ("<a@.b.example>", None),
    ("<a@.>", None),
    ("<a..b@b.example>", '"a..b"@b.example'),
    ("<.a@b.example>", '".a"@b.example'),
    ("<a.@b.example>", '"a."@b.example'),
    ("<.@b.example>", '"."@b.example'),
    ("<...@b.example>", '"..."@b.example'),
    ('<"a..b"@b.example>', '"a..b"@b.example'),
    ("<a. b@b.example>", "a.b@b.example"),
    ('<"a"@b.example>', "a@b.example"),
    ('<"a.b"@b.example>', "a.b@b.example"),
    ('<"a".b@b.example>', "a.b@b.example"),
    ('<"a"."b"@b.example>', "a.b@b.example"),
    ('<"a b".c@b.example>', '"a b.c"@b.example'),
    ('<a"b"@b.example>', None),
    ('<"a\\b"@b.example>', "ab@b.example"),
    ("<a\\ b@b.example>", '"a b"@b.example'),
    ('<"a\\"b"@b.example>', '"a\\"b"@b.example'),
    ('<"a\\\\b"@b.example>', '"a\\\\b"@b.example'),
    ('<"a@b"@b.example>', '"a@b"@b.example'),
    ('<""@b.example>', '""@b.example'),
    ('"a b"@b.example', '"a b"@b.example'),
    ("<a@b@b.example>", None),  # stricter: "a@b"@b.example
    ("<a:b@b.example>", None),  # stricter
    ("<a,b@b.example>", None),
    ("<a;b@b.example>", None),
    ("<a[b@b.example>", None),
    ("<a%b@b.example>", "a%b@b.example"),
    ("<a@[192.0.2.1]>", "a@[192.0.2.1]"),
    ("<a@[IPv6:::1]>", "a@[IPv6:::1]"),
    ("<a@[x]>", None),
    ("<a@B.Example>", "a@B.Example"),
    ("<ü@b.example>", "ü@b.example"),
    ("<ü..ü@b.example>", '"ü..ü"@b.example'),
    ("<root>", "root@ours.example"),
    ("root", "root@ours.example"),
    ("< root >", "root@ours.example"),
    ('<"root">', "root@ours.example"),
    ("<a.b>", "a.b@ours.example"),
    ("<a..b>", '"a..b"@ours.example'),
    ("<@x:root>", "root@ours.example"),
    ("<a!b>", None),  # stricter: b@a
    ("<a%b>", None),  # stricter: a@b
    ('<"a@b">', None),  # stricter
]


@pytest.mark.parametrize(("path", "address"), PATHS)
@pytest.mark.parametrize("parameters", ["", " SIZE=10", "\tSIZE=10", "  SIZE=10 "])
def test_an_address_has_one_form(path, address, parameters):
    expected = None if address is None else (address, parameters.strip())
    for word, read in (("FROM:", mail_argument), ("from:", mail_argument), (" FROM:", mail_argument), ("TO:", rcpt_argument)):
        if path.strip():  # else the parameters would be the path
            found = read((word + path + parameters).encode(), DOMAIN)
            assert (found and (found[0], found[1].strip())) == expected, word
        else:
            assert read((word + path).encode(), DOMAIN) is None
    if address is not None and "ours.example" not in address:
        assert plain(address) == address, "and that form has no other"
        assert mail_argument(f"FROM:<{address}>".encode()) == (address, "")


@pytest.mark.parametrize("path", ["root", "<root>", "< root >", '<"root">', "<a.b>", "<@x:root>"])
def test_without_a_domain_to_complete_it_an_address_is_an_error(path):
    assert mail_argument(b"FROM:" + path.encode()) is None and rcpt_argument(b"TO:" + path.encode()) is None


@pytest.mark.parametrize("path", ["<>", " <>", "< >", '""', '<"">', "<> SIZE=1"])
def test_the_null_sender(path):
    found = mail_argument(b"FROM:" + path.encode(), DOMAIN)
    assert found is not None and found[0] == ""
    assert rcpt_argument(b"TO:" + path.encode(), DOMAIN) is None


@pytest.mark.parametrize(
    "path", ["<postmaster>", "<Postmaster>", '<"postmaster">', " < postmaster >", "postmaster", "<@x:postmaster>"]
)
@pytest.mark.parametrize("domain", ["", DOMAIN])
def test_postmaster_needs_no_domain(path, domain):
    """RFC 5321 4.5.1; which one that is the relay decides."""
    found = rcpt_argument(b"TO:" + path.encode(), domain)
    assert found is not None and found[0].lower() == "postmaster"


@pytest.mark.parametrize("argument", ["FROM a@b", "FROM <a@b>", "FROM :<a@b>", "FROM : <a@b>", "TO:<a@b>", "<a@b>", "", "\xfc"])
def test_what_is_no_path(argument):
    assert mail_argument(argument.encode("latin-1")) is None


SPELLINGS = [
    ("{}", lambda text: text), ('"{}"', lambda text: text), ('"{}"', lambda text: "".join("\\" + one for one in text)),
    (" {} ", lambda text: text), ("(c){}", lambda text: text), ("{}", lambda text: "".join("\\" + one for one in text)),
]  # fmt: skip


@pytest.mark.parametrize(("around", "spelled"), SPELLINGS)
@pytest.mark.parametrize("octets", [1, 63, 64, 65, 100, 255, LONGEST_LOCAL, LONGEST_LOCAL + 1, 300])
def test_local_parts_have_one_limit_in_every_spelling(around, spelled, octets):
    local = around.format(spelled("a" * octets))
    expected = f"{'a' * octets}@b" if octets <= LONGEST_LOCAL else None
    for word, read in (("FROM", mail_argument), ("TO", rcpt_argument)):
        for parameters in ("", " SIZE=1" + "0" * 90):
            found = read(f"{word}:<{local}@b>{parameters}".encode())
            assert (None if found is None else found[0]) == expected


@given(local=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20))
def test_any_local_part_can_be_written_and_is_read_as_it_was(local):
    written = f"{quoted_if_needed(local)}@b.example"
    assert plain(written) == written
    every = '"' + "".join("\\" + one for one in local) + '"@b.example.'
    assert plain(every) == written


@pytest.mark.parametrize(
    ("written", "form"),
    [
        ('"Ann"@Ours.example.', "ann@ours.example"), ("Ann@ours.example", "ann@ours.example"),
        ("@Ours.example.", "@ours.example"), ("@.Ours.example", "@.ours.example"),
        ("a..b@x", '"a..b"@x'), ("no address", "no address"), ("", ""),
    ],
)  # fmt: skip
def test_addresses_of_a_configuration_are_compared_in_the_same_form(written, form):
    assert comparable(written) == form


@pytest.mark.parametrize(
    ("written", "form", "domain"),
    [
        ("", "", ""), ("Postmaster", "postmaster", ""), ("A@B.example", "a@b.example", "b.example"),
        ("a@BÜCHER.example", "a@xn--bcher-kva.example", "xn--bcher-kva.example"),  # RFC 5890 2.3.2.4
        ("Ä@xn--BCHER-kva.example", "ä@xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("a@ä.b.bücher.example", "a@xn--4ca.b.xn--bcher-kva.example", "xn--4ca.b.xn--bcher-kva.example"),
        ("@.bücher.example", "@.xn--bcher-kva.example", ".bücher.example"),
        (".bücher.example", ".xn--bcher-kva.example", ""), ("bücher.example", "xn--bcher-kva.example", ""),
        ("a@ｂ.example", "a@b.example", "b.example"), ("a@b。example", "a@b.example", "b.example"),  # UTS 46 4
        ("a@do\u0308main.test", "a@xn--dmain-jua.test", "xn--dmain-jua.test"),
        ("a@☃.example", "a@☃.example", "☃.example"),  # none of IDNA 2008
        ("a@" + "ä." * 84 + "t", "a@" + "ä." * 84 + "t", "ä." * 84 + "t"),  # 253 octets, 673 in A-labels: none
        ("a@" + "\u4e00" * 64 + ".example", "a@" + "\u4e00" * 64 + ".example", "\u4e00" * 64 + ".example"),
    ],
)  # fmt: skip
def test_u_labels_and_a_labels_of_a_domain_are_compared_as_one(written, form, domain):
    assert compared(written) == form and domain_of(written) == domain
    assert comparable(written) == form


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("ours.example", True), ("bücher.example", True), ("BÜCHER.example.", True), ("xn--bcher-kva.example", True),
        ("ｏurs.example", False), ("ours。example", False), ("bu\u0308cher.example", False), ("☃.example", False),
    ],
)  # fmt: skip
def test_what_is_mapped_to_a_domain_is_not_how_an_address_has_it(domain, expected):
    """RFC 6531 3.3: a recipient of ours is not taken from an unauthenticated client in another spelling."""
    assert in_u_labels(domain) == expected


@pytest.mark.parametrize("domain", ["bücher.example", "xn--bcher-kva.example", "BÜCHER.EXAMPLE", "bücher.example."])
@pytest.mark.parametrize("recipient", ["x@bücher.example", "x@XN--bcher-kva.example"])
def test_a_filter_of_an_operator_means_a_domain_in_either_form(domain, recipient):
    envelope = Envelope("b@bücher.example", [recipient], 1, 0, 0, 0)
    assert Filter(recipient_domain=domain).matches(1, envelope)
    assert Filter(sender="B@xn--bcher-kva.example").matches(1, envelope)
    assert not Filter(recipient_domain="bucher.example").matches(1, envelope)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Example.TEST.", "example.test"), ("xn--DMAIN-jua.test", "xn--dmain-jua.test"),  # RFC 5890 2.3.2.1: case does not matter
        ("dömain.test", "xn--dmain-jua.test"), ("DÖMAIN.Test", "xn--dmain-jua.test"), ("do\u0308main.test", "xn--dmain-jua.test"),
        ("dömain.test.", "xn--dmain-jua.test"), ("dömain。test", "xn--dmain-jua.test"), ("dömain.test。", "xn--dmain-jua.test"),
        ("straße.test", "xn--strae-oqa.test"), ("пример.испытание", "xn--e1afmkfd.xn--80akhbyknj4f"),  # IDNA 2008; RFC 3696
        ("xn--dmain-jua.dömain.test", "xn--dmain-jua.xn--dmain-jua.test"), ("_spf.dömain.test", "_spf.xn--dmain-jua.test"),
        ("a_b.dömain.test", "a_b.xn--dmain-jua.test"), ("ｅｘample.dömain.test", "example.xn--dmain-jua.test"),
    ],
)  # fmt: skip
def test_the_forms_of_a_domain_are_one(written, expected):
    assert normalize_domain(written) == expected


@pytest.mark.parametrize(
    "written",
    ["", ".", "a..test", "dömain..test", ".dömain.test", "a＠b.test", "a\u00a0b.test", "dö main.test", "dömain;.test", "☃.test",
     "ö" * 64 + ".test", "ö." * 60 + "test" + ".ö" * 80, "a" * 64],
)  # fmt: skip
def test_what_is_no_domain_has_no_form(written):
    with pytest.raises(DomainError):
        normalize_domain(written)


def test_spellings_of_one_mailbox_are_compared_as_one():
    composed, decomposed = "j\u00d6rg@b\u00fccher.example", "jo\u0308rg@bu\u0308cher.example"
    assert compared(composed) == compared(decomposed) == "j\u00f6rg@xn--bcher-kva.example"
    assert rcpt_argument(b"TO:<a@[ipv6:2001:0DB8:0::1]>") == ("a@[IPv6:2001:db8::1]", "")
    assert comparable("a@[IPv6:2001:db8:0:0::1]") == comparable("a@[ipv6:2001:DB8::0001]")
