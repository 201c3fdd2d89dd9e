"""ENVELOPE, BODYSTRUCTURE and sections of messages: the examples of the RFCs, cases that others got wrong, and messages that
break the rules, whose replies have to be what an independent grammar allows."""

import email.utils
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta._speedups.mime import scan
from relaymta.proto import mime, mime_envelope
from relaymta.proto.mime import Section, describe, section
from tests.speedups import structure_oracle
from tests.speedups.test_mime import DATA, bodies
from tests.support import mime_grammar
from tests.support.messages import ATTACHED, NASTY, crlf


def shown(header: bytes) -> mime_grammar.Envelope:
    """The ENVELOPE of a message with these fields, read by the grammar."""
    return mime_grammar.envelope(describe(header + b"\r\n").envelope)


def part(data: bytes, text: str, prefix: bytes = b"") -> bytes | None:
    """BODY[text]."""
    slices = section(data, describe(data).parts, Section.parse(text.encode()), prefix)
    return None if slices is None else b"".join(slices)


# ENVELOPE

MINUTES = crlf(
    """\
Date: Wed, 17 Jul 1996 02:23:25 -0700 (PDT)
From: Terry Gray <gray@cac.washington.edu>
Subject: IMAP4rev1 WG mtg summary and minutes
To: imap@cac.washington.edu
cc: minutes@CNRI.Reston.VA.US, John Klensin <KLENSIN@MIT.EDU>
Message-Id: <B27397-0100000@cac.washington.edu>
MIME-Version: 1.0
Content-Type: TEXT/PLAIN; CHARSET=US-ASCII

"""
)


def test_the_example_of_rfc_9051():
    found = describe(MINUTES + b"x" * 76 + b"\r\n")
    gray = b'(("Terry Gray" NIL "gray" "cac.washington.edu"))'
    assert found.envelope == (
        b'("Wed, 17 Jul 1996 02:23:25 -0700 (PDT)" "IMAP4rev1 WG mtg summary and minutes" ' + gray + b" " + gray + b" " + gray
        + b' ((NIL NIL "imap" "cac.washington.edu"))'
        b' ((NIL NIL "minutes" "CNRI.Reston.VA.US")("John Klensin" NIL "KLENSIN" "MIT.EDU")) NIL NIL'
        b' "<B27397-0100000@cac.washington.edu>")'
    )  # fmt: skip
    assert mime.body_of(found.structure) == b'("text" "plain" ("charset" "US-ASCII") NIL NIL "7bit" 78 1)'
    assert found.header_end == len(MINUTES) and found.version == mime.VERSION


def test_undisclosed_recipients_are_an_empty_group():
    """Case 11."""
    assert (
        b' ((NIL NIL "undisclosed-recipients" NIL)(NIL NIL NIL NIL)) '
        in describe(b"To: undisclosed-recipients:;\r\n\r\n").envelope
    )


def test_two_groups_and_an_address_between():
    """Case 11."""
    to = b'To: A: a@b.test, "C. D" <c@d.test>;, e@f.test, "G H":;\r\n'
    assert shown(to).to == [
        (None, None, b"A", None), (None, None, b"a", b"b.test"), (b"C. D", None, b"c", b"d.test"), (None, None, None, None),
        (None, None, b"e", b"f.test"), (None, None, b"G H", None), (None, None, None, None),
    ]  # fmt: skip


def test_what_is_missing_is_nil():
    """Case 11: never ()."""
    assert describe(b"X: y\r\n\r\n").envelope == b"(NIL NIL NIL NIL NIL NIL NIL NIL NIL NIL)"
    for empty in (b"To:\r\nCc: \r\nBcc: ,\r\nFrom: (x)\r\n", b"To: \r\n \r\n"):
        assert describe(empty + b"\r\n").envelope == b"(NIL NIL NIL NIL NIL NIL NIL NIL NIL NIL)"


def test_fields_of_text_that_are_empty_are_empty_strings():
    text = b"Date:\r\nSubject: \r\n \r\nIn-Reply-To:\t\r\nMessage-ID:\r\n\r\n"
    assert describe(text).envelope == b'("" "" NIL NIL NIL NIL NIL NIL "" "")'


