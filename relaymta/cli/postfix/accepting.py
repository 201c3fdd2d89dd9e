"""Which mail is taken: who may relay, for which domains, for which recipients; certificates and logins of clients."""

from collections.abc import Iterator
from functools import cached_property

from relaymta.cli.postfix.beside import Beside
from relaymta.cli.postfix.conditions import Condition
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin
from relaymta.cli.postfix.listening import Listening
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.networks import Networks
from relaymta.cli.postfix.resolving import Resolver, maps_of
from relaymta.cli.postfix.restrictions import Access
from relaymta.cli.postfix.routing import Routing
from relaymta.cli.postfix.toml_text import NOWHERE, Row, Section
from relaymta.proto.address import domain_of

__all__ = ["Accepting", "certificates"]


_CERTIFICATES = (("smtpd_tls_cert_file", "smtpd_tls_key_file"), ("smtpd_tls_eccert_file", "smtpd_tls_eckey_file"))


def certificates(scopes: list[Scope], files: Files) -> list[Section]:
    """The [[certificate]] tables: the usual ones, one for each algorithm, and those by server name. `scopes`: main.cf, and the
    services that have their own."""
    pairs: list[tuple[str, str, Origin]] = []
    for scope in scopes:
        chain = scope.words("smtpd_tls_chain_files")
        pairs += _pairs(files, chain, scope.origin("smtpd_tls_chain_files"))
        for name, key in () if chain else _CERTIFICATES:
            if scope.text(name) not in ("", "none"):
                pairs.append((scope.text(name), scope.text(key), scope.origin(name)))
    for entry in maps_of(scopes[0], files, "tls_server_sni_maps").entries:
        pairs += _pairs(files, entry.value.replace(",", " ").split(), Origin(entry.place, entry.key))
    found: dict[str, Section] = {}
    for path, key, origin in pairs:
        rows = [Row("chain", path, origin), *([Row("key", key)] if key and key != path else [])]
        found.setdefault(path, Section("[[certificate]]", rows))
    return list(found.values())


def _pairs(files: Files, paths: list[str], origin: Origin) -> list[tuple[str, str, Origin]]:
    """(Certificate, key, origin) of files of which each key stands before its certificate, as chain files do."""
    found, key = [], ""
    for at, path in enumerate(paths):
        try:
            text = files.text(path)
        except OSError:
            text = "CERTIFICATE" if at or len(paths) == 1 else "PRIVATE KEY"
        has_certificate = "CERTIFICATE" in text
        key = path if "PRIVATE KEY" in text and not has_certificate else key
        if has_certificate:
            found.append((path, "" if "PRIVATE KEY" in text else key, origin))
    return found


# Who is there, of domains of a class.
RECIPIENTS = {"relay": "relay_recipient_maps", "virtual": "virtual_mailbox_maps", "local": "local_recipient_maps"}


