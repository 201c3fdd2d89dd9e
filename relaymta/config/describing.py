"""The keys, as data: which there are, what a reload does with each, and the reference file of all of them."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from relaymta.config.values import When, is_list, model_of, place_of, when
from relaymta.config.whole import Config

__all__ = ["Described", "Given", "Key", "as_toml", "describe", "given", "given_values", "leaves", "reference"]

HEAD = """\
# relaymta: every key, with its default. Lines without a value show keys that have none.
#
# Files in the folder conf.d beside this one (conf.d/*.toml) are read after it, in the order of their names. A key has the value
# of the last file that gives it, a list too; tables in double brackets ([[route]]) of all files follow each other. docs/cli.md.
#
# `relaymta reload` (or SIGHUP) applies a changed value, except for keys marked (restart): these take effect at the next start.
"""


class Key(NamedTuple):
    """A key of the reference; `default`: as it stands in a file, "" where there is none."""

    name: str
    text: str
    default: str
    restart: bool


class Described(NamedTuple):
    """A table of the reference: its head as it is written ("": none), what it is for, and its keys."""

    head: str
    text: str
    keys: list[Key]


class Given(NamedTuple):
    """A key that was given: dotted, its value, and the lines (file, number) in which it is given, that of the value first; none:
    on the command line."""

    key: str
    value: Any
    lines: list[tuple[str, int]]


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key that is not a table itself."""
    for name, field in model.model_fields.items():
        below = model_of(field.annotation)
        if below is None:
            yield prefix + name, field
        else:
            yield from leaves(below, f"{prefix}{name}.")


def given(config: Config) -> Iterator[Given]:
    """Every key that was given, in the order of the reference."""
    origin = config._origin
    for key, value in given_values(config, defaults=False):
        place = place_of(key)
        if key == "hostname" and config._unnamed:
            continue
        spots = [] if origin.is_overridden(place) else [origin.spot(place), *origin.others(place)]
        yield Given(key, value, [(str(origin.files[spot.file]), spot.line) for spot in spots if spot.line])


def given_values(table: BaseModel, prefix: str = "", defaults: bool = True) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key that is not a table itself. `defaults`: also of those that were not given."""
    for name, field in type(table).model_fields.items():
        if not defaults and name not in table.model_fields_set:
            continue
        value, key = getattr(table, name), prefix + (field.alias or name)
        if isinstance(value, BaseModel):
            yield from given_values(value, f"{key}.", defaults)
        elif model_of(field.annotation) is None:
            yield key, value
        else:
            for number, row in enumerate(value or []):
                yield from given_values(row, f"{key}.{number}.", defaults)


def describe() -> str:
    """The reference configuration file: every key with its description and default, as comments."""
    lines = HEAD.splitlines()
    for table in reference():
        mark = "" if re.fullmatch(r"\[\w+\]", table.head) else "#"  # the head of a table that there is once is no comment
        lines += ["", *(f"# {line}" for line in table.text.splitlines()), *([mark + table.head] if table.head else [])]
        for key in table.keys:
            lines += [f"# {key.text}{' (restart)' * key.restart}", f"#{key.name} = {key.default}"]
    return "\n".join(lines) + "\n"


def reference() -> Iterator[Described]:
    """All tables, in their order: first the keys that stand in front of the first one."""
    yield Described("", "", _keys(Config))
    for name, model in _tables_of(Config):
        yield _described(name, model, Config)
        for inner, below in _tables_of(model):
            described = _described(inner, below, model)
            yield described._replace(head=described.head.replace(inner, f"{name}.{inner}"))


def _described(name: str, model: type[BaseModel], above: type[BaseModel]) -> Described:
    head = f"[[{name}]]" if is_list(above.model_fields[name].annotation) else f"[{name}]"
    return Described(head, inspect.cleandoc(model.__doc__ or ""), _keys(model))


def _tables_of(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """(key, model) of the keys of a table that are tables themselves."""
    found = [(name, model_of(field.annotation)) for name, field in model.model_fields.items()]
    return [(name, below) for name, below in found if below is not None]


def _keys(model: type[BaseModel]) -> list[Key]:
    """The keys of a table that are not tables."""
    found = []
    for name, field in model.model_fields.items():
        if model_of(field.annotation) is None:
            default = None if field.is_required() or field.default_factory is not None else field.default
            found.append(Key(field.alias or name, field.description or "", as_toml(default), when(field) is When.RESTART))
    return found


def as_toml(value: Any) -> str:
    """A value as it stands in a file, in one line; "" for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(int(value)) if float(value).is_integer() else str(value)
