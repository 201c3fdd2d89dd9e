"""Clients: mynetworks and lists like it, as networks of ours."""

import ipaddress
from typing import NamedTuple

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin, Place
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.maps import Indexed
from relaymta.cli.postfix.maps import Networks as NetworkTable
from relaymta.cli.postfix.match_lists import Item, read_list
from relaymta.cli.postfix.toml_text import Row, Section

__all__ = ["Networks"]

LOOPBACK = ["127.0.0.0/8", "::1/128"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# What to do about what could not be read, by parameter.
_INSTEAD = {"mynetworks": "name the networks that are meant in relay.networks"}
_OF_CLIENTS = "clients are told by their networks alone: name these in the [[network]]"


class Member(NamedTuple):
    """A network of a list. `excluded`: its clients are not meant."""

    network: Network
    excluded: bool
    origin: Origin


class Networks:
    """The networks of a list of clients. The first that has a client decides; those that are never reached are left out."""

    def __init__(self, members: list[Member]) -> None:
        self._members = members

    @classmethod
    def read(cls, scope: Scope, files: Files, findings: Findings, name: str = "mynetworks") -> "Networks":
        """The networks of a parameter; of mynetworks, where it is not given, those of mynetworks_style."""
        if name == "mynetworks" and not scope.is_given(name):
            return cls.by_style(scope, findings)
        reading = _Reading(name, findings)
        for item in read_list(files, scope.text(name), scope.place(name)).items:
            if not reading.add(item):
                break
        return cls(reading.members)

    @classmethod
    def by_style(cls, scope: Scope, findings: Findings) -> "Networks":
        """What mynetworks_style means."""
        style, origin = scope.text("mynetworks_style"), scope.origin("mynetworks_style")
        place = origin.place if origin.place.line else Place("main.cf", 0)
        if style != "host":
            instead = "these are the networks of that machine: name them in relay.networks (`postconf mynetworks` shows them)"
            findings.gap(place, f"mynetworks_style = {style}, and no mynetworks", instead)
        return cls([Member(ipaddress.ip_network(text), False, origin) for text in LOOPBACK])

    def __bool__(self) -> bool:
        return any(not member.excluded for member in self._members)

    @property
    def inside(self) -> list[str]:
        """Those whose clients are meant."""
        return [str(member.network) for member in self._members if not member.excluded]

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The line of each of these."""
        return tuple(member.origin for member in self._members if not member.excluded)

    def exceptions(self) -> "list[Networks]":
        """What has to be decided before `inside` is looked at, in this order: networks that are excluded, and those within them
        that are not. Each has members of one kind."""
        excluded = _Known()
        chosen = list[Member]()
        for member in reversed(self._members):
            if member.excluded or excluded.have(member.network):
                chosen.append(member)
            if member.excluded:
                excluded.add(member.network)
        found = list[Networks]()
        for member in reversed(chosen):
            if not found or found[-1].excluded != member.excluded:
                found.append(Networks([]))
            found[-1]._members.append(member)
        return found

    @property
    def names(self) -> list[str]:
        """All of them, as text."""
        return [str(member.network) for member in self._members]

    @property
    def excluded(self) -> bool:
        """Of exceptions: whether their clients are not meant."""
        return self._members[0].excluded

    def as_exception(self) -> Section:
        """The [[network]] of an exception."""
        origins = tuple(member.origin for member in self._members)
        return Section("[[network]]", [Row("networks", self.names, origins=origins), Row("relay", not self.excluded)])

    def within(self, others: "list[Networks]") -> "Networks":
        """Those that are in all of the other lists, too, as they are written."""
        each = [{(member.network, member.excluded) for member in other._members} for other in others]
        excluded = dict.fromkeys(member for other in others for member in other._members if member.excluded)
        inside = [one for one in self._members if not one.excluded and all((one.network, False) in every for every in each)]
        return Networks([*excluded, *inside]) if len({frozenset(every) for every in each}) > 1 else self


class _Known:
    """Networks, and whether another one is within one of them."""

    def __init__(self) -> None:
        self._by_length: dict[tuple[int, int], set[int]] = {}

    def add(self, network: Network) -> None:
        host_bits = network.max_prefixlen - network.prefixlen
        self._by_length.setdefault((network.version, network.prefixlen), set()).add(int(network.network_address) >> host_bits)

    def have(self, network: Network) -> bool:
        address = int(network.network_address)
        return any(
            version == network.version and length <= network.prefixlen and address >> (network.max_prefixlen - length) in known
            for (version, length), known in self._by_length.items()
        )


class _Reading:
    """A list on its way. `members`: what is read so far."""

    def __init__(self, name: str, findings: Findings) -> None:
        self._name, self._findings, self._known = name, findings, _Known()
        self.members: list[Member] = []
        self._unclear = False  # something of the item was not understood

    def _gap(self, place: Place, what: str, why: str) -> None:
        self._unclear = True
        self._findings.gap(place, what, f"{why}: {_INSTEAD.get(self._name, _OF_CLIENTS)}")

    def add(self, item: Item) -> bool:
        """Add an item; False: it excludes clients that are not known, so nothing behind it may be taken."""
        self._unclear = False
        if item.table is None:
            self._put(item.pattern, item.negated, Origin(item.place, self._name))
        elif isinstance(item.table, NetworkTable):
            for network, negated, entry in item.table.rows:
                if network is None or negated:
                    self._gap(entry.place, entry.key, f"this row of {item.table.spec} is not understood")
                else:
                    self._put(network, item.negated, Origin(entry.place))
        elif isinstance(item.table, Indexed):
            for entry in item.table.entries:
                if "/" in entry.key:
                    self._gap(entry.place, entry.key, "addresses alone are looked up in such a table, so Postfix never finds it")
                else:
                    self._put(entry.key, item.negated, Origin(entry.place))
        else:
            self._gap(item.place, f"{self._name} = ... {item.pattern}", "its clients are not known here")
        if not (item.negated and self._unclear):
            return True
        self._gap(
            item.place, f"{self._name} = ... !{item.pattern} ...", "what is behind it is left out, since it may be excluded"
        )
        return False

    def _put(self, pattern: str, negated: bool, origin: Origin) -> None:
        try:
            network: Network = ipaddress.ip_network(pattern.replace("[", "").replace("]", ""))
        except ValueError:
            self._gap(origin.place, f"{origin.name} {pattern}".strip(), "it is no network")
            return
        if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
            mapped = ipaddress.ip_network((network.network_address.ipv4_mapped, network.prefixlen - 96))
            if not self._known.have(mapped):
                instead = "Postfix finds no client by such a network, since it knows IPv4 clients by their IPv4 addresses"
                self._findings.note(origin.place, f"{self._name}: {pattern}", instead)
            return
        if not self._known.have(network):  # else one before it decides
            self._known.add(network)
            self.members.append(Member(network, negated, origin))
