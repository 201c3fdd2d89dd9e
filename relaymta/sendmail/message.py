"""A message on standard input, and the envelope that the command line or its header gives it."""

import os

from relaymta.proto.addressees import addresses, fields, header_octets, recipients
from relaymta.sendmail.standard import piece
from relaymta.sendmail.status import DATA, IO, NO_INPUT, USAGE, Stop

__all__ = ["Envelope", "User", "address", "enveloped", "read"]

PIECE = 65536
# As Debian's cron, and cronie, begin the output of every user's jobs.
CRONS = (b"From: root (Cron Daemon)\r\n", b'From: "(Cron Daemon)" <root>\r\n')
_DOTS = (b"\n.\n", b"\n.\r\n", b"\n.\r\r\n")
_FIRST_DOTS = tuple(dots[1:] for dots in _DOTS)
_LAST_DOTS = tuple(dots[:-1] for dots in _FIRST_DOTS)
KEY = b"X-Relay-Idempotency"


class User:
    """The user as whom this runs: the effective one, as the socket has it, or whom a file belongs to. `name`, or its number;
    `full_name`: as the system has it, in which `&` is the name."""

    def __init__(self) -> None:
        import pwd  # a part of the interpreter; its look-up may take long where users are elsewhere

        uid = os.geteuid()
        try:
            found = pwd.getpwuid(uid)
            self.name = found.pw_name.rpartition("\\")[2]  # `CORP\ann`, as Winbind has it
            self.full_name = found.pw_gecos.partition(",")[0].replace("&", self.name)
        except KeyError:
            self.name, self.full_name = str(uid), ""


class Envelope:
    """A message to be handed over: `sender` and `recipients` as SMTP has them, without brackets; `data` with CRLF; `wrong`: a
    sentence about each recipient that is no address; `is_partial`: others than `recipients` have it already."""

    def __init__(self, sender: bytes, recipients: list[bytes], data: bytes, wrong: list[str] | None = None) -> None:
        self.sender = sender
        self.recipients = recipients
        self.data = data
        self.wrong = wrong or []
        self.is_partial = False


def read(descriptor: int, dot: bool) -> bytes:
    """The message, with CRLF for each line end. `dot`: a line of a single dot is part of it, and does not end it. Stop: it cannot
    be read."""
    data = bytearray()
    try:
        while True:
            more = piece(descriptor, PIECE)
            begin = max(len(data) - 4, 0)
            data += more
            end = -1 if dot else _end(data, begin, not more)
            if end >= 0:
                del data[end:]
                break
            if not more:
                break
    except OSError as error:
        missing = error.errno == 9  # EBADF: standard input is closed
        raise Stop(NO_INPUT if missing else IO, f"standard input: {error.strerror}") from None
    return with_crlf(bytes(data))


def with_crlf(data: bytes) -> bytes:
    """A message with CRLF for each line end, however they are: LF with any number of CR before it; in the body a CR by itself,
    too, such as a progress bar in the output of a job has. In the header that is a blank, or what follows it would be another
    field; so is NUL, everywhere. The relay takes none of them."""
    data = data.replace(b"\0", b" ").replace(b"\r\n", b"\n")
    if b"\r\n" in data:
        *lines, last = data.split(b"\n")
        data = b"\n".join((*(line.rstrip(b"\r") for line in lines), last))
    has_cr = b"\r" in data
    data = data.replace(b"\n", b"\r\n")
    if not has_cr:
        return data
    begin = _separator_octets(data)
    end = begin + header_octets(data[begin:])
    return _without_cr(data[:end], b" ") + _without_cr(data[end:], b"\n")


def _without_cr(data: bytes, other: bytes) -> bytes:
    """Text with CRLF, in which each CR by itself is something else."""
    return data.replace(b"\r\n", b"\n").replace(b"\r", other).replace(b"\n", b"\r\n")


def _end(data: bytearray, begin: int, complete: bool) -> int:
    """Where the line of a single dot begins that ends a message; -1: none is there. `begin`: up to where there was none."""
    if not begin and (data.startswith(_FIRST_DOTS) or (complete and bytes(data[:4]) in _LAST_DOTS)):
        return 0
    found = [at + 1 for at in (data.find(dots, begin) for dots in _DOTS) if at >= 0]
    if not found and complete and data.endswith(tuple(b"\n" + dot for dot in _LAST_DOTS)):
        return data.rindex(b"\n.") + 1
    return min(found, default=-1)


def enveloped(data: bytes, user: User, sender: str | None, given: list[str], from_header: bool, full_name: str) -> Envelope:
    """The message with its envelope. `sender`: None: the user; `given`: recipients of the command line, to which `from_header`
    adds those of the header. A message without From gets one, and one without an idempotency key that, so that it is sent once
    where the relay has it, and could not say so. Bcc is removed by the relay, as from all that is submitted, and so is the key.
    Stop: the sender is no address, or none of the recipients is."""
    data = data[_separator_octets(data) :]
    end = header_octets(data)
    header = data[:end]
    found, wrong = _recipients(header if from_header else None, given)
    own = os.fsencode(user.name)
    envelope_sender = address(own) if sender is None else _sender(sender) if sender else b""
    if not data.startswith(b"\r\n", end) and (not end or end < len(data)):  # or lines of the body would count as header
        data = header + b"\r\n" + data[end:]
    more = b""
    if user.name != "root" and data.startswith(CRONS):  # it would be refused: the user is not root
        data = data.replace(b"root", own, 1)
    elif not fields(header, (b"from",)):
        more = b"From: " + author(full_name or user.full_name, own) + b"\r\n"
    if not fields(header, (KEY.lower(),)):
        more += KEY + b": sendmail-" + os.urandom(16).hex().encode() + b"\r\n"
    return Envelope(envelope_sender, list(dict.fromkeys(found)), more + data, wrong)


