"""Configurations of Postfix drawn from a seed, about everything that decides where mail goes."""

from pathlib import Path
from random import Random

__all__ = ["make"]

DOMAINS = [
    "a.example", "b.example", "sub.a.example", "deep.sub.a.example", "c.example", "host.corp.example", "corp.example",
    "x.c.example",
]  # fmt: skip
USERS = ["ann", "bob", "ann+x", "carl"]
HOPS = ["[h1.example]", "[h2.example]:2525", "[192.0.2.1]", "plain.example", "[h3.example], [h4.example]"]
CHANNELS = ["smtp", "relay", "alt", "lmtp", "local", "virtual", "error", "retry", "discard", "prog", "", ""]
EXPRESSIONS = [
    r"/@b\.example$/", "/^ann@/", r"/^bob@c\.example$/", r"/@(.*\.)?a\.example$/", "/^[a-b].*@c/", r"/\.example$/", "!/ann/",
    "/.*/", r"/\.a\.example$/",
]  # fmt: skip
MASTER = """\
smtp      inet  n       -       y       -       -       smtpd
rewrite   unix  -       -       y       -       -       trivial-rewrite
smtp      unix  -       -       y       -       -       smtp
relay     unix  -       -       y       -       -       smtp
error     unix  -       -       y       -       -       error
retry     unix  -       -       y       -       -       error
discard   unix  -       -       y       -       -       discard
local     unix  -       n       n       -       -       local
virtual   unix  -       n       n       -       -       virtual
lmtp      unix  -       -       y       -       -       lmtp
alt       unix  -       -       n       -       7       smtp
  -o smtp_bind_address=192.0.2.9
prog      unix  -       n       n       -       -       pipe
  flags=R user=x argv=/bin/x
"""
PLAIN = """\
myhostname = host.corp.example
mynetworks = 127.0.0.0/8
alias_maps =
inet_protocols = ipv4
smtputf8_enable = no
"""


def make(folder: Path, drawn: Random) -> None:
    """Write main.cf, master.cf, tables, and addresses to ask about."""
    folder.mkdir()
    made = _Drawing(folder, drawn)
    (folder / "main.cf").write_text(PLAIN + "".join(f"{line}\n" for line in made.lines()))
    (folder / "master.cf").write_text(MASTER)
    senders = [made.address(), "<>", made.address(), "ann@host.corp.example"]
    domains = [*DOMAINS, "elsewhere.example", "y.deep.sub.a.example", "q.b.example"]
    pairs = [(drawn.choice(senders), f"{drawn.choice(USERS)}@{drawn.choice(domains)}") for _ in range(25)]
    (folder / "addresses").write_text("".join(f"{sender} {recipient}\n" for sender, recipient in pairs))


class _Drawing:
    def __init__(self, folder: Path, drawn: Random) -> None:
        self._folder, self._drawn = folder, drawn

    def address(self) -> str:
        return f"{self._drawn.choice(USERS)}@{self._drawn.choice(DOMAINS)}"

    def _some(self, most: int, *more: str) -> list[str]:
        return self._drawn.sample([*DOMAINS, *more], self._drawn.randint(0, most))

    def _table(self, name: str, keys: list[str], values: list[str]) -> str:
        """Write a table, of which each key has one of the values; its type:name."""
        rows = {key: self._drawn.choice(values) for key in keys}
        (self._folder / name).write_text("".join(f"{key} {value}\n" for key, value in rows.items()))
        return f"hash:/etc/postfix/{name}"

    def _result(self) -> str:
        """A result of transport_maps."""
        channel = self._drawn.choice(CHANNELS)
        if channel in ("error", "retry"):
            return f"{channel}:{self._drawn.choice(['5.1.1 gone', 'no way', ''])}"
        if channel == "lmtp":
            return "lmtp:" + self._drawn.choice(["unix:/run/l", "inet:[l.example]:24", "[l2.example]"])
        return f"{channel}:" + ("" if channel in ("local", "virtual", "discard", "prog") else self._drawn.choice([*HOPS, "", ""]))

    def lines(self) -> list[str]:
        """The lines of main.cf, each of which may be missing."""
        drawn, choice = self._drawn, self._drawn.choice
        senders = [
            self.address(),
            self.address(),
            *(f"@{domain}" for domain in self._some(2)),
            choice(["<>", "ann", "@x.example"]),
        ]
        aliases = [self.address(), *(f"@{domain}" for domain in self._some(1)), choice(["bob", "carl@corp.example"])]
        targets = [self.address(), f"{self.address()}, {self.address()}"]
        transports = ["alt:", "alt:[s.example]", "relay"]
        parents = ["", "relay_domains", "transport_maps", "relay_domains, transport_maps"]
        may = {
            f"mydestination = {', '.join([*self._some(2), 'localhost'])}": 0.7,
            f"relay_domains = {' '.join(self._some(3, '.c.example', '!x.c.example'))}": 0.6,
            f"parent_domain_matches_subdomains = {choice(parents)}": 0.3,
            f"virtual_mailbox_domains = {' '.join(self._some(2))}": 0.4,
            f"virtual_alias_domains = {' '.join(self._some(2))}": 0.4,
            f"relayhost = {choice(HOPS)}": 0.5,
            "recipient_delimiter = +": 0.3,
            f"virtual_transport = {choice(['lmtp:unix:/run/v', 'virtual', 'smtp:[v.example]'])}": 0.3,
            f"relay_transport = {choice(['relay', 'alt', 'smtp:[r.example]', 'error:no relay'])}": 0.3,
            f"default_transport = {choice(['smtp', 'alt:', 'smtp:[d.example]', 'error:nothing'])}": 0.3,
            f"local_transport = {choice(['local', 'error:no local', 'lmtp:unix:/run/x', 'smtp:[l.example]'])}": 0.3,
            f"transport_maps = {', '.join(self._transports())}": 0.7,
            f"sender_dependent_relayhost_maps = {self._table('relayhosts', senders, [*HOPS, 'DUNNO'])}": 0.4,
            f"sender_dependent_default_transport_maps = {self._table('transports', senders[:3], transports)}": 0.3,
            f"relocated_maps = {self._table('relocated', senders[1:3], ['new@x.example'])}": 0.3,
            f"virtual_alias_maps = {self._table('virtual', aliases, targets)}": 0.3,
            f"compatibility_level = {choice(['0', '2', '3.6'])}": 1,
        }  # fmt: skip
        return [line for line, share in may.items() if drawn.random() < share]

    def _transports(self) -> list[str]:
        """transport_maps: a table, and perhaps expressions before or behind it."""
        keys = [*self._some(4), *(f".{domain}" for domain in self._some(3)), self.address(), self.address(), "*"]
        self._drawn.shuffle(keys)
        maps = [self._table("transport", keys[: self._drawn.randint(1, len(keys))], [self._result() for _ in range(8)])]
        if self._drawn.random() < 0.5:
            rules = self._drawn.sample(EXPRESSIONS, self._drawn.randint(1, 3))
            (self._folder / "transport.pcre").write_text("".join(f"{rule} {self._result()}\n" for rule in rules))
            maps.insert(self._drawn.randint(0, 1), "pcre:/etc/postfix/transport.pcre")
        return maps
