"""POP3: real programs read and remove mail, in the clear and over TLS; one session a user; what another session knows."""

import json
import os
import poplib
import signal
import smtplib
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, wait_for
from tests.support.mailboxes import Readable, shown, verified
from tests.support.programs import need


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    with Readable(tmp_path_factory.mktemp("pop3"), workers=2) as relay:
        relay.user("alice", "geheim")
        yield relay
        verified(relay)


def client(relay: Readable, name: str = "alice", password: str = "geheim") -> poplib.POP3:
    made = poplib.POP3("127.0.0.1", relay.ports["pop3"], timeout=PATIENCE)
    made.user(f"{name}@local.example")
    made.pass_(password)
    return made


def user(relay: Readable, name: str, *subjects: str, text: str = "x") -> None:
    relay.user(name, "geheim")
    relay.mail(name, *subjects, text=text)


@pytest.mark.parametrize("secure", ["clear", "stls", "implicit"])
def test_poplib_reads_and_removes(relay, secure):
    name = f"lib-{secure}"
    user(relay, name, "one", "two", "three", text=".dot\r\n..\r\nlast")
    trusted = ssl.create_default_context(cafile=relay.ca)
    if secure == "implicit":
        session = poplib.POP3_SSL("127.0.0.1", relay.ports["pop3s"], context=trusted, timeout=PATIENCE)
    else:
        session = poplib.POP3("127.0.0.1", relay.ports["pop3"], timeout=PATIENCE)
        assert "STLS" in session.capa()
        if secure == "stls":
            session.stls(trusted)
            assert "STLS" not in session.capa()
    session.user(f"{name}@local.example")
    session.pass_("geheim")
    count, octets = session.stat()
    sizes = [int(line.split()[1]) for line in session.list()[1]]
    assert (count, octets) == (3, sum(sizes))
    ids = [line.split()[1].decode() for line in session.uidl()[1]]
    assert len(set(ids)) == 3
    lines, size = session.retr(2)[1:]
    assert lines[-5:] == [b"Subject: two", b"", b".dot", b"..", b"last"] and size == sizes[1]
    assert session.top(1, 1)[1][-2:] == [b"", b".dot"]
    session.dele(1)
    assert [line.split()[0] for line in session.uidl()[1]] == [b"2", b"3"]
    session.quit()
    assert shown(relay, name)["INBOX"] == ["two", "three"]
    wait_for(lambda: flags(relay, name) == [["\\Seen"], []], what="Seen")
    again = client(relay, name)
    assert [line.split()[1].decode() for line in again.uidl()[1]] == ids[1:]  # the same for ever
    again.quit()


def flags(relay: Readable, name: str) -> list[list[str]]:
    """The flags of the messages in a user's INBOX."""
    found = json.loads(relay.cli("mailbox", "show", "--messages", "--json", f"{name}@local.example").stdout)
    inbox = next(row for row in found["mailboxes"] if row["name"] == "INBOX")
    return [message["flags"] for message in inbox["list"]]


def test_one_session_a_user_in_all_workers(relay):
    user(relay, "single", "one")
    first = client(relay, "single")
    for _ in range(6):  # of both workers
        with pytest.raises(poplib.error_proto, match=r"\[IN-USE\]"):
            client(relay, "single")
    first.sock.shutdown(socket.SHUT_RDWR)
    first.close()

    def free() -> bool:
        try:
            client(relay, "single").quit()
        except poplib.error_proto:
            return False
        return True

    wait_for(free, what="the maildrop to be free")


def test_a_user_who_is_disabled_is_dismissed(relay):
    user(relay, "gone", "one")
    session = client(relay, "gone")
    session.dele(1)
    relay.cli("mailbox", "disable", "gone@local.example")
    assert session.file.readline().startswith(b"-ERR [SYS/TEMP] The session has ended") and session.file.read() == b""
    assert shown(relay, "gone")["INBOX"] == ["one"]


def test_a_cut_connection_removes_nothing(relay):
    user(relay, "cut", "one", "two")
    session = client(relay, "cut")
    session.dele(1)
    session.sock.shutdown(socket.SHUT_RDWR)
    session.close()
    wait_for(lambda: len(relay.events("session")) > 0, what="the end")
    assert shown(relay, "cut")["INBOX"] == ["one", "two"]


