"""Changes to a header: against a slow and obvious model, and what no change can do, whatever a filter writes."""

import email
import email.policy
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta.proto import edits as module
from relaymta.proto.edits import Append, Change, Edited, Insert, edited, shown, spaced, subject_edits, without
from relaymta.proto.header import begins_well, fields, header_end
from relaymta.proto.mime_text import header_text

OURS = b"Received: from a\r\n\tby b; now\r\nAuthentication-Results: b; spf=pass\r\n"
HEADER = b"From: a@b.test\r\nX-Spam: one\r\nTo: c@d.test,\r\n e@f.test\r\nx-spam : two\r\nSubject: s\r\n\r\n"


AROUND = bytes(octet for octet in range(32) if octet not in b"\t\r\n") + b"\x7f"  # what is ignored in front of a name


class Item:
    """A line of a header, with the folded lines behind it; `text` is None while it is removed."""

    def __init__(self, text, name=b"", kind="line"):
        self.text, self.name, self.kind = text, name, kind


class Model:
    """A header as a list of lines, changed one by one."""

    def __init__(self, header):
        end = header_end(header)
        self.rest, block = header[end:], header[:end]
        self.items, self.tail = [Item(OURS, kind="ours")], b""
        lines = block.split(b"\r\n")
        unended = lines.pop()
        if block == b"\r\n" or block.endswith(b"\r\n\r\n"):
            lines.pop()
            self.tail = b"\r\n"
        elif unended:
            lines.append(unended)
        for line in lines:
            if line[:1] in (b" ", b"\t"):
                self.items[-1].text += b"\r\n" + line
            else:
                self.items.append(Item(line))
        for item in self.items[1:]:
            front = item.text.partition(b":")[0].lstrip(AROUND) if b":" in item.text else b""
            name = front.replace(b"\r\n", b"").rstrip(AROUND + b" \t")
            if name and all(33 <= octet <= 126 for octet in name):
                item.name, item.kind = name.lower(), "field"
        self.instances = {}
        for item in self.items:
            if item.kind == "field":
                self.instances.setdefault(item.name, []).append(item)
        self.before, self.header, self.dropped, self.written, self.changed = self.size(), header, 0, 0, False

    def size(self):
        return sum(len(item.text) + 2 for item in self.items if item.text is not None)

    def apply(self, edit):
        if not edit.name or any(not 33 <= octet <= 126 or octet == 58 for octet in edit.name):
            self.dropped += 1
            return
        found = self.instances.setdefault(edit.name.lower(), [])
        if isinstance(edit, Change) and edit.value == b"":
            if max(edit.instance, 1) <= len(found):
                found[max(edit.instance, 1) - 1].text = None
                self.changed = True
            return
        self.written += 1
        text = safe(edit.name, edit.value)
        if text is None or self.written > module.EDITS_MOST:
            self.dropped += 1
            return
        kept, ours = [(item, item.text) for item in self.items], self.ours()
        if isinstance(edit, Change) and max(edit.instance, 1) <= len(found):
            found[max(edit.instance, 1) - 1].text = text
        else:
            self.items.insert(self.place(edit), Item(text, edit.name.lower(), "added"))
        if self.size() - self.before > module.MOST:
            self.items = [item for item, _ in kept]
            for item, old in kept:
                item.text = old
            self.dropped += 1
            return
        self.changed = self.changed or isinstance(edit, Change) or self.ours() == ours
        if isinstance(edit, Change) and max(edit.instance, 1) > len(found):
            found.append(self.items[-1])

    def place(self, edit):
        counted = [at for at, item in enumerate(self.items) if item.kind != "line"]
        if not isinstance(edit, Insert) or edit.at >= len(counted):
            return len(self.items)
        at = max(edit.at, 0)
        if all(item.kind == "added" for item in self.items[counted[at] :]):
            return counted[at]
        return counted[at - 1] + 1 if at else 0

    def ours(self):
        return next(at for at, item in enumerate(self.items) if item.kind == "ours")

    def result(self):
        ours = self.ours()
        above, below = (
            [item.text for item in items if item.text is not None] for items in (self.items[:ours], self.items[ours + 1 :])
        )
        tail = self.tail if self.header[: header_end(self.header)] or not below else b"\r\n"
        header = b"".join(text + b"\r\n" for text in below) + tail + self.rest
        return Edited(b"".join(text + b"\r\n" for text in above), header if self.changed else self.header, self.dropped)


