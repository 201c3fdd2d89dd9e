"""The POP3 session in dialogues: commands and replies, in one piece and octet by octet."""

import re
from base64 import b64decode, b64encode

import pytest
import scramp

from relaymta.proto import pop3_reply, reply
from relaymta.proto.access_session import ERRORS
from relaymta.proto.pop3_server import Offers, ServerSession
from relaymta.proto.pop3_session import CLAIMED, COMMANDS, COMMITTING, SENDING, TLS
from relaymta.proto.pop3_verbs import VERBS
from relaymta.proto.sasl import Keys, Password, Token
from relaymta.proto.session import WRONG_LOGINS
from tests.support.pop3 import CLEAR, LOGIN, Caller, Mailbox, caller

WITH_TLS = Offers(starttls=True, mechanisms=("PLAIN", "LOGIN"))
MESSAGE = b"Subject: a\r\n\r\none\r\ntwo\r\n"  # 24 octets
ONE, TWO = b"a" * 118 + b"\r\n", b"b" * 198 + b"\r\n"  # as in the examples of RFC 1939


def talk(data: bytes, *messages: bytes, step: int = 0, **options) -> bytes:
    """The replies of a dialogue, `step` octets at a time."""
    made = caller(*messages, login=False, **options)
    return b"".join(made.feed(data[start : start + (step or len(data))]) for start in range(0, len(data), step or len(data)))


def plain(user: str = "bob", password: str = "secret") -> bytes:
    return b64encode(f"\0{user}\0{password}".encode())


