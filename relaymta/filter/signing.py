"""DKIM: which keys sign a message, and its signatures, made in batches by a process of the worker's own (signatory.py)."""

import asyncio
import contextlib
import hashlib
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from relaymta.config import Dkim
from relaymta.control import Channel, Late, program
from relaymta.errors import RelayError
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.dkim import BodyHashes, has_author, signed, split_fields
from relaymta.proto.header import header_end, too_long
from relaymta.watch import Watched

if TYPE_CHECKING:  # what only keys need is imported where it is used: a worker without them starts without it
    from relaymta.filter.keys import Key

__all__ = ["Draft", "Signer", "SigningKey", "Unsignable"]

SIGNED_MESSAGES = index("relaymta_dkim_signatures_total")
TOGETHER = 32  # messages whose signatures are made in one batch
AT_ONCE = 65536  # octets that are hashed on the event loop; more would block it
ANSWER_SECONDS = 5.0  # a batch takes some hundredths of one
RESTART_SECONDS = 1.0


class Unsignable(Exception):
    """It cannot be determined which keys sign a message, or they cannot be read; `reply`: the reply that refuses it."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(answer.decode().strip())
        self.reply = answer


class Unsigned(NamedTuple):
    """A signature to be made. `own`: its field up to b=; `hashed`: the SHA-256 that is signed."""

    key: "Key"
    own: bytes
    hashed: bytes


class Signatory:
    """A worker's signing process. While it is down or does not answer, a thread makes the signatures."""

    def __init__(self, counters: Counters, log: Log) -> None:
        self._counters = counters
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "signer")
        self.took = counters.histogram("relaymta_dkim_seconds", "sign")
        self._pending: list[tuple[list[Unsigned], Callable[[bytes | Exception], None], float]] = []
        self._work: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._known: set[int] = set()  # keys that the process has
        self.wanted = False

    def begin(self) -> None:
        """Start the process, and restart it whenever it ends."""
        self.wanted = True
        if self._channel is None and self._starting is None:
            self._starting = self._loop.create_task(self._start())

    def end(self) -> None:
        """Stop the process."""
        self.wanted = False
        if self._channel is not None:
            self._channel.close()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = program("relaymta.filter.signatory", str(theirs.fileno()))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL
            )
            self._known = set()
            self._channel = Channel(ours, _nothing, self._gone)
            if not self.wanted:  # any more
                self._channel.close()
        except OSError as error:
            self._gone(error.strerror or "")
        finally:
            theirs.close()
            self._starting = None

    def _gone(self, why: str = "") -> None:
        self._channel = None
        if self.wanted:
            self._log.event("warning", text=f"the signing process has ended; a thread signs until it is restarted {why}".rstrip())
            self._loop.call_later(RESTART_SECONDS, lambda: self.begin() if self.wanted else None)

    def submit(self, wanted: list[Unsigned], done: Callable[[bytes | Exception], None], began: float) -> None:
        """Make the signatures of a message; calls `done` with its DKIM-Signature fields, or with an Exception. `began`: when work
        on them has begun (time.monotonic)."""
        self._pending.append((wanted, done, began))
        if self._work is None:  # starts in the next iteration of the event loop: this one's messages become one batch
            self._work = self._loop.create_task(self._batches())

    async def _batches(self) -> None:
        while self._pending:
            batch, self._pending = self._pending[:TOGETHER], self._pending[TOGETHER:]
            everything = [one for wanted, _, _ in batch for one in wanted]
            try:
                made = iter(await self._made(everything))
            except Exception as error:  # a bug must not stop other messages
                made = iter([error] * len(everything))
            now = time.monotonic()
            for wanted, done, began in batch:
                fields = _joined([(one, next(made)) for one in wanted])
                if isinstance(fields, bytes):
                    self._counters.add(SIGNED_MESSAGES, len(wanted))
                    self.took(now - began)
                self._loop.call_soon(done, fields)
        self._work = None

    async def _made(self, wanted: list[Unsigned]) -> list[bytes | Exception]:
        channel = self._channel
        if channel is not None:
            keys = {one.key.number: one.key for one in wanted if one.key.number not in self._known}
            try:
                found: list[bytes | Exception] = await channel.ask(
                    "sign", None, ANSWER_SECONDS,
                    keys=[(number, key.der) for number, key in keys.items()],
                    wanted=[(one.key.number, one.hashed) for one in wanted],
                )  # fmt: skip
                self._known.update(keys)
                return found
            except Late:
                self._kill()
            except (RelayError, ConnectionError):  # the thread finds which of them fail
                pass
        return await self._loop.run_in_executor(self._thread, _by_hand, wanted)

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


async def _nothing(op: str, args: object, descriptors: list[int]) -> None:
    """The signing process sends no requests."""


def _by_hand(wanted: list[Unsigned]) -> list[bytes | Exception]:
    """The signatures, or the errors, in order. Runs on any thread."""
    from relaymta.filter.signatory import sign_hash

    found: list[bytes | Exception] = []
    for one in wanted:
        try:
            found.append(sign_hash(one.key.private, one.hashed))
        except Exception as error:  # any error of OpenSSL
            found.append(error)
    return found


def _joined(made: Iterable[tuple[Unsigned, bytes | Exception]]) -> bytes | Exception:
    """The fields of a message, or the first error."""
    out = []
    for one, signature in made:
        if isinstance(signature, Exception):
            return signature
        out.append(signed(one.own, signature))
    return b"".join(out)


class SigningKey(Watched["Key"]):
    """A `[[dkim]]` of the configuration, and its key as it was last read."""

    def __init__(self, settings: Dkim) -> None:
        super().__init__([settings.key], self._read)
        self.settings = settings

    def _read(self) -> "Key":
        from relaymta.filter.keys import load_key

        return load_key(self.settings)


