"""`relaymta doctor`: set-ups that are broken, each by the real thing where that can be had; one that is not; and checks that hang
or fail."""

import contextlib
import datetime
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner

from relaymta.cli import (
    doctor_checks,
    doctor_daemon,
    doctor_disk,
    doctor_here,
    doctor_limits,
    doctor_names,
    doctor_scene,
    doctor_ways,
    main,
)
from relaymta.cli.doctor_checks import CHECKS, Check, Need
from relaymta.cli.doctor_scene import Row, Scene
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.resolver import nameserver_with

ROOT = Path(__file__).parent.parent
ZONE = [
    "mail.test. A 127.0.0.1", "mx.test. A 127.0.0.1", "own.test. MX 10 mail.test.", "other.test. MX 10 nowhere.test.",
    "8.8.8.8.list.test. A 127.0.0.2", "1.1.1.1.list.test. A 127.255.255.254",
    "8.8.8.8.in-addr.arpa. PTR named.test.", "named.test. A 8.8.8.8", "1.1.1.1.in-addr.arpa. PTR mail.test.",
]  # fmt: skip
Found = dict[str, tuple[str, str]]


def doctor(*words: str) -> tuple[int, Found]:
    """The exit status of `doctor --json`, and what each check has found: (state, sentence)."""
    done = CliRunner().invoke(main, ["doctor", "--json", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(row) == {"check", "state", "found"} and row["state"] in ("ok", "warning", "wrong") for row in rows)
    assert done.exit_code == any(row["state"] == "wrong" for row in rows), done.output
    names = [row["check"] for row in rows]
    assert len(set(names)) == len(names), names
    return done.exit_code, {row["check"]: (row["state"], row["found"]) for row in rows}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check is late because this machine is busy."""
    for module, names in (
        (doctor_checks, ("LIMIT", "SPARE")), (doctor_names, ("SECONDS", "SLOW")), (doctor_ways, ("STEP", "HOST")),
        (doctor_scene, ("ANSWER",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, 80.0)


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """A nameserver that answers REFUSED."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                query, client = sock.recvfrom(4096)
                if not query:
                    return
                sock.sendto(query[:2] + b"\x81\x85" + query[4:], client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{sock.getsockname()[1]}"
        finally:
            sock.sendto(b"", sock.getsockname())
            thread.join()


@pytest.fixture(scope="module")
def dns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A nameserver with ZONE; it does not know the root."""
    zones = "".join(f'  local-zone: "{zone}.in-addr.arpa." static\n' for zone in ("8.8.8.8", "1.1.1.1", "9.9.9.9"))
    with nameserver_with(tmp_path_factory.mktemp("dns"), ZONE, zones) as address:
        yield address


class Place:
    """A configuration in a folder, as a healthy relay has it; `text`: more of it."""

    def __init__(self, folder: Path, dns: str, **keys: str) -> None:
        self.folder = folder
        self.port, self.metrics = free_port(), free_port()
        self.keys = {"hostname": '"mail.test"', "spool": f'"{folder}/spool"'} | keys
        self.listener = f"127.0.0.1:{self.port}"
        self.tables = f'[delivery]\nnameservers = ["{dns}"]\n[limits]\nconnections = 100\n'
        self.path = folder / "relay.toml"

    def write(self, text: str = "") -> str:
        """The path of the file."""
        top = "".join(f"{key} = {value}\n" for key, value in self.keys.items())
        listener = f'[[listener]]\naddress = "{self.listener}"\n[metrics]\nlisten = "127.0.0.1:{self.metrics}"\n'
        self.path.write_text(f"{top}{listener}{self.tables}{text}")
        return str(self.path)


@pytest.fixture
def place(tmp_path: Path, dns: str) -> Place:
    return Place(tmp_path, dns)


def to(*hosts: str, more: str = "") -> str:
    """A route to smart hosts."""
    return f'[[route]]\nname = "out"\nhosts = {json.dumps(hosts)}\n{more}'


def certified(folder: Path, authority: trustme.CA, name: str, **how: Any) -> str:
    """A [[certificate]] that was made now."""
    made = authority.issue_cert(name, **how)
    path = folder / f"{name}.pem"
    path.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems) + made.private_key_pem.bytes())
    path.chmod(0o600)
    return f'[[certificate]]\nchain = "{path}"\n'


# The running relay


class Configured(Relay):
    """A relay with a configuration file."""

    def __init__(self, place: Place, path: str) -> None:
        super().__init__(place.folder, None)
        self.path = path

    def command(self) -> list[str]:
        settings = [f"log.file={self.log}", "workers=1", "intake.shed_lag=0"]
        return [self.python, "-m", "relaymta", "serve", "-c", self.path, *(word for one in settings for word in ("--set", one))]


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the machine that tests run on is as it should be."""
    monkeypatch.setattr(doctor_here, "_is_kept", lambda: True)
    monkeypatch.setattr(doctor_disk, "_PASSING", {})
    monkeypatch.setattr(doctor_disk, "FLOOR_MOST", 1 << 20)
    monkeypatch.setattr(sysconfig, "get_config_var", {"CONFIG_ARGS": "--enable-optimizations"}.get)


def test_a_healthy_relay_and_what_may_happen_to_it(place: Place, monkeypatch: pytest.MonkeyPatch, sound: None) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(place.folder / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(place.folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("mx.test").configure_cert(context)
    rules = {"EHLO": b"250-mx.test\r\n250 STARTTLS\r\n"}
    with FakeMx(rules, tls=context) as peer:
        own = to(f"mx.test:{peer.port}", more='tls = "verify"\n') + certified(place.folder, authority, "mail.test")
        clear = 'protocol = "http"\ntls = "off"\n'
        path = place.write(own + f'[[listener]]\naddress = "127.0.0.1:{free_port()}"\n{clear}')
        with Configured(place, path) as relay:
            status, found = doctor("-c", path, "--dnsbl")
            assert status == 0 and {state for state, _ in found.values()} == {"ok"}, found
            expected = {
                "interpreter", "kernels", "configuration", "daemon", "workers", "control socket", "ports", "permissions",
                f"certificate {place.folder}/mail.test.pem", "disk of the spool", "descriptors", "listen queue", "address space",
                "memory", "clock", "hostname", f"smart host mx.test:{peer.port} of route out", "mail loop", "open relay",
            }  # fmt: skip
            assert {name for name in found if not name.startswith("nameserver")} == expected
            assert "TLS; its certificate is valid until" in found[f"smart host mx.test:{peer.port} of route out"][1]
            assert not peer.messages and not any(command.startswith("AUTH") for command in peer.commands)

            assert relay.process is not None
            before = resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (256, before[1]))
            status, found = doctor("-c", path, "--offline")
            assert status == 1 and found["descriptors"][0] == "wrong"
            assert re.search("256 descriptors .*LimitNOFILE=", found["descriptors"][1])
            resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, before)

            with monkeypatch.context() as patch:
                patch.setattr(doctor_daemon, "__version__", "99.0")
                state, what = doctor("-c", path, "--offline")[1]["daemon"]
                assert state == "wrong" and "this program is 99.0: restart it" in what

            with monkeypatch.context() as patch:
                patch.setattr(doctor_scene, "ANSWER", 0.3)
                relay.process.send_signal(signal.SIGSTOP)
                found = doctor("-c", path, "--offline")[1]
                relay.process.send_signal(signal.SIGCONT)
            state, what = found["daemon"]
            assert state == "wrong" and "does not answer" in what and "restart it" in what and found["ports"][0] == "warning"

            other = path.replace("relay.toml", "other.toml")
            Path(other).write_text(Path(path).read_text() + f'[control]\nsocket = "{place.folder}/other.sock"\n')
            state, what = doctor("-c", other, "--offline")[1]["daemon"]
            assert state == "wrong" and "shard-0 is in use by a relay that does not answer at" in what and "stop it" in what

            (pid,) = relay.worker_pids()
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: relay.worker_pids() not in ([], [pid]), what="the next worker")
            state, what = doctor("-c", path, "--offline")[1]["workers"]
            assert state == "warning" and "worker 0 has died and was replaced once" in what and "see the log" in what

            (place.folder / "spool/control.sock").chmod(0o666)
            state, what = doctor("-c", path, "--offline")[1]["control socket"]
            assert state == "wrong" and "chmod o=" in what


# Broken set-ups, without a relay


def test_a_nameserver_that_does_not_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_names, "SECONDS", 0.3)
    nobody = f"127.0.0.1:{free_port()}"
    place.tables = f'[delivery]\nnameservers = ["{nobody}"]\n'
    status, found = doctor("-c", place.write(to("127.0.0.1:1")))
    state, what = found[f"nameserver {nobody}"]
    assert status == 1 and state == "wrong" and "does not answer" in what and "correct delivery.nameservers" in what
    assert found["hostname"][0] == "warning"  # it is not known to be wrong


