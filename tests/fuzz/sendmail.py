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
        assert error.status in (64, 65) and all(line.isprintable() for line in str(error).split("\n")), error
        return
    for one in (found.sender, *found.recipients):
        assert not CONTROLS.intersection(one) and len(one) <= 1000
    assert found.recipients and all(found.recipients) and len(set(found.recipients)) == len(found.recipients)
    header = found.data[: header_octets(found.data)]
    assert fields(header, (b"from",))
    message_of = taken[message._separator_octets(taken) :]
    end = header_octets(message_of)
    given, body = message_of[:end], message_of[end:]
    rest = found.data.removesuffix(body).removesuffix(b"\r\n") if not body.startswith(b"\r\n") else found.data.removesuffix(body)
    assert rest != found.data or not body
    given = given.removesuffix(b"\r\n")
    if not message_of.startswith(message.CRONS):  # what was put in front of it are our fields
        ours = rest.removesuffix(b"\r\n").removesuffix(given).removesuffix(b"\r\n")
        assert all(line.startswith((b" ", b"From: ", message.KEY)) for line in ours.split(b"\r\n")) or not ours, ours
    assert len(header) == len(found.data) or found.data.startswith(b"\r\n", len(header)), "no line of the body is a field"
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
        if not dot and line in (b".", b".\r", b".\r\r"):
            break
        expected.append(line.rstrip(b"\r") + b"\n" if number < len(lines) - 1 else line)
    whole = b"".join(expected).replace(b"\0", b" ")
    assert found.replace(b"\r\n", b"\n").replace(b"\n", b" ") == whole.replace(b"\r", b" ").replace(b"\n", b" ")
    assert not found.replace(b"\r\n", b"").count(b"\r") + found.replace(b"\r\n", b"").count(b"\n")
    header = found[: message._separator_octets(found)]
    header += found[len(header) :][: header_octets(found[len(header) :])]
    lines = whole.split(b"\n")[: header.count(b"\r\n")]  # no line of the header begins where there was none
    assert [line.replace(b"\r", b" ") for line in lines] == header.split(b"\r\n")[:-1]
    return found