def safe(name, value):
    """A field as it is written, without its CRLF; None: not at all."""
    lines = []
    for line in (name + b":" + value).replace(b"\r", b"").replace(b"\0", b"").split(b"\n"):
        if lines and not line.strip():
            continue
        text = line if not lines or line[:1] in (b" ", b"\t") else b"\t" + line
        if len(text) > 998:
            text = text.rstrip(b" \t")
        while len(text) > 998:
            places = [at for at in range(1, 999) if text[at] in b" \t" and text[:at].strip(b" \t")]
            if not places:
                return None
            lines.append(text[: places[-1]])
            text = text[places[-1] :]
        lines.append(text)
    return b"\r\n".join(lines)


def modelled(header, edits):
    model = Model(header)
    for edit in edits:
        model.apply(edit)
    return model, model.result()


_LINES = st.sampled_from([
    b"A: b\r\n", b"a : c\r\n", b"X-Spam: Yes\r\n", b"x-spam:no\r\n\tmaybe\r\n", b"B:\r\n c\r\n \r\n\td\r\n", b"C: \xe4\xff\r\n",
    b"Subject: s\r\n", b"no field\r\n", b"no field: x\r\n folded\r\n", b"From a@b Mon\r\n", b": x\r\n", b"\x0bA: x\r\n",
    b"A\r\n : x\r\n", b"A\t:\r\n", b"\xe4: x\r\n", b"\r", b"\n", b"A: b\rc\r\n", b"\x7fA\x00: x\r\n", b"A: b\n\nX-Spam: c\r\n",
    b"\r\n", b" x\r\n",
])  # fmt: skip
_HEADERS = st.tuples(st.lists(_LINES, max_size=9), st.sampled_from([b"\r\n", b"", b"A: end", b"\r\nbody: x\r\n\r\nb\r\n"])).map(
    lambda drawn: b"".join(drawn[0]) + drawn[1]
) | st.binary(max_size=40)
_NAMES = st.sampled_from([b"A", b"a", b"X-Spam", b"B", b"New", b"Subject"]) | st.sampled_from(
    [b"", b"A b", b"A:", b"A\r\nB", b"\xe4"]
)
_VALUES = (
    st.lists(
        st.sampled_from([
            b"x", b" ", b"\t", b"\r\n", b"\n", b"\r", b"\0", b"A: b", b"\xe4", b"\r\n\r\n", b":", b"\x0b", b"y" * 500, b" " * 600,
        ]),
        max_size=8,
    ).map(b"".join)
    | st.binary(max_size=20)
    | st.just(b"")
)  # fmt: skip
_EDITS = st.lists(
    st.builds(Insert, st.integers(-1, 12), _NAMES, _VALUES)
    | st.builds(Append, _NAMES, _VALUES)
    | st.builds(Change, _NAMES, st.integers(-1, 4), _VALUES),
    max_size=12,
)


@given(_HEADERS, _EDITS, st.sampled_from([20, 700, 65536]), st.sampled_from([2, 1000]))
@example(b"A: b\r\nno field\r\n\r\n", [Append(b"X", b"1"), Insert(2, b"Y", b"2")], 65536, 1000)
@example(b"", [Change(b"X", 1, b"1"), Change(b"X", 1, b"")], 65536, 1000)
def test_changes_are_as_the_model_has_them(header, edits, most, number):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST", most)
        patch.setattr(module, "EDITS_MOST", number)
        found = edited(header, edits)
        assert found == modelled(header, edits)[1]
        assert len(found.above) + len(found.header) - len(header) <= most + 4, "an empty line and the end of the last"


@given(_HEADERS, _EDITS)
def test_what_a_filter_writes_is_a_field_and_nothing_else(data, edits):
    end = header_end(data)
    found = edited(data[:end], edits)
    whole = found.above + OURS + (found.header or b"\r\n") + data[end:]
    behind = header_end(whole)
    assert whole[behind:] == data[end:], "the body is as it was, and the header ends where it did"
    items = [item for item in modelled(data[:end], edits)[0].items if item.text is not None]
    assert fields(whole[:behind]) == [one for item in items for one in fields(item.text)]
    added = [item for item in items if item.kind == "added"]
    assert [fields(item.text)[0][0] for item in added] == [item.name for item in added]
    assert all(len(fields(item.text)) == 1 for item in added)


