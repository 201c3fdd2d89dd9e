"""Recipients who are refused at RCPT, since they are in the suppression list."""

import time
from collections.abc import Collection, Iterable

from relaymta.accept.origin import Origin
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.address import compared
from relaymta.proto.suppression import REASONS, shown_reason
from relaymta.suppression import Entry, Lookup

__all__ = ["Suppressed"]

SUPPRESSED = {reason: index("relaymta_suppressed_total", reason) for reason in REASONS}
ADDRESS_SHOWN = 320  # characters of an address in a reply, whose line has 512 octets (RFC 5321 4.5.3.1.5)


class Suppressed:
    """`ignoring`: the applications whose mail is taken all the same."""

    def __init__(self, lookup: Lookup, ignoring: Collection[str], counters: Counters) -> None:
        self._lookup = lookup
        self._ignoring = frozenset(ignoring)
        self._counters = counters

    def is_about(self, origin: Origin, sender: str) -> bool:
        """Whether the list is about this mail: that of clients that may relay. Not what has the null sender, such as DSNs, which
        cannot be returned; nor what a content filter gives back, which was taken before; nor what goes into mailboxes by LMTP."""
        return origin.may_relay and bool(sender) and not (origin.filtered or origin.lmtp or origin.application in self._ignoring)

    def refusal(self, application: str, address: str, reached: Iterable[str]) -> bytes | None:
        """The reply that rejects a recipient of an application's mail, who is in the list, or is an alias that leads to nobody
        else (`reached`: to whom; nobody: it is none). It is counted. None: mail is taken."""
        now = time.time()
        found = self._lookup.find(application, compared(address), now)
        for one in reached if found is None else ():
            found = self._lookup.find(application, compared(one), now)
            if found is None:
                return None
        if found is None:
            return None
        self._counters.add(SUPPRESSED[found.reason], 1)
        return said(address, found)


def said(address: str, entry: Entry) -> bytes:
    """The reply that refuses mail for an address because of an entry."""
    since = time.strftime("%Y-%m-%d", time.gmtime(entry.since))
    text = f" ({entry.text})" if entry.text else ""
    words = f"<{address[:ADDRESS_SHOWN]}>: suppressed: {shown_reason(entry.reason)} {since}{text}"
    return reply.Blameless(reply.format_reply(550, "5.1.8", words.encode("ascii", "replace").decode()))
