"""A Postfix configuration as one of ours: the text, the files beside it, and what could not be carried."""

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from relaymta.cli.postfix.accepting import Accepting, certificates
from relaymta.cli.postfix.beside import Beside
from relaymta.cli.postfix.checking import header_rules, refusal_rules
from relaymta.cli.postfix.expansion import BadExpansion
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.judging import Judging
from relaymta.cli.postfix.keeping import Keeping
from relaymta.cli.postfix.limits import single_keys
from relaymta.cli.postfix.lines import Origin, Place
from relaymta.cli.postfix.listening import Listening
from relaymta.cli.postfix.main_cf import Scope, Setting, read_main
from relaymta.cli.postfix.master_cf import read_master
from relaymta.cli.postfix.named import Named
from relaymta.cli.postfix.parameters import account_for
from relaymta.cli.postfix.resolving import Resolved, Resolver
from relaymta.cli.postfix.routing import Route, Routing
from relaymta.cli.postfix.toml_text import Row, Section, written
from relaymta.cli.postfix.ways import Ways
from relaymta.errors import ConfigError

__all__ = ["Carried", "carry"]

NOT_CARRIED = "not_carried"  # a key that no configuration has: it is refused until somebody has removed the line
DECIDE = "see the end; remove this line when what changes the way of mail is decided"
_ORDER = (
    "", "listener", "certificate", "accounts", "relay", "network", "route", "source", "site", "mail_rule", "filter", "mailboxes",
    "intake", "queue", "delivery", "limits",
)  # fmt: skip
SCRIPT, MAP = "mailboxes.sh", "route_map"


@dataclass(frozen=True)
class Carried:
    """`text`: the configuration; `beside`: what belongs beside it; `findings`: what could not be carried."""

    text: str
    beside: Beside
    findings: Findings


def carry(files: Files, beside: Beside, mx: Callable[[str], list[str] | None], host: str = "") -> Carried:
    """`mx`: as of Ways; `host`: the name of the machine. OSError, ConfigError: it cannot be read."""
    try:
        return _Carrying(files, beside, mx, host).all()
    except BadExpansion as error:
        raise ConfigError([str(error)]) from None
    except RecursionError:
        raise ConfigError(["main.cf: names, lists or tables are nested too deeply"]) from None


