"""Dialogs of mail programs with an IMAP server, read from files and held with a running one.

A file is of lines `VERB: REST`; `#` begins a comment.

    text: NAME     a text: the lines `| ...` behind it, each with CRLF; `|*N ...` stands for N such lines
    put: MAILBOX NAME [FLAGS]   another program files this text
    deliver: NAME  this text is sent to the user by SMTP; the dialog goes on when it is in INBOX
    other: COMMAND   a second session of the user does this, and it is OK; it lasts as long as the dialog
    quota: OCTETS    the user's quota
    as: NAME         from here on it is about this connection, which is opened when it is named first
    C: ...           the client says a line; several of them in a row are one write (pipelined)
    S: ...           the server says a response, and nothing before it; behind `{n}` it goes on in the next line
    S?: ...          a group of them: the responses in any order, each for the first line that fits it
    close:           the client is gone without a word

`<size NAME>` and `<text NAME>` are a text's length and octets; `<user>`, `<password>` and `<plain>` (SASL) what the user logs in
with. In what the server says, `<n>` is a number, `<word>` what has no space and no bracket, `<date>` a date and time, `<any>`
anything in the line, `<octets>` anything at all; `<NAME:n>` keeps what was found there, and is `<NAME>` from then on. All other
octets are themselves, as in `<0.100>` and `<1@x.example>`.

Each response passes the grammar, too. At its end the dialog has taken all that was said."""

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.imap_grammar import DATE_TIME, NotIMAP
from tests.support.imap_relay import PASSWORD, ImapRelay, Session

__all__ = ["Dialog", "DialogFailed"]

_LINE = re.compile(r"([a-z]+|C|S\??):(?: (.*))?")
_TEXT_LINE = re.compile(r"\|(?:\*([0-9]+))?(?: (.*))?")
_PLACE = re.compile(r"<(?:([a-z_]+):)?([a-z_]+)>|<(size|text) ([a-z_]+)>")
_LITERAL = re.compile(r"\{(?:[0-9]+|<[^>]*>)\}\Z")
_KINDS = {"n": rb"[0-9]+", "word": rb'[^ \r\n()\[\]{}"]+', "date": DATE_TIME, "any": rb"[^\r\n]*", "octets": rb"(?s:.*)"}


class DialogFailed(AssertionError):
    """The server does not say what the file expects, or the file is wrong; the text says where."""


class Line(NamedTuple):
    """The line `number` of a file; `rest`: what is behind its verb (with further lines, behind a literal)."""

    number: int
    rest: str