def test_one_of_two_nameservers_that_refuses(place: Place, dns: str) -> None:
    with refusing() as other:
        place.tables = f'[delivery]\nnameservers = ["{other}", "{dns}"]\n'
        _, found = doctor("-c", place.write(to("127.0.0.1:1")))
    state, what = found[f"nameserver {other}"]
    assert state == "warning" and "answers REFUSED" in what and "correct delivery.nameservers" in what
    assert found[f"nameserver {dns}"][0] == "ok"


def test_a_nameserver_that_fails(place: Place, dns: str) -> None:
    place.listener = "0.0.0.0:1"
    _, found = doctor("-c", place.write(), "--probe-host", "127.0.0.1:1")  # mail goes to the MX: the root is asked for
    state, what = found[f"nameserver {dns}"]
    assert state == "wrong" and "answers SERVFAIL when asked for the root" in what and "correct delivery.nameservers" in what


@pytest.mark.parametrize("name", ["mail", "mail.localdomain", "none.test"])
def test_a_hostname_that_others_cannot_look_up(place: Place, name: str) -> None:
    place.keys["hostname"] = f'"{name}"'
    state, what = doctor("-c", place.write(), "--probe-host", "127.0.0.1:1")[1]["hostname"]
    assert state == "wrong" and "set hostname" in what
    assert ("not a full name (FQDN)" in what) == (name != "none.test")
    assert doctor("-c", place.write(to("127.0.0.1:1")))[1]["hostname"][0] == "warning"  # a smart host may not mind


