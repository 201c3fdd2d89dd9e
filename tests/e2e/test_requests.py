"""The command line while a worker is stopped, with messages of any size, and with arguments that mean less than they seem to."""

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relaymta import control
from relaymta.control import Refused
from relaymta.control.requests import REQUESTS
from relaymta.ident import parse_id, shard_of
from relaymta.queue import listing, offline
from tests.support.daemon import Relay, free_port, wait_for

LINE = "worker 1 does not answer"


def at_rest(relay: Relay, messages: int) -> None:
    """Wait until so many messages are queued and none is in flight: the site is down."""
    wait_for(lambda: relay.events("deferred") and len(relay.events("queued")) >= messages)
    wait_for(lambda: not any(row["in flight"] for row in control.ask(relay.spool / "control.sock", "status")["workers"]))


def of_both_shards(relay: Relay) -> dict[int, str]:
    """Send mail until each of two workers has some: ids by shard."""
    found: dict[int, str] = {}
    while len(found) < 2:
        relay.send()
        found = {shard_of(parse_id(event["id"])): event["id"] for event in relay.events("queued")}
    at_rest(relay, 2)
    return found


def test_a_stopped_worker_delays_no_request_for_long_and_is_named(tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", "delivery.first_retry=600", workers=2) as relay:
        ids = of_both_shards(relay)
        pid = next(row["pid"] for row in control.ask(relay.spool / "control.sock", "status")["workers"] if row["worker"] == 1)
        os.kill(pid, signal.SIGSTOP)
        try:
            verbs = [  # (arguments, exit status)
                (("status", "--json"), 0), (("queue", "summary", "--json"), 0), (("queue", "list", "--json"), 0),
                (("queue", "shape"), 0), (("site", "list"), 0), (("shaping", "active"), 0),
                (("message", "show", ids[0]), 0), (("message", "raw", ids[0]), 0), (("message", "show", ids[1]), 75),
                (("message", "raw", ids[1]), 75), (("message", "explain", ids[1]), 75), (("message", "history", ids[1]), 0),
                (("queue", "hold", "--all"), 75), (("queue", "delete", ids[1]), 75), (("queue", "release", ids[0]), 75),
                (("site", "suspend", "x"), 0),
            ]  # fmt: skip
            with ThreadPoolExecutor(6) as pool:
                found = list(pool.map(lambda verb: relay.cli(*verb[0], check=False), verbs))
        finally:
            os.kill(pid, signal.SIGCONT)
        needs = {"shaping", "site"}
        for (verb, status), done in zip(verbs, found, strict=True):
            assert done.returncode == status, (verb, done)
            assert "Traceback" not in done.stderr
            if status or (verb[0] not in needs and verb[1] not in (ids[0], "history") and ids[0] not in verb):
                assert done.stderr.count(LINE) == 1 and len(done.stderr.splitlines()) == 1, (verb, done.stderr)
        assert '"missing"' not in found[0].stdout and '"late"' in found[0].stdout
        assert "note: no site x has mail or connections on the workers that answer" in found[-1].stderr
        assert "mail to x is suspended" in found[-1].stdout
        assert "1 of" in found[12].stdout or "messages changed" in found[12].stdout
        # It goes on where it was.
        wait_for(lambda: all(row["ready"] for row in control.ask(relay.spool / "control.sock", "status")["workers"]))
        assert relay.cli("message", "raw", ids[1]).stdout.endswith("hello\n")


def test_a_queue_is_not_called_empty_while_a_worker_is_missing(tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", workers=2) as relay:
        pid = relay.worker_pids()[1]
        os.kill(pid, signal.SIGSTOP)
        try:
            socket = relay.spool / "control.sock"
            wait_for(lambda: any(row["state"] == "late" for row in control.ask(socket, "status")["workers"]))
            with ThreadPoolExecutor(3) as pool:
                for done in pool.map(lambda verb: relay.cli("queue", verb), ("summary", "list", "shape")):
                    assert "empty" not in done.stdout and LINE in done.stderr, done
        finally:
            os.kill(pid, signal.SIGCONT)


def highest(pid: int) -> int:
    """The most memory a process has had, in octets."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def test_a_message_of_any_size_is_shown_in_pieces(tmp_path):
    text = b"Subject: large\r\n\r\n" + (b"0123456789abcdef" * 62 + b"\r\n") * 80_000
    assert len(text) > control.frames.LIMIT
    settings = ("delivery.first_retry=600", "limits.message_size=100000000")
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", *settings, workers=1) as relay:
        relay.send(text.decode())
        relay.send("Subject: empty\r\n\r\n")
        at_rest(relay, 2)
        large, small = (event["id"] for event in relay.events("queued"))
        assert relay.process is not None
        pids = [relay.process.pid, *relay.worker_pids()]
        before = [highest(pid) for pid in pids]

        def raw(ident: str) -> bytes:
            command = [sys.executable, "-m", "relaymta", "message", "raw", ident, "--spool", str(relay.spool)]
            return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout

        running = raw(large), raw(small)
        assert running[0].endswith(text) and running[0].startswith(b"Received:")
        assert running[1].endswith(b"Subject: empty\r\n\r\n")
        assert relay.worker_pids() == pids[1:]
        grown = [highest(pid) - was for pid, was in zip(pids, before, strict=True)]
        assert max(grown) < 20 << 20, grown

        # One that is not read to its end leaves nothing open.
        def opened() -> int:
            names = [f"/proc/{pids[1]}/fd/{name}" for name in os.listdir(f"/proc/{pids[1]}/fd")]
            return sum("/bodies/big/" in os.path.realpath(name) for name in names)

        assert not opened()
        asked = control.begin(relay.spool / "control.sock", "raw", ident=large)
        pieces = asked.pieces()
        assert len(next(pieces)) <= control.frames.OCTETS_TOGETHER
        assert opened() == 1
        pieces.close()
        wait_for(lambda: not opened())
        relay.stop()
        assert (raw(large), raw(small)) == running


def test_a_filter_means_what_it_says_or_is_refused(tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", "delivery.first_retry=600", workers=1) as relay:
        relay.send()
        at_rest(relay, 1)
        unknown, known = "1ZZZZZZZZZZZZ", relay.events("queued")[0]["id"]
        for verb, status, text in (
            (("queue", "delete", "--held", "--domain", ""), 64, "--domain: it is empty"),
            (("queue", "delete", "--all", "--from", ""), 64, "--from: it is empty"),
            (("queue", "list", "--user", ""), 64, "--user: it is empty"),
            (("queue", "list", "--from", "\udcff@b.example"), 64, "neither an address nor <>"),
            (("queue", "list", "--from", "nobody@"), 64, "neither an address nor <>"),
            (("queue", "list", "--from", "a@b c@d"), 64, "neither an address nor <>"),
            (("queue", "delete", "--domain", "@d.example"), 64, "a domain has no @ in it"),
            (("queue", "delete", "--domain", "c@d.example"), 64, "a domain has no @ in it"),
            (("policy", "hold", "--domain", "@d.example"), 64, "a domain has no @ in it"),
            (("policy", "hold", "--from", "@d.example"), 64, "neither an address nor <>"),
            (("policy", "hold", "--app", "x", "--domain", ""), 64, "--domain: it is empty"),
            (("site", "suspend", "", "--app", "news"), 64, "NAME: it is empty"),
            (("site", "suspend", "x", "--app", ""), 64, "--app: it is empty"),
            (("queue", "delete", unknown), 1, f"no such message in the queue: {unknown}"),
            (("queue", "hold", unknown, "--json"), 1, f"no such message in the queue: {unknown}"),
            (("queue", "hold", unknown, "--dry-run"), 1, f"no such message in the queue: {unknown}"),
            (("queue", "delete", known, "--held"), 1, f"no such message in the queue that matches: {known}"),
            (("queue", "list", "--domain", "\udcff"), 69, "cannot be sent"),
        ):  # fmt: skip
            done = relay.cli(*verb, check=False)
            assert done.returncode == status and text in done.stderr and "Traceback" not in done.stderr, (verb, done)
        done = relay.cli("queue", "hold", unknown, known, check=False)
        assert done.returncode == 1 and "1 of 1 messages changed" in done.stdout and unknown in done.stderr
        socket = relay.spool / "control.sock"
        for about in ("helo=boss", "site=x", "ident=5", "held=1"):
            with pytest.raises(Refused, match="a policy cannot be about"):
                control.ask(socket, "policy", kind="bounce", about=about, seconds=60, reason="x")
        chosen = {"queue": "smarthost", "until": 1}  # older than all
        assert control.ask(socket, "move", chosen=chosen, word="smarthost", dry_run=False) is None
        assert {state["kind"] for state in control.ask(socket, "site_states")} <= {"dead"}
        assert [row["messages"] for row in relay.summary()] == [1]
        relay.stop()
        done = relay.cli("queue", "list", "--site", "smarthost", check=False)
        assert done.returncode == 69 and "which mail is for a site" in done.stderr


IMPORTS = """
import os, sys
class Refuser:
    def find_spec(self, name, path=None, target=None):
        if os.geteuid():
            raise ImportError(f"{name} is imported after root was dropped")
sys.meta_path.insert(0, Refuser())
from relaymta.cli import main
main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="dropping root needs root")
def test_the_offline_reader_imports_nothing_after_root_is_dropped():
    with tempfile.TemporaryDirectory(prefix="relaymta-") as folder:  # which others may enter, unlike those of pytest
        Path(folder).chmod(0o755)
        with Relay(Path(folder), f"127.0.0.1:{free_port()}", "delivery.first_retry=600", workers=1) as relay:
            relay.send()
            relay.send("Subject: large\r\n\r\n" + ("x" * 70 + "\r\n") * 20_000)
            at_rest(relay, 2)
            relay.stop()
        small, large = (event["id"] for event in relay.events("queued"))
        for path in [relay.spool, *relay.spool.rglob("*")]:
            os.chown(path, 65534, 65534)
        for verb in (
            ("queue", "summary"), ("queue", "shape"), ("queue", "list"), ("queue", "list", "--domain", "x"),
            ("message", "show", small), ("message", "raw", small), ("message", "raw", large), ("message", "history", small),
            ("queue", "summary", "--json"), ("queue", "show", "smarthost"),
        ):  # fmt: skip
            command = [sys.executable, "-c", IMPORTS, *verb, "--spool", str(relay.spool)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode, done.stderr.removeprefix("no such messages\n")) == (0, ""), (verb, done.stderr)


def test_a_page_is_limited_by_its_octets_too(tmp_path, monkeypatch):
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", "delivery.first_retry=600", workers=1) as relay:
        relay.send_all(5)
        at_rest(relay, 5)
        relay.stop()
    monkeypatch.setattr(listing, "PAGE_OCTETS", 400)
    counts, after = [], 0
    while True:
        page = offline.answer(relay.spool, "page", shard=0, after=after, chosen={})
        counts.append(len(page["ids"]))
        after = page["after"]
        if not after:
            break
    assert sum(counts) == 5 and max(counts) < 5


def test_a_wrong_argument_on_the_control_socket_is_a_sentence(tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", workers=1) as relay:
        socket = relay.spool / "control.sock"
        for op in REQUESTS:
            with pytest.raises(Refused, match=f"^{op}: "):
                control.ask(socket, op, nonsense=1)
        assert relay.cli("status").returncode == 0
        assert not [event for event in relay.events("warning") if "request" in event["text"]]
