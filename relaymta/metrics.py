"""All metrics, in tables: name, help, labels; and their cells in a worker's block of shared memory.

Counting is one atomic add on a cell; an observation of a histogram is two. The supervisor reads the blocks of all workers and
exposes their sums by prometheus_client.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

from relaymta.proto.suppression import REASONS

__all__ = [
    "DNSBL_RESULTS", "FILTER_FAILURES", "FILTER_VERDICTS", "GAUGES", "HISTOGRAMS", "HISTOGRAM_NAMES", "HOOKS", "HOOK_FAILURES",
    "NAMES", "RESULTS",
    "SITES_SHOWN", "SITE_GAUGES", "SITE_RESULTS", "Counters", "FilterCounters", "FilterTotals", "ListCounters", "Own",
    "WebhookTotals", "activity",
    "certificate_name", "clear_filter_gauges", "down_families", "families", "filter_families", "list_families", "list_name",
    "own_families", "readings", "row_families", "shown", "webhook_families",
]  # fmt: skip


class Cells(Protocol):
    """An array of integer cells in shared memory (shm)."""

    def add(self, index: int, n: int) -> int:
        """Add n to a cell."""

    def set(self, index: int, n: int) -> int:
        """Store n in a cell."""

    def get(self, index: int) -> int:
        """A cell's value."""

    def observer(self, at: int, bounds: Sequence[float]) -> Callable[[float], None]:
        """What adds observations to the histogram in the cells from `at` on (`_speedups.cells.Observer`)."""


# Limits that mail waits for, as `send/room.py` has them.
THROTTLES = ("rate", "connection_rate", "connections", "machine", "learned")

# Hooks in Python, as hookframes.py has them, those that are told afterwards last; and why there is no answer of one: raised (an
# exception), timeout, ended (its process has), answer (it makes no sense), unavailable (there is no process).
HOOKS = (
    "on_connect", "on_helo", "on_auth", "on_mail", "on_rcpt", "on_data", "on_message", "choose_route", "on_attempt",
    "on_deferred", "on_bounced", "on_delivered",
)  # fmt: skip
HOOK_FAILURES = ("raised", "timeout", "ended", "answer", "unavailable")