def test_certificates(place: Place) -> None:
    authority, folder = trustme.CA(), place.folder
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    tables = certified(folder, authority, "old.test", not_before=now - 90 * day, not_after=now - day)
    tables += certified(folder, authority, "soon.test", not_before=now - 90 * day, not_after=now + 3 * day)
    tables += certified(folder, authority, "fresh.test")
    tables += certified(folder, authority, "other.test")
    key = authority.issue_cert("key.test").private_key_pem.bytes()
    (folder / "key.pem").write_bytes(key)
    tables = tables.replace(
        f'chain = "{folder}/other.test.pem"\n', f'chain = "{folder}/other.test.pem"\nkey = "{folder}/key.pem"\n'
    )
    status, found = doctor("-c", place.write(to("127.0.0.1:1") + tables), "--offline")
    rows = {name.removeprefix(f"certificate {folder}/"): row for name, row in found.items() if name.startswith("certificate ")}
    assert status == 1 and {name: state for name, (state, _) in rows.items()} == {
        "old.test.pem": "wrong", "soon.test.pem": "warning", "fresh.test.pem": "warning", "other.test.pem": "wrong",
    }  # fmt: skip
    assert re.search(r"has expired on .*: renew it", rows["old.test.pem"][1])
    assert re.search(r"\(3 days\): renew it", rows["soon.test.pem"][1])
    assert re.search(r"issuer is not in the file, and not trusted here.*fullchain", rows["fresh.test.pem"][1])
    assert re.search(r"is not the certificate's.*set certificate.key", rows["other.test.pem"][1])


def test_a_certificate_for_another_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(place.folder / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(place.folder / "ca.pem"))
    tables = certified(place.folder, authority, "www.test")
    name = f"certificate {place.folder}/www.test.pem"
    state, what = doctor("-c", place.write(tables), "--offline")[1][name]
    assert state == "warning" and "none is for mail.test" in what and "have one made for mail.test" in what
    assert doctor("-c", place.write(tables), "--offline", "--set", "hostname=www.test")[1][name][0] == "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look with the rights of another user")