@given(_HEADERS, _EDITS)
def test_what_is_not_changed_stays_as_it_is(header, edits):
    names = {edit.name.lower() for edit in edits if isinstance(edit, Change)}
    found, at = edited(header, edits).header, 0
    for item in Model(header).items[1:]:
        if item.name not in names:
            at = found.index(item.text, at) + len(item.text)


@given(_HEADERS)
def test_no_change_is_the_same_object(header):
    assert edited(header, []) == (b"", header, 0)
    assert edited(header, []).header is header
    assert edited(header, [Insert(0, b"X", b" y"), Append(b"X:", b" y"), Change(b"No-Such", 1, b"")]).header is header


POSITIONS = [
    ([Insert(0, b"X", b" 1")], b"X", b"A B C", "above all"),
    ([Insert(1, b"X", b" 1")], b"", b"X A B C", "right below what is put in front"),
    ([Insert(2, b"X", b" 1")], b"", b"A X B C", "below the first"),
    ([Insert(4, b"X", b" 1")], b"", b"A B C X", "below the last"),
    ([Insert(99, b"X", b" 1")], b"", b"A B C X", "beyond it"),
    ([Insert(2**32 - 1, b"X", b" 1"), Append(b"Y", b" 2")], b"", b"A B C X Y", "beyond it"),
    ([Insert(99, b"X", b" 1"), Insert(5, b"Y", b" 2")], b"", b"A B C X Y", "it is where it is, not at 99"),
    ([Insert(0, b"X", b" 1"), Insert(0, b"Y", b" 2")], b"Y X", b"A B C", "the later one is above"),
    ([Insert(1, b"X", b" 1"), Insert(1, b"Y", b" 2")], b"", b"Y X A B C", "the later one is above"),
    ([Insert(0, b"X", b" 1"), Insert(1, b"Y", b" 2")], b"X Y", b"A B C", "what is put in front is the third by now"),
    ([Insert(0, b"X", b" 1"), Insert(2, b"Y", b" 2")], b"X", b"Y A B C", "right below what is put in front"),
    ([Append(b"X", b" 1"), Insert(4, b"Y", b" 2")], b"", b"A B C Y X", "what was added counts"),
    ([Change(b"A", 1, b""), Insert(2, b"X", b" 1")], b"", b"X B C", "a removed field keeps its place"),
    ([Change(b"A", 1, b""), Insert(2, b"X", b" 1"), Change(b"A", 1, b" 2")], b"", b"A X B C", "to which it comes back"),
]


@pytest.mark.parametrize(("edits", "above", "below", "why"), POSITIONS)
def test_where_fields_are_inserted(edits, above, below, why):
    """As Sendmail and Postfix do it."""
    found = edited(b"A: b\r\nB: c\r\n d\r\nC: e\r\n\r\n", edits)
    assert b" ".join(re.findall(rb"^(\w):", found.above, re.M)) == above, why
    assert b" ".join(re.findall(rb"^(\w):", found.header, re.M)) == below, why


