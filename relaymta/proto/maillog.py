r"""The log as Postfix writes it, for programs that read that (pflogsumm, fail2ban): an event as lines, and what a line says.

    Nov 29 14:00:00 host postfix/smtpd[123]: 1M8KWQ60M0000: client=unknown[192.0.2.1]

A line has the name of that process of Postfix which would have written it; an event that Postfix has not is one of
`postfix/relaymta`, with its fields as `key=value` (docs/log.md). What comes from outside cannot look like anything else:

- in a *word* (an address, a name) blanks, angle brackets and what is not printable are escaped (\x20),
- in a *text* (a reply, a reason) what is not printable, and the last character of what begins a field (`key=`), of `]:`,
  `reject:`, `hold:` and `discard:`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from relaymta.proto.printable import printable

__all__ = ["Said", "Writer", "heard"]

_Lines = Iterator[tuple[str, str]]  # program, text

_WORD = re.compile(r"[!-;=?-~]*\Z")
_BARE = re.compile(r"[!#-;?-~]+\Z")  # a value that needs no quotation marks
_FORGED = re.compile(r"(?<![\w?&%/.-])[\w-]+=|\]:|\b(?:reject|reject_warning|hold|discard):")
_REPLY = re.compile(r"(?:(\d{3})(?: |\Z))?(?:([245]\.\d{1,3}\.\d{1,3})(?: |\Z))?(.*)", re.S)
_PHASES = {"connect": "CONNECT", "mail": "MAIL", "rcpt": "RCPT"}
_COMMANDS = {
    "connect": "initial server greeting", "ehlo": "EHLO command", "starttls": "STARTTLS command", "auth": "AUTH command",
    "xforward": "XFORWARD command", "mail": "MAIL FROM command", "rcpt": "RCPT TO command", "data": "DATA command",
    "final": "end of DATA command", "rset": "RSET command",
}  # fmt: skip
_DSN = {"sent": "2.0.0", "deferred": "4.0.0", "bounced": "5.0.0", "expired": "4.4.7"}  # where the reply has no such code
_NOT_SHOWN = {"ts", "worker", "until", "notice"}  # in the form of fields: they are elsewhere, or deprecated


def _word(text: str) -> str:
    if _WORD.match(text):
        return text
    return "".join(f"\\x{ord(char):02x}" if char in " <>" else printable(char) for char in text)


def _last_escaped(found: re.Match[str]) -> str:
    return f"{found[0][:-1]}\\x{ord(found[0][-1]):02x}"


def _text(text: str) -> str:
    return _FORGED.sub(_last_escaped, printable(text))


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if _BARE.match(text) else '"' + _text(text).replace('"', "\\x22") + '"'


def _client(address: str) -> str:
    return f"unknown[{_word(address) or 'unknown'}]"


def _given(record: Any, field: str) -> Any:
    """A field of an event, "" where it is left out."""
    value = getattr(record, field)
    return "" if value is msgspec.UNSET else value


def _said(record: Any) -> str:
    """What a peer has said, or why there was nothing to be heard, as Postfix tells it."""
    code, enhanced, text = _REPLY.match(record.reply).groups()  # type: ignore[union-attr] # it matches everything
    if not code:
        return _text(text or enhanced or "")
    command = _COMMANDS.get(record.phase)
    return f"host {_word(record.peer) or 'unknown'} said: {_text(record.reply)}" + (
        f" (in reply to {command})" if command else ""
    )


class Writer:
    """Writes the events of one process. `begin(ts)`: what a line begins with, its time and host, with the blank behind it; `pid`:
    of the process. `programs`: of routes, where it is not "smtp". Not for several threads."""

    def __init__(self, begin: Callable[[float], str], pid: int) -> None:
        self._begin = begin
        self._end = f"[{pid}]: "  # of what is in front of the text
        self.programs: Mapping[str, str] = {}
        self._dsn = ""  # the DSN that was told of last

    def lines(self, name: str, record: Any) -> str:
        """The lines of an event, each with its end; there is one at least. `record`: has the event's fields as attributes."""
        begin, end = self._begin(record.ts) + "postfix/", self._end
        return "".join([f"{begin}{program}{end}{text}\n" for program, text in _FORMS.get(name, _fields)(self, record)])

    def told(self, dsn: str) -> bool:
        """Whether a DSN was told of, which is so from now on: it may be about several recipients, each with an event."""
        before, self._dsn = self._dsn, dsn
        return dsn == before

    def program(self, record: Any) -> str:
        """What would have delivered."""
        return "virtual" if record.peer == "mailbox" else self.programs.get(record.route.partition("/")[0], "smtp")


def _fields(writer: Writer, record: Any) -> _Lines:
    """An event that Postfix has not."""
    shown = ((field, getattr(record, field)) for field in record.__struct_fields__ if field not in _NOT_SHOWN)
    name = record.__struct_config__.tag
    yield "relaymta", " ".join([name, *(f"{field}={_value(value)}" for field, value in shown if value is not msgspec.UNSET)])


