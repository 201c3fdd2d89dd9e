"""What the program does in each of its modes."""

import os
import sys

from relaymta.sendmail.environment import inherited, is_of_others, variable
from relaymta.sendmail.options import Options, parsed
from relaymta.sendmail.standard import INPUT, OUTPUT, opened, say
from relaymta.sendmail.status import DATA, IO, NO_INPUT, OK, SOFTWARE, TEMPFAIL, UNAVAILABLE, USAGE, Stop

__all__ = ["main"]

SOCKET = "/run/relaymta/sendmail.sock"
SOCKET_VARIABLE = "RELAYMTA_SENDMAIL_SOCKET"
PROGRAMS = ("/usr/bin", "/usr/local/bin")  # where the command line is, if it is not beside the interpreter


def main(argv: list[str]) -> int:
    """Run it with a command line, whose first word is its name; the exit status. What is wrong is said on standard error."""
    try:
        closed = opened()
        options = parsed(argv)
        for descriptor, (status, text) in _NEEDED.get(options.mode, {}).items():
            if descriptor in closed:
                raise Stop(status, text)
        for remark in options.remarks:
            say(remark)
        return _MODES[options.mode](options)
    except Stop as error:
        say(str(error))
        return error.status
    except KeyboardInterrupt:
        return TEMPFAIL
    except MemoryError:
        say("there is too little memory")
        return TEMPFAIL
    except Exception as error:
        say(f"internal error: {type(error).__name__}: {error}")
        return SOFTWARE


def _socket() -> str:
    return variable(SOCKET_VARIABLE, SOCKET)


def _send(options: Options) -> int:
    """-bm: standard input is a message."""
    from relaymta.sendmail.handing import NotNow, hand_over
    from relaymta.sendmail.message import User, enveloped, read

    data = read(0, options.dot)
    full_name = options.full_name or variable("NAME")
    envelope = enveloped(data, User(), options.sender, options.recipients, options.from_header, full_name)
    for sentence in envelope.wrong:
        say(sentence)
    try:
        status = hand_over(_socket(), envelope, options)
    except NotNow as error:
        from relaymta.sendmail.dropping import drop

        drop(envelope, options, error)
        status = error.status
    return DATA if envelope.wrong else status


def _converse(options: Options) -> int:
    """-bs: SMTP on standard input and output."""
    from relaymta.sendmail.conversing import converse
    from relaymta.sendmail.handing import NotNow

    try:
        return converse(_socket())
    except NotNow as error:
        raise Stop(TEMPFAIL, str(error)) from None


def _list(options: Options) -> int:
    """-bp, mailq: the queue."""
    return _run(options, "queue", "list")


def _flush(options: Options) -> int:
    """-q: try what is due, now."""
    kind, what = options.flush or ("all", "")
    return _run(options, "queue", "flush", *{"all": ["--all"], "id": ["--", what], "site": ["--domain", what]}[kind])


def _verify(options: Options) -> int:
    """-bv: where mail for the recipients would go."""
    if not options.recipients:
        raise Stop(USAGE, "there is no recipient to look at")
    status = OK
    for recipient in options.recipients:
        status = _waited(options, "route", "test", "--to", recipient) or status
    return status


def _aliases(options: Options) -> int:
    """-bi, newaliases: nothing is to be compiled here; packages run it when they are installed."""
    return OK


def _program() -> str:
    """The path of the command line. Stop: it is not there."""
    own = [] if is_of_others() else [os.path.dirname(sys.executable)]  # it may come from PATH
    for folder in (*own, *PROGRAMS):
        path = f"{folder}/relaymta"
        if os.access(path, os.X_OK):
            return path
    raise Stop(UNAVAILABLE, "the program relaymta is not there")


def _environment(options: Options) -> dict[str, str]:
    return inherited() | ({"RELAYMTA_CONFIG": options.config} if options.config else {})


def _run(options: Options, *words: str) -> int:
    """Become the command line with these words."""
    path = _program()
    os.execve(path, ["relaymta", *words], _environment(options))


def _waited(options: Options, *words: str) -> int:
    """Run the command line with these words, and wait for it. Its exit status."""
    path = _program()
    pid = os.posix_spawn(path, ["relaymta", *words], _environment(options))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# What a mode needs: the status and the sentence where it is closed.
_NO_INPUT, _NO_OUTPUT = (NO_INPUT, "standard input is closed"), (IO, "standard output is closed")
_NEEDED = {
    "m": {INPUT: _NO_INPUT}, "s": {INPUT: _NO_INPUT, OUTPUT: _NO_OUTPUT}, "p": {OUTPUT: _NO_OUTPUT}, "v": {OUTPUT: _NO_OUTPUT},
}  # fmt: skip
_MODES = {"m": _send, "s": _converse, "p": _list, "q": _flush, "v": _verify, "i": _aliases}
