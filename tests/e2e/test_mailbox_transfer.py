"""Export and import: what goes out as Maildir or mbox comes back the same, into another user, once however often it is asked
for; and files that are wrong."""

import json
import mailbox
import os
import socket
from collections.abc import Iterator

import pytest

from tests.support.daemon import Relay, wait_for
from tests.support.mailboxes import create, kept, shown, verified

TEXTS = [
    b"Subject: plain\r\n\r\nhello\r\n",
    b"Subject: from\r\n\r\nFrom me to you\r\n>From there\r\n>>From far\r\n",
    b"From: a@b.example\r\nStatus: RO\r\nX-Status: F\r\nContent-Length: 5\r\n\r\nown fields\r\n",
    b"Subject: 8-bit\r\n\r\n\xc3\xa4\xff\xfe\r\n",
    b"Subject: nul\r\n\r\na\0b\r\n",
    b"Subject: no end\r\n\r\nof the last line",
    b"\r\nno header\r\n",
    b"Subject: mixed\r\n\r\na\rb\nc\r\n",
    b"Subject: empty\r\n\r\n",
    b"Subject: header only\r\nFrom: a@b.example\r\n",
    b"Subject: header without end",
    b"Subject: from\r\n\r\nFrom a@b Mon Jan  1 00:00:00 2024\r\n\r\nFrom \r\n\nFrom x\r\r\n",
    b"Subject: empty lines\r\n\r\n\r\n\r\n",
    b"From a@b Mon Jan  1 00:00:00 2024\r\nSubject: begins with From\r\n\r\nx\r\n",
    b"Subject: large\r\n\r\n" + (b"y" * 70 + b"\r\n") * 20_000,
    b"Subject: twice\r\n\r\nx\r\n",
    b"Subject: twice\r\n\r\nx\r\n",
]
FLAGS = [[], ["\\Seen"], ["\\Seen", "\\Answered"], ["\\Flagged", "\\Draft"], ["\\Deleted"], ["$Work", "Rot"]]


