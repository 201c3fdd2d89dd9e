"""The server side of a POP3 session (RFC 1939, 2449, 2595, 3206, 5034, 6856), without I/O.

The caller passes octets to `receive()` and writes what it returns. `state` says what is to be done then:

    COMMANDS      nothing: commands are parsed
    TLS           a TLS handshake is to be done, before anything is read: then `tls_started()`
    CLAIMED       a login is to be verified: `claim`, answered by `checked(reply)`
    OPENING       the maildrop of the user who has logged in is to be opened: `opened(maildrop or reply)`
    SENDING       the message `wanted` is to be read: `piece(data)` until its end (or `wanted.enough`), then `sent()`; or
                  `refused(reply)`
    COMMITTING    the client has said QUIT: `deletions` is to be carried out, in one operation, then `committed(left)`

In all but the first nothing is parsed, and input is kept (KEPT octets at most). `closing`: the connection is to be closed after
what was returned is written (`foreign`: because the client speaks another protocol; `parting`: the client has asked for it).
`behind` is set when there is more than the work of one call, and when commands have arrived meanwhile: `receive(b"")` goes on.

    AUTHORIZATION    maildrop is None    USER PASS  AUTH -> CLAIMED -> OPENING -> opened() -> TRANSACTION    STLS UTF8
    TRANSACTION      maildrop is set     STAT LIST UIDL DELE RSET NOOP    RETR TOP -> SENDING -> sent()
                                         QUIT -> COMMITTING -> committed() -> closing
    both                                 CAPA QUIT

At every other end of the session nothing is deleted. `maildrop.retrieved` says what the client has got, however it ends.
"""

from relaymta.proto import pop3_reply as reply
from relaymta.proto.access_session import KEPT
from relaymta.proto.pop3_maildrop import Maildrop, Wanted
from relaymta.proto.pop3_session import Session
from relaymta.proto.pop3_verbs import VERBS
from relaymta.proto.session import Offers
from relaymta.proto.verbs import OTHERS

__all__ = ["Maildrop", "Offers", "ServerSession", "Wanted"]

_BAD = 1  # an event kind of _speedups.smtp (a C integer there)
_BAD_LINES = {1: reply.LINE_TOO_LONG, 2: reply.BARE_IN_COMMAND, 3: reply.NUL_IN_COMMAND}
COMMAND_LIMIT = 255  # octets with CRLF (RFC 2449 4)
ENOUGH = 64  # replies of one call
ENOUGH_OCTETS = 65536  # of replies of one call


class ServerSession(Session):
    """One POP3 session: drives the parser, and the session by what that finds."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        """Take octets from the client; returns the octets to write."""
        if self.closing or self.state:
            self.keep(data)
            return b""
        self.behind = False
        self.late += data
        out: list[bytes] = []
        octets = 0
        while not self.closing and not self.state:
            if len(out) >= ENOUGH or octets >= ENOUGH_OCTETS:
                self.behind = self.listing is not None or self.waiting() > 0
                break
            answer = self._step()
            if answer is None:
                break
            out.append(answer)
            octets += len(answer)
        if not self.closing and self.waiting() > KEPT:
            self.close()
            out.append(reply.TOO_MUCH_SENT)
        return b"".join(out)

    def _step(self) -> bytes | None:
        """The next piece of a listing, or the reply to the next line; None when there is no whole line."""
        if self.listing is not None:
            piece = next(self.listing, None)
            if piece is not None:
                return piece
            self.listing = None
        event = self._line()
        if event is None:
            return None
        if event[0] == _BAD:
            return self._bad_line(event[1], event[2])
        return self._respond(event[2]) if self.exchange is not None else self._command(event[2])

    def _line(self) -> tuple[int, int, bytes] | None:
        """The next line, as an event of the parser, which holds after it. What has arrived late is joined to what the parser has
        only when there is no whole line in that: so each octet is copied a few times, however many pieces they come in."""
        self.parser.line()
        events = self.parser.feed(b"") if self.parser.waiting() else []
        if not events and self.late:
            late = bytes(self.late)
            self.late.clear()
            events = self.parser.feed(late)
        return events[0] if events else None  # type: ignore[return-value]  # lines are triples

    def _bad_line(self, why: int, start: bytes) -> bytes:
        if self.exchange is not None:
            return self.login_failed(_BAD_LINES[why])
        if self.maildrop is None and OTHERS.match(start):
            return self.reject_protocol()
        return self.error(_BAD_LINES[why])

    def _respond(self, line: bytes) -> bytes:
        """A response in an AUTH exchange."""
        assert self.exchange is not None
        return self.exchanged(self.exchange.respond(line.strip()))

    def _command(self, line: bytes) -> bytes:
        word, _, rest = line.partition(b" ")
        name = word.upper()
        verb = VERBS.get(name)
        if verb is None and self.maildrop is None and OTHERS.match(line):
            return self.reject_protocol()
        if len(line) + 2 > COMMAND_LIMIT and name != b"AUTH":  # many clients send a long token as initial response
            return self.error(reply.LINE_TOO_LONG)
        if not line.isascii() and (verb is None or not verb.whole):
            return self.error(reply.NOT_ASCII)
        if verb is None:
            return self.error(reply.UNKNOWN_COMMAND)
        if verb.whole:
            arguments = [rest] if rest else []
        else:
            arguments = rest.split()
        refused = verb.refusal(self, arguments)
        return verb.run(self, arguments) if refused is None else self.error(refused)
