"""The configuration: every key says what a reload does with it, and every problem names its place."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from relaymta.cli import main
from relaymta.config import Config, Listener, describe, load
from relaymta.config.describing import leaves
from relaymta.config.values import When, is_list, model_of, when
from relaymta.sockets import bound
from relaymta.supervisor import configuration
from relaymta.supervisor.checks import exposed_secrets
from tests.support.daemon import free_port

START = '[[listener]]\naddress = "127.0.0.1:25"\n'


def test_every_key_says_whether_a_reload_applies_it():
    silent = [key for key, field in leaves() if when(field) is None]
    assert not silent, "annotate them: Reload[...] or Restart[...]"
    assert {when(field) for _, field in leaves()} == set(When)


def test_a_repeated_table_is_applied_as_a_whole():
    """Or a table that is added, removed or moved could be applied in part only."""
    for name, field in Config.model_fields.items():
        model = model_of(field.annotation)
        if model is not None and is_list(field.annotation):
            assert len({when(below) for _, below in leaves(model)}) == 1, name


def test_the_reference_says_which_keys_need_a_restart():
    text = describe()
    restart = {field.alias or key.rpartition(".")[2] for key, field in leaves() if when(field) is When.RESTART}
    shown = re.findall(r"^# .* \(restart\)\n#(\w+) = ", text, re.M)
    assert set(shown) == restart and text.count(" (restart)\n") == len([key for key in leaves() if when(key[1]) is When.RESTART])


@pytest.mark.parametrize("text", ["192.0.2.1", "192.0.2.1:5353", "2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:53"])
def test_name_servers_are_addresses(text):
    config = load(None, {"listener": [{"address": "127.0.0.1:25"}], "delivery.nameservers": [text]})
    assert config.delivery.nameservers == [text]


def test_workers_do_not_ask_for_the_name_of_the_host_again():
    config = load(None, {"listener": [{"address": "127.0.0.1:25"}]})
    assert f'"hostname":"{config.hostname}"' in config.to_json()


def checked(path: Path, text: str) -> tuple[int, list[str]]:
    """The exit status of `config check`, and its lines."""
    path.write_text(text)
    done = CliRunner().invoke(main, ["config", "check", "-c", str(path), "--set", "ephemeral=true"])
    return done.exit_code, (done.stderr or done.stdout).splitlines()


def test_check_looks_at_all_files_folders_and_addresses(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").write_text("\n")
    path = tmp_path / "r.toml"
    text = f"""\
spool = "{tmp_path}/file"
[[listener]]
address = "192.0.2.1:25"
[log]
file = "{tmp_path}/none/relay.log"
[metrics]
listen = "192.0.2.1:9125"
[control]
socket = "{tmp_path}/file"
[[certificate]]
chain = "{tmp_path}/none.pem"
[[dkim]]
domain = "one.example"
selector = "s"
key = "{tmp_path}/none.pem"
[relay]
domains = ["one.example"]
recipients = "{tmp_path}/none"
[accounts]
file = "{tmp_path}/file"
[accounts.tokens]
introspection = "https://a.example/"
client_secret_file = "{tmp_path}/none"
[[route]]
hosts = ["mail.example"]
tls = "verify"
username = "me"
password_file = "{tmp_path}/empty"
"""
    status, lines = checked(path, text)
    assert status == 78
    none = "No such file or directory"
    assert lines == [
        f"{path}:23: accounts.tokens.client_secret_file: {tmp_path}/none: {none}",
        f"{path}:28: route.0.password_file: {tmp_path}/empty: is empty",
        f"{path}:1: spool: {tmp_path}/file is not a directory",
        f"{path}:5: log.file: {tmp_path}/none: {none}",
        f"{path}:9: control.socket: {tmp_path}/file exists and is not a socket",
        f"{path}:3: listener.0.address: 192.0.2.1:25: Cannot assign requested address",
        f"{path}:7: metrics.listen: 192.0.2.1:9125: Cannot assign requested address",
        f"{path}:11: certificate.0.chain: {tmp_path}/none.pem: {none}",
        f"{tmp_path}/file:1: Expected '=' after a key in a key/value pair",
        f"{path}:15: dkim.0.key: {tmp_path}/none.pem: {none}",
        f"{path}:18: relay.recipients: {tmp_path}/none: {none}",
    ]


def test_check_goes_on_behind_what_values_do_not_allow_of_each_other(tmp_path: Path):
    path = tmp_path / "r.toml"
    text = f"""\
