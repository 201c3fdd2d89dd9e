"""What the kernels' memory primitives (`_mem.pxd`) do, for interpreted runs. Never compiled itself."""

__all__ = ["copy", "find", "high"]


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
