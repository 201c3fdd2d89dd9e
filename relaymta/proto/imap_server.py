"""The server side of an IMAP session (RFC 3501, 9051, and the extensions of `imap_session.AFTER_LOGIN`), without I/O.

The caller passes octets to `receive()` and writes what it returns. `state` says what is to be done then:

    COMMANDS      nothing: commands are parsed
    TLS           a TLS handshake is to be done, before anything is read: then `tls_started()`
    CLAIMED       a login is to be verified: `claim`, answered by `checked(reply)`
    COMMAND       `command` is to be executed: any `write(untagged responses)`, then `done(status, text, code)`, or `failed()`
    LITERAL       a message of APPEND is announced: `append`. `go_ahead()` and it comes; or `refuse(text, code)`
    MESSAGE       octets of that message come: after each `receive()`, `take()` them; or `refuse(text, code)`
    APPENDED      all of it has come: `take()`, then `taken()`; or `refuse(text, code)`
    CANCELLED     an APPEND does not come to its end, by an error of the client: forget its messages, then `cancelled()`
    IDLE          `write()` what is new, at any time, until the state is another: COMMAND with `command` IDLE after DONE (news,
                  then `done`), COMMANDS when the client said something else

In COMMANDS, MESSAGE and IDLE octets are parsed; in all others they are kept (KEPT at most; better, nothing is read). Commands run
strictly one after another. `closing`: the connection is to be closed after what was returned is written (`foreign`: because the
client speaks another protocol; `parting`: the client has asked for it). `behind` is set when there is more than the work of one
call, and when octets have arrived meanwhile: `receive(b"")` goes on.

    not authenticated    logged_in False    LOGIN, AUTHENTICATE -> CLAIMED -> checked() -> authenticated     STARTTLS
    authenticated        logged_in          SELECT, EXAMINE -> COMMAND -> done("OK") -> selected
    selected             selected           CLOSE, UNSELECT, a SELECT that fails, unselected() -> authenticated
    all                                     CAPABILITY ID NOOP LOGOUT -> closing

An APPEND is LITERAL, MESSAGE, APPENDED for each of its messages, then COMMAND with `command` APPEND: nothing of it is filed
before that. The session itself refuses an empty message, and a message above `append_limit`. Of a command that is refused, the
client's literals with a plus are read and dropped up to 1 MB; beyond that the connection is closed.
"""

import re
from collections.abc import Callable
from typing import Any

from relaymta.proto import imap_grammar
from relaymta.proto import imap_response as response
from relaymta.proto.access_session import KEPT
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.imap_command import (
    Authenticate,
    Command,
    Enable,
    Fetch,
    Id,
    List,
    Login,
    Search,
    Select,
    Sort,
    Status,
    Store,
    Thread,
)
from relaymta.proto.imap_session import (
    APPENDED,
    CANCELLED,
    COMMAND,
    COMMANDS,
    FIRST_LITERAL,
    IDLE,
    LITERAL,
    MESSAGE,
    TLS,
    Session,
)
from relaymta.proto.imap_verbs import AUTHENTICATED, CLEAR, SELECTED, VERBS, Verb
from relaymta.proto.imap_words import TAG_MOST, Refused, Words
from relaymta.proto.sasl import Password
from relaymta.proto.session import Offers
from relaymta.proto.verbs import OTHERS

__all__ = ["Offers", "ServerSession"]

# Events of _speedups.imap (C integers there)
_BAD, _LITERAL, _PIECE, _END, _LINE = 1, 2, 3, 4, 5
_TOO_LONG, _ENDLESS = 1, 8
_HOLDING = 1  # a mode of it: a literal is announced
_BAD_COMMANDS = {
    1: "Command too long",
    2: "Bare CR or LF in a command; lines end in CRLF",
    3: "A control character in a command",
    4: 'expected a quotation mark at the end of a quoted string, and \\" or \\\\ behind a backslash',
    5: "expected the size of a literal behind an opening brace, and the end of the line",
    6: "Parentheses are nested too deeply",
    7: "Refused",
    8: "A literal that is too large was sent unasked",
}
ENOUGH = 64  # responses of one call
ENABLED = {"IMAP4REV2": "IMAP4rev2", "UTF8=ACCEPT": "UTF8=ACCEPT", "CONDSTORE": "CONDSTORE", "QRESYNC": "QRESYNC"}

