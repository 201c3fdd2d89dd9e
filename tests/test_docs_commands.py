"""What pages say of the command line, of keys and of each other: command lines are parsed, and not run."""

import ast
import contextlib
import io
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from relaymta import metrics
from relaymta.cli import main
from relaymta.config import Account, load
from relaymta.errors import ConfigError
from relaymta.proto import reply
from tests.support.command_lines import Block, blocks, command_lines, outside_of_code
from tests.support.programs import need

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*PAGES, *(ROOT / name for name in ("HACKING.md", "ARCHITECTURE.md", "CHANGELOG.md", "grafana/README.md"))]


def wrong_with(words: tuple[str, ...], whole: bool) -> str:
    """What is wrong with a command line; "": nothing. `whole`: nothing is missing in it."""
    command: click.Command = main
    context: click.Context | None = None
    rest = list(words)
    while True:
        helps = isinstance(command, click.Group) and (not rest or {"-h", "--help", "--version"} & set(rest[:1]))
        if helps or (rest and rest[-1] in ("-h", "--help")):
            return ""
        try:
            context = command.make_context(command.name, rest, parent=context)
        except click.MissingParameter as error:
            return error.format_message() if whole else ""
        except click.UsageError as error:
            return error.format_message()
        except SystemExit as error:
            return f"ends with {error.code}"
        behind = [*context._protected_args, *context.args] if isinstance(command, click.Group) else []
        if not isinstance(command, click.Group) or (command.invoke_without_command and not behind):
            return ""
        try:
            _, found, rest = command.resolve_command(context, behind)
        except click.UsageError as error:
            return error.format_message()
        assert found is not None
        command = found


@pytest.fixture
def nothing_is_looked_at(monkeypatch):
    """Parsing asks neither for files that are named nor for passwords."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: self.coerce_path_result(value))
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n" * 1000))


def test_command_lines_are_valid(nothing_is_looked_at, capsys):
    lines = [line for page in PAGES for line in command_lines(page)]
    assert len(lines) > 400
    wrong = [f"{one.page}:{one.number}: relaymta {' '.join(one.words)}: {why}" for one in lines
             if (why := wrong_with(one.words, one.whole))]  # fmt: skip
    assert not wrong, "\n".join(wrong)


# Links


def slug(title: str) -> str:
    """The anchor of a section, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", outside_of_code(page.read_text(encoding="utf-8"), inline=False), re.M):
        again = sum(1 for one in found if re.sub(r"-\d+$", "", one) == slug(title))
        found.append(f"{slug(title)}-{again}" if again else slug(title))
    return set(found)


def links(page: Path) -> Iterator[tuple[int, str]]:
    text = outside_of_code(page.read_text(encoding="utf-8"))
    for found in re.finditer(r"\]\(([^)\s]+)\)", text):
        yield text.count("\n", 0, found.start()) + 1, found[1]


def leads_nowhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return not re.match(r"\w+:", link) and (not target.exists() or (bool(anchor) and anchor not in anchors(target)))


def test_links_lead_to_pages_and_sections_that_exist():
    every = [(page, number, link) for page in LINKING for number, link in links(page)]
    wrong = [f"{page.name}:{number}: {link}" for page, number, link in every if leads_nowhere(page, link)]
    assert len(every) > 100 and not wrong, "\n".join(wrong)


# Keys


@cache
def keys() -> dict[str, set[str]]:
    """The keys of each table of the configuration; "": those of none."""
    found: dict[str, set[str]] = {"": set()}
    table = ""
    for line in (ROOT / "config/relaymta.toml").read_text(encoding="utf-8").split("\n"):
        if begun := re.fullmatch(r"#?\[{1,2}([a-z_.]+)\]{1,2}", line):
            table = begun[1]
            found.setdefault(table, set())
        elif key := re.match(r"#?([a-z_]+) = ?", line):
            found[table].add(key[1])
    return found


