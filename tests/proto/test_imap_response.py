"""What the IMAP server says: every builder passes the grammar of tests/support/imap_grammar.py, which refuses what it must."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import Section
from tests.support.imap_grammar import NotIMAP, Response, responses

NAME = "Entwürfe/a&b"


def one(octets: bytes, **options: bool) -> Response:
    (found,) = responses(octets, **options)
    return found


SAID = {  # what is said, and what the grammar finds
    response.tagged("a1", "OK", "Done"): Response("a1", "OK", text="Done"),
    response.tagged("*", "BAD", ""): Response("*", "BAD", text="Done"),
    response.tagged("a", "NO", "[x] ü\r\n"): Response("a", "NO", text="?x] ???"),
    response.tagged("a", "NO", "x", response.TRYCREATE): Response("a", "NO", code=("TRYCREATE", None), text="x"),
    response.untagged("OK", "x", response.CLOSED): Response("*", "OK", code=("CLOSED", None), text="x"),
    response.bye("Bye"): Response("*", "BYE", text="Bye"),
    response.continuation(b"dGVzdA=="): Response("+", "", text="dGVzdA=="),
    response.continuation(b""): Response("+", "", text=""),
    response.tagged("a", "OK", "x", response.appenduid(7, [(1, 3), (5, 5)])): Response(
        "a", "OK", code=("APPENDUID", (7, [(1, 3), (5, 5)])), text="x"
    ),
    response.untagged("OK", "x", response.copyuid(7, [(1, 2)], [(9, 9), (11, 11)])): Response(
        "*", "OK", code=("COPYUID", (7, [(1, 2)], [(9, 9), (11, 11)])), text="x"
    ),
    response.untagged("OK", "x", response.uidnext(5)): Response("*", "OK", code=("UIDNEXT", 5), text="x"),
    response.untagged("OK", "x", response.uidvalidity(5)): Response("*", "OK", code=("UIDVALIDITY", 5), text="x"),
    response.untagged("OK", "x", response.highestmodseq(2**60)): Response("*", "OK", code=("HIGHESTMODSEQ", 2**60), text="x"),
    response.untagged("OK", "x", response.mailboxid("F1-a")): Response("*", "OK", code=("MAILBOXID", "F1-a"), text="x"),
    response.tagged("a", "OK", "x", response.modified([(7, 7), (9, 12)])): Response(
        "a", "OK", code=("MODIFIED", [(7, 7), (9, 12)]), text="x"
    ),
    response.untagged("OK", "x", response.permanentflags(["\\Seen", "$x", "\\*"])): Response(
        "*", "OK", code=("PERMANENTFLAGS", ["\\Seen", "$x", "\\*"]), text="x"
    ),
    response.capability(["IMAP4rev1", "X=Y"]): Response("*", "CAPABILITY", data=["IMAP4rev1", "X=Y"]),
    response.enabled([]): Response("*", "ENABLED", data=[]),
    response.enabled(["CONDSTORE"]): Response("*", "ENABLED", data=["CONDSTORE"]),
    response.identity({}): Response("*", "ID", data={}),
    response.identity({"name": "x y"}): Response("*", "ID", data={"name": b"x y"}),
    response.list_(["\\HasNoChildren", "\\Sent"], NAME, False): Response(
        "*", "LIST", data={"attributes": ["\\HasNoChildren", "\\Sent"], "name": NAME}
    ),
    response.list_([], "", False): Response("*", "LIST", data={"attributes": [], "name": ""}),
    response.list_(["\\NonExistent"], "b", False, "ü", ["SUBSCRIBED"]): Response(
        "*", "LIST", data={"attributes": ["\\NonExistent"], "name": "b", "CHILDINFO": [b"SUBSCRIBED"], "OLDNAME": "ü"}
    ),
    response.lsub([], "INBOX", False): Response("*", "LSUB", data={"attributes": [], "name": "INBOX"}),
    response.namespace(): Response("*", "NAMESPACE"),
    response.status(NAME, {"MESSAGES": 0, "UIDNEXT": 1, "MAILBOXID": "F", "APPENDLIMIT": None, "SIZE": 2**40}, False): Response(
        "*", "STATUS", data=(NAME, {"MESSAGES": 0, "UIDNEXT": 1, "MAILBOXID": "F", "APPENDLIMIT": None, "SIZE": 2**40})
    ),
    response.flags(["\\Seen", "a"]): Response("*", "FLAGS", data=["\\Seen", "a"]),
    response.exists(0): Response("*", "EXISTS", 0),
    response.recent(2): Response("*", "RECENT", 2),
    response.quota("", {"STORAGE": (10, 512), "MESSAGE": (0, 5)}): Response(
        "*", "QUOTA", data=("", {"STORAGE": (10, 512), "MESSAGE": (0, 5)})
    ),
    response.quotaroot("INBOX", [""], False): Response("*", "QUOTAROOT", data=("INBOX", [""])),
    response.quotaroot("x", [], False): Response("*", "QUOTAROOT", data=("x", [])),
    response.expunge(3): Response("*", "EXPUNGE", 3),
    response.vanished([(1, 3)]): Response("*", "VANISHED", data=(False, [(1, 3)])),
    response.vanished([(5, 5)], earlier=True): Response("*", "VANISHED", data=(True, [(5, 5)])),
    response.search([]): Response("*", "SEARCH", data=([], None)),
    response.search([3, 1], 917): Response("*", "SEARCH", data=([3, 1], 917)),
    response.esearch("a1", True): Response("*", "ESEARCH", data={"TAG": "a1", "UID": True}),
    response.esearch("a", False, 1, 9, [(1, 3), (9, 9)], 4, 5): Response(
        "*", "ESEARCH", data={"TAG": "a", "UID": False, "MIN": 1, "MAX": 9, "COUNT": 4, "MODSEQ": 5, "ALL": [(1, 3), (9, 9)]}
    ),
    response.esearch("a", False, count=0): Response("*", "ESEARCH", data={"TAG": "a", "UID": False, "COUNT": 0}),
    response.STILL_HERE: Response("*", "OK", text="Still here"),
    response.TOO_MANY_SESSIONS: Response(
        "*", "BYE", code=("LIMIT", None), text="Too many sessions of this user; close one, or try again later"
    ),
}


@pytest.mark.parametrize("octets", SAID, ids=lambda octets: octets[:30].decode())
def test_a_response(octets):
    assert one(octets) == SAID[octets]


@pytest.mark.parametrize(
    "code", sorted(v for k, v in vars(response).items() if k.isupper() and isinstance(v, bytes) and v.isupper())
)
def test_every_code(code):
    assert one(response.tagged("a", "NO", "x", code)).code == (code.decode(), None)


def test_fetch():
    items = [
        response.flags_item(["\\Seen", "$x"]),
        response.uid(7),
        response.internaldate(760168345),
        response.size(9),
        response.modseq(5),
        response.savedate(None),
        response.object_id("EMAILID", "M1"),
        response.object_id("THREADID", None),
        response.section(Section("BODY", (1, 2), "HEADER.FIELDS", ("From", "a b"))) + b" " + response.data(b"From: x\r\n\r\n"),
        response.section(Section("BODY", (), "", (), (0, 5), True)) + b" " + response.data(b""),
        response.section(Section("BINARY", (2,), partial=(7, 1))) + b" " + response.data(b"\0", binary=True),
        response.section(Section("BINARY.SIZE", (2,))) + b" 5",
        response.section(Section("BODY", (3,), "MIME")) + b" NIL",
        response.section(Section("RFC822.TEXT", text="TEXT")) + b" " + response.data(b"a\0b"),
    ]
    assert one(response.fetch(3, items)) == Response(
        "*",
        "FETCH",
        3,
        data={
            "FLAGS": ["\\Seen", "$x"],
            "UID": 7,
            "INTERNALDATE": " 2-Feb-1994 05:52:25 +0000",
            "RFC822.SIZE": 9,
            "MODSEQ": 5,
            "SAVEDATE": None,
            "EMAILID": "M1",
            "THREADID": None,
            'BODY[1.2.HEADER.FIELDS (From "a b")]': b"From: x\r\n\r\n",
            "BODY[]<0>": b"",
            "BINARY[2]<7>": b"\0",
            "BINARY.SIZE[2]": 5,
            "BODY[3.MIME]": None,
            "RFC822.TEXT": b"a\x80b",
        },
    )
    assert response.data(b"") == response.string(b"") == b'""', "never {0}"


def test_dates_that_four_digits_cannot_say():
    assert response.date_time(10**12) == b'"31-Dec-9999 23:59:59 +0000"'
    assert response.date_time(-(10**12)) == b'" 1-Jan-0001 00:00:00 +0000"'


def test_strings():
    for octets, rev1, utf8 in (
        (b"a b", b'"a b"', b'"a b"'),
        (b'a"\\', b'"a\\"\\\\"', b'"a\\"\\\\"'),
        (b"a\r\nb", b"{4}\r\na\r\nb", b"{4}\r\na\r\nb"),
        ("ü".encode(), b"{2}\r\n\xc3\xbc", b'"\xc3\xbc"'),
        (b"\xff", b"{1}\r\n\xff", b"{1}\r\n\xff"),
        (b"a\0", b'"a "', b'"a "'),
        (b"x" * 1001, b"{1001}\r\n" + b"x" * 1001, b"{1001}\r\n" + b"x" * 1001),
    ):
        assert (response.string(octets), response.string(octets, utf8=True)) == (rev1, utf8)
    assert response.nstring(None) == b"NIL" and response.nstring(b"NIL") == b'"NIL"'


@given(st.binary(max_size=30), st.booleans())
def test_any_string_comes_back(octets, utf8):
    item = b"BODY[] " + response.nstring(octets, utf8)
    assert one(response.fetch(1, [item]), utf8=utf8).data == {"BODY[]": octets.replace(b"\0", b" ")}


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20), st.booleans())
def test_any_name_comes_back(name, utf8):
    if name.upper() != "INBOX":
        assert one(response.lsub([], name, utf8), utf8=utf8).data["name"] == name


@pytest.mark.parametrize(
    "octets",
    [
        b"a OK\r\n",
        b"a OK \r\n",
        b"a OK [CLOSED]\r\n",
        b"a OK [FOO] x\r\n",
        b"a  OK x\r\n",
        b"a OK x\n",
        b"a OK x",
        b"+\r\n",
        b"* 0 EXPUNGE\r\n",
        b"* 1 FETCH ()\r\n",
        b"* 1 FETCH (BODY[] {0}\r\n)\r\n",
        b"* 1 FETCH (UID 0)\r\n",
        b"* 1 FETCH (UID 1 UID 1)\r\n",
        b"* 1 FETCH (FLAGS (\\Seen  a))\r\n",
        b'* 1 FETCH (BODY[] "\xc3\xbc")\r\n',
        b'* LIST () "/" inbox\r\n',
        b'* LIST (\\Foo) "/" a\r\n',
        b'* LIST () "/" &x-\r\n',
        b"* STATUS a (FOO 1)\r\n",
        b"* STATUS a (UIDNEXT 0)\r\n",
        b"* ENABLED \r\n",
        b"* SEARCH 0\r\n",
        b"* CAPABILITY IDLE\r\n",
        b"* VANISHED 3:1\r\n",
        b"* FOO\r\n",
        b'* 1 FETCH (INTERNALDATE "1-Feb-1994 05:52:25 +0000")\r\n',
        b"* 1 FETCH (ENVELOPE (NIL NIL () NIL NIL NIL NIL NIL NIL NIL))\r\n",
        b"* OK [APPENDUID 0 1] x\r\n",
        b"* OK [COPYUID 1 1:2 1] x\r\n",
        b"* 1 FETCH (BODY[MIME] NIL)\r\n",
        b"* 1 FETCH (EMAILID M)\r\n",
    ],
)
def test_what_no_server_may_say(octets):
    with pytest.raises((NotIMAP, ValueError)):
        responses(octets)


def test_what_rev2_does_not_have():
    for octets in (b"* SEARCH 1\r\n", b"* 1 RECENT\r\n", b'* LSUB () "/" a\r\n', b"* 1 FETCH (FLAGS (\\Recent))\r\n"):
        responses(octets)
        with pytest.raises(NotIMAP):
            responses(octets, rev2=True)


def test_structures_of_the_rfc():
    """RFC 9051 7.5.2, 6.4.5 and section 8."""
    terry = b'(("Terry Gray" NIL "gray" "cac.example"))'
    date = b'"Wed, 17 Jul 1996 02:23:25 -0700 (PDT)" "IMAP4rev2 WG mtg summary and minutes" '
    envelope = b"(" + date + terry + terry + b" " + terry + b'((NIL NIL "imap" "cac.example"))'
    with pytest.raises(NotIMAP):
        responses(b"* 12 FETCH (ENVELOPE " + envelope + b" NIL NIL NIL NIL))\r\n")  # a blank is missing
    spaced = envelope.replace(b"))((", b")) ((") + b" NIL NIL NIL NIL)"
    inner = spaced.replace(b" NIL NIL NIL NIL)", b' NIL NIL NIL "<a@b>")')
    message = b'("message" "rfc822" NIL NIL NIL "7bit" 9 ' + inner + b' ("image" "png" NIL NIL NIL "base64" 4) 5)'
    body = (
        b'("text" "plain" ("charset" "us-ascii") NIL NIL "7bit" 3028 92)(("text" "plain" NIL NIL NIL "7bit" 1 1)'
        + message
        + b' "mixed")'
    )
    (found,) = responses(b"* 12 FETCH (ENVELOPE " + spaced + b" BODY (" + body + b' "alternative"))\r\n')
    assert found.data["ENVELOPE"][2] == [(b"Terry Gray", None, b"gray", b"cac.example")] and found.data["ENVELOPE"][-1] is None
    parts, kind = found.data["BODY"]
    assert kind == b"alternative" and parts[0][:2] == (b"TEXT", b"PLAIN") and parts[1][0][1][8][:2] == (b"IMAGE", b"PNG")
    text = b'("text" "plain" NIL NIL NIL "7bit" 1 1 NIL ("inline" ("filename" "x")) "en" NIL)'
    extended = b"(" + text + b' "mixed" ("boundary" "b") NIL ("en") NIL)'
    assert one(b"* 1 FETCH (BODYSTRUCTURE " + extended + b")\r\n").data["BODYSTRUCTURE"][1:] == (
        b"mixed",
        [b"boundary", b"b"],
        None,
        [b"en"],
        None,
    )
    with pytest.raises(NotIMAP):
        responses(b"* 1 FETCH (BODY " + extended + b")\r\n")
