"""Files of addresses that local.aliases includes. They may be somebody else's, who writes into them what makes most work, or on a
disk that does not answer: whatever they are, they are known by what they are and not by how a path is spelled, each is read
once, and how many, how large, how deep and for how long is bounded. One that is wrong concerns those alone that include it."""

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, TypeVar

from relaymta.accept.alias_text import Include, Target, Wrong, lines, targets
from relaymta.files import Unreadable, text_of
from relaymta.watch import Stamp, stamp

__all__ = ["DEEPEST", "MISSING", "MOST", "REPEATED", "WAITS", "Lists", "Troubles", "circle", "plain_file", "stamps", "too_much"]

DEEPEST = 20  # aliases of aliases, files that include files
MOST = 5000  # addresses that an alias leads to, or those of a message's recipients together
REPEATED = 4 * MOST  # the same, where an address counts each time that it is there
FILES = 200  # together; first those that the operator's own file includes
FILES_OF_ONE = 20  # that a file includes, and it and those that it is the first to include together
OCTETS = 1 << 20  # of those
OCTETS_TOGETHER = 4 << 20
WRONG_OF_ONE = 3  # problems with a file, of which no more is read then
TROUBLES = 60
LONGEST_SHOWN = 200  # characters of a name in a circle
SECONDS, SECONDS_TOGETHER = 2.0, 10.0  # until a disk answers
HANGING = 8  # threads that wait for a disk
WAITS = "mail for what leads there waits (451)"
MISSING: Final = Target("", True)  # the targets of a file of which nothing is known

T = TypeVar("T")


class Troubles:
    """What is wrong with included files, each once: TROUBLES at most, and that there is more."""

    def __init__(self) -> None:
        self._all: dict[str, None] = {}

    def add(self, what: str) -> None:
        if len(self._all) < TROUBLES:
            self._all[what] = None
        else:
            self._all["local.aliases: more is wrong with the files that it includes, or leads to them"] = None

    @property
    def all(self) -> list[str]:
        return list(self._all)


class _Edge(NamedTuple):
    """Where a file is included, by which path, and by way of which file that the operator's own includes (an index)."""

    place: str
    path: str
    root: int


