"""Mail addresses in SMTP paths (RFC 5321 4.1.2, RFC 6531 3.3), domains and address literals."""

import re
from ipaddress import IPv6Address, ip_address

__all__ = [
    "DomainError", "domain_of", "in_a_labels", "in_dns", "is_host", "mail_argument", "normalize_domain", "parse_parameters",
    "rcpt_argument",
]  # fmt: skip

_ATOM = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = rb"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_COMMON = _ATOM + rb"(?:\." + _ATOM + rb")*@" + _LABEL + rb"(?:\." + _LABEL + rb")*"
# The common forms, in one match: nothing to unquote, nothing to strip.
_MAIL = re.compile(rb"(?i:FROM):<(" + _COMMON + rb"|)>(?: +(.*))?\Z", re.S)
_RCPT = re.compile(rb"(?i:TO):<(" + _COMMON + rb")>(?: +(.*))?\Z", re.S)

_PREFIX = {b"FROM": re.compile(rb"(?i:FROM):[ \t]*(.*)\Z", re.S), b"TO": re.compile(rb"(?i:TO):[ \t]*(.*)\Z", re.S)}
_ROUTE = re.compile(r"@[^:<>@\s,]+(?:,@[^:<>@\s,]+)*:")  # source route: accepted and ignored (RFC 5321 appendix C)
_DOTTED = re.compile(r"[^\x00-\x20()<>@,;:\\\"\[\].\x7f]+(?:\.[^\x00-\x20()<>@,;:\\\"\[\].\x7f]+)*\Z")
_QUOTED = re.compile(r'"(?:[^\x00-\x1f"\\\x7f]|\\[\x20-\x7e])*"\Z')
_DOMAIN = re.compile(r"[^\x00-\x20()<>@,;:\\\"\[\].\x7f]+(?:\.[^\x00-\x20()<>@,;:\\\"\[\].\x7f]+)*\.?\Z")
_KEYWORD = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([\x21-\x3c\x3e-\x7e\u0080-\U0010ffff]+))?\Z")


class DomainError(ValueError):
    """An invalid domain name, which cannot be looked up in the DNS."""


def mail_argument(argument: bytes) -> tuple[str, str] | None:
    """`FROM:<path> parameters` as (address, parameters); "" is the null sender. None: a syntax error."""
    match = _MAIL.match(argument)
    if match is not None and len(argument) < 320:
        return match[1].decode(), (match[2] or b"").decode("utf-8", "surrogateescape")
    return _general(argument, b"FROM")


def rcpt_argument(argument: bytes) -> tuple[str, str] | None:
    """`TO:<path> parameters` as (address, parameters); `<postmaster>` needs no domain. None: a syntax error."""
    match = _RCPT.match(argument)
    if match is not None and len(argument) < 320:
        return match[1].decode(), (match[2] or b"").decode("utf-8", "surrogateescape")
    found = _general(argument, b"TO")
    return None if found is None or not found[0] else found


def _general(argument: bytes, word: bytes) -> tuple[str, str] | None:
    """The forms beyond the common one: quoted local parts, literals, source routes, UTF-8, missing brackets."""
    match = _PREFIX[word].match(argument)
    if match is None:
        return None
    try:
        rest = match[1].decode()
    except UnicodeDecodeError:
        return None
    if rest.startswith("<"):
        end = _closing(rest)
        if end < 0:
            return None
        path, parameters = rest[1:end], rest[end + 1 :]
        if parameters and parameters[0] not in " \t":
            return None
    else:
        path, _, parameters = rest.partition(" ")
    path = _ROUTE.sub("", path, count=1) if path.startswith("@") else path
    if path == "" and word == b"FROM" and rest.startswith("<"):
        return "", parameters.strip(" \t")
    if path.lower() == "postmaster" and word == b"TO":
        return path, parameters.strip(" \t")
    return (path, parameters.strip(" \t")) if _valid(path) else None


def _closing(text: str) -> int:
    """The index of the `>` that closes a leading `<`, quoted strings skipped; -1 when there is none."""
    quoted = False
    i = 1
    while i < len(text):
        char = text[i]
        if quoted and char == "\\":
            i += 1
        elif char == '"':
            quoted = not quoted
        elif char == ">" and not quoted:
            return i
        i += 1
    return -1


def _valid(address: str) -> bool:
    local, at, domain = address.rpartition("@")
    if not at or not 0 < len(local.encode()) <= 64 or len(domain.encode()) > 255:
        return False
    if not (_DOTTED.match(local) or _QUOTED.match(local)):
        return False
    if domain.startswith("["):
        return literal_address(domain) is not None
    return _DOMAIN.match(domain) is not None


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
    """The domain of an address, lower case, without a trailing dot; "" for the null sender and `postmaster`."""
    return address.rpartition("@")[2].lower().rstrip(".") if "@" in address else ""


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
        found = ".".join(label if _HOST_LABEL.match(label) else idna.alabel(label).decode("ascii") for label in labels)
    except idna.IDNAError as error:
        raise DomainError(domain) from error
    if len(found) > 253 or not _LABELS.match(found):
        raise DomainError(domain)
    return found


def in_a_labels(domain: str) -> str:
    """A domain in A-labels and lower case, for a comparison; what is none is in lower case only."""
    if not domain.isascii():
        try:
            return normalize_domain(domain)
        except DomainError:
            pass
    return domain.lower()


_NAME = re.compile(r"(?:[!-\-/-~ ]{1,63}+\.)*+[!-\-/-~ ]{1,63}+\Z")
_HOST = re.compile(r"(?:[A-Za-z0-9_-]{1,63}+\.)++(?![0-9]++\Z)[A-Za-z0-9_-]{1,63}+\Z")


def in_dns(name: str) -> bool:
    """Whether the DNS can have a name (RFC 1035 2.3.4: labels of 1 to 63 octets, 253 in all; RFC 2181 11: of any octets, of which
    only printable ASCII is meant here). One that it cannot have does not exist."""
    return len(name) <= 253 and _NAME.match(name) is not None


def is_host(domain: str) -> bool:
    """Whether a host or mail domain can have a name: several labels of letters, digits, hyphens and underscores, the last not a
    number (RFC 1123 2.1). Address literals are none, nor are templates that were not filled in, such as `${domain}`."""
    return len(domain) <= 253 and _HOST.match(domain) is not None


def parse_parameters(text: str) -> dict[str, str] | None:
    """ESMTP parameters (RFC 5321 4.1.2) by upper-case keyword, "" for one without value; None: a syntax error."""
    found: dict[str, str] = {}
    for word in text.split():
        match = _KEYWORD.match(word)
        if match is None or match[1].upper() in found:
            return None
        found[match[1].upper()] = match[2] or ""
    return found
