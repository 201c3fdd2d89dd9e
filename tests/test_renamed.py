"""What was renamed is understood, and written, under its name of the version before, too."""

import json
import re
import urllib.request

import click
from click.testing import CliRunner

from relaymta import metrics, shm
from relaymta.cli import main
from relaymta.config import load, notes
from relaymta.log import EVENTS, RENAMED, History, Log, find_history
from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx

WARNING = "relaymta: 'standing' is called 'policy' now and will go\n"
OLD = '[[listener]]\naddress = "127.0.0.1:1"\n\n[verify]\nresults = true\ndmarc = "tell"\n'


def test_an_old_value_is_understood_with_a_warning_that_names_its_place(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(OLD)
    config = load(path, {})
    assert config.verify.dmarc == "report"
    assert notes(config) == [f'{path}:6: verify.dmarc: "tell" is called "report" now']
    done = CliRunner().invoke(
        main, ["config", "check", "-c", str(path), "--spool", str(tmp_path / "spool"), "--set", "ephemeral=true"]
    )
    assert done.exit_code == 0 and f'note: {path}:6: verify.dmarc: "tell" is called "report" now\n' in done.stdout
    path.write_text(OLD.replace("tell", "report"))
    assert notes(load(path, {})) == []
    given = {"verify": {"dmarc": "tell"}}
    for overrides in ({"verify.dmarc": "tell"}, given, given):  # the last: a reload gives the same again
        assert notes(load(path, overrides)) == ['command line: verify.dmarc: "tell" is called "report" now']


def test_counters_are_exposed_under_both_names():
    cells = shm.Shared.create().counters(0)
    cells.add(metrics.index("relaymta_dsns_total"), 3)
    cells.add(metrics.index("relaymta_dsns_dropped_total"), 2)
    families = {family.name: family for family in metrics.families([cells])}
    for old, new in (("notices", "dsns"), ("notices_dropped", "dsns_dropped")):
        before, now = families[f"relaymta_{old}"], families[f"relaymta_{new}"]
        assert before.documentation == f"Deprecated: relaymta_{new}_total"
        assert [sample.value for sample in before.samples] == [sample.value for sample in now.samples] != [0]
    assert not metrics.RENAMED.keys() & metrics.NAMES, "dashboards and alerts use the new names"


def test_an_event_has_its_old_fields_beside_the_new_ones(tmp_path):
    common = {
        "recipient": "b",
        "route": "r",
        "phase": "rcpt",
        "peer": "p",
        "reply": "no",
        "attempt": 1,
        "cause": "reply",
        "delay": 1,
    }
    log = Log(str(tmp_path / "log"), 0, History(tmp_path / "history", 0, 1 << 20))
    log.event("bounced", id="ONE", sender="a", dsn="TWO", **common)
    log.event("bounced", id="ONE", sender="a", dsn="", **common)
    log.close()
    for rows in ([json.loads(line) for line in (tmp_path / "log").read_text().splitlines()],
                 find_history(tmp_path / "history", "ONE")):  # fmt: skip
        assert [(row["dsn"], row["notice"]) for row in rows] == [("TWO", "TWO"), ("", "")]
    assert all(new in EVENTS[event] for event, names in RENAMED.items() for new in names.values())


def test_the_history_of_the_version_before_is_understood(tmp_path):
    history = History(tmp_path / "history", 0, 1 << 20)
    history.write(b'{"event":"queued","ts":1,"id":"ONE"}\n{"event":"bounced","ts":2,"id":"ONE","notice":"TWO"}\n')
    assert [event.get("dsn") for event in find_history(tmp_path / "history", "ONE")] == [None, "TWO"]


def test_the_old_verb_is_not_shown_and_has_the_verbs_of_the_new_one():
    old, new = (main.get_command(click.Context(main), name) for name in ("standing", "policy"))
    assert old.commands == new.commands
    assert not re.search(r"^ *standing\b", CliRunner().invoke(main, ["--help"]).stdout, re.M)
    assert CliRunner().invoke(main, ["policy", "hold", "--help"]).stderr == ""


def test_a_running_relay_serves_both_names(tmp_path):
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "verify.dmarc=tell") as relay:
            text = 'command line: verify.dmarc: "tell" is called "report" now'
            assert [event["text"] for event in relay.events("warning") if "verify.dmarc" in event["text"]] == [text]
            made = relay.cli("standing", "bounce", "--domain", "d.example", "--for", "30m")
            assert made.stderr == WARNING and "mail with recipient_domain=d.example" in made.stdout
            listed = [relay.cli(verb, "list", "--json") for verb in ("standing", "policy")]
            assert [done.stderr for done in listed] == [WARNING, ""]
            rows = [json.loads(line) for done in listed for line in done.stdout.splitlines()]
            assert [(row["kind"], row["about"]) for row in rows] == [("bounce", "recipient_domain=d.example")] * 2
            relay.send()
            (bounced,) = wait_for(lambda: relay.events("bounced"))
            assert bounced["dsn"] == bounced["notice"] != ""
            with urllib.request.urlopen(f"http://127.0.0.1:{relay.metrics_port}/metrics", timeout=10) as answer:
                exposed = answer.read().decode()
            assert "\nrelaymta_notices_total 1.0\n" in exposed and "\nrelaymta_dsns_total 1.0\n" in exposed
            assert "# HELP relaymta_notices_total Deprecated: relaymta_dsns_total\n" in exposed
            assert relay.cli("standing", "remove", "bounce", "recipient_domain=d.example").stderr == WARNING
            assert relay.cli("standing", "remove", "bounce", "recipient_domain=d.example", check=False).returncode == 1