class _Carrying:
    """One configuration on its way."""

    def __init__(self, files: Files, beside: Beside, mx: Callable[[str], list[str] | None], host: str) -> None:
        self.files, self.beside, self.findings = files, beside, Findings()
        main = read_main(files)
        scope = Scope(main, host=host)
        files.home = scope.text("config_directory") or files.home
        if scope.text("myorigin").startswith("/"):
            main["myorigin"] = self._first_line(main["myorigin"], scope.text("myorigin"))
        self.scope = Scope(main, host=host)
        self.services = read_master(files)
        rewrite = next((one for one in self.services if (one.name, one.kind) == ("rewrite", "unix")), None)
        self.resolver = Resolver(self.scope.within(rewrite.overrides if rewrite is not None else {}), files)
        self.resolver.note_unreadable(self.findings)
        self.ways = Ways(self.resolver, self.services, files, self.findings, beside, mx)
        smtpd = [self.scope.within(service.overrides) for service in self.services if service.command == "smtpd"]
        self.certificates = certificates([self.scope, *smtpd], files)
        self.listening = Listening(self.scope, self.services, files, self.findings, bool(self.certificates))
        named = Named(self.resolver, [self.ways.client(name) for name in ("smtp", "relay")], self.findings)
        self.routing = Routing(self.resolver, named, self.ways, self.findings, list(self._filters()))
        self.keeping = Keeping(self.scope, files, self.findings, self.resolver, self.routing)

    def _first_line(self, setting: Setting, path: str) -> Setting:
        """myorigin of a file, as Debian has it: its first line."""
        try:
            return setting._replace(raw=self.files.text(path).partition("\n")[0].strip())
        except OSError as error:
            instead = f"{error.strerror}: write what is in it as intake.complete_domain"
            self.findings.gap(setting.place, f"myorigin = {path}", instead)
            return setting._replace(raw="$myhostname")

    def all(self) -> Carried:
        """The result."""
        sections = sorted(self._sections(), key=lambda section: _ORDER.index(section.head.strip("[]").partition(".")[0]))
        back = {one.service.place for one in self.listening.listeners if one.filtered}
        account_for(self.scope, self.services, back, self.ways.transports, self.findings)
        self.ways.note_unused(["smtp", "relay"])
        self._note_mailboxes()
        self._note_submission()
        for name in self.files.escaped:
            instead = r"they are written as \xNN: see that nothing depends on them, such as a password"
            self.findings.gap(Place(name, 0), "octets that are not UTF-8", instead)
        self._check(sections)
        ways = len(self.findings.of("way"))
        if ways:
            sections[0].rows.append(Row(NOT_CARRIED, ways, Origin(Place(DECIDE, 0))))
        return Carried(written(sections), self.beside, self.findings)

    def _sections(self) -> Iterator[Section]:
        scope = self.scope
        top = [Row("hostname", scope.text("myhostname"), scope.origin("myhostname"))] if scope.is_given("myhostname") else []
        yield Section("", [*top, *self._map()])
        yield from self.listening.sections() if self.listening.listeners else self._no_listener()
        yield from self.certificates
        for route in self.routing.routes:
            yield self._route(route)
        for name, source in self.ways.sources.items():
            rows = [Row("name", name), Row("address", source.address, source.origin)]
            yield Section("[[source]]", [*rows, *([Row("hostname", source.hostname)] if source.hostname else [])])
        for host, rate in self.ways.rates.items():
            yield Section("[[site]]", [Row("hosts", [host]), rate])
        accepting = Accepting(scope, self.files, self.findings, self.beside, self.listening, self.resolver, self.routing)
        yield from accepting.sections()
        yield from refusal_rules(self.routing.refusals, self.findings)
        yield from header_rules(scope, self.files, self.findings)
        yield from Judging(scope, self.services, self.listening, self.findings).sections()
        if self.routing.kept and scope.is_given("recipient_delimiter"):
            delimiter = Row("subaddress", scope.text("recipient_delimiter")[:1], scope.origin("recipient_delimiter"))
            yield Section("[mailboxes]", [delimiter])
        yield from single_keys(scope, self.files, self.findings)

    def _no_listener(self) -> Iterator[Section]:
        place = Place("master.cf", 0)
        self.findings.note(place, "no smtpd", "mail comes by SMTP alone: there is a listener on 127.0.0.1:25")
        yield Section("[[listener]]", [Row("address", "127.0.0.1:25", Origin(place, "no smtpd"))])

    # Routes

    def _filters(self) -> Iterator[Route]:
        """The routes to content filters: mail of the listeners that have one."""
        by_filter: dict[str, list[str]] = {}
        origins: dict[str, Origin] = {}
        for listener in self.listening.listeners:
            if listener.content_filter:
                by_filter.setdefault(listener.content_filter, []).extend(listener.addresses)
                origins.setdefault(listener.content_filter, listener.scope.origin("content_filter"))
        for text, addresses in by_filter.items():
            transport, _, nexthop = text.partition(":")
            resolved = Resolved(transport, nexthop or "the domain of the recipient", "", "default", (origins[text],))
            yield Route(self.ways.of(resolved, ""), listeners=addresses, origin=origins[text])

    def _route(self, route: Route) -> Section:
        way = route.way
        rows = [Row("name", route.name, route.origin or Origin(Place("default", 0)))]
        if route.listeners:
            rows.append(Row("listener", route.listeners))
        if route.sender is not None:
            key = {"address": "sender", "domain": "sender_domain", "below": "sender_domain"}[route.sender.kind]
            rows.append(Row(key, [route.sender.pattern], self.routing.where(route.sender)))
        for kinds, key in ((("address",), "recipient"), (("domain", "below"), "recipient_domain")):
            chosen = [one for one in route.recipients if one.kind in kinds]
            if chosen:
                rows.append(Row(key, [one.pattern for one in chosen], origins=tuple(self.routing.where(one) for one in chosen)))
        if route.attempts:
            rows.append(Row("min_attempts", route.attempts))
        if way.kind == "mailbox":
            return Section("[[route]]", [*rows, Row("protocol", "mailbox")])
        hosts = [Row("hosts", list(way.hosts))] if way.hosts else []
        return Section("[[route]]", [*rows, *hosts, *way.rows])

    def _map(self) -> Iterator[Row]:
        if not self.routing.mapped:
            return
        text = "".join(f"{pattern} {route.name}\n" for pattern, route in self.routing.mapped)
        path = self.beside.file(MAP, f"# PATTERN ROUTE: transport_maps\n{text}")
        if not self.beside.has_folder:
            what = f"{len(self.routing.mapped)} rows of transport_maps"
            self.findings.way(self.scope.place("transport_maps"), what, f"import with --files DIR, which writes {path}")
        yield Row("route_map", path, self.scope.origin("transport_maps"))

    # What is left to be done

    def _note_mailboxes(self) -> None:
        script = self.keeping.commands()
        if not script:
            return
        path, count = self.beside.file(SCRIPT, script), script.count("\nrelaymta ")
        what, place = f"{count} {'users and aliases' if count > 1 else 'user or alias'}", self.keeping.places()[0]
        if self.beside.has_folder:
            self.findings.note(place, what, f"run {path} once when the relay runs")
        else:
            self.findings.way(place, what, f"import with --files DIR, which writes {SCRIPT} with the commands")

    def _note_submission(self) -> None:
        pickup = next((one for one in self.services if one.command == "pickup"), None)
        if pickup is not None:
            instead = 'it is here, too; but users send as themselves alone, unless relay.local_users names them ("*": all)'
            self.findings.note(pickup.place, "mail by sendmail(1)", instead)

    def _check(self, sections: list[Section]) -> None:
        """Name what is not valid here of what came of it."""
        from relaymta.config import load

        try:
            load(None, tomllib.loads(written(sections)))
        except ConfigError as error:
            for problem in error.problems:
                what = problem.removeprefix("command line: ")
                self.findings.way(Place("main.cf", 0), "what came of it", f"it is not valid here: {what}")
