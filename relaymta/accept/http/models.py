"""The JSON of a message that is submitted by HTTP, and what it says, checked.

The structs of `Request` are what a client sends (`parse` reads them); `Message` is what is meant by it. Nothing in a Message can
add a field, a part or a recipient to what is composed of it: names, addresses and values have no control characters, and
addresses are those that the project's own parsers read.
"""

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec

from relaymta.proto import mailbox
from relaymta.proto.address import DomainError, normalize_domain, plain
from relaymta.proto.printable import printable

__all__ = [
    "Attachment", "BatchEntry", "Entry", "File", "Header", "Limits", "Mailbox", "Message", "Person", "Request", "Wrong",
    "check_header", "check_text", "is_tag", "is_template", "parse", "with_rendered",
]  # fmt: skip

LONGEST_NAME = 256  # characters of a display name
LONGEST_PERSON = 1600  # characters of a string with a display name and an address
LONGEST_SUBJECT = 2000
LONGEST_VALUE = 8000  # characters of a field's value
LONGEST_WORD = 900  # octets of a word in a field that cannot be encoded: it has to fit into a line (RFC 5322 2.1.1)
LONGEST_FILENAME = 255
SHOWN = 200  # characters of a detail, and of a field, of which a client may have written any number

# What ends a line, for any program, or is not to be seen at all. Characters that join or set directions are in real names.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([\w.\[\]]*)`\Z")
_UNKNOWN = "Object contains unknown field `"
_MISSING = re.compile(r"Object missing required field `(\w+)`\Z")
_QUOTED = re.compile(r'"((?>(?:[^"\\]++|\\.)*))"\Z')
_PAIR = re.compile(r"\\(.)")
_FIELD_NAME = re.compile(r"[!-9;-~]{1,76}\Z")  # ftext (RFC 5322 3.6.8)
_TAG = re.compile(r"[!-+\--~]{1,64}\Z")
_ID = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
_CONTENT_ID = re.compile(rf"<?({_ID}(?:@{_ID})?)>?\Z")
_MESSAGE_ID = re.compile(rf"<{_ID}@(?:{_ID}|\[[!-Z^-~]*\])>\Z")
_DATE = re.compile(
    r"(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), )?\d{1,2} (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4} \d\d:\d\d(?::\d\d)?"
    r" [+-]\d{4}\Z", re.A,
)  # fmt: skip
_TOKEN = r"[A-Za-z0-9!#$&^_.+-]{1,100}"
_PARAMETER = rf'; *({_TOKEN})=({_TOKEN}|"[ !#-\[\]-~]{{0,200}}")'
_CONTENT_TYPE = re.compile(rf"({_TOKEN})/{_TOKEN}((?: *{_PARAMETER})*)\Z")
_PARAMETERS = re.compile(_PARAMETER)

# Names that other fields of the request say, or the relay alone: in front of a message they would be taken for what they are not.
_ELSEWHERE = {"from": "from", "to": "to", "cc": "cc", "bcc": "bcc", "subject": "subject"}
_RESERVED = re.compile(
    r"(?:mime-version|received|return-path|delivered-to|apparently-to|x-original-to|x-mailbox-line|authentication-results|received-spf"
    r"|dkim-signature|domainkey-signature|content-.*|arc-.*|resent-.*|x-relay.*)\Z"
)
_ONCE = frozenset(("date", "message-id", "reply-to", "sender", "in-reply-to", "references"))
# Fields in which an encoded word (RFC 2047 5) has no place: they are sent as they are.
_STRUCTURED = re.compile(
    r"(?:date|message-id|in-reply-to|references|list-.*|auto-submitted|precedence|importance|priority|feedback-id|errors-to"
    r"|disposition-notification-to|return-receipt-to)\Z"
)


class Wrong(Exception):
    """A request cannot be done as it is. `field`: where it is wrong (`attachments[2].content`; "": as a whole); `detail`: why,
    one line."""

    def __init__(self, field: str, detail: str) -> None:
        self.field, self.detail = printable(field[:SHOWN])[:SHOWN], printable(detail[:SHOWN])[:SHOWN]
        super().__init__(f"{self.field}: {self.detail}" if field else self.detail)


