"""The client side of an SMTP session after EHLO (RFC 5321, 2920), without I/O.

`begin(mail)` starts a transaction, `receive(data)` takes replies; both append octets to be written to `out` and mails that
are done to `finished`. With a PIPELINING peer an envelope (MAIL, every RCPT, DATA) is one write, and the next envelope is
written right behind the message data of the one before: one round trip per message.

    expected    on success                 refused
    RSET        -                          (out of turn)
    XFORWARD    -                          -
    MAIL        -                          the reply counts for every recipient
    RCPT        -                          the reply counts for that recipient
    DATA 354    message data, then FINAL   the reply counts for every accepted recipient
    FINAL       accepted: delivered        the reply counts for every accepted recipient

XFORWARD (https://www.postfix.org/XFORWARD_README.html) is said in front of each MAIL to a peer that offers it, where the mail has
something to say by it: what the peer replies does the mail neither good nor harm.

After a 354 though every recipient was refused, a lone dot is written, so that nothing is sent. `proto/sequence.py` defines which
replies are success and refusal; any other, a reply to no command, and one that arrives before its command was written are out of
turn: the connection is closed, and the mails under way are tried again.

To a peer with CHUNKING (RFC 3030) the message data is written as one `BDAT n LAST` behind the envelope, without waiting; FINAL is
its reply. Without a 354 nothing shows that commands and replies are in step, so RSET is written behind the data, and FINAL
counts only with a 2xx to that: had the peer sent one reply too many, this one would be the reply to BDAT. (RSET is needed anyway:
a refused BDAT does not end the transaction.) A peer that replies 500 or 502 does not know BDAT, whatever it offers: DATA is used
from then on, for this message too. With LMTP (RFC 2033) there is one FINAL for each accepted recipient.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from relaymta._speedups.dots import Stuffer, stuff
from relaymta._speedups.replies import Replies
from relaymta.proto.arguments import xforward
from relaymta.proto.said import Said, classify
from relaymta.proto.sequence import GOES_ON, OUT_OF_TURN, verdict

__all__ = [
    "LINES_LIMIT", "LINE_LIMIT", "ClientSession", "Features", "Mail", "Replies", "Said", "Stuffer", "classify", "features_of",
    "stuff",
]  # fmt: skip

RSET, XFORWARD, MAIL, RCPT, DATA, FINAL = "rset", "xforward", "mail", "rcpt", "data", "final"
LINE_LIMIT = 4096
LINES_LIMIT = 200
NO_BDAT = (500, 502)  # replies to BDAT of a peer that does not implement it (RFC 5321 4.2.4)
SLACK = 1024  # octets by which TLS may enlarge what is not written yet


class Features:
    """The extensions in a peer's reply to EHLO. `xforward`: the attributes that it takes."""

    __slots__ = ("chunking", "eight_bit", "pipelining", "size", "smtputf8", "xforward")

    def __init__(
        self,
        pipelining: bool,
        eight_bit: bool,
        smtputf8: bool,
        size: int | None,
        chunking: bool = False,
        xforward: frozenset[str] = frozenset(),
    ) -> None:
        self.pipelining = pipelining
        self.eight_bit = eight_bit
        self.smtputf8 = smtputf8
        self.size = size  # None: no SIZE; 0: no limit
        self.chunking = chunking and pipelining
        self.xforward = xforward


def features_of(extensions: dict[str, str]) -> Features:
    """Features from EHLO keywords (lower case) and their parameters."""
    size = extensions.get("size")
    digits = size.strip() if size is not None else ""
    return Features(
        "pipelining" in extensions,
        "8bitmime" in extensions,
        "smtputf8" in extensions,
        None if size is None else int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else 0,
        "chunking" in extensions,
        frozenset(extensions.get("xforward", "").upper().split()),
    )


