"""The description of the API (OpenAPI 3.1), made of the table of its operations and their models."""

from typing import Any

import msgspec

from relaymta import __version__
from relaymta.admin.tokens import SCOPES
from relaymta.api.routes import PREFIX, ROUTES, Route
from relaymta.problems import ProblemDetails

__all__ = ["description"]

_REFERENCE = "#/components/schemas/{name}"
_ERRORS = {
    "400": "an argument is wrong; `argument` names it",
    "401": "no valid token",
    "403": "the token does not allow it",
    "404": "what it is about does not exist",
    "409": "refused as things are now",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "429": "too many wrong tokens from this address",
    "503": "the relay, or a worker, does not answer; `workers` names these",
}


def description() -> dict[str, Any]:
    """The document."""
    kinds = {route.arguments for route in ROUTES.values()} | {route.answer for route in ROUTES.values() if not route.octets}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components([*ordered, ProblemDetails], ref_template=_REFERENCE)
    paths: dict[str, Any] = {}
    for route in ROUTES.values():
        paths.setdefault(PREFIX + route.path, {})[route.method.lower()] = _operation(route, components)
    used = {name: schema for name, schema in components.items() if name not in _only_in_queries()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "relaymta",
            "version": __version__,
            "description": "What operators do with the command line, by HTTP. Times are seconds since 1970 UTC; 0: never.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": used,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "of `relaymta token create`; not on the unix socket"}
            },
        },
        "security": [{"token": []}],
    }


def _only_in_queries() -> set[str]:
    """The models whose fields are parameters, and which no body is."""
    bodies = {route.arguments.__name__ for route in ROUTES.values() if route.changes}
    return {route.arguments.__name__ for route in ROUTES.values()} - bodies


def _operation(route: Route, components: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": route.name,
        "summary": (route.run.__doc__ or "").rstrip("."),
        "description": f"Scope `{route.scope}`: {SCOPES[route.scope]}. {_text(route.arguments)}".strip(),
        "security": [{"token": []}],
        "x-scope": route.scope,
        "responses": {"200": _answer(route), **{status: _error(text) for status, text in _ERRORS.items()}},
    }
    if route.changes:
        schema = {"$ref": _REFERENCE.format(name=route.arguments.__name__)}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif parameters := _parameters(route, components[route.arguments.__name__]):
        found["parameters"] = parameters
    return found


def _text(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split())


def _parameters(route: Route, model: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, schema in model["properties"].items():
        in_path = f"{{{name}}}" in route.path
        where = {"name": name, "in": "path" if in_path else "query", "schema": schema}
        found.append(where | {"required": in_path or name in model.get("required", [])})
    return found


def _answer(route: Route) -> dict[str, Any]:
    if route.octets:
        content: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        return {"description": "The message data.", "content": content}
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(name=route.answer.__name__)}}}
    if route.lines is not None:
        content["application/x-ndjson"] = {"schema": {"type": "string", "description": "all that match, an object a line"}}
    return {"description": _text(route.answer), "content": content}


def _error(text: str) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(name="ProblemDetails")}
    return {"description": text, "content": {"application/problem+json": {"schema": schema}}}
