"""What the metrics say of the mailboxes now, and the log of what users have done with them."""

import imaplib
import poplib
import subprocess
import sys

import pytest

from tests.support.daemon import wait_for
from tests.support.mailboxes import Readable

USER = "alice@local.example"
READER = """
import lmdb, sys
with lmdb.open(sys.argv[1], readonly=True).begin():
    print("reading", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def relay(tmp_path):
    with Readable(tmp_path, workers=1, protocols=("imap", "pop3")) as relay:
        relay.user("alice", "geheim")
        yield relay


def shows(relay, **values):
    """Wait until gauges have these values."""
    for name, value in values.items():
        wait_for(lambda name=name, value=value: relay.metric(f"relaymta_{name}") == value, what=f"{name} to be {value}")


def test_sessions_are_counted_while_they_last(relay):
    mail = [imaplib.IMAP4("127.0.0.1", relay.ports["imap"]) for _ in range(3)]
    for one in mail[:2]:
        one.login(USER, "geheim")
    drop = poplib.POP3("127.0.0.1", relay.ports["pop3"])
    drop.user(USER)
    drop.pass_("geheim")
    shows(relay, imap_sessions=2, pop3_sessions=1, managesieve_sessions=0)
    mail[0].logout()
    mail[1].shutdown()  # without a word
    mail[2].logout()
    drop.quit()
    shows(relay, imap_sessions=0, pop3_sessions=0)


def test_bodies_and_what_they_take_are_shown(relay):
    relay.mail("alice", "one", "two")
    shows(relay, mailbox_bodies=2, mailbox_store_full=0, mailbox_store_stalled=0)
    assert relay.metric("relaymta_mailbox_segment_octets") > relay.metric("relaymta_mailbox_segment_live_octets") > 0
    mail = imaplib.IMAP4("127.0.0.1", relay.ports["imap"])
    mail.login(USER, "geheim")
    mail.select()
    shows(relay, mailbox_view_octets=8)
    mail.copy("1", "Trash")
    mail.store("2", "+FLAGS", r"\Deleted")
    mail.expunge()
    shows(relay, mailbox_bodies=1)
    mail.logout()
    shows(relay, mailbox_view_octets=0)


def test_a_reader_of_an_old_state_is_seen_until_it_ends(relay):
    relay.mail("alice", "one")
    path = relay.spool / "mail" / "shard-0" / "lmdb"
    with subprocess.Popen([sys.executable, "-c", READER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
        shows(relay, mailbox_bodies=1, mailbox_oldest_reader_seconds=0)  # what it reads is the newest state
        relay.mail("alice", "two")
        wait_for(lambda: relay.metric("relaymta_mailbox_oldest_reader_seconds") >= 2, what="the age of the reader")
        reader.stdin.close()
    shows(relay, mailbox_oldest_reader_seconds=0)


def test_the_log_says_what_users_have_done(relay):
    relay.mail("alice", "one", "two", "three", "four")
    mail = imaplib.IMAP4("127.0.0.1", relay.ports["imap"])
    mail.login(USER, "geheim")
    mail.select()
    for command in (
        lambda: mail.create("Work"),
        lambda: mail.append("Work", "", "", b"Subject: new\r\n\r\n"),
        lambda: mail.copy("1:2", "Work"),
        lambda: mail.xatom("MOVE", "3", "Work"),
        lambda: mail.store("1", "+FLAGS", r"\Deleted"),  # is not told
        mail.expunge,
        mail.expunge,  # of nothing
        lambda: mail.rename("Work", "Play"),
        lambda: mail.delete("Play"),
    ):
        assert command()[0] == "OK"
    assert mail.copy("1", "Nowhere")[0] == "NO"
    mail.logout()
    drop = poplib.POP3("127.0.0.1", relay.ports["pop3"])
    drop.user(USER)
    drop.pass_("geheim")
    drop.dele(1)
    drop.quit()
    names = ("protocol", "action", "mailbox", "into", "messages")

    def changes():
        found = relay.events("changed")
        assert all(event["client"] == "127.0.0.1" and event["user"] == USER for event in found)
        return [tuple(event[name] for name in names) for event in found]

    expected = [
        ("imap", "create", "Work", "", 0),
        ("imap", "append", "Work", "", 1),
        ("imap", "copy", "INBOX", "Work", 2),
        ("imap", "move", "INBOX", "Work", 1),
        ("imap", "expunge", "INBOX", "", 1),
        ("imap", "rename", "Work", "Play", 0),
        ("imap", "delete", "Play", "", 0),
        ("pop3", "expunge", "INBOX", "", 1),
    ]
    wait_for(lambda: len(changes()) >= len(expected), what="the events")
    assert changes() == expected
