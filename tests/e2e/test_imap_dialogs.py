"""What mail programs say to an IMAP server that cannot run here (tests/dialogs), in the clear and over TLS."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.dialog import Dialog, DialogFailed
from tests.support.imap_relay import ImapRelay, Session
from tests.support.mailboxes import verified
from tests.support.prove import in_prove

DIALOGS = sorted((Path(__file__).parent.parent / "dialogs").glob("*.dialog"))


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path_factory.mktemp("dialogs")) as relay:
        yield relay
        relay.close_sessions()
        assert [one["text"] for one in relay.events("warning") if one["worker"] >= 0] == []
        verified(relay)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        *((path, "imaps" if number % 2 else "imap") for number, path in enumerate(DIALOGS)),
        *in_prove(*((path, "imap" if number % 2 else "imaps") for number, path in enumerate(DIALOGS))),
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_the_dialog_is_held(relay, user, path, place):
    Dialog(path, relay, user, lambda: relay.connect(place)).hold()


# The runner itself: of a dialog that is right but for one line, it names that line, what was expected there, and what came.

GOOD = """\
# A comment.
text: mail
| Subject: s
|
|*2 x
put: INBOX mail (\\Seen)
S: * OK [CAPABILITY <any>] <any>
C: a LOGIN <user> <password>
C: b STATUS INBOX (MESSAGES UIDVALIDITY)
S: a OK <any>
S: * STATUS "INBOX" (MESSAGES 1 UIDVALIDITY <uidvalidity:n>)
S: b OK <any>
C: c SELECT INBOX
S?: * 1 RECENT
S?: * 1 EXISTS
S?: * OK [UIDVALIDITY <uidvalidity>] <any>
S?: * OK [UIDNEXT 2] <any>
S?: * OK [HIGHESTMODSEQ <n>] <any>
S?: * OK [MAILBOXID (<word>)] <any>
S?: * FLAGS (<any>)
S?: * OK [PERMANENTFLAGS (<any>)] <any>
S: c OK [READ-WRITE] <any>
C: d FETCH 1 (INTERNALDATE BODY.PEEK[])
S: * 1 FETCH (INTERNALDATE <date> BODY[] {<size mail>}
S: <text mail>)
S: d OK <any>
deliver: mail
C: e NOOP
S?: * 2 RECENT
S?: * 2 EXISTS
S: e OK <any>
other: SELECT INBOX
other: STORE 1 +FLAGS.SILENT (\\Deleted)
other: EXPUNGE
C: f NOOP
S?: * 1 EXPUNGE
S?: * 1 RECENT
S: f OK <any>
C: g LOGOUT
S: * BYE <any>
S: g OK <any>
as: second
S: * OK <any>
close:
"""


def held(relay, user, folder: Path, text: str, dial: Callable[[], Session] | None = None) -> str:
    """How a dialog of this text fails, or ""."""
    path = folder / "x.dialog"
    path.write_text(text)
    try:
        Dialog(path, relay, user, dial or relay.connect).hold()
    except DialogFailed as failure:
        return str(failure)
    return ""


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("MESSAGES 1 UID", "MESSAGES 2 UID", "11: expected '* STATUS \"INBOX\" (MESSAGES 2 UIDVALIDITY <uid"),
        ("[UIDVALIDITY <uidvalidity>]", "[UIDVALIDITY <n>x]", "16: expected '* OK [UIDVALIDITY <n>x] <any>' or '* OK [UIDNEXT "),
        ("\nS: a OK <any>", "", "10: expected '* STATUS"),
        ("S?: * 2 EXISTS\n", "", "29: expected '* 2 RECENT', got b'* 2 EXISTS"),
        ("|*2 x", "|*3 x", ""),
        ("S: <text mail>)", "S: <any>)", "24: expected"),
        ("S: <text mail>)", "S: <octets>)", ""),
        ("S: <text mail>)", "S: <text mial>)", "24: nothing is known of <text mial>"),
        ("<password>", "<passwort>", "8: nothing is known of <passwort>"),
        ("a LOGIN <user>", "a LOGIN <n>", "8: nobody says 'a LOGIN <n> <password>'"),
        ("S: a OK <any>", "S: a NO <any>", "10: expected 'a NO <any>', got b'a OK "),
        ("S: g OK <any>", "S: g OK <any>\nS: * 3 EXISTS", "42: expected '* 3 EXISTS', got EOFError("),
        ("S: * BYE <any>\nS: g OK <any>\n", "", " client: expected nothing more, got b'* BYE "),
        ("C: g LOGOUT\nS: * BYE <any>\nS: g OK <any>\n", "deliver: mail\n", " client: expected nothing more, got b'* 2 EXISTS"),
        ("other: EXPUNGE", "other: EXPUNGE 1", "34: AssertionError("),
        ("close:", "clos:", "44: no line of a dialog: 'clos:'"),
        ("S: f OK <any>", "f OK", "38: no line of a dialog: 'f OK'"),
    ],
)  # fmt: skip
def test_of_a_wrong_dialog_the_line_is_named(relay, user, tmp_path, was, becomes, message):
    assert GOOD.count(was) == 1
    found = held(relay, user, tmp_path, GOOD.replace(was, becomes))
    assert found.startswith(f"x.dialog:{message}") if message else not found


def test_a_right_dialog_passes(relay, user, tmp_path):
    assert held(relay, user, tmp_path, GOOD) == ""


def test_a_server_that_says_nothing(relay, user, tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"* OK here\r\n")
        ours.settimeout(0.1)
        found = held(relay, user, tmp_path, "S: * OK <any>\nC: a NOOP\nS: a OK <any>\n", lambda: Session(ours))
    assert found == "x.dialog:3: expected 'a OK <any>', got TimeoutError('timed out')"


def test_what_the_grammar_refuses_is_named(relay, user, tmp_path):
    """A reply that fits the file but is no IMAP."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"* OK here\r\n* 01 EXISTS\r\n")
        found = held(relay, user, tmp_path, "S: * OK <any>\nS: * <n> EXISTS\n", lambda: Session(ours))
    assert found.startswith("x.dialog:2: expected '* <n> EXISTS', got NotIMAP(")
