"""The wall clock is set while the relay runs, or between two runs: mail is delivered, and nothing expires without an attempt."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need

SHIM = Path(__file__).parents[1] / "support/shifted_clock.c"
HOUR, DAYS = 3600, 86_400


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """A library that shifts the wall clock of a process that preloads it."""
    built = tmp_path_factory.mktemp("shim") / "shifted_clock.so"
    subprocess.run([need("gcc"), "-shared", "-fPIC", "-O1", "-o", built, SHIM, "-ldl"], check=True)
    return built


class Shifted:
    """A relay whose smart host is a port of loopback, and whose wall clock can be set."""

    def __init__(self, folder: Path, shim: Path, smarthost: int) -> None:
        self.file = folder / "shift"
        self.set(0)
        self.relay = Relay(folder, f"127.0.0.1:{smarthost}", "delivery.first_retry=1", "queue.max_age=432000")
        self.relay.environment = {"LD_PRELOAD": str(shim), "CLOCK_SHIFT": str(self.file)}

    def set(self, seconds: int) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self.file)


@pytest.mark.parametrize("shift", [-HOUR, -10 * DAYS, HOUR, 10 * DAYS], ids=["back 1 h", "back 10 d", "on 1 h", "on 10 d"])
@pytest.mark.parametrize("restart", [False, True], ids=["running", "across a restart"])
def test_the_clock_is_set(tmp_path, shim, shift, restart):
    port = free_port()
    shifted = Shifted(tmp_path, shim, port)
    with shifted.relay as relay:
        relay.send("Subject: before\r\n\r\nx\r\n")  # the smart host is down: it waits
        wait_for(lambda: relay.events("deferred"), what="the first attempt")
        if restart:
            relay.stop()
        shifted.set(shift)
        with FakeMx({}, port) as peer:  # up before the restart: after the jump each message gets one attempt, perhaps its last
            if restart:
                relay.start()
            relay.send("Subject: after\r\n\r\nx\r\n")
            wait_for(lambda: len(relay.events("queued")) == 2)
            logged = relay.events("queued")[-1]["ts"]
            assert abs(logged - time.time() - shift) < 60, "the shift is not in effect"
            wait_for(lambda: len(peer.messages) == 2, 30, "both to be delivered")
        assert not relay.events("bounced")
        wait_for(lambda: relay.summary() == [])


def test_mail_for_a_slow_peer_does_not_expire_after_the_jump(tmp_path, shim):
    """All of it has passed its deadline, and the scan for expired mail comes before the first attempt ends."""
    port = free_port()
    shifted = Shifted(tmp_path, shim, port)
    with shifted.relay as relay:
        relay.send("Subject: before\r\n\r\nx\r\n")
        wait_for(lambda: relay.events("deferred"), what="the first attempt")
        relay.stop()
        shifted.set(10 * DAYS)
        with FakeMx({}, port, slow=3) as peer:
            relay.start()
            wait_for(lambda: peer.messages, 30, "it to be delivered")
        assert not relay.events("bounced")
