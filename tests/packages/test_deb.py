"""The Debian package: installed into a fresh Debian without a network, run by systemd, upgraded under load, removed, purged."""

import asyncio
import json
import shutil
import smtplib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.e2e.test_init import PASSWORD, smart_host
from tests.support import sink
from tests.support.daemon import wait_for
from tests.support.machine import Machine
from tests.support.programs import need
from tests.support.source import Source

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]

SINK = 2526
# Set-ups that this file's tests use: a smart host that listens in the machine, and mailboxes.
CONFIG = f"""
user = "relaymta"
spool = "/var/lib/relaymta"
hostname = "relay.example"
workers = 2

[[listener]]
address = "127.0.0.1:25"

[[listener]]
address = "127.0.0.1:587"
auth = "may"
auth_in_clear = true

[[route]]
protocol = "mailbox"
recipient_domain = ["here.example"]

[[route]]
hosts = ["127.0.0.1:{SINK}"]
tls = "off"

[[dkim]]
domain = "b.example"
selector = "one"
key = "/etc/relaymta/one.pem"

[accounts]
file = "/etc/relaymta/accounts.toml"

[log]
file = "/var/log/relaymta/relaymta.log"

[control]
socket = "/run/relaymta/control.sock"
group = "adm"
"""


@pytest.fixture(scope="module")
def machine(debian: Path, deb: Path) -> Iterator[Machine]:
    """A fresh Debian with the package. A call of the system that the unit forbids kills the process."""
    shutil.copy(deb, debian / "srv/relaymta.deb")
    strict = debian / "etc/systemd/system/relaymta.service.d/strict.conf"
    strict.parent.mkdir(parents=True)
    strict.write_text("[Service]\nSystemCallErrorNumber=\nSupplementaryGroups=adm\nWatchdogSec=5\n")
    with Machine(debian) as running:
        yield running


def _main_pid(machine: Machine) -> int:
    return int(machine.run("systemctl", "show", "-p", "MainPID", "--value", "relaymta").stdout)


def _status(machine: Machine) -> dict[str, object]:
    found: dict[str, object] = json.loads(machine.run("relaymta", "status", "--json").stdout)
    return found


def _send(machine: Machine, port: int, *to: str, login: tuple[str, str] | None = None, sender: str = "a@b.example") -> None:
    with machine.network(), smtplib.SMTP("127.0.0.1", port, local_hostname="client.example", timeout=60) as client:
        if login:
            client.login(*login)
        client.sendmail(sender, list(to), f"From: {sender}\r\nSubject: hello\r\n\r\nhello\r\n")


def _events(machine: Machine, name: str) -> list[dict[str, object]]:
    lines = machine.path("/var/log/relaymta/relaymta.log").read_text().splitlines()
    return [found for found in map(json.loads, lines) if found["event"] == name]


def test_it_installs_without_a_network_and_runs(machine: Machine) -> None:
    done = machine.run("dpkg", "-i", "/srv/relaymta.deb")
    assert "did not start" not in done.stdout + done.stderr
    assert machine.run("systemctl", "is-active", "relaymta").stdout == "active\n"
    assert machine.run("systemctl", "is-enabled", "relaymta").stdout == "enabled\n"
    rights = machine.run("stat", "-c", "%U:%G %a", "/etc/relaymta", "/etc/relaymta/relaymta.toml", "/var/lib/relaymta")
    assert rights.stdout.splitlines() == ["root:relaymta 750", "root:relaymta 640", "relaymta:relaymta 700"]
    assert _status(machine)["listeners"] == ["127.0.0.1:25"]
    assert "Traceback" not in machine.journal(lines=200)
    with machine.network(), smtplib.SMTP("127.0.0.1", 25, timeout=60) as client:
        assert client.ehlo()[0] == 250
    assert machine.run("dpkg", "-V", "relaymta").stdout == ""  # every file is as it was packed
    assert machine.run("relaymta", "--version").stdout.startswith("relaymta")


