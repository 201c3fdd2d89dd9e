"""What is kept of a message's data beside it, made once, when it is filed: the description that FETCH is answered from, and a
digest, by which the same data is known in any mailbox (EMAILID, RFC 8474)."""

import os
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from relaymta.disk.big import BigBody, BigFile, copy_big
from relaymta.disk.folders import remove_file
from relaymta.disk.segments import FRAME, MEGABYTE
from relaymta.errors import StoreError, store_error
from relaymta.proto.envelope import Body
from relaymta.proto.mime import Description, describe

__all__ = ["NOTHING", "Noted", "noted", "write_large"]

KEPT_MOST = 64 << 10  # octets of a description; of a message that needs more it is made when it is asked for
SCANNED_MOST = 64 * MEGABYTE
DIGEST = 16  # octets


class Noted(NamedTuple):
    """As of rows.ObjectRow."""

    described: Description | None = None
    digest: bytes = b""


NOTHING = Noted()


def noted(data: bytes) -> Noted:
    """Of a message's data."""
    return Noted(_kept(data), sha256(data).digest()[:DIGEST])


def _kept(data: bytes) -> Description | None:
    found = describe(data)
    return found if len(found.envelope) + len(found.structure) + len(found.parts) <= KEPT_MOST else None


def write_large(path: Path, ident: int, data: list[bytes] | BigFile) -> tuple[Body, Noted]:
    """Write a large body into a file of its own; one above SCANNED_MOST is not described. Blocks. StoreError: there is none."""
    try:
        body = copy_big(data, path, ident) if isinstance(data, BigFile) else _written(path, ident, data)
    except OSError as error:
        raise store_error(error) from None
    try:
        return body, _noted_of(path, body)
    except BaseException:
        remove_file(path)
        raise


def _written(path: Path, ident: int, data: list[bytes]) -> Body:
    file = BigBody(path, ident)
    try:
        file.write(data)
        return file.finish([])
    except BaseException:
        file.discard()
        raise


def _noted_of(path: Path, body: Body) -> Noted:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(descriptor, body.offset + FRAME.size, body.length)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise store_error(error) from None


def _read(descriptor: int, place: int, left: int) -> Noted:
    if left <= SCANNED_MOST:
        data = os.pread(descriptor, left, place)
        if len(data) == left:
            return noted(data)
    digest = sha256()
    while left:
        data = os.pread(descriptor, min(left, MEGABYTE), place)
        if not data:
            raise StoreError("a body ends early")
        digest.update(data)
        place, left = place + len(data), left - len(data)
    return Noted(None, digest.digest()[:DIGEST])
