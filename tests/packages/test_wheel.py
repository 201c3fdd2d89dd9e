"""The wheel: installed into an empty venv without a network, it runs from anywhere, and has what operators need."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import trustme

from relaymta.config import describe
from tests.e2e.test_init import PASSWORD, smart_host
from tests.packages.conftest import ROOT
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx

pytestmark = [pytest.mark.packages, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def venv(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    command = [made / "bin/pip", "install", "-q", "--no-index", "--find-links", wheels, "relaymta"]
    subprocess.run(command, check=True, cwd=made)
    return made


def _run(venv: Path, *arguments: str, where: Path) -> str:
    done = subprocess.run(
        [venv / "bin/relaymta", *arguments], cwd=where, capture_output=True, text=True, env={"PATH": "/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_from_anywhere(venv: Path, tmp_path: Path) -> None:
    assert re.search(r"^kernels +ok +compiled$", _run(venv, "doctor", where=tmp_path), re.M)
    assert _run(venv, "config", "describe", where=tmp_path) == describe()


def test_it_delivers(venv: Path, tmp_path: Path) -> None:
    with FakeMx({}) as peer:
        relay = Relay(tmp_path, f"127.0.0.1:{peer.port}")
        relay.python = str(venv / "bin/python")
        relay.environment = {"PYTHONSAFEPATH": "1"}  # not the package in the current folder
        with relay:
            relay.send()
            wait_for(lambda: peer.messages)
            assert str(venv) in Path(f"/proc/{relay.worker_pids()[0]}/maps").read_text()


def test_a_newcomer_gets_to_a_signed_message_through_a_smart_host(venv: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with smart_host(authority) as peer:
        said = subprocess.run(
            [venv / "bin/relaymta", "init", "--smarthost", f"localhost:{peer.port}", "--username", "me", "--password-stdin",
             "--ca-file", tmp_path / "ca.pem", "--domain", "example.org", "--to", "you@example.net",
             "--spool", tmp_path / "spool",
             "--listen", f"127.0.0.1:{free_port()}", "--set", "metrics.listen=off", "-c", tmp_path / "relaymta.toml"],
            input=PASSWORD, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin"},
        )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "test message to you@example.net: delivered to localhost" in said.stdout
    assert b"DKIM-Signature: " in peer.messages[0][2]


def test_it_has_the_files_for_operators(venv: Path, tmp_path: Path) -> None:
    said = _run(venv, "assets", "here", where=tmp_path).splitlines()
    written = {str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert written == {
        str(path.relative_to(ROOT)) for name in ("config", "grafana") for path in (ROOT / name).rglob("*") if path.is_file()
    }
    assert said == sorted(str(tmp_path / "here" / name) for name in written)
    assert f"ExecStart={venv}/bin/relaymta serve\n" in (tmp_path / "here/config/relaymta.service").read_text()
    assert (tmp_path / "here/config/relaymta.toml").read_text() == describe()


def test_the_source_distribution_has_what_it_is_built_from(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])",
        tmp_path,
    ]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    needed = {name for name in listed if name.startswith(("relaymta/", "config/", "grafana/", "packaging/"))}
    assert needed <= names
