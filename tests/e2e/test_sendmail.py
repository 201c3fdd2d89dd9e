"""sendmail(1) with a relay: who may send what by its socket, and that nothing is lost, whatever happens to the relay."""

import os
import pwd
import smtplib
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import relaymta
from tests.support.daemon import Relay, wait_for
from tests.support.programs import need

PROGRAM = Path(relaymta.__file__).parent / "sendmail" / "__main__.py"
NOBODY = pwd.getpwnam("nobody")
OTHER = 31_777  # a user without a name
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that others may enter."""
    with tempfile.TemporaryDirectory(prefix="relaymta-") as found:
        path = Path(found)
        path.chmod(0o755)
        yield path


def socket_of(relay: Relay) -> Path:
    return relay.folder / "sendmail.sock"


def made(folder: Path, *settings: str, workers: int = 1) -> Relay:
    """A relay that keeps what it gets."""
    held = ("delivery.first_retry=1h", f"local.socket={folder / 'sendmail.sock'}", *settings)
    return Relay(folder, "127.0.0.1:9", *held, workers=workers)


@pytest.fixture(scope="module")
def relay(folder: Path) -> Iterator[Relay]:
    with made(folder) as found:
        yield found


def sendmail(
    relay: Relay, *words: str, text: str = "Subject: x\n\nx\n", uid: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it as a user."""
    python = sys.executable
    if uid is not None and not os.access(python, os.X_OK):
        pytest.skip("other users cannot run this interpreter")
    other = {} if uid is None else {"user": uid, "group": NOBODY.pw_gid, "extra_groups": []}
    environment = {"PATH": os.environ["PATH"], "RELAYMTA_SENDMAIL_SOCKET": str(socket_of(relay))}
    command = [python, "-I", "-S", str(PROGRAM), *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False, **other)


def taken(relay: Relay, *words: str, text: str = "Subject: x\n\nx\n", uid: int | None = None) -> tuple[dict[str, Any], str]:
    """Run it; what the relay has then: the log's record and the message."""
    done = sendmail(relay, "-v", *words, text=text, uid=uid)
    assert done.returncode == 0, done.stderr
    ident = done.stderr.rpartition("queued as ")[2].split()[0]
    event = wait_for(lambda: next((one for one in relay.events("queued") if one["id"] == ident), None))
    return event, relay.cli("message", "raw", ident).stdout


def queued(relay: Relay) -> int:
    return len(relay.cli("queue", "list", "--json").stdout.splitlines())


def last(relay: Relay, before: int) -> dict[str, Any]:
    """The log's record of the message that follows so many."""
    found: list[dict[str, Any]] = wait_for(lambda: len(found := relay.events("queued")) > before and found)
    return found[-1]


@root_only
def test_the_system_says_who_sends(relay):
    done = sendmail(relay, "ann@a.example", uid=NOBODY.pw_uid)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    event, text = taken(relay, "ann@a.example", uid=NOBODY.pw_uid)
    assert (event["sender"], event["user"], event["client"]) == ("nobody@relay.example", "nobody", "127.0.0.1")
    assert "From: " in text and "<nobody@relay.example>" in text
    assert "Message-ID: <" in text and "\nDate: " in text
    assert taken(relay, "ann@a.example", uid=OTHER)[0]["sender"] == f"{OTHER}@relay.example"
    assert taken(relay, "ann@a.example", uid=0)[0]["user"] == "root"


