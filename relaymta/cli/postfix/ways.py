"""What a transport and its next hop are here: hosts, the MX of the domain, mailboxes, or nothing that there is."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from relaymta.cli.postfix.beside import Beside
from relaymta.cli.postfix.clients import Client, Source, host_and_port, is_address, port_number, shown
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin, Place, tokens
from relaymta.cli.postfix.master_cf import Service
from relaymta.cli.postfix.resolving import Resolved, Resolver
from relaymta.cli.postfix.toml_text import Row

__all__ = ["MOVED", "UNDECIDED", "Way", "Ways"]

_USUAL = ("smtp", "relay")
MOVED = "5.1.6 User has moved to"
UNDECIDED = "undecided.invalid"  # a host that never exists (RFC 2606): mail for it waits
Kind = Literal["mx", "hosts", "lmtp", "mailbox", "refused", "undecided"]


@dataclass(frozen=True)
class Way:
    """Where mail goes. `text`: why it is refused; `keys`: the other keys of its route, with their values; `rows`: these with
    their origins; `label`: a name for the route. Two ways are equal whatever lines they come from."""

    kind: Kind
    hosts: tuple[str, ...] = ()
    text: str = ""
    keys: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()  # hosts that are tried after the first attempt
    rows: tuple[Row, ...] = field(default=(), compare=False)
    label: str = field(default="", compare=False)
    origins: tuple[Origin, ...] = field(default=(), compare=False)


class Ways:
    """Ways of what a resolver says. `mx(name)`: the MX hosts of a name as the DNS has them, [] for none; None: it is not asked,
    or does not answer. `sources`: those that the ways use, by name; `rates`: of hosts."""

    def __init__(
        self, resolver: Resolver, services: list[Service], files: Files, findings: Findings, beside: Beside,
        mx: Callable[[str], list[str] | None],
    ) -> None:  # fmt: skip
        self._resolver, self._files, self._findings, self._beside, self._mx = resolver, files, findings, beside, mx
        self._services = {service.name: service for service in services if service.kind in ("unix", "fifo")}
        self.sources: dict[str, Source] = {}
        self.rates: dict[str, Row] = {}
        self._clients: dict[str, Client] = {}
        self._known_mx: dict[str, list[str] | None] = {}
        self._used = set[Place]()
        self.transports = set[str]()  # of all ways

    def note_unused(self, transports: list[str]) -> None:
        """Name rows of the tables of logins and TLS policies that no route has used."""
        for client in map(self.client, transports):
            tables = {"smtp_sasl_password_maps": client.passwords, "smtp_tls_policy_maps": client.policies}
            for name, entry in ((name, entry) for name, maps in tables.items() for entry in maps.entries):
                if entry.place not in self._used:
                    self._findings.note(entry.place, f"{name}: {entry.key}", "no mail goes there: it is left out")

    def client(self, transport: str) -> Client:
        """The program of a transport, as far as it sends mail by SMTP or LMTP."""
        if transport not in self._clients:
            self._clients[transport] = self._new_client(transport)
        return self._clients[transport]

    def _new_client(self, transport: str) -> Client:
        service = self._services.get(transport)
        scope = self._resolver.scope.within(service.overrides if service is not None else {})
        return Client(
            scope, transport, service, self._resolver, self._files, self._findings, self._beside, self.sources, self._used
        )

    def of(self, resolved: Resolved, sender: str) -> Way:
        """The way of a recipient's mail."""
        if resolved.moved is not None:
            moved = Origin(resolved.moved.place, "relocated_maps")
            return Way("refused", text=f"{MOVED} {resolved.moved.value}", origins=(moved,))
        if resolved.kind == "alias":
            return self._here(resolved)
        self.transports.add(resolved.transport)
        service = self._services.get(resolved.transport)
        command = service.command if service is not None else "?"
        if command == "smtp":
            return self._smtp(resolved, sender)
        if command == "lmtp":
            return self._lmtp(resolved)
        if command == "local" and self._resolver.scope.text("mailbox_transport"):
            return self._by_mailbox_transport(resolved, sender)
        if command in ("local", "virtual"):
            return self._here(resolved)
        if command == "error" and resolved.transport != "retry":
            return Way("refused", text=resolved.nexthop, origins=resolved.origins)
        if command == "error":  # its mail waits until it expires, as that for a host that does not exist
            return Way("hosts", ("retry.invalid:25",), label="retry", origins=resolved.origins)
        return self._undecided(resolved, self._no_such_program(service, resolved))

    @staticmethod
    def _here(resolved: Resolved) -> Way:
        return Way("mailbox", label="here", origins=resolved.origins)

    def _by_mailbox_transport(self, resolved: Resolved, sender: str) -> Way:
        transport, _, nexthop = self._resolver.scope.text("mailbox_transport").partition(":")
        origins = (*resolved.origins, self._resolver.scope.origin("mailbox_transport"))
        nexthop, service = nexthop or resolved.nexthop, self._services.get(transport)
        if service is not None and service.command == "local":  # which refuses to give mail to itself
            return self._here(resolved)
        return self.of(resolved._replace(transport=transport, nexthop=nexthop, kind="virtual", origins=origins), sender)

    @staticmethod
    def _no_such_program(service: Service | None, resolved: Resolved) -> str:
        if service is None:
            return f"master.cf has no transport {resolved.transport!r}"
        if service.command == "discard":
            return 'no route drops mail; a [[mail_rule]] with verdict = "discard" drops a message for all of its recipients'
        if service.command == "pipe":
            program = next((word.removeprefix("argv=") for word in service.rest if word.startswith("argv=")), "")
            return f"programs, as {program}, are not run: give the mail to one that speaks LMTP or SMTP"
        return f"the program {service.command} is not known"

    def _undecided(self, resolved: Resolved, why: str) -> Way:
        what = f"{resolved.transport}:{resolved.nexthop}".removesuffix(f":{resolved.domain}")
        self._findings.way(resolved.place, what, f"{why}. Mail for it waits: name a host in place of {UNDECIDED}")
        return Way("undecided", (f"{UNDECIDED}:25",), label="undecided", origins=resolved.origins)

    def _lmtp(self, resolved: Resolved) -> Way:
        client = self.client(resolved.transport)
        spool = client.scope.text("queue_directory")
        hosts = list[str]()
        for word in tokens(resolved.nexthop):
            if word.startswith("unix:"):
                path = word.removeprefix("unix:")
                path = path if path.startswith("/") else f"{spool}/{path}"
                hosts.append(f"unix:{path}")
                if path.startswith(f"{spool}/private/"):
                    instead = (
                        "this folder is open to Postfix alone: give the program another socket, and name it in the [[route]]"
                    )
                    self._findings.gap(resolved.place, path, instead)
                continue
            found = host_and_port(word.removeprefix("inet:"), port_number(client.scope.text("lmtp_tcp_port")) or 24)
            if found is None:
                return self._undecided(resolved, f"{word!r} is no host")
            hosts.append(shown(*found[:2]))
        return self._made("lmtp", hosts, [Row("protocol", "lmtp"), *client.limits()], resolved)

    def _smtp(self, resolved: Resolved, sender: str) -> Way:
        client = self.client(resolved.transport)
        rows = [*client.source(), *client.families(), *client.limits(), *client.chunking()]
        if resolved.nexthop.lower() == resolved.domain:
            client.note_mx()
            way = self._made("mx", [], [*rows, *client.tls(resolved.nexthop, login=False)], resolved)
            return replace(way, fallback=self._fallback(client, resolved))
        hops: dict[str, str] = {}  # host -> next hop, as it is written
        for word in [*tokens(resolved.nexthop), *tokens(client.scope.text("smtp_fallback_relay"))]:
            found = host_and_port(word, client.port)
            if found is None:
                return self._undecided(resolved, f"{word!r} is no host")
            for host in self._hosts(client, *found, resolved):
                hops.setdefault(host, word)
        if not hops:
            return self._undecided(resolved, f"{resolved.nexthop!r} is no host")
        login = client.login(hops, sender if resolved.by_relayhost else "")
        if client.delay:
            for name in (host.rpartition(":")[0] for host in hops):
                self.rates.setdefault(name, Row("rate", f"{3600 / client.delay:g}/h", client.scope.origin(client.delay_name)))
        rows += [*client.tls(next(iter(hops.values())), login=bool(login)), *login, *client.xforward()]
        return self._made("hosts", list(hops), rows, resolved)

    def _fallback(self, client: Client, resolved: Resolved) -> tuple[str, ...]:
        """smtp_fallback_relay, of mail to the MX."""
        place, text = client.scope.place("smtp_fallback_relay"), client.scope.text("smtp_fallback_relay")
        hosts = list[str]()
        for word in tokens(text):
            found = host_and_port(word, client.port)
            if found is not None:
                hosts += self._hosts(client, *found, resolved)
        if hosts:
            instead = "they get the mail after the first attempt (min_attempts = 1), and not within it"
            self._findings.note(place, f"smtp_fallback_relay = {text}", instead)
        return tuple(dict.fromkeys(hosts))

    def _hosts(self, client: Client, host: str, port: int, by_mx: bool, resolved: Resolved) -> list[str]:
        """A next hop as hosts: where Postfix looks for its MX, those that the DNS has now."""
        if not by_mx or not client.asks_for_mx:
            return [shown(host, port)]
        if host not in self._known_mx:
            self._known_mx[host] = self._mx(host)
        known = self._known_mx[host]
        if known is None:
            instead = "without [ ] Postfix sends to its MX, if it has some; here it is the host itself: see --mx"
            self._findings.way(resolved.place, shown(host, port), instead)
        elif known:
            instead = f"these are its MX now; a change of the DNS is not followed: {', '.join(known)}"
            self._findings.note(resolved.place, shown(host, port), instead)
        return [shown(name, port) for name in known or [host]]

    @staticmethod
    def _made(kind: Kind, hosts: list[str], rows: list[Row], resolved: Resolved) -> Way:
        keys = tuple(repr((row.key, row.value)) for row in rows)
        label = "mx" if resolved.transport == "smtp" else resolved.transport
        if hosts:
            host = hosts[0].rpartition("/")[2] if hosts[0].startswith("unix:") else hosts[0].rpartition(":")[0]
            if resolved.transport in _USUAL or not is_address(host):
                label = re.sub(r"[^A-Za-z0-9.-]+", "-", host).strip("-")
        return Way(kind, tuple(hosts), keys=keys, rows=tuple(rows), label=label, origins=resolved.origins)
