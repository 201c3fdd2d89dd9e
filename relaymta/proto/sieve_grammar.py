"""The grammar of Sieve (RFC 5228 8.2): a script's text as commands, of which only the form is known here.

Bounds: SCRIPT_MOST octets; blocks, and lists of tests, nest NESTING deep; of tests within tests there are twice as many.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from relaymta.proto.sieve_lexer import END, IDENTIFIER, NUMBER, STRING, TAG, Problem, Token, tokens

__all__ = ["NESTING", "SCRIPT_MOST", "Argument", "Command", "parse"]

SCRIPT_MOST: Final = 65_536  # octets
NESTING: Final = 15


class Argument(NamedTuple):
    """`kind`: TAG (`value`: its name), NUMBER, STRING, or "strings", a list in brackets; `at`: its offset."""

    kind: str
    value: str | int | bytes | list[bytes]
    at: int


class Command(NamedTuple):
    """A command or a test. `name`: in lower case; `tests`: within it, `listed`: in parentheses; `block`: None without one."""

    name: str
    at: int
    arguments: list[Argument]
    tests: list["Command"]
    listed: bool
    block: list["Command"] | None


def parse(text: bytes) -> list[Command]:
    """The commands of a script. Raises Problem."""
    if len(text) > SCRIPT_MOST:
        raise Problem(SCRIPT_MOST, f"the script has more than {SCRIPT_MOST} octets")
    return _Parser(tokens(text)).commands(0)


class _Parser:
    """One pass over the tokens of a script."""

    def __init__(self, found: Iterator[Token]) -> None:
        self._rest = found
        self._token = next(found)

    def _advance(self) -> Token:
        token = self._token
        if token.kind != END:
            self._token = next(self._rest)
        return token

    def _take(self, kind: str) -> bool:
        found = self._token.kind == kind
        if found:
            self._advance()
        return found

    def _expected(self, what: str) -> Problem:
        return Problem(self._token.at, f"expected {what}, found {self._token}")

    def commands(self, depth: int) -> list[Command]:
        """Commands up to the end of the block, or of the script."""
        found = []
        while self._token.kind == IDENTIFIER:
            found.append(self._command(depth))
        if self._token.kind != ("}" if depth else END):
            raise self._expected('a command or "}"' if depth else "a command")
        return found

    def _command(self, depth: int) -> Command:
        name = self._advance()
        arguments, tests, listed = self._arguments(0, 0)
        block = None
        if self._token.kind == "{":
            if depth >= NESTING:
                raise Problem(self._token.at, f"blocks are nested more than {NESTING} deep")
            self._advance()
            block = self.commands(depth + 1)
            self._advance()
        elif not self._take(";"):
            raise self._expected('";"' if not tests else 'a block in "{" and "}"')
        return Command(name.value.decode(), name.at, arguments, tests, listed, block)

    def _arguments(self, lists: int, depth: int) -> tuple[list[Argument], list[Command], bool]:
        """Arguments, then a test or a list of tests. `lists`, `depth`: in how many lists, and tests, this is."""
        found = []
        while (argument := self._argument()) is not None:
            found.append(argument)
        listed = self._token.kind == "("
        if self._token.kind == IDENTIFIER:
            return found, [self._test(lists, depth)], False
        tests = []
        if listed:
            if lists >= NESTING:
                raise Problem(self._token.at, f"lists of tests are nested more than {NESTING} deep")
            self._advance()
            tests.append(self._test(lists + 1, depth))
            while self._take(","):
                tests.append(self._test(lists + 1, depth))
            if not self._take(")"):
                raise self._expected('"," or ")"')
        return found, tests, listed

    def _test(self, lists: int, depth: int) -> Command:
        if self._token.kind != IDENTIFIER:
            raise self._expected("a test")
        if depth > 2 * NESTING:
            raise Problem(self._token.at, f"tests are nested more than {2 * NESTING} deep")
        name = self._advance()
        arguments, tests, listed = self._arguments(lists, depth + 1)
        return Command(name.value.decode(), name.at, arguments, tests, listed, None)

    def _argument(self) -> Argument | None:
        token = self._token
        if token.kind == "[":
            return self._strings()
        if token.kind not in (STRING, NUMBER, TAG):
            return None
        self._advance()
        value = token.value if token.kind == STRING else token.number if token.kind == NUMBER else token.value.decode()
        return Argument(token.kind, value, token.at)

    def _strings(self) -> Argument:
        start = self._advance()
        found = []
        while True:
            if self._token.kind != STRING:
                raise self._expected("a string")
            found.append(self._advance().value)
            if not self._take(","):
                break
        if not self._take("]"):
            raise self._expected('"," or "]"')
        return Argument("strings", found, start.at)
