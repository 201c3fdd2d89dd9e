"""Spam filtering by rspamd, over HTTP: POST /checkv2 to its normal worker. Each answer closes its connection (rspamd 3.4).

What it says beside its verdict are changes to the header (the `milter` block and the subject of its reply), which the chain
applies.
"""

import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterable, Sequence
from typing import Any

from relaymta.filter.exchange import exchange, nothing
from relaymta.filter.judgement import Answer, FilterFailure, Mail, Text, gtube
from relaymta.proto.edits import Append, Change, Edit, Insert, shown, spaced
from relaymta.proto.printable import printable

__all__ = ["Rspamd", "edits_of", "object_of"]

LARGEST = 1 << 20  # octets of an answer
SYMBOLS_SHOWN = 8  # the heaviest ones, in a reason
HEADER_MOST = 998  # characters of what is told in a header field of HTTP
EDITS_MOST = 200
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [^\r\n]*)?")
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,9})[ \t]*\r?$", re.I | re.M)


class Rspamd:
    """A judgement.Filter. Its words are rspamd's actions ("no action", "reject", ...); the reason: its own sentence for a
    refusal, or the symbols that weigh most."""

    def __init__(self, addresses: Sequence[str], timeout: float, must_work: Sequence[str] = (), controller: str = "") -> None:
        """`addresses`: "host:port" or "unix:/path"; the first that answers is asked. `timeout`: seconds for a connection.
        `must_work`: symbols that say that a part of it did not work, such as CLAM_VIRUS_FAIL: a message with one has not been
        judged. `controller`: the address of what learns, or ""."""
        self._addresses = list(addresses)
        self._timeout = timeout
        self._must_work = frozenset(must_work)
        self._controller = controller

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter. FilterFailure; OSError: the text cannot be read."""
        found = object_of(await self._asked("POST /checkv2", _headers(mail), mail.text.pieces(mail.most)))
        action, score = found.get("action"), found.get("score")
        if not isinstance(action, str) or not isinstance(score, int | float) or not math.isfinite(score):
            raise FilterFailure("protocol", f"answers without action and score: {_begin(json.dumps(found).encode())}")
        symbols = found.get("symbols")
        names = _weights(symbols) if isinstance(symbols, dict) else {}
        failed = self._must_work & names.keys()
        if failed:
            raise FilterFailure("refused", f"a part of it did not work: {', '.join(sorted(failed))}")
        messages = found.get("messages")
        sentence = messages.get("smtp_message") if isinstance(messages, dict) else None
        heaviest = sorted(names, key=lambda name: (-abs(names[name]), name))[:SYMBOLS_SHOWN]
        reason = sentence if isinstance(sentence, str) and sentence else ", ".join(heaviest)
        return Answer(action, reason, float(score), edits_of(found, mail.text.head, action))

    async def probe(self) -> None:
        """As in judgement.Filter: /ping."""
        body = await self._asked("GET /ping", [], nothing())
        if body.strip() != b"pong":
            raise FilterFailure("protocol", f"answers, but not as rspamd: {_begin(body)}")

    async def prove(self) -> str:
        """As in judgement.Filter: GTUBE."""
        answer = await self.judge(gtube())
        if answer.word != "reject":
            raise FilterFailure("refused", f"does not refuse GTUBE, the test text of all spam filters, but says {answer.word!r}")
        return f"GTUBE ({answer.word}, score {answer.score:g})"

    async def learn(self, text: Text, spam: bool) -> str:
        """As in judgement.Learner: by its controller."""
        if not self._controller:
            raise FilterFailure("refused", "no `controller` is configured, which learns")
        told = [("Content-Length", str(text.size))]
        request = f"POST /learn{'spam' if spam else 'ham'}"
        status, body = await _exchanged([self._controller], request, told, text.pieces(), self._timeout)
        if status == 208:
            return "known already"
        found = object_of(body)
        if status != 200 or found.get("success") is not True:
            why = found.get("error")
            text_of_it = f": {printable(why)[:200]}" if isinstance(why, str) else ""
            raise FilterFailure("refused", f"answers HTTP {status}{text_of_it}")
        return "learned"

    def close(self) -> None:
        """As in judgement.Filter: no connection is ever idle."""

    async def _asked(self, request: str, told: list[tuple[str, str]], pieces: AsyncIterable[bytes]) -> bytes:
        """The body of an answer with status 200. FilterFailure; OSError of the text."""
        status, body = await _exchanged(self._addresses, request, told, pieces, self._timeout)
        if status != 200:
            raise FilterFailure("refused", f"answers HTTP {status}")
        return body


async def _exchanged(
    addresses: Sequence[str], request: str, told: list[tuple[str, str]], pieces: AsyncIterable[bytes], timeout: float
) -> tuple[int, bytes]:
    """Status and body of an answer. HTTP/1.0: it ends with the connection. FilterFailure; OSError of the text."""
    lines = [f"{request} HTTP/1.0", "Connection: close", *(f"{name}: {value}" for name, value in told), "", ""]
    answer = await exchange(addresses, "\r\n".join(lines).encode(), pieces, timeout, LARGEST, False)
    head, separator, body = answer.partition(b"\r\n\r\n")
    status = _STATUS.match(head)
    if status is None:
        raise FilterFailure("protocol", f"answers, but not as rspamd: {_begin(answer)}" if answer else "closes the connection")
    length = _LENGTH.search(head)
    if status[1] == b"200" and (not separator or (length is not None and len(body) < int(length[1]))):
        raise FilterFailure("protocol", "its answer is cut short")
    return int(status[1]), body


def object_of(body: bytes) -> dict[str, Any]:
    """The object in an answer. FilterFailure."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FilterFailure("protocol", f"answers, but not as rspamd: {_begin(body)}")
    return found


