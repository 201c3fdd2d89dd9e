"""Writes the Grafana dashboards: `python tools/dashboards.py [FOLDER]` (default: grafana/). A test holds the files with this.

A panel is a row of a table: title, unit, what to do about it, and its queries with their legends. `{}` behind a metric is not
needed: every metric gets the chosen instances.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

Panel = tuple[str, str, str, list[tuple[str, str]]]
METRIC = re.compile(r"\b(relaymta_[a-z0-9_]+)(\{)?")
RATE = "[$__rate_interval]"


def rate(name: str, by: str = "") -> str:
    """The sum of a counter's rates, by labels."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}{RATE}))"


def quantiles(name: str, by: str = "") -> list[tuple[str, str]]:
    """Half, and 99 of 100, of a histogram."""
    group = f"{by}, le" if by else "le"
    legend = "".join(f"{{{{{one}}}}} " for one in by.split(", ") if one)
    return [
        (f"histogram_quantile({share}, sum by ({group}) (rate({name}_bucket{RATE})))", f"{legend}{shown}")
        for share, shown in ((0.5, "half within"), (0.99, "99 of 100 within"))
    ]


# fmt: off
OVERVIEW: list[Panel] = [
    ("Messages accepted, recipients by result", "ops", "If deferred rises, look at delivery by site. If bounced rises, read the replies in the log's `bounced` events.",
     [(rate("relaymta_messages_received_total"), "received"), (rate("relaymta_recipients_received_total"), "recipients received"), (rate("relaymta_recipients_total", "result"), "{{result}}")]),
    ("Queue", "short", "If it grows, `relaymta queue summary` says which mail waits, and `relaymta message explain ID` why.",
     [("sum(relaymta_queue_messages)", "messages"), ("sum(relaymta_queue_deferred)", "deferred"), ("sum(relaymta_queue_held)", "held"), ("sum(relaymta_unseen)", "unseen")]),
    ("Oldest message, by state", "s", "Old mail: `relaymta queue list` shows it, oldest first. Past its deadline is a bug: report it. Held mail waits for you: `relaymta quarantine list`, `relaymta policy list`.",
     [("max(relaymta_oldest_message_seconds)", "not held"), ("max(relaymta_oldest_held_seconds)", "held"), ("max(relaymta_unseen_oldest_seconds)", "unseen"), ("max(relaymta_oldest_overdue_seconds)", "past its deadline")]),
    ("Time from acceptance to delivery", "s", "If it grows while the queue is short, look at the phases of attempts on the dashboard of delivery.",
     quantiles("relaymta_delivery_delay_seconds")),
    ("Time from the final dot to 250", "s", "If it grows, look at the duration of commits: a slow disk. If that is short, filters are slow.",
     quantiles("relaymta_accept_seconds")),
    ("Sites that are down, and the cause", "short", "`relaymta site show SITE` says why, and when it is tried again.",
     [("max(relaymta_sites_down)", "down"), ("sum by (site, cause) (relaymta_site_down) or vector(0)", "{{site}} {{cause}}")]),
    ("What is wrong now", "short", "Each line above 0 is trouble; the alert of its name says what to do. `relaymta status` and `relaymta doctor` say more.",
     [("max(relaymta_store_full)", "store full"), ("max(relaymta_store_stalled)", "store stalled"), ("max(relaymta_memory_pressure)", "memory"), ("max(relaymta_shedding)", "load shedding"),
      ("max(relaymta_listeners_paused)", "listeners paused"), ("max(relaymta_tls_certificate_errors)", "certificates"), ("max(relaymta_dkim_key_errors)", "DKIM keys"), ("max(relaymta_accounts_file_errors)", "accounts file"),
      ("max(relaymta_config_reload_refused)", "reload refused"), ("sum(relaymta_workers{state!=\"ready\"})", "workers not ready")]),
    ("Attempts in doubt", "ops", "The peer may have the message, and gets it again. If it is more than rare, look for a firewall or peer that cuts connections.",
     [(rate("relaymta_in_doubt_total"), "in doubt")]),
    ("DSNs, and failures without one", "ops", "Many DSNs: senders use bad addresses, or mail of ours is refused: read the log's `bounced` events.",
     [(rate("relaymta_dsns_total"), "queued"), (rate("relaymta_dsns_dropped_total"), "null sender: none")]),
    ("Connections", "short", "Near limits.connections clients have to wait; near delivery.connections mail does.",
     [("sum(relaymta_connections)", "incoming"), ("sum(relaymta_sessions)", "outgoing")]),
]
DELIVERY: list[Panel] = [
    ("Attempts by site", "ops", "The busiest sites; all others are `other`. `relaymta site show SITE` has the details of one.",
     [(rate("relaymta_site_attempts_total", "site"), "{{site}}")]),
    ("Attempts deferred or bounced, by site", "ops", "Read the replies: `relaymta logs tail --event deferred`. A limit of theirs: `relaymta shaping active`.",
     [('sum by (site, result) (rate(relaymta_site_attempts_total{result!="delivered"}[$__rate_interval]))', "{{site}} {{result}}")]),
    ("Messages in memory that wait for a site", "short", "What waits though the site is up waits for connections or a rate: `relaymta message explain ID`.",
     [("sum by (site) (relaymta_site_waiting)", "{{site}}")]),
    ("Connections to sites, and their window", "short", "If connections are at the window, the site accepts no more; `relaymta shaping why SITE` says what was learned.",
     [("sum by (site) (relaymta_site_connections)", "{{site}}"), ("sum by (site) (relaymta_site_window)", "{{site}} window")]),
    ("Messages a second, by site", "ops", "A site with a rate limit stays at it: `[[site]] rate` in the configuration, or what the site has shown.",
     [("sum by (site) (relaymta_site_rate)", "{{site}}")]),
    ("Time for a phase of an attempt, 99 of 100", "s", "dns: your name servers. connect: the network. dot: the peer is slow to take messages.",
     [quantiles("relaymta_attempt_phase_seconds", "phase")[1]]),
    ("Time from commit to the first attempt", "s", "If it grows, mail waits for its site, for connections, or for the workers.",
     quantiles("relaymta_first_attempt_seconds", "class")),
    ("Outgoing connections opened, and failed", "ops", "If many fail, look at the network, and at the sites that are down.",
     [(rate("relaymta_sessions_total", "result"), "{{result}}")]),
    ("Outgoing connections by TLS: what the route wants, and what has come of it", "ops", "failed: the log's `deferred` events say why; with `may` a connection in the clear follows. Much `may clear`: hosts that offer no TLS.",
     [(rate("relaymta_tls_sessions_total", "policy, result"), "{{policy}} {{result}}")]),
    ("Sites whose mail waits for a limit", "short", "Sites, once for each worker. rate, connection_rate, connections: the site's limits, `relaymta shaping why SITE`. machine: delivery.connections. learned: as much as the site has shown to take.",
     [(rate("relaymta_throttled_seconds_total", "constraint"), "{{constraint}}")]),
    ("Messages per outgoing connection", "short", "Near 1 with much mail: peers close after each message, or `messages_per_connection` is low.",
     [(f'{rate("relaymta_messages_per_session_sum")} / {rate("relaymta_messages_per_session_count")}', "messages")]),
    ("Transactions, and deliveries without progress", "ops", "Deliveries without progress were cancelled by the watchdog: report the stack that the log has.",
     [(rate("relaymta_transactions_total"), "transactions"), (rate("relaymta_watchdog_total"), "cancelled")]),
    ("Octets received and delivered", "Bps", "What the network and the disk have to carry.",
     [(rate("relaymta_received_octets_total"), "received"), (rate("relaymta_delivered_octets_total"), "delivered")]),
    ("DNS queries, and answers from the cache", "ops", "Many queries beside few answers from the cache: mail goes to many domains. A caching resolver on this machine helps.",
     [(rate("relaymta_dns_lookups_total", "result"), "{{result}}")]),
    ("Time for a DNS query", "s", "If it is above 0.1 s, or `failed` is there, use a resolver that is nearer: delivery.nameservers.",
     quantiles("relaymta_dns_seconds", "result")),
    ("Mailboxes: messages filed, refused since full, failed", "ops", "failed: look at the disk and `relaymta mailbox verify`. full: quotas.",
     [(rate("relaymta_mailbox_deliveries_total", "result"), "{{result}}")]),
    ("Webhooks: events delivered, and dropped", "ops", "dropped: a webhook was down for longer than `retry`, or [webhooks] keep or store ended: `relaymta webhook list`.",
     [(rate("relaymta_webhook_events_total", "webhook, result"), "{{webhook}} {{result}}"), (rate("relaymta_journal_dropped_total"), "not written")]),
    ("Webhooks: events behind, and the age of the oldest", "short", "If it grows, the webhook does not answer, or is slow: `relaymta webhook show NAME`.",
     [("sum by (webhook) (relaymta_webhook_lag_events)", "{{webhook}} events"), ("max by (webhook) (relaymta_webhook_lag_seconds)", "{{webhook}} seconds")]),
    ("Sieve: what users' scripts have done", "ops", "failed: the message was kept; the log says which script.",
     [(rate("relaymta_sieve_scripts_total", "result"), "{{result}}")]),
]
INTAKE: list[Panel] = [
    ("Connections of clients", "ops", "refused: a limit, or load shedding; the log's warnings say which.",
     [(rate("relaymta_connections_total", "result"), "{{result}}")]),
    ("Rejected: messages, recipients, quotas", "ops", "content: malformed, or judged by a rule or filter. store, full: the disk. filter: a filter, signing or verification fails.",
     [(rate("relaymta_messages_refused_total", "reason"), "message {{reason}}"), (rate("relaymta_recipients_refused_total"), "recipients"), (rate("relaymta_quota_exceeded_total", "result"), "quota {{result}}")]),
    ("Rejections by phase, and class of the reply", "ops", "The log's events `rejected` say whom, and why. 4xx: the client comes again. rcpt 5xx: addresses that do not exist, or nobody may relay to.",
     [(rate("relaymta_rejections_total", "phase, reply"), "{{phase}} {{reply}}")]),
    ("Requests by HTTP", "reqps",
     "4xx: applications ask for what is not possible, or have used up a quota; the log says what (rejected). 5xx: it could not be "
     "done; the log has a warning.",
     [(rate("relaymta_http_requests_total", "operation, answer"), "{{operation}} {{answer}}")]),
    ("Logins", "ops", "wrong, limited: somebody guesses passwords; the log's `login` events name the clients. unavailable: the back end does not answer.",
     [(rate("relaymta_logins_total", "result"), "{{result}}")]),
    ("TLS handshakes with clients", "ops", "failed: old clients, or a certificate that they do not trust; `relaymta doctor` looks at certificates.",
     [(rate("relaymta_tls_handshakes_total", "result"), "{{result}}")]),
    ("Certificates: time until they end", "s", "Renew what ends in less than two weeks: docs/operations.md. A new file is used by itself.",
     [("min by (name) (relaymta_cert_expiry_seconds)", "{{name}}")]),
    ("DKIM signatures made, DMARC results", "ops", "Many fail from a partner: their DNS, or mail that was changed on its way. Ours: `relaymta doctor domain DOMAIN`.",
     [(rate("relaymta_dkim_signatures_total"), "signed"), (rate("relaymta_dmarc_total", "result"), "DMARC {{result}}")]),
    ("DKIM: time to sign, and to verify, a message", "s", "If it grows: a busy CPU, or RSA keys of more than 2048 bits. Seconds: the signing process hangs; the log says when it has ended.",
     quantiles("relaymta_dkim_seconds", "op")),
    ("Quotas: share used", "percentunit", "At 1 mail of the account is rejected or held: `relaymta app usage`.",
     [("max by (account, what) (relaymta_quota_used_ratio)", "{{account}} {{what}}")]),
    ("Abuse: accounts that are not as usual, by check", "short", "`relaymta abuse list`, then `relaymta abuse why NAME`.",
     [("sum by (check) (relaymta_abuse_accounts)", "{{check}}")]),
    ("Abuse: findings in an hour, enforced or tried", "short", "Findings that are tried show what `enforce` would do.",
     [("sum by (check, enforced) (increase(relaymta_abuse_total[1h]))", "{{check}} enforced: {{enforced}}")]),
    ("Suppression list: recipients refused, by reason", "ops", "Applications go on to write to them: the log's events `rejected` say which.",
     [(rate("relaymta_suppressed_total", "reason"), "{{reason}}")]),
    ("Suppression list: entries, how many there may be, and were left out", "short", "left out: raise suppression.entries, or remove some. `relaymta suppression stats`.",
     [("sum by (reason) (relaymta_suppression_entries)", "{{reason}}"), ("max(relaymta_suppression_entries_most)", "most"),
      ("sum(increase(relaymta_suppression_left_out_total[1h]))", "left out in an hour")]),
    ("Filters: verdicts", "ops", "What filters say; a sudden change is one of theirs, or a wave of spam.",
     [(rate("relaymta_filter_verdicts_total", "filter, verdict"), "{{filter}} {{verdict}}")]),
    ("Filters: messages without a verdict, by reason", "ops", "`relaymta filter list` says what is wrong; the filter's own log says more.",
     [(rate("relaymta_filter_failures_total", "filter, reason"), "{{filter}} {{reason}}")]),
    ("Filters: time for an answer", "s", "Near the filter's `timeout`: give it more places (`concurrency`), or a faster machine.",
     quantiles("relaymta_filter_seconds", "filter")),
    ("Filters: up (1) or down (0), messages that wait for a place", "none", "Down: start it. Waiting: raise `concurrency`, as far as the filter can take it.",
     [("min by (filter) (relaymta_filter_up)", "{{filter}} up"), ("sum by (filter) (relaymta_filter_waiting)", "{{filter}} waiting")]),
    ("Rules about mail: messages that match", "ops", "A rule that is tried (enforced: false) does nothing yet: see whom it would hit before you enforce it.",
     [(rate("relaymta_rule_matches_total", "rule, enforced"), "{{rule}} enforced: {{enforced}}")]),
    ("Hooks in Python: time for an answer", "s", "Near the filter's `timeout`: the hook waits for something, or blocks: the log's warnings name the line.",
     quantiles("relaymta_hook_seconds", "hook")),
    ("Hooks in Python: no answer, exceptions by place, events not told", "ops", "The log's warnings have the traceback, and how the process has ended.",
     [(rate("relaymta_hook_failures_total", "hook, reason"), "{{hook}} {{reason}}"), (rate("relaymta_hook_exceptions_total", "place"), "{{place}}"), (rate("relaymta_hook_dropped_total", "hook"), "{{hook}} not told")]),
    ("Mail that filters have not looked at: messages", "short", "If it grows, a filter is down or slow.",
     [("sum(relaymta_unseen)", "messages")]),
    ("Drop and pickup folder: messages", "short", "Waiting: the relay cannot take them now; the log says why. Put aside: each has a file beside it that says why.",
     [("sum(relaymta_drop_files)", "drop"), ("sum(relaymta_drop_bad_files)", "drop, put aside"), ("sum(relaymta_pickup_files)", "pickup"), ("sum(relaymta_pickup_bad_files)", "pickup, put aside")]),
    ("Drop and pickup folder: for how long a message waits", "s", "More than some minutes: the log's warnings name the folder, or why mail is refused for now.",
     [("max(relaymta_drop_oldest_seconds)", "drop"), ("max(relaymta_pickup_oldest_seconds)", "pickup")]),
    ("Quarantine: messages, and what has left it in an hour", "short", "`relaymta quarantine list`. displaced: there was no room; raise quarantine.octets.",
     [("sum(relaymta_quarantine_messages)", "messages"), ("sum by (result) (increase(relaymta_quarantine_total[1h]))", "{{result}}")]),
    ("Quarantine: octets, and what there is room for", "bytes", "At the limit the oldest mail in it is deleted.",
     [("sum(relaymta_quarantine_octets)", "used"), ("max(relaymta_quarantine_limit_octets)", "room")]),
    ("Lists in the DNS: answers", "ops", "refused: the list does not answer your resolver; ask it by one of your own.",
     [(rate("relaymta_dnsbl_total", "zone, result"), "{{zone}} {{result}}")]),
    ("Greylisting: messages", "ops", "Many `early`: clients that do not wait, mostly spam. Many `new` for long: hosts with many addresses.",
     [(rate("relaymta_greylist_total", "result"), "{{result}}")]),
]
WORKERS: list[Panel] = [
    ("Workers by state", "short", "Each should be ready. late: it does not answer; dead: it is started again. The log's warnings say why.",
     [("sum by (state) (relaymta_workers)", "{{state}}")]),
    ("Restarts of workers, in an hour", "short", "None is usual. Report what the log says of it; with `silent`, the kernel's log, too.",
     [("sum by (reason) (increase(relaymta_worker_restarts_total[1h]))", "{{reason}}")]),
    ("Lag of the event loops, 99 of 100", "s", "Above 0.2 s the worker has too much to do: more workers, more CPU, or fewer clients at once.",
     [quantiles("relaymta_loop_lag_seconds", "worker")[1]]),
    ("Garbage collections: share of the time", "percentunit", "Above 0.05: report it.",
     [(rate("relaymta_gc_pause_seconds_sum"), "share")]),
    ("Memory of workers", "bytes", "If it grows for days: report it. The limit is limits.memory.",
     [("sum by (worker) (relaymta_rss_octets)", "{{worker}}")]),
    ("Messages in memory for delivery", "short", "At queue.window further mail stays on disk, which is no trouble by itself.",
     [("sum(relaymta_window)", "window")]),
    ("Time for a group commit", "s", "Above 0.05 s the disk is slow: look at what else uses it.",
     quantiles("relaymta_commit_seconds")),
    ("Messages and operations per commit, syncs per commit", "short", "The more mail comes at once, the more are in a commit. Near 1 under load: clients send one after the other.",
     [(f'{rate("relaymta_messages_per_commit_sum")} / {rate("relaymta_messages_per_commit_count")}', "messages"), (f'{rate("relaymta_commit_operations_total")} / {rate("relaymta_commits_total")}', "operations"),
      (f'{rate("relaymta_syncs_total")} / {rate("relaymta_commits_total")}', "syncs")]),
    ("Operations that could not be committed, damaged bodies, log records lost", "ops", "Any is trouble with a disk: the kernel's log, `relaymta status`.",
     [(rate("relaymta_commit_errors_total"), "commits"), (rate("relaymta_corrupt_bodies_total"), "bodies"), (rate("relaymta_log_dropped_total"), "log")]),
    ("Spans for the collector, by result", "ops", "`dropped`: it takes too few, or none; `refused`: it says that it does not want them. The log says why.",
     [(rate("relaymta_trace_spans_total", "result"), "{{result}}")]),
    ("Disk: free, and the floor below which no mail is taken", "bytes", "Free space before it comes to the floor.",
     [("min(relaymta_disk_free_octets)", "free"), ("max(relaymta_disk_floor_octets)", "floor")]),
    ("Disk: segments, live bodies, octets of messages", "bytes", "Segments shrink some time after messages have left.",
     [("sum(relaymta_segment_octets)", "segments"), ("sum(relaymta_segment_live_octets)", "live"), ("sum(relaymta_queue_octets)", "messages")]),
    ("LMDB: used share of the map", "percentunit", "Above 0.9 no mail is taken: deliver, bounce or move mail.",
     [("max(relaymta_lmdb_map_used_ratio)", "queue"), ("max(relaymta_mailbox_lmdb_map_used_ratio)", "mailboxes")]),
    ("Configuration in use, reloads refused in an hour", "short", "`relaymta config check` says what is wrong with the file.",
     [("max(relaymta_config_generation)", "number"), ("sum(increase(relaymta_config_reload_errors_total[1h]))", "refused")]),
    ("Pressure: stressed, slow store, limits without a row", "short", "stressed: raise limits.connections. slow: the disk is nearly full. Limits without a row: report it.",
     [("max(relaymta_stressed)", "stressed"), ("max(relaymta_store_slow)", "slow store"), ("sum(relaymta_limit_overflows)", "limits")]),
    ("Mailboxes: sessions begun, messages read and removed", "ops", "What users do.",
     [(rate("relaymta_mailbox_sessions_total", "protocol"), "{{protocol}}"), (rate("relaymta_mailbox_messages_read_total"), "read"), (rate("relaymta_mailbox_expunged_total"), "removed"), (rate("relaymta_mailbox_read_octets_total"), "octets read")]),
    ("Mailboxes: open sessions", "short", "`relaymta mailbox sessions` lists them.",
     [("sum(relaymta_imap_sessions)", "IMAP"), ("sum(relaymta_pop3_sessions)", "POP3"), ("sum(relaymta_managesieve_sessions)", "ManageSieve")]),
    ("Mailboxes: disk, memory of views", "bytes", "Segments shrink some time after messages were removed.",
     [("sum(relaymta_mailbox_segment_octets)", "segments"), ("sum(relaymta_mailbox_segment_live_octets)", "live"), ("sum(relaymta_mailbox_view_octets)", "views")]),
    ("Mailboxes: messages stored", "short", "One that is in several mailboxes counts once.", [("sum(relaymta_mailbox_bodies)", "messages")]),
    ("Mailboxes: full or stalled", "short", "full: free disk space. stalled: `relaymta status`, and the kernel's log.",
     [("max(relaymta_mailbox_store_full)", "full"), ("max(relaymta_mailbox_store_stalled)", "stalled")]),
    ("Mailboxes: for how long an old state is read", "s", "Minutes: a backup or `relaymta mailbox verify` hangs, and LMDB's file grows.",
     [("max(relaymta_mailbox_oldest_reader_seconds)", "oldest reader")]),
    ("IMAP: commands", "ops", "What mail programs do; one that asks all the time is in the log.",
     [(rate("relaymta_imap_commands_total", "verb"), "{{verb}}")]),
    ("IMAP: how commands ended", "ops", "failed: report it. bad: a mail program that speaks wrongly.",
     [(rate("relaymta_imap_results_total", "result"), "{{result}}")]),
    ("IMAP: commands that take more than half a second", "ops", "Long searches are usual; if most are slow, look at the lag of the event loops.",
     [(f'{rate("relaymta_imap_command_seconds_count")} - sum(rate(relaymta_imap_command_seconds_bucket{{le="0.5"}}[$__rate_interval]))', "slow")]),
]
# fmt: on
BOARDS: dict[str, tuple[str, str, list[Panel]]] = {
    "relaymta.json": ("relaymta-overview", "relaymta: overview", OVERVIEW),
    "relaymta-delivery.json": ("relaymta-delivery", "relaymta: delivery by site", DELIVERY),
    "relaymta-intake.json": ("relaymta-intake", "relaymta: intake and security", INTAKE),
    "relaymta-workers.json": ("relaymta-workers", "relaymta: workers and queue", WORKERS),
}