@root_only
@pytest.mark.parametrize(
    ("words", "text", "status"),
    [
        (["-f", "root", "a@x.example"], "Subject: x\n\n", 77),
        (["-f", "boss@x.example", "a@x.example"], "Subject: x\n\n", 77),
        (["-f", "nobody@x.example", "a@x.example"], "Subject: x\n\n", 77),
        (["a@x.example"], "From: boss@x.example\n\n", 77),
        (["a@x.example"], "From: nobody, boss@x.example\n\n", 77),
        (["a@x.example"], "From: nobody\nSender: boss@x.example\n\n", 77),
        (["-f", "", "a@x.example"], "From: boss@x.example\n\n", 77),
        (["-f", "nobody> BODY=8BITMIME\r\nRCPT TO:<b@x.example", "a@x.example"], "\n", 65),
        (["-f", "", "a@x.example"], "From: nobody\n\n", 0),
        (["-f", "nobody@relay.example", "a@x.example"], "From: N <nobody@relay.example>\n\n", 0),
        (["a@x.example"], "From: root (Cron Daemon)\n\n", 0),
    ],
)
def test_users_send_as_themselves(relay, words, text, status):
    before = queued(relay)
    done = sendmail(relay, *words, text=text, uid=NOBODY.pw_uid)
    assert done.returncode == status, done.stderr
    assert queued(relay) == before + (status == 0)
    if status == 77:
        assert "relay.local_users" in done.stderr


def test_root_sends_as_anybody(relay):
    event, _ = taken(relay, "-f", "boss@x.example", "a@x.example", text="From: ceo@y.example\n\n")
    assert event["sender"] == "boss@x.example"


@root_only
def test_no_other_user_says_who_it_is(relay):
    """By the socket itself, without the program."""
    said = ["EHLO x", "XCLIENT LOGIN=root", "AUTH PLAIN AHJvb3QAcm9vdA==", "MAIL FROM:<root>", "QUIT"]
    code = (
        f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(socket_of(relay))!r})\n"
        "f = s.makefile('rwb'); f.readline()\n"
        f"for one in {said!r}:\n"
        "    f.write(one.encode() + b'\\r\\n'); f.flush(); line = f.readline()\n"
        "    while line[3:4] == b'-': line = f.readline()\n"
        "    print(line.decode().strip())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, user=NOBODY.pw_uid, check=True)
    replies = done.stdout.splitlines()
    assert [line[:3] for line in replies] == ["250", "500", "502", "550", "221"], replies


def test_t_takes_the_header_and_bcc_is_removed(relay):
    text = 'From: a@x.example\nTo: "B, b" <b@x.example>\nBcc: c@x.example,\n d@x.example\nSubject: x\n\nBcc: e@x.example\n'
    event, stored = taken(relay, "-t", text=text)
    assert event["recipients"] == ["b@x.example", "c@x.example", "d@x.example"]
    assert "c@x.example" not in stored and "d@x.example" not in stored
    assert stored.endswith("\nBcc: e@x.example\n")


def test_lines_and_dots_arrive_as_they_are(relay):
    body = "".join(f"{'.' * number}{number}\n" for number in range(4)) + ".\n..\n" + "x" * 3000 + "\nä\r\n"
    _, stored = taken(relay, "-i", "-f", "", "a@x.example", text=f"From: a@x.example\n\n{body}")
    assert stored.partition("\n\n")[2] == body.replace("\r\n", "\n")


def test_what_is_refused_is_named(relay):
    before = queued(relay)
    done = sendmail(relay, "a@x.example", "b@", text="Subject: x\n\n")
    assert done.returncode == 65
    assert "b@" in done.stderr and "a@x.example" not in done.stderr
    assert queued(relay) == before + 1


def test_recipients_that_are_refused_keep_nobody_else_from_it(relay):
    """As many as a client from elsewhere would be sent away for."""
    before = queued(relay)
    done = sendmail(relay, *(f"b{number}@" for number in range(30)), "a@x.example", text="Subject: x\n\n")
    assert done.returncode == 65
    assert all(f"b{number}@" in done.stderr for number in range(30)), done.stderr
    assert queued(relay) == before + 1


def test_more_recipients_than_a_message_may_have(relay):
    before = len(relay.events("queued"))
    many = [f"a{number}@x.example" for number in range(2500)]
    assert sendmail(relay, *many, text="Subject: x\n\n").returncode == 0
    events = wait_for(lambda: len(found := relay.events("queued")[before:]) == 3 and found)
    assert [address for event in events for address in event["recipients"]] == many


