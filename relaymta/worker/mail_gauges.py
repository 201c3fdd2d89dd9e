"""What a worker shows of its shards of the mailboxes, and of their users' sessions, every second."""

from collections.abc import Callable

from relaymta.store.mailboxes import Mailboxes
from relaymta.view.access import Access

__all__ = ["mail_state", "set_mail_gauges"]

PROTOCOLS = ("imap", "pop3", "managesieve")


def set_mail_gauges(gauge: Callable[[str, float], None], mailboxes: Mailboxes, access: Access | None) -> None:
    """`gauge(name, value)`: as of Counters. Nothing here waits for the disk."""
    shards = list(mailboxes.shards.values())
    files, live, bodies = (
        (sum(column) for column in zip(*(shard.usage for shard in shards), strict=True)) if shards else (0, 0, 0)
    )
    gauge("relaymta_mailbox_segment_octets", files)
    gauge("relaymta_mailbox_segment_live_octets", live)
    gauge("relaymta_mailbox_bodies", bodies)
    gauge("relaymta_mailbox_store_full", any(shard.disk.full for shard in shards))
    gauge("relaymta_mailbox_store_stalled", any(shard.writer.stalled for shard in shards))
    gauge("relaymta_mailbox_oldest_reader_seconds", max((shard.behind.seconds for shard in shards), default=0.0))
    for protocol in PROTOCOLS:
        gauge(f"relaymta_{protocol}_sessions", access.sessions[protocol] if access is not None else 0)
    gauge("relaymta_mailbox_view_octets", access.shared.octets if access is not None else 0)


def mail_state(mailboxes: Mailboxes) -> tuple[str, str]:
    """ "ok", "full" or "stalled", as of the event `store`; and why."""
    shards = mailboxes.shards.values()
    error = next((shard.writer.last_error for shard in shards if shard.writer.last_error), "")
    if any(shard.writer.stalled for shard in shards):
        return "stalled", error
    if any(shard.disk.full for shard in shards):
        return "full", error or "too little room is left on the disk, or in LMDB's map"
    return "ok", ""
