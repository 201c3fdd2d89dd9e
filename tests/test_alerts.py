"""Each alert rule, by `promtool test rules`: it fires on what a relay exposes in trouble, and falls silent afterwards."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from relaymta import metrics
from tests.support.programs import need

RULES = Path(__file__).resolve().parent.parent / "grafana" / "alerts.yml"
ALL = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
STEP = 15  # seconds between two samples
REPORTED = re.compile(r"alertname: *\w+, time: *(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?,")

# Of two relays: the series (labels beside those of the scrape) of one in trouble, as values for a phase of trouble and one of
# rest; the other relay always rests. A tuple: a counter's rates a second in the phases.
LONG, SHORT = 5 * 3600, 3 * 3600  # seconds of each phase
TROUBLE: dict[str, list[tuple[str, dict[str, str], object, object]]] = {
    "RelaymtaStoreFull": [("relaymta_store_full", {}, 1, 0)],
    "RelaymtaStoreStalled": [("relaymta_store_stalled", {}, 1, 0)],
    "RelaymtaListenersPaused": [("relaymta_listeners_paused", {}, 1, 0)],
    "RelaymtaSiteDown": [("relaymta_site_down", {"site": "out", "hosts": "smart", "cause": "refused"}, 1, None)],
    "RelaymtaManySitesDown": [("relaymta_sites_down", {}, 21, 3)],
    "RelaymtaOldMessage": [("relaymta_oldest_message_seconds", {}, 5 * 3600, 60)],
    "RelaymtaOverdue": [("relaymta_oldest_overdue_seconds", {}, 3601, 0)],
    "RelaymtaQueueGrows": [("relaymta_queue_messages", {}, (2.0,), (-2.0,))],
    "RelaymtaNothingDelivered": [
        ("relaymta_queue_messages", {}, 5, 5),
        ("relaymta_queue_held", {}, 1, 1),
        ("relaymta_recipients_total", {"result": "delivered"}, (0.0,), (1.0,)),
    ],
    "RelaymtaBounces": [
        ("relaymta_recipients_total", {"result": "delivered"}, (1.0,), (1.0,)),
        ("relaymta_recipients_total", {"result": "bounced"}, (1.0,), (0.0,)),
        ("relaymta_recipients_total", {"result": "deferred"}, (0.5,), (0.5,)),
        ("relaymta_recipients_total", {"result": "expired"}, (0.0,), (0.0,)),
    ],
    "RelaymtaFilterDown": [("relaymta_filter_up", {"filter": "virus"}, 0, 1)],
    "RelaymtaFilterFails": [
        ("relaymta_filter_failures_total", {"filter": "virus", "reason": "timeout"}, (0.02,), (0.0,)),
        ("relaymta_filter_failures_total", {"filter": "virus", "reason": "oversize"}, (0.0,), (1.0,)),
        ("relaymta_filter_seconds_count", {"filter": "virus"}, (1.0,), (1.0,)),
    ],
    "RelaymtaFilterSlow": [
        ("relaymta_filter_seconds_bucket", {"filter": "virus", "le": "2"}, (0.9,), (1.0,)),
        ("relaymta_filter_seconds_bucket", {"filter": "virus", "le": "10"}, (1.0,), (1.0,)),
        ("relaymta_filter_seconds_bucket", {"filter": "virus", "le": "+Inf"}, (1.0,), (1.0,)),
        ("relaymta_filter_timeout_seconds", {"filter": "virus"}, 10, 10),
    ],
    "RelaymtaHookRaises": [("relaymta_hook_exceptions_total", {"place": "policy.py:2"}, (0.01,), (0.0,))],
    "RelaymtaUnseen": [("relaymta_unseen_oldest_seconds", {}, 601, 0)],
    "RelaymtaDropWaits": [("relaymta_drop_oldest_seconds", {}, 901, 0)],
    "RelaymtaQuarantineFull": [
        ("relaymta_quarantine_octets", {}, 81_000_000, 70_000_000),
        ("relaymta_quarantine_limit_octets", {}, 100_000_000, 100_000_000),
    ],
    "RelaymtaListRefuses": [("relaymta_dnsbl_total", {"zone": "bl.example", "result": "refused"}, (0.01,), (0.0,))],
    "RelaymtaAbuse": [("relaymta_abuse_total", {"check": "volume", "enforced": "true"}, (0.01,), (0.0,))],
    "RelaymtaWebhookFails": [("relaymta_webhook_failing", {"webhook": "shop"}, 1, 0)],
    "RelaymtaWebhookDropped": [
        ("relaymta_webhook_events_total", {"webhook": "shop", "result": "dropped"}, (0.01,), (0.0,)),
        ("relaymta_webhook_events_total", {"webhook": "shop", "result": "delivered"}, (1.0,), (1.0,)),
    ],
    "RelaymtaMailboxesFail": [("relaymta_mailbox_deliveries_total", {"result": "failed"}, (0.1,), (0.0,))],
    "RelaymtaMailboxesFull": [("relaymta_mailbox_store_full", {}, 1, 0)],
    "RelaymtaMailboxesStalled": [("relaymta_mailbox_store_stalled", {}, 1, 0)],
    "RelaymtaMailboxReader": [("relaymta_mailbox_oldest_reader_seconds", {}, 601, 0)],
    "RelaymtaCorruptBody": [("relaymta_corrupt_bodies_total", {}, (0.01,), (0.0,))],
    "RelaymtaLogDropped": [("relaymta_log_dropped_total", {}, (1.0,), (0.0,))],
    "RelaymtaCertificate": [("relaymta_tls_certificate_errors", {}, 1, 0)],
    "RelaymtaKeysOrAccounts": [("relaymta_dkim_key_errors", {}, 0, 0), ("relaymta_accounts_file_errors", {}, 1, 0)],
    "RelaymtaLoginsUnavailable": [("relaymta_logins_total", {"result": "unavailable"}, (0.1,), (0.0,))],
    "RelaymtaBruteForce": [
        ("relaymta_logins_total", {"result": "wrong"}, (0.7,), (0.0,)),
        ("relaymta_logins_total", {"result": "limited"}, (0.7,), (0.0,)),
    ],
    "RelaymtaCertificateEnds": [("relaymta_cert_expiry_seconds", {"name": "/a.pem"}, 13 * 86400, 60 * 86400)],
    "RelaymtaLoopLag": [
        ("relaymta_loop_lag_seconds_bucket", {"worker": "1", "le": "0.5"}, (19.0,), (20.0,)),
        ("relaymta_loop_lag_seconds_bucket", {"worker": "1", "le": "1"}, (20.0,), (20.0,)),
        ("relaymta_loop_lag_seconds_bucket", {"worker": "1", "le": "+Inf"}, (20.0,), (20.0,)),
    ],
    "RelaymtaReloadRefused": [("relaymta_config_reload_refused", {}, 1, 0)],
    "RelaymtaWorkersRestart": [("relaymta_worker_restarts_total", {"reason": "signal"}, (0.01,), (0.0,))],
    "RelaymtaWorkersMissing": [("relaymta_workers", {"state": "late"}, 1, 0), ("relaymta_workers", {"state": "ready"}, 1, 2)],
    "RelaymtaMapFull": [("relaymta_lmdb_map_used_ratio", {}, 0.85, 0.5)],
    "RelaymtaCommitsSlow": [
        ("relaymta_commit_seconds_bucket", {"le": "1"}, (0.9,), (1.0,)),
        ("relaymta_commit_seconds_bucket", {"le": "2"}, (1.0,), (1.0,)),
        ("relaymta_commit_seconds_bucket", {"le": "+Inf"}, (1.0,), (1.0,)),
    ],
}
# Where an alert is about either of two things: the other one.
OTHERWISE: dict[str, list[tuple[str, dict[str, str], object, object]]] = {
    "RelaymtaKeysOrAccounts": [("relaymta_dkim_key_errors", {}, 1, 0), ("relaymta_accounts_file_errors", {}, 0, 0)],
    "RelaymtaMapFull": [("relaymta_lmdb_map_used_ratio", {}, 0.5, 0.5), ("relaymta_mailbox_lmdb_map_used_ratio", {}, 0.85, 0.5)],
}
# What looks similar and is no trouble.
HARMLESS: dict[str, list[tuple[str, dict[str, str], object, object]]] = {
    "RelaymtaSiteDown": [("relaymta_site_down", {"site": "mx/old.example", "hosts": "mx", "cause": "timeout"}, 1, 1)],
    "RelaymtaManySitesDown": [("relaymta_sites_down", {}, 20, 20)],
    "RelaymtaOldMessage": [("relaymta_oldest_message_seconds", {}, 4 * 3600, 4 * 3600)],
    "RelaymtaMailboxReader": [("relaymta_mailbox_oldest_reader_seconds", {}, 600, 600)],
    "RelaymtaFilterFails": [
        ("relaymta_filter_failures_total", {"filter": "virus", "reason": "timeout"}, (0.005,), (0.005,)),
        ("relaymta_filter_failures_total", {"filter": "virus", "reason": "oversize"}, (0.5,), (0.5,)),
        ("relaymta_filter_seconds_count", {"filter": "virus"}, (1.0,), (1.0,)),
    ],
    "RelaymtaFilterSlow": [
        ("relaymta_filter_seconds_bucket", {"filter": "virus", "le": "2"}, (0.9,), (0.9,)),
        ("relaymta_filter_seconds_bucket", {"filter": "virus", "le": "10"}, (1.0,), (1.0,)),
        ("relaymta_filter_seconds_bucket", {"filter": "virus", "le": "+Inf"}, (1.0,), (1.0,)),
        ("relaymta_filter_timeout_seconds", {"filter": "virus"}, 30, 30),
    ],
    "RelaymtaUnseen": [("relaymta_unseen_oldest_seconds", {}, 599, 599)],
    "RelaymtaDropWaits": [("relaymta_drop_oldest_seconds", {}, 899, 899)],
    "RelaymtaQuarantineFull": [
        ("relaymta_quarantine_octets", {}, 79_000_000, 79_000_000),
        ("relaymta_quarantine_limit_octets", {}, 100_000_000, 100_000_000),
    ],
    "RelaymtaListRefuses": [("relaymta_dnsbl_total", {"zone": "bl.example", "result": "failed"}, (1.0,), (1.0,))],
    "RelaymtaAbuse": [("relaymta_abuse_total", {"check": "volume", "enforced": "false"}, (1.0,), (1.0,))],
    "RelaymtaQueueGrows": [("relaymta_queue_messages", {}, 20_000, 20_000)],
    "RelaymtaNothingDelivered": [
        ("relaymta_queue_messages", {}, 5, 5),
        ("relaymta_queue_held", {}, 5, 5),
        ("relaymta_recipients_total", {"result": "delivered"}, (0.0,), (0.0,)),
    ],
    "RelaymtaBounces": [
        ("relaymta_recipients_total", {"result": "delivered"}, (1.0,), (1.0,)),
        ("relaymta_recipients_total", {"result": "bounced"}, (0.2,), (0.2,)),
    ],
    "RelaymtaBruteForce": [("relaymta_logins_total", {"result": "wrong"}, (0.5,), (0.5,))],
    "RelaymtaCertificateEnds": [("relaymta_cert_expiry_seconds", {"name": "/a.pem"}, 15 * 86400, 15 * 86400)],
    "RelaymtaWorkersRestart": [("relaymta_worker_restarts_total", {"reason": "signal"}, (0.0005,), (0.0005,))],
    "RelaymtaWorkersMissing": [("relaymta_workers", {"state": "ready"}, 2, 2), ("relaymta_workers", {"state": "late"}, 0, 0)],
}


def _values(trouble: object, rest: object) -> str:
    """A series of both phases in promtool's notation."""
    counts = LONG // STEP, SHORT // STEP
    if isinstance(trouble, tuple) and isinstance(rest, tuple):
        first, second = trouble[0] * STEP, rest[0] * STEP
        start = 0.0
        return f"{start}{first:+}x{counts[0]} {start + first * counts[0]}{second:+}x{counts[1]}"
    if rest is None:  # the series ends
        return f"{trouble}x{counts[0]} _x{counts[1]}"
    return f"{trouble}x{counts[0]} {rest}x{counts[1]}"


