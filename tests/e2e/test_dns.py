"""Delivery to the MX of a domain, with a real unbound on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.resolver import nameserver_with

ZONE = [
    "two.test. MX 20 backup.test.",
    "two.test. MX 10 dead.test.",
    "dead.test. A 127.0.0.77",
    "backup.test. A 127.0.0.1",
    "plain.test. A 127.0.0.1",
    "null.test. MX 0 .",
    "alias.test. CNAME two.test.",
    "ours.test. MX 10 relay.example.",
    *(f"shared{n}.test. MX 10 mx{m}.pool.test." for n in range(30) for m in (1, 2)),
    "mx1.pool.test. A 127.0.0.1",
    "mx2.pool.test. A 127.0.0.1",
]


@pytest.fixture
def nameserver(tmp_path: Path) -> Iterator[str]:
    with nameserver_with(tmp_path, ZONE) as address:
        yield address


def test_mail_finds_its_mx(tmp_path, nameserver):
    with FakeMx({}) as peer:
        settings = [f'delivery.nameservers=["{nameserver}"]', f"delivery.port={peer.port}", "delivery.connect_timeout=2"]
        with Relay(tmp_path, None, *settings) as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "", "a@two.test", "b@plain.test", "c@[127.0.0.1]")
            wait_for(lambda: len(peer.messages) == 3)
            assert sorted(to for _, to, _ in peer.messages) == [["a@two.test"], ["b@plain.test"], ["c@[127.0.0.1]"]]
            relay.send("Subject: x\r\n\r\nx\r\n", "", "a@null.test", "b@nowhere.test", "d@ours.test")
            wait_for(lambda: len(relay.events("bounced")) == 3)
            replies = {event["recipient"]: event["reply"] for event in relay.events("bounced")}
            assert "5.1.10" in replies["a@null.test"]
            assert "5.1.2" in replies["b@nowhere.test"]
            assert "5.4.6" in replies["d@ours.test"]
            relay.send("Subject: x\r\n\r\nx\r\n", "", "a@servfail.example")
            (deferred,) = wait_for(lambda: relay.events("deferred"), 40)
            assert "4.4.3" in deferred["reply"], "SERVFAIL defers"
            wait_for(lambda: [row["queue"] for row in relay.summary()] == ["mx/servfail.example"])


def test_domains_with_the_same_mx_are_one_site(tmp_path, nameserver):
    """Thirty domains, two connections, and few more DNS queries than domains."""
    with FakeMx({}, slow=0.1) as peer:
        settings = [
            f'delivery.nameservers=["{nameserver}"]',
            f"delivery.port={peer.port}",
            'site=[{hosts=[".pool.test"],connections=2}]',
        ]
        with Relay(tmp_path, None, *settings) as relay:
            for number in range(30):
                relay.send("Subject: x\r\n\r\nx\r\n", "a@b", f"x@shared{number}.test")
            (row,) = wait_for(lambda: [json.loads(line) for line in relay.cli("site", "list", "--json").stdout.splitlines()])
            assert row["pool"] == "mx/(mx1|mx2).pool.test"
            assert row["limits"]["connections"] == {"value": 2, "origin": "[[site]] .pool.test"}
            wait_for(lambda: len(peer.messages) == 30)
            assert peer.most_open <= 2
            assert relay.metric('relaymta_dns_lookups_total{result="query"}') <= 30 + 4


def test_the_cname_of_a_domain_is_followed(tmp_path, nameserver):
    with FakeMx({}) as peer:
        settings = [f'delivery.nameservers=["{nameserver}"]', f"delivery.port={peer.port}", "delivery.connect_timeout=2"]
        with Relay(tmp_path, None, *settings) as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b", "x@alias.test")
            wait_for(lambda: peer.messages)


def test_route_test_shows_where_mail_would_be_sent(tmp_path, nameserver):
    flags = [
        "--set",
        f'delivery.nameservers=["{nameserver}"]',
        "--set",
        'route=[{name="shop",application=["shop"],hosts=["h:587"]}]',
        "--set",
        "delivery.port=2525",  # on port 25 a loopback address would be this host
    ]
    relay = Relay(tmp_path, None)
    text = relay.cli("route", "test", "--to", "x@two.test", *flags).stdout
    assert "route shop             no: application" in text
    assert "dead.test  127.0.0.77" in text
    assert "site  mx/(dead|backup).test" in text
    found = json.loads(relay.cli("route", "test", "--to", "x@two.test", "--as", "shop", "--json", *flags).stdout)
    assert (found["routes"], found["site"]) == ([{"route": "shop", "matches": True, "by": ""}], "shop")
    assert "5.1.10" in relay.cli("route", "test", "--to", "x@null.test", *flags).stdout
    assert relay.cli("route", "test", "--to", "nobody@", *flags, check=False).returncode == 64


def test_a_route_by_mx_matches_the_domains_of_its_hosts(tmp_path, nameserver):
    with FakeMx({}) as peer:
        routes = f'route=[{{name="pool",mx=[".pool.test"],hosts=["127.0.0.1:{peer.port}"]}}]'
        with Relay(tmp_path, None, f'delivery.nameservers=["{nameserver}"]', routes, "delivery.connect_timeout=2") as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b", "x@shared1.test")
            wait_for(lambda: peer.messages)