_TAG = re.compile(rb"([!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]{1,%d}) " % TAG_MOST)
_PARSING = (COMMANDS, MESSAGE, IDLE)


class ServerSession(Session):
    """One IMAP session: drives the parser, and the session by what that finds."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        """Take octets from the client; returns the octets to write. A defect of ours in a command is told to `mistaken`, and the
        command refused; where there is none, it is raised."""
        if self.closing or self.state not in _PARSING:
            self.keep(data)
            return b""
        self.behind = False
        self.parser.keep(data)
        out: list[bytes] = []
        while not self.closing and self.state in _PARSING:
            if len(out) >= ENOUGH:
                self.behind = self.waiting() > 0
                break
            try:
                answer = self._step()
            except Exception as error:
                answer = self._defect(error)
            if answer is None:
                break
            if answer:
                out.append(answer)
        if not self.closing and self.waiting() > KEPT:
            self.close()
            out.append(response.bye("Too many commands were sent without waiting for their responses"))
        return b"".join(out)

    def _defect(self, error: Exception) -> bytes:
        """The command under way has met a defect of ours; it counts as an error, so that it is not met for ever."""
        if self.mistaken is None:
            raise error
        self.mistaken(error)
        if self.exchange is not None:
            return self.refuse_login(b"454 4.3.0 Internal error; it has been logged\r\n")
        return self.error(self._refused(Refused("Internal error; it has been logged", "NO", response.SERVERBUG)))

    def refuse(self, text: str, code: bytes = b"") -> bytes:
        """APPEND ends here with NO: in LITERAL, MESSAGE and APPENDED. The caller forgets all messages of it. Returns what to
        write."""
        if self.state not in (LITERAL, MESSAGE, APPENDED) or self.closing:
            return b""
        self.appending = False
        return self._dropped(Refused(text, "NO", code))

    def cancelled(self) -> bytes:
        """The caller has forgotten all messages of an APPEND that does not come to its end (CANCELLED). Returns what to write."""
        refused, self.refusal = self.refusal, None
        if refused is None or not self._over(CANCELLED):
            return b""
        self.appending = False
        return self._dropped(refused) if self.parser.mode == _HOLDING else self.said(refused)

    def _dropped(self, refused: Refused) -> bytes:
        """Refuse the command under way, when all has arrived of it that the client sends unasked."""
        self.append, self.pieces = None, []
        self.refusal = refused
        self.state = COMMANDS
        self.parser.refuse()
        said = self._step()
        self.behind = not self.closing and self.waiting() > 0
        return said or b""

    def _step(self) -> bytes | None:
        """The response to the next event, b"" where there is none; None when there is no event."""
        event = self.parser.event()
        if event is None:
            return None
        return _EVENTS[event[0]](self, event)

    # Events

    def _whole(self, event: tuple[Any, ...]) -> bytes:
        """A command."""
        kinds, values = event[1], event[2]
        if self.state == IDLE:
            return self._idle_over(kinds == b"a" and values[0].upper() == b"DONE")
        words = self._words(kinds, values)
        try:
            verb, name = self._begin(words)
            command = Command(self.tag, name, verb.parse(words))
        except Refused as refused:
            if not self.logged_in and kinds and OTHERS.match(values[0] + b" ") and self._unknown(words):
                return self.reject_protocol()
            return self._refused(refused)
        if not self.condstore and type(command.arguments) in _CONDSTORE:
            self.condstore = _CONDSTORE[type(command.arguments)](command.arguments)
        handler = _OWN.get(name)
        if handler is not None:
            return handler(self, command)
        if name == "NOOP" and not self.logged_in:
            return response.tagged(self.tag, "OK", "Nothing to tell before a login")
        self.command = command
        return self.wait(COMMAND)

    def _words(self, kinds: bytes, values: list[bytes]) -> Words:
        return Words(kinds, values, self.utf8, self.utf8_accept, self.qresync)

    def _unknown(self, words: Words) -> bool:
        """Whether the command is none of ours: the second word."""
        words.at = 2
        try:
            return words.keyword("a command") not in {"UID", *VERBS}
        except (Refused, IndexError):
            return True

    def _begin(self, words: Words) -> tuple[Verb, str]:
        """The row and name of a command, `words` going on behind it. Raises Refused."""
        self.tag = "*"
        self.tag = words.tag()
        words.space()
        name = words.keyword("a command")
        if name == "UID":
            words.space()
            name = f"UID {words.keyword('a command of UIDs')}"
        verb = VERBS.get(name)
        if verb is None:
            words.reject("expected a command")
        return self._allowed(verb), name

    def _allowed(self, verb: Verb) -> Verb:
        """The verb; Refused in a state that does not allow it."""
        now = SELECTED if self.selected else AUTHENTICATED if self.logged_in else CLEAR
        if not verb.states & now:
            if now == CLEAR:
                raise Refused("Log in first")
            raise Refused("Already logged in" if verb.states == CLEAR else "No mailbox is selected")
        if verb.alters and self.read_only:
            raise Refused("The mailbox is selected read-only", "NO", response.READ_ONLY)
        return verb

    def _refused(self, refused: Refused) -> bytes:
        """The command under way is refused; an APPEND of which the caller has messages, when it has forgotten them."""
        if not self.appending:
            return self._dropped(refused) if self.parser.mode == _HOLDING else self.said(refused)
        self.append = None
        self.refusal = refused
        return self.wait(CANCELLED)

    def _bad(self, event: tuple[Any, ...]) -> bytes:
        """A command that is none, or was refused."""
        why, start = event[1], event[2]
        if self.exchange is not None:
            return self.refuse_login(b"501 5.5.2 Line too long\r\n" if why == _TOO_LONG else b"501 5.5.2 Not base64\r\n")
        refusal, self.refusal = self.refusal, None
        if self.state == IDLE and why != _ENDLESS:
            return self._idle_over(False)
        match = _TAG.match(start)
        self.tag = match[1].decode() if match else "*"
        refused = refusal or Refused(_BAD_COMMANDS[why])
        if why == _ENDLESS:
            said = self.said(refused)
            self.close()
            return said + response.bye(_BAD_COMMANDS[_ENDLESS])
        if not self.logged_in and refusal is None and OTHERS.match(start):
            return self.reject_protocol()
        return self._refused(refused)

    def _literal(self, event: tuple[Any, ...]) -> bytes:
        """A literal is announced."""
        octets, plus, binary, kinds, values = event[1:]
        if self.state == IDLE:
            self.parser.refuse()
            return b""
        words = self._words(kinds, values)
        try:
            name = self._begin(words)[1]
            self.append = imap_grammar.append(words, octets, plus, binary) if name == "APPEND" else None
            self._admit(octets)
        except Refused as refused:
            return self._refused(refused)
        if self.append is not None:
            return self.wait(LITERAL)
        self.parser.collect()
        return b"" if plus else response.continuation(b"Ready for the literal")

    def _admit(self, octets: int) -> None:
        """Raises Refused for a literal that is too large, and for a message that is empty."""
        if self.append is None:
            if not self.parser.fits() or (not self.logged_in and octets > FIRST_LITERAL):
                raise Refused("The literal is too large")
        elif octets > self.append_limit:
            raise Refused(f"The message is larger than {self.append_limit} octets", "NO", response.TOOBIG)
        elif not octets:
            raise Refused("The message is empty: APPEND is cancelled (RFC 3502 6.3.11)", "NO", response.CANNOT)

    def _piece(self, event: tuple[Any, ...]) -> bytes:
        self.pieces.append(event[1])
        return b""

    def _message_over(self, event: tuple[Any, ...]) -> bytes:
        return self.wait(APPENDED)

    def _response(self, event: tuple[Any, ...]) -> bytes:
        """A response in AUTHENTICATE."""
        assert self.exchange is not None
        return self.exchanged(self.exchange.respond(event[1].strip()))

    def _idle_over(self, done: bool) -> bytes:
        """IDLE ends: by DONE, or by anything else, which is not executed (RFC 9051 6.3.13)."""
        if done:
            return self.wait(COMMAND)
        assert self.command is not None
        self.tag, self.command = self.command.tag, None
        self.state = COMMANDS
        return self.said(Refused("expected DONE"))

    # Commands that the session answers itself

    def _capability(self, command: Command) -> bytes:
        return response.capability(self.capabilities()) + response.tagged(self.tag, "OK", "That is all")

    def _logout(self, command: Command) -> bytes:
        self.parting = True
        self.close()
        return response.bye("Logging out") + response.tagged(self.tag, "OK", "Bye")

    def _id(self, command: Command) -> bytes:
        assert isinstance(command.arguments, Id)
        self.client = command.arguments.fields
        return response.identity({"name": "relaymta"}) + response.tagged(self.tag, "OK", "Pleased to meet you")

    def _enable(self, command: Command) -> bytes:
        assert isinstance(command.arguments, Enable)
        offered = [ENABLED[name] for name in command.arguments.capabilities if name in ENABLED]
        names = [name for name in dict.fromkeys(offered) if name not in self.hide]
        self.rev2 = self.rev2 or "IMAP4rev2" in names
        self.utf8_accept = self.utf8_accept or "UTF8=ACCEPT" in names
        self.qresync = self.qresync or "QRESYNC" in names
        self.condstore = self.condstore or self.qresync or "CONDSTORE" in names
        return response.enabled(names) + response.tagged(self.tag, "OK", "Enabled" if names else "Nothing to enable")

    def _idle(self, command: Command) -> bytes:
        self.command = command
        self.state = IDLE
        return response.continuation(b"idling")

    def _starttls(self, command: Command) -> bytes:
        if self.secure:
            return self.said(Refused("TLS is already active"))
        if not self.offers.starttls:
            return self.said(Refused("STARTTLS is not offered"))
        if self.waiting():  # command injection: sent in the clear, to be processed as if it came by TLS
            self.close()
            said = "Commands behind STARTTLS were sent without TLS"
            return response.tagged(self.tag, "BAD", said) + response.bye(said)
        self.wait(TLS)
        return response.tagged(self.tag, "OK", "Begin TLS negotiation now")

    def _login_refusal(self) -> bytes | None:
        """The response to a login that is not allowed on this connection."""
        if not self.offers.mechanisms:
            return response.tagged(self.tag, "NO", "Logins are not possible here", response.CANNOT)
        if self.may_log_in:
            return None
        if self.offers.starttls:
            return response.tagged(self.tag, "NO", "Encryption required: issue STARTTLS first", response.PRIVACYREQUIRED)
        return response.tagged(self.tag, "NO", "TLS is required and temporarily not available", response.UNAVAILABLE)

    def _login(self, command: Command) -> bytes:
        assert isinstance(command.arguments, Login)
        refused = self._login_refusal()
        if refused is None and "PLAIN" not in self.offers.mechanisms:
            refused = response.tagged(self.tag, "NO", "LOGIN is not offered; use AUTHENTICATE", response.CANNOT)
        if refused is not None:
            return self.error(refused)
        return self.exchanged(Password(command.arguments.user, command.arguments.password))

    def _authenticate(self, command: Command) -> bytes:
        arguments = command.arguments
        assert isinstance(arguments, Authenticate)
        refused = self._login_refusal()
        if refused is None and arguments.mechanism not in self.offers.mechanisms:
            refused = response.tagged(self.tag, "NO", "Authentication mechanism not offered", response.CANNOT)
        if refused is not None:
            return self.error(refused)
        self.exchange = AuthExchange(arguments.mechanism, self.keys)
        return self.exchanged(self.exchange.begin([] if arguments.initial is None else [arguments.initial]))


# Whether a command enables CONDSTORE (RFC 7162 3.1)
_CONDSTORE: dict[type, Callable[[Any], bool]] = {
    Select: lambda arguments: arguments.condstore,
    Status: lambda arguments: "HIGHESTMODSEQ" in arguments.items,
    List: lambda arguments: "HIGHESTMODSEQ" in arguments.status,
    Fetch: lambda arguments: "MODSEQ" in arguments.items,
    Store: lambda arguments: arguments.unchanged_since is not None,
    Search: lambda arguments: arguments.modseq,
    Sort: lambda arguments: arguments.modseq,
    Thread: lambda arguments: arguments.modseq,
}
_EVENTS: dict[int, Callable[[ServerSession, tuple[Any, ...]], bytes]] = {
    0: ServerSession._whole,
    _BAD: ServerSession._bad,
    _LITERAL: ServerSession._literal,
    _PIECE: ServerSession._piece,
    _END: ServerSession._message_over,
    _LINE: ServerSession._response,
}
_OWN: dict[str, Callable[[ServerSession, Command], bytes]] = {
    "CAPABILITY": ServerSession._capability,
    "LOGOUT": ServerSession._logout,
    "ID": ServerSession._id,
    "ENABLE": ServerSession._enable,
    "IDLE": ServerSession._idle,
    "STARTTLS": ServerSession._starttls,
    "LOGIN": ServerSession._login,
    "AUTHENTICATE": ServerSession._authenticate,
}
