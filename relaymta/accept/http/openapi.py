"""The description of the operations (OpenAPI 3.1), made of the models of requests and answers. docs/injection-openapi.json is
what `python -m relaymta.accept.http.openapi` prints."""

import sys
from functools import cache
from typing import Any, NamedTuple

import msgspec

from relaymta import __version__
from relaymta.accept.http.answers import Accepted, Check, MessageState, ReceiptState, RecipientResult
from relaymta.accept.http.models import Request
from relaymta.problems import ProblemDetails

__all__ = ["description", "text"]

_TEXT = """Applications hand in mail. A message is safe on disk when it is answered with 202; what becomes of it, its state tells.
Fields of answers, and operations, are only added within v1: ignore those that you do not know. Errors are problem details
(RFC 9457). Times are RFC 3339, UTC in answers."""
_OF_OPERATORS = ("workers", "matched", "changed")  # fields of ProblemDetails that no answer has here
_TIME = {"type": "string", "format": "date-time"}

_PARAMETERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "in": "header", "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
        "description": "A request that is sent again under the same key sends no message twice: those that were accepted are "
        "answered as before, the others are tried again. For another request under it: 422.",
    },
    "traceparent": {
        "in": "header", "schema": {"type": "string"},
        "description": "The trace that the request belongs to (W3C Trace Context); one that is not well-formed is ignored.",
    },
    "validate": {
        "in": "query", "schema": {"type": "string", "enum": ["0", "1", "false", "true"]},
        "description": "1: nothing is sent; the answer (200) says what would happen.",
    },
    "from": {
        "in": "query", "schema": {"type": "string"},
        "description": "message/rfc822: the sender of the envelope, empty for the null sender; without it, that in Sender, or "
        "From.",
    },
    "to": {
        "in": "query", "schema": {"type": "array", "items": {"type": "string"}},
        "description": "message/rfc822: the recipients; without any, the addresses in To, Cc and Bcc.",
    },
    "tag": {
        "in": "query", "schema": {"type": "array", "items": {"type": "string", "pattern": "^[!-+\\--~]{1,64}$"}, "maxItems": 20},
        "description": "message/rfc822: words by which the message is found again.",
    },
    "priority": {
        "in": "query", "schema": {"type": "string", "enum": ["express", "normal", "bulk"]},
        "description": "message/rfc822: its class; without it, that of the account.",
    },
    "send_at": {
        "in": "query", "schema": _TIME,
        "description": "message/rfc822: when it is tried first, with an offset; at most 90 days ahead.",
    },
    "id": {
        "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9A-Za-z]{1,32}$"},
        "description": "of a message, as it was answered",
    },
    "key": {
        "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
        "description": "an idempotency key",
    },
}  # fmt: skip
_HEADERS = {
    "Retry-After": {"description": "seconds after which it may be tried again", "schema": {"type": "integer", "minimum": 0}},
    "Idempotency-Replayed": {
        "description": "`true`: all of it was accepted before, and nothing was sent now", "schema": {"const": "true"},
    },
    "WWW-Authenticate": {"description": "how to log in (RFC 9110 11.6.1)", "schema": {"type": "string"}},
}  # fmt: skip
_ALL = {  # problems of all operations
    "400": "a header or parameter is wrong; `argument` names it",
    "401": "credentials are needed, or wrong",
    "403": "the client may not send here",
    "421": "there are no credentials, and Host is no address or name of this relay",
    "429": "too many wrong logins",
    "500": "an internal error; the log of the relay says more",
    "503": "it cannot be done now",
}
_GONE = {"404": "it is not known, or no longer, or another user's"}
_POST = {
    "400": "the body is not JSON, or no form, or a header or parameter is wrong; `argument` names it",
    "403": "the client may not send here, or not this: by its sender, by a rule or by a filter",
    "409": "a request with the same Idempotency-Key is under way",
    "413": "the request, or its message, is too large",
    "415": "the type of the body, or its encoding, is not supported",
    "422": "the message cannot be sent as it is (`argument` names the field), is refused (`recipients` says why), or has "
    "the Idempotency-Key of another one",
    "429": "a quota or rate is exceeded, or there were too many wrong logins",
    "503": "it cannot be stored, or is refused for now",
}
_WITH_HEADERS = {"401": ["WWW-Authenticate"], "409": ["Retry-After"], "429": ["Retry-After"], "503": ["Retry-After"]}


class _Row(NamedTuple):
    """An operation. `answers`: models by status, `problems`: beside those of all."""

    method: str
    path: str
    name: str
    summary: str
    parameters: tuple[str, ...]
    answers: dict[str, Any]
    problems: dict[str, str]
    body: bool = False


