"""The arguments of EHLO, MAIL, XCLIENT and XFORWARD."""

import contextlib
import ipaddress
import re
from collections.abc import Iterable

from relaymta.proto import reply
from relaymta.proto.address import parse_parameters

__all__ = ["XCLIENT", "XFORWARD", "attributes", "forwarded", "hello_name", "mail_parameters", "xforward"]

XCLIENT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
XFORWARD = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")
FORWARDED_MOST = 255  # octets of a value of XFORWARD
COMMAND_MOST = 510  # octets of a command without CRLF (RFC 5321 4.5.3.1.4)
UNAVAILABLE = "[UNAVAILABLE]"
SHORTENED = ("HELO", "NAME", "PROTO", "IDENT")  # the attributes without a form of their own; the last is what finds the message
_XTEXT = re.compile(r"\+([0-9A-Fa-f]{2})")
_HEX = re.compile(rb"[0-9A-Fa-f]{2}")


def hello_name(argument: bytes, lenient: bool = False) -> str | None:
    """The client's name in EHLO/HELO; None when it is missing or unprintable. `lenient`: it may have blanks in it (`my pc`), and
    as many octets as a line."""
    name = argument.strip()
    if lenient:
        name = b" ".join(name.split())
    if not name or (len(name) > 255 and not lenient) or (b" " in name and not lenient):
        return None
    text = name.decode("utf-8", "replace")
    return text if text.isprintable() else None


def attributes(argument: bytes) -> dict[str, str] | None:
    """XCLIENT's attributes, "" for unavailable ones; None: a syntax error."""
    found = {}
    for word in argument.split():
        name, equals, value = word.decode("utf-8", "replace").partition("=")
        if not equals or name.upper() not in XCLIENT:
            return None
        known = value.upper() not in ("[UNAVAILABLE]", "[TEMPUNAVAIL]")
        text = _XTEXT.sub(lambda match: chr(int(match[1], 16)), value) if known else ""
        if not text.isprintable():
            return None
        found[name.upper()] = text
    return found if argument else None


def forwarded(argument: bytes) -> dict[str, str] | None:
    """XFORWARD's attributes (https://www.postfix.org/XFORWARD_README.html), "" for unavailable ones; None: a syntax error. The
    address is as Python writes it, without `IPv6:`. Of NAME, HELO and IDENT, which are only shown, each character that is not
    printable is a "?"."""
    found = {}
    for word in argument.split():
        key, equals, value = word.partition(b"=")
        name, octets = key.upper().decode("ascii", "replace"), _from_xtext(value)
        if not equals or name not in XFORWARD or not octets or len(octets) > FORWARDED_MOST:
            return None
        text: str | None = octets.decode("utf-8", "replace")
        if octets.upper() in (b"[UNAVAILABLE]", b"[TEMPUNAVAIL]"):
            text = ""
        elif name == "ADDR":
            text = _address(octets)
        elif name == "PORT":
            text = text if octets.isdigit() and len(octets) <= 5 and int(octets) < 65536 else None
        elif name in ("PROTO", "SOURCE"):
            text = octets.upper().decode("ascii", "replace")
            known = ("LOCAL", "REMOTE")
            text = text if text in known or (name == "PROTO" and text.isascii() and text.isalnum()) else None
        if text is None:
            return None
        found[name] = "".join(one if one.isprintable() else "?" for one in text)
    return found or None


def xforward(values: dict[str, str], offered: Iterable[str]) -> str:
    """The XFORWARD command that says these attributes ("": unavailable), of those that a peer offers; "" where there are none.
    Long values are cut, in the order of SHORTENED, so that it is no longer than a command may be."""
    parts = {name: f"{name}={_to_xtext(value, FORWARDED_MOST)}" for name, value in values.items() if name in offered}
    if not parts:
        return ""
    beyond = len("XFORWARD") + sum(len(part) + 1 for part in parts.values()) - COMMAND_MOST
    for name in SHORTENED:
        if beyond > 0 and name in parts:
            whole = len(parts[name])
            most = max(whole - len(name) - 1 - beyond, len(UNAVAILABLE))
            parts[name] = f"{name}={_to_xtext(values[name], most)}"
            beyond -= whole - len(parts[name])
    return f"XFORWARD {' '.join(parts.values())}"


def _from_xtext(value: bytes) -> bytes | None:
    """What xtext (RFC 3461 4) stands for; None: it is none. Characters that should be encoded are taken as they are."""
    found, *encoded = value.split(b"+")
    pieces = [found]
    for part in encoded:
        if not _HEX.match(part):
            return None
        pieces += [bytes([int(part[:2], 16)]), part[2:]]
    return b"".join(pieces)


def _to_xtext(text: str, most: int) -> str:
    """The beginning of a text as xtext of `most` octets at most; "[UNAVAILABLE]" for ""."""
    pieces, octets = list[str](), 0
    for one in text:
        codes = one.encode("utf-8", "replace")
        piece = "".join(chr(code) if 33 <= code <= 126 and code not in b"+=" else f"+{code:02X}" for code in codes)
        octets += len(piece)
        if octets > most:
            break
        pieces.append(piece)
    return "".join(pieces) or UNAVAILABLE


def _address(octets: bytes) -> str | None:
    """An IP address, of which one of IPv6 may begin with `IPv6:`, and an IPv4-mapped one is of IPv4; None: it is none."""
    text = octets.decode("ascii", "replace").partition("%")[0]
    with contextlib.suppress(ValueError):
        found = ipaddress.IPv6Address(text[5:]) if text[:5].upper() == "IPV6:" else ipaddress.ip_address(text)
        return str((found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found)
    return None


def mail_parameters(text: str) -> tuple[int, bool] | bytes:
    """(announced size, SMTPUTF8) of MAIL's parameters, or the reply that refuses them."""
    found = parse_parameters(text)
    if found is None:
        return reply.BAD_PARAMETER
    size, smtputf8 = 0, False
    for keyword, value in found.items():
        if keyword == "SIZE" and value.isascii() and value.isdigit() and len(value) <= 20:
            size = int(value)
        elif keyword == "BODY" and value.upper() in ("7BIT", "8BITMIME"):
            pass
        elif keyword == "SMTPUTF8" and not value:
            smtputf8 = True
        elif keyword == "AUTH" and value:
            pass  # the original submitter (RFC 4954 5), also where AUTH is not offered: ignored, clients are not trusted with it
        elif keyword in ("SIZE", "BODY", "SMTPUTF8"):
            return reply.BAD_PARAMETER
        else:
            return reply.UNKNOWN_PARAMETER
    return size, smtputf8
