"""Every reply the server gives (RFC 5321 4.2, enhanced codes RFC 3463 and 5248), in one table.

A reply is bytes, ready to be written, CRLF included.
"""

__all__ = ["Blameless", "for_now", "format_reply"]


class Blameless(bytes):
    """A reply that rejects a recipient, and is no error of the client: whoever sends what it is told to cannot know better."""

    __slots__ = ()


def format_reply(code: int, enhanced: str, text: str) -> bytes:
    """One reply line as bytes. `enhanced` is empty only for banner, EHLO/HELO and 354 (RFC 2034 4)."""
    clean = text.replace("\r", " ").replace("\n", " ")
    return f"{code} {enhanced} {clean}\r\n".encode() if enhanced else f"{code} {clean}\r\n".encode()


def for_now(answer: bytes) -> bytes:
    """A 550 5.7.1 as one that may be otherwise later: 451 4.7.1."""
    return answer.replace(b"550 5.", b"451 4.", 1)


GO_AHEAD = format_reply(354, "", "End data with <CR><LF>.<CR><LF>")
SENDER_OK = format_reply(250, "2.1.0", "Sender ok")
RECIPIENT_OK = format_reply(250, "2.1.5", "Recipient ok")
RESET = format_reply(250, "2.0.0", "Ok")
NOOP = format_reply(250, "2.0.0", "Ok")
BYE = format_reply(221, "2.0.0", "Bye")
VERIFY = format_reply(252, "2.5.0", "Cannot VRFY user, but will accept message and attempt delivery")
HELP = format_reply(214, "2.0.0", "Commands: EHLO HELO STARTTLS AUTH MAIL RCPT DATA BDAT RSET NOOP VRFY HELP QUIT")
HELP_LMTP = format_reply(214, "2.0.0", "Commands: LHLO STARTTLS AUTH MAIL RCPT DATA BDAT RSET NOOP VRFY HELP QUIT")
START_TLS = format_reply(220, "2.0.0", "Ready to start TLS")
LOGGED_IN = format_reply(235, "2.7.0", "Authentication successful")

UNKNOWN_COMMAND = format_reply(500, "5.5.1", "Unknown command")
LINE_TOO_LONG = format_reply(500, "5.5.2", "Command line too long")
BARE_IN_COMMAND = format_reply(500, "5.5.2", "Bare CR or LF in a command (RFC 5321 2.3.8)")
NUL_IN_COMMAND = format_reply(500, "5.5.2", "NUL in a command")
NOT_IMPLEMENTED = format_reply(502, "5.5.1", "Command not implemented")
NEED_HELLO = format_reply(503, "5.5.1", "Say EHLO first")
NEED_LHLO = format_reply(503, "5.5.1", "Say LHLO first")
NEED_SENDER = format_reply(503, "5.5.1", "Need MAIL command")
NEED_RECIPIENT = format_reply(554, "5.5.1", "No valid recipients")
NEED_RECIPIENT_LMTP = format_reply(503, "5.5.1", "No valid recipients")
NESTED_MAIL = format_reply(503, "5.5.1", "Nested MAIL command; RSET first")
IN_CHUNKS = format_reply(503, "5.5.1", "BDAT in progress; send BDAT LAST or RSET")
BAD_HELLO = format_reply(501, "5.5.4", "Host name missing or malformed")
BAD_SENDER = format_reply(501, "5.1.7", "Bad sender address syntax")
BAD_RECIPIENT = format_reply(501, "5.1.3", "Bad recipient address syntax")
BAD_PARAMETER = format_reply(501, "5.5.4", "Bad parameter value")
UNKNOWN_PARAMETER = format_reply(555, "5.5.4", "Parameter not recognized")
BAD_ARGUMENT = format_reply(501, "5.5.4", "Bad argument")
NEEDS_SMTPUTF8 = format_reply(553, "5.6.7", "Non-ASCII address without SMTPUTF8")
TOO_BIG = format_reply(552, "5.3.4", "Message size exceeds the limit")
TOO_MANY_RECIPIENTS = format_reply(452, "4.5.3", "Too many recipients; send the rest in another message")
RELAY_DENIED = format_reply(550, "5.7.1", "Relaying denied")
NO_SUCH_RECIPIENT = format_reply(550, "5.1.1", "No such recipient here")
NO_POSTMASTER = format_reply(550, "5.1.1", "There is no postmaster without a domain here")
NOT_KEPT_HERE = format_reply(550, "5.7.1", "Relaying denied: mail for this domain is not kept here")
LMTP_DENIED = format_reply(550, "5.7.1", "Your address may not deliver here by LMTP (relay.networks)")
LMTP_CLOSED = format_reply(554, "5.7.1", "Your address may not deliver here by LMTP (relay.networks); closing")
FILTERS_ONLY = format_reply(554, "5.7.1", "Your address may not give mail back here (networks of the listener); closing")
RECIPIENTS_UNKNOWN = format_reply(451, "4.3.0", "The recipient cannot be checked now; try again later")
TALKING_EARLY = format_reply(554, "5.5.1", "Improper command pipelining (RFC 2920); closing")
NOT_SMTP = format_reply(421, "4.7.0", "This is an SMTP server, and that was not SMTP; closing")
TOO_MANY_ERRORS = format_reply(421, "4.7.0", "Too many errors; closing")

