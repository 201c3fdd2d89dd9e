"""ManageSieve in the running relay: by the client of sievelib, and by hand."""

import os
import re
import signal
import socket
import ssl
from collections.abc import Iterator

import pytest
from sievelib.managesieve import Client

from tests.support.daemon import PATIENCE, wait_for
from tests.support.mailboxes import Readable, shown, verified

PASSWORD = "a pass word"


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[Readable]:
    with Readable(tmp_path_factory.mktemp("managesieve"), workers=2, protocols=("managesieve",)) as relay:
        for name in ("alice", "bob", "carol", "dave", "eve"):
            relay.user(name, PASSWORD)
        yield relay
        assert [one["text"] for one in relay.events("warning") if one["worker"] >= 0] == []
        verified(relay)


def client(relay: Readable, name: str, starttls: bool = False) -> Client:
    made = Client("127.0.0.1", relay.ports["managesieve"])
    assert made.connect(f"{name}@local.example", PASSWORD, starttls=starttls, authmech="PLAIN")
    return made


class Hand:
    """A connection on which octets are written by hand. `greeting`: what the server has said first."""

    def __init__(self, relay: Readable, tls: bool = False) -> None:
        sock = socket.create_connection(("127.0.0.1", relay.ports["managesieves" if tls else "managesieve"]), timeout=PATIENCE)
        if tls:
            sock = ssl.create_default_context(cafile=relay.ca).wrap_socket(sock, server_hostname="localhost")
        self.sock = sock
        self.file = sock.makefile("rb")
        self.greeting = self.answer()

    def answer(self) -> bytes:
        """All up to the next OK, NO or BYE, literals included."""
        found = b""
        while line := self.file.readline():
            found += line
            literal = re.search(rb"\{(\d+)\}\r\n\Z", line)
            if literal:
                found += self.file.read(int(literal[1]))
            elif re.match(rb"(OK|NO|BYE)\b", line):
                break
        return found

    def say(self, octets: bytes) -> bytes:
        self.sock.sendall(octets)
        return self.answer()

    def login(self, name: str) -> "Hand":
        import base64

        plain = base64.b64encode(f"\0{name}@local.example\0{PASSWORD}".encode())
        assert b"OK" in self.say(b'AUTHENTICATE "PLAIN" "%b"\r\n' % plain)
        return self


