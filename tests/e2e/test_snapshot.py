"""`queue snapshot`: the queue at one moment, under load; a relay that is started with it has what was there, complete."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

from relaymta.queue import snapshot
from tests.e2e.test_stopped_queue import cli, letters
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.filled import fill, histories

LARGE = "0123456789abcde\r\n" * 80_000


class Load:
    """Clients that send until they are stopped: mail that is delivered, and mail that waits. `taken`: what has had its 250, and
    when."""

    def __init__(self, relay: Relay) -> None:
        self.taken: dict[str, float] = {}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(relay, number)) for number in range(4)]
        for thread in self._threads:
            thread.start()

    def _send(self, relay: Relay, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            name = f"{'live' if count % 2 else 'dead'}-{number}-{count}"
            text = LARGE if count % 20 == 2 else "x" * (count % 7 * 1000 + 10)
            relay.send(f"X-Ledger: {name}\r\n\r\n{text}\r\n", "a@b.example", f"c@{name[:4]}.example")
            self.taken[name] = time.time()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_under_load_it_is_a_state_that_was(tmp_path, ledger):
    (tmp_path / "one").mkdir()
    live = f'{{name="live", recipient_domain=["live.example"], hosts=["127.0.0.1:{ledger.port}"]}}'
    routes = f'route=[{live}, {{name="dead", hosts=["127.0.0.1:{free_port()}"]}}]'
    made = tmp_path / "snapshot"
    with Relay(tmp_path / "one", None, routes, workers=2) as relay:
        load = Load(relay)
        try:
            wait_for(lambda: len(load.taken) > 150, 60, "load")
            began = time.time()
            found = json.loads(relay.cli("queue", "snapshot", str(made), "--json").stdout)
            ended, count = time.time(), len(load.taken)
            wait_for(lambda: len(load.taken) > count + 150, 60, "load behind it")
        finally:
            load.stop()
        delivered = {event["id"] for event in relay.events("delivered") if event["ts"] < began}
        assert not list(relay.spool.glob("snapshot-*"))
    assert sum(snapshot.check(made / name) for name in ("shard-0", "shard-1")) == found["messages"], (
        "what came later harms nothing"
    )
    kept = histories(made)
    names = {data.partition(b"X-Ledger: ")[2].split(b"\r\n", 1)[0].decode(): data for _, data in kept}
    assert len(kept) == len(names) == found["messages"] and found["shards"].keys() == {"0", "1"}
    assert not delivered & {row["id"] for row, _ in kept}, "nothing that was finished before"
    assert {name for name, at in load.taken.items() if at < began and name.startswith("dead")} <= names.keys()
    assert not {name for name, at in load.taken.items() if at > ended + 5} & names.keys()
    assert any(data.endswith(LARGE.encode() + b"\r\n") for data in names.values())
    (tmp_path / "two").mkdir()
    shutil.copytree(made, tmp_path / "two" / "spool")
    before = len(ledger.taken)
    with Relay(tmp_path / "two", f"127.0.0.1:{ledger.port}", workers=2) as relay:
        wait_for(lambda: not relay.summary() and len(ledger.taken) - before >= len(names), 60, "all to be delivered")
    later = ledger.taken[before:]
    assert {name for name, _, _ in later} == names.keys() and len(later) == len(names)


def test_with_the_relay_stopped_and_into_another_file_system(tmp_path):
    spool, made = tmp_path / "spool", Path("/dev/shm") / f"relaymta-{os.getpid()}-snapshot"
    fill(spool, [*letters(3), ("a@b.example", ["c@d.example"], LARGE.encode() * 2)])
    try:
        out, _ = cli(spool, "queue", "snapshot", str(made))
        assert out == f"{made} is a snapshot of 4 messages in 1 shard; all are complete\n"
        there, here = histories(made), histories(spool)
        assert [(row["id"], data) for row, data in there] == [(row["id"], data) for row, data in here]
        assert json.loads((made / "relaymta-snapshot.json").read_text())["messages"] == 4
        assert "is not empty: a snapshot needs a new one" in cli(spool, "queue", "snapshot", str(made), status=69)[1]
    finally:
        shutil.rmtree(made, ignore_errors=True)


def test_damage_is_not_passed_on_as_a_snapshot(tmp_path):
    spool = tmp_path / "spool"
    fill(spool, letters(3))
    segment = next((spool / "shard-0" / "bodies").glob("*.seg"))
    segment.write_bytes(segment.read_bytes().replace(b"hello", b"hallo", 1))
    _, err = cli(spool, "queue", "snapshot", str(tmp_path / "made"), status=69)
    assert "the snapshot is not complete: message " in err and "does not match its checksum" in err
    assert not (tmp_path / "made" / "relaymta-snapshot.json").exists() and not list(spool.glob("snapshot-*"))


def test_what_a_killed_snapshot_has_left_keeps_no_room(tmp_path):
    spool = tmp_path / "spool"
    fill(spool, letters(2))
    left, killed = snapshot.begin(spool)
    os.close(killed)
    (segment,) = (spool / "shard-0" / "bodies").glob("*.seg")
    (left / segment.name).hardlink_to(segment)
    under_way, descriptor = snapshot.begin(spool)
    try:
        cli(spool, "queue", "snapshot", str(tmp_path / "made"))
        assert not left.exists() and under_way.exists(), "another command makes that one"
    finally:
        os.close(descriptor)
