"""The file of accounts as `relaymta user` and `relaymta app` edit it: what was meant, or nothing."""

import fcntl
import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from relaymta.auth.identity import Identity
from relaymta.auth.passwords import matches, scram, scram_keys
from relaymta.cli import account as verbs
from relaymta.cli import main
from relaymta.cli.dkim import _put_in_place
from relaymta.config import Account, Dkim, load_accounts

A, B, C = (scram(password) for password in ("a", "b", "c"))
Run = Callable[..., Result]


def secret(kept: str, more: str = "") -> str:
    return f'{{ hash = "{kept}"{more} }}'


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`relaymta user|app ...` with accounts.toml in `tmp_path`."""

    def made(group: str, *words: str, **more: str) -> Result:
        settings = ["--set", f"accounts.file={tmp_path / 'accounts.toml'}", "--set", f"spool={tmp_path}"]
        return CliRunner().invoke(main, [group, *words, *settings], **more)  # type: ignore[arg-type]

    return made


def accounts(folder: Path) -> dict[str, Account]:
    return {account.name: account for account in load_accounts(folder / "accounts.toml")}


PLAIN = f"""# who may send
[[account]]
name = "ann"
secrets = [{secret(A)}]

# bob is on holiday
[[account]]
name = "bob"
secrets = [{secret(B)}]
senders = ["@b.example"]  # all of it
# the end
"""
TABLES = f"""[[account]]
name = "ann"
[[account.secrets]]
hash = "{A}"
[[ account . "secrets" ]]
hash = "{C}"

[[account]]
name = "bob"
[[account.secrets]]
hash = "{B}"
"""
LINES = f"""[[account]]
name = "ann"
secrets = [
    # the one of the printer
    {secret(A)},
    {secret(C)},   # ]
]
priority = "bulk"

[["account"]]  # second
"name" = "bob"
"secrets" = [{secret(B)}]
"""
INDENTED = f"""  [[account]]
  name = "ann"
  secrets = [{secret(A)}]
  [[account]]
    name = "bob"
    secrets = [{secret(B)}]
"""
TEXTS = f'''[[account]]
name = "ann"
application = """
[[account]]
name = \\"eve\\"
secrets = []
# """
secrets = [{secret(A)}]
[[account]]
name = \'\'\'bob\'\'\'
application = \'\'\'
[[account]]
\'\'\'
secrets = [{secret(B)}]
'''
COMMENTED = f"""#[[account]]
#name = "old"
#secrets = [{secret(C)}]
[[account]]  # [[account]]
name = "ann" # [[account]]
secrets = [{secret(A)}] # ]
[[account]]
# name = "ann"
name = "bob"
secrets = [{secret(B)}]
"""
SENDERS = f"""[[account]]
name = "ann"
senders = [
    "a@b.example",
[
]
secrets = [{secret(A)}]
[[account]]
name = "bob"
secrets = [{secret(B)}]
""".replace("[\n]", "]")
FILES = [PLAIN, TABLES, LINES, INDENTED, TEXTS, COMMENTED, SENDERS, PLAIN.replace("\n", "\r\n"), PLAIN.rstrip("\n")]
NAMES = ["plain", "tables", "lines", "indented", "texts", "commented", "senders", "crlf", "no end of line"]


@pytest.mark.parametrize("text", FILES, ids=NAMES)
@pytest.mark.parametrize("name", ["ann", "bob"])
@pytest.mark.parametrize("verb", ["remove", "password", "rotate", "expire"])
def test_an_edit_changes_what_was_meant_and_nothing_else(tmp_path, run, text, name, verb):
    (tmp_path / "accounts.toml").write_text(text, newline="")
    before = accounts(tmp_path)
    more = {"password": ["--password", "new", "--scram"]}.get(verb, [])
    found = run("user" if verb in ("remove", "password") else "app", verb, name, *more)
    assert found.exit_code == 0, found.output
    after = accounts(tmp_path)
    other = "bob" if name == "ann" else "ann"
    assert after[other] == before[other]
    written = (tmp_path / "accounts.toml").read_text()
    if verb == "remove":
        assert list(after) == [other]
        assert not any(kept.hash in written for kept in before[name].secrets)
    else:
        assert after[name].model_copy(update={"secrets": []}) == before[name].model_copy(update={"secrets": []})
    now = datetime.now(UTC)
    alive = [one for one in after[name].secrets if one.expires is None or one.expires > now] if name in after else []
    assert len(alive) == {"remove": 0, "password": 1, "rotate": 1 + len(before[name].secrets), "expire": 0}[verb]


def test_comments_stay_with_what_they_are_about(tmp_path, run):
    (tmp_path / "accounts.toml").write_text(PLAIN)
    run("user", "remove", "ann")
    text = (tmp_path / "accounts.toml").read_text()
    assert all(comment in text for comment in ("# who may send", "# bob is on holiday", "# all of it", "# the end"))
    run("user", "password", "bob", "--password", "new")
    assert all(comment in (tmp_path / "accounts.toml").read_text() for comment in ("# all of it", "# the end"))


INLINE = f'account = [{{ name = "ann", secrets = [{secret(A)}] }}, {{ name = "bob", secrets = [{secret(B)}] }}]\n'


@pytest.mark.parametrize("words", [("remove", "ann"), ("password", "bob", "--password", "x"), ("add", "eve", "--password", "x")])
def test_what_cannot_be_edited_stays_as_it_is(tmp_path, run, words):
    (tmp_path / "accounts.toml").write_text(INLINE)
    found = run("user", *words)
    assert found.exit_code != 0 and "accounts.toml" in found.output
    assert (tmp_path / "accounts.toml").read_text() == INLINE and os.listdir(tmp_path) == ["accounts.toml"]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a'b", "a#b", "a]b", "[[account]]", "ünï@ex.example", "a b", "😀", '"""', "'''"])
