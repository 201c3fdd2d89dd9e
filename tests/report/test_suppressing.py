"""What the suppression list hears of events."""

from typing import Any

import pytest

from relaymta.config import Config
from relaymta.proto.envelope import encode
from relaymta.queue.journal import decode_records, events
from relaymta.report.suppressing import Suppressing


class Told:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        config = {"listener": [{"address": "127.0.0.1:25"}], "suppression": {"enabled": True}}
        self.consumer = Suppressing(Config.model_validate(config), self._note)

    async def _note(self, events: list[dict[str, Any]]) -> None:
        self.events += events


@pytest.fixture
def told():
    return Told()


def event(kind: str, party: tuple[Any, ...], more: dict[str, Any]) -> dict[str, Any]:
    about = ("a@b.example", "shop", "", [], "", "")
    (found,) = events(0, decode_records(encode([(kind, 1796000870553, 1 << 40, about, [party], 1, more)])))
    return found


async def test_a_complaint_of_a_message_is_told_with_its_text_and_one_of_an_operator_is_not(told):
    complained = event("complained", ("c@d.example",), {"text": "abuse"})
    assert told.consumer.wants(complained) and not told.consumer.wants(complained | {"message": ""})
    await told.consumer.take([complained])
    (noted,) = told.events
    assert (noted["event"], noted["recipient"], noted["reply"]) == ("complained", "c@d.example", "abuse")


async def test_a_bounce_is_told_as_its_host_said_it(told):
    party = ("c@d.example", 550, "5.1.1", "no such user", "mx.d.example", "rcpt", "reply", False, "permanent")
    bounced = event("bounced", party, {"recipients": 3})
    assert told.consumer.wants(bounced) and not told.consumer.wants(bounced | {"reason": "expired"})
    await told.consumer.take([bounced])
    (noted,) = told.events
    assert (noted["reply"], noted["recipients"], noted["time"]) == ("550 5.1.1 no such user", 3, 1796000870553)
