"""The arguments of Sieve commands and tests against what each of them takes (RFC 5228 2.6)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, Generic, NamedTuple, TypeVar

from relaymta.errors import near
from relaymta.proto.sieve_grammar import Argument, Command
from relaymta.proto.sieve_lexer import NUMBER, STRING, TAG, Problem
from relaymta.proto.sieve_program import Match, Texts
from relaymta.proto.sieve_strings import VARIABLES_MOST, Text, decoded_characters, text_of, variable_name

__all__ = [
    "COMPARATOR", "EXTENSIONS", "MANY", "MATCHING", "PART", "STRINGS", "Arguments", "Context", "Spec", "Tag", "checked", "find",
]  # fmt: skip

STRINGS: Final = "strings"
MANY: Final = 2  # tests of a command: one or more, in parentheses
NAMES = {STRING: "a string", STRINGS: "a string or a list of strings", NUMBER: "a number"}

EXTENSIONS: Final = (
    "fileinto", "reject", "ereject", "envelope", "copy", "vacation", "imap4flags", "subaddress", "relational",
    "comparator-i;ascii-numeric", "mailbox", "body", "encoded-character", "variables", "date",
)  # fmt: skip
_COMPARATORS = ("i;octet", "i;ascii-casemap", "i;ascii-numeric")  # the first two need no `require` (RFC 5228 2.7.3)
_RELATIONS = ("gt", "ge", "lt", "le", "eq", "ne")
Result = TypeVar("Result")


class Tag(NamedTuple):
    """A tagged argument. `group`: two of a group exclude each other; `takes`: the kind of what follows it, "" for nothing;
    `extension`: that it needs."""

    group: str
    takes: str = ""
    extension: str = ""


class Given(NamedTuple):
    """An argument. `tag`: its name, "" of a positional one; `value`: as it takes, a string as a list where one may be."""

    tag: str
    value: Text | Texts | int | None
    at: int


class Context:
    """What is known of a script so far. `extensions`: those it requires; `line_of`: the line of an offset."""

    def __init__(self, line_of: Callable[[int], int]) -> None:
        self.extensions: set[str] = set()
        self.line_of = line_of
        self.reads_body = False
        self._variables: set[str] = set()

    def text(self, value: bytes, at: int) -> Text:
        """A string of the script."""
        try:
            if "encoded-character" in self.extensions:
                value = decoded_characters(value)
            return text_of(value, "variables" in self.extensions)
        except ValueError as error:
            raise Problem(at, str(error)) from None

    def needs(self, extension: str, what: str, at: int) -> None:
        """Problem, unless the script requires the extension."""
        if extension and extension not in self.extensions:
            raise Problem(at, f'{what} needs require "{extension}"')

    def variable(self, text: Text, at: int, *, assigned: bool) -> str:
        """The variable that a constant string names; `assigned`: it gets a value."""
        try:
            if text.constant is None:
                raise ValueError("the name of a variable has to be a constant")
            name = variable_name(text.constant)
        except ValueError as error:
            raise Problem(at, str(error)) from None
        if assigned:
            self._variables.add(name)
            if len(self._variables) > VARIABLES_MOST:
                raise Problem(at, f"more than {VARIABLES_MOST} variables")
        return name


class Arguments:
    """The arguments of one command, of the right number and kinds."""

    def __init__(self, context: Context, command: Command, tags: dict[str, Given], positional: list[Given]) -> None:
        self.context = context
        self.command = command
        self.tags = tags
        self.positional = positional

    @property
    def line(self) -> int:
        return self.context.line_of(self.command.at)

    def tag(self, group: str, default: str = "") -> str:
        """Which of a group of tagged arguments is given."""
        given = self.tags.get(group)
        return default if given is None else given.tag

    def _given(self, which: str | int) -> Given | None:
        return self.tags.get(which) if isinstance(which, str) else self.positional[which]

    def string(self, which: str | int, check: Callable[[bytes], object] | None = None) -> Text | None:
        """A string: a positional argument, or that of a tagged one, None without it. `check`: raises ValueError for a value that
        is not allowed."""
        given = self._given(which)
        if given is None:
            return None
        assert isinstance(given.value, Text)
        self._check([given.value], given.at, check)
        return given.value

    def must(self, which: int, check: Callable[[bytes], object] | None = None) -> Text:
        """As `string`, of a positional argument."""
        found = self.string(which, check)
        assert found is not None
        return found

    def strings(self, which: str | int, check: Callable[[bytes], object] | None = None) -> Texts | None:
        """The same of a list of strings."""
        given = self._given(which)
        if given is None:
            return None
        assert isinstance(given.value, tuple) and not isinstance(given.value, Text)
        self._check(given.value, given.at, check)
        return given.value

    def must_list(self, which: int, check: Callable[[bytes], object] | None = None) -> Texts:
        """As `strings`, of a positional argument."""
        return self.strings(which, check) or ()

    def _check(self, texts: Iterable[Text], at: int, check: Callable[[bytes], object] | None) -> None:
        try:
            for text in texts:
                if check is not None and text.constant is not None:
                    check(text.constant)
        except ValueError as error:
            raise Problem(at, str(error)) from None

    def number(self, which: str | int) -> int | None:
        """A number, as `string`."""
        given = self._given(which)
        return None if given is None or not isinstance(given.value, int) else given.value

    def match(self, keys: int) -> Match:
        """How the test compares, with these positional arguments as its keys."""
        kind = self.tag("match", "is")
        comparator = self._word("comparator", _COMPARATORS, "i;ascii-casemap", "comparator")
        relation = self._word("match", _RELATIONS, "", "relation") if kind in ("value", "count") else ""
        given = self.tags.get("comparator")
        if given is not None and comparator == "i;ascii-numeric":
            self.context.needs("comparator-i;ascii-numeric", f'the comparator "{comparator}"', given.at)
            if kind in ("contains", "matches"):
                raise Problem(given.at, f'the comparator "{comparator}" cannot be used with ":{kind}"')
        return Match(kind, relation, comparator, self.must_list(keys))

    def _word(self, group: str, words: tuple[str, ...], default: str, what: str) -> str:
        """A constant that is one of some words."""
        given = self.tags.get(group)
        if given is None:
            return default
        assert isinstance(given.value, Text)
        word = (given.value.constant or b"").decode("utf-8", "replace")
        if word not in words:
            raise Problem(given.at, f'unknown {what} "{word[:40]}"{near(word[:40], words)}')
        return word


class Spec(NamedTuple, Generic[Result]):
    """A command or a test: what it takes. `make`: what it is compiled to; `positional`: kinds of arguments, of which those behind
    "?" may be missing; `tests`: 0, 1 or MANY; `block`: it has one."""

    make: Callable[[Arguments], Result]
    positional: tuple[str, ...] = ()
    tags: Mapping[str, Tag] = {}
    extension: str = ""
    tests: int = 0
    block: bool = False


COMPARATOR: Final = {"comparator": Tag("comparator", STRING)}
MATCHING: Final = COMPARATOR | {
    "is": Tag("match"), "contains": Tag("match"), "matches": Tag("match"), "count": Tag("match", STRING, "relational"),
    "value": Tag("match", STRING, "relational"),
}  # fmt: skip
PART: Final = {
    "all": Tag("part"), "localpart": Tag("part"), "domain": Tag("part"), "user": Tag("part", "", "subaddress"),
    "detail": Tag("part", "", "subaddress"),
}  # fmt: skip


def find(table: Mapping[str, Spec[Result]], kind: str, command: Command) -> Spec[Result]:
    """The row of a command in its table. `kind`: what the table has."""
    spec = table.get(command.name)
    if spec is None:
        name = command.name[:40]
        raise Problem(command.at, f'unknown {kind} "{name}"{near(name, table)}')
    return spec


def checked(context: Context, command: Command, spec: Spec[Result]) -> Arguments:
    """The arguments of a command, which are what it takes."""
    context.needs(spec.extension, f'"{command.name}"', command.at)
    arguments = command.arguments
    tags: dict[str, Given] = {}
    at = 0
    while at < len(arguments) and arguments[at].kind == TAG:
        at = _tagged(context, command, spec.tags, at, tags)
    rest = arguments[at:]
    least = sum(not kind.endswith("?") for kind in spec.positional)
    kinds = spec.positional if len(rest) > least else tuple(kind for kind in spec.positional if not kind.endswith("?"))
    positional = []
    for kind, argument in zip(kinds, rest, strict=False):
        if argument.kind == TAG:
            raise Problem(argument.at, f'":{argument.value!s}" has to be in front of the other arguments of "{command.name}"')
        positional.append(Given("", _value(context, command, kind.rstrip("?"), argument), argument.at))
    if len(rest) < len(kinds):
        raise Problem(command.at, f'"{command.name}" lacks {NAMES[kinds[len(rest)].rstrip("?")]}')
    if len(rest) > len(kinds):
        raise Problem(rest[len(kinds)].at, f'too many arguments of "{command.name}"')
    _check_tests(command, spec)
    return Arguments(context, command, tags, positional)


def _tagged(context: Context, command: Command, known: Mapping[str, Tag], at: int, tags: dict[str, Given]) -> int:
    """Put the tagged argument at this place among `tags`; the place behind it, and behind what it takes."""
    argument = command.arguments[at]
    name = str(argument.value)
    tag = known.get(name)
    if tag is None:
        raise Problem(argument.at, f'unknown argument ":{name[:40]}" of "{command.name}"{near(name[:40], known)}')
    context.needs(tag.extension, f'":{name}"', argument.at)
    if tag.group in tags:
        other = tags[tag.group].tag
        raise Problem(argument.at, f'":{name}" twice' if other == name else f'":{other}" and ":{name}" exclude each other')
    value = None
    at += 1
    if tag.takes:
        if at >= len(command.arguments):
            raise Problem(argument.at, f'":{name}" lacks {NAMES[tag.takes]}')
        value = _value(context, command, tag.takes, command.arguments[at])
        at += 1
    tags[tag.group] = Given(name, value, argument.at)
    return at


def _value(context: Context, command: Command, kind: str, argument: Argument) -> Text | Texts | int:
    value, at = argument.value, argument.at
    if kind == NUMBER and isinstance(value, int):
        return value
    if kind in (STRING, STRINGS) and isinstance(value, bytes):
        text = context.text(value, at)
        return text if kind == STRING else (text,)
    if kind == STRINGS and isinstance(value, list):
        return tuple(context.text(one, at) for one in value)
    raise Problem(at, f'expected {NAMES[kind]} as an argument of "{command.name}"')


def _check_tests(command: Command, spec: Spec[Result]) -> None:
    """Problem, unless a command has as many tests as it takes, and a block if it takes one."""
    if command.tests and not spec.tests:
        raise Problem(command.tests[0].at, f'"{command.name}" takes no test')
    if spec.tests and not command.tests:
        raise Problem(command.at, f'"{command.name}" lacks a test')
    if command.listed and spec.tests != MANY:
        raise Problem(command.at, f'"{command.name}" takes one test, not a list of tests')
    if spec.tests == MANY and not command.listed:
        raise Problem(command.at, f'the tests of "{command.name}" have to be in parentheses')
    if spec.block and command.block is None:
        raise Problem(command.at, f'"{command.name}" lacks a block')
    if command.block is not None and not spec.block:
        raise Problem(command.at, f'"{command.name}" takes no block')
