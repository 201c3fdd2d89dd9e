"""The answers of a running relay are those that docs/injection-openapi.json describes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.conftest import PROVE
from tests.support.daemon import PATIENCE, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.injecting import Injecting, Said, basic, message

DOCUMENT = Path(__file__).parents[2] / "docs/injection-openapi.json"
MAIL = message()
RAW = b"From: a@shop.example\r\nTo: c@d.example\r\nSubject: hello\r\n\r\nhello\r\n"
RULE = '{name="never",header=["Subject: never"],reply="552 5.7.1 {match} is not taken here",enforce=true}'
SHOP, ANN, WRONG = basic("shop"), basic("ann"), basic("shop", "wrong")


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injecting]:
    with FakeMx({}) as peer:
        settings = "limits.message_size=100000", f"mail_rule=[{RULE}]"
        with Injecting(tmp_path_factory.mktemp("relay"), f"127.0.0.1:{peer.port}", *settings) as running:
            yield running


class Described:
    """The document, by which answers are checked; fields that it does not name are wrong here."""

    def __init__(self) -> None:
        self.document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
        for schema in self.document["components"]["schemas"].values():
            if schema["type"] == "object":
                schema["additionalProperties"] = False

    def resolved(self, found: Any) -> Any:
        while "$ref" in found:
            *_, kind, name = found["$ref"].split("/")
            found = self.document["components"][kind][name]
        return found

    def check(self, method: str, path: str, answer: Said) -> None:
        bare = path.partition("?")[0]
        row = next(row for at, row in self.document["paths"].items() if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", at), bare))
        described = row[method.lower()]["responses"][str(answer.status)]
        (kind,) = described["content"]
        headers = {name.lower(): value for name, value in answer.headers.items()}
        assert headers["content-type"].partition(";")[0] == kind
        schema = described["content"][kind]["schema"]
        Draft202012Validator({**schema, "components": self.document["components"]}).validate(answer.json)
        for name, header in described.get("headers", {}).items():
            if answer.status >= 400:
                assert name.lower() in headers
            if name.lower() in headers:
                value: Any = headers[name.lower()]
                schema = self.resolved(header)["schema"]
                Draft202012Validator(schema).validate(int(value) if schema.get("type") == "integer" else value)


def form(*parts: tuple[str, bytes]) -> bytes:
    lines = [b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), body) for name, body in parts]
    return b"".join(lines) + b"--x--\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
EML = {"Content-Type": "message/rfc822"}
OWN = {**MAIL, "from": "ann@corp.example"}
WITH_FILE = {**MAIL, "attachments": [{"filename": "a.bin", "part": "a"}]}
ASKED: list[tuple[int, str, str, Any, dict[str, str]]] = [
    (202, "POST", "/v1/messages", MAIL, {"Idempotency-Key": "one"}),
    (202, "POST", "/v1/messages", MAIL, {"Idempotency-Key": "one"}),
    (202, "POST", "/v1/messages", form(("message", json.dumps(WITH_FILE).encode()), ("a", b"\0\xff")), FORM),
    (202, "POST", "/v1/messages?tag=a&to=x@d.example&to=y@d.example", RAW, EML),
    (200, "POST", "/v1/messages?validate=1", MAIL, {}),
    (200, "POST", "/v1/messages?validate=1&from=", RAW, EML),
    (400, "POST", "/v1/messages", b"{", {"Content-Type": "application/json"}),
    (400, "POST", "/v1/messages", MAIL, {"Idempotency-Key": "a b"}),
    (400, "POST", "/v1/messages", form(("a", b"")), FORM),
    (400, "POST", "/v1/messages?nobody=1", RAW, EML),
    (401, "POST", "/v1/messages", MAIL, {"Authorization": ""}),
    (401, "POST", "/v1/messages", MAIL, WRONG),
    (403, "POST", "/v1/messages", MAIL, ANN),
    (413, "POST", "/v1/messages", {**MAIL, "text": "x" * 120_000}, {}),
    (413, "POST", "/v1/messages", b"x" * 1_500_000, {"Content-Type": "application/json"}),
    (415, "POST", "/v1/messages", b"hello", {"Content-Type": "text/plain"}),
    (422, "POST", "/v1/messages", {**MAIL, "to": "nobody"}, {}),
    (422, "POST", "/v1/messages", {**MAIL, "text": "other"}, {"Idempotency-Key": "one"}),
    (202, "POST", "/v1/messages", {**OWN, "to": [f"{number}@d.example" for number in range(25)]}, ANN),
    (429, "POST", "/v1/messages", OWN, ANN),
    (200, "GET", "/v1/receipts/one", None, {}),
    (404, "GET", "/v1/receipts/two", None, {}),
    (404, "GET", "/v1/messages/1ZZZZZZZZZZZZ", None, {}),
    (404, "GET", "/v1/messages/x", None, {}),
    (200, "GET", "/v1/openapi.json", None, {}),
]  # fmt: skip


def test_answers_are_as_described(relay: Injecting) -> None:
    described = Described()
    seen = set()
    for status, method, path, body, more in ASKED:
        answer = relay.ask(method, path, body, SHOP | more, secure=True)
        assert answer.status == status, (path, body, answer)
        described.check(method, path, answer)
        seen.add((method, path.partition("?")[0], status))
    refused = relay.post({**MAIL, "subject": "never"})
    assert refused.status == 403 and refused.json["recipients"][0]["reply"].startswith("5"), refused
    described.check("POST", "/v1/messages", refused)
    assert {status for _, _, status in seen} >= {200, 202, 400, 401, 403, 404, 413, 415, 422, 429}


def test_what_becomes_of_a_message_is_as_described(relay: Injecting) -> None:
    described = Described()
    ident = relay.post({**MAIL, "tags": ["a"], "send_at": None}).json["id"]

    def ended() -> bool:
        answer = relay.ask("GET", f"/v1/messages/{ident}")
        described.check("GET", f"/v1/messages/{ident}", answer)
        return bool(answer.json.get("ended"))

    wait_for(ended)
    assert relay.ask("GET", "/v1/openapi.json").json == json.loads(DOCUMENT.read_text(encoding="utf-8"))


def test_a_program_that_knows_the_document_alone_finds_nothing_wrong(relay: Injecting) -> None:
    """Schemathesis: requests drawn from it, valid and not, with and without credentials; the answers are held with it."""
    found = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        reason = "schemathesis is missing: make build installs it"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    command = [
        found, "run", str(DOCUMENT), "--url", f"https://localhost:{relay.https}", "--auth", "shop:secret", "--checks", "all",
        "--tls-verify", "false",
        # what the document allows may be refused all the same: an address is any string there
        "--exclude-checks", "positive_data_acceptance", "--phases", "coverage,fuzzing", "--max-examples", "20",
        "--max-time", "60" if PROVE else "8",
        "--seed", "17", "--no-color", "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2, cwd=relay.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 selected / 4 total" in done.stdout
