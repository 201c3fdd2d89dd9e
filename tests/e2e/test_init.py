"""`relaymta init` as README has it, with a smart host that wants TLS and a login, up to the test message; and what fails."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dkim
import pytest
import trustme
from click.testing import CliRunner, Result

from relaymta.cli import main, setup, trial
from relaymta.config import load
from relaymta.errors import RelayError
from tests.e2e.test_privileges import root_only, runs_as_nobody
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.pages import blocks, section
from tests.support.resolver import nameserver_with
from tests.support.routed import server_context
from tests.support.terminal import Terminal

PASSWORD = 'se"cr\\et ☃'
HOST = "mail.example.net:587"


@pytest.fixture(scope="module")
def authority() -> Iterator[trustme.CA]:
    """The CA of smart hosts."""
    yield trustme.CA()


@pytest.fixture
def ca_file(tmp_path: Path, authority: trustme.CA) -> Path:
    """Its certificate, in a file that all may read."""
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    path.chmod(0o644)
    return path


def smart_host(authority: trustme.CA, **rules: Any) -> FakeMx:
    """It offers STARTTLS, and after that AUTH for the user `me`."""

    def answer(line: bytes) -> bytes:
        good = base64.b64decode(line.split()[2]).decode() == f"\0me\0{PASSWORD}"
        return b"235 2.7.0 welcome\r\n" if good else b"535 5.7.8 Bad credentials\r\n"

    return FakeMx({"DOT": b"250 2.0.0 ok\r\n", **rules}, tls=server_context(authority), auth=(b"PLAIN", answer))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder that others may enter."""
    with tempfile.TemporaryDirectory(prefix="relaymta-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "relaymta.toml"


def call(*words: str, text: str | None = None) -> Result:
    found = CliRunner().invoke(main, ("init", *words), input=text)
    assert found.exception is None or isinstance(found.exception, SystemExit), (words, found.exception)
    return found


def options_for(peer: FakeMx, path: Path, ca_file: Path, *more: str) -> tuple[str, ...]:
    return (
        "--smarthost", f"localhost:{peer.port}", "--username", "me", "--password-stdin", "--domain", "example.org", "--hostname",
        "mail.example.org", "--ca-file", str(ca_file), "--listen", f"127.0.0.1:{free_port()}", "--set", "metrics.listen=off",
        "-c", str(path), *more,
    )  # fmt: skip


# README


@pytest.mark.skipif(os.path.exists("/var/lib/relaymta/control.sock"), reason="a relay runs here, which would be used")
def test_the_commands_of_readme(tmp_path, path, authority, ca_file):
    (first, unattended, said, after) = blocks(section("../README.md", "Run it"))[:4]
    (tmp_path / "tmp").mkdir(0o755)
    (tmp_path / "password.txt").write_text(PASSWORD + "\n")
    with smart_host(authority) as peer:
        here = f"localhost:{peer.port}"
        answer_the_questions(shlex.split(first.replace(HOST, here)), tmp_path / "asked" / "relaymta.toml", ca_file)
        assert peer.credentials == [] and "AUTH" in peer.commands and not peer.messages, "--to was left empty"
        program = f"#!{sys.executable}\nfrom relaymta.cli import main\nmain()\n"
        (tmp_path / "relaymta").write_text(program)
        (tmp_path / "relaymta").chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "RELAYMTA_CONFIG": str(path), "SSL_CERT_FILE": str(ca_file),
            "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path / "tmp"),
        }  # fmt: skip
        done = run(unattended.replace(HOST, here), tmp_path, environment)
        line = said.replace("mail.example.net [192.0.2.1]:587", f"localhost [127.0.0.1]:{peer.port}")
        assert done.returncode == 0 and line in done.stdout, done
        ((sender, recipients, message),) = peer.messages
    assert (sender, recipients) == ("postmaster@example.org", ["you@example.net"])
    record = re.search(r"^  (relay1\._domainkey\.example\.org)\. TXT (.*)$", done.stdout, re.M)
    assert record is not None
    texts = {record[1].encode() + b".": "".join(re.findall('"([^"]*)"', record[2])).encode()}
    assert dkim.verify(message, dnsfunc=lambda name, timeout=5: texts.get(name)), "signed, as the printed record has it"
    check, serve, _ = after.splitlines()
    assert run(check, tmp_path, environment).stdout.endswith("the configuration is valid\n")
    assert serve.split(" #")[0].strip() + f" -c {path}" in done.stdout
    assert load(path, {}).relay.networks[-1] == "10.0.0.0/8" and not [*(tmp_path / "tmp").iterdir()]


