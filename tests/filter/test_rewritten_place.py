"""A body that a filter has written takes the place of the message's: however the process, the disk or the connection ends, the
message has it whole, or nothing is left."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from relaymta.accept.large import ROOM, Large
from relaymta.disk.big import BigBody
from relaymta.errors import StoreError
from relaymta.filter.rewritten import Rewritten
from relaymta.proto.envelope import Body, Envelope
from relaymta.queue import wall_ms
from relaymta.reservation import Reservation
from tests.filter.test_rewritten import Stop, content
from tests.queue.test_one_end import Watched
from tests.queue.test_queue import until
from tests.support.prove import in_prove

OLD_HEADER, NEW_HEADER = b"Subject: old\r\n\r\n", b"Subject: new\r\n\r\n"
OLD = OLD_HEADER + b"old\r\n" * 300_000
NEW = b"a new line\r\n" * 150_000


class Incoming(Watched):
    """A queue, and a message whose body a filter replaces."""

    def __init__(self, folder: Path, large: bool = True, room: int = 0) -> None:
        super().__init__(folder)
        self.large, self.room = large, room
        self.threads = ThreadPoolExecutor(4)

    async def __aenter__(self) -> "Incoming":
        await super().__aenter__()
        self.ident = self.queue.ident()
        self.old: Large | None = None
        if self.large:
            front = [b"Received: x\r\n"]
            self.old = Large(lambda room: self.queue.big_body(self.ident, room), front, header=OLD_HEADER, changes=True)
            self.old.write([OLD])
        return self

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        self.threads.shutdown()

    def thread(self, work: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        return asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    async def rewritten(self, data: bytes = NEW) -> Rewritten:
        queue, ident = self.queue, self.queue.ident()

        def make() -> Large:
            return Large(lambda room: queue.big_body(ident, room), [], changes=True, room=self.room)

        new = Rewritten(make, 0, 1 << 30, self.thread, Reservation(lambda: None))
        for at in range(0, len(data), 65_535):
            await new.write(data[at : at + 65_535])
        await new.end()
        return new

    def become(self, file: BigBody) -> None:
        self.queue.become(file, self.ident)

    def submitted(self, body: Body) -> "asyncio.Future[StoreError | None]":
        done = asyncio.get_running_loop().create_future()
        envelope = Envelope("a@b", ["c@d.example"], body.length, 0, wall_ms(), self.queue.deadline())
        self.queue.submit(self.ident, envelope, body, done.set_result)
        return done

    @property
    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder / "shard-0/bodies/big"))

    @property
    def name(self) -> str:
        return f"{self.ident:016x}"


@pytest.mark.parametrize("large", [True, False], ids=["of a file", "of a body in memory"])
async def test_it_takes_the_place_and_the_message_has_it(tmp_path, large):
    async with Incoming(tmp_path, large) as bench:
        new = await bench.rewritten()
        old = bench.old
        if old is not None:  # filters still read it
            assert old.piece(0, 10) == b"old\r\nold\r\n" and len(bench.files) == 2
        taken = new.large
        assert taken is not None
        await bench.thread(taken.take_place_of, old, bench.become)
        assert bench.files == [bench.name] and await content(new) == NEW
        if old is not None:  # whoever gives it up once more takes nothing away
            old.discard()
            assert bench.files == [bench.name]
        front = b"Received: y\r\n"
        taken.change([front, NEW_HEADER])
        assert b"".join(taken.read()) == front + NEW_HEADER + NEW
        body = await bench.thread(taken.finish, b"DKIM-Signature: z\r\n")
        assert await bench.submitted(body) is None
        taken.discard()  # it is the queue's
        assert bench.files == [bench.name]
        (entry,) = await bench.next()
        stored = b"".join([piece async for piece in bench.queue.stream(entry)])
        assert stored == b"DKIM-Signature: z\r\n" + front + NEW_HEADER + NEW
        bench.queue.finish(entry, None)
        await until(lambda: bench.files == [])


async def test_a_header_may_be_as_long_as_it_was_and_grow(tmp_path):
    header = b"X: y\r\n" * 60_000 + b"\r\n"
    async with Incoming(tmp_path, False, len(header)) as bench:
        new = await bench.rewritten(b"short\n")
        taken = new.large
        assert taken is not None
        taken.take_place_of(None, bench.become)
        front, fields = b"A: b\r\n" * (ROOM // 6), b"C: d\r\n" * (ROOM // 6)
        taken.change([front, header])
        body = taken.finish(fields)
        assert bench.queue.segments.read(bench.ident, body) == fields + front + header + b"short\r\n"
        taken.discard()
        assert bench.files == []


@pytest.mark.parametrize("call", ["rename", "fdatasync", "fsync", "pwritev"])
async def test_a_disk_that_fails_meanwhile_leaves_nothing(tmp_path, monkeypatch, call):
    async with Incoming(tmp_path) as bench:
        new = await bench.rewritten()
        taken = new.large
        assert taken is not None
        with monkeypatch.context() as patched:
            patched.setattr(os, call, lambda *what, **named: (_ for _ in ()).throw(OSError(errno.EIO, "it cannot")))
            with pytest.raises(OSError, match="it cannot"):
                taken.take_place_of(bench.old, bench.become)
                taken.change([NEW_HEADER])
                taken.finish(b"")
        taken.discard()
        assert bench.files == []


async def test_a_sweep_takes_neither_name_away(tmp_path):
    async with Incoming(tmp_path) as bench:
        new = await bench.rewritten()
        taken, old, sweep = new.large, bench.old, bench.queue._big.sweep
        assert taken is not None
        await bench.queue._readers.run(sweep, -60)
        assert len(bench.files) == 2
        taken.take_place_of(old, bench.become)
        bench.old = old = None
        await bench.queue._readers.run(sweep, -60)
        assert bench.files == [bench.name]
        taken.change([NEW_HEADER])
        done = bench.submitted(taken.finish(b""))
        del taken, new
        await bench.queue._readers.run(sweep, -60)
        assert await done is None
        await bench.queue._readers.run(sweep, -60)
        assert bench.files == [bench.name]


async def test_a_sweep_removes_what_its_receiver_has_dropped(tmp_path):
    """Under either name."""
    async with Incoming(tmp_path) as bench:
        first, second = await bench.rewritten(), await bench.rewritten()
        assert second.large is not None
        second.large.take_place_of(bench.old, bench.become)
        bench.old = None
        assert len(bench.files) == 2
        del first, second
        await bench.queue._readers.run(bench.queue._big.sweep, -60)
        assert bench.files == []


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["rename", "unlink"])
async def test_it_is_given_up_while_it_takes_the_place(tmp_path, monkeypatch, call, done):
    """The end of a connection, and of the loop, discards both whatever a thread does with them."""
    async with Incoming(tmp_path) as bench:
        new, old = await bench.rewritten(), bench.old
        stop = Stop(monkeypatch, os, call, done)
        taken = new.large
        assert taken is not None and old is not None
        taking = bench.thread(taken.take_place_of, old, bench.become)
        await stop.wait()
        discarding = [bench.thread(old.discard), bench.thread(taken.discard)]
        await asyncio.sleep(0.02)
        stop.go.set()
        found = await asyncio.gather(taking, *discarding, return_exceptions=True)
        assert found[1:] == [None, None] and (found[0] is None or isinstance(found[0], OSError))
        assert bench.files == []


async def test_the_queue_knows_it_by_its_messages_id_before_it_has_the_name(tmp_path, monkeypatch):
    """A sweep between the two must find a receiver."""
    async with Incoming(tmp_path, False) as bench:
        new = await bench.rewritten()
        received, rename, seen = bench.queue._big._received, os.rename, []

        def looking(*names: Any) -> None:
            seen.append(bench.ident in received)
            rename(*names)

        monkeypatch.setattr(os, "rename", looking)
        assert new.large is not None
        new.large.take_place_of(None, bench.become)
        assert seen == [True]
        bench.queue._big.submitted(bench.ident)
        assert received[bench.ident].submitted


# kill -9

POINTS = ["new body", "old one removed", "before the rename", "renamed", "finished", "submitted", "committed"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def replaced_until(folder: Path, point: str, large: bool) -> None:
    """In a process of its own: a message's body is replaced, and the process killed at that point."""
    async with Incoming(folder, large) as bench:
        new = await bench.rewritten()
        taken, rename = new.large, os.rename
        assert taken is not None
        if point == "new body":
            die()
        if point == "old one removed" and bench.old is not None:
            bench.old.discard()
            die()

        def killing(*names: Any) -> None:
            if point == "before the rename":
                die()
            rename(*names)
            die()

        if point in ("before the rename", "renamed"):
            os.rename = killing  # type: ignore[assignment]
        taken.take_place_of(bench.old, bench.become)
        taken.change([NEW_HEADER])
        body = taken.finish(b"")
        print(bench.ident, flush=True)
        if point == "finished":
            die()
        done = bench.submitted(body)
        if point == "submitted":
            die()
        await done
        print("committed", flush=True)
        die()


