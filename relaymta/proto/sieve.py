"""The Sieve language (RFC 5228): a script's text, compiled to what `sieve_run` runs.

Extensions: EXTENSIONS. Bounds: SCRIPT_MOST octets, blocks and lists of tests NESTING deep. Linear in the length of the script.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Final

from relaymta.errors import near
from relaymta.proto.printable import printable
from relaymta.proto.sieve_actions import ACTIONS
from relaymta.proto.sieve_arguments import EXTENSIONS, STRINGS, Context, Spec, checked, find
from relaymta.proto.sieve_grammar import NESTING, SCRIPT_MOST, Command, parse
from relaymta.proto.sieve_lexer import Problem, SieveError
from relaymta.proto.sieve_program import ALWAYS, Block, If, Script, Statement, Test
from relaymta.proto.sieve_tests import TESTS, test_of

__all__ = ["EXTENSIONS", "NESTING", "SCRIPT_MOST", "Script", "SieveError", "compile"]

_KNOWN: Final = frozenset((*EXTENSIONS, "comparator-i;octet", "comparator-i;ascii-casemap"))


def compile(text: bytes) -> Script:
    """The script of this text. Raises SieveError."""
    ends = [place for place, octet in enumerate(text) if octet == 10]
    try:
        commands = parse(text)
        context = Context(lambda at: bisect_right(ends, at - 1) + 1)
        count = _required(context, commands)
        block = _block(context, commands[count:])
    except Problem as problem:
        raise _error(text, problem) from None
    return Script(block, frozenset(context.extensions), context.reads_body)


def _error(text: bytes, problem: Problem) -> SieveError:
    start = text.rfind(b"\n", 0, problem.at) + 1
    column = len(text[start : problem.at].decode("utf-8", "replace")) + 1
    return SieveError(text.count(b"\n", 0, problem.at) + 1, column, printable(str(problem)))


def _required(context: Context, commands: list[Command]) -> int:
    """Take the `require` commands at the beginning; how many there are."""
    spec: Spec[None] = Spec(lambda given: None, (STRINGS,))
    for count, command in enumerate(commands):
        if command.name != "require":
            return count
        given = checked(context, command, spec)
        for text in given.must_list(0):
            name = text.raw.decode("utf-8", "replace")
            if name not in _KNOWN:
                raise Problem(given.positional[0].at, f'unknown extension "{name[:40]}"{near(name[:40], EXTENSIONS)}')
            context.extensions.add(name)
    return len(commands)


def _block(context: Context, commands: list[Command]) -> Block:
    return tuple(_statements(context, iter(commands)))


def _statements(context: Context, commands: Iterator[Command]) -> Iterator[Statement]:
    branches: list[tuple[Test, Block]] = []  # of the `if` at hand
    line, complete = 0, True  # where that begins; it has an `else`, or there is none
    for command in commands:
        if command.name in ("elsif", "else"):
            if complete:
                raise Problem(command.at, f'"{command.name}" without an "if" or "elsif" in front of it')
        elif branches:
            yield If(tuple(branches), line)
            branches, complete = [], True
        if command.name in _CONTROL:
            branches.append(_branch(context, command))
            line = line if len(branches) > 1 else context.line_of(command.at)
            complete = command.name == "else"
        else:
            yield _action(context, command)
    if branches:
        yield If(tuple(branches), line)


def _branch(context: Context, command: Command) -> tuple[Test, Block]:
    checked(context, command, _CONTROL[command.name])
    test = test_of(context, command.tests[0]) if command.tests else ALWAYS
    return test, _block(context, command.block or [])


def _action(context: Context, command: Command) -> Statement:
    if command.name == "require":
        raise Problem(command.at, '"require" has to be in front of all other commands')
    if command.name in TESTS:
        raise Problem(command.at, f'"{command.name}" is a test, not a command: "if" is missing')
    spec = find(_COMMANDS, "command", command)
    return spec.make(checked(context, command, spec))


def _never(given: object) -> Statement:
    raise AssertionError("made by _statements")


_CONTROL: Final[Mapping[str, Spec[Statement]]] = {
    "if": Spec(_never, tests=1, block=True),
    "elsif": Spec(_never, tests=1, block=True),
    "else": Spec(_never, block=True),
}
_COMMANDS: Final[Mapping[str, Spec[Statement]]] = {**ACTIONS, **_CONTROL, "require": Spec(_never)}
