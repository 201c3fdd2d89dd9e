"""The process that makes a worker's signatures: `main()` with a socket's descriptor as its argument, started by signing.py.

A signature takes longer than everything else done for a message. On a thread of the worker each costs a third more, since the
thread competes with the event loop for the interpreter lock.
"""

import signal
import socket
import sys
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from relaymta.control import serve

__all__ = ["Private", "sign_hash"]

Private = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_PADDING, _HASHED = padding.PKCS1v15(), Prehashed(hashes.SHA256())


def sign_hash(private: Private, hashed: bytes) -> bytes:
    """Sign a SHA-256 (RFC 6376 3.3, RFC 8463 3)."""
    if isinstance(private, rsa.RSAPrivateKey):
        return private.sign(hashed, _PADDING, _HASHED)
    return private.sign(hashed)


class _Answers:
    """Handles `sign` requests: `keys`, the new ones (number, DER); `wanted`, (key number, SHA-256) of each signature."""

    def __init__(self) -> None:
        self._keys: dict[int, Any] = {}

    def __call__(self, op: str, args: dict[str, Any]) -> list[bytes]:
        for number, der in args["keys"]:
            self._keys[number] = serialization.load_der_private_key(der, None)
        return [sign_hash(self._keys[number], hashed) for number, hashed in args["wanted"]]


def main() -> None:
    """Serve until the worker ends. Signals are ignored, so that a draining worker can still sign."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])), _Answers())
