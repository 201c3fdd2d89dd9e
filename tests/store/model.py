"""What users have, in dicts: the model of test_model.py."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from relaymta.store.rows import DELETED, INBOX, SYSTEM_FLAGS

__all__ = ["SLICE", "Box", "User"]

SLICE = 3  # messages that one transaction of a session changes


def slices(uids: list[int]) -> Iterator[list[int]]:
    return (uids[start : start + SLICE] for start in range(0, len(uids), SLICE))


@dataclass
class Box:
    uidvalidity: int
    uidnext: int = 1
    modseq: int = 1
    keywords: list[str] = field(default_factory=list)
    messages: dict[int, tuple[int, bytes, int]] = field(default_factory=dict)  # UID: flags, text, MODSEQ
    expunged: list[tuple[int, list[int]]] = field(default_factory=list)  # MODSEQ, UIDs

    def bits(self, keywords: list[str]) -> int:
        found = 0
        for word in keywords:
            if word.lower() not in map(str.lower, self.keywords):
                self.keywords.append(word)
            found |= 1 << SYSTEM_FLAGS + list(map(str.lower, self.keywords)).index(word.lower())
        return found

    def words(self, flags: int) -> list[str]:
        return [word for place, word in enumerate(self.keywords) if flags >> SYSTEM_FLAGS + place & 1]

    def add(self, flags: int, keywords: list[str], text: bytes) -> tuple[int, int]:
        self.modseq += 1
        self.messages[self.uidnext] = flags | self.bits(keywords), text, self.modseq
        self.uidnext += 1
        return self.uidnext - 1, self.modseq

    def expunge(self, uids: list[int], marked: bool = False) -> int:
        there = [uid for uid in uids if uid in self.messages and (not marked or self.messages[uid][0] & DELETED)]
        for uid in there:
            del self.messages[uid]
        if there:
            self.modseq += 1
            self.expunged.append((self.modseq, there))
        return self.modseq if there else 0

    def store(self, uids: list[int], how: str, flags: int, keywords: list[str], since: int | None) -> tuple[list[int], list[int]]:
        """Those it applied to, and those that others had modified."""
        applied, modified = [], []
        for part in slices(uids):
            there = [uid for uid in part if uid in self.messages]
            modified += [uid for uid in there if since is not None and self.messages[uid][2] > since]
            there = [uid for uid in there if uid not in modified]
            if not there:
                continue
            known = [word for word in keywords if how != "-" or word.lower() in map(str.lower, self.keywords)]
            bits = flags | self.bits(known)
            old = {uid: self.messages[uid][0] for uid in there}
            after = {uid: {"+": old[uid] | bits, "-": old[uid] & ~bits, "": bits}[how] for uid in there}
            changed = [uid for uid in there if old[uid] != after[uid]]
            self.modseq += bool(changed)
            for uid in changed:
                self.messages[uid] = after[uid], self.messages[uid][1], self.modseq
            applied += there
        return applied, modified

    def copy(self, uids: list[int], target: "Box", move: bool) -> tuple[list[int], list[int]]:
        """The UIDs of those that were there, and of their copies."""
        sources, copies = [], []
        for part in slices(uids):
            there = [uid for uid in part if uid in self.messages]
            for words in sorted({self.messages[uid][0] >> SYSTEM_FLAGS for uid in there}):
                target.bits(self.words(words << SYSTEM_FLAGS))
            for uid in there:
                flags, text, _ = self.messages[uid]
                bits = flags & (1 << SYSTEM_FLAGS) - 1 | target.bits(self.words(flags))
                target.modseq += 1
                target.messages[target.uidnext] = bits, text, target.modseq
                copies.append(target.uidnext)
                target.uidnext += 1
            sources += there
            if move:
                self.expunge(there)
        return sources, copies


@dataclass
class User:
    uidvalidity: int  # of the next mailbox
    boxes: dict[str, Box] = field(default_factory=dict)
    subscribed: set[str] = field(default_factory=set)  # names, with a mailbox or without

    def create(self, name: str, subscribed: bool = False) -> Box:
        box = self.boxes[name] = Box(self.uidvalidity)
        self.uidvalidity += 1
        if subscribed:
            self.subscribed.add(name)
        return box

    def create_with_parents(self, name: str) -> Box:
        self.create_parents(name)
        return self.create(name)

    def create_parents(self, name: str) -> None:
        levels = name.split("/")
        for count in range(1, len(levels)):
            if "/".join(levels[:count]) not in self.boxes:
                self.create("/".join(levels[:count]))

    def rename(self, old: str, new: str) -> str:
        """Why it may not be; "" where it is done."""
        if old not in self.boxes:
            return "missing"
        if new in self.boxes:
            return "exists"
        if old == INBOX:
            self.boxes[INBOX].copy(sorted(self.boxes[INBOX].messages), self.create_with_parents(new), move=True)
            return ""
        if new.startswith(f"{old}/"):
            return "within"
        moved = {name: new + name[len(old) :] for name in self.boxes if name == old or name.startswith(f"{old}/")}
        if any(name in self.boxes and name not in moved for name in moved.values()):
            return "exists"
        boxes = {moved[name]: self.boxes.pop(name) for name in moved}
        self.boxes |= boxes
        self.create_parents(new)
        return ""

    @property
    def messages(self) -> int:
        return sum(len(box.messages) for box in self.boxes.values())
