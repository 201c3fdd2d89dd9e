"""Who is told that a mailbox has changed: sessions of this process, and other processes, which tell theirs."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol

__all__ = ["Listener", "Told", "Watches"]

Told = Callable[[int], None]
Place = tuple[int, int]  # shard, mailbox


class Listener(Protocol):
    """The channel to another process (control.Channel)."""

    def notify(self, op: str, /, **args: Any) -> None:
        """Tell it something."""


class Watches:
    """Used on the loop. What has changed several times in a turn of the loop is told once."""

    def __init__(self) -> None:
        self._here: dict[Place, list[Told]] = {}
        self._elsewhere: dict[Listener, set[Place]] = {}
        self._changed: dict[Place, int] = {}  # to be told: the highest MODSEQ

    def add(self, shard: int, mailbox: int, told: Told) -> bool:
        """Tell a session of this process from now on; whether it is the mailbox's first."""
        watchers = self._here.setdefault((shard, mailbox), [])
        watchers.append(told)
        return len(watchers) == 1

    def remove(self, shard: int, mailbox: int, told: Told) -> bool:
        """Tell it no more; whether it was the mailbox's last."""
        watchers = self._here[shard, mailbox]
        watchers.remove(told)
        if not watchers:
            del self._here[shard, mailbox]
        return not watchers

    def mailboxes(self, shard: int) -> list[int]:
        """The mailboxes of a shard that sessions of this process watch."""
        return [mailbox for number, mailbox in self._here if number == shard]

    def listen(self, listener: Listener, shard: int, mailboxes: Iterable[int]) -> None:
        """Tell another process, too; once at the beginning, since it may have missed something."""
        places = [(shard, mailbox) for mailbox in mailboxes]
        self._elsewhere.setdefault(listener, set()).update(places)
        _notify(listener, dict.fromkeys(places, 0))

    def ignore(self, listener: Listener, shard: int, mailboxes: Iterable[int]) -> None:
        """Tell it no more."""
        self._elsewhere.get(listener, set()).difference_update((shard, mailbox) for mailbox in mailboxes)

    def forget(self, listener: Listener) -> None:
        """The other process is gone."""
        self._elsewhere.pop(listener, None)

    def changed(self, shard: int, touched: dict[int, int]) -> None:
        """Mailboxes have changed (MODSEQ; 0: it is not known up to which)."""
        begun = bool(self._changed)
        for mailbox, modseq in touched.items():
            place = shard, mailbox
            if place in self._here or any(place in places for places in self._elsewhere.values()):
                self._changed[place] = max(modseq, self._changed.get(place, 0))
        if self._changed and not begun:
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        changed, self._changed = self._changed, {}
        for listener, places in self._elsewhere.items():
            _notify(listener, {place: changed[place] for place in changed.keys() & places})
        for place, modseq in changed.items():
            for told in [*self._here.get(place, ())]:
                _call(told, modseq)


def _notify(listener: Listener, changed: dict[Place, int]) -> None:
    for shard in {shard for shard, _ in changed}:
        touched = [(mailbox, modseq) for (number, mailbox), modseq in changed.items() if number == shard]
        listener.notify("mail_told", shard=shard, touched=touched)


def _call(told: Told, modseq: int) -> None:
    try:
        told(modseq)
    except Exception as error:  # it must not keep the others from being told
        context = {"message": "a session could not be told of a change", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
