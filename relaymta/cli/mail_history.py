"""`relaymta mailbox history`: what the log says of a user. (Apart from mailbox.py, since it imports the store.)"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from relaymta.cli.console import record
from relaymta.cli.mail_files import mail_files
from relaymta.cli.options import ANY_LISTENER, Configuration, loaded
from relaymta.cli.peer import answered, counted, lasting, when
from relaymta.errors import RelayError
from relaymta.log import history_of_user
from relaymta.store.directory import Directory

__all__ = ["events", "show"]

KNOWN = 20_000  # addresses whose owners are remembered


def events(read: Configuration, address: str, since: float) -> Iterator[dict[str, Any]]:
    """The events of the user who has an address, in the order of their times."""
    separator = loaded(read, ANY_LISTENER).mailboxes.subaddress
    with mail_files(read) as files:
        directory = files.directory
        owner = answered(lambda: directory.owner(address))
        ident = owner[0].ident if owner is not None else answered(lambda: directory.known(address)).ident
        found = history_of_user(files.folder.parent / "history", *_tests(directory, ident, separator), since)
        while (event := answered(lambda: next(found, None))) is not None:
            yield event


def _tests(directory: Directory, ident: int, separator: str) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Whether a login name, and whether a recipient, means a user: by the addresses and aliases of now."""

    @lru_cache(KNOWN)
    def is_login(name: str) -> bool:
        found = directory.owner(name)
        return found is not None and found[0].ident == ident

    @lru_cache(KNOWN)
    def is_address(recipient: str) -> bool:
        try:
            found = directory.look_up(recipient, separator)
        except RelayError:  # an alias that leads to nobody
            return False
        return found is not None and any(user.ident == ident for user in found.users)

    return is_login, is_address


def show(event: dict[str, Any]) -> None:
    """Write an event for people."""
    record(f"{when(event['ts']):>10}  {event['event']:<13}", _TEXTS[event["event"]](event))


def _mail(event: dict[str, Any]) -> str:
    who = event.get("recipients") or [event.get("recipient", "")]
    more = f" +{len(who) - 1}" if len(who) > 1 else ""
    sender = f" from <{event['sender']}>" if "sender" in event else ""
    reply = f": {event['reply']}" if event.get("reply") else ""
    return f"{event['id']}{sender} to <{who[0]}>{more}{reply}"


def _changed(event: dict[str, Any]) -> str:
    messages = f" of {counted(event['messages'], 'message', 'messages')}" if event["messages"] else ""
    into = f" -> {event['into']}" if event["into"] else ""
    return f"{event['action']}{messages}: {event['mailbox']}{into} ({event['protocol']} from {event['client']})"


def _session(event: dict[str, Any]) -> str:
    done = f"{event['retrieved'] or 0} retrieved" if event["protocol"] == "pop3" else f"{event['commands'] or 0} commands"
    program = f", {event['program']}" if event.get("program") else ""
    return f"{event['protocol']} from {event['client']}{program}: {lasting(event['seconds'])}, {done}"


def _login(event: dict[str, Any]) -> str:
    return f"as {event['user']} from {event['client']}: {event['reply']}"


def _quota(event: dict[str, Any]) -> str:
    return f"{event['filled']} % of the quota are used"


def _sieve(event: dict[str, Any]) -> str:
    ident = f"{event['id']}: " if event["id"] else ""
    actions = event["actions"]
    return ident + "; ".join(filter(None, (str(actions) if isinstance(actions, str) else ", ".join(actions), event["cause"])))


_TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    **dict.fromkeys(("delivered", "received", "deferred", "bounced"), _mail),
    "changed": _changed,
    "session": _session,
    "login": _login,
    "quota_warning": _quota,
    "sieve": _sieve,
}
