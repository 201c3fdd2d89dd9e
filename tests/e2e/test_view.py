"""`relaymta view`: the sessions of users on two workers, of all protocols, and their end."""

import contextlib
import json
import os
import poplib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.daemon import PATIENCE, wait_for
from tests.support.imap_relay import PASSWORD, ImapRelay, message

BYE = b"* BYE [UNAVAILABLE] The session has ended; log in again\r\n"
POP3_ENDED = b"-ERR [SYS/TEMP]"
LIMITS = ("limits.sessions_per_user=1000", "limits.connections_per_client=1000")
LARGE = 24 << 20  # octets of a message: more than the buffers between a server and a client that does not read


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    protocols = ("imap", "pop3", "managesieve")
    with ImapRelay(tmp_path_factory.mktemp("view"), *LIMITS, protocols=protocols) as relay:
        yield relay
        relay.close_sessions()
        assert [one["text"] for one in relay.events("warning") if one["worker"] >= 0] == []


def listed(relay: ImapRelay, name: str = "") -> list[dict[str, Any]]:
    """The sessions of a user, in the order of their logins."""
    words = [f"{name}@local.example"] if name else []
    found = relay.cli("view", "sessions", "--json", *words)
    assert found.stderr == ""
    return sorted((json.loads(line) for line in found.stdout.splitlines()), key=lambda row: row["since"])


def disconnected(relay: ImapRelay, name: str) -> str:
    return relay.cli("view", "disconnect", f"{name}@local.example").stdout.strip()


def pop3(relay: ImapRelay, name: str, secure: bool = False) -> poplib.POP3:
    if secure:
        import ssl

        trusted = ssl.create_default_context(cafile=relay.ca)
        made: poplib.POP3 = poplib.POP3_SSL("127.0.0.1", relay.ports["pop3s"], context=trusted, timeout=PATIENCE)
    else:
        made = poplib.POP3("127.0.0.1", relay.ports["pop3"], timeout=PATIENCE)
    made.user(f"{name}@local.example")
    made.pass_(PASSWORD)
    return made


def sieve(relay: ImapRelay, name: str) -> Any:
    from sievelib.managesieve import Client

    made = Client("127.0.0.1", relay.ports["managesieve"])
    assert made.connect(f"{name}@local.example", PASSWORD, starttls=False, authmech="PLAIN")
    return made


def test_the_sessions_of_both_workers_and_of_all_protocols(relay):
    relay.user("alice")
    relay.user("alina")
    relay.mail("alice", "one")
    relay.session("alice", 'ID ("name" "mutt \x1b[1m")', "SELECT INBOX", "NOOP", worker=0)
    waiting = relay.session("alice", "CREATE Work", "SELECT Work", worker=1)
    waiting.idle()
    secure = relay.connect("imaps")
    secure.greeting()
    secure.ok(f"LOGIN alina@local.example {PASSWORD}")
    mail = pop3(relay, "alice", secure=True)
    mail.retr(1)
    scripts = sieve(relay, "alice")
    scripts.listscripts()
    relay.connect().greeting()  # nobody has logged in
    wait_for(lambda: len(listed(relay, "alice")) == 4, what="the sessions")
    rows = listed(relay, "alice")
    told = [(row["protocol"], row["state"], row["mailbox"], row["commands"], row["retrieved"]) for row in rows]
    assert told[:3] == [("imap", "waits", "INBOX", 2, 0), ("imap", "idle", "Work", 2, 0), ("pop3", "waits", "INBOX", 0, 1)]
    assert (rows[3]["protocol"], rows[3]["mailbox"], rows[3]["tls"]) == ("managesieve", "", "") and rows[3]["commands"] >= 1
    assert [row["worker"] for row in rows[:2]] == [0, 1] and {row["user"] for row in rows} == {"alice@local.example"}
    assert {row["client"] for row in rows} == {"127.0.0.1"} and rows[2]["tls"].startswith("TLSv1.") and rows[0]["tls"] == ""
    assert [row["program"] for row in rows] == ["mutt \x1b[1m", "", "", ""]
    assert {row["user"] for row in listed(relay)} == {"alice@local.example", "alina@local.example"}
    shown = relay.cli("view", "sessions").stdout
    assert "\x1b" not in shown and "idle Work" in shown and "mutt \\" in shown and "alina" in shown
    mail.quit()
    wait_for(lambda: len(listed(relay, "alice")) == 3, what="the end of one")


def test_disconnect_ends_all_sessions_of_a_user_and_of_nobody_else(relay):
    for name in ("bob", "bert"):
        relay.user(name)
    relay.asked("mailbox_alias", "robert", targets=["bob@local.example"])
    relay.mail("bob", "one")
    open_ones = [relay.session("bob", "SELECT INBOX", worker=0), relay.session("bob", worker=1)]
    open_ones[1].idle()
    other = relay.session("bert", worker=0)
    mail = pop3(relay, "bob")
    mail.dele(1)
    scripts = sieve(relay, "bob")
    assert disconnected(relay, "robert") == "4 sessions of robert@local.example are ended"
    for session in open_ones:
        assert session.ended() == BYE
        session.sock.close()
    with contextlib.suppress(OSError):
        mail.sock.sendall(b"NOOP\r\n")  # behind the end
    assert mail.file is not None and mail.file.read().startswith(POP3_ENDED)
    assert b"BYE" in scripts.sock.recv(1 << 16)
    mail.close()
    scripts.sock.close()
    assert listed(relay, "bob") == []
    other.ok("NOOP")
    again = relay.session("bob", "SELECT INBOX")  # the user is not kept out
    assert again.status("INBOX", "MESSAGES") == [1]  # nor is anything removed
    wait_for(lambda: len([one for one in relay.events("session") if one["user"] == "bob@local.example"]) == 4, what="the log")


