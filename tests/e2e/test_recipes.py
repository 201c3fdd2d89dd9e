"""docs/filter-recipes.md and the session of docs/filters.md: tables and commands as they are written, with the real programs."""

import contextlib
import os
import shutil
import smtplib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import dkim
import pytest

from tests.e2e.test_envelope_filters import OUTSIDE, client, said
from tests.e2e.test_milters import with_config
from tests.support import rspamd as patterns
from tests.support.clamd import EICAR, RealClamd, clamd
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.milters import opendkim, opendmarc
from tests.support.pages import blocks, commands, section, shell, tables
from tests.support.policies import policyd_spf, postgrey
from tests.support.programs import need
from tests.support.resolver import nameserver_with
from tests.support.rspamd import RealRspamd, rspamd
from tests.support.spamd import GTUBE, spamd

PAGE, WALK = "filter-recipes.md", "From a trial to enforcement"
CLAMD, RSPAMD, PROXY = "unix:/run/clamav/clamd.ctl", "127.0.0.1:11333", "127.0.0.1:11332"
HEAD = "From: ann@a.example\r\nTo: bob@d.example\r\nSubject: hello\r\n\r\n"


@pytest.fixture(scope="module")
def virus() -> Iterator[RealClamd]:
    with clamd() as running:
        yield running