# Every command in every state: what the reply begins with.
FIRST, AGAIN = b"-ERR Log in first", b"-ERR Already logged in"
FEW, MANY, BAD, NONE = b"-ERR An argument is missing", b"-ERR Too many arguments", b"-ERR Bad argument", b"-ERR No such message"
TABLE = {  # in the clear without logins, in the clear, over TLS, logged in
    b"USER bob": (b"-ERR Encryption required", b"+OK Send PASS", b"+OK Send PASS", AGAIN),
    b"USER": (FEW, FEW, FEW, AGAIN),
    b"PASS secret": (b"-ERR Encryption required", b"-ERR Say USER", b"-ERR Say USER", AGAIN),
    b"AUTH LOGIN": (b"-ERR Encryption required", b"+ VXNlcm5hbWU6\r\n", b"+ VXNlcm5hbWU6\r\n", AGAIN),
    b"AUTH PLAIN": (b"-ERR Encryption required", b"+ \r\n", b"+ \r\n", AGAIN),
    b"AUTH X": (b"-ERR Encryption required", b"-ERR Authentication", b"-ERR Authentication", AGAIN),
    b"AUTH": (FEW, FEW, FEW, AGAIN),
    b"AUTH PLAIN a b": (MANY, MANY, MANY, AGAIN),
    b"APOP bob 1": (b"-ERR Unknown command", b"-ERR Unknown", b"-ERR Unknown", b"-ERR Unknown"),
    b"LANG": (b"-ERR Unknown command", b"-ERR Unknown", b"-ERR Unknown", b"-ERR Unknown"),
    b"STLS": (b"+OK Begin TLS", b"-ERR STLS is not", b"-ERR TLS is already", AGAIN),
    b"STLS x": (MANY, MANY, MANY, AGAIN),
    b"UTF8": (b"+OK UTF-8 enabled", b"+OK UTF-8", b"+OK UTF-8", AGAIN),
    b"CAPA": (b"+OK Capability list", b"+OK Capability", b"+OK Capability", b"+OK Capability"),
    b"CAPA x": (MANY, MANY, MANY, MANY),
    b"QUIT": (b"+OK Bye", b"+OK Bye", b"+OK Bye", b"+OK Bye"),
    b"STAT": (FIRST, FIRST, FIRST, b"+OK 1 24\r\n"),
    b"LIST": (FIRST, FIRST, FIRST, b"+OK 1 message (24 octets)\r\n1 24"),
    b"LIST 1": (FIRST, FIRST, FIRST, b"+OK 1 24\r\n"),
    b"LIST 1 2": (FIRST, FIRST, FIRST, MANY),
    b"UIDL": (FIRST, FIRST, FIRST, b"+OK 1 message\r\n1 7.10\r\n.\r\n"),
    b"UIDL 1": (FIRST, FIRST, FIRST, b"+OK 1 7.10\r\n"),
    b"UIDL x": (FIRST, FIRST, FIRST, BAD),
    b"RETR 1": (FIRST, FIRST, FIRST, b"+OK 24 octets\r\nSubject"),
    b"RETR": (FIRST, FIRST, FIRST, FEW),
    b"RETR 2": (FIRST, FIRST, FIRST, b"-ERR No such message; there are 1"),
    b"RETR 0": (FIRST, FIRST, FIRST, NONE),
    b"RETR -1": (FIRST, FIRST, FIRST, BAD),
    b"RETR " + b"1" * 200: (FIRST, FIRST, FIRST, NONE),
    b"TOP 1 1": (FIRST, FIRST, FIRST, b"+OK Top of the message"),
    b"TOP 1": (FIRST, FIRST, FIRST, FEW),
    b"TOP 1 -1": (FIRST, FIRST, FIRST, BAD),
    b"TOP 2 1": (FIRST, FIRST, FIRST, NONE),
    b"DELE 1": (FIRST, FIRST, FIRST, b"+OK Message 1 deleted"),
    b"DELE": (FIRST, FIRST, FIRST, FEW),
    b"DELE 2": (FIRST, FIRST, FIRST, NONE),
    b"RSET": (FIRST, FIRST, FIRST, b"+OK 1 message (24 octets)"),
    b"RSET x": (FIRST, FIRST, FIRST, MANY),
    b"NOOP": (FIRST, FIRST, FIRST, b"+OK Nothing done"),
    b"": (b"-ERR Unknown command", b"-ERR Unknown", b"-ERR Unknown", b"-ERR Unknown command"),
    b" NOOP": (b"-ERR Unknown command", b"-ERR Unknown", b"-ERR Unknown", b"-ERR Unknown command"),
    b"LIST\xc3\xbc": (b"-ERR Octets beyond ASCII", b"-ERR Octets beyond", b"-ERR Octets beyond", b"-ERR Octets beyond ASCII"),
    b"RETR 1\x00": (b"-ERR NUL in a command", b"-ERR NUL", b"-ERR NUL", b"-ERR NUL in a command"),
    b"RETR 1\nNOOP": (b"-ERR Bare CR or LF", b"-ERR Bare CR", b"-ERR Bare CR", b"-ERR Bare CR or LF"),
    b"RETR 1\rNOOP": (b"-ERR Bare CR or LF", b"-ERR Bare CR", b"-ERR Bare CR", b"-ERR Bare CR or LF"),
}
STATES = [
    {"offers": WITH_TLS, "login": False},
    {"offers": CLEAR, "login": False},
    {"offers": WITH_TLS, "secure": True, "login": False},
    {"offers": CLEAR},
]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("command", TABLE, ids=lambda command: command[:20].decode("latin-1") or "empty")
def test_every_command_in_every_state(command, step):
    for options, expected in zip(STATES, TABLE[command], strict=True):
        for line in (command, command.swapcase()):
            made = caller(MESSAGE, **options)
            octets = line + b"\r\n"
            pieces = [octets[at : at + (step or len(octets))] for at in range(0, len(octets), step or len(octets))]
            out = b"".join(map(made.feed, pieces))
            assert out.startswith(expected) and out.endswith(b"\r\n"), (options, line)
            assert made.session.errors == (out.startswith(b"-ERR") and b"No such message" not in out)


def test_the_table_has_every_command():
    assert {line.split(b" ")[0] for line in TABLE} >= set(VERBS)


# Dialogues of the RFCs