route_map = "{tmp_path}/none"
[metrics]
listen = "off"
[[route]]
sources = ["s"]
[[dkim]]
domain = "a.example"
selector = "s"
key = "{tmp_path}/none"
[control]
group = "nogroupx"
"""
    none = "No such file or directory"
    assert checked(path, text) == (
        78,
        [
            f"{path}: listener: there is none: give a [[listener]] table, or --listen HOST:PORT",
            f"{path}:5: route.0.sources: there is no [[source]] 's'",
            f"{path}:1: route_map: {tmp_path}/none: {none}",
            f"{path}:11: control.group: there is no group 'nogroupx' (did you mean \"nogroup\"?)",
            f"{path}:9: dkim.0.key: {tmp_path}/none: {none}",
        ],
    )


def test_check_names_the_key_of_a_missing_accounts_file(tmp_path: Path):
    path = tmp_path / "r.toml"
    assert checked(path, f'{START}[accounts]\nfile = "{tmp_path}/none"\n[metrics]\nlisten = "off"\n')[1] == [
        f"{path}:4: accounts.file: {tmp_path}/none: No such file or directory"
    ]


def test_check_reads_the_route_map(tmp_path: Path):
    path = tmp_path / "r.toml"
    assert checked(path, f'route_map = "{tmp_path}/none"\n{START}') == (
        78, [f"{path}:1: route_map: {tmp_path}/none: No such file or directory"]
    )  # fmt: skip
    (tmp_path / "map").write_text("one.example mai\n")
    assert checked(path, f'route_map = "{tmp_path}/map"\n{START}[[route]]\nname = "main"\nhosts = ["h"]\n') == (
        78, [f"{tmp_path}/map:1: there is no route 'mai' (did you mean \"main\"?)"]
    )  # fmt: skip


def test_a_password_in_the_environment_is_a_note(tmp_path: Path, monkeypatch):
    path, start = tmp_path / "r.toml", f'spool = "{tmp_path}/spool"\n[metrics]\nlisten = "off"\n'
    text = f'{start}[[listener]]\naddress = "127.0.0.1:25"\n[[route]]\nhosts = ["h"]\ntls = "verify"\nusername = "me"\n'
    text += 'password_env = "RELAYMTA_TEST_SECRET"\n'
    note = f"note: {path}:10: route.0.password_env: RELAYMTA_TEST_SECRET is not set in this environment"
    assert checked(path, text) == (0, [note, "the configuration is valid"])
    monkeypatch.setenv("RELAYMTA_TEST_SECRET", "x")
    assert checked(path, text) == (0, ["the configuration is valid"])
    assert not (tmp_path / "spool").exists(), "a check makes nothing"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_check_looks_with_the_rights_of_the_user(tmp_path: Path):
    """In a process of its own, which cannot become root again. Only root can enter the folder."""
    (tmp_path / "roots").mkdir(mode=0o700)
    (tmp_path / "roots" / "secret").write_text("x")
    os.chmod(tmp_path, 0o755)
    path = tmp_path / "r.toml"
    path.write_text(
        f'user = "nobody"\nspool = "{tmp_path}/roots/spool"\n[metrics]\nlisten = "off"\n[log]\nfile = "{tmp_path}/roots/log"\n'
        f'{START}[[route]]\nhosts = ["h"]\ntls = "verify"\nusername = "me"\npassword_file = "{tmp_path}/roots/secret"\n'
    )
    command = [sys.executable, "-m", "relaymta", "config", "check", "-c", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 78
    assert [line.rpartition(f" {tmp_path}/roots")[0] for line in done.stderr.splitlines()] == [
        f"{path}:13: route.0.password_file:",
        f"{path}:2: spool:",
        f"{path}:6: log.file:",
    ]
    assert done.stderr.count("Permission denied") == 3


SECRETS = [  # (what is in the file's table, the line of its key, the key)
    ('[[route]]\nhosts = ["h.example"]\ntls = "verify"\nusername = "me"\npassword_file = "%s"\n', 7, "route.0.password_file"),
    ('[[dkim]]\ndomain = "a.example"\nselector = "s"\nkey = "%s"\n', 6, "dkim.0.key"),
    ('[[certificate]]\nchain = "/c"\nkey = "%s"\n', 5, "certificate.0.key"),
    ('[[certificate]]\nchain = "%s"\n', 4, "certificate.0.chain"),
    ('[accounts]\nfile = "%s"\n', 4, "accounts.file"),
    ('[accounts.tokens]\nintrospection = "https://a.example/"\nclient_secret_file = "%s"\n',
     5, "accounts.tokens.client_secret_file"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "line", "key"), SECRETS, ids=[row[2] for row in SECRETS])
@pytest.mark.parametrize(("mode", "does"), [(0o600, ""), (0o640, ""), (0o660, ""), (0o644, "read"), (0o622, "change")])
def test_a_secret_that_every_user_can_read_is_a_note(tmp_path: Path, table, line, key, mode, does):
    path, secret = tmp_path / "r.toml", tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(mode)
    path.write_text(START + table % secret)
    what = f"every user of this machine can {does} it (mode {mode:04o}): chmod o= {secret}"
    if key == "certificate.0.chain":  # it has the key, too
        assert len(exposed_secrets(load(path, {}))) == bool(does)
    assert exposed_secrets(load(path, {})) == ([f"{path}:{line}: {key}: {secret}: {what}"] if does else [])


def test_check_and_start_say_that_every_user_can_read_a_password(tmp_path: Path):
    path, secret = tmp_path / "r.toml", tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    text = f'hostname = "a.example"\nspool = "{tmp_path}/spool"\n[metrics]\nlisten = "off"\n'
    text += f'[[listener]]\naddress = "127.0.0.1:{free_port()}"\n'
    text += f'[[route]]\nhosts = ["h"]\ntls = "verify"\nusername = "me"\npassword_file = "{secret}"\n'
    status, lines = checked(path, text)
    assert status == 0 and lines[-1] == "the configuration is valid"
    assert [line for line in lines[:-1] if "chmod o=" in line] == lines[:-1]
    assert any("chmod o=" in sentence for sentence in configuration._warnings(load(path, {})))


def test_a_port_of_another_program_is_a_note(tmp_path: Path, monkeypatch):
    """Unless it is the relay's that is running."""
    path = tmp_path / "r.toml"
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        text = f'hostname = "a.example"\nspool = "{tmp_path}/spool"\n[metrics]\nlisten = "{address}"\n{START}'
        taken = f"note: {path}:4: metrics.listen: {address}: another program listens on this port now: a start would fail"
        assert checked(path, text) == (0, [taken, "the configuration is valid"])
        monkeypatch.setattr("relaymta.control.ask", lambda path, op: {"listeners": [], "metrics": address})
        assert checked(path, text) == (0, ["the configuration is valid"])
        monkeypatch.setattr("relaymta.control.ask", lambda path, op: {"listeners": ["127.0.0.1:2"], "metrics": "off"})
        assert checked(path, text) == (0, [taken, "the configuration is valid"])
    monkeypatch.undo()
    assert checked(path, text) == (0, ["the configuration is valid"])


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="needs IPv6")
def test_ipv4_and_ipv6_may_have_the_same_port():
    rows = bound([Listener(address=f"{host}:{port}") for port in [free_port()] for host in ("0.0.0.0", "[::]")], 1)
    assert [sock.family for sock in rows[0]] == [socket.AF_INET, socket.AF_INET6]
    for sock in rows[0]:
        sock.close()


def test_a_group_that_does_not_exist_is_named(tmp_path: Path):
    path = tmp_path / "r.toml"
    text = f'hostname = "a.example"\nspool = "{tmp_path}/spool"\n{START}[metrics]\nlisten = "off"\n[control]\ngroup = "roott"\n'
    assert checked(path, text) == (78, [f"{path}:8: control.group: there is no group 'roott' (did you mean \"root\"?)"])
