"""Outbound abuse in the running relay: as docs/abuse.md has it."""

import json
import os
import signal
import smtplib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.test_rules import Reloading
from tests.support.daemon import PATIENCE, wait_for
from tests.support.fake_mx import FakeMx

VOLUME = '[[abuse]]\nname = "sudden volume"\nwatch = "volume"\nfloor = 20\nlasts = "1h"\n'
KEYS = """
[[mail_rule]]
name = "keys"
secrets = ["private key"]
verdict = "tag"
[[abuse]]
name = "leaked keys"
watch = "rule"
rule = "keys"
verdict = "suspend"
enforce = true
"""
PLAIN = "Subject: x\r\n\r\nx\r\n"
KEY = (
    "Subject: the key\r\n\r\n-----BEGIN RSA PRIVATE KEY-----\r\n"
    + "MIIEowIBAAKCAQEA7bq1Zt9sX0fVw3yJp4mK8nRcQ5eHd2LgTuYi\r\n" * 6
    + "-----END RSA PRIVATE KEY-----\r\n"
)
SECONDS = 2.2  # in which a worker has told, and been told


class Watched(Reloading):
    """A relay whose listener takes logins of the application `shop` and the user `ann`."""

    def __init__(self, folder: Path, peer: FakeMx) -> None:
        super().__init__(folder, peer)
        where = f'address = "127.0.0.1:{self.port}"\n'
        self.base = self.base.replace(where, where + 'auth = "may"\nauth_in_clear = true\n', 1)
        self.base += f'[accounts]\nfile = "{folder}/accounts.toml"\n'
        self.config.write_text(self.base)
        said = self.cli("app", "create", "shop", "--config", str(self.config)).stdout
        self.keys = {"shop": said.partition("secret: ")[2].split()[0], "ann": "a long password"}
        self.cli("user", "add", "ann", "--password", "a long password", "--config", str(self.config))

    @contextmanager
    def client(self, name: str, source: str = "127.0.0.1") -> Iterator[smtplib.SMTP]:
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE, source_address=(source, 0)) as client:
            client.login(name, self.keys[name])
            yield client

    def post(
        self, name: str, recipients: int = 1, text: str = PLAIN, source: str = "127.0.0.1", domain: str = "d.example"
    ) -> None:
        with self.client(name, source) as client:
            client.sendmail("a@b.example", [f"c{n}@{domain}" for n in range(recipients)], text)

    def reload(self, text: str) -> None:
        self.config.write_text(self.base + text)
        self.cli("-c", str(self.config), "reload")

    def found(self) -> list[dict]:
        return [json.loads(line) for line in self.cli("abuse", "list", "--json").stdout.splitlines()]

    def held(self) -> list[dict]:
        return [json.loads(line) for line in self.cli("quarantine", "list", "--json").stdout.splitlines()]


def test_a_stolen_password_is_seen_then_stopped_and_the_owner_goes_on(tmp_path):
    with FakeMx({}) as peer:
        relay = Watched(tmp_path, peer)
        relay.config.write_text(relay.base + VOLUME)
        with relay:
            relay.post("ann", 19)
            time.sleep(SECONDS)
            assert relay.found() == []
            relay.post("ann", 5)
            (row,) = wait_for(relay.found)
            assert (row["account"], row["check"], row["enforced"]) == ("user=ann", "sudden volume", False)
            assert row["reason"] == "24 recipients within an hour; it has sent nothing before"
            assert "nothing is done (enforce = false)" in relay.cli("abuse", "list").stdout
            relay.post("ann")
            wait_for(lambda: len(peer.messages) == 3)
            assert relay.metric('relaymta_abuse_total{check="sudden volume",enforced="false"}') == 1

            time.sleep(SECONDS)
            relay.reload(VOLUME + "enforce = true\n")
            relay.post("ann")
            wait_for(lambda: relay.found()[0]["verdict"] == "hold")
            wait_for(lambda: len(peer.messages) == 4)
            time.sleep(SECONDS)
            relay.post("ann", text=PLAIN.replace("x\r\n", "held\r\n"))
            relay.post("shop")
            wait_for(lambda: len(peer.messages) == 5)
            (one,) = relay.held()
            assert one["quarantine"]["by"] == "abuse sudden volume" and one["quarantine"]["until"] == 0
            assert "26 recipients within an hour" in one["quarantine"]["reason"]
            told = relay.events("abuse")[-1]
            assert told["account"] == "user=ann" and told["enforced"] and told["ends"] > time.time() + 3000
            why = relay.cli("abuse", "why", "ann").stdout
            assert "user=ann: known since" in why and "sudden volume" in why and "127.0.0.0/24" in why

            cleared = relay.cli("abuse", "clear", "ann").stdout
            assert "relaymta quarantine release --filter 'sudden volume' --user ann" in cleared
            time.sleep(SECONDS)
            relay.post("ann", 20)
            wait_for(lambda: len(peer.messages) == 6)
            time.sleep(SECONDS)
            assert relay.found() == [], "that is usual now"
            relay.cli("quarantine", "release", "--filter", "sudden volume", "--user", "ann")
            wait_for(lambda: len(peer.messages) == 7)
            assert peer.messages[-1][2].endswith(b"held\r\n")
            again = relay.cli("abuse", "clear", "nobody", check=False)
            assert again.returncode == 1 and "no such account" in again.stderr


