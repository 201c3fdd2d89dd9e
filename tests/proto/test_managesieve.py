"""The server side of ManageSieve: dialogues, input in any pieces, hostile input, bounds."""

import base64
import hashlib
import hmac
import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.proto import managesieve_reply as reply
from relaymta.proto import reply as smtp
from relaymta.proto import sasl
from relaymta.proto.access_session import ERRORS, KEPT
from relaymta.proto.managesieve_grammar import Broken, Command, Reader, String, Word
from relaymta.proto.managesieve_server import AFTER_LOGIN, ASKED, BEFORE_LOGIN, CLAIMED, TLS, Asked, Listed, Offers, ServerSession
from relaymta.proto.sieve import EXTENSIONS

CLEAR = Offers(mechanisms=("SCRAM-SHA-256", "PLAIN", "LOGIN"), clear=True)
LOGIN = b'AUTHENTICATE "PLAIN" "%b"\r\n' % base64.b64encode(b"\0bob\0secret")


class Caller:
    """Does what a session's state requires, at once, with scripts that are a dictionary. `asked`: all that was asked."""

    def __init__(self, offers: Offers = CLEAR, secure: bool = False, keys=None, login: bool = True) -> None:
        self.session = ServerSession("mx.example", offers, *([keys] if keys else []), secure=secure)
        self.scripts: dict[str, bytes] = {}
        self.active = ""
        self.asked: list[Asked] = []
        self.answer: bytes = b""  # that every login gets
        if login:
            assert self.feed(LOGIN) == b'OK "Logged in"\r\n'

    def feed(self, data: bytes) -> bytes:
        out, session = [self.session.receive(data)], self.session
        while not session.closing and (session.state or session.behind):
            out.append(self.step() if session.state else session.receive(b""))
        return b"".join(out)

    def step(self) -> bytes:
        session = self.session
        if session.state == TLS:
            session.tls_started()
            return session.greet()
        if session.state == CLAIMED:
            claim = session.claim
            good = claim.good if isinstance(claim, sasl.Proof) else claim == sasl.Password("bob", "secret")
            if good and not self.answer:
                session.name_owner("bob@local.example")
            return session.checked(self.answer or (smtp.LOGGED_IN if good else smtp.WRONG_CREDENTIALS))
        assert session.state == ASKED and session.asked is not None
        self.asked.append(session.asked)
        return self.do(session.asked)

    def do(self, asked: Asked) -> bytes:
        session = self.session
        if asked.what == "list":
            return session.done([Listed(name, name == self.active) for name in self.scripts])
        if asked.what == "get":
            return session.done(self.scripts.get(asked.name))
        if asked.what == "put":
            if asked.text == b"bad":
                return session.refused("line 1:1: unknown command", b"")
            self.scripts[asked.name] = asked.text
        if asked.what == "activate":
            if asked.name and asked.name not in self.scripts:
                return session.refused("there is none", reply.NONEXISTENT)
            self.active = asked.name
        if asked.what == "remove" and asked.name == self.active:
            return session.refused("it is active", reply.ACTIVE)
        return session.done()


def test_a_greeting_tells_the_capabilities():
    told = Caller(Offers(starttls=True, mechanisms=("PLAIN",)), login=False).session.greet().split(b"\r\n")
    assert told == [
        b'"IMPLEMENTATION" "relaymta"',
        b'"SIEVE" "%b"' % " ".join(EXTENSIONS).encode(),
        b'"SASL" ""',
        b'"MAXREDIRECTS" "4"',
        b'"VERSION" "1.0"',
        b'"STARTTLS"',
        b'OK "mx.example ManageSieve relaymta ready"',
        b"",
    ]


def test_after_starttls_the_capabilities_are_told_again():
    caller = Caller(Offers(starttls=True, mechanisms=("PLAIN",)), login=False)
    assert caller.feed(LOGIN).startswith(b"NO (ENCRYPT-NEEDED)")
    out = caller.feed(b"StartTLS\r\n")
    assert out.startswith(b'OK "Begin TLS negotiation now"\r\n"IMPLEMENTATION"')
    assert b'"SASL" "PLAIN"\r\n' in out and b'"STARTTLS"' not in out
    assert caller.feed(b"STARTTLS\r\n").startswith(b"NO")
    assert caller.feed(LOGIN).startswith(b"OK")


def test_what_is_said_behind_starttls_is_not_taken_for_what_comes_by_tls():
    caller = Caller(Offers(starttls=True, mechanisms=("PLAIN",)), login=False)
    assert caller.feed(b"STARTTLS\r\n" + LOGIN).startswith(b"BYE")
    assert caller.session.closing and not caller.session.secure