def test_rfc_1939_example():
    made = caller(ONE, TWO, login=False)
    assert made.feed(b"USER bob\r\n") == b"+OK Send PASS\r\n"
    assert made.feed(b"PASS secret\r\n") == b"+OK 2 messages (320 octets)\r\n"
    assert made.feed(b"STAT\r\n") == b"+OK 2 320\r\n"
    assert made.feed(b"LIST\r\n") == b"+OK 2 messages (320 octets)\r\n1 120\r\n2 200\r\n.\r\n"
    assert made.feed(b"LIST 2\r\n") == b"+OK 2 200\r\n"
    assert made.feed(b"LIST 3\r\n").startswith(b"-ERR No such message")
    for number, message in (b"1", ONE), (b"2", TWO):
        assert made.feed(b"RETR " + number + b"\r\n") == b"+OK %d octets\r\n%b.\r\n" % (len(message), message)
        assert made.feed(b"DELE " + number + b"\r\n") == b"+OK Message " + number + b" deleted\r\n"
    assert made.feed(b"DELE 2\r\n") == b"-ERR Message 2 has been deleted\r\n"
    assert made.feed(b"LIST\r\n") == b"+OK 0 messages (0 octets)\r\n.\r\n"
    assert made.feed(b"QUIT\r\n") == b"+OK 2 messages deleted; bye\r\n"
    assert made.session.closing and not made.mailbox.messages and made.mailbox.seen == {10, 20}


def test_rfc_1939_empty_maildrop():
    assert talk(LOGIN + b"STAT\r\nLIST\r\nUIDL\r\nQUIT\r\n") == (
        b"+OK Send PASS\r\n+OK 0 messages (0 octets)\r\n+OK 0 0\r\n"
        b"+OK 0 messages (0 octets)\r\n.\r\n+OK 0 messages\r\n.\r\n+OK Bye\r\n"
    )


def test_rfc_1939_top():
    ok = b"+OK Top of the message follows\r\nA: b\r\n\r\n"
    for piece in range(1, 22):
        made = caller(b"A: b\r\n\r\n1\r\n.2\r\n3\r\n", piece=piece)
        assert made.feed(b"TOP 1 0\r\n") == ok + b".\r\n"
        assert made.feed(b"TOP 1 2\r\n") == ok + b"1\r\n..2\r\n.\r\n"
        assert made.feed(b"TOP 1 10\r\n") == ok + b"1\r\n..2\r\n3\r\n.\r\n"
        assert made.feed(b"TOP 100 3\r\n").startswith(b"-ERR ")
        assert not made.session.maildrop.retrieved


def test_rfc_2449_capabilities():
    always = {b"TOP", b"UIDL", b"RESP-CODES", b"AUTH-RESP-CODE", b"PIPELINING", b"EXPIRE NEVER", b"IMPLEMENTATION relaymta"}
    login = {b"SASL PLAIN LOGIN", b"USER", b"UTF8 USER"}
    tokens = Offers(mechanisms=("OAUTHBEARER",), clear=True)
    forced = Offers(starttls=True, tls_needed=True, mechanisms=("PLAIN", "LOGIN"), clear=True)

    def capabilities(made: Caller) -> set[bytes]:
        first, *lines, dot, end = made.feed(b"CAPA\r\n").split(b"\r\n")
        assert (first[:3], dot, end) == (b"+OK", b".", b"") and len(set(lines)) == len(lines)
        return set(lines) - always if always <= set(lines) else set()

    assert capabilities(caller(offers=WITH_TLS, login=False)) == {b"STLS", b"UTF8"}
    assert capabilities(caller(offers=forced, login=False)) == {b"STLS", b"UTF8"}
    assert capabilities(caller(offers=WITH_TLS, secure=True, login=False)) == login
    assert capabilities(caller(offers=WITH_TLS, secure=True)) == login
    assert capabilities(caller(offers=CLEAR, login=False)) == login
    both = Offers(starttls=True, mechanisms=("PLAIN", "LOGIN"), clear=True)
    assert capabilities(caller(offers=both, login=False)) == login | {b"STLS"}
    assert capabilities(caller(offers=both)) == login
    assert capabilities(caller(offers=tokens, login=False)) == {b"SASL OAUTHBEARER", b"UTF8"}
    assert capabilities(caller(offers=Offers(starttls=True), login=False)) == {b"STLS", b"UTF8"}