class _File:
    """A file as it was read: its own targets, the places where it includes others by their paths, and what is wrong with it.
    `paths`: by which it is included; `whole`: its targets and theirs, once they are known; `height`: how deep these are."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.paths = {path}
        self.own: dict[Target, None] = {}
        self.includes: dict[str, str] = {}
        self.problems: list[str] = []
        self.whole: list[Target] | None = None
        self.height = 1

    def wrong(self, what: str) -> None:
        if what not in self.problems:
            self.problems.append(what)

    def fill(self, text: str, domains: frozenset[str]) -> None:
        """Take what is in its text, up to what is too much, or too wrong."""
        for place, line in lines(self.path, text):
            for one in targets(line, domains):
                if isinstance(one, Wrong):
                    self.wrong(f"{place}: {one.why}")
                elif isinstance(one, Include):
                    self.includes.setdefault(one.path, place)
                else:
                    self.own[one] = None
                if len(self.own) > MOST:
                    self.wrong(f"{place}: leads to more than {MOST} addresses")
                elif len(self.includes) > FILES_OF_ONE:
                    self.wrong(f"{place}: includes more than {FILES_OF_ONE} files")
                elif len(self.problems) < WRONG_OF_ONE:
                    continue
                return


class Lists:
    """The included files. `found`: the targets of each by its path, as of every spelling; `files`: those that were looked for."""

    def __init__(self, domains: frozenset[str], before: dict[str, list[Target]], troubles: Troubles) -> None:
        """`before`: `found` of before, which stays in use where a file is wrong now."""
        self._domains, self._before, self._troubles = domains, before, troubles
        self.found: dict[str, list[Target]] = {}
        self.files: dict[str, None] = {}
        self._read: dict[tuple[int, int], _File] = {}
        self._at: dict[str, _File] = {}
        self._octets = 0
        self._of_root: dict[int, tuple[int, int]] = {}  # how many files, and octets
        self._until = time.monotonic() + SECONDS_TOGETHER

    def read(self, wanted: Mapping[str, str]) -> None:
        """Read these (places by path), and what they include: first all of these, then what these include, so that no file takes
        the place of one that the operator has named. Blocks: SECONDS_TOGETHER at most."""
        edges = deque(_Edge(place, path, root) for root, (path, place) in enumerate(wanted.items()))
        tried, followed = set[tuple[str, int]](), set[tuple[_File, int]]()
        while edges:
            edge = edges.popleft()
            if (edge.path, edge.root) in tried:
                continue
            tried.add((edge.path, edge.root))
            try:
                file = self._at.get(edge.path) or self._opened(edge)
            except OSError as error:
                self._refused(edge, error.strerror or str(error))
                continue
            self._at[edge.path] = file
            file.paths.add(edge.path)
            if (file, edge.root) not in followed:  # also one that is known: this root may have room for what it includes
                followed.add((file, edge.root))
                edges += [_Edge(place, path, edge.root) for path, place in file.includes.items()]
        for path, one in self._at.items():
            self.found[path] = self._whole(one, {})
        for path, _ in tried:
            if path not in self.found and path in self._before:
                self.found[path] = self._before[path]

    def _refused(self, edge: _Edge, why: str) -> None:
        if len(self.files) < 2 * FILES:  # more than that is not looked at, but all is read again as long as something is wrong
            self.files[edge.path] = None
        self._troubles.add(f"{edge.place}: {edge.path}: {why}; {_in_use(self._before.get(edge.path, [MISSING]))}")

    def targets(self, path: str) -> list[Target]:
        """Those of a file; where it was not read, those that it had before, or MISSING."""
        found = self.found.get(path)
        return self._before.get(path, [MISSING]) if found is None else found

    def _opened(self, edge: _Edge) -> _File:
        """OSError where it is no such file, or one too many."""
        number, octets = self._of_root.setdefault(edge.root, (0, 0))
        full = ""
        if len(self._read) >= FILES:
            full = f"more than {FILES} files are included"
        elif number >= FILES_OF_ONE:
            full = f"a file leads to more than {FILES_OF_ONE} files"
        of_one, together = OCTETS - octets, OCTETS_TOGETHER - self._octets
        room = -1 if full else min(of_one, together)
        known = frozenset(self._read)  # the thread may be late
        identity, data = _patiently(edge.path, lambda: _octets_of(edge.path, room, known), self._until)
        if identity in self._read:
            return self._read[identity]
        if full:
            raise Unreadable(edge.path, full)
        if data is None:
            most = f"has more than {OCTETS} octets" + (", with the files that lead there" if octets else "")
            raise Unreadable(
                edge.path, most if room == of_one else f"included files have more than {OCTETS_TOGETHER} octets together"
            )
        self._of_root[edge.root] = number + 1, octets + len(data)
        self._octets += len(data)
        file = self._read[identity] = _File(edge.path)
        self.files[edge.path] = None
        try:
            file.fill(text_of(data, edge.path), self._domains)
        except OSError as error:
            file.wrong(f"{edge.place}: {edge.path}: {error.strerror}")
        return file

    def _whole(self, file: _File, way: dict[_File, None]) -> list[Target]:
        """The targets of a file, and of those that it includes; where something is wrong with it, those that it had before.
        `way`: the files that lead there."""
        if file.whole is not None:
            return file.whole
        way[file] = None
        found, counted = dict(file.own), len(file.own)
        met = set[_File]()
        for path, place in file.includes.items():
            inner = self._at.get(path)
            if inner is not None and inner in way:
                file.wrong(f"{place}: a circle: {circle((one.path for one in way), inner.path)}")
                continue
            if inner in met:
                continue
            if inner is not None:
                met.add(inner)
            more = self.targets(path) if inner is None else self._whole(inner, way)
            file.height = max(file.height, 1 + (0 if inner is None else inner.height))
            counted += len(more)
            if counted <= REPEATED:
                found |= dict.fromkeys(more)
            if what := too_much(len(found), counted):
                file.wrong(f"{place}: leads to {what}")
            elif file.height > DEEPEST:
                file.wrong(f"{place}: files include others more than {DEEPEST} deep")
            if file.problems:
                break
        del way[file]
        file.whole = self._instead(file) if file.problems else list(found)
        return file.whole

    def _instead(self, file: _File) -> list[Target]:
        """What there is in place of the targets of a file that is wrong."""
        before = next((self._before[path] for path in file.paths if path in self._before), [MISSING])
        for one in file.problems:
            self._troubles.add(f"{one}; {_in_use(before)}")
        return before


def too_much(found: int, counted: int) -> str:
    """How many addresses are too many; "": these are not. `counted`: where one counts as often as it is there."""
    if found > MOST:
        return f"more than {MOST} addresses"
    return f"the same addresses again and again, more than {REPEATED} with these" if counted > REPEATED else ""


def stamps(paths: list[str]) -> Stamp:
    """By which it is seen that files have changed (`watch.stamp`): the first one's, the operator's own, and those of what it
    includes, which are not known while their disk does not answer."""
    first, rest = paths[:1], paths[1:]
    try:
        others = _patiently("", lambda: [stamp(path) for path in rest], time.monotonic() + SECONDS) if rest else []
    except Unreadable:
        others = [None] * len(rest)
    return (*map(stamp, first), *others)


def plain_file(path: str) -> int:
    """A descriptor of a file that is open. OSError: it is no plain one. A pipe, which whoever may write an included file could
    put in its place, keeps nobody waiting, and no device notices."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unreadable(path, "is not a plain file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it has another one by now
        os.close(descriptor)
        raise Unreadable(path, "is not a plain file")
    return descriptor


