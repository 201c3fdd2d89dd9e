"""What `relaymta doctor` checks of this machine and this program."""

import os
import platform
import sys
import sysconfig

__all__ = ["Row", "here"]

Row = tuple[str, str, str]  # what was checked, ok | warning | wrong, the result

DISTRIBUTION = "/usr/bin/"  # where the distribution's interpreters are: all that are known to us are built with optimisation


def here() -> list[Row]:
    """The results, in the order in which they are shown."""
    return [_interpreter(), _kernels()]


def _interpreter() -> Row:
    """Which interpreter runs, and whether it was built with profile-guided optimisation."""
    path = os.path.realpath(sys.executable)
    what = f"{platform.python_implementation()} {platform.python_version()}, {path}"
    if path.startswith(DISTRIBUTION) or "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""):
        return "interpreter", "ok", what
    cure = "that of the distribution is faster (`make clean build PYTHON=/usr/bin/python3`)"
    return "interpreter", "warning", f"{what}, was built without profile-guided optimisation: {cure}"


def _kernels() -> Row:
    """Whether the compiled kernels are used: a program without them does not even start (`_speedups`), unless it is told to."""
    if os.environ.get("RELAYMTA_INTERPRETED") == "1":
        return "kernels", "wrong", "interpreted, many times slower: unset RELAYMTA_INTERPRETED"
    return "kernels", "ok", "compiled"
