"""Connections of HTTP clients: what they are told where they are refused, and of what is not taken."""

import json
from typing import Any, cast

import pytest

from relaymta.accept.http.answers import MessageResult, RecipientResult, not_taken
from relaymta.accept.http.connection import HttpConnection


def refused(answer: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, body = HttpConnection.refusal(cast(Any, None), answer).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines)
    assert int(headers["Content-Length"]) == len(body)
    return int(first.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize("answer, status, after", [
    (b"421 4.7.0 Too much from your address (limit connection_rate 1/h); try again in 180 s\r\n", 429, "180"),
    (b"421 4.3.2 Overloaded; try again in a moment\r\n", 503, "5"), (b"554 5.7.1 no\r\n", 403, None),
], ids=["rate", "load", "denied"])  # fmt: skip
def test_who_may_not_connect_is_told_when_to_try_again(answer, status, after):
    found, headers, body = refused(answer)
    assert (found, headers.get("Retry-After"), body["status"]) == (status, after, status)
    assert body["detail"] == answer.decode().strip()[4:]


def result(status: str, reply: str) -> MessageResult:
    return MessageResult(status=status, reply=reply, recipients=[RecipientResult(address=reply, status=status, reply=reply)])


def test_a_batch_of_which_one_can_be_tried_again_can_be():
    refused, later = result("refused", "550 5.1.1 no"), result("try again", "452 4.7.1 Too much from x; try again in 180 s")
    found = not_taken([refused, later, refused])
    assert (found.status, found.headers, found.detail) == (429, {"Retry-After": "180"}, later.reply)
    assert found.details.messages == [refused, later, refused] and found.details.recipients == later.recipients
    found = not_taken([refused, result("refused", "552 5.3.4 large")])
    assert (found.status, found.headers, len(found.details.messages)) == (422, {}, 2)
    found = not_taken([result("try again", "451 4.3.0 x")])
    assert (found.status, found.headers, found.details.messages) == (503, {"Retry-After": "30"}, [])