class _Fields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class Person(_Fields):
    """A mailbox, as an object."""

    email: str
    name: str = ""


_One: TypeAlias = str | Person
_Many: TypeAlias = str | Person | list[str | Person]
_Object = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]
_Base64 = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "string", "contentEncoding": "base64"})]


class File(_Fields):
    """An attachment. One of `content` (base64, RFC 4648 4) and `part` (the name of the part of a multipart/form-data request
    that has its octets). `disposition`: "inline" where `content_id` is given, else "attachment"; with `content_id` the html
    shows it as `cid:CONTENT_ID`."""

    filename: str
    content_type: str = "application/octet-stream"
    content: _Base64 = msgspec.field(default_factory=msgspec.Raw)
    part: str | None = None
    disposition: Literal["attachment", "inline"] | None = None
    content_id: str | None = None


class BatchEntry(_Fields):
    """One message of a batch. `substitutions`: go before those of the request; `subject`: in place of the request's."""

    to: _Many
    cc: _Many = []
    bcc: _Many = []
    subject: str | None = None
    substitutions: _Object = msgspec.field(default_factory=msgspec.Raw)


class Request(_Fields, rename={"from_": "from"}):
    """A message, or a batch of messages that have all but recipients and substitutions in common. A mailbox is a string (`a@b`,
    `Name <a@b>`) or an object. `envelope_from`: the sender, "" for the null sender; without it, the address of `from`. Where
    `substitutions` or `batch` is given, `subject`, `text`, `html` and the values of `headers` are Jinja2 templates. `reply_to`:
    100 mailboxes at most."""

    from_: _One
    envelope_from: str | None = None
    to: _Many = []
    cc: _Many = []
    bcc: _Many = []
    reply_to: _Many = []
    subject: str | None = None
    text: str | None = None
    html: str | None = None
    headers: dict[str, str | list[str]] = {}
    attachments: list[File] = []
    send_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    tags: list[str] = []
    priority: Literal["express", "normal", "bulk"] | None = None
    batch: list[BatchEntry] | None = None
    substitutions: _Object = msgspec.field(default_factory=msgspec.Raw)


class Limits(NamedTuple):
    """What a request may have. `recipients`: of one message; `together`: of all in a batch; `reply_to`: mailboxes; `text`:
    characters of `text` and of `html`; `substitutions`: octets of JSON."""

    recipients: int = 1000
    reply_to: int = 100
    batch: int = 10_000
    together: int = 100_000
    headers: int = 100
    attachments: int = 100
    tags: int = 20
    text: int = 10_000_000
    substitutions: int = 1 << 20


class Mailbox(NamedTuple):
    """An address in its one form (`plain`), with a domain in A-labels where its local part is ASCII; `name`: "" for none."""

    address: str
    name: str = ""


class Header(NamedTuple):
    """A field that the client sets. `structured`: it is sent as it is, without encoded words; `field`: where the request has
    it."""

    name: str
    value: str
    structured: bool
    field: str


class Attachment(msgspec.Struct, kw_only=True, eq=False):
    """An attachment. `content`: the octets of a JSON string in base64, a view of the request, empty where `part` is given;
    `content_type`: with parameters, each behind "; ". `characters`: of the base64, once that is known to be valid."""

    field: str
    filename: str
    content_type: str
    inline: bool
    content_id: str
    content: memoryview
    part: str | None
    characters: int | None = None


class Entry(NamedTuple):
    """One message of a batch. `substitutions`: JSON of an object, or b""; `subject`: None: that of the request."""

    to: tuple[Mailbox, ...]
    cc: tuple[Mailbox, ...]
    bcc: tuple[Mailbox, ...]
    subject: str | None
    substitutions: bytes


class Message(msgspec.Struct, kw_only=True, frozen=True, eq=False):
    """What a request says. `sender`: of the envelope, "" the null sender; `on_behalf`: in Sender:. `priority`: "" that of the
    account. `substitutions`: JSON of an object, b"": there are none, None: its strings are no templates. With a `batch` it has no
    recipients of its own."""

    sender: str
    author: Mailbox
    on_behalf: Mailbox | None
    to: tuple[Mailbox, ...]
    cc: tuple[Mailbox, ...]
    bcc: tuple[Mailbox, ...]
    reply_to: tuple[Mailbox, ...]
    subject: str | None
    text: str | None
    html: str | None
    headers: tuple[Header, ...]
    attachments: tuple[Attachment, ...]
    send_at: datetime | None
    tags: tuple[str, ...]
    priority: str
    batch: tuple[Entry, ...] | None
    substitutions: bytes | None


