"""A reload of a running relay: what is said to be applied is, what needs a restart stays, and a refusal changes nothing."""

import json
import os
import resource
import signal
import smtplib
import threading
from pathlib import Path
from typing import Any

import trustme

from relaymta import control
from tests.support import commands
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import SILENT, FakeMx
from tests.support.resolver import nameserver_with


class Reloaded(Relay):
    """A relay with a configuration file, which `reload` writes and has read."""

    def __init__(self, folder: Path, text: str = "", smarthost: str | None = None, *settings: str, workers: int = 1) -> None:
        super().__init__(folder, smarthost, *settings, workers=workers)
        self.file = folder / "relay.toml"
        self.file.write_text(text)
        self.environment["RELAYMTA_CONFIG"] = str(self.file)

    def reload(self, text: str) -> str:
        """The answer."""
        self.file.write_text(text)
        return str(control.ask(self.spool / "control.sock", "reload"))

    def sizes(self, times: int = 20) -> set[str]:
        """The SIZE that is announced: one of all workers, which share the connections."""
        found = set()
        for _ in range(times):
            with smtplib.SMTP("127.0.0.1", self.port, timeout=60) as client:
                client.ehlo()
                found.add(client.esmtp_features["size"])
        return found


def expiry(relay: Relay) -> list[float]:
    """The seconds that messages are kept, as listed."""
    rows = [json.loads(line) for line in relay.cli("queue", "list", "--json").stdout.splitlines()]
    return sorted(round(row["expires"] - row["arrived"]) for row in rows)


def test_ages_and_retries_are_applied(tmp_path):
    with FakeMx({"RCPT": b"450 4.2.1 later\r\n"}) as peer, Reloaded(tmp_path, "", f"127.0.0.1:{peer.port}") as relay:
        relay.send()
        (first,) = wait_for(lambda: relay.events("deferred"))
        assert first["next"] - first["ts"] < 70
        answer = relay.reload('[queue]\nmax_age = "3h"\n[delivery]\nfirst_retry = "1h"\n')
        assert answer == "reloaded; applied: queue.max_age, delivery.first_retry"
        (event,) = wait_for(lambda: relay.events("reloaded"))
        assert (event["applied"], event["restart"]) == (["queue.max_age", "delivery.first_retry"], [])
        relay.send()
        _, second = wait_for(lambda: len(found := relay.events("deferred")) == 2 and found)
        assert 3500 < second["next"] - second["ts"] < 3600 * 1.15 + 1
        ages = expiry(relay)
        assert abs(ages[0] - 3 * 3600) <= 2 and abs(ages[1] - 5 * 86400) <= 2, "of mail accepted from now on"


def test_another_window_is_applied(tmp_path):
    with FakeMx({"EHLO": SILENT, "HELO": SILENT}) as peer:
        settings = ("delivery.connect_timeout=600", "delivery.patience=10")
        with Reloaded(tmp_path, "[queue]\nwindow = 100\n", f"127.0.0.1:{peer.port}", *settings) as relay:
            relay.send_all(150)
            wait_for(lambda: sum(row["messages"] for row in relay.summary()) == 150)
            assert relay.metric("relaymta_window") <= 100
            assert relay.reload("[queue]\nwindow = 1000\nwindow_bytes = 10000000\n") == (
                "reloaded; applied: queue.window, queue.window_bytes"
            )
            relay.send_all(150)
            wait_for(lambda: relay.metric("relaymta_window") == 300, what="all in memory")


def test_other_name_servers_are_applied(tmp_path):
    with FakeMx({}) as peer, nameserver_with(tmp_path, ["d.test. A 127.0.0.1"]) as nameserver:
        text = f'[delivery]\nport = {peer.port}\nfirst_retry = "1h"\nnameservers = ["%s"]\n'
        with Reloaded(tmp_path, text % "127.0.0.1:1") as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "one@d.test")
            (deferred,) = wait_for(lambda: relay.events("deferred"))
            assert "4.4.3" in deferred["reply"]
            assert relay.reload(text % nameserver) == "reloaded; applied: delivery.nameservers"
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "two@d.test")
            wait_for(lambda: peer.messages, what="mail for a domain that could not be looked up")


def test_what_needs_a_restart_is_named_and_stays(tmp_path):
    with FakeMx({}) as peer, Reloaded(tmp_path, "", f"127.0.0.1:{peer.port}") as relay:
        before = relay.worker_pids()
        text = "[limits]\nmessage_size = 2000\n[log]\nhistory = 0\n[control]\nsocket = '/none/x'\n"
        assert relay.reload(text) == ("reloaded; applied: limits.message_size; these need a restart: control.socket, log.history")
        assert relay.sizes(1) == {"2000"}
        relay.send()
        (queued,) = wait_for(lambda: relay.events("delivered"))
        assert "delivered" in relay.cli("message", "history", queued["id"]).stdout, "the history is kept as before"
        assert relay.worker_pids() == before
        assert relay.reload("") == "reloaded; applied: limits.message_size"


