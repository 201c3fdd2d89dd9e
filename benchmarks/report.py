"""Writes the measured part of docs/benchmarks.md: `python -m benchmarks.report FOLDER docs/benchmarks.md`.

FOLDER holds run.json, idle.json, large.json, backlog.json, stragglers.json, sites.json, crowd.json, endpoint.json,
mailboxes.json, imap.json, imap_large.json and watched.json, as the benchmarks print them. What is missing is reported as not
measured.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["tables"]

Found = dict[str, Any]


def row_of(found: Found, load: str) -> Found:
    return next(row for row in found["run"]["rows"] if row["load"] == load)


def beside(found: Found, load: str, peer: str) -> float:
    """CPU of the relay per message, divided by a peer's."""
    row = row_of(found, load)
    return float(row["relaymta"]["cpu_us"] / row[peer]["cpu_us"])


def cpu(found: Found, load: str) -> float:
    return float(row_of(found, load)["relaymta"]["cpu_us"])


def ratio(which: str, upper: str, lower: str) -> Callable[[Found], float]:
    return lambda found: found[which][upper] / found[which][lower]


def value(which: str, name: str) -> Callable[[Found], float]:
    return lambda found: float(found[which][name])


def many(run: int) -> Callable[[Found], float]:
    return lambda found: found["sites"]["many"][run]["cpu us"] / found["sites"]["many"][run]["cpu us, one smart host"]


def most(name: str, killed: bool = False) -> Callable[[Found], float]:
    """The greatest value in the runs with many domains; `killed`: in those in which workers were killed."""
    return lambda found: max(row[name] for row in found["sites"]["many"] if bool(row.get("kills")) == killed)


def part(which: str, name: str) -> Callable[[Found], float]:
    return lambda found: float(found["sites"][which][name])


def filed(part: str, number: int, name: str, of: str = "relaymta") -> Callable[[Found], float]:
    """A value of one load into mailboxes, of the relay or (`of`: "") of the load as a whole."""

    def measured(found: Found) -> float:
        row = found["mailboxes"][part]["rows"][number]
        return float((row[of] if of else row)[name])

    return measured


REUSED, EACH, LARGE = "sessions reused, 4 kB", "one connection a message, 4 kB", "200 kB"
TWO = "sessions reused, 4 kB, two workers"

