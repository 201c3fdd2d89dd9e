"""What a session is told of its mailbox: equal to an oracle of plain lists, and the cases that others got wrong."""

from random import Random

import pytest

from relaymta.proto.imap_records import load
from relaymta.proto.imap_uids import NoSuchNumber, Shared
from relaymta.proto.imap_view import Desynchronized, Mailbox, View
from tests.proto.imap_model import DELETED, SAVED, STAR, Session, Store, comes_back, numbers
from tests.speedups.index import Rec, pack, pack32, unpack32

SEEN, FLAGGED = 1, 4


class Run:
    """Three sessions that do things at random."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.store, self.shared = Store(), Shared()
        self.keywords = [f"$k{n}" for n in range(2)]
        for _ in range(random.randint(0, 12)):
            self.store.deliver(random.choice([0, SEEN, FLAGGED, DELETED]))
        self.sessions = [self.opened() for _ in range(3)]

    def opened(self) -> Session:
        qresync = self.random.random() < 0.5
        return Session(self.store, self.shared, self.random.random() < 0.6, qresync, self.random.random() < 0.5)

    def some(self, session: Session, by_uid: bool) -> list[tuple[int, int]]:
        most = (self.store.uidnext + 3 if by_uid else len(session.told)) or 1
        ends = [self.random.choice([STAR, *range(1, most + 1)]) for _ in range(2 * self.random.randint(1, 3))]
        return list(zip(ends[::2], ends[1::2], strict=True))

    def outside(self) -> None:
        """Something happens that no session of these does."""
        store, random = self.store, self.random
        uids = [uid for uid in store.messages if random.random() < 0.3]
        match random.randrange(5):
            case 0:
                store.deliver(random.choice([0, SEEN]))
            case 1:
                store.store(uids, random.choice("+-"), random.choice([SEEN, FLAGGED, DELETED]))
            case 2 if random.random() < 0.4:
                store.expunge(uids)
            case 3 if random.random() < 0.3:
                store.skip(random.randint(1, 3))
            case 4:
                store.expunge([store.deliver()])  # nobody sees it

    def flags(self) -> int:
        if self.random.random() < 0.1 and len(self.store.keywords) < 2:
            self.store.keywords = self.keywords[: len(self.store.keywords) + 1]
        return self.random.choice([SEEN, FLAGGED, DELETED, *(32 << n for n in range(len(self.store.keywords)))])

    def step(self) -> None:
        random, session = self.random, self.random.choice(self.sessions)
        by_uid = random.random() < 0.5
        match random.randrange(9):
            case 0 | 1:
                self.outside()
            case 8:
                session.command_search(self.some(session, by_uid), by_uid, random.choice([0, 2, 3]), random.random() < 0.5)
            case 2:
                session.advance(may_expunge=True, remembers=random.random() < 0.8)
            case 3:
                session.command_fetch(self.some(session, by_uid), by_uid)
            case 4 | 5:
                since = random.choice([None, None, session.view.modseq, self.store.modseq])
                session.command_store(
                    self.some(session, by_uid), by_uid, random.choice(["+", "-", ""]), self.flags(), random.random() < 0.5, since,
                    self.outside,
                )  # fmt: skip
            case 6:
                session.command_expunge()
            case 7:
                session.advance(may_expunge=False, remembers=random.random() < 0.8)

    def back(self) -> None:
        """A client goes, and comes back when more has happened."""
        at = self.random.randrange(3)
        gone, self.sessions[at] = self.sessions[at], self.opened()
        if gone.view.qresync:
            for _ in range(self.random.randint(0, 4)):
                self.outside()
            comes_back(gone.cache(), gone.known(self.random), self.store, self.shared, self.random.random() < 0.6)


@pytest.mark.parametrize("seed", range(250))
def test_clients_know_what_the_mailbox_is(seed):
    run = Run(seed)
    for _ in range(60):
        run.step()
        if run.random.random() < 0.08:
            run.back()
    for session in run.sessions:
        session.advance(may_expunge=True)
        session.command_fetch([(1, STAR)], True)
    arrays = {id(session.view.uids) for session in run.sessions}
    assert len(arrays) == 1 == len(run.shared)


# What one command says, octet by octet


def opened(store: Store, **options) -> View:
    mailbox = Mailbox(7, store.uidnext, store.modseq, store.keywords)
    return View(Shared(), "box", mailbox, load([store.records()]), **options)


def mailbox_of(*flags: int) -> Store:
    store = Store()
    for one in flags:
        store.deliver(one)
    return store


def advanced(view: View, store: Store, may_expunge: bool) -> list[bytes]:
    return b"".join(view.advance(store.since(view.modseq), may_expunge)).split(b"\r\n")[:-1]


def stored(
    view: View, store: Store, uids: list[int], sign: str, flags: int, silent: bool, since: int | None = None
) -> list[bytes]:
    before, after, _ = store.store(uids, sign, flags, since)
    return b"".join(view.stored(pack(before), pack(after), silent, since is not None)).split(b"\r\n")[:-1]


def test_2_expunge_waits_and_numbers_hold():
    """Case 2: RFC 9051 7.5.1, RFC 2180 4."""
    store = mailbox_of(0, 0, 0)
    view = opened(store)
    store.expunge([2])
    for _ in range(2):  # FETCH, STORE, SEARCH
        assert advanced(view, store, may_expunge=False) == []
        assert unpack32(view.targets(numbers([(1, STAR)]), False)) == [1, 2, 3]
        assert b"".join(view.lines(store.records())) == b"* 1 FETCH (UID 1 FLAGS ())\r\n* 3 FETCH (UID 3 FLAGS ())\r\n"
        assert b"".join(view.lines(store.records([2]))) == b""  # never a neighbour's
    store.deliver()
    assert advanced(view, store, may_expunge=False) == [b"* 4 EXISTS", b"* 0 RECENT"]
    assert unpack32(view.targets(numbers([(4, 4)]), False)) == [4]
    assert view.holds
    assert advanced(view, store, may_expunge=True) == [b"* 2 EXPUNGE"]
    assert unpack32(view.targets(numbers([(2, 3)]), False)) == [3, 4]
    assert not view.holds


def test_2_expunges_are_told_from_the_last_one_on():
    store = mailbox_of(0, 0, 0, 0, 0)
    view = opened(store)
    store.expunge([2, 3, 5])
    assert advanced(view, store, may_expunge=True) == [b"* 5 EXPUNGE", b"* 3 EXPUNGE", b"* 2 EXPUNGE"]


def test_3_nothing_but_exists_fetch_expunge():
    """Case 3: RFC 9051 5.2, 7.3.3."""
    store = mailbox_of(0, 0)
    view = opened(store, rev2=True)
    assert advanced(view, store, may_expunge=True) == []
    store.deliver()
    store.store([2], "+", SEEN)
    store.expunge([1])
    assert advanced(view, store, may_expunge=True) == [b"* 1 EXPUNGE", b"* 2 EXISTS", b"* 1 FETCH (UID 2 FLAGS (\\Seen))"]
    assert advanced(view, store, may_expunge=True) == []


def test_4_silent_is_not_silent_under_condstore():
    """Case 4: RFC 7162 3.1.3."""
    store = mailbox_of(0, SEEN, 0)
    view = opened(store, condstore=True)
    assert stored(view, store, [1, 2], "+", SEEN, True) == [b"* 1 FETCH (UID 1 MODSEQ (5))"]  # 2 was seen: no new MODSEQ
    assert advanced(view, store, may_expunge=False) == []  # not told twice
    assert stored(view, store, [1], "+", FLAGGED, False) == [b"* 1 FETCH (UID 1 FLAGS (\\Seen \\Flagged) MODSEQ (6))"]
    assert advanced(view, store, may_expunge=False) == []


def test_4_unchangedsince_tells_the_modseq_of_all_it_applied_to():
    store = mailbox_of(0, SEEN, 0)
    view = opened(store, condstore=True)
    store.store([3], "+", FLAGGED)
    assert stored(view, store, [1, 2, 3], "+", SEEN, True, since=4) == [
        b"* 1 FETCH (UID 1 MODSEQ (6))", b"* 2 FETCH (UID 2 MODSEQ (3))",
    ]  # fmt: skip
    assert view.named(pack32([3]), by_uid=False) == b"3"  # MODIFIED
    assert advanced(view, store, may_expunge=False) == [b"* 3 FETCH (UID 3 FLAGS (\\Flagged) MODSEQ (5))"]


def test_4_what_others_have_changed_is_told_though_silent():
    store = mailbox_of(0)
    for view in (opened(store), opened(store, condstore=True)):
        store.store([1], "", FLAGGED)  # by another session
        flags = stored(view, store, [1], "+", SEEN, True)
        assert [line.partition(b" MODSEQ")[0].rstrip(b")") for line in flags] == [b"* 1 FETCH (UID 1 FLAGS (\\Seen \\Flagged"]
        assert advanced(view, store, may_expunge=False) == []


def test_silent_is_silent_without_condstore():
    store = mailbox_of(0)
    view = opened(store)
    assert stored(view, store, [1], "+", SEEN, True) == []
    assert advanced(view, store, may_expunge=True) == []


def test_5_expunges_of_a_move_name_numbers_or_uids():
    """Case 5: what follows COPYUID."""
    for options, told in (({}, [b"* 3 EXPUNGE", b"* 2 EXPUNGE"]), ({"qresync": True}, [b"* VANISHED 2:3"])):
        store = mailbox_of(0, 0, 0, 0)
        view = opened(store, **options)
        assert view.named(pack32([2, 3]), by_uid=True) == b"2:3"  # COPYUID
        store.expunge([2, 3])
        lines = advanced(view, store, may_expunge=True)
        assert lines[: len(told)] == told
        assert lines[len(told) :] == ([b"* OK [HIGHESTMODSEQ 6] Highest"] if options else [])


def test_highestmodseq_stays_below_what_is_held_back():
    """RFC 7162 6: the example."""
    store = mailbox_of(0, 0, 0, 0)
    view = opened(store, qresync=True)
    before = view.modseq
    store.expunge([4])
    assert stored(view, store, [1], "+", SEEN, True) == [b"* 1 FETCH (UID 1 MODSEQ (7))"]
    assert advanced(view, store, may_expunge=False) == [b"* OK [HIGHESTMODSEQ %d] Highest" % before]
    assert stored(view, store, [3], "+", SEEN, True) == [b"* 3 FETCH (UID 3 MODSEQ (8))"]
    assert advanced(view, store, may_expunge=False) == [b"* OK [HIGHESTMODSEQ %d] Highest" % before]
    assert view.highest == before
    assert advanced(view, store, may_expunge=True) == [b"* VANISHED 4", b"* OK [HIGHESTMODSEQ 8] Highest"]


def test_vanished_names_only_what_was_announced():
    store = mailbox_of(0, 0)
    view = opened(store, qresync=True)
    store.expunge([store.deliver(), 1])
    assert advanced(view, store, may_expunge=True)[0] == b"* VANISHED 1"


def test_a_long_vanished_is_several():
    store = mailbox_of(*[0] * 2000)
    view = opened(store, qresync=True)
    store.expunge(list(range(1, 2001, 2)))
    lines = advanced(view, store, may_expunge=True)
    assert len(lines) == 4
    assert all(len(line) < 8192 for line in lines)


def test_what_is_forgotten_is_found_by_comparing():
    store = mailbox_of(0, 0, 0)
    view = opened(store)
    store.expunge([1])
    store.deliver()
    with pytest.raises(Desynchronized):
        view.advance(store.since(view.modseq)._replace(expunged=None), True)
    with pytest.raises(Desynchronized):
        view.advance(store.since(view.modseq)._replace(expunged=[]), True)
    assert (
        b"".join(view.advance(store.since(view.modseq, remembers=False), True)) == b"* 1 EXPUNGE\r\n* 3 EXISTS\r\n* 0 RECENT\r\n"
    )


def test_a_new_keyword_is_told_before_it_is_used():
    store = mailbox_of(0)
    view = opened(store)
    store.keywords = ["$Junk"]
    store.store([1], "+", 32)
    lines = advanced(view, store, may_expunge=True)
    assert lines[0] == b"* FLAGS (\\Seen \\Answered \\Flagged \\Deleted \\Draft $Junk)"
    assert lines[1].startswith(b"* OK [PERMANENTFLAGS (\\Seen \\Answered \\Flagged \\Deleted \\Draft $Junk \\*)] ")
    assert lines[2:] == [b"* 1 FETCH (UID 1 FLAGS ($Junk))"]
    assert view.flag_bit("$junk") == 5
    assert view.flag_bit("$other") is None


def test_what_select_says():
    store = mailbox_of(SEEN, 0, 0)
    store.keywords = [f"k{n}" for n in range(59)]
    mailbox = Mailbox(7, store.uidnext, store.modseq, store.keywords, 3)
    view = View(Shared(), "box", mailbox, load([store.records()]))
    flags = b" ".join([b"\\Seen", b"\\Answered", b"\\Flagged", b"\\Deleted", b"\\Draft", *(b"k%d" % n for n in range(59))])
    assert view.opened(2).split(b"\r\n") == [
        b"* FLAGS (" + flags + b")", b"* OK [PERMANENTFLAGS (" + flags + b")] Flags that are kept", b"* 3 EXISTS", b"* 1 RECENT",
        b"* OK [UNSEEN 2] First unseen", b"* OK [UIDVALIDITY 7] UIDs valid", b"* OK [UIDNEXT 4] Next UID",
        b"* OK [HIGHESTMODSEQ 4] Highest", b"",
    ]  # fmt: skip
    examined = opened(Store(), rev2=True, read_only=True).opened(0)
    assert b"* 0 EXISTS\r\n* OK [UIDVALIDITY" in examined
    assert b"PERMANENTFLAGS ()" in examined


def test_recent_of_the_first_session():
    store = mailbox_of(0, 0)
    view = View(Shared(), "box", Mailbox(7, 3, 3, [], 2), load([store.records()]))
    assert b"".join(view.lines(store.records())) == b"* 1 FETCH (UID 1 FLAGS ())\r\n* 2 FETCH (UID 2 FLAGS (\\Recent))\r\n"
    assert view.flag_list(2, SEEN) == b"\\Recent \\Seen"
    store.deliver()
    assert advanced(view, store, may_expunge=False) == [b"* 3 EXISTS", b"* 1 RECENT"]  # another session was told of it before
    store.deliver()
    view.take_recent(3, 5)
    assert advanced(view, store, may_expunge=False) == [b"* 4 EXISTS", b"* 3 RECENT"]
    store.deliver()
    assert advanced(view, store, may_expunge=False) == [b"* 5 EXISTS", b"* 3 RECENT"]


def test_condstore_is_enabled_once():
    view = opened(mailbox_of(0))
    assert view.enable_condstore() == b"* OK [HIGHESTMODSEQ 2] Highest\r\n"
    assert view.enable_condstore() == b""
    assert b"".join(view.lines(pack([Rec(1, 0, 2)]))) == b"* 1 FETCH (UID 1 FLAGS () MODSEQ (2))\r\n"


def test_what_slices_of_a_fetch_have_told_is_told_once():
    store = mailbox_of(0, 0, 0)
    view = opened(store)
    store.store([1, 2, 3], "+", SEEN)
    for uids in ([3], [1], [2]):
        view.told(store.records(uids))
    assert advanced(view, store, may_expunge=False) == []
    assert view._told == []
    store.store([2], "-", SEEN)
    assert advanced(view, store, may_expunge=False) == [b"* 2 FETCH (UID 2 FLAGS ())"]


# Sequence sets


def test_sequence_sets():
    store = mailbox_of(0, 0, 0, 0, 0, 0)
    store.expunge([2, 5])
    view = opened(store)  # 1 3 4 6
    for ranges, uids in (
        ([(4, 2), (3, 3)], [3, 4, 6]),
        ([(STAR, STAR)], [6]),
        ([(STAR, 3)], [4, 6]),
        ([(1, STAR), (2, 2)], [1, 3, 4, 6]),
        ([(5, STAR)], [6]),
        ([(1, 1), (9, STAR)], [1, 6]),
    ):
        assert unpack32(view.targets(numbers(ranges), by_uid=False)) == uids
    for ranges, uids in (
        ([(5, 2)], [3, 4]),
        ([(99, STAR)], [6]),
        ([(5, 5), (7, 0xFFFFFFFF)], []),
        ([(5, 5)], []),
        ([(STAR, 6)], [6]),
    ):
        assert unpack32(view.targets(numbers(ranges), by_uid=True)) == uids
    for ranges in ([(1, 5)], [(2, 0xFFFFFFFF)], [(1, 1), (5, 5)], [(1, STAR), (5, 5)]):
        with pytest.raises(NoSuchNumber):
            view.targets(numbers(ranges), by_uid=False)
    assert view.uids.number(5) == 0
    assert view.named(pack32([1, 4, 6]), by_uid=False) == b"1,3:4"


def test_an_empty_mailbox_has_no_numbers():
    view = opened(Store())
    for ranges in ([(1, STAR)], [(STAR, STAR)], [(1, 1)]):
        assert view.targets(numbers(ranges), by_uid=True) == b""
    for ranges in ([(1, STAR)], [(STAR, STAR)]):
        assert view.targets(numbers(ranges), by_uid=False) == b""
    for ranges in ([(1, 1)], [(1, 1), (STAR, STAR)]):
        with pytest.raises(NoSuchNumber):
            view.targets(numbers(ranges), by_uid=False)


def test_what_is_saved_loses_what_is_expunged():
    """RFC 9051 6.4.4.1."""
    store = mailbox_of(0, 0, 0)
    view = opened(store)
    assert view.targets(SAVED, by_uid=False) == view.targets(SAVED, by_uid=True) == b""
    view.saved = pack32([1, 3])
    store.expunge([1])
    advanced(view, store, may_expunge=False)
    assert unpack32(view.targets(SAVED, by_uid=False)) == [1, 3]
    advanced(view, store, may_expunge=True)
    assert unpack32(view.targets(SAVED, by_uid=False)) == [3]


def test_sessions_share_arrays_which_go_with_them():
    store, shared = mailbox_of(0, 0, 0), Shared()
    mailbox = Mailbox(7, store.uidnext, store.modseq, [], 1)
    one, other = (View(shared, "box", mailbox, load([store.records()])) for _ in range(2))
    assert one.uids is other.uids
    store.expunge([2])
    advanced(one, store, may_expunge=False)
    assert one.uids is other.uids  # it holds back
    advanced(other, store, may_expunge=True)
    assert one.uids is not other.uids
    advanced(one, store, may_expunge=True)
    assert one.uids is other.uids
    for _ in range(100):
        store.store([1], "+" if _ % 2 else "-", SEEN)
        advanced(one, store, may_expunge=True)
    assert (len(shared), shared.octets) == (1, 8)
    advanced(other, store, may_expunge=True)
    assert one.uids is other.uids
    del one, other
    assert len(shared) == 0


def test_a_reply_comes_in_pieces():
    store = mailbox_of(*[0] * 9000)
    view = opened(store)
    store.store(list(store.messages), "+", SEEN)
    pieces = list(view.advance(store.since(view.modseq), True))
    assert len(pieces) == 3
    assert max(map(len, pieces)) < 300_000
    store.expunge(list(store.messages))
    assert len(list(view.advance(store.since(view.modseq), True))) == 3
    assert len(view) == 0


def test_changes_that_are_older_than_the_view_are_ignored():
    store = mailbox_of(0, 0)
    view = opened(store)
    old = store.since(view.modseq)
    store.deliver()
    advanced(view, store, may_expunge=True)
    assert list(view.advance(old, may_expunge=True)) == []
    assert (len(view), view.modseq) == (3, store.modseq)


def test_changes_that_are_told_twice_do_no_harm():
    """Two reads may overlap: IDLE's, and the next command's."""
    store = mailbox_of(0, 0, 0)
    view = opened(store)
    store.expunge([2])
    store.deliver()
    changes = store.since(view.modseq)
    assert b"".join(view.advance(changes, may_expunge=True)) == b"* 2 EXPUNGE\r\n* 3 EXISTS\r\n* 0 RECENT\r\n"
    assert b"".join(view.advance(changes, may_expunge=True)) == b"* 3 FETCH (UID 4 FLAGS ())\r\n"
    assert unpack32(view.uids.data) == [1, 3, 4]


def test_own_changes_need_no_look():
    store = mailbox_of(0, 0, 0)
    view = opened(store)
    assert view.covers(view.modseq) and not view.covers(view.modseq + 1)
    store.store([3], "+", SEEN)  # another session's
    stored(view, store, [1], "+", SEEN, silent=True)
    assert not view.covers(store.modseq)
    advanced(view, store, may_expunge=False)
    stored(view, store, [1, 2, 3], "-", SEEN, silent=True)
    stored(view, store, [1], "-", SEEN, silent=False)  # which has it not
    stored(view, store, [2], "+", SEEN, silent=False)
    assert view.covers(store.modseq) and not view.covers(store.modseq + 1)
    store.store([1, 2], "+", SEEN | DELETED)
    view.told(store.records()[:24])  # by a FETCH, which has not told all of that change
    assert not view.covers(store.modseq)
