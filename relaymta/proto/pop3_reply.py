"""Every reply of the POP3 server that is the same in all sessions (RFC 1939 3), with its response code (RFC 2449 8, RFC 3206), in
one table.

A reply is bytes, ready to be written, CRLF included.
"""

__all__ = ["err", "of_login", "ok"]


def ok(text: str) -> bytes:
    """A positive reply."""
    return f"+OK {text}\r\n".encode()


def err(text: str, code: str = "") -> bytes:
    """A negative reply; `code`: a response code, without its brackets."""
    return f"-ERR [{code}] {text}\r\n".encode() if code else f"-ERR {text}\r\n".encode()


def of_login(answer: bytes) -> bytes:
    """What POP3 says where SMTP's AUTH has the reply `answer` (RFC 4954 4, 6), which is no 2xx: 334 is a challenge (RFC 5034 4),
    4xx [SYS/TEMP], 535 [AUTH] (RFC 3206 4, 5)."""
    code, _, rest = answer.decode("utf-8", "replace").strip("\r\n").partition(" ")
    if code == "334":
        return f"+ {rest}\r\n".encode()
    text = rest.partition(" ")[2]  # behind the enhanced code
    return err(text, "SYS/TEMP" if code.startswith("4") else "AUTH" if code == "535" else "")


NOOP = ok("Nothing done")
BYE = ok("Bye")
START_TLS = ok("Begin TLS negotiation now")
UTF8_ENABLED = ok("UTF-8 enabled")
SEND_PASSWORD = ok("Send PASS")  # for every user name: whether there is such a user is not said

UNKNOWN_COMMAND = err("Unknown command")
LINE_TOO_LONG = err("Command line too long (RFC 2449 4)")
BARE_IN_COMMAND = err("Bare CR or LF in a command; lines end in CRLF (RFC 1939 3)")
NUL_IN_COMMAND = err("NUL in a command")
NOT_ASCII = err("Octets beyond ASCII in a command")
NOT_UTF8 = err("Not UTF-8 (RFC 6856 2.2)")
BAD_ARGUMENT = err("Bad argument")
MISSING_ARGUMENT = err("An argument is missing")
TOO_MANY_ARGUMENTS = err("Too many arguments")
NOT_LOGGED_IN = err("Log in first")
LOGGED_IN_ALREADY = err("Already logged in")

NO_TLS = err("STLS is not offered")
HAS_TLS = err("TLS is already active")
TLS_FOR_LOGIN = err("Encryption required: issue STLS first")
TLS_UNAVAILABLE = err("TLS is required and temporarily not available; try again later", "SYS/TEMP")
NO_LOGINS = err("Logins are not possible here")
NO_PASSWORDS = err("USER and PASS are not offered; use AUTH")
NO_SUCH_MECHANISM = err("Authentication mechanism not offered")
NEED_USER = err("Say USER first")

IN_USE = err("The maildrop is in use by another session", "IN-USE")
LOGIN_DELAY = err("Logins are too frequent; try again later", "LOGIN-DELAY")
NO_MAILDROP = err("No mail of this user is kept here", "AUTH")
UNAVAILABLE = err("The maildrop is temporarily not available; try again later", "SYS/TEMP")
MESSAGE_GONE = err("This message has been deleted by another client")
MESSAGE_UNAVAILABLE = err("The message cannot be read now; try again later", "SYS/TEMP")
NOT_REMOVED = err("Some deleted messages were not removed; try again later", "SYS/TEMP")

TALKING_EARLY = err("Commands behind STLS were sent without TLS; closing (RFC 2595 4)")
TOO_MUCH_SENT = err("Too many commands were sent without reading the replies; closing")
TOO_MANY_ERRORS = err("Too many errors; closing")
TOO_MANY_WRONG = err("Too many failed logins; closing")
NOT_POP3 = err("This is a POP3 server, and that was not POP3; closing")
SHUTTING_DOWN = err("Shutting down; try again in a moment", "SYS/TEMP")
DISMISSED = err("The session has ended; nothing is removed", "SYS/TEMP")
OVERLOADED = err("Overloaded; try again in a moment", "SYS/TEMP")
TOO_MANY_CONNECTIONS = err("Too many connections; try again later", "SYS/TEMP")
TOO_MANY_FROM_CLIENT = err("Too many connections from your address; try again later", "SYS/TEMP")
