"""A configuration of ours as text, with a comment behind each line that says where it comes from."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from relaymta.cli.postfix.lines import DEFAULT, Origin

__all__ = ["Row", "Section", "Value", "value_text", "written"]

Value = bool | int | float | str | Sequence[str] | dict[str, str]
NOWHERE = Origin(DEFAULT)
WIDTH = 100  # columns of a list that stays in one line


class Row(NamedTuple):
    """A key. `origin`: where it comes from, NOWHERE: nothing is said; `origins`: the same of each value of a list."""

    key: str
    value: Value
    origin: Origin = NOWHERE
    origins: tuple[Origin, ...] = ()


class Section(NamedTuple):
    """A table. `head`: its name in brackets, "" for the top."""

    head: str
    rows: list[Row]


def written(sections: list[Section]) -> str:
    """The text of a file. Sections without rows are left out."""
    lines = list[str]()
    for section in sections:
        if not section.rows:
            continue
        lines += ["", *([section.head] if section.head else [])]
        for row in section.rows:
            lines += _lines(row)
    return "\n".join(lines[1:]) + "\n" if lines else ""


def _lines(row: Row) -> list[str]:
    value = row.value
    if isinstance(value, Sequence) and not isinstance(value, str):
        texts = [value_text(one) for one in value]
        flat = f"{row.key} = [{', '.join(texts)}]"
        same = len(set(row.origins)) <= 1
        if len(flat) <= WIDTH and same:
            return [_commented(flat, row.origins[0] if row.origin == NOWHERE and row.origins else row.origin)]
        origins = row.origins or (NOWHERE,) * len(texts)
        each = [_commented(f"    {text},", origin) for text, origin in zip(texts, origins, strict=True)]
        return [_commented(f"{row.key} = [", row.origin), *each, "]"]
    return [_commented(f"{row.key} = {value_text(value)}", row.origin)]


def _commented(text: str, origin: Origin) -> str:
    comment = re.sub(r"[\x00-\x1f\x7f]", " ", str(origin))
    return f"{text}  # {comment}" if comment else text


def value_text(value: object) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {value_text(one)}" for key, one in value.items()) + " }"
    text = str(value)
    if "\\" in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else value_text(name)
