"""What other servers got wrong, as far as it is decided before a mailbox is looked at: what the caller is asked for, and what
it can say. (Cases of IDLE and APPEND: test_imap_server.py, test_imap_append.py.)"""

from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import Create, List, Mailbox, Numbers, Rename, Select, Store
from relaymta.proto.mailbox_list import Pattern
from tests.support.imap import Caller, caller
from tests.support.imap_grammar import responses


def asked(line: str) -> object:
    """The arguments of a command that the caller gets to execute."""
    made = caller(selected=True)
    assert made.feed(line.encode() + b"\r\n").endswith(b" completed\r\n")
    return made.commands[-1].arguments


def test_silent_is_not_silent_under_condstore():
    """cyrus 1537. RFC 7162 3.1.3: MODSEQ is told without FLAGS, and which messages were left alone."""
    made = caller(selected=True)

    def store(command):
        assert command.arguments == Store(Numbers(((5, 7),)), "+", ("\\Seen",), True, 12, True)
        told = [response.fetch(number, [response.uid(number), response.modseq(13)]) for number in (5, 6)]
        return made.session.write(b"".join(told)) + made.session.done("OK", "Stored", response.modified([(7, 7)]))

    made.execute = store
    found = responses(made.feed(b"1 UID STORE 5:7 (UNCHANGEDSINCE 12) +FLAGS.SILENT (\\seen)\r\n"))
    assert [one.data for one in found[:2]] == [{"UID": 5, "MODSEQ": 13}, {"UID": 6, "MODSEQ": 13}]
    assert found[2].code == ("MODIFIED", [(7, 7)]) and made.session.condstore


def test_move_says_copyuid_before_expunge():
    """cyrus 2114. RFC 6851 4.3."""
    made = caller(selected=True)
    copied = response.untagged("OK", "Moved", response.copyuid(7, [(3, 4)], [(10, 11)]))
    gone = response.vanished([(3, 4)])
    made.execute = lambda command: made.session.write(copied + gone) + made.session.done("OK", "Done")
    assert [one.name for one in responses(made.feed(b"1 UID MOVE 3:4 Trash\r\n"))] == ["OK", "VANISHED", "OK"]
    made.execute = lambda command: made.session.done("NO", "No such mailbox", response.TRYCREATE)
    assert made.feed(b"2 MOVE 1 x\r\n") == b"2 NO [TRYCREATE] No such mailbox\r\n"


def test_inbox_by_any_name():
    """greenmail 399. RFC 9051 5.1."""
    assert asked("1 SELECT iNbOx") == Select("INBOX")
    assert asked("1 CREATE inbox/x") == Create("INBOX/x", "inbox/x")
    assert asked("1 CREATE inbox") == Create("INBOX", "inbox") and asked("1 DELETE Inbox") == Mailbox("INBOX")
    assert asked("1 RENAME inBox inbox/old") == Rename("INBOX", "INBOX/old")
    names = ["INBOX", "INBOX/x", "inboxes", "Sent"]
    for line, expected in (
        ('1 LIST "" inbox', ["INBOX"]), ('1 LSUB "" "iNbox*"', ["INBOX", "INBOX/x"]), ('1 LIST inbox/ %', ["INBOX/x"]),
        ('1 LIST "" "in%"', ["INBOX", "inboxes"]),
    ):  # fmt: skip
        (pattern,) = asked(line).patterns
        assert [name for name in names if Pattern(pattern).matches(name)] == expected, line


def test_selecting_is_not_returning():
    """davmail 392, cyrus 2179. RFC 5258 3, 6154 2, 5819 2."""
    special = frozenset(("SPECIAL-USE",))
    assert asked('1 LIST (SPECIAL-USE) "" "*"') == List(("*",), select=special, extended=True)
    assert asked('1 LIST "" "*" RETURN (SPECIAL-USE STATUS (UNSEEN))') == List(
        ("*",), returns=special, status=("UNSEEN",), extended=True
    )
    assert asked('1 LIST "" ("INBOX" "%")') == List(("INBOX", "%"), extended=True)
    assert asked('1 LIST (SUBSCRIBED RECURSIVEMATCH) "" *').select == {"SUBSCRIBED", "RECURSIVEMATCH"}


def _rename(made: Caller) -> bytes:
    return made.session.done("NO", "There is one", response.ALREADYEXISTS)


def test_codes_are_followed_by_a_text():
    made = caller()
    made.execute = lambda command: _rename(made)
    assert made.feed(b"1 RENAME a b\r\n") == b"1 NO [ALREADYEXISTS] There is one\r\n"
    made.execute = lambda command: made.session.done("OK", "", response.READ_WRITE)
    assert made.feed(b"2 SELECT a\r\n") == b"2 OK [READ-WRITE] Done\r\n"