NEED_TLS = format_reply(530, "5.7.0", "Issue STARTTLS first")
TLS_UNAVAILABLE = format_reply(454, "4.7.0", "TLS is required and temporarily not available; try again later")
NEED_LOGIN = format_reply(530, "5.7.0", "Authentication required")
TLS_FOR_LOGIN = format_reply(538, "5.7.11", "Encryption required for authentication: issue STARTTLS first")
HAS_TLS = format_reply(503, "5.5.1", "TLS is already active")
LOGGED_IN_ALREADY = format_reply(503, "5.5.1", "Already authenticated")
NOT_IN_TRANSACTION = format_reply(503, "5.5.1", "Not permitted during a mail transaction")
NO_SUCH_MECHANISM = format_reply(504, "5.5.4", "Authentication mechanism not offered")
NOT_BASE64 = format_reply(501, "5.5.2", "Not base64")
LOGIN_CANCELLED = format_reply(501, "5.7.0", "Authentication cancelled")
BAD_RESPONSE = format_reply(501, "5.5.2", "Malformed authentication response")
WRONG_CREDENTIALS = format_reply(535, "5.7.8", "Authentication credentials invalid")
TOO_MANY_LOGINS = format_reply(454, "4.7.0", "Too many failed logins (limit login_failures); try again later")
LOGIN_UNAVAILABLE = format_reply(454, "4.7.0", "Temporary authentication failure; try again later")
TOO_MANY_WRONG = format_reply(421, "4.7.0", "Too many failed logins; closing")

BARE_LF = format_reply(550, "5.5.2", "Refused: bare LF in the message (RFC 5321 2.3.8)")
BARE_CR = format_reply(550, "5.5.2", "Refused: bare CR in the message (RFC 5321 2.3.8)")
NUL_IN_DATA = format_reply(550, "5.6.0", "Refused: NUL in the message")
LONG_LINE = format_reply(550, "5.6.0", "Refused: a line of more than 998 octets (RFC 5322 2.1.1)")
BAD_AUTHOR = format_reply(550, "5.6.0", "Refused: From: or Sender: is not an address list (RFC 5322 3.4)")
NO_AUTHOR = format_reply(550, "5.7.1", "Refused: there is no From: with an address (RFC 5322 3.6.2)")
HEADER_TOO_LONG = format_reply(554, "5.6.0", "The header is too long")
TOO_MANY_HOPS = format_reply(554, "5.4.6", "Too many hops: this looks like a mail loop")

BAD_KEY = format_reply(550, "5.6.0", "Refused: X-Relay-Idempotency: is to be there once, 1 to 255 visible ASCII characters")
KEY_BUSY = format_reply(451, "4.3.0", "A message with the same X-Relay-Idempotency: is being taken; try again later")
STORE_ERROR = format_reply(451, "4.3.0", "The message could not be stored; try again later")
TOO_MUCH_HELD = format_reply(450, "4.7.1", "Your mail is held, and more of it is not taken now; ask your administrator")
STORE_FULL = format_reply(452, "4.3.1", "Out of space; try again later")
NOT_VERIFIED = format_reply(451, "4.7.5", "The message could not be verified; try again later")
DNS_SILENT = format_reply(451, "4.4.3", "The message could not be authenticated: no answer from the DNS; try again later")
NOT_SIGNED = format_reply(451, "4.7.5", "The message could not be signed; try again later")
NOT_FILTERED = format_reply(451, "4.3.0", "You have hung up while filters looked at the message; it is not taken")
NOT_ASKED = format_reply(451, "4.3.0", "Filters could not be asked; try again later")
NOT_HELD = format_reply(451, "4.7.1", "The message would have to be held, which cannot be done with LMTP; try again later")
DMARC_REJECT = format_reply(550, "5.7.1", "Refused by the policy of the author's domain (DMARC, RFC 7489)")
TIMEOUT = format_reply(421, "4.4.2", "Timed out waiting for you; closing")
TOO_SLOW = format_reply(421, "4.4.2", "Message data arrives too slowly; closing")
SHUTTING_DOWN = format_reply(421, "4.3.2", "Shutting down; try again in a moment")
OVERLOADED = format_reply(421, "4.3.2", "Overloaded; try again in a moment")
OUT_OF_MEMORY = format_reply(452, "4.3.1", "Out of memory; try again later")
TOO_MANY_CONNECTIONS = format_reply(421, "4.7.0", "Too many connections; try again later")
TOO_MANY_FROM_CLIENT = format_reply(421, "4.7.0", "Too many connections from your address; try again later")
