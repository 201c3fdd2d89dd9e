"""What a start finds out before it begins, and `config check` before a start."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from relaymta.config import load
from relaymta.disk import mounts
from relaymta.disk.mounts import mount_of
from relaymta.errors import ConfigError
from relaymta.supervisor import checks

LISTENER = '[[listener]]\naddress = "127.0.0.1:25"\n'


def loaded(folder, text):
    path = folder / "r.toml"
    path.write_text(text)
    return path, load(path, {})


def test_a_route_map_that_the_relays_user_may_not_read_is_a_problem(tmp_path, monkeypatch):
    """A worker would not start; root has read it before."""
    path, config = loaded(tmp_path, f'route_map = "{tmp_path}/map"\n{LISTENER}')
    (tmp_path / "map").write_text("")
    checks.check_files(config)

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks, "open", refused, raising=False)
    with pytest.raises(ConfigError) as found:
        checks.check_files(config)
    assert found.value.problems == [f"{path}:1: route_map: {tmp_path}/map: Permission denied"]


def test_broken_aliases_are_a_problem(tmp_path):
    """Also where there is no other file that a start reads."""
    _, config = loaded(tmp_path, f'{LISTENER}[local]\naliases = "{tmp_path}/aliases"\n')
    (tmp_path / "aliases").write_text("root: |/bin/sh\n")
    with pytest.raises(ConfigError, match="no mail is given to a program"):
        checks.check_files(config)
    assert checks.broken_lists(config) == []


def test_a_broken_list_is_a_warning(tmp_path):
    _, config = loaded(tmp_path, f'{LISTENER}[local]\naliases = "{tmp_path}/aliases"\n')
    (tmp_path / "aliases").write_text(f"root: ann@x.example\nteam: :include:{tmp_path}/team\n")
    checks.check_files(config)
    place, file = f"{tmp_path}/aliases:2", f"{tmp_path}/team"
    assert checks.broken_lists(config) == [f"{place}: {file}: No such file or directory; mail for what leads there waits (451)"]
    (tmp_path / "team").write_text("bob@x.example\n")
    assert checks.broken_lists(config) == []


def test_what_mail_is_sent_from_and_to_is_looked_at(tmp_path):
    (tmp_path / "there").touch()
    path, config = loaded(
        tmp_path,
        f'{LISTENER}[[source]]\nname = "a"\naddress = "192.0.2.77"\n[[source]]\nname = "b"\naddress = "127.0.0.1"\n'
        f'[[route]]\nprotocol = "lmtp"\nhosts = ["unix:{tmp_path}/there", "unix:{tmp_path}/gone"]\n',
    )
    assert checks.absent_places(config) == [
        f"{path}:5: source.0.address: 192.0.2.77 is not an address of this machine: it is used once it is",
        f"{path}:11: route.0.hosts: {tmp_path}/gone: No such file or directory",
    ]


def mounted(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


@pytest.fixture
def outside(tmp_path: Path, overlay: Path) -> Iterator[Path]:
    """A folder in a ramfs, beside the overlay. What is mounted in both is unmounted at the end."""
    made = tmp_path / "outside"
    made.mkdir()
    mounted("-t", "ramfs", "ramfs", made)
    yield made
    for path in sorted([*overlay.rglob("*"), *made.rglob("*"), made], reverse=True):
        if path.is_mount() and not path.is_symlink():
            subprocess.run(["umount", "-l", path], check=True)


REFUSED = "is on an overlay file system (overlay), which ends with its container, and the mail in it, too: mount a volume there; "
REFUSED += "if mail may be lost, start with --ephemeral (ephemeral = true)"
IN_MEMORY = "is in memory ({}): the mail in it is lost when this machine, or the container, restarts"
UNNAMED = "is on a volume of this container or pod alone, which the next one will not have: mount one that has a name, or a claim"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_spool_is_where_its_nearest_folder_is_mounted(tmp_path, overlay, outside, monkeypatch):
    def said(path: str) -> str:
        """What is said of a spool at a path in the overlay."""
        spool = str(overlay / path)
        _, config = loaded(tmp_path, f"spool = '{spool}'\n{LISTENER}")
        refused, noted = checks.ephemeral_spool(config), checks.fleeting_spool(config)
        assert not (refused and noted)
        found = "".join([*refused, *noted])
        return found.replace(f"{tmp_path}/r.toml:1: spool: {spool} ", "")

    blank, volume, empty = "a b\\n", f"volumes/{'0af3' * 16}/_data", "x/volumes/kubernetes.io~empty-dir/y"
    for name in (blank, "later/below", "link", volume, empty):
        (outside / name).mkdir(parents=True)
        (overlay / name).mkdir(parents=True)
    (overlay / "link/in").symlink_to(overlay / "later")
    (overlay / "link/out").symlink_to(outside)
    there, here = IN_MEMORY.format("ramfs"), IN_MEMORY.format("tmpfs")

    for path in ("", blank, "none", "none/at/all", "link/in", "link/in/none"):
        assert said(path) == REFUSED
    assert said("link/out") == said("link/out/none") == there, "where a link leads to"

    mounted("--bind", outside, overlay / blank)
    assert said(blank) == said(f"{blank}/none/at/all") == there, "a bind mount"
    mounted("--bind", overlay / "later", outside / "link")
    assert said(f"{blank}/link") == there, "the folder, and not what is mounted on it elsewhere"
    assert said("link/out/link/none") == REFUSED, "the overlay, as it is mounted out there"

    mounted("-t", "tmpfs", "tmpfs", overlay / "later/below")
    assert said("later/below/spool") == here
    mounted("--bind", outside / "later", overlay / "later")
    assert said("later/below/spool") == there, "the tmpfs is hidden now"

    monkeypatch.setattr(checks, "IN_MEMORY", frozenset())
    assert said("link/out") == ""
    for name in (volume, empty):
        mounted("--bind", outside / name, overlay / name)
        assert said(name) == said(f"{name}/spool") == UNNAMED


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_spool_that_may_end_is_said_so(tmp_path, overlay):
    _, config = loaded(tmp_path, f'ephemeral = true\nspool = "{overlay}"\n{LISTENER}')
    assert checks.ephemeral_spool(config) == checks.fleeting_spool(config) == []


def test_where_a_spool_is_cannot_always_be_found_out(tmp_path, monkeypatch):
    """Without /proc a relay starts as it did before."""

    def none(*args: object, **more: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/mountinfo")

    assert mount_of(tmp_path) is not None
    monkeypatch.setattr(mounts, "open", none, raising=False)
    assert mount_of(tmp_path) is None