def steps(source: str) -> list[tuple[str, list[Line]]]:
    """What is done at once: a verb, with all of its lines. Raises DialogFailed."""
    found: list[tuple[str, list[Line]]] = []
    for number, line in enumerate(source.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        text, match = _TEXT_LINE.fullmatch(line), _LINE.fullmatch(line)
        verb, lines = found[-1] if found else ("", [])
        if text and verb == "text":
            lines.append(Line(number, f"{text[2] or ''}\r\n" * int(text[1] or 1)))
        elif match is None or match[1] not in _DO:
            raise DialogFailed(f"{number}: no line of a dialog: {line!r}")
        elif verb == match[1] and verb in ("S", "S?") and _LITERAL.search(lines[-1].rest):
            lines[-1] = Line(lines[-1].number, f"{lines[-1].rest}\r\n{match[2] or ''}")
        elif verb == match[1] and verb in ("C", "S?"):
            lines.append(Line(number, match[2] or ""))
        else:
            found.append((match[1], [Line(number, match[2] or "")]))
    return found


class Dialog:
    """A dialog of a user. `dial` makes connections to the server."""

    def __init__(self, path: Path, relay: ImapRelay, user: str, dial: Callable[[], Session]) -> None:
        self._path, self._relay, self._user, self._dial = path, relay, user, dial
        address = f"{user}@local.example".encode()
        plain = base64.b64encode(b"\0%b\0%b" % (address, PASSWORD.encode()))
        self._known = {"user": address, "password": PASSWORD.encode(), "plain": plain}
        self._texts: dict[str, bytes] = {}
        self._connections: dict[str, Session] = {}
        self._name = "client"
        self._second: Session | None = None

    def hold(self) -> None:
        """All of it. Raises DialogFailed: the file, the line, what was expected and what came instead."""
        number = 0
        try:
            for verb, lines in steps(self._path.read_text()):
                number = lines[0].number
                _DO[verb](self, lines)
            for name, session in self._connections.items():
                _at_its_end(name, session)
        except DialogFailed as failure:
            raise DialogFailed(f"{self._path.name}:{failure}") from None
        except (NotIMAP, OSError, EOFError, AssertionError) as failure:
            raise DialogFailed(f"{self._path.name}:{number}: {failure!r}") from failure

    def _session(self) -> Session:
        if self._name not in self._connections:
            self._connections[self._name] = self._dial()
        return self._connections[self._name]

    def _other(self) -> Session:
        self._second = self._second or self._relay.session(self._user)
        return self._second

    # What lines do

    def _text(self, lines: list[Line]) -> None:
        self._texts[lines[0].rest] = "".join(line.rest for line in lines[1:]).encode()

    def _put(self, lines: list[Line]) -> None:
        mailbox, name, flags = f"{lines[0].rest} ".split(" ", 2)
        answer = self._other().append(mailbox, self._texts[name], flags.strip(), plus=True)
        assert answer.status == "OK", answer

    def _deliver(self, lines: list[Line]) -> None:
        self._relay.deliver(self._user, self._texts[lines[0].rest])

    def _other_does(self, lines: list[Line]) -> None:
        self._other().ok(self._octets(lines[0]))

    def _quota(self, lines: list[Line]) -> None:
        self._relay.quota(self._user, octets=int(lines[0].rest))

    def _as(self, lines: list[Line]) -> None:
        self._name = lines[0].rest

    def _close(self, lines: list[Line]) -> None:
        self._connections.pop(self._name).sock.close()

    def _client(self, lines: list[Line]) -> None:
        self._session().send(b"".join(self._octets(line) + b"\r\n" for line in lines))

    def _server(self, lines: list[Line]) -> None:
        left = {line: self._pattern(line) for line in lines}
        while left:
            wanted = f"{next(iter(left)).number}: expected {' or '.join(repr(line.rest) for line in left)}"
            try:
                said = self._session().octets()
            except (EOFError, OSError, NotIMAP) as failure:
                raise DialogFailed(f"{wanted}, got {failure!r}") from None
            fit = next(((line, match) for line, pattern in left.items() if (match := pattern.fullmatch(said))), None)
            if fit is None:
                raise DialogFailed(f"{wanted}, got {_shown(said)}")
            self._known.update(fit[1].groupdict())
            del left[fit[0]]

    # What is in a line

    def _octets(self, line: Line) -> bytes:
        found = list(self._pieces(line))
        if any(kind for _, kind in found):
            raise DialogFailed(f"{line.number}: nobody says {line.rest!r}")
        return b"".join(octets for octets, _ in found)

    def _pattern(self, line: Line) -> re.Pattern[bytes]:
        return re.compile(b"".join(kind or re.escape(octets) for octets, kind in self._pieces(line)) + rb"\r\n")

    def _pieces(self, line: Line) -> Iterator[tuple[bytes, bytes]]:
        """(octets, b"") that are meant as they are, or (b"", a regular expression)."""
        at = 0
        for place in _PLACE.finditer(line.rest):
            yield line.rest[at : place.start()].encode(), b""
            name, word, what, text = place.groups()
            if what and text in self._texts:
                yield self._texts[text] if what == "text" else b"%d" % len(self._texts[text]), b""
            elif word in _KINDS:
                yield b"", b"(?P<%b>%b)" % (name.encode(), _KINDS[word]) if name else _KINDS[word]
            elif word in self._known and not name:
                yield self._known[word], b""
            else:
                raise DialogFailed(f"{line.number}: nothing is known of {place[0]}")
            at = place.end()
        yield line.rest[at:].encode(), b""


def _at_its_end(name: str, session: Session) -> None:
    """Nothing is left that the dialog has not taken."""
    if any(one.name == "BYE" for one in session.said):
        said = session.ended()
    else:
        session.send(b"end NOOP\r\n")
        said = session.octets()
        said = b"" if said.startswith(b"end OK ") else said
    if said:
        raise DialogFailed(f" {name}: expected nothing more, got {_shown(said)}")


def _shown(octets: bytes) -> str:
    return repr(octets) if len(octets) < 2000 else f"{octets[:1000]!r} ... {octets[-1000:]!r}"


_DO: dict[str, Callable[[Dialog, list[Line]], None]] = {
    "text": Dialog._text, "put": Dialog._put, "deliver": Dialog._deliver, "other": Dialog._other_does, "quota": Dialog._quota,
    "as": Dialog._as, "close": Dialog._close, "C": Dialog._client, "S": Dialog._server, "S?": Dialog._server,
}  # fmt: skip
