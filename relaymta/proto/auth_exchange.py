"""One AUTH command, from its first line to its reply (RFC 4954 4), without I/O."""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Callable

from relaymta.proto import reply, sasl

__all__ = ["AuthExchange"]


class _Over(Exception):
    """The exchange ends with a reply."""

    def __init__(self, answer: bytes) -> None:
        self.reply = answer


class AuthExchange:
    """An exchange of challenges and responses. Each step returns the next challenge (334), the reply that ends the exchange, or a
    claim, which the caller verifies and answers with `checked`."""

    __slots__ = ("_first", "_steps", "mechanism")

    def __init__(self, mechanism: str, keys: Callable[[str], sasl.Keys]) -> None:
        """`keys`: for SCRAM, see `sasl.begin`. KeyError: an unknown mechanism."""
        self._steps, first = sasl.begin(mechanism, keys)
        self._first = first or b""
        self.mechanism = mechanism

    def begin(self, initial: list[bytes]) -> bytes | sasl.Claim:
        """The first step; `initial`: the initial response, if there is one ("=" is an empty one)."""
        if not initial:
            return _challenge(self._first)
        return self.respond(b"" if initial[0] == b"=" else initial[0])

    def respond(self, line: bytes) -> bytes | sasl.Claim:
        """The step after the client's response, which is base64, or "*" to cancel."""
        if line == b"*":
            return reply.LOGIN_CANCELLED
        try:
            return _challenge(self._steps.send(b64decode(line, validate=True)))
        except StopIteration as end:
            found: sasl.Claim = end.value
            return found
        except binascii.Error:
            return reply.NOT_BASE64
        except sasl.Malformed:
            return reply.BAD_RESPONSE
        except _Over as over:
            return over.reply

    def checked(self, claim: sasl.Claim, answer: bytes) -> bytes:
        """The step after a claim was verified: `answer` is 235, or the reply that refuses it."""
        if answer.startswith(b"2") and isinstance(claim, sasl.Proof) and claim.final:
            # RFC 4954 4: the server's proof, an empty response, and then 235.
            return self._expect(_proved(), claim.final)
        if answer.startswith(b"5") and isinstance(claim, sasl.Token):
            # RFC 7628 3.2.3: the client responds to the reason, and then gets 535.
            return self._expect(_token_refused(), b'{"status":"invalid_token","schemes":"bearer"}')
        return answer

    def _expect(self, steps: sasl.Exchange, challenge: bytes) -> bytes:
        self._steps = steps
        next(steps)
        return _challenge(challenge)


def _challenge(challenge: bytes) -> bytes:
    return b"334 " + b64encode(challenge) + b"\r\n"


def _token_refused() -> sasl.Exchange:
    yield b""
    raise _Over(reply.WRONG_CREDENTIALS)


def _proved() -> sasl.Exchange:
    if (yield b""):
        raise sasl.Malformed("expected an empty response to the server's proof")
    raise _Over(reply.LOGGED_IN)