def test_root_looks_with_the_rights_of_the_relays_user(place: Place, tmp_path: Path) -> None:
    place.keys["user"] = '"nobody"'
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    tables = certified(place.folder, trustme.CA(), "mail.test")
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    route = to("127.0.0.1:1", more=f'tls = "verify"\nusername = "me"\npassword_file = "{secret}"\n')
    (tmp_path / "spool").mkdir(mode=0o700)
    os.chown(tmp_path / "spool", 65534, 65534)
    path = place.write(route + tables)
    status, found = doctor("-c", path, "--offline")
    state, what = found[f"certificate {tmp_path}/mail.test.pem"]
    assert status == 1 and state == "wrong" and "Permission denied: let nobody read it" in what
    state, what = found["permissions"]
    assert state == "wrong" and f"{secret}: Permission denied" in what and "let nobody have it" in what
    for file in (secret, tmp_path / "mail.test.pem"):
        os.chown(file, 65534, 65534)
    assert doctor("-c", path, "--offline")[1]["permissions"][0] == "ok"
    (tmp_path / "spool/shard-0/lmdb").mkdir(parents=True)
    (tmp_path / "spool/shard-0/lmdb/data.mdb").touch(0o600)
    for made in (tmp_path / "spool").rglob("*"):
        if made.is_dir():
            os.chown(made, 65534, 65534)
    state, what = doctor("-c", path, "--offline")[1]["permissions"]
    assert state == "wrong" and f"{tmp_path}/spool/shard-0/lmdb/data.mdb is not writable" in what
    shutil.rmtree(tmp_path / "spool")
    (tmp_path / "spool").mkdir()  # root's, in a folder of root's: a start gives it away
    assert doctor("-c", path, "--offline")[1]["permissions"][0] == "ok"
    tmp_path.chmod(0o777)
    state, what = doctor("-c", path, "--offline")[1]["permissions"]
    assert state == "wrong" and f"{tmp_path}/spool is not writable" in what and "chown" in what


def test_a_full_disk(small_disk: Path, tmp_path_factory: pytest.TempPathFactory, dns: str) -> None:
    place = Place(tmp_path_factory.mktemp("place"), dns, spool=f'"{small_disk}/spool"')
    path = place.write(to("127.0.0.1:1"))
    state, what = doctor("-c", path, "--offline")[1]["disk of the spool"]
    assert state == "warning" and "(tmpfs at" in what and "lost at the next boot" in what and "put the spool on a disk" in what
    (small_disk / "fill").write_bytes(b"x" * 1_000_000)
    state, what = doctor("-c", path, "--offline")[1]["disk of the spool"]
    assert state == "wrong" and "mail is refused" in what and "make room" in what


@pytest.mark.parametrize("kind", ["nfs4", "cifs"])
def test_a_spool_on_another_machine(place: Place, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
        f"23 22 0:9 / {tmp_path}/a\\040b rw,relatime shared:1 - {kind} nas:/mail rw\n"
        f"24 22 0:9 / {tmp_path}/a rw - xfs /dev/sdb rw\n"
    )
    (tmp_path / "a b").mkdir()
    place.keys["spool"] = f'"{tmp_path}/a b/spool"'
    monkeypatch.setattr(doctor_disk, "_MOUNTS", mounts)
    state, what = doctor("-c", place.write(to("127.0.0.1:1")), "--offline")[1]["disk of the spool"]
    assert state == "wrong" and f"({kind} at {tmp_path}/a b)" in what and "put the spool on a local disk" in what


