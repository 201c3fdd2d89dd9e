"""The IMAP session in dialogues: commands and responses, in one piece and octet by octet. (`Caller.feed` passes all that is said
through the grammar of tests/support/imap_grammar.py.)"""

from base64 import b64decode, b64encode

import pytest
import scramp

from relaymta.proto import imap_response as response
from relaymta.proto import reply
from relaymta.proto.access_session import ERRORS
from relaymta.proto.imap_command import Nothing, Select
from relaymta.proto.imap_server import Offers, ServerSession
from relaymta.proto.imap_session import AFTER_LOGIN, CLAIMED, COMMAND, COMMANDS, IDLE, TLS
from relaymta.proto.imap_verbs import VERBS
from relaymta.proto.sasl import Keys, Password, Token
from relaymta.proto.session import WRONG_LOGINS
from tests.support.imap import CLEAR, caller
from tests.support.imap_grammar import responses

WITH_TLS = Offers(starttls=True, mechanisms=("PLAIN", "LOGIN"))


def plain(user: str = "bob", password: str = "secret") -> bytes:
    return b64encode(f"\0{user}\0{password}".encode())


# Which command is allowed in which state: what the response begins with (without TLS, in the clear, logged in, selected).

FIRST, ALREADY, NONE, OK = b"t BAD Log in first", b"t BAD Already logged in", b"t BAD No mailbox", b"t OK "
STATES = [{"offers": WITH_TLS, "login": False}, {"login": False}, {}, {"selected": True}]
ALLOWED = {
    b"CAPABILITY": (b"* CAPABILITY", b"* CAPABILITY", b"* CAPABILITY", b"* CAPABILITY"),
    b"LOGOUT": (b"* BYE", b"* BYE", b"* BYE", b"* BYE"),
    b"NOOP": (OK, OK, OK, OK),
    b"ID NIL": (b"* ID (", b"* ID (", b"* ID (", b"* ID ("),
    b"STARTTLS": (OK, b"t BAD STARTTLS is not offered", ALREADY, ALREADY),
    b"AUTHENTICATE PLAIN": (b"t NO [PRIVACYREQUIRED]", b"+ \r\n", ALREADY, ALREADY),
    b"AUTHENTICATE FOO": (b"t NO [PRIVACYREQUIRED]", b"t NO [CANNOT]", ALREADY, ALREADY),
    b"LOGIN bob secret": (b"t NO [PRIVACYREQUIRED]", b"t OK [CAPABILITY", ALREADY, ALREADY),
    b"LOGIN bob wrong": (b"t NO [PRIVACYREQUIRED]", b"t NO [AUTHENTICATIONFAILED]", ALREADY, ALREADY),
    b"ENABLE X": (FIRST, FIRST, b"* ENABLED\r\n", b"* ENABLED\r\n"),
    b"IDLE": (FIRST, FIRST, b"+ idling", b"+ idling"),
    b"FOO": (b"t BAD expected a command",) * 4,
    b"UID FOO 1": (b"t BAD expected a command",) * 4,
    b"UID": (b"t BAD expected a space",) * 4,
    b"APPEND x {1+}\r\na": (FIRST, FIRST, OK, OK),
    **dict.fromkeys(
        (b"SELECT a", b"EXAMINE a", b"CREATE a", b"DELETE a", b"RENAME a b", b"SUBSCRIBE a", b"UNSUBSCRIBE a", b'LIST "" *',
         b'LSUB "" *', b"NAMESPACE", b"STATUS a (UNSEEN)", b'GETQUOTA ""', b"GETQUOTAROOT a", b'SETQUOTA "" ()'),
        (FIRST, FIRST, OK, OK),
    ),
    **dict.fromkeys(
        (b"CHECK", b"CLOSE", b"UNSELECT", b"EXPUNGE", b"SEARCH ALL", b"FETCH 1 UID", b"STORE 1 FLAGS a", b"COPY 1 a", b"MOVE 1 a",
         b"SORT (DATE) UTF-8 ALL", b"UID SORT (DATE) UTF-8 ALL", b"THREAD REFERENCES UTF-8 ALL",
         b"UID THREAD REFERENCES UTF-8 ALL", b"UID EXPUNGE 1", b"UID SEARCH ALL", b"UID FETCH 1 UID", b"UID STORE 1 FLAGS a",
         b"UID COPY 1 a", b"UID MOVE 1 a"),
        (FIRST, FIRST, NONE, OK),
    ),
}  # fmt: skip


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("command", ALLOWED, ids=lambda command: command[:20].decode())
def test_every_command_in_every_state(command, step):
    for options, expected in zip(STATES, ALLOWED[command], strict=True):
        made = caller(**options)
        octets = b"t " + command + b"\r\n"
        out = b"".join(made.feed(octets[at : at + (step or len(octets))]) for at in range(0, len(octets), step or len(octets)))
        assert out.startswith(expected), options
        assert made.session.errors == (b"t BAD" in out or b"t NO [" in out)


