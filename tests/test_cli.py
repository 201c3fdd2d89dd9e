"""What all verbs have in common: options, exit statuses, the form of lists and of --json, imports, words (docs/cli.md)."""

import ast
import asyncio
import json
import mailbox
import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner, Result

from relaymta.cli import VERBS, console, main, peer, sink
from relaymta.config import describe
from relaymta.queue import offline
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.prove import in_prove

ROOT = Path(__file__).parent.parent
UNKNOWN = "1ZZZZZZZZZZZZ"


def leaves(command: click.Command = main, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command that does something, by its words."""
    if not isinstance(command, click.Group):
        return {path: command}
    context = click.Context(command)
    found = {}
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        found |= leaves(inner, (*path, name))
    return found


ALL = {path: command for path, command in leaves().items() if path[0] != "standing"}


def call(*words: str, **environment: str) -> Result:
    found = CliRunner().invoke(main, words, env=environment)
    assert found.exception is None or isinstance(found.exception, SystemExit), (words, found.exception)
    return found


# Options


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_verb_has_the_same_options(path):
    options = {name for parameter in ALL[path].params for name in parameter.opts}
    assert {"-c", "--config", "--set", "--spool"} <= options
    assert call(*path, "-h").exit_code == 0


def test_options_stand_before_the_verb_or_behind_it_and_those_behind_it_win(tmp_path, monkeypatch):
    one, two = (tmp_path / name for name in ("one.toml", "two.toml"))
    for path in (one, two):
        path.write_text(f'spool = "/{path.stem}"\n[[listener]]\naddress = "127.0.0.1:1"\n')

    def shown(*words: str, **environment: str) -> dict:
        found = call(*words, "--json", **environment)
        assert found.exit_code == 0, found.stderr
        return json.loads(found.stdout)

    verb = ("config", "show")
    assert shown("-c", str(one), *verb)["spool"] == shown(*verb, "-c", str(one))["spool"] == "/one"
    assert shown("-c", str(one), *verb, "-c", str(two))["spool"] == "/two"
    assert shown(*verb, RELAYMTA_CONFIG=str(one))["spool"] == "/one"
    assert shown("-c", str(two), *verb, RELAYMTA_CONFIG=str(one))["spool"] == "/two"
    assert shown("--spool", "/three", *verb, "-c", str(one))["spool"] == "/three"
    found = shown("--set", "workers=2", "-c", str(one), *verb, "--set", "hostname=h.example")
    assert (found["workers"], found["hostname"]) == (2, "h.example")
    monkeypatch.chdir(tmp_path)
    assert shown(*verb, "-c", "one.toml", "--spool", "s")["spool"] == f"{tmp_path}/s", "paths are absolute"
    assert call(*verb, "-c", "none.toml").stderr == f"{tmp_path}/none.toml: No such file or directory\n"


# Exit statuses

ARGUMENTS = {  # what a verb needs to get as far as its configuration
    ("abuse", "why"): ["n"], ("abuse", "clear"): ["n"], ("assets",): ["k"], ("completion",): ["bash"],
    ("manual",): ["k"],
    ("app", "create"): ["n"], ("app", "expire"): ["n"], ("app", "rotate"): ["n"], ("app", "remove"): ["n"],
    ("user", "add"): ["n", "--password", "x"], ("user", "password"): ["n", "--password", "x"], ("user", "remove"): ["n"],
    ("dkim", "keygen"): ["d.example", "--selector", "s", "--out", "k"],
    ("dkim", "rotate"): ["d.example", "--selector", "s", "--out", "k"],
    ("doctor", "domain"): ["d.example", "--address", "127.0.0.1"],
    **{("mailbox", verb): ["a@b.example"] for verb in ("create", "show", "disable", "enable", "password", "delete", "history")},
    ("mailbox", "rename"): ["a@b.example", "c@b.example"], ("mailbox", "move"): ["a@b.example", "0"],
    ("mailbox", "backup"): ["new"], ("mailbox", "restore"): ["none"], ("mailbox", "export"): ["a@b.example", "new"],
    ("mailbox", "import"): ["a@b.example", __file__],
    ("mailbox", "alias"): ["a@b.example", "c@b.example"], ("mailbox", "quota"): ["a@b.example", "5G"],
    ("import", "postfix"): [str(Path(__file__).parent / "postfix/null-client")],
    ("filter", "test"): ["/dev/null"], ("filter", "learn"): ["spam", "/dev/null"],
    ("message", "show"): [UNKNOWN], ("message", "raw"): [UNKNOWN], ("message", "explain"): [UNKNOWN],
    ("message", "history"): [UNKNOWN],
    ("policy", "test"): [str(ROOT / "tests" / "dialogs")],
    ("policy", "hold"): ["--app", "a"], ("policy", "bounce"): ["--app", "a"], ("policy", "remove"): ["hold", "application=a"],
    **{("quarantine", verb): ["--all"] for verb in ("release", "delete")}, ("quarantine", "show"): [UNKNOWN],
    ("quarantine", "learn"): ["spam", "--all"],
    ("queue", "show"): ["q"], ("queue", "reroute"): ["--all", "--to", "r"],
    ("queue", "snapshot"): ["k"],
    ("queue", "export"): ["--all", "--to", "k"], ("queue", "import"): [str(ROOT / "tests" / "dialogs")],
    **{("queue", verb): ["--all"] for verb in ("flush", "hold", "release", "delete", "bounce")},
    ("route", "test"): ["--to", "a@b.example"], ("rule", "test"): ["/dev/null"], ("rule", "why"): [UNKNOWN],
    ("sieve", "put"): ["a@b.example", "/dev/null"], ("sieve", "check"): ["/dev/null"], ("sieve", "list"): ["a@b.example"],
    ("sieve", "get"): ["a@b.example", "x"], ("sieve", "activate"): ["a@b.example", "x"],
    ("sieve", "remove"): ["a@b.example", "x"],
    **{("suppression", verb): ["a@b.example"] for verb in ("add", "complaint", "remove", "show")},
    ("suppression", "import"): ["/dev/null"],
    ("site", "show"): ["s"], ("site", "limits"): ["s"], ("site", "suspend"): ["s"], ("site", "resume"): ["s"],
    ("token", "create"): ["--name", "n", "--scope", "read"], ("token", "revoke"): ["n"],
    ("shaping", "why"): ["s"], ("shaping", "clear"): ["s"], ("view", "disconnect"): ["a@b.example"],
    ("webhook", "show"): ["n"], ("webhook", "test"): ["n"], ("webhook", "replay"): ["n", "--since", "1h"],
}  # fmt: skip
# Verbs that do not ask it.
NO_DAEMON = {
    "app",
    "assets",
    "bench",
    "completion",
    "config",
    "dkim",
    "doctor",
    "import",
    "init",
    "logs",
    "manual",
    "route",
    "serve",
    "sink",
    "token",
    "user",
}
ALONE = {
    ("shaping", "diff"), ("shaping", "profiles"), ("mailbox", "restore"), ("mailbox", "dns"), ("sieve", "check"),
    ("filter", "check"), ("filter", "learn"), ("filter", "test"),
    ("rule", "test"), ("policy", "test"),
}  # fmt: skip  # likewise
ASKING = [p for p in ALL if p == ("app", "usage") or (p[0] not in NO_DAEMON and p not in ALONE)]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_a_wrong_option_is_wrong_usage(path):
    found = call(*path, "--nonsense")
    assert found.exit_code == 64 and "No such option" in found.stderr and found.stdout == ""


@pytest.mark.parametrize("words", [
    ("quene", "list"), ("queue",), ("queue", "lisst"), (), ("message", "show"), ("--nonsense",), ("status", "extra"),
    ("status", "--set", "workers"), ("shaping", "clear", "x", "--kind", "y"), ("site", "suspend", "x", "--for", "soon"),
    ("policy", "hold", "--app", "x", "--until", "25:00"), ("queue", "delete", "ALL"),
    ("queue", "hold", UNKNOWN, "zz"), ("queue", "list", "--domain", ""), ("queue", "delete"),
    ("route", "test", "--to", "a@b.example", "--header", "foo"), ("route", "test", "--to", "a@b.example", "--header", ": x"),
])  # fmt: skip
def test_wrong_usage(words):
    assert call(*words).exit_code == 64


@pytest.mark.parametrize("path", ASKING, ids=" ".join)
def test_without_a_relay_and_a_spool_the_status_is_unavailable(path, tmp_path):
    found = call(*path, *ARGUMENTS.get(path, []), "--spool", str(tmp_path / "none"))
    assert found.exit_code == 69 and f"no daemon answers at {tmp_path}/none/control.sock" in found.stderr and not found.stdout


@pytest.mark.parametrize("path", ASKING, ids=" ".join)
def test_without_permission_the_status_is_that(path, tmp_path, monkeypatch):
    class Forbidden(socket.socket):
        def connect(self, address):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Forbidden)
    found = call(*path, *ARGUMENTS.get(path, []), "--spool", str(tmp_path))
    assert found.exit_code == 77 and f"{tmp_path}/control.sock: Permission denied: run this as root" in found.stderr


def test_a_spool_that_may_not_be_read_is_no_permission(tmp_path, monkeypatch):
    def answer(spool, op, **args):
        raise PermissionError(13, "Permission denied", str(spool / "shard-0" / "lock"))

    monkeypatch.setattr(offline, "answer", answer)
    (tmp_path / "shard-0").mkdir()
    found = call("queue", "list", "--spool", str(tmp_path))
    assert found.exit_code == 77 and "shard-0/lock: Permission denied" in found.stderr


@pytest.mark.parametrize("verb", ["show", "raw", "explain", "history"])
@pytest.mark.parametrize("ident", ["zz", "", "UUUUUUUUUUUUU", "ZZZZZZZZZZZZZ", "1ZZZZZZZZZZZZZ"])
def test_a_malformed_id_is_wrong_usage(verb, ident):
    found = call("message", verb, ident)
    assert found.exit_code == 64 and "not a message id" in found.stderr


@pytest.mark.parametrize(("path", "kind"), [
    (("user", "password"), "user"), (("user", "remove"), "user"), (("app", "rotate"), "application"),
    (("app", "expire"), "application"), (("app", "remove"), "application"),
])  # fmt: skip
@pytest.mark.parametrize("others", [[], ["shop"]])
def test_an_unknown_account_is_no_such_account(path, kind, others, tmp_path):
    settings = ["--set", f"accounts.file={tmp_path}/accounts.toml"]
    for name in others:
        assert call("user", "add", name, "--password", "x", *settings).exit_code == 0
    name, *more = ARGUMENTS[path]
    found = call(*path, "shob", *more, *settings)
    near = ' (did you mean "shop"?)' if others else ""
    assert (found.exit_code, found.stderr, found.stdout) == (1, f"no such {kind}: shob{near}\n", "")
    assert call("user", "add", "shop", "--password", "x", *settings).exit_code == bool(others)


LISTENERS = """hostname = "mx.b.example"
[[route]]
name = "here"
protocol = "mailbox"
recipient_domain = ["b.example", ".c.example"]
[[listener]]
address = "0.0.0.0:25"
[[listener]]
address = "0.0.0.0:587"
auth = "may"
tls = "may"
[[listener]]
address = "[::]:993"
protocol = "imap"
tls = "implicit"
[[listener]]
address = "127.0.0.1:1430"
protocol = "imap"
tls = "may"
[[certificate]]
chain = "none.pem"
"""


def test_the_records_by_which_programs_find_the_listeners(tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text(LISTENERS)
    (tmp_path / "none.pem").touch()
    found = call("mailbox", "dns", "--config", str(config))
    assert found.exit_code == 0 and [line.split("  ") for line in found.stdout.splitlines()] == [
        ["b.example.", "MX", "10 mx.b.example."],
        ["_imaps._tcp.b.example.", "SRV", "0 1 993 mx.b.example."],
        ["_imap._tcp.b.example.", "SRV", "0 0 0 ."],
        ["_pop3s._tcp.b.example.", "SRV", "0 0 0 ."],
        ["_pop3._tcp.b.example.", "SRV", "0 0 0 ."],
        ["_submissions._tcp.b.example.", "SRV", "0 0 0 ."],
        ["_submission._tcp.b.example.", "SRV", "0 1 587 mx.b.example."],
        ["_sieve._tcp.b.example.", "SRV", "0 0 0 ."],
    ]
    found = call("mailbox", "dns", "x.c.example", "--json", "--config", str(config))
    assert json.loads(found.stdout.splitlines()[0]) == {"name": "x.c.example.", "kind": "MX", "value": "10 mx.b.example."}
    for spelled in ("B.example.", "b.EXAMPLE"):
        assert call("mailbox", "dns", spelled, "--config", str(config)).stdout.startswith("b.example.  MX  ")
    for wrong, reason in (("", "DOMAIN: it is empty"), ("a..b", "'a..b' is not a domain"), (".", "'.' is not a domain")):
        found = call("mailbox", "dns", wrong, "--config", str(config))
        assert (found.exit_code, reason in found.stderr) == (64, True)
    found = call("mailbox", "dns", "bb.example", "--config", str(config))
    assert found.exit_code == 69 and 'no route keeps mail for bb.example (did you mean "b.example"?)' in found.stderr


def test_records_of_a_domain_in_u_labels_are_as_zone_files_have_them(tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text(LISTENERS.replace('"b.example"', '"bücher.example"'))
    (tmp_path / "none.pem").touch()
    for words in ((), ("bücher.example",), ("xn--bcher-kva.example",)):
        found = call("mailbox", "dns", *words, "--config", str(config))
        assert found.exit_code == 0 and found.stdout.startswith("xn--bcher-kva.example.  MX  10 mx.b.example.\n")
        assert found.stdout.isascii()


def test_the_file_of_autoconfig_has_the_listeners(tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text(LISTENERS)
    (tmp_path / "none.pem").touch()
    found = call("mailbox", "dns", "--autoconfig", "--config", str(config))
    provider = ElementTree.fromstring(found.stdout).find("emailProvider")
    assert provider is not None and [one.text for one in provider.findall("domain")] == ["b.example"]
    servers = [(one.tag, one.attrib["type"], *(field.text for field in one)) for one in provider if one.tag != "domain"]
    name = "%EMAILADDRESS%", "password-cleartext"
    assert servers == [
        ("incomingServer", "imap", "mx.b.example", "993", "SSL", *name),
        ("outgoingServer", "smtp", "mx.b.example", "587", "STARTTLS", *name),
    ]


def test_records_of_a_configuration_that_is_wrong(tmp_path):
    config = tmp_path / "relay.toml"
    config.write_text("hostname = 3\n")
    found = call("mailbox", "dns", "--config", str(config))
    assert (found.exit_code, found.exception.__class__, f"{config}:1: hostname" in found.stderr) == (78, SystemExit, True)


NO_SUCH = [  # words, the beginning of the message
    (("message", "show", UNKNOWN), f"no such message in the queue: {UNKNOWN} (what happened to it:"),
    (("message", "raw", UNKNOWN), f"no such message in the queue: {UNKNOWN}\n"),
    (("message", "explain", UNKNOWN), f"no such message in the queue or in the history: {UNKNOWN}\n"),
    (("message", "history", UNKNOWN), f"no such message in the history: {UNKNOWN}\n"),
    *((("queue", verb, UNKNOWN), f"no such message in the queue: {UNKNOWN}\n") for verb in
      ("flush", "hold", "release", "delete", "bounce")),
    (("queue", "reroute", UNKNOWN, "--to", "smarthost"), f"no such message in the queue: {UNKNOWN}\n"),
    (("queue", "reroute", "--all", "--to", "smarthos"), 'no such route: smarthos (did you mean "smarthost"?)\n'),
    (("queue", "reroute", "--all", "--to", "x", "--dry-run"), "no such route: x\n"),
    (("queue", "list", "--route", "smarthos"), 'no such route: smarthos (did you mean "smarthost"?)\n'),
    (("queue", "list", "--route", "smarthos", "--json"), "no such route: smarthos"),
    (("queue", "hold", "--route", "x"), "no such route: x\n"),
    (("policy", "hold", "--route", "x"), "no such route: x\n"),
    (("policy", "bounce", "--route", "x", "--dry-run"), "no such route: x\n"),
    (("queue", "list", "--queue", "smarthos"), 'no such queue: smarthos (did you mean "smarthost"?) (`relaymta queue summary`'),
    (("queue", "flush", "--queue", "x"), "no such queue: x"),
    (("queue", "show", "x"), "no such queue: x (`relaymta queue summary` names"),
    (("queue", "list", "--site", "smarthos"), 'no such site: smarthos (did you mean "smarthost"?) (`relaymta site list` names'),
    (("queue", "bounce", "--site", "x"), "no such site: x"),
    (("site", "show", "x"), "no such site: x"),
    (("site", "limits", "x"), "no such site: x"),
    (("site", "resume", "x"), "no such site: x"),
    (("site", "resume", "--app", "x"), "no such suspension: --app x"),
    (("shaping", "why", "smarthos"), 'no such site: smarthos (did you mean "smarthost"?)'),
    (("shaping", "clear", "x"), "no such site: x"),
    (("policy", "remove", "hold", "application=x"), "no such policy: hold application=x (`relaymta policy list`"),
]  # fmt: skip
FOUND = [  # words that name what exists, or what may come: status 0
    ("queue", "list", "--route", "smarthost"), ("queue", "list", "--queue", "smarthost"),
    ("queue", "list", "--app", "x"), ("queue", "list", "--domain", "x.example"), ("queue", "list", "--from", "x@x"),
    ("queue", "list", "--site", "smarthost", "--domain", "x.example"), ("queue", "list", "--held"),
    ("queue", "release", "--user", "x"),
    ("site", "suspend", "later.example", "--for", "30m"), ("site", "resume", "later.example"), ("shaping", "clear", "--all"),
    ("queue", "show", "smarthost"), ("site", "show", "smarthost"), ("site", "limits", "smarthost"),
    ("shaping", "why", "smarthost"),
    ("shaping", "active"), ("shaping", "diff"), ("policy", "hold", "--app", "x", "--for", "1h"), ("policy", "list"),
    ("policy", "remove", "hold", "application=x"), ("status",), ("queue", "summary"), ("queue", "shape"), ("site", "list"),
    ("app", "usage"),
]  # fmt: skip
LISTS = {
    ("queue", "list"),
    ("queue", "summary"),
    ("site", "list"),
    ("shaping", "active"),
    ("policy", "list"),
    ("app", "usage"),
    ("shaping", "why"),
}


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    """With one deferred message to a smart host that is down."""
    folder = tmp_path_factory.mktemp("cli")
    with Relay(folder, f"127.0.0.1:{free_port()}", "delivery.first_retry=600") as relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "sender-with-a-long-name@department.company.example", *RECIPIENTS)
        wait_for(lambda: relay.events("deferred"))
        wait_for(lambda: json.loads(call("queue", "list", "--json", "--spool", str(relay.spool)).stdout)["state"] == "deferred")
        yield relay


RECIPIENTS = [f"recipient-{n}-with-a-long-name@another.company.example" for n in range(3)]


@pytest.mark.parametrize(("words", "message"), NO_SUCH, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_what_does_not_exist_is_named_and_the_status_is_1(relay, words, message):
    found = call(*words, "--spool", str(relay.spool))
    assert found.exit_code == 1 and found.stderr.startswith(message), found.stderr
    assert words[0] == "queue" or not found.stdout


def test_what_exists_or_may_come_is_accepted_and_json_is_an_object_a_line(relay):
    spool = ("--spool", str(relay.spool))
    for words in FOUND:
        found = call(*words, *spool)
        assert found.exit_code == 0, (words, found.stderr)
        options = {name for parameter in ALL[words[:2] if len(words) > 1 else words].params for name in parameter.opts}
        if "--json" not in options:
            continue
        lines = call(*words, "--json", *spool).stdout.splitlines()
        assert all(isinstance(json.loads(line), dict) for line in lines), words
        assert len(lines) == 1 or words[:2] in LISTS, words


@pytest.mark.parametrize("kind", ["route", "queue", "site"])
def test_a_dry_run_that_counts_nothing_says_what_does_not_exist(relay, kind):
    found = call("queue", "delete", f"--{kind}", "x", "--dry-run", "--json", "--spool", str(relay.spool))
    assert found.exit_code == 0 and json.loads(found.stdout)["matched"] == 0 and found.stderr.startswith(f"no such {kind}: x")


def test_a_folder_that_is_no_spool_is_no_empty_queue(tmp_path):
    for words in (("queue", "list"), ("queue", "summary"), ("queue", "list", "--json")):
        found = call(*words, "--spool", str(tmp_path))
        assert found.exit_code == 69 and found.stderr.startswith(f"{tmp_path} is no spool of relaymta") and not found.stdout


@pytest.mark.parametrize("words", [
    ("queue", "list"), ("queue", "list", "--json"), ("config", "describe"), ("site", "list"), ("shaping", "profiles"),
], ids=" ".join)  # fmt: skip
def test_output_that_cannot_be_written_ends_with_a_sentence(relay, words):
    command = [sys.executable, "-m", "relaymta", *words, "--spool", str(relay.spool)]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (74, "standard output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")


def test_a_configuration_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "r.toml").write_text("")
    real = os.open

    def refused(path, *args, **options):
        if str(path).endswith("r.toml"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr("relaymta.cli.options.os.open", refused)
    found = call("status", "-c", str(tmp_path / "r.toml"))
    assert (found.exit_code, found.stderr) == (74, f"{tmp_path}/r.toml: Permission denied\n")


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("queue", "--help"), ("config", "describe")])
def test_output_that_cannot_be_written_has_its_status(words):
    command = [sys.executable, "-m", "relaymta", *words]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (74, "standard output: No space left on device\n")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (closed.returncode, closed.stderr) == (74, "standard output: Bad file descriptor\n")


def test_an_error_message_that_cannot_be_written_changes_no_status(tmp_path):
    command = [sys.executable, "-m", "relaymta", "status", "--spool", str(tmp_path / "none")]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stderr=full, check=False).returncode == 69
    assert subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], check=False).returncode == 69


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_may_not_be_read_is_neither_missing_nor_empty(tmp_path):
    """A folder that may not be entered, as another user; and a spool that may not be listed."""
    tmp_path.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "accounts.toml").write_text("")
    spool = tmp_path / "spool"
    (spool / "shard-0").mkdir(parents=True)
    (spool / "secret").write_text("x")
    spool.chmod(0o711)

    def become() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    def as_nobody(*words: str) -> tuple[int, str]:
        process = os.fork()
        if process:
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), (tmp_path / "said").read_text()
        status = 99
        with open(tmp_path / "said", "w") as said:
            os.dup2(said.fileno(), 2)
            try:
                become()
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 # until the process ends
                main.main(list(words), standalone_mode=True)
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            finally:
                sys.stderr.flush()
                os._exit(status)

    settings = ("--set", f"accounts.file={closed}/accounts.toml")
    assert as_nobody("user", "list", *settings) == (74, f"{closed}/accounts.toml: Permission denied\n")
    assert as_nobody("status", "-c", f"{closed}/r.toml") == (74, f"{closed}/r.toml: Permission denied\n")
    status, said = as_nobody("queue", "list", "--spool", str(spool))
    assert status == 77 and "Permission denied" in said


def test_a_decision_about_a_site_that_is_not_known_is_taken_with_a_note(relay):
    found = call("site", "suspend", "smarthos", "--spool", str(relay.spool))
    assert (
        found.exit_code == 0
        and found.stderr == 'note: no site smarthos has mail or connections now (did you mean "smarthost"?)\n'
    )
    assert "smarthos is resumed" in call("site", "resume", "smarthos", "--spool", str(relay.spool)).stdout


def test_deferred_mail_is_called_deferred_and_is_one_line_in_a_pipe(relay):
    (line,) = call("queue", "list", "--spool", str(relay.spool)).stdout.splitlines()
    assert re.match(r"[0-9A-Z]{13}  deferred +[0-9]+ B +\S+( ago)?  next (now|in \S+) +<sender-with", line)
    assert f"-> <{RECIPIENTS[0]}> +2  " in line and "Connection refused" in line
    ident = line[:13]
    assert f"{ident}  deferred" in call("message", "show", ident, "--spool", str(relay.spool)).stdout
    assert f"{ident}  deferred" in call("message", "explain", ident, "--spool", str(relay.spool)).stdout


# Lists


@pytest.mark.parametrize("words", [
    ("queue", "list"), ("queue", "summary"), ("queue", "shape"), ("site", "list"), ("shaping", "active"), ("message", "history"),
    ("policy", "list"),
], ids=" ".join)  # fmt: skip
def test_a_list_fits_the_terminal(relay, words):
    spool = ("--spool", str(relay.spool))
    call("policy", "hold", "--from", "somebody-with-a-long-name@department.company.example", "--reason", "a reason " * 20, *spool)
    call("site", "suspend", "a-site-with-a-long-name.another.company.example", "--reason", "a reason " * 20, *spool)
    ident = (relay.events("queued")[0]["id"],) if words[0] == "message" else ()
    piped = call(*words, *ident, *spool).stdout
    for columns in (80, 200):
        command = [sys.executable, "-m", "relaymta", *words, *ident, *spool]
        shown = on_a_terminal(command, columns)
        assert shown and max(map(len, shown.splitlines())) <= columns, shown
    assert len(piped.splitlines()) <= len(shown.splitlines())


def on_a_terminal(command: list[str], columns: int) -> str:
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, env=environment)
    os.close(follower)
    written = b""
    while True:
        try:
            written += (piece := os.read(leader, 65536))
        except OSError:
            break
        if not piece:
            break
    os.close(leader)
    assert process.wait(60) == 0
    return written.decode().replace("\r\n", "\n")


WIDE = "x" * 100


@pytest.mark.parametrize(("columns", "rows", "lines"), [
    (0, [["a", "1", WIDE]], ["name  count  what", f"a         1  {WIDE}"]),
    (48, [["a", "1", "one two three four five six seven eight"]],
     ["name  count  what", "a         1  one two three four five six seven", "             eight"]),
    (40, [["a" * 20, "1", "one two three four five six seven eight nine ten"], ["b", "2", ""]],
     ["name                  count", "aaaaaaaaaaaaaaaaaaaa      1", "  one two three four five six seven", "  eight nine ten",
      "b                         2"]),
    (40, [[WIDE, "1", "short"], ["b", "22", "-"]],
     ["name                    count  what", "x" * 23 + "...  1  short", "b                          22  -"]),
    (40, [["你" * 20, "1", "x" * 12]], ["name            count  what", "你你你你你你你你...      1  xxxxxxxxxxxx"]),
])  # fmt: skip
def test_a_table(columns, rows, lines, monkeypatch, capsys):
    monkeypatch.setattr(console, "width", lambda: columns)
    console.table("", ["name", "count", "what"], rows)
    shown = capsys.readouterr().out.splitlines()
    assert all(console._columns_of(line) <= (columns or 1000) for line in shown)
    assert [re.sub(" +", " ", line) for line in shown] == [re.sub(" +", " ", line) for line in lines]


@pytest.mark.parametrize(("columns", "parts", "lines"), [
    (0, ["a", "", WIDE, "c"], [f"a  {WIDE}  c"]),
    (40, ["a", "b", ""], ["a  b"]),
    (40, ["a b", "x" * 30, "y" * 50], ["a b", "  " + "x" * 30, "  " + "y" * 38, "  " + "y" * 12]),
])  # fmt: skip
def test_a_record(columns, parts, lines, monkeypatch, capsys):
    monkeypatch.setattr(console, "width", lambda: columns)
    console.record(*parts)
    assert capsys.readouterr().out.splitlines() == lines


NOW = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


@pytest.mark.parametrize(("ahead", "shown", "end", "next_attempt"), [
    (-NOW, "-", "until -", "-"), (0, "now", "until now", "now"), (-0.4, "now", "until now", "now"),
    (45, "in 45s", "until 08:00:45Z (in 45s)", "in 45s"), (-59.9, "59s ago", "until 59s ago", "now"),
    (200, "in 3m20s", "until 08:03:20Z (in 3m20s)", "in 3m20s"), (-7199, "119m59s ago", "until 119m59s ago", "now"),
    (7200, "2027-01-15 10:00:00Z", "until 2027-01-15 10:00:00Z", "2027-01-15 10:00:00Z"),
    (-86400, "2027-01-14 08:00:00Z", "until 2027-01-14 08:00:00Z", "now"),
])  # fmt: skip
def test_times(ahead, shown, end, next_attempt, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: NOW)
    assert (peer.when(NOW + ahead), peer.until(NOW + ahead), peer.due(NOW + ahead)) == (shown, end, next_attempt)


def test_a_suspended_site_is_called_that(relay):
    spool = ("--spool", str(relay.spool))
    call("site", "suspend", "smarthost", "--for", "30m", "--reason", "maintenance", *spool)
    try:
        (row,) = [json.loads(line) for line in call("site", "list", "--json", *spool).stdout.splitlines()]
        assert (row["state"], row["reason"]) == ("suspended", "maintenance") and row["until"] > time.time() + 1500
        assert call("site", "show", "smarthost", *spool).stdout.startswith("smarthost: suspended until ")
        assert re.search(r"^smarthost +suspended .* maintenance$", call("site", "list", *spool).stdout, re.M)
        ident = relay.events("queued")[0]["id"]
        explained = call("message", "explain", ident, *spool).stdout
        assert re.search(r"^  smarthost is suspended by operator: maintenance, until \S+Z \(in 29m5\ds\)$", explained, re.M)
        assert ": deferred at connect" in explained
    finally:
        call("site", "resume", "smarthost", *spool)


def test_a_policy_says_when_it_ends(relay):
    spool = ("--spool", str(relay.spool))
    made = call("policy", "hold", "--domain", "none.example", "--for", "1h", *spool)
    assert made.exit_code == 0 and re.match(
        r"mail with recipient_domain=none.example is held until \S+Z \(in 59m5\ds\); 0 q", made.stdout
    )
    assert call("policy", "hold", "--domain", "none.example", "--until", "12:00", *spool).exit_code == 0
    assert call("policy", "remove", "hold", "recipient_domain=none.example", *spool).exit_code == 0


# Imports

IMPORTED = """
import sys
from relaymta.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
except SystemExit as end:
    assert end.code in (0, 1, 69), end.code
print(*sys.modules, file=sys.stderr)
"""
# The same in a fork for each line that comes, which has a file for the output (and another one has the input) and the words: an
# interpreter that starts takes longer than most verbs. What it has imported itself is what --help imports.
FORKS = f"""
import os, sys
import relaymta.cli, relaymta.cli.console, relaymta.cli.options
for line in os.fdopen(os.dup(0), "rb"):
    out, *words = line.rstrip(b"\\n").decode().split("\\0")
    if not (child := os.fork()):
        for number, name in enumerate([out + ".in", os.devnull, out]):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.argv = ["-c", *words]
        exec({IMPORTED!r}, {{"__name__": "__main__"}})
        sys.stderr.flush()
        os._exit(0)
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
HEAVY = {
    "asyncio", "pydantic", "cryptography", "uvloop", "lmdb", "rich", "dkim", "spf", "aiosmtplib", "aiohttp", "joserfc", "argon2",
    "scramp", "aiodns", "email", "mailbox", "dmarc", "publicsuffixlist", "nacl", "prometheus_client", "idna",
}  # fmt: skip
CONFIG = {"pydantic", "email"}
DNS = CONFIG | {"asyncio", "aiodns", "idna"}
SECRETS = CONFIG | {"asyncio", "scramp", "argon2"}
NEEDS = {  # what a verb may import beside the light; all others: nothing of HEAVY
    ("app", "create"): SECRETS | {"cryptography"}, ("app", "rotate"): SECRETS, ("user", "add"): SECRETS,
    ("user", "password"): SECRETS, ("app", "expire"): CONFIG, ("app", "remove"): CONFIG, ("app", "list"): CONFIG,
    ("user", "remove"): CONFIG, ("user", "list"): CONFIG, ("config", "show"): CONFIG, ("config", "describe"): CONFIG,
    ("dkim", "keygen"): CONFIG | {"asyncio", "cryptography", "idna"}, ("dkim", "check"): DNS, ("route", "test"): DNS,
    **{("mailbox", verb): {"lmdb", "asyncio", "email"} for verb in ("list", "show", "backup", "verify", "export", "import")},
    ("fsck",): CONFIG | {"lmdb", "asyncio", "idna", "aiodns"},
    ("queue", "snapshot"): {"lmdb", "asyncio", "email"}, ("mailbox", "history"): CONFIG | {"lmdb", "asyncio"},
    **{("sieve", verb): {"lmdb", "asyncio", "email"} for verb in ("list", "get")},
    ("shaping", "diff"): CONFIG | {"lmdb"}, ("shaping", "profiles"): CONFIG, ("logs", "tail"): CONFIG,
    ("import", "postfix"): CONFIG,
    **{("token", verb): CONFIG for verb in ("create", "list", "revoke")},
}  # fmt: skip
SLOW = {
    ("bench", "account"),
    ("bench", "sink"),
    ("manual",),
    ("serve",),
    ("sink",),
    ("upgrade",),
    ("config", "check"),
    ("doctor", "domain"),
    ("init",),
    ("dkim", "rotate"),
    ("mailbox", "restore"),
    ("mailbox", "dns"),
    ("filter", "check"),
    ("filter", "learn"),
    ("filter", "test"),
    ("quarantine", "learn"),
    ("rule", "test"),
    ("policy", "test"),
    ("top",),
    ("trace", "in"),
    ("trace", "out"),
}  # serve for ever, or do all there is


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-P", "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


QUICK = [path for path in ALL if path not in SLOW]


@pytest.mark.parametrize(
    "path", [one for at, path in enumerate(QUICK) for one in ([path] if at % 3 == 0 else in_prove((path,)))], ids=" ".join
)
def test_a_verb_imports_only_what_it_needs(path, relay, forks, tmp_path):
    """Each call starts an interpreter: what the daemon answers takes no more than a socket."""
    words = [*path, *ARGUMENTS.get(path, []), "--spool", str(relay.spool)]
    if path[0] in ("app", "user") and path != ("app", "usage"):
        words += ["--set", f"accounts.file={tmp_path}/accounts.toml"]
    words = [str(tmp_path / "k") if word == "k" else word for word in words]
    if path[0] in ("queue", "policy"):
        words += ["--dry-run"] if path[1] in ("flush", "hold", "release", "delete", "bounce") else []
    if path == ("config", "show"):
        words += ["--set", 'listener=[{address="127.0.0.1:1"}]']
    said = tmp_path / "said"
    said.with_suffix(".in").write_text("a password\n")
    forks.stdin.write("\0".join([str(said), *words]).encode() + b"\n")
    forks.stdin.flush()
    status = int(forks.stdout.readline())
    assert status == 0, said.read_text()
    assert HEAVY & {name.partition(".")[0] for name in said.read_text().split()} <= NEEDS.get(path, set())


@pytest.mark.parametrize("words", [("--help",), ("--version",)])
def test_the_help_of_all_verbs_imports_none(words):
    done = subprocess.run([sys.executable, "-P", "-c", IMPORTED, *words], capture_output=True, text=True, check=True)
    modules = {name for name in done.stderr.split() if name.startswith("relaymta.cli.")}
    assert modules == {"relaymta.cli.console", "relaymta.cli.options"} and not HEAVY & set(done.stderr.split())


def test_the_line_of_a_verb_is_the_beginning_of_its_help():
    shown = call("--help").stdout
    for name, verb in VERBS.items():
        command = getattr(import_module(f"relaymta.cli.{verb.module}"), verb.command or name)
        assert " ".join(command.help.split()).startswith(verb.line.rstrip(".")), name
        assert command.hidden == (not verb.line)
        assert (f"  {name} " in shown) == bool(verb.line)


# Words


def _messages() -> list[tuple[str, str]]:
    """Texts of the program: (file, text). Not docstrings, and not names of one word."""
    found = []
    for path in sorted((ROOT / "relaymta").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs and " " in node.value:
                found.append((f"{path.name}:{node.lineno}", node.value))
    return found


def test_nobody_uses_the_words_that_are_not_used_any_more():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    used, _, unused = glossary.partition("## Words that are not used any more")
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", unused, re.M)
    words = [word for row in rows if row not in ("word", "---") for word in row.split(", ")]
    assert {"stranger", "notice", "door"} <= set(words)
    expression = re.compile(rf"\b({'|'.join(map(re.escape, words))})s?\b", re.I)
    pages = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "HACKING.md", "grafana/README.md", "config/relaymta.toml")]
    texts = [(path.name, path.read_text(encoding="utf-8")) for path in [*pages, *sorted((ROOT / "docs").glob("*.md"))]
             if path.name != "glossary.md"]  # fmt: skip
    texts += [("glossary.md", used), *((" ".join(path), call(*path, "--help").output) for path in ALL), *_messages()]
    quoted = re.compile(r"`[^`]*`|'\w+'|(?<=that )notices|notices(?= that)")  # names, and the verb
    found = [(name, match[0]) for name, text in texts if (match := expression.search(quoted.sub("", text)))]
    assert not found


