"""What the directory says to those who accept mail and logins: whether an address of a domain whose mail is kept here exists,
which addresses an alias stands for, and who logs in."""

from collections.abc import Callable

from relaymta.auth.identity import MailUser
from relaymta.config import Mailboxes as Settings
from relaymta.errors import RelayError
from relaymta.proto.address import comparable
from relaymta.proto.said import Reply
from relaymta.store.deliver import FULL, REFUSED, UNKNOWN, limits_of, status_of
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes

__all__ = ["Recipients"]

LOGINS_MOST = 10_000  # addresses of those who have logged in
MOST = 5000  # addresses that those of one message stand for


class Recipients:
    """`settings()`: the configuration in use. Each look-up takes some microseconds, on the loop."""

    def __init__(self, mailboxes: Mailboxes, settings: Callable[[], Settings]) -> None:
        self._mailboxes = mailboxes
        self._settings = settings
        self._logins: dict[str, MailUser] = {}  # by address since the directory's version `_logins_at`
        self._logins_at = -1

    def refusal(self, address: str, size: int) -> Reply | None:
        """Why an address gets no message of `size` octets (0: unknown); None: it does. One of several users gets none when all
        of them get none."""
        settings = self._settings()
        try:
            found = self._mailboxes.find(address, settings.subaddress)
        except RelayError as error:
            return Reply(450, "4.2.4", str(error))
        if found is None:
            return UNKNOWN
        if found.others:
            return None
        refused: list[Reply] = []
        for user in found.users:
            why = status_of(user) or self._full(user, size, settings)
            if why is None:
                return None
            refused.append(why)
        return min(refused)  # what may pass before what does not

    def _full(self, user: User, size: int, settings: Settings) -> Reply | None:
        """The reply while a user's quota has no room for a message; None where it has, or where that is not known."""
        limits = limits_of(user, settings)
        if not limits.octets and not limits.messages:
            return None
        used = self._mailboxes.used(user.shard, user.ident)
        if used is None:
            return None
        over = limits.octets and used.octets + max(size, 1) > limits.octets
        if over or (limits.messages and used.messages >= limits.messages):
            return REFUSED if settings.over_quota == "refuse" else FULL
        return None

    def login(self, name: str) -> MailUser | None:
        """A user as one who logs in, by any address of the user. A catch-all is no address: the user who gets the mail of a
        domain's other addresses is not called so, and does not send as all of the domain. From memory where nothing has changed
        since the last time: a login asks some times."""
        version = self._mailboxes.directory.version  # before the look: what is changed meanwhile is looked up again
        if version != self._logins_at or version < 0 or len(self._logins) >= LOGINS_MOST:
            self._logins.clear()
            self._logins_at = version
        address = comparable(name)
        known = self._logins.get(address)
        if known is None:
            known = self._look_up(address)
            if known is not None:  # of names that nobody has any number might be asked for
                self._logins[address] = known
        return known

    def _look_up(self, address: str) -> MailUser | None:
        found = None if address.startswith("@") else self._mailboxes.directory.owner(address)
        if found is None:
            return None
        user, addresses = found
        own = tuple(address for address in addresses if not address.startswith("@"))
        return MailUser(user.address, user.secret, not (user.disabled or user.deleted), own)

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
