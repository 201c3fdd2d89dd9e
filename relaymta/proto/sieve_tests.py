"""The tests of Sieve, compiled: one row for each (RFC 5228 5, and extensions)."""

from collections.abc import Mapping
from typing import Final

from relaymta.errors import near
from relaymta.proto.sieve_arguments import MANY, MATCHING, PART, STRINGS, Arguments, Context, Spec, Tag, checked, find
from relaymta.proto.sieve_grammar import Command
from relaymta.proto.sieve_lexer import NUMBER, STRING, Problem
from relaymta.proto.sieve_program import (
    AddressTest,
    All,
    Any,
    BodyTest,
    Constant,
    DateTest,
    EnvelopeTest,
    Exists,
    FlagTest,
    HeaderTest,
    MailboxExists,
    Not,
    Size,
    StringTest,
    Test,
)
from relaymta.proto.sieve_strings import Text
from relaymta.proto.sieve_values import ADDRESS_FIELDS, DATE_PARTS, zone_minutes

__all__ = ["TESTS", "test_of"]

UTC: Final = Text(b"+0000")
TEXT_TYPES: Final = (Text(b"text"),)


def test_of(context: Context, command: Command) -> Test:
    """A test."""
    spec = find(TESTS, "test", command)
    return spec.make(checked(context, command, spec))


def _tests(given: Arguments) -> tuple[Test, ...]:
    return tuple(test_of(given.context, one) for one in given.command.tests)


def _one_of(words: frozenset[bytes], what: str, value: bytes) -> None:
    """ValueError, unless the value is one of some words, in any case."""
    if value.lower() not in words:
        word = value[:40].decode("utf-8", "replace").lower()
        raise ValueError(f'unknown {what} "{word}"{near(word, [one.decode() for one in words])}')


def _address_field(value: bytes) -> None:
    if value.lower() not in ADDRESS_FIELDS:
        raise ValueError(f'"{value[:40].decode("utf-8", "replace")}" is not a field of addresses')


def _envelope_part(value: bytes) -> None:
    _one_of(frozenset((b"from", b"to")), "part of the envelope", value)


def _date_part(value: bytes) -> None:
    _one_of(DATE_PARTS, "part of a date", value)


def _size(given: Arguments) -> Test:
    if not given.tag("limit"):
        raise Problem(given.command.at, '"size" lacks ":over" or ":under"')
    return Size(given.tag("limit") == "over", given.number(0) or 0)


def _hasflag(given: Arguments) -> Test:
    if len(given.positional) == 1:
        return FlagTest(("",), given.match(0))
    at = given.positional[0].at
    given.context.needs("variables", "a variable of flags", at)
    names = tuple(given.context.variable(text, at, assigned=False) for text in given.must_list(0))
    return FlagTest(names, given.match(1))


def _body(given: Arguments) -> Test:
    given.context.reads_body = True
    transform = given.tag("transform", "text")
    types = None if transform == "raw" else TEXT_TYPES if transform == "text" else given.strings("transform")
    return BodyTest(types, given.match(0))


def _zone(given: Arguments) -> Text | None:
    return None if given.tag("zone") == "originalzone" else given.string("zone", zone_minutes) or UTC


def _date(given: Arguments) -> Test:
    return DateTest(given.must(0), _zone(given), given.must(1, _date_part), given.match(2))


def _currentdate(given: Arguments) -> Test:
    return DateTest(None, _zone(given), given.must(0, _date_part), given.match(1))


_ZONE: Final = {"zone": Tag("zone", STRING)}
_TRANSFORM: Final = {"raw": Tag("transform"), "text": Tag("transform"), "content": Tag("transform", STRINGS)}

TESTS: Final[Mapping[str, Spec[Test]]] = {
    "true": Spec(lambda given: Constant(True)),
    "false": Spec(lambda given: Constant(False)),
    "not": Spec(lambda given: Not(_tests(given)[0]), tests=1),
    "allof": Spec(lambda given: All(_tests(given)), tests=MANY),
    "anyof": Spec(lambda given: Any(_tests(given)), tests=MANY),
    "exists": Spec(lambda given: Exists(given.must_list(0)), (STRINGS,)),
    "size": Spec(_size, (NUMBER,), {"over": Tag("limit"), "under": Tag("limit")}),
    "header": Spec(lambda given: HeaderTest(given.must_list(0), given.match(1)), (STRINGS, STRINGS), MATCHING),
    "address": Spec(
        lambda given: AddressTest(given.must_list(0, _address_field), given.tag("part", "all"), given.match(1)),
        (STRINGS, STRINGS), MATCHING | PART,
    ),
    "envelope": Spec(
        lambda given: EnvelopeTest(given.must_list(0, _envelope_part), given.tag("part", "all"), given.match(1)),
        (STRINGS, STRINGS), MATCHING | PART, "envelope",
    ),
    "string": Spec(lambda given: StringTest(given.must_list(0), given.match(1)), (STRINGS, STRINGS), MATCHING, "variables"),
    "hasflag": Spec(_hasflag, ("strings?", STRINGS), MATCHING, "imap4flags"),
    "mailboxexists": Spec(lambda given: MailboxExists(given.must_list(0)), (STRINGS,), {}, "mailbox"),
    "body": Spec(_body, (STRINGS,), MATCHING | _TRANSFORM, "body"),
    "date": Spec(_date, (STRING, STRING, STRINGS), MATCHING | _ZONE | {"originalzone": Tag("zone")}, "date"),
    "currentdate": Spec(_currentdate, (STRING, STRINGS), MATCHING | _ZONE, "date"),
}  # fmt: skip
