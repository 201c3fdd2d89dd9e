"""The image, built and run as docs/containers.md says, with podman in the place of Docker."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.conftest import PROVE
from tests.support.daemon import wait_for
from tests.support.dockerfile import ROOT, health_check, stages
from tests.support.engine import Engine
from tests.support.pages import commands, section, shell
from tests.support.programs import need

pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not PROVE, reason="minutes: make prove"),
    pytest.mark.skipif(os.geteuid() != 0, reason="building an image needs root"),
    pytest.mark.timeout(1800),
]
IMAGE = "relaymta"
CLOSED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
PORT, SINK = 2525, 2526
SEND = """
import smtplib, sys
with smtplib.SMTP("127.0.0.1", int(sys.argv[1]), timeout=60) as client:
    client.sendmail("a@b.example", ["c@d.example"], f"Subject: {sys.argv[2]}\\r\\n\\r\\nhello\\r\\n")
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One that has the image."""
    need("podman")
    with Engine(tmp_path_factory.mktemp("engine")) as made:
        made.install_base()
        made.build(IMAGE)
        yield made


@pytest.fixture
def ended(engine: Engine) -> Iterator[None]:
    """The containers of the test are gone at its end."""
    yield
    engine.docker("rm", "--force", "--all", "--volumes", "--time", "0")


def ready(engine: Engine, name: str) -> bool:
    return engine.docker("exec", name, *health_check(stages()[-1]), check=False).returncode == 0


def started(engine: Engine, *words: str, name: str = "relay") -> None:
    """Start a container of the relay, and wait until its health check says that it is ready."""
    engine.docker("run", "--detach", "--name", name, *CLOSED, *words)
    wait_for(lambda: ready(engine, name), what=f"a ready relay:\n{engine.docker('logs', name).stderr}")


def queued(engine: Engine) -> list[str]:
    """The states of the messages in the queue."""
    lines = engine.docker("exec", "relay", "relaymta", "queue", "list", "--json").stdout.splitlines()
    return [json.loads(line)["state"] for line in lines]


class Sink:
    """A smart host outside of the containers."""

    def __init__(self, engine: Engine) -> None:
        self._process = subprocess.Popen(
            [*engine.inside(), sys.executable, "-m", "relaymta", "sink", "--listen", f"127.0.0.1:{SINK}"],
            stdout=(engine.folder / "sink").open("wb"), cwd=ROOT,
        )  # fmt: skip
        self._said = engine.folder / "sink"

    def subjects(self) -> list[str]:
        """Of the messages that have come."""
        return [line.rpartition("Subject: ")[2] for line in self._said.read_text().splitlines() if "Subject: " in line]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def test_the_image_is_what_its_file_says(engine):
    file, config = stages()[-1], engine.inspect(IMAGE)
    assert config["User"] == file.one("USER") and list(config["Volumes"]) == [file.one("VOLUME")]
    assert sorted(config["ExposedPorts"]) == sorted(f"{port}/tcp" for port in file.one("EXPOSE").split())
    assert (config["Entrypoint"], config["Cmd"]) == (json.loads(file.one("ENTRYPOINT")), json.loads(file.one("CMD")))
    assert config["Healthcheck"]["Test"] == ["CMD", *health_check(file)] and config["StopSignal"] == "SIGTERM"
    look = "id -u; id -g; python -c 'import sys; print(sys.base_prefix)'; ls -ld /var/lib/relaymta; grep Cap /proc/self/status"
    said = engine.docker("run", "--rm", *CLOSED, "--entrypoint", "sh", IMAGE, "-c", look).stdout.splitlines()
    assert said[:3] == ["10025", "10025", "/usr"] and said[3].startswith("drwx------ 2 relaymta relaymta")
    assert {line.split()[1] for line in said[4:]} == {"0" * 16}
    none = "command -v gcc cc pip pip3; python -c 'import pip'; touch /etc/x"
    done = engine.docker("run", "--rm", *CLOSED, "--entrypoint", "sh", IMAGE, "-c", none, check=False)
    assert done.returncode != 0 and done.stdout == ""
    assert "No module named 'pip'" in done.stderr and "Read-only file system" in done.stderr
    assert engine.docker("run", "--rm", *CLOSED, IMAGE, "--version").stdout.startswith("relaymta, version ")


def test_a_changed_source_downloads_nothing(engine, tmp_path):
    """It is changed to one that is built soon."""
    for path in (
        "Dockerfile",
        ".dockerignore",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "relaymta/__init__.py",
        "tools/requirements.py",
    ):
        there = tmp_path / path
        there.parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / path, there)
    (tmp_path / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    said = engine.build(f"{IMAGE}:changed", tmp_path, "--target=build")
    assert "Successfully built relaymta" in said and "Downloading" not in said and "Collecting" not in said
    assert said.count("Using cache") == 4, "all that is in front of the source"


def test_the_page_is_right(engine, ended, tmp_path, monkeypatch):
    """With a network where nobody answers, but there is no mail."""
    programs = tmp_path / "programs"
    programs.mkdir()
    engine.command(programs)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with shell(tmp_path, tmp_path / "none", {}) as running:
        for said in commands(section("containers.md", "With docker run")):
            running.run(said)
    assert engine.docker("ps", "--all", "--quiet").stdout == ""


def test_mail_survives_kill_9_and_leaves_and_sigterm_drains(engine, ended):
    started(engine, "--volume", "queue:/var/lib/relaymta", IMAGE, "serve", "--smarthost", f"127.0.0.1:{SINK}")
    engine.python(SEND, str(PORT), "one")
    wait_for(lambda: queued(engine) == ["deferred"])
    engine.docker("kill", "--signal", "KILL", "relay")
    engine.docker("start", "relay")
    wait_for(lambda: ready(engine, "relay"))
    assert queued(engine) == ["deferred"]
    engine.docker("rm", "--force", "--time", "0", "relay")  # and another one, with that volume
    started(engine, "--volume", "queue:/var/lib/relaymta", IMAGE, "serve", "--smarthost", f"127.0.0.1:{SINK}")
    assert queued(engine) == ["deferred"]
    sink = Sink(engine)
    try:
        engine.docker("exec", "relay", "relaymta", "queue", "flush", "--all")
        wait_for(lambda: sink.subjects() == ["one"])
        engine.python(SEND, str(PORT), "two")
        wait_for(lambda: sink.subjects() == ["one", "two"] and queued(engine) == [])
    finally:
        sink.close()
    began = time.monotonic()
    engine.docker("stop", "--time", "60", "relay")
    assert engine.docker("inspect", "--format", "{{.State.ExitCode}}", "relay").stdout.strip() == "0", "it was not killed"
    assert time.monotonic() - began < 60
    assert json.loads(engine.docker("logs", "relay").stderr.splitlines()[-1])["event"] == "stopped"


def test_without_a_volume_it_is_refused_unless_that_is_meant(engine, ended):
    """As an engine has it that does not make volumes for an image."""
    layers = ["--image-volume", "ignore"]
    done = engine.docker("run", "--rm", *layers, IMAGE, check=False)
    assert done.returncode == 78
    assert "spool: /var/lib/relaymta is on an overlay file system (overlay)" in done.stderr and "mount a volume" in done.stderr
    engine.docker("run", "--detach", "--name", "relay", *layers, IMAGE, "serve", "--ephemeral")
    wait_for(lambda: ready(engine, "relay"))


def test_a_volume_without_a_name_is_noted(engine):
    said = engine.docker("run", "--rm", *CLOSED, IMAGE, "config", "check").stdout
    assert "spool: /var/lib/relaymta is on a volume of this container or pod alone" in said


def test_a_folder_as_kubernetes_gives_it_is_taken_and_one_of_roots_refused(engine, ended, tmp_path):
    """By fsGroup the volume belongs to the group; and it is a file system of its own."""
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(mode=0o700, parents=True)
    os.chown(volume, 0, 0)
    done = engine.docker("run", "--rm", *CLOSED, "--volume", f"{volume}:/var/lib/relaymta", IMAGE, check=False)
    assert (done.returncode, "spool: /var/lib/relaymta is not writable for user 10025" in done.stderr) == (78, True)
    os.chown(volume, 0, 10025)
    volume.chmod(0o2775)
    started(engine, "--volume", f"{volume}:/var/lib/relaymta", IMAGE)
    said = engine.docker("logs", "relay").stderr
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["started"], said
