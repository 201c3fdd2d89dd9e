"""What an IMAP server may say: RFC 9051 9, with RFC 3501 9 (RECENT, SEARCH, LSUB) and the extensions that are offered (RFC 2971,
4315, 4731, 5258, 5530, 6154, 7162, 7889, 8474, 8514, 9208). Strict, and written from these alone: every response of every test
has to pass.

Beyond the RFCs it refuses what clients are known to fail on: a literal of no octets, and a response code without a text."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.support.imap_terminals import ATOM, FLAG, NZ, TAG, NotIMAP, Terminals

__all__ = ["NotIMAP", "Response", "responses"]

MONTH = rb"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
DATE_TIME = rb'"(?: [0-9]|[0-9]{2})-' + MONTH + rb'-[0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} [+-][0-9]{4}"'
OBJECT_ID = rb"[A-Za-z0-9_-]{1,255}"
ATTRIBUTES = (
    "Noinferiors", "Noselect", "Marked", "Unmarked", "HasChildren", "HasNoChildren", "NonExistent", "Subscribed", "Remote", "All",
    "Archive", "Drafts", "Flagged", "Junk", "Sent", "Trash", "Important",
)  # fmt: skip
PLAIN_CODES = frozenset(
    b"ALERT ALREADYEXISTS AUTHENTICATIONFAILED AUTHORIZATIONFAILED CANNOT CLIENTBUG CLOSED CONTACTADMIN CORRUPTION EXPIRED "
    b"EXPUNGEISSUED HASCHILDREN INUSE LIMIT NONEXISTENT NOPERM NOTSAVED OVERQUOTA PARSE PRIVACYREQUIRED READ-ONLY READ-WRITE "
    b"SERVERBUG TRYCREATE UIDNOTSTICKY UNAVAILABLE UNKNOWN-CTE NOMODSEQ USEATTR TOOBIG".split()
)
STATUS_NUMBERS = frozenset(
    ("MESSAGES", "RECENT", "UIDNEXT", "UIDVALIDITY", "UNSEEN", "DELETED", "DELETED-STORAGE", "SIZE", "HIGHESTMODSEQ")
)


class Response(NamedTuple):
    """`tag`: "*", "+" or a tag; `name`: in upper case; `number`: of a message, or how many; `code`: a response code, its name and
    its argument; `data`: the rest, by kind; `text`: of people."""

    tag: str
    name: str
    number: int | None = None
    code: tuple[str, Any] | None = None
    data: Any = None
    text: str = ""


def responses(octets: bytes, utf8: bool = False, rev2: bool = False) -> list[Response]:
    """All responses of what a server has said. `utf8`: strings may be UTF-8; `rev2`: IMAP4rev2 is enabled. Raises NotIMAP."""
    reader = _Reader(octets, utf8 or rev2, rev2)
    found = []
    while reader.at < len(octets):
        found.append(reader.response())
    return found


class _Reader(Terminals):
    # Responses

    def response(self) -> Response:
        if self.maybe(rb"\+ "):
            text = self.take(rb"[^\x00\r\n]*")
            self.literally(b"\r\n")
            return Response("+", "", text=text.decode())
        if self.maybe(rb"\* "):
            found = self.untagged()
        else:
            tag = self.take(TAG, "a tag").decode()
            self.literally(b" ")
            found = self.status(tag, self.take(rb"(?:OK|NO|BAD) ", "OK, NO or BAD")[:-1].decode().upper())
        self.literally(b"\r\n")
        return found

    def status(self, tag: str, name: str) -> Response:
        code = None
        if self.maybe(rb"\["):
            code = self.code()
            self.literally(b"] ")
        text = self.take(rb"[^\x00\r\n\[][^\x00\r\n]*", "a text")
        return Response(tag, name, code=code, text=text.decode("utf-8" if self.utf8 else "ascii"))

    def code(self) -> tuple[str, Any]:
        name = self.take(rb"[A-Z][A-Z-]*", "a response code").decode()
        if name.encode() in PLAIN_CODES:
            return name, None
        if name not in _CODES:
            raise self.fail(f"a known response code, not {name}")
        self.literally(b" ")
        return name, _CODES[name](self)

    def capabilities(self) -> list[str]:
        names = [self.take(ATOM, "a capability").decode()]
        while self.maybe(rb" "):
            names.append(self.take(ATOM, "a capability").decode())
        if "IMAP4rev1" not in names or len(set(names)) < len(names):
            raise self.fail("IMAP4rev1 among capabilities, and each once")
        return names

    def untagged(self) -> Response:
        number = self.maybe(rb"(?:0|[1-9][0-9]*) ")
        name = self.take(rb"[A-Z]+", "the name of a response").decode().upper()
        if number is not None:
            return self.numbered(int(number), name)
        if name in ("OK", "NO", "BAD", "BYE", "PREAUTH"):
            self.literally(b" ")
            return self.status("*", name)
        if name not in _UNTAGGED or (self.rev2 and name in ("SEARCH", "LSUB")):
            raise self.fail(f"a response, not {name}")
        return Response("*", name, data=_UNTAGGED[name](self))

    def numbered(self, number: int, name: str) -> Response:
        if name == "EXISTS" or (name == "RECENT" and not self.rev2):
            return Response("*", name, number)
        if name not in ("EXPUNGE", "FETCH") or not number:
            raise self.fail("EXISTS, EXPUNGE or FETCH of a message")
        if name == "EXPUNGE":
            return Response("*", name, number)
        self.literally(b" ")
        items = self.many(self.item, least=1)
        if len(dict(items)) < len(items):
            raise self.fail("each item once")
        return Response("*", name, number, data=dict(items))

    def listed(self) -> dict[str, Any]:
        self.literally(b" ")
        form = rb"\\(?:" + "|".join(ATTRIBUTES).encode() + rb")(?![A-Za-z])"
        attributes = [one.decode() for one in self.many(lambda: self.take(form, "an attribute of LIST"))]
        self.take(rb' (?:"/"|NIL) ', "a delimiter")
        name = self.mailbox()
        extended = dict(self.many(self.list_item, least=1)) if self.maybe(rb" (?=\()") else {}
        return {"attributes": attributes, "name": name, **extended}

    def list_item(self) -> tuple[str, Any]:
        name = self.take(rb'"(?:CHILDINFO|OLDNAME)" ', "CHILDINFO or OLDNAME")[1:-2].decode()
        if name == "OLDNAME":
            self.literally(b"(")
            old = self.mailbox()
            self.literally(b")")
            return name, old
        return name, self.many(self.quoted, least=1)

    def status_data(self) -> tuple[str, dict[str, Any]]:
        self.literally(b" ")
        name = self.mailbox()
        self.literally(b" ")
        return name, dict(self.many(self.status_item))

    def status_item(self) -> tuple[str, Any]:
        name = self.take(rb"[A-Z-]+ ", "a STATUS item")[:-1].decode().upper()
        if name == "MAILBOXID":
            return name, self.object_id()
        if name == "APPENDLIMIT":
            return name, None if self.maybe(rb"NIL") else self.number()
        if name not in STATUS_NUMBERS:
            raise self.fail("a STATUS item")
        return name, self.number(least=name.startswith("UID"), most=2**63 - 1)

    def object_id(self) -> str:
        return self.take(rb"\(" + OBJECT_ID + rb"\)", "an object id")[1:-1].decode()

    def search(self) -> tuple[list[int], int | None]:
        found = []
        while self.maybe(rb" (?=[0-9])"):
            found.append(self.number(least=1))
        modseq = self.maybe(rb" \(MODSEQ [1-9][0-9]*\)")
        return found, None if modseq is None else int(modseq[9:-1])

    def esearch(self) -> dict[str, Any]:
        found: dict[str, Any] = {"UID": False}
        if self.maybe(rb" \(TAG "):
            found["TAG"] = self.astring().decode()
            self.literally(b")")
        if self.maybe(rb" UID"):
            found["UID"] = True
        while self.maybe(rb" "):
            name = self.take(rb"(?:MIN|MAX|COUNT|ALL|MODSEQ) ", "a result of SEARCH")[:-1].decode()
            found[name] = self.numbers() if name == "ALL" else self.number(least=name != "COUNT", most=2**63 - 1)
        return found

    def quota(self) -> tuple[str, dict[str, tuple[int, int]]]:
        self.literally(b" ")
        root = self.astring().decode()
        self.literally(b" ")

        def resource() -> tuple[str, tuple[int, int]]:
            name = self.take(rb"(?:STORAGE|MESSAGE|MAILBOX|ANNOTATION-STORAGE) ", "a resource")[:-1].decode()
            used = self.number(most=2**63 - 1)
            self.literally(b" ")
            return name, (used, self.number(most=2**63 - 1))

        return root, dict(self.many(resource))

    def quotaroot(self) -> tuple[str, list[str]]:
        self.literally(b" ")
        name, roots = self.mailbox(), []
        while self.maybe(rb" "):
            roots.append(self.astring().decode())
        return name, roots

    def identity(self) -> dict[str, bytes | None]:
        self.literally(b" ")
        if self.maybe(rb"NIL"):
            return {}

        def field() -> tuple[str, bytes | None]:
            name = self.string().decode()
            self.literally(b" ")
            return name, self.nstring()

        return dict(self.many(field))

    def sorted_(self) -> tuple[list[int], int | None]:
        """RFC 5256 4, RFC 7162 7."""
        return self.search()

    def threads(self) -> list[Any]:
        """RFC 5256 4: threads as lists of numbers and lists."""
        found: list[Any] = []
        open_ = [found]
        if self.maybe(rb" "):
            while len(open_) > 1 or self.octets[self.at : self.at + 1] == b"(":
                self._thread_token(open_)
        return found

    def _thread_token(self, open_: list[list[Any]]) -> None:
        here = open_[-1]
        nested = bool(here) and isinstance(here[-1], list)
        if self.maybe(rb"\("):
            here.append([])
            open_.append(here[-1])
        elif len(open_) > 1 and here and self.maybe(rb"\)"):
            if nested and len([one for one in here if isinstance(one, list)]) < 2:
                raise self.fail("two threads that are nested")
            open_.pop()
        elif len(open_) > 1 and not nested:
            here.append(int(self.take(NZ, "a number")))
            behind = self.octets[self.at : self.at + 1]
            if behind != b")":
                self.literally(b" ")
        else:
            raise self.fail("a thread")

    def vanished(self) -> tuple[bool, list[tuple[int, int]]]:
        earlier = self.maybe(rb" \(EARLIER\)") is not None
        self.literally(b" ")
        return earlier, self.numbers()

    # FETCH

    def item(self) -> tuple[str, Any]:
        name = self.take(rb"[A-Z][A-Z0-9.]*", "a FETCH item").decode().upper()
        if name in ("BODY", "BINARY", "BINARY.SIZE") and self.octets[self.at : self.at + 1] == b"[":
            return self.section(name)
        if name not in _ITEMS:
            raise self.fail(f"a FETCH item, not {name}")
        self.literally(b" ")
        return name, _ITEMS[name](self)

    def section(self, name: str) -> tuple[str, Any]:
        start = self.at
        self.literally(b"[")
        part = self.maybe(NZ + rb"(?:\." + NZ + rb")*")
        if name == "BODY" and (part is None or self.maybe(rb"\.")):
            text = (self.take if part else self.maybe)(rb"HEADER\.FIELDS\.NOT|HEADER\.FIELDS|HEADER|TEXT|MIME") or b""
            if text.startswith(b"HEADER.FIELDS"):
                self.literally(b" ")
                self.many(self.astring, least=1)
            elif text == b"MIME" and part is None:
                raise self.fail("a part before MIME")
        self.literally(b"]")
        if name != "BINARY.SIZE":
            self.maybe(rb"<[0-9]+>")
        label = name + self.octets[start : self.at].decode()
        self.literally(b" ")
        return label, self.number() if name == "BINARY.SIZE" else self.nstring(binary=name == "BINARY")

    def flags_of_message(self) -> list[str]:
        return [one.decode() for one in self.many(lambda: self.take(FLAG + (rb"" if self.rev2 else rb"|\\Recent"), "a flag"))]

    def modseq(self) -> int:
        return int(self.take(rb"\(" + NZ + rb"\)", "a mod-sequence")[1:-1])

    def envelope(self) -> list[Any]:
        self.literally(b"(")
        found: list[Any] = [self.nstring()]
        parts: list[Callable[[], Any]] = [self.nstring, *[self.addresses] * 6, self.nstring, self.nstring]
        for one in parts:
            self.literally(b" ")
            found.append(one())
        self.literally(b")")
        return found

    def addresses(self) -> list[tuple[bytes | None, ...]] | None:
        if self.maybe(rb"NIL"):
            return None
        self.literally(b"(")
        found = [self.address()]
        while not self.maybe(rb"\)"):
            found.append(self.address())
        return found

    def address(self) -> tuple[bytes | None, ...]:
        found = tuple(self.many(self.nstring, least=1))
        if len(found) != 4:
            raise self.fail("an address of four parts")
        return found

    def body(self, extended: bool = True) -> Any:
        self.literally(b"(")
        if self.octets[self.at : self.at + 1] == b"(":
            parts = [self.body(extended)]
            while self.octets[self.at : self.at + 1] == b"(":
                parts.append(self.body(extended))
            self.literally(b" ")
            found: Any = (parts, self.string())
            rest = self.extension(self.parameters) if extended else []
        else:
            found, last = self.single(extended)
            rest = self.extension(self.nstring) if extended and last else []
        self.literally(b")")
        return (*found, *rest)

    def single(self, extended: bool) -> tuple[list[Any], bool]:
        kind = self.string().upper()
        self.literally(b" ")
        found: list[Any] = [kind, self.string().upper()]
        for one in (self.parameters, self.nstring, self.nstring, self.string, self.number):
            self.literally(b" ")
            found.append(one())
        if kind == b"MESSAGE" and found[1] in (b"RFC822", b"GLOBAL"):
            for two in (self.envelope, lambda: self.body(extended), self.number):
                self.literally(b" ")
                found.append(two())
        elif kind == b"TEXT":
            self.literally(b" ")
            found.append(self.number())
        return found, True

    def parameters(self) -> list[bytes] | None:
        if self.maybe(rb"NIL"):
            return None
        found = self.many(self.string, least=1)
        if len(found) % 2:
            raise self.fail("a value for each parameter")
        return found

    def extension(self, first: Callable[[], Any]) -> list[Any]:
        """What BODYSTRUCTURE alone has, as far as it goes: MD5 or parameters, disposition, language, location."""
        found = []
        for one in (first, self.disposition, self.language, self.nstring):
            if not self.maybe(rb" "):
                break
            found.append(one())
        return found

    def disposition(self) -> Any:
        if self.maybe(rb"NIL"):
            return None
        self.literally(b"(")
        name = self.string()
        self.literally(b" ")
        found = (name, self.parameters())
        self.literally(b")")
        return found

    def language(self) -> Any:
        return self.many(self.string, least=1) if self.octets[self.at : self.at + 1] == b"(" else self.nstring()

    # Arguments of response codes, and of responses

    def charsets(self) -> list[bytes]:
        return self.many(self.astring, least=1)

    def permanent(self) -> list[str]:
        return [one.decode() for one in self.many(lambda: self.take(rb"\\\*|" + FLAG, "a flag"))]

    def appenduid(self) -> tuple[int, list[tuple[int, int]]]:
        uidvalidity = self.number(least=1)
        self.literally(b" ")
        return uidvalidity, self.numbers()

    def copyuid(self) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
        uidvalidity, sources = self.appenduid()
        self.literally(b" ")
        copies = self.numbers()
        if sum(high - low for low, high in sources) + len(sources) != sum(high - low for low, high in copies) + len(copies):
            raise self.fail("as many copies as sources")
        return uidvalidity, sources, copies

    def enabled(self) -> list[str]:
        names = []
        while self.maybe(rb" "):
            names.append(self.take(ATOM, "a capability").decode())
        return names

    def flags(self) -> list[str]:
        self.literally(b" ")
        return self.many(self.flag)

    def namespace(self) -> None:
        self.literally(b' (("" "/")) NIL NIL')


def _number(reader: _Reader) -> int:
    return reader.number(least=1, most=2**63 - 1)


def _body(reader: _Reader) -> Any:
    return reader.body(extended=False)


def _date_time(reader: _Reader) -> str:
    return reader.take(DATE_TIME, "a date and time")[1:-1].decode()


def _capability(reader: _Reader) -> list[str]:
    reader.literally(b" ")
    return reader.capabilities()


_CODES: dict[str, Callable[[_Reader], Any]] = {
    "CAPABILITY": _Reader.capabilities,
    "BADCHARSET": _Reader.charsets,
    "PERMANENTFLAGS": _Reader.permanent,
    "APPENDUID": _Reader.appenduid,
    "COPYUID": _Reader.copyuid,
    "UIDNEXT": _number,
    "UIDVALIDITY": _number,
    "UNSEEN": _number,
    "HIGHESTMODSEQ": _number,
    "MAILBOXID": _Reader.object_id,
    "MODIFIED": _Reader.numbers,
}
_UNTAGGED: dict[str, Callable[[_Reader], Any]] = {
    "CAPABILITY": _capability,
    "ENABLED": _Reader.enabled,
    "LIST": _Reader.listed,
    "LSUB": _Reader.listed,
    "STATUS": _Reader.status_data,
    "NAMESPACE": _Reader.namespace,
    "FLAGS": _Reader.flags,
    "SEARCH": _Reader.search,
    "ESEARCH": _Reader.esearch,
    "SORT": _Reader.sorted_,
    "THREAD": _Reader.threads,
    "QUOTA": _Reader.quota,
    "QUOTAROOT": _Reader.quotaroot,
    "ID": _Reader.identity,
    "VANISHED": _Reader.vanished,
}
_ITEMS: dict[str, Callable[[_Reader], Any]] = {
    "FLAGS": _Reader.flags_of_message,
    "UID": _number,
    "INTERNALDATE": _date_time,
    "SAVEDATE": lambda reader: None if reader.maybe(rb"NIL") else _date_time(reader),
    "RFC822.SIZE": lambda reader: reader.number(most=2**63 - 1),
    "RFC822": _Reader.nstring,
    "PREVIEW": _Reader.nstring,
    "RFC822.HEADER": _Reader.nstring,
    "RFC822.TEXT": _Reader.nstring,
    "ENVELOPE": _Reader.envelope,
    "BODY": _body,
    "BODYSTRUCTURE": _Reader.body,
    "MODSEQ": _Reader.modseq,
    "EMAILID": _Reader.object_id,
    "THREADID": lambda reader: None if reader.maybe(rb"NIL") else reader.object_id(),
}
