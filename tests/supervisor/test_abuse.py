"""What is found about accounts, and what follows: states of the machine, told once, ended by time or by an operator."""

import time
from pathlib import Path

import msgspec
import pytest

from relaymta.config import Abuse
from relaymta.errors import NoSuch, RelayError
from relaymta.filter.conduct import ACCOUNTS_MOST, Conduct, accounts
from relaymta.filter.habits import DAY, HOUR, Seen
from relaymta.node import ABUSE, HOLD, SiteState, SiteStates
from relaymta.proto.envelope import DSN, Envelope
from relaymta.supervisor import abuse
from relaymta.supervisor.abuse import Accounts

START = 1_800_000_000


class Machine:
    def __init__(self, *checks: dict, octets: bytes = b"") -> None:
        self.checks = [Abuse.model_validate({"name": one["watch"], "floor": 10, "enforce": True} | one) for one in checks]
        self.states, self.events, self.now = SiteStates(), [], START
        self.accounts = Accounts(lambda: self.checks, self.states, self.decide, self, octets, lambda: self.now)  # type: ignore[arg-type]

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))

    def decide(self, state: SiteState | None, key: tuple[str, str, str]) -> bool:
        if state is None:
            return self.states.forget(*key) is not None
        self.states.learn(state)
        return True

    async def seen(self, account: str = "user=ann", recipients: int = 10, **more: object) -> None:
        row = Seen(account, recipients, networks={"192.0.2.0/24": recipients}, **more)  # type: ignore[arg-type]
        await self.accounts.conduct([msgspec.to_builtins(row)])


async def test_a_finding_is_told_once_and_has_an_end():
    machine = Machine({"watch": "volume", "lasts": "1h"})
    await machine.seen(recipients=9)
    assert machine.accounts.rows() == []
    for _ in range(3):
        await machine.seen()
    (row,) = machine.accounts.rows()
    assert (row["account"], row["verdict"], row["enforced"]) == ("user=ann", "hold", True)
    assert row["until"] - row["since"] == HOUR
    ((name, event),) = machine.events
    assert name == "abuse" and event["value"] == 19 and event["limit"] == 9 and event["verdict"] == "hold" and event["enforced"]
    assert machine.accounts.counts() == {"volume": (1, 0, 1)}


async def test_what_is_not_enforced_does_nothing_and_is_enforced_once_that_is_wanted():
    machine = Machine({"watch": "volume", "enforce": False, "verdict": "suspend"})
    await machine.seen()
    await machine.seen()
    (row,) = machine.accounts.rows()
    assert row["verdict"] == "" and not row["enforced"] and not machine.states.of(HOLD)
    assert machine.accounts.counts() == {"volume": (0, 1, 1)} and machine.events[0][1]["verdict"] == "suspend"
    machine.checks = [machine.checks[0].model_copy(update={"enforce": True})]
    await machine.seen()
    await machine.seen()
    (row,) = machine.accounts.rows()
    assert row["verdict"] == "suspend" and [state.site for state in machine.states.of(HOLD)] == ["user=ann"]
    assert machine.accounts.counts() == {"volume": (1, 1, 1)}


async def test_a_suspended_account_goes_on_when_the_last_finding_is_cleared():
    machine = Machine({"watch": "volume", "verdict": "suspend"}, {"watch": "rule", "rule": "r", "floor": 1, "verdict": "suspend"})
    await machine.seen(rules={"r": 1})
    assert len(machine.accounts.rows()) == 2
    with pytest.raises(NoSuch, match="volume"):
        machine.accounts.clear("ann", "volumes")
    assert [row["check"] for row in machine.accounts.clear("ann", "rule")] == ["rule"]
    assert machine.states.of(HOLD)
    assert [row["check"] for row in machine.accounts.clear("user=ann", "")] == ["volume"]
    assert not machine.states.of(HOLD) and not machine.states.of(ABUSE)
    machine.now += 3
    await machine.seen(recipients=5)
    assert machine.accounts.rows() == [], "that is usual now"
    await machine.seen(recipients=100)
    assert len(machine.accounts.rows()) == 1


async def test_a_policy_of_an_operator_is_not_ended():
    machine = Machine({"watch": "volume", "verdict": "suspend"})
    machine.states.learn(SiteState(HOLD, "user=ann", "", START * 1000, START * 2000, "operator", "mine"))
    await machine.seen()
    assert machine.accounts.rows()[0]["verdict"] == "hold"
    machine.accounts.clear("ann", "")
    with pytest.raises(NoSuch, match="no such finding about user=ann"):
        machine.accounts.clear("ann", "")
    assert [state.reason for state in machine.states.of(HOLD)] == ["mine"]


