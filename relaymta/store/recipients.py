"""What the directory says to those who accept mail and logins: whether an address of a domain whose mail is kept here exists,
which addresses an alias stands for, and who logs in."""

from collections.abc import Callable

from relaymta.auth.identity import MailUser
from relaymta.config import Mailboxes as Settings
from relaymta.errors import RelayError
from relaymta.proto.said import Reply
from relaymta.store.deliver import UNKNOWN, status_of
from relaymta.store.mailboxes import Mailboxes

__all__ = ["Recipients"]

MOST = 5000  # addresses that those of one message stand for


class Recipients:
    """`settings()`: the configuration in use. Each look-up takes some microseconds, on the loop."""

    def __init__(self, mailboxes: Mailboxes, settings: Callable[[], Settings]) -> None:
        self._mailboxes = mailboxes
        self._settings = settings

    def refusal(self, address: str) -> Reply | None:
        """Why an address gets no mail; None: it does."""
        try:
            found = self._mailboxes.find(address, self._settings().subaddress)
        except RelayError as error:
            return Reply(450, "4.2.4", str(error))
        if found is None:
            return UNKNOWN
        refused = [status_of(user) for user in found.users]
        return None if found.others or None in refused else refused[0]

    def login(self, name: str) -> MailUser | None:
        """A user as one who logs in, by any address of the user."""
        found = self._mailboxes.directory.owner(name)
        if found is None:
            return None
        user, addresses = found
        return MailUser(user.address, user.secret, not (user.disabled or user.deleted), addresses)

    def expanded(self, recipients: list[str], kept_here: Callable[[str], bool]) -> list[str]:
        """A message's recipients, with aliases of addresses elsewhere replaced by all that they stand for; aliases of users stay,
        since they are followed when the message is delivered. Each address once. The same list when there is none."""
        new: list[str] = []
        changed = False
        for address in recipients:
            others: list[str] = []
            if kept_here(address) and len(new) < MOST:
                try:
                    found = self._mailboxes.find(address, self._settings().subaddress)
                except RelayError:
                    found = None  # it is tried again where it is delivered
                if found is not None and found.others:
                    others = [*(user.address for user in found.users), *found.others]
            changed |= bool(others)
            new += others or [address]
        return list(dict.fromkeys(new)) if changed else recipients
