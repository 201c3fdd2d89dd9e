"""DKIM: which keys sign a message, and the signing, on a thread beside the loop (OpenSSL gives the interpreter up meanwhile)."""

import asyncio
import base64
import hashlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from relaymta.config import Config, Dkim
from relaymta.errors import ConfigError
from relaymta.metrics import Counters, index
from relaymta.proto.dkim import OVERSIGNED, SIGNED, BodyHash, Signature, author_domain, signed, split_fields
from relaymta.proto.header import header_end
from relaymta.watch import Watched

__all__ = ["Big", "Key", "Signer", "check", "load_key", "record", "zone_line"]

SIGNED_MESSAGES = index("relaymta_dkim_signatures_total")
BITS_LEAST = 1024
STRING = 255  # octets of one string of a TXT record
TOGETHER = 32  # messages that are signed and go on to the commit together: a group costs as much as several of them,
GATHER_SECONDS = 0.004  # so behind a batch, where some wait, others are waited for
PLACE = "A" * 43 + "="  # for a hash that is not known yet
Private = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class Key(NamedTuple):
    """A key in use, and what its signatures say."""

    settings: Dkim
    private: Private
    signature: Signature

    def sign(self, data: bytes) -> bytes:
        """RFC 6376 3.3.2, RFC 8463 3."""
        if isinstance(self.private, rsa.RSAPrivateKey):
            return self.private.sign(data, padding.PKCS1v15(), hashes.SHA256())
        return self.private.sign(hashlib.sha256(data).digest())

    @property
    def octets(self) -> int:
        """Of a signature."""
        return self.private.key_size // 8 if isinstance(self.private, rsa.RSAPrivateKey) else 64


def check(config: Config) -> None:
    """ConfigError with everything that is wrong with the keys' files, as the user who asks can read them."""
    problems: list[str] = []
    for settings in config.dkim:
        try:
            load_key(settings)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def load_key(settings: Dkim) -> Key:
    """Read a key's file. ConfigError says what is wrong with it."""
    try:
        private = serialization.load_pem_private_key(Path(settings.key).read_bytes(), None)
    except OSError as error:
        raise ConfigError([f"dkim.key: {settings.key}: {error.strerror}"]) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError([f"dkim.key: {settings.key}: no private key in PEM form without a pass phrase"]) from None
    if not isinstance(private, Private):
        raise ConfigError([f"dkim.key: {settings.key}: neither RSA nor Ed25519"])
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size < BITS_LEAST:
        raise ConfigError([f"dkim.key: {settings.key}: {private.key_size} bits are too few (RFC 8301 3.2)"])
    algorithm = "rsa-sha256" if isinstance(private, rsa.RSAPrivateKey) else "ed25519-sha256"
    head, _, body = settings.canonicalization.partition("/")
    more = tuple(name.lower() for name in settings.signed)
    over = tuple(name.lower() for name in settings.oversigned)
    signature = Signature(
        settings.domain.lower(), settings.selector.lower(), algorithm, head == "relaxed", body == "relaxed",
        (*SIGNED, *(name for name in more if name not in SIGNED)), over or OVERSIGNED, int(settings.expires),
    )  # fmt: skip
    return Key(settings, private, signature)


def record(key: Key) -> str:
    """The TXT record of a key's public half (RFC 6376 3.6.1, RFC 8463 4)."""
    public = key.private.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return f"v=DKIM1; k=ed25519; p={base64.b64encode(raw).decode()}"
    raw = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"v=DKIM1; k=rsa; p={base64.b64encode(raw).decode()}"


def zone_line(name: str, text: str) -> str:
    """A TXT record as a zone file has it."""
    strings = [text[i : i + STRING] for i in range(0, len(text), STRING)]
    return f"{name}. TXT " + " ".join(f'"{part}"' for part in strings)


