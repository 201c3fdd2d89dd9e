"""What was in flight when a worker died: probed side by side at different sites; only a certain culprit is quarantined."""

from relaymta.proto.envelope import Envelope, QueueName
from relaymta.queue import Entry
from relaymta.queue.lifecycle import CLAIMED, ENDED, WAITING
from relaymta.send.recovery import Recovery
from relaymta.shm import PROBED, InFlight, Shared


class Life:
    """One worker's recovery, over the shared memory of its slot."""

    begins = True  # whether what is offered is begun

    def __init__(self, shared: Shared, probed: dict[int, bool]) -> None:
        self.marks: InFlight = shared.in_flight(0)
        self.tried: list[Entry] = []
        self.recovery = Recovery(self.marks, probed, self.offer)

    def offer(self, one: Entry) -> None:
        if not self.recovery.takes(one):
            self.tried.append(one)
            if self.begins:
                self.marks.add(one.ident)

    def end(self, one: Entry) -> None:
        one.state = ENDED
        self.recovery.landed(one)

    @property
    def idents(self) -> list[int]:
        return [one.ident for one in self.tried]


def entry(ident: int, domain: str = "") -> Entry:
    name = QueueName("mx", domain or f"d{ident}.test", "")
    made = Entry(ident, Envelope("a@b", ["c@d"], 1, 0, 0, 0), name, 1, 0, 0, None, True)
    made.state = WAITING
    return made


def offered(life: Life, *entries: Entry) -> list[Entry]:
    for one in entries:
        life.offer(one)
    return list(entries)


def test_a_silent_peer_holds_only_the_probes_of_its_own_site():
    life = Life(Shared.create(), dict.fromkeys(range(1, 6), False))
    one, two, *_ = offered(life, entry(1, "silent.test"), entry(2, "silent.test"), entry(3), entry(4), entry(5), entry(9))
    assert life.idents == [1, 3, 4, 5, 9]
    assert life.recovery.keeps(two) and not life.recovery.keeps(one)
    life.end(one)
    assert life.idents == [1, 3, 4, 5, 9, 2]


def test_at_most_so_many_are_probed_as_there_are_cells():
    life = Life(Shared.create(), dict.fromkeys(range(1, 101), False))
    entries = offered(life, *map(entry, range(1, 101)))
    assert len(life.tried) == PROBED
    for one in entries:
        life.end(one)
    assert life.idents == list(range(1, 101))


def test_a_message_probed_while_nothing_else_was_in_flight_is_the_culprit():
    shared = Shared.create()
    life = Life(shared, {1: False})
    offered(life, entry(1))
    assert shared.in_flight(0).take() == ([], 1)


def test_where_several_were_in_flight_none_is_the_culprit_before_it_was_tried_alone():
    shared = Shared.create()
    life = Life(shared, dict.fromkeys(range(1, 4), False))
    offered(life, entry(1), entry(2), entry(3), entry(9))
    probed, culprit = shared.in_flight(0).take()
    assert (dict(probed), culprit) == ({1: True, 2: True, 3: True, 9: False}, 0)

    life = Life(shared, dict(probed))
    _, one, *_ = offered(life, entry(9), entry(1), entry(2), entry(3))
    assert life.idents == [9], "an alone one waits until no other is probed"
    life.end(life.tried[0])
    assert life.idents == [9, 1]
    life.end(one)
    assert life.idents == [9, 1, 2]
    offered(life, entry(20))  # other mail goes on
    assert shared.in_flight(0).take() == ([(20, False)], 2)


def test_mail_of_others_in_flight_makes_a_single_probe_no_culprit():
    shared = Shared.create()
    life = Life(shared, {1: False})
    offered(life, entry(1), entry(2))
    assert shared.in_flight(0).take() == ([(1, True), (2, False)], 0)


def test_a_message_that_is_to_be_probed_and_was_not_begun_is_no_culprit():
    shared = Shared.create()
    life = Life(shared, {1: False})
    life.begins = False
    offered(life, entry(1))
    assert shared.in_flight(0).take() == ([], 0)


def test_a_probed_message_that_an_operator_takes_does_not_hold_the_others():
    life = Life(Shared.create(), {1: True, 2: True})
    one, _ = offered(life, entry(1), entry(2))
    assert life.idents == [1]
    one.state = CLAIMED
    life.recovery.tick()
    assert life.idents == [1, 2]
