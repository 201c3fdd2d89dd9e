"""Patterns that can never match are named, with the line and what was meant."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from relaymta.cli import main
from relaymta.config import Config, Route, load
from relaymta.config.patterns import _may_match, address_trouble, domain_trouble, host_trouble, never, relay_domain_trouble
from relaymta.proto.address import domain_matches
from relaymta.route.shaping import profiles


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("example.org", None), (".example.org", None), ("Example.ORG", None), ("bücher.example", None), ("localhost", None),
        ("[192.0.2.1]", None), ("x_y.example", None), ("xn--bcher-kva.example", None),
        ("*.example.org", '".example.org"'), ("*example.org", '".example.org"'), ("*", "match all"),
        ("@example.org", '"example.org"'), ("joe@example.org", '"example.org"'), ("example.org.", '"example.org"'),
        (".example.org.", '".example.org"'), ("a.example b.example", "one string"), ("a.example,b.example", "one string"),
        ("", "no domain"), (".", "no domain"), ("a..example", "empty label"),
        ("https://example.org", "URL"), ("/example/", "regular expressions"), ("192.0.2.0/24", "networks"),
        ("a" * 64 + ".example", "63 characters"),
    ],
)  # fmt: skip
def test_patterns_of_domains(pattern, meant):
    found = domain_trouble(pattern)
    assert (meant is None) == (found == "") and (meant or "") in found
    if meant is not None and not pattern.startswith("["):
        for domain in ("example.org", "a.example.org", "a.example", "example", "192.0.2.1"):
            assert not domain_matches(domain, [pattern]), "what is named does not match"


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("joe@example.org", None), ("Joe@Example.org", None), ("postmaster", None), ('"a b"@example.org', None),
        ("joe@[192.0.2.1]", None), ("joe@bücher.example", None),
        ("joe", "not an address"), ("example.org", "not an address"), ("@example.org", "no local part"),
        ("*@example.org", None), ("joe@*.example", "not special"), ("<joe@example.org>", "without < and >"),
        ("joe@", "no domain"),
    ],
)  # fmt: skip
def test_patterns_of_addresses(pattern, meant):
    found = address_trouble(pattern)
    assert (meant is None) == (found == "") and (meant or "") in found


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("mx.example.org", None), (".example.org", None), ("192.0.2.1", None), ("2001:db8::1", None),
        ("mx.example.org:25", '"mx.example.org"'), ("*.example.org", '".example.org"'),
        ("bücher.example", None), (".bücher.example", None), ("☃.example", "it is no domain (IDNA 2008)"),
    ],
)  # fmt: skip
def test_patterns_of_hosts(pattern, meant):
    found = host_trouble(pattern)
    assert (meant is None) == (found == "") and (meant or "") in found


@pytest.mark.parametrize(
    ("domain", "meant"),
    [
        ("ours.example", None), ("Ours.example.", None), ("bücher.example", None), ("localhost", None), ("[192.0.2.1]", None),
        (".ours.example", 'write "ours.example" for this domain alone'), ("*.ours.example", '"*" is not special here'),
        ("a@ours.example", 'write the domain alone: "ours.example"'), ("", "it names no domain"), (".", "it names no domain"),
        ("☃.example", "it is no domain"), ("ours.example, b.example", "white space or a comma"), ("a..example", "an empty label"),
        ("hash:/etc/domains", "write a domain"),
    ],
)  # fmt: skip
def test_relay_domains_in_which_no_recipient_can_be(domain, meant):
    found = relay_domain_trouble(domain)
    assert (meant is None) == (found == "") and (meant or "") in found
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "relay": {"domains": [domain]}})
    assert [key for key, _ in never(config)] == ([] if meant is None else ["relay.domains"])


@pytest.mark.parametrize(
    "expression",
    ["mailbox full", "^450", "^4.2.1", "^421 4.7.0", "^(4|5)\\d\\d", "^[45]50 ", "^(?:4|5).*grey", "^5", "^.*x", "^550\\s5.7.1",
     "^(421|450) ", "^\\b450", "^[^6]", "^4[0-9]+ ", "^\\d{3} 4", "^$", "", "a^", "^(?=4)", "^[\\d]", "^\\w", "(", "^4{1,2}x"],
)  # fmt: skip
def test_expressions_that_may_match_a_reply(expression):
    assert _may_match(expression)


@pytest.mark.parametrize(
    "expression",
    ["^4\\.7\\.1", "\\A4\\.2", "^450-", "^temporar", "^[a-z]", "^\\s", "^(too many|spam)", "(?i)^rate", "^1\\d\\d", "^ 450",
     "^\\D", "^45a", "^[^\\d]", "^(?:4\\.7|5\\.7)", "^\\d{4}", "^\\d\\d ", "^<"],
)  # fmt: skip
def test_expressions_that_match_no_reply(expression):
    assert not _may_match(expression)


def test_what_comes_with_relaymta_can_match():
    shipped = profiles()
    assert all(_may_match(rule.match) for rule in shipped.rules)
    assert not [host for site in shipped.sites for host in site.hosts if host_trouble(host)]


@pytest.mark.parametrize(
    ("route", "key"),
    [
        ({"min_size": 10, "max_size": 5}, "min_size"),
        ({"min_size": 5, "max_size": 5}, None),
        ({"min_size": 5}, None),
        ({"sender": ["a@one.example"], "sender_domain": ["two.example"]}, "sender"),
        ({"sender": ["a@one.example", "a@x.two.example"], "sender_domain": [".two.example"]}, None),
        ({"sender": [""]}, None),
        ({"recipient": ["a@one.example"], "recipient_domain": ["One.example"]}, None),
        ({"recipient": ["a@one.example"], "recipient_domain": [".one.example"]}, None),
        ({"recipient": ["a@one.example"], "recipient_domain": [".x.one.example"]}, "recipient"),
    ],
)
def test_conditions_that_no_message_meets_together(route, key):
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], "route": [{"hosts": ["h"], **route}]})
    assert [found for found, _ in never(config)] == ([] if key is None else [f"route.0.{key}"])
    assert Route.model_fields.keys() >= route.keys()


def test_config_check_names_each_with_its_line(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text(
        f"""spool = "{tmp_path}"
