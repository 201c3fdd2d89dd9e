"""Alert rules with a real relay and a real Prometheus, as trouble is made and mended. All durations of the rules are divided by
FASTER; what takes too long, or cannot be made, is in tests/test_alerts.py alone."""

import datetime
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.prometheus import asked, firing, hastened, prometheus

RULES = (Path(__file__).resolve().parents[2] / "grafana" / "alerts.yml").read_text()
FASTER = 120
CONFIG = """
[[listener]]
address = "127.0.0.1:{port}"
[[certificate]]
chain = "{folder}/relay.pem"
[accounts]
file = "{folder}/accounts.toml"
[[filter]]
name = "gone"
type = "clamd"
address = ["127.0.0.1:1"]
on_failure = "accept"
[[route]]
name = "down"
recipient_domain = ["down.example"]
hosts = ["127.0.0.1:{down}"]
[[route]]
name = "out"
hosts = ["127.0.0.1:1"]
"""


class Troubled(Relay):
    """A relay with what can be broken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None, workers=2)
        self.authority = trustme.CA()
        self.down = free_port()
        self.config = folder / "relay.toml"
        self.good = CONFIG.format(port=self.port, folder=folder, down=self.down)
        self.config.write_text(self.good)
        self.certify(60)
        (folder / "accounts.toml").write_text("")

    def certify(self, days: int) -> None:
        """A new certificate that ends in so many days."""
        now = datetime.datetime.now(datetime.UTC)
        made = self.authority.issue_cert("relay.example", not_after=now + datetime.timedelta(days=days))
        fresh = self.folder / "new.pem"
        made.private_key_and_cert_chain_pem.write_to_path(str(fresh))
        fresh.rename(self.folder / "relay.pem")

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]

    def reload(self, config: str) -> None:
        self.config.write_text(config)
        self.cli("reload", "--config", str(self.config), check=False)

    def worker(self) -> int:
        """The process of the worker of slot 0."""
        assert self.process is not None
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False).stdout
        pids = [int(pid) for pid in children.split()]
        named = [pid for pid in pids if b"relaymta.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return min(named, default=0)

    def kill_workers(self) -> None:
        """Kill a worker four times, each time once it is ready."""
        for _ in range(4):
            wait_for(self.ready)
            os.kill(self.worker(), signal.SIGKILL)
            wait_for(lambda: not self.ready())
        wait_for(self.ready)

    def ready(self) -> bool:
        """Whether all workers are ready."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/health", timeout=30) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Troubled, str]]:
    folder = tmp_path_factory.mktemp("alerts")
    with Troubled(folder) as relay, prometheus(folder, relay, hastened(RULES, FASTER)) as url:
        yield relay, url


def test_rules_are_hastened_and_otherwise_unchanged():
    fast = hastened(RULES, FASTER)
    assert "for: 2s" in fast and "[15s]" in fast and "30m" not in fast and "4 * 3600" in fast
    assert fast.count("alert:") == RULES.count("alert:")


def test_alerts_fire_and_fall_silent_as_trouble_is_made_and_mended(watched):
    """All at once, since most of the time goes by with waiting."""
    relay, url = watched
    wait_for(lambda: asked(url, "relaymta_worker_restarts_total"))
    relay.certify(5)
    (relay.folder / "accounts.toml").write_text("this is no table")
    relay.reload(relay.good + "\n[no_such_table]\n")
    relay.kill_workers()
    for _ in range(6):  # each worker finds out by itself that the filter is down
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "a@down.example")
    trouble = {
        "RelaymtaSiteDown", "RelaymtaFilterDown", "RelaymtaCertificateEnds", "RelaymtaKeysOrAccounts", "RelaymtaReloadRefused",
        "RelaymtaWorkersRestart",
    }  # fmt: skip
    seen: set[str] = set()

    def all_seen() -> bool:
        seen.update(firing(url))
        return trouble <= seen

    try:
        wait_for(all_seen)
    finally:
        assert not trouble - seen
    with FakeMx({}, relay.down) as peer:
        relay.certify(60)
        (relay.folder / "accounts.toml").write_text("")
        without = relay.good.partition("[[filter]]")[0] + relay.good.partition('on_failure = "accept"\n')[2]
        relay.reload(without)
        relay.cli("queue", "flush", "--all")
        wait_for(lambda: peer.messages)
        wait_for(lambda: not trouble & firing(url), what="silence")


def test_a_worker_that_does_not_answer_is_missed(watched):
    relay, url = watched
    missing: Callable[[], Any] = lambda: "RelaymtaWorkersMissing" in firing(url)  # noqa: E731
    pid = wait_for(relay.worker)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(missing)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not missing())
