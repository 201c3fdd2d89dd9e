"""`relaymta init`: its questions, the files that it writes, what it refuses. (That mail is delivered: tests/e2e/test_init.py.)"""

import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from relaymta.cli import answers, initial, main, options, questions, setup
from relaymta.cli.initial import Exists, NewFile, write
from relaymta.config import load
from relaymta.files import read_secret
from relaymta.toml import written
from tests.support.pages import section
from tests.support.terminal import Terminal

PASSWORDS = ['quo"te', "back\\slash", "tick's", "pässwörd ☃", "#!$ %s {x}", "[a] = 1", "two words"]
DOMAIN = ("--domain", "shop.example", "--hostname", "mail.shop.example", "--listen", "127.0.0.1:2525")
SMART_HOST = ("--smarthost", "smtp.example.net")
LOGIN = (*SMART_HOST, "--username", "me@shop.example", "--password-stdin")


def call(*words: str, text: str | None = None, **environment: str) -> Result:
    found = CliRunner().invoke(main, ("init", *words), input=text, env=environment)
    assert found.exception is None or isinstance(found.exception, SystemExit), (words, found.exception)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "relaymta.toml"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`relaymta config check`, a process of its own, is not started."""
    monkeypatch.setattr(setup.Setup, "check", lambda self: None)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The files

TEXT = """\
# Written by `relaymta init`. `relaymta config describe` shows every key with its meaning and default.
# After a change: `relaymta config check`, then `relaymta reload`.

# our name in EHLO and Received:
hostname = "mail.shop.example"
{user}# the queue
spool = "{folder}/spool"

[[listener]]
# where applications and other servers hand in their mail
address = "127.0.0.1:2525"

[[route]]
# its name in the log and on the command line
name = "smarthost"
# all mail goes there; further ones are used when the first cannot be reached
hosts = ["smtp.example.net:587"]
# TLS: with a valid certificate only
tls = "verify"
# the login there
username = "me@shop.example"
password_file = "{folder}/etc/smarthost.password"

[[dkim]]
# mail with a From: of this domain is signed
domain = "shop.example"
# the public key is in the DNS, at SELECTOR._domainkey.DOMAIN
selector = "relay1"
key = "{folder}/etc/dkim/shop.example.relay1.pem"

