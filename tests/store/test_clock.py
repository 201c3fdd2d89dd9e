"""The wall clock is set a year forwards and back while a shard of mailboxes is open, and between two openings: UIDs, MODSEQ,
UIDVALIDITY and object ids go up."""

import os
import subprocess
import sys

from tests.support.preload import built


def test_what_a_shard_gives_out_goes_up_whatever_the_clock_does(tmp_path):
    environment = {"LD_PRELOAD": str(built("shifted_clock.c", tmp_path)), "CLOCK_SHIFT": str(tmp_path / "shift")}
    subprocess.run(
        [sys.executable, "-m", "tests.store.clock_driver", tmp_path], env=os.environ | environment, check=True, timeout=100
    )
