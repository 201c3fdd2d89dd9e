"""The command line's end of the connection to the supervisor. Blocks; needs no event loop."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relaymta.control.frames import UNSET, Broken, Frame, Frames, Refused, pack
from relaymta.control.requests import REQUESTS

__all__ = ["Asked", "ask", "begin"]

_OCTETS = 1 << 18  # of one read


class Asked:
    """A request that was sent to the daemon. Call it, or read its `pieces`, once. `missing`: as in `Answer`, when that has
    ended."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._value: Any = None
        self.missing: list[int] = []

    def __call__(self) -> Any:
        """The answer; a list that comes in pieces is put together. Blocks; OSError when the daemon goes away or is late, Refused
        with its sentence."""
        rows: list[Any] = []
        for piece in self.pieces():
            rows.extend(piece)
        return rows or self._value

    def pieces(self) -> Iterator[Any]:
        """The pieces of an answer that comes in pieces, as they arrive. Errors as of a call."""
        with self._socket as sock:
            frames = Frames()
            while data := sock.recv(_OCTETS):
                for frame in frames.feed(data):
                    if isinstance(frame, Broken):
                        raise Refused(frame.why)
                    if frame.error is not None:
                        raise Refused(frame.error, frame.absent)
                    if frame.piece is UNSET:
                        self._value, self.missing = frame.ok, frame.missing
                        return
                    yield frame.piece
        raise ConnectionError("the daemon closed the connection")


def begin(path: Path, op: str, by: tuple[str, str] | None = None, /, **args: Any) -> Asked:
    """Send a request to the daemon's control socket. `by`: on whose behalf (who, and from where). Blocks; OSError when there is
    no daemon, RelayError when the request cannot be sent."""
    row = REQUESTS.get(op)
    data = pack(Frame(1, op, args, by=list(by or ())))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(60 if row is None else row.patience)
        sock.connect(str(path))
        sock.sendall(data)
    except BaseException:
        sock.close()
        raise
    return Asked(sock)


def ask(path: Path, op: str, /, **args: Any) -> Any:
    """The daemon's answer to a request. Errors as of `begin` and of a call of `Asked`."""
    return begin(path, op, **args)()