@pytest.mark.parametrize("others", [b"", b"Sender:\r\nReply-To: \r\n", b"Sender: ,\r\nReply-To: (x)\r\n"])
def test_sender_and_reply_to_default_to_from(others):
    """Case 11."""
    found = shown(b"From: A <a@b.test>, c@d.test\r\n" + others)
    assert found.sender_from == found.sender == found.reply_to == [(b"A", None, b"a", b"b.test"), (None, None, b"c", b"d.test")]
    found = shown(b"From: a@b.test\r\nSender: s@b.test\r\nReply-To: r:;\r\n")
    assert (found.sender, found.reply_to) == (
        [(None, None, b"s", b"b.test")],
        [(None, None, b"r", None), (None, None, None, None)],
    )


@pytest.mark.parametrize(
    ("value", "expected", "octets"),
    [
        (b" a\r\n b\r\n\tc", b"a b\tc", b'"a b\tc"'),
        (b' say "x" \\', b'say "x" \\', b'"say \\"x\\" \\\\"'),
        (b" caf\xc3\xa9", b"caf\xc3\xa9", b"{5}\r\ncaf\xc3\xa9"),
        (b" a\0b", b"a b", b'"a b"'),
        (b" a\rb", b"a b", b'"a b"'),
        (b" \xff\0\rx", b"\xff  x", b"{4}\r\n\xff  x"),
        (b" \x01\x1f\x7f", b"\x01\x1f\x7f", b'"\x01\x1f\x7f"'),
        (b" " + b"x" * 1001, b"x" * 1001, b"{1001}\r\n" + b"x" * 1001),
    ],
)
def test_a_string_is_quoted_or_a_literal_as_the_grammar_allows(value, expected, octets):
    """Case 11: folded, with quotes, backslash, 8-bit, NUL; one line."""
    found = describe(b"Subject:" + value + b"\r\n\r\n").envelope
    assert found.startswith(b"(NIL " + octets + b" NIL ")
    assert mime_grammar.envelope(found).subject == expected
    assert b"\n" not in expected and b"\r" not in expected


ADDRESSES = {
    b"a@b.test": [(None, None, b"a", b"b.test")],
    b"<a@b.test>": [(None, None, b"a", b"b.test")],
    b"A  B. <a@b.test>": [(b"A B.", None, b"a", b"b.test")],
    b'"A, \\"B\\"" <a@b.test>': [(b'A, "B"', None, b"a", b"b.test")],
    b'"" <a@b.test>': [(None, None, b"a", b"b.test")],
    b"=?utf-8?q?=C3=A4?= <a@b.test>": [(b"=?utf-8?q?=C3=A4?=", None, b"a", b"b.test")],
    b"a@b.test (A (B) \\) C)": [(b"A (B) ) C", None, b"a", b"b.test")],
    b"A (c) <a@b.test> (d)": [(b"A", None, b"a", b"b.test")],
    b"<@x.test,@y.test:a@b.test>": [(None, b"@x.test,@y.test", b"a", b"b.test")],
    b'"q r"@b.test, "x@y"@[IPv6:2001:db8::1]': [(None, None, b"q r", b"b.test"), (None, None, b"x@y", b"[IPv6:2001:db8::1]")],
    b"Pete(A nice \\) chap) <pete(his account)@silly.test(his host)>": [(b"Pete", None, b"pete", b"silly.test")],
    b"A Group(Some people)\r\n :Chris Jones <c@(Chris's host.)public.example>,\r\n joe@example.org,\r\n"
    b" John <jdoe@one.test> (my dear friend); (the end of the group)": [
        (None, None, b"A Group", None), (b"Chris Jones", None, b"c", b"public.example"), (None, None, b"joe", b"example.org"),
        (b"John", None, b"jdoe", b"one.test"), (None, None, None, None),
    ],
    b"g: a@b.test, h: c@d.test;": [
        (None, None, b"g", None), (None, None, b"a", b"b.test"), (None, None, None, None), (None, None, b"h", None),
        (None, None, b"c", b"d.test"), (None, None, None, None),
    ],
    b"a@b@c.test (one) (two)": [(b"two", None, b"a@b", b"c.test")],
    b"a . b @ c . test": [(None, None, b"a.b", b"c.test")],
    b"root": [(None, None, b"root", b"")],
    b"A B <>": [(b"A B", None, b"", b"")],
    b"@": [(None, None, b"", b"")],
    b"a@b.test, , c@d.test,": [(None, None, b"a", b"b.test"), (None, None, b"c", b"d.test")],
    b"a@b.test; c@d.test": [(None, None, b"a", b"b.test"), (None, None, b"c", b"d.test")],
    b"A <a@b.test, c@d.test": [(b"A", None, b"a", b"b.test"), (None, None, b"c", b"d.test")],
    b"a@b.test <c@d.test>": [(b"a@b.test", None, b"c", b"d.test")],
    b"[X] A <a@b.test>": [(b"[X] A", None, b"a", b"b.test")],
    b"g: a@b.test": [(None, None, b"g", None), (None, None, b"a", b"b.test"), (None, None, None, None)],
    b"\xe4 <\xf6@\xfc>": [(b"\xe4", None, b"\xf6", b"\xfc")],
    b'"A': [(None, None, b"A", b"")],
}  # fmt: skip