[metrics]
listen = "off"
[[listener]]
address = "127.0.0.1:2599"
[[route]]
hosts = ["h"]
recipient_domain = ["ok.example", "*.wild.example"]
sender_domain = ["@at.example"]
sender = ["joe"]
recipient = ["@x.example"]
[[route]]
name = "two"
hosts = ["localhost.:2599", "i"]
lookup_hosts = ["h:25"]
mx = ["x.example."]
[[site]]
hosts = ["mx.example:25"]
[[rule]]
match = "^4\\\\.7\\\\.1"
hosts = ["*.y.example"]
action = "retry"
[[rule]]
match = "full"
action = "retry"
[[rule]]
match = "full"
action = "bounce"
"""
    )
    assert load(path, {}).rule[0].match == "^4\\.7\\.1"
    done = CliRunner().invoke(main, ["config", "check", "-c", str(path), "--set", "ephemeral=true"])
    assert done.exit_code == 0, done.output
    notes = [line.removeprefix(f"note: {path}:") for line in done.output.splitlines() if line.startswith("note: ")]
    assert [note.partition(": ")[0] + " " + note.split(": ")[1] for note in notes] == [
        "10 route.0.sender", "11 route.0.recipient", "9 route.0.sender_domain", "8 route.0.recipient_domain", "16 route.1.mx",
        "15 route.1.lookup_hosts", "18 site.0.hosts", "21 rule.0.hosts", "20 rule.0.match", "27 rule.2.match", "14 route.1.hosts",
    ]  # fmt: skip
    assert all("can never match" in note for note in notes[:-1]) and "would loop" in notes[-1]
    assert '"*.wild.example"' in done.output and '".wild.example"' in done.output
