"""Listeners: the smtpd(8) services of master.cf, with what their `-o` say, and content filters."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from relaymta.cli.postfix.clients import is_address, port_number, shown
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.master_cf import Service
from relaymta.cli.postfix.networks import Networks
from relaymta.cli.postfix.restrictions import Access
from relaymta.cli.postfix.toml_text import Row, Section

__all__ = ["Listener", "Listening"]

LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}
ANY = {"ipv4": "0.0.0.0", "ipv6": "::"}


@dataclass
class Listener:
    """A service that takes mail by SMTP: at which addresses, and the keys of its tables."""

    service: Service
    scope: Scope
    addresses: list[str]
    rows: list[Row] = field(default_factory=list)
    filtered: bool = False
    auth: str = "off"

    @property
    def content_filter(self) -> str:
        """The content filter that its mail goes to; "" for none."""
        return self.scope.text("content_filter")


class Listening:
    """`listeners`, in the order of master.cf. `has_certificate`: TLS can be offered."""

    def __init__(self, scope: Scope, services: list[Service], files: Files, findings: Findings, has_certificate: bool) -> None:
        self._scope, self._files, self._findings, self._has_certificate = scope, files, findings, has_certificate
        passed = next((service for service in services if service.kind == "pass" and service.command == "smtpd"), None)
        self.listeners: list[Listener] = []
        for service in services:
            if service.kind != "inet":
                continue
            if service.command == "postscreen" and passed is not None:
                service = service._replace(overrides=passed.overrides)  # of the program behind it
            elif service.command != "smtpd":
                findings.gap(service.place, service.label, "it is not known here: keep that program, or leave it out")
                continue
            self._add(service)
        self._set_up()

    def _add(self, service: Service) -> None:
        scope = self._scope.within(service.overrides)
        known = {address for listener in self.listeners for address in listener.addresses}
        addresses = [address for address in self._addresses(service, scope) if address not in known]
        if addresses:
            self.listeners.append(Listener(service, scope, addresses))

    def _addresses(self, service: Service, scope: Scope) -> Iterator[str]:
        host, _, name = service.name.rpartition(":")
        port = port_number(name)
        if port is None:
            self._findings.way(service.place, service.label, f"the port {name!r} is not known: add a [[listener]]")
            return
        families = scope.words("inet_protocols")
        chosen = [one for one in ("ipv4", "ipv6") if one in families or "all" in families]
        names = [host.strip("[]")] if host else scope.words("inet_interfaces")
        for one in names:
            yield from (shown(address, port) for address in self._bound(one.strip("[]"), chosen))

    @staticmethod
    def _bound(name: str, families: list[str]) -> list[str]:
        """The addresses of a name of inet_interfaces."""
        table = {"all": ANY, "loopback-only": LOOPBACK, "localhost": LOOPBACK}.get(name.lower())
        if table is not None:
            return [table[family] for family in families]
        return [name] if not is_address(name) or ("ipv6" if ":" in name else "ipv4") in families else []

    # What they offer

    def _set_up(self) -> None:
        filters = {listener.content_filter for listener in self.listeners} - {""}
        for listener in self.listeners:
            listener.filtered = bool(filters) and not listener.content_filter and self._is_back(listener)
            if listener.filtered:
                self._give_back(listener)
            else:
                self._offer(listener)

    @staticmethod
    def _is_back(listener: Listener) -> bool:
        """Whether a content filter gives mail back there: without a filter, for few clients, without logins."""
        loopback = all(address.startswith(("127.", "[::1]")) for address in listener.addresses)
        return (loopback or "mynetworks" in listener.service.overrides) and not listener.scope.yes("smtpd_sasl_auth_enable")

    def _give_back(self, listener: Listener) -> None:
        origin = listener.scope.origin("content_filter")
        listener.rows.append(Row("filtered", True, origin))
        if "mynetworks" in listener.service.overrides:
            networks = Networks.read(listener.scope, self._files, self._findings)
            if set(networks.inside) - {"127.0.0.0/8", "::1/128"}:
                listener.rows.append(Row("networks", networks.inside, listener.scope.origin("mynetworks")))
            for member in networks.exceptions():
                instead = "networks of a filtered listener have no exceptions: name those of the content filter alone"
                self._findings.gap(listener.scope.place("mynetworks"), f"mynetworks: !{', !'.join(member.names)}", instead)

    def _offer(self, listener: Listener) -> None:
        listener.rows += [*self._tls(listener), *self._auth(listener)]
        if listener.service.name.rpartition(":")[2] in ("submission", "587", "smtps", "submissions", "465"):
            listener.rows.append(Row("submission", True, Origin(listener.service.place, listener.service.name)))
        if listener.scope.text("smtpd_upstream_proxy_protocol"):
            place = listener.scope.place("smtpd_upstream_proxy_protocol")
            instead = "name your load balancers in `proxy` of this listener: no other client may connect then"
            self._findings.gap(place, f"{listener.service.name}: smtpd_upstream_proxy_protocol", instead)
        if listener.scope.text("smtpd_proxy_filter"):
            text = listener.scope.text("smtpd_proxy_filter")
            instead = "no SMTP filter is asked while the client waits: make it a content filter (docs/content-filters.md)"
            self._findings.way(
                listener.scope.place("smtpd_proxy_filter"), f"{listener.service.name}: smtpd_proxy_filter = {text}", instead
            )

    def _tls(self, listener: Listener) -> Iterator[Row]:
        scope = listener.scope
        if scope.yes("smtpd_tls_wrappermode"):
            yield Row("tls", "implicit", scope.origin("smtpd_tls_wrappermode"))
            return
        level = scope.text("smtpd_tls_security_level")
        if level == "encrypt" or (not level and scope.yes("smtpd_enforce_tls")):
            yield Row("tls", "require", scope.origin("smtpd_tls_security_level" if level else "smtpd_enforce_tls"))
        elif level == "none" and self._has_certificate:
            yield Row("tls", "off", scope.origin("smtpd_tls_security_level"))

    def _auth(self, listener: Listener) -> Iterator[Row]:
        scope = listener.scope
        if not scope.yes("smtpd_sasl_auth_enable"):
            return
        origin = scope.origin("smtpd_sasl_auth_enable")
        loopback = all(address.startswith(("127.", "[::1]")) for address in listener.addresses)
        has_tls = self._has_certificate and not any(row.key == "tls" and row.value == "off" for row in listener.rows)
        if not has_tls and not loopback:
            instead = "AUTH is offered over TLS alone: give a [[certificate]], and auth of this listener"
            self._findings.gap(origin.place, f"{listener.service.name}: smtpd_sasl_auth_enable without a certificate", instead)
            return
        access = Access(scope)
        listener.auth = "require" if access.need_login else "may"
        yield Row("auth", listener.auth, scope.origin(access.refusing("anybody")) if access.need_login else origin)
        if not has_tls:
            yield Row("auth_in_clear", True, origin)

    def sections(self) -> Iterator[Section]:
        """The [[listener]] tables."""
        for listener in self.listeners:
            origin = Origin(listener.service.place, f"{listener.service.name} {listener.service.kind}")
            for address in listener.addresses:
                yield Section("[[listener]]", [Row("address", address, origin), *listener.rows])
