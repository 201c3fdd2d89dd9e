"""Every panel of the dashboards, asked of a real Prometheus that scrapes a real relay."""

import json
import re
import smtplib
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.filter.test_signing import write_key
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need
from tests.support.prometheus import asked, prometheus
from tests.support.webhooks import secret_file

ROOT = Path(__file__).resolve().parents[2]
BOARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "grafana").glob("*.json"))]
EXPRESSIONS = [target["expr"] for board in BOARDS for panel in board["panels"] for target in panel["targets"]]


class Busy(Relay):
    """A relay with a listener for logins, an application with a quota, a DKIM key, a filter and a webhook that nobody answers
    for, a hook that fails, and a route to a host that is down."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, None, "delivery.idle=1")
        self.submission = free_port()
        self.config = folder / "relay.toml"
        trustme.CA().issue_cert("relay.example").private_key_and_cert_chain_pem.write_to_path(str(folder / "relay.pem"))
        write_key(folder / "dkim.pem", "ed25519")
        (folder / "policy.py").write_text("async def on_bounced(attempt):\n    raise ValueError\n")
        secret_file(folder / "secret")
        self.config.write_text(
            f'''
[[listener]]
address = "127.0.0.1:{self.port}"
[[listener]]
address = "127.0.0.1:{self.submission}"
auth = "may"
auth_in_clear = true
submission = true
[[certificate]]
chain = "{folder}/relay.pem"
[[dkim]]
domain = "b.example"
selector = "s"
key = "{folder}/dkim.pem"
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
[[filter]]
name = "policy"
type = "python"
file = "{folder}/policy.py"
[[webhook]]
name = "shop"
url = "http://127.0.0.1:1/"
secret_file = "{folder}/secret"
private = true
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
name = "mx"
recipient_domain = ["mx.example"]
[delivery]
nameservers = ["127.0.0.1:1"]
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
def relay_and_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Relay, str]]:
    """A relay that has done a little of everything, and a Prometheus that scrapes it."""
    folder = tmp_path_factory.mktemp("board")
    rules = {"RCPT": {"no@d.example": b"550 5.1.1 no\r\n", "later@d.example": b"450 4.2.1 later\r\n"}}
    with FakeMx(rules) as peer, Busy(folder, peer.port) as relay, prometheus(folder, relay) as url:
        wait_for(lambda: asked(url, "up == 1"))
        recipients = ["a@d.example", "no@d.example", "later@d.example", "x@down.example", "x@mx.example"]
        relay.send("From: a@b.example\r\nSubject: x\r\n\r\nx\r\n", "a@b.example", *recipients)
        with smtplib.SMTP("127.0.0.1", relay.submission) as client:
            client.login("shop", relay.key)
            client.sendmail("a@b.example", ["a@d.example"], "Subject: x\r\n\r\nx\r\n")
        wait_for(lambda: relay.events("site") and len(peer.messages) >= 2)
        yield relay, url


@pytest.fixture
def board(relay_and_board: tuple[Relay, str]) -> str:
    return relay_and_board[1]


def test_the_page_of_metrics_has_what_is_exposed_and_promtool_finds_nothing(relay_and_board):
    relay, board = relay_and_board
    wait_for(lambda: asked(board, "relaymta_disk_free_octets"))
    with urllib.request.urlopen(f"http://127.0.0.1:{relay.metrics_port}/metrics") as answer:
        text = answer.read()
    done = subprocess.run([need("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    page = (ROOT / "docs/metrics.md").read_text()
    listed = {(name, kind.replace("info", "gauge")) for name, kind in re.findall(r"^\| `(relaymta_\w+)` \| (\w+) \|", page, re.M)}
    old = set(re.findall(r"`(relaymta_\w+)` \(now", page))
    exposed = {(name, kind) for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text.decode(), re.M) if name not in old}
    assert listed == exposed


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