def test_the_table_has_every_command():
    def name(line: bytes) -> str:
        return b" ".join(line.split()[: 2 if line.startswith(b"UID ") else 1]).decode()

    assert {name(line) for line in ALLOWED} >= set(VERBS)


def test_what_may_be_told_during_which_command():
    """RFC 9051 7.5.1, RFC 2180 4."""
    assert {name for name, verb in VERBS.items() if not verb.expunges} == {
        "FETCH", "STORE", "SEARCH", "SORT", "THREAD", "CLOSE", "UNSELECT",
    }  # fmt: skip


def test_what_changes_mailboxes():
    assert {name for name, verb in VERBS.items() if verb.writes} == {
        "CREATE", "DELETE", "RENAME", "SUBSCRIBE", "UNSUBSCRIBE", "APPEND", "CLOSE", "EXPUNGE", "STORE", "COPY", "MOVE",
        "UID EXPUNGE", "UID STORE", "UID COPY", "UID MOVE",
    }  # fmt: skip


# Greeting and capabilities


def test_capabilities():
    def offered(**options) -> str:
        return responses(caller(login=False, **options).feed(b"t CAPABILITY\r\n"))[0].data

    before = ["IMAP4rev1", "IMAP4rev2", "SASL-IR", "LITERAL+", "ID", "ENABLE"]
    assert offered(offers=WITH_TLS) == [*before, "STARTTLS", "LOGINDISABLED"]
    assert offered(offers=WITH_TLS, secure=True) == [*before, "AUTH=PLAIN", "AUTH=LOGIN"]
    assert offered(offers=Offers(mechanisms=("XOAUTH2",)), secure=True) == [*before, "AUTH=XOAUTH2", "LOGINDISABLED"]
    assert offered(offers=Offers()) == [*before, "LOGINDISABLED"]
    assert offered(hide=frozenset(("IMAP4rev2", "ID"))) == [
        "IMAP4rev1",
        "SASL-IR",
        "LITERAL+",
        "ENABLE",
        "AUTH=PLAIN",
        "AUTH=LOGIN",
    ]


def test_capabilities_are_in_the_greeting_and_in_the_ok_of_login():
    """Some clients never ask."""
    made = caller(login=False, append_limit=1000, hide=frozenset(("MOVE", "APPENDLIMIT")))
    (greeting,) = responses(made.session.greet())
    assert greeting.code == ("CAPABILITY", responses(made.feed(b"t CAPABILITY\r\n"))[0].data)
    (answer,) = responses(made.feed(b"t LOGIN bob secret\r\n"))
    expected = ["IMAP4rev1", "IMAP4rev2", *(name for name in AFTER_LOGIN if name not in ("MOVE", "APPENDLIMIT"))]
    assert answer.code == ("CAPABILITY", expected)
    made = caller(append_limit=1000)
    assert "APPENDLIMIT=1000" in responses(made.feed(b"t CAPABILITY\r\n"))[0].data