def test_names_of_any_kind_are_kept(tmp_path, run, name):
    for other in ("first", "last"):
        assert run("user", "add", other, "--password", "x").exit_code == 0
    assert run("user", "add", name, "--password", "pw", "--sender", '"o\\"d"@d.example').exit_code == 0
    assert run("user", "add", name, "--password", "pw").exit_code == 1
    assert list(accounts(tmp_path)) == ["first", "last", name] and accounts(tmp_path)[name].senders == ['"o\\"d"@d.example']
    assert run("user", "password", name, "--password", "new").exit_code == 0
    assert matches(accounts(tmp_path)[name].secrets[0].hash, "new")
    assert run("user", "remove", name).exit_code == 0
    assert list(accounts(tmp_path)) == ["first", "last"]


@pytest.mark.parametrize(
    "sender",
    ["@", "\udcff@b.example", "@b\udcff.example", "a b@c.example", "@a..b", "ann@", "nobody", 'o"d@d.example', "@" + "x" * 64],
)
def test_a_sender_that_no_mail_can_have_is_refused(tmp_path, run, sender):
    for verb in (("app", "create", "shop"), ("user", "add", "ann", "--password", "x")):
        found = run(*verb, "--sender", sender)
        assert found.exit_code == 64 and "neither an address" in found.output
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["", " ", "ann ", " ann", "a\nb", "a\x7fb", "a\x1b[2Jb", "a\u2028b", "\udcff", "a\u200bb"])
def test_a_name_that_is_like_another_is_rejected(tmp_path, run, name):
    assert run("user", "add", name, "--password", "x").exit_code == 64
    assert run("app", "create", name).exit_code == 64
    assert not os.listdir(tmp_path)


@given(st.lists(st.tuples(st.sampled_from("ab\"'[]{}#=\\\n \t"), st.integers(1, 3)), max_size=30))
def test_lines_within_a_value_are_recognized(parts):
    """Whatever a multi-line string contains, only lines outside of it begin a key or table."""
    inner = "".join(char * count for char, count in parts)
    quoted = inner.replace("\\", "\\\\").replace('"', '\\"')
    lines = f'a = """{quoted}"""\nb = [ # ]\n"]",\n]\nc = 1'.split("\n")
    within = inner.count("\n")
    assert verbs._tops(lines) == [0, within + 1, within + 4]


