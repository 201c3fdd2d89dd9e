"""A worker whose supervisor is gone ends within a bound, whatever its threads and its event loop do.

A thread waits for the supervisor's end (it costs nothing meanwhile), and then sets an alarm of the kernel, which ends the process
unless it has drained and ended by itself before. So a store that does not answer, or a loop that is blocked, does not keep the
spool from the next start. What is lost is what a power cut would lose: nothing that was acknowledged.
"""

import os
import select
import signal
import threading

__all__ = ["end_with_supervisor"]


def end_with_supervisor(seconds: float) -> None:
    """From now on: `seconds` after the end of the process that has started us, this one is ended. Without a pidfd (Linux before
    5.3) only the event loop notices that end."""
    try:
        parent = os.pidfd_open(os.getppid())
    except OSError:
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    threading.Thread(target=_wait, args=(parent, seconds), name="supervisor", daemon=True).start()


def _wait(parent: int, seconds: float) -> None:
    waiting = select.poll()
    waiting.register(parent, select.POLLIN)
    waiting.poll()
    signal.setitimer(signal.ITIMER_REAL, seconds)
