"""Limits, rules about replies, and learned limits: the running relay, and peers with limits of their own."""

import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from relaymta import control
from relaymta.config import Config
from relaymta.route.shaping import Shaping, check, profiles
from relaymta.route.sites import Site
from tests.support.daemon import Relay, free_port, heard, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.routed import Routed


def config(**tables) -> Config:
    return Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], **tables})


def test_each_limit_is_the_first_that_is_set_and_names_its_origin():
    made = config(
        site=[{"hosts": [".google.com"], "rate": "500/m"}],
        route=[{"name": "relay", "hosts": ["smtp-relay.google.com:587"], "connections": 3}, {"name": "out", "hosts": ["h"]}],
    )
    made = Config.model_validate_json(made.to_json())
    shape = Shaping(made).shape(Site("relay", made.route[0], None))
    assert (shape.key, shape.connections.value, shape.connections.origin) == ("google", 3, "route relay")
    assert shape.rate.value == pytest.approx(500 / 60) and shape.rate.origin == "[[site]] .google.com"
    assert shape.messages_per_connection.origin.startswith("provider profile google (20")
    other = Shaping(made).shape(Site("out", made.route[1], None))
    assert (other.key, other.rate.value, other.connections.origin) == ("out", 0, "default")


def test_rules_of_the_configuration_precede_those_of_the_profiles():
    rules = [{"match": "greylist", "action": "bounce"}]
    shaping = Shaping(config(rule=rules))
    assert shaping.rule("mx.example", "450 4.7.1 Greylisted, come back").action == "bounce"
    assert Shaping(config()).rule("mx.example", "450 4.7.1 Greylisted, come back").duration == 300
    assert Shaping(config()).rule("mx.example", "452 4.2.2 mailbox full").duration == 4 * 3600
    assert Shaping(config()).rule("mx.example", "550 5.1.1 no such user") is None
    google = Shaping(config()).rule("alt1.gmail-smtp-in.l.google.com", "421 4.7.28 Gmail has detected an unusual rate of mail")
    assert google.action == "slow"
    assert profiles().version


def test_limits_that_can_never_be_reached_are_named():
    assert check(config(site=[{"hosts": ["h"], "rate": "10/s", "connection_rate": "1/s", "messages_per_connection": 5}]))
    assert not check(config(site=[{"hosts": ["h"], "rate": "4/s", "connection_rate": "1/s", "messages_per_connection": 5}]))


def test_config_check_names_them_and_reads_the_route_map(tmp_path):
    relay = Relay(tmp_path, None)
    table = 'site=[{hosts=["h"],rate="10/s",connection_rate="1/s",messages_per_connection=5}]'
    flags = ["--set", 'listener=[{address="127.0.0.1:1"}]', "--set", table]
    said = relay.cli("config", "check", *flags)
    assert "rate 10/s is never reached" in said.stdout and "is valid" in said.stdout
    (tmp_path / "map").write_text("x@y nowhere\n")
    wrong = relay.cli("config", "check", *flags, "--set", f"route_map={tmp_path}/map", check=False)
    assert wrong.returncode == 78 and "map:1: there is no route 'nowhere'" in wrong.stderr


def states(relay: Relay) -> list[dict]:
    return control.ask(relay.spool / "control.sock", "site_states")


# Tests that share a relay, each with a site of its own.

