"""Standard input, output and error. A caller may have closed them, made them non-blocking, or may read no more of them: none of
that is a reason to lose a message, or to send it twice."""

import os

__all__ = ["ERROR", "INPUT", "OUTPUT", "opened", "piece", "put", "say"]

INPUT, OUTPUT, ERROR = range(3)


def opened() -> set[int]:
    """Those of the three that are closed; /dev/null has their places from now on: else a socket or a file would get their
    numbers. OSError: it cannot be opened."""
    closed = set()
    for descriptor in (INPUT, OUTPUT, ERROR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)  # the lowest number that is free
            closed.add(descriptor)
    return closed


def say(text: str, prefix: str = "sendmail: ") -> None:
    """Write a sentence, each of its lines behind `prefix`, to standard error, if somebody reads it. What a terminal would take
    for a command, also of the controls from U+0080 on, is not written: replies and addresses are those of others."""
    lines = ("".join(one if one.isprintable() else "?" for one in prefix + line) + "\n" for line in text.split("\n"))
    data = "".join(lines).encode()
    try:
        while data:
            data = data[os.write(ERROR, data) :]
    except OSError:
        pass


def piece(descriptor: int, octets: int) -> bytes:
    """What is there to be read next, at most so many octets; empty: nothing more will be. It waits, also where the descriptor
    does not. OSError."""
    while True:
        try:
            return os.read(descriptor, octets)
        except BlockingIOError:
            _wait(descriptor, writes=False)


def put(descriptor: int, data: bytes) -> None:
    """Write all of it. It waits, also where the descriptor does not. OSError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            _wait(descriptor, writes=True)


def _wait(descriptor: int, *, writes: bool) -> None:
    from select import POLLIN, POLLOUT, poll  # few need it

    waiting = poll()
    waiting.register(descriptor, POLLOUT if writes else POLLIN)
    waiting.poll()