def said_at_once(relay: Readable, octets: bytes, step: int, closes: bool) -> bytes:
    """What comes behind the greeting, to the end. `closes`: the client's side, before it reads."""
    with socket.create_connection(("127.0.0.1", relay.ports["pop3"]), PATIENCE) as sock, sock.makefile("rb") as file:
        assert file.readline().startswith(b"+OK")
        for start in range(0, len(octets), step):
            sock.sendall(octets[start : start + step])
        if closes:
            sock.shutdown(socket.SHUT_WR)
        return file.read()


def test_a_whole_session_at_once_in_any_pieces(relay):
    """Some of the messages are read at once, one is waited for."""
    user(relay, "piped", "one", text=".x")
    relay.mail("piped", "large", text=("y" * 70 + "\r\n") * 30_000)
    relay.mail("piped", "three", text="last\r\n.")
    name = b"USER piped@local.example\r\nPASS geheim\r\n"
    octets = name + b"STAT\r\n" + b"RETR 1\r\nRETR 2\r\nTOP 2 1\r\nRETR 3\r\nLIST\r\n" * 3 + b"UIDL\r\nNOOP\r\nQUIT\r\n"
    whole = said_at_once(relay, octets, len(octets), False)
    assert (
        whole.count(b"\r\n.\r\n") == 16
        and whole.count(b"\r\n..x") == 3
        and whole.endswith(b"\r\n.\r\n+OK Nothing done\r\n+OK Bye\r\n")
    )
    for step, closes in ((len(octets), True), (1, False), (7, True), (100, False)):
        assert said_at_once(relay, octets, step, closes) == whole
    deleted = said_at_once(relay, name + b"DELE 2\r\nQUIT\r\nNOOP\r\n", 1000, True)
    assert deleted.endswith(b"+OK 1 message deleted; bye\r\n")
    assert shown(relay, "piped")["INBOX"] == ["one", "three"]


def test_a_wrong_password_and_an_unknown_user_are_the_same(relay):
    said = []
    for name, password in (("alice", "wrong"), ("nobody", "geheim"), ("", "x")):
        with pytest.raises(poplib.error_proto) as error:
            client(relay, name, password)
        said.append(str(error.value))
    assert len(set(said)) == 1 and "[AUTH]" in said[0]
    relay.user("away", "geheim")
    relay.cli("mailbox", "disable", "away@local.example")
    with pytest.raises(poplib.error_proto, match=r"\[AUTH\]"):
        client(relay, "away")
    relay.cli("mailbox", "password", "alice@local.example", check=False)


def test_a_large_message_of_a_slow_client_is_not_in_memory(relay):
    user(relay, "slow", "large", text="\r\n".join(["y" * 70] * 300_000))
    before = memory(relay)
    session = socket.create_connection(("127.0.0.1", relay.ports["pop3"]), timeout=PATIENCE)
    session.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    assert session.recv(4096).startswith(b"+OK")
    session.sendall(b"USER slow@local.example\r\nPASS geheim\r\nRETR 1\r\n")
    wait_for(lambda: b"octets" in session.recv(4096), what="the message")
    most = max(memory(relay) for _ in range(20))
    assert most - before < 8 << 20
    session.close()
    read = client(relay, "slow")
    assert len(read.retr(1)[1]) > 300_000
    read.quit()


def memory(relay: Readable) -> int:
    total = 0
    for pid in relay.worker_pids():
        status = Path(f"/proc/{pid}/status").read_text()
        total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
    return total


def test_the_worker_of_the_mailbox_is_killed_and_the_session_goes_on(tmp_path):
    with Readable(tmp_path, workers=2) as relay:
        for name in ("alice", "bob"):
            relay.user(name, "geheim")
            relay.mail(name, "one", "two")
        pids = relay.worker_pids()
        sessions = [client(relay, name) for name in ("alice", "bob")]
        home = json.loads(relay.cli("mailbox", "show", "--json", "alice@local.example").stdout)["shard"]
        os.kill(pids[home], signal.SIGKILL)
        wait_for(lambda: len(relay.worker_pids()) == 2, what="its successor")
        left = {}
        for name, session in zip(("alice", "bob"), sessions, strict=True):
            try:
                session.retr(1)
                session.dele(1)
                session.quit()
                left[name] = ["two"]
            except (poplib.error_proto, OSError):  # the session was of that worker
                left[name] = ["one", "two"]
        for name in left:
            assert shown(relay, name)["INBOX"] == left[name]
            wait_for(lambda name=name: usable(relay, name), what="the maildrop")  # its seat is free
        verified(relay)
        assert relay.stop() == 0


