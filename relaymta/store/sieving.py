"""Users' active Sieve scripts, run over messages that are delivered to them (proto/sieve_run.py): where a message is filed, what
its sender is told, and what is sent on.

A script is run on a thread of a pool of its own, one of a user at a time: scripts that take long delay nothing but scripts. What
it sends comes into the queue with the outcome of the message (send/onward.py); by whom a reply has been asked for is remembered
before, so that what is asked again after a crash is sent once.
"""

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from weakref import WeakValueDictionary

import lmdb

from relaymta.disk.big import BigFile
from relaymta.disk.segments import FRAME
from relaymta.errors import RelayError, StoreError
from relaymta.ident import format_id
from relaymta.proto import sieve
from relaymta.proto.address import comparable
from relaymta.proto.envelope import Onward
from relaymta.proto.header import first_octets, header_end
from relaymta.proto.said import Reply
from relaymta.proto.sieve_message import Message
from relaymta.proto.sieve_outcome import Answered, Discarded, Filed, Kept, Outcome, Redirected, Rejected
from relaymta.proto.sieve_replies import answered, redirected, rejection
from relaymta.proto.sieve_run import run
from relaymta.proto.sieve_vacation import own
from relaymta.store import scripts
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.reading import Readable
from relaymta.store.rows import INBOX
from relaymta.store.shown import flags_from
from relaymta.store.writer import Place

__all__ = ["Mail", "Sieved", "Sieving"]

SCRIPT_COST: Final = 1024  # octets, of the smallest
COMPILED_OCTETS: Final = 2 << 20  # of texts of scripts that are kept compiled, which may take 25 times as much
THREADS: Final = 2
HEADER_MOST: Final = 1 << 20  # octets of a large message's header, and
BODY_MOST: Final = 4 << 20  # of it in all, that a script sees: decoding and comparing take several times as much, and the GIL


@dataclass
class Sieved:
    """What a user's script says of a message. `places`: where it is filed; `refusal`: the reply that refuses it, instead;
    `redirects`: addresses that get it as well; `answers`: replies to its sender. `shown`, `cause`: for the log; `results`: to be
    counted."""

    places: list[Place]
    refusal: Reply | None = None
    redirects: list[str] = field(default_factory=list)
    answers: list[Answered] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    cause: str = ""
    results: set[str] = field(default_factory=set)

    @property
    def sends(self) -> bool:
        """Whether messages are to be sent."""
        return bool(self.redirects or self.answers)


class Mail:
    """Message data as scripts see it, parsed once for the scripts of all recipients. On one thread at a time."""

    def __init__(self, data: list[bytes] | BigFile) -> None:
        self._data = data
        self._made: dict[bool, Message] = {}

    def message(self, whole: bool) -> Message:
        """`whole`: with its body. OSError."""
        found = self._made.get(True) or self._made.get(whole)
        if found is None:
            found = self._made[whole] = _message(self._data, whole)
        return found


