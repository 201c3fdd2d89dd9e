"""The manual pages: there is one for each verb, they are well-formed, and what is in the help is on the page as it is there."""

import re
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from relaymta.cli import main
from relaymta.cli.manual import STATUSES, _of_command, pages, roff
from relaymta.config.describing import leaves
from tests.support.programs import need
from tests.test_cli import ALL
from tests.test_cli import leaves as commands

HOSTILE = [
    ".SH NAME", "'br", "\\fBx", "back\\slash \\", '"quoted" and "', "it's `", "-v --long-one", "~a^b", "Grüße, 漢", "a\\", "..",
    "%s {x}", ".", "\\", "\\&.x", "\\*(xx \\n(yy \\(aq", ".de x",
]  # fmt: skip


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return dict(pages())


def rendered(text: str, folder: Path) -> str:
    """A page as a terminal shows it, in long lines. Warnings of groff are errors."""
    need("groff")
    path = folder / "page"
    path.write_text(text, encoding="ascii")
    command = ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=400n", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


def test_each_verb_has_a_page(written):
    verbs = {path[:end] for path in ALL for end in range(1, len(path) + 1) if not _is_hidden(path)}
    expected = {f"man1/{'-'.join(('relaymta', *path))}.1" for path in verbs} | {"man1/relaymta.1", "man5/relaymta.toml.5"}
    assert set(written) == expected


def _is_hidden(path: tuple[str, ...]) -> bool:
    return main.get_command(click.Context(main), path[0]).hidden


def test_pages_are_well_formed(written, tmp_path):
    need("groff")
    for name, text in written.items():
        (tmp_path / Path(name).name).write_text(text, encoding="ascii")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    command = ["groff", "-man", "-ww", "-Tutf8", "-z"]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "" and len(paths) == len(written)
    (tmp_path / "wrong").write_text(".nonsense\n")
    assert subprocess.run([*command, *paths, str(tmp_path / "wrong")], capture_output=True, check=True).stderr != b""


def test_what_is_in_the_help_is_on_the_page(written, tmp_path):
    for path in (("queue", "list"), ("filter", "test"), ("message",), ("serve",)):
        shown = rendered(written[f"man1/{'-'.join(('relaymta', *path))}.1"], tmp_path)
        help_text = CliRunner().invoke(main, [*path, "--help"]).stdout
        options = re.findall(r"^  (-.*?)(?:  |$)", help_text, re.M)
        assert len(options) >= 4 and all(f"       {option.split('  ')[0]}" in shown for option in options)
        command = commands()[path] if path in commands() else main.get_command(click.Context(main), path[0])
        for paragraph in re.split(r"\n\s*\n", command.help):
            assert " ".join(paragraph.replace("`", "").split()) in shown
    for verb in ("relaymta-message-show(1)", "relaymta.toml(5)", "relaymta(1)"):
        assert verb in rendered(written["man1/relaymta-message.1"], tmp_path)


def test_the_configuration_has_a_page_with_every_key(written, tmp_path):
    shown = rendered(written["man5/relaymta.toml.5"], tmp_path)
    for key, field in leaves():
        name = field.alias or key.rpartition(".")[2]
        assert re.search(rf"^       {name}(?: |$)", shown, re.M), key
        assert " ".join(field.description.replace("`", "").split()) in " ".join(shown.split()), key
    assert '       special = { Drafts = "\\Drafts", Sent = "\\Sent"'.replace("\\", "\\\\") in shown
    assert re.search(r"^   \[\[filter\.score\]\]$", shown, re.M)


def test_the_statuses_are_those_of_the_page(written):
    text = (Path(__file__).parents[1] / "docs/cli.md").read_text().partition("## Exit statuses")[2].partition("\n## ")[0]
    rows = {int(number): what for number, what in re.findall(r"^\| (\d+) \| (.*) \|$", text, re.M)}
    assert list(rows) == list(STATUSES)
    assert all(
        set(re.findall(r"[a-z]{6,}", STATUSES[one])) <= set(re.findall(r"[a-z]{6,}", rows[one])) | {"another"} for one in rows
    )


def test_every_character_means_itself(tmp_path):
    """A help text cannot become a request of roff, and nothing of it is lost."""
    text = "\n\n".join(HOSTILE)

    @click.command(name="x", help=text)
    @click.option("--y", metavar="A-'B", help=" ".join(HOSTILE))
    def command(y: str) -> None: ...

    ((_, page),) = _of_command(command, click.Context(command, info_name="x"))
    shown = rendered(page, tmp_path)
    for one in HOSTILE:
        assert f"       {one}" in [line.rstrip() for line in shown.splitlines()], one
    assert " ".join(HOSTILE) in shown.replace("  ", " ") and "--y A-'B" in shown
    assert roff("see `a b` and `-c`") == "see \\fBa b\\fP and \\fB\\-c\\fP"


def test_they_are_written_where_they_belong(tmp_path):
    done = CliRunner().invoke(main, ["manual", str(tmp_path / "man")])
    assert done.exit_code == 0 and f"{tmp_path}/man/man1/relaymta-queue-list.1" in done.stdout.splitlines()
    assert (tmp_path / "man/man5/relaymta.toml.5").read_text().startswith('.TH "RELAYMTA.TOML" "5" "')
    assert CliRunner().invoke(main, ["manual", str(tmp_path / "man")]).exit_code == 0
    assert CliRunner().invoke(main, ["manual", "/dev/null/x"]).exit_code == 73


def test_a_day_can_be_given(monkeypatch):
    """So that a package that is built again is the same."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert '"1970-01-02"' in next(pages())[1]
