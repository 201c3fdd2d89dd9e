"""The target `sendmail`: a message on standard input and the command line, up to what is handed to the daemon."""

import os

from relaymta.proto.addressees import fields, header_octets
from relaymta.sendmail import message
from relaymta.sendmail.message import User, author, enveloped, read
from relaymta.sendmail.options import parsed
from relaymta.sendmail.status import Stop

CONTROLS = frozenset((*range(32), 127))


class Ann(User):
    """A user whose name the system has."""

    def __init__(self, full_name: str) -> None:
        self.name, self.full_name = "ann", full_name


def sendmail(data: bytes) -> None:
    """An input: an octet of the size in which the message is read, one of how many lines follow: the words of the command line,
    the full name, and the message."""
    count = 2 + data[1] % 6
    pieces = data[2:].split(b"\n", count - 1)
    *words, full_name, text = [b"-t"] * (count - len(pieces)) + pieces
    message.PIECE = 1 + data[0]
    try:
        options = parsed(["sendmail", *(os.fsdecode(word.replace(b"\0", b"")) for word in words)])
        dot = options.dot
    except Stop as error:
        assert str(error)
        options, dot = parsed(["sendmail", "-t"]), bool(data[0] % 2)
    taken = _read(text, dot)
    name = os.fsdecode(full_name.replace(b"\0", b""))
    try:
        found = enveloped(taken, Ann(name), options.sender, options.recipients, options.from_header, options.full_name or "")
    except Stop as error:
        assert error.status in (64, 65) and str(error).isprintable(), error
        return
    for one in (found.sender, *found.recipients):
        assert not CONTROLS.intersection(one) and len(one) <= 1000
    assert found.recipients and all(found.recipients) and len(set(found.recipients)) == len(found.recipients)
    header = found.data[: header_octets(found.data)]
    assert fields(header, (b"from",))
    message_of = message._without_separator(taken)
    if found.data.endswith(message_of):  # what was put in front of it are our fields, and at most the line that ends a header
        ours = found.data[: len(found.data) - len(message_of)].removesuffix(b"\r\n\r\n").removesuffix(b"\r\n")
        assert all(line.startswith((b" ", b"From: ", message.KEY)) for line in ours.split(b"\r\n")) or not ours
    else:
        assert message_of.startswith(message.CRONS)
    assert fields(header, (message.KEY.lower(),))
    assert not CONTROLS.difference((13, 10)).intersection(author(name, b"ann"))


def _read(text: bytes, dot: bool) -> bytes:
    """What is read of a message, which is that up to its dot, by whatever pieces it comes."""
    descriptor = os.memfd_create("input")
    try:
        os.write(descriptor, text)
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = read(descriptor, dot)
    finally:
        os.close(descriptor)
    expected, lines = [], text.split(b"\n")
    for number, line in enumerate(lines):
        if not dot and line in (b".", b".\r"):
            break
        expected.append(line + b"\n" if number < len(lines) - 1 else line)
    whole = b"".join(expected).replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n").replace(b"\0", b" ")
    assert found == whole, (found, whole)
    return found