INSTANCES = [
    ([Change(b"X-SPAM", 1, b" new")], HEADER.replace(b"X-Spam: one", b"X-SPAM: new")),
    ([Change(b"X-Spam", 0, b" new")], HEADER.replace(b"X-Spam: one", b"X-Spam: new")),
    ([Change(b"X-Spam", 2, b" new")], HEADER.replace(b"x-spam : two", b"X-Spam: new")),
    ([Change(b"X-Spam", 3, b" new")], HEADER[:-2] + b"X-Spam: new\r\n\r\n"),
    ([Change(b"X-Spam", 9, b" 3"), Change(b"X-Spam", 3, b" new")], HEADER[:-2] + b"X-Spam: new\r\n\r\n"),
    ([Change(b"X-Spam", 3, b"")], HEADER),
    ([Change(b"To", 1, b"")], HEADER.replace(b"To: c@d.test,\r\n e@f.test\r\n", b"")),
    ([Change(b"X-Spam", 1, b""), Change(b"X-Spam", 2, b"")],
     HEADER.replace(b"X-Spam: one\r\n", b"").replace(b"x-spam : two\r\n", b"")),
    ([Change(b"X-Spam", 1, b""), Change(b"X-Spam", 1, b" new")], HEADER.replace(b"one", b"new")),
    # Of what was shown: the second stays the second, and what was added is none.
    ([Change(b"X-Spam", 1, b""), Change(b"X-Spam", 2, b" new")],
     HEADER.replace(b"X-Spam: one\r\n", b"").replace(b"x-spam : two", b"X-Spam: new")),
    ([Append(b"To", b" x"), Insert(1, b"To", b" y"), Change(b"To", 2, b"")], b"To: y\r\n" + HEADER[:-2] + b"To: x\r\n\r\n"),
    ([Change(b"New", 1, b" x"), Append(b"Y", b" z"), Change(b"new", 1, b" y")], HEADER[:-2] + b"new: y\r\nY: z\r\n\r\n"),
    # As rspamd does: all of them are removed, then the first is changed.
    ([Change(b"X-Spam", 2, b""), Change(b"X-Spam", 1, b""), Change(b"X-Spam", 1, b" Yes")],
     HEADER.replace(b"one", b"Yes").replace(b"x-spam : two\r\n", b"")),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "expected"), INSTANCES)
def test_instances_are_counted_in_what_was_shown(edits, expected):
    assert edited(HEADER, edits) == (b"", expected, 0)


VALUES = [
    (b" Yes", b" Yes"), (b"Yes", b"Yes"), (b"\tYes", b"\tYes"), (b"", b""),
    (b" a\nb", b" a\r\n\tb"), (b" a\r\nb", b" a\r\n\tb"), (b" a\r\n b", b" a\r\n b"), (b" a\n\tb", b" a\r\n\tb"),
    (b" a\rb", b" ab"), (b" a\0b", b" ab"), (b" a\n\nb", b" a\r\n\tb"), (b" a\n \t\n b", b" a\r\n b"), (b"\n a", b"\r\n a"),
    (b" a\r\n\r\nbody", b" a\r\n\tbody"), (b" a\n", b" a"), (b" a\r\r\n\r", b" a"), (b" a\nEvil: b", b" a\r\n\tEvil: b"),
    (b" \xe4\xff", b" \xe4\xff"), (b" a\n\x0b\nb", b" a\r\n\tb"), (b"\r\n\r\n", b""), (b" a\n\0\nb", b" a\r\n\tb"),
    (b" " + b"a" * 995, b" " + b"a" * 995), (b" " + b"a" * 996, b"\r\n " + b"a" * 996),
    (b" " + b"a" * 997, b"\r\n " + b"a" * 997),
    (b" " + b"a" * 998, None), (b"a" * 997, None), (b" a" + b" " * 2000, b" a"), (b" a" + b" " * 2000 + b"b", None),
    (b" a\n" + b"b" * 997, b" a\r\n\t" + b"b" * 997), (b" a\n" + b"b" * 998, None),
    (b" a" * 1000, b" a" * 498 + b"\r\n" + b" a" * 499 + b"\r\n" + b" a" * 3),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), VALUES)
def test_values_are_made_safe(value, expected):
    found = edited(HEADER, [Append(b"X", value), Append(b"Y", b" z")])
    assert found.dropped == (expected is None)
    assert found.header == HEADER[:-2] + (b"X:" + expected + b"\r\n" if expected is not None else b"") + b"Y: z\r\n\r\n"


@pytest.mark.parametrize("name", [b"", b"A:", b"A B", b"A\r\nB", b"A\0", b"\xe4", b"A\t", b"\x7f", b"x" * 998])
def test_a_name_that_is_none_is_dropped_and_the_rest_applies(name):
    edits = [Insert(0, name, b" x"), Append(name, b" x"), Change(name, 1, b" x"), Append(b"Y", b" z")]
    assert edited(HEADER, edits) == (b"", HEADER[:-2] + b"Y: z\r\n\r\n", 3)
    assert edited(HEADER, [Change(b"A:", 1, b"")]) == (b"", HEADER, 1)


