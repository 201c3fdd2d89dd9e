"""docs/injection.md: its examples are run beside a relay, and its JSON is what the relay takes."""

import email
import email.policy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.injecting import Injecting, basic
from tests.support.pages import blocks
from tests.support.programs import need

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/injection.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8025"
ID = re.compile(r"\b1[0-9A-HJKMNP-TV-Z]{12}\b")
INVOICE = b"%PDF-1.7 " + bytes(range(256)) * 500


@pytest.fixture(scope="module")
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, peer: FakeMx) -> Iterator[Injecting]:
    with Injecting(tmp_path_factory.mktemp("relay"), f"127.0.0.1:{peer.port}") as running:
        yield running


def fenced(language: str) -> str:
    """The example in a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    return str(found)


def indented() -> list[str]:
    return blocks(re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S))


def documents() -> Iterator[dict]:
    """The JSON of requests."""
    for block in indented():
        for text in block.split("\n\n"):
            if text.startswith('{"from'):
                yield json.loads(text)
            elif text.startswith("curl ") and "--json" in text:
                yield json.loads(text.partition("--json '")[2].rstrip().removesuffix("'"))


def run(relay: Injecting, folder: Path, *command: str, more: dict[str, str] | None = None) -> str:
    """What a program prints."""
    (folder / "invoice.pdf").write_bytes(INVOICE)
    environment = os.environ | {"RELAY_KEY": "secret"} | (more or {})
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def program(relay: Injecting, folder: Path, language: str, name: str) -> str:
    """The path of an example, which sends to this relay."""
    text = fenced(language)
    assert text.count(URL) == 1
    (folder / name).write_text(text.replace(URL, f"http://127.0.0.1:{relay.http}"), encoding="utf-8")
    return str(folder / name)


def arrived(peer: FakeMx, ident: str) -> EmailMessage:
    def found() -> list[bytes]:
        return [data for _, _, data in peer.messages if f" id {ident}".encode() in data]

    message = email.message_from_bytes(wait_for(found)[0], policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def check(relay: Injecting, peer: FakeMx, folder: Path, command: list[str], more: dict[str, str] | None = None) -> None:
    """It sends one message with the invoice, by the account, and a second run sends none."""
    first = run(relay, folder, *command, more=more)
    (ident,) = set(ID.findall(first))
    assert set(ID.findall(run(relay, folder, *command, more=more))) == {ident}
    message = arrived(peer, ident)
    assert "orders@shop.example" in message["From"] and "ann@example.org" in message["To"]
    assert [part.get_content() for part in message.iter_attachments()] == ([INVOICE] if "invoice" in message["Subject"] else [])
    assert sum(f" id {ident}".encode() in data for _, _, data in peer.messages) == 1
    wait_for(lambda: set(relay.states(ident, **basic("shop")).values()) == {"delivered"})


def test_curl(relay: Injecting, peer: FakeMx, tmp_path: Path) -> None:
    need("curl")
    check(relay, peer, tmp_path, ["sh", program(relay, tmp_path, "sh", "send.sh")])


def test_statuses_of_curl(relay: Injecting, tmp_path: Path) -> None:
    """Those that docs/programs.md has."""
    need("curl")
    text = re.sub(r"--retry 5 --retry-connrefused", "", fenced("sh"))
    for where, to, status, said in (
        (f"http://127.0.0.1:{relay.http}", "nobody", 22, '"argument":"to[0]"'),
        (f"http://127.0.0.1:{free_port()}", "ann@example.org", 7, "Failed to connect"),
    ):
        command = text.replace(URL, where).replace("Ann <ann@example.org>", to)
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=os.environ | {"RELAY_KEY": "secret"})
        assert done.returncode == status and said in done.stdout + done.stderr, done
    row = re.search(r"^\| \[curl, by HTTP\].*", (ROOT / "docs/programs.md").read_text(encoding="utf-8"), re.M)
    assert row is not None and re.findall(r"\| (?:status )?(\d+)", row[0]) == ["22", "7"]


def test_javascript(relay: Injecting, peer: FakeMx, tmp_path: Path) -> None:
    check(relay, peer, tmp_path, [need("node"), program(relay, tmp_path, "js", "send.mjs")])


def test_php(relay: Injecting, peer: FakeMx, tmp_path: Path) -> None:
    """Without extensions that Debian's php-cli does not have (-n: without those that are installed)."""
    check(relay, peer, tmp_path, [need("php"), "-n", program(relay, tmp_path, "php", "send.php")])


