"""sendmail -bs: SMTP on standard input and output, which is that of the relay's socket."""

import os
from _thread import start_new_thread

from relaymta.sendmail.handing import PIECE, connected
from relaymta.sendmail.status import OK

__all__ = ["converse"]


def converse(path: str) -> int:
    """Pass octets on in both directions until the relay closes the connection. NotNow: nobody answers there."""
    sock = connected(path)

    def give() -> None:
        """What the program says; with its end the relay is told that no more comes."""
        try:
            while data := os.read(0, PIECE):
                sock.sendall(data)
            sock.shutdown(1)
        except OSError:
            pass

    begun = False
    try:
        while data := sock.recv(PIECE):
            while data:
                data = data[os.write(1, data) :]
            if not begun:  # who speaks before the greeting is taken for a spammer
                begun = True
                start_new_thread(give, ())
    except OSError:  # the program reads no more, or the relay is gone
        pass
    return OK
