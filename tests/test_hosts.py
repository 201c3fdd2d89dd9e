"""Names without the DNS: numbers, /etc/hosts, localhost, and the search list (hosts(5), resolv.conf(5), RFC 6761 6.3)."""

import os
from pathlib import Path

import pytest

from relaymta import dns
from relaymta.dns import NoSuchName, Resolver
from relaymta.hosts import Hosts, numeric
from tests.support.resolver import nameserver_with

HOSTS = """\
127.0.0.1 localhost
# 192.0.2.9 commented
192.0.2.1   Mail.Corp mail # and more
2001:db8::1\tmail
192.0.2.2 mail
nonsense mail
192.0.2.3
"""


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"), ("127.1", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("0x7f.1", "127.0.0.1"),
        ("0", "0.0.0.0"), ("::1", "::1"), ("::ffff:127.0.0.1", "::ffff:127.0.0.1"), ("2001:DB8::1", "2001:db8::1"),
        ("localhost", None), ("mail", None), ("1.example", None), ("", None), ("a:b", None), ("1.2.3.4.5", None), ("dead", None),
    ],
)  # fmt: skip
def test_hosts_given_by_number(host, address):
    """As getaddrinfo(3) and Postfix 3.7 (`smtp_addr_one`) read them."""
    assert numeric(host) == address


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    hosts, resolv = tmp_path / "hosts", tmp_path / "resolv.conf"
    hosts.write_text(HOSTS)
    resolv.write_text("nameserver 127.0.0.1\nsearch one.test two.test.\n")
    return hosts, resolv


@pytest.mark.parametrize(
    ("name", "families", "found"),
    [
        ("mail", "64", ["2001:db8::1", "192.0.2.1", "192.0.2.2"]),
        ("mail", "46", ["192.0.2.1", "192.0.2.2", "2001:db8::1"]),
        ("MAIL.", "4", ["192.0.2.1", "192.0.2.2"]),
        ("mail.corp", "64", ["192.0.2.1"]),
        ("mail.corp", "6", []),
        ("commented", "64", []),
        ("localhost", "64", ["127.0.0.1"]),
        ("localhost.", "4", ["127.0.0.1"]),
        ("a.localhost", "64", ["::1", "127.0.0.1"]),
        ("a.localhost", "4", ["127.0.0.1"]),
        ("other", "64", []),
    ],
)
def test_the_hosts_file(files, name, families, found):
    assert Hosts(*map(str, files)).addresses(name, families) == found


def test_a_changed_file_is_read_again_and_a_missing_one_is_empty(files):
    hosts, resolv = files
    known = Hosts(str(hosts), str(resolv))
    assert known.addresses("late", "4") == [] and known.candidates("x") == ["x.one.test", "x.two.test", "x"]
    hosts.write_text(HOSTS + "192.0.2.7 late\n")
    resolv.write_text("search three.test\n")
    assert known.addresses("late", "4") == ["192.0.2.7"] and known.candidates("x") == ["x.three.test", "x"]
    hosts.unlink()
    resolv.unlink()
    assert known.addresses("late", "4") == [] and known.candidates("x") == ["x"]


@pytest.mark.parametrize(
    ("conf", "name", "candidates"),
    [
        ("", "x", ["x"]),
        ("search a.test\n", "x", ["x.a.test", "x"]),
        ("search a.test\n", "x.example", ["x.example", "x.example.a.test"]),
        ("search a.test\n", "x.", ["x"]),
        ("search a.test\nsearch b.test\n", "x", ["x.b.test", "x"]),
        ("domain a.test\n", "x", ["x.a.test", "x"]),
        ("search a.test\noptions ndots:2 timeout:1\n", "x.example", ["x.example.a.test", "x.example"]),
        ("options ndots:x\nsearch .\n", "x", ["x"]),
    ],
)
def test_the_search_list(tmp_path, conf, name, candidates):
    (tmp_path / "resolv.conf").write_text(conf)
    assert Hosts(str(tmp_path / "none"), str(tmp_path / "resolv.conf")).candidates(name) == candidates


async def test_a_host_is_looked_up_like_by_the_system_but_with_our_name_servers(files, tmp_path):
    zone = [
        "relay.two.test. A 192.0.2.20",
        "relay.two.test. AAAA 2001:db8::20",
        "mail.test. A 192.0.2.21",
        "none.test. MX 1 x.test.",
    ]
    with nameserver_with(tmp_path, zone) as nameserver:
        resolver = Resolver([nameserver])
        resolver._hosts = Hosts(*map(str, files))
        assert await resolver.host("relay", "64") == ["2001:db8::20", "192.0.2.20"], "the second domain of the search list"
        assert await resolver.host("mail", "4") == ["192.0.2.1", "192.0.2.2"], "/etc/hosts comes first"
        assert await resolver.host("mail.test.", "4") == ["192.0.2.21"]
        assert await resolver.host("127.1", "64") == ["127.0.0.1"]
        with pytest.raises(NoSuchName):
            await resolver.host("nowhere.test", "64")
        await resolver.close()


async def test_a_changed_resolv_conf_is_noticed(tmp_path, monkeypatch):
    """Before the next query, without a reload; a file that is missing for a moment changes nothing."""
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 192.0.2.1\n")
    os.utime(conf, (1, 1))
    monkeypatch.setattr(dns, "RESOLV_CONF", str(conf))
    used: list[str] = []
    make = dns._on_loop

    def on_loop(nameservers: list[str]) -> object:
        (line,) = conf.read_text().splitlines()
        used.append(line.removeprefix("nameserver "))
        return make([used[-1]])

    monkeypatch.setattr(dns, "_on_loop", on_loop)
    now = [100.0]
    with nameserver_with(tmp_path, ["mail.test. A 192.0.2.20"]) as nameserver:
        resolver = Resolver([], now=lambda: now[0])
        resolver._keep("mail.test", "A", dns.Records([], dns.DnsFailure("no"), 1000.0))
        assert not resolver.refresh()
        conf.rename(tmp_path / "aside")
        now[0] += 10
        assert not resolver.refresh() and used == ["192.0.2.1"]
        conf.write_text(f"nameserver {nameserver}\n")
        assert not resolver.refresh(), "looked at once a second"
        now[0] += 10
        assert resolver.refresh() and used == ["192.0.2.1", nameserver]
        assert not resolver.refresh(), "said once"
        assert await resolver.addresses("mail.test", "4") == ["192.0.2.20"], "what was cached is forgotten"
        conf.write_text("nameserver 192.0.2.1\n")
        os.utime(conf, (2, 2))
        now[0] += 10
        resolver._look()  # as before each query
        assert used[-1] == "192.0.2.1" and resolver.refresh(), "said afterwards, too"
        await resolver.close()


async def test_given_name_servers_do_not_depend_on_resolv_conf(tmp_path, monkeypatch):
    monkeypatch.setattr(dns, "RESOLV_CONF", str(tmp_path / "resolv.conf"))
    now = [100.0]
    resolver = Resolver(["192.0.2.1"], now=lambda: now[0])
    channel = resolver._resolver
    (tmp_path / "resolv.conf").write_text("nameserver 192.0.2.2\n")
    now[0] += 10
    assert not resolver.refresh() and resolver._resolver is channel
    await resolver.close()
