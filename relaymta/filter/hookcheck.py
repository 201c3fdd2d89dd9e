"""Whether a file of hooks can be imported: found by a process of its own, as the relay's user: what the file does there is done
nowhere else."""

import contextlib
import json
import os
import signal
import subprocess
from typing import Any, Final

from relaymta.config import Config
from relaymta.control import program
from relaymta.errors import ConfigError
from relaymta.filter.hookprocess import environment

__all__ = ["check", "imported"]

SECONDS: Final = 30.0
ANSWER_MOST: Final = 1 << 16  # octets


def imported(path: str, user: str = "") -> list[str]:
    """The hooks of a file. `user`: whose rights it gets, where the caller is root. ValueError: why it cannot be imported, with
    its line."""
    more: dict[str, Any] = {}
    if user and os.geteuid() == 0:
        from relaymta.privileges import account

        one = account(user)
        more = {"user": one.pw_uid, "group": one.pw_gid, "extra_groups": os.getgrouplist(one.pw_name, one.pw_gid)}
    answer = os.memfd_create("relaymta-hooks")
    try:
        found = _found(path, answer, more)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path}: it is not imported within {SECONDS:g} s") from None
    except OSError as error:
        raise ValueError(f"{path}: no process can import it: {error.strerror}") from None
    finally:
        os.close(answer)
    if not isinstance(found, list):
        raise ValueError(str(found))
    return [str(one) for one in found]


def _found(path: str, answer: int, more: dict[str, Any]) -> Any:
    """What a process says of a file, by a descriptor of its own: the file may print without end, and begin processes that go on,
    which end with it here. OSError, TimeoutExpired."""
    process = subprocess.Popen(
        program("relaymta.filter.hookhost", "check", path, str(answer)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, pass_fds=[answer], cwd="/", env=environment(), start_new_session=True, **more,
    )  # fmt: skip
    try:
        status = process.wait(SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        return json.loads(os.pread(answer, ANSWER_MOST, 0))
    except ValueError:
        return f"{path}: its import ends the process (status {status})"


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