# name: (help, names of labels or "", their values: of several labels with blanks between them, in both)
COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "relaymta_connections_total": ("Incoming connections", "result", ("accepted", "refused")),
    "relaymta_tls_handshakes_total": ("TLS handshakes with clients", "result", ("full", "resumed", "failed")),
    "relaymta_logins_total": ("Logins of clients", "result", ("good", "wrong", "limited", "unavailable")),
    "relaymta_dkim_signatures_total": ("DKIM signatures made", "", ("",)),
    "relaymta_dmarc_total": (
        "Messages of unauthenticated clients that were verified, by DMARC result", "result",
        ("pass", "none", "fail", "permerror", "temperror"),
    ),
    "relaymta_greylist_total": (
        "Messages that greylisting has judged, by what is known of their sender (passed: it has waited; early: not long enough)",
        "result", ("known", "passed", "early", "new"),
    ),
    "relaymta_quarantine_total": (
        "Messages that have left the quarantine (displaced: there was no room)", "result",
        ("released", "deleted", "bounced", "expired", "displaced"),
    ),
    "relaymta_quota_exceeded_total": (
        "Times a quota was exceeded: an account's (rejected or held), or a client's rate", "result",
        ("rejected", "held", "client"),
    ),
    "relaymta_messages_received_total": ("Messages acknowledged with 250", "", ("",)),
    "relaymta_received_octets_total": ("Octets of acknowledged messages", "", ("",)),
    "relaymta_recipients_received_total": ("Recipients of acknowledged messages", "", ("",)),
    "relaymta_messages_refused_total": (
        "Messages rejected after their data (filter: temporarily, since they could not be signed or verified)", "reason",
        ("content", "store", "full", "filter"),
    ),
    "relaymta_rejections_total": (
        "Rejections that the log has as `rejected`, by phase and class of the reply", "phase reply",
        tuple(f"{phase} {reply}" for phase in ("connect", "mail", "rcpt", "data") for reply in ("4xx", "5xx")),
    ),
    "relaymta_http_requests_total": (
        "Requests of applications that hand in mail by HTTP, by operation and class of the answer", "operation answer",
        tuple(f"{name} {answer}" for name in ("send", "message", "receipt", "other") for answer in ("2xx", "4xx", "5xx")),
    ),
    "relaymta_recipients_refused_total": ("Recipients rejected at RCPT, or of LMTP by their mailbox", "", ("",)),
    "relaymta_suppressed_total": (
        "Recipients rejected at RCPT since they are in the suppression list, by its reason", "reason",
        REASONS,
    ),
    "relaymta_recipients_total": ("Recipients by result", "result", ("delivered", "deferred", "bounced", "expired")),
    "relaymta_delivered_octets_total": ("Octets delivered", "", ("",)),
    "relaymta_mailbox_deliveries_total": (
        "Messages for mailboxes, one for each mailbox, by result (full: a quota is used up)", "result",
        ("filed", "full", "failed"),
    ),
    "relaymta_sieve_scripts_total": (
        "Messages on which users' Sieve scripts have decided, by what was done, which may be several (failed: kept)", "result",
        ("kept", "filed", "discarded", "rejected", "redirected", "replied", "failed"),
    ),
    "relaymta_mailbox_sessions_total": ("Sessions of users who read their mail", "protocol", ("pop3", "imap", "managesieve")),
    "relaymta_imap_commands_total": (
        "Commands of IMAP clients (those of UIDs with the others)", "verb",
        (
            "NOOP", "SELECT", "EXAMINE", "CREATE", "DELETE", "RENAME", "SUBSCRIBE", "UNSUBSCRIBE", "LIST", "LSUB", "NAMESPACE",
            "STATUS", "APPEND", "IDLE", "GETQUOTA", "GETQUOTAROOT", "SETQUOTA", "CHECK", "CLOSE", "UNSELECT", "EXPUNGE",
            "SEARCH", "SORT", "THREAD", "FETCH", "STORE", "COPY", "MOVE",
        ),
    ),
    "relaymta_imap_results_total": (
        "Commands of IMAP clients by their end (failed: by a defect, or since the client was gone)", "result",
        ("ok", "no", "bad", "failed"),
    ),
    "relaymta_mailbox_messages_read_total": ("Messages that users have read", "", ("",)),
    "relaymta_mailbox_read_octets_total": ("Octets of messages that users have read", "", ("",)),
    "relaymta_mailbox_expunged_total": ("Messages that users have removed", "", ("",)),
    "relaymta_sessions_total": ("Outgoing connections", "result", ("opened", "failed")),
    "relaymta_tls_sessions_total": (
        "Outgoing connections over TCP that are ready for mail, by the route's `tls`: verified, encrypted with a certificate that"
        " was not verified, or in the clear; and those that have failed in TLS, or since a host does not offer it",
        "policy result",
        tuple(
            f"{policy} {result}" for policy in ("off", "may", "encrypt", "verify")
            for result in ("verified", "encrypted", "clear", "failed")
        ),
    ),
    "relaymta_throttled_seconds_total": (
        "Seconds for which sites had mail in memory that waited for a limit, looked at once a second (rate,"
        " connection_rate, connections: the site's; machine: delivery.connections; learned: from the site's replies)",
        "constraint", THROTTLES,
    ),
    "relaymta_transactions_total": ("Outgoing mail transactions", "", ("",)),
    "relaymta_dns_lookups_total": ("DNS look-ups: queries sent, or answers from the cache", "result", ("query", "hit")),
    "relaymta_in_doubt_total": ("Attempts that ended between the last octet and its reply: possible duplicates", "", ("",)),
    "relaymta_commits_total": ("Group commits", "", ("",)),
    "relaymta_commit_operations_total": ("Operations in group commits", "", ("",)),
    "relaymta_commit_errors_total": ("Messages and changes of the queue that could not be committed", "", ("",)),
    "relaymta_syncs_total": ("fdatasync and fsync calls for bodies", "", ("",)),
    "relaymta_dsns_total": ("DSNs queued", "", ("",)),
    "relaymta_dsns_dropped_total": ("Permanent failures without a DSN, since the message has the null sender", "", ("",)),
    "relaymta_hook_failures_total": (
        "Calls of hooks in Python without an answer, by why (ended: their process has; answer: it makes no sense; unavailable:"
        " there is no process)", "hook reason", tuple(f"{hook} {why}" for hook in HOOKS for why in HOOK_FAILURES),
    ),
    "relaymta_hook_dropped_total": (
        "Times a hook in Python was not told what has become of a message, since too much waited for it", "hook", HOOKS[-4:],
    ),
    "relaymta_watchdog_total": ("Deliveries cancelled because they made no progress", "", ("",)),
    "relaymta_corrupt_bodies_total": ("Bodies that did not match their checksum", "", ("",)),
    "relaymta_journal_dropped_total": (
        "Events that were not written to the journal, since the disk was full or failed", "", ("",),
    ),
    "relaymta_trace_spans_total": (
        "Spans for the collector of [tracing] (dropped: there was no room for them; refused: it has answered that it does not"
        " take them)", "result", ("sent", "dropped", "refused"),
    ),
    "relaymta_log_dropped_total": ("Log records dropped because they could not be written", "", ("",)),
}  # fmt: skip

# Names of 0.1, exposed beside the new ones for one version: old -> new.
RENAMED = {
    "relaymta_notices_total": "relaymta_dsns_total",
    "relaymta_notices_dropped_total": "relaymta_dsns_dropped_total",
}


class Histogram(NamedTuple):
    """`bounds`: upper, in seconds or messages. `label`: its name ("": none), with `values`; "worker": each worker has a series of
    its own."""

    text: str
    bounds: tuple[float, ...]
    label: str = ""
    values: tuple[str, ...] = ("",)


