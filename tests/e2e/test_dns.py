"""Mail to the MX of its domain, by a real unbound on loopback."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need

ZONE = """
  local-zone: "test." static
  local-data: "two.test. MX 20 backup.test."
  local-data: "two.test. MX 10 dead.test."
  local-data: "dead.test. A 127.0.0.77"
  local-data: "backup.test. A 127.0.0.1"
  local-data: "plain.test. A 127.0.0.1"
  local-data: "null.test. MX 0 ."
  local-data: "alias.test. CNAME two.test."
  local-data: "ours.test. MX 10 relay.example."
"""


@pytest.fixture
def nameserver(tmp_path: Path) -> Iterator[str]:
    unbound = need("unbound")
    port = free_port()
    config = tmp_path / "unbound.conf"
    config.write_text(
        f'server:\n  interface: 127.0.0.1@{port}\n  do-daemonize: no\n  chroot: ""\n  username: ""\n  pidfile: ""\n'
        f'  use-syslog: no\n  access-control: 127.0.0.0/8 allow\n  directory: "{tmp_path}"\n{ZONE}\n'
        'forward-zone:\n  name: "."\n  forward-addr: 127.0.0.1@1\n'
    )
    process = subprocess.Popen([unbound, "-c", str(config)], stderr=(tmp_path / "unbound.err").open("wb"))
    time.sleep(0.5)
    assert process.poll() is None, (tmp_path / "unbound.err").read_text()
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_mail_finds_its_mx(tmp_path, nameserver):
    with FakeMx({}) as peer:
        settings = [f'delivery.nameservers=["{nameserver}"]', f"delivery.port={peer.port}", "delivery.connect_timeout=2"]
        with Relay(tmp_path, None, *settings) as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "", "a@two.test", "b@plain.test", "c@[127.0.0.1]")
            wait_for(lambda: len(peer.messages) == 3)
            assert sorted(to for _, to, _ in peer.messages) == [["a@two.test"], ["b@plain.test"], ["c@[127.0.0.1]"]]
            relay.send("Subject: x\r\n\r\nx\r\n", "", "a@null.test", "b@nowhere.test", "d@ours.test")
            wait_for(lambda: len(relay.events("bounced")) == 3)
            replies = {event["recipient"]: event["reply"] for event in relay.events("bounced")}
            assert "5.1.10" in replies["a@null.test"]
            assert "5.1.2" in replies["b@nowhere.test"]
            assert "5.4.6" in replies["d@ours.test"]
            relay.send("Subject: x\r\n\r\nx\r\n", "", "a@servfail.example")
            (deferred,) = wait_for(lambda: relay.events("deferred"), 40)
            assert "4.4.3" in deferred["reply"], "SERVFAIL defers"
            wait_for(lambda: [row["queue"] for row in relay.summary()] == ["mx/servfail.example"])
