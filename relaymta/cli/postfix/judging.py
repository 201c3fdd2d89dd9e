"""What judges mail: policy services and DNS lists of restrictions, milters, postscreen's lists, header_checks."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from relaymta.cli.postfix.clients import shown
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin, tokens, without_braces
from relaymta.cli.postfix.listening import Listener, Listening
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.master_cf import Service
from relaymta.cli.postfix.restrictions import Restriction, Restrictions
from relaymta.cli.postfix.toml_text import Row, Section

__all__ = ["Judging"]

LISTS = {
    "smtpd_client_restrictions": "rcpt", "smtpd_helo_restrictions": "rcpt", "smtpd_sender_restrictions": "rcpt",
    "smtpd_relay_restrictions": "rcpt", "smtpd_recipient_restrictions": "rcpt", "smtpd_data_restrictions": "data",
    "smtpd_end_of_data_restrictions": "message",
}  # fmt: skip
CODES = "127.0.0.2-254"
_ON_FAILURE = {"accept": "accept", "tempfail": "tempfail", "quarantine": "hold", "shutdown": "disconnect", "reject": "tempfail"}


class Asked(NamedTuple):
    """Something that is asked. `whose`: `clients` of the [[filter]]."""

    type: str
    address: str
    stage: str
    whose: str


class Judging:
    """The [[filter]] tables."""

    def __init__(self, scope: Scope, services: list[Service], listening: Listening, findings: Findings) -> None:
        self._scope, self._services, self._findings = scope, services, findings
        self._listeners = [listener for listener in listening.listeners if not listener.filtered]
        self._names: set[str] = set()

    def sections(self) -> Iterator[Section]:
        """All of them: those that need no program first."""
        yield from self._lists()
        yield from self._postscreen()
        yield from self._policies()
        yield from self._milters()

    def _name(self, wanted: str) -> str:
        """A name that no other filter has."""
        base = re.sub(r"[^A-Za-z0-9_.-]+", "-", wanted).strip("-._")[:28] or "filter"
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base}-{number}"
        self._names.add(name)
        return name

    def _where(self, listeners: list[Listener]) -> Iterator[Row]:
        """`listener`, where not all of them ask."""
        if len(listeners) < len(self._listeners):
            yield Row("listener", [address for listener in listeners for address in listener.addresses])

    def _restrictions(self) -> Iterator[tuple[Listener, str, str, Restriction]]:
        """(Listener, stage, whose mail, restriction) of each restriction of each listener."""
        for listener in self._listeners:
            for name, stage in LISTS.items():
                found = Restrictions.read(listener.scope, name)
                before = found.place_of("permit_mynetworks"), found.place_of("permit_sasl_authenticated")
                for at, member in enumerate(found.members):
                    behind = before[0] < at and (before[1] < at or listener.auth == "off")
                    yield listener, stage, "unauthenticated" if behind else "all", member

    def _collected(self, chosen: Callable[[Restriction, str, str], Asked | None]) -> dict[Asked, tuple[Origin, list[Listener]]]:
        found: dict[Asked, tuple[Origin, list[Listener]]] = {}
        for listener, stage, whose, member in self._restrictions():
            asked = chosen(member, stage, whose)
            if asked is not None:
                found.setdefault(asked, (member.origin, []))[1].append(listener)
        return {
            asked: (origin, list({id(one): one for one in listeners}.values())) for asked, (origin, listeners) in found.items()
        }

    # Policy services

    def _policies(self) -> Iterator[Section]:
        for asked, (origin, listeners) in self._collected(_policy).items():
            address = self._socket(asked.address)
            if not address:
                self._findings.gap(
                    origin.place,
                    f"check_policy_service {asked.address}",
                    "this address is not understood: give a [[filter]] of type policy",
                )
                continue
            service = self._spawned(asked.address)
            if service is not None:
                instead = f"Postfix starts it for each connection: give it a socket of its own, {address} (docs/filters.md)"
                self._findings.gap(service.place, service.label, instead)
            name = self._name(service.name if service is not None else _called(address, "policy"))
            rows = [Row("name", name), Row("type", "policy"), Row("address", [address], origin)]
            rows += [Row("stage", asked.stage)] if asked.stage != "rcpt" else []
            rows += [Row("clients", asked.whose)] if asked.whose != "all" else []
            yield Section("[[filter]]", [*rows, *self._where(listeners)])

    def _spawned(self, text: str) -> Service | None:
        name = text.removeprefix("unix:").removeprefix("private/")
        return next((one for one in self._services if one.name == name and one.command == "spawn"), None)

    def _socket(self, text: str) -> str:
        """A socket of Postfix's (`unix:private/x`, `inet:127.0.0.1:10023`, `inet:8891@localhost`) as ours are; "": it is none."""
        text = text.removeprefix("local:") if text.startswith("local:") else text
        if text.startswith("inet:"):
            rest = text.removeprefix("inet:")
            by_port = re.fullmatch(r"(\d+)@(.+)", rest)
            match = by_port or re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):(\d+)", rest)
            if match is None:
                return ""
            return shown(match[2].strip("[]"), int(match[1])) if by_port else shown(match[1] or match[2], int(match[3]))
        path = text.removeprefix("unix:")
        if path.startswith("/"):
            return f"unix:{path}"
        return f"unix:{self._scope.text('queue_directory')}/{path}" if "/" in path or text.startswith("unix:") else ""

    # DNS lists

    def _lists(self) -> Iterator[Section]:
        for domain, restriction in ((False, "reject_rbl_client"), (True, "reject_rhsbl_")):
            found = self._collected(lambda member, stage, whose: _dns_list(member, restriction))  # noqa: B023 # used at once
            if not found:
                continue
            rows, listeners = [], next(iter(found.values()))[1]
            for asked, (origin, _) in found.items():
                zone, _, codes = asked.address.partition("=")
                made = _codes(codes)
                if not made:
                    self._findings.gap(
                        origin.place,
                        f"{restriction} {asked.address}",
                        "these answers are not understood: give codes of [[filter.lists]]",
                    )
                    continue
                more = [Row("domain", True)] if domain else []
                rows.append(Section("[[filter.lists]]", [Row("zone", zone, origin), Row("codes", made), *more]))
            if rows:
                yield Section(
                    "[[filter]]",
                    [
                        Row("name", self._name("domain-lists" if domain else "lists")),
                        Row("type", "dnsbl"),
                        *self._where(listeners),
                    ],
                )
                yield from rows

    def _postscreen(self) -> Iterator[Section]:
        scope = self._scope
        words = scope.words("postscreen_dnsbl_sites")
        used = any(service.command == "postscreen" for service in self._services)
        if not used or not words:
            return
        origin, action = scope.origin("postscreen_dnsbl_sites"), scope.text("postscreen_dnsbl_action")
        rows = []
        for word in words:
            match = re.fullmatch(r"([^=*]+)(?:=([^*]+))?(?:\*(-?\d+))?", word)
            codes = _codes(match[2] or "") if match is not None else []
            if match is None or not codes:
                self._findings.gap(origin.place, word, "these answers are not understood: give codes of [[filter.lists]]")
                continue
            more = [Row("score", float(match[3]))] if match[3] else []
            rows.append(Section("[[filter.lists]]", [Row("zone", match[1], origin), Row("codes", codes), *more]))
        if rows:
            trial = [] if action in ("enforce", "drop") else [Row("enforce", False, scope.origin("postscreen_dnsbl_action"))]
            yield Section("[[filter]]", [Row("name", self._name("postscreen")), Row("type", "dnsbl"), *trial])
            yield from rows
            threshold = float(scope.number("postscreen_dnsbl_threshold") or 1)
            yield Section(
                "[[filter.score]]", [Row("at", threshold, scope.origin("postscreen_dnsbl_threshold")), Row("verdict", "reject")]
            )

    # Milters

    def _milters(self) -> Iterator[Section]:
        found: dict[str, tuple[Origin, list[Listener]]] = {}
        for listener in self._listeners:
            if "no_milters" in listener.scope.text("receive_override_options"):
                continue
            for word in tokens(listener.scope.text("smtpd_milters")):
                found.setdefault(word, (listener.scope.origin("smtpd_milters"), []))[1].append(listener)
        for word, (origin, listeners) in found.items():
            first, *settings = tokens(without_braces(word))
            own = dict(one.partition("=")[::2] for one in settings)
            address = self._socket(first)
            if not address:
                self._findings.gap(
                    origin.place, f"smtpd_milters = {word}", "this address is not understood: give a [[filter]] of type milter"
                )
                continue
            name = self._name(_called(address, "milter"))
            action = own.get("default_action", self._scope.text("milter_default_action"))
            if action == "reject":
                self._findings.gap(
                    origin.place,
                    f"milter_default_action = reject ({first})",
                    'on_failure = "tempfail" here: mail is refused for now, not for good',
                )
            rows = [Row("name", name), Row("type", "milter"), Row("address", [address], origin)]
            rows.append(Row("on_failure", _ON_FAILURE.get(action, "tempfail"), self._scope.origin("milter_default_action")))
            yield Section("[[filter]]", [*rows, *self._where(listeners)])