def _begin(body: bytes) -> str:
    return f"begins with '{printable(body[:64].decode('utf-8', 'replace'))}'"


def _headers(mail: Mail) -> list[tuple[str, str]]:
    """What rspamd is told beside the message (its protocol: "HTTP headers")."""
    told = [("Content-Length", str(mail.octets)), ("Queue-Id", mail.ident), ("From", mail.sender), ("IP", mail.client)]
    told += [("Rcpt", address) for address in mail.recipients]
    told += [(name, value) for name, value in (("Helo", mail.helo), ("User", mail.user)) if value]
    if mail.tls:
        words = mail.tls.split()  # "using TLSv1.3 with cipher NAME (256/256 bits)"
        told += [("TLS-Version", words[1]), ("TLS-Cipher", words[4])] if len(words) > 4 else []
    return [(name, printable(value)[:HEADER_MOST]) for name, value in told]


def _weights(symbols: dict[str, Any]) -> dict[str, float]:
    """The symbols and what each adds to the score."""
    found = {}
    for name, told in symbols.items():
        weight = told.get("score") if isinstance(told, dict) else None
        found[printable(name)] = float(weight) if isinstance(weight, int | float) and math.isfinite(weight) else 0.0
    return found


def edits_of(found: dict[str, Any], header: bytes, action: str = "") -> list[Edit]:
    """The changes to the header in an answer: as rspamd's own milter makes them."""
    edits: list[Edit] = []
    milter = found.get("milter")
    if isinstance(milter, dict):
        edits += _removals(milter.get("remove_headers"), header)
        edits += _additions(milter.get("add_headers"))
    subject = found.get("subject")
    if action == "rewrite subject" and isinstance(subject, str) and subject:
        edits.append(Change(b"Subject", 1, spaced(_octets(subject))))
    return edits[:EDITS_MOST]


def _removals(wanted: Any, header: bytes) -> list[Edit]:
    """`{name: n}`: the n-th field of that name, from the end if it is negative; 0: all of them."""
    if not isinstance(wanted, dict):
        return []
    counts = Counter(name.lower() for name, _ in shown(header))
    edits: list[Edit] = []
    for name, number in wanted.items():
        if not isinstance(number, int) or len(edits) >= EDITS_MOST:
            continue
        count = counts[_octets(name.lower())]
        which = range(1, count + 1) if not number else [number if number > 0 else count + 1 + number]
        edits += [Change(_octets(name), instance, b"") for instance in which if 0 < instance <= count]
    return edits


def _additions(wanted: Any) -> list[Edit]:
    """`{name: value}`, where a value is a text, {"value": text, "order": n}, or a list of these."""
    if not isinstance(wanted, dict):
        return []
    edits: list[Edit] = []
    for name, told in wanted.items():
        for one in told if isinstance(told, list) else [told]:
            value, order = (one.get("value"), one.get("order")) if isinstance(one, dict) else (one, None)
            if not isinstance(value, str):
                continue
            if isinstance(order, int) and order >= 0:
                edits.append(Insert(order, _octets(name), spaced(_octets(value))))
            else:
                edits.append(Append(_octets(name), spaced(_octets(value))))
    return edits


def _octets(text: str) -> bytes:
    """JSON may have halves of a pair of surrogates in it, which UTF-8 has not."""
    return text.encode("utf-8", "replace")
