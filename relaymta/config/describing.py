"""The keys, as data: which there are, what a reload does with each, and the reference file of all of them."""

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from relaymta.config.values import When
from relaymta.config.whole import Config

__all__ = ["describe", "given_values", "is_list", "leaves", "model_of", "when"]

HEAD = """\
# relaymta: every key, with its default. Lines without a value show keys that have none.
#
# `relaymta reload` (or SIGHUP) applies a changed value, except for keys marked (restart): these take effect at the next start.
"""


def when(field: FieldInfo) -> When | None:
    """What a reload does with a key; None for one that is a table, whose keys say it."""
    return next((mark for mark in field.metadata if isinstance(mark, When)), None)


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key that is not a table itself."""
    for name, field in model.model_fields.items():
        below = model_of(field.annotation)
        if below is None:
            yield prefix + name, field
        else:
            yield from leaves(below, f"{prefix}{name}.")


def given_values(table: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key that is not a table itself, defaults included."""
    for name, field in type(table).model_fields.items():
        value, key = getattr(table, name), prefix + (field.alias or name)
        if isinstance(value, BaseModel):
            yield from given_values(value, f"{key}.")
        elif model_of(field.annotation) is None:
            yield key, value
        else:
            for number, row in enumerate(value or []):
                yield from given_values(row, f"{key}.{number}.")


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


def is_list(annotation: Any) -> bool:
    """Whether a key's value is a list."""
    return getattr(annotation, "__origin__", None) is list


def _tables_of(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """(key, model) of the keys of a table that are tables themselves."""
    found = [(name, model_of(field.annotation)) for name, field in model.model_fields.items()]
    return [(name, below) for name, below in found if below is not None]


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a key that is a table, or a list of tables; None for other keys."""
    inner = getattr(annotation, "__args__", (annotation,))[0]
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _describe_fields(model: type[BaseModel]) -> list[str]:
    """The lines about the keys of a table that are not tables."""
    lines = []
    for name, field in model.model_fields.items():
        if model_of(field.annotation) is None:
            default = None if field.is_required() or field.default_factory is not None else field.default
            restart = " (restart)" if when(field) is When.RESTART else ""
            lines += [f"# {field.description}{restart}", f"#{field.alias or name} = {_toml(default)}"]
    return lines


def _toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(int(value)) if float(value).is_integer() else str(value)
