"""Reading the files of the configuration, and that of accounts. A problem reads `file:line: key: what (did you mean ...)`."""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from relaymta.config.accounts import Account, AccountsFile
from relaymta.config.merging import merge_files
from relaymta.config.origin import Origin
from relaymta.config.sentences import problems_of
from relaymta.config.values import Place, Problem, is_list
from relaymta.config.whole import Config
from relaymta.errors import ConfigError
from relaymta.toml import Source, lay_over, read_all, read_toml

if TYPE_CHECKING:
    from relaymta.config.cases import Case

__all__ = ["load", "load_accounts", "load_cases"]

SEVERAL = {"account", *(name for name, field in Config.model_fields.items() if is_list(field.annotation))}
M = TypeVar("M", bound=BaseModel)

# Values that had another name in 0.1, understood for one version with a warning: key -> old -> new.
_RENAMED: dict[str, dict[str, str]] = {"verify.dmarc": {"tell": "report"}}


def load(path: Path | None, overrides: dict[str, Any], found: list[str] | None = None) -> Config:
    """The configuration of a file (None: no file) and of conf.d/*.toml beside it, overridden by `overrides` (dotted key -> value,
    or "listener"/"route" -> tables). ConfigError with every problem. With a list `found`, what values do not allow of each other
    is put there, and not raised."""
    sources = read_all(path, SEVERAL) if path is not None else []
    merged = merge_files(Config, sources)
    data = deepcopy(merged.data)
    for key, value in overrides.items():
        lay_over(data, key, deepcopy(value))  # old names in it are replaced
    renamed = _rename(data)
    origin = Origin(path, sources, merged, overrides)
    contradictions: list[Problem] = []
    config = _validated(Config, origin, data, None if found is None else contradictions)
    if found is not None:
        found += [origin.sentence(*problem) for problem in contradictions]
    config._origin = origin
    config._renamed = [origin.sentence(place, what) for place, what in renamed]
    return config


def load_accounts(path: Path) -> list[Account]:
    """The accounts of a file. ConfigError with every problem."""
    text, data = read_toml(path, SEVERAL)
    return _validated(AccountsFile, Origin(path, [Source(path, text, data)]), data).account


def load_cases(path: Path) -> "list[Case]":
    """The cases of hooks in a file. ConfigError with every problem."""
    from relaymta.config.cases import CasesFile  # what reads a configuration does without

    text, data = read_toml(path, ("case",))
    return _validated(CasesFile, Origin(path, [Source(path, text, data)]), data).case


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


def _validated(model: type[M], origin: Origin, data: dict[str, Any], context: Any = None) -> M:
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise ConfigError(problems_of(model, origin, error)) from None
