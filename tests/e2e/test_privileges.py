"""What root touches before it becomes `user`, and from where our processes import."""

import grp
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import relaymta
from relaymta import control, privileges
from relaymta.config import load
from relaymta.errors import ConfigError
from relaymta.queue import offline
from relaymta.sockets import control_socket, remove_socket
from relaymta.supervisor import checks
from tests.support.daemon import Relay, free_port, wait_for

NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="dropping root needs root")


def test_who_is_at_the_other_end_of_a_unix_socket():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert privileges.peer_of(ours) == (os.getpid(), os.geteuid(), os.getegid())
    with pytest.raises(OSError):
        privileges.peer_of(ours)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder that others may enter: every pytest that starts closes the folders of pytest to them."""
    with tempfile.TemporaryDirectory(prefix="relaymta-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


def runs_as_nobody(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", ""], user=NOBODY, check=False).returncode == 0
    except PermissionError:
        return False


def relay_of_nobody(folder: Path, port: int, *settings: str) -> Relay:
    """A relay that is started by root and runs as the user nobody; its log is in a folder of nobody's."""
    for one in [folder, *folder.parents]:
        if one != one.parent:
            one.chmod(one.stat().st_mode | 0o055)
    log = folder / "log"
    log.mkdir()
    os.chown(log, NOBODY, NOBODY)
    relay = Relay(folder, f"127.0.0.1:{port}", "user=nobody", *settings)
    relay.log = log / "relay.log"
    if not runs_as_nobody(sys.executable):
        relay.python = "/usr/bin/python3"  # the user nobody cannot execute ours
        paths = [str(Path(relaymta.__file__).parent.parent), sysconfig.get_path("purelib")]
        relay.environment = {"PYTHONPATH": ":".join(paths)}
    return relay


def refused(relay: Relay) -> str:
    """The error output of a start that ends with status 78."""
    command = relay.command()
    done = subprocess.run(command, env=os.environ | relay.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78, (done.returncode, done.stderr)
    return done.stderr


def secret_of_root(folder: Path) -> Path:
    victim = folder / "roots"
    victim.write_text("root's alone")
    victim.chmod(0o600)
    return victim


def untouched(victim: Path) -> bool:
    found = victim.stat()
    return (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), victim.read_text()) == (0, 0, 0o600, "root's alone")


