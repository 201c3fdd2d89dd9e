"""`relaymta upgrade`: under load to a program that is as good as the running one, and to programs that are not.

Connections are made all the time, one for each message; what is counted is on the ledgers of both ends. The programs that fail
are this one with a fault put in, so that what fails is real.
"""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import PROVE
from tests.e2e.conftest import SinkThread
from tests.support.commands import run
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.imap_relay import ImapRelay
from tests.support.programs import need
from tests.support.source import Source

# Faults, as Python that runs before the new program does. `BOOT`: what its workers execute instead.
WORKER = """
from relaymta.supervisor import slots
def fault(module, *arguments):
    return [sys.executable, "-c", {boot!r}, *arguments]
slots.program = fault
"""
DIES = "import sys; from relaymta import worker\nasync def start(self, **k): import os; os._exit(3)\n"
REFUSES = (
    "import sys; from relaymta import worker; from relaymta.errors import StoreError\n"
    "async def start(self, **k): raise StoreError('the shard is of clay')\n"
)
PATCHED = "worker.Worker.start = start; worker.main()"
STEP = """
from relaymta import supervisor
async def fault(self, **given):
    {fault}
supervisor.Supervisor.{step} = fault
"""
OVER = """
from relaymta import supervisor
commit = supervisor.Supervisor._commit
async def fault(self, **given):
    await commit(self, **given)
    raise OSError('no')
supervisor.Supervisor._commit = fault
"""
SLEEPS, DIES_HERE = "import asyncio; await asyncio.sleep(1000)", "import os; os.kill(os.getpid(), 9)"


class Load(Source):
    """One connection for each message, on a thread of its own, until `end`."""

    def __init__(self, relay: Relay, clients: int = 6) -> None:
        super().__init__(lambda: relay.port, clients, size=500, reuse=False)
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.run(self._over.is_set)))
        self._thread.start()

    async def pause(self) -> None:
        """About 100 connections a second, of all clients; 200 where all is proved."""
        await asyncio.sleep(0.025 if PROVE else 0.05)

    def more(self, count: int = 30) -> None:
        """Wait until so many more are acknowledged."""
        enough = len(self.acknowledged) + count
        wait_for(lambda: len(self.acknowledged) >= enough, what="more mail to be accepted")

    def end(self) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def loaded(relay: Relay, ledger: SinkThread) -> Iterator[Load]:
    """Within, clients send; then nothing is refused, lost, or doubled."""
    load = Load(relay)
    try:
        load.more()
        yield load
        load.more()
    finally:
        load.end()
    assert load.failed_connects == 0
    assert load.refused == 0
    wait_for(lambda: not load.acknowledged.keys() - ledger.counts().keys(), what=f"{len(load.acknowledged)} messages")
    counts = ledger.counts()
    in_doubt = load.offered - load.acknowledged.keys()
    assert [ident for ident, times in counts.items() if times > 1 and ident not in in_doubt] == []
    print(f"{len(load.acknowledged)} messages, {len(in_doubt)} in doubt; slowest banner {load.slowest_banner:.2f} s")
    ledger.taken.clear()


def program(folder: Path, name: str, text: str) -> Path:
    made = folder / name
    made.write_text(text)
    made.chmod(made.stat().st_mode | stat.S_IXUSR)
    return made


def faulty(folder: Path, name: str, fault: str) -> Path:
    """This program, with a fault."""
    ours = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    return program(folder, name, f"{ours}{fault}\nfrom relaymta.cli import main\nmain()\n")


