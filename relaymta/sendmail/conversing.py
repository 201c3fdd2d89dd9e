"""sendmail -bs: SMTP on standard input and output, which is that of the relay's socket.

A program may write the whole dialogue at once, with line feeds alone: each command is passed on when the one before has been
answered, and every line with CRLF, since the relay takes neither commands before their time nor bare line feeds."""

from select import POLLIN, poll

from relaymta.sendmail.handing import PIECE, connected
from relaymta.sendmail.standard import INPUT, OUTPUT, piece, put
from relaymta.sendmail.status import OK, TEMPFAIL

__all__ = ["converse"]


def converse(path: str) -> int:
    """Hold the dialogue. The exit status: OK if it ended with a QUIT that was answered, else TEMPFAIL. NotNow: nobody answers
    there."""
    dialogue = _Dialogue(path)
    try:
        return OK if dialogue.is_held() else TEMPFAIL
    except OSError:  # the program reads no more, or the relay is gone
        return TEMPFAIL


class _Dialogue:
    """Between the program and the relay. All methods: OSError: one of them is gone."""

    def __init__(self, path: str) -> None:
        self._socket = connected(path)
        self._given = bytearray()  # by the program, and not yet passed on
        self._unsent = False
        self._said = b""  # by the relay, passed on, and not yet seen as a reply
        self._waiting = poll()
        for one in (INPUT, self._socket.fileno()):
            self._waiting.register(one, POLLIN)

    def is_held(self) -> bool:
        """Pass all on. Whether the program took leave; else standard input has ended, or a message that it has not waited with
        was not sent."""
        self._reply()
        while line := self._line():
            words = line.upper().split() or [b""]
            self._send(_ended(line))
            if words[0] == b"BDAT":
                self._chunk(words[1:])
            code = self._reply()
            if code == b"354":
                self._data()
                self._reply()
            elif words[0] == b"DATA" and self._given:  # the program has not waited: what follows is a message, and no commands
                self._unsent = True
                while (line := self._line()) and _ended(line) != b".\r\n":
                    pass
            elif code == b"221" and words[0] == b"QUIT":
                return not self._unsent
        return False

    def _line(self) -> bytes:
        """The next line of the program, the last one perhaps without its end; empty: there is none."""
        begin = 0
        while not (end := self._given.find(b"\n", begin) + 1):
            begin = len(self._given)
            if not self._takes():
                end = begin
                break
        line = bytes(self._given[:end])
        del self._given[:end]
        return line

    def _takes(self) -> bool:
        """Whether the program has given more. What the relay says meanwhile (421) is passed on."""
        while True:
            ready = [descriptor for descriptor, _ in self._waiting.poll()]
            if self._socket.fileno() in ready:
                self._hear()
            elif data := piece(INPUT, PIECE):
                self._given += data
                return True
            else:
                return False

    def _data(self) -> None:
        """Pass a message on, up to its line of a single dot. Of one that is not complete the relay never gets the end."""
        gathered = bytearray()
        while (line := self._line()).endswith(b"\n"):
            line = _ended(line)
            gathered += line
            if line == b".\r\n":
                return self._send(bytes(gathered))
            if len(gathered) >= PIECE:
                self._send(bytes(gathered))
                gathered.clear()
        raise ConnectionAbortedError  # the message is not complete

    def _chunk(self, words: list[bytes]) -> None:
        """Pass on what follows BDAT (RFC 3030), as it is."""
        rest = int(words[0]) if words and words[0].isdigit() and len(words[0]) < 19 else 0
        while rest:
            if not self._given and not self._takes():
                raise ConnectionAbortedError  # the message is not complete
            now = bytes(self._given[:rest])
            del self._given[: len(now)]
            rest -= len(now)
            self._send(now)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):  # it may have said why
            pass

    def _reply(self) -> bytes:
        """Wait until the relay has replied; the code."""
        while True:
            line, end, rest = self._said.partition(b"\r\n")
            if not end:
                self._hear()
                continue
            self._said = rest
            if line[3:4] != b"-":
                return line[:3]

    def _hear(self) -> None:
        """Pass on what the relay says."""
        data = self._socket.recv(PIECE)
        if not data:
            raise ConnectionResetError
        put(OUTPUT, data)
        self._said += data


def _ended(line: bytes) -> bytes:
    """A line with CRLF."""
    return line.rstrip(b"\r\n") + b"\r\n"