def test_the_licence_is_there_and_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0 AND 0BSD", "ours, and that of htmx"
    assert project["license-files"] == ["LICENSE", "relaymta/api/static/NOTICE"]
    assert all((ROOT / name).is_file() for name in project["license-files"])
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert f"[{'0.2.0'}]" in (ROOT / "CHANGELOG.md").read_text()


# Files for operators, and the program


def test_the_assets_are_written_and_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "a"
    first = call("assets", str(folder))
    assert first.exit_code == 0 and f"{folder}/grafana/relaymta.json" in first.stdout.splitlines()
    assert call("assets", str(folder)).exit_code == 0  # the same
    (folder / "config/relaymta.toml").write_text("mine")
    refused = call("assets", str(folder))
    assert refused.exit_code == 73 and refused.stderr.startswith(f"{folder}/config/relaymta.toml exists and is different")
    assert (folder / "config/relaymta.toml").read_text() == "mine"
    assert call("assets", "--force", str(folder)).exit_code == 0
    assert (folder / "config/relaymta.toml").read_text() == describe()
    assert call("assets", "/dev/null/a").exit_code == 73


@pytest.mark.parametrize(("path", "options", "state"), [
    ("/usr/bin/python3.11", "--enable-shared", "ok"),
    ("/opt/python/bin/python3.11", "'--enable-optimizations' '--with-lto'", "ok"),
    ("/opt/python/bin/python3.11", "'--enable-shared'", "warning"), ("/opt/python/bin/python3.11", None, "warning"),
])  # fmt: skip
def test_the_doctor_says_which_interpreter_runs(path, options, state, monkeypatch):
    monkeypatch.setattr(sys, "executable", path)
    monkeypatch.setattr(sysconfig, "get_config_var", {"CONFIG_ARGS": options}.get)
    done = call("doctor", "--json")
    rows = {row["check"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.exit_code == 0 and rows["interpreter"]["state"] == state and path in rows["interpreter"]["found"]
    assert rows["kernels"]["state"] == "ok"
    monkeypatch.setenv("RELAYMTA_INTERPRETED", "1")
    assert call("doctor").exit_code == 1
    assert call("doctor", "--json", "domain", "d.example").exit_code == 64


# The sink


class Nowhere(asyncio.Transport):
    """The transport of a client; what is written to it."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


def deliver(one: sink.Sink) -> bytes:
    transport = Nowhere()
    one.connection_made(transport)
    for text in (b"EHLO x\r\n", b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\nDATA\r\n", DATA + b".\r\n"):
        one.data_received(text)
    return transport.written


DATA = b"Subject: hello\r\n\r\nFrom here\r\n\r\nto \xff there\r\n"


def test_the_sink_shows_messages(capsysbinary):
    assert b"250 2.0.0 Accepted by the sink as number " in deliver(sink.Sink(show=True))
    shown = capsysbinary.readouterr().out
    assert re.match(rb"sink: \d+: <a@b.example> -> <c@d, e@f> 43 octets, Subject: hello\n", shown)
    assert shown.endswith(b"Subject: hello\n" + DATA + b"\n"), "unchanged into a pipe"
    deliver(sink.Sink())
    assert b"From here" not in capsysbinary.readouterr().out


def test_the_sink_saves_messages_in_a_maildir(tmp_path, monkeypatch, capsys):
    folder, moved, link = tmp_path / "new folder" / "mail", [], os.link

    def moving(source: str, target: str) -> None:
        moved.append((Path(source).parent.name, Path(target).parent.name, Path(source).read_bytes()))
        link(source, target)

    monkeypatch.setattr(os, "link", moving)
    monkeypatch.setattr(sink.Sink, "count", 0)
    one = sink.Sink(save=sink.Maildir(folder))
    assert b"number 1\r\n" in deliver(one)
    assert b"number 2\r\n" in deliver(one)
    expected = b"Return-Path: <a@b.example>\nDelivered-To: c@d\nDelivered-To: e@f\n" + DATA.replace(b"\r\n", b"\n")
    files = sorted((folder / "new").iterdir())
    assert [path.read_bytes() for path in files] == [expected] * 2
    assert not [*(folder / "tmp").iterdir(), *(folder / "cur").iterdir()]
    assert moved == [("tmp", "new", expected)] * 2
    assert {str(message["Subject"]) for message in mailbox.Maildir(folder, create=False)} == {"hello"}
    capsys.readouterr()
    (folder / "tmp").rmdir()
    assert b"451 4.3.0 The sink could not save the message\r\n" in deliver(one)
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("sink: not saved: ") and len(list((folder / "new").iterdir())) == 2


def test_a_maildir_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    found = call("sink", "--maildir", "file/mail")
    assert found.exit_code == 73 and found.stderr.startswith(f"--maildir {tmp_path}/file") and "Not a directory" in found.stderr
    assert call("sink", "--listen", "x").exit_code == 64


# Applications


def test_an_application_is_removed_with_its_keys_and_nothing_else(tmp_path):
    path = tmp_path / "accounts.toml"
    settings = ["--set", f"accounts.file={path}"]
    for name in ("shop", "news"):
        assert call("app", "create", name, *settings).exit_code == 0
    assert call("user", "add", "ann", "--password", "x", *settings).exit_code == 0
    assert call("app", "rotate", "shop", *settings).exit_code == 0
    key = ["--set", 'dkim=[{domain="shop.example", selector="s1", key="/k", application=["shop"]}]']
    found = call("app", "remove", "shop", *settings, *key)
    assert found.exit_code == 0 and "s1._domainkey.shop.example" in found.stdout and "queue list --app shop" in found.stdout
    rows = [json.loads(line) for line in call("app", "list", "--json", *settings).stdout.splitlines()]
    assert [row["name"] for row in rows] == ["news", "ann"]
    assert call("app", "remove", "shop", *settings).stderr == "no such application: shop\n"
    assert "_domainkey" not in call("app", "remove", "news", *settings, *key).stdout


def test_what_is_shown_once_is_an_object_too(tmp_path):
    settings = ["--set", f"accounts.file={tmp_path}/accounts.toml"]
    (made,) = call("app", "create", "shop", "--sender", "@shop.example", "--json", *settings).stdout.splitlines()
    assert (
        json.loads(made)["user"] == "shop"
        and len(json.loads(made)["secret"]) == 32
        and any("v=spf1" in line for line in json.loads(made)["dns"])
    )
    (made,) = call("app", "rotate", "shop", "--overlap", "1h", "--json", *settings).stdout.splitlines()
    assert 3500 < json.loads(made)["old keys expire"] - time.time() <= 3600
    out = str(tmp_path / "key.pem")
    (made,) = call("dkim", "keygen", "shop.example", "--selector", "s1", "--out", out, "--json").stdout.splitlines()
    assert json.loads(made)["name"] == "s1._domainkey.shop.example" and json.loads(made)["key"] == out
    assert json.loads(made)["value"].startswith("v=DKIM1; k=rsa; p=")


def test_times_of_accounts_are_seconds(tmp_path):
    settings = ["--set", f"accounts.file={tmp_path}/accounts.toml"]
    call("app", "create", "shop", *settings)
    call("app", "rotate", "shop", "--overlap", "1h", *settings)
    (row,) = [json.loads(line) for line in call("user", "list", "--json", *settings).stdout.splitlines()]
    assert row["secrets"][0]["expires"] == 0 and 3500 < row["secrets"][1]["expires"] - time.time() <= 3600
    assert "SCRAM-SHA-256 (expires in " in call("app", "list", *settings).stdout
    call("app", "expire", "shop", *settings)
    assert "SCRAM-SHA-256 (expired " in call("app", "list", *settings).stdout


def test_the_table_for_a_key_names_its_file_however_that_is_called(tmp_path):
    path = tmp_path / 'my "key" \\ ☃.pem'
    found = call("dkim", "keygen", "shop.example", "--selector", "s1", "--type", "ed25519", "--out", str(path))
    (table,) = tomllib.loads(found.stdout.partition("\n\n")[2])["dkim"]
    assert table == {"domain": "shop.example", "selector": "s1", "key": str(path)} and path.exists()
    found = call("dkim", "keygen", "shop.example", "--selector", "s1", "--out", f"{tmp_path}/\udcff")
    assert (found.exit_code, found.stderr) == (64, "--out: the path is not UTF-8, so no configuration could name it\n")