def test_files_of_conf_d_are_read_at_each_reload(tmp_path):
    folder = tmp_path / "conf.d"
    folder.mkdir()
    socket = tmp_path / "control.sock"
    (folder / "10-a.toml").write_text(f'[limits]\nmessage_size = 2000\n[control]\nsocket = "{socket}"\n')
    with Reloaded(tmp_path, "[limits]\nmessage_size = 1000\n", "127.0.0.1:1") as relay:

        def reloaded() -> str:
            done = commands.run(["reload", "-c", str(relay.file)], 60)  # which finds the socket by conf.d, too
            return done.stdout + done.stderr

        assert relay.sizes(1) == {"2000"}
        (folder / "20-b.toml").write_text("\nlimits.message_size = 3000\n")
        assert reloaded() == "reloaded; applied: limits.message_size\n" and relay.sizes(1) == {"3000"}
        (folder / "30-c.toml").write_text("limits.message_size = -1\n")
        answer = reloaded()
        assert answer.startswith(f"refused, the old configuration stays:\n{folder}/30-c.toml:1: limits.message_size: ")
        assert answer.endswith(f" (also in {relay.file}:2, {folder}/10-a.toml:2, {folder}/20-b.toml:2)\n")
        (folder / "30-c.toml").unlink()
        (folder / "20-b.toml").rename(folder / "20-b.toml~")
        assert reloaded() == "reloaded; applied: limits.message_size\n" and relay.sizes(1) == {"2000"}


def test_one_worker_that_cannot_read_a_file_keeps_all_on_the_old_configuration(tmp_path):
    (tmp_path / "recipients").write_text("@ours.example\n")
    text = f'[relay]\nrecipients = "{tmp_path / "recipients"}"\n[limits]\nmessage_size = %d\n'
    with Reloaded(tmp_path, text % 1000, "127.0.0.1:1", workers=2) as relay:
        victim = relay.worker_pids()[1]
        before = resource.prlimit(victim, resource.RLIMIT_NOFILE)
        resource.prlimit(victim, resource.RLIMIT_NOFILE, (3, before[1]))
        answer = relay.reload(text % 2000)
        resource.prlimit(victim, resource.RLIMIT_NOFILE, before)
        assert answer.startswith("refused, the old configuration stays:\nworker 1: ") and "Too many open files" in answer
        assert relay.sizes() == {"1000"}
        assert relay.reload(text % 2000) == "reloaded; applied: limits.message_size"
        assert relay.sizes() == {"2000"}


def test_a_valid_file_that_is_invalid_with_what_is_running_is_refused_and_workers_start_again(tmp_path):
    trustme.CA().issue_cert("relay.example").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    port = free_port()
    relay = Reloaded(tmp_path, f'[[listener]]\naddress = "127.0.0.1:{port}"\ntls = "require"\n'
                               f'[[certificate]]\nchain = "{tmp_path / "cert.pem"}"\n')  # fmt: skip
    relay.port, plain = port, relay.command
    relay.command = lambda: [word for word in plain() if word not in ("--listen", f"127.0.0.1:{port}")]  # type: ignore[method-assign]
    with relay:
        answer = relay.reload(f'[[listener]]\naddress = "127.0.0.1:{port}"\n')
        assert answer.startswith("refused, the old configuration stays:\nwith the running listener.0.tls")
        (pid,) = relay.worker_pids()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: relay.worker_pids() not in ([], [pid]), what="another worker")
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
            client.ehlo()
            assert client.has_extn("starttls")


def test_workers_that_die_and_start_during_reloads_end_up_with_the_same_configuration(tmp_path):
    with Reloaded(tmp_path, "[limits]\nmessage_size = 1000\n", "127.0.0.1:1", workers=2) as relay:
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(0.7):
                for pid in relay.worker_pids()[:1]:
                    os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        last: Any = None
        for size in range(2000, 2020):
            answer = relay.reload(f"[limits]\nmessage_size = {size}\n")
            last = size if answer.startswith("reloaded") else last
            assert last is not None or answer.startswith("refused")
        stop.set()
        killer.join()
        wait_for(lambda: len(relay.worker_pids()) == 2)
        wait_for(lambda: relay.sizes() == {str(last)}, what="the last configuration that was applied, in all workers")