WORKER = "worker"
# Phases of an attempt: until a site's hosts are known; until they are connected to; for their greeting; and so on, each from the
# command to its reply.
PHASES = ("dns", "connect", "greeting", "ehlo", "tls", "auth", "mail", "rcpt", "data", "dot")
CLASSES = ("express", "normal", "bulk")
HISTOGRAMS: dict[str, Histogram] = {
    "relaymta_accept_seconds": Histogram("From the final dot to 250", (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2)),
    "relaymta_commit_seconds": Histogram(
        "What a group commit of the queue takes: bodies written and synced, then one transaction",
        (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5),
    ),
    "relaymta_messages_per_commit": Histogram(
        "Messages that one group commit stores, of those that store any", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
    ),
    "relaymta_first_attempt_seconds": Histogram(
        "From the commit of a message (its release, where it was held) to its first attempt, by class",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30, 60, 600, 3600), "class", CLASSES,
    ),
    "relaymta_attempt_phase_seconds": Histogram(
        "What the phases of attempts to deliver take, failed ones too",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300), "phase", PHASES,
    ),
    "relaymta_delivery_delay_seconds": Histogram(
        "From acceptance to delivery", (0.01, 0.05, 0.1, 0.5, 1, 5, 60, 600, 3600, 86400)
    ),
    "relaymta_messages_per_session": Histogram(
        "Messages sent over one outgoing connection", (1, 2, 5, 10, 50, 100, 500, 1000)
    ),
    "relaymta_dns_seconds": Histogram(
        "What queries of the DNS take, by what comes of them (none: no such name, or no such record)",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10), "result", ("found", "none", "failed"),
    ),
    "relaymta_imap_command_seconds": Histogram(
        "From an IMAP command to its end", (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10)
    ),
    "relaymta_dkim_seconds": Histogram(
        "What the DKIM signatures of a message take that has any: to be made, or verified (with ARC) once their keys are there;"
        " of a large message, when all of it is there. Waits for another process or thread are included",
        (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5), "op", ("sign", "verify"),
    ),
    "relaymta_hook_seconds": Histogram(
        "From the call of a hook in Python to its answer, or its failure",
        (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5), "hook", HOOKS,
    ),
    "relaymta_loop_lag_seconds": Histogram(
        "How much later than it should a worker's event loop gets to a timer, measured 20 times a second",
        (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5), WORKER,
    ),
    "relaymta_gc_pause_seconds": Histogram(
        "How long Python's garbage collections stop a worker", (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5)
    ),
}  # fmt: skip

# Gauges, set by each worker once a second: (help, whether the greatest value of all workers is exposed instead of their sum; or
# LEAST, EACH).
LEAST = "least"  # the least of those that are above 0; not exposed while there is none
EACH = "each"  # of each worker, with its number as a label
GAUGES: dict[str, tuple[str, bool | str]] = {
    "relaymta_queue_messages": ("Messages in the queue", False),
    "relaymta_queue_octets": ("Octets of the messages in the queue", False),
    "relaymta_queue_deferred": ("Placements in the queue that are deferred: tried, to be tried again", False),
    "relaymta_queue_held": ("Held messages", False),
    "relaymta_unseen": ("Messages in the queue that filters have not looked at yet", False),
    "relaymta_unseen_oldest_seconds": ("Age of the oldest of these", True),
    "relaymta_quarantine_messages": ("Messages in the quarantine", False),
    "relaymta_quarantine_octets": ("Octets of the messages in the quarantine that are deleted by themselves", False),
    "relaymta_quarantine_limit_octets": ("What these may have (quarantine.octets)", True),
    "relaymta_oldest_overdue_seconds": (
        "How long the longest expired message in the queue has been expired; 0 for a day after a long stop",
        True,
    ),
    "relaymta_oldest_message_seconds": ("Age of the oldest message in the queue that is not held", True),
    "relaymta_oldest_held_seconds": ("Age of the oldest held message, those in the quarantine included", True),
    "relaymta_drop_files": ("Messages in the drop folder that wait to be taken", False),
    "relaymta_drop_oldest_seconds": ("For how long the relay has seen the one of these that waits longest", True),
    "relaymta_drop_bad_files": ("Messages in the drop folder that were put aside (bad/)", False),
    "relaymta_pickup_files": ("Messages in the pickup folder that wait to be taken", False),
    "relaymta_pickup_oldest_seconds": ("For how long the relay has seen the one of these that waits longest", True),
    "relaymta_pickup_bad_files": ("Messages in the pickup folder that were put aside (bad/)", False),
    "relaymta_connections": ("Open incoming connections", False),
    "relaymta_sessions": ("Open outgoing connections", False),
    "relaymta_window": ("Messages in memory for delivery", False),
    "relaymta_segment_octets": ("Octets of segment files", False),
    "relaymta_segment_live_octets": ("Octets of live bodies in segments", False),
    "relaymta_limit_overflows": ("Times the table of a limit was full, and a worker used only its share of the limit", False),
    "relaymta_listeners_paused": ("1 while a worker is out of descriptors and does not accept connections", True),
    "relaymta_stressed": ("1 while 80 % of the connections are in use and timeouts for clients are a tenth", True),
    "relaymta_tls_certificate_errors": ("Certificates whose current files cannot be used", True),
    "relaymta_dkim_key_errors": ("DKIM keys whose current files cannot be used", True),
    "relaymta_accounts_file_errors": ("1 while the current file of accounts cannot be used", True),
    "relaymta_memory_pressure": (
        "1 while no message data is kept in memory, 2 while mail is temporarily rejected",
        True,
    ),
    "relaymta_shedding": ("1 while the event loop is late and new clients get 421 (load shedding)", True),
    "relaymta_store_slow": ("1 while the disk is nearly full and 250 is delayed", True),
    "relaymta_store_full": ("1 while the disk or the LMDB map is too full to accept mail", True),
    "relaymta_store_stalled": ("1 while the store cannot commit deletes and delivery pauses", True),
    "relaymta_imap_sessions": ("Open sessions of IMAP clients that have logged in", False),
    "relaymta_pop3_sessions": ("Open sessions of POP3 clients that have logged in", False),
    "relaymta_managesieve_sessions": ("Open sessions of ManageSieve clients that have logged in", False),
    "relaymta_mailbox_bodies": ("Messages stored for mailboxes; one that is in several of them counts once", False),
    "relaymta_mailbox_segment_octets": ("Octets of the mailboxes' segment files", False),
    "relaymta_mailbox_segment_live_octets": ("Octets of messages in the mailboxes' segment files that a mailbox has", False),
    "relaymta_mailbox_view_octets": ("Memory of what sessions know of the mailboxes that they have selected", False),
    "relaymta_mailbox_oldest_reader_seconds": (
        "For how long somebody has been reading a state of the mailboxes from before a commit: LMDB files grow meanwhile",
        True,
    ),
    "relaymta_mailbox_store_full": ("1 while the disk or the LMDB map is too full to file messages in mailboxes", True),
    "relaymta_mailbox_store_stalled": ("1 while the mailboxes cannot be opened again after a failed commit", True),
    "relaymta_disk_free_octets": ("Octets free for the relay on the disk of the spool", LEAST),
    "relaymta_disk_floor_octets": ("Octets free below which no mail is taken", LEAST),
    "relaymta_lmdb_map_used_ratio": ("Used share of the LMDB map of the fullest shard; above 0.9 no mail is taken", True),
    "relaymta_mailbox_lmdb_map_used_ratio": ("Used share of the LMDB map of the fullest shard of mailboxes", True),
    "relaymta_rss_octets": ("Memory of a worker that is its own: pages of files, such as LMDB's map, are not counted", EACH),
}
RATIOS = frozenset(name for name in GAUGES if name.endswith("_ratio"))  # their cells have millionths

