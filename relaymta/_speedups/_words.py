"""What the kernels' numbers in octets (`_words.pxd`) do, for interpreted runs. Never compiled itself."""

__all__ = ["digits", "get32", "get64", "lowest", "put32", "put64", "seek"]


def get32(p: bytes, at: int) -> int:
    """The little-endian number of 32 bits at p[at:]."""
    return int.from_bytes(p[at : at + 4], "little")


def get64(p: bytes, at: int) -> int:
    """The little-endian number of 64 bits at p[at:]."""
    return int.from_bytes(p[at : at + 8], "little")


def put32(w: bytearray, at: int, n: int) -> None:
    """Write a number of 32 bits to w[at:], little-endian."""
    w[at : at + 4] = n.to_bytes(4, "little")


def put64(w: bytearray, at: int, n: int) -> None:
    """Write a number of 64 bits to w[at:], little-endian."""
    w[at : at + 8] = n.to_bytes(8, "little")


def digits(w: bytearray, k: int, n: int) -> int:
    """Write a number in decimal to w[k:]; the new k."""
    text = b"%d" % n
    w[k : k + len(text)] = text
    return k + len(text)


def lowest(n: int) -> int:
    """The number of the lowest bit of n, which is not 0."""
    return (n & -n).bit_length() - 1


def seek(u: bytes, at: int, total: int, n: int) -> int:
    """Of `total` packed ascending numbers the first from the one at `at` on that is not below n; `total` when there is none."""
    while at < total and get32(u, at * 4) < n:
        at += 1
    return at