class Mail:
    """One message for one peer. `data`: pieces of message data, not dot-stuffed, or None when the caller streams it; `size`:
    its octets; `cargo`, `trail`: the caller's own; `forward`: what is said of its client by XFORWARD, by attribute.

    `said`: the reply that decides, by recipient index; empty when `all_sent`.
    """

    __slots__ = (
        "all_sent",
        "answer",
        "asked",
        "cargo",
        "data",
        "data_sent",
        "eight_bit",
        "forward",
        "reached",
        "recipients",
        "refused_mail",
        "said",
        "sender",
        "sent",
        "size",
        "smtputf8",
        "todo",
        "trail",
        "unanswered",
        "waited",
    )  # fmt: skip

    def __init__(
        self,
        cargo: object,
        sender: str,
        recipients: list[tuple[int, str]],
        data: list[bytes] | None,
        size: int,
        eight_bit: bool,
        smtputf8: bool,
    ) -> None:
        self.cargo = cargo
        self.trail: object = None
        self.forward: dict[str, str] = {}
        self.sender = sender
        self.recipients = recipients
        self.data = data
        self.size = size
        self.eight_bit = eight_bit
        self.smtputf8 = smtputf8
        self.unanswered = 0  # recipients whose FINAL is awaited (LMTP)
        self.todo = recipients  # recipients left for further transactions
        self.asked: list[tuple[int, str]] = []  # recipients of the transaction under way
        self.sent: list[int] = []  # accepted by RCPT in the transaction under way
        self.refused_mail: Said | None = None
        self.said: dict[int, Said] = {}
        self.all_sent = False  # every recipient was accepted: no replies are built on the hot path
        self.answer = (0, b"")  # code and text of the reply to the final dot
        self.reached = ""  # phase of the last reply, "" before the first
        self.data_sent = False  # the last octet is written and its reply awaited: in doubt
        self.waited: dict[str, float] = {}  # seconds for replies, by the phase of the first that came together


class Tap(Protocol):
    """Who is told of a dialogue."""

    def said(self, octets: bytes) -> None:
        """Commands."""

    def data(self, octets: int) -> None:
        """So many octets of message data, all of it."""

    def heard(self, found: Iterable[tuple[int, bytes]]) -> None:
        """Replies, before they are handled."""


