"""A mailbox, and what its sessions are told, in plain lists: what a View has to agree with. A client applies untagged responses
by the rules of the RFCs, and knows nothing else."""

import re
from random import Random

from relaymta.proto.imap_command import And, Flagged, Numbers, Or, Qresync, Within
from relaymta.proto.imap_found import Found
from relaymta.proto.imap_program import Program
from relaymta.proto.imap_records import load
from relaymta.proto.imap_resync import resync
from relaymta.proto.imap_uids import Shared
from relaymta.proto.imap_view import SYSTEM_FLAGS, Changes, Mailbox, View
from relaymta.proto.imap_words import Words
from tests.speedups.index import Rec, pack, unpack32

DELETED = 8
ALL = (1 << 7) - 1
STAR = 0  # "*" in the ranges of these tests
SAVED = Numbers((), saved=True)


def numbers(ranges: list[tuple[int, int]]) -> Numbers:
    """A sequence set, as the grammar reads it."""
    text = ",".join(":".join(str(end or "*") for end in ends) for ends in ranges)
    return Words(b"a", [text.encode()]).numbers()


class Store:
    """The mailbox. `messages`: UID to [flags, MODSEQ]; `expunged`: (MODSEQ, UID)."""

    def __init__(self) -> None:
        self.uidnext, self.modseq = 1, 1
        self.messages: dict[int, list[int]] = {}
        self.expunged: list[tuple[int, int]] = []
        self.keywords: list[str] = []

    def deliver(self, flags: int = 0) -> int:
        self.modseq += 1
        uid, self.uidnext = self.uidnext, self.uidnext + 1
        self.messages[uid] = [flags, self.modseq]
        return uid

    def skip(self, uids: int) -> None:
        self.uidnext += uids

    def store(
        self, uids: list[int], sign: str, flags: int, unchanged: int | None = None
    ) -> tuple[list[Rec], list[Rec], list[int]]:
        """One slice of a STORE: records before and after, and the UIDs that UNCHANGEDSINCE refuses."""
        there = [uid for uid in uids if uid in self.messages]
        failed = [uid for uid in there if unchanged is not None and self.messages[uid][1] > unchanged]
        before = [Rec(uid, *self.messages[uid]) for uid in there if uid not in failed]
        change = {"+": lambda old: old | flags, "-": lambda old: old & ~flags, "": lambda old: flags}[sign]
        if any(change(one.flags) != one.flags for one in before):
            self.modseq += 1
        for one in before:
            if change(one.flags) != one.flags:
                self.messages[one.uid] = [change(one.flags), self.modseq]
        return before, [Rec(one.uid, *self.messages[one.uid]) for one in before], failed

    def expunge(self, uids: list[int]) -> None:
        gone = [uid for uid in uids if uid in self.messages]
        if gone:
            self.modseq += 1
        for uid in gone:
            del self.messages[uid]
            self.expunged.append((self.modseq, uid))

    def records(self, uids: list[int] | None = None) -> bytes:
        return pack([Rec(uid, *self.messages[uid]) for uid in sorted(self.messages) if uids is None or uid in uids])

    def gone(self, modseq: int) -> list[tuple[int, int]]:
        return [(uid, uid) for when, uid in self.expunged if when > modseq]

    def since(self, modseq: int, remembers: bool = True) -> Changes:
        found = pack([Rec(uid, *self.messages[uid]) for uid in sorted(self.messages) if self.messages[uid][1] > modseq])
        expunged = self.gone(modseq) if remembers else None
        uids = None if remembers else load([self.records()])
        return Changes(self.modseq, self.uidnext, len(self.messages), self.keywords, found, expunged, uids)


class Entry:
    """What a client knows of a message."""

    def __init__(self) -> None:
        self.uid: int | None = None
        self.flags: int | None = None
        self.modseq: int | None = None


FETCH = re.compile(rb"\* (\d+) FETCH \(UID (\d+)(?: FLAGS \(([^)]*)\))?(?: MODSEQ \((\d+)\))?\)")
NUMBERED = re.compile(rb"\* (\d+) (EXISTS|RECENT|EXPUNGE)")
VANISHED = re.compile(rb"\* VANISHED (\(EARLIER\) )?([\d,:]+)")
HIGHEST = re.compile(rb"\* OK \[HIGHESTMODSEQ (\d+)\] .+")


def members(text: bytes) -> list[int]:
    """The numbers of a sequence set."""
    found: list[int] = []
    for part in text.split(b","):
        low, _, high = part.partition(b":")
        found += range(int(low), int(high or low) + 1)
    return found