def test_scripts():
    caller = Caller()
    assert b'"OWNER" "bob@local.example"\r\n' in caller.feed(b"CAPABILITY\r\n")
    assert caller.feed(b'PUTSCRIPT "a \\"b\\\\" {6+}\r\nkeep;\n\r\nLISTSCRIPTS\r\n') == b'OK\r\n"a \\"b\\\\"\r\nOK\r\n'
    assert caller.scripts == {'a "b\\': b"keep;\n"}
    assert caller.feed(b'putscript {1+}\r\nx "stop;"\r\nSetActive "x"\r\nLISTSCRIPTS\r\n').endswith(b'"x" ACTIVE\r\nOK\r\n')
    assert caller.feed(b'GETSCRIPT "x"\r\nGETSCRIPT "y"\r\n') == (
        b'{5}\r\nstop;\r\nOK\r\nNO (NONEXISTENT) "There is no script of that name"\r\n'
    )
    assert caller.feed(b'PUTSCRIPT "z" "bad"\r\n') == b'NO "line 1:1: unknown command"\r\n'
    assert caller.feed(b'SETACTIVE "none"\r\n') == b'NO (NONEXISTENT) "there is none"\r\n'
    assert caller.feed(b'DELETESCRIPT "x"\r\n') == b'NO (ACTIVE) "it is active"\r\n'
    assert caller.feed(b'SETACTIVE ""\r\nRENAMESCRIPT "x" "y"\r\nCHECKSCRIPT "keep;"\r\nHAVESPACE "n" 10\r\n') == b"OK\r\n" * 4
    assert caller.asked[-4:] == [
        Asked("activate", ""), Asked("rename", "x", new="y"), Asked("check", text=b"keep;"), Asked("room", "n", size=10),
    ]  # fmt: skip
    assert caller.session.errors == 0, "what the store refuses is no error of the client"


def test_noop_and_logout():
    caller = Caller(login=False)
    assert caller.feed(b"NOOP\r\n") == b'OK "Done"\r\n'
    assert caller.feed(b'NOOP "a"\r\nNOOP {3+}\r\nb\r\n\r\n') == b'OK (TAG "a") "Done"\r\nOK (TAG {3}\r\nb\r\n) "Done"\r\n'
    assert caller.feed(b"LOGOUT\r\nNOOP\r\n") == b'OK "Bye"\r\n'
    assert caller.session.closing


def test_names_and_texts_that_cannot_be_quoted_are_literals():
    caller = Caller()
    assert caller.feed(b'PUTSCRIPT "%b" "keep;"\r\n' % (b'"' * 0 + b"n" * 512)) == b"OK\r\n"
    caller.scripts = {"\\" * 512: b"", '"' * 513: b""}
    assert caller.feed(b"LISTSCRIPTS\r\n") == b'"%b"\r\n{513}\r\n%b\r\nOK\r\n' % (b"\\\\" * 512, b'"' * 513)


# Logins


def test_a_login_with_challenges_and_by_literals():
    caller = Caller(login=False)
    assert caller.feed(b'AUTHENTICATE "LOGIN"\r\n') == b'"%b"\r\n' % base64.b64encode(b"Username:")
    assert caller.feed(b"{4+}\r\nYm9i\r\n") == b'"%b"\r\n' % base64.b64encode(b"Password:")
    assert caller.feed(b'"%b"\r\n' % base64.b64encode(b"secret")) == b'OK "Logged in"\r\n'
    assert caller.feed(LOGIN) == b'NO "Already logged in"\r\n'


def test_scram_proves_to_the_client_with_the_ok():
    salt = b"a salt of its own"
    salted = hashlib.pbkdf2_hmac("sha256", b"secret", salt, 4096)
    client = hmac.digest(salted, b"Client Key", "sha256")
    stored, server = hashlib.sha256(client).digest(), hmac.digest(salted, b"Server Key", "sha256")
    caller = Caller(keys=lambda user: sasl.Keys(salt, stored, server, 4096), login=False)
    first = b"n=bob,r=a-nonce-of-the-client"
    said = caller.feed(b'AUTHENTICATE "SCRAM-SHA-256" "%b"\r\n' % base64.b64encode(b"n,," + first))
    challenge = base64.b64decode(said.strip().strip(b'"'))
    nonce = challenge.split(b",")[0][2:]
    without = b"c=biws,r=" + nonce
    signed = b",".join((first, challenge, without))
    proof = bytes(a ^ b for a, b in zip(client, hmac.digest(stored, signed, "sha256"), strict=True))
    final = b"v=" + base64.b64encode(hmac.digest(server, signed, "sha256"))
    out = caller.feed(b'"%b"\r\n' % base64.b64encode(without + b",p=" + base64.b64encode(proof)))
    assert out == b'OK (SASL "%b") "Logged in"\r\n' % base64.b64encode(final)
    assert caller.feed(b"LISTSCRIPTS\r\n") == b"OK\r\n"


