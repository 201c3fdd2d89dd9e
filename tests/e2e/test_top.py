"""`relaymta top`: on a terminal, for programs, and while the relay is restarted."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.terminal import Terminal

ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """With one deferred message, to a host whose reply would clear the screen."""
    with FakeMx({"MAIL": b"450 4.2.1 \x1b[2J later\r\n"}) as mx:
        with Relay(tmp_path_factory.mktemp("top"), f"127.0.0.1:{mx.port}", "delivery.first_retry=600", workers=2) as relay:
            relay.send()
            wait_for(lambda: relay.events("deferred"))
            yield relay


def once(relay: Relay) -> dict:
    return json.loads(relay.cli("top", "--once", "--json").stdout)


def test_once_for_programs_and_for_people(relay):
    found = wait_for(lambda: (got := once(relay))["queue"]["deferred"] and got)
    assert found["running"] and found["queue"]["messages"] == 1 and found["queue"]["ready"] == 0
    assert set(found["rates"]) == {
        "accepted", "delivered", "deferred", "bounced", "expired", "rejected", "connections", "refused", "sessions",
    }  # fmt: skip
    assert [worker["state"] for worker in found["workers"]] == ["ready", "ready"]
    assert all(worker["rss"] > 1e6 and worker["cpu"] >= 0 and worker["lag"] >= 0 for worker in found["workers"])
    assert sum(worker["messages"] for worker in found["workers"]) == 1
    (site,) = found["sites"]
    assert (site["site"], site["deferred"], site["state"]) == ("smarthost", 1, "up")
    relay.cli("site", "suspend", "smarthost", "--reason", "closed \x1b[2J today")
    text = relay.cli("top", "--once").stdout
    assert "1 messages in the queue (180 B)" in text and "\x1b" not in text
    assert re.search(r"smarthost +suspended +0 +1 +0 +\d +0/s +closed \\x1b\[2J today \(until", text), text
    relay.cli("site", "resume", "smarthost")


def test_rates_are_of_what_has_come_in_between(relay):
    """Without a terminal it writes on."""
    command = [sys.executable, "-m", "relaymta", "top", "--json", "--interval", "0.2s", "--spool", str(relay.spool)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as top:
        assert top.stdout is not None
        first = json.loads(top.stdout.readline())
        relay.send_all(20)
        seen = [json.loads(top.stdout.readline())["rates"]["accepted"] for _ in range(5)]
        while not seen[-1]["minute"]:
            seen.append(json.loads(top.stdout.readline())["rates"]["accepted"])
        assert first["rates"]["accepted"]["now"] == 0 and max(row["now"] for row in seen) > 0
        top.send_signal(signal.SIGINT)
        top.stdout.read()
        assert top.wait(PATIENCE) == 0


@pytest.mark.parametrize("how", ["q", "Ctrl-C", "SIGTERM"])
def test_the_terminal_is_left_as_it_was(relay, how):
    words = ("top", "--interval", "0.2s", "--spool", str(relay.spool))
    with Terminal(words, TERM="xterm", COLUMNS="80", LINES="24", NO_COLOR="1") as terminal:
        terminal.await_text(ENTERED)
        terminal.await_text("site (by backlog)")
        terminal.press("s")
        terminal.await_text("site (by rate)")
        terminal.press("p")
        terminal.await_text("paused")
        if how == "SIGTERM":
            terminal.signal(signal.SIGTERM)
        else:
            terminal.press("q" if how == "q" else "\x03")
        terminal.await_text(LEFT)
        assert terminal.end() == (143 if how == "SIGTERM" else 0)
        text = terminal.shown
        assert "\x1b[2J" not in text.replace("\x1b[?1049h\x1b[H", "") and not re.search(r"\x1b\[[0-9;]*3\dm", text)
        frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.split("\x1b[H")[-2]).split("\n")
        assert len(frame) <= 24 and all(len(line) <= 80 for line in frame)


def test_a_relay_that_is_restarted_is_waited_for(tmp_path):
    relay = Relay(tmp_path, f"127.0.0.1:{free_port()}")
    with relay, Terminal(("top", "--interval", "0.2s", "--spool", str(relay.spool)), TERM="xterm") as terminal:
        terminal.await_text(f"pid {relay.process.pid}")
        relay.kill()
        terminal.await_text("the relay is not running")
        relay.start()
        terminal.await_text(f"pid {relay.process.pid}")
        terminal.press("q")
        assert terminal.end() == 0
