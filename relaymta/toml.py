"""TOML without a schema: files, and the overrides of the command line. The configuration and the command line read it here."""

import re
import tomllib
from pathlib import Path
from typing import Any

from relaymta.errors import ConfigError

__all__ = ["lay_over", "read_toml"]


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """(text, parsed content) of a file. ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: not UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(path, str(error))]) from None


def _syntax_problem(path: Path, text: str) -> str:
    match = re.search(r"\(at line (\d+), column \d+\)", text)
    what = re.sub(r"\s*\(at (?:line \d+, column \d+|end of document)\)", "", text)
    what = what.replace("Cannot overwrite a value", "this key is given twice")
    return f"{path}:{match[1] if match else 'end'}: {what}"


def lay_over(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key. ConfigError when a part of it is not a table."""
    *tables, last = key.split(".")
    for table in tables:
        inner = data.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"--set {key}: {table} is not a table"])
        data = inner
    data[last] = value
