"""`relaymta import postfix`: configurations as people have them (tests/postfix), whose mail goes the same way as with the
installed Postfix; what is written where, and what is said.

`python -m tests.test_import_postfix` writes tests/postfix/*/expected anew."""

import json
import random
import re
import stat
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from click.testing import CliRunner, Result

from relaymta.cli import main
from relaymta.cli.judged import may_relay
from relaymta.cli.postfix.carry import NOT_CARRIED
from relaymta.config import Config, Route, load
from relaymta.proto.address import domain_matches, domain_of
from tests.conftest import PROVE
from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.pages import blocks, commands, section, shell
from tests.support.postfix import CONFIGURATIONS, Resolved, addresses, postfix
from tests.support.postfix_configurations import make
from tests.support.resolver import nameserver_with

PAGE = "import-postfix.md"
NAMES = sorted(path.name for path in CONFIGURATIONS.iterdir())
ROUTED = [name for name in NAMES if (CONFIGURATIONS / name / "addresses").exists()]
DEAD = 'delivery.nameservers=["127.0.0.1:1"]'  # nobody answers there
PASSWORDS = ("SG.x7Qk-not-a:real_key", "unused", "sender secret", "host-secret", "group-secret")


def call(*words: object) -> Result:
    found = CliRunner().invoke(main, [str(word) for word in words])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


class Imported(NamedTuple):
    """What an import has written, and what it has said."""

    config: Path
    done: Result
    folder: Path

    @property
    def ways(self) -> str:
        """The list of what changes the way of mail."""
        found = re.search(r"^These change the way of mail:\n((?:- .*\n)*)", self.done.stderr, re.M)
        return found[1] if found is not None else ""


def imported(folder: Path, config: Path, *options: object) -> Imported:
    root = ["--root", config / "copy"] if (config / "copy").exists() else []
    out, beside = folder / "relaymta.toml", ("--files", folder / "files", "--secrets", folder / "secrets")
    return Imported(out, call("import", "postfix", config, "-o", out, *beside, *root, *options), folder)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    issued, path = trustme.CA().issue_cert("mail.example"), tmp_path_factory.mktemp("certificate") / "all.pem"
    path.write_bytes(issued.private_key_pem.bytes() + b"".join(one.bytes() for one in issued.cert_chain_pems))
    return path


def decided(written: Imported, certificate: Path) -> Path:
    """The configuration with what an operator has to replace: the line about what is not decided, and files of that machine."""
    text = re.sub(rf"^{NOT_CARRIED} = .*\n", "", written.config.read_text(), flags=re.M)
    text = re.sub(r'^(chain|ca_file) = "[^"]*"', rf'\1 = "{certificate}"', text, flags=re.M)
    text = re.sub(r"^key = .*\n", "", text, flags=re.M)
    text = text.replace("192.0.2.10:25", "127.0.0.2:25")
    path, accounts = written.folder / "decided.toml", written.folder / "accounts.toml"
    accounts.touch()
    path.write_text(text.replace("/etc/relaymta/accounts.toml", str(accounts)))
    return path


# What is written


def shown(written: Imported, config: Path) -> str:
    """All that an import has written, with the paths of this machine replaced."""
    text = written.config.read_text()
    for path in sorted(path for path in written.folder.glob("*/*") if path.parent.name in ("files", "secrets")):
        text += f"\n==> {path.parent.name}/{path.name}\n{path.read_text()}"
    for path, name in ((config, "CONFIG"), (written.folder, "OUT")):
        text = text.replace(str(path), name)
    return text


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written(tmp_path, name):
    written = imported(tmp_path, CONFIGURATIONS / name)
    assert shown(written, CONFIGURATIONS / name) == (CONFIGURATIONS / name / "expected").read_text()
    assert written.done.exit_code == (0 if name == "null-client" else 1) and written.done.stdout == ""
    assert not any(password in written.config.read_text() + written.done.output for password in PASSWORDS)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_once_all_is_decided(tmp_path, name, certificate):
    written = imported(tmp_path, CONFIGURATIONS / name)
    check = ("config", "check", "--spool", tmp_path / "spool", "--no-connect", "-c")
    if written.ways:
        found = call(*check, written.config)
        assert found.exit_code == 78 and f"{NOT_CARRIED}: no such key" in found.stderr, "until somebody has decided"
    found = call(*check, decided(written, certificate))
    assert found.exit_code == 0, found.stderr