@pytest.mark.parametrize("local", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_another_program_has(place: Place, local: str) -> None:
    with socket.create_server((local, place.port)):
        status, found = doctor("-c", place.write(to("127.0.0.1:1")), "--offline")
    state, what = found[f"port 127.0.0.1:{place.port}"]
    assert status == 1 and state == "wrong" and f"pid {os.getpid()}" in what and "systemctl disable --now" in what
    assert doctor("-c", place.write(to("127.0.0.1:1")), "--offline")[1]["ports"][0] == "ok"


def test_a_smart_host_that_is_the_relay_itself(place: Place) -> None:
    status, found = doctor("-c", place.write(to(place.listener)), "--offline")
    state, what = found["mail loop"]
    assert status == 1 and state == "wrong" and "is a listener of this relay" in what and "give the route the next host" in what
    # By a name, and so only a connection shows it.
    with FakeMx({}, port=place.port):
        _, found = doctor("-c", place.write(to(f"mx.test:{place.port}")))
    assert found["mail loop"][0] == "ok"
    state, what = found[f"smart host mx.test:{place.port} of route out"]
    assert state == "wrong" and "is this host: mail to it would loop" in what and "give route out another host" in what


def test_a_relay_behind_an_address_translation_is_known_by_its_greeting(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ways, "is_local", lambda address: False)
    with FakeMx({}, banner=b"220 mail.test ESMTP\r\n") as peer:
        _, found = doctor("-c", place.write(to(f"127.0.0.1:{peer.port}")))
    state, what = found[f"smart host 127.0.0.1:{peer.port} of route out"]
    assert state == "wrong" and "greets with our own name, mail.test" in what and "give route out another host" in what


def test_files_of_routes_and_filters(place: Place) -> None:
    authority, folder = trustme.CA(), place.folder
    authority.cert_pem.write_to_path(folder / "ca.pem")
    day = datetime.timedelta(days=1)
    certified(folder, authority, "old.test", not_after=datetime.datetime.now(datetime.UTC) - day)
    files = f'tls = "verify"\nca_file = "{folder}/ca.pem"\nclient_certificate = "{folder}/old.test.pem"\n'
    route = to(f"127.0.0.1:{free_port()}", more=files)
    filter = f'[[filter]]\nname = "scanner"\ntype = "clamd"\naddress = ["127.0.0.1:{free_port()}"]\n'
    status, found = doctor("-c", place.write(route + filter))
    assert status == 1 and found["ca_file of route out"][0] == "ok"
    state, what = found["client_certificate of route out"]
    assert state == "wrong" and "old.test.pem has expired on" in what and "renew it" in what
    state, what = found["filters"]
    assert state == "warning" and "filter.0.address.0: 127.0.0.1:" in what and "`relaymta filter check -c" in what
    (folder / "old.test.pem").unlink()
    state, what = doctor("-c", place.write(route), "--offline")[1]["client_certificate of route out"]
    assert state == "wrong" and "No such file or directory: correct it" in what


def test_smart_hosts(place: Place) -> None:
    old = trustme.CA().issue_cert("mx.test", not_after=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.configure_cert(context)
    refused = free_port()
    rules = {"EHLO": b"250-mx.test\r\n250 STARTTLS\r\n"}
    with FakeMx(rules, tls=context) as late, FakeMx({}) as bare, FakeMx({}, banner=b"554 5.7.1 not you\r\n") as closed:
        routes = f"""
            [[route]]
            name = "a"
            recipient_domain = ["a.example"]
            hosts = ["127.0.0.1:{refused}", "none.test:587", "mx.test:{bare.port}", "127.0.0.1:{closed.port}"]
            [[route]]
            name = "b"
            hosts = ["mx.test:{late.port}", "mx.test:{bare.port}"]
            tls = "verify"
        """
        status, found = doctor("-c", place.write(routes))
    assert status == 1
    for name, state, *words in (
        (f"127.0.0.1:{refused} of route a", "wrong", "Connection refused", "start the program that should listen at 127.0.0.1"),
        ("none.test:587 of route a", "wrong", "it does not exist", "correct the name in hosts of route a"),
        (f"mx.test:{bare.port} of route a", "ok", "without TLS"),
        (f"127.0.0.1:{closed.port} of route a", "wrong", "554 5.7.1 not you", "ask who runs"),
        (f"mx.test:{late.port} of route b", "wrong", "certificate", "trusted", "ca_file"),
        (f"mx.test:{bare.port} of route b", "wrong", "does not offer STARTTLS", "tls, ca_file and client_certificate of route b"),
    ):
        row = found[f"smart host {name}"]
        assert row[0] == state and all(word in row[1] for word in words), (name, row)


def test_port_25_and_mail_for_our_own_domains(place: Place) -> None:
    relay = '[relay]\ndomains = ["own.test", "other.test", "none.test", "here.test"]\n'
    route = '[[route]]\nname = "here"\nrecipient_domain = ["here.test"]\nhosts = ["127.0.0.1:1"]\n'
    with FakeMx({}) as open_port:
        path = place.write(relay + route)
        _, found = doctor("-c", path, "--probe-host", f"127.0.0.1:{open_port.port}")
        assert found["port 25"][0] == "ok"
    status, found = doctor("-c", path, "--probe-host", f"127.0.0.1:{free_port()}")
    state, what = found["port 25"]
    assert status == 1 and state == "wrong" and "Connection refused" in what and "send by a smart host" in what
    state, what = found["mail for own.test"]
    assert state == "wrong" and "would loop" in what and 'recipient_domain = ["own.test"]' in what
    assert found["mail for other.test"][0] == found["mail for none.test"][0] == "wrong"
    assert found["mail for here.test"] == ("ok", "route here")
    state, what = doctor("-c", path)[1]["port 25"]  # the nameserver of the test does not know the default
    assert state == "warning" and "--probe-host" in what
    assert not {"port 25", "mail for own.test", "smart host 127.0.0.1:1 of route here"} & set(doctor("-c", path, "--offline")[1])


def test_addresses(place: Place) -> None:
    place.tables += '[[source]]\nname = "gone"\naddress = "192.0.2.77"\n'
    lists = '[[filter]]\nname = "lists"\ntype = "dnsbl"\n[[filter.lists]]\nzone = "list.test"\ncodes = ["127.0.0.2"]\n'
    words = [word for address in ("8.8.8.8", "1.1.1.1", "9.9.9.9", "10.0.0.1") for word in ("--address", address)]
    status, found = doctor("-c", place.write(lists), "--probe-host", "127.0.0.1:1", "--dnsbl", *words)
    assert (
        status == 1 and "DNSBL list.test of 8.8.8.8" not in doctor("-c", place.write(lists), "--probe-host", "[::1]:1", *words)[1]
    )
    for name, state, what in (
        ("PTR of 8.8.8.8", "warning", "named.test, but EHLO gives mail.test: set hostname to named.test"),
        ("PTR of 1.1.1.1", "wrong", "does not have this address: have whoever gave you the address set it"),
        ("PTR of 9.9.9.9", "wrong", "no PTR record"), ("address 10.0.0.1", "warning", "give it with --address"),
        ("source gone", "warning", "not an address of this machine now: add it"),
        ("DNSBL list.test of 8.8.8.8", "wrong", "listed (127.0.0.2): find out why"),
        ("DNSBL list.test of 1.1.1.1", "warning", "refuses to answer your nameserver"),
        ("DNSBL list.test of 9.9.9.9", "ok", "not listed"),
    ):  # fmt: skip
        assert found[name][0] == state and what in found[name][1], (name, found[name])


def test_clocks(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = place.write(to("127.0.0.1:1"))

    def unknown() -> bool:
        raise PermissionError(1, "Operation not permitted")

    def clock() -> tuple[str, str]:
        return doctor("-c", path, "--offline")[1]["clock"]

    monkeypatch.setattr(doctor_here, "_is_kept", lambda: False)
    assert clock()[0] == "warning" and "not kept by NTP" in clock()[1] and "timedatectl set-ntp true" in clock()[1]
    monkeypatch.setattr(doctor_here, "_is_kept", unknown)
    assert clock()[0] == "ok" and "cannot be asked here" in clock()[1]
    (tmp_path / "spool/shard-0").mkdir(parents=True)
    (tmp_path / "spool/shard-0/data.mdb").touch()
    os.utime(tmp_path / "spool/shard-0/data.mdb", (time.time() + 7200, time.time() + 7200))
    assert clock()[0] == "wrong" and "was set back" in clock()[1] and "timedatectl" in clock()[1]
    shutil.rmtree(tmp_path / "spool")
    os.utime(path, (time.time() + 200_000, time.time() + 200_000))
    monkeypatch.setattr(doctor_here, "DATED", (path,))
    assert clock()[0] == "wrong" and "this machine has files of" in clock()[1]


def test_the_kernel_says_whether_its_clock_is_kept() -> None:
    assert doctor_here._is_kept() in (True, False)


def test_limits_of_the_machine(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = place.write(to("127.0.0.1:1"))
    few = tmp_path / "somaxconn"
    few.write_text("128\n")
    monkeypatch.setattr(doctor_limits, "_SOMAXCONN", few)
    monkeypatch.setattr(doctor_limits.memory, "limit", lambda process: (64 << 20, 0.5))
    limits = {resource.RLIMIT_NOFILE: (256, 256), resource.RLIMIT_AS: (8 << 30, 8 << 30)}
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    _, found = doctor("-c", path, "--offline")
    for name, state, cure in (
        ("listen queue", "warning", "sysctl -w net.core.somaxconn="), ("memory", "warning", "MemoryMax="),
        ("descriptors", "wrong", "LimitNOFILE="), ("address space", "wrong", "LimitAS=infinity"),
    ):  # fmt: skip
        assert found[name][0] == state and cure in found[name][1], found[name]
    monkeypatch.setattr(doctor_limits.memory, "limit", lambda process: (1 << 30, 0.97))
    state, what = doctor("-c", path, "--offline")[1]["memory"]
    assert state == "wrong" and "mail is temporarily rejected" in what


def test_a_spool_that_is_a_link_to_what_is_not_there(place: Place) -> None:
    (place.folder / "spool").symlink_to("/nonexistent/disk")
    state, what = doctor("-c", place.write(), "--offline")[1]["permissions"]
    assert state == "wrong" and f"{place.folder}/spool is a link to /nonexistent/disk, which is not there" in what


def test_a_configuration_that_everybody_can_change(place: Place) -> None:
    path, folder = place.write(), place.folder / "conf.d"
    folder.mkdir()
    assert doctor("-c", path, "--offline")[1]["permissions"][0] == "ok"
    for one in (Path(path), folder):
        before = one.stat().st_mode
        one.chmod(before | 0o002)
        state, what = doctor("-c", path, "--offline")[1]["permissions"]
        assert state == "warning" and f"{one}: every user of this machine can change it" in what and "chmod o-w" in what
        one.chmod(before)


def test_an_open_relay(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.write(to("127.0.0.1:1") + '[relay]\nnetworks = ["0.0.0.0/0"]\nopen_relay = true\n')
    state, what = doctor("-c", path, "--offline")[1]["open relay"]
    assert state == "warning" and "loopback addresses only" in what
    monkeypatch.setattr("relaymta.cli.doctor_config.default_addresses", lambda: ["8.8.8.8"])
    login = 'protocol = "http"\ntls = "implicit"\nauth = "require"\n[accounts]\nurl = "https://login.test/"\n'
    wide = '[relay]\nnetworks = ["0.0.0.0/0"]\nopen_relay = true\n'
    certificate = certified(place.folder, trustme.CA(), "mail.test")
    path = place.write(f'{to("127.0.0.1:1")}{wide}{certificate}[[listener]]\naddress = "0.0.0.0:{free_port()}"\n{login}')
    assert doctor("-c", path, "--offline")[1]["open relay"] == (state, what), "nobody sends there without a login"
    place.listener = f"0.0.0.0:{place.port}"
    path = place.write(to("127.0.0.1:1") + '[relay]\nnetworks = ["0.0.0.0/0"]\nopen_relay = true\n')
    status, found = doctor("-c", path, "--offline")
    state, what = found["open relay"]
    assert status == 1 and state == "wrong" and "may relay: that is an open relay" in what and "remove relay.open_relay" in what


def test_a_broken_configuration_leaves_the_checks_that_need_none(place: Place, tmp_path: Path) -> None:
    path = place.write("[limits]\nx = 1\n")
    status, found = doctor("-c", path)
    assert status == 1 and found["configuration"][0] == "wrong" and f"{path}:" in found["configuration"][1]
    assert {"interpreter", "kernels", "listen queue", "clock"} < set(found) and "disk of the spool" not in found
    found = doctor("-c", str(tmp_path / "none.toml"))[1]
    assert found["configuration"][0] == "wrong" and "or name another one (-c FILE)" in found["configuration"][1]
    place.keys["user"] = '"nosuchuser"'
    state, what = doctor("-c", place.write(to("127.0.0.1:1")))[1]["configuration"]
    assert state == "wrong" and "there is no user 'nosuchuser': create it" in what


def test_without_a_file_the_options_are_checked(place: Place, tmp_path: Path) -> None:
    found = doctor("--offline", "--spool", str(tmp_path / "s"), "--set", 'route=[{hosts=["127.0.0.1:1"]}]')[1]
    assert found["configuration"][0] == "ok" and "disk of the spool" in found and found["daemon"][0] == "warning"


# The checks themselves


def hangs(scene: Scene) -> list[Row]:
    threading.Event().wait(30)
    return []


async def hangs_too(scene: Scene) -> list[Row]:
    import asyncio

    await asyncio.Event().wait()
    return []


def fails(scene: Scene) -> list[Row]:
    raise KeyError("x")


def ends(scene: Scene) -> list[Row]:
    sys.exit(3)


def kills(scene: Scene) -> list[Row]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def stops(scene: Scene) -> list[Row]:
    os.kill(os.getpid(), signal.SIGSTOP)
    return []


def test_no_check_hangs_or_ends_the_command(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    path = place.write(to("127.0.0.1:1"))
    monkeypatch.setattr(doctor_checks, "CHECKS", [Check("fails", fails), Check("ends", ends), CHECKS[0]])
    status, found = doctor("-c", path)
    assert status == 1 and found["fails"][0] == found["ends"][0] == "wrong" and "interpreter" in found
    assert "KeyError: 'x'" in found["fails"][1] and "SystemExit(3)" in found["ends"][1]
    monkeypatch.setattr(doctor_checks, "CHECKS", [Check("hangs", hangs), Check("too", hangs_too), CHECKS[0]])
    monkeypatch.setattr(doctor_checks, "LIMIT", 0.2)
    status, found = doctor("-c", path)
    assert status == 1 and found["hangs"] == found["too"] and "interpreter" in found
    assert found["hangs"][0] == "wrong" and "longer than 0.2 s: see whether" in found["hangs"][1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a process of another user's")
def test_no_check_hangs_or_ends_the_process_of_the_relays_user(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    place.keys["user"] = '"nobody"'
    path = place.write(to("127.0.0.1:1"))
    who = Check("who", lambda scene: [("who", "ok", str(os.getuid()))])
    asks = Check("asks", lambda scene: [("asks", "ok", str(os.getuid()))], Need.CALLER)
    monkeypatch.setattr(doctor_checks, "CHECKS", [who, asks, Check("fails", fails)])
    _, found = doctor("-c", path)
    assert (found["who"][1], found["asks"][1]) == ("65534", "0") and "KeyError" in found["fails"][1]
    monkeypatch.setattr(doctor_checks, "CHECKS", [asks, Check("kills", kills)])
    _, found = doctor("-c", path)
    assert found["asks"][0] == "ok" and found["kills"][0] == "wrong" and "its process has ended" in found["kills"][1]
    monkeypatch.setattr(doctor_checks, "CHECKS", [Check("stops", stops)])
    monkeypatch.setattr(doctor_checks, "LIMIT", 0.2)
    monkeypatch.setattr(doctor_checks, "SPARE", 0.2)
    assert doctor("-c", path)[1]["stops"][0] == "wrong"


def test_another_user_is_told_who_can_check(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    place.keys["user"] = '"nobody"'
    (place.folder / "spool").mkdir()
    path = place.write(to("127.0.0.1:1") + certified(place.folder, trustme.CA(), "mail.test"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    found = doctor("-c", path, "--offline")[1]
    for name in ("permissions", "certificate"):
        assert found[name] == ("warning", "run as root or nobody to check this with the rights of the relay"), name

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("relaymta.control.ask", refused)
    found = doctor("-c", path, "--offline")[1]
    assert found["daemon"][0] == "warning" and "run as root or nobody to check the running relay" in found["daemon"][1]


def test_the_page_has_a_row_for_each_check() -> None:
    text = (ROOT / "docs/cli.md").read_text().partition("## `relaymta doctor`")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| [^|]+ \|$", text, re.M)
    named = [name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row)]
    assert named == [check.name for check in CHECKS]