class Accepting:
    """The tables about clients and recipients."""

    def __init__(
        self, scope: Scope, files: Files, findings: Findings, beside: Beside, listening: Listening, resolver: Resolver,
        routing: Routing,
    ) -> None:  # fmt: skip
        self._scope, self._files, self._findings, self._beside = scope, files, findings, beside
        self._listening, self._resolver, self._routing = listening, resolver, routing
        # The listeners for clients that need not log in; without one, what main.cf says of them.
        listeners = [one for one in listening.listeners if not one.filtered and one.auth != "require"]
        self._open = [(one.scope, one.service.name) for one in listeners] or [(scope, "main.cf")]

    def sections(self) -> Iterator[Section]:
        """[accounts], [[network]] and [relay]."""
        yield Section("[accounts]", list(self._accounts()))
        relaying = list(self._relaying())
        yield from self._of_networks()
        yield from self._closed()
        yield Section("[relay]", [*relaying, *self._domains()])

    # Clients

    def _relaying(self) -> Iterator[Row]:
        """relay.networks: the clients in mynetworks, where the restrictions of every listener let them relay."""
        each = [self._relaying_at(scope, name) for scope, name in self._open]
        networks = self._networks = each[0].within(each)
        for (scope, name), own in zip(self._open, each, strict=True):
            common = set(networks.inside)
            more = [one for one in own.inside if one not in common]
            if more:
                instead = "they may relay there, and not at all listeners of this kind; relay.networks is about all of them"
                self._findings.gap(scope.place("mynetworks"), f"{name}: mynetworks {', '.join(more)}", instead)
        scope, _ = self._open[0]
        relays = Access(scope).relays("network")
        why = scope.origin("mynetworks" if relays else Access(scope).refusing("network", elsewhere=True))
        yield Row("networks", networks.inside, NOWHERE if networks else why, networks.origins)
        for listener in self._listening.listeners:
            if listener.auth != "off" and not Access(listener.scope).relays("login"):
                place = listener.scope.place(Access(listener.scope).refusing("login", elsewhere=True))
                instead = "who logs in may relay here: leave out auth of this listener, or give them no account"
                self._findings.gap(place, f"{listener.service.name}: no permit_sasl_authenticated", instead)

    def _relaying_at(self, scope: Scope, name: str) -> Networks:
        """The clients that may relay at a listener."""
        access = Access(scope)
        if access.relays("anybody"):
            instead = "nothing refuses mail of all clients for all domains: that is an open relay, and is not carried"
            self._findings.gap(scope.place("smtpd_relay_restrictions"), f"{name}: restrictions", instead)
        return Networks.read(scope, self._files, self._findings) if access.relays("network") else Networks([])

    def _of_networks(self) -> Iterator[Section]:
        for exception in self._networks.exceptions():
            yield exception.as_exception()
        for name, key in (("smtpd_authorized_xclient_hosts", "xclient"), ("smtpd_authorized_xforward_hosts", "xforward")):
            for listener in self._listening.listeners:
                scope = listener.scope
                if scope.text(name) and not (key == "xforward" and listener.filtered):
                    found = Networks.read(scope, self._files, self._findings, name)
                    rows = [Row("networks", found.inside, scope.origin(name)), Row(key, True)]
                    yield Section("[[network]]", rows if found else [])
                    break

    def _accounts(self) -> Iterator[Row]:
        listener = next((one for one in self._listening.listeners if one.auth != "off"), None)
        if listener is None:
            return
        scope, path = listener.scope, listener.scope.text("smtpd_sasl_path")
        for other in self._listening.listeners:
            if other.auth != "off" and other.scope.text("smtpd_sasl_path") != path:
                text = f"{other.service.name}: smtpd_sasl_path = {other.scope.text('smtpd_sasl_path')}"
                self._findings.gap(other.scope.place("smtpd_sasl_path"), text, "all listeners have the same accounts")
        origin = scope.origin("smtpd_sasl_path")
        if scope.text("smtpd_sasl_type") == "dovecot" and not path.startswith("inet:"):
            whole = path.removeprefix("unix:")
            whole = whole if whole.startswith("/") else f"{scope.text('queue_directory')}/{whole}"
            yield Row("dovecot", whole, origin)
            if "/private/" in whole:
                instead = "this folder is open to Postfix alone: give Dovecot another socket, and name it in accounts.dovecot"
                self._findings.gap(origin.place, whole, instead)
            return
        instead = "make the accounts by `relaymta user add`, or name a back end (docs/submission.md)"
        place = origin.place if origin.place.line else scope.place("smtpd_sasl_auth_enable")
        self._findings.gap(place, f"smtpd_sasl_type = {scope.text('smtpd_sasl_type')}, smtpd_sasl_path = {path}", instead)
        yield Row("file", "/etc/relaymta/accounts.toml", origin)

    # Domains and recipients

    def _domains(self) -> Iterator[Row]:
        """relay.domains, and relay.recipients where Postfix has a list."""
        found: dict[str, Origin] = {}
        for condition in self._routing.named.recipients:
            if condition.kind != "domain" or condition.value in self._routing.kept:
                continue
            kind, origin = self._resolver.domain_kind(condition.value)
            if kind != "default" and self._routing.way(condition).kind != "refused":
                found[condition.value] = origin or self._routing.where(condition)
        for domain in sorted(self._routing.kept):
            if self._resolver.domain_kind(domain)[0] == "default":
                instead = (
                    "clients that may not relay may not send to it with Postfix; here they may, as to every domain that is kept"
                )
                self._findings.gap(self._routing.where(Condition("domain", domain)).place, domain, instead)
        for domain in self._sub_domains():
            found.setdefault(domain, self._scope.origin("relay_recipient_maps"))
        if not found or not self._open_to_all:  # the networks of relay.networks may send to any domain
            return
        yield Row("domains", list(found), origins=tuple(found.values()))
        self._note_below()
        yield from self._recipients(list(found))

    @cached_property
    def _open_to_all(self) -> list[Scope]:
        """The listeners that take mail for Postfix's own domains from all clients."""
        return [scope for scope, _ in self._open if Access(scope).takes("anybody")]

    def _closed(self) -> Iterator[Section]:
        """What refuses mail of other clients for domains that are kept here, where no listener takes it; where one does, the
        others are named."""
        scope, _ = self._open[0]
        if not self._open_to_all and self._routing.kept:
            origin = scope.origin(Access(scope).refusing("anybody"))
            rows = [Row("name", "other clients", origin), Row("clients", "unauthenticated"), Row("verdict", "reject")]
            yield Section(
                "[[mail_rule]]", [*rows, Row("reply", "550 5.7.1 Client host rejected: Access denied"), Row("enforce", True)]
            )
        for scope, name in self._open if self._open_to_all else ():
            if scope not in self._open_to_all:
                refusing = Access(scope).refusing("anybody")
                instead = "every listener takes mail for our own domains from all clients: let a firewall refuse them at this one"
                self._findings.gap(scope.place(refusing), f"{name}: {refusing} = {scope.text(refusing)}", instead)

    def _sub_domains(self) -> Iterator[str]:
        """Domains of relay_recipient_maps that are in relay_domains only by a domain above them."""
        for entry in maps_of(self._scope, self._files, "relay_recipient_maps").entries:
            domain = domain_of(entry.key.lower())
            if "@" in entry.key and domain and self._resolver.domain_kind(domain)[0] == "relay":
                yield domain

    def _note_below(self) -> None:
        members = self._resolver.relay_domains
        below = {name.lstrip("."): place for name, place in members.names() if members.parents or name.startswith(".")}
        if below:
            shown = ", ".join([*below][:3]) + (", ..." if len(below) > 3 else "")
            instead = "Postfix takes mail for what is below them, too: name such sub-domains in relay.domains, if there are some"
            self._findings.gap(next(iter(below.values())), f"relay_domains: {shown}", instead)

    def _recipients(self, domains: list[str]) -> Iterator[Row]:
        """relay.recipients: the file, with a line for all of a domain where not all of its recipients are known."""
        kinds = {domain: self._resolver.domain_kind(domain)[0] for domain in domains}
        known: dict[str, None] = {}
        for kind in dict.fromkeys(kinds.values()):
            within = [domain for domain in domains if kinds[domain] == kind]
            found = self._known(RECIPIENTS.get(kind, ""), within)
            known.update(dict.fromkeys(found if found is not None else [f"@{domain}" for domain in within]))
        if known.keys() >= {f"@{domain}" for domain in domains}:
            return
        text = "".join(f"{line}\n" for line in sorted(known, key=lambda one: (one.partition("@")[2], one)))
        path = self._beside.file("recipients", f"# valid recipients: {', '.join(RECIPIENTS.values())}\n{text}")
        name = next(name for name in RECIPIENTS.values() if self._scope.text(name))
        if not self._beside.has_folder:
            self._findings.gap(
                self._scope.place(name), f"{name} = {self._scope.text(name)}", f"import with --files DIR, which writes {path}"
            )
        instead = "clients that may relay are not asked for valid recipients: the host that the mail goes to refuses others"
        self._findings.note(self._scope.place(name), name, instead)
        yield Row("recipients", path, self._scope.origin(name))

    def _known(self, name: str, domains: list[str]) -> list[str] | None:
        """The recipients in some domains: those that a parameter names, and aliases; None where not all of them are known."""
        if name == "local_recipient_maps" and not self._scope.is_given(name):
            instead = f"mail for any address there is accepted ({', '.join(domains)}): write the valid ones into relay.recipients"
            self._findings.gap(self._scope.place("mydestination"), "mydestination: the users of that machine", instead)
            return None
        if not name or not self._scope.text(name):
            return None
        maps = maps_of(self._scope, self._files, name)
        odd = [one.spec for one in maps.flat() if not hasattr(one, "entries")]
        for domain in domains if odd else ():
            instead = f"mail for any address there is accepted (@{domain}): write the addresses into a file for relay.recipients"
            self._findings.gap(self._scope.place(name), f"{name} = ... {odd[0]}", instead)
        if odd:
            return None
        aliases = maps_of(self._scope, self._files, "virtual_alias_maps")
        keys, within = [entry.key.lower() for one in (maps, aliases) for entry in one.entries], set(domains)
        bare = (
            [f"{key}@{domain}" for key in keys if "@" not in key for domain in domains] if name == "local_recipient_maps" else []
        )
        return [key for key in (*keys, *bare) if "@" in key and domain_of(key) in within]