ENDS = [
    (b"", b"X: y\r\n\r\n", b"X: y\r\n\r\n"),  # there is no header: the body must not become a part of it
    (b"\r\n", b"X: y\r\n\r\n", b"X: y\r\n\r\n"),
    (b"A: b\r\n\r\n", b"X: y\r\nA: b\r\n\r\n", b"A: b\r\nX: y\r\n\r\n"),
    (b"A: b\r\n", b"X: y\r\nA: b\r\n", b"A: b\r\nX: y\r\n"),
    (b"A: b", b"X: y\r\nA: b\r\n", b"A: b\r\nX: y\r\n"),
    (b"A: b\r\nno field\r\n\r\n", b"X: y\r\nA: b\r\nno field\r\n\r\n", b"A: b\r\nno field\r\nX: y\r\n\r\n"),
    (b"no header\r\nA: b\r\n\r\n", b"X: y\r\n\r\nno header\r\nA: b\r\n\r\n", b"X: y\r\n\r\nno header\r\nA: b\r\n\r\n"),
    (b" A: b\r\n\r\n", b"X: y\r\n\r\n A: b\r\n\r\n", b"X: y\r\n\r\n A: b\r\n\r\n"),
]


@pytest.mark.parametrize(("header", "first", "last"), ENDS)
def test_headers_of_any_end(header, first, last):
    assert edited(header, [Insert(1, b"X", b" y")]).header == first
    for edit in (Append(b"X", b" y"), Insert(9, b"X", b" y"), Change(b"X", 1, b" y")):
        assert edited(header, [edit]).header == last
    assert edited(header, [Insert(0, b"X", b" y")]) == (b"X: y\r\n", header, 0)


@pytest.mark.parametrize(("header", "left"), [(b"A: b\r\n\r\n", b"\r\n"), (b"A: b\r\n", b""), (b"A: b", b"")])
def test_all_fields_can_be_removed(header, left):
    assert edited(header, [Change(b"A", 1, b"")]).header == left
    assert without(header, [b"a"]) == left


def test_a_header_grows_by_so_much_and_by_so_many_fields():
    large = Append(b"X", b" " + b"a " * 15_000 + b"b")
    found = edited(HEADER, [large, large, large, Append(b"Y", b" z"), Change(b"To", 1, b"")])
    assert found.dropped == 1, "the small one still fits"
    assert len(found.header) <= len(HEADER) + module.MOST and b"\r\nY: z\r\n" in found.header and b"To:" not in found.header
    long = b"A:" + b" " + b"a " * 40_000 + b"b\r\n\r\n"
    found = edited(long, [Change(b"A", 1, b" " + b"a " * 50_000 + b"b")])
    assert found.dropped == 0, "what a field had before is not added"
    found = edited(HEADER, [Append(b"X", b" y")] * 1003 + [Change(b"X-Spam", 2, b"")])
    assert found.dropped == 3 and found.header.count(b"X: y\r\n") == 1000 and b"x-spam" not in found.header


def test_growth_is_counted_to_the_octet(monkeypatch):
    monkeypatch.setattr(module, "MOST", len(b"X: yz\r\n"))
    edits = [Append(b"X", b" yz"), Change(b"A", 1, b" c"), Change(b"A", 1, b" cd"), Change(b"A", 1, b""), Append(b"Y", b" z")]
    assert edited(b"A: b\r\n\r\n", edits) == (b"", b"X: yz\r\nY: z\r\n\r\n", 1), "what is removed makes room"
    assert edited(b"A: b\r\n\r\n", [*edits[:4], Append(b"Y", b" zz")]) == (b"", b"X: yz\r\n\r\n", 2)
    assert edited(b"A: b\r\n\r\n", [Append(b"X", b" yzz"), *edits[:3]]) == (b"", b"A: c\r\nX: yz\r\n\r\n", 2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"x", b" x"),
        (b" x", b" x"),
        (b"\t  x ", b" x "),
        (b"\r\n\tx", b" x"),
        (b"", b""),
        (b"  ", b" "),
        (b"x\r\n y", b" x\r\n y"),
    ],
)
def test_a_value_with_one_space(value, expected):
    assert spaced(value) == expected