def test_files_are_not_overwritten_and_passwords_are_for_their_owner_alone(tmp_path):
    config = CONFIGURATIONS / "sender-dependent"
    written = imported(tmp_path, config)
    secrets = list((tmp_path / "secrets").iterdir())
    assert {path.read_text().strip() for path in secrets} == {"sender secret", "host-secret", "group-secret"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    before = {path: path.stat().st_ino for path in (written.config, *secrets)}
    again = imported(tmp_path, config)
    assert again.done.exit_code == 73 and again.done.stderr.count("exists: --force overwrites it") == len(before)
    assert {path: path.stat().st_ino for path in before} == before
    assert imported(tmp_path, config, "--force").done.exit_code == 1
    assert all(path.stat().st_ino != number for path, number in before.items())
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*(path.name for path in before), "secrets"])


def test_without_folders_nothing_is_written_and_both_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = call("import", "postfix", CONFIGURATIONS / "pcre-transport")
    assert 'route_map = "/etc/relaymta/route_map"' in found.stdout
    assert (
        "# - main.cf:10: 6 rows of transport_maps: import with --files DIR, which writes /etc/relaymta/route_map" in found.stdout
    )
    found = call("import", "postfix", CONFIGURATIONS / "sender-dependent")
    assert "the password of group at smtp.group.example: import with --secrets DIR" in found.stdout
    assert not any(password in found.output for password in PASSWORDS) and found.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_the_list_as_json(tmp_path):
    found = call("import", "postfix", CONFIGURATIONS / "database", "--json", "-o", tmp_path / "out.toml")
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert {row["kind"] for row in rows} == {"way", "gap", "note"} and all(row["instead"] for row in rows)
    first = rows[0]
    assert (first["kind"], first["file"], first["line"]) == ("way", "main.cf", 6)
    assert first["what"] == "virtual_mailbox_domains = mysql:/etc/postfix/sql/domains.cf"
    assert (tmp_path / "out.toml").exists() and found.exit_code == 1 and found.stderr == ""


def test_what_postfix_would_refuse_is_refused(tmp_path):
    (tmp_path / "main.cf").write_text("myhostname = a.example\n[mail.example]:587 user:password\n")
    found = call("import", "postfix", tmp_path)
    assert found.exit_code == 65 and found.stderr == "main.cf:2: '[mail.example]:587' ...: missing '=' after attribute name\n"
    (tmp_path / "main.cf").write_text("myhostname = $mydomain\nmydomain = $myhostname\n")
    assert call("import", "postfix", tmp_path).exit_code == 65
    (tmp_path / "main.cf").unlink()
    found = call("import", "postfix", tmp_path)
    assert found.exit_code == 74 and found.stderr == f"{tmp_path}/main.cf: No such file or directory\n"


def test_mx_of_hosts_without_brackets(tmp_path):
    (tmp_path / "main.cf").write_text("mydestination =\nrelayhost = both.test:587\n")
    found = call("import", "postfix", tmp_path)
    assert 'hosts = ["both.test:587"]' in found.stdout and "without [ ] Postfix sends to its MX" in found.stdout
    with nameserver_with(
        tmp_path, ["both.test. MX 20 two.test.", "both.test. MX 10 one.test.", "none.test. A 192.0.2.1"]
    ) as server:
        asked = ("--mx", "--set", f'delivery.nameservers=["{server}"]')
        found = call("import", "postfix", tmp_path, *asked)
        assert 'hosts = ["one.test:587", "two.test:587"]' in found.stdout and NOT_CARRIED not in found.stdout
        (tmp_path / "main.cf").write_text("mydestination =\nrelayhost = none.test\n")
        found = call("import", "postfix", tmp_path, *asked)
        assert 'hosts = ["none.test:25"]' in found.stdout and NOT_CARRIED not in found.stdout