@pytest.mark.parametrize(
    "octets, answer",
    [
        (b'AUTHENTICATE "PLAIN"\r\n"*"\r\n', b"NO"),
        (b'AUTHENTICATE "PLAIN"\r\n*\r\n', b'NO "Expected a string"'),
        (b'AUTHENTICATE "PLAIN" "?"\r\n', b"NO"),
        (b'AUTHENTICATE "CRAM-MD5"\r\n', b'NO "Authentication mechanism not offered"'),
        (b'AUTHENTICATE "PLAIN" "AGJvYgB3cm9uZw=="\r\n', b"NO"),
    ],
)
def test_logins_that_fail(octets, answer):
    caller = Caller(login=False)
    assert caller.feed(octets).splitlines()[-1].startswith(answer)
    assert caller.session.errors == 1 and not caller.session.owner
    assert caller.feed(LOGIN).startswith(b"OK")


def test_logins_that_cannot_be_checked_now():
    caller = Caller(login=False)
    caller.answer = b"454 4.7.0 Temporary authentication failure\r\n"
    assert caller.feed(LOGIN) == b'NO (TRYLATER) "Temporary authentication failure"\r\n'


def test_three_wrong_logins_end_the_session():
    caller = Caller(login=False)
    wrong = b'AUTHENTICATE "PLAIN" "AGJvYgB3cm9uZw=="\r\n'
    assert caller.feed(wrong * 5).count(b"NO") == 3
    assert caller.session.closing


# What is malformed


@pytest.mark.parametrize(
    "octets",
    [
        b"\r\n", b"FILINTO\r\n", b'"LISTSCRIPTS"\r\n', b"LISTSCRIPTS 1\r\n", b"SETACTIVE x\r\n", b'HAVESPACE "a" "1"\r\n',
        b'HAVESPACE "a" 4294967296\r\n', b'HAVESPACE "a" -1\r\n', b'PUTSCRIPT "a"\r\n', b'SETACTIVE "a\r\n',
        b'SETACTIVE "\\x"\r\n', b'SETACTIVE "\xff"\r\n', b'SETACTIVE "a\0"\r\n', b"LISTSCRIPTS\n",
        b'RENAMESCRIPT "a""b"\r\n', b'RENAMESCRIPT {1+}\r\na"b"\r\n', b"RENAMESCRIPT {1+}\r\na{1+}\r\nb\r\n",
        b'PUTSCRIPT "a" {3+}\r\nxyz "more"\r\n', b"UNAUTHENTICATE\r\n",
    ],
)  # fmt: skip
def test_malformed_commands_are_refused_and_what_follows_is_run(octets):
    caller = Caller()
    out = caller.feed(octets + b"NOOP\r\n")
    assert out.startswith(b"NO ") and out.endswith(b'OK "Done"\r\n') and out.count(b"\r\n") == 2
    assert caller.session.errors == 1


@pytest.mark.parametrize(
    "octets",
    [b'PUTSCRIPT "a" {5}\r\n', b'PUTSCRIPT "a" {1048577+}\r\n', b'PUTSCRIPT "a" {99999999999999999999+}\r\n' * 30],
)
def test_literals_that_cannot_be_followed_end_the_session(octets):
    caller = Caller()
    out = caller.feed(octets + b"LOGOUT\r\n" * 3)
    assert out.count(b"BYE") == 1 and b"Bye" not in out
    assert caller.session.closing


def test_a_script_that_is_too_long_is_skipped():
    caller = Caller()
    out = caller.feed(b'PUTSCRIPT "a" {100000+}\r\n')
    assert out == b"" and caller.session.waiting() == 0
    for _ in range(10):
        assert caller.feed(b'LOGOUT\r\n""' * 1000) == b"" and caller.session.waiting() == 0
    assert caller.feed(b"\r\nNOOP\r\n") == reply.SCRIPT_TOO_LONG + b'OK "Done"\r\n'
    assert caller.scripts == {}


def test_bounds_before_and_after_the_login():
    text = b"#" * 65_536
    assert Caller(login=False).feed(b'PUTSCRIPT "a" {%d+}\r\n' % BEFORE_LOGIN) == b""
    caller = Caller()
    assert caller.feed(b'PUTSCRIPT "a" {65536+}\r\n%b\r\n' % text) == b"OK\r\n"
    assert caller.feed(b"N" * AFTER_LOGIN) == b"" and not caller.session.closing
    assert caller.feed(b"N") == reply.TOO_LONG and caller.session.closing
    early = Caller(login=False)
    assert early.feed(b"N" * (BEFORE_LOGIN + 1)) == reply.TOO_LONG and early.session.closing


