"""Every panel of the dashboard, asked of a real Prometheus that scrapes a real relay."""

import json
import smtplib
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need

BOARD = json.loads((Path(__file__).resolve().parents[2] / "grafana" / "relaymta.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


@contextmanager
def prometheus(folder: Path, relay: Relay) -> Iterator[str]:
    """A Prometheus that scrapes a relay each second: its URL."""
    port = free_port()
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n  - job_name: relaymta\n"
        f'    static_configs: [{{targets: ["127.0.0.1:{relay.metrics_port}"]}}]\n'
    )
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen(
        [need("prometheus"), *options],
        stderr=(folder / "prometheus.err").open("wb"),
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def asked(url: str, expression: str) -> list[dict[str, Any]]:
    """The series that an expression of a panel gives now, with a number each."""
    query = urllib.parse.urlencode({"query": expression.replace("$__rate_interval", "1m")})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=30) as answer:
            return [row for row in json.loads(answer.read())["data"]["result"] if row["value"][1] != "NaN"]
    except (ConnectionError, urllib.error.URLError):
        return []


class Busy(Relay):
    """A relay with a listener for logins, an application with a quota, a filter that nobody answers for, and a route to a host
    that is down."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, None, "delivery.idle=1")
        self.submission = free_port()
        self.config = folder / "relay.toml"
        self.config.write_text(
            f'''
[[listener]]
address = "127.0.0.1:{self.port}"
[[listener]]
address = "127.0.0.1:{self.submission}"
auth = "may"
auth_in_clear = true
submission = true
[accounts]
file = "{folder}/accounts.toml"
[[filter]]
name = "gone"
type = "clamd"
address = ["127.0.0.1:1"]
on_failure = "accept"
[[filter]]
name = "lists"
type = "dnsbl"
lists = [{{ zone = "bl.example", codes = ["127.0.0.2"] }}]
[[mail_rule]]
name = "programs"
attachment = ["*.exe"]
[[abuse]]
name = "volume"
watch = "volume"
[[route]]
name = "down"
recipient_domain = ["down.example"]
hosts = ["127.0.0.1:1"]
[[route]]
name = "out"
hosts = ["127.0.0.1:{port}"]
'''
        )
        said = self.cli("app", "create", "shop", "--config", str(self.config)).stdout
        self.key = said.partition("secret: ")[2].split()[0]
        accounts = folder / "accounts.toml"
        accounts.write_text(accounts.read_text().replace('name = "shop"', 'name = "shop"\nmessages = "10/d"'))

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus, after a relay has done a little of everything."""
    folder = tmp_path_factory.mktemp("board")
    rules = {"RCPT": {"no@d.example": b"550 5.1.1 no\r\n", "later@d.example": b"450 4.2.1 later\r\n"}}
    with FakeMx(rules) as peer, Busy(folder, peer.port) as relay, prometheus(folder, relay) as url:
        wait_for(lambda: asked(url, "up == 1"))
        recipients = ["a@d.example", "no@d.example", "later@d.example", "x@down.example"]
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", *recipients)
        with smtplib.SMTP("127.0.0.1", relay.submission) as client:
            client.login("shop", relay.key)
            client.sendmail("a@b.example", ["a@d.example"], "Subject: x\r\n\r\nx\r\n")
        wait_for(lambda: relay.events("site") and len(peer.messages) >= 2)
        yield url


def test_every_panel_has_data(board):
    without = EXPRESSIONS
    until = time.monotonic() + 120
    while without and time.monotonic() < until:  # two scrapes make a rate
        without = [expression for expression in without if not asked(board, expression)]
        time.sleep(0.5)
    assert not without


def test_panels_show_what_happened(board):
    def value(expression: str) -> float:
        return float(next((row["value"][1] for row in asked(board, expression)), "nan"))

    wait_for(lambda: value("max(relaymta_sites_down)") == 1)
    (row,) = wait_for(lambda: asked(board, "sum by (site, cause, hosts) (relaymta_site_down)"))
    assert row["metric"] == {"site": "down", "cause": "refused", "hosts": "smart"}
    wait_for(lambda: value("max(relaymta_oldest_message_seconds)") >= 1)
    wait_for(lambda: value('sum by (reason) (relaymta_filter_failures_total{filter="gone", reason="connect"})') >= 2)
    wait_for(lambda: value("max by (account, what) (relaymta_quota_used_ratio)") > 0)
