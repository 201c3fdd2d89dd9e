"""The table of an entry's transitions, and every way through it that the code takes without the table."""

from types import SimpleNamespace

import pytest

from relaymta.proto.envelope import Envelope, QueueName
from relaymta.queue import Entry, Events, Queue, QueueSettings
from relaymta.queue.ends import Ends
from relaymta.queue.lifecycle import (
    ADD,
    AGAIN,
    BEGIN,
    CLAIM,
    CLAIMED,
    END,
    ENDED,
    FINISH,
    ON_DISK,
    PUT_BACK,
    READ,
    RECORD,
    REFUSALS,
    TRANSITIONS,
    Lifecycle,
    Mistake,
)

EVENTS = (ADD, BEGIN, AGAIN, PUT_BACK, CLAIM, FINISH, END, RECORD)


def entry(ident: int = 1, size: int = 10, data: bool = True) -> Entry:
    envelope = Envelope("a@b", ["c@d"], size, 0, 0, 0)
    return Entry(ident, envelope, QueueName("mx", "d"), 1, 0, 0, None, True, [bytes(size)] if data else None)


class Refused(Events):
    def __init__(self) -> None:
        self.why: list[str] = []

    def refused(self, entry, why) -> None:
        self.why.append(why)


def in_state(state: int) -> tuple[Entry, Lifecycle]:
    """An entry in a state, in the table where that state is one of memory."""
    entries = Lifecycle(lambda entry: None, lambda entry, error: None, 100, 1000)
    one = entry()
    entries.add_fresh([one])
    if state in (READ, CLAIMED, ENDED, ON_DISK):
        entries._remove(one)
    one.state = state
    return one, entries


@pytest.mark.parametrize("state", TRANSITIONS)
@pytest.mark.parametrize("event", EVENTS)
def test_the_ways_that_do_not_read_the_table_agree_with_it(state, event):
    one, entries = in_state(state)
    events = Refused()
    queue = SimpleNamespace(
        entries=entries, _events=events, schedule=SimpleNamespace(wake=lambda: None), store=SimpleNamespace(fresh={})
    )
    writer = SimpleNamespace(submit=lambda outcome: None)
    ends = Ends(writer, SimpleNamespace(now=lambda: 0), QueueSettings("x"), lambda *_: [], events, SimpleNamespace())
    allowed = event in TRANSITIONS[state]

    def act() -> object:
        match event:
            case "add":
                return entries.add_read(one, 0) if state == READ else None
            case "begin":
                assert entries.begin(one) == allowed
            case "again":
                Queue.again(queue, one)
            case "put back":
                Queue.put_back(queue, one)
            case "claim":
                assert (entries.claim([1]) == {1}) == allowed if state not in (READ, ENDED) else True
                return entries.adopt(one, 0) if state == READ else None
            case "finish":
                ends.finish(one, None)
            case "end":
                ends.end(one, {})
            case "record":
                entries.record(one)
        return None

    if event == CLAIM and (1, 1) not in entries._entries and state != READ:
        return  # its row may be claimed, whatever became of the entry
    if event == END and not allowed:
        with pytest.raises(Mistake):
            act()
    else:
        act()
    assert one.state == TRANSITIONS[state].get(event, state)
    assert bool(events.why) == (event in (AGAIN, FINISH, PUT_BACK) and not allowed)
    assert set(events.why) <= set(REFUSALS.values())
    assert entries.octets == sum(other.octets for other in entries._entries.values()) >= 0


def test_every_state_but_the_last_has_a_way_out_and_all_lead_to_an_end():
    left = {state for state, ways in TRANSITIONS.items() if set(ways.values()) - {state}}
    assert set(TRANSITIONS) - left == {ENDED, ON_DISK}, "ended, and on disk: nothing but a row is left"
