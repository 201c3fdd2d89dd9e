"""Values with `$name` in them, as mac_expand(3) of Postfix reads them."""

import re
from collections.abc import Callable

__all__ = ["BadExpansion", "expand"]

DEEPEST = 100
LONGEST = 1 << 20  # characters of a value: names that refer to others twice grow without bound
_BLANKS = " \t\r\n"
_NAME = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"(==|!=|<=|>=|<|>)([A-Za-z0-9]*)")


class BadExpansion(ValueError):
    """A value that Postfix refuses."""

    is_placed = False  # whether it says where that is

    def at(self, place: str) -> "BadExpansion":
        """The same with the place of the innermost value."""
        found = self if self.is_placed else BadExpansion(f"{place}: {self}")
        found.is_placed = True
        return found


def expand(text: str, raw: Callable[[str], str | None], value: Callable[[str], str], depth: int = 0) -> str:
    """The text with `$name`, `${name}`, `$(name)`, `${name?text}`, `${name:text}`, `${name?{text}:{text}}` and
    `${{text} == {text} ? {text} : {text}}` replaced; `$$` is `$`. `raw(name)`: the value as it is written, None: there is
    none; `value(name)`: the same, expanded. BadExpansion."""
    if depth > DEEPEST:
        raise BadExpansion("conditions are nested too deeply")
    found, at = list[str](), 0
    while at < len(text):
        dollar = text.find("$", at)
        if dollar < 0:
            break
        found.append(text[at:dollar])
        at = dollar + 1
        if text.startswith("$", at):
            found.append("$")
            at += 1
        elif text[at : at + 1] in ("{", "("):
            inside, at = _bracketed(text, at)
            found.append(_conditional(inside, raw, value, depth))
        else:
            name = _NAME.match(text, at)
            if name is None:
                raise BadExpansion(f"a $ without a name in {text[:60]!r}")
            at = name.end()
            found.append(value(name[0]))
    found.append(text[at:])
    if sum(map(len, found)) > LONGEST:
        raise BadExpansion(f"it is longer than {LONGEST} characters")
    return "".join(found)


def _bracketed(text: str, at: int) -> tuple[str, int]:
    """(What is within the bracket that opens at `at`, where the text goes on)."""
    opening, closing = text[at], {"{": "}", "(": ")"}[text[at]]
    level = 0
    for end in range(at, len(text)):
        level += (text[end] == opening) - (text[end] == closing)
        if not level:
            return text[at + 1 : end], end + 1
    raise BadExpansion(f"the closing {closing} is missing in {text[:60]!r}")


def _conditional(inside: str, raw: Callable[[str], str | None], value: Callable[[str], str], depth: int) -> str:
    """What stands for `${inside}`."""
    rest = inside.lstrip(_BLANKS)
    if rest.startswith("{"):
        is_true, rest = _relation(rest, raw, value, depth)
    else:
        name = _NAME.match(rest)
        if name is None:
            raise BadExpansion(f"no name in ${{{inside[:60]}}}")
        rest = rest[name.end() :].lstrip(_BLANKS)
        if not rest:
            return value(name[0])
        is_true = bool(raw(name[0]))
    if not rest:
        return "true" if is_true else ""
    operator, rest = rest[0], rest[1:]
    if operator not in "?:":
        raise BadExpansion(f'"?" or ":" expected at {(operator + rest)[:60]!r}')
    chosen = ""
    if operator == "?":
        text, rest = _operand(rest)
        chosen = text if is_true else ""
        if rest and not rest.startswith(":"):
            raise BadExpansion(f'":" expected at {rest[:60]!r}')
        if not rest:
            return expand(chosen, raw, value, depth + 1)
        rest = rest[1:]
    text, rest = _operand(rest)
    if rest:
        raise BadExpansion(f"unexpected: {rest[:60]!r}")
    return expand(chosen if is_true else text, raw, value, depth + 1)


def _operand(rest: str) -> tuple[str, str]:
    """(The text of an operand, what is behind it): in braces, or else all of it."""
    bare = rest.lstrip(_BLANKS)
    if not bare.startswith("{"):
        return rest, ""
    text, end = _bracketed(bare, 0)
    return text, bare[end:].lstrip(_BLANKS)


def _relation(rest: str, raw: Callable[[str], str | None], value: Callable[[str], str], depth: int) -> tuple[bool, str]:
    """(Whether `{left} OP {right}` holds, what is behind it)."""
    left, rest = _operand(rest)
    operator = _OPERATOR.match(rest)
    if operator is None or operator[2] not in ("", "level"):
        raise BadExpansion(f"an operator such as == expected at {rest[:60]!r}")
    rest = rest[operator.end() :]
    if not rest.lstrip(_BLANKS).startswith("{"):
        raise BadExpansion(f'"{{" expected at {rest[:60]!r}')
    right, rest = _operand(rest)
    values = [expand(text, raw, value, depth + 1) for text in (left, right)]
    order = _compared(values, operator[2] == "level")
    holds = {"==": order == 0, "!=": order != 0, "<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0}
    return holds[operator[1]], rest


def _compared(values: list[str], levels: bool) -> int:
    """Below, above or equal to 0, as the first value is less than the second. `levels`: of compatibility, such as 3.6."""
    keys: list[list[int]] | list[int] | list[str]
    if levels:
        try:
            keys = [([int(part) for part in value.split(".")] + [0, 0])[:3] for value in values]
        except ValueError:
            raise BadExpansion(f"no compatibility level: {values}") from None
    else:
        keys = [int(value) for value in values] if all(value.isdecimal() for value in values) else values
    first, second = keys
    return (first > second) - (first < second)  # type: ignore[operator]
