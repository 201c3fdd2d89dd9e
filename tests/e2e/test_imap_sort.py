"""SORT, THREAD and PREVIEW, by the running relay (RFC 5256, 8970)."""

import itertools
from collections.abc import Iterator

import pytest

from tests.support.imap_relay import ImapRelay
from tests.support.mailboxes import verified

_count = itertools.count()


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path_factory.mktemp("sort")) as relay:
        yield relay
        verified(relay)


@pytest.fixture
def session(relay):
    name = f"user{next(_count)}"
    relay.user(name)
    session = relay.session(name)
    yield session
    relay.close_sessions()


def mail(number: int, subject: str, sender: str, *references: int, size: int = 0) -> bytes:
    date = f"Mon, 1 Jan 2024 00:00:{number:02} +0000"
    refers = "".join(f" <{one}@x>" for one in references)
    header = f"Message-ID: <{number}@x>\r\nDate: {date}\r\nSubject: {subject}\r\nFrom: {sender}@x\r\nTo: u@x\r\n"
    return f"{header}{'References:' * bool(refers)}{refers}\r\n\r\nText of {number}.\r\n{'x' * size}\r\n".encode()


def put(session, *messages: bytes) -> None:
    for data in messages:
        session.ok(b"APPEND INBOX {%d+}\r\n%b" % (len(data), data))


FOUR = (
    mail(3, "b", "carol"), mail(1, "=?utf-8?q?=C3=84?=", "Bob", size=400), mail(4, "Re: b", "alice", 3), mail(2, "a", "dave", 9)
)  # fmt: skip


def told(session, command: str, name: str):
    (one,) = session.ok(command).named(name)
    return one.data


def test_sort(session):
    put(session, *FOUR)
    session.ok("SELECT INBOX")
    for criteria, expected in {
        "SUBJECT": [4, 1, 3, 2], "REVERSE SUBJECT": [2, 1, 3, 4], "DATE": [2, 4, 1, 3], "REVERSE DATE": [3, 1, 4, 2],
        "FROM": [3, 2, 1, 4], "ARRIVAL": [1, 2, 3, 4], "TO REVERSE DATE": [3, 1, 4, 2],
    }.items():  # fmt: skip
        assert told(session, f"SORT ({criteria}) UTF-8 ALL", "SORT") == (expected, None), criteria
    assert told(session, "SORT (REVERSE SIZE) US-ASCII ALL", "SORT")[0][0] == 2
    assert told(session, "SORT (DATE) US-ASCII FROM alice", "SORT") == ([3], None)
    assert told(session, "SORT (DATE) UTF-8 SUBJECT nothing", "SORT") == ([], None)
    session.ok("UID SEARCH RETURN (SAVE) UID 1:2")
    assert told(session, "UID SORT (DATE) UTF-8 $", "SORT") == ([2, 1], None)
    highest = told(session, "SORT (DATE) UTF-8 MODSEQ 1", "SORT")
    assert highest[0] == [2, 4, 1, 3] and highest[1] == session.status("INBOX", "HIGHESTMODSEQ")[0]
    answer = session.command("SORT (DATE) KOI8-R ALL")
    assert answer.status == "NO" and answer.last.code[0] == "BADCHARSET"
    for bad in (
        "SORT () UTF-8 ALL", "SORT (FOO) UTF-8 ALL", "SORT (REVERSE) UTF-8 ALL", "SORT (DATE) UTF-8", "SORT DATE UTF-8 ALL",
        "THREAD FOO UTF-8 ALL", "THREAD REFERENCES UTF-8",
    ):  # fmt: skip
        assert session.command(bad).status == "BAD", bad


def test_thread(session):
    put(session, *FOUR)
    session.ok("SELECT INBOX")
    assert told(session, "THREAD REFERENCES UTF-8 ALL", "THREAD") == [[2], [4], [1, 3]]
    assert told(session, "THREAD ORDEREDSUBJECT UTF-8 ALL", "THREAD") == [[2], [4], [1, 3]]
    session.ok("STORE 2 +FLAGS (\\Deleted)")
    session.ok("EXPUNGE")
    assert told(session, "UID THREAD REFERENCES US-ASCII ALL", "THREAD") == [[4], [1, 3]]
    assert told(session, "THREAD REFERENCES US-ASCII ALL", "THREAD") == [[3], [1, 2]]
    assert told(session, "THREAD REFERENCES US-ASCII SUBJECT nothing", "THREAD") == []


def test_nothing_is_expunged_meanwhile(relay, session):
    put(session, *FOUR)
    session.ok("SELECT INBOX")
    other = relay.session(f"user{next(_count) - 1}")
    next(_count)
    other.ok("SELECT INBOX")
    other.ok("STORE 1 +FLAGS (\\Deleted)")
    other.ok("EXPUNGE")
    assert not session.ok("SORT (ARRIVAL) UTF-8 ALL").named("EXPUNGE")
    assert not session.ok("THREAD REFERENCES UTF-8 ALL").named("EXPUNGE")
    answer = session.ok("UID SORT (ARRIVAL) UTF-8 ALL")
    assert answer.named("SORT")[0].data == ([2, 3, 4], None) and len(answer.named("EXPUNGE")) == 1


def test_preview(session):
    put(
        session, *FOUR, b"Subject: x\r\n\r\n", b"Subject: x\r\n\r\n" + "grüße\r\n".encode(), mail(5, "large", "a", size=1_500_000)
    )
    session.ok("SELECT INBOX")
    found = session.fetch("1,5:7 (PREVIEW UID)")
    assert found[1]["PREVIEW"] == b"Text of 3." and found[5]["PREVIEW"] == b"" and found[6]["PREVIEW"] == "grüße".encode()
    assert found[7]["PREVIEW"].startswith(b"Text of 5. xxx") and len(found[7]["PREVIEW"]) == 200
    found = session.fetch("1,7 PREVIEW (LAZY)")
    assert found[1]["PREVIEW"] == b"Text of 3." and found[7]["PREVIEW"] is None
    assert list(session.fetch("1 (PREVIEW (LAZY) FLAGS)")[1]) == ["FLAGS", "PREVIEW"]
    assert "\\Seen" not in session.fetch("1 FLAGS")[1]["FLAGS"]
    session.ok("FETCH 1 PREVIEW (CHANGEDSINCE 1)")
    for bad in ("FETCH 1 PREVIEW (EAGER)", "FETCH 1 (PREVIEW ())", "FETCH 1 (PREVIEW (LAZY)", "FETCH 1 PREVIEW LAZY"):
        assert session.command(bad).status == "BAD", bad


def test_what_roundcube_says(session):
    """Its list of a folder, sorted, then in threads."""
    put(session, *FOUR)
    session.ok('LIST (SUBSCRIBED) "" "*" RETURN (SPECIAL-USE STATUS (MESSAGES UNSEEN))')
    session.ok("SELECT INBOX")
    assert told(session, "UID SORT (REVERSE DATE) US-ASCII ALL UNDELETED", "SORT") == ([3, 1, 4, 2], None)
    found = told(session, "UID SEARCH RETURN (ALL COUNT) UNSEEN UNDELETED", "ESEARCH")
    assert found["COUNT"] == 4
    session.fetch("UID FETCH 3,1,4,2 (UID RFC822.SIZE FLAGS INTERNALDATE BODYSTRUCTURE BODY.PEEK[HEADER.FIELDS (DATE FROM TO)])")
    assert told(session, "UID THREAD REFERENCES US-ASCII ALL UNDELETED", "THREAD") == [[2], [4], [1, 3]]