class _Headers(msgspec.Struct):
    headers: dict[str, msgspec.Raw] = {}


_decode = msgspec.json.Decoder(Request).decode
_value = msgspec.json.Decoder(str | list[str]).decode


def parse(buffer: bytes | memoryview, limits: Limits = Limits()) -> Message:  # noqa: B008 (immutable)
    """The message in the JSON of a request. Raises Wrong. The base64 of attachments stays in `buffer` (any object with the buffer
    protocol: bytes, an mmap), of which the Message is a view, and is not looked at before it is composed. About a nanosecond an
    octet, and 5 us a recipient."""
    try:
        request = _decode(buffer)
    except msgspec.ValidationError as error:
        raise _located(error, buffer) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise Wrong("", str(error)) from None
    return _Checked(request, limits).message()


def is_template(text: str) -> bool:
    """Whether something in a string is for Jinja2."""
    return "{{" in text or "{%" in text or "{#" in text


def _located(error: msgspec.ValidationError, buffer: bytes | memoryview) -> Wrong:
    """What msgspec says, with the field that it is about. (It names no key of an object: `headers[...]`.)"""
    detail, field = _place(str(error))
    if "[...]" in field:
        try:
            headers = msgspec.json.decode(buffer, type=_Headers).headers
        except (ValueError, RecursionError) as later:  # behind what is wrong, it is not even JSON
            return Wrong("", str(later))
        for name, raw in headers.items():
            try:
                _value(raw)
            except msgspec.ValidationError as own:
                return Wrong(f"headers.{name[:SHOWN]}{_place(str(own))[1]}", detail)
    missing = _MISSING.match(detail)
    if detail.startswith(_UNKNOWN):
        return Wrong(_within(field, detail[len(_UNKNOWN) :].removesuffix("`")), "there is no such field")
    if missing is not None:
        return Wrong(_within(field, missing[1]), "it is missing")
    return Wrong(field, detail)


def _place(said: str) -> tuple[str, str]:
    """What an error of msgspec says, and the field that it is about. It quotes what the client has written, of any length: that
    is cut before it is looked at."""
    match = _AT.search(said, max(0, len(said) - SHOWN))
    return (said[: min(match.start(), 2 * SHOWN)], match[1]) if match is not None else (said[: 2 * SHOWN], "")


