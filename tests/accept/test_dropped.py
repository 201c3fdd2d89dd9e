"""Files that hold messages: what they say, without a relay."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.accept.dropped import Broken, Converted, Folder, Message, opened_drop, opened_pickup


def folder(path: Path, ends: str = ".drop") -> Folder:
    made = Folder(str(path), ends, opened_drop if ends == ".drop" else opened_pickup, True)
    assert made.begin()
    return made


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=4))
def test_any_split_of_a_text_has_the_same_line_ends(text, places):
    text = text.translate(bytes((10, 13, 0, 97)[one % 4] for one in range(256)))
    cuts = sorted({0, len(text), *(place for place in places if place < len(text))})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    converted = Converted()
    found = b"".join(converted.take(piece, number == len(pieces) - 1) for number, piece in enumerate(pieces))
    assert found == Converted().take(text, True)
    assert b"\0" not in found
    assert b"\r" not in found.replace(b"\r\n", b"") and b"\n" not in found.replace(b"\r\n", b"")


def test_of_two_programs_one_has_the_folder(tmp_path):
    first, second = folder(tmp_path), Folder(str(tmp_path), ".drop", opened_drop, True)
    assert not second.begin()
    assert first.begin()
    first.end()
    assert second.begin()


def test_a_folder_that_is_replaced_or_gone_is_noticed(tmp_path):
    path = tmp_path / "drop"
    path.mkdir()
    one = folder(path)
    (path / "1.drop").write_text("x")
    assert one.names() == ["1.drop"]
    path.rename(tmp_path / "old")
    assert not one.begin()
    path.mkdir()
    assert one.begin()
    assert one.names() == []


def test_files_in_their_order_without_those_that_are_not_complete(tmp_path):
    one = folder(tmp_path)
    for name in ("2.drop", "1.drop", ".3.drop", "note", ".old.drop", ".old.note"):
        (tmp_path / name).write_text("x")
    for name in (".old.drop", ".old.note"):
        os.utime(tmp_path / name, (0, 0))
    assert one.names() == ["1.drop", "2.drop"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".3.drop", ".old.note", "1.drop", "2.drop", "note"]
    assert one.names() == ["1.drop", "2.drop"]  # the same descriptor is read again
    one.put_aside("1.drop", "why")
    one.remove("2.drop")
    assert one.names() == []
    assert (tmp_path / "bad/1.drop").read_text() == "x"
    assert (tmp_path / "bad/1.drop.reason").read_text() == "why\n"


def opened(tmp_path: Path, text: bytes, ends: str) -> tuple[Message, bytes]:
    (tmp_path / f"1{ends}").write_bytes(text)
    message = folder(tmp_path, ends).open(f"1{ends}")
    rest = os.read(message.descriptor, 1 << 20)
    os.close(message.descriptor)
    return message, rest


def test_a_dropped_message(tmp_path):
    text = b"MAIL FROM:<> SIZE=3\r\nRCPT TO:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nBDAT 3 LAST\r\na\r\n"
    message, rest = opened(tmp_path, text, ".drop")
    assert (message.mail, message.rcpts) == (b"MAIL FROM:<> SIZE=3", [b"RCPT TO:<a@x.example>", b"RCPT TO:<b@x.example>"])
    assert (rest, message.octets, message.user) == (b"a\r\n", 3, os.geteuid())


def test_a_message_that_is_picked_up(tmp_path):
    text = b"X-Receiver: a@x.example\nFrom: b@x.example\nX-Sender: c@x.example\n d\n\nX-Sender: e\n"
    message, rest = opened(tmp_path, text.replace(b"\n d", b""), ".eml")
    assert (message.mail, message.rcpts) == (b"MAIL FROM:<c@x.example>", [b"RCPT TO:<a@x.example>"])
    assert (message.head + rest, message.octets) == (b"From: b@x.example\r\n\r\nX-Sender: e\r\n", 0)


def test_a_header_without_a_last_line_end_is_whole(tmp_path):
    message, _ = opened(tmp_path, b"From: b@x.example\nTo: a@x.example", ".eml")
    assert message.rcpts == [b"RCPT TO:<a@x.example>"]
    assert message.head == b"From: b@x.example\r\nTo: a@x.example\r\n"


@pytest.mark.parametrize(
    "text", [b"X-Sender: a@x>\r\nRCPT TO:<b\nTo: a@x\n\n", b"From: a\rTo: b\n\n", b"From: a@x\nTo: <b@x> NOTIFY=x <c>d@x\n\n"]
)
def test_no_address_becomes_a_command(tmp_path, text):
    try:
        message, _ = opened(tmp_path, text, ".eml")
    except Broken:
        return
    for command in (message.mail, *message.rcpts):
        assert command.count(b"<") == command.count(b">") == 1
        assert not command.strip().translate(None, bytes(range(32, 127)))