# Gauges of the SITES_SHOWN busiest sites, labelled with the site: help, and the key in a row of `site list --json`.
SITE_GAUGES: dict[str, tuple[str, str]] = {
    "relaymta_site_waiting": ("Messages in memory that wait for a site", "waiting"),
    "relaymta_site_connections": ("Open connections to a site", "connections"),
    "relaymta_site_window": ("Connections that a site has shown to accept so far", "window"),
    "relaymta_site_rate": ("Transactions begun a second", "rate"),
}
SITES_SHOWN = 50
# Of the machine: sites that are down, and the ones with most failures: hosts is "smart" (a route's smart hosts) or "mx".
DOWN_GAUGE, DOWN_TOTAL = "relaymta_site_down", "relaymta_sites_down"
QUOTA_GAUGE = "relaymta_quota_used_ratio"
ACCOUNTS_SHOWN = 50

# Of each configured filter, by its name; its cells in a worker's block of `shm.Named`, in this order.
FILTER_VERDICTS = ("accept", "tag", "discard", "hold", "tempfail", "reject")
FILTER_FAILURES = ("connect", "timeout", "protocol", "refused", "oversize")
FILTER_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10)
FILTER_METRICS = {
    "seconds": "relaymta_filter_seconds", "verdicts": "relaymta_filter_verdicts_total", "failures":
    "relaymta_filter_failures_total", "up": "relaymta_filter_up", "waiting": "relaymta_filter_waiting",
    "timeout": "relaymta_filter_timeout_seconds",
}  # fmt: skip
# Of a list in the DNS: what it answers (refused: it does not answer us; failed: no answer), or that it is not asked (paused).
DNSBL_RESULTS = ("listed", "clean", "refused", "failed", "paused")
DNSBL_TOTAL = "relaymta_dnsbl_total"
RULE_TOTAL = "relaymta_rule_matches_total"
ABUSE_TOTAL, ABUSE_GAUGE = "relaymta_abuse_total", "relaymta_abuse_accounts"
RESTARTS, WORKERS, CERTIFICATES = "relaymta_worker_restarts_total", "relaymta_workers", "relaymta_cert_expiry_seconds"
WEBHOOK_TOTAL = "relaymta_webhook_events_total"
WEBHOOK_GAUGES = ("relaymta_webhook_lag_events", "relaymta_webhook_lag_seconds", "relaymta_webhook_failing")
GENERATION, REFUSED = "relaymta_config_generation", "relaymta_config_reload_refused"
REFUSALS = "relaymta_config_reload_errors_total"
SITE_TOTAL = "relaymta_site_attempts_total"
SUPPRESSIONS, SUPPRESSIONS_MOST = "relaymta_suppression_entries", "relaymta_suppression_entries_most"
SUPPRESSIONS_LEFT = "relaymta_suppression_left_out_total"
RAISED = "relaymta_hook_exceptions_total"
OTHER = "other"  # the sites that are not shown
SITE_RESULTS = ("delivered", "deferred", "bounced")
LABEL_MOST = 100  # characters of a label's value that comes from outside
_FAILURES_AT = len(FILTER_VERDICTS)
_BUCKETS_AT = _FAILURES_AT + len(FILTER_FAILURES)
_SUM_AT = _BUCKETS_AT + len(FILTER_BOUNDS) + 1  # microseconds
_DOWN_AT, _WAITING_AT, _FILTER_CELLS = _SUM_AT + 1, _SUM_AT + 2, _SUM_AT + 3

_index: dict[tuple[str, str], int] = {}
for _name, (_, _, _values) in COUNTERS.items():
    for _value in _values:
        _index[_name, _value] = len(_index)
_histogram: dict[tuple[str, str], int] = {}
_next = len(_index)
for _name, _one in HISTOGRAMS.items():
    for _value in _one.values:
        _histogram[_name, _value] = _next
        _next += len(_one.bounds) + 2  # +Inf, and the sum in millionths
