"""A message on standard input, and the envelope that the command line or its header gives it."""

import os

from relaymta.proto.addressees import addresses, fields, header_octets, recipients
from relaymta.sendmail.status import DATA, IO, NO_INPUT, USAGE, Stop

__all__ = ["Envelope", "User", "address", "enveloped", "read"]

PIECE = 65536
# As Debian's cron, and cronie, begin the output of every user's jobs.
CRONS = (b"From: root (Cron Daemon)\r\n", b'From: "(Cron Daemon)" <root>\r\n')
_DOTS = (b"\n.\n", b"\n.\r\n")
KEY = b"X-Relay-Idempotency"


class User:
    """The user who runs this. `name`: that of the real user, or its number; `full_name`: as the system has it."""

    def __init__(self) -> None:
        import pwd  # a part of the interpreter; its look-up may take long where users are elsewhere

        uid = os.getuid()
        try:
            found = pwd.getpwuid(uid)
            self.name = found.pw_name.rpartition("\\")[2]  # `CORP\ann`, as Winbind has it
            self.full_name = found.pw_gecos.partition(",")[0]
        except KeyError:
            self.name, self.full_name = str(uid), ""


class Envelope:
    """A message to be handed over: `sender` and `recipients` as SMTP has them, without brackets; `data` with CRLF."""

    def __init__(self, sender: bytes, recipients: list[bytes], data: bytes) -> None:
        self.sender = sender
        self.recipients = recipients
        self.data = data


def read(descriptor: int, dot: bool) -> bytes:
    """The message, with CRLF for each line end. `dot`: a line of a single dot is part of it, and does not end it. Stop: it cannot
    be read."""
    data = bytearray()
    try:
        while True:
            piece = os.read(descriptor, PIECE)
            begin = max(len(data) - 3, 0)
            data += piece
            end = -1 if dot else _end(data, begin, not piece)
            if end >= 0:
                del data[end:]
                break
            if not piece:
                break
    except OSError as error:
        missing = error.errno == 9  # EBADF: standard input is closed
        raise Stop(NO_INPUT if missing else IO, f"standard input: {error.strerror}") from None
    # The relay takes no bare CR, such as a progress bar in the output of a job has, and no NUL.
    return bytes(data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n").replace(b"\0", b" ")


def _end(data: bytearray, begin: int, complete: bool) -> int:
    """Where the line of a single dot begins that ends a message; -1: none is there. `begin`: up to where there was none."""
    if not begin and (data.startswith((b".\n", b".\r\n")) or (complete and bytes(data[:3]) in (b".", b".\r"))):
        return 0
    found = [at + 1 for at in (data.find(dots, begin) for dots in _DOTS) if at >= 0]
    if not found and complete and data.endswith((b"\n.", b"\n.\r")):
        return data.rindex(b"\n.") + 1
    return min(found, default=-1)


def enveloped(data: bytes, user: User, sender: str | None, given: list[str], from_header: bool, full_name: str) -> Envelope:
    """The message with its envelope. `sender`: None: the user; `given`: recipients of the command line, to which `from_header`
    adds those of the header. A message without From gets one, and one without an idempotency key that, so that it is sent once
    where the relay has it, and could not say so. Bcc is removed by the relay, as from all that is submitted, and so is the key.
    Stop: an address is none, or there is no recipient."""
    data = _without_separator(data)
    header = data[: header_octets(data)]
    found = [one for argument in given for one in _argued(argument)]
    if from_header:
        found += [address(one) for one in recipients(header)]
    if not found:
        if from_header:
            raise Stop(DATA, "the header names no recipient (To, Cc, Bcc)")
        raise Stop(USAGE, "there is no recipient: give addresses, or -t to take those of the header")
    own = os.fsencode(user.name)
    envelope_sender = address(own) if sender is None else _sender(sender) if sender else b""
    more = b""
    if user.name != "root" and data.startswith(CRONS):  # it would be refused: the user is not root
        data = data.replace(b"root", own, 1)
    elif not fields(header, (b"from",)):
        more = b"From: " + author(full_name or user.full_name, own) + b"\r\n"
    if not fields(header, (KEY.lower(),)):
        more += KEY + b": sendmail-" + os.urandom(16).hex().encode() + b"\r\n"
    if more:
        data = more + (data if header or data.startswith(b"\r\n") else b"\r\n" + data)
    return Envelope(envelope_sender, list(dict.fromkeys(found)), data)


def _without_separator(data: bytes) -> bytes:
    """A message without the lines in front of it with which a mailbox of mbox form separates messages."""
    at = 0
    while data.startswith((b"From ", b">From "), at):
        at = data.find(b"\r\n", at) + 2
        if at == 1:
            return b""
    return data[at:]


def _argued(argument: str) -> list[bytes]:
    """The addresses that an argument of the command line has: one, or a list as in a header, with names or without (cron passes
    MAILTO=ann,bob on as one). Stop: there is none, or something else is there."""
    given = os.fsencode(argument)
    found = addresses(given)
    if not found or any(one < 32 or one == 127 for one in given):  # else what stands behind a line end might count
        raise Stop(DATA, f"{_shown(given)}: this is no address")
    return [address(one) for one in found]


def _sender(argument: str) -> bytes:
    """As `_argued`, of the only address."""
    found = _argued(argument)
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
        raise Stop(DATA, f"{_shown(given)}: this is no address")
    return found


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
    named = full_name.replace("&", name.decode("ascii", "replace"))
    full = " ".join("".join(one if one.isprintable() else " " for one in named).split())
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