@pytest.mark.prove
def test_go(relay: Injecting, peer: FakeMx, tmp_path: Path) -> None:
    """Debian's compiler has 450 MB, which .ci/run does not install: where there is one, the example is run."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin:/usr/lib/go/bin")
    if go is None:
        pytest.skip("go is missing: apt-get install golang-go")
    more = {"GOCACHE": str(tmp_path / "cache"), "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod", "HOME": str(tmp_path)}
    source = program(relay, tmp_path, "go", "send.go")
    run(relay, tmp_path, go, "vet", source, more=more)
    check(relay, peer, tmp_path, [go, "run", source], more)


def test_python(relay: Injecting, peer: FakeMx, tmp_path: Path) -> None:
    check(relay, peer, tmp_path, [sys.executable, program(relay, tmp_path, "python", "send.py")], {"PYTHONPATH": str(ROOT)})


def test_commands_of_the_text(relay: Injecting, peer: FakeMx, tmp_path: Path) -> None:
    """curl with JSON, with a form, with a whole message, and the question what has become of it."""
    need("curl")
    (tmp_path / "message.eml").write_bytes(b"From: orders@shop.example\nTo: nobody@example.org\nSubject: raw\n\nhello\n")
    (form,) = (one for one in documents() if "attachments" in one)
    (tmp_path / "message.json").write_text(json.dumps(form))
    found = [text for block in indented() for text in block.split("\n\n") if text.startswith("curl ")]
    idents: list[str] = []
    for command in found:
        command = command.replace(URL, f"http://127.0.0.1:{relay.http}")
        if idents:
            command = command.replace("1M8MZK99Q0000", idents[0])
        said = run(relay, tmp_path, "bash", "-c", f"set -e; {command}")
        assert ID.search(said), (command, said)
        idents.append(ID.findall(said)[0])
    assert len(found) == 4 and idents[0] == idents[1]
    assert arrived(peer, idents[0])["Subject"] == "Your order 17"
    assert [part.get_content() for part in arrived(peer, idents[2]).iter_attachments()] == [INVOICE]
    assert arrived(peer, idents[3])["Subject"] == "raw"
    assert list(relay.states(idents[3], **basic("shop"))) == ["ann@example.org"]


def test_the_json_of_the_page_is_what_the_relay_takes(relay: Injecting) -> None:
    every = list(documents())
    assert len(every) == 3 and any("batch" in one for one in every)
    for one in every:
        for file in one.pop("attachments", []):
            assert set(file) == {"filename", "content_type", "part"}
        assert relay.post(one, path="/v1/messages?validate=1", **basic("shop")).status == 200, one


def test_the_batch_of_the_page_is_what_it_says(relay: Injecting, peer: FakeMx) -> None:
    (one,) = (one for one in documents() if "batch" in one)
    said = relay.post(one, **basic("shop"))
    texts = [arrived(peer, row["id"]).get_body(("plain",)) for row in said.json["messages"]]
    lines = [text.get_content().splitlines() for text in texts if text is not None]
    assert lines == [["Dear Ann,", "- a pen", "Shop Ltd"], ["Dear Bob,", "- ink", "- paper", "Shop Ltd"]]
    assert arrived(peer, said.json["messages"][1]["id"])["Subject"] == "Bob, your order 18"


def test_the_states_and_fields_of_the_page_are_all() -> None:
    document = json.loads((ROOT / "docs/injection-openapi.json").read_text(encoding="utf-8"))
    schemas = document["components"]["schemas"]
    described = PAGE.partition("## What has become of it")[2].partition("\n## ")[0]
    states = schemas["RecipientState"]["description"].partition("`state`: ")[2].partition(". `reply`")[0]
    named = {re.sub(r" \(.*\)", "", one) for one in re.split(r", (?![^(]*\))| or ", states)}
    assert set(re.findall(r"^\| `([a-z ]+)` \|", described, re.M)) - {"state"} == named
    fields = PAGE.partition("## A message as JSON")[2].partition("\n## ")[0]
    rows = {name for row in re.findall(r"^\| (`.*?) \|", fields, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert rows == set(schemas["Request"]["properties"])


def test_the_configuration_of_the_page_is_complete() -> None:
    block = next(one for one in indented() if "[[listener]]" in one)
    assert [one["protocol"] for one in tomllib.loads(block)["listener"]] == ["http", "http"]
