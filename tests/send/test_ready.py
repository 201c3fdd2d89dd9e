"""The order in which entries are delivered to a site."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.envelope import CLASSES, Envelope, QueueName
from relaymta.queue import Entry
from relaymta.queue.lifecycle import CLAIMED, WAITING
from relaymta.send.ready import TURNS, Ready


def entry(ident: int, application: str = "", priority: str = "normal", queue: int = 1) -> Entry:
    made = Entry(
        ident, Envelope("a@b", ["c@d"], 1, 0, 0, 0), QueueName("mx", "d", application, priority), queue, 0, 0, None, True
    )
    made.state = WAITING
    return made


def order(ready: Ready, count: int = 1000) -> list[Entry]:
    found = []
    while len(found) < count and ready.head() is not None:
        found.append(ready.pop())
    return found


def test_a_small_tenant_waits_for_one_message_of_a_large_one():
    ready = Ready()
    for number in range(1000):
        ready.push(entry(number, "large"))
    order(ready, 3)
    for number in range(10):
        ready.push(entry(5000 + number, "small"))
    applications = [e.name.application for e in order(ready, 21)]
    assert applications.count("small") == 10
    assert "largelarge" not in "".join(applications[1:20])


def test_a_higher_class_goes_first_and_starves_nobody():
    ready = Ready()
    for number in range(100):
        ready.push(entry(number, priority="bulk"))
        ready.push(entry(100 + number, priority="express"))
    first = [e.name.priority for e in order(ready, 5 * TURNS)]
    assert first[0] == "express"
    assert Counter(first) == {"express": 5 * (TURNS - 1), "bulk": 5}


def test_the_head_is_the_same_until_it_is_popped():
    ready = Ready()
    ready.push(entry(1))
    ready.push(entry(2, priority="express"))
    assert ready.head() is ready.head()
    assert ready.head() is ready.pop()
    assert ready.highest() == len(CLASSES) - CLASSES["normal"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from(list(CLASSES)), st.sampled_from("xyz"), st.integers(1, 3), st.booleans()),
        st.tuples(st.sampled_from(["pop", "cancel", "remove"]), st.integers(0, 20)),
    )
)


@given(STEPS)
def test_each_pushed_entry_is_popped_once_unless_it_was_removed(steps):
    ready, waiting, number = Ready(), [], 0
    for step in steps:
        if step[0] == "push":
            number += 1
            one = entry(number, step[2], step[1], step[3])
            ready.push(one, step[4])
            waiting.append(one)
        elif step[0] == "pop":
            head = ready.head()
            assert (head is None) == (not waiting)
            if head is not None:
                assert ready.pop() is head
                waiting.remove(head)
        elif waiting:
            one = waiting.pop(step[1] % len(waiting))
            if step[0] == "cancel":
                one.state = CLAIMED
            else:
                assert ready.remove(one)
                assert not ready.remove(one)
        assert sorted(e.ident for e in ready if e.waiting) == sorted(e.ident for e in waiting)
        assert set(ready.first(3)) <= set(waiting)
    places = {e: ready.position(e, 1000) for e in waiting}
    assert ready.position(entry(0), 1000) == -1
    assert [places[e] for e in order(ready, len(waiting) // 2)] == list(range(len(waiting) // 2)), "positions are exact"
    waiting = sorted((e for e in waiting if places[e] >= len(waiting) // 2), key=lambda e: e.ident)
    assert sorted(e.ident for e in ready.take_all()) == sorted(e.ident for e in waiting)
    assert len(ready) == 0


def test_a_tenant_of_more_weight_has_more_messages_in_its_turn():
    ready = Ready({"paid": 3})
    for number in range(60):
        ready.push(entry(number, "paid"))
        ready.push(entry(100 + number, "free"))
    assert "".join(e.name.application[0] for e in order(ready, 12)) in ("pppf" * 3, "fppp" * 3)
    one = next(e for e in ready if e.ident == 150)
    ahead = ready.position(one, 1000)
    assert list(order(ready)).index(one) == ahead, "positions respect weights"


def test_a_claimed_entry_has_no_position():
    ready = Ready()
    first, claimed = entry(1), entry(2)
    ready.push(first)
    ready.push(claimed)
    assert ready.position(claimed, 1000) == 1
    claimed.state = CLAIMED
    assert ready.position(claimed, 1000) == -1
