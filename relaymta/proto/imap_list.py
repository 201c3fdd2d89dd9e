"""What LIST and LSUB say of a user's mailboxes (RFC 9051 and 3501 6.3.9, RFC 3348, 5258, 5819, 6154), without I/O."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import List
from relaymta.proto.mailbox_list import DELIMITER, INBOX, Pattern

__all__ = ["Name", "listed"]

NONEXISTENT, NOSELECT = "\\NonExistent", "\\Noselect"
BASE = ("SUBSCRIBED", "SPECIAL-USE")  # selection options that restrict what is returned, and that CHILDINFO names
PLACES = 4096  # characters of patterns that are matched together: the memory for it is bounded by the square of it

Response = tuple[bytes, str | None]


class Name(NamedTuple):
    """A name of a user's, canonical. `exists`: False for one that is only subscribed; `special`: special uses, divided by blanks
    ("\\\\Sent")."""

    name: str
    exists: bool = True
    special: str = ""
    subscribed: bool = False


def listed(names: Iterable[Name], command: List, *, lsub: bool, rev2: bool, utf8: bool) -> Iterator[Response]:
    """The LIST or LSUB responses: INBOX first, then in the order of names, parents in front of their children. With each of them
    the name of the mailbox whose STATUS follows it (RETURN (STATUS ...)), or None.

    `names`: all that the user has, in any order, each once. `rev2`, `utf8`: what the client has enabled. Some responses are
    empty, so that the caller can pause when it wants to: the time to the next one is proportional to the length of a name and of
    all patterns (but for a sort of all names, before the first)."""
    if command.patterns == ("",) and not command.extended:
        return iter([((response.lsub if lsub else response.list_)([NOSELECT], "", utf8), None)])
    if lsub:
        return _subscribed(names, command, utf8)
    return _listed(names, command, NONEXISTENT if command.extended or rev2 else NOSELECT, utf8)


def _subscribed(names: Iterable[Name], command: List, utf8: bool) -> Iterator[Response]:
    """RFC 3501 6.3.9: with `%`, the parent of a subscribed name that it does not match is told as \\Noselect."""
    for found in _found(names, command, "%" in command.patterns[0]):
        yield b"" if found is None else response.lsub([] if found.meets else [NOSELECT], found.name, utf8), None


def _listed(names: Iterable[Name], command: List, missing: str, utf8: bool) -> Iterator[Response]:
    base = tuple(option for option in BASE if option in command.select)
    recursive = "RECURSIVEMATCH" in command.select
    tell_subscribed = "SUBSCRIBED" in command.select | command.returns
    for found in _found(names, command, recursive or not base):
        if found is None:
            yield b"", None
            continue
        attributes = [
            *([] if found.exists else [missing]),
            "\\HasChildren" if found.children else "\\HasNoChildren",
            *(["\\Subscribed"] if tell_subscribed and found.subscribed else []),
            *found.special.split(),
        ]
        said = response.list_(attributes, found.name, utf8, childinfo=base if recursive and found.below else ())
        # RFC 5819 2: none where only a mailbox below meets the criteria
        yield said, found.name if command.status and found.exists and found.meets else None


class _Found(NamedTuple):
    """A name to return. `meets`: the selection criteria; `children`: there are mailboxes below it; `below`: some of the names
    there meet the criteria."""

    name: str
    exists: bool
    special: str
    subscribed: bool
    meets: bool
    children: bool
    below: bool


def _found(names: Iterable[Name], command: List, parents: bool) -> Iterator[_Found | None]:
    """What is to be returned, and None when time has passed. A name that matches a pattern is returned when it meets the
    selection criteria; and, with `parents`, when a name below it meets them and matches no pattern, so that it is not returned
    itself (RFC 5258 3.3): also one that is not among the names."""
    ordered = sorted(names, key=_order)
    patterns = _patterns(command.patterns)
    meeting = [_meets(one, command) for one in ordered]
    hidden = []  # names that meet the criteria, and are not returned
    for one, meets in zip(ordered, meeting, strict=True):
        hidden.append(meets and not _matches(patterns, one.name))
        yield None
    children, below, unseen = _First([one.exists for one in ordered]), _First(meeting), _First(hidden)
    before = ""
    for at, one in enumerate(ordered):
        for parent in _missing(one.name, before) if parents else ():
            if unseen.below(parent, ordered, at) and _matches(patterns, parent):
                found = children.below(parent, ordered, at), below.below(parent, ordered, at)
                yield _Found(parent, False, "", False, False, *found)
            else:
                yield None
        before, meets = one.name, meeting[at]
        if not hidden[at] and (meets or (parents and unseen.below(before, ordered, at + 1) and _matches(patterns, before))):
            yield _Found(*one, meets, children.below(before, ordered, at + 1), below.below(before, ordered, at + 1))
        else:
            yield None


def _order(one: Name) -> tuple[bool, str]:
    """A delimiter is less than any other character, so that what is below a name follows it."""
    return one.name != INBOX and not one.name.startswith(INBOX + DELIMITER), one.name.replace(DELIMITER, "\0")


def _meets(one: Name, command: List) -> bool:
    """The selection criteria. (REMOTE has no effect: there are no mailboxes elsewhere.)"""
    if "SPECIAL-USE" in command.select and not (one.exists and one.special):
        return False
    return one.subscribed if "SUBSCRIBED" in command.select else one.exists


def _missing(name: str, before: str) -> Iterator[str]:
    """The parents of a name that are no names themselves, and are not those of the name before."""
    at = name.find(DELIMITER)
    while at >= 0:
        parent = name[:at]
        if parent != before and not before.startswith(name[: at + 1]):
            yield parent
        at = name.find(DELIMITER, at + 1)


class _First:
    """Of names in order, the first one from each on that has a property."""

    def __init__(self, having: Sequence[bool]) -> None:
        self._first = [len(having)] * (len(having) + 1)
        for at in range(len(having) - 1, -1, -1):
            self._first[at] = at if having[at] else self._first[at + 1]

    def below(self, name: str, ordered: Sequence[Name], at: int) -> bool:
        """Whether one from `at` on has it, and is below `name`, of which all that is below is from there on."""
        first = self._first[at]
        return first < len(ordered) and ordered[first].name.startswith(name + DELIMITER)


def _patterns(given: Sequence[str]) -> list[Pattern]:
    groups: list[list[str]] = [[]]
    places = 0
    for one in given:
        if places > PLACES:
            groups.append([])
            places = 0
        groups[-1].append(one)
        places += len(one)
    return [Pattern(*group) for group in groups]


def _matches(patterns: Sequence[Pattern], name: str) -> bool:
    return any(pattern.matches(name) for pattern in patterns)