ROUTES = [
    (name, f"{name}.test", f'hosts=["127.0.1.{number}:${name}"]')
    for number, name in enumerate(("hourly", "applications", "express", "busy"), 1)
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    networks = (
        'network=[{networks=["127.0.0.9/32"],application="bulk",relay=true},'
        '{networks=["127.0.0.8/32"],priority="express",relay=true}]'
    )
    sites = 'site=[{hosts=["127.0.1.1"],rate="1/h"},{hosts=["127.0.1.3"],rate="5/s"}]'
    with Routed(tmp_path_factory.mktemp("shared"), ROUTES, networks, sites) as made:
        yield made


def peer_of(relay: Routed, name: str, slow: float = 0) -> FakeMx:
    number = [route for route, _, _ in ROUTES].index(name) + 1
    return FakeMx({}, relay.port_of(name), slow=slow, host=f"127.0.1.{number}")


def test_a_rate_is_kept_by_two_workers_together(tmp_path):
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", 'site=[{hosts=["127.0.0.1"],rate="10/s"}]', workers=2) as relay:
            began = time.time()
            relay.send_all(40)
            wait_for(lambda: len(peer.messages) == 40)
            wait_for(lambda: len(relay.events("delivered")) == 40)
            last = max(event["ts"] for event in relay.events("delivered"))
            assert last - began >= 39 / 10 - 0.5, "faster than the limit"


def test_a_message_that_waits_for_a_rate_is_explained(shared):
    with peer_of(shared, "hourly") as peer:
        shared.send_all(3, to="c@hourly.test")
        ident = wait_for(lambda: [e["id"] for e in shared.events("queued") if "c@hourly.test" in e["recipients"]][2:])[0]
        wait_for(lambda: len(peer.messages) == 1)
        shown = shared.cli("message", "explain", ident).stdout
        assert "waits for its turn" in shown and "set by [[site]] 127.0.1.1" in shown
        wait_for(lambda: shared.metric('relaymta_throttled_seconds_total{constraint="rate"}') >= 1)


def test_a_rule_suspends_a_site_until_it_is_resumed_and_the_reply_is_the_evidence(tmp_path):
    rules = 'rule=[{match="go away",action="suspend",for="1h"}]'
    with FakeMx({"MAIL": [b"451 4.7.0 go away for now\r\n"]}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", rules, workers=2) as relay:
            relay.send()
            wait_for(lambda: states(relay))
            for _ in range(4):
                relay.send()
            time.sleep(0.5)
            assert peer.messages == []
            why = relay.cli("shaping", "why", "smarthost").stdout
            assert "451 4.7.0 go away for now" in why and "rule go away" in why
            ident = wait_for(lambda: [event["id"] for event in relay.events("queued")][4:])[0]
            assert "suspended by rule go away" in relay.cli("message", "explain", ident).stdout
            relay.kill()
            relay.start()
            time.sleep(1)
            assert peer.messages == [], "the suspension survives a restart"
            relay.cli("site", "resume", "smarthost")
            wait_for(lambda: len(peer.messages) == 4)
            assert states(relay) == []


def test_an_operator_suspends_one_application(shared):
    with peer_of(shared, "applications") as peer:
        site, to = "applications", ("c@applications.test",)
        said = shared.cli("site", "suspend", site, "--app", "bulk", "--for", "10m", "--reason", "complaints")
        assert "suspended for 10m" in said.stdout
        shared.send("Subject: x\r\n\r\nx\r\n", "a@b.example", *to)
        wait_for(lambda: len(peer.messages) == 1)
        shared.send_from("127.0.0.9", to=to)
        ident = wait_for(lambda: [e["id"] for e in shared.events("queued") if e["application"] == "bulk"])[0]
        time.sleep(0.5)
        assert len(peer.messages) == 1
        assert "suspended by operator: complaints" in shared.cli("message", "explain", ident).stdout
        assert shared.cli("site", "resume", site, check=False).returncode == 1
        shared.cli("site", "resume", site, "--app", "bulk")
        wait_for(lambda: len(peer.messages) == 2)


def test_a_site_that_is_down_is_not_tried_by_any_worker_nor_after_a_restart(tmp_path):
    port = free_port()
    with Relay(tmp_path, f"127.0.0.1:{port}", "delivery.first_retry=3600", workers=2) as relay:
        for _ in range(10):
            relay.send()
        wait_for(lambda: any(state["kind"] == "dead" for state in states(relay)))
        wait_for(lambda: settled(relay))
        failed = relay.metric('relaymta_sessions_total{result="failed"}')
        relay.send_all(5)
        time.sleep(0.5)
        assert relay.metric('relaymta_sessions_total{result="failed"}') == failed, "no worker tries it"
        relay.kill()
        relay.start()
        relay.send()
        time.sleep(0.5)
        assert relay.metric('relaymta_sessions_total{result="failed"}') == 0
        assert len(relay.events("deferred")) <= 2, "one message of each worker is charged"
        with FakeMx({}, port) as peer:
            wait_for(lambda: len(peer.messages) == 16, 30)
            wait_for(lambda: states(relay) == [])


def settled(relay: Relay) -> bool:
    """No connection is being opened, and none was during the check."""
    before = relay.metric('relaymta_sessions_total{result="failed"}')
    return not any(row["opening"] for row in relay.sites()) and relay.metric('relaymta_sessions_total{result="failed"}') == before


class Provider(FakeMx):
    """A peer with limits that nobody configured: `most` connections, `each` messages on one, `rate` messages a second."""

    def __init__(self, most: int, each: int, rate: int) -> None:
        super().__init__({})
        self.most, self.each, self.rate = most, each, rate
        self.refused = 0
        self._taken: list[float] = []
        self._carried: dict[int, int] = {}
        self._lock = threading.Lock()

    def _talk(self, sock) -> None:
        self._carried[threading.get_ident()] = 0
        if self.now_open > self.most:
            self.refused += 1
            sock.sendall(b"421 4.7.0 too many connections from you\r\n")
            return
        super()._talk(sock)

    def _rule(self, verb, argument=""):
        if verb != "MAIL":
            return super()._rule(verb, argument)
        with self._lock:
            me, now = threading.get_ident(), time.monotonic()
            self._carried[me] = self._carried.get(me, 0) + 1
            self._taken = [moment for moment in self._taken if moment > now - 1]
            if self._carried[me] > self.each or len(self._taken) >= self.rate:
                self.refused += 1
                return b"421 4.7.0 too much from you\r\n"
            self._taken.append(now)
        return super()._rule(verb, argument)


def test_limits_that_nobody_configured_are_learned(tmp_path):
    with Provider(4, 20, 25) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=1") as relay:
            relay.send_all(200)
            wait_for(lambda: len(peer.messages) >= 80)
            refused = peer.refused
            wait_for(lambda: len(peer.messages) == 200)
            assert peer.refused - refused <= 20, "421 is not heeded"
            learned = {state["about"]: state["value"] for state in states(relay) if state["kind"] == "learned"}
            assert learned and learned.get("rate", 1) <= 25 and learned.get("connections", 1) <= 4
            why = relay.cli("shaping", "why", "smarthost").stdout
            assert "421 4.7.0 too" in why


def test_an_express_message_overtakes_a_backlog_and_the_backlog_is_delivered_too(shared):
    with peer_of(shared, "express") as peer:
        shared.send_all(60, "Subject: slow\r\n\r\nx\r\n", "c@express.test")
        shared.send_from("127.0.0.8", "Subject: express\r\n\r\nx\r\n", ("c@express.test",))
        before = len(peer.messages)
        places = wait_for(lambda: [at for at, mail in enumerate(list(peer.messages)) if b"Subject: express" in mail[2]])
        assert places[0] <= before + 5 and before < 50
        wait_for(lambda: len(peer.messages) > places[0] + 1)


def test_more_mail_than_a_site_may_hold_in_memory_is_delivered_after_an_outage(tmp_path):
    """So much waits that the rest stays on disk; then the site is down, and up again."""
    with FakeMx({}, free_port(), slow=3600) as slow:
        with Relay(tmp_path, f"127.0.0.1:{slow.port}", "delivery.first_retry=0.5", "delivery.connect_timeout=300") as relay:
            taken: list[int] = []

            def part() -> None:
                envelope = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"
                with socket.create_connection(("127.0.0.1", relay.port), 60) as client:
                    heard(client, b"220 ")
                    client.sendall(b"EHLO source\r\n")
                    heard(client, b"250 ")
                    for _ in range(230):  # pipelined: what is sent is not what is tested
                        client.sendall(envelope)
                        assert b"354 " in heard(client, b"354", b"4", b"5")
                        client.sendall(b"Subject: x\r\n\r\nx\r\n.\r\n")
                        assert heard(client, b"250", b"4", b"5").startswith(b"250")
                        taken.append(1)

            threads = [threading.Thread(target=part) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(taken) == 2300 and slow.messages == []
            slow.__exit__()
            with FakeMx({}, slow.port) as peer:
                wait_for(lambda: len(peer.messages) == 2300, 60)


def test_one_connection_for_two_workers_is_shared(tmp_path):
    """Neither worker's mail waits for all of the other's."""
    with FakeMx({}) as peer:
        settings = ('site=[{hosts=["127.0.0.1"],connections=1}]', "delivery.idle=30")
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings, workers=2) as relay:
            peer.rules["DOT"] = Slow(0.01)
            peer.patience = 0.25  # a place is given back with QUIT, which the system sends a moment later
            for _ in range(20):  # some to each worker
                relay.send_all(10)
            wait_for(lambda: len(peer.messages) == 200)
            assert peer.most_open == 1
            wait_for(lambda: len(relay.events("delivered")) == 200)
            assert {event["worker"] for event in relay.events("delivered")} == {0, 1}
            order = [event["worker"] for event in sorted(relay.events("delivered"), key=lambda e: e["ts"])]
            assert sum(a != b for a, b in pairwise(order)) >= 3


class Slow(dict):
    """A rule that delays each reply."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def get(self, key, default=None):
        time.sleep(self.seconds)
        return default


def test_a_reload_that_renames_a_site_keeps_its_limit(tmp_path):
    config = tmp_path / "relay.toml"
    site = '[[site]]\nname = "{}"\nhosts = ["127.0.0.1"]\nconnections = 1\n'
    config.write_text(site.format("one"))
    with FakeMx({}, slow=0.1) as peer:
        relay = Relay(tmp_path, f"127.0.0.1:{peer.port}", workers=2)
        relay.environment["RELAYMTA_CONFIG"] = str(config)
        with relay:
            _counted(config, site, peer, relay)


def _counted(config: Path, site: str, peer: FakeMx, relay: Relay) -> None:
    for name in ("two", "three", "four"):
        before = len(peer.messages)
        for _ in range(8):
            relay.send()
        wait_for(lambda before=before: len(peer.messages) > before)
        config.write_text(site.format(name))  # while messages are under way
        assert "reloaded" in control.ask(relay.spool / "control.sock", "reload")
    wait_for(lambda: len(peer.messages) == 24)
    wait_for(lambda: peer.now_open <= 1)
    peer.most_open = 0
    for _ in range(8):
        relay.send()
    wait_for(lambda: len(peer.messages) == 32)
    assert peer.most_open <= 1


def test_metrics_show_the_busiest_sites(shared):
    with peer_of(shared, "busy", slow=0.05) as peer:
        shared.send_all(20, to="c@busy.test")
        wait_for(lambda: peer.messages)
        assert shared.metric('relaymta_site_connections{site="busy"}') >= 1
        assert shared.metric('relaymta_site_window{site="busy"}') >= 5


def test_a_site_that_has_only_deferred_mail_is_known(tmp_path):
    """Nothing waits in memory, nothing is connected: its mail's next attempt is not due."""
    with (
        FakeMx({"RCPT": b"450 4.2.1 later\r\n"}) as peer,
        Relay(tmp_path, f"127.0.0.1:{peer.port}", 'delivery.idle="0.2s"', workers=2) as relay,
    ):
        relay.send_all(6)
        wait_for(lambda: len(relay.events("deferred")) == 6)
        wait_for(lambda: not any(row["connections"] for row in relay.sites()))
        (row,) = relay.sites()
        assert (row["pool"], row["state"], row["deferred"], row["waiting"], row["connections"]) == ("smarthost", "up", 6, 0, 0)
        assert row["limits"]["connections"]["value"]
        assert relay.cli("site", "list").stdout.splitlines()[-1].split()[:4] == ["smarthost", "up", "0", "6"]
        host = f"127.0.0.1:{peer.port}"
        assert "6 deferred" in relay.cli("site", "show", host).stdout
        assert relay.cli("shaping", "why", "smarthost").stderr == "there is no decision about smarthost\n"
        assert relay.cli("site", "suspend", "smarthost", "--for", "1m").stderr == ""
        assert relay.cli("site", "list").stdout.splitlines()[-1].split()[1] == "suspended"
        relay.cli("site", "resume", "smarthost")
        assert "6 of 6" in relay.cli("queue", "delete", "--site", host).stdout
        assert relay.sites() == []
