"""A simulated power cut: the real system calls of the queue are recorded, then replayed up to random moments into images in
which everything that was not synced is kept, dropped or torn at random. Each image must hold every acknowledged message."""

import asyncio
import hashlib
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from relaymta.proto.envelope import QueueName
from relaymta.queue import Events, Null, Queue, QueueSettings, format_id
from tests.conftest import PROVE
from tests.support.programs import need

CALLS = "openat,pwrite64,pwritev,pwritev2,write,writev,lseek,fdatasync,fsync,ftruncate,unlink,rename"
CUTS = 250 if PROVE else 40
SECTOR = 512

_LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
_FD = re.compile(r"^(\d+)<([^>]*)>")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass
class Call:
    """One finished system call: its file, octets and offset."""

    name: str
    path: str
    data: bytes = b""
    offset: int = 0
    dsync: bool = False


def unhex(text: str) -> bytes:
    return b"".join(bytes.fromhex(part.replace("\\x", "")) for part in _STRING.findall(text))


def finished_lines(trace: str) -> list[str]:
    """strace's lines in order of completion, interrupted ones joined."""
    lines, halves = [], {}
    for line in trace.splitlines():
        pid, _, rest = line.partition(" ")
        if rest.rstrip().endswith("<unfinished ...>"):
            halves[pid] = rest.rstrip().removesuffix("<unfinished ...>").strip()
        elif "resumed>" in rest:
            lines.append(halves.pop(pid, "") + rest.partition("resumed>")[2])
        else:
            lines.append(rest.strip())
    return lines


def calls_of(trace: str) -> list[Call]:
    calls: list[Call] = []
    positions: dict[str, int] = {}
    dsync: set[str] = set()
    for line in finished_lines(trace):
        match = _LINE.match(line)
        if match is None or int(match[3]) < 0:
            continue
        name, arguments, result = match[1], match[2], int(match[3])
        if name == "openat":
            path = re.search(r"= \d+<([^>]*)>", line)
            if path is not None and "O_DSYNC" in arguments:
                dsync.add(f"{result}<{path[1]}>")
            if path is not None and "O_CREAT" in arguments:
                calls.append(Call("create", path[1]))
            continue
        if name == "unlink":
            calls.append(Call("unlink", unhex(arguments).decode()))
            continue
        fd = _FD.match(arguments)
        if fd is None:
            continue
        handle, path = fd[0], fd[2]
        if name == "lseek":
            positions[handle] = result
        elif name in ("fdatasync", "fsync"):
            calls.append(Call("sync", path))
        elif name == "ftruncate":
            calls.append(Call("truncate", path, offset=int(arguments.rpartition(",")[2])))
        elif fd[1] == "1":
            calls.append(Call("output", "", unhex(arguments)))
        elif name in ("write", "writev"):
            offset = positions.get(handle, 0)
            calls.append(Call("write", path, unhex(arguments)[:result], offset, handle in dsync))
            positions[handle] = offset + result
        else:
            numbers = re.findall(r", (\d+)", arguments)
            offset = int(numbers[-2] if name == "pwritev2" else numbers[-1])
            calls.append(Call("write", path, unhex(arguments)[:result], offset, handle in dsync))
    return calls


@dataclass
class Image:
    """A disk: what is durable of each file, and what is only in the page cache."""

    durable: dict[str, bytearray] = field(default_factory=dict)
    pending: dict[str, list[Call]] = field(default_factory=dict)
    unnamed: set[str] = field(default_factory=set)  # created, its directory not synced yet
    removed: set[str] = field(default_factory=set)
    acknowledged: dict[str, str] = field(default_factory=dict)
    moved: int = 0  # bodies that compaction moved

    def play(self, call: Call) -> None:
        if call.name == "create":
            if call.path not in self.durable:
                self.durable[call.path] = bytearray()
                self.unnamed.add(call.path)
            self.removed.discard(call.path)
        elif call.name == "unlink":
            self.removed.add(call.path)
        elif call.name == "write":
            self.durable.setdefault(call.path, bytearray())
            if call.dsync:
                apply(self.durable[call.path], call.offset, call.data)
            else:
                self.pending.setdefault(call.path, []).append(call)
        elif call.name == "truncate":
            self.pending.setdefault(call.path, []).append(call)
        elif call.name == "sync":
            for one in self.pending.pop(call.path, []):
                apply(self.durable[call.path], one.offset, one.data)
            self.unnamed = {p for p in self.unnamed if str(Path(p).parent) != call.path}
        elif call.name == "output":
            for line in call.data.decode().splitlines():
                word, ident, *rest = line.split()
                if word == "ACK":
                    self.acknowledged[ident] = rest[0]
                elif word == "END":
                    self.acknowledged.pop(ident, None)
                else:
                    self.moved = int(ident)

    def write_out(self, root: Path, target: Path, rng: random.Random) -> None:
        """The image as a power cut now would leave it."""
        for path, content in self.durable.items():
            if not path.startswith(str(root)) or path.endswith(("lock", "lock.mdb", "ballast")):
                continue
            if path in self.unnamed and rng.random() < 0.5:
                continue  # its name never reached the disk
            if path in self.removed and rng.random() < 0.5:
                continue
            left = bytearray(content)
            for call in self.pending.get(path, []):
                fate = rng.choice(["kept", "dropped", "torn"])
                if fate == "kept":
                    apply(left, call.offset, call.data)
                elif fate == "torn":
                    for start in range(0, len(call.data), SECTOR):
                        if rng.random() < 0.5:
                            apply(left, call.offset + start, call.data[start : start + SECTOR])
            out = target / Path(path).relative_to(root)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(left)


def apply(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


async def messages_in(spool: Path) -> dict[str, str]:
    """Hash by id of every message in a spool, read as the relay reads them."""
    queue = Queue(spool, 0, QueueSettings("relay.example"), lambda *_: [(QueueName("out", ""), None)], Null(), Events())
    queue.entries.paused = True
    await queue.start()
    found = {}
    with queue.store.env.begin() as txn:
        for ident, envelope in queue.store.idents(txn, 0, queue.store.fresh.live()):
            found[format_id(ident)] = hashlib.sha256(queue.segments.read(ident, envelope.body)).hexdigest()
    await queue.stop()
    return found


def test_every_image_holds_every_acknowledged_message(tmp_path):
    strace = need("strace")
    rng = random.Random(7)
    root = tmp_path / "spool"
    trace = tmp_path / "trace"
    subprocess.run(
        [strace, "-f", "-y", "-xx", "-s", "9999999", "-o", trace, "-e", f"trace={CALLS}", "--", sys.executable, "-m",
         "tests.queue.power_cut_driver", root, "60", "7"],
        check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    text = re.sub(r"<((?:\\x[0-9a-f]{2})+)>", lambda m: f"<{unhex(chr(34) + m[1] + chr(34)).decode()}>", trace.read_text())
    calls = calls_of(text)
    first = next(i for i, call in enumerate(calls) if call.name == "output")
    cuts = sorted(rng.sample(range(first, len(calls)), min(CUTS, len(calls) - first)))
    image = Image()
    checked = 0
    for position, call in enumerate(calls):
        image.play(call)
        if position in cuts:
            target = tmp_path / "image"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            image.write_out(root, target, rng)
            found = asyncio.run(messages_in(target))
            missing = {ident for ident, digest in image.acknowledged.items() if found.get(ident) != digest}
            assert not missing, f"cut at call {position} ({call.name} {call.path}): {len(missing)} messages are lost"
            checked += len(image.acknowledged)
    assert checked > 500
    assert image.moved > 100
