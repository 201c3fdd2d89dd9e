"""The environment, which is not to be trusted where the caller is a set-uid or set-gid program: whoever has started that one has
made it, and would have a program or a socket of his own used with the rights of another user."""

import os

__all__ = ["inherited", "is_of_others", "variable"]

CLEAN = {"PATH": "/usr/bin:/bin"}


def is_of_others() -> bool:
    """Whether the environment may be that of a user with fewer rights, as secure_getenv(3) sees it."""
    return os.getuid() != os.geteuid() or os.getgid() != os.getegid()


def variable(name: str, default: str = "") -> str:
    """The value of a variable, or the default where it is not set, empty, or not to be trusted."""
    return default if is_of_others() else os.environ.get(name) or default


def inherited() -> dict[str, str]:
    """The environment for the programs that are run."""
    return dict(CLEAN) if is_of_others() else dict(os.environ)
