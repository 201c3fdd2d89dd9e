"""Which reply codes a client accepts to which command (RFC 5321 4.3.2; RFC 2033, 3030, 3207 and 4954 for theirs).

A table, since a gap in it would lose or duplicate mail: `verdict` covers every phase and every code.

    phase      success     refusal      any other code is out of turn: commands and replies are out of step
    banner     220         4xx 5xx
    ehlo       250         4xx 5xx      HELO is tried after 500, 502, 504 and 550 only: the peer may not support EHLO
    helo       250         4xx 5xx
    starttls   220         4xx 5xx
    auth       235 334     4xx 5xx      334: the exchange continues
    rset       2xx         -            a peer that keeps the old envelope would add the next one to it
    xforward   2xx         4xx 5xx      a refusal does no harm: MAIL follows all the same
    mail       2xx         4xx 5xx
    rcpt       2xx         4xx 5xx
    data       354         4xx 5xx      no other code is followed by message data; 2xx accepts nothing
    final      2xx         4xx 5xx      the reply to the final dot, to BDAT ... LAST, and with LMTP to each recipient
    quit       any         -            nothing depends on it

421 closes the connection in every phase (RFC 5321 3.8). An unexpected 2xx counts by its first digit (4.2.1) in the phases of a
transaction; before that no mail is at risk, and a peer that is no SMTP server is detected.
"""

from typing import Final

__all__ = ["CLOSES", "GOES_ON", "GO_ON", "HELO_AFTER", "OUT_OF_TURN", "REFUSED", "verdict"]

GO_ON: Final = "go on"
REFUSED: Final = "refused"
CLOSES: Final = "closes"
OUT_OF_TURN: Final = "out of turn"

_ANY_2XX: Final = frozenset(range(200, 300))

GOES_ON: Final[dict[str, frozenset[int]]] = {
    "banner": frozenset({220}),
    "ehlo": frozenset({250}),
    "helo": frozenset({250}),
    "starttls": frozenset({220}),
    "auth": frozenset({235, 334}),
    "rset": _ANY_2XX,
    "xforward": _ANY_2XX,
    "mail": _ANY_2XX,
    "rcpt": _ANY_2XX,
    "data": frozenset({354}),
    "final": _ANY_2XX,
    "quit": frozenset(range(200, 600)),
}
UNREFUSABLE: Final = frozenset({"rset"})
HELO_AFTER: Final = frozenset({500, 502, 504, 550})


def verdict(phase: str, code: int) -> str:
    """What a reply code (0: not a valid reply) means for the command of this phase: GO_ON, REFUSED, CLOSES or OUT_OF_TURN."""
    if code == 421:
        return CLOSES
    if code in GOES_ON[phase]:
        return GO_ON
    return REFUSED if 400 <= code < 600 and phase not in UNREFUSABLE else OUT_OF_TURN
