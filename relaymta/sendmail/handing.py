"""Handing a message to the relay, by SMTP over its socket."""

import os
from _socket import AF_UNIX, SO_RCVTIMEO, SO_SNDTIMEO, SOCK_STREAM, SOL_SOCKET, socket  # `socket` imports 10 ms more
from sys import byteorder

from relaymta.sendmail.message import Envelope
from relaymta.sendmail.options import Options
from relaymta.sendmail.standard import say
from relaymta.sendmail.status import DATA, NO_PERMISSION, OK, Stop

__all__ = ["NotNow", "connected", "hand_over", "lines"]

SECONDS = 300  # for the relay to answer: filters may take their time
CONNECTING_SECONDS = 10
PIECE = 65536
LONGEST = 65536  # octets of a reply
TOO_MANY = 452, "4.5.3"  # at RCPT: this transaction takes no more recipients
CLOSING = 421


class NotNow(Exception):
    """The relay is not there, or takes no mail now: str() says why. Nothing was taken for the recipients that the envelope has,
    or it is not known that it was. `status`: that of the program, if the message is kept for them."""

    status = OK


class _Relay:
    """The connection: commands and their replies."""

    def __init__(self, path: str, verbose: bool) -> None:
        self._socket = connected(path)
        self._rest = b""
        self._verbose = verbose

    def reply(self) -> tuple[int, str]:
        """The (code, text) of the next reply. NotNow: there is none."""
        texts: list[bytes] = []
        while True:
            line, end, rest = self._rest.partition(b"\r\n")
            if not end:
                if len(self._rest) > LONGEST:
                    raise NotNow("the relay does not speak SMTP")
                piece = self._socket.recv(PIECE)
                if not piece:
                    raise NotNow("the relay has closed the connection")
                self._rest += piece
                continue
            self._rest = rest
            texts.append(line[4:])
            if line[3:4] != b"-":
                if not line[:3].isdigit():
                    raise NotNow("the relay does not speak SMTP")
                text = b"\n".join(texts).decode("utf-8", "replace")
                if self._verbose:
                    say(text, f"<<< {line[:3].decode()} ")
                return int(line[:3]), text

    def ask(self, line: bytes, more: bytes = b"") -> tuple[int, str]:
        """Send a command, and `more` behind it; its reply."""
        if self._verbose:
            say(line.decode("utf-8", "replace"), ">>> ")
        try:
            self._socket.sendall(line + b"\r\n")
            if more:
                self._socket.sendall(more)
        except (BrokenPipeError, ConnectionResetError):  # it may have said why
            pass
        return self.reply()

    def expect(self, answer: tuple[int, str]) -> str:
        """The text of a positive reply. NotNow: it is none."""
        code, text = answer
        if code >= 300:
            raise NotNow(f"{code} {text}")
        return text

    def quit(self) -> None:
        """Take leave."""
        try:
            self._socket.sendall(b"QUIT\r\n")
        except OSError:
            pass
        self._socket.close()


def connected(path: str) -> socket:
    """A socket to the relay. NotNow: nobody answers there."""
    sock = socket(AF_UNIX, SOCK_STREAM)
    try:
        # Not `settimeout`: a connection that has to wait for a place in the backlog would fail at once.
        _wait(sock, SO_SNDTIMEO, CONNECTING_SECONDS)
        sock.connect(path)
        _wait(sock, SO_SNDTIMEO, SECONDS)
        _wait(sock, SO_RCVTIMEO, SECONDS)
    except OSError as error:
        sock.close()
        raise NotNow(f"{path}: {error.strerror or error}") from None
    return sock


def _wait(sock: socket, option: int, seconds: int) -> None:
    """How long a call may wait (a timeval, socket(7))."""
    sock.setsockopt(SOL_SOCKET, option, seconds.to_bytes(8, byteorder) + bytes(8))


def lines(envelope: Envelope, options: Options, offered: set[str]) -> list[bytes]:
    """The commands MAIL and RCPT. `offered`: extensions of the relay."""
    mail = b"MAIL FROM:<" + envelope.sender + b"> SIZE=%d" % len(envelope.data)
    if not envelope.data.isascii() and options.eight_bit is not False:
        mail += b" BODY=8BITMIME"
    if not all(map(bytes.isascii, (envelope.sender, *envelope.recipients))):
        mail += b" SMTPUTF8"
    rcpt = b""
    if "DSN" in offered:  # RFC 3461
        if options.ret:
            mail += b" RET=" + options.ret.encode()
        if options.envid:
            mail += b" ENVID=" + b"".join(_xtext(one) for one in options.envid.encode())
        if options.notify:
            rcpt = b" NOTIFY=" + options.notify.encode()
    return [mail, *(b"RCPT TO:<" + one + b">" + rcpt for one in envelope.recipients)]