def test_many_domains_are_in_a_route_map(tmp_path):
    rows = [f"d{number}.example   smtp:[h{number % 3}.example]" for number in range(3000)]
    rows += [".d1.example   smtp:[sub.example]", "ann@d2.example   smtp:[ann.example]", "here.example   local:"]
    (tmp_path / "transport").write_text("\n".join(rows))
    (tmp_path / "main.cf").write_text("mydestination =\ntransport_maps = hash:/etc/postfix/transport\nmynetworks = 127.0.0.0/8\n")
    written = imported(tmp_path, tmp_path)
    config = load(written.config, {})
    assert len(config.route) == 7, "for each host, mailboxes, and the MX"
    lines = dict(line.split() for line in Path(config.route_map).read_text().splitlines()[1:])
    assert len(lines) == 3003 and lines["ann@d2.example"] == "ann.example" and lines[".d1.example"] == "sub.example"
    assert lines["here.example"] == "here" and config.local_domains == ["here.example"]


@pytest.mark.parametrize(
    ("recipients", "known"),
    [
        ("inline:{ann@one.example=x @two.example=x Bob@TWO.example=x}", ["ann@one.example", "@two.example", "bob@two.example"]),
        ("inline:{ann@three.example=x}", []),
        ("inline:{@one.example=x @two.example=x}", None),
        ("", None),
        ("mysql:/etc/postfix/users.cf", None),
    ],
)
def test_who_is_not_among_the_recipients_is_refused(tmp_path, recipients, known):
    (tmp_path / "main.cf").write_text(f"relay_domains = one.example two.example\nrelay_recipient_maps = {recipients}\n")
    written = imported(tmp_path, tmp_path)
    path = tmp_path / "files/recipients"
    assert path.exists() == (known is not None) and ("recipients = " in written.config.read_text()) == path.exists()
    assert known is None or path.read_text().splitlines()[1:] == known
    assert written.done.stderr.count("mail for any address there is accepted") == (2 if "mysql" in recipients else 0)


