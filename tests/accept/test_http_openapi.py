"""The description of HTTP injection: it is valid, it is the one that is committed, and it names all that the program does."""

import json
import re
from pathlib import Path

from openapi_spec_validator import validate

from relaymta.accept.http.openapi import description, text
from relaymta.accept.http.requests import _OPERATIONS

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs/injection-openapi.json"
SOURCES = sorted((ROOT / "relaymta/accept/http").glob("*.py"))
# Given by the operations alone, and not as a Problem of its own: of methods that no operation has.
OF_NO_OPERATION = {"405"}


def test_it_is_valid_openapi_3_1():
    validate(description())
    assert description()["openapi"].startswith("3.1.")


def test_the_committed_one_is_that_of_the_program():
    """python -m relaymta.accept.http.openapi > docs/injection-openapi.json"""
    assert COMMITTED.read_text(encoding="utf-8") == text()


def test_it_has_all_operations():
    described = {(path, method.upper()) for path, row in description()["paths"].items() for method in row}
    for pattern, methods in _OPERATIONS:
        for method in methods:
            found = {one for one in described if one[1] == method and pattern.fullmatch(re.sub(r"\{\w+\}", "x", one[0]))}
            assert len(found) == 1, (pattern.pattern, method)
            described -= found
    assert not described


def test_it_has_all_statuses():
    """Those of each `Problem(...)` of the program, and of the tables by which replies become statuses."""
    given = set()
    for source in SOURCES:
        code = source.read_text(encoding="utf-8")
        given |= set(re.findall(r"Problem\((\d{3})", code))
        for one, other in re.findall(r"\b([45]\d\d) if .* else ([45]\d\d)", code):
            given |= {one, other}
        for table in re.findall(r"^_(?:LATER|NEVER) = (\{.*\})", code, re.M):
            given |= set(re.findall(r": (\d{3})", table))
    operation = description()["paths"]["/v1/messages"]["post"]
    assert len(given) > 8 and given - OF_NO_OPERATION <= set(operation["responses"]) | {"404"}
    for row in description()["paths"].values():
        for one in row.values():
            assert {"400", "401", "403", "500", "503"} <= set(one["responses"])


def test_it_names_all_fields_of_a_request_and_no_word_of_operators():
    whole = json.dumps(description())
    assert set(description()["components"]["schemas"]["Request"]["properties"]) >= {"from", "to", "batch", "substitutions"}
    assert "from_" not in whole and "matched" not in whole and "workers" not in whole


def test_a_service_that_sends_nothing_back_is_never_asked_again_too_early():
    """What may be tried again says when."""
    for row in description()["paths"].values():
        for one in row.values():
            for status in {"409", "429", "503"} & set(one["responses"]):
                assert "Retry-After" in one["responses"][status]["headers"]
