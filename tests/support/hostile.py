"""Hostile clients, many at once, in one thread: each takes one step at every `tick`."""

import contextlib
import socket
import ssl
import struct
from collections.abc import Callable

EHLO = b"EHLO hostile.example\r\n"
FLOOD = EHLO * 8192
ENVELOPE = EHLO + b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"
LARGE = b"Subject: large\r\n\r\n" + b"never to be delivered to anybody\r\n" * 60_000


class Crowd:
    """So many (`counts`) of each kind at the ports of a plain, a TLS and a PROXY listener. `lmtp`: the user of local.example to
    whom they deliver by LMTP."""

    def __init__(self, counts: dict[str, int], plain: int, implicit: int = 0, proxy: int = 0, lmtp: str = "") -> None:
        self._flood, self._envelope = FLOOD, ENVELOPE
        if lmtp:
            self._flood = FLOOD.replace(b"EHLO", b"LHLO")
            self._envelope = ENVELOPE.replace(b"EHLO", b"LHLO").replace(b"c@d.example", f"{lmtp}@local.example".encode())
        self._plain, self._implicit, self._proxy = plain, implicit, proxy
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        kinds: dict[str, Callable[[], Callable[[], object]]] = {
            "do not read": self._silent, "do not read, by TLS": self._silent_by_tls, "read an octet a second": self._dripping,
            "half-close": self._half_closing, "reset": self._resetting, "stop in message data": self._in_data,
            "stop in the PROXY header": self._in_proxy, "stop in the handshake": self._in_handshake, "speak HTTP": self._http,
        }  # fmt: skip
        self._open: list[socket.socket] = []
        self._ticks = [kinds[kind]() for kind, count in counts.items() for _ in range(count)]

    def tick(self) -> None:
        """One step of each client."""
        for tick in self._ticks:
            with contextlib.suppress(OSError):
                tick()

    def close(self) -> None:
        """Close all connections."""
        for sock in self._open:
            sock.close()

    def _connected(self, port: int, said: bool = True) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), 20)
        self._open.append(sock)
        if said:
            sock.recv(100)
        return sock

    def _silent(self) -> Callable[[], object]:
        sock = self._connected(self._plain)
        sock.setblocking(False)
        return lambda: [sock.send(self._flood) for _ in range(20)]

    def _silent_by_tls(self) -> Callable[[], object]:
        sock = self._context.wrap_socket(self._connected(self._implicit, said=False))
        self._open.append(sock)
        sock.recv(100)
        sock.setblocking(False)
        return lambda: [sock.send(self._flood[:16_000]) for _ in range(200)]

    def _dripping(self) -> Callable[[], object]:
        sock = self._connected(self._plain)
        sock.setblocking(False)

        def tick() -> None:
            with contextlib.suppress(BlockingIOError):
                sock.send(self._flood)
            sock.recv(1)

        return tick

    def _half_closing(self) -> Callable[[], object]:
        sock = self._connected(self._plain)
        sock.setblocking(False)
        sock.send(self._flood[:100_000])
        sock.shutdown(socket.SHUT_WR)
        return lambda: None

    def _resetting(self) -> Callable[[], object]:
        def tick() -> None:
            sock = socket.create_connection(("127.0.0.1", self._plain), 20)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.recv(100)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.send(self._envelope + b"BDAT %d\r\n" % len(LARGE) + LARGE[:-1])
            sock.close()

        return tick

    def _in_data(self) -> Callable[[], object]:
        sock = self._connected(self._plain)
        sock.sendall(self._envelope + b"BDAT %d\r\n" % len(LARGE))
        rest = memoryview(LARGE)[:-1]
        sock.setblocking(False)

        def tick() -> None:
            nonlocal rest
            rest = rest[sock.send(rest) :]

        return tick

    def _in_proxy(self) -> Callable[[], object]:
        self._connected(self._proxy, said=False).sendall(b"PROXY TCP4 192.0.2.1 ")
        return lambda: None

    def _in_handshake(self) -> Callable[[], object]:
        self._connected(self._implicit, said=False)
        return lambda: None

    def _http(self) -> Callable[[], object]:
        def tick() -> None:
            with socket.create_connection(("127.0.0.1", self._plain), 20) as sock:
                sock.recv(100)
                body = self._envelope + b"BDAT 2 LAST\r\nhi"
                sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                sock.recv(100)

        return tick
