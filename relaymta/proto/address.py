"""Mail addresses in SMTP paths (RFC 5321 4.1.2, RFC 6531 3.3), domains and address literals."""

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from unicodedata import normalize

__all__ = [
    "LONGEST_LOCAL", "DomainError", "comparable", "compared", "domain_matches", "domain_of", "domain_of_host", "in_a_labels",
    "in_dns", "in_u_labels", "is_host", "mail_argument", "normalize_domain", "parse_parameters", "plain", "quoted_if_needed",
    "rcpt_argument", "same_host",
]  # fmt: skip

# Octets of a local part after unquoting, the same in every spelling. RFC 5321 4.5.3.1.1 has 64 as the least that must be
# accepted; real ones (VERP) are longer, and Postfix has no limit.
LONGEST_LOCAL = 256
_LONGEST_DOMAIN = 255
_LONGEST_PATH = 1024  # characters of all spellings that are read
_COMMON_MOST = LONGEST_LOCAL + len(b"FROM:<")  # octets of an argument in which no local part can be too long

_ATOM = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = rb"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_COMMON = _ATOM + rb"(?:\." + _ATOM + rb")*@" + _LABEL + rb"(?:\." + _LABEL + rb")*"
# The common forms, in one match: nothing to unquote, nothing to strip.
_MAIL = re.compile(rb"(?i:FROM):<(" + _COMMON + rb"|)>(?: +(.*))?\Z", re.S)
_RCPT = re.compile(rb"(?i:TO):<(" + _COMMON + rb")>(?: +(.*))?\Z", re.S)
_PLAIN = re.compile(_COMMON.decode() + r"\Z")

_PREFIX = {
    b"FROM": re.compile(rb"[ \t]*(?i:FROM):[ \t]*(.*)\Z", re.S),
    b"TO": re.compile(rb"[ \t]*(?i:TO):[ \t]*(.*)\Z", re.S),
}
_STRING = r'"(?>(?:[^"\\]++|\\.)*)"'
_IN_BRACKETS = re.compile(rf'<((?>(?:[^">\\]++|\\.|{_STRING})*))>', re.S)
_WITHOUT = re.compile(rf'((?>(?:[^" \t\\]++|\\.|{_STRING})*))', re.S)
_BRACKETS, _SEMICOLONS = re.compile(">*+"), re.compile(";*+")  # what Postfix ignores behind a path, beside a comment
_IN_COMMENT = re.compile(r"(?>(?:[^()\\\x00-\x1f\x7f]++|\\[\x20-\x7e])+)|(?P<open>\()|(?P<close>\))")
_ATEXT = r"[^\x00-\x20()<>@,;:\\\"\[\].\x7f]"
_TOKEN = re.compile(
    rf"(?P<none>[ \t]++)|(?P<comment>\()|(?P<word>(?>(?:{_ATEXT}|\.|\\[\x20-\x7e])+))|(?P<special>[@,:])"
    r'|"(?P<quoted>(?>(?:[^\x00-\x1f"\\\x7f]++|\\[\x20-\x7e])*))"|(?P<literal>\[[^\x00-\x20\[\]\\\x7f]*+\])'
)
_QUOTED_PAIR = re.compile(r"\\(.)", re.S)
_DOT_ATOM = re.compile(rf"{_ATEXT}++(?>(?:\.{_ATEXT}++)*)\Z")
_HOST_AND_PORT = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::([0-9]+))?\Z")
_ROUTED = re.compile("[%!@]")
_KEYWORD = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([\x21-\x3c\x3e-\x7e\u0080-\U0010ffff]+))?\Z")


class DomainError(ValueError):
    """An invalid domain name, which cannot be looked up in the DNS."""


def mail_argument(argument: bytes, domain: str = "") -> tuple[str, str] | None:
    """`FROM:<path> parameters` as (address, parameters); "" is the null sender. None: a syntax error. The address is in the one
    form that all of its spellings have in common: see `plain`. `domain`: completes one that has none; "": that is an error."""
    match = _MAIL.match(argument)
    if match is not None and len(argument) <= _COMMON_MOST:
        return match[1].decode(), (match[2] or b"").decode("utf-8", "surrogateescape")
    return _general(argument, b"FROM", domain)


