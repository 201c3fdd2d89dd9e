"""The drop folder, for the time in which the relay does not answer: it takes from there what was put there when it is back
(accept/drops.py).

Users may not write into it: `relaymta-drop` (packaging/drop), which is set-gid, puts the message there for them. Where it is
not installed, whoever may write into the folder does it here.

A dropped message is the dialogue that the relay would have heard, `MAIL`, `RCPT` and `BDAT n LAST` with the message data: so it
says itself whether it is complete.
"""

import os
import time

from relaymta.sendmail.handing import NotNow, lines
from relaymta.sendmail.message import Envelope
from relaymta.sendmail.options import Options
from relaymta.sendmail.status import OK, TEMPFAIL, Stop

__all__ = ["drop"]

FOLDER, FOLDER_VARIABLE = "/var/spool/relaymta/drop", "RELAYMTA_DROP"
PROGRAM, PROGRAM_VARIABLE = "/usr/lib/relaymta/relaymta-drop", "RELAYMTA_DROP_PROGRAM"


def drop(envelope: Envelope, options: Options, why: NotNow) -> int:
    """Put a message into the drop folder. The exit status: it is safe on disk. Stop: it is not. `why`: why the relay did not
    take it."""
    start = b"".join(line + b"\r\n" for line in lines(envelope, options, set()))
    text = start + b"BDAT %d LAST\r\n" % len(envelope.data) + envelope.data
    program = os.environ.get(PROGRAM_VARIABLE) or PROGRAM
    if os.access(program, os.X_OK):
        status = _by_program(program, text)
        if status == OK:
            return OK
        raise Stop(status if status > 0 else TEMPFAIL, f"the message was not taken: {why}")
    try:
        _write(os.environ.get(FOLDER_VARIABLE) or FOLDER, text)
    except OSError as error:
        raise Stop(TEMPFAIL, f"the message was not taken: {why}; and it cannot be dropped: {error.strerror}") from None
    return OK


def _by_program(program: str, text: bytes) -> int:
    """Have the set-gid program do it; its exit status. It says itself what is wrong."""
    ours, theirs = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, ours, 0), (os.POSIX_SPAWN_CLOSE, theirs)]
    try:
        pid = os.posix_spawn(program, [program, str(len(text))], {}, file_actions=actions)
    except OSError as error:
        raise Stop(TEMPFAIL, f"{program}: {error.strerror}") from None
    os.close(ours)
    rest = memoryview(text)
    try:
        while rest:
            rest = rest[os.write(theirs, rest) :]
    except BrokenPipeError:  # it has ended, and says why by its status
        pass
    os.close(theirs)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _write(folder: str, text: bytes) -> None:
    """Write it here. OSError: that is not possible."""
    name = f"{time.time_ns()}.{os.getpid()}.drop"
    path, final = f"{folder}/.{name}", f"{folder}/{name}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        os.fchmod(descriptor, 0o644)  # the relay reads it, whatever the user's umask is
        rest = memoryview(text)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
        os.rename(path, final)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    there = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(there)
    finally:
        os.close(there)
