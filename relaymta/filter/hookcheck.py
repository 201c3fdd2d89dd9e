"""Whether a file of hooks can be imported: found by a process of its own, as the relay's user: what the file does there is done
nowhere else."""

import json
import os
import subprocess
from typing import Any, Final

from relaymta.config import Config
from relaymta.control import program
from relaymta.errors import ConfigError

__all__ = ["check", "imported"]

SECONDS: Final = 30.0


def imported(path: str, user: str = "") -> list[str]:
    """The hooks of a file. `user`: whose rights it gets, where the caller is root. ValueError: why it cannot be imported, with
    its line."""
    more: dict[str, Any] = {}
    if user and os.geteuid() == 0:
        from relaymta.privileges import account

        one = account(user)
        more = {"user": one.pw_uid, "group": one.pw_gid, "extra_groups": os.getgrouplist(one.pw_name, one.pw_gid)}
    try:
        done = subprocess.run(
            program("relaymta.filter.hookhost", "check", path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=SECONDS, cwd="/", **more,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path}: it is not imported within {SECONDS:g} s") from None
    except OSError as error:
        raise ValueError(f"{path}: no process can import it: {error.strerror}") from None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = f"{path}: its import ends the process (status {done.returncode})"
    if not isinstance(found, list):
        raise ValueError(str(found))
    return [str(one) for one in found]


def check(config: Config) -> None:
    """ConfigError with each file of hooks that cannot be imported."""
    problems = []
    for number, one in enumerate(config.filter):
        if one.type == "python":
            try:
                hooks = imported(one.file, config.user)
            except ValueError as error:
                problems.append(f"filter.{number}.file: {error}")
            else:
                if not hooks:
                    problems.append(f"filter.{number}.file: {one.file}: none of its functions is a hook (docs/hooks.md)")
    if problems:
        raise ConfigError(problems)
