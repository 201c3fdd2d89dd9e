"""What a 250 promises, tested with kill -9, strace, full disks and failing syncs."""

import asyncio
import contextlib
import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import PROVE
from tests.support.daemon import Relay, dialog, free_port, wait_for
from tests.support.fake_mx import SILENT, FakeMx
from tests.support.programs import need
from tests.support.prove import in_prove
from tests.support.source import Source
from tests.support.traced import BEGINS, CALLS, Syncs, is_traced, moments

KILLS = 30 if PROVE else 4
PAUSE = 0.0 if PROVE else 0.02  # seconds of each client between two messages: many are under way all the time, even so


def check_ledger(source: Source, ledger) -> int:
    """Check that every acknowledged message has arrived unchanged; how many arrived more than once."""
    counts = ledger.counts()
    lost = [ident for ident in source.acknowledged if not counts[ident]]
    assert not lost, f"{len(lost)} of {len(source.acknowledged)} acknowledged messages are lost: {lost[:5]}"
    digests = {ident: digest for ident, digest, _ in ledger.taken}
    wrong = [ident for ident, digest in source.acknowledged.items() if digests[ident] != digest]
    assert not wrong, f"changed on the way: {wrong[:5]}"
    return sum(1 for count in counts.values() if count > 1)


def check_outcomes(relay: Relay) -> None:
    """Check that no message was sent again after its outcome was committed, which is when "delivered" is logged."""
    committed = Counter(event["id"] for event in relay.events("delivered"))
    again = [ident for ident, count in committed.items() if count > 1]
    assert not again, f"sent again after their outcome was committed: {again}"


def load_while(source: Source, disturbance: Coroutine[object, object, None]) -> None:
    """Send until the disturbance has ended."""

    async def main() -> None:
        task = asyncio.create_task(disturbance)
        await source.run(task.done)
        await task

    asyncio.run(main())


def replaced(relay: Relay, victim: int) -> bool:
    pids = relay.worker_pids()
    return len(pids) == relay.workers and victim not in pids


def drained(relay: Relay, seconds: float = 60) -> None:
    wait_for(lambda: relay.summary() == [], seconds, "an empty queue")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [*in_prove(1), 2])
def test_kill_minus_nine_of_the_whole_group_loses_nothing(tmp_path, ledger, workers):
    """Duplicates are allowed only for messages that were in doubt at a kill."""
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=workers).start()
    source = Source(lambda: relay.port, 20, pause=PAUSE)

    async def kills() -> None:
        for _ in range(KILLS):
            before = len(source.acknowledged)
            while len(source.acknowledged) <= before + 100:
                await asyncio.sleep(0.01)
            await asyncio.sleep(random.uniform(0, 0.5))
            relay.kill()
            await asyncio.to_thread(relay.start)
        await asyncio.sleep(0.5)

    try:
        load_while(source, kills())
        drained(relay)
        assert len(source.acknowledged) > 100 * KILLS
        duplicates = check_ledger(source, ledger)
        # At each kill, at most the messages of the 20 connections: one past its dot on each, and the group being committed.
        assert duplicates <= KILLS * 20 * workers * 4, f"{duplicates} duplicates"
        check_outcomes(relay)
        unknown = set(ledger.counts()) - source.offered
        assert not unknown, f"messages that were not sent: {unknown}"
    finally:
        relay.kill()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [*in_prove(1), 2])
