"""The authors of a message: the addresses in From: and Sender: (RFC 5322 3.4, and 4.4, obsolete syntax that must be accepted:
comments and white space anywhere, routes, empty elements; UTF-8 by RFC 6532). No other code parses these fields.

Strict: a field matches the grammar, or is Malformed. Where programs are known to parse the same octets differently (an invalid
encoded word, an address on two lines), it is Malformed too: so a decision by the addresses found here covers every address that
another program could show. Linear in the length of a field, whatever it contains.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from relaymta.proto.address import DomainError, literal_address, normalize_domain
from relaymta.proto.dkim import name_of, split_fields

__all__ = ["AUTHORS", "LONGEST", "Mailbox", "Malformed", "addresses", "authors", "completed", "domains"]

LONGEST = 8192  # octets of these fields of one message; real ones have less than a tenth of that
MOST = 250  # domains in one field: each costs as much as a hundred octets
CONVERTED = 9  # how many more a domain counts as that is not ASCII
EACH = 60  # octets added to the length of each field, and for each of CONVERTED
AUTHORS: Collection[bytes] = (b"from",)

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\x80-\U0010ffff-"
_CONTROL = r"\x00-\x08\x0a-\x1f\x7f"  # the CRLF of a fold is a line feed here
# RFC 2047 2, with what is allowed in a phrase (5) and dots, which many accept: without RFC 2047 these are words and dots.
_ENCODED = r"=\?[A-Za-z0-9*_-]++\?[BbQq]\?[A-Za-z0-9!#$%&'*+/=^_`{|}~.-]*+\?="
_TOKEN = re.compile(
    rf"(?P<space>(?>(?:\n?[ \t])+))|(?P<encoded>{_ENCODED})|(?P<atom>[{_ATEXT}]++)|(?P<special>[<>@,;:.])|(?P<comment>\()"
    rf'|"(?P<quoted>(?>(?:[^"\\{_CONTROL}]++|\n[ \t]|\\[^{_CONTROL}])*))"|(?P<literal>\[[!-Z^-~]*+\])'
)
_WITHIN_COMMENT = re.compile(rf"(?>(?:[^()\\{_CONTROL}]++|\\[^{_CONTROL}])*)([()])")
_QUOTED_PAIR = re.compile(r"\\(.)", re.S)
_DOT_ATOM = re.compile(rf"[{_ATEXT}]++(?>(?:\.[{_ATEXT}]++)*)\Z")
_WITHIN_QUOTES = re.compile(r"=\?[A-Za-z0-9*_-]++\?[BbQq]\?[!->@-~]*+\?=")  # not one within quotes, but often taken for one
_LABEL = re.compile(r"[A-Za-z0-9_\x80-\U0010ffff-]++\Z")

# The common form, in one match: a display name or none, and one address, all of it ASCII, nothing to unquote.
_SIMPLE_LOCAL = rb"[A-Za-z0-9!#$%&'*+/^_`{|}~-]++(?>(?:\.[A-Za-z0-9!#$%&'*+/^_`{|}~-]++)*)"
_SIMPLE_DOMAIN = rb"[A-Za-z0-9_-]{1,63}+(?>(?:\.[A-Za-z0-9_-]{1,63}+)*)"
_SIMPLE = re.compile(
    rb"[ \t]*+(?:(?:[A-Za-z0-9 \t!#$%&'*+/^_`{|}~-]++|\"[ !#-<>@-\[\]-~]*+\"[ \t]*+)?"
    rb"<(" + _SIMPLE_LOCAL + rb")@(" + _SIMPLE_DOMAIN + rb")>|(" + _SIMPLE_LOCAL + rb")@(" + _SIMPLE_DOMAIN + rb"))[ \t]*+\Z"
)  # fmt: skip
_FOLDS = rb"(?>(?:(?:\r\n)?[ \t])*)"
_ONE = (
    _FOLDS + rb"(?:(?:[A-Za-z0-9 \t!#$%&'*+/=?^_`{|}~.-]++|\"[ !#-\[\]-~]*+\"" + _FOLDS + rb")?<" + _SIMPLE_LOCAL + rb"@"
    + _SIMPLE_DOMAIN + rb">|" + _SIMPLE_LOCAL + rb"@" + _SIMPLE_DOMAIN + rb")" + _FOLDS
)  # fmt: skip
# The only form in which a quoted string may be on two lines: as the display name of one address, with nothing else but comments
# in which no string or address begins.
_BETWEEN = rb"(?>(?:\s|\([^()\"\\<>@]*+\))*)"
_FOLDED_NAME = re.compile(
    _BETWEEN + rb"\"[^\"\\<>@]*+\"" + _BETWEEN + rb"<[^\"\\()<>@\s]++@[^\"\\()<>@\s]++>" + _BETWEEN + rb"\Z"
)
_FULL = re.compile(rb"(?>(?:" + _ONE + rb",)*)" + _ONE + rb"\Z")  # common lists in which no address lacks its domain


class _Token(NamedTuple):
    """`kind`: "atom", "encoded" (word), "quoted", "literal", a special, or "" at the end; `folded`: behind a line break; `end`:
    the index behind it, in the text in which each CRLF is one character."""

    kind: str
    text: str
    folded: bool
    end: int = 0


class Malformed(ValueError):
    """A field that is not an address list; str() is the reason."""


class Mailbox(NamedTuple):
    """An address. `local`: its local part, quoted only if necessary; `domain`: as it is written, in lower case, "" for none
    (`root`)."""

    local: str
    domain: str

    def __str__(self) -> str:
        return f"{self.local}@{self.domain}" if self.domain else self.local

    @property
    def host(self) -> str:
        """The domain as A-labels, for the DNS; "" for an address literal, or without a domain."""
        if not self.domain or self.domain.startswith("["):
            return ""
        return self.domain if self.domain.isascii() else normalize_domain(self.domain)


def authors(block: bytes, names: Collection[bytes] = AUTHORS, fields: Iterable[bytes] | None = None) -> list[Mailbox]:
    """The addresses in the fields with these `names` (lower case) of a header block, in order; several fields are read as one.
    Malformed when one of them is, when the block has NULs or line ends other than CRLF (a parser that splits there sees other
    fields), or when they are longer than LONGEST. `fields`: those of the block, if it is split already."""
    if b"\0" in block or not block.count(b"\r\n") == block.count(b"\n") == block.count(b"\r"):
        raise Malformed("a NUL or a bare CR or LF in the header")
    found: list[Mailbox] = []
    octets = 0
    for field in split_fields(block) if fields is None else fields:
        if name_of(field) in names:
            name, colon, value = field.partition(b":")
            if name.rstrip(b" \t").lower() not in names:
                raise Malformed("a field name on two lines, or with control characters around it")
            octets += EACH + len(value)
            if octets > LONGEST:
                raise Malformed("too long")
            if colon:
                listed = addresses(value)
                if not value.isascii():
                    octets += EACH * CONVERTED * sum(not one.domain.isascii() for one in listed)
                found += listed
    return found


def domains(mailboxes: Iterable[Mailbox]) -> list[str]:
    """The domains of addresses as A-labels, each once, in order; addresses without one are left out."""
    return list(dict.fromkeys(host for mailbox in mailboxes if (host := mailbox.host)))


def addresses(value: bytes) -> list[Mailbox]:
    """The addresses in a field's value, folded or not; none in an empty group (RFC 6854). Malformed when it is not an
    address list."""
    simple = _SIMPLE.match(value)
    if simple is not None:
        local, domain, bare, bare_domain = simple.groups()
        domain = domain or bare_domain
        if len(domain) <= 253:
            return [Mailbox((local or bare).decode(), domain.decode().lower())]
    if len(value) > LONGEST:
        raise Malformed("too long")
    return _List(value).read()


def completed(value: bytes, domain: str, room: int) -> bytes:
    """A field's value, folded or not, with `domain` added to the addresses in it that have none (`root`, `Ann <ann>`); every
    other octet is as it was. Unchanged if it is no address list, or would grow by more than `room` octets."""
    if _FULL.match(value):
        return value
    most = room // (len(domain.encode()) + 1)
    try:
        ends = _without_domains(_tokens(value), most)
    except Malformed:
        return value
    if not 0 < len(ends) <= most:
        return value
    text = value.replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return f"@{domain}".join(parts).replace("\n", "\r\n").encode("utf-8", "surrogateescape")


def _without_domains(tokens: list[_Token], most: int) -> list[int]:
    """Where the local parts end that have no domain behind them, up to the first beyond `most`. Unlike `_List` it does not check
    the rest: nothing is decided by what it passes by."""
    found: list[int] = []
    words: list[_Token] = []
    full = False  # the address of this element is complete, or has ended
    for token in tokens:
        kind = token.kind
        if kind in ("atom", "quoted", "encoded", "."):
            words.append(token)
            continue
        if kind in (">", ",", ";", ""):
            if words and not full and _is_local(words):
                found.append(words[-1].end)
                if len(found) > most:
                    break
            full = kind == ">"
        else:  # : ends the name of a group, or a route
            full = kind not in ("<", ":")
        words = []
    return found


def _is_local(words: list[_Token]) -> bool:
    """Whether words are a plain local part."""
    try:
        local = _local(words)
    except Malformed:
        return False
    return _DOT_ATOM.match(local) is not None and "%" not in local and "!" not in local


class _List:
    """The parser of one field's value: one pass over its tokens."""

    def __init__(self, value: bytes) -> None:
        self._tokens = _tokens(value)
        if any(token.kind == "quoted" and "\n" in token.text for token in self._tokens) and not _FOLDED_NAME.match(value):
            # email.utils takes the end of a line for that of the string, and may show what is behind it as an address.
            raise Malformed("a quoted string on two lines")
        self._at = 0
        self._domains = 0

    def read(self) -> list[Mailbox]:
        """address-list and obs-addr-list; within a group, mailbox-list and obs-mbox-list."""
        found: list[Mailbox] = []
        group, groups = False, 0
        while True:
            words = self._words()
            kind = self._kind()
            if kind == "<":
                _check_phrase(words)
                found.append(self._angle())
            elif kind == "@":
                found.append(self._with_domain(words))
            elif kind == ":" and words and not group:
                _check_phrase(words)
                self._at += 1
                group, groups = True, groups + 1
                continue
            elif words:
                found.append(_without_domain(words))
            if group and self._kind() == ";":
                self._at += 1
                group = False
            kind = self._kind()
            if not kind:
                break
            if kind != ",":
                raise Malformed(f"unexpected {self._tokens[self._at].text!r}")
            self._at += 1
        if group:
            raise Malformed("an unterminated group")
        if not found and not groups:
            raise Malformed("no address")
        return found

    def _kind(self) -> str:
        return self._tokens[self._at].kind

    def _words(self) -> list[_Token]:
        """The words and dots up to the next other token."""
        start = self._at
        while self._kind() in ("atom", "quoted", "encoded", "."):
            self._at += 1
        return self._tokens[start : self._at]

    def _angle(self) -> Mailbox:
        """angle-addr and obs-angle-addr, whose route is ignored (RFC 5322 4.4)."""
        self._at += 1
        if self._kind() == "@":
            self._route()
        words = self._words()
        found = self._with_domain(words) if self._kind() == "@" else _without_domain(words)
        if self._kind() != ">":
            raise Malformed("not exactly one address in <>")
        self._at += 1
        return found

    def _route(self) -> None:
        """obs-route: `@one.example:`. With several domains it is Malformed: email.utils shows the second as an address."""
        self._at += 1
        self._domain()
        if self._kind() != ":":
            raise Malformed("a route of more than one domain, or unterminated")
        self._at += 1

    def _with_domain(self, words: list[_Token]) -> Mailbox:
        local = _local(words)
        if self._tokens[self._at].folded:
            raise Malformed("an address on two lines")
        self._at += 1
        return Mailbox(local, self._domain())

    def _domain(self) -> str:
        """domain, obs-domain or domain-literal, in lower case."""
        kind, text, *_ = self._tokens[self._at]
        if kind == "literal":
            self._at += 1
            if literal_address(text) is None:
                raise Malformed("no IP address in []")
            return text.lower()
        self._count(1)
        labels: list[str] = []
        while True:
            kind, text, folded, _ = self._tokens[self._at]
            if folded and labels:
                raise Malformed("a domain on two lines")
            if kind != "atom" or not _LABEL.match(text):
                raise Malformed("no domain behind @")
            labels.append(text)
            self._at += 1
            if self._kind() != ".":
                break
            if self._tokens[self._at].folded:
                raise Malformed("a domain on two lines")
            self._at += 1
        domain = ".".join(labels).lower()
        if not domain.isascii():
            self._count(CONVERTED)
        try:
            normalize_domain(domain)
        except (DomainError, UnicodeError):
            raise Malformed("an invalid domain") from None
        return domain

    def _count(self, domains: int) -> None:
        self._domains += domains
        if self._domains > MOST:
            raise Malformed("too many addresses")