def _taken(record: Any) -> _Lines:
    if record.client:
        user = f", sasl_username={_word(record.user)}" if record.user else ""
        yield "smtpd", f"{record.id}: client={_client(record.client)}{user}"
    given = record.message_id
    inner = given[1:-1] if given.startswith("<") and given.endswith(">") else given
    yield "cleanup", f"{record.id}: message-id=<{_word(inner)}>"


def _active(record: Any, queue: str = "active") -> tuple[str, str]:
    size = f"size={record.size}, nrcpt={len(record.recipients)}"
    return "qmgr", f"{record.id}: from=<{_word(record.sender)}>, {size} (queue {queue})"


def _queued(writer: Writer, record: Any) -> _Lines:
    for program, text in _taken(record):
        before = _given(record, "orig_client") and f", orig_client={_client(record.orig_client)}"
        ident = _given(record, "orig_id") and f", orig_queue_id={_word(record.orig_id)}"
        yield program, text + ident + before if program == "smtpd" else text
    held = _given(record, "held")
    if held:
        yield "smtpd", f"{record.id}: hold: END-OF-MESSAGE from {_client(record.client)}: {_text(held)}; {_envelope(record)}"
    yield _active(record, "hold" if held else "active")


def _received(writer: Writer, record: Any) -> _Lines:
    """By LMTP. Where it is in the queue, too, `queued` tells of it."""
    if _given(record, "stays"):
        yield from _fields(writer, record)
        return
    yield from _taken(record)
    yield _active(record)


def _envelope(record: Any) -> str:
    recipients = "".join(f" to=<{_word(one)}>" for one in record.recipients)
    return f"from=<{_word(record.sender)}>{recipients}"


def _outcome(record: Any, recipient: str, relay: str, status: str, said: str) -> str:
    """What has become of one recipient. `delays` are parts of the delay that nobody has measured: all of it is that before the
    attempt (a), or, at the first one, that in it (b)."""
    found = _REPLY.match(record.reply)
    dsn = (found and found[2]) or _DSN[status]
    delay = f"{round(record.delay, 2):.10g}"
    delays = f"{delay}/0/0/0" if record.attempt > 1 else f"0/{delay}/0/0"
    to = f"{record.id}: to=<{_word(recipient)}>, relay={relay}"
    return f"{to}, delay={delay}, delays={delays}, dsn={dsn}, status={status} ({said})"


def _relay(peer: str) -> str:
    return _word(peer).replace(",", "\\x2c") or "none"


def _removed(record: Any) -> _Lines:
    if not _given(record, "stays"):
        yield "qmgr", f"{record.id}: removed"


def _delivered(writer: Writer, record: Any) -> _Lines:
    program = writer.program(record)
    relay = "virtual" if program == "virtual" else _relay(record.peer)
    if record.address:
        relay += f"[{_relay(record.address)}]:{record.port}"
    for recipient in record.recipients:
        yield program, _outcome(record, recipient, relay, "sent", _text(record.reply))
    yield from _removed(record)


def _deferred(writer: Writer, record: Any) -> _Lines:
    yield writer.program(record), _outcome(record, record.recipient, _relay(record.peer), "deferred", _said(record))


def _bounced(writer: Writer, record: Any) -> _Lines:
    expired = _given(record, "expired")
    status = "expired" if expired else "bounced"
    yield writer.program(record), _outcome(record, record.recipient, _relay(record.peer), status, _said(record))
    if expired and not _given(record, "stays"):
        yield "qmgr", f"{record.id}: from=<{_word(record.sender)}>, status=expired, returned to sender"
    if record.dsn and not writer.told(record.dsn):
        yield "bounce", f"{record.id}: sender non-delivery notification: {record.dsn}"
    yield from _removed(record)


def _next_host(writer: Writer, record: Any) -> _Lines:
    said, answered = _said(record), _REPLY.match(record.reply)
    if answered is None or not answered[1]:
        said = f"{'connect to' if record.phase == 'connect' else 'conversation with'} {_word(record.peer) or 'unknown'}: {said}"
    yield writer.program(record), f"{record.id}: {said}"


def _rejected(writer: Writer, record: Any) -> _Lines:
    code, enhanced, text = _REPLY.match(record.reply).groups()  # type: ignore[union-attr] # it matches everything
    about = ""
    if record.phase == "rcpt" and record.recipients:
        about = f"<{_word(record.recipients[0])}>: "
        if text.startswith("Relaying denied"):
            text = "Relay access denied" + text.removeprefix("Relaying denied")
        elif enhanced == "5.1.1":
            text = f"Recipient address rejected: User unknown: {text}"
    elif record.phase == "mail":
        about = f"<{_word(record.sender)}>: "
    what = " ".join(part for part in (code, enhanced) if part)
    phase = _PHASES.get(record.phase, "END-OF-MESSAGE")
    said = f"{what} {about}{_text(text)}; {_envelope(record)} proto={record.protocol or 'SMTP'} helo=<{_word(record.helo)}>"
    yield "smtpd", f"NOQUEUE: reject: {phase} from {_client(record.client)}: {said}"


