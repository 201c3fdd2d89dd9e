"""The drop folder, for the time in which the relay does not answer: it takes from there what was put there when it is back
(accept/dropped.py).

Users may not write into it: `relaymta-drop` (packaging/drop), which is set-gid, puts the message there for them. Where it is
not installed, whoever may write into the folder does it here.

A dropped message is the dialogue that the relay would have heard, `MAIL`, `RCPT` and `BDAT n LAST` with the message data: so it
says itself whether it is complete.
"""

import os
import time

from relaymta.sendmail.environment import variable
from relaymta.sendmail.handing import NotNow, lines
from relaymta.sendmail.message import Envelope
from relaymta.sendmail.options import Options
from relaymta.sendmail.standard import put
from relaymta.sendmail.status import OK, TEMPFAIL, Stop

__all__ = ["drop"]

FOLDER, FOLDER_VARIABLE = "/var/spool/relaymta/drop", "RELAYMTA_DROP"
PROGRAM, PROGRAM_VARIABLE = "/usr/lib/relaymta/relaymta-drop", "RELAYMTA_DROP_PROGRAM"
COMMANDS_MOST = 3 << 20  # octets of the commands of a file: the relay takes 4 MiB


def drop(envelope: Envelope, options: Options, why: NotNow) -> None:
    """Put a message into the drop folder, where it is safe on disk. For many recipients it is several files, each for some of
    them. Stop: it is not there, for those whom `envelope.recipients` has still. `why`: why the relay did not take it."""
    mail, *rcpts = lines(envelope, options, set())
    last = b"BDAT %d LAST\r\n" % len(envelope.data)
    while rcpts:
        count = _fitting(rcpts, COMMANDS_MOST - len(mail) - len(last))
        start = b"".join(line + b"\r\n" for line in (mail, *rcpts[:count]))
        _put(start + last + envelope.data, envelope, why)
        del rcpts[:count], envelope.recipients[:count]
        envelope.is_partial = True


def _fitting(rcpts: list[bytes], octets: int) -> int:
    """How many of these commands have no more octets together, with their line ends; at least one."""
    for count, rcpt in enumerate(rcpts):
        octets -= len(rcpt) + 2
        if octets < 0 and count:
            return count
    return len(rcpts)


def _put(text: bytes, envelope: Envelope, why: NotNow) -> None:
    """Put a file there, by the program or without. Stop."""
    whom = b" for " + b", ".join(envelope.recipients) if envelope.is_partial else b""
    sentence = f"the message was not taken{whom.decode('utf-8', 'replace')}: {why}"
    program = variable(PROGRAM_VARIABLE, PROGRAM)
    if os.access(program, os.X_OK):
        status = _by_program(program, text)
        if status != OK:
            raise Stop(status if status > 0 else TEMPFAIL, sentence)
        return
    try:
        _write(variable(FOLDER_VARIABLE, FOLDER), text)
    except OSError as error:
        raise Stop(TEMPFAIL, f"{sentence}; and it cannot be dropped: {error.strerror}") from None


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
    """Write it here. OSError: that is not possible, and nothing of it is left."""
    name = f"{time.time_ns()}.{os.getpid()}.drop"
    kept = f".{name}"
    there = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        descriptor = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=there)
        try:
            os.fchmod(descriptor, 0o644)  # the relay reads it, whatever the user's umask is
            put(descriptor, text)
            os.fsync(descriptor)
            os.rename(kept, name, src_dir_fd=there, dst_dir_fd=there)
            kept = name
            os.fsync(there)
        except BaseException:  # who is told that it is not there sends it again
            os.unlink(kept, dir_fd=there)
            raise
        finally:
            os.close(descriptor)
    finally:
        os.close(there)
