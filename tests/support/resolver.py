"""A real unbound on loopback with a zone of the test's."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import free_port, wait_for
from tests.support.programs import need


def _answers(port: int) -> bool:
    """Whether a nameserver answers at a port (the root's NS, id 7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        try:
            sock.connect(("127.0.0.1", port))
            sock.send(b"\0\7\1\0\0\1\0\0\0\0\0\0\4test\0\0\2\0\1")
            return sock.recv(512)[:2] == b"\0\7"
        except OSError:
            return False


@contextmanager
def nameserver_with(folder: Path, records: list[str], server: str = "", forwards: dict[str, str] | None = None) -> Iterator[str]:
    """unbound with these records below `test.`; its `host:port`. What is not there does not exist; other names SERVFAIL.
    `server`: more lines of the section. `forwards`: zones, outside of `test.`, of other nameservers (`host:port`)."""
    unbound = need("unbound")
    port = free_port()
    config = folder / "unbound.conf"
    quoted = [f"'{record}'" if '"' in record else f'"{record}"' for record in records]
    data = "\n".join(f"  local-data: {record}" for record in quoted)
    config.write_text(
        f'server:\n  interface: 127.0.0.1@{port}\n  do-daemonize: no\n  chroot: ""\n  username: ""\n  pidfile: ""\n'
        f'  use-syslog: no\n  access-control: 127.0.0.0/8 allow\n  directory: "{folder}"\n  local-zone: "test." static\n'
        f"{data}\n{server}"
        'forward-zone:\n  name: "."\n  forward-addr: 127.0.0.1@1\n'
        + "".join(
            f'forward-zone:\n  name: "{zone}"\n  forward-addr: {address.replace(":", "@")}\n'
            for zone, address in (forwards or {}).items()
        )
    )
    process = subprocess.Popen([unbound, "-c", str(config)], stderr=(folder / "unbound.err").open("wb"))
    try:
        wait_for(lambda: process.poll() is not None or _answers(port), what="unbound")
        assert process.poll() is None, (folder / "unbound.err").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
