"""A relay with mailboxes that tests reach by IMAP: users that are made in no time, sessions on the worker that is asked for."""

import os
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

from relaymta import control
from tests.support.daemon import PATIENCE, wait_for
from tests.support.imap_client import Answer, Client
from tests.support.imap_grammar import Response
from tests.support.mailboxes import Readable

__all__ = ["PASSWORD", "ImapRelay", "Session", "message"]

PASSWORD = "geheim"


class Session(Client):
    """A client of the connection `sock`, which the worker `pid` serves."""

    def __init__(self, sock: socket.socket, pid: int = 0) -> None:
        super().__init__(sock.sendall, lambda: sock.recv(1 << 16))
        self.sock = sock
        self.pid = pid

    def until(self, name: str) -> list[Response]:
        """Responses until one of this name (or tag) has come."""
        found = [self.response()]
        while name not in (found[-1].name, found[-1].tag):
            found.append(self.response())
        return found

    def idle(self) -> str:
        """IDLE has begun: its tag."""
        tag = self.start("IDLE")
        assert self.response().tag == "+"
        return tag

    def done(self, tag: str) -> Answer:
        """The end of IDLE."""
        self.send(b"DONE\r\n")
        answer = self.finish(tag)
        assert answer.status == "OK", answer
        return answer

    def fetch(self, what: str) -> dict[int, dict[str, Any]]:
        """The items that a FETCH (or UID FETCH) tells, by message number."""
        command = what if what.startswith("UID") else f"FETCH {what}"
        return {one.number or 0: one.data for one in self.ok(command).named("FETCH")}

    def flags(self) -> dict[int, set[str]]:
        """The flags of all messages, by UID, without \\Recent."""
        return {one["UID"]: set(one["FLAGS"]) - {"\\Recent"} for one in self.fetch("UID FETCH 1:* (FLAGS)").values()}

    def searched(self, keys: str | bytes) -> list[int]:
        """What SEARCH finds."""
        (found,) = self.ok(b"SEARCH " + (keys.encode() if isinstance(keys, str) else keys)).named("SEARCH")
        return list(found.data[0])

    def listed(self, command: str) -> dict[str, list[str]]:
        """The attributes that LIST or LSUB tells, by name."""
        answer = self.ok(command)
        return {one.data["name"]: one.data["attributes"] for one in answer.untagged if one.name in ("LIST", "LSUB")}

    def status(self, name: str, *items: str) -> list[Any]:
        """The values of these STATUS items."""
        (found,) = self.ok(f"STATUS {name} ({' '.join(items)})").named("STATUS")
        return [found.data[1][item] for item in items]

    def subjects(self) -> dict[int, str]:
        """The subjects of all messages, by UID."""
        found = self.fetch("UID FETCH 1:* (ENVELOPE)")
        return {one["UID"]: (one["ENVELOPE"][1] or b"").decode() for one in found.values()}

    def expunge(self, uids: str) -> None:
        """Remove these messages."""
        self.ok(f"UID STORE {uids} +FLAGS.SILENT (\\Deleted)")
        self.ok(f"UID EXPUNGE {uids}")

    def raw(self, command: str) -> bytes:
        """What the server says to a command, to its OK."""
        self.send(f"raw {command}\r\n".encode())
        said = b""
        while b"raw OK" not in said:
            said += self.sock.recv(1 << 16)
        return said

    def put(self, name: str, *subjects: str) -> list[int]:
        """APPEND a message for each of the subjects; their UIDs."""
        answers = [self.append(name, message(subject), plus=True) for subject in subjects]
        return [answer.last.code[1][1][0][0] for answer in answers if answer.last.code]

    def ended(self) -> bytes:
        """What else is read until the server has closed the connection."""
        found = self._rest
        try:
            while piece := self.sock.recv(1 << 16):
                found += piece
        except ConnectionResetError:
            pass
        return found

    def reset(self) -> None:
        """Go away as a client whose network is gone."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class ImapRelay(Readable):
    """Readable, with IMAP. `homes`: the shard of each user."""

    def __init__(self, folder: Path, *settings: str, workers: int = 2, protocols: tuple[str, ...] = ("imap",)) -> None:
        super().__init__(folder, *settings, workers=workers, protocols=protocols)
        self.homes: dict[str, int] = {}
        self._pids: list[int] = []
        self._open: list[socket.socket] = []

    def asked(self, request: str, name: str, **args: Any) -> Any:
        """The daemon's answer to a request about a user, without a process for it."""
        return control.ask(self.spool / "control.sock", request, address=f"{name}@local.example", **args)

    def user(self, name: str, password: str = PASSWORD, octets: int = 0, messages: int = 0) -> None:
        made = self.asked("mailbox_create", name, password=password, octets=octets, messages=messages)
        self.homes[name] = made["shard"]

    def quota(self, name: str, octets: int = -1, messages: int = -1) -> None:
        """Set a user's quota (-1: any)."""
        self.asked("mailbox_change", name, changes={"octets": octets, "messages": messages})

    def connect(self, place: str = "imap") -> Session:
        """A connection to a listener (a key of `ports`), before the greeting."""
        sock = socket.create_connection(("127.0.0.1", self.ports[place]), timeout=PATIENCE)
        if place.endswith("s"):
            sock = ssl.create_default_context(cafile=self.ca).wrap_socket(sock, server_hostname="localhost")
        self._open.append(sock)
        return Session(sock)

    def session(self, name: str, *commands: str, worker: int | None = None) -> Session:
        """A session of a user, on the worker of this number (None: any), which has done these commands."""
        made = self.connect() if worker is None else self._on(worker)
        if worker is None:
            made.greeting()
        made.ok(f"LOGIN {name}@local.example {PASSWORD}")
        for command in commands:
            made.ok(command)
        return made

    def pair(self, name: str, count: int, *commands: str, mailbox: str = "INBOX") -> tuple[Session, Session]:
        """Two sessions of a user on different workers, with so many messages (s1, s2, ...) in a mailbox that both have selected;
        the first has done these commands before."""
        both = self.session(name, *commands, worker=0), self.session(name, worker=1)
        both[1].put(mailbox, *(f"s{number}" for number in range(1, count + 1)))
        for session in both:
            session.ok(f"SELECT {mailbox}")
        return both

    def ended_session(self, name: str) -> dict[str, Any]:
        """What the log says at the end of a session of a user."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.events("session") if one["user"] == f"{name}@local.example"]

        return dict(wait_for(found, what="the end of the session")[-1])

    def _on(self, worker: int) -> Session:
        """A greeted connection that a certain worker serves: the kernel gives each connection to any of them."""
        self._pids = self._pids or self.worker_pids()
        while True:
            made = self.connect()
            made.greeting()
            made.pid = self._pids[worker]
            if self.serves(worker, made.sock):
                return made
            made.sock.close()

    def serves(self, worker: int, sock: socket.socket) -> bool:
        """Whether a connection, which has been greeted, is that worker's."""
        self._pids = self._pids or self.worker_pids()
        return self._inode(sock) in _sockets(self._pids[worker])

    def _inode(self, sock: socket.socket) -> str:
        """The daemon's end of a connection."""
        ours, theirs = sock.getsockname()[1], sock.getpeername()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{theirs:04X}") and fields[2].endswith(f":{ours:04X}"):
                return fields[9]
        raise AssertionError("the connection is gone")

    def changed_workers(self) -> None:
        """Workers have been replaced."""
        self._pids = []

    def close_sessions(self) -> None:
        """Close all connections that were made."""
        for sock in self._open:
            sock.close()
        self._open.clear()


def _sockets(pid: int) -> set[str]:
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    return found


def message(subject: str, body: str = "x") -> bytes:
    """A small message."""
    return f"From: Ann <ann@x.example>\r\nTo: bob@local.example\r\nSubject: {subject}\r\n\r\n{body}\r\n".encode()
