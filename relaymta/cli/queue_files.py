"""`relaymta queue export` and `import`: messages of the queue as files, ID.eml (message data) and ID.json (all else).

A message is exported when its ID.json is there: that is written last. With `--delete` it leaves the queue when both files are
synced, and only if it is still as they say. So wherever an export is interrupted, a message is in the queue, in files, or both.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from relaymta.cli.console import say, say_json
from relaymta.cli.folder import Folder, open_folder
from relaymta.cli.options import Configuration, fail, incomplete, missing
from relaymta.cli.peer import asked, connect, counted
from relaymta.cli.queue import changeable, pages
from relaymta.errors import NoSuch, RelayError
from relaymta.ident import format_id, parse_id, shard_of

if TYPE_CHECKING:
    from relaymta.cli.peer import Peer

__all__ = ["export", "import_from"]

TOGETHER = 100  # messages that are synced, then deleted, together
ROUNDS = 3  # for a message that changes while it is exported
SMALL = 512 << 10  # octets of message data that go with the request
PIECE = 256 << 10
JSON_MOST = 32 << 20


@contextmanager
def _folder(path: Path, make: bool) -> Iterator[Folder]:
    try:
        folder = open_folder(path, make)
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 73 if make else 74, f"{path}: {error.strerror}")
    try:
        _reserve(folder, make)
        yield folder
    finally:
        folder.close()


def _reserve(folder: Folder, alone: bool) -> None:
    """An export takes back the files of what has not left the queue, or has left it otherwise: those of another export must not
    be among them, and nobody may import them meanwhile."""
    if not folder.reserve(alone):
        fail(75, f"{folder.path} is in use by another export{' or import' if alone else ''}; nothing was changed")


# Export


class _Export:
    """One export. `found`: its counts, for --json."""

    def __init__(self, peer: "Peer", folder: Folder, delete: bool, force: bool) -> None:
        self._peer, self._folder, self._delete, self._force = peer, folder, delete, force
        self.found: dict[str, Any] = {"matched": 0, "exported": 0, "deleted": 0, "in_flight": 0, "existing": 0, "damaged": 0}

    def shard(self, shard: int, idents: list[int]) -> None:
        """Export these messages of a shard, some at a time."""
        self.found["matched"] += len(idents)
        for start in range(0, len(idents), TOGETHER):
            left = idents[start : start + TOGETHER]
            for _ in range(ROUNDS):
                left = self._some(shard, left)
                if not left:
                    break
            self.found["in_flight"] += len(left)  # tried again and again meanwhile

    def _some(self, shard: int, idents: list[int]) -> list[int]:
        """Export some messages; those that have changed meanwhile, so that their files were removed."""
        written = {ident: known for ident, known, record in self._records(shard, idents) if self._write(ident, record)}
        if not written:
            return []
        self._folder.sync()
        self.found["exported"] += len(written)
        if not self._delete:
            return []
        results = asked(self._peer, "exported", shard=shard, messages=list(written.items()))
        if results is None:  # the worker is missing, which is said at the end
            return []
        kept = [(ident, what) for ident, what in results if what != "deleted"]
        for ident, _ in kept:  # it is in the queue, or has left it: never in both
            for suffix in (".json", ".eml"):
                self._folder.remove(format_id(ident) + suffix)
        self.found["exported"] -= len(kept)
        self.found["deleted"] += len(results) - len(kept)
        self.found["in_flight"] += sum(what == "in flight" for _, what in kept)
        return [ident for ident, what in kept if what == "changed"]

    def _records(self, shard: int, idents: list[int]) -> Iterator[tuple[int, str, bytes]]:
        while idents:
            found = asked(self._peer, "records", shard=shard, idents=idents) or []
            yield from ((ident, known, record) for ident, known, record in found if record)
            idents = idents[len(found) :] if found else []

    def _write(self, ident: int, record: bytes) -> bool:
        """Write both files; False where they cannot be, which is said."""
        name, folder = format_id(ident), self._folder
        if not self._force and (folder.has(f"{name}.json") or folder.has(f"{name}.eml")):
            self.found["existing"] += 1
            say(f"{folder.path / name}.json or .eml exists already: {name} is not exported (--force replaces it)", err=True)
            return False
        fields = msgspec.json.decode(record)
        try:
            fields["sha256"] = self._data(name, fields["size"])
        except RelayError as error:
            self.found["damaged"] += 1
            say(f"{name} is not exported: {error}", err=True)
            folder.remove(f".{name}.eml.part")
            return False
        if not fields["sha256"]:  # it has left the queue, or has got another body
            folder.remove(f".{name}.eml.part")
            return False
        folder.remove(f"{name}.json")  # (--force) first: with the new data it would be another message's
        folder.place(f"{name}.eml", self._force)
        descriptor = folder.create(f"{name}.json")
        try:
            _write(descriptor, msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        folder.place(f"{name}.json", self._force)
        return True

    def _data(self, name: str, size: int) -> str:
        """Write the message data; its SHA-256, "" when it is not there or of another size. RelayError when it is damaged."""
        descriptor, digest, length = self._folder.create(f"{name}.eml"), sha256(), 0
        try:
            for piece in self._peer.pieces("raw", ident=name):
                _write(descriptor, piece)
                digest.update(piece)
                length += len(piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return digest.hexdigest() if length == size else ""


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def export(
    read: Configuration, path: Path, filters: list[dict[str, Any]], delete: bool, force: bool, as_json: bool, dry_run: bool
) -> None:
    """Export the messages that match one of `filters` into a folder."""
    unknown: list[str] = []
    path = path.absolute()
    connect(read)  # before a folder is made for nothing
    with _folder(path, not dry_run) if not dry_run else _nothing() as folder, changeable(read) as peer:
        made = _Export(peer, folder, delete, force)
        try:
            for chosen in filters:
                before = made.found["matched"]
                for shard, idents, _ in pages(peer, chosen):
                    if dry_run:
                        made.found["matched"] += len(idents)
                    else:
                        made.shard(shard, idents)
                if chosen.get("ident") and made.found["matched"] == before:
                    unknown.append(format_id(chosen["ident"]))
        except ConnectionError as error:
            fail(69, f"the daemon does not answer: {error}")
        except OSError as error:
            fail(77 if isinstance(error, PermissionError) else 74, f"{path}: {error.strerror or error}")
    found = made.found | {"dry_run": dry_run}
    if as_json:
        say_json(found | ({"unknown": unknown} if unknown else {}))
    else:
        say(f"export: {_exported(found, path, delete)}")
    incomplete()
    if unknown:
        fail(1, "\n".join(str(NoSuch("message in the queue", ident)) for ident in unknown))
    if found["damaged"] or found["existing"]:
        sys.exit(65 if found["damaged"] else 73)


@contextmanager
def _nothing() -> Iterator[Any]:
    yield None


def _exported(found: dict[str, Any], path: Path, delete: bool) -> str:
    if found["dry_run"]:
        return f"{counted(found['matched'], 'message matches', 'messages match')}; nothing was written"
    if not found["matched"]:
        return "no message matches; nothing was written"
    text = f"{found['exported']} of {found['matched']} messages are in {path}"
    if delete:
        text += f", and {found['deleted']} of them not in the queue any more"
        text += f"; {found['in_flight']} in flight stay in the queue" if found["in_flight"] else ""
    return text


# Import


class _Full(Exception):
    """The relay has no room for more mail."""


class _Import:
    """One import. `found`: its counts, for --json."""

    def __init__(self, peer: "Peer", again: bool) -> None:
        self._peer, self._again = peer, again
        self._shards: list[int] = asked(peer, "shards")
        if missing():  # what its shards have, or had, would be imported into others
            sys.exit(75)  # `configured` names the workers
        self.found = {"imported": 0, "there": 0, "before": 0, "wrong": 0}

    def all(self, paths: Iterable[Path], opened: dict[Path, Folder]) -> None:
        """All messages of these folders and files. _Full."""
        for path in paths:
            if path.is_dir():
                self.folder(opened[path])
            else:
                self.message(opened[path.parent], path.name.removesuffix(".json").removesuffix(".eml"))

    def folder(self, folder: Folder) -> None:
        """All messages of a folder."""
        for name in folder.names():
            stem, _, suffix = name.rpartition(".")
            if name.startswith("."):
                if suffix == "part":
                    say(f"note: {folder.path / name} is what an interrupted export has left", err=True)
            elif suffix == "json":
                self.message(folder, stem)
            elif suffix == "eml" and not folder.has(f"{stem}.json"):
                self._wrong(folder, name, f"there is no {stem}.json: its export was interrupted")

    def message(self, folder: Folder, stem: str) -> None:
        """One message. What is wrong with it is said."""
        file = f"{stem}.json"
        try:
            record = self._read(folder, file)
            ident = record.get("id")
            if ident != stem:
                raise RelayError(f"$.id: it is not that of the file's name: {ident!r}")
            number = parse_id(stem)
            file = f"{stem}.eml"
            descriptor = folder.open(file)
        except (RelayError, ValueError) as error:
            self._wrong(folder, file, str(error))
            return
        except OSError as error:
            self._wrong(folder, file, error.strerror or str(error))
            return
        try:
            self._put(folder, stem, number, record, descriptor)
        finally:
            os.close(descriptor)

    def _read(self, folder: Folder, file: str) -> dict[str, Any]:
        descriptor = folder.open(file)
        with os.fdopen(descriptor, "rb") as opened:
            text = opened.read(JSON_MOST + 1)
        if len(text) > JSON_MOST:
            raise RelayError(f"it has more than {JSON_MOST >> 20} MB")
        try:
            found = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RelayError(f"no JSON: {error}") from None
        if not isinstance(found, dict):
            raise RelayError("no JSON object")
        self._text = text
        return found

    def _put(self, folder: Folder, stem: str, number: int, record: dict[str, Any], descriptor: int) -> None:
        home = shard_of(number)
        shard = home if home in self._shards else self._shards[number % len(self._shards)]
        size, digest = record.get("size"), sha256()
        length = os.fstat(descriptor).st_size
        if not isinstance(size, int):
            self._wrong(folder, f"{stem}.json", "$.size: it is no number of octets")
            return
        if size != length:
            self._wrong(folder, f"{stem}.eml", f"it has {length} octets, and {stem}.json says {size}")
            return
        data = b"" if length <= SMALL else None
        at, last = 0, b""
        while piece := os.read(descriptor, PIECE):
            digest.update(piece)
            if _bare(last + piece):
                self._wrong(folder, f"{stem}.eml", "it has CR or LF alone: lines end with CR LF")
                return
            last = b"\r" if piece.endswith(b"\r") else b""
            if data is not None:
                data += piece
            at += len(piece)
        if last or digest.hexdigest() != record.get("sha256"):
            self._wrong(folder, f"{stem}.eml", f"its SHA-256 is not the one that {stem}.json says")
            return
        try:
            if data is None:
                self._send(shard, number, descriptor)  # _Full
            what = self._peer.ask("import_message", shard=shard, record=self._text, data=data, again=self._again)
        except RelayError as error:
            self._wrong(folder, f"{stem}.json", str(error))
            return
        self._became(folder, stem, what)

    def _send(self, shard: int, number: int, descriptor: int) -> None:
        at = 0
        while piece := os.pread(descriptor, PIECE, at):
            if self._peer.ask("import_data", shard=shard, ident=number, at=at, data=piece):
                raise _Full
            at += len(piece)

    def _became(self, folder: Folder, stem: str, what: str | None) -> None:
        if what == "imported":
            self.found["imported"] += 1
        elif what == "there":
            self.found["there"] += 1
            say(f"{stem} is in the queue already: skipped", err=True)
        elif what == "before":
            self.found["before"] += 1
            say(f"{stem} was imported before, and has left the queue: skipped (--again imports it)", err=True)
        elif what == "full":
            raise _Full
        elif what == "other":
            self._wrong(folder, f"{stem}.json", "$.id: another message in the queue has it")

    def _wrong(self, folder: Folder, file: str, why: str) -> None:
        self.found["wrong"] += 1
        say(f"{folder.path / file}: {why}", err=True)


def _bare(data: bytes) -> bool:
    """Whether there is a CR or LF alone; a CR at the end may have its LF behind it."""
    pairs = data.count(b"\r\n")
    return data.count(b"\n") != pairs or data.count(b"\r") - data.endswith(b"\r") != pairs


def import_from(read: Configuration, paths: tuple[Path, ...], again: bool, as_json: bool) -> None:
    """Import messages: those in folders, and those of single files (ID.json or ID.eml)."""
    opened: dict[Path, Folder] = {}
    full = False
    connect(read)
    try:
        for path in paths:
            where = path if path.is_dir() else path.parent
            if where not in opened:
                opened[where] = open_folder(where.absolute(), False)
                _reserve(opened[where], False)
        with changeable(read) as peer:
            made = _Import(peer, again)
            try:
                made.all(paths, opened)
            except _Full:
                full = True
    except ConnectionError as error:
        fail(69, f"the daemon does not answer: {error}")
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 74, f"{error.filename or paths[0]}: {error.strerror or error}")
    finally:
        for folder in opened.values():
            folder.close()
    found = made.found
    if as_json:
        say_json(found)
    else:
        more = f"; {found['there'] + found['before']} skipped" if found["there"] + found["before"] else ""
        more += f"; {found['wrong']} left out, since something is wrong with them" if found["wrong"] else ""
        say(f"import: {counted(found['imported'], 'message is', 'messages are')} in the queue{more}")
    incomplete()
    if full:
        fail(74, "the relay has no room for more mail; the rest was not looked at: repeat the import when there is room")
    if found["wrong"]:
        sys.exit(65)
