"""The keys, as data: which there are, what a reload does with each, and the reference file of all of them."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from relaymta.config.values import When, is_list, model_of, place_of, when
from relaymta.config.whole import Config

__all__ = ["Given", "as_toml", "describe", "given", "given_values", "leaves"]

HEAD = """\
# relaymta: every key, with its default. Lines without a value show keys that have none.
#
# Files in the folder conf.d beside this one (conf.d/*.toml) are read after it, in the order of their names. A key has the value
# of the last file that gives it, a list too; tables in double brackets ([[route]]) of all files follow each other. docs/cli.md.
#
# `relaymta reload` (or SIGHUP) applies a changed value, except for keys marked (restart): these take effect at the next start.
"""


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
    lines = [*HEAD.splitlines(), ""]
    lines += _describe_fields(Config)
    for name, model in _tables_of(Config):
        repeated = is_list(Config.model_fields[name].annotation)
        lines += ["", *_comment(model), f"#[[{name}]]" if repeated else f"[{name}]"]
        lines += _describe_fields(model)
        for inner, below in _tables_of(model):
            several = is_list(model.model_fields[inner].annotation)
            lines += ["", *_comment(below), f"#[[{name}.{inner}]]" if several else f"#[{name}.{inner}]", *_describe_fields(below)]
    return "\n".join(lines) + "\n"


def _comment(model: type[BaseModel]) -> list[str]:
    return [f"# {line}" for line in inspect.cleandoc(model.__doc__ or "").splitlines()]


def _tables_of(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """(key, model) of the keys of a table that are tables themselves."""
    found = [(name, model_of(field.annotation)) for name, field in model.model_fields.items()]
    return [(name, below) for name, below in found if below is not None]


def _describe_fields(model: type[BaseModel]) -> list[str]:
    """The lines about the keys of a table that are not tables."""
    lines = []
    for name, field in model.model_fields.items():
        if model_of(field.annotation) is None:
            default = None if field.is_required() or field.default_factory is not None else field.default
            restart = " (restart)" if when(field) is When.RESTART else ""
            lines += [f"# {field.description}{restart}", f"#{field.alias or name} = {as_toml(default)}"]
    return lines


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
