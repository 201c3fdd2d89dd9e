"""A small IMAP client for tests: what it says goes out by any function, and every octet of a server's passes the grammar."""

import re
import socket
from collections.abc import Callable
from typing import NamedTuple

from tests.support.imap_grammar import Response, responses

__all__ = ["Answer", "Client", "over_socket"]

_LITERAL = re.compile(rb"\{([0-9]+)\}\r\n\Z")


class Answer(NamedTuple):
    """What came until the end of a command: untagged responses, and the tagged one (or "+", or BYE at the end of the
    connection)."""

    untagged: list[Response]
    last: Response

    @property
    def status(self) -> str:
        return self.last.name

    @property
    def code(self) -> str:
        return self.last.code[0] if self.last.code else ""

    def named(self, name: str) -> list[Response]:
        """The untagged responses of this name."""
        return [one for one in self.untagged if one.name == name]

    @property
    def names(self) -> list[str]:
        """The names of the untagged responses, in order."""
        return [one.name for one in self.untagged]


class Client:
    """`send(octets)` gives octets to the server, `receive()` waits for some of its octets: b"" at the end."""

    def __init__(self, send: Callable[[bytes], object], receive: Callable[[], bytes]) -> None:
        self._send, self._receive = send, receive
        self._rest = b""
        self._count = 0
        self.utf8 = self.rev2 = False
        self.said: list[Response] = []  # all of it

    def greeting(self) -> Response:
        """The first response."""
        return self.response()

    def response(self) -> Response:
        """The next response."""
        end = self._end()
        (found,) = responses(self._rest[:end], self.utf8, self.rev2)
        self._rest = self._rest[end:]
        self.said.append(found)
        if found.name == "ENABLED":
            self.rev2 = self.rev2 or "IMAP4rev2" in found.data
            self.utf8 = self.utf8 or self.rev2 or "UTF8=ACCEPT" in found.data
        return found

    def octets(self) -> bytes:
        """The next response as it was said; it has passed the grammar."""
        end = self._end()
        found = self._rest[:end]
        self.response()
        return found

    def _end(self) -> int:
        """Where the next response ends, with its literals."""
        at = 0
        while True:
            line = self._rest.find(b"\n", at)
            if line >= 0:
                literal = _LITERAL.search(self._rest, at, line + 1)
                if literal is None:
                    return line + 1
                at = line + 1 + int(literal[1])
                continue
            more = self._receive()
            if not more:
                raise EOFError(f"the server has closed the connection; left: {self._rest!r}")
            self._rest += more

    def start(self, command: str | bytes) -> str:
        """Send a command without waiting for its end: its tag."""
        self._count += 1
        tag = f"a{self._count}"
        self._send(tag.encode() + b" " + (command.encode() if isinstance(command, str) else command) + b"\r\n")
        return tag

    def send(self, octets: bytes) -> None:
        """Send anything."""
        self._send(octets)

    def finish(self, tag: str) -> Answer:
        """All until the end of that command, or until `+`."""
        untagged: list[Response] = []
        while True:
            found = self.response()
            if found.tag in (tag, "+"):
                return Answer(untagged, found)
            if found.tag != "*":
                raise AssertionError(f"the end of another command: {found}")
            untagged.append(found)

    def command(self, command: str | bytes) -> Answer:
        """Send a command, and wait for its end."""
        return self.finish(self.start(command))

    def ok(self, command: str | bytes) -> Answer:
        """As `command`; it has to be OK."""
        answer = self.command(command)
        assert answer.status == "OK", answer
        return answer

    def append(self, name: str, message: bytes, arguments: str = "", plus: bool = False) -> Answer:
        """APPEND of a message; `arguments`: flags and date."""
        announced = f"APPEND {name}{arguments and ' '}{arguments} {{{len(message)}{'+' if plus else ''}}}".encode()
        if plus:
            return self.command(announced + b"\r\n" + message)
        tag = self.start(announced)
        answer = self.finish(tag)
        if answer.last.tag != "+":
            return answer
        self._send(message + b"\r\n")
        return self.finish(tag)


def over_socket(sock: socket.socket) -> Client:
    """A client of this connection."""
    return Client(sock.sendall, lambda: sock.recv(65536))
