"""A relay that keeps mail, its users, and clients that send to them."""

import contextlib
import json
import random
import smtplib
import threading
from collections import Counter
from pathlib import Path

from tests.support.daemon import Relay

__all__ = ["LOCAL", "Load", "create", "kept", "shown", "verified"]

LOCAL = '{name="here",protocol="mailbox",recipient_domain=["local.example"]}'


def kept(folder: Path, *settings: str, workers: int = 1, routes: str = LOCAL) -> Relay:
    return Relay(folder, None, f"route=[{routes}]", *settings, workers=workers)


def create(relay: Relay, *names: str, options: tuple[str, ...] = ()) -> None:
    for name in names:
        relay.cli("mailbox", "create", *options, f"{name}@local.example")


def shown(relay: Relay, name: str) -> dict[str, list[str]]:
    """The subjects of a user's messages, by mailbox."""
    found = json.loads(relay.cli("mailbox", "show", "--messages", "--json", f"{name}@local.example").stdout)
    return {row["name"]: [message["subject"] for message in row["list"]] for row in found["mailboxes"]}


def verified(relay: Relay) -> None:
    """`mailbox verify` finds nothing wrong."""
    found = relay.cli("mailbox", "verify", check=False)
    assert (found.returncode, found.stderr) == (0, ""), found


class Load:
    """Clients that send messages with a subject of their own to some of the users, and note which were acknowledged."""

    def __init__(self, relay: Relay, users: list[str], clients: int) -> None:
        self.relay = relay
        self.users = users
        self.acknowledged: Counter[tuple[str, str]] = Counter()  # (user, subject)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        chance, count = random.Random(number), 0
        while not self._stop.is_set():
            with contextlib.suppress(OSError, smtplib.SMTPException):
                with smtplib.SMTP("127.0.0.1", self.relay.port, timeout=10) as client:
                    while not self._stop.is_set():
                        count += 1
                        to = chance.sample(self.users, min(len(self.users), chance.choice((1, 1, 3))))
                        subject = f"{number}-{count}"
                        text = f"Subject: {subject}\r\n\r\n" + "x" * chance.choice((10, 3000)) + "\r\n"
                        if not client.sendmail("s@x.example", [f"{name}@local.example" for name in to], text):
                            self.acknowledged.update((name, subject) for name in to)
            self._stop.wait(0.05)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """All that was acknowledged is there, and nothing twice."""
        found = Counter((name, subject) for name in self.users for subject in shown(self.relay, name)["INBOX"])
        assert [pair for pair in self.acknowledged if not found[pair]] == []
        assert [pair for pair, count in found.items() if count > 1] == []
