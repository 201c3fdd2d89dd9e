"""A start that fails because of its configuration says which line is wrong, also where only the start finds that."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import free_port


@pytest.fixture
def taken() -> Iterator[str]:
    """An address on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


NONE = "No such file or directory"
ROWS = [  # (from line 5 on, the line, the key, what is wrong)
    ('[metrics]\nlisten = "{taken}"\n',
     6, "metrics.listen", "{taken}: another program listens on this port; stop it, or choose another"),
    ('[[listener]]\naddress = "{taken}"\n',
     6, "listener.1.address", "{taken}: another program listens on this port; stop it, or"),
    ('[[certificate]]\nchain = "{folder}/none"\n', 6, "certificate.0.chain", "{folder}/none: " + NONE),
    ('[[certificate]]\nchain = "{folder}/relay.toml"\n',
     6, "certificate.0.chain", "{folder}/relay.toml: no certificate in PEM form"),
    ('[[dkim]]\ndomain = "a.example"\nselector = "s"\nkey = "{folder}/none"\n', 8, "dkim.0.key", "{folder}/none: " + NONE),
    ('[accounts]\nfile = "{folder}/none"\n', 6, "accounts.file", "{folder}/none: " + NONE),
    ('[relay]\ndomains = ["a.example"]\nrecipients = "{folder}/none"\n', 7, "relay.recipients", "{folder}/none: " + NONE),
    ('[control]\ngroup = "no-such-group"\n', 6, "control.group", "there is no group 'no-such-group'"),
    ('[control]\nsocket = "{folder}/relay.toml"\n', 6, "control.socket", "{folder}/relay.toml exists and is not a socket"),
    ('[log]\nfile = "{folder}"\n', 6, "log.file", "{folder}: Is a directory"),
    ('[relay]\nnetworks = ["0.0.0.0/0"]\n', 6, "relay.networks", "0.0.0.0/0 may relay: that is an open relay"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "key", "what"), ROWS, ids=[f"{row[2]} {number}" for number, row in enumerate(ROWS)])
def test_a_mistake_that_a_start_finds_has_its_line(tmp_path: Path, taken: str, text: str, line: int, key: str, what: str):
    path = tmp_path / "relay.toml"
    words = {"taken": taken, "folder": str(tmp_path)}
    start = f'hostname = "a.example"\nspool = "{tmp_path}/spool"\n[[listener]]\naddress = "127.0.0.1:{free_port()}"\n'
    more = "" if "[metrics]" in text else '[metrics]\nlisten = "off"\n'
    path.write_text(start + text.format(**words) + more)
    done = subprocess.run(
        [sys.executable, "-m", "relaymta", "serve", "--ephemeral", "-c", str(path), "--workers", "1"],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 78 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{path}:{line}: {key}: {what.format(**words)}")