def test_aliases_that_lead_to_more_than_a_message_takes_are_several_messages(tmp_path):
    file = tmp_path / "aliases"
    file.write_text("".join(f"a{one}: {','.join(f'u{one}-{number}@x.example' for number in range(4000))}\n" for one in range(2)))
    with made(tmp_path, f"local.aliases={file}") as relay:
        assert sendmail(relay, "a0", "a1", "eve@x.example", text="Subject: x\n\n").returncode == 0
        events = wait_for(lambda: len(found := relay.events("queued")) == 2 and found)
        assert [len(event["recipients"]) for event in events] == [4000, 4001]


def test_smtp_on_standard_input(relay):
    before = queued(relay)
    text = "EHLO me\nMAIL FROM:<a@x.example>\nRCPT TO:<b@x.example>\nDATA\n".replace("\n", "\r\n")
    done = sendmail(relay, "-bs", text=text + "QUIT\r\n")
    assert done.stdout.startswith("220 ")
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(PROGRAM), "-bs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"RELAYMTA_SENDMAIL_SOCKET": str(socket_of(relay))},
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith(b"220 ")
        for line in (*text.splitlines(), "Subject: x\r\n\r\n.", "QUIT"):
            process.stdin.write(line.encode() + b"\r\n")
            process.stdin.flush()
            while process.stdout.readline()[3:4] == b"-":
                pass
        assert process.wait(60) == 0
    assert queued(relay) == before + 1


