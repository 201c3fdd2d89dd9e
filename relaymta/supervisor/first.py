"""What is expected of process 1, which the relay is in a container (pid_namespaces(7))."""

import asyncio
import os

__all__ = ["bury_adopted"]

LOOK_SECONDS = 1.0


async def bury_adopted() -> None:
    """As process 1, wait for ever for children that others have left: the signing process of a worker that was killed, a command
    that was executed in the container. One that is dead at two looks is not ours: the event loop waits for those at once."""
    before = 0
    while os.getpid() == 1:
        await asyncio.sleep(LOOK_SECONDS)
        before = _look(before)


def _look(before: int) -> int:
    """A child that has ended and that nobody has waited for; 0: there is none. If it is that of `before`, it is waited for."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if found is None or found.si_pid != before:
        return found.si_pid if found is not None else 0
    os.waitpid(before, os.WNOHANG)
    return 0