_gauge = {name: _next + position for position, name in enumerate(GAUGES)}
CELLS = _next + len(GAUGES)
# What is in which cell: two programs with the same layout can share the memory (of shm.LAYOUT, too).
LAYOUT = repr(
    (list(_index), list(HISTOGRAMS.items()), list(GAUGES), FILTER_VERDICTS, FILTER_FAILURES, FILTER_BOUNDS, DNSBL_RESULTS)
)
HISTOGRAM_NAMES = frozenset([*HISTOGRAMS, FILTER_METRICS["seconds"]])
_ROWS = (
    QUOTA_GAUGE, DOWN_GAUGE, DOWN_TOTAL, DNSBL_TOTAL, RULE_TOTAL, ABUSE_TOTAL, ABUSE_GAUGE, RESTARTS, WORKERS, CERTIFICATES,
    GENERATION, REFUSED, REFUSALS, SITE_TOTAL, SUPPRESSIONS, SUPPRESSIONS_MOST, SUPPRESSIONS_LEFT, WEBHOOK_TOTAL, RAISED,
    *WEBHOOK_GAUGES,
)  # fmt: skip
NAMES = frozenset([*COUNTERS, *HISTOGRAMS, *GAUGES, *SITE_GAUGES, *_ROWS, *FILTER_METRICS.values()])


def index(name: str, label: str = "") -> int:
    """The cell of a counter, of values of its labels as COUNTERS has them; called at import time, so that counting needs no
    look-up."""
    return _index[name, label]


# What `relaymta status` shows -> its cell.
RESULTS = {"accepted": index("relaymta_messages_received_total")} | {
    result: index("relaymta_recipients_total", result) for result in COUNTERS["relaymta_recipients_total"][2]
}

# What `relaymta top` shows as rates -> its cells; and of what that and `readings` show the times.
_RATES = {name: (cell,) for name, cell in RESULTS.items()} | {
    "rejected": (
        *(index("relaymta_messages_refused_total", why) for why in COUNTERS["relaymta_messages_refused_total"][2]),
        index("relaymta_recipients_refused_total"),
    ),
    "connections": (index("relaymta_connections_total", "accepted"),),
    "refused": (index("relaymta_connections_total", "refused"),),
    "sessions": (index("relaymta_sessions_total", "opened"),),
}
_TIMES = {"accept": "relaymta_accept_seconds", "delivery": "relaymta_delivery_delay_seconds"}


def _total(workers: Sequence[Cells], cell: int) -> int:
    return sum(worker.get(cell) for worker in workers)


def _gauged(workers: Sequence[Cells], name: str) -> int:
    """A gauge of all workers together."""
    values = [worker.get(_gauge[name]) for worker in workers]
    return max(values, default=0) if GAUGES[name][1] else sum(values)


def _buckets(workers: Sequence[Cells], name: str) -> list[int]:
    """The counts of a histogram without a label, by bound; then what is above the last, and the sum in millionths."""
    base = _histogram[name, ""]
    return [_total(workers, base + cell) for cell in range(len(HISTOGRAMS[name].bounds) + 2)]


def activity(workers: Sequence[Cells]) -> dict[str, Any]:
    """Of all workers: `counts` since the start by name, `times` as (how many, their sum in ms), `gauges` by their names."""
    times = {}
    for name, histogram in _TIMES.items():
        *counts, millionths = _buckets(workers, histogram)
        times[name] = sum(counts), millionths // 1000
    counted = {name: sum(_total(workers, cell) for cell in cells) for name, cells in _RATES.items()}
    return {"counts": counted, "times": times, "gauges": {name: _gauged(workers, name) for name in GAUGES}}


def shown(text: str) -> str:
    """A label's value that comes from outside: names of hosts, files, accounts. Printable, at most LABEL_MOST characters; what
    was changed ends with a hash, so that two that differ still do. (Quotes and backslashes are escaped by prometheus_client.)"""
    clean = "".join(c if c.isprintable() else "?" for c in text)  # lone surrogates are not printable
    if clean == text and len(text) <= LABEL_MOST:
        return text
    hashed = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{clean[: LABEL_MOST - 10]}...{hashed}"[:LABEL_MOST]


class Counters:
    """One worker's metrics, in `cells`."""

    __slots__ = ("_observers", "add", "cells")

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.add = cells.add
        self._observers: dict[str, Callable[[float], None]] = {}  # by their histograms, as far as they were asked for

    def observe(self, name: str, value: float) -> None:
        """Add an observation (seconds, or messages) to a histogram without labels."""
        observer = self._observers.get(name)
        if observer is None:
            observer = self._observers[name] = self.histogram(name)
        observer(value)

    def histogram(self, name: str, value: str = "") -> Callable[[float], None]:
        """What adds observations to a histogram, of one value of its label: for hot paths. What is negative or absurd is left
        out (`_speedups.cells.Observer`). Durations are measured by a monotonic clock all the same."""
        return self.cells.observer(_histogram[name, value], HISTOGRAMS[name].bounds)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge; the fraction is dropped, but for a ratio's."""
        self.cells.set(_gauge[name], int(value * 1_000_000 if name in RATIOS else value))

    def reading(self, name: str) -> int:
        """The value of a gauge that is no ratio."""
        return self.cells.get(_gauge[name])

    def clear_gauges(self) -> None:
        """Set all gauges to 0, of a worker that has died. Its counters stay."""
        for cell in _gauge.values():
            self.cells.set(cell, 0)


# What `readings` shows -> the gauge behind it.
_SHOWN_GAUGES = {
    "messages": "relaymta_queue_messages", "octets": "relaymta_queue_octets", "deferred": "relaymta_queue_deferred",
    "held": "relaymta_queue_held", "quarantined": "relaymta_quarantine_messages", "connections": "relaymta_connections",
    "sessions": "relaymta_sessions", "oldest": "relaymta_oldest_message_seconds",
}  # fmt: skip


