"""The arguments of EHLO, MAIL and XCLIENT."""

import re

from relaymta.proto import reply
from relaymta.proto.address import parse_parameters

__all__ = ["XCLIENT", "attributes", "hello_name", "mail_parameters"]

XCLIENT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
_XTEXT = re.compile(r"\+([0-9A-Fa-f]{2})")


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