@pytest.mark.parametrize("value", ADDRESSES)
def test_addresses(value):
    assert shown(b"From: " + value + b"\r\n").sender_from == ADDRESSES[value]


WORDS = st.sampled_from(
    [b"a", b"b@c.test", b" ", b"<", b">", b",", b'"x y"', b"A.", b"a_b", b"<d@e>", b"@", b".", b"  ", b'"', b"-"]
)


@given(value=st.lists(WORDS, max_size=12).map(b"".join))
@example(value=b"A  b <b@c.test>, d@e ")
@example(value=b'" x" <a@b>,')
def test_common_addresses_are_read_as_all_others_are(value):
    value = mime_envelope.unfolded(value)
    assert structure_oracle.addresses(value) == structure_oracle.general(value)


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f\xad"), max_size=20).map(str.strip)


@given(pairs=st.lists(st.tuples(NAMES, st.sampled_from(["a@b.test", "a.b+c@d-e.test", "x_y@z.test"])), min_size=1, max_size=4))
def test_addresses_are_as_for_pythons_email(pairs):
    value = ", ".join(f'"{name}" <{spec}>'.replace("\\", "") if '"' not in name else spec for name, spec in pairs)
    expected = [(name or None, spec) for name, spec in email.utils.getaddresses([value])]
    found = shown(b"To: " + value.encode() + b"\r\n").to
    assert found is not None
    assert [
        ((name or b"").decode().strip() or None, f"{mailbox.decode()}@{host.decode()}") for name, _, mailbox, host in found
    ] == [((name or "").strip() or None, spec) for name, spec in expected]


# BODYSTRUCTURE


def structure(data: bytes) -> mime_grammar.Body:
    return mime_grammar.body(describe(data).structure)


def test_extension_data():
    found = structure(NASTY["extension data"])
    disposition = (b"attachment", {b"filename": b'a"b'})
    assert found.extension == (b"Q2hlY2s=", disposition, [b"en", b"de-AT", b"x"], b"http://x.test/ y")
    assert (found.ident, found.description, found.encoding) == (b"<1@x.test>", b"a  b", "7BIT")


def test_the_structure_of_an_attached_tree():
    found = structure(ATTACHED)
    assert [one.type + "/" + one.subtype for one in found.children] == [
        "TEXT/PLAIN", "APPLICATION/OCTET-STREAM", "MESSAGE/RFC822", "MULTIPART/MIXED"
    ]  # fmt: skip
    attached = found.children[2]
    assert attached.envelope is not None and attached.envelope.subject == b"three"
    assert attached.octets == len(part(ATTACHED, "3") or b"") and attached.lines == 11
    assert [one.subtype for one in attached.children[0].children] == ["PLAIN", "OCTET-STREAM"]
    assert found.children[0].parameters == {b"charset": b"us-ascii"} and found.parameters == {b"boundary": b"o"}


