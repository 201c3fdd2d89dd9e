"""Which sites /metrics shows as down."""

import time

from relaymta.node import DEAD, SUSPENDED, SiteState
from relaymta.supervisor import outages
from relaymta.supervisor.outages import GRACE, Outages


def dead(site: str, seconds: float = 60.0, failures: float = 1.0, kind: str = DEAD) -> SiteState:
    now = time.time_ns() // 1_000_000
    return SiteState(kind, site, "", now, now + int(seconds * 1000), "automatic", "no", "", failures, "refused")


def names(made: Outages) -> list[str]:
    count, rows = made.rows(lambda site: site == "out")
    assert count >= len(rows)
    return [row["site"] for row in rows]


def test_a_site_is_down_until_it_is_up_and_between_two_attempts():
    now = [0.0]
    made = Outages([dead("before")], lambda: now[0])
    for state in (dead("out"), dead("mx/d.example", failures=5), dead("x", kind=SUSPENDED)):
        made.changed(state, state.key)
    count, rows = made.rows(lambda site: site == "out")
    assert count == 3 and rows[0] == {"site": "out", "cause": "refused", "hosts": "smart"}, "first, whatever has failed oftener"
    assert rows[1] == {"site": "mx/d.example", "cause": "refused", "hosts": "mx"}
    now[0] = 60 + GRACE - 5  # its state has ended; the attempt that follows has not failed yet
    assert "out" in names(made)
    again = dead("out")
    made.changed(again, again.key)
    now[0] += 60
    assert names(made) == ["out"], "of the others nobody has tried anything"
    made.changed(None, again.key)
    assert names(made) == []
    made.changed(None, again.key)


def test_they_are_bounded(monkeypatch):
    monkeypatch.setattr(outages, "MOST", 10)
    made = Outages()
    for number in range(100):
        state = dead(f"s{number}")
        made.changed(state, state.key)
    count, rows = made.rows(lambda site: False)
    assert count <= 10 and len(rows) <= 10 and "s99" in {row["site"] for row in rows}


def test_few_new_sites_of_others_are_shown_a_minute_and_those_that_are_stay_while_they_are_down():
    """Else each of 10,000 domains that are down in turn would leave a series behind in Prometheus."""
    now, seen = [0.0], set[str]()
    made = Outages(now=lambda: now[0])
    for number in range(500):
        made.changed(dead(f"mx/{number}"), dead(f"mx/{number}").key)
    first = set(names(made))
    assert len(first) == outages.SHOWN and set(names(made)) == first
    for minute in range(60):
        now[0] += 60
        for number in range(500):
            state = dead(f"mx/{minute}-{number}", failures=float(minute))
            made.changed(state, state.key)
        seen |= set(names(made))
    assert len(seen - first) <= 60 * outages.SWAPS
    down = dead("out")
    made.changed(down, down.key)
    assert names(made)[0] == "out", "one of ours is shown at once"
