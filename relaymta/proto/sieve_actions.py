"""The actions of Sieve, compiled: one row for each (RFC 5228 4, and extensions)."""

import hashlib
from collections.abc import Mapping
from typing import Final

from relaymta.proto.sieve_arguments import STRINGS, Arguments, Spec, Tag
from relaymta.proto.sieve_lexer import NUMBER, STRING, Problem
from relaymta.proto.sieve_program import Discard, Fileinto, Flags, Keep, Redirect, Reject, Set, Statement, Stop, Vacation
from relaymta.proto.sieve_strings import Text
from relaymta.proto.sieve_values import mailbox_named, outbound, senders

__all__ = ["ACTIONS", "DAYS_MOST"]

DAYS, DAYS_LEAST, DAYS_MOST = 7, 1, 365  # of vacation (RFC 5230 4.1)
_MODIFIERS: Final = {  # of `set`, in the order in which they are applied (RFC 5229 4.1)
    "lower": Tag("case"), "upper": Tag("case"), "lowerfirst": Tag("first"), "upperfirst": Tag("first"),
    "quotewildcard": Tag("quote"), "length": Tag("length"),
}  # fmt: skip


def _fileinto(given: Arguments) -> Statement:
    mailbox = given.must(0, mailbox_named)
    return Fileinto(mailbox, given.strings("flags"), "copy" in given.tags, "create" in given.tags, given.line)


def _set(given: Arguments) -> Statement:
    name = given.context.variable(given.must(0), given.positional[0].at, assigned=True)
    modifiers = tuple(given.tag(group) for group in ("case", "first", "quote", "length") if group in given.tags)
    return Set(name, given.must(1), modifiers, given.line)


def _flags(given: Arguments) -> Statement:
    kind, name = given.command.name, ""
    if len(given.positional) > 1:
        at = given.positional[0].at
        given.context.needs("variables", "a variable of flags", at)
        name = given.context.variable(given.must(0), at, assigned=True)
    flags = given.must_list(len(given.positional) - 1)
    return Flags(kind, name, flags, given.line)  # type: ignore[arg-type]


def _vacation(given: Arguments) -> Statement:
    reason, subject, sender = given.must(0), given.string("subject"), given.string("from", senders)
    days = given.number("days")
    mime = "mime" in given.tags
    if mime:
        _check_mime(reason, given)
    handle = given.string("handle")
    parts: list[Text | None] = [handle] if handle is not None else [subject, sender, Text(b"mime") if mime else None, reason]
    days = min(max(DAYS if days is None else days, DAYS_LEAST), DAYS_MOST)
    return Vacation(reason, subject, sender, given.strings("addresses") or (), mime, days, _key(parts), given.line)


def _check_mime(reason: Text, given: Arguments) -> None:
    """RFC 5230 5: no 8-bit octets in the header of a MIME entity."""
    header = reason.raw.partition(b"\r\n\r\n")[0]
    if not header.isascii():
        raise Problem(given.positional[0].at, 'the header of a ":mime" reason has characters that are not ASCII')


def _key(parts: list[Text | None]) -> bytes:
    """16 octets that stand for strings as they are written, with their number and lengths."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = b"-" if part is None else b"%d:%b" % (len(part.raw), part.raw)
        found.update(raw)
    found.update(b"%d" % len(parts))
    return found.digest()


_FLAGS: Final = {"flags": Tag("flags", STRINGS, "imap4flags")}
_COPY: Final = {"copy": Tag("copy", "", "copy")}
_VACATION: Final = {
    "days": Tag("days", NUMBER), "subject": Tag("subject", STRING), "from": Tag("from", STRING),
    "addresses": Tag("addresses", STRINGS), "mime": Tag("mime"), "handle": Tag("handle", STRING),
}  # fmt: skip

ACTIONS: Final[Mapping[str, Spec[Statement]]] = {
    "stop": Spec(lambda given: Stop(given.line)),
    "keep": Spec(lambda given: Keep(given.strings("flags"), given.line), (), _FLAGS),
    "discard": Spec(lambda given: Discard(given.line)),
    "fileinto": Spec(_fileinto, (STRING,), _FLAGS | _COPY | {"create": Tag("create", "", "mailbox")}, "fileinto"),
    "redirect": Spec(
        lambda given: Redirect(given.must(0, outbound), "copy" in given.tags, given.line), (STRING,), _COPY
    ),
    "reject": Spec(lambda given: Reject(given.must(0), given.line), (STRING,), {}, "reject"),
    "ereject": Spec(lambda given: Reject(given.must(0), given.line), (STRING,), {}, "ereject"),
    "vacation": Spec(_vacation, (STRING,), _VACATION, "vacation"),
    "set": Spec(_set, (STRING, STRING), _MODIFIERS, "variables"),
    "setflag": Spec(_flags, ("string?", STRINGS), {}, "imap4flags"),
    "addflag": Spec(_flags, ("string?", STRINGS), {}, "imap4flags"),
    "removeflag": Spec(_flags, ("string?", STRINGS), {}, "imap4flags"),
}  # fmt: skip
