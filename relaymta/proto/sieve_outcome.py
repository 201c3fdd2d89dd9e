"""What is to become of a message, as a Sieve script says: data, for those who do it."""

from typing import NamedTuple, TypeAlias

__all__ = ["Action", "Answered", "Discarded", "Filed", "Kept", "Outcome", "Redirected", "Rejected"]


class Kept(NamedTuple):
    """File it in INBOX with these flags. `line`: of the script, as in all actions; `implicit`: nobody said so (`line` is 0)."""

    flags: tuple[str, ...] = ()
    line: int = 0
    implicit: bool = True


class Filed(NamedTuple):
    """File it in a mailbox; `create`: the script says that it is to be made if it does not exist (RFC 5490 3.2)."""

    mailbox: str
    flags: tuple[str, ...]
    create: bool
    line: int


class Redirected(NamedTuple):
    """Send it on to an address: `sieve_replies.redirected`."""

    address: str
    line: int


class Rejected(NamedTuple):
    """Refuse it (RFC 5429): 550 5.7.1 with `sieve_replies.rejection`. The sender is not null."""

    reason: bytes
    line: int


class Discarded(NamedTuple):
    """Accept it, and file it nowhere."""

    line: int


class Answered(NamedTuple):
    """Send a reply (RFC 5230): `sieve_replies.answered`, unless one with this `key` has been sent to `recipient` in the last
    `days`. `recipient`: the envelope's sender; `sender`: (display name, address) of its From; `subject`: as it is read;
    `reason`: its text, or with `mime` a MIME entity; `message_id`, `references`: of what it replies to, b"" without."""

    recipient: str
    sender: tuple[str, str]
    subject: str
    reason: bytes
    mime: bool
    days: int
    key: bytes
    message_id: bytes
    references: tuple[bytes, ...]
    line: int


Action: TypeAlias = Kept | Filed | Redirected | Rejected | Discarded | Answered


class Outcome(NamedTuple):
    """`actions`: all that is to be done, with the implicit keep; never empty. `error`: why the script could not be run to its end
    ("": it was), `line`: where; then there is the implicit keep alone. `loop`: why it was not run at all, likewise. `notes`:
    (line, text) of what was left out: replies that must not be sent."""

    actions: tuple[Action, ...]
    error: str = ""
    line: int = 0
    loop: str = ""
    notes: tuple[tuple[int, str], ...] = ()

    @property
    def implicit_keep(self) -> bool:
        """Whether it is filed in INBOX because nothing else was said."""
        return any(isinstance(one, Kept) and one.implicit for one in self.actions)
