"""Writes docs/metrics.md: `python tools/metrics_page.py`. The metrics are asked of the code, what uses them of the dashboards
and the alert rules. A test holds the page with this, and with what a running relay exposes."""

import re
from pathlib import Path
from typing import Any

import yaml

from relaymta import metrics
from relaymta.admin.http import exposed
from relaymta.shm import Shared

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Metrics

What http://127.0.0.1:9125/metrics exposes (`metrics.listen`), for Prometheus, and which dashboards and alerts use it
([grafana/](../grafana/README.md)). `tools/metrics_page.py` of the sources writes this page; a test holds it with a running relay.

- Counters begin at 0 when the relay starts; a worker that dies takes nothing with it. Gauges are set each second.
- Durations are measured by clocks that nobody sets: setting the wall clock does not change them. (Only the time until a
  certificate ends is by the wall clock.)
- Histograms have the classic buckets: `NAME_bucket{le="..."}`, `NAME_sum`, `NAME_count`.
- **Sites.** The labels `site` have SITES names at a time; all others are `other`. A site stays at least STAY minutes, until
  another is more than twice as active; at most NEW names an hour are new. A counter of a site that comes back goes on where
  it was; what was counted under `other` stays there. Of the sites that are down, those of smart hosts are always shown.
- Labels from outside (names of hosts, files, accounts) have at most LONG characters; a longer one, and one with control
  characters, is changed, and ends with a hash.
- Phases of an attempt (`phase`): `dns` until the hosts are known, `connect`, `greeting`, `ehlo`, `tls` (the handshake: behind
  STARTTLS, or at once on port 465), `auth`, then the waits for the replies to `mail`, `rcpt`, `data` and to the final `dot`.
  Pipelined replies that come together count for the first of them; the others took 0 s. A phase that has failed counts, too.

"""


def families() -> list[Any]:
    """All metrics, as a relay exposes them that has something of each."""
    cells = Shared.create().counters(0)
    for name in metrics.GAUGES:
        metrics.Counters(cells).gauge(name, 1)
    row = {"pool": "s", "waiting": 0, "connections": 0, "window": 0, "rate": 0}
    return exposed(
        [cells], [row], [{"name": "a", "what": "messages", "share": 0.0}], {"s": (0, 0, 0)},
        (1, [{"site": "s", "hosts": "mx", "cause": "c"}]), {"f": metrics.FilterTotals([])}, {"z": []},
        {"r": metrics.RuleTotals(0, 0, 0, 0)}, {"c": (0, 0, 0)},
        metrics.Own(1, False, 0, {"exit": 0}, {"ready": 1}, {"/c.pem": 0}, {"manual": 1}, 1, 0, {"/p.py:1": 0}),
        {"w": metrics.WebhookTotals()},
    )  # fmt: skip


def used() -> dict[str, list[str]]:
    """Where each metric is used: panels, as "dashboard: title", then alerts."""
    import json

    found: dict[str, list[str]] = {}

    def note(expression: str, where: str) -> None:
        for name in set(re.findall(r"\brelaymta_\w+", expression)):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            rows = found.setdefault(base if base in metrics.HISTOGRAM_NAMES else name, [])
            rows += [where] if where not in rows else []

    for path in sorted((ROOT / "grafana").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                note(target["expr"], f"{board['title'].partition(': ')[2].split()[0]}: *{panel['title']}*")
    for group in yaml.safe_load((ROOT / "grafana/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            note(rule["expr"], f"`{rule['alert']}`")
    return found


def page() -> str:
    """The page."""
    from relaymta.supervisor.activity import STAY, SWAPS

    head = HEAD.replace("SITES", str(metrics.SITES_SHOWN)).replace("STAY", f"{STAY / 60:.0f}").replace("NEW", str(SWAPS * 60))
    where = used()
    lines = ["| Metric | Type | Labels | Meaning | Used by |", "|---|---|---|---|---|"]
    for family in sorted(families(), key=lambda one: one.name):
        name = family.name + ("_total" if family.type == "counter" else "_info" if family.type == "info" else "")
        if name in metrics.RENAMED:
            continue
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} | {'; '.join(where.get(name, []))} |")
    old = ", ".join(f"`{before}` (now `{now}`)" for before, now in metrics.RENAMED.items())
    return head.replace("LONG", str(metrics.LABEL_MOST)) + "\n".join(lines) + f"\n\nNames of 0.1, for one version more: {old}.\n"


if __name__ == "__main__":
    (ROOT / "docs/metrics.md").write_text(page())