def _login(writer: Writer, record: Any) -> _Lines:
    """Only wrong credentials are what Postfix calls a failure: fail2ban bans for it."""
    code, _, text = _REPLY.match(record.reply).groups()  # type: ignore[union-attr] # it matches everything
    if record.good or code != "535":
        yield from _fields(writer, record)
        return
    why = f"authentication failed: {_text(text)}, sasl_username={_word(record.user)}"
    yield "smtpd", f"warning: {_client(record.client)}: SASL {_word(record.mechanism) or 'LOGIN'} {why}"


def _warning(writer: Writer, record: Any) -> _Lines:
    yield "relaymta", f"warning: {_text(record.text)}"


def _filtered(writer: Writer, record: Any) -> _Lines:
    yield from _fields(writer, record)
    if record.action == "discard":
        said = f"{_text(record.reason)}; {_envelope(record)}"
        yield "smtpd", f"{record.id}: discard: END-OF-MESSAGE from {_client(record.client)}: {said}"


def _scanned(writer: Writer, record: Any) -> _Lines:
    yield from _fields(writer, record)
    if record.result == "discarded":
        yield "qmgr", f"{record.id}: removed"


def _quarantine(writer: Writer, record: Any) -> _Lines:
    yield from _fields(writer, record)
    done = {"released": "released from hold", "deleted": "removed", "expired": "removed", "displaced": "removed"}
    if record.result in done:
        yield "postsuper", f"{record.id}: {done[record.result]}"


def _held(writer: Writer, record: Any) -> _Lines:
    yield from _fields(writer, record)
    yield "postsuper", f"{record.id}: placed on hold"


def _released(writer: Writer, record: Any) -> _Lines:
    yield from _fields(writer, record)
    yield "postsuper", f"{record.id}: released from hold"


def _deleted(writer: Writer, record: Any) -> _Lines:
    yield from _fields(writer, record)
    yield "postsuper", f"{record.id}: removed"


_FORMS: dict[str, Callable[[Writer, Any], _Lines]] = {
    "queued": _queued, "received": _received, "delivered": _delivered, "deferred": _deferred, "bounced": _bounced,
    "next_host": _next_host, "rejected": _rejected, "login": _login, "warning": _warning, "filtered": _filtered,
    "scanned": _scanned, "quarantine": _quarantine, "held": _held, "released": _released, "deleted": _deleted,
}  # fmt: skip


# Reading


class Said(NamedTuple):
    """What a line says: the event that it belongs to ("removed": the message has left the queue), the message's id ("": none),
    its sender ("<>": the null sender; "": not named) and recipients."""

    event: str
    ident: str
    sender: str
    recipients: list[str]


_LINE = re.compile(r"(?:[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ )?postfix/(\w+)\[\d+\]: (.*)", re.S)
_IDENT = re.compile(r"([0-9A-HJKMNP-TV-Z]{13}): |.*? id=([0-9A-HJKMNP-TV-Z]{13})\b")
# A field in a text has no such end: it is escaped, or (as in `?to=`) behind a character that is not in front of a field.
_SENDER = re.compile(r"(?<![\w?&%/.-])from=<([^<>]*)>| sender=\"?([^ \"]*)")
_RECIPIENT = re.compile(r"(?<![\w?&%/.-])to=<([^<>]*)>")
_RECIPIENTS = re.compile(r" recipients?=\"?([^ \"]+)")  # of an event in the form of fields
_STATUS = {"sent": "delivered", "deferred": "deferred", "bounced": "bounced", "expired": "bounced"}
_EVENT_OF = [
    (re.compile(expression), event) for expression, event in (
        (r"\w+: (?:client=|message-id=|hold: |from=<[^>]*>, size=)", "queued"), (r"\w+: reject: ", "rejected"),
        (r"\w+: discard: ", "filtered"), (r"warning: .*: SASL ", "login"), (r"\w+: sender non-delivery ", "bounced"),
        (r"\w+: (?:host|connect to|conversation with) ", "next_host"),
        (r"\w+: (?:removed|released from hold|placed on hold)\Z", "removed"),
    )
]  # fmt: skip
_STATUS_OF = re.compile(r".* status=(sent|deferred|bounced|expired)\b")


def heard(line: str) -> Said | None:
    """What a line of this form says, without its end; None: it is none."""
    found = _LINE.match(line)
    if found is None:
        return None
    program, text = found.groups()
    ident, sender, several = _IDENT.match(text), _SENDER.search(text), _RECIPIENTS.search(text)
    from_ = "" if sender is None else sender[1] or sender[2] or "<>"
    to = _RECIPIENT.findall(text) + (several[1].split(",") if several else [])
    return Said(_event_of(program, text), (ident[1] or ident[2]) if ident else "", _unescaped(from_), list(map(_unescaped, to)))


def _unescaped(word: str) -> str:
    return re.sub(r"\\x(20|3c|3e)", lambda found: chr(int(found[1], 16)), word)


def _event_of(program: str, text: str) -> str:
    if program == "relaymta":
        return text.partition(" ")[0].rstrip(":")
    if status := _STATUS_OF.match(text):
        return _STATUS[status[1]]
    return next((name for expression, name in _EVENT_OF if expression.match(text)), "")