def upgraded(relay: Relay, *options: str, status: int = 0) -> dict[str, object]:
    done = relay.cli("upgrade", "--json", *options, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def pid_of(relay: Relay) -> int:
    found: int = relay._asked("status", "status")["pid"]
    return found


def answered(relay: Relay, port: int) -> tuple[int, str]:
    """The process in charge, by the HTTP API's unix socket; and the status of a request without a token at its port."""
    api = "/api/v1/status"
    unix = ["--unix-socket", str(relay.spool / "admin.sock"), f"http://localhost{api}"]
    tcp = ["-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}{api}"]
    curl = [need("curl"), "-sS", "--max-time", "20"]
    said = [subprocess.run([*curl, *words], capture_output=True, check=True, text=True).stdout for words in (unix, tcp)]
    return json.loads(said[0])["pid"], said[1]


def test_upgrades_under_load_refuse_lose_and_double_nothing(tmp_path: Path, ledger: SinkThread) -> None:
    """Two, one after the other; what an operator has decided stays, and the first process ends as the last one does."""
    port = free_port()
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", f'admin={{listen="127.0.0.1:{port}"}}', workers=2) as relay:
        relay.cli("site", "suspend", "slow.example", "--for", "1h")
        first = pid_of(relay)
        assert answered(relay, port) == (first, "401")
        pids = [first]
        with loaded(relay, ledger):
            for _ in range(2):
                found = upgraded(relay)
                assert found["result"] == "upgraded"
                pids.append(pid_of(relay))
                assert pids[-1] == found["pid"]
                assert answered(relay, port) == (pids[-1], "401")
        assert len(set(pids)) == 3
        assert "slow.example" in relay.cli("shaping", "active").stdout
        assert sum(relay._asked("status", "status")["totals"][name] for name in ("accepted", "delivered")) >= 2 * 60
        assert [row["ready"] for row in relay._asked("status", "status")["workers"]] == [True, True]
        assert relay.cli("reload").stdout.startswith("reloaded")
        assert relay.process is not None and relay.process.pid == first and relay.process.poll() is None
        os.kill(first, signal.SIGHUP)  # what the first process is told is passed on
        wait_for(lambda: len(relay.events("reloaded")) == 2, what="the reload of the last one")
        states = [event["state"] for event in relay.events("upgrade")]
        assert states == ["begun", "prepared", "slot", "slot", "committed"] * 2
        assert not [event for event in relay.events("warning") if "worker" in event["text"]]
        assert relay.stop() == 0
        assert not list(relay.spool.glob("*.sock"))


def failing(folder: Path) -> dict[str, tuple[list[str], str, str]]:
    """Programs: options of the upgrade, its result, and what is said of it."""
    ours = f"exec {sys.executable} -m relaymta"
    python = str(Path(__file__).parents[2])

    def shell(name: str, text: str) -> list[str]:
        return ["--program", str(program(folder, name, f"#!/bin/sh\ncd {python}\n{text}\n"))]

    def of(name: str, fault: str) -> list[str]:
        return ["--program", str(faulty(folder, name, fault))]

    def steps(step: str, fault: str) -> str:
        return STEP.format(step=step, fault=fault)

    return {
        "missing": (["--program", str(folder / "none")], "unchanged", "No such file or directory"),
        "ends": (shell("ends", "echo it is broken >&2; exit 3"), "unchanged", "it ended with status 3:\nit is broken"),
        "hangs": ([*shell("hangs", "exec sleep 1000"), "--timeout", "1s"], "unchanged", "within 1 s"),
        "knows no upgrade": (shell("old", f'unset RELAYMTA_UPGRADE; {ours} "$@"'), "unchanged", "is in use by another relaymta"),
        "wrong key": (shell("key", f'{ours} "$@" --set hostnaem=x'), "unchanged", "hostnaem"),
        "other number": (shell("more", f'{ours} "$@" --workers 3'), "unchanged", "this needs a restart"),
        "workers die": (of("workers", WORKER.format(boot="raise SystemExit(4)")), "unchanged", "did not start"),
        "prepared, then hangs": ([*of("late", steps("_prepare", SLEEPS)), "--timeout", "1s"], "unchanged", "within 1 s"),
        "worker dies at its shard": (of("dies", WORKER.format(boot=DIES + PATCHED)), "gone back", "worker 0 did not start"),
        "shard does not open": (of("clay", WORKER.format(boot=REFUSES + PATCHED)), "gone back", "the shard is of clay"),
        "killed at a shard": (of("killed", steps("_take", DIES_HERE)), "gone back", "it ended with signal 9"),
        "takes over, and does not say so": (of("silent", OVER), "gone back", "internal error"),
        "cannot commit": (of("commit", steps("_commit", "raise OSError('no')")), "gone back", "internal error"),
    }


# Of `failing`, in `make test`: each comes further than the one before.
SOME = ("knows no upgrade", "workers die", "killed at a shard", "cannot commit")


def test_an_upgrade_to_a_program_that_fails_changes_nothing(tmp_path: Path, ledger: SinkThread) -> None:
    """No connection is refused meanwhile, no mail lost; the old program serves on, and can be upgraded afterwards."""
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=2) as relay:
        pid, workers = pid_of(relay), relay.worker_pids()
        with loaded(relay, ledger) as load:
            programs = failing(tmp_path)
            for name, (options, result, why) in ((name, programs[name]) for name in (programs if PROVE else SOME)):
                found = upgraded(relay, *options, status=1)
                assert (found["result"], why in str(found["why"])) == (result, True), (name, found)
                load.more(10)
                assert pid_of(relay) == pid
                assert {path.name for path in relay.spool.glob("*.sock")} == {"admin.sock", "control.sock", "sendmail.sock"}, name
                if result == "unchanged":
                    assert relay.worker_pids() == workers, name
                else:
                    wait_for(lambda: len(relay.worker_pids()) == 2, what="both workers")
                    workers = relay.worker_pids()
                print(name, round(load.slowest_banner, 2))
                load.slowest_banner = 0.0
            assert upgraded(relay)["pid"] != pid
        assert relay.cli("upgrade", "--program", str(tmp_path / "ends"), check=False).stderr.startswith(
            "not upgraded, nothing has changed: the new program is not ready:\nit ended with status 3"
        )
        assert relay.stop() == 0