def rcpt_argument(argument: bytes, domain: str = "") -> tuple[str, str] | None:
    """`TO:<path> parameters` as (address, parameters), as `mail_argument`. `postmaster` is returned without a domain (RFC 5321
    4.5.1), however it is written."""
    match = _RCPT.match(argument)
    if match is not None and len(argument) <= _COMMON_MOST:
        return match[1].decode(), (match[2] or b"").decode("utf-8", "surrogateescape")
    found = _general(argument, b"TO", domain)
    return None if found is None or not found[0] else found


def _general(argument: bytes, word: bytes, domain: str) -> tuple[str, str] | None:
    """The forms beyond the common one: quoted local parts, literals, source routes, UTF-8; and those that Postfix accepts, too:
    missing brackets, white space and comments in the path."""
    match = _PREFIX[word].match(argument)
    if match is None:
        return None
    try:
        rest = match[1].decode()
    except UnicodeDecodeError:
        return None
    found = (_IN_BRACKETS if rest.startswith("<") else _WITHOUT).match(rest)
    if found is None:
        return None
    path, end = found[1], found.end()
    if rest.startswith("<"):
        if path.startswith("<") and rest.startswith(">", end):  # <<a@b>>
            path = path[1:]
        end = _behind_path(rest, end)
    elif not path:
        return None
    parameters = rest[end:]
    if parameters and parameters[0] not in " \t":
        return None
    read = _read(path if rest.startswith("<") else path.rstrip(">;"))
    if read is None:
        return None
    local, own = read
    if not own and local and not (word == b"TO" and local.lower() == "postmaster"):
        if not domain or _ROUTED.search(local):
            return None
        own = domain
    return f"{local}@{own}" if own else local, parameters.strip(" \t")


def _behind_path(rest: str, at: int) -> int:
    """The index behind what Postfix ignores behind a path: further brackets, a comment, semicolons."""
    brackets = _BRACKETS.match(rest, at)
    at = brackets.end() if brackets is not None else at
    if rest.startswith("(", at):
        end = _behind_comment(rest, at)
        at = end if end >= 0 else at
    semicolons = _SEMICOLONS.match(rest, at)
    return semicolons.end() if semicolons is not None else at


def plain(address: str) -> str | None:
    """The one form of an address (RFC 5321 4.1.2 and, as in RFC 5322 4.4, with white space, comments and a route in it): the
    local part quoted only where that is necessary, no dot behind the domain. None: no address, or more than 1024 characters."""
    if len(address) <= LONGEST_LOCAL and _PLAIN.match(address):
        return address
    try:
        found = _read(address)
    except UnicodeError:  # lone surrogates: octets that are not UTF-8
        return None
    return f"{found[0]}@{found[1]}" if found is not None and found[1] else None


@lru_cache(256)
def comparable(address: str) -> str:
    """An address, "@domain", "domain" or ".domain" of a configuration in the form in which addresses are compared: as `compared`,
    of `plain`."""
    return compared(address.rstrip(".") if address.startswith("@") else plain(address) or address)


def compared(address: str) -> str:
    """An address of an envelope in the form in which addresses are compared: lower case, the domain as `in_a_labels`, the local
    part in NFC (RFC 6532 3.1): however it is written, it is of one mailbox."""
    address = address.lower()
    if address.isascii():
        return address
    local, at, domain = address.rpartition("@")
    dot = "." * domain.startswith(".")
    return f"{normalize('NFC', local)}{at}{dot}{in_a_labels(domain.removeprefix('.'))}"


def quoted_if_needed(local: str) -> str:
    """A local part as it is sent: quoted unless it is a dot-atom."""
    if _DOT_ATOM.match(local):
        return local
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _read(path: str) -> tuple[str, str] | None:
    """(local part as it is sent, domain) of the address in a path; "" for a missing domain, ("", "") for an empty path. None: a
    syntax error."""
    tokens = _tokens(path) if len(path) <= _LONGEST_PATH else None
    if tokens is None:
        return None
    at = _behind_routes(tokens)
    ats = [number for number in range(at, len(tokens)) if tokens[number] == ("special", "@")]
    if len(ats) > 1 or at < 0:
        return None
    end = ats[0] if ats else len(tokens)
    local = _joined(tokens[at:end])
    if local is None or len(local.encode()) > LONGEST_LOCAL:
        return None
    if not ats:
        return quoted_if_needed(local) if local else "", ""
    domain = _domain(tokens[end + 1 :])
    return None if not domain or end == at else (quoted_if_needed(local), domain)