# Name; how it is read from the results; at most (-) or at least (+); the target; how it is shown.
AIMS: list[tuple[str, Callable[[Found], float], str, float, str]] = [
    ("Sessions reused: CPU vs. smtp-source plus smtp-sink", lambda f: beside(f, REUSED, "direct"), "-", 1.6, "{:.2f} x"),
    ("... Postfix's CPU vs. it", lambda f: 1 / beside(f, REUSED, "Postfix"), "+", 16, "{:.1f} x"),
    ("... messages a second", lambda f: row_of(f, REUSED)["relaymta"]["rate"], "+", 6000, "{:,.0f}"),
    ("One connection a message: CPU", lambda f: cpu(f, EACH), "-", 250, "{:.0f} us"),
    ("... Postfix's CPU vs. it", lambda f: 1 / beside(f, EACH, "Postfix"), "+", 11, "{:.1f} x"),
    ("200 kB: CPU", lambda f: cpu(f, LARGE), "-", 550, "{:.0f} us"),
    (
        "50 MB bodies: share of the lower of dd and smtp-sink",
        lambda f: f["large"]["relaymta MB/s"] / min(f["large"]["dd MB/s"], f["large"]["smtp-sink MB/s"]),
        "+", 0.6, "{:.2f}",
    ),
    ("200 such clients at the same time: memory", value("large", "200 clients, RssAnon MB"), "-", 256, "{:.0f} MB"),
    ("Small mail during 20 of them: p99 of acceptance", value("large", "small mail's p99 beside 20, ms"), "-", 100, "{:.0f} ms"),
    ("1,000,000 queued: start to the first 220", value("backlog", "start full s"), "-", 2, "{:.1f} s"),
    ("... `queue summary`", value("backlog", "summary s"), "-", 1, "{:.1f} s"),
    ("... memory above an empty worker's", value("backlog", "worker RssAnon over an empty one's, MB"), "-", 100, "{:.0f} MB"),
    ("... the file grown by listing all", value("backlog", "map grown by listing, MB"), "-", 0, "{:.0f} MB"),
    ("... CPU afterwards vs. a fresh spool's", ratio("backlog", "cpu after us", "cpu before us"), "-", 1.1, "{:.2f} x"),
    (
        "2,000,000 messages, 1 % of them deferred: CPU vs. a fresh spool's",
        ratio("stragglers", "cpu us", "cpu of a fresh spool, us"), "-", 1.15, "{:.2f} x",
    ),
    (
        "... most segments beyond twice the live octets",
        value("stragglers", "most segments beyond twice the live octets (bound: 16)"), "-", 16, "{:.0f}",
    ),
    ("10,000 idle connections: memory of each", value("idle", "kB each"), "-", 8, "{:.1f} kB"),
    ("... p99 of acceptance for other clients", value("idle", "p99 ms"), "-", 50, "{:.1f} ms"),
    ("Two workers: CPU vs. one", lambda f: beside(f, TWO, "one worker"), "-", 1.1, "{:.2f} x"),
    (
        "1,000,000 queued for one connection: an express message starts after, p99",
        lambda f: f["crowd"]["priority"]["express begins after, p99 s"],
        "-", 1, "{:.2f} s",
    ),
    (
        "... messages of one tenant before each message of another",
        lambda f: max(f["crowd"]["priority"]["of the first tenant before each of the second's"]),
        "-", 1, "{:.0f}",
    ),
    (
        "... deleted in bulk: increase of the p99 of acceptance",
        lambda f: f["crowd"]["delete"]["accept while deleting ms"]["p99"] - f["crowd"]["delete"]["accept before ms"]["p99"],
        "-", 20, "{:.1f} ms",
    ),
    ("... `queue list --json` of all of them, two workers", lambda f: f["crowd"]["list"]["s"], "-", 10, "{:.1f} s"),
    ("... `queue reroute` of all of them to another smart host", lambda f: f["crowd"]["reroute"]["s"], "-", 10, "{:.1f} s"),
    ("... `explain` ten times a second: delivery slower by", lambda f: f["crowd"]["explain"]["slower by"], "-", 0.02, "{:.3f}"),
    ("10,000 domains on 200 sites: CPU vs. one smart host", many(0), "-", 1.5, "{:.2f} x"),
    ("... the same with two workers", many(1), "-", 1.5, "{:.2f} x"),
    ("... DNS queries per domain", most("DNS queries per domain"), "-", 2.2, "{:.2f}"),
    ("... most connections to one site (limit 5)", most("most connections to a site (limit 5)"), "-", 5, "{:.0f}"),
    ("... while workers are killed", most("most connections to a site (limit 5)", True), "-", 5, "{:.0f}"),
    (
        "Healthy sites, with a dead, a flaky, a slow and a greylisting one: rate",
        lambda f: f["sites"]["trouble"]["rate of the healthy with trouble"]
        / f["sites"]["trouble"]["rate of the healthy without trouble"],
        "+", 0.9, "{:.2f} x",
    ),
    ("Limits not configured: share of the permitted rate", part("provider", "share of the permitted rate"), "+", 0.9, "{:.2f}"),
    ("... refused attempts", part("provider", "refused share"), "-", 0.01, "{:.4f}"),
    ("`explain` with 1,000,000 queued, inside the daemon: slowest of 200", part("explain", "most ms"), "-", 20, "{:.1f} ms"),
    (
        "DKIM-signed (RSA-2048, 4 kB): extra CPU, in bare signatures",
        lambda f: f["endpoint"]["signed"]["more, in bare signatures"], "-", 1.15, "{:.2f} x",
    ),
    (
        "... in bare signatures made during such a load",
        lambda f: f["endpoint"]["signed"]["more, in bare ones beside a load"], "-", 1.15, "{:.2f} x",
    ),
    (
        "... canonicalizing and hashing",
        lambda f: f["endpoint"]["signed"]["canonicalizing and hashing 4 kB us"], "-", 15, "{:.1f} us",
    ),
    (
        "... signing one message: dkimpy's CPU vs. it",
        lambda f: f["endpoint"]["signed"]["one message by dkimpy us"] / f["endpoint"]["signed"]["one message us"],
        "+", 20, "{:.0f} x",
    ),
    (
        "Canonicalizing 10 MB of spaces, 1,000,000 empty lines, 100,000 fields: an octet vs. ordinary ones",
        lambda f: max(f["endpoint"]["hostile"][name] for name in (
            "10 MB of spaces in one line", "1,000,000 empty lines", "100,000 fields beside 1,000")),
        "-", 2, "{:.2f} x",
    ),
    ("STARTTLS, one connection a message, resumed: share of Postfix's CPU", lambda f: f["endpoint"]["tls"]["share of Postfix's"],
     "-", 0.5, "{:.2f}"),
    (
        "Brute force from 50 addresses: increase of the p99 of acceptance",
        lambda f: f["endpoint"]["attack"]["accept while attacked ms"]["p99"] - f["endpoint"]["attack"]["accept before ms"]["p99"],
        "-", 20, "{:.1f} ms",
    ),
    ("... of memory", lambda f: f["endpoint"]["attack"]["memory more MB"], "-", 200, "{:.0f} MB"),
    ("... the right password logs in after", lambda f: max(f["endpoint"]["attack"]["right passwords logged in after s"]),
     "-", 1, "{:.2f} s"),
    ("LMTP into mailboxes, 50 connections: Dovecot's CPU vs. it", filed("lmtp", 0, "fewer", ""), "+", 10, "{:.1f} x"),
    ("... messages a second, one worker", filed("lmtp", 0, "rate"), "+", 2500, "{:,.0f}"),
    ("... 8 connections: Dovecot's CPU vs. it", filed("lmtp", 1, "fewer", ""), "+", 6, "{:.1f} x"),
    ("... 20 recipients, 50 connections: Dovecot's CPU a recipient vs. it", filed("lmtp", 2, "fewer", ""), "+", 20, "{:.1f} x"),
    ("... 20 recipients, 8 connections: Dovecot's CPU a recipient vs. it", filed("lmtp", 3, "fewer", ""), "+", 20, "{:.1f} x"),
    ("... bodies on disk for each message", lambda f: f["mailboxes"]["lmtp"]["on disk"]["bodies for each message"],
     "-", 1, "{:.2f}"),
    ("SMTP, queue, mailbox, one worker: CPU", filed("queue", 0, "cpu_us"), "-", 260, "{:.0f} us"),
    ("... messages a second, until they are in the mailbox", filed("queue", 0, "end to end"), "+", 2500, "{:,.0f}"),
    ("... Postfix's and Dovecot's CPU vs. it", filed("queue", 0, "fewer", ""), "+", 15, "{:.1f} x"),
    ("A scrape every five seconds, the page and a trace: messages a second with them", lambda f: f["watched"]["rate"]["median"],
     "+", 0.98, "{:.3f} x"),
    ("Ledger: messages a second", lambda f: f["run"]["ledger"]["rate"], "+", 2000, "{:,.0f}"),
    ("... lost or altered", lambda f: f["run"]["ledger"]["lost"] + f["run"]["ledger"]["altered"], "-", 0, "{:.0f}"),
]  # fmt: skip