def test_what_is_shown_is_what_is_counted():
    header = b"A: b\r\nno field\r\n x\r\nB :c\r\n d\r\n\x0bC\x0b: e\r\nD\r\n : f\r\nno field: g\r\n\r\nE: body\r\n"
    assert shown(header) == [
        (b"A", b"A: b"), (b"B", b"B :c\r\n d"), (b"C", b"\x0bC\x0b: e"), (b"D", b"D\r\n : f"),
    ]  # fmt: skip
    assert edited(header, [Change(name, 1, b"") for name, _ in shown(header)]).header == (
        b"no field\r\n x\r\nno field: g\r\n\r\nE: body\r\n"
    )
    assert shown(b"") == shown(b"\r\nA: b\r\n") == shown(b"no field\r\nA: b\r\n\r\n") == []


@given(_HEADERS, st.sets(st.sampled_from([b"a", b"x-spam", b"b", b"subject", b"spam", b"x-spam-score"])))
def test_fields_of_these_names_are_removed_and_no_others(header, names):
    model = Model(header)
    left = [item for item in model.items[1:] if item.name not in names]
    found = without(header, names)
    if len(left) == len(model.items) - 1:
        assert found is header
    else:
        assert found == b"".join(item.text + b"\r\n" for item in left) + model.tail + model.rest
        assert not names & {name.lower() for name, _ in shown(OURS + found)}


@pytest.mark.parametrize(
    "field",
    [b"X-Spam: Yes", b"x-spam:Yes", b"X-SPAM : Yes", b"X-Spam\t:\r\n Yes", b"X-Spam\r\n : Yes", b"\x0bX-Spam: Yes",
     b"X-Spam\x00: Yes", b"X-Spam: a\r\n\tb\r\n \r\n c", b"X-Spam:"],
)  # fmt: skip
def test_case_13_tags_from_outside(field):
    """However they are written, alone, first, last, in a row."""
    names = frozenset((b"x-spam", b"x-spam-score"))
    if begins_well(field):  # else it is the body
        assert without(field + b"\r\n\r\n", names) == b"\r\n"
        assert without(field + b"\r\nA: b\r\n c\r\n\r\n", names) == b"A: b\r\n c\r\n\r\n"
    assert without(b"A: b\r\n c\r\n" + field + b"\r\n" + field + b"\r\n\r\n", names) == b"A: b\r\n c\r\n\r\n"
    kept = b"A: " + field.strip() + b"\r\nX-Spammer: x\r\nX-Spam-Scores: y\r\nAX-Spam: z\r\n\r\n"
    assert without(kept, names) is kept