class Client:
    """A client that has selected the mailbox."""

    def __init__(self, store: Store, highest: int) -> None:
        self.entries: list[Entry] = []
        self.highest = highest
        self.store = store
        self._said: int | None = None
        self._seen = 0

    def flags_of(self, text: bytes) -> int:
        names = [*SYSTEM_FLAGS, *(word.encode() for word in self.store.keywords)]
        return sum(1 << names.index(word) for word in text.split() if word != b"\\Recent")

    def feed(self, octets: bytes, may_expunge: bool) -> None:
        assert octets == b"" or octets.endswith(b"\r\n")
        for line in octets.split(b"\r\n")[:-1]:
            self._line(line, may_expunge)

    def _line(self, line: bytes, may_expunge: bool) -> None:
        if match := NUMBERED.fullmatch(line):
            self._numbered(int(match[1]), match[2], may_expunge)
        elif match := FETCH.fullmatch(line):
            self._fetch(int(match[1]), int(match[2]), match[3], match[4])
        elif match := VANISHED.fullmatch(line):
            assert may_expunge and not match[1]
            for uid in members(match[2]):
                self._vanished(uid)
        elif match := HIGHEST.fullmatch(line):
            self._said = int(match[1])
        else:
            assert line.startswith((b"* FLAGS (", b"* OK [PERMANENTFLAGS (")), line

    def _numbered(self, number: int, what: bytes, may_expunge: bool) -> None:
        if what == b"EXISTS":
            assert number >= len(self.entries)
            self.entries += [Entry() for _ in range(number - len(self.entries))]
        elif what == b"EXPUNGE":
            assert may_expunge and 1 <= number <= len(self.entries)
            del self.entries[number - 1]

    def _fetch(self, number: int, uid: int, flags: bytes | None, modseq: bytes | None) -> None:
        assert 1 <= number <= len(self.entries)
        entry = self.entries[number - 1]
        assert entry.uid in (None, uid), "a neighbour's data"
        entry.uid = uid
        if flags is not None:
            entry.flags = self.flags_of(flags)
        if modseq is not None:
            entry.modseq = int(modseq)
            self._seen = max(self._seen, entry.modseq)

    def _vanished(self, uid: int) -> None:
        """Each UID is of a message that the client was told of: one that it knows, or one of those that it has not asked
        about."""
        known = [entry for entry in self.entries if entry.uid == uid]
        below = [at for at, entry in enumerate(self.entries) if entry.uid is not None and entry.uid < uid]
        entry = known[0] if known else self.entries[below[-1] + 1 if below else 0]
        assert entry.uid in (None, uid), "a message that the client was not told of"
        self.entries.remove(entry)

    def tagged(self) -> None:
        """The command has ended: RFC 7162 6 on what HIGHESTMODSEQ is now."""
        self.highest = self._said if self._said is not None else max(self.highest, self._seen)
        self._said, self._seen = None, 0


