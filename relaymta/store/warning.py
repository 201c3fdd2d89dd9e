"""A message to users whose quota is nearly used up, once a day."""

import time
from collections.abc import Callable
from secrets import token_bytes
from typing import Final

import lmdb

from relaymta.errors import RelayError
from relaymta.ident import format_id
from relaymta.proto.header import rfc5322_date
from relaymta.store import scripts
from relaymta.store.change import Limits
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.writer import Target, prefix_of

__all__ = ["WARNED_AT", "Warnings"]

WARNED_AT: Final = 90  # per cent of a quota
EACH_SECONDS: Final = 86400
_KEY: Final = b"\0quota"  # among the replies that are remembered


class Warnings:
    """`hostname`: of their sender; `log(**fields)`: the event of each."""

    def __init__(self, mailboxes: Mailboxes, hostname: str, log: Callable[..., None]) -> None:
        self._mailboxes = mailboxes
        self._hostname = hostname
        self._log = log

    async def consider(self, user: User, limits: Limits, filled: int) -> None:
        """A message has been filed for a user, whose quota is used to `filled` per cent: warn the user, unless that was done in
        the last day. What goes wrong is no reason not to deliver."""
        now = int(time.time())
        try:
            shard = self._mailboxes.reading(user.shard)
            with shard.rows.reading() as txn:
                if scripts.replied_until(shard.rows, txn, user.ident, _KEY) > now:
                    return
            until, claimant = now + EACH_SECONDS, token_bytes(8)  # each message that comes now is somebody else
            if await self._mailboxes.change(user.shard, "remember_reply", user.ident, _KEY, until, now, claimant):
                target = Target(user.ident, prefix=prefix_of("", user.address))
                await self._mailboxes.file([_message(user, limits, filled, self._hostname, now)], [(user.shard, target)])
                self._log(user=user.address, filled=filled)
        except (RelayError, ConnectionError, lmdb.Error):
            return


def _message(user: User, limits: Limits, filled: int, hostname: str, now: int) -> bytes:
    quota = " and ".join(
        [f"{limits.octets >> 20} MB"] * bool(limits.octets) + [f"{limits.messages} messages"] * bool(limits.messages)
    )
    lines = [
        f"From: Mail Delivery System <MAILER-DAEMON@{hostname}>",
        f"To: <{user.address}>",
        f"Subject: Your mailbox is {filled} % full",
        f"Date: {rfc5322_date(now)}",
        f"Message-ID: <quota.{format_id(user.ident)}.{now}@{hostname}>",
        "Auto-Submitted: auto-generated",
        "MIME-Version: 1.0",
        "Content-Type: text/plain; charset=us-ascii",
        "",
        f"{filled} % of your quota ({quota}) are used.",
        "When it is full, further mail to you is delayed or refused.",
        "Delete what you do not need any more, also in Trash and Junk.",
        "",
    ]
    return "\r\n".join(lines).encode()