def test_rfc_2595_stls():
    made = caller(offers=WITH_TLS, login=False)
    assert made.session.receive(b"UTF8\r\nSTLS\r\n").endswith(b"+OK Begin TLS negotiation now\r\n")
    assert made.session.state == TLS
    assert made.session.receive(b"USER mallory\r\n") == b""  # in the clear, while the handshake begins
    made.session.tls_started()
    assert (made.session.secure, made.session.utf8, made.session.waiting(), made.session.behind) == (True, False, 0, False)
    assert made.feed(b"PASS secret\r\n") == b"-ERR Say USER first\r\n"
    assert b"STLS" not in made.feed(b"CAPA\r\n")
    assert made.feed(LOGIN).endswith(b"+OK 0 messages (0 octets)\r\n")


def test_rfc_2595_command_injection():
    made = caller(offers=WITH_TLS, login=False)
    assert made.feed(b"STLS\r\nUSER mallory\r\n") == pop3_reply.TALKING_EARLY
    assert made.session.closing and made.feed(b"CAPA\r\n") == b""


def test_stls_forgets_the_user():
    made = caller(offers=Offers(starttls=True, mechanisms=("PLAIN",), clear=True), login=False)
    assert made.feed(b"USER bob\r\n") == pop3_reply.SEND_PASSWORD
    assert made.feed(b"STLS\r\n") == pop3_reply.START_TLS
    assert made.feed(b"PASS secret\r\n") == pop3_reply.NEED_USER


def test_rfc_3206_codes():
    made = caller(login=False)
    wrong = b"-ERR [AUTH] Authentication credentials invalid\r\n"
    for user in b"bob", b"nobody":  # the same for a wrong password and an unknown user
        assert made.feed(b"USER " + user + b"\r\nPASS wrong\r\n") == pop3_reply.SEND_PASSWORD + wrong
    made.login = lambda claim: reply.TOO_MANY_LOGINS
    assert made.feed(LOGIN).endswith(b"-ERR [SYS/TEMP] Too many failed logins (limit login_failures); try again later\r\n")
    made = caller(login=False)
    made.mailbox.session = "another"
    assert made.feed(LOGIN).endswith(b"-ERR [IN-USE] The maildrop is in use by another session\r\n")
    assert made.feed(b"STAT\r\n") == pop3_reply.NOT_LOGGED_IN
    assert made.feed(b"AUTH PLAIN =\r\n") == b"-ERR Malformed authentication response\r\n" and not made.session.closing
    made.mailbox.session = None
    assert made.feed(LOGIN).endswith(b"+OK 0 messages (0 octets)\r\n")


def test_rfc_5034_auth():
    ok = b"+OK 0 messages (0 octets)\r\n"
    assert talk(b"AUTH PLAIN " + plain() + b"\r\n") == ok
    assert talk(b"auth plain\r\n" + plain() + b"\r\nSTAT\r\n") == b"+ \r\n" + ok + b"+OK 0 0\r\n"
    assert talk(b"AUTH LOGIN\r\nYm9i\r\nc2VjcmV0\r\n") == b"+ VXNlcm5hbWU6\r\n+ UGFzc3dvcmQ6\r\n" + ok
    assert talk(b"AUTH PLAIN\r\n*\r\n" + LOGIN).endswith(b"-ERR Authentication cancelled\r\n+OK Send PASS\r\n" + ok)
    assert talk(b"AUTH PLAIN =\r\n") == b"-ERR Malformed authentication response\r\n"
    assert talk(b"AUTH PLAIN\r\n!!!\r\n" + LOGIN).endswith(b"-ERR Not base64\r\n+OK Send PASS\r\n" + ok)


