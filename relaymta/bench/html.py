"""The report in one HTML file: tables, and plots in SVG. It loads nothing from elsewhere; all texts are escaped."""

import time
from collections.abc import Sequence
from html import escape
from math import ceil, log10
from typing import Any

from relaymta.bench.report import compared, verdict
from relaymta.proto.printable import printable

__all__ = ["page"]

WIDTH, HEIGHT = 860, 220
LEFT, BOTTOM, TOP, RIGHT = 64, 26, 12, 12
COLORS = ("#1f5fa8", "#d2691e", "#2e8b57", "#8b2252", "#708090")
# Title; the unit; the series of each run that it shows, and their names.
PLOTS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Throughput", "messages a second", [("accepted", "accepted"), ("arrived", "at the sink"), ("not accepted", "not accepted")]),
    ("Time to 250, from when the message was due", "ms", [("accepted p50", "p50"), ("accepted p99", "p99")]),
    ("Time to the sink, from when the message was due", "ms", [("arrived p50", "p50"), ("arrived p99", "p99")]),
]
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 940px; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.15em; margin-top: 2em; } h3 { font-size: 1em; margin: 1.2em 0 0; }
table { border-collapse: collapse; } td, th { padding: 2px 12px 2px 0; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } .ok { color: #1b6e3c; } .bad { color: #a11; font-weight: bold; }
svg text { font: 11px system-ui, sans-serif; fill: #555; } pre { white-space: pre-wrap; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd; } td, th { border-color: #444; }
svg text { fill: #aaa; } .ok { color: #6cc28d; } .bad { color: #ff7b7b; } }
"""


def page(report: dict[str, Any]) -> str:
    """The whole file."""
    runs: list[dict[str, Any]] = report["runs"]
    machine = report["machine"]
    when = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(report["at"]))
    about = (
        f"{when}, relaymta {report['version']}, {machine['cores']} cores, Linux {machine['system']}, Python {machine['python']}"
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>relaymta bench</title>',
        f"<style>{STYLE}</style></head><body>",
        "<h1>relaymta bench</h1>",
        f"<p>{_text(about)}</p>",
    ]
    if report["interrupted"]:
        parts.append('<p class="bad">Interrupted: these are the figures until then.</p>')
    parts += [f"<p>{_text(runs[0]['load_in_words'])}</p>"] if runs else []
    for run in runs:
        sound = run["ledger"]["sound"]
        parts += [f'<p class="{"ok" if sound else "bad"}">{_text(line)}</p>' for line in [*verdict(run), *run["limits"]]]
    if runs:
        parts.append(_table(*compared(runs, [run["name"] for run in runs])))
    for run in runs:
        parts += _of_run(run)
    return "\n".join([*parts, "</body></html>", ""])


def _of_run(run: dict[str, Any]) -> list[str]:
    version = f" {run['version']}" if run["version"] else ""
    disk = f" Spool on {run['disk']}." if run["disk"] else ""
    profile = f" Sink: {run['profile']}." if run["profile"] else ""
    parts = [f"<h2>{_text(run['name'] + version)}</h2>", f"<p>{_text(_about(run, disk, profile))}</p>"]
    for title, unit, series in PLOTS:
        lines = [(name, run["series"][key]) for key, name in series if any(run["series"].get(key) or ())]
        parts += [f"<h3>{_text(title)}, {unit}</h3>", _plot(lines, run["series"]["step"])] if lines else []
    for title, counts in (
        ("Replies that refused", run["replies"]),
        ("Connections that failed", run["failures"]),
        ("The sink", run["sink"]),
    ):
        if counts:
            rows = [[str(name), f"{count:,}"] for name, count in counts.items()]
            parts += [f"<h3>{title}</h3>", _table(["", "times"], rows)]
    return parts


def _about(run: dict[str, Any], disk: str, profile: str) -> str:
    return f"Durability: {run['durability']}.{disk}{profile} The load ended: {run['ended']}."


def _text(text: str) -> str:
    return escape(printable(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(one)}</th>" for one in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10 ... times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** (ceil(log10(value)) - 1)
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= value)


def _plot(lines: list[tuple[str, list[float | None]]], step: float) -> str:
    """Lines over time, as SVG. A value that is None leaves a gap."""
    most = _round_up(max((value for _, values in lines for value in values if value is not None), default=1.0))
    count = max(len(values) for _, values in lines)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(place: float) -> float:
        return LEFT + wide * place / max(1, count - 1)

    def y(value: float) -> float:
        return TOP + high * (1 - value / most)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img">']
    for part in range(5):
        value = most * part / 4
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.10g}</text>')
    for part in range(5):
        place = (count - 1) * part / 4
        parts.append(f'<text x="{x(place):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{place * step:.3g} s</text>')
    for number, (name, values) in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>' for points in _runs(values, x, y)
        ]
        place = LEFT + 10 + 110 * number
        parts.append(f'<rect x="{place}" y="{TOP}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{place + 14}" y="{TOP + 9}">{_text(name)}</text>')
    return "".join([*parts, "</svg>"])


def _runs(values: list[float | None], x: Any, y: Any) -> list[str]:
    """The points of each part of a line that has no gap."""
    found: list[list[str]] = [[]]
    for place, value in enumerate(values):
        if value is None:
            found.append([])
        else:
            found[-1].append(f"{x(place):.1f},{y(value):.1f}")
    return [" ".join(points if len(points) > 1 else points * 2) for points in found if points]