def test_a_command_under_way_ends_before_its_session(relay):
    relay.user("carol")
    session = relay.session("carol", "SELECT INBOX", worker=1)
    session.append("INBOX", message("large", "y" * LARGE), plus=True)
    session.sock.sendall(b"f1 FETCH 1 BODY.PEEK[]\r\nf2 NOOP\r\nf3 NOOP\r\n")
    wait_for(lambda: listed(relay, "carol")[0]["state"] == "command", what="the command")
    assert disconnected(relay, "carol") == "1 session of carol@local.example is ended"
    assert [row["state"] for row in listed(relay, "carol")] == ["command"]  # until the client has read
    said = session.ended()
    assert len(said) > LARGE and said.endswith(b"\r\nf1 OK Fetched\r\n" + BYE), said[-200:]
    assert listed(relay, "carol") == []


def test_a_message_under_way_ends_before_its_pop3_session(relay):
    relay.user("clara")
    relay.session("clara").append("INBOX", message("large", "y" * 70 + ("\r\n" + "y" * 70) * (LARGE // 72)), plus=True)
    mail = pop3(relay, "clara")
    mail.sock.sendall(b"RETR 1\r\nDELE 1\r\nQUIT\r\n")
    wait_for(lambda: {"command", "waits"} == {row["state"] for row in listed(relay, "clara")}, what="the command")
    assert disconnected(relay, "clara") == "2 sessions of clara@local.example are ended"
    assert mail.file is not None
    said = mail.file.read()
    assert len(said) > LARGE and b"\r\n.\r\n-ERR [SYS/TEMP]" in said[-200:] and b"+OK" not in said[-200:]
    assert relay.session("clara").status("INBOX", "MESSAGES") == [1]


def test_an_append_that_is_not_whole_is_given_up(relay):
    relay.user("conny")
    session = relay.session("conny", "SELECT INBOX")
    session.sock.sendall(b"a APPEND INBOX {100}\r\n")
    assert session.response().tag == "+"
    session.sock.sendall(b"Subject: ")
    disconnected(relay, "conny")
    assert session.ended() == BYE
    assert relay.session("conny").status("INBOX", "MESSAGES") == [0]


def test_a_user_who_is_not_known_is_named_with_one_that_is_like_it(relay):
    relay.user("dorothea")
    relay.asked("mailbox_alias", "both", targets=["dorothea@local.example", "x@elsewhere.example"])
    for verb in ("sessions", "disconnect"):
        found = relay.cli("view", verb, "dorotea@local.example", check=False)
        assert (found.returncode, found.stdout) == (1, "")
        assert 'no such mailbox user: dorotea@local.example (did you mean "dorothea@local.example"?)' in found.stderr
        found = relay.cli("view", verb, "both@local.example", check=False)
        assert found.returncode == 1 and "it is an alias of" in found.stderr
        assert relay.cli("view", verb, "", check=False).returncode == 64
    assert disconnected(relay, "dorothea") == "0 sessions of dorothea@local.example are ended"
    found = relay.cli("view", "sessions", "dorothea@local.example")
    assert (found.stdout, found.stderr) == ("", "dorothea@local.example has no session\n")


def test_many_sessions_come_in_parts(relay):
    relay.user("many")
    for _ in range(250):
        relay.session("many")
    rows = listed(relay, "many")
    assert len(rows) == 250 and {row["worker"] for row in rows} == {0, 1}
    shown = relay.cli("view", "sessions", "many@local.example").stdout.splitlines()
    assert len(shown) == 251 and shown[0].startswith("user ")
    assert disconnected(relay, "many") == "250 sessions of many@local.example are ended"
    assert listed(relay, "many") == []


def test_who_reads_the_list_may_go_away(relay):
    words = [sys.executable, "-m", "relaymta", "view", "sessions", "--json", "--spool", str(relay.spool)]
    relay.user("eve")
    for _ in range(3):
        relay.session("eve")
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdout is not None and first.stderr is not None
    first.stdout.close()
    assert first.wait(PATIENCE) == 141 and first.stderr.read() == b""
    first.stderr.close()
    assert len(listed(relay, "eve")) == 3


def test_a_worker_that_does_not_answer_is_named(tmp_path):
    with ImapRelay(tmp_path) as relay:
        relay.user("alice")
        relay.session("alice", worker=0)
        relay.session("alice", worker=1)
        pid = relay.worker_pids()[1]
        os.kill(pid, signal.SIGSTOP)
        try:
            found = relay.cli("view", "sessions", "--json", check=False)
            assert [json.loads(line)["worker"] for line in found.stdout.splitlines()] == [0]
            assert (found.returncode, "worker 1 does not answer" in found.stderr) == (0, True), found
            found = relay.cli("view", "disconnect", "alice@local.example", check=False)
            assert found.stdout == "1 session of alice@local.example is ended\n"
            assert (found.returncode, "worker 1 does not answer" in found.stderr) == (75, True), found
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        relay.close_sessions()


def test_a_stopped_relay_has_no_sessions(tmp_path):
    with ImapRelay(tmp_path, workers=1) as relay:
        relay.user("alice")
        assert relay.cli("view", "sessions").stderr == "nobody is logged in\n"
        assert relay.stop() == 0
    for words in (["sessions"], ["disconnect", "alice@local.example"]):
        found = relay.cli("view", *words, check=False)
        assert (found.returncode, found.stdout) == (69, "") and "this needs the running daemon" in found.stderr
