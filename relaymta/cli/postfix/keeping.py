"""Mail that stays: users and aliases of the domains whose mail is kept here, as commands that make them.

Postfix has aliases for every address (virtual_alias_maps, canonical_maps); here they are for domains that are kept here alone.
"""

import re
import shlex
from typing import NamedTuple

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Place, logical_lines
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.maps import Entry, Maps
from relaymta.cli.postfix.resolving import Resolver, maps_of
from relaymta.cli.postfix.routing import Routing
from relaymta.proto.address import domain_of, plain

__all__ = ["Keeping"]

REWRITING = ("virtual_alias_maps", "canonical_maps", "recipient_canonical_maps")

HEAD = """\
#!/bin/sh
# The users and aliases of Postfix: run this once while the relay runs. Passwords: relaymta mailbox password ADDRESS
set -e
"""


class Alias(NamedTuple):
    """An address that leads to others."""

    targets: list[str]
    place: Place


class Keeping:
    """`aliases`, by address; `users`: those who need a mailbox."""

    def __init__(self, scope: Scope, files: Files, findings: Findings, resolver: Resolver, routing: Routing) -> None:
        self._scope, self._files, self._findings, self._resolver = scope, files, findings, resolver
        self._kept = routing.kept
        self.aliases: dict[str, Alias] = {}
        self.users: dict[str, Place] = {}
        self._folders: dict[str, str] = {}  # of users, with what they have
        for name in REWRITING:
            self._rewriting(name, maps_of(scope, files, name))
        self._local_aliases()
        self._mailboxes()
        for address, place in [(address, alias.place) for alias in self.aliases.values() for address in alias.targets]:
            if domain_of(address) in self._kept and not self._leads_on(address):
                self.users.setdefault(address, place)

    def _leads_on(self, address: str) -> bool:
        bare = self._resolver.without_extension(address)
        return any(one in self.aliases for one in (address, bare)) or bare in self.users

    # Aliases

    def _rewriting(self, name: str, maps: Maps) -> None:
        for one in maps.unreadable:
            instead = f"{one.why}: give domains that are kept here their aliases by `relaymta mailbox alias`"
            self._findings.way(one.place, f"{name} = {one.spec}", instead)
        for rule in maps.rules:
            self._findings.way(
                rule.place,
                f"{rule.text} {rule.value}",
                "aliases are addresses and @domain: name them by `relaymta mailbox alias`",
            )
        for entry in maps.entries:
            for key in self._keys(entry.key.lower(), name):
                self._alias(key, self._targets(entry.value), entry, name)

    def _keys(self, key: str, name: str) -> list[str]:
        """The addresses that a key of virtual(5) stands for; none where it only names a domain."""
        if "@" in key:
            return [key]
        if self._resolver.domain_kind(key)[0] == "alias" and "." in key:
            return []
        return [f"{key}@{domain}" for domain in self._resolver.local_domains]

    def _targets(self, value: str) -> list[str]:
        """The addresses of a result; those without a domain are in myorigin."""
        words = [word for word in re.split(r"[,\s]+", value) if word]
        return [word.lower() if "@" in word else f"{word}@{self._scope.text('myorigin')}".lower() for word in words]

    def _alias(self, key: str, targets: list[str], entry: Entry, name: str) -> None:
        what = f"{name}: {key} {entry.value}"
        if targets == [key]:
            return
        if key in targets:
            instead = "an alias cannot lead to itself: give the user a Sieve script with redirect :copy (`relaymta sieve`)"
            self._findings.way(entry.place, what, instead)
        elif domain_of(f"x{key}" if key.startswith("@") else key) not in self._kept:
            instead = "aliases are there for domains that are kept here alone: let the host behind do it, or keep the domain here"
            self._findings.way(entry.place, what, instead)
        elif any(target.startswith("@") or plain(target) is None for target in targets):
            self._findings.way(entry.place, what, "an alias leads to addresses: name each of them by `relaymta mailbox alias`")
        else:
            self.aliases.setdefault(key, Alias(targets, entry.place))

    def _local_aliases(self) -> None:
        """alias_maps: of the domains of mydestination, where local(8) delivers."""
        domains = [one for one in self._resolver.local_domains if one in self._kept]
        for spec in self._scope.words("alias_maps") if self._resolver.mydestination else ():
            kind, _, path = spec.removeprefix("proxy:").partition(":")
            place = self._scope.place("alias_maps")
            try:
                lines = (
                    logical_lines(self._files.text(path)) if kind in ("hash", "btree", "lmdb", "cdb", "dbm", "texthash") else None
                )
            except OSError as error:
                if self._scope.is_given("alias_maps"):
                    self._findings.gap(place, f"alias_maps = {spec}", f"{path}: {error.strerror}")
                continue
            if lines is None:
                if self._scope.is_given("alias_maps"):
                    self._findings.gap(
                        place, f"alias_maps = {spec}", "it is not read: make the aliases by `relaymta mailbox alias`"
                    )
                continue
            for line in lines:
                self._local_alias(line.text, Place(self._files.shown(path), line.number), domains)

    def _local_alias(self, text: str, place: Place, domains: list[str]) -> None:
        """A line of aliases(5), for the first of these domains; in the others its names lead there."""
        name, _, value = text.partition(":")
        name = name.strip().strip('"').lower()
        words = [word.strip() for word in re.findall(r'(?:"[^"]*"|[^,"])+', value) if word.strip()]
        odd = [word for word in words if re.match(r'"?[|/]|:include:|"?\s*\|', word)]
        if odd:
            instead = "programs, files and lists of addresses are no targets of an alias: name addresses, or filter by Sieve"
            self._findings.gap(place, text, instead)
        targets = [word for word in words if word not in odd and word.lower() != name]
        if not targets or not name:
            return
        if not domains:
            local = [one for one in self._resolver.local_domains if self._resolver.domain_kind(one)[0] == "local"]
            if local:
                instead = f"mail of {local[0]} is not kept here, so it has no aliases: let the host behind do it"
                self._findings.way(place, text, instead)
            return
        first, *others = domains
        each = [word.lower() if "@" in word else f"{word.lower()}@{first}" for word in targets]
        self.aliases.setdefault(f"{name}@{first}", Alias(each, place))
        for local in dict.fromkeys([name, *(word.lower() for word in targets if "@" not in word)]):
            for domain in others:
                self.aliases.setdefault(f"{local}@{domain}", Alias([f"{local}@{first}"], place))

    # Users

    def _mailboxes(self) -> None:
        """virtual_mailbox_maps: users; and what is not known of them."""
        name = "virtual_mailbox_maps"
        maps = maps_of(self._scope, self._files, name)
        virtual = [domain for domain in sorted(self._kept) if self._resolver.domain_kind(domain)[0] == "virtual"]
        for one in maps.unreadable if virtual else ():
            self._findings.gap(one.place, f"{name} = {one.spec}", f"{one.why}: make the users by `relaymta mailbox create`")
        for entry in maps.entries:
            key = entry.key.lower()
            if key.startswith("@") and domain_of(f"x{key}") in self._kept:
                instead = f"a catch-all leads to a user: `relaymta mailbox alias {key} ADDRESS`"
                self._findings.gap(entry.place, f"{name}: {entry.key} {entry.value}", instead)
            elif "@" in key and domain_of(key) in self._kept and plain(key) is not None:
                self.users.setdefault(key, entry.place)
                self._folders[key] = f" {self._scope.text('virtual_mailbox_base').rstrip('/')}/{entry.value.lstrip('/')}"
        local = [domain for domain in sorted(self._kept) if self._resolver.domain_kind(domain)[0] == "local"]
        if local:
            instead = "the accounts of that machine are no users here: make those who get mail by `relaymta mailbox create`"
            self._findings.gap(self._resolver.scope.place("mydestination"), f"mydestination: {', '.join(local)}", instead)

    # Commands

    def commands(self) -> str:
        """A script that makes them: users first, then each alias behind those that it leads to. "": there are none."""
        users = {self._resolver.without_extension(user): place for user, place in self.users.items() if user not in self.aliases}
        lines = [_line(["create", user], f"{place}{self._folders.get(user, '')}") for user, place in users.items()]
        aliases = {address: self.aliases[address] for address in self._ordered()}
        lines += [_line(["alias", address, *alias.targets], str(alias.place)) for address, alias in aliases.items()]
        return HEAD + "".join(lines) if lines else ""

    def _ordered(self) -> list[str]:
        """The aliases, each behind those that it leads to, but for circles."""
        found, seen = dict[str, None](), set[str]()
        waiting = list(reversed(self.aliases))
        while waiting:
            address = waiting[-1]
            if address in seen:
                waiting.pop()
                found[address] = None  # again, where it is there
                continue
            seen.add(address)
            waiting += [one for one in reversed(self.aliases[address].targets) if one in self.aliases and one not in seen]
        return list(found)

    def places(self) -> list[Place]:
        """The lines that the commands come from."""
        return sorted({*self.users.values(), *(alias.place for alias in self.aliases.values())})


def _line(words: list[str], comment: str) -> str:
    options_end = ["--"] if any(word.startswith("-") for word in words) else []
    return f"relaymta mailbox {shlex.join([words[0], *options_end, *words[1:]])}  # {comment}\n"