async def test_the_policy_lasts_as_long_as_the_finding_that_lasts_longest():
    machine = Machine(
        {"watch": "volume", "verdict": "suspend", "lasts": "1d"},
        {"watch": "rule", "rule": "r", "floor": 1, "verdict": "suspend", "lasts": "1h"},
    )
    await machine.seen(rules={"r": 1})
    (policy,) = machine.states.of(HOLD)
    assert machine.states.left(policy) > 23 * HOUR * 1000 and policy.by == "abuse volume"
    machine.accounts.clear("ann", "volume")
    (policy,) = machine.states.of(HOLD)
    assert 59 * 60_000 < machine.states.left(policy) <= HOUR * 1000 and policy.by == "abuse rule"


@pytest.mark.parametrize("verdict", ["hold", "suspend"])
async def test_what_a_check_does_ends_when_it_is_gone_or_not_enforced_any_more(verdict):
    machine = Machine({"watch": "volume", "verdict": verdict}, {"watch": "rule", "rule": "r", "enforce": False, "floor": 1})
    await machine.seen(rules={"r": 1})
    machine.accounts.configured()
    assert len(machine.states.of(ABUSE)) == 2
    machine.checks = [machine.checks[0].model_copy(update={"enforce": False})]
    machine.accounts.configured()
    assert not machine.states.of(ABUSE) and not machine.states.of(HOLD)


def test_a_finding_that_ends_first_does_not_hide_one_that_lasts(monkeypatch):
    import relaymta.node as node

    boot = node._boot()
    monkeypatch.setattr(node, "_boot", lambda: boot)
    states, now = SiteStates(), node._wall()
    conduct = Conduct(states)
    for check, seconds in (("long", 100), ("short", 10)):
        state = SiteState(ABUSE, "user=ann", check, now, now + seconds * 1000, f"abuse {check}", "why", "hold")
        states.learn(state)
        conduct.changed(state, state.key)
    boot += 11_000
    found = conduct.took("ann", "", "192.0.2.1", ["a@b"])
    assert found is not None and found.about == "long"
    conduct.changed(None, (ABUSE, "user=ann", "long"))
    assert conduct.took("ann", "", "192.0.2.1", ["a@b"]) is None


