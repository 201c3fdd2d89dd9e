"""What the kernels' memory primitives (`_mem.pxd`) do, for interpreted runs. Never compiled itself."""

import re

__all__ = ["clean", "copy", "cut", "dot", "find", "high", "lower", "same"]

_DOT = re.compile(rb"(?<=[\r\n])\.")


def find(p: bytes, byte: int, start: int, end: int) -> int:
    """Index of the first `byte` in p[start:end], or -1."""
    return p.find(byte, start, end)


def high(p: bytes, start: int, end: int) -> bool:
    """Whether a byte of p[start:end] is above 127."""
    return not p[start:end].isascii()


def copy(w: bytearray, k: int, p: bytes, start: int, end: int) -> int:
    """Copy p[start:end] to w[k:]; the new k."""
    if end <= start:
        return k
    w[k : k + end - start] = p[start:end]
    return k + end - start


def cut(p: bytes, start: int, end: int) -> bytes:
    """p[start:end] as bytes."""
    return bytes(p[start:end])


def clean(p: bytes, start: int, end: int) -> bool:
    """Whether p[start:end] has no TAB, no two spaces side by side, and none at its end."""
    part = p[start:end]
    return b"\t" not in part and b"  " not in part and not part.endswith(b" ")


def dot(p: bytes, start: int, end: int) -> int:
    """Index of the first "." in p[start:end] that follows a CR or LF, or -1; `start` is at least 1."""
    found = _DOT.search(p, start, end)
    return -1 if found is None else found.start()


def same(p: bytes, start: int, end: int, word: bytes) -> bool:
    """Whether p[start:end] is `word`, which is in lower case and has no NUL, in any case."""
    return end - start == len(word) and p[start:end].lower() == word


def lower(w: bytearray, end: int) -> None:
    """Make the ASCII letters of w[:end] lower case."""
    w[:end] = w[:end].lower()