class Sieving:
    """`separator()`: of the +detail of addresses; `hostname`: in Message-IDs of replies; `log(**fields)`: the event of each
    message; `count(result)`: called for each kind of thing that a script has done with a message."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        separator: Callable[[], str],
        hostname: str,
        log: Callable[..., None],
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._count = count
        self._threads = ThreadPoolExecutor(THREADS, "sieve")
        self._compiled = _Compiled()
        self._running: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()  # by user
        self._mailboxes = mailboxes
        self._separator = separator
        self._hostname = hostname
        self._log = log

    def active(self, users: list[User]) -> list[bool | None]:
        """Whether users have activated a script; None: that cannot be read now. A microsecond each, on the loop."""
        return [self._active(user) for user in users]

    def _active(self, user: User) -> bool | None:
        try:
            return self._mailboxes.has_script(user.shard, user.ident)
        except (lmdb.Error, StoreError):
            return None

    def sent_before(self, user: User, queue_id: int, recipient: int, attempt: int) -> bool:
        """Whether an attempt before this one has filed a message for a user, and its outcome was recorded, with what the script
        sends. StoreError."""
        shard = self._mailboxes.reading(user.shard)
        try:
            with shard.rows.reading() as txn:
                found = shard.rows.filed_by(txn, queue_id, recipient, user.ident)
        except lmdb.Error as error:
            raise StoreError(str(error)) from None
        return found is not None and found < attempt

    async def run(self, user: User, sender: str, recipient: str, mail: Mail) -> Sieved:
        """What the active script of a user says of a message. StoreError."""
        work = partial(self._run, user, sender, recipient, mail)
        lock = self._running.setdefault(user.ident, asyncio.Lock())
        try:
            async with lock:
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (lmdb.Error, OSError) as error:
            raise StoreError(str(error)) from None

    def close(self) -> None:
        """No script is run any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, user: User, sender: str, recipient: str, mail: Mail) -> Sieved:
        shard = self._mailboxes.reading(user.shard)
        script = self._script(shard, user)
        if isinstance(script, sieve.SieveError):
            return Sieved([Place()], cause=str(script), results={"failed"})
        found = self._mailboxes.directory.owner(user.address)
        addresses = [user.address, *(found[1] if found is not None else ())]
        outcome = run(
            script,
            mail.message(script.reads_body),
            sender=sender,
            recipient=recipient,
            addresses=[one for one in addresses if not one.startswith("@")],
            exists=partial(_exists, shard, user.ident),
            seconds=int(time.time()),
            separator=self._separator(),
            shared=self._is_shared(recipient, user),
        )
        return _sieved(outcome, partial(_exists, shard, user.ident))

    def _is_shared(self, recipient: str, user: User) -> bool:
        """On any thread: whether mail for an address goes to others than this user, too."""
        try:
            found = self._mailboxes.directory.look_up(recipient, self._separator())
        except RelayError:
            return True
        return found is None or bool(found.others) or [one.ident for one in found.users] != [user.ident]

    def _script(self, shard: Readable, user: User) -> sieve.Script | sieve.SieveError:
        with shard.rows.reading() as txn:
            found = scripts.active_text(shard.rows, txn, user.ident)
        return self._compiled.script(found[1] if found is not None else b"")  # it may have been deactivated just now

    async def onward(self, user: User, sieved: Sieved, sender: str, recipient: str, queue_id: int, index: int) -> list[Onward]:
        """The messages that a script sends, of a recipient (by index) of a message of the queue. StoreError, RelayError,
        ConnectionError."""
        here = [recipient]  # and the user, where a catch-all or an alias gives each round another recipient
        if comparable(user.address) not in own(recipient, (), self._separator()):
            here.append(user.address)
        found = [redirected(address, sender=sender, recipients=here) for address in sieved.redirects]
        now = int(time.time())
        claimant = queue_id.to_bytes(8, "big") + index.to_bytes(4, "big")
        for answer in sieved.answers:
            key, until = answer.key + answer.recipient.lower().encode(), now + answer.days * 86400
            if await self._mailboxes.change(user.shard, "remember_reply", user.ident, key, until, now, claimant):
                ident = f"{format_id(queue_id)}.{index}.{user.ident}"
                found.append(answered(answer, hostname=self._hostname, ident=ident, seconds=now))
                sieved.results.add("replied")
            else:
                sieved.shown.append("no vacation reply: this sender has had one")
        return found

    def note(self, user: User, sieved: Sieved, queue_id: int) -> None:
        """Log and count what has been done."""
        for result in sorted(sieved.results):
            self._count(result)
        self._log(id=format_id(queue_id) if queue_id else "", user=user.address, actions=sieved.shown, cause=sieved.cause)


