"""The wall clock is set while the relay runs, or between two runs: mail is delivered, and nothing expires without an attempt."""

import json
import time
from pathlib import Path

import pytest

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.preload import built

HOUR, DAYS = 3600, 86_400
LOCAL = '{protocol="mailbox",recipient_domain=["local.example"]}'


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """A library that shifts the wall clock of a process that preloads it."""
    return built("shifted_clock.c", tmp_path_factory.mktemp("shim"))


class Shifted:
    """A relay whose smart host is a port of loopback (0: it keeps its mail), and whose wall clock can be set."""

    def __init__(self, folder: Path, shim: Path, smarthost: int) -> None:
        self.file = folder / "shift"
        self.set(0)
        route = (f"127.0.0.1:{smarthost}",) if smarthost else (None, f"route=[{LOCAL}]")
        self.relay = Relay(folder, *route, "delivery.first_retry=1", "queue.max_age=432000")
        self.relay.environment = {"LD_PRELOAD": str(shim), "CLOCK_SHIFT": str(self.file)}

    def set(self, seconds: int) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self.file)


@pytest.mark.parametrize("restart", [False, True], ids=["running", "across a restart"])
def test_the_clock_is_set(tmp_path, shim, restart):
    """On and back by an hour, and by ten days, which is longer than mail may be in the queue."""
    port = free_port()
    shifted = Shifted(tmp_path, shim, port)
    with shifted.relay as relay:
        for number, shift in enumerate((HOUR, 0, 10 * DAYS, 0)):
            relay.send("Subject: before\r\n\r\nx\r\n")  # the smart host is down: it waits
            wait_for(lambda: len(relay.events("queued")) == 2 * number + 1)  # noqa: B023
            waiting = relay.events("queued")[-1]["id"]
            wait_for(lambda: waiting in {event["id"] for event in relay.events("deferred")}, what="the first attempt")  # noqa: B023
            if restart:
                relay.stop()
            shifted.set(shift)
            with FakeMx({}, port) as peer:  # before the restart: each message gets one attempt, perhaps its last
                if restart:
                    relay.start()
                relay.send("Subject: after\r\n\r\nx\r\n")
                wait_for(lambda: len(relay.events("queued")) == 2 * number + 2)  # noqa: B023
                logged = relay.events("queued")[-1]["ts"]
                assert abs(logged - time.time() - shift) < 60, "the shift is not in effect"
                wait_for(lambda: len(peer.messages) == 2, 30, "both to be delivered")
            wait_for(lambda: relay.summary() == [])
        assert not relay.events("bounced")


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


@pytest.mark.parametrize("shifts", [(365 * DAYS, -365 * DAYS), (-365 * DAYS, 365 * DAYS)], ids=["on, then back", "back, then on"])
def test_mail_is_filed_in_its_order_whatever_the_clock_says(tmp_path, shim, shifts):
    shifted = Shifted(tmp_path, shim, 0)
    with shifted.relay as relay:
        relay.cli("mailbox", "create", "alice@local.example")
        for number, shift in enumerate((0, *shifts)):
            shifted.set(shift)
            relay.send(f"Subject: {number}\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
            wait_for(lambda: len(relay.events("delivered")) == number + 1, what="delivery")  # noqa: B023
        relay.stop()
        shifted.set(-700 * DAYS)
        relay.start()
        relay.send("Subject: 3\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: len(relay.events("delivered")) == 4, what="delivery")
        found = json.loads(relay.cli("mailbox", "show", "--messages", "--json", "alice@local.example").stdout)["mailboxes"]
        messages = next(row["list"] for row in found if row["name"] == "INBOX")
        assert [(one["uid"], one["subject"]) for one in messages] == [(number + 1, str(number)) for number in range(4)]
        ages = [round((one["date"] - time.time()) / (100 * DAYS)) for one in messages]
        assert ages == [round(shift / (100 * DAYS)) for shift in (0, *shifts, -700 * DAYS)], (
            "INTERNALDATE is that of the wall clock"
        )