def _recipients(header: bytes | None, given: list[str]) -> tuple[list[bytes], list[str]]:
    """The addresses that the arguments have, then those of the header, if one is given; and a sentence for each that is none.
    Stop: nobody would get the message."""
    lists = [_argued(argument) for argument in given if argument.strip()]
    if header is not None:
        lists.append(_checked(recipients(header)))
    found, wrong = [one for pair in lists for one in pair[0]], [one for pair in lists for one in pair[1]]
    if found:
        return found, wrong
    if wrong:
        raise Stop(DATA, "\n".join(wrong))
    if header is not None:
        raise Stop(USAGE, "the header names no recipient (To, Cc, Bcc)")
    raise Stop(USAGE, "there is no recipient: give addresses, or -t to take those of the header")


def _separator_octets(data: bytes) -> int:
    """The octets of the lines in front of a message with which a mailbox of mbox form separates messages."""
    at = 0
    while data.startswith((b"From ", b">From "), at):
        at = data.find(b"\r\n", at) + 2
        if at == 1:
            return len(data)
    return at


def _argued(argument: str) -> tuple[list[bytes], list[str]]:
    """The addresses that an argument of the command line has: one, or a list as in a header, with names or without (cron passes
    MAILTO=ann,bob on as one); and a sentence for each that is none."""
    given = os.fsencode(argument)
    found = addresses(given)
    if not found or any(one < 32 or one == 127 for one in given):  # else what stands behind a line end might count
        return [], [str(_no_address(given))]
    return _checked(found)


def _checked(listed: list[bytes]) -> tuple[list[bytes], list[str]]:
    """Those of the entries of a list that are addresses, and a sentence for each that is none."""
    found, wrong = [], []
    for one in (part for entry in listed for part in _parts(entry)):
        try:
            found.append(address(one))
        except Stop as error:
            wrong.append(str(error))
    return found, wrong


def _parts(entry: bytes) -> list[bytes]:
    """The addresses of an entry, as Postfix reads it: blanks beside @, and a bracket that closes nothing, do not count, and of
    several with blanks alone between them, each with an @, each is one."""
    if b'"' in entry or b"<" in entry:
        return [entry]
    words = b"@".join(part.strip(b" ") for part in entry.split(b"@")).split(b" ")
    if len(words) > 1 and not all(b"@" in word for word in words):
        return [entry]
    return [word.removesuffix(b">") for word in words]


def _sender(argument: str) -> bytes:
    """As `_argued`, of the only address. Stop."""
    found, wrong = _argued(argument)
    if wrong:
        raise Stop(DATA, wrong[0])
    if len(found) > 1:
        raise Stop(DATA, f"{_shown(os.fsencode(argument))}: a message has one sender")
    return found[0]


def address(given: bytes) -> bytes:
    """An address as SMTP has it between angle brackets. Stop: it has what an address cannot have, such as a line end, which must
    not come into a command."""
    found = given.strip(b" \t")
    if found.startswith(b"<") and found.endswith(b">"):
        found = found[1:-1]
    outside = _without_quoted(found)
    if not found or len(found) > 1000 or any(one < 32 or one == 127 for one in found) or any(one in b" <>()" for one in outside):
        raise _no_address(given)
    return found


def _no_address(given: bytes) -> Stop:
    return Stop(DATA, f"{_shown(given)}: this is no address")


def _without_quoted(text: bytes) -> bytes:
    """What is not in quotes, up to the last quote that is closed."""
    if b'"' not in text:
        return text
    kept, inside, escaped = bytearray(), False, False
    for one in text:
        if inside and not escaped and one == 0x5C:
            escaped = True
            continue
        if one == 0x22 and not escaped:
            inside = not inside
        elif not inside:
            kept.append(one)
        escaped = False
    return bytes(kept) if not inside else text


def author(full_name: str, name: bytes) -> bytes:
    """A mailbox for From: the full name, in a form in which it can be nothing else (RFC 5322 3.4, RFC 2047 5), and the user."""
    full = " ".join("".join(one if one.isprintable() else " " for one in full_name).split())
    if not full:
        return name
    if full.isascii():
        return b'"' + full.encode().replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'" <' + name + b">"
    from binascii import b2a_base64

    words, text = [], full
    while text:  # 75 octets a word, at most
        most = 11  # characters of four octets
        words.append(b"=?utf-8?B?" + b2a_base64(text[:most].encode("utf-8", "replace"), newline=False) + b"?=")
        text = text[most:]
    return b"\r\n ".join(words) + b" <" + name + b">"


def _shown(given: bytes) -> str:
    """An address for the user to see, without what a terminal takes for a command."""
    return repr(given[:200].decode("utf-8", "replace"))