def test_users_of_the_machine_send_mail_also_while_the_relay_is_down(machine: Machine) -> None:
    drop = "/var/spool/relaymta/drop"
    rights = machine.run("stat", "-c", "%U:%G %a", "/usr/lib/relaymta/relaymta-drop", drop).stdout.splitlines()
    assert rights == ["root:relaymta-drop 2755", "relaymta:relaymta-drop 770"]

    def nobody(*command: str) -> int:
        done = machine.run("runuser", "-u", "nobody", "--", *command, given="Subject: x\n\nx\n", check=False)
        return done.returncode

    for program in ("/usr/sbin/sendmail", "/usr/lib/sendmail"):
        assert nobody(program, f"up@{Path(program).parent.name}.example") == 0
    assert nobody("sendmail", "-f", "root", "a@b.example") == 77
    machine.run("systemctl", "stop", "relaymta")
    assert nobody("sendmail", "down@b.example") == 0
    assert nobody("ls", drop) != 0
    machine.run("systemctl", "start", "relaymta")
    wait_for(lambda: not list(machine.path(drop).glob("*.drop")), what="what was dropped to be taken")
    shown = machine.run("mailq").stdout
    assert all(address in shown for address in ("up@sbin.example", "up@lib.example", "down@b.example"))
    assert "a@b.example" not in shown
    assert machine.run("newaliases").stdout == ""
    assert "Traceback" not in machine.journal(lines=200)
    machine.run("relaymta", "queue", "delete", "--all")


def test_shells_complete_and_manual_pages_are_there(machine: Machine) -> None:
    bash = """
. /usr/share/bash-completion/bash_completion
_completion_loader relaymta
COMP_LINE="relaymta queue list --un" COMP_POINT=24
_relaymta_completion relaymta "" ""
echo "${COMPREPLY[@]}"
"""
    assert machine.run("bash", "--norc", "-c", bash).stdout == "--unseen\n"
    assert machine.run("fish", "-c", 'complete -C "relaymta queue list --un"').stdout.startswith("--unseen\t")
    zsh = "autoload -Uz compinit; compinit -u -D; print -r -- $_comps[relaymta]; autoload +X _relaymta"
    assert machine.run("zsh", "-f", "-c", zsh).stdout == "_relaymta\n"
    machine.run("zsh", "-n", "/usr/share/zsh/vendor-completions/_relaymta")
    pages = machine.run("sh", "-c", "ls /usr/share/man/man1/relaymta*.1.gz /usr/share/man/man5/relaymta*").stdout.split()
    assert len(pages) > 90
    for name, told in (("relaymta-queue-list", "--unseen"), ("relaymta", "EXIT STATUS"), ("relaymta.toml", "message_size")):
        assert told in machine.run("man", name).stdout
    assert machine.run("man", "--warnings", "relaymta.toml").stderr == ""
    for name in ("sendmail", "mailq", "newaliases"):
        assert "hand mail to the relay" in machine.run("man", "--warnings", name).stdout
    assert machine.run("whatis", "relaymta.toml").stdout.startswith("relaymta.toml (5)")