def test_capabilities_of_an_account():
    made = caller(login=False)
    made.session.receive(b"t LOGIN bob secret\r\n")
    made.session.hide = frozenset(("CONDSTORE", "QRESYNC", "UTF8=ACCEPT"))
    assert b"CONDSTORE" not in made.run()
    assert responses(made.feed(b"t ENABLE QRESYNC UTF8=ACCEPT IMAP4rev2\r\n"))[0].data == ["IMAP4rev2"]
    assert not made.session.qresync and not made.session.utf8_accept and made.session.utf8


# Logins


def test_login():
    made = caller(login=False)
    assert made.feed(b"1 LOGIN {3}\r\n") == b"+ Ready for the literal\r\n"
    assert made.feed(b"bob {6}\r\n") == b"+ Ready for the literal\r\n"
    assert made.feed(b"secret\r\n").startswith(b"1 OK [CAPABILITY ")
    assert made.claims == [Password("bob", "secret")] and made.session.logged_in
    assert made.feed(b"1 LOGIN bob secret\r\n") == b"1 BAD Already logged in\r\n"


def test_login_by_authenticate():
    made = caller(login=False)
    assert made.feed(b"1 AUTHENTICATE PLAIN\r\n") == b"+ \r\n"
    assert made.feed(b"*\r\n") == b"1 BAD Authentication cancelled\r\n"
    assert made.feed(b"2 AUTHENTICATE PLAIN !!\r\n") == b"2 BAD Not base64\r\n"
    assert made.feed(b"3 AUTHENTICATE LOGIN\r\n") == b"+ VXNlcm5hbWU6\r\n"
    assert made.feed(b64encode(b"bob") + b"\r\n") == b"+ UGFzc3dvcmQ6\r\n"
    assert made.feed(b64encode(b"wrong") + b"\r\n").startswith(b"3 NO [AUTHENTICATIONFAILED] ")
    assert made.feed(b"4 AUTHENTICATE PLAIN " + plain() + b"\r\n5 NOOP\r\n").endswith(b"5 OK NOOP completed\r\n")
    assert made.session.logged_in and made.session.parser.limit == 65536


def test_long_and_malformed_responses_of_authenticate():
    made = caller(login=False)
    for line, text in ((b"x" * 20_000, b"Line too long"), (b"a\nb", b"Not base64"), (b"???", b"Not base64")):
        assert made.feed(b"t AUTHENTICATE PLAIN\r\n" + line + b"\r\n") == b"+ \r\nt BAD " + text + b"\r\n"
    assert made.feed(b"t NOOP\r\n").startswith(b"t OK")


def test_scram_proves_itself_to_the_client():
    mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
    salt, stored, server, iterations = mechanism.make_auth_info("pencil", 4096)
    found = scramp.ScramClient(["SCRAM-SHA-256"], "bob", "pencil")
    offers = Offers(mechanisms=("SCRAM-SHA-256",), clear=True)
    made = caller(offers, login=False, keys=lambda user: Keys(salt, stored, server, iterations))
    first = b64encode(found.get_client_first().encode())
    challenge = made.feed(b"t AUTHENTICATE SCRAM-SHA-256 " + first + b"\r\n")
    found.set_server_first(b64decode(challenge[2:]).decode())
    final = made.feed(b64encode(found.get_client_final().encode()) + b"\r\n")
    found.set_server_final(b64decode(final[2:]).decode())
    assert not made.session.logged_in
    assert made.feed(b"\r\n").startswith(b"t OK [CAPABILITY") and made.session.logged_in


def test_a_token_that_is_refused():
    made = caller(Offers(mechanisms=("XOAUTH2",), clear=True), login=False)
    token = b64encode(b"user=bob\1auth=Bearer x\1\1")
    assert made.feed(b"t AUTHENTICATE XOAUTH2 " + token + b"\r\n").startswith(b"+ ey")
    assert made.feed(b"\r\n").startswith(b"t NO [AUTHENTICATIONFAILED] ") and made.claims == [Token("bob", "x")]
    assert made.feed(b"t LOGIN bob secret\r\n").startswith(b"t NO [CANNOT] ")