def test_what_comes_in_the_middle_of_an_upgrade(tmp_path: Path, ledger: SinkThread) -> None:
    """Another upgrade, a change, the death of whoever asked, and SIGTERM."""
    slow = faulty(tmp_path, "slow", STEP.format(step="_commit", fault=SLEEPS))
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=2) as relay:
        asked = subprocess.Popen(
            [sys.executable, "-m", "relaymta", "upgrade", "--program", str(slow), "--spool", str(relay.spool)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: [one["state"] for one in relay.events("upgrade")].count("slot") == 2, what="the hand-over")
        assert "an upgrade is under way already" in relay.cli("upgrade", check=False).stderr
        wait_for(lambda: "is being completed" in relay.cli("site", "suspend", "a.example", "--for", "1h", check=False).stderr)
        asked.kill()
        asked.wait()
        rotated = relay.log.rename(tmp_path / "relay.log.1")
        assert relay.process is not None
        os.kill(relay.process.pid, signal.SIGUSR1)
        wait_for(lambda: _have_open(relay, relay.log) == 4, what="both programs and the workers to open the log again")
        assert not _have_open(relay, rotated)
        relay.send()  # the new workers serve
        wait_for(lambda: sum(ledger.counts().values()) == 1, what="its delivery")
        assert relay.stop() == 0
        assert [one["state"] for one in relay.events("upgrade")][-1] == "gone back"
    with relay:
        relay.send()
        wait_for(lambda: sum(ledger.counts().values()) == 2, what="mail after a start")
        _signals_behind_an_upgrade(relay, tmp_path)


def _have_open(relay: Relay, file: Path) -> int:
    """How many processes of the relay have a file open."""
    assert relay.process is not None
    found: list[Path] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == relay.process.pid:
                found += [one.readlink() for one in (process / "fd").iterdir()]
    return found.count(file)


def _signals_behind_an_upgrade(relay: Relay, folder: Path) -> None:
    """To the first process, which answers somebody who says no more and so has not become the one that passes them on: they are
    for the new program. That has another address of /metrics; the one before is closed."""
    before, relay.metrics_port = relay.metrics_port, free_port()
    ours = f"cd {Path(__file__).parents[2]}; exec {sys.executable} -m relaymta"
    moved = program(folder, "moved", f'#!/bin/sh\n{ours} "$@" --set metrics.listen=127.0.0.1:{relay.metrics_port}\n')
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(relay.spool / "control.sock"))
        assert upgraded(relay, "--program", str(moved))["result"] == "upgraded"
        assert relay.process is not None
        os.kill(relay.process.pid, signal.SIGHUP)
        wait_for(lambda: relay.events("reloaded"), what="the reload")
        assert relay.unready() == []
        wait_for(lambda: _refused(before), what="the address of before to be closed")
        assert relay.stop() == 0


def _refused(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_the_death_of_the_old_program_in_the_middle_ends_the_new_one(tmp_path: Path, ledger: SinkThread) -> None:
    slow = faulty(tmp_path, "slow", STEP.format(step="_settle", fault=SLEEPS))
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=2) as relay:
        asked = threading.Thread(target=relay.cli, args=("upgrade", "--program", str(slow)), kwargs={"check": False})
        asked.start()
        wait_for(lambda: [one["state"] for one in relay.events("upgrade")].count("slot") == 2, what="the hand-over")
        relay.send()
        assert relay.process is not None
        os.kill(relay.process.pid, signal.SIGKILL)
        relay.process.wait()
        asked.join()
        wait_for(lambda: _is_free(relay), what="the new program to end")
    with relay:
        relay.send()
        wait_for(lambda: sum(ledger.counts().values()) == 2, what="mail after a start")


def _is_free(relay: Relay) -> bool:
    done = run(["queue", "summary", "--spool", str(relay.spool)], PATIENCE)
    return done.returncode == 0


def test_idle_sessions_of_imap_end_and_begin_again(tmp_path: Path) -> None:
    with ImapRelay(tmp_path) as relay:
        relay.user("ann")
        session = relay.session("ann", "SELECT INBOX")
        session.idle()
        assert upgraded(relay)["result"] == "upgraded"
        assert session.until("BYE")[-1].name == "BYE"
        both = [relay.session("ann", "SELECT INBOX") for _ in range(4)]
        both[0].put("INBOX", "after")
        wait_for(lambda: list(both[-1].subjects().values()) == ["after"], what="the message in another session")