def _tokens(value: bytes) -> list[_Token]:
    """The tokens of a value without white space and comments, and one for its end. Raises Malformed."""
    folds = value.count(b"\r\n")
    if folds != value.count(b"\n"):
        raise Malformed("a bare LF")
    text = (value.replace(b"\r\n", b"\n") if folds else value).decode("utf-8", "surrogateescape")
    found: list[_Token] = []
    at, end, last = 0, len(text), 0
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise Malformed(f"unexpected {text[at]!a}")
        at = match.end()
        kind = match.lastgroup or ""
        if kind == "comment":
            at = _behind_comment(text, at)
        elif kind != "space":
            folded = folds > 0 and text.find("\n", last, at) >= 0
            content = match[kind]
            if kind == "quoted":
                content = _QUOTED_PAIR.sub(r"\1", content)  # a fold is kept: in a local part email.utils shows it otherwise
            found.append(_Token(content if kind == "special" else kind, content, folded, at))
            last = at
    found.append(_Token("", "", False))
    return found


def _behind_comment(text: str, at: int) -> int:
    """The index behind a comment whose ( is in front of `at`; comments nest."""
    depth = 1
    while depth:
        match = _WITHIN_COMMENT.match(text, at)
        if match is None:
            raise Malformed("a comment that is unterminated, or on two lines")
        depth += 1 if match[1] == "(" else -1
        at = match.end()
    return at


