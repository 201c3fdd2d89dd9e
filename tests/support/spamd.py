"""spamd: a real one, without the network."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.daemon import free_port, wait_for
from tests.support.programs import need

__all__ = ["GTUBE", "spamd"]

GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*" + "GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"  # in two: this file is no spam


@contextlib.contextmanager
def spamd() -> Iterator[str]:
    """A running spamd: its address."""
    program = need("spamd")
    folder, port = Path(tempfile.mkdtemp(prefix="spamd")), free_port()
    for path in Path("/etc/spamassassin").glob("*.pre"):  # without them every child dies at once
        shutil.copy(path, folder)
    (folder / "local.cf").write_text(f"bayes_path {folder}/bayes\nbayes_auto_learn 0\n")
    folder.chmod(0o777)  # as root it becomes another user
    command = [program, "-L", "-x", "-m", "2", "--allow-tell", f"--listen=127.0.0.1:{port}", f"--siteconfigpath={folder}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for(lambda: process.poll() is not None or _answers(port), what="spamd")
        assert process.poll() is None, (folder / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"PING SPAMC/1.5\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        return b"PONG" in sock.recv(100)
    return False
