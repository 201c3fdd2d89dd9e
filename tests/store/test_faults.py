"""Calls of the owner of a shard of mailboxes that fail, one by one (tests/support/failing_calls.c), and by strace: what was
acknowledged is there, what was refused is there or not but never in part, and the shard works on in the same process."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROVE
from tests.store.fault_driver import MADE, NOT_MADE, SHORT
from tests.support.daemon import wait_for
from tests.support.preload import built
from tests.support.programs import need
from tests.support.prove import in_prove
from tests.support.traced import is_traced

CALLS = {"open", "write", "pwrite", "writev", "fdatasync"}  # of those that may fail; the others are seldom made


def with_failing_calls(folder: Path, module: str, *arguments: int | str) -> dict[str, Any]:
    """What a driver prints, in whose mailboxes calls fail."""
    library = built("failing_calls.c", folder)
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAILING_BELOW": str(folder / "mail")}
    command = [sys.executable, "-m", f"tests.store.{module}", str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=2000)
    assert not done.returncode and not done.stderr, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "row"),
    [(NOT_MADE, 1), (MADE, 1), (SHORT, 1), *in_prove((NOT_MADE, 3))],  # the last waits half a second for each opening of LMDB
    ids=["is not made", "is made", "is short", "three in a row"],
)
def test_each_call_in_turn_fails(memory_path, kind, row):
    said = with_failing_calls(memory_path, "fault_driver", "sweep", kind, row, 1 if PROVE else 3)
    assert said["refused"] > 40 and said["filed"] > 300
    if PROVE and row == 1:
        assert set(said["failed"]) >= CALLS


@pytest.mark.parametrize("kind", [NOT_MADE, MADE], ids=["is not made", "is made"])
def test_each_call_of_an_opening_in_turn_fails(memory_path, kind):
    said = with_failing_calls(memory_path, "opening_driver", kind, 1 if PROVE else 4)
    assert said["failed"] > 10 and said["opened"] > 0


@pytest.mark.parametrize(
    ("call", "every"), [("fdatasync", 7), ("pwrite64,writev", 29), *in_prove(("pwritev,pwritev2", 7), ("unlink", 2))]
)
def test_calls_that_strace_lets_fail(memory_path, call, every):
    strace = need("strace")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.store.fault_driver", memory_path, "work"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    fault = f"inject={call}:error=EIO:when=3+{every}"
    tracer = subprocess.Popen(
        [strace, "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", fault, "-p", str(process.pid)], stderr=subprocess.DEVNULL
    )
    wait_for(partial(is_traced, process.pid), what="strace to be attached to every thread")
    process.stdin.write("go\n")
    assert process.stdout.readline() == "worked\n"
    tracer.send_signal(signal.SIGTERM)
    tracer.wait(60)
    said, _ = process.communicate("go on\n", timeout=120)
    assert process.returncode == 0
    assert json.loads(said)["refused"] > 0 or call == "unlink", "nobody hears of a file that could not be removed"