class _Compiled:
    """Scripts by their texts, which alone say what a script does; those that were run last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the rest
        self._scripts: OrderedDict[bytes, sieve.Script | sieve.SieveError] = OrderedDict()
        self._octets = 0

    def script(self, text: bytes) -> sieve.Script | sieve.SieveError:
        """On any thread."""
        with self._lock:
            found = self._scripts.get(text)
            if found is not None:
                self._scripts.move_to_end(text)
                return found
        try:
            found = sieve.compile(text)
        except sieve.SieveError as error:  # by an older version it was right
            found = error
        with self._lock:
            if text not in self._scripts:
                self._scripts[text] = found
                self._octets += SCRIPT_COST + len(text)
            while self._octets > COMPILED_OCTETS:
                self._octets -= SCRIPT_COST + len(self._scripts.popitem(last=False)[0])
        return found


def _exists(shard: Readable, user: int, name: str) -> bool:
    with shard.rows.reading() as txn:
        row = shard.rows.mailbox(txn, user, name)
    return row is not None and bool(row.mailbox)


def _message(data: list[bytes] | BigFile, whole: bool) -> Message:
    if isinstance(data, BigFile):
        size, most = data.body.length, BODY_MOST if whole else HEADER_MOST
        descriptor = os.open(data.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.pread(descriptor, min(size, most), data.body.offset + FRAME.size)
        finally:
            os.close(descriptor)
    else:
        size, found = sum(map(len, data)), first_octets(data, BODY_MOST)
    return Message(found if whole else found[: header_end(found)], size)


def _place(name: str, flags: Iterable[str], create: bool = False) -> Place:
    """`flags`: as of sieve_values.flag_names."""
    return Place(name, flags_from(list(flags)), [flag for flag in flags if not flag.startswith("\\")], create)


def _sieved(outcome: Outcome, exists: Callable[[str], bool]) -> Sieved:
    found = Sieved([], cause=outcome.loop or (outcome.error and f"line {outcome.line}: {outcome.error}"))
    for action in outcome.actions:
        _ACTIONS[type(action)](found, action, exists)
    if outcome.error:
        found.results = {"failed"}
    found.shown += [f"line {line}: no reply: {text}" for line, text in outcome.notes]
    return found


def _keep(found: Sieved, action: Kept, exists: Callable[[str], bool]) -> None:
    _file_in(found, _place(INBOX, action.flags))
    found.results.add("kept")
    found.shown.append("keep" if not action.line else f"line {action.line}: keep")


def _file(found: Sieved, action: Filed, exists: Callable[[str], bool]) -> None:
    if action.create or exists(action.mailbox):
        _file_in(found, _place(action.mailbox, action.flags, action.create))
        found.results.add("filed")
        found.shown.append(f"line {action.line}: fileinto {action.mailbox}")
    else:
        _file_in(found, _place(INBOX, action.flags))
        found.results.add("kept")
        found.shown.append(f"line {action.line}: there is no mailbox {action.mailbox}: keep")


def _file_in(found: Sieved, place: Place) -> None:
    if all(one.name != place.name for one in found.places):
        found.places.append(place)


def _redirect(found: Sieved, action: Redirected, exists: Callable[[str], bool]) -> None:
    found.redirects.append(action.address)
    found.results.add("redirected")
    found.shown.append(f"line {action.line}: redirect {action.address}")


def _reject(found: Sieved, action: Rejected, exists: Callable[[str], bool]) -> None:
    found.refusal = Reply(550, "5.7.1", rejection(action.reason).encode("ascii", "replace").decode())
    found.results.add("rejected")
    found.shown.append(f"line {action.line}: reject")


def _discard(found: Sieved, action: Discarded, exists: Callable[[str], bool]) -> None:
    found.results.add("discarded")
    found.shown.append(f"line {action.line}: discard")


def _answer(found: Sieved, action: Answered, exists: Callable[[str], bool]) -> None:
    found.answers.append(action)
    found.shown.append(f"line {action.line}: vacation")


_ACTIONS: Final[dict[type, Callable[[Sieved, Any, Callable[[str], bool]], None]]] = {
    Kept: _keep,
    Filed: _file,
    Redirected: _redirect,
    Rejected: _reject,
    Discarded: _discard,
    Answered: _answer,
}