@pytest.mark.parametrize("options", [(), ("--scram",)])
@pytest.mark.parametrize("verb", ["rotate", "expire", "remove"])
def test_a_person_is_no_application(tmp_path, run, verb, options):
    """Or the password would end, and be replaced by a key."""
    run("user", "add", "ann", "--password", "x", *options)
    before = (tmp_path / "accounts.toml").read_text()
    found = run("app", verb, "ann")
    assert found.exit_code == 1 and found.stderr == "ann is a user: see `relaymta user --help`\n"
    assert (tmp_path / "accounts.toml").read_text() == before


def test_concurrent_additions_are_all_kept(tmp_path):
    command = [
        sys.executable,
        "-m",
        "relaymta",
        "user",
        "add",
        "--set",
        f"accounts.file={tmp_path}/accounts.toml",
        "--password",
        "x",
    ]
    going = [subprocess.Popen([*command, f"user{n}"], stdout=subprocess.PIPE, text=True) for n in range(6)]
    said = [process.communicate(timeout=120)[0] for process in going]
    assert said == [f"user{n} may log in\n" for n in range(6)]
    assert sorted(accounts(tmp_path)) == sorted(f"user{n}" for n in range(6))


def test_an_edit_waits_for_the_one_under_way(tmp_path):
    (tmp_path / "accounts.toml").write_text(PLAIN)
    with open(tmp_path / "accounts.toml") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        settings = ["--set", f"accounts.file={tmp_path}/accounts.toml"]
        process = subprocess.Popen([sys.executable, "-m", "relaymta", "user", "remove", "bob", *settings])
        locks = Path("/proc/locks")
        inode = f":{os.fstat(held.fileno()).st_ino} "
        while not any("->" in line and inode in line for line in locks.read_text().splitlines()):
            assert process.poll() is None
        (tmp_path / "other").write_text(PLAIN.replace('"ann"', '"eve"'))
        (tmp_path / "other").replace(tmp_path / "accounts.toml")
    assert process.wait(60) == 0
    assert list(accounts(tmp_path)) == ["eve"]  # the file was read after the lock was taken


def test_a_file_is_replaced_atomically_and_keeps_its_owner(tmp_path, run, monkeypatch):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "kept.toml", tmp_path / "accounts.toml"
    real.write_text(PLAIN)
    real.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(real, 12345, 23456)
    link.symlink_to(real)
    before, synced = real.stat(), []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_mode), sync(descriptor))[1])
    assert run("user", "remove", "ann").exit_code == 0
    after = real.stat()
    assert link.is_symlink() and list(accounts(tmp_path)) == ["bob"] and os.listdir(tmp_path / "real") == ["kept.toml"]
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert after.st_ino != before.st_ino
    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]


def test_a_new_file_is_its_owners_alone(tmp_path, run):
    assert run("user", "password", "ann", "--password", "x").exit_code == 1
    assert not os.listdir(tmp_path)
    assert run("user", "add", "ann", "--password", "x").exit_code == 0
    assert stat.S_IMODE((tmp_path / "accounts.toml").stat().st_mode) == 0o600


@pytest.mark.parametrize("words", [("add", "ann", "--password", ""), ("add", "ann", "--scram", "--password", "a\x07"),
                                   ("add", "ann", "--password", "x", "--sender", "nobody")])  # fmt: skip
def test_an_account_that_could_not_log_in_is_not_added(tmp_path, run, words):
    assert run("user", *words).exit_code == 64
    assert not os.listdir(tmp_path)