def readings(blocks: Sequence[Cells]) -> dict[str, Any]:
    """Of all workers together, for operators: `totals` (as of RESULTS, since the start), `gauges` (now), and `histograms`: by
    name `bounds` (seconds) and `counts`, one more, of what is above the last one."""
    histograms = {
        shown: {"bounds": list(HISTOGRAMS[name].bounds), "counts": _buckets(blocks, name)[:-1]} for shown, name in _TIMES.items()
    }
    gauges = {shown: _gauged(blocks, name) for shown, name in _SHOWN_GAUGES.items()}
    totals = {name: _total(blocks, cell) for name, cell in RESULTS.items()}
    return {"totals": totals, "gauges": gauges, "histograms": histograms}


class FilterCounters:
    """What one worker counts of one filter. `at`: where its cells begin; negative: nothing is counted."""

    __slots__ = ("_at", "_cells")

    def __init__(self, cells: Cells, at: int) -> None:
        self._cells = cells
        self._at = at

    def _add(self, cell: int, n: int = 1) -> None:
        if self._at >= 0:
            self._cells.add(self._at + cell, n)

    def verdict(self, word: str) -> None:
        """A verdict was given, one of FILTER_VERDICTS."""
        self._add(FILTER_VERDICTS.index(word))

    def failure(self, reason: str) -> None:
        """There was none, for one of FILTER_FAILURES."""
        self._add(_FAILURES_AT + FILTER_FAILURES.index(reason))

    def took(self, seconds: float) -> None:
        """It was asked, and has answered or failed after so long."""
        self._add(_BUCKETS_AT + bisect_left(FILTER_BOUNDS, seconds))
        self._add(_SUM_AT, int(seconds * 1e6))

    def set_state(self, down: bool, waiting: int) -> None:
        """Whether it is down for this worker, and how many messages wait for a place."""
        if self._at >= 0:
            self._cells.set(self._at + _DOWN_AT, down)
            self._cells.set(self._at + _WAITING_AT, waiting)


def clear_filter_gauges(cells: Cells, each: int, count: int) -> None:
    """Set the gauges of all filters to 0, of a worker that has died: `count` filters of `each` cells. Its counters stay."""
    for at in range(0, count * each, each):
        FilterCounters(cells, at).set_state(False, 0)


class ListCounters:
    """What one worker counts of a list in the DNS. `at`: where its cells begin; negative: nothing is counted."""

    __slots__ = ("_at", "_cells")

    def __init__(self, cells: Cells, at: int) -> None:
        self._cells = cells
        self._at = at

    def result(self, word: str) -> None:
        """It was asked, or is not now; with one of DNSBL_RESULTS."""
        if self._at >= 0:
            self._cells.add(self._at + DNSBL_RESULTS.index(word), 1)


class RuleCounters:
    """What one worker counts of a rule about mail. `at`: where its cells begin; negative: nothing is counted."""

    __slots__ = ("_at", "_cells")

    def __init__(self, cells: Cells, at: int) -> None:
        self._cells = cells
        self._at = at

    def looked(self, matches: bool, enforced: bool, microseconds: int) -> None:
        """It was evaluated. On any thread."""
        if self._at < 0:
            return
        if matches:
            self._cells.add(self._at + (0 if enforced else 1), 1)
        self._cells.add(self._at + 2, 1)
        self._cells.add(self._at + 3, microseconds)


def rule_name(name: str) -> str:
    """The name under which a rule's counters are known, which is no filter's."""
    return f"rule {name}"


class RuleTotals(NamedTuple):
    """The counters of all workers for one rule: how often it has matched with `enforce` and without, how often it was evaluated,
    and how long that took."""

    enforced: int
    dry: int
    looked: int
    microseconds: int

    @classmethod
    def of(cls, blocks: list[list[int]]) -> "RuleTotals":
        """`blocks`: the cells of each worker."""
        return cls(*(sum(cells[cell] for cells in blocks) for cell in range(4)))


def rule_families(totals: dict[str, RuleTotals]) -> list[object]:
    """Metrics of rules about mail, by their names, as prometheus_client metric families."""
    from prometheus_client.core import CounterMetricFamily

    found = CounterMetricFamily(RULE_TOTAL, "Messages that rules about mail match", labels=["rule", "enforced"])
    for name, total in totals.items():
        found.add_metric([shown(name), "true"], total.enforced)
        found.add_metric([shown(name), "false"], total.dry)
    return [found]


def abuse_families(counts: dict[str, tuple[int, int, int]]) -> list[object]:
    """Metrics of looks at abuse, by their names (`Accounts.counts`), as prometheus_client metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    found = CounterMetricFamily(ABUSE_TOTAL, "Times an account was not as usual", labels=["check", "enforced"])
    now = GaugeMetricFamily(ABUSE_GAUGE, "Accounts that are not as usual now, enforced or not", labels=["check"])
    for name, (enforced, dry, there) in counts.items():
        found.add_metric([shown(name), "true"], enforced)
        found.add_metric([shown(name), "false"], dry)
        now.add_metric([shown(name)], there)
    return [found, now]


class WebhookTotals(NamedTuple):
    """What was counted of a webhook: events `delivered` and `dropped`, how many it is `behind`, and the age (seconds) of the
    oldest that it has not taken; whether it takes none now."""

    delivered: int = 0
    dropped: int = 0
    behind: int = 0
    seconds: float = 0.0
    failing: bool = False


def webhook_families(totals: dict[str, WebhookTotals]) -> list[object]:
    """Metrics of webhooks, by their names, as prometheus_client metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    events = CounterMetricFamily(
        WEBHOOK_TOTAL, "Events for webhooks (delivered: they were taken; dropped: they were not, and are sent no more)",
        labels=["webhook", "result"],
    )  # fmt: skip
    behind = GaugeMetricFamily(WEBHOOK_GAUGES[0], "Events of the journal that a webhook has not come to", labels=["webhook"])
    seconds = GaugeMetricFamily(WEBHOOK_GAUGES[1], "Age of the oldest event that a webhook has not taken", labels=["webhook"])
    failing = GaugeMetricFamily(WEBHOOK_GAUGES[2], "1 while a webhook takes no events", labels=["webhook"])
    for name, total in totals.items():
        events.add_metric([shown(name), "delivered"], total.delivered)
        events.add_metric([shown(name), "dropped"], total.dropped)
        behind.add_metric([shown(name)], total.behind)
        seconds.add_metric([shown(name)], total.seconds)
        failing.add_metric([shown(name)], total.failing)
    return [events, behind, seconds, failing]