class ClientSession:
    """One connection. `recipients`: the maximum of one transaction; `lmtp`: the peer speaks LMTP."""

    __slots__ = (
        "_behind", "_expected", "_replies", "_since", "broken", "closing", "features", "finished", "last_said", "lmtp",
        "messages", "moment", "no_bdat", "not_sent", "open_envelope", "out", "recipients", "streaming", "tap",
    )  # fmt: skip

    def __init__(self, features: Features, recipients: int = 100, lmtp: bool = False) -> None:
        self.features = features
        self.lmtp = lmtp
        self.recipients = recipients
        self._replies = Replies(LINE_LIMIT, LINES_LIMIT)
        self._expected: deque[tuple[str, Mail | None, int]] = deque()
        self._behind = 0  # octets of the envelope (and BDAT data) begun last
        self.out: list[bytes] = []
        self.finished: list[Mail] = []
        self.streaming: Mail | None = None  # the caller writes this mail's message data, then calls data_written()
        self.closing = False  # the peer replied 421, or out of turn
        self.broken = b""
        self.open_envelope = False  # the peer has an envelope that no message data ended: RSET first
        self.messages = 0
        self.last_said: Said | None = None  # the peer's 421
        self.no_bdat = False  # it offered CHUNKING, and does not implement BDAT
        self.not_sent = False  # so no mail under way was sent
        self.tap: Tap | None = None
        self.moment = 0.0  # now, seconds of a monotonic clock: its owner sets it before each call
        self._since = 0.0  # from then on the next reply has been waited for

    @property
    def idle(self) -> bool:
        """No reply is awaited, and no message data is being streamed."""
        return not self._expected and self.streaming is None

    @property
    def may_follow(self) -> bool:
        """Another envelope may be written now, behind the message data of the one before."""
        expected = self._expected
        if not expected:
            return self.streaming is None
        kind, mail, _ = expected[0]
        if (kind is not FINAL and kind is not RSET) or not self.features.pipelining or mail is None:
            return False
        # A mail with recipients left begins their transaction itself: its envelope must not follow another mail's DATA.
        return not mail.todo and (len(expected) == 1 or (mail is expected[-1][1] and not self.lmtp))

    @property
    def waits(self) -> float:
        """For how long the next reply has been waited for, at `moment`."""
        return self.moment - self._since

    @property
    def awaiting(self) -> str:
        """The phase of the reply that is awaited, "" for none."""
        return self._expected[0][0] if self._expected else ""

    def under_way(self) -> list[Mail]:
        """The mails begun and not finished, in order."""
        found: list[Mail] = []
        for _, mail, _ in self._expected:
            if mail is not None and mail not in found:
                found.append(mail)
        if self.streaming is not None and self.streaming not in found:
            found.append(self.streaming)
        return found

    def begin(self, mail: Mail) -> None:
        """Start a transaction with the first `recipients` of `mail.todo`."""
        asked = mail.asked = mail.todo[: self.recipients]
        mail.todo = mail.todo[self.recipients :]
        mail.sent = []
        mail.refused_mail = None
        mail.reached = ""
        mail.data_sent = False
        if not self._expected:
            self._since = self.moment
        features, expected = self.features, self._expected
        lines = []
        if self.open_envelope:
            lines.append("RSET\r\n")
            expected.append((RSET, None, 0))
        self.open_envelope = True
        if mail.forward and features.xforward and (said := xforward(mail.forward, features.xforward)):
            lines.append(f"{said}\r\n")
            expected.append((XFORWARD, mail, 0))
            if not features.pipelining:  # MAIL follows the reply
                self._say("".join(lines))
                return
        lines.append(self._mail_from(mail))
        expected.append((MAIL, mail, 0))
        if features.pipelining:
            for index, address in asked:
                lines.append(f"RCPT TO:<{address}>\r\n")
                expected.append((RCPT, mail, index))
            if features.chunking and mail.data is not None:
                octets = sum(map(len, mail.data))
                lines.append(f"BDAT {octets} LAST\r\n")
                envelope = "".join(lines).encode()
                self._behind = len(envelope) + octets
                self.out.append(envelope)
                self.out += mail.data
                self.out.append(b"RSET\r\n")
                if self.tap is not None:
                    self.tap.said(envelope)
                    self.tap.data(octets)
                    self.tap.said(b"RSET\r\n")
                mail.data_sent = True
                self.open_envelope = False
                expected.append((FINAL, mail, 0))
                expected.append((RSET, mail, 0))
                return
            lines.append("DATA\r\n")
            expected.append((DATA, mail, 0))
        envelope = "".join(lines).encode()
        self._behind = len(envelope)
        self.out.append(envelope)
        if self.tap is not None:
            self.tap.said(envelope)

    def _say(self, line: str) -> None:
        octets = line.encode()
        self.out.append(octets)
        if self.tap is not None:
            self.tap.said(octets)

    def _mail_from(self, mail: Mail) -> str:
        features = self.features
        options = ""
        if features.size is not None:
            options = f" SIZE={mail.size}"
        if mail.eight_bit and features.eight_bit:
            options += " BODY=8BITMIME"
        if mail.smtputf8 and features.smtputf8:
            options += " SMTPUTF8"
        return f"MAIL FROM:<{mail.sender}>{options}\r\n"

    def receive(self, data: bytes, unsent: int = 0) -> None:
        """Take octets from the peer. `out` was written before, except for `unsent` octets that the peer cannot have yet."""
        replies = self._replies.feed(data)
        if self.tap is not None:
            self.tap.heard(replies)
        if len(replies) > len(self._expected) and self.features.chunking:
            self._cut_surplus(replies)
        streaming = self.streaming
        self._take(replies, unsent)
        if (self.out or self.streaming is not streaming) and not self.closing and self._replies.begun():
            # The beginning of a reply to what is not written yet: its end would be taken for the reply to that.
            found = self._replies.end()
            self._stop(*(found[0] if found else (0, b"the beginning of another reply")))

    def ended(self, unsent: int = 0) -> None:
        """The connection has ended: a reply that had begun counts by its code, if it ends its command (a 354 does not, and no
        message data follows it any more). `unsent`: as of the last `receive`."""
        replies = self._replies.end()
        if replies and self.tap is not None:
            self.tap.heard(replies)
        if replies and replies[0][0] >= 200 and not 300 <= replies[0][0] < 400:
            self._take(replies, unsent)
            self._not_written()

    def _not_written(self) -> None:
        """What is in `out` is not written any more: message data (BDAT) that is there is not in doubt."""
        last = self._expected[-1][1] if self._expected else None
        if self.out and last is not None:
            last.data_sent = False

    def _take(self, replies: list[tuple[int, bytes]], unsent: int) -> None:
        expected = self._expected
        if replies and expected:
            kind, mail, _ = expected[0]
            if mail is not None:
                mail.waited[kind] = mail.waited.get(kind, 0.0) + self.moment - self._since
            self._since = self.moment
        for number, (code, text) in enumerate(replies):
            if self.closing:
                return
            # A reply before this one has filled `out`: then this one arrived before its command was written.
            if not expected or self.out or code == 421:
                self._stop(code, text, replies[number + 1 :])
                return
            kind, mail, index = expected[0]
            if code not in GOES_ON[kind] and verdict(kind, code) == OUT_OF_TURN:
                if self.not_sent and kind is RSET and 500 <= code < 600:  # the reply to the first line of message data
                    self._stop_bdat()
                else:
                    self._stop(code, text, replies[number + 1 :])
                return
            if unsent and kind is FINAL and code < 400 and unsent > self._behind_data():
                self._stop(code, text)  # it accepts message data that it does not have
                return
            expected.popleft()
            if mail is not None:
                _STEPS[kind](self, mail, index, code, text)

    def _stop_bdat(self) -> None:
        """The peer does not implement BDAT, and takes message data for commands. No mail under way was sent to it."""
        self.closing = True
        self.broken = b"the peer offers CHUNKING, and does not implement BDAT"
        for mail in self.under_way():
            mail.data_sent = False

    def _cut_surplus(self, replies: list[tuple[int, bytes]]) -> None:
        """With BDAT and more replies than commands it cannot be determined which one is surplus, only that the replies to message
        data whose envelope was answered before are in step."""
        bdat = next((i for i, (kind, _, _) in enumerate(self._expected) if kind is FINAL), len(replies))
        if bdat + 1 < len(replies) and replies[bdat][0] in NO_BDAT and 500 <= replies[bdat + 1][0] < 600:
            del replies[bdat + 2 :]  # it took the lines of the message data for commands
        elif replies[-1][0] not in (0, 421) or len(replies) > len(self._expected) + 1:
            first = next((i for i, (kind, _, _) in enumerate(self._expected) if kind not in (FINAL, RSET)), len(self._expected))
            replies[first:] = [(0, b"more replies than commands: " + replies[-1][1])]

    def _behind_data(self) -> int:
        """The most octets still to be written behind the message data whose FINAL is next."""
        expected = self._expected
        if len(expected) == 1:
            return 0
        return SLACK + (self._behind if expected[-1][1] is not expected[0][1] else 0)

    def _stop(self, code: int, text: bytes, more: Sequence[tuple[int, bytes]] = ()) -> None:
        """The peer closes (421), or replied out of turn: no later reply can be trusted, nor those to an envelope that no 354 has
        shown to be in step. `more`: the replies behind it."""
        self.closing = True
        self._not_written()
        mail = self._expected[0][1] if self._expected else None
        early = mail if self.awaiting is FINAL and self.out else self.streaming
        if early is not None and self.streaming is None:  # it came with the 354: no message data is written
            early.data_sent = False
        if code == 421:
            self.broken = b"the peer closes: " + text
            self.last_said = Said(code, text, self.awaiting or "idle")
            return
        awaiting = self.awaiting
        wanted = b"no reply" if not awaiting else b"the reply to " + awaiting.upper().encode()
        self.broken = b"the peer speaks out of turn: expected " + wanted + b", got: " + (b"%d " % code if code else b"") + text
        if early is not None and 400 <= code < 600:
            self._refuse_early(early, [(code, text), *more])
        elif mail is not None and (awaiting is not FINAL or self.features.chunking):
            mail.data_sent = mail.data_sent or awaiting is RSET
            mail.all_sent = False
            for index, _ in mail.asked:
                mail.said.pop(index, None)

    def _refuse_early(self, mail: Mail, replies: list[tuple[int, bytes]]) -> None:
        """The peer refused the message data before its end: the rest is not sent. In LMTP each reply is for one recipient, in
        their order (RFC 2033 4.2); those without one are asked for again."""
        if not self.lmtp:
            mail.said |= dict.fromkeys(mail.sent, Said(*replies[0], FINAL))
            return
        for recipient, (code, text) in zip(mail.sent, replies, strict=False):
            if not 400 <= code < 600:
                return
            mail.said[recipient] = Said(code, text, FINAL)

    def _forwarded(self, mail: Mail, index: int, code: int, text: bytes) -> None:
        mail.reached = XFORWARD
        if not self.features.pipelining:
            self._say(self._mail_from(mail))
            self._expected.append((MAIL, mail, 0))

    def _mail(self, mail: Mail, index: int, code: int, text: bytes) -> None:
        mail.reached = MAIL
        if code >= 400:
            mail.refused_mail = Said(code, text, MAIL)
        if not self.features.pipelining:
            if mail.refused_mail is not None:
                self._end(mail)
            else:
                self._ask(mail, 0)

    def _ask(self, mail: Mail, position: int) -> None:
        """Without PIPELINING: send the next RCPT, or DATA after the last."""
        if position < len(mail.asked):
            index, address = mail.asked[position]
            self._say(f"RCPT TO:<{address}>\r\n")
            self._expected.append((RCPT, mail, index))
        elif mail.sent:
            self._say("DATA\r\n")
            self._expected.append((DATA, mail, 0))
        else:
            self._end(mail)

    def _rcpt(self, mail: Mail, index: int, code: int, text: bytes) -> None:
        mail.reached = RCPT
        if code < 400:
            mail.sent.append(index)
        elif mail.refused_mail is not None:
            pass  # a consequence of the refused MAIL
        elif code in (452, 552) and mail.sent and _too_many(text):
            mail.todo = [*mail.todo, next(pair for pair in mail.asked if pair[0] == index)]
        else:
            mail.said[index] = Said(code, text, RCPT)
        if not self.features.pipelining:
            position = next(i for i, pair in enumerate(mail.asked) if pair[0] == index)
            self._ask(mail, position + 1)

    def _data(self, mail: Mail, index: int, code: int, text: bytes) -> None:
        mail.reached = DATA
        wanted = bool(mail.sent) and mail.refused_mail is None
        if code == 354:
            if not wanted and mail.sent:
                # It accepted recipients without a sender, and a lone dot would send them an empty message.
                self._end(mail)
                self._stop(0, b"354 to a transaction without a sender")
            elif not wanted:
                # RFC 2920 3.1: every recipient was refused, and the peer asks for message data all the same.
                if self.lmtp:  # the number of replies to a dot is undefined (RFC 2033 4.2 requires 503)
                    self._end(mail)
                    self._stop(0, b"354 to a transaction without recipients")
                else:
                    self.out += stuff([])
                    if self.tap is not None:
                        self.tap.data(0)
                    self._expected.appendleft((FINAL, mail, -1))
            elif mail.data is None:
                self.streaming = mail
            else:
                self.out += stuff(mail.data)
                self._data_sent(mail)
            return
        if wanted:
            said = Said(code, text, DATA)
            for recipient in mail.sent:
                mail.said[recipient] = said
            mail.sent = []
        self._end(mail)

    def data_written(self, whole: bool) -> None:
        """The caller has stopped streaming; `whole`: message data and final dot were written."""
        mail, self.streaming = self.streaming, None
        self._since = self.moment
        if mail is not None and whole:
            self._data_sent(mail)

    def _data_sent(self, mail: Mail) -> None:
        """Message data and final dot were written: one reply is expected, with LMTP one for each recipient."""
        mail.data_sent = True
        self.open_envelope = False
        if self.tap is not None:
            self.tap.data(mail.size)
        if self.lmtp:
            mail.unanswered = len(mail.sent)
            self._expected.extendleft((FINAL, mail, index) for index in reversed(mail.sent))
        else:
            self._expected.appendleft((FINAL, mail, 0))

    def _final(self, mail: Mail, index: int, code: int, text: bytes) -> None:
        if self.lmtp:
            self._recipient_final(mail, index, code, text)
            return
        chunked = bool(self._expected) and self._expected[0][1] is mail  # sent by BDAT: the reply to its RSET is next
        mail.reached = FINAL
        mail.data_sent = False
        if not self._expected:  # otherwise the envelope behind it is open
            self.open_envelope = False
        if index == 0 and (not mail.sent or mail.refused_mail is not None):
            pass  # BDAT behind an envelope without accepted sender or recipients: its reply adds nothing
        elif index == 0 and chunked and code in NO_BDAT:
            self.no_bdat = self.not_sent = True
        elif index == 0:
            self.messages += 1
            if code < 400:
                mail.answer = (code, text)
                if not mail.said and not mail.todo and len(mail.sent) == len(mail.recipients):
                    mail.all_sent = True
                    if not chunked:
                        self.finished.append(mail)
                        return
            said = Said(code, text, FINAL)
            for recipient in mail.sent:
                mail.said[recipient] = said
        if not chunked:
            self._end(mail)

    def _confirmed(self, mail: Mail, index: int, code: int, text: bytes) -> None:
        """The RSET behind BDAT was accepted, so replies are in step: the one before was the reply to BDAT."""
        if mail.all_sent:
            mail.said.clear()
            self.finished.append(mail)
        elif self.not_sent and mail.sent and mail.refused_mail is None:
            self._send_again(mail)
        else:
            self._end(mail)

    def _send_again(self, mail: Mail) -> None:
        """Send a mail whose BDAT was not implemented by DATA; by another connection, where an envelope is under way behind it."""
        self.features.chunking = False
        if self._expected:
            self._stop_bdat()
            self._expected.appendleft((FINAL, mail, 0))  # it is under way
            return
        unsent = [pair for pair in mail.asked if pair[0] in mail.sent]
        mail.todo = [*unsent, *mail.todo]
        self.not_sent = False
        self.begin(mail)

    def _recipient_final(self, mail: Mail, index: int, code: int, text: bytes) -> None:
        """LMTP: the reply for one recipient (RFC 2033 4.2)."""
        mail.unanswered -= 1
        mail.said[index] = Said(code, text, FINAL)
        if code < 400:
            mail.answer = (code, text)
        if not mail.unanswered:
            mail.reached = FINAL
            mail.data_sent = False
            self.messages += 1
            self._end(mail)

    def _end(self, mail: Mail) -> None:
        """A transaction ended: start one with the recipients that are left, or the mail is finished."""
        if mail.refused_mail is not None:
            for recipient, _ in mail.asked:
                mail.said.setdefault(recipient, mail.refused_mail)
            mail.todo = [pair for pair in mail.todo if pair not in mail.asked]
            for recipient, _ in mail.todo:
                mail.said[recipient] = mail.refused_mail
            mail.todo = []
        if mail.todo:
            self.begin(mail)
        else:
            self.finished.append(mail)


def _too_many(text: bytes) -> bool:
    """Whether a 452 or 552 refuses the number of recipients, not this one (RFC 5321 4.5.3.1.10)."""
    return b"4.5.3" in text or b"5.5.3" in text or b"too many" in text.lower()


_STEPS = {
    RSET: ClientSession._confirmed,
    XFORWARD: ClientSession._forwarded,
    MAIL: ClientSession._mail,
    RCPT: ClientSession._rcpt,
    DATA: ClientSession._data,
    FINAL: ClientSession._final,
}