_ROWS = (
    _Row(
        "post", "/v1/messages", "send", "Send a message, or a batch of them",
        ("Idempotency-Key", "traceparent", "validate", "from", "to", "tag", "priority", "send_at"),
        {"200": Check, "202": Accepted}, _POST, True,
    ),
    _Row("get", "/v1/messages/{id}", "message", "What has become of a message", ("id",), {"200": MessageState}, _GONE),
    _Row(
        "get", "/v1/receipts/{key}", "receipt", "What was accepted under an idempotency key, and what has become of it",
        ("key",), {"200": ReceiptState}, _GONE,
    ),
    _Row("get", "/v1/openapi.json", "openapi", "This description", (), {"200": None}, {}),
)  # fmt: skip


@cache
def description() -> dict[str, Any]:
    """The document, which callers do not change."""
    models = [Request, Accepted, Check, MessageState, ReceiptState, RecipientResult, ProblemDetails]
    _, schemas = msgspec.json.schema_components(models, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for row in _ROWS:
        paths.setdefault(row.path, {})[row.method] = _operation(row)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "relaymta: mail by HTTP",
            "version": __version__,
            "description": _line(_TEXT),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _written(schemas),
            "parameters": {name: {"name": name} | one for name, one in _PARAMETERS.items()},
            "headers": _HEADERS,
            "securitySchemes": {
                "basic": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "user and password, or key, of an account of the relay",
                },
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "an OAuth token, where accounts.tokens says of whom",
                },
            },
        },
        # {}: of clients in networks that may relay, where the listener does not require a login
        "security": [{"basic": []}, {"bearer": []}, {}],
    }


def text() -> str:
    """The document as JSON, as it is committed."""
    return msgspec.json.format(msgspec.json.encode(description()), indent=1).decode() + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _ref(kind: str, name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _written(schemas: dict[str, Any]) -> dict[str, Any]:
    """Models as applications see them."""
    problem = schemas["ProblemDetails"]["properties"]
    for name in _OF_OPERATORS:
        del problem[name]
    problem["recipients"]["items"] = _ref("schemas", "RecipientResult")
    problem["messages"]["items"] = _ref("schemas", "MessageResult")
    schemas["ProblemDetails"]["description"] = (
        "The JSON of an answer that is an error. `argument`: the field, parameter or header that is wrong; `recipients`: of "
        "a message that nobody gets, each with the reply; `messages`: of a batch of which nobody gets any, in its order."
    )
    for one in schemas.values():
        one["description"] = _line(one.get("description", ""))
    return dict(sorted(schemas.items()))


def _operation(row: _Row) -> dict[str, Any]:
    answers = {status: _answer(model) for status, model in row.answers.items()}
    if row.body:
        answers["202"]["headers"] = {"Idempotency-Replayed": _ref("headers", "Idempotency-Replayed")}
        answers["202"]["links"] = {"message": {"operationId": "message", "parameters": {"id": "$response.body#/id"}}}
    problems = {status: _problem(status, text) for status, text in sorted((_ALL | row.problems).items())}
    found: dict[str, Any] = {"operationId": row.name, "summary": row.summary, "responses": answers | problems}
    if row.parameters:
        found["parameters"] = [_ref("parameters", name) for name in row.parameters]
    if row.body:
        found["requestBody"] = {"required": True, "content": _bodies()}
    return found


def _bodies() -> dict[str, Any]:
    request = _ref("schemas", "Request")
    form = {
        "type": "object",
        "properties": {"message": request},
        "required": ["message"],
        "additionalProperties": {"type": "string", "contentMediaType": "application/octet-stream"},
        "description": "`message`: the JSON; other parts are files, each of which an attachment names by its `part`.",
    }
    return {
        "application/json": {"schema": request},
        "multipart/form-data": {"schema": form, "encoding": {"message": {"contentType": "application/json"}}},
        "message/rfc822": {"schema": {"type": "string", "contentMediaType": "message/rfc822"}},
    }


def _answer(model: Any) -> dict[str, Any]:
    if model is None:
        return {"description": "OpenAPI 3.1", "content": {"application/json": {"schema": {"type": "object"}}}}
    content = {"application/json": {"schema": _ref("schemas", model.__name__)}}
    return {"description": _line(model.__doc__ or ""), "content": content}


def _problem(status: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"description": text}
    if status in _WITH_HEADERS:
        found["headers"] = {name: _ref("headers", name) for name in _WITH_HEADERS[status]}
    return found | {"content": {"application/problem+json": {"schema": _ref("schemas", "ProblemDetails")}}}


if __name__ == "__main__":
    sys.stdout.write(text())
