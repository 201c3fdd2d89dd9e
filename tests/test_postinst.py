"""What the script of the Debian package decides, without a package: tests/packages has the rest."""

import subprocess
from pathlib import Path

import pytest

POSTINST = Path(__file__).parents[1] / "packaging" / "deb" / "postinst"


@pytest.mark.parametrize("policy, walled, status", [(0, "", 0), (104, "", 0), (101, "", 2), (0, "yes", 2)])
def test_where_the_new_program_has_taken_over_the_relay_is_not_restarted(tmp_path, policy, walled, status):
    text = POSTINST.read_text()
    functions = text[text.index("# Whether the administrator lets") : text.index("if ! getent passwd")]
    asked, ours = tmp_path / "policy-rc.d", tmp_path / "relaymta"
    for path, end in ((asked, policy), (ours, 0)):
        path.write_text(f"#!/bin/sh\nexit {end}\n")
        path.chmod(0o755)
    functions = functions.replace("/usr/sbin/policy-rc.d", str(asked)).replace("/usr/bin/relaymta", str(ours))
    script = f"set -e\nwalled={walled}\nsystemctl() {{ :; }}\n{functions}\nstatus=0\ntake_over || status=$?\nexit $status"
    assert subprocess.run(["sh", "-c", script]).returncode == status


@pytest.mark.parametrize("there", [True, False])
def test_a_relay_whose_unit_did_not_know_the_drop_folder_is_restarted(tmp_path, there):
    """It runs where it cannot write into it, and so would the program that takes over."""
    text = POSTINST.read_text()
    folder = tmp_path / "spool"
    lines = text[text.index("walled=\n") : text.index("[ -d /var/spool/relaymta/drop ]")].replace(
        "/var/spool/relaymta", str(folder)
    )
    if there:
        folder.mkdir()
    script = f'install() {{ mkdir "$8"; }}\nset -e\n{lines}\n[ -z "$walled" ]'
    assert subprocess.run(["sh", "-c", script]).returncode == (0 if there else 1)
    assert folder.is_dir()
