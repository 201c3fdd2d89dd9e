"""The index of a mailbox in a slow and obvious way: what the kernels `records` and `uids` have to agree with."""

import struct
from typing import NamedTuple

RECORD = struct.Struct("<IIQQ")


class Rec(NamedTuple):
    """A record of the index."""

    uid: int
    flags: int
    modseq: int


def pack(records: list[Rec]) -> bytes:
    """Records, packed."""
    return b"".join(RECORD.pack(uid, 0, flags, modseq) for uid, flags, modseq in records)


def unpack(packed: bytes) -> list[Rec]:
    """The records of a block."""
    return [Rec(uid, flags, modseq) for uid, _, flags, modseq in RECORD.iter_unpack(packed)]


def pack32(numbers: list[int]) -> bytes:
    """Numbers of 32 bits, packed."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def unpack32(packed: bytes) -> list[int]:
    """What `pack32` has packed."""
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


def bits(bitmap: bytes, count: int) -> list[bool]:
    """The bits of a bitmap."""
    return [bool(bitmap[i // 8] & 1 << i % 8) for i in range(count)]


def bitmap(wanted: list[bool]) -> bytes:
    """A bitmap of these bits."""
    return sum(bit << i for i, bit in enumerate(wanted)).to_bytes((len(wanted) + 7) // 8, "little")


def lines(records: list[Rec], uids: list[int], names: list[bytes], recent: int, until: int, items: int) -> bytes:
    """FETCH responses."""
    out = b""
    for record in records:
        if record.uid not in uids:
            continue
        parts = [b"UID %d" % record.uid]
        if items & 1:
            flags = [b"\\Recent"] if recent <= record.uid < until else []
            flags += [name for bit, name in enumerate(names) if record.flags >> bit & 1]
            parts.append(b"FLAGS (%s)" % b" ".join(flags))
        if items & 2:
            parts.append(b"MODSEQ (%d)" % record.modseq)
        out += b"* %d FETCH (%s)\r\n" % (uids.index(record.uid) + 1, b" ".join(parts))
    return out


def runs(uids: list[int]) -> list[tuple[int, int]]:
    """UIDs as ranges without gaps."""
    found: list[tuple[int, int]] = []
    for uid in uids:
        if found and found[-1][1] + 1 == uid:
            found[-1] = (found[-1][0], uid)
        else:
            found.append((uid, uid))
    return found
