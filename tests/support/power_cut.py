"""Simulated power cuts: the real system calls of a program that owns a store are recorded (strace), then replayed up to random
moments into images in which everything that was not synced is kept, dropped or torn at random. What the program has said on its
standard output by then is what it has acknowledged."""

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.programs import need

__all__ = ["Call", "Image", "images", "recorded"]

CALLS = "openat,mkdir,pwrite64,pwritev,pwritev2,write,writev,lseek,fdatasync,fsync,ftruncate,unlink,rename"
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
    """The calls that succeeded, of a trace whose paths are no longer in hexadecimal."""
    calls: list[Call] = []
    positions: dict[str, int] = {}
    dsync: set[str] = set()
    for line in finished_lines(trace):
        match = _LINE.match(line)
        if match is None or int(match[3]) < 0:
            continue
        name, arguments, result = match[1], match[2], int(match[3])
        if name == "openat":
            opened = re.search(r"= \d+<([^>]*)>", line)
            if opened is None:
                continue
            handle = f"{result}<{opened[1]}>"
            positions.pop(handle, None)
            dsync.discard(handle)
            if "O_DSYNC" in arguments:
                dsync.add(handle)
            if "O_CREAT" in arguments:
                calls.append(Call("create", opened[1]))
            continue
        if name in ("unlink", "mkdir"):
            calls.append(Call(name, unhex(arguments).decode()))
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
    """A disk: what is durable of each file, and what is only in the page cache. A name, of a folder too, is durable once the
    folder that it is in has been synced."""

    durable: dict[str, bytearray] = field(default_factory=dict)
    pending: dict[str, list[Call]] = field(default_factory=dict)
    unnamed: set[str] = field(default_factory=set)  # created, its directory not synced yet
    removed: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)  # lines of standard output
    taken: int = 0  # how many of them

    def play(self, call: Call) -> None:
        if call.name == "create":
            if call.path not in self.durable:
                self.durable[call.path] = bytearray()
                self.unnamed.add(call.path)
            self.removed.discard(call.path)
        elif call.name == "mkdir":
            self.unnamed.add(call.path)
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
            self.said += call.data.decode().splitlines()

    def take(self) -> list[str]:
        """The lines that were said since the last time."""
        new, self.taken = self.said[self.taken :], len(self.said)
        return new

    def write_out(self, root: Path, target: Path, rng: random.Random) -> None:
        """The image as a power cut now would leave it."""
        below = sorted(path for path in self.unnamed if path.startswith(f"{root}/"))
        lost = {Path(path) for path in below if rng.random() < 0.5}  # these names never reached the disk
        for path, content in self.durable.items():
            if not path.startswith(str(root)) or path.endswith(("lock", "lock.mdb", "ballast")):
                continue
            if not lost.isdisjoint((Path(path), *Path(path).parents)):
                continue
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


def recorded(module: str, root: Path, *arguments: str) -> list[Call]:
    """The calls of `python -m MODULE ROOT ARGUMENTS`, which must succeed, in the order in which they ended."""
    trace = root.with_suffix(".trace")
    subprocess.run(
        [need("strace"), "-f", "-y", "-xx", "-s", "9999999", "-o", trace, "-e", f"trace={CALLS}", "--", sys.executable, "-m",
         module, root, *arguments],
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    text = trace.read_text()
    trace.unlink()
    return calls_of(re.sub(r"<((?:\\x[0-9a-f]{2})+)>", lambda m: f"<{unhex(chr(34) + m[1] + chr(34)).decode()}>", text))


def images(calls: list[Call], cuts: int, root: Path, target: Path, rng: random.Random) -> Iterator[tuple[str, Image]]:
    """Cut the power at so many moments behind the first acknowledgement: (where, image), with the disk of `root` as it is then
    in `target`."""
    first = next(i for i, call in enumerate(calls) if call.name == "output")
    moments = set(rng.sample(range(first, len(calls)), min(cuts, len(calls) - first)))
    image = Image()
    for position, call in enumerate(calls):
        image.play(call)
        if position in moments:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            image.write_out(root, target, rng)
            yield f"cut at call {position} ({call.name} {call.path})", image
