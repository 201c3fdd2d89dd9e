"""What is found about accounts, and what follows: states of the machine, told once, ended by time or by an operator."""

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
    octets = machine.accounts.dump()
    assert not machine.accounts.changed
    again = Machine({"watch": "volume"}, octets=octets)
    again.now = machine.now + HOUR
    await again.seen(recipients=35)
    assert again.accounts.rows() == [] and again.accounts.why("ann")["since"] == START
    await again.seen(recipients=6)
    assert again.accounts.rows()[0]["reason"] == "41 recipients within an hour; its busiest hour of 7 days had 8"
    for broken in (octets[:-3], b"x" + octets, b"\0", octets[: len(octets) // 2], b"x" * 100):
        assert Machine({"watch": "volume"}, octets=broken).accounts._habits == {}


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
    conduct = Conduct(states)
    now = node._wall()
    for account, verdict in (("user=ann", "hold"), ("user=bob", ""), ("user=eve", "suspend")):
        states.learn(SiteState(ABUSE, account, "c", now, now + 10_000, "abuse c", "why", verdict))
    conduct.refresh()
    assert conduct.took("bob", "", "192.0.2.1", ["a@b"]) is None is conduct.took("eve", "", "192.0.2.1", ["a@b"])
    found = conduct.took("ann", "shop", "192.0.2.1", ["a@b"])
    assert found is not None and (found.site, found.about, found.reason) == ("user=ann", "c", "why")
    boot += 11_000
    assert conduct.took("ann", "shop", "192.0.2.1", ["a@b"]) is None


def test_the_docs_name_every_watch():
    text = (Path(__file__).parents[2] / "docs/abuse.md").read_text()
    assert all(f"| `{watch}` |" in text for watch in ("volume", "spread", "failures", "network", "rule"))