def aims(found: Found) -> str:
    """Targets and what was measured, as a Markdown table."""
    lines = ["| | target | measured | |", "|---|---|---|---|"]
    for text, measured, sign, aim, shape in AIMS:
        bound = f"{'at most' if sign == '-' else 'at least'} {shape.format(aim)}"
        try:
            seen = measured(found)
        except (KeyError, StopIteration):
            lines.append(f"| {text} | {bound} | not measured in this run | |")
            continue
        missed = seen > aim if sign == "-" else seen < aim
        factor = (seen / aim if sign == "-" else aim / seen) if missed and aim and seen else 1.0
        lines.append(f"| {text} | {bound} | {shape.format(seen)} | {f'**missed by {factor:.2f} x**' if missed else 'met'} |")
    return "\n".join(lines) + "\n"


def loads(rows: list[Found]) -> str:
    """The loads of benchmarks.run, with the bare peers and Postfix, as a Markdown table."""
    lines = [
        "| load | relaymta msg/s | CPU us/msg | bare peers msg/s, CPU us | ratio | Postfix msg/s, CPU us | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["relaymta"]
        peers = row.get("direct"), row.get("Postfix")
        cells = [str(row["load"]), f"{ours['rate']:,.0f}", f"{ours['cpu_us']:,.0f}"]
        for position, peer in enumerate(peers):
            if isinstance(peer, dict):
                ratio = ours["cpu_us"] / peer["cpu_us"] if position == 0 else peer["cpu_us"] / ours["cpu_us"]
                cells += [
                    f"{peer['rate']:,.0f}, {peer['cpu_us']:,.0f}",
                    f"{ratio:.1f} x" if position == 0 else f"{ratio:.1f} x fewer",
                ]
            else:
                cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def delivery(mailboxes: Found) -> str:
    """The loads of benchmarks.mailboxes, with Dovecot, and the shard alone, as Markdown tables."""

    def cell(server: Found | None) -> str:
        if server is None:
            return ""
        return f"{server['end to end']:,.0f}, {server['cpu_us']:,.0f}, {server['p50 ms']:.1f}, {server['p99 ms']:.1f}"

    lines = [
        "| into mailboxes: msg/s, CPU us/msg, p50, p99 ms | relaymta | Dovecot mdbox | Maildir | the better's CPU vs. ours |",
        "|---|---|---|---|---|",
    ]
    for row in [row for part in ("lmtp", "queue") for row in mailboxes.get(part, {}).get("rows", [])]:
        servers = " | ".join(cell(row.get(name)) for name in ("relaymta", "mdbox", "Maildir"))
        each = ", ".join(f"{one:.1f}" for one in row.get("fewer in each trial", []))
        ratio = f"{row['fewer']:.1f} x ({each})" if each else ""
        lines.append(f"| {row['load']} | {servers} | {ratio} |")
    lines += ["", "| the shard of the mailboxes alone | CPU us/msg | msg/s |", "|---|---|---|"]
    for name, found in mailboxes.get("store", {}).items():
        lines.append(f"| {name} | {found['cpu us']:.0f} | {found['rate']:,.0f} |")
    return "\n".join(lines) + "\n"


def reading(found: Found) -> str:
    """What benchmarks.imap and benchmarks.imap_large have measured and have a target for, as Markdown tables."""
    lines: list[str] = []
    for which, title in (("imap", "reading mail"), ("imap_large", "large mailboxes, many users")):
        if which in found:
            scale = found[which].get("scale", 1)
            lines += [f"| {title}{f' (at {scale:g} of the size)' * (scale != 1)} | at most | measured | |", "|---|---|---|---|"]
            lines += [judged(row) for rows in found[which].values() if isinstance(rows, list) for row in rows if "met" in row]
            lines.append("")
    return "\n".join(lines)


def judged(row: Found) -> str:
    """A row of a Markdown table: one of those of benchmarks.imap_servers that has a target."""
    value, most = row["measured"], row["at most"]
    missed = f"**missed by {value / most:.2f} x**" if most > 0 else "**missed**"
    return f"| {row['what']} | {most:.4g} | {value:.3g} | {'met' if row['met'] else missed} |"


def tables(run: Found) -> str:
    """What benchmarks.run measured, as Markdown tables."""
    shown = {
        name: f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" for name, value in run["ledger"].items()
    }
    return f"{loads(run['rows'])}\n| ledger: {' | '.join(shown)} |\n|{'---|' * len(shown)}\n| {' | '.join(shown.values())} |\n"


def main() -> None:
    folder, path = Path(sys.argv[1]), Path(sys.argv[2])
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    states = f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {time.strftime('%F')}."
    head, rest = path.read_text().split("<!-- measured -->")
    tail = rest.split("<!-- end -->")[1]
    mailboxes = delivery(found["mailboxes"]) + "\n" if "mailboxes" in found else ""
    read = reading(found) + "\n" if {"imap", "imap_large"} & set(found) else ""
    measured = f"{states}\n\n{tables(found['run'])}\n{mailboxes}{read}{aims(found)}"
    path.write_text(f"{head}<!-- measured -->\n{measured}<!-- end -->{tail}")


if __name__ == "__main__":
    main()