def _within(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def check_text(text: str, field: str, most: int) -> str:
    """A text that is sent in a header: no control characters (RFC 5322 2.2), nothing that ends a line anywhere, `most`
    characters at most. Raises Wrong."""
    if len(text) > most:
        raise Wrong(field, f"it has {len(text)} characters, {most} are allowed")
    if not text.isprintable():
        found = _CONTROL.search(text)
        if found is not None:
            raise Wrong(field, f"it has a control character (U+{ord(found[0]):04X})")
    return text


class _Checked:
    """A request while it is checked."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._request, self._limits = request, limits
        if _count(request.reply_to) > limits.reply_to:  # before any is read: that takes up to 50 us
            raise Wrong("reply_to", f"there are more than {limits.reply_to}")
        self._reply_to = _each(request.reply_to, "reply_to")
        self._on_behalf: Mailbox | None = None

    def message(self) -> Message:
        """The message."""
        request = self._request
        author = _mailbox(request.from_, "from")
        headers = self._headers()
        self._texts()
        batch, (to, cc, bcc) = self._batch(), self._recipients(request, "")
        if batch is None and not (to or cc or bcc):
            raise Wrong("to", "there is no recipient")
        return Message(
            sender=author.address if request.envelope_from is None else _sender(request.envelope_from),
            author=author, on_behalf=self._on_behalf, to=to, cc=cc, bcc=bcc, reply_to=tuple(self._reply_to),
            subject=request.subject, text=request.text, html=request.html, headers=headers,
            attachments=self._attachments(), send_at=_time(request.send_at), tags=self._tags(),
            priority=request.priority or "",
            batch=batch,
            substitutions=self._substitutions(request.substitutions, "substitutions", None if batch is None else b""),
        )  # fmt: skip

    def _recipients(self, one: Request | BatchEntry, prefix: str) -> list[tuple[Mailbox, ...]]:
        if _together(one) > self._limits.recipients:
            raise Wrong(f"{prefix}to", f"there are more than {self._limits.recipients} recipients")
        return [tuple(_each(getattr(one, name), prefix + name)) for name in ("to", "cc", "bcc")]

    def _texts(self) -> None:
        request, limits = self._request, self._limits
        if request.subject is not None and not self._rendered(request.subject):
            check_text(request.subject, "subject", LONGEST_SUBJECT)
        for name, text in (("text", request.text), ("html", request.html)):
            if text is not None:
                if len(text) > limits.text:
                    raise Wrong(name, f"it has {len(text)} characters, {limits.text} are allowed")
                if "\0" in text:
                    raise Wrong(name, "it has a NUL")
        if request.text is None and request.html is None and not request.attachments:
            raise Wrong("text", "one of text, html and attachments is needed")

    def _rendered(self, text: str) -> bool:
        """Whether a string is a template: it is checked when it is rendered."""
        templates = self._request.batch is not None or bool(memoryview(self._request.substitutions))
        return templates and is_template(text)

    def _headers(self) -> tuple[Header, ...]:
        found: list[Header] = []
        once: set[str] = {"reply-to"} if self._reply_to else set()
        places: set[str] = set()
        for name, value in self._request.headers.items():
            field = f"headers.{name[:SHOWN]}"
            lower = _check_name(name, field)
            if len(value) + len(found) > self._limits.headers and not isinstance(value, str):
                raise Wrong("headers", f"there are more than {self._limits.headers}")
            values = [(value, field)] if isinstance(value, str) else [(v, f"{field}[{i}]") for i, v in enumerate(value)]
            if not places.isdisjoint(where for _, where in values):  # templates are known by it
                raise Wrong(field, "another header field is called so, too, in the request")
            places.update(where for _, where in values)
            if lower in _ONCE and (lower in once or len(values) > 1):
                raise Wrong(field, "a message has this field once")
            if lower == "message-id" and self._request.batch is not None and not is_template(values[0][0] if values else ""):
                raise Wrong(field, "all messages of the batch would have the same")
            once.add(lower)
            for text, where in values:
                header = Header(name, text, _STRUCTURED.match(lower) is not None, where)
                if self._rendered(text):
                    found.append(header)
                elif lower == "reply-to":
                    self._reply_to.append(_mailbox(text, where))
                elif lower == "sender":
                    self._on_behalf = _mailbox(text, where)
                else:
                    found.append(check_header(header))
            if len(found) > self._limits.headers:
                raise Wrong("headers", f"there are more than {self._limits.headers}")
        return tuple(found)

    def _attachments(self) -> tuple[Attachment, ...]:
        files = self._request.attachments
        if len(files) > self._limits.attachments:
            raise Wrong("attachments", f"there are more than {self._limits.attachments}")
        found = tuple(_attachment(one, f"attachments[{number}]") for number, one in enumerate(files))
        ids: set[str] = set()
        for one in found:
            if one.content_id and one.content_id in ids:
                raise Wrong(f"{one.field}.content_id", "another attachment has it, too")
            ids.add(one.content_id)
        return found

    def _tags(self) -> tuple[str, ...]:
        tags = self._request.tags
        if len(tags) > self._limits.tags:
            raise Wrong("tags", f"there are more than {self._limits.tags}")
        for number, tag in enumerate(tags):
            if not _TAG.match(tag):
                raise Wrong(f"tags[{number}]", "a tag is a word of 1 to 64 printable ASCII characters without commas")
        return tuple(dict.fromkeys(tags))

    def _batch(self) -> tuple[Entry, ...] | None:
        request = self._request
        if request.batch is None:
            return None
        for name in ("to", "cc", "bcc"):
            if getattr(request, name):
                raise Wrong(name, "the recipients of a batch are in its entries")
        if not 0 < len(request.batch) <= self._limits.batch:
            raise Wrong("batch", f"it has {len(request.batch)} entries, 1 to {self._limits.batch} are allowed")
        if sum(map(_together, request.batch)) > self._limits.together:
            raise Wrong("batch", f"it has more than {self._limits.together} recipients")
        return tuple(self._entry(one, f"batch[{number}].") for number, one in enumerate(request.batch))

    def _entry(self, entry: BatchEntry, prefix: str) -> Entry:
        to, cc, bcc = self._recipients(entry, prefix)
        if not to:
            raise Wrong(f"{prefix}to", "there is no recipient")
        if entry.subject is not None and not self._rendered(entry.subject):
            check_text(entry.subject, f"{prefix}subject", LONGEST_SUBJECT)
        return Entry(to, cc, bcc, entry.subject, self._substitutions(entry.substitutions, f"{prefix}substitutions", b"") or b"")

    def _substitutions(self, raw: msgspec.Raw, field: str, without: bytes | None) -> bytes | None:
        """JSON of an object; what is in it is read where templates are rendered."""
        octets = len(memoryview(raw))
        if not octets:
            return without
        if octets > self._limits.substitutions:
            raise Wrong(field, f"it has {octets} octets, {self._limits.substitutions} are allowed")
        found = bytes(memoryview(raw))
        if not found.startswith(b"{"):
            raise Wrong(field, "Expected `object`")
        return found


def is_tag(text: str) -> bool:
    """Whether a word can be a tag."""
    return _TAG.match(text) is not None


def _count(people: _Many) -> int:
    return len(people) if isinstance(people, list) else 1


def _together(one: Request | BatchEntry) -> int:
    return _count(one.to) + _count(one.cc) + _count(one.bcc)


def _each(people: _Many, field: str) -> list[Mailbox]:
    if not isinstance(people, list):
        return [_mailbox(people, field)]
    return [_mailbox(one, f"{field}[{number}]") for number, one in enumerate(people)]


def _mailbox(one: _One, field: str) -> Mailbox:
    """A string `a@b` or `Name <a@b>`, whose name is quoted if there are `"<>@,;` in it, or an object."""
    if isinstance(one, Person):
        return Mailbox(_address(one.email, f"{field}.email"), _name(one.name, f"{field}.name"))
    if len(one) > LONGEST_PERSON:
        raise Wrong(field, "it is too long")
    text = one.strip(" ")
    if not text.endswith(">"):
        return Mailbox(_address(text, field))
    name, _, address = text[:-1].rpartition("<")
    name = name.strip(" ")
    quoted = _QUOTED.match(name)
    if quoted is not None:
        name = _PAIR.sub(r"\1", quoted[1])
    elif any(special in name for special in '"<>@,;'):
        raise Wrong(field, 'it is not one mailbox (a name with one of "<>@,; is to be quoted, or given as an object)')
    return Mailbox(_address(address, field), _name(name, field))


def _name(name: str, field: str) -> str:
    """A display name, without white space around it, or more than one space within it, which programs remove or not."""
    check_text(name, field, LONGEST_NAME)
    return " ".join(filter(None, name.split(" "))) if "  " in name or name[:1] == " " or name[-1:] == " " else name


def _address(text: str, field: str) -> str:
    """An address in its one form. That of a domain is A-labels, unless SMTPUTF8 (RFC 6531) is needed anyway for its local
    part."""
    found = plain(text) if len(text) <= LONGEST_PERSON else None
    if found is None:
        raise Wrong(field, "it is not a mail address")
    local, _, domain = found.rpartition("@")
    if not local.isascii() or local[0] == '"' or "=?" in local:
        try:
            mailbox.addresses(found.encode())  # what other programs may read otherwise
        except ValueError as error:
            raise Wrong(field, f"it is not a mail address: {error}") from None
    if domain[0] != "[":
        try:
            normal = normalize_domain(domain)
        except (DomainError, UnicodeError):
            raise Wrong(field, "its domain is invalid") from None
        if local.isascii() and not domain.isascii():
            return f"{local}@{normal}"
    return found


def _sender(text: str) -> str:
    return "" if text in ("", "<>") else _address(text, "envelope_from")


def _time(time: datetime | None) -> datetime | None:
    try:
        return None if time is None else time.astimezone(UTC)
    except (OverflowError, ValueError):
        raise Wrong("send_at", "it is out of range") from None


def _check_name(name: str, field: str) -> str:
    """The name of a field in lower case. Raises Wrong."""
    if not _FIELD_NAME.match(name):
        raise Wrong(field[:100], "a field's name has 1 to 76 printable ASCII characters without colons")
    lower = name.lower()
    if lower in _ELSEWHERE:
        raise Wrong(field, f"it is said by `{_ELSEWHERE[lower]}`")
    if _RESERVED.match(lower):
        raise Wrong(field, "the relay alone sets this field")
    return lower


def with_rendered(message: Message, headers: list[Header]) -> Message:
    """A message with these fields, of which Reply-To and Sender are read as mailboxes. Raises Wrong."""
    answers, sender = message.reply_to, message.on_behalf
    others = []
    for header in headers:
        lower = header.name.lower()
        if lower == "reply-to":
            answers = (*answers, _mailbox(header.value, header.field))
        elif lower == "sender":
            sender = _mailbox(header.value, header.field)
        else:
            others.append(header)
    return msgspec.structs.replace(message, headers=tuple(others), reply_to=answers, on_behalf=sender)


def check_header(header: Header) -> Header:
    """A field whose value is as it is to be sent. Raises Wrong."""
    name, value, structured, field = header
    check_text(value, field, LONGEST_VALUE)
    if not structured:
        return header
    value = value.strip(" ")
    if not value.isascii():
        raise Wrong(field, "this field is ASCII")
    if any(len(word) > LONGEST_WORD for word in value.split(" ")):
        raise Wrong(field, f"it has a word of more than {LONGEST_WORD} characters")
    lower = name.lower()
    if lower == "message-id" and (len(value) > 250 or not _MESSAGE_ID.match(value)):
        raise Wrong(field, "it is not `<left@right>` (RFC 5322 3.6.4)")
    if lower == "date" and not _is_date(value):
        raise Wrong(field, "it is not a date such as `Thu, 1 Jan 2026 12:00:00 +0000` (RFC 5322 3.3)")
    return Header(name, value, structured, field)


def _is_date(value: str) -> bool:
    try:
        return _DATE.match(value) is not None and parsedate_to_datetime(value) is not None
    except (ValueError, OverflowError):
        return False


def _attachment(one: File, field: str) -> Attachment:
    content = memoryview(one.content)
    if bool(content) == (one.part is not None):
        raise Wrong(f"{field}.content", "exactly one of content and part is needed")
    if content and (content[0] != 0x22 or len(content) < 2):
        raise Wrong(f"{field}.content", "Expected `str` (base64)")
    if not one.filename:
        raise Wrong(f"{field}.filename", "it is empty")
    match = _CONTENT_ID.match(one.content_id) if one.content_id is not None and len(one.content_id) <= 250 else None
    if one.content_id is not None and match is None:
        raise Wrong(f"{field}.content_id", "it is not a word such as `logo`, or `logo@example.com`")
    if match is not None and one.disposition == "attachment":
        raise Wrong(f"{field}.disposition", "what has a content_id is inline")
    return Attachment(
        field=field,
        filename=check_text(one.filename, f"{field}.filename", LONGEST_FILENAME),
        content_type=_content_type(one.content_type, f"{field}.content_type"),
        inline=match is not None or one.disposition == "inline",
        content_id="" if match is None else match[1],
        content=content[1:-1],
        part=one.part,
    )


def _content_type(text: str, field: str) -> str:
    """A media type (RFC 2045 5.1), each of its parameters behind "; "."""
    match = _CONTENT_TYPE.match(text) if len(text) <= 1000 else None
    if match is None:
        raise Wrong(field, "it is not a media type such as `image/png` or `text/csv; charset=utf-8`")
    if match[1].lower() in ("multipart", "message"):
        raise Wrong(field, "what has parts may not be in base64 (RFC 2045 6.4): send it as application/octet-stream")
    parameters = [(name, value) for name, value in _PARAMETERS.findall(match[2])]
    if len({name.lower() for name, _ in parameters}) < len(parameters):
        raise Wrong(field, "it has a parameter twice")
    kind = text[: match.start(2)] if match[2] else text
    return "; ".join([kind, *(f"{name}={value}" for name, value in parameters)])