class Signer:
    """The keys of one worker, and the thread that signs with them."""

    def __init__(self, config: Config, counters: Counters, now: Callable[[], int]) -> None:
        """`now()`: the wall clock, seconds."""
        self._counters = counters
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self._inbox: queue.SimpleQueue[list[tuple[Callable[[], Any], Callable[[Any], None]]]] = queue.SimpleQueue()
        self._busy = False  # the thread is at work, or about to be
        self._thread: threading.Thread | None = None
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a configuration (blocks while keys are read)."""
        self.watched = [Watched([one.key], lambda one=one: load_key(one)) for one in config.dkim]  # type: ignore[misc]
        for one in self.watched:
            one.refresh()

    def __bool__(self) -> bool:
        return bool(self.watched)

    def keys_for(self, fields: list[bytes], application: str) -> list[Key]:
        """The keys that sign a message with these header fields."""
        author = author_domain(fields)
        found = []
        for one in self.watched:
            key = one.value
            if key is None:
                continue
            settings = key.settings
            authors = settings.authors or [settings.domain]
            mine = "*" in authors or author in authors or any(a.startswith(".") and author.endswith(a) for a in authors)
            if mine and (not settings.application or application in settings.application):
                found.append(key)
        return found

    def sign(self, front: bytes, text: list[bytes], application: str, done: Callable[[bytes | Exception], None]) -> None:
        """Sign a message of `front` (fields of ours) and `text`: `done(fields to put in front of it)`, or an Exception."""
        self.run(lambda: self._signed(front, text, application), done)

    def signatures(self, text: bytes) -> bytes:
        """Any thread: the signatures of a message of our own; none where its key fails: nobody waits for it in vain."""
        try:
            return self._signed(b"", [text], "") if self.watched else b""
        except Exception:  # whatever OpenSSL has against it
            return b""

    def run(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """`done(job())` with `job` run on the thread; with the exception when it raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="signer", daemon=True)
            self._thread.start()
        self._pending.append((job, done))
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._hand_over)  # what this turn of the loop has goes together

    def _hand_over(self) -> None:
        pending, self._pending = self._pending[:TOGETHER], self._pending[TOGETHER:]
        self._inbox.put(pending)

    def _done(self, results: list[tuple[Callable[[Any], None], Any]]) -> None:
        for done, result in results:
            done(result)
        waiting = len(self._pending)
        if not waiting:
            self._busy = False
        elif 1 < waiting < TOGETHER:
            self._loop.call_later(GATHER_SECONDS, self._hand_over)
        else:
            self._hand_over()

    def _run(self) -> None:
        while True:
            results: list[tuple[Callable[[Any], None], Any]] = []
            for job, done in self._inbox.get():
                try:
                    results.append((done, job()))
                except Exception as error:
                    results.append((done, error))
            self._loop.call_soon_threadsafe(self._done, results)

    def _signed(self, front: bytes, text: list[bytes], application: str) -> bytes:
        whole = text[0] if len(text) == 1 else b"".join(text)
        end = header_end(whole)
        fields = split_fields(front + whole[:end])
        keys = self.keys_for(fields, application)
        body = whole[end:]
        hashed: dict[bool, str] = {}
        out = []
        for key in keys:
            relaxed = key.signature.relaxed_body
            if relaxed not in hashed:  # one for all signatures that see the body alike
                one = BodyHash(relaxed)
                one.feed(body)
                hashed[relaxed] = one.finish()
            own, data = key.signature.unsigned(fields, hashed[relaxed], self._now())
            out.append(signed(own, key.sign(data)))
        self._counters.add(SIGNED_MESSAGES, len(out))
        return b"".join(out)

    def big(self, front: bytes, start: bytes, application: str) -> "Big | None":
        """For a message that goes to a file as it comes: its header is in `start`. None when no key signs it."""
        end = header_end(start)
        if end == len(start):  # a header of more than 64 kB is nobody's mail
            return None
        fields = split_fields(front + start[:end])
        keys = self.keys_for(fields, application)
        return Big(fields, keys, end, self._now(), self._counters) if keys else None


class Big:
    """The signatures of a message that is longer than memory has room for: room for them is left in front of it, and filled once
    its body has gone by. Thread: `feed` all of the text in turn, then `finish`."""

    def __init__(self, fields: list[bytes], keys: list[Key], skip: int, seconds: int, counters: Counters) -> None:
        self._fields, self._keys, self._skip, self._seconds, self._counters = fields, keys, skip, seconds, counters
        self._hashes = {relaxed: BodyHash(relaxed) for relaxed in {key.signature.relaxed_body for key in keys}}
        self.room = self._written(dict.fromkeys(self._hashes, PLACE), lambda key, data: bytes(key.octets))

    def feed(self, data: bytes) -> None:
        """Take the next octets of the message, of its header first."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        if skipped < len(data):
            for one in self._hashes.values():
                one.feed(data[skipped:])

    def finish(self) -> bytes:
        """The signatures, as long as `room`."""
        found = self._written({relaxed: one.finish() for relaxed, one in self._hashes.items()}, Key.sign)
        self._counters.add(SIGNED_MESSAGES, len(self._keys))
        assert len(found) == len(self.room)
        return found

    def _written(self, hashed: dict[bool, str], sign: Callable[[Key, bytes], bytes]) -> bytes:
        out = []
        for key in self._keys:
            own, data = key.signature.unsigned(self._fields, hashed[key.signature.relaxed_body], self._seconds)
            out.append(signed(own, sign(key, data)))
        return b"".join(out)