def run(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=90
    )


def answer_the_questions(words: list[str], path: Path, ca_file: Path) -> None:
    with Terminal(words[1:], RELAYMTA_CONFIG=str(path), SSL_CERT_FILE=str(ca_file)) as terminal:
        terminal.answer("User name there", "me")
        terminal.answer("Password of me", "wrong")
        terminal.answer("Domain of your mail", "example.org")
        for question in ("Full name of this host", "Networks of clients", "Addresses to accept mail on", "Send a test message"):
            terminal.answer(question, "")
        terminal.await_text("535 5.7.8 Bad credentials")
        terminal.answer("or quit", "change")
        for question, text in (("Smart host", ""), ("User name", ""), ("TLS there", ""), ("Password", PASSWORD)):
            terminal.answer(question, text)
        terminal.await_text("TLSv1.3, logged in as me")
        terminal.answer("Write ", "y")
        assert terminal.end() == 0 and PASSWORD not in terminal.shown and "wrong" not in terminal.shown


# What fails


def test_a_wrong_password_is_said_before_anything_is_written(path, authority, ca_file):
    with smart_host(authority) as peer:
        words = options_for(peer, path, ca_file, "--to", "you@example.net")
        found = call(*words, text="hunter2")
        assert (found.exit_code, found.stdout) == (1, "") and not path.parent.exists() and "hunter2" not in found.stderr
        file = path.parent / "smarthost.password"
        assert found.stderr.splitlines() == [
            f"localhost:{peer.port}: 535 5.7.8 Bad credentials (user me, with the password of password_file {file})",
            "cure: correct the user name and the password; where a provider wants a password for applications, use that",
            "nothing is written; --no-connect writes the files without a connection",
        ]  # fmt: skip
        row = json.loads(call(*words, "--json", text="hunter2").stdout)
        assert row["files"] == [] and row["hosts"][0]["failure"].startswith("535 5.7.8") and not peer.messages


def test_each_failure_of_a_host_is_named_with_its_cure(tmp_path, path, authority, ca_file):
    """Without a relay: TLS that is not offered or not trusted, nobody there, no such name; MX hosts."""
    server = server_context(trustme.CA())
    words = ("--domain", "example.org", "--hostname", "mail.example.org", "--listen", "127.0.0.1:2525", "-c", str(path))
    with ExitStack() as stack:
        zone = ["d.test. MX 10 mx.d.test.", "mx.d.test. A 127.0.0.1", "e.test. MX 0 ."]
        dns = stack.enter_context(nameserver_with(tmp_path, zone))
        plain, other, good = (stack.enter_context(peer) for peer in (FakeMx({}), FakeMx({}, tls=server), smart_host(authority)))
        own_dns = ("--set", f'delivery.nameservers=["{dns}"]')
        rows = [
            ((f"localhost:{plain.port}",), "does not offer STARTTLS", "also --tls may"),
            ((f"localhost:{other.port}",), "the issuer of its certificate is not trusted", "--ca-file"),
            ((f"localhost:{free_port()}",), "Connect call failed", "nothing listens there"),
            (("none.d.test", *own_dns), "its name could not be looked up: it does not exist", "correct the name"),
        ]
        for (host, *more), failure, cure in rows:
            found = call("--smarthost", f"localhost:{good.port}", "--smarthost", host, *more, *words, "--ca-file", str(ca_file))
            assert found.exit_code == 1 and failure in found.stderr and cure in found.stderr, found.stderr
            assert not path.parent.exists() and f"localhost [127.0.0.1]:{good.port}: TLSv1.3\n" in found.stdout
        for to, failure in (("a@none.test", "none.test does not exist"), ("a@e.test", "e.test accepts no mail")):
            found = call("--direct", *words, *own_dns, "--to", to)
            assert found.exit_code == 1 and failure in found.stderr and f"cure: correct {to}" in found.stderr, found.stderr
        direct = {"listener": [{"address": "127.0.0.1:2525"}], "delivery": {"nameservers": [dns], "port": plain.port}}
        (row,) = trial.reach(load(None, direct), "a@d.test")
        assert (row["host"], row["address"], row["port"], row["failure"]) == ("mx.d.test", "127.0.0.1", plain.port, "")


