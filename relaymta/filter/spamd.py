"""Spam filtering by SpamAssassin's spamd (proto/spamc.py): a connection for each message, as spamd wants it."""

from collections.abc import AsyncIterable, Sequence

from relaymta.filter.exchange import exchange, nothing
from relaymta.filter.judgement import Answer, FilterFailure, Mail, Text, gtube
from relaymta.proto import spamc

__all__ = ["Spamd"]

RULES_SHOWN = 8  # in a reason


class Spamd:
    """A judgement.Filter. Its words are True (spam) and False; the reason: rules that match."""

    def __init__(self, addresses: Sequence[str], timeout: float) -> None:
        """`addresses`: "host:port" or "unix:/path"; the first that can be connected to is asked. `timeout`: seconds for a
        connection."""
        self._addresses = list(addresses)
        self._timeout = timeout

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter. FilterFailure; OSError: the text cannot be read."""
        answer = await self._asked(spamc.request(mail.octets, mail.user), mail.text.pieces(mail.most))
        try:
            found = spamc.judged(answer)
        except spamc.SpamdError as error:
            raise FilterFailure("refused" if error.refused else "protocol", str(error)) from None
        return Answer(str(found.spam), ", ".join(found.rules[:RULES_SHOWN]), found.score)

    async def probe(self) -> None:
        """As in judgement.Filter: PING."""
        answer = await self._asked(spamc.PING, nothing())
        try:
            good = spamc.is_pong(answer)
        except spamc.SpamdError as error:
            raise FilterFailure("protocol", str(error)) from None
        if not good:
            raise FilterFailure("protocol", f"answers PING by {answer[: spamc.SHOWN]!r}")

    async def prove(self) -> str:
        """As in judgement.Filter: GTUBE."""
        answer = await self.judge(gtube())
        if answer.word != "True":
            raise FilterFailure("refused", "does not find GTUBE, the test text of all spam filters")
        return f"GTUBE (score {answer.score:g})"

    async def learn(self, text: Text, spam: bool) -> str:
        """As in judgement.Learner. spamd needs --allow-tell for that."""
        answer = await self._asked(spamc.teaching(text.size, spam), text.pieces())
        try:
            return "learned" if spamc.has_learned(answer) else "known already"
        except spamc.SpamdError as error:
            raise FilterFailure("refused" if error.refused else "protocol", str(error)) from None

    def close(self) -> None:
        """As in judgement.Filter: no connection is ever idle."""

    async def _asked(self, request: bytes, pieces: AsyncIterable[bytes]) -> bytes:
        return await exchange(self._addresses, request, pieces, self._timeout, spamc.LARGEST, True)