def test_more_arguments_than_any_command_has_are_not_read():
    reader = Reader(AFTER_LOGIN)
    reader.feed(b"NOOP" + b" a" * 30_000 + b"\r\nNOOP\r\n")
    assert reader.next().answer == reply.BAD_ARGUMENTS and len(reader._tokens) == 0
    assert reader.next() == Command([Word(b"NOOP")], b"NOOP\r\n")
    reader.feed(b"NOOP" + b" {0+}\r\n" * 10_000)
    assert reader.next().fatal and len(reader.buffer) > 50_000


def test_many_errors_end_the_session():
    caller = Caller()
    out = caller.feed(b"FILINTO\r\n" * 100)
    assert out.count(b"NO ") == ERRORS and out.endswith(reply.TOO_MANY_ERRORS)


def test_more_than_is_kept_ends_the_session():
    caller = Caller()
    caller.session.receive(b"LISTSCRIPTS\r\n")
    for _ in range(KEPT // 65536):
        assert caller.session.receive(b"NOOP\r\n" * 10922) == b""
    caller.session.receive(b"NOOP\r\n" * 10922)
    assert caller.session.closing


@pytest.mark.parametrize("octets", [b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"Host: x\r\n", b"SSH-2.0-x\r\n"])
def test_other_protocols_are_turned_away(octets):
    caller = Caller(login=False)
    assert caller.feed(octets + LOGIN) == reply.NOT_MANAGESIEVE
    assert caller.session.closing and caller.session.foreign


def test_after_the_end_nothing_is_done():
    caller = Caller()
    caller.session.receive(b"LISTSCRIPTS\r\n")
    caller.session.close()
    assert caller.session.done([]) == caller.session.refused("x") == caller.session.receive(b"NOOP\r\n") == b""
    assert caller.session.asked is None


# Any pieces

_NAME = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=8).map(str.encode)
_STRING = st.one_of(
    _NAME.map(lambda raw: b'"%b"' % raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"')),
    st.binary(max_size=30).map(lambda raw: b"{%d+}\r\n%b" % (len(raw), raw)),
    st.sampled_from([b"{3}\r\n", b"{100000+}\r\n", b'"', b"12", b"{999999999+}\r\n"]),
)
_COMMAND = st.builds(
    lambda verb, words, end: b" ".join((verb, *words)) + end,
    st.sampled_from([b"PUTSCRIPT", b"SETACTIVE", b"GETSCRIPT", b"LISTSCRIPTS", b"NOOP", b"STARTTLS", b"x", b"", LOGIN.rstrip(),
                     b'AUTHENTICATE "LOGIN"', b'"Ym9i"']),
    st.lists(_STRING, max_size=3), st.sampled_from([b"\r\n"] * 9 + [b"\n"]),
)  # fmt: skip


@given(st.lists(_COMMAND, max_size=12).map(b"".join), st.lists(st.integers(0, 400), max_size=12), st.booleans())
@settings(max_examples=300 if "CI" not in os.environ else 1000, deadline=None)
def test_any_pieces_of_the_input_have_the_same_effect(wire, cuts, login):
    places = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    pieces = [wire[start:end] for start, end in pairwise(places)]
    whole, apart = Caller(login=login), Caller(login=login)
    assert b"".join(map(apart.feed, pieces)) == whole.feed(wire)
    assert (apart.asked, apart.session.closing, apart.session.errors) == (
        whole.asked,
        whole.session.closing,
        whole.session.errors,
    )


@given(st.lists(st.binary(max_size=40), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_octets_are_commands_or_broken(pieces):
    one, other = Reader(100), Reader(100)
    for piece in pieces:
        one.feed(piece)
    other_found = []
    for piece in pieces:
        other.feed(piece)
        other_found += list(_all(other))
        if other_found and isinstance(other_found[-1], Broken) and other_found[-1].fatal:
            break  # the session has ended
    assert list(_all(one)) == other_found


def _all(reader: Reader):
    while (found := reader.next()) is not None:
        yield found
        if isinstance(found, Broken) and found.fatal:
            reader.buffer.clear()
            return


@given(st.lists(st.one_of(st.binary(max_size=50).map(String), st.sampled_from([b"a", b"12"]).map(Word)), min_size=1, max_size=6))
def test_what_is_written_is_read(tokens):
    reader = Reader(10_000)
    words = [token if isinstance(token, Word) else b"{%d+}\r\n%b" % (len(token), token) for token in tokens]
    reader.feed(b" ".join(words) + b"\r\n")
    found = reader.next()
    assert isinstance(found, Command) and found.tokens == tokens and list(map(type, found.tokens)) == list(map(type, tokens))
    assert reader.next() is None and not reader.buffer