@pytest.mark.parametrize(
    ("large", "point"),
    [
        *((True, point) for point in POINTS),
        (False, "renamed"),
        *in_prove(*((False, point) for point in POINTS if point != "renamed")),
    ],
    ids=lambda value: value if isinstance(value, str) else "of a file" if value else "of a body in memory",
)
async def test_a_process_that_is_killed_leaves_the_whole_message_or_none(tmp_path, point, large):
    code = (
        "import asyncio, sys; from pathlib import Path; from tests.filter.test_rewritten_place import replaced_until; "
        "asyncio.run(replaced_until(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == 'True'))"
    )
    asked = [sys.executable, "-c", code, str(tmp_path), point, str(large)]
    ended = await asyncio.to_thread(subprocess.run, asked, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert b"committed" in ended.stdout or point != "committed"
    left = os.listdir(tmp_path / "shard-0/bodies/big")
    assert len(left) == (2 if large and point == "new body" else 1)
    async with Watched(tmp_path) as bench:
        if b"committed" not in ended.stdout:
            await asyncio.sleep(0.02)
            if not bench.offered:
                assert os.listdir(tmp_path / "shard-0/bodies/big") == []
                return
        (entry,) = await bench.next()
        assert entry.ident == int(ended.stdout.split()[0])
        assert b"".join([piece async for piece in bench.queue.stream(entry)]) == NEW_HEADER + NEW
        assert os.listdir(tmp_path / "shard-0/bodies/big") == [f"{entry.ident:016x}"]
