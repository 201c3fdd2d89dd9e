"""Why a request is not answered as it was meant: problem details (RFC 9457), with the right status."""

import re
from http import HTTPStatus
from typing import Any

import msgspec

from relaymta.proto.printable import encodable

__all__ = ["Problem", "ProblemDetails", "of_arguments"]

_AT = re.compile(r"`\$\.?([^`]*)`\Z")
_FIELD = re.compile(r"field `([^`]*)`")


class ProblemDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The JSON of an answer that is an error (RFC 9457, `application/problem+json`). `argument`: the one that is wrong;
    `workers`: those that do not answer; `matched`, `changed`: how many messages match, or were changed before the error;
    `recipients`: of a message that was not taken, each with its reply; `messages`: of several, none of which was taken."""

    title: str
    status: int
    detail: str
    type: str = "about:blank"
    argument: str = ""
    workers: list[int] = []
    matched: int | None = None
    changed: int | None = None
    recipients: list[Any] = []
    messages: list[Any] = []


class Problem(Exception):
    """Ends the handling of a request. `more`: further fields of ProblemDetails; `headers`: of the answer."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}
        self.more = more

    @property
    def details(self) -> ProblemDetails:
        """What the answer says. JSON has no lone surrogates, as a client's octets that are no UTF-8 are."""
        found = ProblemDetails(
            title=HTTPStatus(self.status).phrase, status=self.status, detail=encodable(self.detail), **self.more
        )
        found.argument = encodable(found.argument)
        return found


def of_arguments(error: Exception) -> Problem:
    """400 for arguments that are not as their model says, with the name of the first that is wrong."""
    text = str(error)
    at, field = _AT.search(text), _FIELD.search(text)
    name = (at[1] if at else "").partition("[")[0] or (field[1] if field else "")
    return Problem(400, text, argument=name) if name else Problem(400, text)