def test_logins_that_are_temporarily_impossible():
    made = caller(login=False)
    made.login = lambda claim: reply.LOGIN_UNAVAILABLE
    assert made.feed(b"t LOGIN bob secret\r\n").startswith(b"t NO [UNAVAILABLE] Temporary")
    assert caller(Offers(), login=False).feed(b"t LOGIN a b\r\n").startswith(b"t NO [CANNOT] Logins are not")
    assert caller(Offers(mechanisms=("PLAIN",)), login=False).feed(b"t LOGIN a b\r\n").startswith(b"t NO [UNAVAILABLE] TLS")


def test_wrong_logins_close():
    made = caller(login=False)
    out = b"".join(made.feed(b"t LOGIN bob x\r\n") for _ in range(WRONG_LOGINS + 1))
    assert out.count(b"[AUTHENTICATIONFAILED]") == WRONG_LOGINS and out.endswith(b"* BYE Too many failed logins\r\n")
    assert made.session.closing


def test_pipelined_commands_wait_for_the_login():
    session = ServerSession("mx.example", CLEAR)
    assert not session.behind and not session.closing and session.state == COMMANDS
    assert session.receive(b"1 LOGIN bob secret\r\n2 NOOP\r\n3 NO") == b""
    assert session.state == CLAIMED and session.claim == Password("bob", "secret") and not session.behind
    assert session.receive(b"OP\r\n") == b""
    assert session.checked(reply.LOGGED_IN).startswith(b"1 OK ") and session.behind and session.state == COMMANDS
    assert session.receive(b"") == b"" and session.state == COMMAND and session.command.tag == "2"
    assert session.done("OK", "done") == b"2 OK done\r\n" and session.behind
    assert session.receive(b"") == b"" and session.command.tag == "3"
    for nothing in (session.checked(reply.LOGGED_IN), session.go_ahead(), session.refuse("x"), session.cancelled()):
        assert nothing == b""  # none of these is waited for
    session.tls_started()
    session.taken()
    assert session.state == COMMAND and not session.secure


# TLS


def test_starttls_forgets_what_was_said_before():
    made = caller(WITH_TLS, login=False)
    made.feed(b'1 ID ("name" "x")\r\n')
    assert made.session.client == {"name": "x"}
    assert made.session.receive(b"2 STARTTLS\r\n") == b"2 OK Begin TLS negotiation now\r\n" and made.session.state == TLS
    made.session.tls_started()
    assert made.session.secure and made.session.client == {} and made.session.state == COMMANDS
    assert made.feed(b"3 STARTTLS\r\n") == b"3 BAD TLS is already active\r\n"
    assert made.feed(b"4 LOGIN bob secret\r\n").startswith(b"4 OK")


def test_what_was_sent_in_the_clear_behind_starttls_is_not_executed():
    made = caller(WITH_TLS, login=False)
    out = made.feed(b"1 STARTTLS\r\n2 LOGIN bob secret\r\n")
    assert out.startswith(b"1 BAD Commands behind STARTTLS") and b"* BYE" in out and made.session.closing and not made.claims
    session = ServerSession("mx.example", WITH_TLS)
    session.receive(b"1 STARTTLS\r\n")
    session.keep(b"2 LOGIN bob secret\r\n")
    session.tls_started()
    assert session.receive(b"") == b"" and session.claim is None and not session.behind


# States