def test_scripts_are_kept_activated_and_run(relay):
    with_them = client(relay, "alice")
    assert with_them.putscript("main", 'require ["fileinto", "mailbox"];\nfileinto :create "Box";\n')
    assert with_them.putscript("spare", "keep;\n") and with_them.setactive("main")
    assert with_them.listscripts() == ("main", ["spare"])
    assert with_them.getscript("spare").strip() == "keep;"
    assert with_them.havespace("other", 1000) and not with_them.havespace("other", 1 << 20)
    assert not with_them.putscript("wrong", 'filinto "x";\n')
    assert b"unknown command" in with_them.errmsg and b"line 1:1" in with_them.errmsg
    assert with_them.checkscript("stop;\n") and not with_them.checkscript("stop\n")
    assert not with_them.deletescript("main") and with_them.deletescript("spare")
    with_them.logout()
    relay.send("Subject: x\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
    wait_for(lambda: shown(relay, "alice").get("Box") == ["x"], what="the message")
    again = client(relay, "alice")
    assert again.renamescript("main", "first") and again.listscripts() == ("first", [])
    assert again.setactive("") and again.listscripts() in (("", ["first"]), (None, ["first"]))
    again.logout()
    wait_for(lambda: [one for one in relay.events("session") if one["protocol"] == "managesieve"], what="the log")


@pytest.mark.parametrize("tls", [False, True])
def test_capabilities_and_a_login_by_hand(relay, tls):
    hand = Hand(relay, tls)
    assert b'"IMPLEMENTATION" "relaymta"' in hand.greeting and b'"VERSION" "1.0"' in hand.greeting
    assert b"fileinto" in hand.greeting and b"vacation" in hand.greeting and (b"STARTTLS" in hand.greeting) == (not tls)
    assert hand.say(b"LISTSCRIPTS\r\n").startswith(b"NO")
    hand.login("bob")
    assert b'"OWNER" "bob@local.example"' in hand.say(b"CAPABILITY\r\n")
    assert hand.say(b'NOOP "a tag"\r\n').startswith(b'OK (TAG "a tag")') or b"TAG" in hand.say(b'NOOP "a tag"\r\n')
    text = 'if header :is "subject" "ü" { discard; }\r\n'.encode()
    assert hand.say(b'PUTSCRIPT "n\xc3\xbcm" {%d+}\r\n%b\r\n' % (len(text), text)).startswith(b"OK")
    assert hand.say(b'GETSCRIPT "n\xc3\xbcm"\r\n').startswith(b"{%d}\r\n%b" % (len(text), text))
    assert hand.say(b'DELETESCRIPT "none"\r\n').startswith(b"NO (NONEXISTENT)")
    assert hand.say(b'SETACTIVE "n\xc3\xbcm"\r\n').startswith(b"OK")
    assert hand.say(b'DELETESCRIPT "n\xc3\xbcm"\r\n').startswith(b"NO (ACTIVE)")
    assert b'"n\xc3\xbcm" ACTIVE\r\n' in hand.say(b"LISTSCRIPTS\r\n")
    assert hand.say(b'SETACTIVE ""\r\n').startswith(b"OK") and hand.say(b'DELETESCRIPT "n\xc3\xbcm"\r\n').startswith(b"OK")
    assert hand.say(b"LOGOUT\r\n").startswith((b"OK", b"BYE"))
    assert hand.file.read() == b""


def test_starttls_and_what_comes_before_it_is_forgotten(relay):
    hand = Hand(relay)
    assert hand.say(b"STARTTLS\r\n").startswith(b"OK")
    hand.sock = ssl.create_default_context(cafile=relay.ca).wrap_socket(hand.sock, server_hostname="localhost")
    hand.file = hand.sock.makefile("rb")
    assert b'"SASL" ' in hand.answer()
    hand.login("bob")
    early = Hand(relay)
    assert early.say(b'STARTTLS\r\nNOOP "x"\r\n').startswith((b"BYE", b"NO"))


def test_limits(relay):
    hand = Hand(relay).login("carol")
    for number in range(32):
        assert hand.say(b'PUTSCRIPT "s%d" "keep;"\r\n' % number).startswith(b"OK")
    assert b"QUOTA/MAXSCRIPTS" in hand.say(b'PUTSCRIPT "more" "keep;"\r\n')
    large = b"#" + b"x" * (64 * 1024 - 3) + b"\r\n"
    assert hand.say(b'PUTSCRIPT "s1" {%d+}\r\n%b\r\n' % (len(large), large)).startswith(b"OK")
    assert b"QUOTA/MAXSIZE" in hand.say(b'PUTSCRIPT "s1" {%d+}\r\n%b\r\n' % (len(large) + 1, large + b"#"))
    assert hand.say(b'PUTSCRIPT "a\x01" "keep;"\r\n').startswith(b"NO")
    assert hand.say(b"FILINTO\r\n").startswith(b"NO")
    for octets in (100_000, 20 << 20):
        huge = Hand(relay)
        huge.sock.sendall(b'PUTSCRIPT "a" {%d+}\r\n' % octets + b"x" * octets + b"\r\n")  # the client reads when it has sent all
        assert huge.answer().startswith((b"NO", b"BYE"))


def test_a_script_that_was_acknowledged_survives_a_kill(relay):
    hand = Hand(relay).login("dave")
    for number in range(5):
        assert hand.say(b'PUTSCRIPT "s%d" "keep;"\r\n' % number).startswith(b"OK")
    assert hand.say(b'SETACTIVE "s3"\r\n').startswith(b"OK")
    before = relay.worker_pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(relay.worker_pids()) - set(before)) == len(before), what="new workers")
    found = client(relay, "dave").listscripts()
    assert found[0] == "s3" and sorted(found[1]) == ["s0", "s1", "s2", "s4"]


def test_a_user_who_is_disabled_is_dismissed(relay):
    hand, silent = Hand(relay).login("eve"), Hand(relay).login("eve")
    relay.cli("mailbox", "disable", "eve@local.example")
    assert hand.say(b"LISTSCRIPTS\r\n").startswith(b"BYE")
    assert silent.answer().startswith(b"BYE") and silent.file.read() == b""
