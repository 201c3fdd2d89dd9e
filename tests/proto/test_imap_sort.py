"""SORT: base subjects (RFC 5256 2.1), sent dates (2.2), what is compared, and orders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.imap_sort import Sortable, Sorted, base_subject, in_order, sent, sortable
from relaymta.proto.imap_text import FIELDS, EnvelopeText
from relaymta.proto.mime import describe
from relaymta.proto.mime_envelope import tokens


@pytest.mark.parametrize(
    "subject, base, replies",
    [
        ("test", "test", False),
        ("Re: test", "test", True),
        ("re[2]: Test", "test", True),
        ("RE : [list] FW: Fwd: test  (fwd) (FWD) ", "test", True),
        ("[list] test", "test", False),
        ("[one][two] re: [three] test", "test", True),
        ("[list]", "[list]", False),
        ("[one] [two]", "[two]", False),
        ("[fwd: re: [x] test]", "test", True),
        ("[Fwd: [fwd: test]]", "test", True),
        ("test (fwd) x", "test (fwd) x", False),
        ("a\t b\r\n   c", "a b c", False),
        ("=?utf-8?q?Re:_=C3=84pfel?=", "äpfel", True),
        ("Re:", "", True),
        ("", "", False),
        ("rest: x", "rest: x", False),
        ("[a[b] x", "[a[b] x", False),
    ],
)
def test_base_subject(subject, base, replies):
    assert base_subject(subject.encode()) == (base, replies)


@pytest.mark.parametrize("piece", ["re:", "[", "[a]", "[fwd:", "(fwd)", "re [", " ", "[a] re:", "]"])
def test_base_subject_of_what_is_long(piece):
    base, _ = base_subject((piece * 200_000).encode())
    assert len(base) < 4001


@given(st.text(st.sampled_from("re:fwd[]() x"), max_size=40))
def test_base_subject_is_base(subject):
    base, _ = base_subject(subject.encode())
    assert base_subject(base.encode())[0] == base


@pytest.mark.parametrize(
    "date, seconds",
    [
        ("Thu, 1 Jan 1970 01:00:00 +0100", 0),
        ("1 Jan 70 00:00 +0000", 0),
        ("Thu, 01 Jan 1970 00:00:05 GMT", 5),
        ("Wed, 31 Dec 1969 19:00:01 EST", 1),
        ("Thu, 1 Jan 1970 00:00:00 -0130", 5400),
        ("Sat, 30 Feb 2002 00:00:00 +0000", None),
        ("Thu, 1 Foo 1970 00:00:00 +0000", None),
        ("Thu, 1 Jan 0000 00:00:00 +0000", None),
        ("Thu, 1 Jan 1970 25:00:00 +0000", None),
        ("yesterday", None),
    ],
)
def test_sent(date, seconds):
    assert sent(date.encode()) == seconds


def test_nothing_sent():
    assert sent(None) is None


@given(st.binary(max_size=100))
def test_sent_of_anything(date):
    sent(date)


def envelope(**fields: str) -> bytes:
    header = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return describe(f"{header}\r\n".encode()).envelope


def test_parts_of_an_envelope():
    found = sortable(envelope(Date="x", Subject='say "a\\b"', From="A <a@x>, B <b@x>", To="list:c@x;", Cc="<d@y>"))
    assert found.date == b"x" and found.subject == b'say "a\\b"'
    assert found.mailboxes == {"FROM": b"a", "TO": b"list", "CC": b"d"}
    empty = sortable(envelope(From="a@x"))
    assert (empty.date, empty.subject) == (None, b"") and empty.mailboxes == {"FROM": b"a", "TO": b"", "CC": b""}
    assert sortable(b"(NIL {3}\r\na)( NIL ((NIL NIL {1}\r\nz NIL)) NIL NIL NIL NIL NIL NIL NIL)").mailboxes["TO"] == b""


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_parts_of_any_envelope(subject, to, date):
    data = b"Subject: %b\r\nTo: %b\r\nCc: c@x\r\nDate: %b\r\n\r\n" % (subject, to, date)
    if b"\n" not in subject + to + date and b"\r" not in subject + to + date:
        assert sortable(describe(data).envelope).mailboxes["CC"] == b"c"


def order(messages, *criteria) -> list[int]:
    found = Sorted([(name.removeprefix("-"), name.startswith("-")) for name in criteria])
    for number, fields in enumerate(messages):
        size, arrival = fields.pop("size", 0), fields.pop("arrival", number)
        found.add(envelope(**fields), arrival, size)
    return list(found.order())


def test_orders():
    def messages():
        return [
            {"Subject": "Re: b", "From": "z@x", "size": 10, "Date": "Thu, 1 Jan 1970 00:00:09 +0000", "To": "a@b"},
            {"Subject": "A", "From": "Z@x", "size": 9, "Date": "Thu, 1 Jan 1970 00:00:07 +0000", "Cc": "q@x"},
            {"Subject": "ab", "From": "b@x", "size": 10, "arrival": 8000, "To": "A@c"},
            {"Subject": "b", "size": 300, "Date": "Thu, 1 Jan 1970 10:00:00 +1000"},
        ]

    assert order(messages(), "SUBJECT") == [1, 2, 0, 3] and order(messages(), "-SUBJECT") == [0, 3, 2, 1]
    assert order(messages(), "DATE") == [3, 1, 2, 0]  # one without Date: is sorted by its internal date
    assert order(messages(), "SIZE", "-ARRIVAL") == [1, 2, 0, 3]
    assert order(messages(), "FROM", "-SIZE") == [3, 2, 0, 1]
    assert order(messages(), "TO") == [1, 3, 0, 2] and order(messages(), "-CC", "ARRIVAL") == [1, 0, 3, 2]
    assert order([], "TO") == []


def test_many():
    found = Sorted([("SIZE", True)])
    for number in range(20_000):
        found.add(b"", 0, number % 7)
    assert list(found.order()) == sorted(range(20_000), key=lambda number: -(number % 7))


@given(st.lists(st.integers(0, 5), max_size=40))
def test_in_order_is_sorted(items):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relaymta.proto.imap_sort.RUN", 4)
        numbers = list(range(len(items)))
        assert in_order(numbers, items.__getitem__) == sorted(numbers, key=items.__getitem__)


def test_a_criterion_that_comes_again_costs_nothing():
    once, often = Sorted([("SUBJECT", False)]), Sorted([("SUBJECT", False), ("SUBJECT", True)] * 10)
    for one in (once, often):
        for subject in (b"b", b"a" * 300, b"c"):
            one.add(describe(b"Subject: " + subject + b"\r\n\r\n").envelope, 0, 0)
    assert once._run == often._run and list(once.order()) == list(often.order()) == [1, 0, 2]


def walked(envelope: bytes) -> list[list[bytes | None]]:
    """All strings of each field of an ENVELOPE, in one walk over it."""
    fields: list[list[bytes | None]] = []
    depth = 0
    for token in tokens(envelope):
        if depth == 1 and token != ")":
            fields.append([])
        if isinstance(token, str):
            depth += 1 if token == "(" else -1
        else:
            fields[-1].append(token)
    return fields


LINES = st.builds(
    lambda name, words: name + b": " + b"".join(words) + b"\r\n",
    st.sampled_from([b"From", b"To", b"Cc", b"Reply-To", b"Subject", b"Date", b"In-Reply-To", b"X"]),
    st.lists(st.sampled_from([b"a@b", b", ", b'"x y" <c@d>', b"\xe4", b"g: ", b"; ", b"(c)", b'"q\\"(" <e@f>', b"l" * 90, b"<"])),
)


@given(st.lists(LINES, max_size=12).map(b"".join))
def test_fields_are_found_without_a_look_at_all_that_is_in_them(header):
    envelope = describe(header + b"\r\n").envelope
    fields = walked(envelope)
    assert len(fields) == 10
    third = [one[2] or b"" if len(one) > 2 else b"" for one in fields]
    assert sortable(envelope) == Sortable(fields[0][0], fields[1][0] or b"", {"FROM": third[2], "TO": third[5], "CC": third[6]})
    text = EnvelopeText(envelope, str)
    assert [text.has(name, "") for name in FIELDS] == [one != [None] for one in fields]


def test_an_envelope_that_is_cut_off_has_the_fields_in_front():
    envelope = describe(b"Date: x\r\nSubject: y\r\nTo: a@b\r\n\r\n").envelope
    for end in range(len(envelope)):
        assert sortable(envelope[:end]).date in (b"x", None)
    assert sortable(b"") == Sortable(None, b"", dict.fromkeys(("FROM", "TO", "CC"), b""))