def test_a_mailbox_is_selected_and_is_not():
    made = caller()
    session = made.session
    made.feed(b"1 SELECT a\r\n")
    assert session.selected and not session.read_only and made.commands[-1] == ("1", "SELECT", Select("a"))
    made.feed(b"2 EXAMINE a\r\n")
    assert session.selected and session.read_only
    for line in (b"STORE 1 FLAGS x", b"EXPUNGE", b"MOVE 1 x", b"UID EXPUNGE 1", b"UID STORE 1 FLAGS x"):
        assert made.feed(b"3 " + line + b"\r\n") == b"3 NO [READ-ONLY] The mailbox is selected read-only\r\n"
    assert made.feed(b"3 COPY 1 x\r\n4 CREATE b\r\n5 CLOSE\r\n") == (
        b"3 OK COPY completed\r\n4 OK CREATE completed\r\n5 OK CLOSE completed\r\n"
    )
    assert not session.selected and session.errors == 0
    made.feed(b"6 SELECT a\r\n7 UNSELECT\r\n")
    assert not session.selected
    made.feed(b"8 SELECT a\r\n")
    made.execute = lambda command: made.session.done("NO", "No such mailbox", response.NONEXISTENT)
    assert made.feed(b"9 SELECT b\r\n") == b"9 NO [NONEXISTENT] No such mailbox\r\n" and not session.selected
    made.execute = lambda command: made.session.done("OK", "Selected", response.READ_ONLY)
    made.feed(b"1 SELECT a\r\n")
    assert session.selected and session.read_only
    session.unselected()
    assert made.feed(b"2 CHECK\r\n").startswith(NONE.replace(b"t", b"2"))


def test_what_the_caller_writes_and_how_a_command_ends():
    made = caller(selected=True)
    made.execute = lambda command: made.session.write(response.exists(3)) + made.session.failed()
    assert made.feed(b"1 NOOP\r\n") == b"* 3 EXISTS\r\n1 NO [SERVERBUG] Internal error; it has been logged\r\n"
    made.execute = lambda command: made.session.done("BAD", "no such message")
    assert made.feed(b"1 FETCH 9 UID\r\n") == b"1 BAD no such message\r\n" and made.session.errors == 1
    assert made.session.done("OK", "x") == b"" and made.session.failed() == b""
    made.session.close()
    assert made.session.write(b"x") == b"" and made.feed(b"1 NOOP\r\n") == b""


def test_enable():
    """`* ENABLED` comes even when it lists nothing (RFC 9051 7.2.1)."""
    made = caller()
    assert made.feed(b"1 ENABLE FOO\r\n") == b"* ENABLED\r\n1 OK Nothing to enable\r\n"
    assert made.feed(b"2 ENABLE condstore X CONDSTORE\r\n") == b"* ENABLED CONDSTORE\r\n2 OK Enabled\r\n"
    assert made.session.condstore and not made.session.qresync and not made.session.utf8
    made.feed(b"3 ENABLE QRESYNC UTF8=ACCEPT\r\n")
    assert made.session.qresync and made.session.utf8_accept and made.session.utf8 and not made.session.rev2
    made.feed(b"4 ENABLE IMAP4rev2\r\n")
    assert made.session.rev2


@pytest.mark.parametrize(
    "line",
    [b"SELECT a (CONDSTORE)", b"STATUS a (HIGHESTMODSEQ)", b"FETCH 1 MODSEQ", b"FETCH 1 UID (CHANGEDSINCE 1)",
     b"STORE 1 (UNCHANGEDSINCE 1) FLAGS x", b"SEARCH MODSEQ 1", b'LIST "" * RETURN (STATUS (HIGHESTMODSEQ))'],
)  # fmt: skip
def test_commands_that_enable_condstore(line):
    """RFC 7162 3.1."""
    made = caller(selected=True)
    made.feed(b"1 FETCH 1 UID\r\n2 SEARCH ALL\r\n3 STORE 1 FLAGS x\r\n")
    assert not made.session.condstore
    assert made.feed(b"4 " + line + b"\r\n").startswith(b"4 OK") and made.session.condstore


def test_names_are_in_modified_utf7_until_utf8_is_enabled():
    made = caller()
    made.feed(b"1 SELECT &APw-\r\n")
    assert made.feed('2 SELECT "ü"\r\n'.encode()).startswith(b"2 NO [CANNOT] ")
    made.feed(b"3 ENABLE IMAP4rev2\r\n")
    made.feed('4 SELECT "ü"\r\n5 SELECT &APw-\r\n'.encode())
    assert [one.arguments.name for one in made.commands] == ["ü", "ü", "&APw-"]