def _tokens(path: str) -> list[tuple[str, str]] | None:
    """(kind, text) of the tokens of a path, quoted strings unquoted, without white space and comments. None: a syntax error."""
    found = []
    at = 0
    while at < len(path):
        match = _TOKEN.match(path, at)
        if match is None:
            return None
        at, kind = match.end(), match.lastgroup or ""
        if kind == "comment":
            at = _behind_comment(path, match.start())
            if at < 0:
                return None
        elif kind != "none":
            text = match[kind]
            found.append((kind, _QUOTED_PAIR.sub(r"\1", text) if kind in ("quoted", "word") else text))
    return found


def _behind_comment(path: str, at: int) -> int:
    """The index behind the comment that begins at `at`, with those within it (RFC 5322 3.2.2); -1: it does not end."""
    depth = 0
    while (match := _IN_COMMENT.match(path, at)) is not None:
        at = match.end()
        depth += (match.lastgroup == "open") - (match.lastgroup == "close")
        if not depth:
            return at
    return -1


def _behind_routes(tokens: list[tuple[str, str]]) -> int:
    """The index behind source routes (`@one,@two:`), which are accepted and ignored (RFC 5321 appendix C); -1: a syntax error."""
    at = 0
    while at < len(tokens) and tokens[at] == ("special", "@"):
        try:
            at = tokens.index(("special", ":"), at) + 1
        except ValueError:
            return -1
    return at


def _joined(tokens: list[tuple[str, str]]) -> str | None:
    """A local part: words with dots between them. Dots may be anywhere: it is quoted then, as Postfix does."""
    dot = True
    for kind, text in tokens:
        if kind not in ("word", "quoted") or not (dot or (kind == "word" and text.startswith("."))):
            return None
        dot = kind == "word" and text.endswith(".")
    return "".join(text for _, text in tokens)


def _domain(tokens: list[tuple[str, str]]) -> str | None:
    """A domain, without a dot behind it, or an address literal, its IPv6 address as of RFC 5952. None: it is neither."""
    if tokens and tokens[0][0] == "literal" and tokens[1:] in ([], [("word", ".")]):
        address = literal_address(tokens[0][1])
        return None if address is None else f"[IPv6:{address}]" if ":" in address else f"[{address}]"
    found = _joined(tokens)
    if found is None or any(kind != "word" for kind, _ in tokens):
        return None
    found = found.removesuffix(".")
    return found if len(found.encode()) <= _LONGEST_DOMAIN and _DOT_ATOM.match(found) else None


def literal_address(domain: str) -> str | None:
    """The IP address in an address literal (`[192.0.2.1]`, `[IPv6:2001:db8::1]`); None: not a literal (RFC 5321 4.1.3)."""
    if not (domain.startswith("[") and domain.endswith("]")):
        return None
    inner = domain[1:-1]
    try:
        if inner.lower().startswith("ipv6:"):
            return str(IPv6Address(inner[5:]))
        found = ip_address(inner)
    except ValueError:
        return None
    return str(found) if found.version == 4 else None


def domain_of(address: str) -> str:
    """The domain of an address in lower case and A-labels, without a trailing dot; "" for the null sender and `postmaster`."""
    return in_a_labels(address.rpartition("@")[2].rstrip(".")) if "@" in address else ""


_LABELS = re.compile(r"[^.]{1,63}(?:\.[^.]{1,63})*\Z")
_HOST_LABEL = re.compile(r"[a-z0-9_-]+\Z")