class Signer:
    """The DKIM keys of one worker, and which messages they sign."""

    def __init__(self, counters: Counters, log: Log, now: Callable[[], int]) -> None:
        """`now()`: the wall clock, seconds. It signs nothing before `configure`."""
        self._counters = counters
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._hashing = ThreadPoolExecutor(1, "hashing")
        self._signatory = Signatory(counters, log)
        self.watched: list[SigningKey] = []

    def configure(self, keys: list[SigningKey]) -> None:
        """Replace the keys."""
        self.watched = keys
        if self.watched:
            self._signatory.begin()
        else:
            self._signatory.end()

    def end(self) -> None:
        """Stop the signing process."""
        self._signatory.end()

    def __bool__(self) -> bool:
        return bool(self.watched)

    def _keys_for(self, header: bytes, fields: list[bytes], application: str, partly: bool) -> list["Key"]:
        """The keys that sign a message with this header; `fields`: the header, split. `partly`: those that can be read will do.
        Raises Unsignable."""
        from relaymta.proto.mailbox import Malformed, authors, domains

        wanted = [one for one in self.watched if one.settings.signs_for(application)]
        if not all("*" in one.settings.authors for one in wanted):
            try:
                author = next(iter(domains(authors(header, fields=fields))), "")
            except Malformed:
                raise Unsignable(reply.BAD_AUTHOR) from None
            wanted = [one for one in wanted if one.settings.signs(author)]
        # A key whose file could never be read does not sign. Another one of its domain will do; without one, mail that is
        # meant to be signed does not leave unsigned.
        keys = [key for one in wanted if (key := one.value) is not None]
        if not partly and {one.settings.domain for one in wanted} - {key.settings.domain for key in keys}:
            raise Unsignable(reply.NOT_SIGNED)
        return keys

    def sign(self, front: bytes, data: list[bytes], application: str, done: Callable[[bytes | Exception], None]) -> None:
        """Sign a message of `front`, our own fields, and `data`: `done(its DKIM-Signature fields)`, or an Exception."""
        began = time.monotonic()
        if sum(map(len, data)) > AT_ONCE:
            future = self._loop.run_in_executor(self._hashing, self._drafted, front, data, application)
            future.add_done_callback(lambda future: self._submit(future.result, done, began))
        else:
            self._submit(lambda: self._drafted(front, data, application), done, began)

    def draft(self, front: bytes, start: bytes, application: str, partly: bool = False) -> "Draft | None":
        """Begin to sign a message whose data begins with `start`, which has to contain its header; the rest may be streamed.
        None when no key signs it; Unsignable when that cannot be determined, or (unless `partly`) a key cannot be read."""
        end = header_end(start)
        header = start[:end]
        if too_long(header):
            if any(one.settings.signs_for(application) for one in self.watched):
                raise Unsignable(reply.HEADER_TOO_LONG)
            return None
        header = front + header
        fields = split_fields(header)
        keys = self._keys_for(header, fields, application, partly)
        return Draft(fields, keys, end, self._now()) if keys else None

    def finish(self, draft: "Draft", done: Callable[[bytes | Exception], None]) -> None:
        """Sign a message whose draft was fed all of its data; `done` as in `sign`."""
        self._submit(draft.unsigned, done, time.monotonic())

    def _submit(self, find: Callable[[], list[Unsigned]], done: Callable[[bytes | Exception], None], began: float) -> None:
        try:
            wanted = find()
        except Exception as error:  # a bug: the message is temporarily rejected, not sent unsigned
            done(error)
            return
        if wanted:
            self._signatory.submit(wanted, done, began)
        else:
            done(b"")

    def signatures(self, data: bytes) -> bytes:
        """The DKIM-Signature fields of a DSN, by the keys that can be read; b"" when signing fails: the DSN is sent all the same.
        Any thread."""
        if not self.watched:
            return b""
        began = time.monotonic()
        try:
            wanted = self._drafted(b"", [data], "", partly=True)
        except Exception:  # a bug
            return b""
        fields = _joined(zip(wanted, _by_hand(wanted), strict=True))
        if isinstance(fields, Exception):
            return b""
        if wanted:
            self._counters.add(SIGNED_MESSAGES, len(wanted))
            self._signatory.took(time.monotonic() - began)
        return fields

    def _drafted(self, front: bytes, data: list[bytes], application: str, partly: bool = False) -> list[Unsigned]:
        whole = data[0] if len(data) == 1 else b"".join(data)
        draft = self.draft(front, whole, application, partly)
        if draft is None:
            return []
        draft.body.feed(whole)
        return draft.unsigned()


class Draft:
    """A message to be signed. `body` is fed all of its data, header first; then `unsigned()` returns the signatures to make: none
    where it has no From: (no verifier would accept them)."""

    def __init__(self, fields: list[bytes], keys: list["Key"], skip: int, seconds: int) -> None:
        """`skip`: octets of its header; `seconds`: the wall clock, when it is signed."""
        self._fields, self._keys, self._seconds = fields, keys if has_author(fields) else [], seconds
        # One hash for each canonical form of the body.
        self.body = BodyHashes({key.signature.relaxed_body for key in self._keys})
        self.body.skip(skip)

    @property
    def domains(self) -> list[str]:
        """In whose name it is signed."""
        return list(dict.fromkeys(key.settings.domain for key in self._keys))

    def unsigned(self) -> list[Unsigned]:
        """The signatures to be made. Called once."""
        hashes = self.body.finish()
        found = []
        for key in self._keys:
            body_hash, _ = hashes[key.signature.relaxed_body]
            own, data = key.signature.unsigned(self._fields, body_hash, self._seconds)
            found.append(Unsigned(key, own, hashlib.sha256(data).digest()))
        return found