def test_an_error_says_what_was_expected_and_where():
    made = caller(selected=True)
    assert made.feed(b"tag FETCH foo FLAGS\r\n") == b'tag BAD expected a sequence set at "foo"\r\n'
    assert made.feed(b"tag\r\n") == b"tag BAD expected a space at the end\r\n"
    assert made.feed(b"\r\n") == b"* BAD expected a tag at the end\r\n"
    assert made.feed(b"+ NOOP\r\n") == b'* BAD expected a tag without "+" at "+"\r\n'
    assert made.feed(b'x LOGIN "a\r\n').startswith(b"x BAD expected a quotation mark")
    assert made.feed(b"\xff LOGIN\r\n") == b'* BAD expected a tag at "\\xff"\r\n'


def test_tags_may_be_used_again_and_commands_are_in_any_case():
    made = caller()
    assert made.feed(b"A noop\r\nA NoOp\r\n") == b"A OK NOOP completed\r\n" * 2


def test_twenty_errors_close():
    made = caller(selected=True)
    made.execute = lambda command: made.session.done("NO", "not now")
    out = made.feed(b"1 FETCH 99 UID\r\n" * 100 + b"2 FOO\r\n" * ERRORS + b"3 NOOP\r\n")
    assert out.count(b"\r\n") == 100 + ERRORS + 1 and out.endswith(b"* BYE Too many errors\r\n") and made.session.closing


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1", b"Host: mx.example", b"SSH-2.0-x", b"POST /" + b"x" * 20_000, b"GET /\x01"])
def test_another_protocol(line):
    made = caller(login=False)
    assert made.feed(line + b"\r\n1 LOGIN bob secret\r\n") == b"* BYE This is an IMAP server, and that was not IMAP\r\n"
    assert made.session.foreign and made.session.closing and not made.claims
    assert caller().feed(line + b"\r\n").count(b" BAD ") == 1, "after a login nothing is taken for another protocol"


def test_tags_that_look_like_another_protocol():
    made = caller(login=False)
    assert made.feed(b"GET NOOP\r\nx: NOOP\r\nMOVE LOGIN {3+}\r\nbob secret\r\n").count(b" OK ") == 3


def test_id():
    made = caller()
    assert made.feed(b'1 ID ("name" "x" "os" NIL)\r\n') == b'* ID ("name" "relaymta")\r\n1 OK Pleased to meet you\r\n'
    assert made.session.client == {"name": "x", "os": None}


# IDLE


@pytest.mark.parametrize("done", [b"DONE", b"done", b"Done"])
def test_idle_in_one_packet(done):
    """RFC 9051 6.3.13."""
    made = caller(selected=True)
    news = lambda command: made.session.write(response.exists(5)) + made.session.done("OK", "x")  # noqa: E731
    made.execute = news
    assert made.feed(b"1 IDLE\r\n" + done + b"\r\n2 CHECK\r\n") == (
        b"+ idling\r\n* 5 EXISTS\r\n1 OK x\r\n* 5 EXISTS\r\n2 OK x\r\n"
    )
    assert made.commands == [("1", "IDLE", Nothing()), ("2", "CHECK", Nothing())]


def test_idle_is_open_until_done():
    session = caller(selected=True).session
    assert session.receive(b"1 IDLE\r\n") == b"+ idling\r\n" and session.state == IDLE
    assert session.write(response.expunge(3)) == b"* 3 EXPUNGE\r\n"
    assert session.receive(b"DO") == b"" and session.state == IDLE
    assert session.receive(b"NE\r\n2 NOOP\r\n") == b"" and session.state == COMMAND and session.command.name == "IDLE"
    assert session.done("OK", "Done") == b"1 OK Done\r\n" and session.behind