class Own(NamedTuple):
    """What the supervisor knows of itself. `generation`: the number of the configuration in use; `refused`: whether the last
    reload was refused, and how often one was; `restarts`: of workers, by reason; `workers`: by state; `certificates`: when they
    end (seconds since 1970), by path; of the suppression list, its entries by reason, how many there may be, and how many were
    left out; `raised`: exceptions of hooks in Python, by their places."""

    generation: int
    refused: bool
    refusals: int
    restarts: dict[str, int]
    workers: dict[str, int]
    certificates: dict[str, int]
    suppressions: dict[str, int]
    suppressions_most: int
    suppressions_left_out: int
    raised: dict[str, int]


def certificate_name(path: str) -> str:
    """The name under which the end of a certificate is known, which is no filter's."""
    return f"certificate {path}"


def own_families(own: Own, now: float) -> list[object]:
    """Metrics of the supervisor as prometheus_client metric families. `now`: seconds since 1970."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    restarts = CounterMetricFamily(RESTARTS, "Workers that have ended and were replaced", labels=["reason"])
    for reason, count in own.restarts.items():
        restarts.add_metric([reason], count)
    workers = GaugeMetricFamily(WORKERS, "Workers by state (late: it does not answer)", labels=["state"])
    for state, count in own.workers.items():
        workers.add_metric([state], count)
    ends = GaugeMetricFamily(CERTIFICATES, "Seconds until a certificate in use ends, by its file", labels=["name"])
    for path, moment in own.certificates.items():
        ends.add_metric([shown(path)], moment - now)
    entries = GaugeMetricFamily(
        SUPPRESSIONS, "Entries of the suppression list, where it is used, by reason (expired ones until they are swept)",
        labels=["reason"],
    )  # fmt: skip
    for reason, count in own.suppressions.items():
        entries.add_metric([reason], count)
    raised = CounterMetricFamily(RAISED, "Exceptions that hooks in Python have raised, by file and line", labels=["place"])
    for place, count in own.raised.items():
        raised.add_metric([shown(place)], count)
    return [
        GaugeMetricFamily(GENERATION, "The number of the configuration in use, counted since the start", value=own.generation),
        GaugeMetricFamily(REFUSED, "1 while the last reload was refused: the file is not what is in use", value=own.refused),
        CounterMetricFamily(REFUSALS, "Reloads that were refused", value=own.refusals),
        restarts, workers, ends, entries, raised,
        GaugeMetricFamily(
            SUPPRESSIONS_MOST, "How many entries the suppression list may have; 0: it is not used", value=own.suppressions_most
        ),
        CounterMetricFamily(
            SUPPRESSIONS_LEFT, "Entries that were not added to the suppression list, since it was full",
            value=own.suppressions_left_out,
        ),
    ]  # fmt: skip


def list_name(zone: str) -> str:
    """The name under which a list's counters are known, which is no filter's."""
    return f"dnsbl {zone}"


def list_families(zones: dict[str, list[list[int]]]) -> list[object]:
    """Metrics of lists in the DNS, from the cells of each worker, as prometheus_client metric families."""
    from prometheus_client.core import CounterMetricFamily

    found = CounterMetricFamily(DNSBL_TOTAL, "Answers of lists in the DNS", labels=["zone", "result"])
    for zone, blocks in zones.items():
        for cell, word in enumerate(DNSBL_RESULTS):
            found.add_metric([shown(zone), word], sum(cells[cell] for cells in blocks))
    return [found]


class FilterTotals:
    """The counters of all workers for one filter: `blocks`, the cells of each. `timeout`: as configured, seconds."""

    def __init__(self, blocks: list[list[int]], timeout: float = 0.0) -> None:
        self.timeout = timeout
        self._sums = [sum(cells) for cells in zip(*blocks, strict=True)] if blocks else [0] * _FILTER_CELLS
        self.up = not self._sums[_DOWN_AT]
        self.waiting = self._sums[_WAITING_AT]
        self.verdicts = dict(zip(FILTER_VERDICTS, self._sums, strict=False))
        self.failures = dict(zip(FILTER_FAILURES, self._sums[_FAILURES_AT:], strict=False))
        self.buckets = self._sums[_BUCKETS_AT:_SUM_AT]
        self.seconds = self._sums[_SUM_AT] / 1e6

    def within(self, share: float) -> float | None:
        """How many seconds at most so many of its answers took (0.5: half of them), as far as buckets tell; None: it was never
        asked, or longer than the last bound tells."""
        wanted, asked = share * sum(self.buckets), 0
        for bound, count in zip([*FILTER_BOUNDS, None], self.buckets, strict=True):
            asked += count
            if count and asked >= wanted:
                return bound
        return None


def filter_families(totals: dict[str, FilterTotals]) -> list[object]:
    """Metrics of filters, by their names, as prometheus_client metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    seconds = HistogramMetricFamily(FILTER_METRICS["seconds"], "What filters took to answer or to fail", labels=["filter"])
    verdicts = CounterMetricFamily(FILTER_METRICS["verdicts"], "Verdicts of filters", labels=["filter", "verdict"])
    failures = CounterMetricFamily(FILTER_METRICS["failures"], "Messages without a verdict", labels=["filter", "reason"])
    up = GaugeMetricFamily(FILTER_METRICS["up"], "0 while a filter is down for a worker, and not asked", labels=["filter"])
    timeout = GaugeMetricFamily(FILTER_METRICS["timeout"], "How long a filter may take (timeout)", labels=["filter"])
    waiting = GaugeMetricFamily(FILTER_METRICS["waiting"], "Messages that wait for a place at a filter", labels=["filter"])
    for full, total in totals.items():
        name = shown(full)
        running, buckets = 0, []
        for bound, count in zip([*map(str, FILTER_BOUNDS), "+Inf"], total.buckets, strict=True):
            running += count
            buckets.append((bound, running))
        seconds.add_metric([name], buckets, sum_value=total.seconds)
        for family, counts in ((verdicts, total.verdicts), (failures, total.failures)):
            for word, count in counts.items():
                family.add_metric([name, word], count)
        up.add_metric([name], total.up)
        waiting.add_metric([name], total.waiting)
        timeout.add_metric([name], total.timeout)
    return [seconds, verdicts, failures, up, waiting, timeout]