@root_only
def test_root_is_dropped_with_its_groups(tmp_path, ledger):
    """The log and the control socket may be in folders of root's: they belong to the user that the relay runs as."""
    run = tmp_path / "run"
    run.mkdir()
    path = run / "relaymta.sock"
    relay = relay_of_nobody(tmp_path, ledger.port, f"control.socket={path}")
    relay.log = tmp_path / "var/relay.log"

    def check_socket() -> None:
        found = path.lstat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (NOBODY, 0o660)

    with relay:
        relay.send("X-Ledger: nobody\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["nobody"] and relay.events("delivered"))
        assert relay.process is not None
        workers = [row["pid"] for row in control.ask(path, "status")["workers"]]
        assert len(workers) == 1
        for pid in [relay.process.pid, *workers]:
            status = Path(f"/proc/{pid}/status").read_text()
            for what in ("Uid", "Gid"):
                assert f"\n{what}:\t65534\t65534\t65534\t65534\n" in status
            assert "\nGroups:\t65534 \n" in status
        assert all(file.stat().st_uid == NOBODY for file in relay.spool.rglob("*"))
        check_socket()
        assert relay.log.stat().st_uid == NOBODY and relay.log.parent.stat().st_uid == 0
        assert relay.stop() == 0
    with relay:  # the spool belongs to the user nobody now, and the old socket is left over
        check_socket()
        relay.send("X-Ledger: again\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["again"])
        # A log that cannot be reopened continues in the old file.
        old = tmp_path / "var/relay.log.1"
        relay.log.rename(old)
        relay.log = old
        relay.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: sum("stays in use" in row["text"] for row in relay.events("warning")) == 2)
        relay.send()
        wait_for(lambda: len(relay.events("delivered")) == 3)
        assert relay.stop() == 0


@root_only
def test_links_in_the_spool_do_not_give_files_of_roots_away(tmp_path, ledger):
    relay = relay_of_nobody(tmp_path, ledger.port)
    victim = secret_of_root(tmp_path)
    folder = tmp_path / "roots-folder"
    folder.mkdir()
    for path in (relay.spool, relay.spool / "node"):
        path.mkdir()
        os.chown(path, NOBODY, NOBODY)
        (path / "link").symlink_to(victim)
        (path / "folder").symlink_to(folder)
    (relay.spool / "node/rates.new").symlink_to(victim)
    (relay.spool / "node/providers.new").symlink_to(victim)
    os.link(victim, relay.spool / "hard")
    with relay:
        relay.send("X-Ledger: one\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["one"])
        assert (relay.spool / "control.sock").lstat().st_uid == NOBODY
        assert relay.stop() == 0
    assert untouched(victim) and folder.stat().st_uid == 0


@root_only
def test_a_link_in_place_of_the_file_of_tokens_does_not_lead_root_elsewhere(tmp_path):
    spool, secret = tmp_path / "spool", tmp_path / "secret"
    spool.mkdir(mode=0o700)
    os.chown(spool, NOBODY, NOBODY)
    secret.mkdir(mode=0o700)
    config = tmp_path / "relaymta.toml"
    config.write_text(f'hostname = "a.example"\nspool = "{spool}"\n[[listener]]\naddress = "127.0.0.1:2525"\n')

    def token(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "relaymta", "-c", str(config), "token", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    create = ("create", "--name", "a", "--scope", "all")
    for target in (secret / "new", secret / "kept"):
        (secret / "kept").write_text('{"tokens": []}')
        (spool / "admin-tokens.json").symlink_to(target)
        for words in (create, ("revoke", "a")):
            assert token(*words).returncode in (1, 74), words
        (spool / "admin-tokens.json").unlink()
    assert [path.name for path in secret.iterdir()] == ["kept"] and (secret / "kept").read_text() == '{"tokens": []}'
    assert token(*create).returncode == 0
    made = (spool / "admin-tokens.json").stat()
    assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (NOBODY, 0o600)
    assert token("list").stdout.startswith("a  ") and token("revoke", "b").returncode == 1
    assert token("revoke", "a").returncode == 0 and token("list").stdout == ""


@root_only
def test_a_hard_link_in_a_spool_of_roots_is_named(tmp_path):
    relay = relay_of_nobody(tmp_path, free_port())
    victim = secret_of_root(tmp_path)
    relay.spool.mkdir(mode=0o700)
    os.link(victim, relay.spool / "hard")
    assert f"{relay.spool}/hard" in refused(relay)
    assert untouched(victim)


@root_only
def test_a_spool_that_another_user_could_have_replaced_is_not_given_away(tmp_path):
    """Its path is a link, in a folder of the user nobody, to a folder of root's."""
    relay = relay_of_nobody(tmp_path, free_port())
    folder, home = tmp_path / "roots-folder", tmp_path / "home"
    folder.mkdir(mode=0o700)
    (folder / "file").touch()
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    (home / "spool").symlink_to(folder)
    relay.spool = home / "spool"
    assert f"spool: {relay.spool} is not writable" in refused(relay)
    assert folder.stat().st_uid == 0 and (folder / "file").stat().st_uid == 0


@root_only
@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_link_in_place_of_the_log_does_not_give_a_file_of_roots_away(tmp_path, how):
    relay = relay_of_nobody(tmp_path, free_port())
    victim = secret_of_root(tmp_path)
    relay.log.symlink_to(victim) if how == "symbolic" else os.link(victim, relay.log)
    assert f"log.file: {relay.log}" in refused(relay)
    assert untouched(victim)


GROUP = "mail"


@root_only
def test_members_of_a_group_may_use_the_command_line(tmp_path, ledger):
    run, gid = tmp_path / "run", grp.getgrnam(GROUP).gr_gid
    run.mkdir()
    path = run / "relaymta.sock"
    relay = relay_of_nobody(tmp_path, ledger.port, f"control.socket={path}", f"control.group={GROUP}")

    def ask(*groups: int) -> str:
        """As a user in these groups."""

        def work() -> str:
            os.setgroups(groups)
            os.setresgid(54_321, 54_321, 54_321)
            os.setresuid(54_321, 54_321, 54_321)
            try:
                return str(control.ask(path, "status")["pid"])
            except PermissionError as error:
                return str(error.strerror)

        return str(in_a_child(work))

    with relay:
        found = path.lstat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, gid, 0o660)
        assert relay.process is not None and ask(gid) == str(relay.process.pid)
        assert ask() == "Permission denied"


@root_only
@pytest.mark.parametrize(("root", "gives"), [(True, True), (False, False)])
def test_who_can_give_the_control_socket_to_a_group(tmp_path, root, gives):
    """Root, or a member of it (which the user nobody is not)."""
    folder, gid = tmp_path / "folder", grp.getgrnam(GROUP).gr_gid
    folder.mkdir()
    for one in [folder, *folder.parents][:-1]:
        one.chmod(one.stat().st_mode | 0o055)
    os.chown(folder, NOBODY, NOBODY)

    def work() -> str:
        if not root:
            privileges.become(privileges.account("nobody"))
        try:
            control_socket(folder / "socket", None, gid).close()
        except ConfigError as error:
            return str(error)
        return ""

    answer = in_a_child(work)
    assert (folder / "socket").exists() is gives
    if gives:
        assert (folder / "socket").lstat().st_gid == gid and not answer
    else:
        assert str(answer).startswith("control.group: only root, or a member of the group, can give the socket to it")


@root_only
def test_a_group_that_cannot_get_to_the_socket_is_named(tmp_path):
    spool, run = tmp_path / "spool", tmp_path / "run"
    spool.mkdir(mode=0o700)
    run.mkdir(mode=0o710)
    for one in [tmp_path, *tmp_path.parents][:-1]:
        one.chmod(one.stat().st_mode | 0o055)
    keys = {"listener": [{"address": "127.0.0.1:1"}], "spool": str(spool), "control.group": GROUP}
    (warning,) = checks.closed_socket(load(None, keys))
    assert f"its members cannot get to {spool}/control.sock: {spool} is closed to them (mode 0700)" in warning
    elsewhere = keys | {"control.socket": f"{run}/socket"}
    assert len(checks.closed_socket(load(None, elsewhere))) == 1, "it has another group"
    os.chown(run, 0, grp.getgrnam(GROUP).gr_gid)
    assert checks.closed_socket(load(None, elsewhere)) == []


# The interpreter


@root_only
@pytest.mark.parametrize("closed", ["interpreter", "code", ""])
def test_an_interpreter_that_the_user_cannot_execute_is_named(tmp_path, monkeypatch, closed):
    """As in a virtual environment in a folder of root's."""
    for one in [tmp_path, *tmp_path.parents][:-1]:
        one.chmod(one.stat().st_mode | 0o055)
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", home / "bin/python")
    home.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(home / "bin/python") if closed == "interpreter" else "/bin/true")
    monkeypatch.setattr(relaymta, "__file__", str(home / "bin/python") if closed == "code" else "/bin/true")
    config = load(None, {"listener": [{"address": "127.0.0.1:1"}], "user": "nobody"})

    def work() -> str:
        privileges.become(privileges.account("nobody"))
        try:
            checks.check_program(config)
        except ConfigError as error:
            return str(error)
        return ""

    what = {"interpreter": "execute the interpreter", "code": "read our code", "": ""}[closed]
    expected = f"command line: user: nobody cannot {what} {home}/bin/python: {home} is closed to it; install relaymta where"
    assert str(in_a_child(work)).startswith(expected) if closed else in_a_child(work) == ""


# Folders that only root can change

FOLDERS = [  # (folders with owner and mode, whether only root can change the last)
    ([("a", 0, 0o755)], True),
    ([("a", 0, 0o700), ("b", 0, 0o755)], True),
    ([("a", NOBODY, 0o755)], False),
    ([("a", NOBODY, 0o755), ("b", 0, 0o755)], False),
    ([("a", 0, 0o777)], False),
    ([("a", 0, 0o777), ("b", 0, 0o755)], False),
    ([("a", 0, 0o1777)], False),
    ([("a", 0, 0o1777), ("b", 0, 0o755)], True),
    ([("a", 0, 0o1777), ("missing", 0, 0)], False),
    ([("a", 0, 0o755), ("missing", 0, 0)], True),
    ([("a", NOBODY, 0o755), ("missing", 0, 0)], False),
    ([("group", 0, 0o775)], False),  # the user is in its group
]


@root_only
@pytest.mark.parametrize(("folders", "alone"), FOLDERS)
def test_folders_that_only_root_can_change(tmp_path, folders, alone):
    path = tmp_path
    for name, owner, mode in folders:
        path /= name
        if name != "missing":
            path.mkdir()
            os.chown(path, owner, NOBODY if name == "group" else 0)
            path.chmod(mode)
    assert privileges.roots_alone(path, privileges.account("nobody")) is alone


@root_only
@pytest.mark.parametrize(("owner", "target", "alone"), [(0, "roots", True), (NOBODY, "roots", False), (0, "others", False)])
def test_only_root_can_change_a_link_if_that_holds_for_it_and_its_target(tmp_path, owner, target, alone):
    for name, who in (("roots", 0), ("others", NOBODY)):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, who, who)
    (tmp_path / "link").symlink_to(target)
    os.chown(tmp_path / "link", owner, owner, follow_symlinks=False)
    assert privileges.roots_alone(tmp_path / "link") is alone


