"""A relay that keeps mail, its users, and clients that send to them."""

import contextlib
import os
import random
import signal
import smtplib
import threading
from collections import Counter
from pathlib import Path

import trustme

from relaymta import control
from relaymta.store.files import MailFiles
from relaymta.store.shown import shown as store_shown
from tests.conftest import PROVE
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for

__all__ = ["LOCAL", "PAUSE", "Load", "Readable", "create", "kept", "kill_under_load", "shown", "verified"]

LOCAL = '{name="here",protocol="mailbox",recipient_domain=["local.example"]}'


def kept(folder: Path, *settings: str, workers: int = 1, routes: str = LOCAL) -> Relay:
    return Relay(folder, None, f"route=[{routes}]", *settings, workers=workers)


def create(relay: Relay, *names: str, password: str = "", octets: int = 0, messages: int = 0) -> None:
    """Create users as `relaymta mailbox create` does, but without a process for it."""
    for name in names:
        limits = {"octets": octets, "messages": messages}
        control.ask(relay.spool / "control.sock", "mailbox_create", address=f"{name}@local.example", password=password, **limits)


def shown(relay: Relay, name: str) -> dict[str, list[str]]:
    """The subjects of a user's messages, by mailbox; read as `relaymta mailbox show` does, but without a process for it."""
    with MailFiles(relay.spool / "mail") as files:
        user = files.directory.known(f"{name}@local.example")
        found = store_shown(files.shard(user.shard), user.ident, True)
    return {row["name"]: [message["subject"] for message in row["list"]] for row in found["mailboxes"]}


def verified(relay: Relay) -> None:
    """`mailbox verify` finds nothing wrong."""
    found = relay.cli("mailbox", "verify", check=False)
    assert (found.returncode, found.stderr) == (0, ""), found


PAUSE = 0.0 if PROVE else 0.01  # seconds of each client between two messages: one is under way most of the time, even so


class Load:
    """Clients (the first has the number `first`) that send messages with a subject of their own to some of the users, and note
    which were acknowledged."""

    def __init__(self, relay: Relay, users: list[str], clients: int, first: int = 0) -> None:
        self.relay = relay
        self.users = users
        self.acknowledged: Counter[tuple[str, str]] = Counter()  # (user, subject)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(first, first + clients)]
        for thread in self._threads:
            thread.start()

    def client(self) -> smtplib.SMTP:
        """A client, connected to the relay."""
        return smtplib.SMTP("127.0.0.1", self.relay.port, timeout=10)

    def deliver(self, client: smtplib.SMTP, to: list[str], text: str) -> list[str]:
        """Send a message; returns those of `to` for whom it was acknowledged."""
        return [] if client.sendmail("s@x.example", [f"{name}@local.example" for name in to], text) else to

    def _run(self, number: int) -> None:
        chance, count = random.Random(number), 0
        while not self._stop.is_set():
            with contextlib.suppress(OSError, smtplib.SMTPException), self.client() as client:
                while not self._stop.is_set():
                    self._stop.wait(PAUSE)
                    count += 1
                    to = chance.sample(self.users, min(len(self.users), chance.choice((1, 1, 3))))
                    subject = f"{number}-{count}"
                    text = f"Subject: {subject}\r\n\r\n" + "x" * chance.choice((10, 3000)) + "\r\n"
                    self.acknowledged.update((name, subject) for name in self.deliver(client, to, text))
            self._stop.wait(0.05)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def found(self, name: str) -> list[str]:
        """The subjects that a user has."""
        return shown(self.relay, name)["INBOX"]

    def check(self) -> None:
        """All that was acknowledged is there, and nothing twice."""
        found = Counter((name, subject) for name in self.users for subject in self.found(name))
        lost = [pair for pair in self.acknowledged if not found[pair]]
        twice = [pair for pair, count in found.items() if count > 1]
        assert not lost and not twice, (lost[:20], twice[:20])


def kill_under_load(relay: Relay, load: Load, what: str, rounds: int) -> None:
    """Kill the group of processes (`what` is "group") or one of the workers at random moments while `load` runs; ends it, and
    waits for the workers."""
    chance = random.Random(what)
    try:
        for _ in range(rounds):
            threading.Event().wait(chance.uniform(0.3, 1.0))
            if what == "group":
                relay.kill()
                relay.start()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(wait_for(relay.worker_pids)), signal.SIGKILL)
        threading.Event().wait(0.5)
    finally:
        load.end()
    wait_for(lambda: len(relay.worker_pids()) == relay.workers, what="all workers")


class Readable(Relay):
    """A relay that keeps the mail of local.example, with an SMTP listener and, for each protocol in `ports`, one in the clear
    (with STARTTLS) and one with TLS from the first octet (`PROTOCOLs`). `ca`: a file with the certificate's issuer."""

    def __init__(self, folder: Path, *settings: str, workers: int = 1, protocols: tuple[str, ...] = ("pop3",)) -> None:
        super().__init__(folder, None, *settings, workers=workers)
        authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        authority.issue_cert("localhost", "127.0.0.1", common_name="localhost").private_key_and_cert_chain_pem.write_to_path(
            folder / "cert.pem"
        )
        listeners = [f'[[listener]]\naddress = "127.0.0.1:{self.port}"\nauth = "may"\nauth_in_clear = true\n']
        self.ports: dict[str, int] = {}
        for protocol in protocols:
            self.ports[protocol], self.ports[protocol + "s"] = free_port(), free_port()
            clear = f'address = "127.0.0.1:{self.ports[protocol]}"\nprotocol = "{protocol}"\nauth_in_clear = true\n'
            secure = f'address = "127.0.0.1:{self.ports[protocol + "s"]}"\nprotocol = "{protocol}"\ntls = "implicit"\n'
            listeners += [f"[[listener]]\n{clear}", f"[[listener]]\n{secure}"]
        self.config = folder / "relay.toml"
        tables = f'[[certificate]]\nchain = "{folder}/cert.pem"\n'
        self.config.write_text("".join(listeners) + tables)

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :], "--set", f"route=[{LOCAL}]"]

    def user(self, name: str, password: str) -> None:
        """Create a user with a password."""
        create(self, name, password=password)

    def mail(self, name: str, *subjects: str, text: str = "x") -> None:
        """Send messages to a user, and wait until they are there."""
        self.deliver(name, *(f"Subject: {subject}\r\n\r\n{text}\r\n".encode() for subject in subjects))

    def deliver(self, name: str, *messages: bytes) -> None:
        """Send messages to a user by SMTP, and wait until they are in INBOX."""
        before = len(shown(self, name)["INBOX"])
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE) as client:
            for message in messages:
                client.sendmail("s@x.example", [f"{name}@local.example"], message)
        wait_for(lambda: len(shown(self, name)["INBOX"]) == before + len(messages), what="delivery")
