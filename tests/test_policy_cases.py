"""`relaymta policy test`, and the example of docs/hooks.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner, Result

from relaymta.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")

HOOKS = """
from relaymta.hooks import *
async def on_rcpt(client, envelope, recipient):
    match recipient:
        case "r@d.example": return reject("why", "550 5.1.1 Nobody")
        case "e@d.example": raise ValueError
        case "w@d.example": return 1
        case _: return tempfail(f"{client.helo} {envelope.sender}")
@wants_body
async def on_message(mail): return accept(Add("X-Size", str(len(mail.body.read()))), SetSender(""))
async def choose_route(mail): return "there"
async def on_delivered(attempt): assert attempt.recipients == ("a@b.example",), attempt
"""
RCPT = '[[case]]\nname = "{}"\nevent = "on_rcpt"\nrecipient = "{}@d.example"\n'


def ran(folder: Path, cases: str, *more: str, hooks: str = HOOKS) -> Result:
    (folder / "policy.py").write_text(hooks)
    (folder / "cases").mkdir(exist_ok=True)
    (folder / "cases/all.toml").write_text(cases)
    which = [] if "-c" in more else ["--file", str(folder / "policy.py")]
    return CliRunner().invoke(main, ["policy", "test", str(folder / "cases"), *more, *which])


PASSING = "".join([
    RCPT.format("refused", "r") + 'expect = "reject"\nreason = "why"\nreply = "550 5.1.1 Nobody"\n',
    RCPT.format("raises", "e") + 'expect = "raised"\n', RCPT.format("no verdict", "w") + 'expect = "failed"\n',
    RCPT.format("records", "x") + 'expect = "tempfail"\nreason = "h s@b.example"\nclient = { helo = "h" }\n'
    'envelope = { sender = "s@b.example" }\n',
    '[[case]]\nname = "text"\nevent = "on_message"\nheader = ["Subject: x"]\nbody = "one\\ntwo\\n"\nexpect = "accept"\n'
    'changes = [{ do = "add", name = "X-Size", value = "10" }, { do = "set_sender", address = "" }]\n',
    '[[case]]\nname = "file"\nevent = "choose_route"\nmessage = "../m.eml"\nexpect = "route"\nroute = "there"\n',
    '[[case]]\nname = "told"\nevent = "on_delivered"\nattempt = { recipients = ["a@b.example"] }\n',
])  # fmt: skip


def test_cases_that_pass(tmp_path: Path) -> None:
    (tmp_path / "m.eml").write_text("Subject: x\n\nhello\n")
    done = ran(tmp_path, PASSING)
    assert (done.exit_code, done.output) == (0, "7 cases: 7 pass, 0 fail\n")


@pytest.mark.parametrize("case, why", [
    (RCPT.format("a", "r"), "a: expected none, got reject (why)"),
    (RCPT.format("a", "r") + 'expect = "reject"\nreply = "550 x"\n', "expected reply '550 x', got '550 5.1.1 Nobody'"),
    (RCPT.format("a", "r") + 'expect = "reject"\nreason = "x"\n', "expected reason 'x', got 'why'"),
    (RCPT.format("a", "e"), "policy.py:6)\n  filter test: on_rcpt has raised an exception at "),
    ('[[case]]\nname = "a"\nevent = "on_helo"\n', "expected none, got failed (there is no on_helo in "),
    ('[[case]]\nname = "a"\nevent = "on_message"\nexpect = "accept"\nchanges = []\n', "expected changes []"),
    ('[[case]]\nname = "a"\nevent = "choose_route"\nexpect = "route"\nroute = "x"\n', "expected route 'x', got 'there'"),
    ('[[case]]\nname = "a"\nevent = "on_delivered"\n', "got raised"),
])  # fmt: skip
def test_a_case_that_fails(tmp_path: Path, case: str, why: str) -> None:
    done = ran(tmp_path, PASSING.partition('[[case]]\nname = "file"')[0] + case)
    assert done.exit_code == 1 and why in done.output and done.output.endswith("6 cases: 5 pass, 1 fails\n")
    rows = [json.loads(line) for line in ran(tmp_path, case, "--json").output.splitlines()]
    assert [(row["case"], row["passed"]) for row in rows] == [("a", False)] and rows[0]["why"]


@pytest.mark.parametrize("hooks, cases, why", [
    ("x = (\n", PASSING, "policy.py:1: '(' was never closed"), (HOOKS, "", "there are no cases in it"),
    (HOOKS, '[[case]]\nname = "a"\nevent = "on_rctp"\n', "all.toml:3: case.0.event: there is no hook 'on_rctp' (did you mean"),
    (HOOKS, '[[case]]\nname = "a"\nevent = "on_rcpt"\n', "case.0.recipient: is empty"),
    (HOOKS, '[[case]]\nname = "a"\nevent = "on_helo"\nbody = "x"\n', "all.toml:4: case.0.body: on_helo is shown no message"),
    (HOOKS, '[[case]]\nname = "a"\nevent = "on_message"\nmessage = "none"\n', "No such file"), (HOOKS, "x", "all.toml:1: "),
])  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, hooks: str, cases: str, why: str) -> None:
    done = ran(tmp_path, cases, hooks=hooks)
    assert done.exit_code == 78 and why in done.output, done.output


def test_the_hooks_of_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "relaymta.toml"
    table = '[[filter]]\nname = "{}"\ntype = "python"\nfile = "' + str(tmp_path / "policy.py") + '"\n'
    base = '[[listener]]\naddress = "127.0.0.1:1"\n[[route]]\nname = "here"\nhosts = ["127.0.0.1:2"]\n'
    config.write_text(base + table.format("one"))
    case = '[[case]]\nname = "a"\nevent = "choose_route"\nexpect = "failed"\n'
    done = ran(tmp_path, case, "-c", str(config))
    assert done.exit_code == 0, "there is no such route"
    config.write_text(config.read_text() + table.format("two"))
    assert "which filter? Give --only: one, two" in ran(tmp_path, case, "-c", str(config)).output
    assert ran(tmp_path, case, "-c", str(config), "--only", "two").exit_code == 0
    assert ran(tmp_path, case, "-c", str(config), "--only", "tow").exit_code == 64


def blocks() -> list[str]:
    """The indented texts of the page."""
    return [dedent(text) for text in re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.M)]


def test_the_example_of_the_page(tmp_path: Path) -> None:
    hooks = next(text for text in blocks() if "FORMER" in text)
    cases = next(text for text in blocks() if "[[case]]" in text)
    done = ran(tmp_path, cases, hooks=hooks)
    assert (done.exit_code, done.output) == (0, "4 cases: 4 pass, 0 fail\n")
    assert "# 4 cases: 4 pass, 0 fail" in PAGE


def test_the_functions_of_the_page_are_typed(tmp_path: Path) -> None:
    """mypy, as a user runs it: elsewhere, with the records of the package."""
    texts = [text for text in blocks() if "async def" in text]
    assert len(texts) == 2
    for number, text in enumerate(texts):
        (tmp_path / f"policy{number}.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "."]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_body_of_the_page(tmp_path: Path) -> None:
    hooks = next(text for text in blocks() if "@wants_body" in text)
    case = '[[case]]\nname = "a"\nevent = "on_message"\nbody = "{}"\n'
    refused = case.format("x\\nTVqQAAMAAAAEAAAA\\n") + 'expect = "reject"\nreason = "no programs"\n'
    done = ran(tmp_path, refused + case.format("x"), hooks=hooks)
    assert (done.exit_code, done.output) == (0, "2 cases: 2 pass, 0 fail\n")