def chosen(expression: str) -> str:
    """The expression for the instances that are chosen in the dashboard."""
    pick = 'instance=~"$instance"'
    return METRIC.sub(lambda found: f"{found[1]}{{{pick}{', ' if found[2] else '}'}", expression)


def panel(number: int, row: Panel) -> dict[str, Any]:
    """A panel; two are side by side."""
    title, unit, text, queries = row
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(65 + n), "datasource": source, "expr": chosen(expression), "legendFormat": legend}
        for n, (expression, legend) in enumerate(queries)
    ]
    return {
        "id": number + 1, "title": title, "description": text, "type": "timeseries", "datasource": source,
        "gridPos": {"h": 8, "w": 12, "x": number % 2 * 12, "y": number // 2 * 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": None if unit == "s" and "end" in title else 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}}, "targets": targets,
    }  # fmt: skip


def board(uid: str, title: str, rows: list[Panel]) -> dict[str, Any]:
    """A dashboard, with links to the others."""
    variable = {
        "name": "instance", "label": "Instance", "type": "query", "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(relaymta_build_info, instance)", "refId": "instance"}, "refresh": 2, "sort": 1,
        "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    links = {
        "type": "dashboards", "tags": ["relaymta"], "title": "relaymta", "asDropdown": False, "includeVars": True, "keepTime": True,
    }  # fmt: skip
    return {
        "uid": uid, "title": title, "tags": ["mail", "relaymta"], "schemaVersion": 39, "version": 1, "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"}, "timezone": "", "editable": True, "links": [links],
        "templating": {"list": [source, variable]}, "panels": [panel(number, row) for number, row in enumerate(rows)],
    }  # fmt: skip


def files() -> dict[str, str]:
    """The dashboards by the names of their files."""
    return {name: json.dumps(board(*rows), indent=1) + "\n" for name, rows in BOARDS.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (Path(sys.argv[1] if len(sys.argv) > 1 else "grafana") / name).write_text(text)
