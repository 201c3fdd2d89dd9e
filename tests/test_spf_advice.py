"""Which SPF record is advised: that of the way by which the mail leaves."""

import json
from pathlib import Path

import pytest

from relaymta.cli.spf import PROVIDERS, record, ways
from relaymta.config import Config
from tests.support.daemon import Relay
from tests.support.resolver import nameserver_with

OURS = "a:mail.example.org"


def config(*routes: dict, **others: object) -> Config:
    listener = [{"address": "127.0.0.1:1"}]
    return Config.model_validate({"hostname": "mail.example.org", "listener": listener, "route": list(routes), **others})


def to(*hosts: str, **conditions: object) -> dict:
    return {"name": hosts[0] if hosts else "direct", "hosts": list(hosts), **conditions}


@pytest.mark.parametrize(
    ("routes", "mechanisms"),
    [
        ([], OURS),
        ([to("smtp.gmail.com:587")], "include:_spf.google.com"),
        ([to("smtp-relay.gmail.com.")], "include:_spf.google.com"),
        ([to("smtp.office365.com:587")], "include:spf.protection.outlook.com"),
        ([to("shop-example.mail.protection.outlook.com")], "include:spf.protection.outlook.com"),
        ([to("email-smtp.eu-west-1.amazonaws.com:587")], "include:amazonses.com"),
        ([to("SMTP.SENDGRID.NET:587")], "include:sendgrid.net"),
        ([to("smtp.mailgun.org", "smtp.eu.mailgun.org")], "include:mailgun.org"),
        ([to("smtp.gmail.com", "smtp.sendgrid.net")], "include:_spf.google.com include:sendgrid.net"),
        ([to("127.0.0.1:10025")], OURS),  # a content filter of this machine
        ([to("unix:/run/lmtp", protocol="lmtp")], OURS),
        ([to("notgmail.com")], ""),
        ([to("10.0.0.5:25")], ""),
        # the routes that this domain's mail may take, up to the one that takes the rest
        ([to("smtp.gmail.com", sender_domain=["shop.example"])], "include:_spf.google.com"),
        ([to("smtp.gmail.com", sender_domain=[".example"])], "include:_spf.google.com"),
        ([to("smtp.gmail.com", sender_domain=["other.example"])], OURS),
        ([to("smtp.gmail.com", sender=["a@other.example"])], OURS),
        ([to("smtp.gmail.com", sender=["a@shop.example"])], f"include:_spf.google.com {OURS}"),
        ([to("smtp.gmail.com", recipient_domain=["x.example"])], f"include:_spf.google.com {OURS}"),
        ([to("smtp.gmail.com", application=["shop"])], "include:_spf.google.com"),
        ([to("smtp.gmail.com", application=["bulk"])], OURS),
        ([to("smtp.gmail.com", min_attempts=3)], f"include:_spf.google.com {OURS}"),
        ([to(), to("smtp.gmail.com")], OURS),
        ([to("smtp.gmail.com"), to("smtp.sendgrid.net")], "include:_spf.google.com"),
        ([to("smtp.gmail.com", rewrite_sender="@bounce.example")], ""),
        ([to("smtp.gmail.com", rewrite_sender="@shop.example")], "include:_spf.google.com"),
    ],
)
def test_the_record_allows_what_receivers_see(routes, mechanisms):
    found = [way.mechanism for way in ways(config(*routes), "Shop.Example.", "shop") if way.mechanism]
    assert " ".join(dict.fromkeys(found)) == mechanisms
    lines = record(config(*routes), "shop.example", "shop")
    assert (f'shop.example. TXT "v=spf1 {mechanisms} -all"' in lines[0]) == bool(mechanisms)
    if not mechanisms:
        assert OURS not in " ".join(lines)


def test_a_host_that_is_not_known_is_named():
    (line,) = record(config(to("smtp.isp.example:587")), "shop.example")
    assert "smtp.isp.example" in line and "operator" in line
    (line,) = record(config({"name": "l", "lookup": "https://x.example/"}), "shop.example")
    assert "looks its hosts up" in line


def test_the_addresses_of_sources_are_ours():
    source = [{"name": "one", "address": "8.8.8.8"}, {"name": "two", "address": "10.0.0.1"}]
    made = config({"name": "direct", "sources": ["one", "two"]}, source=source)
    assert [way.mechanism for way in ways(made, "shop.example")] == ["ip4:8.8.8.8"]


def test_the_table_of_providers():
    for suffix, include in PROVIDERS.items():
        assert suffix == suffix.lower().strip(".") and include == include.lower().strip(".")


def test_the_doctor_looks_at_the_smart_host(tmp_path: Path):
    zone = [
        'good.test. TXT "v=spf1 ip4:192.0.2.1 include:_spf.google.com -all"', 'nested.test. TXT "v=spf1 include:good.test -all"',
        'bad.test. TXT "v=spf1 ip4:192.0.2.1 -all"', '_dmarc.good.test. TXT "v=DMARC1; p=reject"',
        '_dmarc.bad.test. TXT "v=DMARC1; p=reject"',
    ]  # fmt: skip
    relay = Relay(tmp_path, None)

    def found(domain: str, host: str, nameserver: str) -> tuple[int, dict[str, str], str]:
        done = relay.cli(
            "doctor", "domain", domain, "--json", "--set", f'delivery.nameservers=["{nameserver}"]', "--set",
            f'route=[{{name="out",hosts=["{host}"]}}]', check=False,
        )  # fmt: skip
        rows = list(map(json.loads, done.stdout.splitlines()))
        return done.returncode, {row["check"].split(" ")[0]: row["state"] for row in rows}, done.stdout

    with nameserver_with(tmp_path, zone) as nameserver:
        status, rows, _ = found("good.test", "smtp.gmail.com:587", nameserver)
        assert (status, rows) == (0, {"SPF": "ok", "DKIM": "warning", "DMARC": "ok"})
        assert found("nested.test", "smtp.gmail.com:587", nameserver)[1]["SPF"] == "ok"
        status, rows, text = found("bad.test", "smtp.gmail.com:587", nameserver)
        assert (status, rows["SPF"], rows["DMARC"]) == (1, "wrong", "wrong") and "include:_spf.google.com" in text
        assert found("none.test", "smtp.gmail.com:587", nameserver)[1]["SPF"] == "warning"
        status, rows, text = found("good.test", "smtp.isp.example", nameserver)
        assert rows["SPF"] == "warning" and "smtp.isp.example" in text and "ip4:" in text