def _octets_of(path: str, most: int, known: frozenset[tuple[int, int]]) -> tuple[tuple[int, int], bytes | None]:
    """Which file it is (device, inode), and its octets; None: more than `most` (however it grows meanwhile), or it is known."""
    descriptor = plain_file(path)
    with open(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        identity = found.st_dev, found.st_ino
        if identity in known or found.st_size > most:
            return identity, None
        data, more = bytearray(), b"-"
        while more and len(data) <= most:
            more = file.read(most + 1 - len(data)) or b""
            data += more
        return identity, None if len(data) > most else bytes(data)


_hanging: dict[str, threading.Thread] = {}  # by path


def _patiently(path: str, call: Callable[[], T], until: float) -> T:
    """What a call returns, or OSError; also where that takes more than SECONDS, or longer than `until` (as of time.monotonic): it
    goes on, on a thread of its own, and until it ends the path is not asked for again."""
    for one in [one for one, thread in list(_hanging.items()) if not thread.is_alive()]:
        _hanging.pop(one, None)
    patience = min(SECONDS, until - time.monotonic())
    if path in _hanging or len(_hanging) >= HANGING or patience <= 0:
        raise Unreadable(path, "its disk does not answer" if path in _hanging else "was not read: other files keep it waiting")
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="aliases", daemon=True)
    thread.start()
    thread.join(patience)
    if results:
        return results[0]
    if errors:
        raise errors[0]
    _hanging[path] = thread
    raise Unreadable(path, "its disk does not answer")


def _in_use(targets: list[Target]) -> str:
    return WAITS if MISSING in targets else "what was read before stays in use"


def circle(way: Iterable[str], name: str) -> str:
    """How a way comes back to a name of it; of each name what fits on a line."""
    names = [*way, name]
    return " -> ".join(one if len(one) <= LONGEST_SHOWN else f"{one[:LONGEST_SHOWN]}..." for one in names[names.index(name) :])