class Session:
    """A session with its client, and the oracle of both: `told` is the UIDs by message number, a plain list."""

    def __init__(self, store: Store, shared: Shared, condstore: bool, qresync: bool, rev2: bool) -> None:
        self.store = store
        mailbox = Mailbox(7, store.uidnext, store.modseq, store.keywords, 1)
        options = {"condstore": condstore, "qresync": qresync, "rev2": rev2}
        self.view = View(shared, "box", mailbox, load([store.records()]), **options)
        self.told, self.next = sorted(store.messages), store.uidnext
        self.saved: list[int] = []
        self.client = Client(store, store.modseq)
        self.client.feed(b"* %d EXISTS\r\n" % len(self.told), False)
        self.command_fetch([(1, STAR)], True)

    # Commands

    def advance(self, may_expunge: bool, remembers: bool = True) -> None:
        """What ends each command."""
        self.client.feed(b"".join(self.view.advance(self.store.since(self.view.modseq, remembers), may_expunge)), may_expunge)
        self.client.tagged()
        if may_expunge:
            self.told = [uid for uid in self.told if uid in self.store.messages]
        self.told += [uid for uid in sorted(self.store.messages) if uid >= self.next]
        self.next = self.store.uidnext
        self.check(may_expunge)

    def check(self, may_expunge: bool) -> None:
        """View, client and oracle agree; the client knows all flags that it has asked for, as they are."""
        assert unpack32(self.view.uids.data) == self.told
        assert [entry.uid or uid for entry, uid in zip(self.client.entries, self.told, strict=True)] == self.told
        assert not may_expunge or self.told == sorted(self.store.messages)
        for entry in self.client.entries:
            if entry.uid in self.store.messages and entry.flags is not None:
                flags, modseq = self.store.messages[entry.uid]
                assert entry.flags == flags
                assert not self.view.condstore or entry.modseq == modseq
        assert self.client.highest <= self.store.modseq

    def chosen(self, ranges: list[tuple[int, int]], by_uid: bool) -> list[int]:
        """The UIDs of a set, by the oracle."""
        star = (self.told[-1] if by_uid else len(self.told)) if self.told else 0
        found = set()
        for ends in ranges:
            low, high = sorted(end or star for end in ends)
            found |= {uid for at, uid in enumerate(self.told, 1) if low <= (uid if by_uid else at) <= high}
        return sorted(found)

    def targets(self, ranges: list[tuple[int, int]], by_uid: bool) -> list[int]:
        found = unpack32(self.view.targets(numbers(ranges), by_uid))
        assert found == self.chosen(ranges, by_uid)
        return found

    def command_fetch(self, ranges: list[tuple[int, int]], by_uid: bool) -> None:
        if not by_uid and not self.told:
            return
        records = self.store.records(self.targets(ranges, by_uid))
        self.client.feed(b"".join(self.view.lines(records)), False)
        self.view.told(records)
        self.advance(may_expunge=by_uid)

    def command_store(
        self, ranges: list[tuple[int, int]], by_uid: bool, sign: str, flags: int, silent: bool, since: int | None, meanwhile
    ) -> None:
        """In two slices, between which others do something."""
        if not by_uid and not self.told:
            return
        uids = self.targets(ranges, by_uid)
        for part in (uids[: len(uids) // 2], uids[len(uids) // 2 :]):
            before, after, _ = self.store.store(part, sign, flags, since)
            if silent:
                self._computes([one.uid for one in after], sign, flags)
            keywords = self.view.learn(self.store.keywords) if self.store.modseq % 2 else b""
            lines = b"".join(self.view.stored(pack(before), pack(after), silent, since is not None))
            if silent and not self.view.condstore:
                assert lines.count(b"\r\n") <= sum(one.modseq > self.view.modseq for one in before)
            self.client.feed(keywords + lines, False)
            meanwhile()
        self.advance(may_expunge=by_uid)

    def _computes(self, uids: list[int], sign: str, flags: int) -> None:
        for entry in self.client.entries:
            if entry.flags is not None and entry.uid in uids:
                entry.flags = {"+": entry.flags | flags, "-": entry.flags & ~flags, "": flags}[sign]

    def command_expunge(self) -> None:
        self.store.expunge([uid for uid, (flags, _) in self.store.messages.items() if flags & DELETED])
        self.advance(may_expunge=True)

    def command_search(self, ranges: list[tuple[int, int]], by_uid: bool, flags: int, save: bool) -> None:
        """Messages of a set, or those that were saved, with a flag."""
        if not by_uid and not self.told:
            return
        inside = Or(Within(numbers(ranges), by_uid), Within(SAVED, by_uid))
        wanted = {*self.chosen(ranges, by_uid), *self.saved}
        program = Program(And((Flagged(SYSTEM_FLAGS[flags].decode()), inside)), self.view, 0)
        found, batch = Found({"ALL", "SAVE"} if save else {"ALL"}), program.batch(self.store.records())
        if batch is not None:
            found.add(program.run(batch)[0])
        uids = [uid for uid in self.told if uid in wanted and self.store.messages.get(uid, [0])[0] >> flags & 1]
        said = b"".join(found.search(self.view, by_uid, False)).split()[2:]
        assert [int(one) for one in said] == [uid if by_uid else self.told.index(uid) + 1 for uid in uids]
        found.save(self.view)
        self.saved = uids if save else self.saved
        self.advance(may_expunge=by_uid and not program.by_number)
        assert unpack32(self.view.targets(SAVED, by_uid)) == [uid for uid in self.told if uid in self.saved]

    # The client comes back

    def cache(self) -> dict[int, int]:
        """Flags by UID, as the client keeps them when the connection ends."""
        return {entry.uid: entry.flags for entry in self.client.entries if entry.uid is not None and entry.flags is not None}

    def known(self, random: Random) -> Qresync:
        """What the client says in SELECT: all that it knows, or a part of it."""
        uids = [(1, max(self.cache(), default=1))] if random.random() < 0.5 else [(uid, uid) for uid in self.cache()] or [(1, 1)]
        sample = sorted(random.sample(range(len(self.told)), random.randint(0, min(3, len(self.told)))))
        sample = [at for at in sample if self.client.entries[at].uid is not None]
        had = [(at + 1, at + 1) for at in sample], [(self.told[at], self.told[at]) for at in sample]
        return Qresync(7, self.client.highest, numbers(uids), *(map(numbers, had) if sample else (None, None)))


def comes_back(cache: dict[int, int], known: Qresync, store: Store, shared: Shared, remembers: bool) -> None:
    """After SELECT with QRESYNC the cache is as the mailbox is, but for messages that it never had."""
    mailbox = Mailbox(7, store.uidnext, store.modseq, store.keywords, 1)
    view = View(shared, "box", mailbox, load([store.records()]), condstore=True, qresync=True)
    expunged = store.gone(known.modseq) if remembers else None
    had, client = set(cache), Client(store, 0)
    for line in b"".join(resync(view, known, store.since(known.modseq).records, expunged)).split(b"\r\n")[:-1]:
        if vanished := VANISHED.fullmatch(line):
            assert vanished[1]
            for uid in members(vanished[2]):
                assert uid not in store.messages
                cache.pop(uid, None)
        else:
            match = FETCH.fullmatch(line)
            assert match and match[4] and sorted(store.messages)[int(match[1]) - 1] == int(match[2])
            cache[int(match[2])] = client.flags_of(match[3])
    assert {uid: flags for uid, flags in cache.items() if uid in had} == {
        uid: flags for uid, (flags, _) in store.messages.items() if uid in had
    }