def test_its_processes_have_one_capability_and_a_filter_of_system_calls(machine: Machine) -> None:
    owner = machine.run("id", "-u", "relaymta").stdout.strip()
    files = machine.run("sh", "-c", f"grep -l '^Uid:.{owner}' /proc/[0-9]*/status").stdout.split()
    assert len(files) >= 2
    for file in files:
        found = dict(line.split(":\t", 1) for line in machine.run("cat", file).stdout.splitlines() if ":\t" in line)
        assert found["Uid"].split() == [owner] * 4
        assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 1 << 10  # CAP_NET_BIND_SERVICE
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_a_newcomer_gets_to_a_signed_message_through_a_smart_host(machine: Machine) -> None:
    """From the package, by `relaymta init`, to what an application sends: over TLS, with a login."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(machine.path("/etc/ssl/ca.pem")))
    with machine.network():
        peer = smart_host(authority)
    with peer:
        machine.run(
            "relaymta", "init", "--force", "--smarthost", f"localhost:{peer.port}", "--username", "me", "--password-stdin",
            "--ca-file", "/etc/ssl/ca.pem", "--domain", "example.org", "--to", "you@example.net", given=PASSWORD,
        )  # fmt: skip
        machine.run("systemctl", "restart", "relaymta")
        _send(machine, 25, "c@d.example", sender="shop@example.org")
        wait_for(lambda: len(peer.messages) == 2, what="the test message and ours")
    sender, _, message = peer.messages[-1]
    assert sender == "shop@example.org" and b"\nDKIM-Signature: " in b"\n" + message.replace(b"\r", b"")
    assert machine.run("stat", "-c", "%U", "/etc/relaymta/smarthost.password").stdout == "relaymta\n"


def test_what_the_relay_does_is_allowed(machine: Machine) -> None:
    """Signing, logins, mailboxes, a control group, reload, rotation of the log, the rights of a folder of its own."""
    machine.run("relaymta", "dkim", "keygen", "--selector", "one", "--out", "/etc/relaymta/one.pem", "b.example")
    machine.run("chown", "relaymta", "/etc/relaymta/one.pem")  # made before there was a configuration that says who needs it
    machine.path("/etc/relaymta/relaymta.toml").write_text(CONFIG)
    key = json.loads(machine.run("relaymta", "app", "create", "shop", "--json").stdout)["secret"]
    machine.run("relaymta", "config", "check")
    machine.run("systemctl", "restart", "relaymta")
    machine.run("relaymta", "mailbox", "create", "--password", "ann@here.example", given="secret\n")
    arrived: list[str] = []

    async def exchange() -> None:
        server = await sink.serve(SINK, lambda ident, digest, to: arrived.extend(to))
        await asyncio.to_thread(_send, machine, 25, "c@d.example", "ann@here.example")
        await asyncio.to_thread(
            _send, machine, 587, "e@f.example", login=("ann@here.example", "secret"), sender="ann@here.example"
        )
        await asyncio.to_thread(_send, machine, 587, "g@f.example", login=("shop", key))
        async with asyncio.timeout(60):
            while len(arrived) < 3:
                await asyncio.sleep(0.05)
        server.close()

    with machine.network():
        asyncio.run(exchange())
    assert sorted(arrived) == ["c@d.example", "e@f.example", "g@f.example"]
    assert "hello" in machine.run("relaymta", "mailbox", "show", "--messages", "ann@here.example").stdout
    machine.run("systemctl", "reload", "relaymta")
    assert machine.run("stat", "-c", "%U:%G", "/run/relaymta/control.sock").stdout == "relaymta:adm\n"
    machine.run("logrotate", "-f", "/etc/logrotate.d/relaymta")
    assert machine.path("/var/log/relaymta/relaymta.log.1").exists()
    _send(machine, 25, "ann@here.example")
    wait_for(lambda: _events(machine, "delivered"), what="the new log file")
    assert machine.run("systemctl", "show", "-p", "NRestarts", "--value", "relaymta").stdout == "0\n"
    assert "Traceback" not in machine.journal(lines=200)


def test_a_reload_of_a_file_with_a_mistake_fails_with_the_reason(machine: Machine) -> None:
    before = machine.path("/etc/relaymta/relaymta.toml").read_text()
    machine.path("/etc/relaymta/relaymta.toml").write_text(before.replace("hostname", "hostnaem"))
    assert machine.run("systemctl", "reload", "relaymta", check=False).returncode != 0
    assert "hostnaem" in machine.journal()
    machine.path("/etc/relaymta/relaymta.toml").write_text(before)
    machine.run("systemctl", "reload", "relaymta")


def test_a_supervisor_that_hangs_is_started_again(machine: Machine) -> None:
    pid = _main_pid(machine)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "relaymta")
    wait_for(lambda: _main_pid(machine) not in (0, pid) and _is_up(machine), what="the watchdog")


def _is_up(machine: Machine) -> bool:
    return machine.run("systemctl", "is-active", "relaymta", check=False).stdout == "active\n"


def test_systemd_passes_the_ports(machine: Machine) -> None:
    ports = machine.path("/etc/systemd/system/relaymta.socket.d/ports.conf")
    ports.parent.mkdir(parents=True)
    ports.write_text("[Socket]\nListenStream=127.0.0.1:587\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "stop", "relaymta")
    machine.run("systemctl", "enable", "--now", "relaymta.socket")
    machine.run("systemctl", "start", "relaymta")
    machine.run("systemctl", "stop", "relaymta.service")
    with machine.network(), smtplib.SMTP(timeout=60) as client:  # the port is open without the relay, which a client starts
        assert client.connect("127.0.0.1", 25)[0] == 220
    wait_for(lambda: _is_up(machine), what="the relay to be ready")


def test_an_upgrade_under_load_loses_nothing(machine: Machine, deb: Path, next_deb: Path) -> None:
    """With the relay's own sockets, and with those of relaymta.socket: no connection is refused, and the new program is systemd's
    main process. There and back: an older version is installed in the same way."""
    shutil.copy(next_deb, machine.path("/srv/next.deb"))
    for package, revision in (("next.deb", "-2"), ("relaymta.deb", "-1")):
        before = _main_pid(machine)
        if revision == "-2":
            machine.run("systemctl", "stop", "relaymta.socket", "relaymta.service")
            machine.run("systemctl", "start", "relaymta.service")
            before = _main_pid(machine)
            assert machine.run("systemctl", "is-active", "relaymta.socket", check=False).stdout != "active\n"
        with machine.network():
            source, taken, said = asyncio.run(_installed_under_load(machine, package))
        assert "upgraded from" in said
        assert _main_pid(machine) not in (0, before)
        assert _main_pid(machine) == _status(machine)["pid"]
        assert machine.run("dpkg-query", "-W", "-f", "${Version}", "relaymta").stdout.endswith(revision)
        assert source.failed_connects == 0
        assert all(digest in taken[ident] for ident, digest in source.acknowledged.items())
        assert not [ident for ident, copies in taken.items() if ident in source.acknowledged and len(copies) > 1]
        print(f"{len(source.acknowledged)} messages; slowest banner {source.slowest_banner:.2f} s")
        (left,) = machine.path("/opt/relaymta").iterdir()  # of the version before nothing is
        assert left.name.endswith(revision)
        assert machine.run("dpkg", "-V", "relaymta").stdout == ""
        machine.run("systemctl", "reload", "relaymta")
        if revision == "-2":
            machine.run("systemctl", "stop", "relaymta.service")
            machine.run("systemctl", "start", "relaymta.socket", "relaymta.service")
    assert machine.run("systemctl", "show", "-p", "NRestarts", "--value", "relaymta").stdout == "0\n"
    assert "Traceback" not in machine.journal(lines=400)


async def _installed_under_load(machine: Machine, package: str) -> tuple[Source, dict[str, list[str]], str]:
    """Install a package while clients send, one connection a message, and until some is sent by the new program: the clients, the
    digests of what has arrived by its id, and what was said."""
    taken: dict[str, list[str]] = {}
    server = await sink.serve(SINK, lambda ident, digest, to: taken.setdefault(ident, []).append(digest))
    source = Source(lambda: 25, 4, reuse=False)
    enough = [10**9]
    upgrade = asyncio.create_task(asyncio.to_thread(machine.run, "dpkg", "-i", f"/srv/{package}"))
    running = asyncio.create_task(source.run(lambda: upgrade.done() and len(source.acknowledged) > enough[0]))
    done = await upgrade
    enough[0] = len(source.acknowledged) + 100
    await running
    async with asyncio.timeout(120):
        while source.acknowledged.keys() - taken.keys():
            await asyncio.sleep(0.1)
    server.close()
    return source, taken, done.stdout + done.stderr


def test_a_new_program_that_does_not_start_leaves_the_old_one(machine: Machine) -> None:
    """The package is installed, and the relay goes on with the version before, whose files stay, until the mistake is mended."""
    file = machine.path("/etc/relaymta/relaymta.toml")
    before, pid = file.read_text(), _main_pid(machine)
    file.write_text(before.replace("hostname", "hostnaem"))
    done = machine.run("dpkg", "-i", "/srv/next.deb")
    file.write_text(before)
    assert "hostnaem" in done.stderr and "goes on with the version before" in done.stderr
    assert _main_pid(machine) == pid and _is_up(machine)
    assert len(list(machine.path("/opt/relaymta").iterdir())) == 2
    assert machine.run("relaymta", "upgrade").stdout.startswith("upgraded from")
    assert _main_pid(machine) not in (0, pid)
    machine.run("systemctl", "restart", "relaymta")


def test_the_watchdog_looks_at_the_new_program(machine: Machine) -> None:
    machine.run("relaymta", "upgrade")
    pid = _main_pid(machine)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "relaymta")
    wait_for(lambda: _main_pid(machine) not in (0, pid) and _is_up(machine), what="the watchdog")


def test_the_units_are_accepted_and_closed(machine: Machine) -> None:
    need("systemd-analyze")
    units = ["relaymta.service", "relaymta.socket"]
    done = subprocess.run(["systemd-analyze", "verify", f"--root={machine.root}", *units], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for one in units[:1]:
        command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", f"--root={machine.root}", "--no-pager", one]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-300:]


def test_a_removal_leaves_the_configuration_and_the_queue(machine: Machine) -> None:
    machine.run("dpkg", "-r", "relaymta")
    assert not machine.path("/opt/relaymta").exists()
    assert not machine.path("/usr/sbin/sendmail").is_symlink()
    assert machine.run("systemctl", "is-active", "relaymta", check=False).stdout != "active\n"
    assert machine.path("/etc/relaymta/relaymta.toml").exists()
    assert machine.path("/var/lib/relaymta/secret").exists()
    machine.run("dpkg", "-i", "/srv/next.deb")  # and again: with its configuration and its queue
    assert _is_up(machine)
    assert _status(machine)["listeners"] == ["127.0.0.1:25", "127.0.0.1:587"]
    assert machine.run("systemctl", "is-enabled", "relaymta.service", "relaymta.socket").stdout.split() == ["enabled"] * 2


def test_a_purge_asks_before_it_removes_the_queue(machine: Machine) -> None:
    done = machine.run("dpkg", "-P", "relaymta")  # nobody is asked: the answer is no
    assert "/var/lib/relaymta has the queue and was left" in done.stdout + done.stderr
    assert machine.path("/var/lib/relaymta/secret").exists()
    assert not machine.path("/etc/relaymta").exists()
    with machine.network(), socket.create_server(("127.0.0.1", 25)):
        done = machine.run("dpkg", "-i", "/srv/relaymta.deb")  # another MTA has the port
    assert "relaymta.service did not start" in done.stdout + done.stderr
    assert "another program listens on this port" in machine.journal()
    wait_for(lambda: _is_up(machine), what="another try")
    said = machine.run("dpkg", "-P", "relaymta", given="yes\n", env={"DEBIAN_FRONTEND": "teletype"})
    assert "Remove queued mail" in said.stdout + said.stderr
    assert not machine.path("/var/lib/relaymta").exists()
    assert not machine.path("/var/spool/relaymta").exists()
    assert machine.run("getent", "group", "relaymta-drop", check=False).returncode == 2
    assert machine.run("getent", "passwd", "relaymta", check=False).returncode == 2