def usable(relay: Readable, name: str) -> bool:
    try:
        client(relay, name).quit()
    except poplib.error_proto:
        return False
    return True


def test_curl(relay):
    need("curl")
    user(relay, "curl", "one", "two")
    base = ["curl", "-sS", "--max-time", "20", "-u", "curl@local.example:geheim"]
    for url in (f"pop3://localhost:{relay.ports['pop3']}", f"pop3s://localhost:{relay.ports['pop3s']}"):
        found = subprocess.run([*base, "--cacert", relay.ca, url + "/"], capture_output=True, text=True, timeout=30)
        assert [line.split()[0] for line in found.stdout.splitlines()] == ["1", "2"], found
        found = subprocess.run(
            [*base, "--cacert", relay.ca, "--ssl-reqd", url + "/2"], capture_output=True, text=True, timeout=30
        )
        assert "Subject: two" in found.stdout, found
    url = f"pop3://localhost:{relay.ports['pop3']}/1"
    subprocess.run([*base, "-I", "-X", "DELE", url], capture_output=True, timeout=30, check=True)
    assert shown(relay, "curl")["INBOX"] == ["two"]


@pytest.mark.parametrize("secure", [False, True])
def test_fetchmail(relay, tmp_path, secure):
    program = need("fetchmail")
    name = f"fetch{secure}".lower()
    user(relay, name, "one", "two", "three", text="From me\r\n.dot")
    folder = tmp_path / "out"
    folder.mkdir()
    port = relay.ports["pop3s" if secure else "pop3"]
    tls = f'ssl sslcertck sslcertfile "{relay.ca}"' if secure else 'sslproto ""'
    control = tmp_path / "fetchmailrc"
    control.write_text(
        f'poll localhost protocol pop3 port {port} uidl user "{name}@local.example" password "geheim" {tls} '
        f"mda \"/bin/sh -c 'cat > {folder}/$$'\" fetchall nokeep\n"
    )
    control.chmod(0o600)
    environment = os.environ | {"HOME": str(tmp_path), "FETCHMAILHOME": str(tmp_path)}
    command = [program, "-f", str(control), "--nosyslog", "-v", "--pidfile", str(tmp_path / "pid"), "-i", str(tmp_path / "ids")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
    texts = [path.read_text() for path in folder.iterdir()]
    assert len(texts) == 3 and all("From me\n.dot\n" in text for text in texts)
    assert shown(relay, name)["INBOX"] == []
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1, found  # no mail


@pytest.mark.parametrize("secure", [False, True])
def test_getmail(relay, tmp_path, secure):
    program = need("getmail")
    name = f"get{secure}".lower()
    user(relay, name, "one", "two", "three", text=".dot")
    for sub in ("cur", "new", "tmp"):
        (tmp_path / "out" / sub).mkdir(parents=True)
    port = relay.ports["pop3s" if secure else "pop3"]
    kind = "SimplePOP3SSLRetriever" if secure else "SimplePOP3Retriever"
    (tmp_path / "rc").write_text(  # of a program that ends before it waits for it getmail never hears
        f"[retriever]\ntype = {kind}\nserver = localhost\nport = {port}\nusername = {name}@local.example\npassword = geheim\n"
        + (f"ca_certs = {relay.ca}\n" if secure else "")
        + "[destination]\ntype = MDA_external\npath = /bin/sh\nallow_root_commands = true\n"
        + f"arguments = ('-c', 'cat > {tmp_path}/out/new/$$; sleep 0.2')\n[options]\nread_all = false\ndelete = false\n"
    )
    command = [program, "--getmaildir", str(tmp_path), "--rcfile", str(tmp_path / "rc")]
    environment = os.environ | {"HOME": str(tmp_path)}
    for _ in range(2):  # the second time it knows them by UIDL
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout + found.stderr
        assert len(list((tmp_path / "out" / "new").iterdir())) == 3
    assert shown(relay, name)["INBOX"] == ["one", "two", "three"]


def test_a_user_sends_by_the_password_of_the_mailbox(relay):
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as session:
        session.login("alice@local.example", "geheim")
        assert session.mail("alice@local.example")[0] == 250
        session.rset()
        code, text = session.mail("bob@local.example")
        assert code == 550 and b"may not send as" in text
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as session, pytest.raises(smtplib.SMTPAuthenticationError):
        session.login("alice@local.example", "wrong")