def unknown_key(code: str) -> str:
    """What is wrong with the name of a key in one of the forms `limits.message_size`, `[limits] message_size`, `[[route]] hosts`;
    "": nothing, or it is no such name."""
    if dotted := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*)\.([a-z_]+)(?: = .*)?", code):
        table, key = dotted[1], dotted[2]
        known = table.partition(".")[0] in {name.partition(".")[0] for name in keys()}
        is_key = key in keys().get(table, set()) or f"{table}.{key}" in keys()
        return f"no such key: {code}" if known and not is_key and not is_of_code(code) else ""
    if within := re.fullmatch(r"\[{1,2}([a-z][a-z_.]*)\]{1,2}(?: ([a-z_]+)\b.*)?", code):
        table, key = within[1], within[2]
        return "" if table in keys() and (not key or key in keys()[table]) else f"no such table or key: {code}"
    return ""


def is_of_code(name: str) -> bool:
    """Whether it is a file, a module of ours and what is in it, or an attribute of spans."""
    if name.startswith("network.peer."):
        return True
    module = ROOT / "relaymta" / name.replace(".", "/")
    return any(path.with_suffix(".py").exists() for path in (module, module.parent)) or name.endswith(
        (".md", ".toml", ".py", ".sock", ".com", ".org", ".net", ".example")
    )


def test_keys_that_pages_name_exist():
    wrong = []
    for page in PAGES:
        text = outside_of_code(page.read_text(encoding="utf-8"), inline=False)
        for found in re.finditer(r"`([^`\n]+)`", text):
            if why := unknown_key(found[1]):
                wrong.append(f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}: {why}")
    assert not wrong, "\n".join(wrong)


# Texts of the program


WORD = re.compile(r"[A-Za-z][A-Za-z']+")
PROGRAMS = {
    "relaymta", "jq", "curl", "openssl", "swaks", "ss", "df", "du", "dmesg", "mount", "systemctl", "journalctl", "timedatectl",
    "top", "cat",
}  # fmt: skip
# What is no text of ours: words of the system, the resolver and libraries; and what is put together from short ones.
OTHERS = (
    "Cannot assign requested address", "Could not contact DNS servers", "DNS server returned general failure",
    "Input should be greater than", "BEGIN RSA PRIVATE KEY", "waits for filter", "hold policy",
)  # fmt: skip
REPLYING = (
    "accept/intake.py", "accept/lmtp.py", "accept/quota.py", "accept/rights.py", "config/filters.py", "filter/chain.py",
    "filter/greylist.py", "filter/rules.py", "store/deliver.py", "store/recipients.py",
)  # fmt: skip