def dialogue(relay: Relay, text: bytes) -> tuple[int, list[str]]:
    """What comes of a whole dialogue that is written at once: the exit status, and the codes of the replies."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(PROGRAM), "-bs"], input=text, capture_output=True, check=False,
        env={"RELAYMTA_SENDMAIL_SOCKET": str(socket_of(relay))},
    )  # fmt: skip
    return done.returncode, [line[:3] for line in done.stdout.decode().splitlines() if line[3:4] != "-"]


SENT = ["220", "250", "250", "250", "354", "250", "221"]
LONG = b"y" * 900 + b"\n"


def test_a_message_whose_data_is_refused_is_not_taken_for_commands(relay):
    """Of a program that does not wait for replies."""
    before = queued(relay)
    body = b"Subject: x\n\nRSET\nMAIL FROM:<me@x.example>\nRCPT TO:<victim@x.example>\nDATA\nSubject: y\n"
    text = b"EHLO me\nMAIL FROM:<a@x.example>\nRCPT TO:<b@x..example>\nDATA\n" + body + b".\nNOOP\nQUIT\n"
    status, codes = dialogue(relay, text)
    assert status == 75 and codes[:3] == ["220", "250", "250"] and [code[0] for code in codes[3:]] == ["5", "5", "2", "2"]
    assert queued(relay) == before


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r\r\n"])
def test_a_dialogue_may_be_written_at_once_and_with_line_feeds(relay, end):
    text = b"EHLO me\nMAIL FROM:<a@x.example>\nRCPT TO:<b@x.example>\nDATA\nSubject: x\n\n..\n" + LONG * 300 + b".\nQUIT\n"
    before = queued(relay)
    assert dialogue(relay, text.replace(b"\n", end)) == (0, SENT)
    assert queued(relay) == before + 1
    stored = relay.cli("message", "raw", last(relay, before)["id"]).stdout
    assert stored.endswith("\n\n.\n" + LONG.decode() * 300)


def test_chunks_of_a_dialogue_are_passed_on_as_they_are(relay):
    """RFC 3030. What looks like a line, or the end of a message, is none."""
    before = queued(relay)
    first, second = b"From: a@x.example\r\n\r\n.\r\nQUIT\r\n", b"y" * 100_000 + b"\r\n"
    text = b"EHLO me\nMAIL FROM:<a@x.example>\nRCPT TO:<b@x.example>\nBDAT %d\n%sBDAT %d LAST\n%sQUIT\n"
    codes = ["220", "250", "250", "250", "250", "250", "221"]
    assert dialogue(relay, text % (len(first), first, len(second), second)) == (0, codes)
    stored = relay.cli("message", "raw", last(relay, before)["id"]).stdout
    assert stored.partition("\n\n")[2] == ".\nQUIT\n" + "y" * 100_000 + "\n"


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (b"", SENT[:1]),
        (b"EHLO me\n", SENT[:2]),
        (b"EHLO me\nMAIL FROM:<a@x.example>\nRCPT TO:<b@x.example>\nDATA\nSubject: x\n\nx\n", SENT[:5]),
        (b"EHLO me\nMAIL FROM:<a@x.example>\nRCPT TO:<b@x.example>\nDATA\nSubject: x\n\nx\n.", SENT[:5]),
        (b"EHLO me\nMAIL FROM:<a@x.example>\nRCPT TO:<b@x.example>\nBDAT 9 LAST\nx\n", SENT[:4]),
    ],
)
def test_a_dialogue_that_breaks_off_is_told_and_half_a_message_is_not_sent(relay, text, codes):
    before = queued(relay)
    assert dialogue(relay, text) == (75, codes)
    assert queued(relay) == before


def test_a_dialogue_ends_with_the_relay(tmp_path):
    with made(tmp_path) as relay, subprocess.Popen(
        [sys.executable, "-I", "-S", str(PROGRAM), "-bs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"RELAYMTA_SENDMAIL_SOCKET": str(socket_of(relay))},
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith(b"220 ")
        assert relay.stop() == 0
        assert process.wait(60) == 75


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&1 | true"])
def test_a_dialogue_that_cannot_be_shown_does_not_send_twice(relay, where):
    before = queued(relay)
    script = f'set -o pipefail; "$@" {where}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-I", "-S", str(PROGRAM), "-v", "a@x.example", "b@"],
        input=b"Subject: x\n\n", env={"RELAYMTA_SENDMAIL_SOCKET": str(socket_of(relay)), "PATH": os.environ["PATH"]}, check=False,
    )  # fmt: skip
    assert done.returncode == 65
    assert queued(relay) == before + 1


def test_addresses_that_are_none_are_named_and_the_others_get_it(relay):
    before = queued(relay)
    done = sendmail(relay, "-t", "c@x.example d@x.example", text="From: a@x.example\nTo: good@x.example, Bob Smith\n\nx\n")
    assert (done.returncode, done.stderr) == (65, "sendmail: 'Bob Smith': this is no address\n")
    assert last(relay, before)["recipients"] == ["c@x.example", "d@x.example", "good@x.example"]


def test_text_behind_the_header_stays_as_it_is(relay):
    body = "These hosts failed:\n  web1\nBcc: were empty\nFrom: nobody\n"
    _, stored = taken(relay, "a@x.example", text=f"From: a@x.example\nSubject: report\n{body}")
    assert stored.endswith(f"\n\n{body}")


@root_only
def test_a_set_uid_program_sends_as_its_owner(relay):
    if not os.access(sys.executable, os.X_OK):
        pytest.skip("other users cannot run this interpreter")
    before = queued(relay)
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parents[2])!r})\n"
        f"from relaymta.sendmail import main, program; program.SOCKET = {str(socket_of(relay))!r}\n"
        "sys.exit(main(['sendmail', 'a@x.example']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], input=b"Subject: x\n\n", check=False, capture_output=True,
        preexec_fn=lambda: os.setresuid(OTHER, NOBODY.pw_uid, NOBODY.pw_uid),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert last(relay, before)["sender"] == "nobody@relay.example"


def test_swaks_speaks_to_the_socket(relay):
    before = queued(relay)
    done = subprocess.run(
        [need("swaks"), "--socket", str(socket_of(relay)), "--from", "a@x.example", "--to", "b@x.example"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert queued(relay) == before + 1


@pytest.mark.parametrize(
    "program",
    [
        ["mutt", "-n", "-F", "/dev/null", "-e", "set sendmail={0}", "-e", "set copy=no", "-s", "x", "b@x.example"],
        ["s-nail", "-n", "-S", "mta={0}", "-S", "v15-compat=y", "-s", "x", "b@x.example"],
    ],
    ids=lambda words: words[0],
)
def test_mail_programs_call_it(relay, tmp_path, program):
    wrapper = tmp_path / "sendmail"
    wrapper.write_text(f'#!/bin/sh\nRELAYMTA_SENDMAIL_SOCKET={socket_of(relay)} exec {sys.executable} -IS {PROGRAM} "$@"\n')
    wrapper.chmod(0o755)
    before = queued(relay)
    call = [need(program[0]), *(word.format(wrapper) for word in program[1:])]
    done = subprocess.run(call, input=b"hello\n", check=False, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: queued(relay) == before + 1)


def test_the_queue_is_shown_flushed_and_explained(relay, tmp_path):
    if not (Path(sys.executable).parent / "relaymta").exists():
        pytest.skip("the command line is not installed beside this interpreter")
    config = tmp_path / "relaymta.toml"
    (tmp_path / "aliases").write_text("root: ann@x.example\n")
    local = f'[local]\naliases = "{tmp_path}/aliases"\n'
    config.write_text(f'spool = "{relay.spool}"\n[[listener]]\naddress = "127.0.0.1:{relay.port}"\n{local}')
    event, _ = taken(relay, "a@x.example")
    shown = sendmail(relay, "-C", str(config), "-bp")
    assert (shown.returncode, event["id"] in shown.stdout) == (0, True)
    for flush in ("-q", f"-qI{event['id']}", "-qRx.example"):
        done = sendmail(relay, "-C", str(config), flush)
        assert done.returncode == 0, done.stderr
    assert sendmail(relay, "-C", str(config), "-qInone").returncode != 0
    verified = sendmail(relay, "-C", str(config), "-bv", "a@x.example")
    assert (verified.returncode, "<a@x.example>" in verified.stdout) == (0, True)
    verified = sendmail(relay, "-C", str(config), "-bv", "root")
    assert (verified.returncode, "\n<ann@x.example>\n" in verified.stdout) == (0, True)


def test_everybody_may_open_the_socket_and_it_is_gone_with_the_relay(tmp_path):
    with made(tmp_path, workers=2) as relay:
        path = socket_of(relay)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert all(sendmail(relay, "a@x.example").returncode == 0 for _ in range(3))
        victim = relay.worker_pids()[0]
        os.kill(victim, 9)
        assert all(sendmail(relay, "a@x.example").returncode == 0 for _ in range(3))
        relay.cli("reload")
        assert sendmail(relay, "a@x.example").returncode == 0
        assert relay.stop() == 0
        assert not path.exists()
        assert sendmail(relay, "a@x.example").returncode == 75


def test_it_is_passed_on_at_an_upgrade(tmp_path):
    with made(tmp_path) as relay:
        with socket.socket(socket.AF_UNIX) as waiting:
            relay.cli("upgrade")
            waiting.connect(str(socket_of(relay)))
            assert waiting.recv(100).startswith(b"220 ")
        assert sendmail(relay, "a@x.example").returncode == 0


def test_off_is_off(tmp_path):
    with Relay(tmp_path, "127.0.0.1:9", "local.socket=off") as relay:
        assert not (relay.spool / "sendmail.sock").exists()


@root_only
def test_users_who_may_send_as_anybody(tmp_path, folder):
    own = folder / "own"
    own.mkdir()
    own.chmod(0o755)
    with made(own, 'relay.local_users=["nobody"]', "local.application=local") as relay:
        event, _ = taken(relay, "-f", "shop@x.example", "a@x.example", text="From: x@y.example\n\n", uid=NOBODY.pw_uid)
        assert (event["sender"], event["user"], event["application"]) == ("shop@x.example", "nobody", "local")
        assert sendmail(relay, "-f", "shop@x.example", "a@x.example", uid=OTHER).returncode == 77


def test_aliases_of_this_machine(tmp_path):
    file = tmp_path / "aliases"
    file.write_text("root: ann@x.example, bob@x.example\nhere: carl\npostmaster: dora@x.example\n")
    more = (f"local.aliases={file}", "hostname=mail.relay.example", 'relay.domains=["mail.relay.example"]', "relay.networks=[]")
    with made(tmp_path, *more) as relay:
        assert taken(relay, "root")[0]["recipients"] == ["ann@x.example", "bob@x.example"]
        assert taken(relay, "here", "eve@x.example")[0]["recipients"] == ["carl@relay.example", "eve@x.example"]
        assert taken(relay, "root@relay.example")[0]["recipients"] == ["root@relay.example"]
        assert taken(relay, "here@relay.example", "here")[0]["recipients"] == ["carl@relay.example", "here@relay.example"]
        assert taken(relay, "here", "here@relay.example")[0]["recipients"] == ["carl@relay.example", "here@relay.example"]
        assert taken(relay, "postmaster")[0]["recipients"] == ["dora@x.example"]
        relay.send("Subject: x\r\n\r\n", "out@x.example", "root@mail.relay.example")
        found = wait_for(lambda: [one for one in relay.events("queued") if one["sender"] == "out@x.example"])
        assert found[0]["recipients"] == ["ann@x.example", "bob@x.example"]
        with pytest.raises(smtplib.SMTPRecipientsRefused):  # others have no rights by it
            relay.send("Subject: x\r\n\r\n", "out@x.example", "root@relay.example")
        file.write_text("root: |/bin/sh\n")
        assert "no mail is given to a program" in relay.cli("reload", check=False).stdout
        wait_for(lambda: any("no mail is given to a program" in one["text"] for one in relay.events("warning")))
        assert taken(relay, "root")[0]["recipients"] == ["ann@x.example", "bob@x.example"]
        file.write_text("root: dora@x.example\n")
        wait_for(lambda: taken(relay, "root")[0]["recipients"] == ["dora@x.example"])


def test_a_list_of_addresses_that_cannot_be_read_keeps_no_other_mail_waiting(tmp_path):
    """Nor the relay from starting. (Postfix bounces mail for a list whose file is not there, with 5.3.5; here it waits.)"""
    file, team, drop = tmp_path / "aliases", tmp_path / "team", tmp_path / "drop"
    file.write_text(f"root: ann@x.example\nteam: :include:{team}\n")
    with made(tmp_path, f"local.aliases={file}", f"local.drop={drop}") as relay:
        wait_for(lambda: any(f"{team}: No such file" in one["text"] for one in relay.events("warning")))
        assert relay.cli("reload").returncode == 0
        assert taken(relay, "root")[0]["recipients"] == ["ann@x.example"]
        assert sendmail(relay, "team").returncode == 75
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            relay.send("Subject: x\r\n\r\n", "out@x.example", "team@relay.example")
        assert [code for code, _ in refused.value.recipients.values()] == [451]
        team.write_text("bob@x.example\n")
        wait_for(lambda: any(f"resolved: {file}" in one["text"] for one in relay.events("warning")))
        assert taken(relay, "team")[0]["recipients"] == ["bob@x.example"]
        team.write_text("bob@\n")  # what was read before stays in use, past a reload, too
        wait_for(lambda: any("'bob@' is no address" in one["text"] for one in relay.events("warning")))
        assert relay.cli("reload").returncode == 0
        assert taken(relay, "team")[0]["recipients"] == ["bob@x.example"]
        team.write_text("carl@x.example\n")
        wait_for(lambda: taken(relay, "team")[0]["recipients"] == ["carl@x.example"])