def row_families(sites: list[dict[str, Any]], quotas: list[dict[str, Any]], attempts: dict[str, tuple[int, ...]]) -> list[object]:
    """Metrics of single sites and accounts as prometheus_client metric families, from rows of `site list --json` and of
    `app usage --json`, and the attempts at sites, by SITE_RESULTS."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    total = CounterMetricFamily(
        SITE_TOTAL, "Attempts to deliver by site and result, one for each recipient (other: all sites that are not shown)",
        labels=["site", "result"],
    )  # fmt: skip
    for site, counts in attempts.items():
        for result, count in zip(SITE_RESULTS, counts, strict=True):
            total.add_metric([shown(site), result], count)
    found: list[object] = [total]
    for name, (text, key) in SITE_GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["site"])
        for row in sites:
            gauge.add_metric([shown(row["pool"])], row[key])
        found.append(gauge)
    gauge = GaugeMetricFamily(
        QUOTA_GAUGE, "Used share of an account's quota (of the accounts that have used most)", labels=["account", "what"]
    )
    for row in sorted(quotas, key=lambda row: -row["share"])[:ACCOUNTS_SHOWN]:
        gauge.add_metric([shown(row["name"]), row["what"]], row["share"])
    found.append(gauge)
    return found


def down_families(count: int, rows: list[dict[str, Any]]) -> list[object]:
    """Metrics of the sites that are down: how many; and a row for each that is shown (`supervisor.outages`)."""
    from prometheus_client.core import GaugeMetricFamily

    gauge = GaugeMetricFamily(
        DOWN_GAUGE, "1 for a site that is down, with the cause of its last failure", labels=["site", "hosts", "cause"]
    )
    for row in rows:
        gauge.add_metric([shown(row["site"]), row["hosts"], shown(row["cause"])], 1)
    return [GaugeMetricFamily(DOWN_TOTAL, "Sites that are down", value=count), gauge]


def families(blocks: Iterable[Cells]) -> list[object]:
    """The metrics of all workers together as prometheus_client metric families. `blocks`: the cells of each, by its number."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    workers = list(blocks)

    def total(cell: int) -> int:
        return sum(worker.get(cell) for worker in workers)

    found: list[object] = []
    for name, (text, label, values) in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=label.split())
        for value in values:
            counter.add_metric(value.split(), total(_index[name, value]))
        found.append(counter)
    for old, name in RENAMED.items():
        found.append(CounterMetricFamily(old, f"Deprecated: {name}", value=total(_index[name, ""])))
    for name, kind in HISTOGRAMS.items():
        found.append(_histogram_family(name, kind, workers))
    for name, (text, how) in GAUGES.items():
        cell, scale = _gauge[name], 1_000_000 if name in RATIOS else 1
        readings = [worker.get(cell) / scale for worker in workers]
        gauge = GaugeMetricFamily(name, text, labels=[WORKER] if how == EACH else [])
        if how == EACH:
            for number, reading in enumerate(readings):
                gauge.add_metric([str(number)], reading)
        elif how == LEAST:
            some = [reading for reading in readings if reading > 0]
            if not some:
                continue
            gauge.add_metric([], min(some))
        else:
            gauge.add_metric([], max(readings, default=0) if how else sum(readings))
        found.append(gauge)
    return found


def _histogram_family(name: str, kind: Histogram, workers: list[Cells]) -> object:
    from prometheus_client.core import HistogramMetricFamily

    found = HistogramMetricFamily(name, kind.text, labels=[kind.label] if kind.label else [])
    rows: list[tuple[str, str, list[Cells]]] = [(value, value, workers) for value in kind.values]
    if kind.label == WORKER:
        rows = [(str(number), "", [worker]) for number, worker in enumerate(workers)]
    for shown, value, counted in rows:
        base, running, buckets = _histogram[name, value], 0, list[tuple[str, float]]()
        for position, bound in enumerate([*map(str, kind.bounds), "+Inf"]):
            running += sum(worker.get(base + position) for worker in counted)
            buckets.append((bound, running))
        total = sum(worker.get(base + len(kind.bounds) + 1) for worker in counted)
        found.add_metric([shown] if kind.label else [], buckets, sum_value=total / 1_000_000)
    return found