def test_a_relay_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "relaymta.toml"
    path.write_text('[[listener]]\naddress = "127.0.0.1:1"\n')
    config = load(path, {})
    path.write_text('[[dkim]]\ndomain = "d.example"\nselector = "s"\nkey = "/nonexistent"\n')
    with pytest.raises(RelayError, match=r"the relay does not start: .*relaymta.toml.*/nonexistent"), trial.started(config, path):
        raise AssertionError
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives folders away")
def test_root_writes_nothing_in_a_folder_of_the_relays_user(tmp_path, monkeypatch):
    """Who has that user's rights puts links there, as soon as the folder is that user's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    path, precious = tmp_path / "relaymta.toml", tmp_path / "precious"
    path.write_text('user = "nobody"\nnonsense = 1\n')
    precious.write_text("precious")
    given = os.chown

    def chown(folder: Path, *owner: int) -> None:
        given(folder, *owner)
        for name in ("said", "log", "spool"):
            (folder / name).symlink_to(precious)

    monkeypatch.setattr(os, "chown", chown)
    config = load(None, {"user": "nobody", "listener": [{"address": "127.0.0.1:1"}]})
    with pytest.raises(RelayError, match="nonsense: no such key"), trial.started(config, path):
        raise AssertionError
    assert precious.read_text() == "precious"


# A relay that runs


class Written(Relay):
    """A relay with a configuration that `init` has written."""

    def __init__(self, folder: Path, path: Path) -> None:
        super().__init__(folder, None)
        self.path = path

    def command(self) -> list[str]:
        options = ("-c", str(self.path), "--set", f"log.file={self.log}", "--set", "intake.shed_lag=0")
        return [self.python, "-m", "relaymta", "serve", "--workers", "1", *options]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`relaymta config check`, a process of its own, is not started."""
    monkeypatch.setattr(setup.Setup, "check", lambda self: None)
    yield


def test_a_relay_that_runs_reads_the_new_configuration_and_sends_the_message(tmp_path, path, authority, ca_file, unchecked):
    """Then messages that the host refuses, for good and for now: status 1, the reply, and the cure."""
    later = {"bob@later.test": b"450 4.7.1 Greylisted\r\n", "bob@not.test": b"550 5.7.1 Sender is not yours\r\n"}
    with smart_host(authority) as one, smart_host(authority, RCPT=later) as two:
        before = options_for(one, path, ca_file, "--no-connect", "--spool", str(tmp_path / "spool"))
        assert call(*before, text=PASSWORD).exit_code == 0
        with Written(tmp_path, path) as relay:
            again = list(before)
            again[1] = f"localhost:{two.port}"
            again.remove("--no-connect")
            again += ["--force"]
            found = call(*again, "--to", "bob@d.test", "--json", text=PASSWORD)
            row = json.loads(found.stdout)
            assert found.exit_code == 0 and row["test"]["state"] == "delivered", found.output
            assert (row["test"]["port"], row["test"]["tls"], row["test"]["login"]) == (two.port, "TLSv1.3", "me")
            assert wait_for(lambda: relay.events("delivered"))[0]["id"] == row["test"]["id"] and not one.messages
            assert "relaymta serve" not in " ".join(row["next"])
            found = call(*again, "--to", "bob@not.test", text=PASSWORD)
            assert found.exit_code == 1 and "refused for good by localhost: 550 5.7.1 Sender is not yours\ncure: " in found.stdout
            assert "give one with --from" in found.stdout
            found = call(*again, "--to", "bob@later.test", text=PASSWORD)
            assert found.exit_code == 1 and "refused for now by localhost: 450 4.7.1 Greylisted\ncure: " in found.stdout
            assert re.search(r"note: `relaymta message explain \w{13}` says more\n", found.stdout)
            moved = [word if word != again[again.index("--listen") + 1] else f"127.0.0.1:{free_port()}" for word in again]
            found = call(*moved, "--to", "bob@d.test", text=PASSWORD)
            assert found.exit_code == 0 and "note: the relay that runs needs a restart; it listens on" in found.stdout
            assert "  stop the relay that runs, and start it again\n" in found.stdout
            assert len(relay.events("queued")) == len(relay.events("bounced")) + 3, "the last one has gone through another relay"


@root_only
@pytest.mark.skipif(not runs_as_nobody(sys.executable), reason="the user nobody cannot execute this interpreter")
def test_root_sets_up_a_relay_of_another_user(tmp_path, path, authority, ca_file):
    """What is written is readable for that user, who sends the message."""
    with smart_host(authority) as peer:
        words = options_for(peer, path, ca_file, "--to", "you@example.net", "--user", "nobody", "--json")
        found = call(*words, "--spool", str(tmp_path / "spool"), text=PASSWORD)
        assert found.exit_code == 0, found.output
        row = json.loads(found.stdout)
        assert row["test"]["state"] == "delivered" and len(peer.messages) == 1
        assert [file["owner"] for file in row["files"]] == ["nobody", "nobody", "root:nobody"]
