"""Files that hold messages: what they say, without a relay."""

import os
import stat
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.accept import dropped
from relaymta.accept.dropped import Broken, Converted, Folder, Identity, Message, opened_drop, opened_pickup


def folder(path: Path, ends: str = ".drop") -> Folder:
    made = Folder(str(path), ends, opened_drop if ends == ".drop" else opened_pickup, ends == ".drop")
    assert made.begin()
    return made


def names(one: Folder) -> list[str]:
    return [name for name, _ in one.names({}, 0.0)[0]]


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=4), st.booleans())
def test_any_split_of_a_text_has_the_same_line_ends(text, places, in_header):
    text = text.translate(bytes((10, 13, 0, 97)[one % 4] for one in range(256)))
    cuts = sorted({0, len(text), *(place for place in places if place < len(text))})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    converted = Converted(in_header)
    found = b"".join(converted.take(piece, number == len(pieces) - 1) for number, piece in enumerate(pieces))
    assert found == Converted(in_header).take(text, True)
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
    assert names(one) == ["1.drop"]
    path.rename(tmp_path / "old")
    assert not one.begin()
    path.mkdir()
    assert one.begin()
    assert names(one) == []


def test_files_in_their_order_without_those_that_are_not_complete(tmp_path):
    one = folder(tmp_path)
    for name in ("2.drop", "1.drop", ".3.drop", "note"):
        (tmp_path / name).write_text("x")
    assert names(one) == ["1.drop", "2.drop"]
    assert names(one) == ["1.drop", "2.drop"]  # the same descriptor is read again
    one.put_aside("1.drop", "why")
    one.remove("2.drop", Identity.of((tmp_path / "2.drop").stat()))
    assert names(one) == []
    assert (tmp_path / "bad/1.drop").read_text() == "x"
    assert (tmp_path / "bad/1.drop.reason").read_text() == "why\n"


def test_what_was_never_completed_is_removed_from_a_drop_folder(tmp_path, monkeypatch):
    for ends in (".drop", ".eml"):
        (tmp_path / f".old{ends}").write_text("x")
    (tmp_path / ".old.note").write_text("x")
    os.utime(tmp_path / ".old.drop", (0, 0))  # as its user can
    there = [".old.drop", ".old.eml", ".old.note"]
    one = folder(tmp_path)
    assert names(one) == [] and sorted(os.listdir(tmp_path)) == there
    one.end()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 90_000)
    assert names(folder(tmp_path, ".eml")) == [] and sorted(os.listdir(tmp_path)) == there
    (tmp_path / "new").mkdir()
    (tmp_path / ".old.drop").rename(tmp_path / "new/.old.drop")
    assert names(folder(tmp_path / "new")) == [] and os.listdir(tmp_path / "new") == []


def test_some_of_many_files_those_first_that_were_never_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(dropped, "AT_ONCE", 3)
    for number in range(6):
        (tmp_path / f"{number}.drop").write_text("x")
    due, there, more = folder(tmp_path).names({"0.drop": 9.0, "1.drop": 2.0, "2.drop": 1.0, "4.drop": 10.5}, 10.0)
    assert [name for name, _ in due] == ["3.drop", "5.drop", "2.drop"] and more
    assert there == {f"{number}.drop" for number in range(6)}


@pytest.mark.skipif(os.geteuid() != 0, reason="files of other users need root")
def test_many_files_of_one_user_do_not_hide_those_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(dropped, "AT_ONCE", 4)
    monkeypatch.setattr(dropped, "OF_ONE", 2)
    for number in range(20):
        (tmp_path / f"{number:02}.drop").write_text("x")
        os.chown(tmp_path / f"{number:02}.drop", 1000 if number in (17, 19) else 1001, -1)
    due, _, more = folder(tmp_path).names({}, 0.0)
    assert due == [("00.drop", 1001), ("01.drop", 1001), ("17.drop", 1000), ("19.drop", 1000)] and more


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"To: a@x\nSubject: hi\rBcc: victim@x\nFrom: b@x\n\na\rb\r\r\nc\n", b"Subject: hi Bcc: victim@x\r\n"),
        (b"To: a@x\r\r\nFrom: b@x\r\r\nSubject: x\r\r\n\r\r\na\rb\r\r\nc\n", b"Subject: x\r\n"),
    ],
)
def test_a_bare_cr_in_a_header_begins_no_field(tmp_path, text, found):
    (tmp_path / "1.eml").write_bytes(text)
    message = folder(tmp_path, ".eml").open("1.eml")
    os.close(message.descriptor)
    assert message.rcpts == [b"RCPT TO:<a@x>"] and found in message.head
    assert message.head.endswith(b"\r\n\r\na\r\nb\r\nc\r\n")


def test_text_behind_header_lines_is_no_header(tmp_path):
    (tmp_path / "1.eml").write_text("To: a@x\nFrom: b@x\nThese hosts failed:\n  web1\nBcc: were empty\n")
    message = folder(tmp_path, ".eml").open("1.eml")
    os.close(message.descriptor)
    assert message.head == b"To: a@x\r\nFrom: b@x\r\n\r\nThese hosts failed:\r\n  web1\r\nBcc: were empty\r\n"


def test_a_file_that_takes_the_name_of_another_is_neither_removed_nor_put_aside(tmp_path):
    one = folder(tmp_path)
    path = tmp_path / "1.drop"
    path.write_text("old")
    identity = Identity.of(path.stat())
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").rename(path)
    one.remove("1.drop", identity)
    with pytest.raises(FileNotFoundError):
        one.put_aside("1.drop", "why", identity)
    assert path.read_text() == "new"
    one.remove("1.drop", Identity.of(path.stat()))
    assert not path.exists()


