"""Mail that sendmail(1) cannot hand over: it is dropped, by relaymta-drop, and taken when the relay is back."""

import contextlib
import os
import pwd
import resource
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import relaymta
from relaymta.sendmail import dropping
from relaymta.sendmail.handing import NotNow
from relaymta.sendmail.message import User, enveloped
from relaymta.sendmail.options import parsed
from tests.conftest import PROVE
from tests.support.daemon import Relay, wait_for
from tests.support.programs import need
from tests.support.prove import in_prove
from tests.support.traced import is_traced

PROGRAM = Path(relaymta.__file__).parent / "sendmail" / "__main__.py"
SOURCE = Path(relaymta.__file__).parent.parent / "packaging/drop/relaymta-drop.c"
NOBODY = pwd.getpwnam("nobody").pw_uid
DAEMON = 1  # a user with a name
OTHER = 31_777  # a user without a name
GROUP = 31_778  # that of the drop folder
MANY = 1000 if PROVE else 60
SIDE_BY_SIDE = MANY if PROVE else 20
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")


class Place:
    """A drop folder, and the program that puts messages there. It belongs to root, as the relay here is root's."""

    def __init__(self, folder: Path, *, drop: Path | None = None, set_gid: bool = True, options: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.drop = drop or folder / "drop"
        self.drop.mkdir(exist_ok=True)
        self.drop.chmod(0o770)
        self.program = folder / "relaymta-drop"
        subprocess.run([need("gcc"), "-O2", "-Wall", f'-DFOLDER="{self.drop}"', *options, "-o", self.program, SOURCE], check=True)
        self.program.chmod(0o755)
        if set_gid:
            os.chown(self.drop, 0, GROUP)
            os.chown(self.program, 0, GROUP)
            self.program.chmod(0o2755)
        self.environment = {
            "PATH": os.environ["PATH"], "RELAYMTA_SENDMAIL_SOCKET": str(folder / "sendmail.sock"),
            "RELAYMTA_DROP_PROGRAM": str(self.program), "RELAYMTA_DROP": str(self.drop),
        }  # fmt: skip

    def relay(self, smarthost: str = "127.0.0.1:9", *settings: str) -> Relay:
        return Relay(self.folder, smarthost, f"local.socket={self.folder}/sendmail.sock", f"local.drop={self.drop}", *settings)

    def sendmail(self, *words: str, text: str = "Subject: x\n\nx\n", uid: int | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", str(PROGRAM), *words]
        return self.run(command, text, uid)

    def run(self, command: list[str], text: str, uid: int | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        other = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
        return subprocess.run(
            command, input=text, capture_output=True, text=True, env=self.environment, check=False, **other, **more
        )  # fmt: skip

    def put(self, text: str, octets: int | None = None, uid: int = NOBODY, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run relaymta-drop."""
        return self.run([str(self.program), str(len(text) if octets is None else octets)], text, uid, **more)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.drop.iterdir() if path.is_file())

    def reasons(self) -> dict[str, str]:
        """Why what is in bad/ is there."""
        return {path.name.removesuffix(".reason"): path.read_text() for path in (self.drop / "bad").glob("*.reason")}


@pytest.fixture
def place() -> Iterator[Place]:
    """Where others may enter."""
    if os.statvfs("/tmp").f_flag & os.ST_NOSUID:
        pytest.skip("no set-gid program runs in /tmp")
    with tempfile.TemporaryDirectory(prefix="relaymta-") as found:
        Path(found).chmod(0o755)
        yield Place(Path(found))


def batch(sender: str = "nobody", to: str = "a@x.example", data: str = "Subject: x\r\n\r\nx\r\n") -> str:
    return f"MAIL FROM:<{sender}>\r\nRCPT TO:<{to}>\r\nBDAT {len(data)} LAST\r\n{data}"


@root_only
def test_what_is_sent_while_the_relay_is_down_is_taken_when_it_is_back(place):
    for uid in (NOBODY, OTHER):
        done = place.sendmail("a@x.example", text=f"Subject: {uid}\n\n.\nä\n", uid=uid)
        assert (done.returncode, done.stderr) == (0, "")
    assert len(place.names) == 2
    with place.relay() as relay:
        found = wait_for(lambda: len(relay.events("queued")) == 2 and relay.events("queued"))
        assert {event["user"] for event in found} == {"nobody", str(OTHER)}
        assert {event["sender"] for event in found} == {"nobody@relay.example", f"{OTHER}@relay.example"}
        wait_for(lambda: not place.names)
        text = relay.cli("message", "raw", found[0]["id"]).stdout
        assert f"\nSubject: {NOBODY}\n" in text or f"\nSubject: {OTHER}\n" in text
        assert relay.stop() == 0


@root_only
def test_users_neither_read_nor_change_the_drops_of_others_nor_send_as_them(place):
    assert place.put(batch()).returncode == 0
    [name] = place.names
    found = (place.drop / name).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, GROUP, 0o644)
    for uid in (NOBODY, OTHER):
        for command in (["ls", str(place.drop)], ["cat", str(place.drop / name)], ["rm", "-f", str(place.drop / name)],
                        ["touch", str(place.drop / "1.drop")], ["ln", str(place.drop / name), "/tmp/relaymta-link"]):  # fmt: skip
            assert place.run(command, "", uid).returncode != 0, command
    del place.environment["RELAYMTA_DROP_PROGRAM"]  # write it oneself
    place.environment["RELAYMTA_DROP_PROGRAM"] = "/nonexistent"
    assert place.sendmail("a@x.example", uid=OTHER).returncode == 75
    assert place.names == [name]
    assert place.put(batch(sender="root"), uid=DAEMON).returncode == 0
    assert place.put(batch(data="From: boss@x.example\r\n\r\n"), uid=NOBODY).returncode == 0
    with place.relay() as relay:
        reasons = wait_for(lambda: len(place.reasons()) == 2 and place.reasons())
        assert all("relay.local_users" in text for text in reasons.values())
        wait_for(lambda: not place.names)
        wait_for(lambda: len(relay.events("queued")) == 3)  # the good one, and two notices
        assert stat.S_IMODE((place.drop / "bad").stat().st_mode) == 0o700


@root_only
def test_who_has_dropped_what_is_refused_is_told(place):
    assert place.put(batch(data="From: boss@x.example\r\n\r\n"), uid=NOBODY).returncode == 0
    partly = "MAIL FROM:<nobody>\r\nRCPT TO:<ok@x.example>\r\nRCPT TO:<bad@>\r\nBDAT 2 LAST\r\n\r\n"
    assert place.put(partly, uid=NOBODY).returncode == 0
    with place.relay() as relay:
        found = wait_for(lambda: len(relay.events("queued")) == 3 and relay.events("queued"))
        told = [event for event in found if event["sender"] == ""]
        assert [event["recipients"] for event in told] == [["nobody@relay.example"]] * 2
        texts = [relay.cli("message", "raw", event["id"]).stdout for event in told]
        assert all("\nAuto-Submitted: auto-replied\n" in text and "MAILER-DAEMON@relay.example" in text for text in texts)
        assert sum("relay.local_users" in text and "RCPT TO:<a@x.example>" in text for text in texts) == 1
        assert sum("not to these recipients" in text and "<bad@> 5" in text for text in texts) == 1


@root_only
def test_more_recipients_than_a_message_may_have_get_it(place):
    good, bad = [f"r{number}@x.example" for number in range(250)], [f"r{number}@" for number in range(50)]
    rcpts = "".join(f"RCPT TO:<{rcpt}>\r\n" for pair in zip(good, bad, strict=False) for rcpt in pair)
    rcpts += "".join(f"RCPT TO:<{rcpt}>\r\n" for rcpt in good[50:])
    assert place.put(f"MAIL FROM:<nobody>\r\n{rcpts}BDAT 2 LAST\r\n\r\n").returncode == 0
    with place.relay("127.0.0.1:9", "intake.recipients=100") as relay:
        wait_for(lambda: [event for event in relay.events("queued") if event["sender"] == ""])
        found = [rcpt for event in relay.events("queued") if event["sender"] for rcpt in event["recipients"]]
        assert sorted(found) == sorted(good)
        [reason] = place.reasons().values()
        assert "not to these recipients" in reason and all(f"<{rcpt}> 5" in reason for rcpt in bad)


@root_only
def test_only_what_is_complete_is_dropped(place):
    assert place.put("x" * 50, 100).returncode == 65
    assert place.put("", 1).returncode == 65
    assert place.put("x", 1 << 40).returncode == 65
    for wrong in ("", "-1", "1x", "x"):
        assert place.run([str(place.program), wrong], "x", NOBODY).returncode == 64
    assert place.run([str(place.program)], "x", NOBODY).returncode == 64
    limits = (resource.RLIMIT_FSIZE, (4096, 4096))  # a user's own: no part is left by it
    assert place.put("x" * 100_000, preexec_fn=lambda: resource.setrlimit(*limits)).returncode == 74
    assert place.names == []
    with subprocess.Popen([place.program, "1000"], stdin=subprocess.PIPE, user=NOBODY) as process:
        process.stdin.write(b"x" * 500)
        process.stdin.flush()
        wait_for(lambda: place.names)
        process.kill()
    [left] = place.names
    assert left.startswith(".")
    assert place.put(batch()).returncode == 0
    with place.relay() as relay:
        wait_for(lambda: place.names == [left])  # for a day
        wait_for(lambda: len(relay.events("queued")) == 1)


@root_only
def test_descriptors_that_are_closed_do_not_become_the_message(place):
    for number in (0, 1, 2):
        place.put(batch(), preexec_fn=lambda number=number: os.close(number))
    for name in place.names:
        assert (place.drop / name).read_bytes() == batch().encode()


@root_only
def test_what_is_broken_is_put_aside_with_its_reason(place):
    secret = place.folder / "secret"
    secret.write_text(batch(sender="root"))
    good = {"1.drop": batch(), "8.drop": batch()}
    wrong = {
        "2.drop": "hello", "3.drop": batch()[:-1], "4.drop": batch() + "x", "5.drop": "",
        "6.drop": "EHLO x\r\n" + batch(), "7.drop": batch().replace("BDAT", "RSET\r\nBDAT"),
        "9.drop": batch().replace("RCPT", "VRFY"), "a.drop": "MAIL FROM:<>\r\nBDAT 0 LAST\r\n",
    }  # fmt: skip
    for name, text in {**good, **wrong}.items():
        (place.drop / name).write_text(text)
        os.chown(place.drop / name, NOBODY, GROUP)
    (place.drop / "link.drop").symlink_to(secret)
    os.link(secret, place.drop / "hard.drop")
    os.mkfifo(place.drop / "fifo.drop")
    (place.drop / "folder.drop").mkdir()
    with place.relay() as relay:
        more = {"link.drop", "hard.drop", "fifo.drop", "folder.drop"}
        reasons = wait_for(lambda: place.reasons().keys() >= wrong.keys() | more and place.reasons())
        assert reasons.keys() == wrong.keys() | more
        wait_for(lambda: not place.names)
        wait_for(
            lambda: len(relay.events("queued")) == len(good) + len(wrong), what="what is good, and a notice of each other one"
        )
        assert all(event["text"] for event in relay.events("warning"))


@root_only
def test_a_drop_waits_while_it_is_refused_for_now(place):
    """With the disk full, for example; here by a rate."""
    for _ in range(3):
        assert place.put(batch()).returncode == 0
    with place.relay("127.0.0.1:9", "limits.message_rate=1/h") as relay:
        wait_for(lambda: len(relay.events("queued")) == 1)
        wait_for(lambda: len(place.names) == 2)
        assert relay.stop() == 0
    assert len(place.names) == 2
    assert place.reasons() == {}


@root_only
def test_what_the_relay_refuses_for_now_is_dropped(place):
    with place.relay("127.0.0.1:9", "limits.message_rate=1/h") as relay:
        for _ in range(2):
            assert place.sendmail("a@x.example", uid=NOBODY).returncode == 0
        assert len(relay.cli("queue", "list", "--json").stdout.splitlines()) == 1
        assert len(place.names) == 1


@root_only
def test_who_is_refused_for_now_keeps_nobody_else_waiting(place):
    aliases = place.folder / "aliases"
    aliases.write_text(f"list: :include:{place.folder}/members\n")
    with place.relay("127.0.0.1:9", f"local.aliases={aliases}") as relay:
        done = place.sendmail("a@x.example", "list", "b@x.example", "c@", uid=NOBODY)
        assert done.returncode == 65 and "c@" in done.stderr and "list" not in done.stderr
        assert wait_for(lambda: relay.events("queued"))[0]["recipients"] == ["a@x.example", "b@x.example"]
        [name] = place.names
        commands = (place.drop / name).read_bytes().split(b"BDAT")[0].split(b"\r\n")
        assert commands[1:] == [b"RCPT TO:<list>", b""]
        assert place.sendmail("list", "d@x.example", uid=NOBODY).returncode == 0
        (place.folder / "members").write_text("dora@x.example\n")
        relay.cli("reload")
        found = wait_for(lambda: len(found := relay.events("queued")) == 4 and found)
        assert sorted(event["recipients"][0] for event in found) == [
            "a@x.example",
            "d@x.example",
            "dora@x.example",
            "dora@x.example",
        ]
        wait_for(lambda: not place.names)


def test_several_files_of_one_message_are_sent_to_all_of_its_recipients(place, monkeypatch):
    """They have the same idempotency key."""
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dropping, "COMMANDS_MOST", 200)
    many = [f"a{number}@x.example" for number in range(20)]
    made = enveloped(b"Subject: x\r\n\r\n", User(), "", many, False, "")
    dropping.drop(made, parsed(["sendmail"]), NotNow("no"))
    assert len(place.names) > 3 and made.recipients == []
    with place.relay() as relay:
        wait_for(lambda: not place.names)
        found = lambda: [address for event in relay.events("queued") for address in event["recipients"]]  # noqa: E731
        wait_for(lambda: len(found()) >= len(many))
        assert sorted(found()) == sorted(many)


def without_last_reply(listening: socket.socket, relay: Path) -> None:
    """One connection to the relay that is lost when it has taken the message, and before it has said so."""
    theirs, _ = listening.accept()
    with theirs, socket.socket(socket.AF_UNIX) as ours:
        ours.connect(str(relay))
        while True:
            for sock in select.select([theirs, ours], [], [])[0]:
                data = sock.recv(65536)
                if not data or b"queued as" in data:
                    return
                (ours if sock is theirs else theirs).sendall(data)


@root_only
def test_what_the_relay_has_taken_and_could_not_say_so_is_sent_once(place, ledger):
    place.environment["RELAYMTA_SENDMAIL_SOCKET"] = str(place.folder / "lost.sock")
    with place.relay(f"127.0.0.1:{ledger.port}") as relay, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place.environment["RELAYMTA_SENDMAIL_SOCKET"])
        listening.listen()
        lost = threading.Thread(target=without_last_reply, args=(listening, place.folder / "sendmail.sock"))
        lost.start()
        done = place.sendmail("a@x.example", "b@x.example", text="From: root@x.example\nX-Ledger: 5\n\nx\n")
        lost.join()
        assert (done.returncode, done.stderr) == (0, "")
        assert len(place.names) == 1, "it was dropped, too"
        wait_for(lambda: relay.events("queued"))
        wait_for(lambda: not place.names and relay.summary() == [])
        assert ledger.counts() == {"5": 1} and len(relay.events("queued")) == 1


@root_only
def test_nobody_fills_the_disk_past_the_floor():
    """Many at the same time, on a small disk."""
    with tempfile.TemporaryDirectory(prefix="relaymta-") as found:
        folder = Path(found)
        folder.chmod(0o755)
        disk = folder / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M,mode=755", "none", disk], check=False).returncode != 0:
            pytest.skip("nothing can be mounted here")
        try:
            place = Place(folder, drop=disk / "drop")
            text = "x" * (1 << 20)
            with ThreadPoolExecutor(20) as pool:
                statuses = [done.returncode for done in pool.map(lambda _: place.put(text), range(40))]
            assert set(statuses) == {0, 75}
            left = os.statvfs(disk)
            total, free = left.f_blocks * left.f_frsize, left.f_bavail * left.f_frsize
            assert free >= total * 15 // 100 - 20 * 65536
            assert statuses.count(0) == len(place.names) >= 8
        finally:
            subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="the folder has to be the relay's")
def test_where_the_program_is_not_installed_who_may_writes_it(place):
    place.environment["RELAYMTA_DROP_PROGRAM"] = "/nonexistent"
    assert place.sendmail("-f", "a@x.example", "b@x.example").returncode == 0
    assert len(place.names) == 1
    with place.relay() as relay:
        [event] = wait_for(lambda: relay.events("queued"))
        assert (event["sender"], event["user"]) == ("a@x.example", "root")
    shutil.rmtree(place.drop)
    done = place.sendmail("b@x.example")
    assert (done.returncode, "cannot be dropped" in done.stderr) == (75, True)


@root_only
def test_a_folder_of_others_is_not_looked_at(place):
    assert place.put(batch()).returncode == 0
    os.chown(place.drop, NOBODY, GROUP)
    with place.relay() as relay:
        relay.send()
        time.sleep(5)
        assert [event["user"] for event in relay.events("queued")] == [""]
        [text] = [event["text"] for event in relay.events("warning") if "local.drop" in event["text"]]
        assert "does not belong to the user of the relay" in text
    assert len(place.names) == 1


@root_only
@pytest.mark.parametrize("kind", ["drop", "pickup"])
def test_a_relay_that_dies_before_it_removes_a_file_does_not_send_it_again(place, ledger, kind):
    """Killed by the kernel when it is about to remove what it has in the queue. A file that is put there anew is another one."""
    pickup = place.folder / "pickup"
    pickup.mkdir()
    text = "From: root@x.example\r\nTo: a@x.example\r\nX-Ledger: 7\r\n\r\nx\r\n"

    def put() -> None:
        if kind == "drop":
            assert place.put(batch("root", data=text), uid=0).returncode == 0
        else:
            (pickup / "new").write_text(text)
            os.utime(pickup / "new", (1e9, 1e9))
            (pickup / "new").rename(pickup / "a.eml")

    def left() -> list[str]:
        return place.names if kind == "drop" else [path.name for path in pickup.glob("*.eml")]

    with place.relay(f"127.0.0.1:{ledger.port}", f"local.pickup={pickup}") as relay:
        [worker] = relay.worker_pids()
        kill = [need("strace"), "-f", "-o", os.devnull, "-e", "inject=unlinkat:signal=KILL", "-p", str(worker)]
        with subprocess.Popen(kill, stderr=subprocess.DEVNULL) as tracer:
            wait_for(lambda: is_traced(worker), what="strace to be attached to every thread")
            put()
            tracer.wait(60)
        assert len(left()) == 1
        for number in (1, 2, 3):
            wait_for(lambda: not left() and relay.summary() == [], what="the file to be removed by the next worker")
            assert ledger.counts() == {"7": number}
            put()
        assert relay.stop() == 0


@root_only
@pytest.mark.parametrize("state", ["killed", *in_prove("up", "down")])
def test_of_many_that_start_side_by_side_none_is_lost(place, ledger, state):
    """Each that ends with 0 arrives, whatever happens to the relay; and none ends otherwise."""
    relay = place.relay(f"127.0.0.1:{ledger.port}", 'relay.local_users=["*"]')
    done: list[tuple[int, str]] = []

    def send(number: int) -> None:
        found = place.sendmail("-t", "-i", text=f"To: r{number}@x.example\nX-Ledger: {number}\n\nx\n", uid=NOBODY)
        done.append((found.returncode, found.stderr))

    with contextlib.ExitStack() as stack:
        if state != "down":
            relay.start()
        stack.callback(lambda: relay.process is not None and relay.process.poll() is None and relay.kill())
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            futures = [pool.submit(send, number) for number in range(MANY)]
            if state == "killed":
                for at in (MANY // 6, MANY // 2, 3 * MANY // 4):
                    wait_for(lambda at=at: len(done) >= at)
                    relay.kill()
                    relay.start()
            for future in futures:
                future.result()
        assert [found for found in done if found[0] != 0] == []
        if state == "down":
            assert len(place.names) == MANY
            relay.start()
        wait_for(lambda: len(ledger.counts()) == MANY, what="all to arrive")
        wait_for(lambda: not place.names)
        if state != "killed":  # else the relay did not know what was delivered before it was killed
            assert set(ledger.counts().values()) == {1}
        assert place.reasons() == {}
