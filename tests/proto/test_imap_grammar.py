"""The grammar of IMAP commands: lines of each command that are good, and what they mean; lines that are not, and what is said."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta._speedups.imap import Parser
from relaymta.proto.imap_command import (
    STAR,
    Age,
    And,
    Authenticate,
    Copy,
    Create,
    Day,
    Enable,
    Expunge,
    Fetch,
    Field,
    Flagged,
    Id,
    List,
    Login,
    Mailbox,
    Modified,
    Not,
    Nothing,
    Numbers,
    ObjectId,
    Or,
    Qresync,
    Rename,
    Search,
    Section,
    Select,
    SetQuota,
    Size,
    Sort,
    Status,
    Store,
    Text,
    Thread,
    Within,
)
from relaymta.proto.imap_verbs import VERBS
from relaymta.proto.imap_words import Refused, Words

ONE = Numbers(((1, 1),))
SEEN, DELETED = Flagged("\\Seen"), Flagged("\\Deleted")


def parsed(line: str | bytes, utf8: bool = False, accept: bool = False, qresync: bool = True) -> object:
    """The arguments of a command without a tag. A literal is written in place, {n+} and its octets."""
    octets = line if isinstance(line, bytes) else line.encode()
    parser = Parser(1 << 20, 100)
    parser.keep(b"t " + octets + b"\r\n")
    while (event := parser.event())[0] == 2:
        parser.collect()
    assert event[0] == 0, event
    words = Words(event[1], event[2], utf8, accept, qresync)
    assert words.tag() == "t"
    words.space()
    name = words.keyword("a command")
    if name == "UID":
        words.space()
        name += " " + words.keyword("a command")
    return VERBS[name].parse(words)


def refused(line: str | bytes, **options: bool) -> str:
    with pytest.raises(Refused) as caught:
        parsed(line, **options)
    error = caught.value
    return f"{error.status} {f'[{error.code.decode()}] ' if error.code else ''}{error.text}"


GOOD = {
    "CAPABILITY": Nothing(),
    "noop": Nothing(),
    "Logout": Nothing(),
    "STARTTLS": Nothing(),
    "CHECK": Nothing(),
    "CLOSE": Nothing(),
    "UNSELECT": Nothing(),
    "NAMESPACE": Nothing(),
    "IDLE": Nothing(),
    "EXPUNGE": Expunge(),
    "UID EXPUNGE 1": Expunge(ONE),
    "LOGIN bob secret": Login("bob", "secret"),
    'login "b o\\"b" "\\\\"': Login('b o"b', "\\"),
    "LOGIN {3+}\r\nbob {2+}\r\nü": Login("bob", "ü"),
    'LOGIN bob ""': Login("bob", ""),
    "LOGIN a]b c": Login("a]b", "c"),
    "AUTHENTICATE plain": Authenticate("PLAIN", None),
    "AUTHENTICATE PLAIN =": Authenticate("PLAIN", b"="),
    "AUTHENTICATE XOAUTH2 dXNlcj0=": Authenticate("XOAUTH2", b"dXNlcj0="),
    "ID NIL": Id({}),
    "ID ()": Id({}),
    'ID ("Name" "x" "version" NIL)': Id({"name": "x", "version": None}),
    "ENABLE condstore X": Enable(("CONDSTORE", "X")),
    "SELECT iNbOx": Select("INBOX"),
    "EXAMINE inbox/Sub": Select("INBOX/Sub"),
    'SELECT ""': Select(""),
    "SELECT {5+}\r\nINBOX": Select("INBOX"),
    "SELECT [Gmail]/Sent": Select("[Gmail]/Sent"),
    "SELECT inboxes": Select("inboxes"),
    "SELECT Entw&APw-rfe": Select("Entwürfe"),
    'SELECT "a&-b"': Select("a&b"),
    "SELECT x (CONDSTORE)": Select("x", True),
    "SELECT x (QRESYNC (7 9))": Select("x", True, Qresync(7, 9)),
    "SELECT x (QRESYNC (7 9 1:5,9) CONDSTORE)": Select("x", True, Qresync(7, 9, Numbers(((1, 5), (9, 9))))),
    "SELECT x (QRESYNC (7 9 1:5 (1,3 2,7)))": Select(
        "x", True, Qresync(7, 9, Numbers(((1, 5),)), Numbers(((1, 1), (3, 3))), Numbers(((2, 2), (7, 7))))
    ),
    "SELECT x (QRESYNC (7 9 (1 2)))": Select("x", True, Qresync(7, 9, None, ONE, Numbers(((2, 2),)))),
    "CREATE a/b": Create("a/b"),
    "CREATE a/b/": Create("a/b"),
    "CREATE inbox/x": Create("INBOX/x", "inbox/x"),
    "CREATE Out (USE (\\sent \\Archive))": Create("Out", "", ("\\Sent", "\\Archive")),
    "CREATE x (USE ())": Create("x"),
    "DELETE x": Mailbox("x"),
    "SUBSCRIBE INBOX": Mailbox("INBOX"),
    "UNSUBSCRIBE a": Mailbox("a"),
    "RENAME a b/": Rename("a", "b"),
    "RENAME inbox old": Rename("INBOX", "old"),
    'LIST "" *': List(("*",)),
    'LIST "" ""': List(("",)),
    'LIST "a/" %': List(("a/%",)),
    'LIST a ""': List(("",)),
    'LIST () "" *': List(("*",), extended=True),
    'LIST "" inbox': List(("INBOX",)),
    'LIST "" "inbox/%"': List(("INBOX/%",)),
    'LIST (SUBSCRIBED recursivematch) "" ("INBOX" %)': List(
        ("INBOX", "%"), frozenset(("SUBSCRIBED", "RECURSIVEMATCH")), extended=True
    ),
    'LIST (SPECIAL-USE) "" "*"': List(("*",), frozenset(("SPECIAL-USE",)), extended=True),
    'LIST "" "*" RETURN (SPECIAL-USE STATUS (UNSEEN messages) children)': List(
        ("*",), frozenset(), frozenset(("SPECIAL-USE", "CHILDREN")), ("UNSEEN", "MESSAGES"), True
    ),
    'LIST "" % RETURN ()': List(("%",), extended=True),
    'LIST "" {3+}\r\na b': List(("a b",)),
    'LIST "" &APw-%': List(("ü%",)),
    'LSUB "" *': List(("*",), frozenset(("SUBSCRIBED",))),
    'LSUB "" INBOX': List(("INBOX",), frozenset(("SUBSCRIBED",))),
    "STATUS a (MESSAGES uidnext)": Status("a", ("MESSAGES", "UIDNEXT")),
    "STATUS a (RECENT UIDVALIDITY UNSEEN DELETED SIZE HIGHESTMODSEQ MAILBOXID APPENDLIMIT DELETED-STORAGE)": Status(
        "a",
        ("RECENT", "UIDVALIDITY", "UNSEEN", "DELETED", "SIZE", "HIGHESTMODSEQ", "MAILBOXID", "APPENDLIMIT", "DELETED-STORAGE"),
    ),
    'GETQUOTA ""': Mailbox(""),
    "GETQUOTAROOT inbox": Mailbox("INBOX"),
    'SETQUOTA "" (STORAGE 512)': SetQuota("", {"STORAGE": 512}),
    'SETQUOTA "#u" ()': SetQuota("#u", {}),
    "FETCH 1 FLAGS": Fetch(ONE, ("FLAGS",)),
    "UID FETCH 1 FLAGS": Fetch(ONE, ("UID", "FLAGS"), uid=True),
    "FETCH 1 (uid UID)": Fetch(ONE, ("UID",)),
    "FETCH 1 fast": Fetch(ONE, ("FLAGS", "INTERNALDATE", "RFC822.SIZE")),
    "FETCH 1 ALL": Fetch(ONE, ("FLAGS", "INTERNALDATE", "RFC822.SIZE", "ENVELOPE")),
    "FETCH 1 FULL": Fetch(ONE, ("FLAGS", "INTERNALDATE", "RFC822.SIZE", "ENVELOPE", "BODY")),
    "FETCH 1 (BODY BODYSTRUCTURE ENVELOPE EMAILID THREADID SAVEDATE MODSEQ)": Fetch(
        ONE, ("BODY", "BODYSTRUCTURE", "ENVELOPE", "EMAILID", "THREADID", "SAVEDATE", "MODSEQ")
    ),
    "FETCH 1 RFC822": Fetch(ONE, (), (Section("RFC822"),)),
    "FETCH 1 (RFC822.HEADER RFC822.TEXT)": Fetch(
        ONE, (), (Section("RFC822.HEADER", text="HEADER", peek=True), Section("RFC822.TEXT", text="TEXT"))
    ),
    "FETCH 1 body[]": Fetch(ONE, (), (Section("BODY"),)),
    "FETCH 1 BODY.PEEK[]": Fetch(ONE, (), (Section("BODY", peek=True),)),
    "FETCH 1 (BODY[1.2.MIME] BODY.PEEK[header] BODY[3])": Fetch(
        ONE, (), (Section("BODY", (1, 2), "MIME"), Section("BODY", (), "HEADER", peek=True), Section("BODY", (3,)))
    ),
    "FETCH 1 BODY[]<0.4096>": Fetch(ONE, (), (Section("BODY", partial=(0, 4096)),)),
    'FETCH 1 BODY[HEADER.FIELDS (From "To" {2+}\r\nCc)]': Fetch(
        ONE, (), (Section("BODY", (), "HEADER.FIELDS", ("From", "To", "Cc")),)
    ),
    "FETCH 1 (UID BODY.PEEK[4.1.HEADER.FIELDS.NOT (to to)]<5.1> FLAGS)": Fetch(
        ONE, ("UID", "FLAGS"), (Section("BODY", (4, 1), "HEADER.FIELDS.NOT", ("to", "to"), (5, 1), True),)
    ),
    "FETCH 1 (BINARY[1]<0.9> BINARY.PEEK[2.3] BINARY.SIZE[1] BINARY[])": Fetch(
        ONE,
        (),
        (
            Section("BINARY", (1,), partial=(0, 9)),
            Section("BINARY", (2, 3), peek=True),
            Section("BINARY.SIZE", (1,), peek=True),
            Section("BINARY"),
        ),
    ),
    "FETCH 1 FLAGS (CHANGEDSINCE 12345)": Fetch(ONE, ("FLAGS", "MODSEQ"), changed_since=12345),
    "UID FETCH 1 FLAGS (VANISHED CHANGEDSINCE 7)": Fetch(ONE, ("UID", "FLAGS", "MODSEQ"), (), 7, True, True),
    "FETCH $ UID": Fetch(Numbers((), saved=True), ("UID",)),
    "FETCH *:4 UID": Fetch(Numbers((), 4), ("UID",)),
    "FETCH 9,3:1,2:4,* UID": Fetch(Numbers(((1, 4), (9, 9)), STAR), ("UID",)),
    "FETCH 1,2,3,7,5:6,12 UID": Fetch(Numbers(((1, 3), (5, 7), (12, 12))), ("UID",)),
    "STORE 1 FLAGS (\\seen $x)": Store(ONE, "", ("\\Seen", "$x")),
    "STORE 1 +flags.silent \\Deleted": Store(ONE, "+", ("\\Deleted",), True),
    "STORE 1 -FLAGS ()": Store(ONE, "-", ()),
    "STORE 1 FLAGS a b a": Store(ONE, "", ("a", "b")),
    "UID STORE 1 (UNCHANGEDSINCE 0) +FLAGS (\\X)": Store(ONE, "+", ("\\X",), False, 0, True),
    "COPY 1 inbox": Copy(ONE, "INBOX"),
    "MOVE 1 Trash": Copy(ONE, "Trash"),
    "UID COPY 1 x": Copy(ONE, "x", True),
    "UID MOVE $ x": Copy(Numbers((), saved=True), "x", True),
    "SEARCH ALL": Search(And()),
    "UID SEARCH ALL": Search(And(), uid=True),
    "SEARCH seen unseen": Search(And((SEEN, Not(SEEN)))),
    "SEARCH NEW": Search(And((Flagged("\\Recent"), Not(SEEN)))),
    "SEARCH OLD": Search(Not(Flagged("\\Recent"))),
    "SEARCH RECENT": Search(Flagged("\\Recent")),
    "SEARCH UNDELETED": Search(Not(DELETED)),
    "SEARCH DRAFT": Search(Flagged("\\Draft")),
    "SEARCH ANSWERED FLAGGED": Search(And((Flagged("\\Answered"), Flagged("\\Flagged")))),
    "SEARCH KEYWORD $Junk UNKEYWORD x": Search(And((Flagged("$Junk"), Not(Flagged("x"))))),
    'SEARCH FROM bob TO "a b" CC {2+}\r\nü BCC x SUBJECT y BODY z TEXT w': Search(
        And(
            (
                Text("FROM", "bob"),
                Text("TO", "a b"),
                Text("CC", "ü"),
                Text("BCC", "x"),
                Text("SUBJECT", "y"),
                Text("BODY", "z"),
                Text("TEXT", "w"),
            )
        )
    ),
    'SEARCH HEADER Message-ID ""': Search(Field("Message-ID", "")),
    'SEARCH SINCE 1-Feb-1994 BEFORE "02-feb-1994" ON 29-Feb-2000': Search(
        And(
            (
                Day("INTERNAL", ">", datetime.date(1994, 2, 1)),
                Day("INTERNAL", "<", datetime.date(1994, 2, 2)),
                Day("INTERNAL", "=", datetime.date(2000, 2, 29)),
            )
        )
    ),
    "SEARCH SENTON 1-Jan-2020 SAVEDSINCE 1-Jan-2020": Search(
        And((Day("SENT", "=", datetime.date(2020, 1, 1)), Day("SAVED", ">", datetime.date(2020, 1, 1))))
    ),
    "SEARCH SAVEDATESUPPORTED": Search(And()),
    "SEARCH LARGER 5 SMALLER 6": Search(And((Size(True, 5), Size(False, 6)))),
    "SEARCH YOUNGER 60 OLDER 9": Search(And((Age(False, 60), Age(True, 9)))),
    "SEARCH 1:3 UID 4 $": Search(
        And((Within(Numbers(((1, 3),)), False), Within(Numbers(((4, 4),)), True), Within(Numbers((), saved=True), False)))
    ),
    "SEARCH OR SEEN NOT (DELETED 1)": Search(Or(SEEN, Not(And((DELETED, Within(ONE, False)))))),
    "SEARCH ((SEEN))": Search(SEEN),
    'SEARCH MODSEQ "/flags/\\\\draft" all 620': Search(Modified(620), modseq=True),
    "SEARCH OR NOT MODSEQ 0 SEEN": Search(Or(Not(Modified(0)), SEEN), modseq=True),
    "SEARCH SUBJECT MODSEQ": Search(Text("SUBJECT", "MODSEQ")),
    "SEARCH EMAILID M1-_ THREADID T": Search(And((ObjectId("EMAILID", "M1-_"), ObjectId("THREADID", "T")))),
    "SEARCH RETURN (MIN count) ALL": Search(And(), frozenset(("MIN", "COUNT"))),
    "UID SEARCH RETURN () CHARSET utf-8 SEEN": Search(SEEN, frozenset(("ALL",)), uid=True),
    "SEARCH RETURN (SAVE) SEEN": Search(SEEN, frozenset(("SAVE",))),
    'SEARCH CHARSET "US-ASCII" SEEN': Search(SEEN),
    "SORT (DATE) UTF-8 SEEN": Sort((("DATE", False),), SEEN),
    'sort (reverse date subject) "us-ascii" all seen': Sort((("DATE", True), ("SUBJECT", False)), And((And(), SEEN))),
    "UID SORT (CC) US-ASCII MODSEQ 5": Sort((("CC", False),), Modified(5), True, True),
    "THREAD REFERENCES UTF-8 SEEN": Thread(True, SEEN),
    "UID THREAD OrderedSubject UTF-8 SEEN": Thread(False, SEEN, uid=True),
    "FETCH 1 PREVIEW": Fetch(ONE, (), (Section("PREVIEW", peek=True),)),
    "FETCH 1 (PREVIEW (LAZY) UID)": Fetch(ONE, ("UID",), (Section("PREVIEW", text="LAZY", peek=True),)),
    "FETCH 1 PREVIEW (CHANGEDSINCE 5)": Fetch(ONE, ("MODSEQ",), (Section("PREVIEW", peek=True),), 5),
}

NO_VANISHED = "BAD VANISHED is allowed with CHANGEDSINCE in UID FETCH after ENABLE QRESYNC (RFC 7162 3.2.6)"
BAD = {
    "NOOP ": 'BAD expected the end of the command at " "',
    "NOOP x": 'BAD expected the end of the command at " "',
    "LOGIN": "BAD expected a space at the end",
    "LOGIN bob": "BAD expected a space at the end",
    "LOGIN  bob x": 'BAD expected a user name at " "',
    "LOGIN bob x y": 'BAD expected the end of the command at " "',
    "LOGIN (bob) x": 'BAD expected a user name at "("',
    "LOGIN b%b x": 'BAD expected a user name at "b%b"',
    'LOGIN "" x': "BAD expected a user name that is not empty",
    b"LOGIN bob {1+}\r\n\xff": "BAD a password is not UTF-8",
    b"LOGIN bob {1+}\r\n\0": "BAD NUL in a password",
    "LOGIN bob ~{1+}\r\nx": 'BAD expected a password at "x"',
    'LOGIN bob"x" y': 'BAD expected a space at "x"',
    b"LOGIN b\xfcb x": 'BAD expected a user name at "b\\xfcb"',
    "AUTHENTICATE": "BAD expected a space at the end",
    'AUTHENTICATE "PLAIN"': 'BAD expected a mechanism at "PLAIN"',
    "ID": "BAD expected a space at the end",
    "ID x": 'BAD expected NIL or a list at "x"',
    "ID (a b)": 'BAD expected the name of a field at "a"',
    'ID ("a")': 'BAD expected a space at ")"',
    f'ID ("{"a" * 31}" NIL)': "BAD more than RFC 2971 3.3 allows",
    "ENABLE": "BAD expected a space at the end",
    "SELECT": "BAD expected a space at the end",
    "SELECT a*": 'BAD expected the name of a mailbox at "a*"',
    "SELECT a&b": "NO [CANNOT] the name is not modified UTF-7 (RFC 3501 5.1.3)",
    'SELECT "ü"': "NO [CANNOT] the name is not modified UTF-7 (RFC 3501 5.1.3)",
    "SELECT x ()": 'BAD expected a parameter of SELECT at ")"',
    "SORT": "BAD expected a space at the end",
    "SORT () UTF-8 ALL": 'BAD expected a sort criterion at ")"',
    "SORT (REVERSE REVERSE DATE) UTF-8 ALL": 'BAD expected a sort criterion at "REVERSE"',
    "SORT (DATE) UTF-8": "BAD expected a space at the end",
    "SORT (DATE) x ALL": "NO [BADCHARSET (US-ASCII UTF-8)] the charset is not supported",
    f"UID SORT ({' '.join(['DATE'] * 21)}) UTF-8 ALL": "NO [LIMIT] more than 20 sort criteria",
    "THREAD REFS UTF-8 ALL": 'BAD expected REFERENCES or ORDEREDSUBJECT at "REFS"',
    "UID THREAD REFERENCES": "BAD expected a space at the end",
    "SELECT x (FOO)": 'BAD expected CONDSTORE or QRESYNC at "FOO"',
    "SELECT x (QRESYNC (0 1))": 'BAD expected a UIDVALIDITY at "0"',
    "SELECT x (QRESYNC (1 2 *))": 'BAD expected a set of numbers without "*" at "*"',
    "SELECT x (QRESYNC (1 2 1 (1 1:2)))": "BAD expected as many message numbers as UIDs",
    "CREATE a//b": "NO [CANNOT] a level of the name is empty",
    "CREATE a%": 'BAD expected the name of a mailbox at "a%"',
    'CREATE "a%"': "NO [CANNOT] the name has a wildcard (* or %)",
    "CREATE /": "NO [CANNOT] the name is empty",
    "CREATE x (USE (\\Foo))": "NO [USEATTR] no such special use",
    "CREATE x (USE (\\Sent)": 'BAD expected ")" at the end',
    "SELECT x (QRESYNC (1 2 1 (1 1)": 'BAD expected ")" at the end',
    "SELECT x (QRESYNC (1 2 1 (1 1 1": 'BAD expected ")" at " "',
    "STORE 1 (UNCHANGEDSINCE 1 FLAGS x": 'BAD expected ")" at " "',
    "CREATE x (FOO)": 'BAD expected USE at "FOO"',
    "RENAME a": "BAD expected a space at the end",
    'RENAME a "\t"': "NO [CANNOT] the name is not modified UTF-7 (RFC 3501 5.1.3)",
    "LIST": "BAD expected a space at the end",
    "LIST *": 'BAD expected the name of a mailbox at "*"',
    'LIST (RECURSIVEMATCH) "" *': "BAD expected a selection option beside RECURSIVEMATCH (RFC 5258 3)",
    'LIST (FOO) "" *': 'BAD expected a selection option at "FOO"',
    'LIST "" ()': 'BAD expected a pattern at ")"',
    'LIST "" * RETURN': "BAD expected a space at the end",
    'LIST "" * RETURN (STATUS ())': 'BAD expected a STATUS item at ")"',
    'LIST "" * RETURN (FOO)': 'BAD expected a return option at "FOO"',
    'LIST "" * FOO ()': 'BAD expected RETURN at "FOO"',
    f'LIST "" ({" ".join("%" * 101)})': "NO [LIMIT] more than 100 patterns",
    "STATUS a ()": 'BAD expected a STATUS item at ")"',
    "STATUS a (FOO)": 'BAD expected a STATUS item at "FOO"',
    "STATUS a MESSAGES": 'BAD expected "(" at "MESSAGES"',
    "STATUS a (MESSAGES": "BAD expected a space at the end",
    'SETQUOTA "" (STORAGE x)': 'BAD expected a limit at "x"',
    "FETCH 1": "BAD expected a space at the end",
    "FETCH 1 ": "BAD expected a FETCH item at the end",
    "FETCH foo FLAGS": 'BAD expected a sequence set at "foo"',
    "FETCH 0 FLAGS": 'BAD expected a sequence set at "0"',
    "FETCH 1:0 FLAGS": 'BAD expected a sequence set at "1:0"',
    "FETCH 1, FLAGS": 'BAD expected a sequence set at "1,"',
    "FETCH 4294967296 FLAGS": 'BAD expected numbers up to 4294967295 at "4294967296"',
    "FETCH 1:2:3 FLAGS": 'BAD expected a sequence set at "1:2:3"',
    "FETCH 1 FOO": 'BAD expected a FETCH item at "FOO"',
    "FETCH 1 (ALL)": 'BAD expected a FETCH item at "ALL"',
    "FETCH 1 ()": 'BAD expected a FETCH item at ")"',
    "FETCH 1 (FLAGS": "BAD expected a space at the end",
    "FETCH 1 BODY[0]": 'BAD expected a section at "BODY[0]"',
    "FETCH 1 BODY[MIME]": 'BAD expected a section at "BODY[MIME]"',
    "FETCH 1 BODY[1": 'BAD expected a section at "BODY[1"',
    "FETCH 1 BODY[1.FOO]": 'BAD expected a section at "BODY[1.FOO]"',
    "FETCH 1 BODY[]<1>": 'BAD expected a section at "BODY[]<1>"',
    "FETCH 1 BODY[]<0.0>": 'BAD expected a part of a section, of at least one octet at "BODY[]<0.0>"',
    "FETCH 1 BINARY[TEXT]": 'BAD expected a section at "BINARY[TEXT]"',
    "FETCH 1 BINARY.SIZE[1]<0.1>": 'BAD expected a section at "BINARY.SIZE[1]<0.1>"',
    "FETCH 1 BODY[HEADER.FIELDS]": 'BAD expected a section at "BODY[HEADER.FIELDS]"',
    "FETCH 1 BODY[HEADER.FIELDS ()]": 'BAD expected the name of a header field at ")"',
    "FETCH 1 BODY[HEADER.FIELDS (a:)]": 'BAD expected the name of a header field at "a:"',
    "FETCH 1 BODY[HEADER.FIELDS (a)x": 'BAD expected a section at "x"',
    "FETCH 1 BODY[HEADER.FIELDS (a) ]": 'BAD expected a section at " "',
    f"FETCH 1 BODY[1{'.1' * 100}]": f'BAD expected a section at "BODY[1{".1" * 17}"',
    "FETCH 1 FLAGS (CHANGEDSINCE x)": 'BAD expected a mod-sequence at "x"',
    "FETCH 1 FLAGS (FOO 1)": 'BAD expected CHANGEDSINCE or VANISHED at "FOO"',
    "FETCH 1 FLAGS (CHANGEDSINCE 1 VANISHED)": NO_VANISHED,
    "UID FETCH 1 FLAGS (VANISHED)": NO_VANISHED,
    "STORE 1 FLAGS": "BAD expected a space at the end",
    "STORE 1 FOO (a)": 'BAD expected FLAGS, +FLAGS or -FLAGS at "FOO"',
    "STORE 1 FLAGS (\\Recent)": 'BAD expected a flag at "\\Recent"',
    "STORE 1 FLAGS (\\)": 'BAD expected a flag at "\\"',
    'STORE 1 FLAGS "a"': 'BAD expected a flag at "a"',
    "STORE 1 (FOO 1) FLAGS a": 'BAD expected UNCHANGEDSINCE at "FOO"',
    "STORE 1 FLAGS (" + "a" * 256 + ")": "NO [LIMIT] a flag has more than 255 octets",
    "STORE 1 FLAGS (a  b)": 'BAD expected a flag at " "',
    "COPY 1": "BAD expected a space at the end",
    "UID EXPUNGE": "BAD expected a space at the end",
    "SEARCH": "BAD expected a space at the end",
    "SEARCH FOO": 'BAD expected a search key at "FOO"',
    "SEARCH ()": 'BAD expected a search key at ")"',
    "SEARCH SEEN ": "BAD expected a search key at the end",
    "SEARCH NOT": "BAD expected a space at the end",
    "SEARCH OR SEEN": "BAD expected a space at the end",
    "SEARCH (SEEN": "BAD expected a space at the end",
    "SEARCH SINCE 31-Feb-2020": 'BAD expected a date that exists at "31-Feb-2020"',
    "SEARCH ON 2020-01-01": 'BAD expected a date (1-Feb-1994) at "2020-01-01"',
    "SEARCH ON 1-Foo-2020": 'BAD expected a date that exists at "1-Foo-2020"',
    "SEARCH LARGER -1": 'BAD expected a size at "-1"',
    "SEARCH YOUNGER 0": 'BAD expected a number of seconds at "0"',
    "SEARCH FROM": "BAD expected a space at the end",
    "SEARCH CHARSET KOI8-R SEEN": "NO [BADCHARSET (US-ASCII UTF-8)] the charset is not supported",
    "SEARCH RETURN (FOO) SEEN": 'BAD expected MIN, MAX, ALL, COUNT or SAVE at "FOO"',
    "SEARCH RETURN (MIN)": "BAD expected a space at the end",
    "SEARCH EMAILID a.b": 'BAD expected an object id at "a.b"',
    "SEARCH $$": 'BAD expected a sequence set at "$$"',
    b"SEARCH FROM {1+}\r\n\xff": "BAD a text to search for is not UTF-8",
    "SEARCH" + " SEEN" * 501: "NO [LIMIT] more than 500 search keys",
    "SEARCH" + " NOT" * 21 + " SEEN": "NO [LIMIT] search keys nested deeper than 20",
    'SEARCH MODSEQ "/x" all 1': 'BAD expected an entry (/flags/...) at "/x"',
    "UID SEARCH 4294967296": 'BAD expected numbers up to 4294967295 at "4294967296"',
}


@pytest.mark.parametrize("line", GOOD)
def test_a_good_command(line):
    assert parsed(line) == GOOD[line] and type(parsed(line)) is type(GOOD[line])


@pytest.mark.parametrize("line", GOOD)
def test_nothing_may_follow_a_command(line):
    for more in (")", " )", "  x"):
        assert refused(line + more).startswith("BAD expected ")


@pytest.mark.parametrize("line", BAD)
def test_a_bad_command(line):
    assert refused(line) == BAD[line]


def test_every_command_is_in_both_tables():
    def names(lines):
        words = [line.split() for line in (line if isinstance(line, str) else line.decode("latin-1") for line in lines)]
        return {" ".join(one[:2] if one[0].upper() == "UID" else one[:1]).upper() for one in words}

    own = {"APPEND"}
    assert set(VERBS) - own <= names(GOOD)
    assert names(BAD) >= {name for name in VERBS if VERBS[name].parse is not VERBS["NOOP"].parse} - own - {
        "EXAMINE", "DELETE", "SUBSCRIBE", "UNSUBSCRIBE", "GETQUOTA", "GETQUOTAROOT", "LSUB", "EXPUNGE", "MOVE", "UID COPY",
        "UID MOVE", "UID STORE",
    }  # fmt: skip  # which share a row's parser with one that is there


def test_a_section_that_is_asked_for_twice():
    """It is told once, and \\Seen is set when one of the two sets it."""
    whole = Section("BODY")
    for line in "BODY[] BODY.PEEK[]", "BODY.PEEK[] BODY[]", "BODY[] BODY[]":
        assert parsed(f"FETCH 1 ({line})").sections == (whole,)
    assert parsed("FETCH 1 (BODY.PEEK[] BODY.PEEK[])").sections == (whole._replace(peek=True),)


def test_names_in_utf8():
    assert parsed('SELECT "Entwürfe"', utf8=True) == Select("Entwürfe") == parsed("SELECT {9+}\r\nEntwürfe", utf8=True)
    assert parsed("SELECT a&b", utf8=True) == Select("a&b")
    assert refused(b'SELECT "\xff"', utf8=True) == "NO [CANNOT] the name is not UTF-8"
    decomposed = "Entwu\u0308rfe"
    assert parsed(f'SELECT "{decomposed}"', utf8=True) == Select("Entwürfe", given=decomposed)
    assert parsed(f'CREATE "{decomposed}"', utf8=True) == Create("Entwürfe", decomposed)


def test_what_has_to_be_enabled_before():
    assert refused("SEARCH CHARSET UTF-8 ALL", accept=True).startswith("BAD expected no CHARSET after ENABLE UTF8=ACCEPT")
    assert refused("SELECT x (QRESYNC (1 2))", qresync=False).startswith("BAD expected ENABLE QRESYNC before")
    assert refused("UID FETCH 1 FLAGS (CHANGEDSINCE 1 VANISHED)", qresync=False) == NO_VANISHED


def test_bounds():
    nested = "SEARCH " + "(NOT " * 10 + "{}SEEN" + ")" * 10
    assert isinstance(parsed(nested.format("")), Search)
    assert isinstance(parsed("SEARCH " + "(1 NOT " * 10 + "SEEN" + ")" * 10), Search)
    assert refused(nested.format("NOT ")) == "NO [LIMIT] search keys nested deeper than 20"
    fields = " ".join(f'"{number}" "{"v" * 1024}"' for number in range(30))
    assert len(parsed(f"ID ({fields})").fields) == 30
    for beyond in (f'{fields} "x" NIL', f'"a" "{"v" * 1025}"', f'"{"n" * 31}" NIL'):
        assert refused(f"ID ({beyond})") == "BAD more than RFC 2971 3.3 allows"
    assert len(parsed(f'LIST "" ({" ".join("%" * 100)})').patterns) == 100
    assert len(parsed("SEARCH" + " SEEN" * 500).key.keys) == 500
    assert refused("SEARCH" + " SEEN" * 501) == "NO [LIMIT] more than 500 search keys"
    assert parsed("SEARCH YOUNGER 4294967295 LARGER 9223372036854775807")
    assert refused("SEARCH LARGER 9223372036854775808").startswith("BAD expected a size")
    assert parsed("FETCH 1 FLAGS (CHANGEDSINCE 9223372036854775807)").changed_since == 2**63 - 1
    assert len(parsed(f"FETCH 1 BODY[1{'.1' * 99}]").sections[0].part) == 100
    assert parsed(f"STORE 1 FLAGS ({'a' * 255})")


PIECES = st.lists(
    st.sampled_from(
        ["FETCH", "SEARCH", "UID", "LIST", "STORE", "STATUS", "SELECT", "APPEND", "ID", "LOGIN", "SETQUOTA", "COPY", "CREATE",
         " ", " ", " ", "(", ")", "1:*", "$", '"a"', '""', "{2+}\r\nab", "~{1+}\r\n\0", "BODY[", "BODY.PEEK[HEADER.FIELDS", "]",
         "]<0.1>", "NIL", "RETURN", "OR", "NOT", "SEEN", "MODSEQ", "SINCE", "1-Jan-2020", "USE", "QRESYNC", "\\Seen", "+FLAGS",
         "*", "CHARSET", "%", "CHANGEDSINCE", "5", "ü", "&APw-", "&x", "HEADER", "FLAGS", "UNSEEN", "SUBSCRIBED",
         '"01-Jan-2020 00:00:00 +0000"']
    ),
    max_size=15,
).map("".join)  # fmt: skip


@given(st.sampled_from(sorted(VERBS)), PIECES, st.booleans())
def test_whatever_the_words_are_only_a_refusal_is_raised(name, rest, option):
    try:
        parsed(f"{name} {rest}", utf8=option, accept=option, qresync=option)
    except Refused as error:
        assert error.text and error.status in ("BAD", "NO")
    except AssertionError as error:  # the parser has no words for it
        assert "(1, " in str(error)
