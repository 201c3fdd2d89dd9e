"""Reading the file of the configuration, and that of accounts. A problem reads `file:line: key: what (did you mean ...)`."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from relaymta.config.accounts import Account, AccountsFile
from relaymta.config.describing import model_of
from relaymta.config.origin import Origin
from relaymta.config.values import Place, Problems, near
from relaymta.config.whole import Config
from relaymta.errors import ConfigError
from relaymta.toml import lay_over, read_toml

__all__ = ["load", "load_accounts", "problems_of"]

M = TypeVar("M", bound=BaseModel)
_UNION = re.compile(r"constrained-str\Z|(function-(before|after)|literal)\[")  # pydantic's names for the types of a union
_OPTION = re.compile(r"'([^']*)'")

# Values that had another name in 0.1, understood for one version with a warning: key -> old -> new.
_RENAMED: dict[str, dict[str, str]] = {"verify.dmarc": {"tell": "report"}}


def load(path: Path | None, overrides: dict[str, Any]) -> Config:
    """The configuration of a file (None: no file), overridden by `overrides` (dotted key -> value, or "listener"/"route" ->
    tables). ConfigError with every problem."""
    text, data = read_toml(path) if path is not None else ("", {})
    for key, value in overrides.items():
        lay_over(data, key, deepcopy(value))  # old names in it are replaced
    renamed = _rename(data)
    origin = Origin(path, text, overrides)
    config = _validated(Config, origin, data)
    config._origin = origin
    config._renamed = [origin.sentence(place, what) for place, what in renamed]
    return config


def load_accounts(path: Path) -> list[Account]:
    """The accounts of a file. ConfigError with every problem."""
    text, data = read_toml(path)
    return _validated(AccountsFile, Origin(path, text), data).account


def _rename(data: dict[str, Any]) -> list[tuple[Place, str]]:
    """Replace old values by their new names: the place of each, and what it is called now."""
    found: list[tuple[Place, str]] = []
    for key, names in _RENAMED.items():
        *tables, last = key.split(".")
        inner: Any = data
        for table in tables:
            inner = inner.get(table) if isinstance(inner, dict) else None
        old = inner.get(last) if isinstance(inner, dict) else None
        if isinstance(old, str) and old in names:
            inner[last] = names[old]
            found.append(((*tables, last), f'"{old}" is called "{names[old]}" now'))
    return found


def _validated(model: type[M], origin: Origin, data: dict[str, Any]) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(problems_of(model, origin, error)) from None


def problems_of(model: type[BaseModel], origin: Origin, error: ValidationError) -> list[str]:
    """Pydantic's errors as our problems: `file:line: key: what`."""
    entries = [single for entry in error.errors() for single in _singly(entry)]
    return [_problem(model, origin, entry) for entry in entries]


def _singly(entry: Any) -> list[Any]:
    """The errors in an error of pydantic's, which may be about several keys."""
    problems = entry.get("ctx", {}).get("error")
    if not isinstance(problems, Problems):
        return [entry]
    return [{"type": "value_error", "loc": (*entry["loc"], *place), "msg": what} for place, what in problems.found]


def _problem(model: type[BaseModel], origin: Origin, entry: Any) -> str:
    place: Place = tuple(part for part in entry["loc"] if not _UNION.match(str(part)))
    given = entry.get("input")
    what = re.sub(r"^Value error, ", "", entry["msg"])
    if entry["type"] == "extra_forbidden":
        what = "no such key" + _did_you_mean(model, place)
    elif entry["type"] == "missing":
        what = "is missing"
    elif isinstance(given, str | int | float | bool):
        what = f"{what} (it is {given!r})" if repr(given) not in what else what
        if entry["type"] == "literal_error":
            what += near(str(given), _OPTION.findall(entry["ctx"]["expected"]))
    return origin.sentence(place, what)


def _did_you_mean(root: type[BaseModel], place: Place) -> str:
    model: Any = root
    for part in place[:-1]:
        if isinstance(part, str):
            model = model_of(model.model_fields[part].annotation)
    return near(str(place[-1]), model.model_fields)