@pytest.mark.parametrize(
    ("name", "kind", "lines"),
    [
        ("nothing", "TEXT/PLAIN", 0), ("no delimiter", "TEXT/PLAIN", 1), ("no boundary", "TEXT/PLAIN", 4), ("bare CRs",
        "TEXT/PLAIN", 0),
        ("an attached message in base64", "APPLICATION/OCTET-STREAM", None), ("a type in a comment", "IMAGE/PNG", None),
        ("two Content-Types", "TEXT/HTML", 2), ("a last delimiter alone", "TEXT/PLAIN", 1), ("bare LFs", "MULTIPART/MIXED", None),
        ("a folded boundary", "MULTIPART/MIXED", None), ("an attached message of nothing", "MESSAGE/RFC822", 0),
    ],
)  # fmt: skip
def test_the_structure_of_what_breaks_the_rules(name, kind, lines):
    found = structure(NASTY[name])
    assert (f"{found.type}/{found.subtype}", found.lines) == (kind, lines)


def test_of_fields_that_are_repeated_the_first_counts():
    found = structure(b"Content-ID: <1>\r\nContent-ID: <2>\r\nContent-Disposition: inline\r\nContent-Disposition: x\r\n\r\n")
    assert found.ident == b"<1>" and found.extension is not None and found.extension[1] == (b"inline", None)


def test_values_that_are_empty_or_no_values():
    found = structure(b'Content-Type: text/html; a=b\\c; d="e\\f"\r\nContent-Disposition: ; x=y\r\nContent-Language:\r\n\r\n')
    assert found.parameters == {b"a": b"b\\c", b"d": b"ef"} and found.extension == (None, None, None, None)
    assert structure(NASTY["an empty encoding"]).encoding == "7BIT"
    assert structure(NASTY["an encoding with more"]).encoding == "BASE64"


def test_an_opaque_part_of_type_text_has_no_lines():
    data = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\nContent-Type: text/html\r\n\r\nx\r\n" * 11_000
    found = structure(data)
    last = found.children[-1]
    assert len(found.children) == 9999 and (last.type, last.subtype, last.lines) == ("APPLICATION", "OCTET-STREAM", None)


def strict(data: bytes) -> None:
    """Every reply about a message is what the grammar allows, and the replies agree with each other."""
    found = describe(data)
    parts = scan(data)
    mime_grammar.envelope(found.envelope)
    whole = mime_grammar.body(found.structure)
    short = mime.body_of(found.structure)
    assert short == structure_oracle.body(data, parts)
    mime_grammar.body(short, extended=False)
    assert len(found.parts) == mime.PLACE.size * len(parts)
    same_sizes(data, found.parts, whole, ())


def same_sizes(data: bytes, parts: bytes, body: mime_grammar.Body, path: tuple[int, ...]) -> None:
    """The sections that a structure promises are there, of the sizes it says."""
    children = body.children
    if body.type == "MESSAGE" and children:
        inner = children[0]
        assert section(data, parts, Section(path, "HEADER")) is not None or not path
        children = inner.children if inner.type == "MULTIPART" else (inner,)
    elif body.type != "MULTIPART" and not path:
        children = (body,)
    if path and body.type != "MULTIPART":
        slices = section(data, parts, Section(path))
        assert slices is not None and sum(map(len, slices)) == body.octets
        assert body.lines is None or body.lines == b"".join(slices).count(b"\n")
        assert section(data, parts, Section(path, "MIME")) is not None
    if not path and body.type == "MESSAGE":
        return  # its numbers begin with its own
    for number, child in enumerate(children[:20], 1):
        if not path or (len(path) < 30 and child is not body):
            same_sizes(data, parts, child, (*path, number))
    assert path == () or section(data, parts, Section((*path, len(children) + 1 + (not children)))) is None


@pytest.mark.parametrize("name", NASTY)
def test_replies_about_messages_that_break_the_rules_are_well_formed(name):
    strict(NASTY[name])


@given(data=DATA)
def test_replies_are_well_formed(data):
    strict(data)


@given(data=bodies())
def test_replies_about_well_formed_messages_are_well_formed(data):
    strict(data)


@given(data=st.lists(st.sampled_from([b"From:", b"To: ", b"\r\n", b"\r\n ", b"<", b">", b"@", b":", b";", b",", b'"', b"\\",
b"(", b")",
                                      b"a", b" ", b"\0", b"\xff", b"[", b"]", b"Content-Type: text/plain;", b"=", b"{3}\r\n"])
                     ).map(b"".join))  # fmt: skip
def test_replies_about_any_header_are_well_formed(data):
    strict(data)