@root_only
def test_a_loop_of_links_is_not_roots_alone(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert not privileges.roots_alone(tmp_path / "one")


def in_a_child(work) -> dict[str, object]:
    """The result of `work()`, which runs in a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(writer, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        result = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    found: dict[str, object] = json.loads(result)
    return found


def ids() -> dict[str, object]:
    return {"user": os.getresuid(), "group": os.getresgid(), "groups": os.getgroups()}


@root_only
@pytest.mark.parametrize("uid", [NOBODY, 54_321], ids=["nobody", "without a name"])
def test_the_spool_is_read_as_its_owner_without_groups_of_roots(tmp_path, uid):
    spool = tmp_path / "spool"
    spool.mkdir()
    os.chown(spool, uid, NOBODY)
    for path in [tmp_path, *tmp_path.parents][:-1]:
        path.chmod(path.stat().st_mode | 0o055)

    def read() -> dict[str, object]:
        os.setgroups([0, 4, 27])
        offline.answer(spool, "shards")
        return ids()

    found = in_a_child(read)
    assert found == {"user": [uid] * 3, "group": [NOBODY] * 3, "groups": [NOBODY]}


@root_only
def test_root_privileges_that_are_left_are_an_error(monkeypatch):
    monkeypatch.setattr(os, "setresuid", lambda *ids: None)

    def work() -> str:
        try:
            privileges.become(privileges.account("nobody"))
        except ConfigError as error:
            return str(error)
        return ""

    assert "could not become nobody" in str(in_a_child(work))


# The path of the control socket


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to a socket", "fifo"])
def test_another_file_at_the_path_of_the_control_socket_stays_and_is_reported(tmp_path, kind):
    path, other = tmp_path / "control.sock", tmp_path / "other"
    if kind == "file":
        path.write_text("dear")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a file":
        other.write_text("dear")
        path.symlink_to(other)
    else:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(other))
        path.symlink_to(other)
    before = path.lstat()
    with pytest.raises(ConfigError, match=str(path)):
        control_socket(path)
    assert path.lstat().st_ino == before.st_ino
    if other.exists() and kind == "link to a file":
        assert other.read_text() == "dear"


def test_a_socket_on_which_no_process_answers_is_removed_and_no_other_file(tmp_path):
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    first = control_socket(path)
    with pytest.raises(Exception, match="another relaymta answers here"):
        control_socket(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    remove_socket(first, path)
    assert not path.exists()
    again = control_socket(path)
    path.unlink()
    path.write_text("of another program")
    remove_socket(again, path)
    assert path.exists()


def test_a_file_named_by_control_socket_survives_serve(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear")
    relay = Relay(tmp_path, f"127.0.0.1:{free_port()}", f"control.socket={path}")
    assert f"control.socket: {path}" in refused(relay)
    assert path.read_text() == "dear"


# From where our processes import

EVIL = """
import os, pathlib
pathlib.Path({mark!r}).open("a").write(__name__ + "\\n")
raise ImportError("from the current folder")
"""
MODULES = ["uvloop", "spf", "dkim", "lmdb", "msgspec", "aiosmtplib", "cryptography", "asyncio", "socket", "click", "pydantic"]


@pytest.mark.parametrize("start", ["script", "module"])
def test_nothing_is_imported_from_the_current_folder(tmp_path, ledger, start, monkeypatch):
    """By the supervisor, its workers, the process that signs, and the verbs of the command line."""
    here, mark = tmp_path / "here", tmp_path / "mark"
    here.mkdir()
    for name in MODULES if start == "script" else [name for name in MODULES if name not in sys.stdlib_module_names]:
        (here / f"{name}.py").write_text(EVIL.format(mark=str(mark)))
    key = tmp_path / "key.pem"
    script = [str(Path(sys.executable).parent / "relaymta")] if start == "script" else [sys.executable, "-m", "relaymta"]
    monkeypatch.chdir(here)
    made = ["dkim", "keygen", "b.example", "--selector", "s", "--type", "ed25519", "--out", str(key)]
    subprocess.run([*script, *made, "--spool", str(tmp_path / "spool")], check=True, capture_output=True)
    signing = f'dkim=[{{domain="b.example", selector="s", key="{key}"}}]'
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}", signing)
    command = relay.command()
    relay.command = lambda: [*script, *command[3:]]  # type: ignore[method-assign]
    with relay:
        relay.send("X-Ledger: one\r\nFrom: a@b.example\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["one"])
        subprocess.run([*script, "queue", "summary", "--spool", str(relay.spool)], check=True, capture_output=True)
        (worker,) = relay.worker_pids()
        children = wait_for(lambda: Path(f"/proc/{worker}/task/{worker}/children").read_text().split())
        for pid in (str(worker), *children):
            assert b"-I" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert not mark.exists(), mark.read_text()


def test_the_supervisors_pythonpath_does_not_come_first_in_its_workers(tmp_path, ledger):
    """It is searched last, so that a relay that is installed there is found."""
    evil, mark = tmp_path / "evil", tmp_path / "mark"
    evil.mkdir()
    (evil / "aiosmtplib.py").write_text(EVIL.format(mark=str(mark)))
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}")
    relay.environment = {"PYTHONPATH": str(evil)}
    with relay:
        relay.send("X-Ledger: one\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["one"])
    assert not mark.exists()


@root_only
@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "fifo"])
def test_root_appends_to_no_file_that_another_user_could_have_put_there(tmp_path, kind):
    others, victim = tmp_path / "others", secret_of_root(tmp_path)
    others.mkdir()
    os.chown(others, NOBODY, NOBODY)
    path = others / "log"
    if kind == "symbolic link":
        path.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, path)
    else:
        os.mkfifo(path)
    with pytest.raises(OSError):
        os.close(privileges.append_to(path, 0o640))
    os.close(privileges.append_to(others / "fresh", 0o640))
    assert untouched(victim)


CHECKED = """
import sys
from pathlib import Path
from relaymta.config import load
from relaymta.supervisor import checks
config = load(Path(sys.argv[1]), {})
checks.import_all(config)
print(*sorted({"cryptography.x509", "difflib", "relaymta.accept.endpoint", "relaymta.filter.keys", "scramp"} - set(sys.modules)))
"""


def test_what_the_checks_of_files_import_is_imported_before_root_is_dropped(tmp_path):
    config = tmp_path / "relaymta.toml"
    config.write_text(f'[[listener]]\naddress = "127.0.0.1:2525"\n[relay]\nrecipients = "{tmp_path}/recipients"\n')
    done = subprocess.run([sys.executable, "-c", CHECKED, str(config)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