def test_a_long_response_and_a_longer_one():
    made = caller(login=False)
    longest = plain("bob", "x" * (12288 // 4 * 3 - 5))
    assert len(longest) == 12288
    assert made.feed(b"AUTH PLAIN\r\n" + longest + b"\r\n") == b"+ \r\n-ERR [AUTH] Authentication credentials invalid\r\n"
    assert made.feed(b"AUTH PLAIN " + longest[:8000] + b"\r\n").startswith(b"-ERR [AUTH]")
    assert made.feed(b"AUTH PLAIN\r\n" + longest + b"x\r\n" + LOGIN).startswith(
        b"+ \r\n" + pop3_reply.LINE_TOO_LONG + b"+OK Send"
    )
    assert made.session.maildrop is not None


def test_user_and_pass_make_the_claim_of_plain():
    claims = []
    for data in b"USER j\xc3\xbcrg\r\nPASS two  w\xc3\xb6rds \r\n", b"AUTH PLAIN " + plain("jürg", "two  wörds ") + b"\r\n":
        made = caller(login=False)
        made.feed(data)
        claims += made.claims
    assert claims == [Password("jürg", "two  wörds ")] * 2


def test_names_and_passwords_that_are_not_utf8():
    assert talk(b"USER \xff\r\n") == pop3_reply.NOT_UTF8
    assert talk(b"USER bob\r\nPASS \xff\r\nPASS secret\r\n").endswith(pop3_reply.NOT_UTF8 + pop3_reply.NEED_USER)


@pytest.mark.parametrize("between", [b"USER \xff", b"AUTH PLAIN\r\n*", b"PASS wrong"])
def test_pass_follows_user(between):
    assert talk(b"USER bob\r\n" + between + b"\r\nPASS secret\r\n").endswith(pop3_reply.NEED_USER)


def test_the_tenth_message():
    made = caller(*[MESSAGE] * 10)
    assert made.feed(b"LIST 10\r\nLIST 0010\r\nLIST 11\r\n") == b"+OK 10 24\r\n" * 2 + b"-ERR No such message; there are 10\r\n"


def test_logins_that_are_not_offered():
    assert talk(LOGIN, offers=Offers(clear=True)) == pop3_reply.NO_LOGINS * 2
    assert talk(b"USER bob\r\n", offers=Offers(mechanisms=("OAUTHBEARER",), clear=True)) == pop3_reply.NO_PASSWORDS
    no_certificate = Offers(tls_needed=True, mechanisms=("PLAIN",), clear=True)
    assert talk(b"USER bob\r\nAUTH PLAIN\r\n", offers=no_certificate) == pop3_reply.TLS_UNAVAILABLE * 2


def scram_dialogue(last: bytes):
    """The session after SCRAM-SHA-256, with `last` as the response to the server's proof; and its replies to that."""
    mechanism = scramp.ScramMechanism("SCRAM-SHA-256")
    salt, stored, server, count = mechanism.make_auth_info("secret", iteration_count=4096)
    offers = Offers(mechanisms=("SCRAM-SHA-256",), clear=True)
    made = Caller(ServerSession("mx.example", offers, lambda user: Keys(salt, stored, server, count)), Mailbox(MESSAGE))
    client = scramp.ScramClient(["SCRAM-SHA-256"], "bob", "secret")
    first = made.feed(b"AUTH SCRAM-SHA-256 " + b64encode(client.get_client_first().encode()) + b"\r\n")
    assert first.startswith(b"+ ")
    client.set_server_first(b64decode(first[2:]).decode())
    final = made.feed(b64encode(client.get_client_final().encode()) + b"\r\n")
    client.set_server_final(b64decode(final[2:]).decode())
    assert made.claims[0].good and made.session.maildrop is None
    return made, made.feed(last)


def test_scram():
    assert scram_dialogue(b"\r\n")[1] == b"+OK 1 message (24 octets)\r\n"


@pytest.mark.parametrize("last", [b"*\r\n", b"eA==\r\n", b"a\0\r\n", b"a" * 20000 + b"\r\n"])
def test_scram_whose_proof_the_client_rejects_is_no_login(last):
    made, out = scram_dialogue(last)
    assert out.startswith(b"-ERR ") and made.session.closing and made.session.maildrop is None


def test_a_bearer_token_that_is_refused():
    made = caller(offers=Offers(mechanisms=("XOAUTH2",), clear=True), login=False)
    token = b64encode(b"user=bob\1auth=Bearer abc\1\1")
    assert made.feed(b"AUTH XOAUTH2 " + token + b"\r\n").startswith(b"+ ")
    assert made.claims == [Token("bob", "abc")]
    assert made.feed(b"\r\n") == b"-ERR [AUTH] Authentication credentials invalid\r\n"


def test_wrong_logins_are_bounded():
    made = caller(login=False)
    out = made.feed(b"USER bob\r\nPASS wrong\r\n" * 10)
    assert made.session.closing and len(made.claims) == WRONG_LOGINS and out.endswith(pop3_reply.TOO_MANY_WRONG)


def test_passwords_are_told_nobody():
    made = caller(login=False)
    out = made.session.receive(b"USER bob\r\nPASS hunter2\r\nPASS hunter2\r\n")
    assert made.session.state == CLAIMED
    assert b"hunter2" not in out and "hunter2" not in repr(made.session) and "hunter2" not in str(made.session)
    assert b"hunter2" not in made.run()
    assert made.session.claim is None and made.session.name is None


# Case 15: what other servers got wrong


def test_case_15_deleted_messages_are_omitted():
    made = caller(*[MESSAGE] * 3)
    assert made.feed(b"DELE 2\r\n") == b"+OK Message 2 deleted\r\n"
    assert made.feed(b"LIST\r\n") == b"+OK 2 messages (48 octets)\r\n1 24\r\n3 24\r\n.\r\n"
    assert made.feed(b"UIDL\r\n") == b"+OK 2 messages\r\n1 7.10\r\n3 7.30\r\n.\r\n"
    assert made.feed(b"STAT\r\n") == b"+OK 2 48\r\n"
    assert made.feed(b"UIDL 3\r\n") == b"+OK 3 7.30\r\n"
    for command in b"RETR 2", b"DELE 2", b"LIST 2", b"UIDL 2", b"TOP 2 0":
        assert made.feed(command + b"\r\n") == b"-ERR Message 2 has been deleted\r\n"
    assert made.feed(b"RSET\r\n") == b"+OK 3 messages (72 octets)\r\n"
    assert made.feed(b"RETR 2\r\n").startswith(b"+OK 24 octets\r\n")


@pytest.mark.parametrize("end", ["cut", "cut within a message", "errors"])
def test_case_15_nothing_is_deleted_without_quit(end):
    made = caller(*[MESSAGE] * 3)
    made.feed(b"RETR 1\r\nDELE 1\r\nDELE 2\r\n")
    if end == "errors":
        made.feed(b"WHAT\r\n" * ERRORS)
    elif end == "cut within a message":
        made.session.receive(b"RETR 3\r\nQUIT\r\n")
        made.session.piece(MESSAGE[:5])
    made.drop()
    assert made.session.closing and made.session.deletions == () and made.session.state == COMMANDS
    assert len(made.mailbox.messages) == 3 and made.mailbox.seen == {10}


def test_case_15_a_message_that_another_client_has_expunged():
    made = caller(*[MESSAGE] * 3)
    del made.mailbox.messages[20]
    assert made.feed(b"RETR 2\r\n") == b"-ERR This message has been deleted by another client\r\n"
    assert made.feed(b"TOP 2 1\r\n").startswith(b"-ERR ")
    assert made.feed(b"LIST 2\r\n") == b"+OK 2 24\r\n"  # numbers and sizes are those at login
    assert made.feed(b"DELE 1\r\nDELE 2\r\nDELE 3\r\nQUIT\r\n").endswith(b"+OK 3 messages deleted; bye\r\n")
    assert made.mailbox.messages == {} and made.session.errors == 0


def test_case_15_lines_that_begin_with_dots():
    message = b".\r\n..\r\n.a\r\n\r\n.\r\n...\r\n"
    made = caller(message)
    assert made.feed(b"LIST 1\r\n") == b"+OK 1 %d\r\n" % len(message)  # before dot-stuffing
    assert made.feed(b"RETR 1\r\n") == b"+OK 21 octets\r\n..\r\n...\r\n..a\r\n\r\n..\r\n....\r\n.\r\n"


def test_case_15_a_unique_id_never_comes_back():
    made = caller(*[MESSAGE] * 3)
    first = made.feed(b"UIDL\r\n")
    made.feed(b"DELE 2\r\nQUIT\r\n")
    made.mailbox.messages[40] = MESSAGE  # UIDNEXT never goes back
    again = Caller(ServerSession("mx.example", CLEAR), made.mailbox)
    assert again.feed(LOGIN + b"UIDL\r\n").endswith(b"1 7.10\r\n2 7.30\r\n3 7.40\r\n.\r\n")
    again.drop()
    made.mailbox.uidvalidity = 8  # made anew: UIDs begin again
    other = Caller(ServerSession("mx.example", CLEAR), made.mailbox)
    ids = other.feed(LOGIN + b"UIDL\r\n").split(b"\r\n")[3:-2]
    assert len(ids) == 3 and not {one.split(b" ")[1] for one in ids} & set(re.findall(rb"7\.\d+", first))


def test_quit_says_what_was_not_removed():
    made = caller(*[MESSAGE] * 3)
    made.mailbox.stuck = {20}
    assert made.feed(b"DELE 1\r\nDELE 2\r\nQUIT\r\n").endswith(pop3_reply.NOT_REMOVED)
    assert made.session.closing and list(made.mailbox.messages) == [20, 30]


def test_deletions_are_there_while_they_are_carried_out_only():
    made = caller(*[MESSAGE] * 3)
    session = made.session
    assert session.receive(b"DELE 3\r\nDELE 1\r\n").count(b"+OK") == 2 and session.deletions == ()
    assert session.receive(b"QUIT\r\nNOOP\r\n") == b"" and session.state == COMMITTING and session.deletions == (10, 30)
    assert session.committed(0) == b"+OK 2 messages deleted; bye\r\n"
    assert (session.deletions, session.closing, session.committed(0), session.receive(b"NOOP\r\n")) == ((), True, b"", b"")


def test_a_connection_that_is_lost_during_quit():
    made = caller(MESSAGE)
    made.session.receive(b"DELE 1\r\nQUIT\r\n")
    made.session.close()
    assert made.session.deletions == (10,) and made.session.committed(0) == b""
    assert made.session.state == COMMANDS and made.session.deletions == (), "it is not carried out again"


def test_an_end_of_quit_that_nobody_has_asked_for():
    made = caller(MESSAGE)
    assert made.session.committed(0) == b"" and not made.session.closing


# Messages


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (b"", b".\r\n"),
        (b"a", b"a\r\n.\r\n"),
        (b"a\r", b"a\r\r\n.\r\n"),
        (b"a\n", b"a\n\r\n.\r\n"),
        (b"a\r\n", b"a\r\n.\r\n"),
        (b".", b"..\r\n.\r\n"),
        (b"a\r\n.\r\n.", b"a\r\n..\r\n..\r\n.\r\n"),
        (b"a\n.\n", b"a\n..\n\r\n.\r\n"),  # no client that ends lines at LF sees an end here
    ],
)
def test_a_message_always_ends(message, sent):
    for piece in range(1, 9):
        made = caller(message, piece=piece)
        assert made.feed(b"RETR 1\r\n") == b"+OK %d octets\r\n" % len(message) + sent


