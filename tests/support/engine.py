"""The image, built and run for real by buildah and podman, from a Debian that debootstrap installs."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from relaymta.disk.mounts import IN_LAYERS, mount_of
from tests.support.dockerfile import ROOT
from tests.support.machine import debootstrap
from tests.support.programs import need

__all__ = ["BASE", "Engine"]

BASE = "localhost/debian:bookworm-slim"  # which the short name in the Dockerfile stands for, where it is there
CA = "/run/ca.crt"  # where a build finds the certificates that pip needs here
# A network of its own, with loopback only. Where both versions of cgroups are mounted, crun wants the first alone.
HOLD = """
import fcntl, signal, socket, struct, subprocess
subprocess.run(["umount", "/sys/fs/cgroup/unified"], stderr=subprocess.DEVNULL)
with socket.socket() as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh22x", b"lo", 0x49))
print(flush=True)
signal.pause()
"""


class Engine:
    """A store of images and containers in `folder`, which is removed at the end. The containers are in a network of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kind = getattr(mount_of(folder), "kind", "")
        driver = "vfs" if kind in IN_LAYERS else "overlay"
        self._store = ["--root", f"{folder}/store", "--runroot", f"{folder}/run", "--storage-driver", driver]
        self._hold: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Engine":
        self._hold = subprocess.Popen(
            ["unshare", "--mount", "--net", "--kill-child", "--fork", sys.executable, "-c", HOLD], stdout=subprocess.PIPE
        )
        assert self._hold.stdout is not None and self._hold.stdout.readline() == b"\n"
        return self

    def __exit__(self, *exc: object) -> None:
        self.docker("rm", "--force", "--all", "--time", "0", check=False)
        assert self._hold is not None
        self._hold.kill()
        self._hold.communicate()
        subprocess.run(["umount", "-l", f"{self.folder}/store/overlay"], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self.folder)  # it has gigabytes

    def install_base(self) -> None:
        """Make the image that the Dockerfile is based on."""
        need("debootstrap")
        root, archive = self.folder / "base", self.folder / "base.tar"
        debootstrap(root)
        _run(["tar", "-C", str(root), "-cf", str(archive), "."])
        _run(["podman", *self._store, "import", "--quiet", str(archive), BASE])
        archive.unlink()

    def build(self, name: str, context: Path = ROOT, *options: str) -> str:
        """Build the image; what that says. The configuration of this machine's pip is in files that only the build sees."""
        need("buildah")
        configuration = self.folder / "pip.conf"
        lines, certificates = _pip()
        configuration.write_text("[global]\n" + "".join(f"{line}\n" for line in lines))
        volumes = [f"--volume={configuration}:/etc/pip.conf:ro"]
        volumes += [f"--volume={certificates}:{CA}:ro"] if certificates else []
        how = ["--isolation=chroot", "--format=docker", "--layers", "--pull-never", *volumes, *options]
        return _run(["buildah", *self._store, "build", *how, "--tag", name, str(context)])

    def inspect(self, image: str) -> dict[str, Any]:
        """The configuration of an image."""
        (found,) = json.loads(self.docker("image", "inspect", image).stdout)
        return {"Healthcheck": found.get("Healthcheck"), **found["Config"]}  # podman has that one beside the others

    def command(self, folder: Path) -> Path:
        """A program `docker` in a folder: podman with this store, and with the options that a machine without systemd needs."""
        files, processes = map(_limit, (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        here = "--pull never --network host --cgroups disabled --no-healthcheck"
        limits = f"--ulimit nofile={files}:{files} --ulimit nproc={processes}:{processes}"
        ours = f"--cgroup-manager cgroupfs --events-backend file --tmpdir {self.folder}/libpod"
        program = folder / "docker"
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = run ]; then shift; set -- run {here} {limits} "$@"; fi\n'
            f'exec {" ".join(self.inside())} podman {" ".join(self._store)} {ours} "$@"\n'
        )
        program.chmod(0o755)
        return program

    def inside(self) -> list[str]:
        """What to put in front of a command that is to run where the containers do, and see their network."""
        assert self._hold is not None
        child = Path(f"/proc/{self._hold.pid}/task/{self._hold.pid}/children").read_text().strip()
        return ["nsenter", "-t", child, "-m", "-n"]

    def docker(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker WORDS`."""
        program = self.folder / "docker"
        if not program.exists():
            self.command(self.folder)
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def python(self, code: str, *words: str) -> str:
        """Run a program of ours, outside of all containers, in their network; what it says."""
        return _run([*self.inside(), sys.executable, "-c", code, *words])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def _limit(kind: int) -> int:
    """One that a process without privileges may have, too: podman's own are higher."""
    hard = resource.getrlimit(kind)[1]
    return 10_000 if hard == resource.RLIM_INFINITY else min(hard, 10_000)


def _pip() -> tuple[list[str], str]:
    """pip's configuration here, as lines of a file that a build reads; and the file of certificates that it names, or ""."""
    lines, certificates = [], ""
    for line in _run([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2].replace("_", "-")
        if name == "cert":
            certificates, value = value.strip("'"), CA
        if name != "find-links":  # a folder of this machine
            lines.append(f"{name} = {value.strip(chr(39))}")
    return sorted(set(lines)), certificates