def _series(rows: list[tuple[str, dict[str, str], object, object]], instance: str) -> list[dict[str, str]]:
    found = []
    for name, labels, trouble, rest in rows:
        given = ",".join(f'{key}="{value}"' for key, value in ({"instance": instance, "job": "relaymta"} | labels).items())
        found.append({"series": f"{name}{{{given}}}", "values": _values(trouble, rest)})
    return found


def _quiet(trouble: object, rest: object) -> object:
    """What a relay without trouble has: 0, where less is not worse."""
    if isinstance(trouble, tuple):
        return (0.0,)
    worse_if_less = isinstance(trouble, int) and isinstance(rest, int) and trouble <= rest
    return rest if worse_if_less or not trouble else 0


def _resting(rows: list[tuple[str, dict[str, str], object, object]]) -> list[tuple[str, dict[str, str], object, object]]:
    """The series of a relay without trouble."""
    still = [(name, labels, _quiet(trouble, rest), rest) for name, labels, trouble, rest in rows]
    return [(name, labels, trouble, trouble) for name, labels, trouble, rest in still if rest is not None]


def firing(tmp_path: Path, alert: str, rows: list[tuple[str, dict[str, str], object, object]]) -> list[bool]:
    """Whether an alert fires at the end of the phase of trouble, and at that of rest."""
    series = [*_series(rows, "a:9125"), *_series(_resting(rows), "b:9125")]
    moments = [LONG - STEP, LONG + SHORT - STEP]
    expected = [{"eval_time": f"{moment}s", "alertname": alert, "exp_alerts": []} for moment in moments]
    # Only this rule: each would be evaluated for all the time. The whole file is checked in test_architecture.py.
    rules = {"groups": [{"name": "relaymta", "rules": [rule for rule in ALL if rule["alert"] == alert]}]}
    (tmp_path / "rules.json").write_text(json.dumps(rules))  # JSON is YAML
    case = {"rule_files": ["rules.json"], "evaluation_interval": "1m"}
    case["tests"] = [{"interval": f"{STEP}s", "input_series": series, "alert_rule_test": expected}]  # type: ignore[assignment]
    file = tmp_path / "case.json"
    file.write_text(json.dumps(case))
    done = subprocess.run([need("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    # It reports each moment at which an alert fires that is not expected, which none is.
    reported = [int(h or 0) * 3600 + int(m or 0) * 60 + int(s or 0) for h, m, s in REPORTED.findall(said)]
    assert done.returncode == 0 if not reported else set(reported) <= set(moments), said
    return [moment in reported for moment in moments]


def test_every_alert_is_tested():
    assert {rule["alert"] for rule in ALL} == TROUBLE.keys()
    assert {rule["alert"] for rule in ALL if " or " in rule["expr"]} == OTHERWISE.keys()
    named = {name for rows in [*TROUBLE.values(), *OTHERWISE.values(), *HARMLESS.values()] for name, *_ in rows}
    named -= {f"{name}_{part}" for name in metrics.HISTOGRAM_NAMES for part in ("bucket", "count", "sum")}
    assert named <= metrics.NAMES


@pytest.mark.parametrize("alert", TROUBLE)
def test_an_alert_fires_and_falls_silent(tmp_path, alert):
    assert firing(tmp_path, alert, TROUBLE[alert]) == [True, False]


@pytest.mark.parametrize("alert", OTHERWISE)
def test_an_alert_about_two_things_fires_for_the_other_one_too(tmp_path, alert):
    assert firing(tmp_path, alert, OTHERWISE[alert]) == [True, False]


@pytest.mark.parametrize("alert", HARMLESS)
def test_an_alert_is_silent_without_trouble(tmp_path, alert):
    assert firing(tmp_path, alert, HARMLESS[alert]) == [False, False]
