"""The responses of the ManageSieve server (RFC 5804 1.2, 1.3), as octets, CRLF included."""

from base64 import b64encode

__all__ = ["bye", "challenge", "literal", "no", "of_login", "ok", "string"]

QUOTED_MOST = 1024  # octets of a quoted string (RFC 5804 4)


def string(text: str | bytes) -> bytes:
    """A string: quoted, or where it cannot be, a literal."""
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    quoted = raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return literal(raw) if len(quoted) > QUOTED_MOST or any(octet in raw for octet in b"\r\n\0") else b'"%b"' % quoted


def literal(raw: bytes) -> bytes:
    """A literal, as the server sends it (RFC 5804 1.2)."""
    return b"{%d}\r\n%b" % (len(raw), raw)


def _response(word: bytes, text: str, code: bytes) -> bytes:
    parts = [word, *([b"(%b)" % code] if code else []), *([string(text)] if text else [])]
    return b" ".join(parts) + b"\r\n"


def ok(text: str = "", code: bytes = b"") -> bytes:
    """A positive response; `code`: a response code, without its parentheses."""
    return _response(b"OK", text, code)


def no(text: str, code: bytes = b"") -> bytes:
    """A negative response."""
    return _response(b"NO", text, code)


def bye(text: str, code: bytes = b"") -> bytes:
    """The server closes the connection."""
    return _response(b"BYE", text, code)


def challenge(encoded: str) -> bytes:
    """A challenge of SASL, in base64."""
    return string(encoded) + b"\r\n"


def final(data: bytes) -> bytes:
    """A login is accepted, with what the mechanism proves thereby to the client (RFC 5804 1.3, SASL)."""
    return ok("Logged in", b"SASL " + string(b64encode(data)))


def of_login(answer: bytes) -> bytes:
    """What ManageSieve says where SMTP's AUTH has the reply `answer` (RFC 4954 4, 6): 334 is a challenge, 4xx TRYLATER, 538
    ENCRYPT-NEEDED, 534 AUTH-TOO-WEAK."""
    code, _, rest = answer.decode("utf-8", "replace").strip("\r\n").partition(" ")
    if code == "334":
        return challenge(rest)
    text = rest.partition(" ")[2]  # behind the enhanced code
    if code.startswith("2"):
        return ok(text)
    return no(text, TRYLATER if code.startswith("4") else _OF_LOGIN.get(code, b""))


NONEXISTENT, ACTIVE, ALREADYEXISTS, TRYLATER = b"NONEXISTENT", b"ACTIVE", b"ALREADYEXISTS", b"TRYLATER"
MAXSCRIPTS, MAXSIZE, ENCRYPT_NEEDED = b"QUOTA/MAXSCRIPTS", b"QUOTA/MAXSIZE", b"ENCRYPT-NEEDED"
_OF_LOGIN = {"538": ENCRYPT_NEEDED, "534": b"AUTH-TOO-WEAK", "432": b"TRANSITION-NEEDED"}

DONE = ok()
LOGGED_IN = ok("Logged in")
BYE = ok("Bye")
START_TLS = ok("Begin TLS negotiation now")

UNKNOWN_COMMAND = no("Unknown command")
BAD_SYNTAX = no("Malformed command (RFC 5804 4)")
NOT_A_STRING = no("Expected a string")
TOO_LONG = no("The command is too long")
SCRIPT_TOO_LONG = no("The script is too long", MAXSIZE)
BARE_LF = no("Lines end in CRLF (RFC 5804 1.2)")
NOT_UTF8 = no("Not UTF-8 (RFC 5804 1.2)")
BAD_ARGUMENTS = no("Wrong arguments of this command")
NOT_LOGGED_IN = no("Log in first")
LOGGED_IN_ALREADY = no("Already logged in")

NO_TLS = no("STARTTLS is not offered")
HAS_TLS = no("TLS is already active")
TLS_FOR_LOGIN = no("Encryption required: issue STARTTLS first", ENCRYPT_NEEDED)
TLS_UNAVAILABLE = no("TLS is required and temporarily not available; try again later", TRYLATER)
NO_LOGINS = no("Logins are not possible here")
NO_SUCH_MECHANISM = no("Authentication mechanism not offered")

NO_SCRIPT = no("There is no script of that name", NONEXISTENT)
UNAVAILABLE = no("The scripts are temporarily not available; try again later", TRYLATER)

NOT_SYNCHRONISING = bye("A literal of a client is {n+} (RFC 5804 4); closing")
TALKING_EARLY = bye("Commands behind STARTTLS were sent without TLS; closing")
TOO_MUCH_SENT = bye("Too many commands were sent without reading the responses; closing")
LITERAL_TOO_LONG = bye("The literal is too long; closing", MAXSIZE)
TOO_MANY_ERRORS = bye("Too many errors; closing")
TOO_MANY_WRONG = bye("Too many failed logins; closing")
NOT_MANAGESIEVE = bye("This is a ManageSieve server, and that was not ManageSieve; closing")
SHUTTING_DOWN = bye("Shutting down; try again in a moment", TRYLATER)
IDLE_TOO_LONG = bye("Nothing was said for a long time; closing")
DISMISSED = bye("The session has ended; log in again")