def _xtext(octet: int) -> bytes:
    return b"+%02X" % octet if octet in b"+= " else bytes((octet,))


def hand_over(path: str, envelope: Envelope, options: Options) -> int:
    """Hand a message over. The exit status: it is in the queue for all recipients, or (DATA) for those that are not named on
    standard error. Those who have it are taken out of `envelope.recipients`, so that after NotNow it is to be kept for the rest:
    it is not in the queue for them, or nobody knows. A recipient that is refused for now keeps nobody else waiting. Stop: it is
    refused."""
    try:
        return _handed_over(_Relay(path, options.verbose), envelope, options)
    except OSError as error:
        raise NotNow(f"the connection to the relay was lost: {error.strerror or error}") from None


def _handed_over(relay: _Relay, envelope: Envelope, options: Options) -> int:
    relay.expect(relay.reply())
    offers = relay.expect(relay.ask(b"EHLO " + os.fsencode(os.uname().nodename or "localhost")))
    mail, *rcpts = lines(envelope, options, {line.partition(" ")[0].upper() for line in offers.split("\n")[1:]})
    naming = _Naming(list(zip(rcpts, envelope.recipients, strict=True)))
    while naming.rest:  # a message may have more recipients than one transaction takes (RFC 5321 4.5.3.1.10)
        try:
            _positive(relay, relay.ask(mail))
            taken = naming.takes(relay)
            if taken:
                _positive(relay, relay.ask(b"BDAT %d LAST" % len(envelope.data), envelope.data))
        except Stop as error:
            if not envelope.is_partial:
                raise
            naming.refuse_rest(str(error))  # others have it: those who do not are named
            break
        if taken:
            naming.named = []
            envelope.recipients, envelope.is_partial = naming.without_it, True
        elif len(naming.refused) == len(rcpts):
            relay.quit()
            raise Stop(DATA, "\n".join(naming.refused.values()))
    relay.quit()
    if naming.later:
        envelope.recipients = list(naming.later)
    for sentence in naming.refused.values():
        say(sentence)
    status = DATA if naming.refused else OK
    if naming.later:
        waits = NotNow(next(iter(naming.later.values())))
        waits.status = status
        raise waits
    return status


def _positive(relay: _Relay, answer: tuple[int, str]) -> None:
    """Stop: the message is refused; NotNow: it is for now."""
    code, text = answer
    if code >= 500:
        raise Stop(NO_PERMISSION if text.startswith("5.7.") else DATA, text)
    relay.expect(answer)


class _Naming:
    """What comes of the recipients of a message. `rest`: those that are to be named, each behind its command; `named`: those that
    the transaction under way has taken; `refused`, and `later` (for now): why."""

    def __init__(self, rest: list[tuple[bytes, bytes]]) -> None:
        self.rest = rest
        self.named: list[bytes] = []
        self.refused: dict[bytes, str] = {}
        self.later: dict[bytes, str] = {}

    @property
    def without_it(self) -> list[bytes]:
        """Those who do not have the message."""
        return [*self.refused, *self.later, *(recipient for _, recipient in self.rest)]

    def refuse_rest(self, text: str) -> None:
        """The message is refused for those who were not named yet, or in vain."""
        for recipient in (*self.named, *(recipient for _, recipient in self.rest)):
            self.refused[recipient] = f"{recipient.decode('utf-8', 'replace')}: {text}"
        self.rest = []

    def takes(self, relay: _Relay) -> bool:
        """Name them until the relay takes no more in one transaction. Whether it has taken one."""
        self.named = []
        for at, (rcpt, recipient) in enumerate(self.rest):
            code, text = relay.ask(rcpt)
            if self.named and (code, text[:5]) == TOO_MANY:
                self.rest = self.rest[at:]
                return True
            if code == CLOSING:
                relay.expect((code, text))
            if code >= 500:
                self.refused[recipient] = f"{recipient.decode('utf-8', 'replace')}: {text}"
            elif code >= 300:
                self.later[recipient] = f"{code} {text}"
            else:
                self.named.append(recipient)
        self.rest = []
        return bool(self.named)
