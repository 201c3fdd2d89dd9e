"""A scripted peer: a thread with a listening socket that replies by its rules, and misbehaves on request."""

import base64
import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

DEFAULT = {
    "EHLO": b"250-fake\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 0\r\n",
    "MAIL": b"250 2.1.0 ok\r\n",
    "RCPT": b"250 2.1.5 ok\r\n",
    "DATA": b"354 go\r\n",
    "DOT": b"250 2.0.0 taken\r\n",
    "RSET": b"250 2.0.0 ok\r\n",
    "QUIT": b"221 2.0.0 bye\r\n",
}
CLOSE, RESET, SILENT = "close", "reset", "silent"
TCP_ESTABLISHED = 1  # the first octet of struct tcp_info


def _established(sock: socket.socket) -> bool:
    """Whether neither side has closed a connection: the kernel's knowledge, since the thread that serves it may be late."""
    try:
        return sock.family == socket.AF_UNIX or sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_ESTABLISHED
    except OSError:
        return False


class FakeMx:
    """`rules[verb]`: a reply; a dict from address to reply; a list used up one by one; or CLOSE, RESET, SILENT. Anything
    not named is answered as a good server does. `drip`: replies are sent octet by octet. `slow`: seconds before
    the banner."""

    def __init__(
        self,
        rules: dict[str, Any],
        port: int = 0,
        drip: bool = False,
        banner: bytes = b"220 fake ESMTP\r\n",
        tls: ssl.SSLContext | None = None,
        slow: float = 0,
        host: str = "127.0.0.1",
        path: str = "",
        lmtp: bool = False,
        auth: tuple[bytes, Callable[[bytes], bytes]] | None = None,
    ) -> None:
        """`path`: a unix socket; `lmtp`: it speaks LMTP; `auth`: the one mechanism it offers, and its answer to each line."""
        self.lmtp = lmtp
        self.auth = auth
        self.clients: list[str] = []
        self.greetings: list[str] = []
        self.slow = slow
        self.tls = tls
        self.credentials: list[bytes] = []
        self.rules = rules
        self.drip = drip
        self.banner = banner
        self.messages: list[tuple[str, list[str], bytes]] = []
        self.commands: list[str] = []
        self.mails: list[str] = []  # each MAIL, with its parameters
        self.resumed: list[bool] = []  # of each connection with TLS
        self.certificates: list[dict[str, Any]] = []  # the clients', where `tls` asks for them
        self.connections = self.most_open = 0
        self.patience = 0.0  # seconds in which a client may close other connections, until it has one more than ever
        if path:
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(path)
            self._server.listen()
            self.port = 0
        else:
            self._server = socket.create_server((host, port))
            self.port = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "FakeMx":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # so that accept() returns and the port is free
        self._server.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # a file made of it holds it open
            sock.close()

    @property
    def now_open(self) -> int:
        """The connections that neither side has closed."""
        return sum(map(_established, self._open))

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._server.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(sock)
            until = time.monotonic() + self.patience
            while self.now_open > self.most_open and time.monotonic() < until:
                time.sleep(0.005)
            self.most_open = max(self.most_open, self.now_open)
            if address:
                self.clients.append(address[0])
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            time.sleep(self.slow)
            self._talk(sock)
        except OSError:
            pass
        finally:
            sock.close()

    def _rule(self, verb: str, argument: str = "") -> Any:
        rule = self.rules.get(verb)
        if isinstance(rule, dict):
            rule = rule.get(argument)
        elif isinstance(rule, list):
            rule = rule.pop(0) if rule else None
        return DEFAULT.get(verb, b"250 2.0.0 ok\r\n") if rule is None else rule

    def _say(self, sock: socket.socket, answer: Any) -> bool:
        """Send a reply or misbehave; whether the connection goes on."""
        if answer == SILENT:
            time.sleep(30)
            return False
        if answer == RESET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if answer in (CLOSE, RESET):
            sock.close()
            return False
        for piece in [answer[i : i + 1] for i in range(len(answer))] if self.drip else [answer]:
            sock.sendall(piece)
            if self.drip:
                time.sleep(0.001)
        return not answer.startswith(b"421")

    def _talk(self, sock: socket.socket) -> None:
        if not self._say(sock, self.banner):
            return
        file = sock.makefile("rb")
        sender, greeted = "", False
        recipients: list[str] = []
        while line := file.readline():
            verb = line[:4].decode("latin-1").upper().strip()
            argument = line.partition(b"<")[2].partition(b">")[0].decode("utf-8", "replace")
            self.commands.append(verb)
            if verb in ("EHLO", "LHLO"):
                self.greetings.append(line.split()[1].decode())
            if verb == "LHLO" and self.lmtp:
                sock.sendall(DEFAULT["EHLO"])
                continue
            if verb == "EHLO" and self.tls is not None and "EHLO" not in self.rules:
                secure = isinstance(sock, ssl.SSLSocket)
                offer = b"250-AUTH PLAIN LOGIN\r\n" if self.auth is None else b"250-AUTH " + self.auth[0] + b"\r\n"
                offer = offer if secure else b"250-STARTTLS\r\n"
                sock.sendall(b"250-fake\r\n" + offer + b"250-8BITMIME\r\n250 PIPELINING\r\n")
                continue
            if verb == "STAR" and self.tls is not None:
                sock.sendall(b"220 2.0.0 go\r\n")
                sock = self.tls.wrap_socket(sock, server_side=True)
                self._open.append(sock)
                self.resumed.append(bool(sock.session_reused))
                self.certificates.append(dict(sock.getpeercert() or {}))
                file = sock.makefile("rb")
                continue
            if verb == "AUTH" and self.auth is not None:
                while (answer := self.auth[1](line)).startswith(b"334"):
                    sock.sendall(answer)
                    line = file.readline()
                sock.sendall(answer)
                continue
            if verb == "AUTH":
                self.credentials.append(base64.b64decode(line.split()[2]))
                sock.sendall(b"235 2.7.0 welcome\r\n")
                continue
            if verb == "BDAT":
                message = file.read(int(line.split()[1]))
                if recipients:
                    self.messages.append((sender, recipients, message))
                sock.sendall(self._rule("DOT") if recipients else b"503 5.5.1 no recipients\r\n")
                continue
            answer = self._rule(verb, argument)
            if verb == "MAIL":
                self.mails.append(line.decode().strip())
                sender, recipients = argument, []
                greeted = isinstance(answer, bytes) and answer.startswith(b"2")
            if verb == "RCPT" and not greeted:
                answer = b"503 5.5.1 MAIL first\r\n"
            if verb == "RCPT" and isinstance(answer, bytes) and answer.startswith(b"2"):
                recipients.append(argument)
            if not self._say(sock, answer):
                return
            if verb == "DATA" and answer.startswith(b"354"):
                lines = list[bytes]()
                while (line := file.readline()) != b".\r\n":
                    if not line:
                        return
                    lines.append(line[1:] if line.startswith(b".") else line)
                message = b"".join(lines)
                if self.lmtp:
                    self.messages.append((sender, recipients, message))
                    for _ in recipients:
                        sock.sendall(self._rule("DOT"))
                    continue
                final = self._rule("DOT") if recipients else b"554 5.5.1 no recipients\r\n"
                if isinstance(final, bytes) and final.startswith(b"2"):
                    self.messages.append((sender, recipients, message))
                if not self._say(sock, final):
                    return
            if verb == "QUIT":
                return