def test_a_structure_that_is_not_ours():
    for wrong in (b"", b"(", b'("text"', b"x", b"*", b'(("text" "plain"))'):
        with pytest.raises(ValueError):
            mime.body_of(wrong)


def test_body_of_many_parts_takes_little_more_memory_than_itself():
    whole = mime.describe(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\r\n" * 9_000).structure
    tracemalloc.start()
    try:
        assert mime.body_of(whole).count(b'"text" "plain"') == 9_000
        assert tracemalloc.get_traced_memory()[1] < 16 * len(whole)
    finally:
        tracemalloc.stop()


def test_many_addresses_are_cut():
    found = shown(b"To: " + b"a@b," * 20_000 + b"\r\nBcc: g:" + b"(x)a,a," * 20_000 + b"\r\nCc: a@b\r\n")
    assert found.to is not None and len(found.to) == structure_oracle.ADDRESSES_MOST
    assert found.cc == [(None, None, b"a", b"b")]  # it comes first in the envelope
    assert found.bcc is not None and len(found.bcc) == structure_oracle.ADDRESSES_MOST
    assert shown(b"To: " + b"<a@b " * 100_000 + b"\r\nBcc: c@d").bcc is None


def test_what_is_much_is_not_shown_of_all_parts():
    attached = b"Content-Type: message/rfc822\r\n\r\nFrom: " + b"a@b," * 1000 + b"\r\n"
    data = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + (b"--b\r\n" + attached + b"\r\n") * 100
    strict(data)
    known = [one.envelope is not None and one.envelope.sender_from is not None for one in structure(data).children]
    assert known == [True] * 33 + [False] * 67
    one = b"--b\r\nContent-Type: image/png; a=" + b"x" * 10_000 + b"\r\n\r\n"
    data = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + one * 200
    shown_of = [one.parameters is not None for one in structure(data).children]
    assert shown_of == [True] * 104 + [False] * 96
    assert len(structure(b"Subject: " + b"x" * 100_000 + b"\r\n\r\n").type) == 4
    assert len(shown(b"Subject: " + b"x" * 100_000 + b"\r\n").subject or b"") < 65_536


def test_the_fields_of_a_header():
    data = b"".join(b"A%d: x\r\n" % n for n in range(3000)) + b"\r\n"
    assert len(list(mime.header_fields(data, 0, len(data)))) == 3000
    assert part(data, "HEADER.FIELDS (A0 a1000 A2999)") == b"A0: x\r\nA1000: x\r\nA2999: x\r\n\r\n"


@pytest.mark.parametrize("read", [4, 16, 40, 1000])
@pytest.mark.parametrize("text", ["HEADER.FIELDS (X-B to)", "HEADER.FIELDS.NOT (X-B TO)", "HEADER.FIELDS (X-None)"])
def test_fields_are_chosen_in_pieces_of_a_header(monkeypatch, read, text):
    """Of whole fields, however long they are."""
    data = b"".join(b"X-A: %d\r\n\tfolded\r\nX-B: %d\r\n  and\r\n  more\r\nno field\r\n" % (n, n) for n in range(9)) + b"To: last"
    whole = part(data + b"\r\n\r\nbody", text, b"To: first\r\n")
    monkeypatch.setattr(mime, "READ", read)
    assert part(data + b"\r\n\r\nbody", text, b"To: first\r\n") == whole == part(data, text, b"To: first\r\n")
    assert whole.count(b"X-B: ") == (9 if "(X-B to" in text else 0) and whole.count(b"To: ") == (2 if "(X-B to" in text else 0)


def test_fields_in_front_of_a_message_of_no_octets():
    assert part(b"", "HEADER.FIELDS (TO)", b"To: first\r\n") == b"To: first\r\n\r\n"
    assert part(b"", "HEADER.FIELDS (X-None)", b"To: first\r\n") == b"\r\n"


def test_fields_of_a_large_header_take_little_memory():
    header = b"X: y\r\n" + b"X-1: y\r\n" * 200_000
    tracemalloc.start()
    found = mime.chosen_fields(
        lambda start, end: header[start:end], mime.Extent(0, len(header)), Section((), "HEADER.FIELDS", (b"X",))
    )
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [b"X: y\r\n", b"\r\n"] and most < len(header) // 2
