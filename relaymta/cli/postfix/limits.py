"""Single parameters that have a key here: limits, lifetimes, names."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.networks import Networks
from relaymta.cli.postfix.toml_text import Row, Section, Value

__all__ = ["CARRIED", "single_keys"]


class Single(NamedTuple):
    """A parameter and its key. `value`: of a number or the seconds of a time; None: it has no such value here. `always`: it is
    written where it is Postfix's default, too, since ours is another one."""

    table: str
    key: str
    value: Callable[[int], Value | None] = lambda number: number
    always: bool = False


def _rate(number: int) -> Value | None:
    return f"{number}/m" if number else ""


# (restrictions of ours: intake.recipients is 100 at least)
SINGLES: dict[str, Single] = {
    "message_size_limit": Single("[limits]", "message_size", lambda number: number or None, always=True),
    "smtpd_client_connection_count_limit": Single("[limits]", "connections_per_client", lambda number: number or None),
    "smtpd_client_connection_rate_limit": Single("[limits]", "connection_rate", _rate),
    "smtpd_client_message_rate_limit": Single("[limits]", "message_rate", _rate),
    "smtpd_client_recipient_rate_limit": Single("[limits]", "recipient_rate", _rate),
    "hopcount_limit": Single("[intake]", "hops", lambda number: number or None),
    "smtpd_hard_error_limit": Single("[intake]", "errors", lambda number: number or None),
    "smtpd_recipient_limit": Single("[intake]", "recipients", lambda number: number if 100 <= number <= 65535 else None),
    "smtpd_timeout": Single("[intake]", "command_timeout", lambda number: number or None),
    "smtpd_error_sleep_time": Single("[intake]", "tarpit"),
    "maximal_queue_lifetime": Single("[queue]", "max_age", lambda number: number or None),
    "smtp_connect_timeout": Single("[delivery]", "connect_timeout", lambda number: number or None),
}
CARRIED = {*SINGLES, "smtpd_client_event_limit_exceptions", "smtpd_client_connection_limit_exceptions", "anvil_rate_time_unit"}
_RATES = ("connection_rate", "message_rate", "recipient_rate")


def single_keys(scope: Scope, files: Files, findings: Findings) -> Iterator[Section]:
    """The tables [intake], [queue], [delivery] and [limits], and the [[network]] of clients without limits."""
    tables: dict[str, list[Row]] = {"[intake]": [Row("complete_domain", scope.text("myorigin"), scope.origin("myorigin"))]}
    rates = []
    for name, single in SINGLES.items():
        if scope.is_default(name) and not single.always:
            continue
        number = scope.seconds(name) if scope.number(name) is None else scope.number(name)
        if name == "maximal_queue_lifetime":
            number = scope.seconds(name)
        value = None if number is None else single.value(number)
        if value is None:
            findings.gap(
                scope.place(name), f"{name} = {scope.text(name)}", f"{single.table[1:-1]}.{single.key} has no such value"
            )
            continue
        tables.setdefault(single.table, []).append(Row(single.key, value, scope.origin(name)))
        rates += [single.key] if single.key in _RATES and value else []
    if rates:
        yield from _without_rates(scope, files, findings, rates)
    yield from (Section(head, rows) for head, rows in tables.items())


def _without_rates(scope: Scope, files: Files, findings: Findings, rates: list[str]) -> Iterator[Section]:
    """Clients that no rate holds for."""
    name = "smtpd_client_event_limit_exceptions"
    if scope.is_default("anvil_rate_time_unit") is False:
        instead = "rates are for a minute here: adapt limits.connection_rate, message_rate and recipient_rate"
        findings.gap(scope.place("anvil_rate_time_unit"), f"anvil_rate_time_unit = {scope.text('anvil_rate_time_unit')}", instead)
    networks = Networks.read(scope, files, findings, name if scope.is_given(name) else "mynetworks")
    if networks.inside:
        yield Section("[[network]]", [Row("networks", networks.inside, scope.origin(name)), *(Row(key, "") for key in rates)])
