"""HTTP hooks: requests and answers, without a connection."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.filter.judgement import Mail, NewEnvelope, Text
from relaymta.filter.revision import Revision
from relaymta.proto import hook
from relaymta.proto.edits import MOST, shown
from relaymta.proto.header import header_end
from relaymta.proto.reply import format_reply

RESULTS = b"Authentication-Results: relay.example; dmarc=pass\r\n"
HEADER = b"From: a@b.example\r\nSubject: hello\r\nX-Spam: one\r\nX-Other: x\r\nno field\r\nx-spam: two\r\n\r\n"


def said(*changes: dict[str, Any], **more: Any) -> hook.Said:
    return hook.said(json.dumps({"verdict": "accept", "changes": changes} | more).encode())


def revised(*changes: dict[str, Any], header: bytes = HEADER, results: bytes = RESULTS) -> tuple[Revision, int]:
    """As the chain makes them; and how many were not made."""
    revision = Revision(Mail("ID", "a@b.example", ["c@d.example"], "192.0.2.1", "h", "", "", Text(results + header)), results)
    wanted = hook.wanted(said(*changes), results + header)
    dropped = wanted.dropped + revision.edit(wanted.edits)
    return revision, dropped + revision.readdress(NewEnvelope(wanted.added, wanted.removed, wanted.sender))


def add(name: str, value: str, **more: Any) -> dict[str, Any]:
    return {"do": "add", "name": name, "value": value} | more


def replace(name: str, value: str, **more: Any) -> dict[str, Any]:
    return {"do": "replace", "name": name, "value": value} | more


def remove(name: str, **more: Any) -> dict[str, Any]:
    return {"do": "remove", "name": name} | more


ONE, TWO = b"X-Spam: one\r\n", b"x-spam: two\r\n"
CHANGES: list[tuple[list[dict[str, Any]], bytes, int]] = [
    ([add("X-A", "1"), add("X-B", "2"), add("X-C", "3", last=True)],
     b"X-A: 1\r\nX-B: 2\r\n" + HEADER[:-2] + b"X-C: 3\r\n\r\n", 0),
    ([add("X-A", "")], b"X-A:\r\n" + HEADER, 0),
    ([replace("SUBJECT", "new")], HEADER.replace(b"Subject: hello", b"SUBJECT: new"), 0),
    ([replace("x-spam", "2", instance=2)], HEADER.replace(TWO, b"x-spam: 2\r\n"), 0),
    ([replace("Subject", "")], HEADER.replace(b"Subject: hello", b"Subject: "), 0),
    ([replace("X-New", "1")], HEADER[:-2] + b"X-New: 1\r\n\r\n", 0),
    ([remove("X-SPAM")], HEADER.replace(ONE, b"").replace(TWO, b""), 0),
    ([remove("X-Spam", instance=2)], HEADER.replace(TWO, b""), 0),
    ([remove("X-Spam", instance=3), remove("None")], HEADER, 0),
    ([remove("X-Spam"), replace("X-Spam", "x", instance=2), add("X-Spam", "y")],
     b"X-Spam: y\r\n" + HEADER.replace(ONE, b"").replace(TWO, b"X-Spam: x\r\n"), 0),
    ([remove("X-Spam"), replace("X-Spam", "x", instance=9), remove("x-spam")], HEADER.replace(ONE, b"").replace(TWO, b""), 0),
    ([replace("X-Spam", "x", instance=9), remove("X-Spam")], HEADER.replace(ONE, b"").replace(TWO, b""), 0),
    ([add("X-A", "1\nX-B: 2\r\n\r\nbody\0\r")], b"X-A: 1\r\n\tX-B: 2\r\n\tbody\r\n" + HEADER, 0),
    ([add("X-A", "gr\u00fc\u00dfe")], "X-A: gr\u00fc\u00dfe\r\n".encode() + HEADER, 0),
    ([add("X A", "1"), add("", "1"), add("X:", "1"), add("X\r\nY", "1"), add("\u00fc", "1"),
      replace("X\0", "1"), remove("X Y", instance=1)],
     HEADER, 7),
    ([add("X-A", "x" * 5000), add("X-B", "1")], b"X-B: 1\r\n" + HEADER, 1),
    ([add("X-A", "1")] * 201, b"X-A: 1\r\n" * 200 + HEADER, 1),
]  # fmt: skip


@pytest.mark.parametrize("changes, header, dropped", CHANGES)
def test_changes_of_the_header(changes, header, dropped):
    revision, found = revised(*changes)
    assert (revision.above, revision.header, found) == (RESULTS, header, dropped)


def test_fields_are_counted_as_they_are_shown():
    forged = b"Authentication-Results: else.example; dmarc=fail\r\n" + HEADER
    assert [name for name, _ in hook.fields(RESULTS + forged)[0]][:2] == ["Authentication-Results"] * 2
    revision, _ = revised(remove("authentication-results", instance=2), header=forged)
    assert (revision.above, revision.header) == (RESULTS, HEADER)


ADDRESSES = {
    "x@y.example": "x@y.example", '"a b"@y.example': '"a b"@y.example', "x@[192.0.2.1]": "x@[192.0.2.1]",
    "x@Y.example.": "x@Y.example",
    "": None, "x": None, "postmaster": None, "x@y.example> SIZE=1": None, "x@y.example> BODY=7BIT <": None,
    "x@y.example\r\nDATA": None,
    "x@y.example\0": None, "\u00fc@y.example": None, "x" * 2000 + "@y.example": None, "<x@y.example": None,
    "a@b.example,c@d.example": None,
}  # fmt: skip


@pytest.mark.parametrize("text", ADDRESSES)
def test_addresses(text):
    expected = ADDRESSES[text]
    for do in ("add_recipient", "remove_recipient", "set_sender"):
        found = hook.wanted(said({"do": do, "address": text}), HEADER)
        address = expected if text or do != "set_sender" else ""
        lists = {"add_recipient": found.added, "remove_recipient": found.removed, "set_sender": [found.sender]}
        assert lists[do] == ([address] if address is not None or do == "set_sender" else [])
        assert found.dropped == (address is None)


TEXTS = st.one_of(
    st.text(max_size=40), st.text("\r\n\t \0:X-a@<>.é\ud800", max_size=40), st.text(max_size=5).map(lambda text: text * 1000)
)
CHANGE = st.one_of(
    st.builds(lambda name, value, last: add(name, value, last=last), TEXTS, TEXTS, st.booleans()),
    st.builds(lambda name, value, n: replace(name, value, instance=n), TEXTS, TEXTS, st.integers(1, 9)),
    st.builds(replace, st.sampled_from(["Subject", "x-spam"]), TEXTS),
    st.builds(remove, st.one_of(TEXTS, st.just("X-Spam"))),
    st.builds(
        lambda do, text: {"do": do, "address": text}, st.sampled_from(["add_recipient", "remove_recipient", "set_sender"]),
        st.one_of(TEXTS, st.builds(lambda text: f"{text}@d.example", TEXTS)),
    ),
)  # fmt: skip


@given(st.lists(CHANGE, max_size=12))
def test_whatever_it_wants_a_change_is_one_field_or_one_address(changes):
    octets = json.dumps({"verdict": "accept", "changes": changes}).encode()
    try:
        found = hook.said(octets)
    except hook.HookError:
        assert "\\ud800" in octets.decode()  # which is no Unicode
        return
    wanted = hook.wanted(found, RESULTS + HEADER)
    revision, dropped = revised(*changes)
    before, after = shown(RESULTS + HEADER), shown(revision.above + revision.header)
    whole = revision.above + revision.header
    assert (
        header_end(whole) == len(whole) and whole.endswith(b"\r\n\r\n") and b"\r\n\r\n" not in whole[:-2] and b"\0" not in whole
    )
    assert not (b"\r" in whole.replace(b"\r\n", b"") or b"\n" in whole.replace(b"\r\n", b""))
    writes = sum(one["do"] in ("add", "replace") for one in changes)
    assert len(after) <= len(before) + writes and len(whole) <= len(RESULTS + HEADER) + MOST
    assert dropped <= len(changes)
    assert revision.header.count(b"\r\nno field\r\n") == 1
    names = {name.lower() for name, _ in before} | {
        one["name"].lower().encode("utf-8", "replace") for one in changes if "name" in one
    }
    assert {name.lower() for name, _ in after} <= names
    for address in [*wanted.added, *wanted.removed, *([wanted.sender] if wanted.sender else [])]:
        assert address.isascii() and address.isprintable() and "@" in address and len(address) <= 1024


@given(TEXTS)
def test_whatever_reason_it_gives_it_is_a_part_of_one_line(reason):
    try:
        found = said(reason=reason)
    except hook.HookError:
        return
    assert found.reason.isprintable() and len(found.reason) <= 200
    line = format_reply(554, "5.7.1", found.reason.encode("ascii", "replace").decode())
    assert line.count(b"\r\n") == 1 and line.endswith(b"\r\n") and len(line) <= 512


@given(st.binary(max_size=200))
def test_any_octets_are_an_answer_or_none(octets):
    for body in (octets, b'{"verdict":"accept","reason":"' + octets + b'"}', b'{"verdict":"tag","score":' + octets + b"}"):
        try:
            found = hook.said(body)
        except hook.HookError as error:
            assert str(error).isprintable() and len(str(error)) <= 200
        else:
            assert found.verdict in ("accept", "tag")


@given(st.binary(max_size=200), st.text(max_size=20))
def test_any_octets_can_be_shown(octets, text):
    header = b"A: " + octets.replace(b"\r", b"").replace(b"\n", b"\r\n ") + b"\r\n\r\n"
    found, whole = hook.fields(header)
    request = json.loads(hook.written({"header": found, "octets": whole, "text": text, "lone": ["\udcff\ud800", ("x",)]}))
    assert request["header"] == [list(one) for one in found] and request["text"] == text
    try:
        header.decode()
        assert not whole
    except UnicodeDecodeError:
        assert whole


def test_of_very_many_fields_the_first_are_shown_one_by_one():
    header = b"".join(b"A: %d\r\n" % number for number in range(5001)) + b"\r\n"
    found, whole = hook.fields(header)
    assert len(found) == 5000 and found[-1] == ("A", "4999") and base64.b64decode(whole) == header


def test_removals_without_number_are_as_many_as_there_are_fields():
    """Of a hook and a message that are both hostile."""
    header = b"A: b\r\n" * 20_000 + b"\r\n"
    changes = [remove("a"), replace("A", "x", instance=5)] * 100
    wanted = hook.wanted(said(*changes), header)
    assert len(wanted.edits) <= 20_000 + len(changes)
    assert [name for name, _ in shown(revised(*changes, header=header, results=b"")[0].header)] == [b"A"]
