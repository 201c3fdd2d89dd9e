"""HTTP hooks, without I/O: the request about a message, its signature, and what an answer says.

Each is a JSON object; docs/filters.md has both in full. What an answer says is untrusted: one of six verdicts, with a reason and
a score, and changes that are checked here (addresses) and where they are made (fields: proto/edits.py).
"""

import base64
import hmac
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from relaymta.proto.address import mail_argument, rcpt_argument
from relaymta.proto.edits import Append, Change, Edit, Insert, shown, spaced
from relaymta.proto.printable import printable

__all__ = [
    "CHANGES_MOST", "AnyChange", "HookError", "Said", "Signature", "Wanted", "clean", "fields", "said", "wanted", "written",
]  # fmt: skip

CHANGES_MOST: Final = 200  # of one answer
FIELDS_MOST: Final = 5000  # that are shown one by one
REASON_MOST: Final = 200  # characters
ADDRESS_MOST: Final = 1024  # octets; a path of the dialogue has no more
ERROR_MOST: Final = 200  # characters of what is wrong with an answer

Verdict = Literal["accept", "tag", "hold", "discard", "tempfail", "reject"]
Instance = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class HookError(Exception):
    """An answer that makes no sense; str(): why, printable."""


# The answer


class _Add(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="add"):
    """A field: in front of the others, or, with `last`, behind them."""

    name: str
    value: str
    last: bool = False


class _Replace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="replace"):
    """The value of the n-th field of this name; where there are fewer, a new field."""

    name: str
    value: str
    instance: Instance = 1


class _Remove(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="remove"):
    """The n-th field of this name, or all of them."""

    name: str
    instance: Instance | None = None


class _AddRecipient(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="add_recipient"):
    address: str


class _RemoveRecipient(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="remove_recipient"):
    address: str


class _SetSender(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="set_sender"):
    """Another envelope sender; "": the null sender."""

    address: str


AnyChange = _Add | _Replace | _Remove | _AddRecipient | _RemoveRecipient | _SetSender


class Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An answer, as it came: only its types are checked."""

    verdict: Verdict
    reason: str = ""
    score: float | None = None
    changes: list[AnyChange] = []


class Wanted(NamedTuple):
    """The changes of an answer: `edits` of the header, recipients that are `added` and `removed`, another `sender` (None: as it
    was); `dropped`: how many were none that can be made."""

    edits: list[Edit]
    added: list[str]
    removed: list[str]
    sender: str | None
    dropped: int


_answer = msgspec.json.Decoder(Said)


def said(body: bytes) -> Said:
    """An answer. HookError: it is none, or has a member that is not known. `reason` is one printable line then, of REASON_MOST
    characters at most."""
    try:
        found = _answer.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HookError(printable(str(error))[:ERROR_MOST]) from None
    return msgspec.structs.replace(found, reason=printable(found.reason.strip())[:REASON_MOST]) if found.reason else found


def wanted(found: Said, header: bytes) -> Wanted:
    """The changes of an answer to a message with this header: the first CHANGES_MOST. As many edits at most as there are changes
    and fields."""
    header_of = _Header(header)
    added: list[str] = []
    removed: list[str] = []
    sender, dropped = None, max(len(found.changes) - CHANGES_MOST, 0)
    for one in found.changes[:CHANGES_MOST]:
        if isinstance(one, _Add | _Replace | _Remove):
            header_of.change(one)
            continue
        is_sender = isinstance(one, _SetSender)
        address = _path(one.address, is_sender)
        if address is None:
            dropped += 1
        elif is_sender:
            sender = address
        else:
            (added if isinstance(one, _AddRecipient) else removed).append(address)
    return Wanted(header_of.edits + header_of.first[::-1], added, removed, sender, dropped)


class _Header:
    """Edits of a header. `first`: fields in front of it, each in front of those before it in the list."""

    def __init__(self, header: bytes) -> None:
        self.edits: list[Edit] = []
        self.first: list[Edit] = []
        self._header = header
        self._counts: Counter[bytes] | None = None
        self._gone: dict[bytes, set[int]] = {}  # names of which all fields were removed, and which of these are back

    def change(self, one: _Add | _Replace | _Remove) -> None:
        name = _octets(one.name)
        match one:
            case _Add(last=False):
                self.first.append(Insert(1, name, spaced(_octets(one.value))))
            case _Add():
                self.edits.append(Append(name, spaced(_octets(one.value))))
            case _Replace(instance=instance):
                self.edits.append(Change(name, instance, spaced(_octets(one.value)) or b" "))
                self._is_there(name.lower(), instance)
            case _Remove(instance=None):
                self.edits += [Change(name, instance, b"") for instance in self._all(name.lower())]
            case _Remove(instance=int(instance)):
                self.edits.append(Change(name, instance, b""))

    def _all(self, name: bytes) -> list[int]:
        """The fields of a name that there may be."""
        there = self._gone.get(name)
        self._gone[name] = set()
        return list(range(1, self._count(name) + 1)) if there is None else sorted(there)

    def _is_there(self, name: bytes, instance: int) -> None:
        if instance > (count := self._count(name)):
            instance = count + 1
            assert self._counts is not None
            self._counts[name] = instance
        if name in self._gone:
            self._gone[name].add(instance)

    def _count(self, name: bytes) -> int:
        if self._counts is None:
            self._counts = Counter(known.lower() for known, _ in shown(self._header))
        return self._counts[name]


def _path(text: str, is_sender: bool) -> str | None:
    """An address as MAIL or RCPT have it, in its one form. None: it is none."""
    octets = _octets(text)
    if len(octets) > ADDRESS_MOST or not octets.isascii():
        return None
    parse: Callable[[bytes], tuple[str, str] | None] = mail_argument if is_sender else rcpt_argument
    found = parse((b"FROM:<" if is_sender else b"TO:<") + octets + b">")
    if found is None or found[1] or not found[0].isascii() or ("@" not in found[0] and not (is_sender and not octets)):
        return None
    return found[0]


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "replace")


# The request


def fields(header: bytes) -> tuple[list[tuple[str, str]], str]:
    """The first FIELDS_MOST fields of a header, unfolded, without white space around them, in UTF-8 with U+FFFD for other octets;
    and where that leaves something out, all of its octets in base64, else ""."""
    every = shown(header)
    found = [
        (name.decode("ascii"), field.partition(b":")[2].replace(b"\r\n", b"").strip(b" \t").decode("utf-8", "replace"))
        for name, field in every[:FIELDS_MOST]
    ]
    try:
        if len(every) > FIELDS_MOST:
            return found, base64.b64encode(header).decode()
        header.decode()
    except UnicodeDecodeError:
        return found, base64.b64encode(header).decode()
    return found, ""


def written(request: dict[str, Any]) -> bytes:
    """A request as JSON. Texts that are not Unicode have U+FFFD for what is not."""
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError:
        return msgspec.json.encode(clean(request))


def clean(value: Any) -> Any:
    """With U+FFFD for what is not Unicode in texts, such as octets of a client that are not UTF-8."""
    if isinstance(value, str):
        try:
            octets = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            octets = value.encode("utf-8", "replace")
        return octets.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: clean(one) for key, one in value.items()}
    return [clean(one) for one in value] if isinstance(value, list | tuple) else value


class Signature:
    """Of a request whose body is fed to it, sent at this Unix time (s)."""

    __slots__ = ("_made", "_seconds")

    def __init__(self, secret: bytes, seconds: int) -> None:
        self._seconds = seconds
        self._made = hmac.new(secret, b"%d." % seconds, "sha256")

    def feed(self, piece: bytes) -> None:
        """More of the body."""
        self._made.update(piece)

    def value(self) -> str:
        """The value of its header field."""
        return f"t={self._seconds},v1={self._made.hexdigest()}"
