"""A worker whose supervisor has died ends, whatever it is doing: the next start gets the spool."""

import os
import smtplib
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import Relay, wait_for

BOOT = """
import sys
from relaymta.supervisor import slots
program = slots.program
def patched(module, *arguments):
    command = program(module, *arguments)
    command[3] = command[3].replace("from relaymta.worker import main", PATCH)
    return command
slots.program = patched
PATCH = sys.argv[1]
sys.argv = ["relaymta", *sys.argv[5:]]
from relaymta.cli import main
main()
"""

# Once the file `stuck` exists, the disk does not answer any more, or the worker's event loop is blocked. `reached`: it is so.
FAULTS = {
    "store": "real = os.fdatasync; os.fdatasync = lambda fd: hang() if os.path.exists({stuck!r}) else real(fd)",
    "loop": "worker.Gauges._watch_memory = lambda self: hang() if os.path.exists({stuck!r}) else None",
}
PATCH = (
    "from relaymta import worker; import os, time; worker.ORPHAN_SECONDS = 3.0; "
    "hang = lambda: (open({stuck!r} + '.reached', 'w').close(), time.sleep(1e6)); {fault}; main = worker.main"
)


def running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("fault", list(FAULTS))
def test_an_orphan_ends_though_it_is_stuck(tmp_path, ledger, fault):
    stuck = tmp_path / "stuck"
    patch = PATCH.format(stuck=str(stuck), fault=FAULTS[fault].format(stuck=str(stuck)))
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}", wrap=(sys.executable, "-c", BOOT, patch))
    relay.start()
    try:
        (pid,) = relay.worker_pids()
        stuck.touch()

        def send() -> None:
            with suppress(OSError, smtplib.SMTPException):
                relay.send()

        threading.Thread(target=send, daemon=True).start()
        wait_for((tmp_path / "stuck.reached").exists)
        assert relay.process is not None
        relay.process.kill()
        relay.process.wait()
        wait_for(lambda: not running(pid), what="the worker to end")
        stuck.unlink()
        with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as again:
            assert again.worker_pids()
    finally:
        relay.kill()


def test_a_worker_ends_with_its_supervisor_at_once_when_nothing_holds_it(tmp_path, ledger):
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}").start()
    try:
        (pid,) = relay.worker_pids()
        assert relay.process is not None
        relay.process.kill()
        relay.process.wait()
        wait_for(lambda: not running(pid))
        assert os.path.exists(relay.spool)
    finally:
        relay.kill()