TEMPLATE = "[SPAM] {subject}"
SUBJECTS = [  # (the header, its Subject with the template, its words as they are shown)
    (b"Subject: Hello\r\n", b" [SPAM] Hello", "Hello"),
    (b"SUBJECT :Hello\r\n", b" [SPAM] Hello", "Hello"),
    (b"Subject: =?utf-8?q?H=C3=A4?=\r\n", b" [SPAM] =?utf-8?q?H=C3=A4?=", "Hä"),
    (b"Subject:=?utf-8?b?SMOk?=\r\n =?utf-8?b?SMOk?=\r\n", b" [SPAM] =?utf-8?b?SMOk?=\r\n =?utf-8?b?SMOk?=", "HäHä"),
    (b"Subject:\r\n Hello\r\n\tthere\r\n", b" [SPAM] Hello\r\n\tthere", "Hello there"),
    (b"", b" [SPAM]", ""),
    (b"Subject:\r\n", b" [SPAM]", ""),
    (b"Subject:  \r\n \r\n", b" [SPAM]", ""),
    (b"Subject: one\r\nX: y\r\nsubject: two\r\n", b" [SPAM] one", "one"),
    (b"Subject:\r\nsubject: two\r\nSubject: three\r\n", b" [SPAM] two", "two"),
    (b"Subject: H\xc3\xa4\r\n", b" [SPAM] H\xc3\xa4", "Hä"),
    (b"Subject: H\xe4\r\n", b" [SPAM] H\xe4", "Hä"),
    (b"Subject: " + b"a" * 980 + b"\r\n", b" [SPAM] " + b"a" * 980, "a" * 980),
    (b"Subject: " + b"a" * 989 + b"\r\n", b" [SPAM]\r\n " + b"a" * 989, "a" * 989),
    (b"Subject: " + b"ab " * 700 + b"\r\n", None, " ".join(["ab"] * 700)),
    (b"Subject: " + b"a" * 2500 + b"\r\n", None, "a" * 2500),
    (b"Subject: a" + b" " * 2500 + b"b\r\n", None, "a b"),
    (b"Subject: " + b"\xc3\xa4" * 1200 + b"\r\n", None, "ä" * 1200),
    (b"Subject: =?utf-8?b?" + b"w6TDpMOk" * 250 + b"?= b\r\n", None, "ä" * 750 + " b"),
    (b"Subject: =?iso-8859-1?q?" + b"=E4_" * 500 + b"?=\r\n", None, " ".join(["ä"] * 500)),
    (b"Subject: [SPAM] Hello\r\n", b" [SPAM] Hello", "Hello"),
    (b"Subject:[SPAM]  Hello\r\nSubject: x\r\n", b"[SPAM]  Hello", "Hello"),
    (b"Subject: =?utf-8?q?=5BSPAM=5D_H=C3=A4?=\r\n", b" =?utf-8?q?=5BSPAM=5D_H=C3=A4?=", "Hä"),
    (b"Subject: [SPAM]\r\n Hello\r\n", b" [SPAM]\r\n Hello", "Hello"),
    (b"Subject: [SPAM] " + b"ab " * 700 + b"\r\n", None, " ".join(["ab"] * 700)),
    (b"Subject: [SPAMMER] Hello\r\n", b" [SPAM] [SPAMMER] Hello", "[SPAMMER] Hello"),
    (b"Subject: Re: [SPAM] Hello\r\n", b" [SPAM] Re: [SPAM] Hello", "Re: [SPAM] Hello"),
    (b"Subject: a\rb\0c\r\n", b" [SPAM] abc", "abc"),
    (b"Subject: a\nb\r\n", b" [SPAM] a\r\n\tb", "a b"),
]


def subject(header):
    """The value of the Subject, which is the only one and has no line that is too long."""
    found = [field for name, field in shown(header) if name.lower() == b"subject"]
    assert len(found) == 1 and max(map(len, found[0].split(b"\r\n"))) <= 998
    return found[0].partition(b":")[2]


@pytest.mark.parametrize(("lines", "expected", "words"), SUBJECTS)
def test_case_13_a_lost_subject(lines, expected, words):
    """The words are kept whatever form they have, in one Subject without a long line; a second time nothing happens."""
    header = b"From: a@b.test\r\n" + lines + b"To: c@d.test\r\n\r\n"
    found = edited(header, subject_edits(header, TEMPLATE))
    assert found.above == b"" and found.dropped == 0
    value = subject(found.header)
    assert expected is None or value == expected
    text = " ".join(header_text(value).split())
    together = text.replace(" ", "") == f"[SPAM]{words}".replace(" ", "")  # a word that is divided has a blank in it
    assert text == f"[SPAM] {words}".strip() or (together and max(map(len, words.split())) > 997)
    assert subject_edits(found.header, TEMPLATE) == []
    read = email.message_from_bytes(found.header, policy=email.policy.default)
    assert read.keys().count("Subject") == 1 and not read.defects
    assert [line for line in found.header.split(b"\r\n") if b"@" in line] == [b"From: a@b.test", b"To: c@d.test"]