def test_a_leaked_key_suspends_until_the_end_and_survives_restarts(tmp_path):
    """What is queued waits, too; nothing is lost, and others are not concerned."""
    with FakeMx({}) as peer:
        relay = Watched(tmp_path, peer)
        relay.config.write_text(relay.base + VOLUME + KEYS)
        with relay:
            relay.post("shop", text=KEY)
            row = wait_for(relay.found)[0]
            assert (row["account"], row["verdict"]) == ("user=shop", "suspend") and "matches the rule keys" in row["reason"]
            wait_for(lambda: len(peer.messages) == 1)
            time.sleep(SECONDS)
            for _ in range(5):
                relay.post("shop")
            relay.post("ann")
            wait_for(lambda: len(peer.messages) == 2)
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 5)
            assert "hold user=shop" in relay.cli("policy", "list").stdout
            for words in (("hold", "--user", "shop", "--for", "1s"), ("remove", "hold", "user=shop")):
                refused = relay.cli("policy", *words, check=False)
                assert refused.returncode == 69 and "`relaymta abuse clear user=shop` ends that" in refused.stderr
            worker = json.loads(relay.cli("status", "--json").stdout)["workers"][0]["pid"]
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: all(one["ready"] for one in json.loads(relay.cli("status", "--json").stdout)["workers"]))
            relay.post("shop")
            time.sleep(1)
            assert len(peer.messages) == 2
        with relay:
            assert relay.found()[0]["account"] == "user=shop"
            relay.post("shop")
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 7)
            assert relay.cli("abuse", "clear", "shop", "--check", "leaked keys").returncode == 0
            wait_for(lambda: len(peer.messages) == 9)
            wait_for(lambda: relay.summary() == [])
            assert "no policy" in relay.cli("policy", "list").stderr


def test_failures_and_a_new_network(tmp_path):
    rules = {"RCPT": {f"c{n}@bad.example": b"550 5.1.1 no\r\n" for n in range(9)}}
    checks = (
        '[[abuse]]\nname = "bad list"\nwatch = "failures"\nfloor = 30\nenforce = true\n'
        '[[abuse]]\nname = "elsewhere"\nwatch = "network"\nfloor = 3\n'
    )
    with FakeMx(rules) as peer:
        relay = Watched(tmp_path, peer)
        relay.config.write_text(relay.base + checks)
        with relay:
            relay.post("shop", 27)
            wait_for(lambda: len(peer.messages) == 1)
            relay.post("shop", 3, domain="bad.example")
            wait_for(lambda: len(relay.events("bounced")) == 3)
            time.sleep(SECONDS)
            assert relay.found() == [], "a tenth"
            relay.post("shop", 1, domain="bad.example", source="127.1.2.3")
            (row,) = wait_for(relay.found)
            assert row["reason"] == "4 of its last 31 recipients failed for good" and row["verdict"] == "hold"
            why = json.loads(relay.cli("abuse", "why", "shop", "--json").stdout)
            assert {one["network"] for one in why["networks"]} == {"127.0.0.0/24", "127.1.2.0/24"}
            assert [one["above"] for one in why["checks"]] == [False, False], "told once; its first day"


def test_what_an_operator_bounces_is_no_failure_and_what_is_not_enforced_any_more_does_nothing(tmp_path):
    checks = VOLUME + 'enforce = true\n[[abuse]]\nname = "bad list"\nwatch = "failures"\nfloor = 10\nenforce = true\n'
    with FakeMx({}) as peer:
        relay = Watched(tmp_path, peer)
        relay.config.write_text(relay.base + checks)
        with relay:
            relay.cli("policy", "hold", "--app", "shop")
            for _ in range(12):
                relay.post("shop")
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 12)
            relay.cli("queue", "bounce", "--all")
            time.sleep(SECONDS)
            assert relay.found() == []
            relay.post("ann", 25)
            assert wait_for(relay.found)[0]["verdict"] == "hold"
            time.sleep(SECONDS)
            seen = len(peer.messages)
            relay.reload(VOLUME)
            relay.post("ann")
            wait_for(lambda: len(peer.messages) == seen + 1)
            assert relay.held() == []
            wait_for(lambda: [row["enforced"] for row in relay.found()] == [False])
