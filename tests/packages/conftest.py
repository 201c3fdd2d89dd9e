"""The wheels, the Debian package made from them, and the root of a fresh Debian."""

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
