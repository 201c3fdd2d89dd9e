"""The server side of an SMTP session (RFC 5321, 2920, 1870, 6152, 2034, 3030, 6531, 3207, 4954), or of one of LMTP (RFC 2033),
without I/O.

The caller passes octets to `receive()` and writes what it returns. `state` says what is to be done then:

    COMMANDS    nothing: commands are parsed (RFC 5321 4.1.4)
    DATA        message data of `transaction` arrives, between 354 (or BDAT) and its end
    COMPLETE    the message data of `transaction` has been received: `store()`
    STORING     the caller stores it, and ends it by `finish(reply)`
    CLAIMED     a login is to be verified: `claim`, answered by `checked(reply)`
    ASKED       others are to be asked about a command (`Transaction.asks`): `question`, answered by `answered(reply or None)`
    TLS         a TLS handshake is to be done, before anything is read: then `tls_started()`

In all but the first two nothing is parsed, and input is kept: also what is behind a question in the same segment. `closing`: the
connection is to be closed after what was returned is written (`foreign`: because the client speaks another protocol; `parting`:
the client has asked for it).

A transaction begins at MAIL. Whatever ends it, it is ended before anything behind that is parsed, `Transaction.end` is called
once, and `receive()` returns, as it does at a question. `behind` is set when there is more to do then, and when there is more
than the work of one call: `receive(b"")` goes on.

    transaction    MAIL  RCPT  DATA  BDAT   EHLO HELO RSET STARTTLS QUIT, and every other end of the session
    none            ->    503   503   503
    MAIL           503    ->    554   554   -> none
    RCPT           503    ->    354   ->    -> none
    data                             END    -> COMPLETE -> STORING -> finish() -> none

LMTP differs in three places: LHLO is there in place of EHLO and HELO; without recipients DATA and BDAT get 503, not 554; and the
end of the message data has one reply for each recipient. A message that is refused as a whole counts as one error.
"""

from typing import Any

from relaymta.proto import reply
from relaymta.proto.session import ASKED, COMPLETE, Host, Offers, Session
from relaymta.proto.transaction import Limits, Transaction
from relaymta.proto.verbs import OTHERS, VERBS, unknown

__all__ = ["Host", "Limits", "Offers", "ServerSession", "Transaction"]

_COMMAND, _DATA, _END = 0, 2, 3  # event kinds of _speedups.smtp (C integers there)
_BAD_LINES = {1: reply.LINE_TOO_LONG, 2: reply.BARE_IN_COMMAND, 3: reply.NUL_IN_COMMAND}
_FOREIGN = 4
ENOUGH = 64  # replies of one call


class ServerSession(Session):
    """One SMTP session: drives the parser, and the session by what that finds."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        """Take octets from the client; returns the octets to write."""
        if self.closing:
            return b""
        if self.state == ASKED:  # unlike in the other states, the parser itself does not hold
            self.parser.keep(data)
            return b""
        self.behind = self.returns = False
        parser, tap = self.parser, self.tap
        out: list[bytes] = []
        events: list[Any]
        if self.pending:
            events, self.pending = self.pending, []
            if data:
                parser.keep(data)
        else:
            events = parser.feed(data)
        while True:
            rest = iter(events)
            for event in rest:
                kind = event[0]
                if tap is not None:
                    tap.heard(self, event)
                if kind == _COMMAND:
                    out.append(VERBS.get(event[1], unknown)(self, event[2]))
                elif kind == _DATA:
                    if self.transaction is not None:
                        self.transaction.received(event[1])
                elif kind == _END:
                    out.append(self._ended())
                else:
                    out.append(self._bad_line(event[1], event[2]))
                if self.returns:
                    if not self.closing:
                        self.pending = list(rest)
                        self.behind = self.state != ASKED and (bool(self.pending) or parser.runnable())
                    return b"".join(out)
            if not events or not parser.runnable():
                return b"".join(out)
            if len(out) >= ENOUGH:
                self.behind = True
                return b"".join(out)
            events = parser.feed(b"")

    def _bad_line(self, why: int, start: bytes) -> bytes:
        if self.exchange is not None:
            return self.exchanged(_BAD_LINES[why])
        if why == _FOREIGN or OTHERS.match(start):
            return self.reject_protocol()
        return self.error(_BAD_LINES[why])

    def _ended(self) -> bytes:
        """The message data, or one chunk of it, is complete."""
        transaction = self.transaction
        if transaction is None or (transaction.chunked and not transaction.last_chunk):
            return self._chunk_ended()
        answer = transaction.ended(self.parser.flags, self.parser.normalize)
        if answer is None:
            self.state = COMPLETE
            return b""
        transaction.refused(answer)
        out = self.for_each(answer)
        self.drop()
        self.parser.commands()
        return self.error_if_5xx(out)

    def _chunk_ended(self) -> bytes:
        self.parser.commands()
        if self.transaction is None:
            answer = self.refusal
            self.drop()
            return self.error_if_5xx(answer)
        return reply.RESET