class Clock:
    """Of the machine and of its states; to be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
        import relaymta.node as node

        self.machine, self.passed = machine, 0
        boot, wall = node._boot(), START * 1000
        monkeypatch.setattr(node, "_boot", lambda: boot + self.passed * 1000)
        monkeypatch.setattr(node, "_wall", lambda: wall + self.passed * 1000)
        monkeypatch.setattr(abuse.time, "time_ns", lambda: (wall + self.passed * 1000) * 1_000_000)

    def set(self, passed: int) -> None:
        self.passed, self.machine.now = passed, START + passed


async def test_what_is_done_while_an_account_is_held_is_not_usual_at_its_end(monkeypatch):
    """Or who has stolen a password would only have to wait for `lasts`."""
    machine = Machine({"watch": "volume", "floor": 200, "lasts": "1d"})
    clock = Clock(monkeypatch, machine)
    for hour in range(168):
        clock.set(hour * HOUR)
        await machine.seen(recipients=10)
    began, free = 168 * HOUR, 0
    for passed in range(0, 3 * DAY, 600):
        clock.set(began + passed)
        await machine.seen(recipients=1500)
        free += not machine.states.of(ABUSE)
    assert free == 0 and len(machine.events) == 3
    machine.accounts.clear("ann", "")
    clock.set(began + 4 * DAY)
    await machine.seen(recipients=5 * 9000)
    assert not machine.states.of(ABUSE), "an operator says that this is usual"
    await machine.seen(recipients=1)
    assert machine.states.of(ABUSE)


async def test_the_same_failures_hold_an_account_once(monkeypatch):
    machine = Machine({"watch": "failures", "floor": 50, "lasts": "1d"})
    clock = Clock(monkeypatch, machine)
    await machine.seen(recipients=100, ended=100, failed=30)
    for day in range(1, 9):
        clock.set(day * (DAY + 60))
        await machine.seen(recipients=1, ended=1)
    assert len(machine.events) == 1
    await machine.seen(recipients=50, ended=50, failed=30)
    assert len(machine.events) == 2


async def test_a_network_of_a_thief_is_new_at_the_end_of_the_finding(monkeypatch):
    machine = Machine({"watch": "network", "floor": 10, "lasts": "2d"})
    clock = Clock(monkeypatch, machine)
    for day in range(3):
        clock.set(day * DAY)
        await machine.seen(recipients=1)
    for hour in range(72, 72 + 5 * 24):
        clock.set(hour * HOUR)
        row = Seen("user=ann", 20, networks={"198.51.100.0/24": 20})
        await machine.accounts.conduct([msgspec.to_builtins(row)])
        assert machine.states.of(ABUSE)
    machine.accounts.clear("ann", "")
    await machine.accounts.conduct([msgspec.to_builtins(row)])
    assert not machine.states.of(ABUSE)


async def test_a_name_with_a_space_is_held_since_there_can_be_no_policy():
    machine = Machine({"watch": "volume", "verdict": "suspend"})
    await machine.seen("user=Ann Smith")
    assert machine.accounts.rows()[0]["verdict"] == "hold" and not machine.states.of(HOLD)


async def test_only_the_accounts_that_a_check_is_about():
    machine = Machine(
        {"watch": "volume", "user": ["ann"], "application": ["shop"]}, {"watch": "rule", "rule": "r", "user": ["bob"]}
    )
    for account in ("user=ann", "user=bob", "application=ann", "application=shop"):
        await machine.seen(account)
    assert {row["account"] for row in machine.accounts.rows()} == {"user=ann", "application=shop"}
    assert [one["check"] for one in machine.accounts.why("user=bob")["checks"]] == ["rule"]
    with pytest.raises(RelayError, match="user=ann, application=ann"):
        machine.accounts.why("ann")
    with pytest.raises(NoSuch, match='did you mean "user=ann"'):
        machine.accounts.why("user=anm")


async def test_habits_survive_a_restart_and_what_is_none_is_forgotten():
    machine = Machine({"watch": "volume"})
    for hour in range(5):
        machine.now = START + hour * HOUR
        await machine.seen(recipients=8)
    octets = await machine.accounts.dump()
    assert not machine.accounts.changed
    again = Machine({"watch": "volume"}, octets=octets)
    again.now = machine.now + HOUR
    await again.seen(recipients=35)
    assert again.accounts.rows() == [] and again.accounts.why("ann")["since"] == START
    await again.seen(recipients=6)
    assert again.accounts.rows()[0]["reason"] == "41 recipients within an hour; its busiest hour of 7 days had 8"
    for broken in (octets[:-3], b"x" + octets, b"\0", octets[: len(octets) // 2], b"x" * 100):
        assert Machine({"watch": "volume"}, octets=broken).accounts._habits == {}


async def test_a_table_that_is_too_large_keeps_those_heard_of_last(monkeypatch):
    machine = Machine({"watch": "volume"})
    for number in range(1000):
        await machine.seen(f"user={number}", 1)
    whole = Machine({"watch": "volume"}, octets=await machine.accounts.dump()).accounts._habits
    assert whole == machine.accounts._habits and [*whole] == [*machine.accounts._habits]
    monkeypatch.setattr(abuse, "TABLE_MOST", 50_000)
    again = Machine({"watch": "volume"}, octets=await machine.accounts.dump()).accounts._habits
    assert 200 <= len(again) < 1000 and [*again] == [*machine.accounts._habits][-len(again) :]


async def test_networks_of_all_accounts_are_bounded(monkeypatch):
    monkeypatch.setattr(abuse, "NETWORKS_MOST", 50)
    machine = Machine({"watch": "volume"})
    for number in range(30):
        row = Seen(f"user={number}", 4, networks={f"10.{number}.{part}.0/24": 1 for part in range(4)})
        await machine.accounts.conduct([msgspec.to_builtins(row)])
    kept = machine.accounts._habits
    assert len(kept) == 12 and [*kept][-1] == "user=29"


async def test_accounts_are_bounded_and_those_not_heard_of_for_longest_go(monkeypatch):
    monkeypatch.setattr(abuse, "MOST", 20)
    machine = Machine({"watch": "volume"})
    for number in range(30):
        await machine.seen(f"user={number}", 1)
        await machine.seen("user=0", 0)
    assert [*machine.accounts._habits][-1] == "user=0" and len(machine.accounts._habits) == 20


async def test_why_shows_figures_and_networks():
    machine = Machine({"watch": "volume"}, {"watch": "failures", "enforce": False})
    await machine.seen(recipients=3, ended=4, failed=2)
    machine.now += 3 * DAY
    found = machine.accounts.why("ann")
    assert found["networks"] == [{"network": "192.0.2.0/24", "first": START, "last": START}]
    volume, failures = found["checks"]
    assert (volume["value"], volume["limit"], volume["above"]) == (0, 15, False)
    assert failures["text"] == "2 of its last 4 recipients failed for good" and not failures["above"] and not failures["enforce"]


# What one worker counts

MAIL = type("Mail", (), {"user": "ann", "application": "shop"})()


def test_an_account_is_counted_for_its_user_and_its_application():
    assert [*accounts("", "")] == [] and [*accounts("shop", "shop")] == ["user=shop"]
    assert [*accounts("ann", "shop")] == ["user=ann", "application=shop"] and [*accounts("", "shop")] == ["application=shop"]


def test_a_report_has_what_was_seen_since_the_last_one():
    conduct = Conduct(SiteStates())
    assert conduct.took("", "", "192.0.2.1", ["a@b.example"]) is None and conduct.report() == []
    for client in ("192.0.2.1", "192.0.2.77", "2001:db8::1"):
        conduct.took("ann", "shop", client, ["a@B.example", "c@b.example", "d@e.example"])
    conduct.ended(Envelope("a@b", ["c@d"], 1, 0, 0, 0, user="ann", application="shop"), 3, 2)
    conduct.ended(Envelope("", ["a@b"], 1, DSN, 0, 0, user="", application="shop"), 1, 0)
    conduct.matched(MAIL, "r")  # type: ignore[arg-type]
    rows = [msgspec.convert(row, Seen) for row in conduct.report()]
    assert [row.account for row in rows] == ["user=ann", "application=shop"]
    for row in rows:
        assert (row.recipients, row.failed, row.ended, row.rules) == (9, 2, 5, {"r": 1})
        assert row.networks == {"192.0.2.0/24": 6, "2001:db8::/64": 3} and len(row.domains) == 16
    assert conduct.report() == []


def test_what_is_counted_between_two_reports_is_bounded():
    conduct = Conduct(SiteStates())
    for number in range(ACCOUNTS_MOST + 10):
        conduct.took(f"u{number}", "", "192.0.2.1", ["a@b.example"])
    conduct.took("u1", "", "192.0.2.1", [f"a@{number}.example" for number in range(9000)])
    rows = conduct.report()
    assert len(rows) == ACCOUNTS_MOST and max(len(msgspec.convert(row, Seen).domains) for row in rows) <= 8 * 4096


def test_who_is_held_is_held_until_the_end(monkeypatch):
    import relaymta.node as node

    boot = node._boot()
    monkeypatch.setattr(node, "_boot", lambda: boot)
    states = SiteStates()
    now = node._wall()
    for account, verdict in (("user=ann", "hold"), ("user=bob", ""), ("user=eve", "suspend")):
        states.learn(SiteState(ABUSE, account, "c", now, now + 10_000, "abuse c", "why", verdict))
    conduct = Conduct(states)
    assert conduct.took("bob", "", "192.0.2.1", ["a@b"]) is None is conduct.took("eve", "", "192.0.2.1", ["a@b"])
    found = conduct.took("ann", "shop", "192.0.2.1", ["a@b"])
    assert found is not None and (found.site, found.about, found.reason) == ("user=ann", "c", "why")
    boot += 11_000
    assert conduct.took("ann", "shop", "192.0.2.1", ["a@b"]) is None


def test_the_docs_name_every_watch():
    text = (Path(__file__).parents[2] / "docs/abuse.md").read_text()
    assert all(f"| `{watch}` |" in text for watch in ("volume", "spread", "failures", "network", "rule"))


def test_so_much_is_held_of_an_account_and_then_no_more_is_taken(monkeypatch):
    import relaymta.filter.conduct as module

    monkeypatch.setattr(module, "HELD_OCTETS", 1000)
    states = SiteStates()
    conduct, now = Conduct(states), time.time_ns() // 1_000_000
    state = SiteState(ABUSE, "user=ann", "c", now, now + 10_000, "abuse c", "why", "hold")
    states.learn(state)
    conduct.changed(state, state.key)
    assert not conduct.holds_much("ann", "shop")
    conduct.held(state, 999)
    assert not conduct.holds_much("ann", "shop")
    conduct.held(state, 1)
    assert conduct.holds_much("ann", "shop") and not conduct.holds_much("bob", "shop") and not conduct.holds_much("", "")
    states.forget(*state.key)
    conduct.changed(None, state.key)
    assert not conduct.holds_much("ann", "shop")
    states.learn(state)
    conduct.changed(state, state.key)
    assert not conduct.holds_much("ann", "shop"), "that was before"


async def test_what_was_done_just_before_it_was_cleared_is_not_found_after_it():
    machine = Machine({"watch": "rule", "rule": "r", "floor": 1})
    await machine.seen(rules={"r": 1})
    machine.accounts.clear("ann", "")
    machine.now += 1
    await machine.seen(rules={"r": 1})
    assert machine.accounts.rows() == []
    machine.now += 2
    await machine.seen(rules={"r": 1})
    assert machine.accounts.rows()[0]["reason"] == "1 message within an hour matches the rule r"


async def test_an_account_that_is_used_from_everywhere_has_no_new_networks():
    machine = Machine({"watch": "network", "floor": 1})
    for number in range(250):
        row = Seen("user=ann", 1, networks={f"10.0.{number}.0/24": 1})
        await machine.accounts.conduct([msgspec.to_builtins(row)])
    machine.now += 5 * DAY
    row = Seen("user=ann", 1, networks={"192.0.2.0/24": 1})
    await machine.accounts.conduct([msgspec.to_builtins(row)])
    assert machine.accounts.rows() == [] and machine.accounts.why("ann")["checks"][0]["value"] == 0
