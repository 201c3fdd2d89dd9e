"""TLS session ticket keys shared by all workers, so that a client can resume its session with any of them.

OpenSSL has SSL_CTX_set_tlsext_ticket_keys, but Python's ssl does not expose it. So it is called by ctypes, on versions whose
layout is known; elsewhere each worker has keys of its own.
"""

import ctypes
import ssl
import sys
from collections.abc import Callable

__all__ = ["OCTETS", "share"]

OCTETS = 80  # a key name of 16, and two keys of 32
_GET, _SET = 58, 59  # SSL_CTRL_GET_TLSEXT_TICKET_KEYS, SSL_CTRL_SET_TLSEXT_TICKET_KEYS

_Functions = tuple[Callable[..., int], Callable[..., int]]


def _openssl() -> _Functions | None:
    """SSL_CTX_ctrl and SSL_CTX_get_options of the library that `ssl` uses; None where they cannot be reached."""
    if sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info < (3, 15):
        return None
    try:
        import _ssl

        library = ctypes.CDLL(_ssl.__file__)
        control, options = library.SSL_CTX_ctrl, library.SSL_CTX_get_options
    except (ImportError, AttributeError, OSError):  # linked into the interpreter, or another library
        return None
    control.restype, control.argtypes = ctypes.c_long, [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p]
    options.restype, options.argtypes = ctypes.c_uint64, [ctypes.c_void_p]
    return control, options


_FUNCTIONS = _openssl()


def share(context: ssl.SSLContext, keys: bytes) -> bool:
    """Make a context issue and accept tickets under these keys (OCTETS octets). False where that is not possible."""
    if _FUNCTIONS is None:
        return False
    control, options = _FUNCTIONS
    # In CPython's PySSLContext the SSL_CTX pointer follows the object header; equal options confirm that this is it.
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    if not pointer or options(pointer) != context.options & 0xFFFFFFFFFFFFFFFF:
        return False
    control(pointer, _SET, OCTETS, keys)
    found = ctypes.create_string_buffer(OCTETS)
    control(pointer, _GET, OCTETS, found)
    return found.raw == keys