@pytest.fixture(scope="module")
def spam() -> Iterator[RealRspamd]:
    with rspamd() as running:
        yield running


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: the path of a socket has at most 107 octets."""
    made = Path(tempfile.mkdtemp(prefix="recipes"))
    yield made
    shutil.rmtree(made)


class Recipe(Relay):
    """A relay with the tables of a section of the page, whose addresses are those of programs `here`. Clients of this machine may
    not relay, and may say who they are by XCLIENT."""

    def __init__(self, folder: Path, peer: FakeMx, title: str, here: Mapping[str, str], *settings: str) -> None:
        super().__init__(folder, f"127.0.0.1:{peer.port}", *OUTSIDE, *(settings or ("verify.results=false",)))
        self.title, self.here = title, here
        self.config = folder / "relaymta.toml"
        text = tables(section(PAGE, title))
        for there, address in here.items():
            assert there in text, f"{title}: no filter is at {there}"
            text = text.replace(there, address)
        self.config.write_text(f'hostname = "relay.example"\n[[listener]]\naddress = "127.0.0.1:{self.port}"\n{text}')

    def command(self) -> list[str]:
        return with_config(super().command(), self.config)

    def try_out(self) -> None:
        """Run the commands of the section."""
        with shell(self.folder, self.config, self.here) as running:
            for one in commands(section(PAGE, "rspamd by HTTP")):
                if one.command.startswith("printf"):  # the texts that all recipes show to their filters
                    running.run(one)
            for one in commands(section(PAGE, self.title)):
                running.run(one)

    def post(self, body: str, head: str = HEAD, sender: str = "ann@a.example") -> str:
        """The last reply to a message of a client elsewhere."""
        with client(self) as smtp:
            return said(smtp, ["bob@d.example"], sender, head + body + "\r\n")[-1]


def test_clamd(tmp_path, virus):
    with FakeMx({}) as peer, Recipe(tmp_path, peer, "clamd", {CLAMD: virus.address}) as relay:
        relay.try_out()
        assert relay.post(EICAR.decode()) == "554 5.7.1 Refused by virus: Eicar-Within.UNOFFICIAL"
        assert relay.post("hello").startswith("250")


def test_rspamd_by_http(tmp_path, spam):
    with FakeMx({}) as peer, Recipe(tmp_path, peer, "rspamd by HTTP", {RSPAMD: spam.address}) as relay:
        relay.try_out()
        assert relay.post(patterns.REJECT) == "554 5.7.1 Refused by spam: Gtube pattern"
        assert relay.post(patterns.ADD_HEADER).startswith("250")
        wait_for(lambda: peer.messages)
        assert b"\r\nX-Spam: Yes\r\n" in peer.messages[0][2]


def test_rspamd_as_a_milter(tmp_path):
    with rspamd(proxy=True) as scanner, FakeMx({}) as peer:
        Recipe(tmp_path, peer, "rspamd as a milter", {PROXY: scanner.milter}).try_out()


def test_spamassassin(tmp_path):
    with spamd() as address, FakeMx({}) as peer:
        with Recipe(tmp_path, peer, "SpamAssassin", {"127.0.0.1:783": address}) as relay:
            relay.try_out()
            assert relay.post(GTUBE).startswith("554 5.7.1 Refused by sa: GTUBE, ")
            assert relay.post("hello").startswith("250")
            wait_for(lambda: peer.messages)
            assert b"X-Spam" not in peer.messages[0][2]


def test_opendkim_and_opendmarc(tmp_path):
    with opendkim("Mode v") as (one, key), opendmarc() as two, FakeMx({}) as peer:
        here = {"unix:/run/opendkim/opendkim.sock": one.address, "unix:/run/opendmarc/opendmarc.sock": two.address}
        with Recipe(tmp_path, peer, "opendkim and opendmarc", here) as relay:
            relay.try_out()
            message = b"From: ann@b.example\r\nTo: bob@d.example\r\nSubject: hello\r\n\r\nhello\r\n"
            signed = dkim.sign(message, b"s", b"b.example", key.path.read_bytes()) + message
            head, _, body = signed.decode().partition("\r\n\r\n")
            assert relay.post(body.rstrip(), head + "\r\n\r\n").startswith("250")
            wait_for(lambda: peer.messages)
            fields = peer.messages[0][2].replace(b"\r\n\t", b" ").split(b"\r\n")
            assert fields[0].startswith(b"Authentication-Results: dmarc.example; dmarc=")
            assert fields[1].startswith(b"Authentication-Results: opendkim.example; dkim=pass")
            assert "\ndkim b.example s 0\n" in (two.folder / "history").read_text(), "it has found what opendkim has found"


def test_opendmarc_alone_believes_what_the_relay_has_found(tmp_path):
    """SPF, which the relay looks up by its own nameserver."""
    title, dkim_table = "opendkim and opendmarc", 'name = "opendkim"'
    with (
        nameserver_with(tmp_path, ['b.test. TXT "v=spf1 ip4:203.0.113.10 -all"']) as server,
        opendmarc() as one,
        FakeMx({}) as peer,
    ):
        here = {"unix:/run/opendmarc/opendmarc.sock": one.address}
        relay = Recipe(tmp_path, peer, title, here, f'delivery.nameservers=["{server}"]', "verify.results=true")
        first, _, second = relay.config.read_text().rpartition("[[filter]]\n")
        assert dkim_table in first
        relay.config.write_text(first.partition("[[filter]]\n")[0] + "[[filter]]\n" + second)
        with relay:
            assert relay.post("hello", HEAD.replace("a.example", "b.test"), "ann@b.test").startswith("250")
            history = (one.folder / "history").read_text()
            assert "\nfrom b.test\n" in history and "\nspf 0\n" in history, history


def test_greylisting_and_postgrey(tmp_path):
    with postgrey() as address, FakeMx({}) as peer:
        relay = Recipe(tmp_path, peer, "postgrey, and greylisting without it", {"127.0.0.1:10023": address})
        relay.try_out()
        relay.config.write_text(relay.config.read_text().replace('delay = "5m"', 'delay = "1s"'))
        with relay:
            first = relay.post("hello", sender="new@a.example")
            assert first.startswith("450 4.2.0 ") and "Greylisted, see " in first, "by postgrey, at RCPT"
            time.sleep(1.1)
            assert relay.post("hello", sender="new@a.example") == "451 4.7.1 Greylisted: try again in 1 seconds"
            wait_for(lambda: relay.post("hello", sender="new@a.example").startswith("250"))
            wait_for(lambda: peer.messages)
        asked = "--only", "postgrey", "--from", "new@a.example", "--to", "bob@d.example", "--client", "203.0.113.10"
        tried = relay.cli("-c", str(relay.config), "filter", "test", *asked).stdout
        assert tried.startswith("without a word, or not asked, ") and tried.endswith(": postgrey\naccepted\n"), tried


def test_policyd_spf(tmp_path):
    with policyd_spf() as address, FakeMx({}) as peer:
        Recipe(tmp_path, peer, "policyd-spf", {"unix:/run/policyd-spf.sock": address}).try_out()


@contextlib.contextmanager
def sink(folder: Path) -> Iterator[int]:
    """`relaymta sink`, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "relaymta", "sink", "--listen", f"127.0.0.1:{port}", "--maildir", str(folder)]
    with (folder.parent / "sink.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: _greets(port), what="the sink")
        yield port
    finally:
        process.terminate()
        process.wait()


def _greets(port: int) -> bool:
    with contextlib.suppress(OSError), smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE):
        return True
    return False