@pytest.mark.parametrize(
    "line",
    [b"2 EXPUNGE", b"", b"DONE ", b"DONE x", b"(DONE)", b'"DONE"', b"2 APPEND x {4+}\r\nDONE", b"2 APPEND x {5}", b"x" * 70_000,
     b"\x00DONE", b"{4+}\r\nDONE"],
)  # fmt: skip
def test_another_command_in_idle(line):
    """The IDLE ends BAD, the line is not executed, the session goes on (wildduck 684)."""
    made = caller(selected=True)
    out = made.feed(b"1 IDLE\r\n" + line + b"\r\n3 NOOP\r\n")
    assert out == b"+ idling\r\n1 BAD expected DONE\r\n3 OK NOOP completed\r\n"
    assert [one.name for one in made.commands] == ["NOOP"] and not made.messages


# Dialogues of the RFCs (what the server does with its mailboxes is the caller's)


def test_rfc_9051_example():
    """Section 8."""
    made = caller(login=False)
    assert made.feed(b"a001 login bob secret\r\n").startswith(b"a001 OK ")
    made.execute = lambda command: _EXAMPLE[command.name](made.session, command)
    assert made.feed(b"a002 select inbox\r\n").endswith(b"a002 OK [READ-WRITE] SELECT completed\r\n")
    assert b"* 12 FETCH (FLAGS (\\Seen) RFC822.SIZE 4286" in made.feed(b"a003 fetch 12 full\r\n")
    assert b"* 12 FETCH (BODY[HEADER] {5}\r\nabc\r\n)\r\na004" in made.feed(b"a004 fetch 12 body[header]\r\n")
    assert made.feed(b"a005 store 12 +flags \\deleted\r\n") == (
        b"* 12 FETCH (FLAGS (\\Seen \\Deleted))\r\na005 OK +FLAGS completed\r\n"
    )
    assert made.feed(b"a006 logout\r\n") == b"* BYE Logging out\r\na006 OK Bye\r\n"


def _select(session, command):
    told = [response.exists(18), response.flags(["\\Seen"]), response.recent(2)]
    told.append(response.untagged("OK", "UIDs valid", response.uidvalidity(3857529045)))
    return session.write(b"".join(told)) + session.done("OK", "SELECT completed", response.READ_WRITE)


def _fetch(session, command):
    arguments = command.arguments
    items = [response.flags_item(["\\Seen"]), b"RFC822.SIZE 4286"] if arguments.items else []
    items += [response.section(one) + b" " + response.data(b"abc\r\n") for one in arguments.sections]
    return session.write(response.fetch(arguments.numbers.ranges[0][0], items)) + session.done("OK", "FETCH completed")


def _store(session, command):
    told = response.fetch(12, [response.flags_item(["\\Seen", *command.arguments.flags])])
    return session.write(told) + session.done("OK", f"{command.arguments.how}FLAGS completed")


_EXAMPLE = {"SELECT": _select, "FETCH": _fetch, "STORE": _store}


def test_ten_pipelined_fetches_of_slices():
    """The text of a part that ends before the slice is "", never {0} (swift-nio-imap 850)."""
    made = caller(selected=True)

    def execute(command):
        (asked,) = command.arguments.sections
        octets = (b"x" * 500_000)[asked.partial[0] : sum(asked.partial)]
        told = response.fetch(1, [b"UID 1", response.section(asked) + b" " + response.data(octets)])
        return made.session.write(told) + made.session.done("OK", "done")

    made.execute = execute
    lines = [b"%d UID FETCH 1 BODY.PEEK[1]<%d.393216>\r\n" % (number, number * 393216) for number in range(10)]
    found = responses(made.feed(b"".join(lines)))
    assert [one.tag for one in found if one.tag != "*"] == [str(number) for number in range(10)]
    assert found[4].data == {"UID": 1, "BODY[1]<786432>": b""} and len(found[0].data["BODY[1]<0>"]) == 393216