def normalize_domain(domain: str) -> str:
    """A domain in the form of the DNS: lower case A-labels (IDNA 2008, RFC 5890), no trailing dot. U-labels and A-labels of one
    domain have the same form. Labels of ASCII, such as `_spf`, are kept. DomainError for an invalid one."""
    domain = domain.rstrip(".").lower()
    if domain.isascii():
        if len(domain) > 253 or not _LABELS.match(domain):
            raise DomainError(domain)
        return domain
    if len(domain) > 253:  # A-labels are no shorter
        raise DomainError(domain)
    import idna

    try:
        labels = idna.uts46_remap(domain, False, False).rstrip(".").split(".")  # other full stops become dots (UTS 46 4)
        if max(map(len, labels)) > 63:  # as an A-label no character takes less than an octet, and the time is quadratic
            raise DomainError(domain)
        found = ".".join(label if _HOST_LABEL.match(label) else idna.alabel(label).decode("ascii") for label in labels)
    except idna.IDNAError as error:
        raise DomainError(domain) from error
    if len(found) > 253 or not _LABELS.match(found):
        raise DomainError(domain)
    return found


def in_a_labels(domain: str) -> str:
    """A domain in A-labels and lower case, for a comparison; what is none is in lower case only. U-labels and A-labels of a
    domain are equivalent (RFC 5890 2.3.2.4)."""
    return domain.lower() if domain.isascii() else _in_a_labels(domain)


@lru_cache(4096)
def _in_a_labels(domain: str) -> str:
    try:
        return normalize_domain(domain)
    except DomainError:
        return domain.lower()


def in_u_labels(domain: str) -> bool:
    """Whether a domain is written as an address has it (RFC 6531 3.3): in labels of ASCII and U-labels, not in what is mapped to
    them (fullwidth letters, other full stops)."""
    if domain.isascii():
        return True
    import idna

    try:
        return all(label.isascii() or idna.alabel(label) for label in domain.lower().rstrip(".").split("."))
    except idna.IDNAError:
        return False


_pattern = lru_cache(65536)(compared)


def domain_matches(domain: str, patterns: Iterable[str]) -> bool:
    """Whether a domain is one of `patterns`, or a subdomain of one that begins with a dot, in U-labels or A-labels."""
    domain = in_a_labels(domain)
    return any(domain == p.lstrip(".") or (p.startswith(".") and domain.endswith(p)) for p in map(_pattern, patterns))


_NAME = re.compile(r"(?>(?:[!-\-/-~ ]{1,63}+\.)*)[!-\-/-~ ]{1,63}+\Z")
_HOST = re.compile(r"(?>(?:[A-Za-z0-9_-]{1,63}+\.)+)(?![0-9]++\Z)[A-Za-z0-9_-]{1,63}+\Z")


def in_dns(name: str) -> bool:
    """Whether the DNS can have a name (RFC 1035 2.3.4: labels of 1 to 63 octets, 253 in all; RFC 2181 11: of any octets, of which
    only printable ASCII is meant here). One that it cannot have does not exist."""
    return len(name) <= 253 and _NAME.match(name) is not None


def same_host(name: str, host: str) -> bool:
    """Whether a name is that of a host, `host` (port 25), `host:port` or `[v6]:port`: with the port or without, in any case, in
    U-labels or A-labels."""
    (one, port), (other, its) = _host_and_port(name), _host_and_port(host)
    return in_a_labels(one) == in_a_labels(other) and port in ("", its or "25")


def _host_and_port(text: str) -> tuple[str, str]:
    match = _HOST_AND_PORT.match(text)
    return (match[1] or match[2], match[3] or "") if match is not None else (text, "")


def is_host(domain: str) -> bool:
    """Whether a host or mail domain can have a name: several labels of letters, digits, hyphens and underscores, the last not a
    number (RFC 1123 2.1). Address literals are none, nor are templates that were not filled in, such as `${domain}`."""
    return len(domain) <= 253 and _HOST.match(domain) is not None


def domain_of_host(hostname: str) -> str:
    """The domain of a host: of mail.example.org example.org, of example.org itself."""
    behind = hostname.partition(".")[2]
    return behind if "." in behind else hostname


def parse_parameters(text: str) -> dict[str, str] | None:
    """ESMTP parameters (RFC 5321 4.1.2) by upper-case keyword, "" for one without value; None: a syntax error. Of one that is
    repeated the last counts, as for Postfix."""
    found: dict[str, str] = {}
    for word in text.split():
        match = _KEYWORD.match(word)
        if match is None:
            return None
        found[match[1].upper()] = match[2] or ""
    return found