def test_a_killed_worker_is_replaced_and_no_connect_fails(tmp_path, ledger, workers):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=workers) as relay:
        source = Source(lambda: relay.port, 10, reuse=False, pause=PAUSE)
        slowest = 0.0  # of the replacements

        async def kills() -> None:
            nonlocal slowest
            for _ in range(max(2, KILLS // 2)):
                await asyncio.sleep(random.uniform(0.5, 1.5))
                victim = random.choice(await asyncio.to_thread(relay.worker_pids))
                began = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                await asyncio.to_thread(wait_for, partial(replaced, relay, victim))
                slowest = max(slowest, time.monotonic() - began)

        load_while(source, kills())
        drained(relay)
        assert source.failed_connects == 0
        assert check_ledger(source, ledger) <= KILLS * 10 * 4
        check_outcomes(relay)
        if workers == 2:  # its sockets are lent to the other worker; a slow machine may take longer than the promised second
            assert source.slowest_banner < (1 if PROVE else max(3, slowest))


@pytest.mark.timeout(600)
def test_a_killed_supervisor_loses_nothing(tmp_path, ledger):
    """Its workers finish what is past the dot and release the spool, which the next start takes over."""
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=2).start()
    source = Source(lambda: relay.port, 10, pause=PAUSE)

    async def kills() -> None:
        for _ in range(max(2, KILLS // 3)):
            await asyncio.sleep(random.uniform(0.5, 1.0))
            pids = await asyncio.to_thread(relay.worker_pids)
            assert relay.process is not None
            relay.process.kill()
            relay.process.wait()
            await asyncio.to_thread(wait_for, lambda: not any(alive(pid) for pid in pids), what="the workers to end")  # noqa: B023
            await asyncio.to_thread(relay.start)

    try:
        load_while(source, kills())
        drained(relay)
        assert check_ledger(source, ledger) == 0, "orphaned workers drain: they make no duplicates"
        check_outcomes(relay)
    finally:
        relay.kill()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_killed_supervisor_leaves_no_worker_behind(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as relay:
        relay.send("X-Ledger: before\r\n\r\nx\r\n")
        pids = relay.worker_pids()
        assert relay.process is not None
        relay.process.kill()
        relay.process.wait()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20, "the workers to end")
        relay.start()
        relay.send("X-Ledger: after\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts() == {"before": 1, "after": 1})


def test_sigterm_drains_and_nothing_is_sent_twice(tmp_path, ledger):
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}").start()
    source = Source(lambda: relay.port, 10, pause=PAUSE)
    rounds = 0

    async def stops() -> None:
        nonlocal rounds
        for _ in range(3):
            await asyncio.sleep(0.5)
            assert await asyncio.to_thread(relay.stop) == 0
            await asyncio.to_thread(relay.start)
            rounds += 1

    try:
        load_while(source, stops())
        drained(relay)
        assert rounds == 3
        assert check_ledger(source, ledger) == 0, "an orderly stop makes no duplicates"
    finally:
        relay.kill()


def test_a_relay_that_stops_takes_no_connection_and_answers_operators(tmp_path):
    """Mail may be past its final dot for long. Clients try the next host, and nobody is told that it does not run."""
    with FakeMx({"DOT": SILENT}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        relay.send()
        wait_for(lambda: "DATA" in peer.commands)
        assert relay.process is not None
        relay.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", relay.port)) == errno.ECONNREFUSED

        wait_for(refused)
        found = relay.cli("status")
        assert "it is stopping" in found.stdout
        assert relay.unready() == ["stopping"] and relay.monitored("/livez") == (200, "ok\n")
        (row,) = [json.loads(line) for line in relay.cli("queue", "list", "--json").stdout.splitlines()]
        assert "being delivered" in relay.cli("message", "explain", row["id"]).stdout
        assert json.loads(relay.cli("site", "list", "--json").stdout)["in flight"] == 1
        reload = relay.cli("reload", check=False)
        assert reload.returncode == 69 and "stopping" in reload.stderr
        second = subprocess.run(relay.command(), capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 75 and "another relaymta" in second.stderr
        assert relay.process.poll() is None


def test_a_second_relay_is_told_that_the_spool_is_in_use(tmp_path):
    """Also by workers whose supervisor was killed, and by one whose socket is not there."""
    with FakeMx({"DOT": SILENT}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        (relay.spool / "control.sock").unlink()
        second = subprocess.run(relay.command(), capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 75 and f"{relay.spool}/shard-0 is in use by another relaymta" in second.stderr


def test_what_a_killed_relay_has_yet_is_waited_for(tmp_path):
    """Its port, and its shard: they are those of processes that are ending for a second."""
    (tmp_path / "spool" / "shard-0").mkdir(parents=True)
    relay = Relay(tmp_path, f"127.0.0.1:{free_port()}")
    script = (
        f"import fcntl, socket, sys, time; port = socket.create_server(('127.0.0.1', {relay.port}), reuse_port=True); "
        f"shard = open({str(relay.spool / 'shard-0' / 'lock')!r}, 'w'); fcntl.flock(shard, fcntl.LOCK_EX); "
        "print('has both', flush=True); time.sleep(1); shard.close(); time.sleep(0.05)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as ending:
        assert ending.stdout is not None and ending.stdout.readline() == b"has both\n"
        with relay:
            assert dialog(relay.port, b"QUIT\r\n").startswith(b"220 ")


def test_strace_shows_both_syncs_before_every_250(tmp_path, ledger):
    """In this order: the write of the body, its fdatasync, LMDB's pages and its meta page, then "250 queued"."""
    trace = tmp_path / "trace"
    wrap = (need("strace"), "-f", "-y", "-s", "60", "-o", str(trace), "-e", f"trace={CALLS}")
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", wrap=wrap) as relay:
        for number in range(5):
            relay.send(f"X-Ledger: t{number}\r\n\r\nx\r\n")
        wait_for(lambda: len(ledger.taken) == 5, 30)
    queue = Syncs("spool/shard-0")
    named, acknowledged = [], 0
    for when, call in moments(trace.read_text()):
        queue.take(when, call)
        named.append(queue.state == "named")
        if when == BEGINS and "queued as" in call and re.match(r"(write|sendto|sendmsg|writev)\(", call):
            assert queue.state == "committed", f"250 without both syncs: {call} in state {queue.state}"
            queue.clear()
            acknowledged += 1
    assert acknowledged == 5
    assert any(named), "the new segment's name was synced"


@pytest.mark.parametrize("call", ["fdatasync", "pwritev,pwritev2", "fsync"])
def test_one_failed_write_or_sync_is_never_acknowledged(tmp_path, ledger, call):
    """Some such calls of the worker fail with EIO: no 250 for the messages they cover, and the relay recovers by itself."""
    strace = need("strace")
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as relay:
        relay.send("X-Ledger: warm\r\n\r\nx\r\n")
        (pid,) = relay.worker_pids()
        tracer = subprocess.Popen(
            [strace, "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when=3+7", "-p", str(pid)],
            stderr=subprocess.DEVNULL,
        )
        wait_for(partial(is_traced, pid), what="strace to be attached to every thread")
        source = Source(lambda: relay.port, 5, pause=PAUSE)

        async def main() -> None:
            started = time.monotonic()
            enough = lambda: time.monotonic() - started > 2 and (source.refused > 0 or call == "fsync")  # noqa: E731
            await source.run(enough)

        asyncio.run(main())
        tracer.send_signal(signal.SIGTERM)
        tracer.wait(60)
        if call != "fsync":  # fsync is only called for a new file's name
            assert source.refused > 0, "clients got an error reply"
        before = len(source.acknowledged)
        source._stop = False

        asyncio.run(source.run(lambda: len(source.acknowledged) > before + 20))  # it recovers by itself
        drained(relay)
        check_ledger(source, ledger)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_as_the_disk_fills_mail_slows_down_then_is_rejected_then_the_log_stops(tmp_path, ledger):
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(mount)], check=True)  # its floor is 6 MB
    dead = f'{{recipient_domain=["dead.example"],hosts=["127.0.0.1:{free_port()}"]}}'
    routes = f'route=[{dead},{{hosts=["127.0.0.1:{ledger.port}"]}}]'
    relay = Relay(tmp_path, None, routes, "delivery.first_retry=0.02")
    relay.spool, relay.log = mount / "spool", mount / "relay.log"
    filler = mount / "filler"

    def leave(free: int) -> None:
        filler.unlink(missing_ok=True)
        stats = os.statvfs(mount)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - free)

    def accept_seconds() -> float:
        began = time.monotonic()
        relay.send()
        return time.monotonic() - began

    try:
        relay.start()
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "c@dead.example")  # its attempts are always logged
        leave(20 << 20)
        time.sleep(1.5)  # the relay checks once a second
        assert relay.metric("relaymta_store_slow") == 0
        quick = min(accept_seconds() for _ in range(3))
        leave(6400 << 10)
        wait_for(lambda: relay.metric("relaymta_store_slow") == 1)
        slow = accept_seconds()
        assert slow > 0.5 and slow > quick, "three quarters of the way from slow to full"
        leave(5 << 20)
        wait_for(lambda: relay.metric("relaymta_store_full") == 1)
        assert b"\r\n452 4.3.1" in dialog(relay.port, b"EHLO x\r\nMAIL FROM:<a@b>\r\nQUIT\r\n")
        assert relay.unready() == ["disk"]
        leave(2 << 20)
        wait_for(lambda: relay.metric("relaymta_log_dropped_total") > 0)  # the attempts at the dead host
        dropped = relay.metric("relaymta_log_dropped_total")
        size = relay.log.stat().st_size
        wait_for(lambda: relay.metric("relaymta_log_dropped_total") > dropped)
        assert relay.log.stat().st_size == size
        filler.unlink()
        wait_for(lambda: relay.metric("relaymta_store_full") == relay.metric("relaymta_store_slow") == 0)
        assert relay.unready() == []
        relay.send()
        wait_for(lambda: len(ledger.taken) == 5)
        wait_for(lambda: any("log records dropped" in event["text"] for event in relay.events("warning")))
    finally:
        relay.kill()
        subprocess.run(["umount", "-l", str(mount)], check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_on_a_full_disk_clients_get_452_and_nothing_is_lost(tmp_path, ledger):
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], check=True)
    relay = Relay(tmp_path, f"127.0.0.1:{free_port()}", "delivery.first_retry=1")
    relay.spool = mount / "spool"
    try:
        relay.start()
        replies = dialog(relay.port, b"EHLO x\r\nMAIL FROM:<a@b> SIZE=30000000\r\nMAIL FROM:<a@b> SIZE=1000\r\nQUIT\r\n")
        assert b"\r\n452 4.3.1" in replies and b"\r\n250 2.1.0" in replies, "too large for the disk: rejected before it is sent"
        source = Source(lambda: relay.port, 5, size=20_000)

        async def fill() -> None:
            started = time.monotonic()
            await source.run(lambda: source.refused > 30 or time.monotonic() - started > 120)

        asyncio.run(fill())
        assert source.refused > 30, "the disk was full"
        assert len(source.acknowledged) > 100, "a 24 MB disk is enough to accept mail"
        relay.stop()
        filler = mount / "filler"  # another program fills the rest
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        relay.smarthost = f"127.0.0.1:{ledger.port}"
        relay.start()
        drained(relay, 90)  # delivery continues without a free octet
        check_ledger(source, ledger)
        filler.unlink(missing_ok=True)
        wait_for(lambda: relay.metric("relaymta_store_full") == 0, what="the relay to find the free space")
        relay.send("X-Ledger: again\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["again"] == 1, what="mail after that")
    finally:
        if relay.process is not None and relay.process.poll() is None:
            relay.kill()
        subprocess.run(["umount", "-l", str(mount)], check=False)


def test_a_message_in_flight_in_two_crashes_goes_to_quarantine(tmp_path):
    """The worker is killed while the peer delays the reply to the final dot, and again when that message is probed."""
    with FakeMx({"DOT": SILENT}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        relay.send("Subject: poison\r\n\r\nx\r\n")
        for _ in range(2):
            wait_for(lambda: "DATA" in peer.commands, what="the message to be in flight")
            peer.commands.clear()
            (pid,) = relay.worker_pids()
            os.kill(pid, signal.SIGKILL)
            wait_for(partial(replaced_alone, relay, pid), what="another worker")
        (row,) = relay.summary()
        assert row["held"] == 1
        listed = relay.cli("queue", "list", "--held").stdout
        assert "quarantined" in listed and "a worker died twice while delivering it" in listed
        wait_for(lambda: any("quarantined" in event["text"] for event in relay.events("warning")))


def replaced_alone(relay: Relay, victim: int) -> bool:
    pids = relay.worker_pids()
    return len(pids) == 1 and victim not in pids
