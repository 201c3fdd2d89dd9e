"""What shells complete: verbs, options, values, files. Bash itself runs here; zsh and fish in tests/packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from relaymta.cli import COMPLETE, VERBS, main
from relaymta.cli.completion import SHELLS, _Bash
from tests.support.programs import need

SHOWN = sorted(name for name, verb in VERBS.items() if verb.line)


def completed(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COMP_WORDS", line)
    shell = _Bash(main, {}, "relaymta", COMPLETE)
    return [one.value if one.type == "plain" else f"({one.type})" for one in shell.get_completions(*shell.get_completion_args())]


@pytest.mark.parametrize(("line", "expected"), [
    ("relaymta ", SHOWN),
    ("relaymta qu", ["quarantine", "queue"]),
    ("relaymta stand", []),  # a verb that is not shown
    ("relaymta --s", ["--set", "--spool"]),
    ("relaymta config ", ["check", "describe", "show"]),
    ("relaymta queue list --un", ["--unseen"]),
    ("relaymta -c x.toml --set a=b queue l", ["list"]),
    ("relaymta queue -c x.toml fl", ["flush"]),
    ("relaymta serve --listen [::1]:25 --wo", ["--workers"]),
    ("relaymta dkim keygen a.example --type ", ["rsa", "ed25519"]),
    ("relaymta dkim keygen a.example --type=e", ["ed25519"]),
    ("relaymta completion ", SHELLS),
    ("relaymta filter learn ", ["spam", "ham"]),
    ("relaymta config check -c ", ["(file)"]),
    ("relaymta config check --config=/e", ["(file)"]),
    ("relaymta filter learn spam ", ["(file)"]),
    ("relaymta rule test ", ["(file)"]),
    ("relaymta sieve put a@b.example ", ["(file)"]),
    ("relaymta queue list --spool ", ["(dir)"]),
    ("relaymta assets ", ["(dir)"]),
    ("relaymta message show ", []),
    # What is wrong in front of the cursor ends nothing, and nothing is written between the lines of the terminal.
    ("relaymta message show no-id --j", ["--json"]),
    ("relaymta queue list --domain '' --q", ["--queue"]),
    ("relaymta mailbox create nobody --p", ["--password"]),
    ("relaymta queue list --from 'a b", []),
])  # fmt: skip
def test_what_is_completed(line, expected, monkeypatch, capfd):
    assert completed(line, monkeypatch) == expected
    assert capfd.readouterr() == ("", "")


IMPORTED = """
import sys
from relaymta.cli import main
try:
    main([], prog_name="relaymta")
except SystemExit as end:
    assert end.code == 0
print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(("line", "verbs", "heavy"), [
    ("relaymta ", set(), set()),
    ("relaymta queue list --", {"queue", "peer"}, {"msgspec"}),
    ("relaymta config ", {"config", "peer"}, {"msgspec"}),
])  # fmt: skip
def test_a_completion_imports_no_more_than_it_needs(line, verbs, heavy):
    environment = os.environ | {COMPLETE: "bash_complete", "COMP_WORDS": line}
    done = subprocess.run([sys.executable, "-P", "-c", IMPORTED], env=environment, capture_output=True, text=True, check=True)
    modules = set(done.stderr.split())
    ours = {name.removeprefix("relaymta.cli.") for name in modules if name.startswith("relaymta.cli.")}
    assert ours == {"console", "options", "completion"} | verbs and done.stdout
    assert {"asyncio", "pydantic", "msgspec", "email", "lmdb", "rich"} & modules == heavy


BASH = """
compopt() { printf '(%s)\\n' "$2"; }
completed() {
    COMP_LINE=$1 COMP_POINT=${#1}
    _relaymta_completion relaymta "" ""
    printf '%s\\n' "$1" "${COMPREPLY[@]}" ""
}
complete -p relaymta
"""


def test_bash_completes(tmp_path):
    need("bash")
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    (tmp_path / "relaymta").write_text(f'#!/bin/sh\nexec {sys.executable} -I -c "{PROGRAM}"\n')
    (tmp_path / "relaymta").chmod(0o755)
    lines = ["relaymta que", "relaymta queue list --fr", "relaymta config show --config ", "relaymta serve --listen a:25 --wor"]
    calls = "\n".join(f"completed '{line}'" for line in lines)
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}{BASH}{calls}"], capture_output=True, text=True, timeout=100, check=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == (
        "complete -o nosort -F _relaymta_completion relaymta\n"
        "relaymta que\nqueue\n\nrelaymta queue list --fr\n--from\n\n(default)\nrelaymta config show --config \n\n"
        "relaymta serve --listen a:25 --wor\n--workers\n\n"
    )


PROGRAM = f"import sys; sys.path[:0] = ['{Path(__file__).parents[1]}']; from relaymta.cli import main; main(prog_name='relaymta')"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_name_the_program_and_its_function(shell):
    found = CliRunner().invoke(main, ["completion", shell])
    assert found.exit_code == 0 and found.stderr == ""
    assert f"_RELAYMTA_COMPLETE={shell}_complete" in found.stdout and "_relaymta_completion" in found.stdout
    assert CliRunner().invoke(main, ["completion", "csh"]).exit_code == 64
