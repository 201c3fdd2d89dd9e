"""Overload: load shedding while the event loop is late, and rejection while memory is short; and that both end."""

import os
import signal
import smtplib
import socket
import time

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx


def banner(relay: Relay) -> bytes:
    with socket.create_connection(("127.0.0.1", relay.port)) as sock:
        return sock.recv(200)


def test_load_shedding_rejects_new_clients_and_serves_the_others(tmp_path):
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", "intake.shed_lag=0.1") as relay:
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            (pid,) = relay.worker_pids()

            def late() -> None:
                """Stop the worker for a while, as if other processes had the CPU."""
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.3)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.1)

            wait_for(lambda: late() or banner(relay) == b"421 4.3.2 Overloaded; try again in a moment\r\n")
            wait_for(lambda: late() or relay.metric("relaymta_shedding") == 1)
            client.sendmail("a@b.example", ["c@d.example"], "Subject: x\r\n\r\nx\r\n")
        wait_for(lambda: len(peer.messages) == 1)
        wait_for(lambda: banner(relay).startswith(b"220"))


class Configured(Relay):
    """A relay with a configuration file that is changed while it runs."""

    def set(self, text: str) -> None:
        """Write the file and, if the relay runs, reload it."""
        (self.folder / "relay.toml").write_text(text)
        if self.process is not None:
            self.process.send_signal(signal.SIGHUP)

    def command(self) -> list[str]:
        found = super().command()
        return [*found[:4], "--config", str(self.folder / "relay.toml"), *found[4:]]


def test_without_memory_mail_is_temporarily_rejected_and_the_queue_is_delivered(tmp_path):
    port = free_port()
    relay = Configured(tmp_path, f"127.0.0.1:{port}", "delivery.first_retry=0.5")
    relay.set("")
    with relay:
        relay.send("Subject: before\r\n\r\nx\r\n")
        relay.set("[limits]\nmemory = 1000000\n")
        wait_for(lambda: relay.metric("relaymta_memory_pressure") == 2)
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.ehlo()
            assert client.mail("a@b.example") == (452, b"4.3.1 Out of memory; try again later")
        with FakeMx({}, port=port) as late:
            wait_for(lambda: len(late.messages) == 1)
            relay.set("")
            wait_for(lambda: relay.metric("relaymta_memory_pressure") == 0)
            relay.send("Subject: after\r\n\r\nx\r\n")
            wait_for(lambda: len(late.messages) == 2)