class Running(Relay):
    """The relay of the session, by the configuration that the page has. `here`: what is otherwise on this machine."""

    def __init__(self, folder: Path, here: Mapping[str, str]) -> None:
        super().__init__(folder, None)
        self.config = folder / "relaymta.toml"
        self.here = {
            "/etc/relaymta/relaymta.toml": str(self.config), "/var/log/relaymta/relaymta.log": str(self.log),
            "/var/lib/relaymta": str(self.spool), "127.0.0.1:2525": f"127.0.0.1:{self.port}",
            "127.0.0.1:9125": f"127.0.0.1:{self.metrics_port}", **here,
        }  # fmt: skip
        text = next(block for block in blocks(section("filters.md", WALK)) if block.startswith("hostname"))
        for there, other in self.here.items():
            text = text.replace(there, other)
        self.config.write_text(text)

    def command(self) -> list[str]:
        metrics = f"metrics.listen=127.0.0.1:{self.metrics_port}"
        return [self.python, "-m", "relaymta", "-c", str(self.config), "serve", "--ephemeral", "--workers", "1", "--set", metrics]


def test_from_a_trial_to_enforcement(folder, virus, spam):
    """The session, command by command: each says what the page has."""
    for program in ("swaks", "jq", "curl"):
        need(program)
    (folder / "clamd.ctl").symlink_to(virus.path)
    with sink(folder / "sink") as port:
        here = {"/run/clamav/": f"{folder}/", "/tmp/sink": f"{folder}/sink", RSPAMD: spam.address}
        here["127.0.0.1:2526"] = f"127.0.0.1:{port}"
        with Running(folder, here) as relay, shell(folder, relay.config, relay.here) as running:
            every = commands(section("filters.md", WALK))
            assert len(every) > 20
            for one in every:
                running.run(one)
        assert EICAR in b"".join(file.read_bytes() for file in (folder / "sink/new").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become the user of the relay")
def test_root_asks_filters_with_the_rights_of_the_relays_user(folder, virus):
    """What root may open, and that user may not, is no filter for the relay."""
    folder.chmod(0o700)
    (folder / "ctl").symlink_to(virus.path)
    config, file = folder / "relaymta.toml", folder / "x.eml"
    file.write_text("Subject: x\n\nx\n")
    virus_table = f'[[filter]]\nname = "virus"\ntype = "clamd"\naddress = ["unix:{folder}/ctl"]\n'
    listener = '[[listener]]\naddress = "127.0.0.1:2525"\n'
    relay = Relay(folder, None)
    for user, status in (("", 0), ('user = "nobody"\n', 75)):
        config.write_text(f'{user}hostname = "relay.example"\n{listener}{virus_table}')
        for verb in (("check",), ("test", str(file))):
            found = relay.cli("-c", str(config), "filter", *verb, check=False)
            assert found.returncode == status and ("Permission denied" in found.stdout) == bool(user), found
