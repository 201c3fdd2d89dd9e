"""The wheels, the Debian package made from them, and the root of a fresh Debian."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.machine import debootstrap
from tests.support.programs import need

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build/wheels"


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The folder that `make wheels` fills."""
    assert list(WHEELS.glob("relaymta-*.whl")), "run: make test-packages"
    return WHEELS


@pytest.fixture(scope="session")
def deb(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, revision 1."""
    need("dpkg-deb")
    folder = tmp_path_factory.mktemp("deb")
    quick = os.environ | {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
    subprocess.run([ROOT / "packaging/deb/build", wheels, folder, "1"], check=True, env=quick, cwd="/")
    return next(folder.glob("*.deb"))


@pytest.fixture(scope="session")
def next_deb(deb: Path) -> Path:
    """The same program as revision 2."""
    root = deb.parent / "next"
    subprocess.run(["dpkg-deb", "-R", deb, root], check=True)
    control = root / "DEBIAN/control"
    text = control.read_text()
    assert "-1\n" in text
    control.write_text(text.replace("-1\n", "-2\n", 1))
    (home,) = (root / "opt/relaymta").iterdir()  # each version has a folder of its own
    fresh = home.rename(home.with_name(home.name.removesuffix("-1") + "-2"))
    program = fresh / "bin/relaymta"
    was = hashlib.md5(program.read_bytes()).hexdigest()
    program.write_text(program.read_text().replace(f"/{home.name}/", f"/{fresh.name}/"))
    (root / "usr/bin/relaymta").unlink()
    (root / "usr/bin/relaymta").symlink_to(f"/opt/relaymta/{fresh.name}/bin/relaymta")
    sums = root / "DEBIAN/md5sums"
    now = hashlib.md5(program.read_bytes()).hexdigest()
    text = sums.read_text().replace(f"{was}  opt/", f"{now}  opt/")
    sums.write_text(text.replace(f"opt/relaymta/{home.name}/", f"opt/relaymta/{fresh.name}/"))
    made = deb.parent / "next.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", root, made], check=True, capture_output=True)
    return made


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a Debian in which relaymta can be installed without a network."""
    if os.geteuid() != 0:
        pytest.skip("only root can install a Debian")
    need("systemd-nspawn")
    need("debootstrap")
    root = tmp_path_factory.mktemp("debian") / "root"
    needed = ("python3", "adduser", "ca-certificates", "logrotate", "systemd", "systemd-sysv")
    debootstrap(root, *needed, "bash-completion", "fish", "man-db", "zsh")
    return root