TEMPLATES = [
    ("[WERBUNG für Sie] {subject}", b"x", b" [WERBUNG =?utf-8?q?f=C3=BCr?= Sie] x", "[WERBUNG für Sie] x"),
    ("Müll: {subject}", b"x", b" =?utf-8?q?M=C3=BCll=3A?= x", "Müll: x"),
    ("Müll: {subject}", b"=?utf-8?q?=C3=A4?=", b" =?utf-8?q?M=C3=BCll=3A_?= =?utf-8?q?=C3=A4?=", "Müll: ä"),
    ("Müll: {subject}", b"", b" =?utf-8?q?M=C3=BCll=3A?=", "Müll:"),
    ("[ä ö] {subject} (ü é)", b"=?utf-8?q?a?= b =?utf-8?q?c?=",
     b" =?utf-8?q?=5B=C3=A4_=C3=B6=5D_?= =?utf-8?q?a?= b =?utf-8?q?c?= =?utf-8?q?_=28=C3=BC_=C3=A9=29?=", "[ä ö] a b c (ü é)"),
    ("{subject} (spam)", b"x", b" x (spam)", "x (spam)"),
    ("{subject} (spam)", b"", b" (spam)", "(spam)"),
    ("[SPAM] {subject} (spam)", b"", b" [SPAM] (spam)", "[SPAM] (spam)"),
    ("[SPAM]{subject}", b"x", b" [SPAM]x", "[SPAM]x"),
    ("[SPAM]{subject}", b"=?utf-8?q?=C3=A4?=", b" [SPAM] =?utf-8?q?=C3=A4?=", "[SPAM] ä"),
    ("SPAM {subject}", b"SPAMMERS", b" SPAM SPAMMERS", "SPAM SPAMMERS"),
    ("[SPAM]", b"x", b" [SPAM] x", "[SPAM] x"),
    ("{subject}", b"x", b" x", "x"),
    ("  [SPAM]  {subject}", b"{subject} %s", b" [SPAM] {subject} %s", "[SPAM] {subject} %s"),
    ("ä" * 60 + " {subject}", b"x", None, "ä" * 60 + " x"),
    ("[A\r\nEvil: b] {subject}", b"x", b" [A Evil: b] x", "[A Evil: b] x"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "words", "expected", "text"), TEMPLATES)
def test_templates_of_subjects(template, words, expected, text):
    header = b"Subject: " + words + b"\r\n\r\n"
    found = edited(header, subject_edits(header, template)).header
    assert expected is None or subject(found) == expected
    assert header_text(subject(found)) == text and found.isascii()
    assert subject_edits(found, template) == []
    assert all(len(word) <= 75 for word in subject(found).split())


_WORDS = st.lists(
    st.sampled_from([
        b"[SPAM]", b"x", b"=?utf-8?q?=C3=A4?=", b"=?utf-8?b?w6Q=?=", b"\xc3\xa4", b"\xff", b"=?", b"?=", b"y" * 600,
        b"=?utf-8?q?" + b"=C3=A4" * 200 + b"?=",
        b"\0", b"\n", b"\r", b" ", b"\t", b"\r\n ", b" " * 700, b"=?gb2312?b?" + b"0" * 1000 + b"?=", b"=?u?q??=",
    ]),
    max_size=8,
).map(b"".join)  # fmt: skip


@given(st.lists(_WORDS, max_size=3), st.sampled_from([TEMPLATE, "Müll: {subject}", "{subject} (ö)", "{subject}"]))
@example([b"=?" + b"x" * 1000 + b"?q??="], "{subject}")
@example([b"\0" * 1200], TEMPLATE)
def test_one_subject_whatever_came(values, template):
    header = b"A: b\r\n" + b"".join(b"Subject:" + value + b"\r\n" for value in values) + b"\r\n"
    found = edited(header, subject_edits(header, template))
    assert found.dropped == 0 and (b"Subject:" in found.header) == (bool(values) or template != "{subject}")
    if values:
        assert len(header_text(subject(found.header))) < 10_000


def test_any_number_of_subjects_becomes_one():
    header = b"Subject: x\r\n" * 4000 + b"\r\n"
    assert edited(header, subject_edits(header, TEMPLATE)) == (b"", b"Subject: [SPAM] x\r\n\r\n", 0)


@pytest.mark.parametrize("value", [b"a" * 100_000, b"a " * 50_000, b"\xff" * 100_000, b"=?gb2312?b?" + b"sNG/" * 25_000 + b"?="])
def test_a_subject_of_any_length_is_marked(value):
    header = b"Subject: " + value + b"\r\n\r\n"
    found = edited(header, subject_edits(header, TEMPLATE))
    assert found.dropped == 0 and subject(found.header).startswith(b" [SPAM]")
    assert subject(found.header).replace(b"[SPAM]", b"").translate(None, b" \r\n") == value.translate(None, b" ")
