"""What becomes of a process whose relay has been upgraded, where whoever started it looks at this process (a shell, a container,
a supervisor such as runit): a small program that waits for the new one, passes signals on to it, and ends as it does."""

import os
import signal
import sys
from typing import NoReturn

__all__ = ["PASSED", "stand_by"]

PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PROGRAM = """
import os, signal, sys
pid, numbers = int(sys.argv[2]), [int(word) for word in sys.argv[3:]]
def passed(number, frame):
    try: os.kill(pid, number)
    except ProcessLookupError: pass
for number in numbers: signal.signal(number, passed)
signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
while True:
    try: found, status = os.wait()
    except ChildProcessError: sys.exit(70)
    if found == pid: break
code = os.waitstatus_to_exitcode(status)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code if code >= 0 else 128 - code)
"""


def stand_by(pid: int) -> NoReturn:
    """Become the program that waits for the child `pid`. As process 1 it also waits for what others have left. Signals that come
    meanwhile are passed on when it runs. Descriptors that are not inherited are closed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED)
    numbers = [str(int(number)) for number in PASSED]
    os.execv(
        sys.executable, [sys.executable, "-I", "-S", "-c", _PROGRAM, "relaymta: waits for its successor", str(pid), *numbers]
    )