def test_many_recipients_take_no_time_for_each_domain(tmp_path):
    """20 million comparisons, if each domain looked at all of them."""
    rows = [f"u{number}@d{number}.example x" for number in range(4500)]
    (tmp_path / "recipients").write_text("\n".join(rows))
    (tmp_path / "relay").write_text("\n".join(f"d{number}.example x" for number in range(4500)))
    tables = "relay_domains = hash:/etc/postfix/relay\nrelay_recipient_maps = hash:/etc/postfix/recipients\n"
    (tmp_path / "main.cf").write_text(tables)
    looked = 0

    def counting(address: str) -> str:
        nonlocal looked
        looked += 1
        return domain_of(address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relaymta.cli.postfix.accepting.domain_of", counting)
        imported(tmp_path, tmp_path)
    assert looked < 20_000 and len((tmp_path / "files/recipients").read_text().splitlines()) == 4501


# The same way


class Ours:
    """What our configuration does with an address."""

    def __init__(self, written: Imported, path: Path) -> None:
        self._path = path
        self.config = load(path, {})
        self._routes = {route.label: route for route in self.config.route}
        script = written.folder / "files/mailboxes.sh"
        text = script.read_text() if script.exists() else ""
        lines = re.findall(r"^relaymta mailbox (?:create|alias) (\S+) ([^#\n]*)", text, re.M)
        self._aliases = {address: targets.split() for address, targets in lines}

    def recipients(self, address: str) -> list[str]:
        """The addresses that an alias stands for."""
        targets = self._aliases.get(address, self._aliases.get("@" + domain_of(address), []))
        return [one for target in targets for one in self.recipients(target)] if targets else [address]

    def way(self, sender: str, recipient: str) -> str:
        for rule in self.config.mail_rule:
            if recipient in rule.recipient or domain_matches(domain_of(recipient), rule.recipient_domain):
                assert rule.enforce
                return "refused"
        if domain_matches(domain_of(recipient), self.config.local_domains) and not self._exists(recipient):
            return "mailbox"  # it is refused as what nobody has, whatever the routes say
        done = call("route", "test", "-c", self._path, "--from", sender, "--to", recipient, "--set", DEAD, "--json")
        assert done.exit_code == 0, done.stderr
        return _in_words(self._routes[json.loads(done.stdout)["routes"][-1]["route"]])

    def _exists(self, address: str) -> bool:
        """Whether RCPT finds an address of a domain that is kept here."""
        return bool({address, "@" + domain_of(address)} & self._aliases.keys())

    def takes_from_anybody(self, recipient: str) -> bool:
        domain = domain_of(recipient)
        return domain in self.config.relay.domains or domain_matches(domain, self.config.local_domains)


def _in_words(route: Route) -> str:
    if route.is_local:
        return "mailbox"
    return f"{route.protocol} {' '.join(route.hosts)}" if route.hosts else "mx"


def theirs(config: Path, found: Resolved) -> str:
    """What Postfix does with an address, in the same words."""
    services = re.findall(r"^(\S+)\s+unix(?:\s+\S+){5}\s+(\S+)((?:\n[ \t]+.*)*)", (config / "master.cf").read_text(), re.M)
    command, more = {name: (command, more) for name, command, more in services}[found.transport]
    if command == "error" and found.transport != "retry":
        return "mailbox" if "virtual alias table" in found.nexthop else "refused"  # where nobody has the address
    words = {
        "error": "smtp retry.invalid:25",
        "local": "mailbox",
        "virtual": "mailbox",
        "pipe": "undecided",
        "discard": "undecided",
    }
    if command in words:
        return words[command]
    if found.nexthop == domain_of(found.recipient):
        return "mx"
    fallback = re.search(r"^smtp_fallback_relay = (.*)", (config / "main.cf").read_text(), re.M)
    port = re.search(r"smtp_tcp_port=(\d+)", more)
    hops = re.split(r"[ ,]+", f"{found.nexthop} {fallback[1] if fallback else ''}".strip())
    return f"{command} {' '.join(_host(hop, port[1] if port else '24' if command == 'lmtp' else '25') for hop in hops)}"


def _host(text: str, port: str) -> str:
    if text.startswith("unix:"):
        return text if text[5] == "/" else f"unix:/var/spool/postfix/{text[5:]}"
    text = text.removeprefix("inet:").replace("[", "").replace("]", "")
    return text if re.search(r":\d+$", text) else f"{text}:{port}"


def compare(folder: Path, config: Path, certificate: Path) -> int:
    """How many addresses go the same way; an AssertionError names one that does not, and is not in the list either."""
    written, same = imported(folder, config), 0
    ours = Ours(written, decided(written, certificate))
    with postfix(config) as running:
        for sender, recipient in addresses(config):
            found = [running.resolve(sender, one) for one in running.recipients(recipient)]
            wanted = {theirs(config, one) for one in found}
            by_local = any(one.transport == "local" for one in found)  # which has aliases of its own
            got = {ours.way(sender, one) for one in ([recipient] if by_local else ours.recipients(recipient))}
            if got == wanted:
                same += 1
            else:
                assert _is_listed(written.ways, sender, recipient, got, by_local), (sender, recipient, got, wanted)
            if ours.takes_from_anybody(recipient) and running.resolve(sender, recipient).is_default:
                assert "as to every domain that is kept" in written.done.stderr, f"{recipient} is taken from anybody"
    return same


def _is_listed(ways: str, sender: str, recipient: str, got: set[str], by_local: bool) -> bool:
    """Whether the list says that mail goes another way, or that it is not decided."""
    forms = [form for one in (sender, recipient) if one for form in (one, re.sub(r"\+[^@]*", "", one))]
    return (
        "smtp undecided.invalid:25" in got or by_local or "route_map" in ways or any(form in ways for form in forms)
        or ("_alias_maps: @" in ways and domain_of(recipient) in ways)
    )  # fmt: skip


@pytest.mark.parametrize("name", ROUTED)
def test_mail_takes_the_same_way_as_with_postfix(tmp_path, name, certificate):
    same = compare(tmp_path, CONFIGURATIONS / name, certificate)
    assert same >= len(addresses(CONFIGURATIONS / name)) * 0.8


@pytest.mark.parametrize("seed", range(200 if PROVE else 4))
def test_mail_takes_the_same_way_with_any_tables(tmp_path, seed, certificate):
    config = tmp_path / "config"
    make(config, random.Random(seed))
    compare(tmp_path, config, certificate)


# Who may relay

CLIENTS = ["127.0.0.1", "10.1.2.3", "10.2.2.2", "192.0.2.1", "2001:db8::1"]
RECIPIENTS = ["x@elsewhere.example", "x@relayed.example", "x@kept.example"]
ACCESS_MAIN = """\
compatibility_level = 3.6
myhostname = kept.example
mydestination = kept.example
alias_maps =
local_recipient_maps =
relay_domains = relayed.example
parent_domain_matches_subdomains =
mynetworks = 127.0.0.0/8 10.0.0.0/8 [2001:db8::]/64
"""
USUAL = "permit_mynetworks, reject_unauth_destination"
ACCESS: list[dict[str, str]] = [
    {},
    {"smtpd_relay_restrictions": USUAL, "smtpd_recipient_restrictions": "permit"},
    {"smtpd_relay_restrictions": "permit", "smtpd_recipient_restrictions": USUAL},
    {"smtpd_relay_restrictions": "permit, reject_unauth_destination", "smtpd_recipient_restrictions": USUAL},
    {"smtpd_relay_restrictions": "", "smtpd_recipient_restrictions": USUAL},
    {"smtpd_relay_restrictions": USUAL, "smtpd_recipient_restrictions": "reject_unauth_destination, permit_mynetworks"},
    {"smtpd_relay_restrictions": "reject_unauth_destination, permit_mynetworks"},
    {"smtpd_relay_restrictions": "permit_mynetworks, reject"},
    {"smtpd_relay_restrictions": "permit_mynetworks, permit_auth_destination, reject"},
    {"smtpd_relay_restrictions": "warn_if_reject reject, permit_mynetworks, defer_unauth_destination"},
    {"smtpd_relay_restrictions": "warn_if_reject reject_unauth_destination, permit_mynetworks, reject"},
    {"smtpd_relay_restrictions": "warn_if_reject permit_mynetworks, reject_unauth_destination"},
    {"smtpd_client_restrictions": "permit_mynetworks, reject"},
    {"smtpd_sender_restrictions": "permit_mynetworks, reject"},
    {"smtpd_helo_restrictions": "reject"},
    {"smtpd_restriction_classes": "ours", "ours": "permit_mynetworks, reject", "smtpd_recipient_restrictions": "ours"},
    {"smtpd_relay_restrictions": "permit_sasl_authenticated, reject"},
    {"mynetworks": "!10.1.2.3, 10.0.0.0/8"},
    {"mynetworks": "10.0.0.0/8, !10.1.2.3"},
    {"mynetworks": "10.1.2.3, !10.1.0.0/16, 10.0.0.0/8"},
    {"mynetworks": "!10.0.0.0/8, 10.1.2.3"},
    {"mynetworks": "!!10.1.2.3"},
    {"mynetworks": "[::ffff:10.1.0.0]/112"},
    {"mynetworks": "cidr:/etc/postfix/networks"},
    {"mynetworks": "texthash:/etc/postfix/addresses_of_clients"},
    {"mynetworks": "!texthash:/etc/postfix/addresses_of_clients, 10.0.0.0/8"},
    {"mynetworks": "!/etc/postfix/list, 10.0.0.0/8"},
    {"mynetworks": "/etc/postfix/list"},
    {"mynetworks": "!host.example, 10.0.0.0/8"},
    {"mynetworks_style": "host", "mynetworks": ""},
    {"mynetworks": ""},
    {"relay_domains": "", "mydestination": "kept.example", "smtpd_relay_restrictions": "permit_mynetworks, reject"},
]  # fmt: skip
WORDS = [
    "permit", "reject", "defer", "permit_mynetworks", "permit_sasl_authenticated", "permit_auth_destination",
    "reject_unauth_destination", "defer_unauth_destination", "reject_unlisted_sender", "warn_if_reject", "ours",
    "permit_mynetworks", "reject_unauth_destination",
]  # fmt: skip


def drawn(seed: int) -> dict[str, str]:
    """Some restrictions and networks."""
    found = random.Random(seed)
    names = found.sample(["client", "helo", "sender", "recipient"], found.randint(0, 2))
    lists = {name: ", ".join(found.choices(WORDS, k=found.randint(1, 4))) for name in ["relay", *names]}
    # smtpd(8) does not start without something that refuses relaying, before any `permit` of its list.
    first = lists.get("recipient", "").replace("permit,", "").replace("ours", "").removesuffix("permit")
    lists["recipient"] = f"{first} reject_unlisted_sender reject_unauth_destination"
    nets = [
        found.choice(["", "", "!"]) + one for one in found.choices(["10.1.2.3", "10.1.0.0/16", "10.0.0.0/8", "127.0.0.1"], k=3)
    ]
    settings = {f"smtpd_{name}_restrictions": text for name, text in lists.items()}
    return {"smtpd_restriction_classes": "ours", "ours": "permit_mynetworks, reject", "mynetworks": " ".join(nets), **settings}


def written_files(folder: Path, main: str) -> Path:
    folder.mkdir()
    (folder / "main.cf").write_text(main)
    (folder / "networks").write_text("10.1.0.0/16 x\n192.0.2.9 x\n")
    (folder / "addresses_of_clients").write_text("10.1.2.3 x\n10.2.0.0/16 x\n10 x\n")
    (folder / "list").write_text("10.1.0.0/16\n")
    return folder


@pytest.mark.parametrize("batch", range(12 if PROVE else 1))
def test_who_may_relay_is_who_may_with_postfix(tmp_path, batch):
    """No client may send to a domain that it may not send to with Postfix; nor the other way round, if nothing is said of it."""
    cases = [*(ACCESS if batch == 0 else ()), *(drawn(seed) for seed in range(30 * batch, 30 * batch + 30))]
    listeners = {f"in{number}": case for number, case in enumerate(cases)}
    with postfix(written_files(tmp_path / "base", ACCESS_MAIN), listeners) as running:
        for number, case in enumerate(cases):
            more = "".join(f"{key} = {text}\n" for key, text in case.items())
            (tmp_path / f"{number}").mkdir()
            written = imported(tmp_path / f"{number}", written_files(tmp_path / f"config{number}", ACCESS_MAIN + more))
            config = load(written.config, {})
            for client in CLIENTS:
                theirs = running.takes(f"in{number}", client, RECIPIENTS)
                got = [takes(config, client, recipient) for recipient in RECIPIENTS]
                assert all(one or not ours for one, ours in zip(theirs, got, strict=True)), (case, client, theirs, got)
                assert theirs == got or "not carried" in written.done.stderr, (case, client, theirs, got)


def takes(config: Config, client: str, recipient: str) -> bool:
    """Whether a relay takes a recipient from a client that has not logged in."""
    if may_relay(config, client):
        return True
    if any(rule.clients == "unauthenticated" and rule.enforce for rule in config.mail_rule):
        return False
    return domain_of(recipient) in [*config.relay.domains, *config.local_domains]


@pytest.mark.parametrize(
    ("services", "networks", "said"),
    [
        (["25 -o mynetworks=127.0.0.0/8"], ["127.0.0.0/8"], ""),
        (["2525", "25 -o mynetworks=127.0.0.0/8"], ["127.0.0.0/8"], "2525: mynetworks 10.0.0.0/8"),
        (["2525", "25 -o smtpd_relay_restrictions=reject_unauth_destination"], [], "2525: mynetworks 127.0.0.0/8, 10.0.0.0/8"),
        (["2525", "25 -o smtpd_client_restrictions=permit_mynetworks,reject"], ["127.0.0.0/8", "10.0.0.0/8", "2001:db8::/64"],
         "25: smtpd_client_restrictions = permit_mynetworks,reject"),
        (["25 -o smtpd_relay_restrictions=permit"], ["127.0.0.0/8", "10.0.0.0/8", "2001:db8::/64"], "that is an open relay"),
        (["25 -o mynetworks=0.0.0.0/0"], ["0.0.0.0/0"], "may relay: that is an open relay"),
        (["25 -o mynetworks=!/etc/postfix/missing,10.0.0.0/8"], [], "what is behind it is left out, since it may be excluded"),
    ],
)  # fmt: skip
def test_what_one_service_allows_is_not_allowed_at_all(tmp_path, services, networks, said):
    (tmp_path / "main.cf").write_text(ACCESS_MAIN)
    lines = [f"{port} inet n - - - - smtpd {more}" for port, _, more in (one.partition(" ") for one in services)]
    (tmp_path / "master.cf").write_text("\n".join([*lines, "local unix - - - - - local", "smtp unix - - - - - smtp\n"]))
    written = imported(tmp_path, tmp_path)
    assert tomllib.loads(written.config.read_text())["relay"]["networks"] == networks and said in written.done.stderr


def test_the_script_makes_users_and_aliases(tmp_path):
    written = imported(tmp_path, CONFIGURATIONS / "virtual-hosting")
    mailboxes = re.search(r'^recipient_domain = (\[[^]]*\])\nprotocol = "mailbox"', written.config.read_text(), re.M)
    assert mailboxes is not None
    domains = re.findall(r'"([^"]+)"', mailboxes[1])
    route = ", ".join(f'"{domain}"' for domain in domains)
    with FakeMx({}) as peer:
        settings = f'route=[{{name="here", protocol="mailbox", recipient_domain=[{route}]}}, {{hosts=["127.0.0.1:{peer.port}"]}}]'
        with Relay(tmp_path, None, settings) as relay:
            for line in (tmp_path / "files/mailboxes.sh").read_text().splitlines():
                if line.startswith("relaymta "):
                    relay.cli(*line.partition("  #")[0].split()[1:])
            relay.send(
                "Subject: x\r\n\r\nx\r\n", "a@b.example", "team@people.example", "any@old-shop.example", "info@shop.example"
            )
            users = relay.cli("mailbox", "list").stdout
            assert all(one in users for one in ("sales@shop.example", "ann@shop.example", "board@club.example"))
            wanted = ["ann@mail.example", "bob@elsewhere.example"]
            wait_for(lambda: sorted(one for _, recipients, _ in peer.messages for one in recipients) == wanted)


def test_the_session_of_the_page(tmp_path):
    text = section(PAGE, "A session")
    main_cf, master_cf, *_ = blocks(text)
    postfix_folder = tmp_path / "postfix"
    postfix_folder.mkdir()
    usual = [
        "smtp inet n - y - - smtpd",
        "pickup unix n - y 60 1 pickup",
        *(f"{name} unix - - y - - smtp" for name in ("smtp", "relay")),
    ]
    (postfix_folder / "main.cf").write_text(main_cf)
    (postfix_folder / "master.cf").write_text("\n".join(usual) + f"\n{master_cf}")
    for name in ("sasl_passwd", "transport"):
        rows = re.search(rf"`/etc/postfix/{name}` has `([^`]+)`(?: and\n`([^`]+)`)?", text)
        assert rows is not None
        (postfix_folder / name).write_text("\n".join(filter(None, rows.groups())))
    here = {"/etc/postfix": str(postfix_folder), "/etc/relaymta": str(tmp_path / "relaymta")}
    with shell(tmp_path, tmp_path / "relaymta/relaymta.toml", here) as running:
        for one in commands(text):
            running.run(one)


if __name__ == "__main__":
    for every in NAMES:
        with tempfile.TemporaryDirectory() as made:
            (CONFIGURATIONS / every / "expected").write_text(
                shown(imported(Path(made), CONFIGURATIONS / every), CONFIGURATIONS / every)
            )
    sys.exit(0)
