"""Regular expressions of Postfix's tables (pcre_table(5), regexp_table(5)): as Python reads them, and as plain conditions where
they are no more than that."""

import re
from functools import lru_cache
from typing import NamedTuple

from relaymta.cli.postfix.conditions import Condition
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.lines import Place

__all__ = ["Rule", "anchored", "plain_conditions", "read_rules"]

_IF = re.compile(r"if\b\s*(.*)\Z", re.I | re.S)
_ENDIF = re.compile(r"endif\b", re.I)
# Repeated groups with something repeated in them: a route map may take very long for these.
_NESTED = re.compile(r"[*+}]\)[*+{]")
_CLASSES = {
    "[:alnum:]": "A-Za-z0-9", "[:alpha:]": "A-Za-z", "[:digit:]": "0-9", "[:lower:]": "a-z", "[:upper:]": "A-Z",
    "[:space:]": r"\s", "[:xdigit:]": "A-Fa-f0-9", "[:blank:]": r" \t", "[:word:]": r"\w",
}  # fmt: skip


class Rule(NamedTuple):
    """A rule of a table. `text`: as it is written; `expression`: for Python, "" where it cannot be read, with upper and lower
    case the same; `value`: the result; `exact`: whether `expression` means the same to a route map; `parts`: (expression,
    negated) of the `if` around it and of itself, all of which have to hold."""

    text: str
    expression: str
    value: str
    place: Place
    exact: bool = True
    parts: tuple[tuple[str, bool], ...] = ()

    def matches(self, key: str) -> bool:
        """Whether it matches a key; False for one that could not be read. It takes linear time."""
        return bool(self.expression) and all((_compiled(part).search(key) is not None) != negated for part, negated in self.parts)


def read_rules(files: Files, name: str, kind: str) -> list[Rule]:
    """The rules of a table. `kind`: pcre or regexp. OSError."""
    found = list[Rule]()
    conditions = list[tuple[str, bool, bool]]()  # (expression, negated, exact) of each `if` that is open
    for place, line in files.lines(name):
        text = line.text.strip()
        if _ENDIF.match(text):
            conditions = conditions[:-1]
            continue
        opening = _IF.match(text)
        expression, negated, exact, value = _pattern(opening[1] if opening is not None else text, kind)
        if opening is not None:
            conditions.append((expression, negated, exact))
            continue
        every = [*conditions, (expression, negated, exact)]
        written = text.removesuffix(value).strip() if value else text
        made = "" if not all(one for one, _, _ in every) else _joined([(one, no) for one, no, _ in every])
        parts = tuple((one, no) for one, no, _ in every)
        found.append(Rule(written, made, value, place, all(one for _, _, one in every), parts))
    return found


def _pattern(text: str, kind: str) -> tuple[str, bool, bool, str]:
    """(Expression, "" for one that cannot be read; negated; whether it is exact; what is behind it) of a rule."""
    bare = text.lstrip("! \t")
    negated = text[: len(text) - len(bare)].count("!") % 2 == 1
    end = _closing(bare)
    if end < 0:
        return "", negated, False, ""
    flags, _, value = bare[end + 1 :].replace("\t", " ").partition(" ")
    expression = bare[1:end].replace("\\" + bare[0], bare[0])
    for name, members in _CLASSES.items():
        expression = expression.replace(name, members)
    odd = {flag for flag in flags if flags.count(flag) % 2}
    if odd - {"i", "m"} - ({"x"} if kind == "pcre" else set()) or "[:" in expression:
        return "", negated, False, value.strip()
    if odd:
        expression = f"(?{''.join(sorted(odd - {'i'}))}{'-i' if 'i' in odd else ''}:{expression})"
    exact = "i" not in odd and _NESTED.search(expression) is None  # a route map knows addresses in lower case
    if not _is_read(expression):
        return "", negated, False, value.strip()
    return expression or "(?:)", negated, exact, value.strip()


@lru_cache(10_000)
def _compiled(expression: str) -> "re.Pattern[str]":
    """An expression for RE2, which takes linear time whatever is written there. re2.error."""
    import re2

    options = re2.Options()
    options.case_sensitive, options.dot_nl, options.log_errors = False, True, False
    return re2.compile(expression, options)  # type: ignore[no-any-return]


def _is_read(expression: str) -> bool:
    """Whether both Python, by which a route map is matched, and RE2 know an expression."""
    import re2

    try:
        re.compile(expression)
        _compiled(expression)
    except (re.error, re2.error):
        return False
    return True


def _closing(bare: str) -> int:
    """Where the second delimiter of an expression is; -1: it is missing."""
    at = 1
    while at < len(bare):
        if bare[at] == "\\":
            at += 1
        elif bare[at] == bare[0]:
            return at
        at += 1
    return -1


def _joined(parts: list[tuple[str, bool]]) -> str:
    """One expression that matches where all of these do, or do not."""
    if len(parts) == 1 and not parts[0][1]:
        return parts[0][0]
    return "^" + "".join(f"(?{'!' if negated else '='}.*?(?:{expression}))" for expression, negated in parts)


def anchored(condition: Condition, extension: str = "") -> str:
    """An expression that matches exactly these addresses. `extension`: characters one of which may begin an address extension."""
    if condition.kind == "any":
        return ""
    if condition.kind == "below":
        return rf"@[^@]*\.{re.escape(condition.value)}$"
    if condition.kind == "domain":
        return f"@{re.escape(condition.value)}$"
    local, _, domain = condition.value.rpartition("@")
    detail = f"(?:[{re.escape(extension)}][^@]*)?" if extension else ""
    return f"^{re.escape(local)}{detail}@{re.escape(domain)}$"


_LABELS = r"[A-Za-z0-9-]+(?:\\?\.[A-Za-z0-9-]+)*"
_PLAIN: list[tuple[re.Pattern[str], tuple[str, ...]]] = [
    (re.compile(r"(?:\^?\.[*+]\$?|\^|\^\.|\.|\(\?:\))\Z"), ("any",)),
    (re.compile(rf"(?:\^?\.[*+])?@({_LABELS})\$\Z"), ("domain",)),
    (re.compile(rf"(?:\^?\.[*+])?@\(\.[*+]\\\.\)\?({_LABELS})\$\Z"), ("domain", "below")),
    (re.compile(rf"(?:\^?\.[*+])?\[(?:@\\?\.|\\?\.@)\]({_LABELS})\$\Z"), ("domain", "below")),
    (re.compile(rf"(?:\^?\.[*+])?(?:@\.[*+])?\\\.({_LABELS})\$\Z"), ("below",)),
    (re.compile(rf"\^([A-Za-z0-9_=-]+(?:\\?\.[A-Za-z0-9_=-]+)*@{_LABELS})\$\Z"), ("address",)),
]


def plain_conditions(expression: str) -> list[Condition]:
    """The conditions that an expression comes to, such as `@example\\.com$`; none where it is more than that. A dot that is not
    escaped is taken for a dot."""
    for pattern, kinds in _PLAIN:
        match = pattern.match(expression)
        if match is not None:
            value = match[1].replace("\\", "").lower() if pattern.groups else ""
            return [Condition(kind, value) for kind in kinds]  # type: ignore[arg-type]
    return []
