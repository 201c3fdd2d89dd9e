"""What the program does in each of its modes."""

import os
import sys

from relaymta.sendmail.options import Options, parsed
from relaymta.sendmail.status import OK, SOFTWARE, TEMPFAIL, UNAVAILABLE, USAGE, Stop

__all__ = ["main"]

SOCKET = "/run/relaymta/sendmail.sock"
SOCKET_VARIABLE = "RELAYMTA_SENDMAIL_SOCKET"
PROGRAMS = ("/usr/bin", "/usr/local/bin")  # where the command line is, if it is not beside the interpreter


def main(argv: list[str]) -> int:
    """Run it with a command line, whose first word is its name; the exit status. What is wrong is said on standard error."""
    try:
        options = parsed(argv)
        return _MODES[options.mode](options)
    except Stop as error:
        for line in str(error).split("\n"):
            _say(line)
        return error.status
    except KeyboardInterrupt:
        return TEMPFAIL
    except Exception as error:
        _say(f"internal error: {type(error).__name__}: {error}")
        return SOFTWARE


def _say(text: str) -> None:
    try:
        sys.stderr.write(f"sendmail: {''.join(one if one.isprintable() else '?' for one in text)}\n")
    except (OSError, AttributeError):  # standard error is closed
        pass


def _socket() -> str:
    return os.environ.get(SOCKET_VARIABLE) or SOCKET


def _send(options: Options) -> int:
    """-bm: standard input is a message."""
    from relaymta.sendmail.handing import NotNow, hand_over
    from relaymta.sendmail.message import User, enveloped, read

    data = read(0, options.dot)
    full_name = options.full_name or os.environ.get("NAME", "")
    envelope = enveloped(data, User(), options.sender, options.recipients, options.from_header, full_name)
    try:
        return hand_over(_socket(), envelope, options)
    except NotNow as error:
        from relaymta.sendmail.dropping import drop

        return drop(envelope, options, error)


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
    for folder in (os.path.dirname(sys.executable), *PROGRAMS):
        path = f"{folder}/relaymta"
        if os.access(path, os.X_OK):
            return path
    raise Stop(UNAVAILABLE, "the program relaymta is not there")


def _environment(options: Options) -> dict[str, str]:
    return {**os.environ, **({"RELAYMTA_CONFIG": options.config} if options.config else {})}


def _run(options: Options, *words: str) -> int:
    """Become the command line with these words."""
    path = _program()
    sys.stdout.flush()
    os.execve(path, ["relaymta", *words], _environment(options))


def _waited(options: Options, *words: str) -> int:
    """Run the command line with these words, and wait for it. Its exit status."""
    path = _program()
    pid = os.posix_spawn(path, ["relaymta", *words], _environment(options))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


_MODES = {"m": _send, "s": _converse, "p": _list, "q": _flush, "v": _verify, "i": _aliases}