def test_what_is_put_aside_keeps_its_name_and_reason(tmp_path):
    one = folder(tmp_path)
    for number in range(3):
        (tmp_path / "1.drop").write_text(f"{number}")
        one.put_aside("1.drop", f"why {number}")
    (tmp_path / "1.drop.2.drop").write_text("other")
    one.put_aside("1.drop.2.drop", "other")
    found = {path.name: path.read_text() for path in (tmp_path / "bad").iterdir()}
    assert found == {
        "1.drop": "0", "1.drop.reason": "why 0\n", "1.drop.2": "1", "1.drop.2.reason": "why 1\n",
        "1.drop.3": "2", "1.drop.3.reason": "why 2\n", "1.drop.2.drop": "other", "1.drop.2.drop.reason": "other\n",
    }  # fmt: skip


def test_what_is_put_aside_is_kept_without_its_reason_too(tmp_path):
    one = folder(tmp_path)
    for number in range(2):
        (tmp_path / "1.drop").write_text(f"{number}")
        one.put_aside("1.drop", "why")
        (tmp_path / "bad/1.drop.reason").unlink(missing_ok=True)
    assert {path.name: path.read_text() for path in (tmp_path / "bad").iterdir()} == {
        "1.drop": "0", "1.drop.2": "1", "1.drop.2.reason": "why\n",
    }  # fmt: skip


def test_a_long_name_is_put_aside_too(tmp_path):
    one, name = folder(tmp_path), "ä" * 125 + ".drop"
    for number in range(2):
        (tmp_path / name).write_text(f"{number}")
        one.put_aside(name, f"why {number}")
    found = {path.read_text() for path in (tmp_path / "bad").iterdir()}
    assert found == {"0", "1", "why 0\n", "why 1\n"}
    assert names(one) == []


@pytest.mark.parametrize("name", ["a.drop", "ä" * 125 + ".drop"])
def test_many_of_a_name_are_put_aside_each_with_its_reason_after_a_short_search(tmp_path, name, monkeypatch):
    one, looked = folder(tmp_path), list[object]()
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *words, **more: looked.append(words) or stat(*words, **more))
    for number in range(60):
        (tmp_path / name).write_text(f"{number}")
        looked.clear()
        one.put_aside(name, f"why {number}")
        assert len(looked) < 2 * dropped.NUMBERED
    for path in (tmp_path / "bad").iterdir():
        if not path.name.endswith(".reason"):
            reason = path.with_name(os.fsdecode(os.fsencode(path.name)[:248]) + ".reason")
            assert reason.read_text() == f"why {path.read_text()}\n"
    assert len(list((tmp_path / "bad").iterdir())) == 120


def test_only_a_folder_of_ours_becomes_that_of_what_is_put_aside(tmp_path, monkeypatch):
    path, elsewhere = tmp_path / "drop", tmp_path / "elsewhere"
    path.mkdir()
    elsewhere.mkdir()
    one = folder(path)
    (path / "1.drop").write_text("x")
    (path / "bad").symlink_to(elsewhere)
    with pytest.raises(OSError):
        one.put_aside("1.drop", "why")
    (path / "bad").unlink()
    (path / "bad").mkdir()
    own = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: own + 1)
        with pytest.raises(PermissionError, match="bad/ does not belong"):
            one.put_aside("1.drop", "why")
    os.mkfifo(path / "bad/1.drop.reason")
    (path / "bad/1.drop.2.reason").symlink_to(elsewhere / "x")
    one.put_aside("1.drop", "why")
    assert os.listdir(elsewhere) == []
    assert (path / "bad/1.drop.3.reason").read_text() == "why\n"
    assert names(one) == []


def test_no_reason_is_left_of_what_cannot_be_moved(tmp_path, monkeypatch):
    one = folder(tmp_path)
    (tmp_path / "1.drop").write_text("x")

    def fails(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(PermissionError):
        one.put_aside("1.drop", "why")
    assert os.listdir(tmp_path / "bad") == []


def test_a_pickup_folder_that_is_not_there_is_an_error(tmp_path):
    assert not Folder(str(tmp_path / "none"), ".drop", opened_drop, True).begin()
    with pytest.raises(FileNotFoundError):
        Folder(str(tmp_path / "none"), ".eml", opened_pickup, False).begin()


def test_nothing_is_taken_from_a_sticky_folder_of_somebody_else(tmp_path, monkeypatch):
    tmp_path.chmod(0o1777)
    own = os.geteuid()
    folder(tmp_path, ".eml").end()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(PermissionError, match="sticky"):
        folder(tmp_path, ".eml")
    tmp_path.chmod(stat.S_IMODE(0o777))
    folder(tmp_path, ".eml")


def opened(tmp_path: Path, text: bytes, ends: str) -> tuple[Message, bytes]:
    (tmp_path / f"1{ends}").write_bytes(text)
    message = folder(tmp_path, ends).open(f"1{ends}")
    rest = os.pread(message.descriptor, 1 << 20, message.at)
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


def test_a_long_header_is_not_read(tmp_path):
    text = b"From: b@x.example\nTo: a@x.example\n" + b"X-Long: x\n" * 40_000
    with pytest.raises(Broken, match="too long"):
        opened(tmp_path, text, ".eml")


def test_many_recipients_are_read(tmp_path):
    commands = b"MAIL FROM:<>\r\n" + b"RCPT TO:<a@x.example>\r\n" * 40_000 + b"BDAT 0 LAST\r\n"
    assert len(opened(tmp_path, commands, ".drop")[0].rcpts) == 40_000


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
