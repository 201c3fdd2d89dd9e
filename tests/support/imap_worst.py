"""The worst inputs for the parsers of IMAP: rows of tests/support/parsers.py."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from relaymta.proto.imap_words import Refused, Words
from relaymta.proto.mailbox_list import Pattern, canonical
from tests.support.imap import caller

__all__ = ["rows"]

Row = tuple[str, Callable[[bytes], object], dict[str, Callable[[int], bytes]], str]


def _session(wire: bytes) -> None:
    one = caller(selected=True)
    one.session.errors = -len(wire)  # however many there are, it goes on
    one.execute = lambda command: one.session.done("OK", "x")
    for at in range(0, len(wire), 65536):
        one.session.receive(wire[at : at + 65536])
        one.run()


def _numbers(value: bytes) -> None:
    with contextlib.suppress(Refused):
        Words(b"a", [value]).numbers()


_WORST = Pattern("*a%a*b%" * 40)


def rows(times: Callable[..., Callable[[int], bytes]]) -> Iterator[Row]:
    """(name, what parses, its worst inputs, how much it reads at most). `times`: as in parsers.py."""
    wires: dict[str, Any] = {  # (those of FETCH that end in a digit are not remembered)
        "commands": times(b"1 NOOP\r\n"),
        "fetches": times(b"1 UID FETCH 1:100 (FLAGS BODY.PEEK[HEADER.FIELDS (From To)])\r\n"),
        "sections": times(b"BODY[1.2.3] ", b"1 FETCH 1 (", b"RFC822)\r\n"),
        "literals": times(b"1 SEARCH FROM {1+}\r\na\r\n"),
        "literals of one command": times(b" FROM {1+}\r\na", b"1 SEARCH", b"\r\n"),
        "messages": times(b"1 APPEND x {1+}\r\na\r\n"),
        "messages of one command": times(b" {1+}\r\na", b"1 APPEND x", b"\r\n"),
        "a message": times(b"a", b"1 APPEND x {40000000}\r\n"),
        "refused literals": times(b"1 FOO {3+}\r\nabc\r\n"),
        "a refused literal": times(b"a", b"1 FOO {1000000+}\r\n"),
        "half literals": times(b"1 LOGIN {4000\r\n"),
        "idles": times(b"1 IDLE\r\nDONE\r\n"),
        "broken idles": times(b"1 IDLE\r\nx\r\n"),
        "empty lines": times(b"\r\n"),
        "line feeds": times(b"\n"),
        "carriage returns": times(b"\r"),
        "a line without an end": times(b"a"),
        "braces": times(b"{1}"),
        "opening parentheses": times(b"(", b"1 SEARCH ", b"\r\n"),
        "closing parentheses": times(b")", b"1 SEARCH ", b"\r\n"),
        "quoted pairs": times(b'\\"', b'1 SEARCH FROM "', b'"\r\n'),
        "quotes": times(b'"', b"1 SEARCH ", b"\r\n"),
        "keys": times(b"NOT ", b"1 SEARCH ", b"SEEN\r\n"),
        "commands with many keys": times(b"1 SEARCH " + b"SEEN " * 80 + b"1\r\n"),
        "commands that nest": times(b"1 SEARCH " + b"(OR SEEN " * 15 + b"\r\n"),
        "flags": times(b"a ", b"1 STORE 1 FLAGS (", b"b)\r\n"),
        "fields": times(b"a ", b"1 FETCH 1 (BODY[HEADER.FIELDS (", b"b)] RFC822)\r\n"),
        "patterns": times(b"% ", b'1 LIST "" (', b"%)\r\n"),
        "names": times(b"&", b"1 SELECT ", b"\r\n"),
    }
    yield "proto.imap_server", _session, wires, "a command of 64 kB with its literals (32 kB before login), messages apart"
    sets = {
        "numbers": times(b"1,", b"", b"1"),
        "ranges that fall": lambda n: b",".join(b"%d:%d" % (2 * k + 2, 2 * k + 1) for k in range(n // 14, 0, -1)),
        "stars": times(b"*,", b"", b"*"),
        "digits": times(b"1"),
        "colons": times(b"1:", b"", b"1"),
    }
    yield "proto.imap_words.numbers", _numbers, sets, "as above"
    marks = {"marks": times("\u0316\u0300".encode(), b"a"), "in any case": times(b"INBOX/")}
    yield "proto.mailbox_list.canonical", lambda name: canonical(name.decode()), marks, "64 kB"
    names = {"levels": times(b"ab/"), "letters": times(b"a"), "the end": times(b"a", b"", b"b")}
    yield "proto.mailbox_list.Pattern (names)", lambda name: _WORST.matches(name.decode()), names, "1000 octets"
    patterns = {"stars": times(b"*"), "both": times(b"*%"), "letters": times(b"a*"), "in any case": times(b"INBOX/")}
    yield "proto.mailbox_list.Pattern", lambda pattern: Pattern(pattern.decode()).matches("a"), patterns, "64 kB"
