"""Every reply the server gives (RFC 5321 4.2, enhanced codes RFC 3463 and 5248), in one table.

A reply is bytes, ready to be written, CRLF included.
"""

__all__ = ["format_reply"]


def format_reply(code: int, enhanced: str, text: str) -> bytes:
    """One reply line as bytes. `enhanced` is empty only for banner, EHLO/HELO and 354 (RFC 2034 4)."""
    clean = text.replace("\r", " ").replace("\n", " ")
    return f"{code} {enhanced} {clean}\r\n".encode() if enhanced else f"{code} {clean}\r\n".encode()


GO_AHEAD = format_reply(354, "", "End data with <CR><LF>.<CR><LF>")
SENDER_OK = format_reply(250, "2.1.0", "Sender ok")
RECIPIENT_OK = format_reply(250, "2.1.5", "Recipient ok")
RESET = format_reply(250, "2.0.0", "Ok")
NOOP = format_reply(250, "2.0.0", "Ok")
BYE = format_reply(221, "2.0.0", "Bye")
VERIFY = format_reply(252, "2.5.0", "Send the message and see")
HELP = format_reply(214, "2.0.0", "Commands: EHLO HELO STARTTLS AUTH MAIL RCPT DATA BDAT RSET NOOP VRFY HELP QUIT")
START_TLS = format_reply(220, "2.0.0", "Ready to start TLS")
LOGGED_IN = format_reply(235, "2.7.0", "Authentication successful")

UNKNOWN_COMMAND = format_reply(500, "5.5.1", "Unknown command")
LINE_TOO_LONG = format_reply(500, "5.5.2", "Command line too long")
BARE_IN_COMMAND = format_reply(500, "5.5.2", "Bare CR or LF in a command (RFC 5321 2.3.8)")
NUL_IN_COMMAND = format_reply(500, "5.5.2", "NUL in a command")
NOT_IMPLEMENTED = format_reply(502, "5.5.1", "Not offered here")
NEED_HELLO = format_reply(503, "5.5.1", "Say EHLO first")
NEED_SENDER = format_reply(503, "5.5.1", "MAIL first")
NEED_RECIPIENT = format_reply(554, "5.5.1", "No valid recipients")
NESTED_MAIL = format_reply(503, "5.5.1", "Sender already given; RSET starts over")
IN_CHUNKS = format_reply(503, "5.5.1", "A BDAT message is under way; finish it or RSET")
BAD_HELLO = format_reply(501, "5.5.4", "Give your host name")
BAD_SENDER = format_reply(501, "5.1.7", "Bad sender address syntax")
BAD_RECIPIENT = format_reply(501, "5.1.3", "Bad recipient address syntax")
BAD_PARAMETER = format_reply(501, "5.5.4", "Bad parameter value")
UNKNOWN_PARAMETER = format_reply(555, "5.5.4", "Parameter not recognized")
BAD_ARGUMENT = format_reply(501, "5.5.4", "Bad argument")
NEEDS_SMTPUTF8 = format_reply(553, "5.6.7", "Non-ASCII address without SMTPUTF8")
TOO_BIG = format_reply(552, "5.3.4", "Message larger than this server takes")
TOO_MANY_RECIPIENTS = format_reply(452, "4.5.3", "Too many recipients; send the rest in another message")
RELAY_DENIED = format_reply(550, "5.7.1", "Relaying denied")
NO_SUCH_RECIPIENT = format_reply(550, "5.1.1", "No such recipient here")
TALKING_EARLY = format_reply(554, "5.5.1", "Commands sent before they may be (RFC 2920); closing")
TOO_MANY_ERRORS = format_reply(421, "4.7.0", "Too many errors; closing")

NEED_TLS = format_reply(530, "5.7.0", "Issue STARTTLS first")
TLS_UNAVAILABLE = format_reply(454, "4.7.0", "TLS is needed and not available now; try again later")
NEED_LOGIN = format_reply(530, "5.7.0", "Authentication required")
TLS_FOR_LOGIN = format_reply(538, "5.7.11", "Encryption required for authentication: issue STARTTLS first")
HAS_TLS = format_reply(503, "5.5.1", "TLS is on already")
LOGGED_IN_ALREADY = format_reply(503, "5.5.1", "Authenticated already")
NOT_IN_TRANSACTION = format_reply(503, "5.5.1", "Not within a mail transaction")
NO_SUCH_MECHANISM = format_reply(504, "5.5.4", "Authentication mechanism not offered")
NOT_BASE64 = format_reply(501, "5.5.2", "Not base64")
LOGIN_CANCELLED = format_reply(501, "5.7.0", "Authentication cancelled")
BAD_RESPONSE = format_reply(501, "5.5.2", "Malformed authentication response")
WRONG_CREDENTIALS = format_reply(535, "5.7.8", "Authentication credentials invalid")
TOO_MANY_LOGINS = format_reply(454, "4.7.0", "Too many failed logins (limit login_failures); try again later")
LOGIN_UNAVAILABLE = format_reply(454, "4.7.0", "Authentication is not available now; try again later")
TOO_MANY_WRONG = format_reply(421, "4.7.0", "Too many failed logins; closing")

BARE_LF = format_reply(550, "5.5.2", "Refused: bare LF in the message (RFC 5321 2.3.8)")
BARE_CR = format_reply(550, "5.5.2", "Refused: bare CR in the message (RFC 5321 2.3.8)")
NUL_IN_TEXT = format_reply(550, "5.6.0", "Refused: NUL in the message")
LONG_LINE = format_reply(550, "5.6.0", "Refused: a line of more than 998 octets (RFC 5322 2.1.1)")
HEADER_TOO_LONG = format_reply(554, "5.6.0", "The header is too long to be looked at")
TOO_MANY_HOPS = format_reply(554, "5.4.6", "Too many hops: this looks like a mail loop")

STORE_ERROR = format_reply(451, "4.3.0", "The message could not be stored; try again later")
STORE_FULL = format_reply(452, "4.3.1", "Out of space; try again later")
NOT_VERIFIED = format_reply(451, "4.7.5", "The message could not be verified; try again later")
NOT_SIGNED = format_reply(451, "4.7.5", "The message could not be signed; try again later")
DMARC_REJECT = format_reply(550, "5.7.1", "Refused by the policy of the author's domain (DMARC, RFC 7489)")
TIMEOUT = format_reply(421, "4.4.2", "Timed out waiting for you; closing")
TOO_SLOW = format_reply(421, "4.4.2", "Data comes too slowly; closing")
SHUTTING_DOWN = format_reply(421, "4.3.2", "Shutting down; try again in a moment")
OVERLOADED = format_reply(421, "4.3.2", "Overloaded; try again in a moment")
OUT_OF_MEMORY = format_reply(452, "4.3.1", "Out of memory; try again later")
TOO_MANY_CONNECTIONS = format_reply(421, "4.7.0", "Too many connections; try again later")
TOO_MANY_FROM_CLIENT = format_reply(421, "4.7.0", "Too many connections from your address; try again later")