def _check_phrase(words: list[_Token]) -> None:
    """Raise Malformed unless the words are a display name: phrase and obs-phrase."""
    if words and words[0].kind == ".":
        raise Malformed("a display name that begins with a dot")
    for kind, text, *_ in words:
        if "=?" in text:
            rest = "" if kind == "encoded" else text if kind == "atom" else _WITHIN_QUOTES.sub("", text)
            if "=?" in rest:
                raise Malformed("an invalid encoded word (RFC 2047)")


def _local(words: list[_Token]) -> str:
    """The local part (local-part, obs-local-part): words with dots between them."""
    if not words or len(words) % 2 == 0 or any((kind == ".") != bool(i % 2) for i, (kind, *_) in enumerate(words)):
        raise Malformed("no local part in front of @")
    if any(word.folded for word in words[1:]):
        raise Malformed("a local part on two lines")
    local = "".join(word.text for word in words)
    if "=?" in local:
        raise Malformed("an encoded word in an address (RFC 2047 5)")
    if any(one > "\x7f" and one.lower() < "\x80" for one in local):
        raise Malformed("a local part with characters whose lower case is ASCII")
    if not local.isprintable():  # nor are the surrogates for octets that are not UTF-8
        raise Malformed("a local part with characters that are not printable")
    if _DOT_ATOM.match(local):
        return local
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _without_domain(words: list[_Token]) -> Mailbox:
    """`root`: invalid in transit, but frequent in mail that local programs submit. Malformed if it could be taken for more than
    a local part."""
    local = _local(words)
    if any(word.kind == "quoted" for word in words) or "%" in local or "!" in local:
        raise Malformed("an address without @")
    return Mailbox(local, "")
