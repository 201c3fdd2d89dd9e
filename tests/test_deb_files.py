"""Files of the Debian package, with folders in place of those of the system: the script that runs at a purge, and tmpfiles."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import need

DEB = Path(__file__).parents[1] / "packaging" / "deb"
DATABASE = "Name: {name}\nDriver: File\nMode: 644\nFilename: {folder}/{name}.dat\n"
PRESEED = "relaymta relaymta/purge_spool boolean {}\n"


@pytest.mark.parametrize(("before", "is_left"), [("", True), ("false", True), ("true", False)])
def test_what_was_answered_before_a_purge_without_a_terminal_counts(before, is_left, tmp_path):
    """install.md: `debconf-set-selections`."""
    need("debconf-set-selections")
    script = (DEB / "postrm").read_text()
    for path in ("/var/lib/relaymta", "/var/spool/relaymta", "/etc/relaymta", "/var/log/relaymta", "/opt/relaymta"):
        (tmp_path / path[1:]).mkdir(parents=True)
        script = script.replace(path, f"{tmp_path}{path}")
    for program in ("/usr/bin/deb-systemd-helper", "/usr/sbin/deluser"):
        script = script.replace(program, "/nonexistent")
    (tmp_path / "relaymta.postrm").write_text(script)
    (tmp_path / "relaymta.templates").write_bytes((DEB / "templates").read_bytes())
    databases = "\n".join(DATABASE.format(name=name, folder=tmp_path) for name in ("configdb", "templatedb"))
    (tmp_path / "rc").write_text(f"Config: configdb\nTemplates: templatedb\n\n{databases}")
    env = os.environ | {"DEBCONF_SYSTEMRC": str(tmp_path / "rc"), "DEBIAN_FRONTEND": "noninteractive"}
    if before:
        subprocess.run(["debconf-set-selections"], input=PRESEED.format(before), text=True, check=True, env=env)
    (tmp_path / "relaymta.postrm").chmod(0o755)
    subprocess.run(["debconf", "-orelaymta", tmp_path / "relaymta.postrm", "purge"], check=True, env=env, cwd=tmp_path,
                   stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip
    assert (tmp_path / "var/lib/relaymta").exists() == is_left
    assert not (tmp_path / "etc/relaymta").exists()


@pytest.mark.parametrize("left", ["", "var/lib/relaymta", "var/spool/relaymta/drop"])
def test_the_user_stays_while_files_of_it_do(left, tmp_path):
    """Else another user could get its number, and the mail."""
    script = (DEB / "postrm").read_text()
    begin = script.index("\trmdir")
    lines = script[begin : script.index("\t;;", begin)]
    if left:
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "mail").touch()
    for path in ("/var/lib/relaymta", "/var/spool/relaymta"):
        lines = lines.replace(path, f"{tmp_path}{path}")
    lines = lines.replace("/usr/sbin/deluser", "/bin/sh")
    said = subprocess.run(
        ["sh", "-ec", f'deluser() {{ echo "$@" >&2; }}\ndelgroup() {{ deluser "$@"; }}\n{lines}'],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert ("relaymta" in said) == (not left)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives folders away")
def test_rights_that_an_administrator_has_changed_stay_over_a_boot(tmp_path):
    need("systemd-tmpfiles")
    etc = tmp_path / "etc/relaymta"
    etc.mkdir(parents=True)
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nrelaymta:x:990:990::/:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nrelaymta:x:990:\n")
    (tmp_path / "made.conf").write_bytes((DEB.parents[1] / "config/relaymta.tmpfiles").read_bytes())
    etc.chmod(0o755)
    subprocess.run(["systemd-tmpfiles", "--create", f"--root={tmp_path}", tmp_path / "made.conf"], check=True)
    rights = {path.name: (path.stat().st_mode & 0o777, path.stat().st_gid) for path in (etc, etc / "conf.d")}
    assert rights == {"relaymta": (0o755, 0), "conf.d": (0o750, 990)}
