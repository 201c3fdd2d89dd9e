"""A real Prometheus that scrapes a relay."""

import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.support.daemon import Relay, free_port
from tests.support.programs import need

SECONDS = {"s": 1, "m": 60, "h": 3600}
LEAST = 5  # seconds of a range, in which there are several samples


@contextmanager
def prometheus(folder: Path, relay: Relay, rules: str = "") -> Iterator[str]:
    """A Prometheus that scrapes a relay, and evaluates `rules`, each second: its URL."""
    port = free_port()
    config = folder / "prometheus.yml"
    (folder / "rules.yml").write_text(rules)
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        + (f'rule_files: ["{folder}/rules.yml"]\n' if rules else "")
        + "scrape_configs:\n  - job_name: relaymta\n"
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


def _got(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.loads(answer.read())["data"]
    except (ConnectionError, urllib.error.URLError):
        return None


def asked(url: str, expression: str) -> list[dict[str, Any]]:
    """The series that an expression of a panel gives now, with a number each."""
    text = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
    found = _got(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': text})}")
    return [row for row in found["result"] if row["value"][1] != "NaN"] if found else []


def firing(url: str) -> set[str]:
    """The alerts that fire now."""
    found = _got(f"{url}/api/v1/alerts") or {"alerts": []}
    return {alert["labels"]["alertname"] for alert in found["alerts"] if alert["state"] == "firing"}


def hastened(rules: str, factor: int) -> str:
    """Alert rules with all durations (`for`, and ranges, of LEAST seconds at least) divided by a factor; thresholds stay."""

    def shorter(found: re.Match[str]) -> str:
        return f"[{max(LEAST, int(found[1]) * SECONDS[found[2]] // factor)}s]"

    parsed = yaml.safe_load(rules)
    for group in parsed["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\d+)([smh])\]", shorter, rule["expr"])
            if waits := re.fullmatch(r"(\d+)([smh])", rule.get("for", "")):
                rule["for"] = f"{int(waits[1]) * SECONDS[waits[2]] // factor}s"
    return str(yaml.safe_dump(parsed))