[relay]
# clients that may send to any domain
networks = ["127.0.0.0/8", "::1/128", "10.0.0.0/8"]
"""


def about_user() -> str:
    """The lines about the user of the relay, which root alone needs."""
    who = "# who the relay becomes when root has started it"
    if os.geteuid():
        return ""
    if answers.usual_user(answers.Answers()):
        return f'{who}\nuser = "relaymta"\n'
    return f'{who} (useradd --system --shell /usr/sbin/nologin relaymta)\n#user = "relaymta"\n'


def test_the_files_are_those_of_a_careful_operator(path, tmp_path):
    """And `config check`, which has run, has nothing to say about them but that somebody may listen on a port."""
    more = ("--network", "10.0.0.0/8", "--spool", str(tmp_path / "spool"), "--no-connect", "--json")
    found = call(*LOGIN, *DOMAIN, *more, "-c", str(path), text="secret\n")
    assert found.exit_code == 0, found.stderr
    row = json.loads(found.stdout)
    assert path.read_text() == TEXT.format(folder=tmp_path, user=about_user())
    password, key = path.parent / "smarthost.password", path.parent / "dkim" / "shop.example.relay1.pem"
    assert {file: mode(file) for file in (path, password, key)} == {path: 0o640, password: 0o600, key: 0o600}
    assert [(file["path"], file["mode"]) for file in row["files"]] == [
        (str(password), "0600"), (str(key), "0600"), (str(path), "0640"),
    ]  # fmt: skip
    assert password.read_text() == "secret\n" and not [*path.parent.glob(".*"), *key.parent.glob(".*")]
    config = load(path, {})
    assert (config.route[0].login, config.dkim[0].key) == (
        f"user me@shop.example, with the password of password_file {password}",
        str(key),
    )
    assert all("another program listens" in note or "there is no user" in note or "SPF" in note for note in row["notes"])
    spf, dkim, dmarc = row["dns"][-3:] if len(row["dns"]) > 2 else (None, *row["dns"])
    assert spf is None, "the smart host is not known, so its operator has to be asked"
    assert dkim["name"] == "relay1._domainkey.shop.example" and dkim["value"].startswith("v=DKIM1; k=rsa; p=MII")
    assert dmarc == {"name": "_dmarc.shop.example", "type": "TXT", "value": "v=DMARC1; p=none"}
    assert f"relaymta doctor domain shop.example -c {path}" in row["next"]


@pytest.mark.parametrize("text", PASSWORDS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_password_is_kept_as_it_is(path, unchecked, text, end):
    found = call(*LOGIN, *DOMAIN, "--no-dkim", "--no-connect", "-c", str(path), text=text + end)
    assert found.exit_code == 0 and text not in found.output, found.stderr
    file = path.parent / "smarthost.password"
    assert read_secret(file) == text and mode(file) == 0o600


def test_a_file_with_the_password_is_used_where_it_is(path, unchecked, tmp_path):
    file = tmp_path / 'my "secret"'
    file.write_text("secret\n")
    words = (*SMART_HOST, "--username", 'a"b\\c', "--password-file", str(file), *DOMAIN, "--no-connect", "-c", str(path))
    assert call(*words).exit_code == 0
    route = load(path, {}).route[0]
    assert (route.password_file, route.username) == (str(file), 'a"b\\c') and not (path.parent / "smarthost.password").exists()


def test_an_internationalized_domain(path, unchecked):
    names = ("--domain", "dömain.example", "--hostname", "mäil.dömain.example", "--listen", "127.0.0.1:2525")
    found = call(*SMART_HOST, *names, "--no-connect", "--json", "-c", str(path))
    assert found.exit_code == 0, found.stderr
    config = load(path, {})
    assert (config.dkim[0].domain, config.hostname) == ("xn--dmain-jua.example", "xn--mil-qla.xn--dmain-jua.example")
    assert 'domain = "dömain.example"' in path.read_text() and config.dkim[0].key.isascii()
    assert [row["name"] for row in json.loads(found.stdout)["dns"]] == [
        "relay1._domainkey.xn--dmain-jua.example", "_dmarc.xn--dmain-jua.example",
    ]  # fmt: skip


def test_direct_delivery_has_no_route_and_says_what_matters(path, unchecked):
    found = call("--direct", "--domain", "shop.example", "--hostname", "mx.other.example", "--listen", "127.0.0.1:2525",
                 "--no-connect", "-c", str(path))  # fmt: skip
    assert found.exit_code == 0, found.stderr
    config = load(path, {})
    assert not config.route and config.intake.complete_domain == "shop.example"
    assert '  shop.example. TXT "v=spf1 a:mx.other.example -all"' in found.stdout


def test_set_adds_keys_to_the_file(path, unchecked):
    words = (
        "--set",
        "metrics.listen=off",
        "--set",
        'relay.domains=["x.example"]',
        "--set",
        "workers=2",
        "--set",
        "hostname=h.example",
    )
    found = call(*SMART_HOST, *DOMAIN, *words, "--set", 'imap.hide=["QRESYNC"]', "--no-connect", "-c", str(path))
    assert found.exit_code == 0, found.stderr
    config = load(path, {})
    assert (config.metrics.listen, config.relay.domains, config.workers) == ("off", ["x.example"], 2)
    assert (config.hostname, config.imap.hide) == ("h.example", ["QRESYNC"])


@pytest.mark.parametrize(("setting", "status", "message"), [
    ("route=[]", 64, "--set route: change it in the file that is written"),
    ("dkim.x=1", 64, "--set dkim.x: change it"),
    ("workers=-1", 78, "command line: workers: "),
    ("relay.nonsense=1", 78, "relay.nonsense: no such key"),
    ("log.file=\udcff", 64, "not UTF-8"),
    ('relay={networks=["127.0.0.0/8"]}', 64, "--set relay: this table is in the file already"),
    ("hostname.x=1", 64, "--set hostname.x: hostname has a value already"),
])  # fmt: skip
def test_a_key_that_cannot_be_set(path, setting, status, message):
    found = call(*SMART_HOST, *DOMAIN, "--set", setting, "--no-connect", "-c", str(path))
    assert found.exit_code == status and message in found.stderr and not path.parent.exists()


def test_no_file_is_replaced_without_force_and_a_key_never(path, unchecked):
    words = (*LOGIN, *DOMAIN, "--no-connect", "-c", str(path))
    path.parent.mkdir()
    path.write_text("mine")
    refused = call(*words, text="new")
    assert (
        refused.exit_code == 73
        and refused.stderr.startswith(f"{path} exists already: --force replaces it")
        and not refused.stdout
    )
    assert [*path.parent.iterdir()] == [path] and path.read_text() == "mine"
    password, key = path.parent / "smarthost.password", path.parent / "dkim" / "shop.example.relay1.pem"
    path.unlink()
    password.write_text("old")
    refused = call(*words, text="new")
    assert refused.exit_code == 73 and refused.stderr.startswith(f"{password} exists already: --force")
    assert [*path.parent.iterdir()] == [password] and password.read_text() == "old", "all files, or none"
    assert call(*words, "--force", text="new").exit_code == 0 and password.read_text() == "new\n" and mode(password) == 0o600
    before = key.read_bytes()
    found = call(*words, "--force", "--hostname", "two.shop.example", text="newer")
    assert found.exit_code == 0 and f"{key} was there already, and is used as it is" in found.stdout
    assert key.read_bytes() == before and password.read_text() == "newer\n" and load(path, {}).hostname == "two.shop.example"


def test_a_dry_run_writes_nothing_and_shows_no_secret(path):
    words = (*LOGIN, *DOMAIN, "--dry-run", "-c", str(path))
    found = call(*words, text="secret-word")
    assert found.exit_code == 0 and not path.parent.exists() and "secret-word" not in found.output
    assert f"{path.parent}/smarthost.password: the password (mode 0600" in found.stdout and "  [[route]]\n" in found.stdout
    row = json.loads(call(*words, "--json", text="secret-word").stdout)
    assert tomllib.loads(row["files"][-1]["content"])["route"][0]["username"] == "me@shop.example"
    assert [file["content"] for file in row["files"][:-1]] == ["", ""]


# What is refused

WRONG: list[tuple[tuple[str, ...], str]] = [
    ((), "--smarthost HOST[:PORT], or --direct to deliver"),
    ((*SMART_HOST, "--direct"), "--direct: there is a --smarthost"),
    (("--smarthost", "a b"), "--smarthost: 'a b': it has white space in it"),
    (("--smarthost", "smtp.example.net:0"), "--smarthost: 'smtp.example.net:0': expected host:port with a port from 1 to 65535"),
    (("--smarthost", "smtps://smtp.example.net"), "write host:port without smtps://"),
    (("--smarthost", "unix:/run/lmtp"), "a smart host speaks SMTP"),
    (("--smarthost", ""), "--smarthost: it is empty"),
    ((*SMART_HOST, "--domain", "a@b.example"), "--domain: 'a@b.example': a domain has no @ in it"),
    ((*SMART_HOST, "--domain", "localhost"), "--domain: 'localhost' is not a domain of mail"),
    ((*SMART_HOST, "--domain", "a..b"), "--domain: 'a..b' is not a valid domain name"),
    ((*SMART_HOST, "--domain", 'x"\n[evil]\n.example'), "is not a valid domain name"),
    ((*SMART_HOST, "--hostname", "a_b.example"), "--hostname: 'a_b.example': '_' is not allowed"),
    ((*SMART_HOST, "--network", "10.0.0.1/8"), '--network: 10.0.0.1/8 has host bits set (did you mean "10.0.0.0/8"?)'),
    ((*SMART_HOST, "--network", "0.0.0.0/0"), "--network: '0.0.0.0/0': that is much of the Internet"),
    ((*SMART_HOST, "--network", "16.0.0.0/5", "--network", "24.0.0.0/5"), "--network: '24.0.0.0/5': that is much of the"),
    ((*SMART_HOST, "--listen", "25"), "--listen: '25': expected host:port"),
    ((*SMART_HOST, "--listen", "192.0.2.99:25"), "--listen: 192.0.2.99:25: "),
    ((*SMART_HOST, "--to", "bob"), "--to: 'bob' is not an address"),
    ((*SMART_HOST, "--to", "bob@d.example", "--from", "<x"), "--from: '<x' is not an address"),
    ((*SMART_HOST, "--from", "a@b.example"), "--from: it needs --to"),
    ((*SMART_HOST, "--user", "no-such-user"), "--user: there is no user 'no-such-user'"),
    ((*SMART_HOST, "--selector", "a b"), "--selector: 'a b' is not a valid domain name"),
    ((*SMART_HOST, "--selector", "a", "--no-dkim"), "--selector: it needs --dkim"),
    ((*SMART_HOST, "--tls", "maybe"), "--tls: 'maybe': expected verify, encrypt, may or off"),
    ((*LOGIN, "--tls", "may"), "--tls: 'may': credentials are sent over verified TLS only"),
    ((*SMART_HOST, "--tls", "may", "--ca-file", "/dev/null"), "--ca-file: no certificate is checked with --tls may"),
    ((*SMART_HOST, "--ca-file", "/nonexistent"), "--ca-file: /nonexistent: No such file or directory"),
    ((*SMART_HOST, "--username", "me"), "--password-stdin or --password-file: the password is missing"),
    ((*SMART_HOST, "--username", "me\n", "--password-stdin"), "printable characters"),
    ((*SMART_HOST, "--password-stdin"), "--password-stdin: it needs --username"),
    (("--direct", "--password-file", "x"), "--password-file: it needs --smarthost and --username"),
    (("--direct", "--username", "x"), "--username: it needs --smarthost"),
    ((*LOGIN, "--password-file", "/dev/null"), "--password-stdin: there is a --password-file"),
    ((*SMART_HOST, "--wait", "soon"), "--wait soon: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "")
def test_without_a_terminal_what_is_wrong_is_named_and_nothing_is_written(path, words, message):
    own = [DOMAIN[at : at + 2] for at in range(0, len(DOMAIN), 2) if DOMAIN[at] not in words]
    found = call(*words, *(word for pair in own for word in pair), "-c", str(path), text="secret")
    assert found.exit_code == 64 and message in found.stderr and not found.stdout and not path.parent.exists(), found.stderr


def test_all_that_is_missing_is_named_at_once(path, monkeypatch):
    monkeypatch.setattr("relaymta.config.names.socket.getfqdn", lambda: "web1")
    found = call("-c", str(path))
    assert [line.partition(" ")[0] for line in found.stderr.splitlines()] == ["--smarthost", "--domain:"]
    assert found.exit_code == 64


@pytest.mark.parametrize(("octets", "message"), [
    (b"", "the password is empty"), (b"\n", "the password is empty"), (b"one\ntwo\n", "more than one line"),
    (b" blank\n", "white space around it"), (b"nul\0\n", "more than one line"), (b"\xff\n", "the password is not UTF-8"),
    ("\ufeffmark".encode(), "white space around it"),
])  # fmt: skip
def test_a_password_that_no_file_can_hold(path, octets, message):
    found = call(*LOGIN, *DOMAIN, "-c", str(path), text=octets)  # type: ignore[arg-type]
    assert found.exit_code == 64 and message in found.stderr and not path.parent.exists()


def test_a_file_that_cannot_be_read_or_written_is_named(path, tmp_path, unchecked):
    found = call(*SMART_HOST, "--username", "me", "--password-file", str(tmp_path / "none"), *DOMAIN)
    assert (found.exit_code, found.stderr) == (74, f"--password-file: {tmp_path}/none: No such file or directory\n")
    (tmp_path / "file").touch()
    found = call(*SMART_HOST, *DOMAIN, "--no-connect", "-c", str(tmp_path / "file" / "relaymta.toml"))
    assert found.exit_code == 73 and f"{tmp_path}/file: " in found.stderr and "nothing is written" in found.stderr


# Defaults


@pytest.mark.parametrize(("name", "short", "domain", "host"), [
    ("web1.shop.example", "web1", "shop.example", "web1.shop.example"), ("shop.example", "x", "shop.example", "shop.example"),
    ("web1", "web1", answers.MISSING, "web1.d.example"), ("localhost", "localhost", answers.MISSING, "relay.d.example"),
    ("localhost.localdomain", "a_b", answers.MISSING, "relay.d.example"),
])  # fmt: skip
def test_the_names_of_this_host_are_usual(monkeypatch, name, short, domain, host):
    monkeypatch.setattr("relaymta.config.names.socket.getfqdn", lambda: name)
    monkeypatch.setattr("relaymta.cli.answers.socket.gethostname", lambda: short)
    found = answers.Answers(domain="d.example")
    assert (answers.usual_domain(found), answers.usual_hostname(found)) == (domain, host)


@pytest.mark.parametrize(("networks", "hosts"), [
    ([], "127.0.0.1:{0}"), (["127.0.0.0/8"], "127.0.0.1:{0}"), (["10.0.0.0/8"], "0.0.0.0:{0}"), (["fd00::/8"], "[::]:{0}"),
    (["fd00::/8", "10.0.0.0/8"], "0.0.0.0:{0} [::]:{0}"),
])  # fmt: skip
@pytest.mark.parametrize(("uid", "port"), [(0, 25), (1000, 2525)])
def test_who_may_relay_decides_where_it_is_usual_to_listen(monkeypatch, networks, hosts, uid, port):
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert answers.usual_listen(answers.Answers(networks=networks)) == hosts.format(port)


@pytest.mark.parametrize(("login", "sender"), [
    ("ann@shop.example", "ann@shop.example"), ("ann@SHOP.example", "ann@SHOP.example"), ("ann", "postmaster@shop.example"),
    ("ann@mail.example", "postmaster@shop.example"), ("a@b@shop.example", "postmaster@shop.example"),
    ("", "postmaster@shop.example"),
])  # fmt: skip
def test_the_sender_is_the_login_where_that_is_of_the_domain(login, sender):
    assert answers.usual_sender(answers.Answers(username=login, domain="shop.example")) == sender


@pytest.mark.parametrize(("login", "port"), [("", 25), ("me", 587)])
def test_a_smart_host_without_a_port_has_the_usual_one(login, port):
    found = answers.Answers(smarthosts=["a.example", "b.example:2500", "[2001:db8::1]"], username=login)
    answers.give_ports(found)
    assert found.smarthosts == [f"a.example:{port}", "b.example:2500", f"[2001:db8::1]:{port}"]


def test_where_the_configuration_of_a_user_is(monkeypatch, tmp_path):
    monkeypatch.setattr(options, "CONFIG_PATH", str(tmp_path / "etc.toml"))
    for folder, uid, expected in (("", 0, "etc.toml"), ("", 1000, "home/.config/relaymta/relaymta.toml"),
                                  (str(tmp_path / "xdg"), 1000, "xdg/relaymta/relaymta.toml"),
                                  ("relative", 1000, "home/.config/relaymta/relaymta.toml")):  # fmt: skip
        monkeypatch.setenv("XDG_CONFIG_HOME", folder)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert options.usual_path() == tmp_path / expected
    shown = ("config", "show", "--json")
    (tmp_path / "etc.toml").write_text('spool = "/machine"\n[[listener]]\naddress = "127.0.0.1:1"\n')
    assert json.loads(CliRunner().invoke(main, shown).stdout)["spool"] == "/machine", (
        "none of the user's own: that of the machine"
    )
    own = tmp_path / "home/.config/relaymta/relaymta.toml"
    own.parent.mkdir(parents=True)
    own.write_text('spool = "/own"\n[[listener]]\naddress = "127.0.0.1:1"\n')
    assert json.loads(CliRunner().invoke(main, shown).stdout)["spool"] == "/own"
    refused = call("--direct", *DOMAIN, "--no-connect")
    assert refused.exit_code == 73 and refused.stderr.startswith(f"{own} exists already")


# Questions

ANSWERS = [  # a question, and what is typed
    ("Smart host", "smtp example.net:x"), ("Smart host", "smtp.example.net:0"),
    ("Smart host", "smtp.example.net, two.example.net:25"),
    ("User name there", "me@shop.example"), ("Password of me@shop.example at smtp.example.net", " blank"),
    ("Password", 'se"cret'),
    ("Domain of your mail", "a@b"), ("Domain of your mail", "shop.example"), ("Full name of this host", "a_b"),
    ("Full name of this host", "mail.shop.example"), ("Networks", "10.0.0.1/8"), ("Networks", "10.0.0.0/8 192.168.0.0/16"),
    ("Addresses to accept mail on", "25"), ("Addresses to accept mail on", "127.0.0.1:2525"), ("Send a test message", "bob"),
    ("Send a test message", ""), ("Write ", "y"),
]  # fmt: skip


@pytest.fixture
def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("questions", "init"):
        monkeypatch.setattr(f"relaymta.cli.{module}.asks", lambda: True)
    yield


def test_wrong_answers_are_asked_for_again(path, unchecked, at_a_terminal):
    found = call("--no-connect", "-c", str(path), text="".join(answer + "\n" for _, answer in ANSWERS))
    assert found.exit_code == 0, found.output
    at = 0
    for question, _ in ANSWERS:
        assert question in found.stderr[at:], f"{question} is not asked where it should be: {found.stderr}"
        at = found.stderr.index(question, at) + len(question)
    assert 'se"cret' not in found.output
    config = load(path, {})
    assert config.route[0].hosts == ["smtp.example.net:587", "two.example.net:25"] and config.hostname == "mail.shop.example"
    assert config.relay.networks == ["127.0.0.0/8", "::1/128", "10.0.0.0/8", "192.168.0.0/16"]
    assert read_secret(config.route[0].password_file) == 'se"cret'


def test_no_answer_about_the_smart_host_means_the_mx_and_what_options_say_is_not_asked(path, unchecked, at_a_terminal):
    found = call(*DOMAIN, "--to", "bob@d.example", "--network", "10.0.0.0/8", "--no-connect", "-c", str(path), text="\ny\n")
    assert found.exit_code == 0 and load(path, {}).route == [], found.output
    assert "Smart host" in found.stderr and not {"User name", "Password", "Domain", "Networks"} & set(
        found.stderr.split(" (")[0].split()
    )


def test_no_means_that_nothing_is_written(path, at_a_terminal):
    words = (*LOGIN[:-1], *DOMAIN, "--to", "bob@d.example", "--network", "10.0.0.0/8", "--no-connect", "-c", str(path))
    found = call(*words, text="secret\nn\n")
    assert found.exit_code == 1 and "Aborted!" in found.stderr and not path.parent.exists()


def test_yes_asks_nothing_at_a_terminal(path, unchecked, at_a_terminal):
    found = call(*SMART_HOST, *DOMAIN, "--yes", "--no-connect", "-c", str(path))
    assert found.exit_code == 0 and "Write" not in found.stderr


REACHED = {
    "host": "smtp.example.net",
    "address": "192.0.2.1",
    "port": 587,
    "tls": "TLSv1.3",
    "login": "",
    "failure": "",
    "cure": "",
}


def test_whoever_sits_there_decides_what_to_do_about_a_smart_host_that_fails(path, unchecked, at_a_terminal, monkeypatch):
    """Again, then another host, then all the same."""
    tried = []

    def reach(config: Any, to: str) -> list[dict[str, Any]]:
        tried.append(config.route[0].hosts)
        return [REACHED | {"failure": "nobody is there", "cure": "see"}]

    monkeypatch.setattr("relaymta.cli.trial.reach", reach)
    words = (*SMART_HOST, *DOMAIN, "--network", "10.0.0.0/8", "--to", "bob@d.example", "--username", "me", "-c", str(path))
    typed = ["one", "again", "change", "two.example.net", "you", "verify", "two", "write", "y"]
    found = call(*words, text="".join(line + "\n" for line in typed))
    assert found.exit_code == 0, found.output
    assert tried == [["smtp.example.net:587"]] * 2 + [["two.example.net:587"]] and "nobody is there" in found.stderr
    route = load(path, {}).route[0]
    assert (route.hosts, route.username, read_secret(route.password_file)) == (["two.example.net:587"], "you", "two")
    assert "test message" not in found.stdout, "it would fail"
    found = call(*words, "--force", text="one\nquit\n")
    assert found.exit_code == 1 and load(path, {}).route[0].hosts == ["two.example.net:587"]


def test_on_a_terminal_a_password_is_not_shown_and_ctrl_c_leaves_nothing(path):
    with Terminal(["init", "--no-connect", "--yes", "-c", str(path), *LOGIN[:-1], *DOMAIN]) as terminal:
        assert terminal.end() == 64, "--yes: nothing is asked"
    with Terminal(["init", "--no-connect", "-c", str(path), *SMART_HOST, *DOMAIN]) as terminal:
        terminal.answer("User name there", "me")
        terminal.answer("Password of me at smtp.example.net:", "hunter2")
        terminal.answer("Networks", "10.0.0.1/8")
        terminal.await_text('has host bits set (did you mean "10.0.0.0/8"?)')
        terminal.answer("Networks", "")
        terminal.answer("Send a test message to", "")
        terminal.await_text(f"Write {path.parent}/smarthost.password, ")
        assert terminal.interrupt() == 1 and "hunter2" not in terminal.shown and terminal.shown.endswith("Aborted!\n")
    assert not path.parent.exists()


# Writing


def test_all_files_are_written_or_none(tmp_path, monkeypatch):
    files = [NewFile(tmp_path / "new" / name / "file", b"x") for name in ("a", "b", "c")]
    moved = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if target.parent.name == "c":
            raise OSError(28, "No space left on device", str(target))
        return moved(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        write(files, "", False)
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    write(files, "", False)
    assert all(file.path.read_bytes() == b"x" and mode(file.path) == 0o600 for file in files)
    with pytest.raises(Exists):
        write([files[0]._replace(path=tmp_path / "new" / "d"), files[1]], "", False)
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == ["a", "b", "c"]


def test_a_key_that_has_come_meanwhile_is_not_replaced_whatever_is_given(tmp_path):
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_bytes(b"another's")
    other.write_bytes(b"old")
    with pytest.raises(Exists):
        write([NewFile(tmp_path / "x", b"x"), NewFile(key, b"ours", never_replaces=True), NewFile(other, b"new")], "", True)
    assert (key.read_bytes(), other.read_bytes()) == (b"another's", b"old") and not (tmp_path / "x").exists()
    write([NewFile(other, b"new")], "", True)
    assert other.read_bytes() == b"new"


def test_of_two_at_the_same_time_one_writes(tmp_path, monkeypatch):
    """The file comes between a look at its place and the move."""
    moved = Path.replace

    def late(self: Path, target: Path) -> Path:
        with pytest.raises(FileExistsError):
            target.open("xb")
        return moved(self, target)

    monkeypatch.setattr(Path, "replace", late)
    write([NewFile(tmp_path / "a", b"x")], "", False)
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_signal_that_comes_while_files_are_written_ends_the_program_behind_that(tmp_path, monkeypatch):
    synced = os.fsync

    def interrupted(descriptor: int) -> None:
        os.kill(os.getpid(), initial.signal.SIGINT)
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    files = [NewFile(tmp_path / name, b"x") for name in ("a", "b")]
    with pytest.raises(KeyboardInterrupt):
        write(files, "", False)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")
def test_root_gives_the_files_to_the_user_of_the_relay(tmp_path):
    secret, key, config = (tmp_path / "etc" / name for name in ("secret", "dkim/key", "config"))
    write([NewFile(secret, b"x"), NewFile(key, b"x"), NewFile(config, b"x", group=True)], "nobody", False)
    shown = {
        path: (path.stat().st_uid, path.stat().st_gid, mode(path)) for path in (secret, key, config, key.parent, secret.parent)
    }
    nobody, group = options.os.stat("/").st_uid + 65534, 65534
    assert shown == {
        secret: (nobody, group, 0o600), key: (nobody, group, 0o600), config: (0, group, 0o640), key.parent: (0, group, 0o750),
        secret.parent: (0, 0, 0o755),
    }  # fmt: skip


def test_a_link_in_place_of_the_configuration_stays_one(path, unchecked, tmp_path):
    path.parent.mkdir()
    (tmp_path / "real.toml").write_text("old")
    path.symlink_to(tmp_path / "real.toml")
    assert call(*SMART_HOST, *DOMAIN, "--no-connect", "--force", "-c", str(path)).exit_code == 0
    assert path.is_symlink() and load(tmp_path / "real.toml", {}).hostname == "mail.shop.example"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.dates()
    | st.just(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(VALUES)
def test_what_is_written_as_toml_means_the_same(value):
    text = f"v = {written(value)}\nafter = 1\n"
    assert tomllib.loads(text) == {"v": value, "after": 1} and "\n" not in written(value)


def test_what_is_no_text_is_not_written():
    with pytest.raises(ValueError, match="not UTF-8"):
        written(["\udcff"])


def test_the_page_names_every_option_and_no_other():
    options = {
        name for parameter in main.get_command(None, "init").params for name in (*parameter.opts, *parameter.secondary_opts)
    }  # type: ignore[arg-type, union-attr]
    named = set(re.findall(r"--[a-z][a-z-]*", section("cli.md", "Setting up")))
    assert named <= options and options - named <= {"--dkim", "--json", "--config", "-c"}


def test_the_questions_have_options():
    names = {parameter.name: parameter.opts for parameter in main.get_command(None, "init").params}  # type: ignore[arg-type, union-attr]
    assert all(question.option in names[question.name] for question in questions.QUESTIONS)