def troubleshooting() -> str:
    return (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def test_texts_of_the_program_are_in_its_source():
    """Lines of code that are neither commands nor keys. Of each clause of four words at least half stand there, by threes."""
    words = [word for path in (ROOT / "relaymta").rglob("*.py") for word in WORD.findall(path.read_text(encoding="utf-8"))]
    known = set(zip(words, words[1:], words[2:], strict=False))
    lines = [one for one in blocks(troubleshooting()) if one.text.split()[0] not in PROGRAMS]
    lines = [one for one in lines if not re.match(r"\[\[|[a-z]+ = ", one.text)]
    assert len(lines) > 60
    wrong = []
    for number, text in lines:
        shown = re.sub(r"\S*[/@=]\S*|\S+\.[a-z]\S*", "/", text)  # paths, names and addresses are values
        for clause in re.split(r"[:;,()\[\]]\s", shown):
            own = WORD.findall(clause)
            found = {at + more for at, three in enumerate(zip(own, own[1:], own[2:], strict=False)) if three in known
                     for more in range(3)}  # fmt: skip
            if len(own) > 3 and 2 * len(found) < len(own) and not any(other in text for other in OTHERS):
                wrong.append(f"troubleshooting.md:{number}: {clause}")
    assert not wrong, "\n".join(wrong)


def template(node: ast.Constant | ast.JoinedStr) -> str:
    """An expression for what a string of the source may be; "": it says nothing by itself."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    fixed = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts]
    if len(WORD.findall("".join(fixed))) < 2:
        return ""
    pieces = re.split(r"\{[a-z]*\}", re.sub(r"^\d{3} \d\.\d\.\d+ ", "", "".join(fixed).strip()))
    return ".+".join(map(re.escape, pieces))


def test_replies_are_those_of_the_program():
    known = {value.decode().strip() for value in vars(reply).values() if isinstance(value, bytes)}
    sources = [(ROOT / "relaymta" / name).read_text(encoding="utf-8") for name in REPLYING]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr | ast.Constant)]
    strings = [node for node in nodes if isinstance(node, ast.JoinedStr) or isinstance(node.value, str)]
    texts = re.compile("|".join(filter(None, dict.fromkeys(map(template, strings)))))
    rows = re.findall(r"^\| (`[45]\d\d .*?`) \|", troubleshooting(), re.M)
    said = [one for row in rows for one in re.findall(r"`([^`]+)`", row) if not one.endswith(" ...")]
    assert len(said) > 60
    wrong = [one for one in said if one not in known and not texts.fullmatch(one.split(" ", 2)[2])]
    assert not wrong, "\n".join(wrong)


# Configurations, metrics


# What a part of a configuration lacks, or belongs to another table.
PARTS = re.compile(
    r" needs a \[\[|: there is no \[\[|\(it is a key of |: write \[\[filter\]\] in double brackets|: verdicts: no such key"
)


def configurations(page: Path) -> Iterator[tuple[int, str]]:
    """The runs of lines of code that are TOML with keys of ours: the number of the first, and their text."""
    lines = blocks(page.read_text(encoding="utf-8"))
    runs: list[list[Block]] = []
    for before, one in zip([None, *lines], lines, strict=False):
        if re.match(r"relaymta |\$ ", one.text):
            continue
        if before is None or not runs or before != runs[-1][-1] or one.number > before.number + 2:
            runs.append([])
        runs[-1].append(one)
    known = {key for names in keys().values() for key in names}
    for run in runs:
        text = "\n".join(line.text for line in run)
        with contextlib.suppress(tomllib.TOMLDecodeError):
            found = tomllib.loads(text)
            if set(found) <= set(Account.model_fields):  # lines of the file of accounts
                continue
            if set(found) & ({name.partition(".")[0] for name in keys()} | known):
                yield run[0].number, text


def test_configurations_of_pages_are_valid(tmp_path):
    file, wrong = tmp_path / "part.toml", []
    every = [(page, number, text) for page in PAGES for number, text in configurations(page)]
    assert len(every) > 40
    for page, number, text in every:
        file.write_text(text, encoding="utf-8")
        try:
            load(file, {} if "[[listener]]" in text else {"listener": [{"address": "127.0.0.1:25"}]})
        except ConfigError as error:
            problems = [problem.removeprefix(f"{file}:") for problem in error.problems if not PARTS.search(problem)]
            wrong += [f"{page.name}:{number}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)


def test_metrics_that_pages_name_exist():
    known = metrics.NAMES | metrics.RENAMED.keys() | {"relaymta_build_info"}
    known |= {f"{name}_{part}" for name in metrics.HISTOGRAM_NAMES for part in ("bucket", "sum", "count")}
    named = {(page.name, name) for page in PAGES
             for name in re.findall(r"\brelaymta_[a-z0-9_]*[a-z0-9]\b", page.read_text(encoding="utf-8"))}  # fmt: skip
    assert not [f"{page}: {name}" for page, name in named if name not in known]


# From Postfix


def main_cf() -> list[tuple[list[str], str]]:
    """The rows of main.cf in docs/from-postfix.md: its parameters (or restrictions), and what is said of them."""
    text = (ROOT / "docs/from-postfix.md").read_text(encoding="utf-8")
    part = text.partition("\n## main.cf\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", part, re.M)
    return [(re.findall(r"`([a-z][A-Za-z0-9_]+)", first), second) for first, second in rows]


def test_parameters_of_postfix_are_those_of_postfix():
    shown = subprocess.run([need("postconf"), "-d"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"^(\w+) =", shown, re.M)) | {"smtpd_client_ipv6_prefix_length"}  # of 3.8
    named = {name for names, _ in main_cf() for name in names}
    assert len(named & known) > 150
    restrictions = {name for name in named if re.match(r"(permit|reject|check)_", name)}
    assert named - known - restrictions == {"process_limit", "lmtp", "dane"}, "a column of master.cf, and values"


def test_keys_beside_parameters_of_postfix_exist():
    """Also those that are named without their table."""
    known = {key for names in keys().values() for key in names}
    codes = {(names[0], code) for names, said in main_cf() for code in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", said)}
    assert len(codes) > 3
    assert not [f"{name}: {code}" for name, code in codes if code not in known]