def _policy(member: Restriction, stage: str, whose: str) -> Asked | None:
    if member.name != "check_policy_service":
        return None
    return Asked("policy", tokens(without_braces(member.argument))[0], stage, whose)


def _dns_list(member: Restriction, restriction: str) -> Asked | None:
    if not member.name.startswith(restriction) or member.warned or member.name == "reject_rhsbl_client":
        return None
    return Asked("dnsbl", member.argument, "rcpt", "unauthenticated")


def _called(address: str, kind: str) -> str:
    """A name for what is at an address: that of its socket, or of the folder of that."""
    if not address.startswith("unix:"):
        return f"{kind}-{address.rpartition(':')[2]}"
    folder, _, name = address.removeprefix("unix:").rpartition("/")
    base = re.sub(r"[.-]?(sock|socket)\Z", "", name)
    return base or folder.rpartition("/")[2]


def _codes(text: str) -> list[str]:
    """The answers of a DNS list that count, as ours are written: of `127.0.0.2`, `127.0.0.[2..11]`, `127.0.0.[2;4]`; none for
    others. 127.0.0.1 is none: a list that says so does not answer us."""
    if not text:
        return [CODES]
    match = re.fullmatch(r"(127\.\d+\.\d+\.)(?:(\d+)|\[([\d.;]+)\])", text)
    if match is None:
        return []
    parts = [match[2]] if match[2] else match[3].split(";")
    return [code for code in (match[1] + part.replace("..", "-") for part in parts) if code != "127.0.0.1"]
