"""A message on its way through the filters: as the next one is shown it, and as it will be stored.

Filters that may change the text are asked one after the other, and each sees what those before it have made of it. Nobody else
sees any of that before the chain has ended.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace

from relaymta.filter.judgement import Mail, NewBody, NewEnvelope
from relaymta.proto.address import compared
from relaymta.proto.edits import MOST, Edit, Insert, edited, shown
from relaymta.proto.header import header_end

__all__ = ["Revision"]

# Stands for our Received in a header that is edited. Its NUL is in nothing that comes from elsewhere; nobody guesses its name.
_RECEIVED = f"X-{secrets.token_hex(16)}:\0\r\n".encode()


class Revision:
    """See above. `mail`: as it is shown now; `above` and `header`: the fields above our Received, and those below, with the empty
    line; `body`: a new one, None: its own; `sender`, `recipients`: None: as they were. Changed by the chain alone, and only by
    these methods."""

    __slots__ = ("_addressed", "_room", "above", "body", "header", "mail", "recipients", "sender")

    def __init__(self, mail: Mail, results: bytes = b"", addressed: bool = True) -> None:
        """`results`: the fields with which the text begins that are ours; `addressed`: it may have another envelope."""
        self._addressed = addressed
        self.mail = mail
        self.above = results
        self.header = mail.text.head[len(results) :]
        self.body: NewBody | None = None
        self.sender: str | None = None
        self.recipients: list[str] | None = None
        self._room = MOST

    def edit(self, edits: Sequence[Edit], room: int | None = None) -> int:
        """Change the header. Fields are counted as they are shown; positions (Insert) as if what is above were one field. The
        header grows by `room` octets at most, None: by what all filters of a message have. How many edits were dropped."""
        if not edits:
            return 0
        behind = len(shown(self.above)) + 1 if self.above else 1
        moved = [edit._replace(at=edit.at + behind) if isinstance(edit, Insert) and edit.at > 0 else edit for edit in edits]
        before = len(self.above) + len(self.header)
        above, changed, dropped = edited(self.above + _RECEIVED + self.header, moved, self._room if room is None else room)
        over, _, header = (above + changed).partition(_RECEIVED)
        if header_end(header) != len(header):
            # Without its first field, a header whose next line is none is no header any more: it stays as it is, and what is
            # added stands above our fields.
            above, added, dropped = edited(b"", edits, self._room if room is None else room)
            over, header = above + added.removesuffix(b"\r\n") + self.above, self.header
        self.above, self.header = over, header
        if room is None:
            self._room -= max(len(over) + len(header) - before, 0)
        self._show()
        return dropped

    def rewrite(self, body: NewBody) -> None:
        """Another body, which is this revision's from now on. A message that has none yet may lack the empty line, without which
        the body's first lines would be fields."""
        if self.body is not None:
            self.body.discard()
        self.body = body
        if self.header != b"\r\n" and not self.header.endswith(b"\r\n\r\n"):
            self.header += b"\r\n"
        self._show()

    def readdress(self, envelope: NewEnvelope) -> int:
        """Another envelope. How many of these changes were dropped."""
        if not self._addressed:
            return len(envelope.added) + len(envelope.removed) + (envelope.sender is not None)
        if envelope.sender is not None:
            self.sender = envelope.sender
        if envelope.added or envelope.removed or envelope.only is not None:
            gone = {compared(address) for address in envelope.removed}
            before = self.mail.recipients if envelope.only is None else [envelope.only]
            recipients = {compared(address): address for address in before}
            recipients |= {key: address for address in envelope.added if (key := compared(address)) not in recipients}
            self.recipients = [address for key, address in recipients.items() if key not in gone]
        sender = self.mail.sender if self.sender is None else self.sender
        recipients_now = self.mail.recipients if self.recipients is None else self.recipients
        self.mail = replace(self.mail, sender=sender, recipients=recipients_now)
        return 0

    def discard(self) -> None:
        """It is not stored."""
        if self.body is not None:
            self.body.discard()
            self.body = None

    def _show(self) -> None:
        head = self.above + self.header
        self.mail = replace(self.mail, text=self.mail.text.below(head) if self.body is None else self.body.text(head))