def test_top_reads_no_more_than_it_needs():
    made = caller(b"A: b\r\n\r\n" + b"line\r\n" * 100_000, piece=1000)
    assert made.feed(b"TOP 1 300\r\n").count(b"line\r\n") == 300 and made.octets_read == 2000
    made = caller(b"A: b\r\n" * 2000, piece=1000)  # a header alone
    assert made.feed(b"TOP 1 0\r\n").count(b"A: b\r\n") == 2000


def test_a_message_that_cannot_be_read():
    made = caller(MESSAGE, MESSAGE)
    made.mailbox.unreadable = {10}
    assert made.feed(b"RETR 1\r\nRETR 2\r\n").startswith(pop3_reply.MESSAGE_UNAVAILABLE + b"+OK 24 octets\r\n")
    assert made.session.maildrop.retrieved == {20}


def test_a_message_that_breaks_off_has_no_end():
    made = caller(MESSAGE)
    session = made.session
    session.receive(b"RETR 1\r\nNOOP\r\n")
    assert session.state == SENDING and session.wanted.uid == 10
    assert session.piece(MESSAGE[:9]) == b"+OK 24 octets\r\nSubject: "
    assert (session.refused(), session.closing, session.maildrop.retrieved) == (b"", True, set())
    assert (session.piece(b"a"), session.sent(), session.receive(b"NOOP\r\n")) == (b"", b"", b"")
