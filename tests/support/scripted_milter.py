"""A milter that does as a script says: the filter's side of the protocol, written for itself, with nothing of the relay's in it.

Letters of events and what answers them are those of libmilter's mfdef.h.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "CLOSE", "NO", "NR", "ORDER", "SILENT", "Act", "Hold", "Script", "Scripted", "Told", "agreed", "change", "frame", "lists",
    "scripted",
]  # fmt: skip

ORDER = "CHMRTLNBE"  # events of a message
NO = {"C": 0x1, "H": 0x2, "M": 0x4, "R": 0x8, "B": 0x10, "L": 0x20, "N": 0x40, "U": 0x100, "T": 0x200}
NR = {"L": 0x80, "C": 0x1000, "H": 0x2000, "M": 0x4000, "R": 0x8000, "T": 0x10000, "N": 0x40000, "B": 0x80000}
SKIP, RCPT_REJ, LEADSPC = 0x400, 0x800, 0x100000
FINAL = b"artd4fy"  # but r, t and y about a recipient


@dataclass(frozen=True)
class Hold:
    """Wait for that before anything else is done."""

    until: asyncio.Event


CLOSE, SILENT = object(), object()  # close the connection; do nothing any more, and read nothing
Act = Sequence[object]  # what is done when an event comes: octets to write, CLOSE, SILENT, Hold


def frame(letter: str, data: bytes = b"") -> bytes:
    return (len(data) + 1).to_bytes(4, "big") + letter.encode("latin-1") + data


def agreed(version: int = 6, actions: int = 0x1FF, steps: int = 0, more: bytes = b"") -> bytes:
    """The answer to the offer."""
    return frame("O", b"".join(one.to_bytes(4, "big") for one in (version, actions, steps)) + more)


def lists(**names: str) -> bytes:
    """The macros that it asks for, by stage (SMFIR_SETSYMLIST)."""
    return b"".join("CHMRTEN".index(stage).to_bytes(4, "big") + words.encode() + b"\0" for stage, words in names.items())


def change(letter: str, *texts: bytes, at: int | None = None) -> bytes:
    """A frame of texts, with a number in front."""
    return frame(letter, (b"" if at is None else at.to_bytes(4, "big")) + b"".join(text + b"\0" for text in texts))


@dataclass
class Told:
    """What it was told over a connection: events with their data and the macros in front of them."""

    offer: bytes = b""
    events: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)

    @property
    def letters(self) -> str:
        return "".join(letter for letter, _, _ in self.events)

    def of(self, letter: str) -> list[bytes]:
        return [data for one, data, _ in self.events if one == letter]


@dataclass
class Script:
    """`acts`: by letter, what is done at that event, one after the other for each time it comes; the last one stays. Where there
    is none it says "c", and at E first what `says` has. `ignores`: as libmilter it is silent, after its last word, until the next
    message, or, after one at C or H, for ever. `offer`: what answers the offer, and `steps`, which it means by that."""

    acts: dict[str, list[Act]] = field(default_factory=dict)
    offer: Act = (agreed(),)
    steps: int = 0
    ignores: bool = True
    says: Callable[[str], bytes] = lambda ident: change("h", b"X-Seen", ident.encode())

    def at(self, letter: str, *act: object) -> "Script":
        self.acts.setdefault(letter, []).append(act)
        return self


class Scripted:
    """See above. `script`: what is done from now on; the steps of a connection are those with which it began."""

    def __init__(self) -> None:
        self.script = Script()
        self.told: list[Told] = []
        self.open = self.silent = 0  # connections, and of those the ones that are not read any more
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open += 1
        told = Told()
        self.told.append(told)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._talk(told, reader, writer)
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _talk(self, told: Told, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        macros: dict[str, str] = {}
        steps, silent, counts = self.script.steps, False, dict[str, int]()
        over = False
        while True:
            octets = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
            letter, data = chr(octets[0]), octets[1:]
            if letter == "O":
                told.offer = data
                await self._do(self.script.offer, reader, writer)
                continue
            if letter == "D":
                names = data[1:].decode("utf-8", "surrogateescape").split("\0")
                assert chr(data[0]) in ORDER and names.pop() == "" and all(names[::2])
                macros = dict(zip(names[::2], names[1::2], strict=True))
                continue
            told.events.append((letter, data, macros))
            ident, macros = macros.get("i", ""), {}
            if letter == "Q":
                return
            if letter in "MA":
                silent, counts = False, {}
            if letter == "A" or silent or over:
                continue
            acts = self.script.acts.get(letter)
            counts[letter] = nth = counts.get(letter, -1) + 1
            if acts is not None:
                act = acts[min(nth, len(acts) - 1)]
            elif steps & NR.get(letter, 0):
                continue
            else:
                act = ((self.script.says(ident) if letter == "E" else b"") + frame("c"),)
            silent = await self._do(act, reader, writer, letter) and self.script.ignores
            over = silent and letter in "CH"
            if letter == "E":
                silent, counts = False, {}

    async def _do(self, act: Act, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, letter: str = "") -> bool:
        """Whether a last word was among it."""
        final = False
        for one in act:
            if isinstance(one, bytes):
                writer.write(one)
                await writer.drain()
                final = final or (len(one) > 4 and one[4] in FINAL and not (letter == "R" and one[4] in b"rty"))
            elif isinstance(one, Hold):
                await one.until.wait()
            elif one is CLOSE:
                writer.close()
                raise ConnectionResetError
            else:
                self.silent += 1
                await asyncio.Event().wait()
        return final

    async def end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def scripted() -> AsyncIterator[tuple[Scripted, str]]:
    """One that runs, and its address."""
    made = Scripted()
    with tempfile.TemporaryDirectory(prefix="milter") as folder:
        path = Path(folder) / "s"
        server = await asyncio.start_unix_server(made.serve, path)
        try:
            yield made, f"unix:{path}"
        finally:
            server.close()
            await made.end()