def contents(relay: Relay, name: str):
    """{mailbox: [(data, flags and keywords, date)]}, read from the files."""
    from relaymta.store.files import MailFiles
    from relaymta.store.reading import data_of, pages
    from relaymta.store.shown import flags_of

    found = {}
    with MailFiles(relay.spool / "mail") as files:
        user = files.directory.known(f"{name}@local.example")
        reader = files.shard(user.shard)
        with reader.rows.reading() as txn:
            rows = [(row, reader.rows.state(txn, row.mailbox)) for row in reader.rows.mailboxes(txn, user.ident)]
        for row, state in rows:
            messages = [pair for page in pages(reader.rows, row.mailbox) for pair in page]
            found[row.name] = sorted(
                (data_of(reader.rows, reader.bodies, message), sorted(flags_of(record.flags, state)), message.date // 1000)
                for record, message in messages
            )
    return found


def fill(relay: Relay, name: str) -> None:
    from relaymta import control

    for mailbox_name, texts in (("INBOX", TEXTS), ("Sent", TEXTS[:3]), ("Arbeit/Köln v1.2", TEXTS[2:6])):
        messages = [
            (*split(FLAGS[number % len(FLAGS)]), 1_700_000_000_000 + number * 7_000, text) for number, text in enumerate(texts)
        ]
        control.begin(
            relay.spool / "control.sock", "mailbox_import", address=f"{name}@local.example", name=mailbox_name, messages=messages
        )()


def split(flags):
    return [flag for flag in flags if flag[0] == "\\"], [flag for flag in flags if flag[0] != "\\"]


@pytest.mark.parametrize("form", ["maildir", "mbox"])
def test_what_was_exported_is_imported_the_same(tmp_path, form):
    with kept(tmp_path, workers=2) as relay:
        create(relay, "alice", "bob")
        fill(relay, "alice")
        before = contents(relay, "alice")
        assert len(before["INBOX"]) == len(TEXTS)
        said = relay.cli("mailbox", "export", "--format", form, "alice@local.example", str(tmp_path / "out")).stdout
        assert "24 messages in" in said
        found = relay.cli("mailbox", "export", "--format", form, "alice@local.example", str(tmp_path / "out"), check=False)
        assert found.returncode == 69 and "is not empty" in found.stderr
        said = relay.cli("mailbox", "import", "bob@local.example", str(tmp_path / "out")).stdout
        assert "24 messages imported\n" in said
        assert contents(relay, "bob") == before
        said = relay.cli("mailbox", "import", "bob@local.example", str(tmp_path / "out")).stdout
        assert "0 messages imported, 24 were there already" in said
        assert contents(relay, "bob") == before
        relay.cli("mailbox", "import", "--mailbox", "Old", "bob@local.example", str(tmp_path / "out"))
        again = contents(relay, "bob")
        assert again["Old"] == before["INBOX"] and again["Old/Sent"] == before["Sent"]
        verified(relay)
        assert relay.stop() == 0
        if form == "maildir":
            assert {str(message["Subject"]) for message in mailbox.Maildir(tmp_path / "out", create=False)} >= {"plain", "large"}
        relay.cli("mailbox", "export", "bob@local.example", str(tmp_path / "stopped"))  # nothing runs


def test_an_export_that_was_interrupted_goes_on(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice", "bob")
        fill(relay, "alice")
        folder = tmp_path / "out"
        relay.cli("mailbox", "export", "alice@local.example", str(folder))
        names = sorted(path.name for path in (folder / "cur").iterdir())
        (folder / "cur" / names[0]).unlink()
        (folder / "relaymta-export.json").write_text(json.dumps({"user": "alice@local.example", "format": "maildir"}))
        found = relay.cli("mailbox", "export", "bob@local.example", str(folder), check=False)
        assert found.returncode == 69 and "has another export that was interrupted" in found.stderr
        inodes = {path.name: path.stat().st_ino for path in (folder / "cur").iterdir()}
        relay.cli("mailbox", "export", "alice@local.example", str(folder))
        after = {path.name: path.stat().st_ino for path in (folder / "cur").iterdir()}
        assert sorted(after) == names and after.items() >= inodes.items()


def test_files_that_are_wrong_are_named_and_the_others_are_in(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        folder = mailbox.Maildir(tmp_path / "maildir")
        for number in range(3):
            folder.add(f"Subject: {number}\n\nx\n")
        (tmp_path / "maildir" / "new" / "9.broken").mkdir()
        os.mkfifo(tmp_path / "maildir" / "new" / "9.fifo")
        os.symlink("/etc/passwd", tmp_path / "maildir" / "new" / "9.link")
        long = "x" * 200
        folder.add_folder(long)
        folder.get_folder(long).add("Subject: deep\n\nx\n")
        found = relay.cli("mailbox", "import", "alice@local.example", str(tmp_path / "maildir"), check=False)
        assert found.returncode == 65 and "Traceback" not in found.stderr
        for name, why in (("9.broken", "a directory"), ("9.fifo", "a fifo"), ("9.link", "a symbolic link")):
            assert any(name in line and why in line for line in found.stderr.splitlines()), found.stderr
        assert sorted(shown(relay, "alice")["INBOX"]) == ["0", "1", "2"] and shown(relay, "alice")[long] == ["deep"]
        (tmp_path / "text").write_text("hello\nthis is no mbox\n")
        (tmp_path / "empty").mkdir()
        for words, status, sentence in (
            (("import", "alice@local.example", str(tmp_path / "text")), 65, "line 1: no mbox"),
            (("import", "alice@local.example", str(tmp_path / "empty")), 65, "is neither a Maildir"),
            (("import", "alice@local.example", str(tmp_path / "nothing")), 64, "does not exist"),
            (("import", "alise@local.example", str(tmp_path / "text")), 1, "no such mailbox user"),
            (("import", "--mailbox", "y" * 300, "alice@local.example", str(tmp_path / "text")), 64, "more than 255 octets"),
            (("export", "alise@local.example", str(tmp_path / "new")), 1, "no such mailbox user"),
            (("export", "alice@local.example", str(tmp_path / "maildir")), 69, "is not empty"),
            (("export", "--format", "pst", "alice@local.example", str(tmp_path / "new")), 64, "'pst' is not one of"),
        ):
            found = relay.cli("mailbox", *words, check=False)
            assert (found.returncode, sentence in found.stderr, "Traceback" in found.stderr) == (status, True, False), found
        wait_for(lambda: relay.summary() == [], what="nothing")


@pytest.fixture(scope="module")
def alices(tmp_path_factory) -> Iterator[Relay]:
    """A relay with one user, who is to have no mail."""
    with kept(tmp_path_factory.mktemp("alices")) as relay:
        create(relay, "alice")
        yield relay


@pytest.mark.parametrize("place", ["fifo", "/dev/zero", "/dev/null", "socket"])
def test_what_is_neither_a_file_nor_a_folder_is_not_imported(tmp_path, alices, place):
    """Not waited for, and not read for ever; whether the relay runs or not."""
    path = place if place.startswith("/") else str(tmp_path / place)
    if place == "fifo":
        os.mkfifo(path)
    listening = socket.socket(socket.AF_UNIX)
    if place == "socket":
        listening.bind(path)
    with listening:
        found = alices.cli("mailbox", "import", "alice@local.example", path, check=False)
        assert (found.returncode, found.stdout) == (65, "")
        assert f"{path} is neither a file nor a folder" in found.stderr
        assert shown(alices, "alice")["INBOX"] == []