def test_a_rotated_key_has_the_salt_of_the_one_beside_it(tmp_path, run):
    run("app", "create", "shop")
    keys = [run("app", "rotate", "shop", "--overlap", "1h").output.partition("secret: ")[2].split()[0] for _ in range(2)]
    kept = accounts(tmp_path)["shop"].secrets
    assert len(kept) == 3 and kept[0].expires is None and all(one.expires is not None for one in kept[1:])
    found = [scram_keys(one.hash) for one in kept]
    assert len({(one.salt, one.iterations) for one in found if one is not None}) == 1
    assert [matches(one.hash, key) for one, key in zip(kept, reversed(keys), strict=False)] == [True, True]
    run("app", "expire", "shop")
    kept = accounts(tmp_path)["shop"].secrets
    assert len(kept) == 3 and all(one.expires is not None and one.expires <= datetime.now(UTC) for one in kept)
    run("app", "rotate", "shop")
    fresh = accounts(tmp_path)["shop"].secrets
    assert len(fresh) == 1 and fresh[0].hash not in {one.hash for one in kept}


def test_an_expiry_keeps_its_microseconds(tmp_path, run):
    until = datetime.now(UTC) + timedelta(hours=1, microseconds=7)
    more = f", expires = {until.astimezone().isoformat()}"
    (tmp_path / "accounts.toml").write_text(f'[[account]]\nname = "shop"\nsecrets = [{secret(A, more)}]\n')
    assert run("app", "rotate", "shop", "--overlap", "2h").exit_code == 0
    assert accounts(tmp_path)["shop"].secrets[1].expires == until


DKIM = '[[dkim]]\ndomain = "b.example"\nselector = "s1"\nkey = "/k1"\n'


@pytest.mark.parametrize(
    ("text", "done"),
    [
        (f'hostname = "h.example"\n{DKIM}{DKIM.replace("b.example", "c.example")}', True),
        (DKIM.replace("key", '"key"'), False),  # the new selector came without the new key
        (DKIM.replace('"/k1"', '"""\n/k1"""'), False),  # the result was no TOML
        (DKIM.replace("[[dkim]]", "[[ dkim ]]"), False),
        (f'[[route]]\nto = """\n{DKIM}"""\n{DKIM}', True),
    ],
)
def test_a_key_of_dkim_is_put_in_place_or_the_configuration_stays_as_it_is(tmp_path, text, done):
    file = tmp_path / "relaymta.toml"
    file.write_text(text)
    old = Dkim(domain="b.example", selector="s1", key="/k1")
    fresh = old.model_copy(update={"selector": "s2", "key": "/k2"})
    if done:
        _put_in_place(file, old, fresh)
        expected = tomllib.loads(text)
        expected["dkim"][0].update(selector="s2", key="/k2")
        assert tomllib.loads(file.read_text()) == expected
    else:
        with pytest.raises(SystemExit):
            _put_in_place(file, old, fresh)
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("sender", "address", "allowed"),
    [("@Shop.test", "ann@shop.TEST", True), ("@shop.test", "ann@a.shop.test", False), ("@.shop.test", "ann@a.shop.test", True),
     ("@.shop.test", "ann@shop.test", False), ("ann@shop.test", "Ann@shop.test", True), ("ann@shop.test", "bob@shop.test", False),
     ("@dömain.test", "ann@xn--dmain-jua.test", True), ("@xn--dmain-jua.test", "ann@dömain.test", True),
     ("@.DÖMAIN.test", "ann@a.xn--dmain-jua.test", True), ("ann@xn--dmain-jua.test", "ann@DÖMAIN.test", True),
     ("@dömain.test", "ann@domain.test", False), ("@dömain.test", "ann@a.dömain.test", False), ("@shop.test", "root", False),
     ("@shop.test", "a@b@shop.test", False), ("@shop.test", '"a@b"@shop.test', True), ("@shop.test", "ann@shop.test;", False)],
)  # fmt: skip
def test_an_account_may_send_as_its_senders_however_their_domain_is_written(sender, address, allowed):
    """U-labels and A-labels are the same domain (RFC 5890 2.3.2.1)."""
    assert Identity("ann", senders=(sender,)).may_send_as(address) is allowed
