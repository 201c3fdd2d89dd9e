"""The structure of the project: import contracts, generated files, and names that documents use."""

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest

from relaymta import metrics, shm
from relaymta.cli import VERBS, main
from relaymta.config import describe, load
from relaymta.log import EVENTS
from tests.support.programs import need

ROOT = Path(__file__).parent.parent


def test_import_contracts_hold():
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_kernel_is_built():
    listed = set(re.findall(r'"relaymta/_speedups/(\w+)\.pyx?"', (ROOT / "setup.py").read_text()))
    there = {
        p.stem for p in (ROOT / "relaymta/_speedups").iterdir() if p.suffix in (".py", ".pyx") and not p.stem.startswith("_")
    }
    assert listed == there


def test_all_metrics_fit_into_a_workers_cells():
    assert metrics.CELLS <= shm.COUNTERS


def test_no_function_is_longer_than_a_screen():
    long = []
    for path in (ROOT / "relaymta").rglob("*.py"):
        if "_speedups" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno > 60:
                long.append(f"{path.name}:{node.name} {node.end_lineno - node.lineno}")
    assert not long


def test_the_reference_configuration_is_fresh(tmp_path):
    path = ROOT / "config/relaymta.toml"
    assert path.read_text() == describe(), "run: relaymta config describe > config/relaymta.toml"
    filled = re.sub(r"^#(\w+ = .+)$", r"\1", path.read_text(), flags=re.M).replace("#[[", "[[")
    filled = re.sub(r"^\[\[listener\]\]$", '[[listener]]\naddress = "127.0.0.1:1"', filled, flags=re.M)
    needed = {
        "[[application]]": 'name = "shop"',
        "[[certificate]]": 'chain = "/etc/relaymta/mail.pem"',
        "[[dkim]]": 'domain = "shop.example"\nselector = "s1"\nkey = "/etc/relaymta/s1.pem"',
        "[[filter]]": 'name = "lists"\ntype = "dnsbl"',
        "[[filter.lists]]": 'zone = "bl.example"\ncodes = ["127.0.0.2"]',
        "[[filter.score]]": 'at = 6.0\nverdict = "tag"',
        "[[abuse]]": 'name = "volume"\nwatch = "volume"',
        "[[mail_rule]]": 'name = "large"',
        "[[network]]": 'networks = ["192.0.2.0/24"]',
        "[[webhook]]": 'name = "shop"\nurl = "https://shop.example/events"\nsecret_file = "/etc/relaymta/shop.secret"',
        "[[source]]": 'name = "one"\naddress = "192.0.2.1"',
        "[[site]]": 'hosts = [".example"]',
        "[[rule]]": 'match = "x"\naction = "slow"',
        "[accounts.tokens]": 'introspection = "https://a.example/introspect"',
        "[route.oauth]": 'token_url = "https://a.example/token"\nclient_id = "x"',
    }
    filled = filled.replace("#[route.oauth]", "[route.oauth]").replace("#[accounts.tokens]", "[accounts.tokens]")
    filled = re.sub(r'^(introspection|dovecot|url|jwks) = ""$', r'#\1 = ""', filled, flags=re.M)
    listeners, routes = filled.split("\n[[route]]\n")
    filled = f"{listeners}\n[[route]]\n" + routes.replace('tls = "may"', 'tls = "verify"')
    filled = filled.replace('username = ""', 'username = "me"').replace("\nhosts = []", '\nhosts = ["mail.example"]', 1)
    filled = filled.replace("\nrecipients_min = 0", "\nrecipients_min = 1")  # a rule without a condition is about all mail
    for table, keys in needed.items():
        filled = filled.replace(f"\n{table}\n", f"\n{table}\n{keys}\n")
    again = tmp_path / "all.toml"
    again.write_text(filled)
    load(again, {})


def test_the_log_document_names_every_event_and_field():
    text = (ROOT / "docs/log.md").read_text()
    rows = {row[0]: set(re.findall(r"`(\w+)`", row[1])) for row in re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", text, re.M)}
    assert set(rows) == set(EVENTS)
    for event, fields in EVENTS.items():
        assert set(fields) <= rows[event], event


def used_metrics(text: str) -> set[str]:
    found = set(re.findall(r"\brelaymta_[a-z0-9_]+", text))
    parts = {f"{name}_{part}": name for name in metrics.HISTOGRAM_NAMES for part in ("bucket", "sum", "count")}
    return {parts.get(name, name) for name in found}


def test_dashboard_and_alerts_use_metrics_that_exist():
    boards = [json.loads(path.read_text()) for path in sorted((ROOT / "grafana").glob("*.json"))]
    assert len(boards) == 4
    expressions = [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]
    rules = (ROOT / "grafana/alerts.yml").read_text()
    assert used_metrics(" ".join(expressions)) <= metrics.NAMES | {"relaymta_build_info"}
    assert used_metrics(rules) - {"relaymta_alerts"} <= metrics.NAMES
    assert used_metrics(" ".join([*expressions, rules])) >= metrics.NAMES, "each metric is on a dashboard, or in an alert"


@pytest.mark.parametrize("path", sorted((ROOT / "grafana").glob("*.json")), ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path):
    board = json.loads(path.read_text())
    assert board["uid"].startswith("relaymta-") and board["links"][0]["tags"] == ["relaymta"] and "relaymta" in board["tags"]
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "instance"]
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        sources = {one["datasource"]["uid"] for one in (panel, *panel["targets"])}
        assert sources == {"${datasource}"}
        for target in panel["targets"]:
            named = len(re.findall(r"\brelaymta_\w+", target["expr"]))
            assert target["expr"].count('instance=~"$instance"') == named and target["legendFormat"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({panel["title"] for panel in board["panels"]}) == len(board["panels"])


def test_the_page_of_metrics_is_what_its_tool_writes():
    found = runpy.run_path(str(ROOT / "tools/metrics_page.py"))["page"]()
    assert found == (ROOT / "docs/metrics.md").read_text(), "python tools/metrics_page.py"


def test_dashboards_are_what_their_tool_writes():
    found = runpy.run_path(str(ROOT / "tools/dashboards.py"))["files"]()
    assert found == {path.name: path.read_text() for path in (ROOT / "grafana").glob("*.json")}, "python tools/dashboards.py"


def test_promtool_accepts_the_alert_rules():
    done = subprocess.run(
        [need("promtool"), "check", "rules", ROOT / "grafana/alerts.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_features_name_tests_that_exist():
    text = (ROOT / "docs/features.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 15
    for path, function in named:
        assert f"def {function}(" in (ROOT / path).read_text(), f"{path}::{function}"


def command(name):
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_verb_has_help(name):
    assert command(name).help


def test_documents_name_verbs_that_exist():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for group, verb in re.findall(r"relaymta (queue|message|config) ([a-z]+)", path.read_text()):
            assert verb in command(group).commands, f"{path.name}: relaymta {group} {verb}"


def test_no_pattern_repeats_a_group_possessively():
    """Before Python 3.11.5 such patterns match what they must not (CPython issue 106052): an atomic group says the same."""
    repeated = re.compile(r"\)(?:[*+?]|\{[0-9,]+\})\+")
    found = [f"{path.name}:{number}" for path in (ROOT / "relaymta").rglob("*.py")
             for number, line in enumerate(path.read_text().splitlines(), 1) if repeated.search(line)]  # fmt: skip
    assert not found, "write (?>(?:...)*) in place of (?:...)*+"
