"""SEARCH: programs equal to an oracle that looks at one message after another, and what is told of what was found."""

from datetime import date, timedelta
from random import Random
from typing import NamedTuple

import pytest

from relaymta.proto.imap_command import (
    Age,
    And,
    Day,
    Field,
    Flagged,
    Key,
    Modified,
    Not,
    Numbers,
    ObjectId,
    Or,
    Size,
    Text,
    Within,
)
from relaymta.proto.imap_found import Found
from relaymta.proto.imap_program import Batch, Program, Stage
from relaymta.proto.imap_text import MessageText
from relaymta.proto.imap_uids import Shared
from relaymta.proto.imap_view import Mailbox, View
from relaymta.proto.mime_text import comparable
from tests.proto.imap_model import SAVED, STAR, numbers
from tests.speedups.index import Rec, pack, pack32, unpack, unpack32

DAY = 86_400_000
NOW = 20_000 * DAY + 5_000
NAMES = ["\\Seen", "\\Answered", "\\Flagged", "\\Deleted", "\\Draft", "$Junk"]
WORDS = ["alpha", "Beta", "straße", "STRASSE", "", "x"]


class Row(NamedTuple):
    date: int
    saved: int
    size: int


class Message:
    """A message with all that a search may ask for; it is its own ENVELOPE and header."""

    def __init__(self, random: Random, uid: int) -> None:
        self.uid, self.flags, self.modseq = uid, random.randrange(64), random.randint(1, 50)
        self.row = Row(NOW - random.randint(0, 4 * DAY), NOW - random.randint(0, 4 * DAY), random.randrange(6))
        self.day = random.choice([None, date(2024, 10, 4) + timedelta(days=random.randrange(4))])
        self.fields = {
            name: " ".join(random.sample(WORDS, 2)) for name in ("from", "subject", "message-id") if random.random() < 0.7
        }
        self.others = {"x-a": random.choice(WORDS)} if random.random() < 0.5 else {}
        self.body = " ".join(random.sample(WORDS, 2))

    def ident(self) -> str:
        return f"M{self.uid % 3}"

    def sent(self) -> date | None:
        return self.day

    def has(self, name: str | bytes, needle: str) -> bool:
        text = {**self.fields, **self.others}.get(name if isinstance(name, str) else name.decode())
        return text is not None and needle in comparable(text)

    def text(self) -> MessageText:
        values = "".join(f"A: {value}\r\n" for value in (*self.fields.values(), *self.others.values()))
        return MessageText(values.encode(), b"\r\n" + self.body.encode())


def members(chosen: Numbers, largest: int) -> set[int]:
    found = {number for low, high in chosen.ranges for number in range(low, high + 1)}
    if chosen.star is not None:
        found |= set(range(min(chosen.star, largest), largest + 1))
    return found


def holds(key: Key, message: Message, numbered: list[int], saved: list[int]) -> bool:
    """Whether a message matches, from the RFCs alone."""
    day = lambda ms: date(1970, 1, 1) + timedelta(days=ms // DAY)  # noqa: E731
    related = {"<": date.__lt__, "=": date.__eq__, ">": date.__ge__}
    contains = lambda what, text: comparable(what) in comparable(text)  # noqa: E731
    match key:
        case Flagged(name):
            return name in NAMES and bool(message.flags >> NAMES.index(name) & 1)
        case Within(Numbers(saved=True)):
            return message.uid in saved
        case Within(chosen, uid=False):
            return numbered.index(message.uid) + 1 in members(chosen, len(numbered))
        case Within(chosen):
            return message.uid in members(chosen, numbered[-1])
        case Modified(modseq):
            return message.modseq >= modseq
        case Day("SENT", how, wanted):
            return message.day is not None and related[how](message.day, wanted)
        case Day(which, how, wanted):
            return related[how](day(message.row.date if which == "INTERNAL" else message.row.saved), wanted)
        case Age(older, seconds):
            ago = NOW // 1000 - message.row.date // 1000
            return ago >= seconds if older else ago <= seconds
        case Size(larger, octets):
            return message.row.size > octets if larger else message.row.size < octets
        case ObjectId(which, ident):
            return which == "EMAILID" and ident == f"M{message.uid % 3}"
        case Text("BODY", what):
            return contains(what, message.body)
        case Text("TEXT", what):
            texts = (*message.fields.values(), *message.others.values(), message.body)
            return any(contains(what, text) for text in texts) or not what
        case Text(where, what):
            return where.lower() in message.fields and contains(what, message.fields[where.lower()])
        case Field(name, what):
            fields = {**message.fields, **message.others}
            return name.lower() in fields and contains(what, fields[name.lower()])
        case Not(inner):
            return not holds(inner, message, numbered, saved)
        case Or(one, other):
            return holds(one, message, numbered, saved) or holds(other, message, numbered, saved)
        case And(keys):
            return all(holds(one, message, numbered, saved) for one in keys)
    raise AssertionError(key)


def tree(random: Random, count: int, depth: int = 0) -> Key:
    """A search key."""
    inner = lambda: tree(random, count, depth + 1)  # noqa: E731
    if depth < 4 and random.random() < 0.5:
        return random.choice(
            [lambda: Not(inner()), lambda: Or(inner(), inner()), lambda: And(tuple(inner() for _ in range(random.randrange(4))))]
        )()
    chosen = numbers([(random.randint(0, count), random.randint(0, count)) for _ in range(random.randint(1, 3))])
    word, day = random.choice(WORDS), date(2024, 10, 4) + timedelta(days=random.randrange(4))
    return random.choice(
        [
            And(), Flagged(random.choice([*NAMES, "$Unknown"])), Within(chosen, False), Within(chosen, True),
            Within(SAVED, False), Modified(random.randint(0, 50)), Size(random.random() < 0.5, random.randrange(6)),
            Day(random.choice(["INTERNAL", "SAVED", "SENT"]), random.choice("<=>"), day),
            Age(random.random() < 0.5, random.randint(1, 4 * DAY // 1000)),
            ObjectId(*random.choice([("EMAILID", "M1"), ("THREADID", "T0")])),
            Text(random.choice(["FROM", "SUBJECT", "TO"]), word), Text(random.choice(["BODY", "TEXT"]), word),
            Field(random.choice(["X-A", "Subject", "From", "X-None"]), word),
        ]
    )  # fmt: skip


def give(batch: Batch, stage: Stage, messages: list[Message]) -> None:
    match stage:
        case Stage.ROW:
            batch.rows = [one.row for one in messages]
        case Stage.ENVELOPE:
            batch.envelopes = messages
        case Stage.HEADER:
            batch.headers = messages
        case Stage.BODY:
            batch.bodies = [one.text() for one in messages]


def searched(program: Program, messages: list[Message], random: Random, found: Found) -> set[Stage]:
    """Run a program as a caller does, which brings as many messages at a time as it likes, in turns of some steps; the stages
    that it asked for."""
    by_uid, asked = {one.uid: one for one in messages}, set()
    at = 0
    while at < len(messages):
        part = messages[at : at + random.randint(1, 9)]
        at += len(part)
        batch = program.batch(pack([Rec(one.uid, one.flags, one.modseq) for one in part]))
        matching, batch = (b"", None) if batch is None else program.run(batch)
        found.add(matching)
        todo = [] if batch is None else [batch]
        while todo:
            batch, rest = todo.pop().divided(random.randint(1, 9))
            if any(batch.data(stage) is None for stage in program.stages):
                stage = program.next_stage(batch)
                asked.add(stage)
                give(batch, stage, [by_uid[uid] for uid in batch.uids])
            program.turns.begin(lambda: random.random() < 0.3, 0)
            matching, batch = program.run(batch)
            found.add(matching)
            todo += [one for one in (rest, batch) if one]
    return asked


def view_of(uids: list[int], **options) -> View:
    return View(Shared(), "box", Mailbox(7, max(uids, default=0) + 1, 60, ["$Junk"], 1), pack32(uids), **options)


@pytest.mark.parametrize("seed", range(400))
def test_programs_equal_the_oracle(seed):
    random = Random(seed)
    uids = sorted(random.sample(range(1, 60), random.randint(1, 25)))
    messages = [Message(random, uid) for uid in uids]
    view = view_of(uids)
    saved = [uid for uid in uids if random.random() < 0.5]
    view.saved = pack32([*saved, 61])  # a message that is gone
    key = tree(random, len(uids))
    program, found = Program(key, view, NOW), Found()
    unseen = Message(random, 70)  # it came meanwhile, and has no number yet
    there = [one for one in messages if random.random() < 0.9]  # some are gone meanwhile
    asked = searched(program, [*there, unseen], random, found)
    assert unpack32(found.uids()) == [one.uid for one in there if holds(key, one, uids, saved)]
    assert asked <= program.stages


def program_of(key, count: int = 3) -> tuple[Program, View]:
    view = view_of(list(range(1, count + 1)))
    return Program(key, view, NOW), view


def test_what_the_index_answers_needs_no_rows():
    program, _ = program_of(And((Not(Flagged("\\Seen")), Or(Flagged("$JUNK"), Modified(5)), Within(numbers([(2, STAR)]), True))))
    assert program.stages == set()
    assert program.run(Batch(pack([Rec(1, 0, 9), Rec(2, 0, 9), Rec(3, 1, 9)])))[0] == pack([Rec(2, 0, 9)])


class Stub:
    """Of a message: what it has in any field and in its text."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def has(self, name: str | bytes, needle: str) -> bool:
        return needle in self.texts

    def text(self) -> MessageText:
        return MessageText(b"", b"\r\n" + " ".join(self.texts).encode())


def test_only_what_is_undecided_is_asked_for():
    program, _ = program_of(And((Text("BODY", "x"), Text("SUBJECT", "a"), Not(Flagged("\\Seen")))))
    matching, batch = program.run(Batch(pack([Rec(1, 1, 1), Rec(2, 0, 1), Rec(3, 0, 1)])))
    assert batch is not None
    assert (matching, list(batch.uids), program.next_stage(batch)) == (b"", [2, 3], Stage.ENVELOPE)
    batch.envelopes = [Stub("a"), Stub()]
    matching, batch = program.run(batch)
    assert batch is not None
    assert (matching, list(batch.uids), program.next_stage(batch)) == (b"", [2], Stage.BODY)
    batch.bodies = [Stub("x").text()]
    assert program.run(batch) == (pack([Rec(2, 0, 1)]), None)


def test_strings_are_compared_in_one_form():
    batch = Batch(pack([Rec(1, 0, 1)]))
    batch.envelopes = batch.headers = [Stub("strasse")]
    batch.bodies = [Stub("strasse").text()]
    for key in (
        Text("SUBJECT", "STRA\u00dfE"),
        Field("Subject", "Stra\u00dfe"),
        Field("X", "STRASSE"),
        Text("BODY", "stra\u00dfe"),
    ):
        assert program_of(key)[0].run(batch)[0], key


def test_an_empty_string():
    """RFC 9051 6.4.4: HEADER asks for the field; the text of any message has it in it."""
    for where in ("BODY", "TEXT"):
        program, _ = program_of(Text(where, ""))
        assert not program.stages and program.run(Batch(pack([Rec(1, 0, 1)])))[0]
    assert program_of(Text("SUBJECT", ""))[0].stages == program_of(Field("Subject", ""))[0].stages == {Stage.ENVELOPE}


def test_no_message_has_a_thread_id():
    program, _ = program_of(ObjectId("THREADID", "T1"))
    assert not program.stages and program.run(Batch(pack([Rec(1, 0, 1)]))) == (b"", None)


def test_numbers_of_no_message_find_nothing():
    """Elsewhere they are BAD (NoSuchNumber)."""
    records = pack([Rec(1, 0, 1), Rec(2, 0, 1), Rec(3, 0, 1)])
    for chosen, by_uid, uids in (
        ([(2, 9)], False, [2, 3]), ([(4, 9)], False, []), ([(1, 1), (7, STAR)], False, [1, 3]), ([(4, 9)], True, []),
        ([(4, STAR)], True, [3]),  # the last one: RFC 9051 6.4.9
    ):  # fmt: skip
        matching, _ = program_of(Within(numbers(chosen), by_uid))[0].run(Batch(records))
        assert [one.uid for one in unpack(matching)] == uids
        assert program_of(Within(numbers(chosen), by_uid), 0)[0].batch(records) is None


def test_message_numbers_within_a_program():
    """During UID SEARCH with message numbers no EXPUNGE is told: RFC 9051 7.5.1."""
    number, uid = Within(numbers([(1, 1)]), False), Within(numbers([(1, 1)]), True)
    for key, named in ((Or(And(), Not(number)), True), (And((number, uid)), True), (uid, False), (Within(SAVED, False), False)):
        assert program_of(key)[0].by_number == named


def test_recent_is_the_sessions():
    view = View(Shared(), "box", Mailbox(7, 4, 9, [], 3), pack32([1, 2, 3]))
    records = pack([Rec(1, 0, 1), Rec(2, 1, 1), Rec(3, 0, 1)])
    assert Program(Flagged("\\Recent"), view, 0).run(Batch(records))[0] == records[48:]
    assert Program(Not(Flagged("\\Recent")), view, 0).run(Batch(records))[0] == records[:48]
    assert Program(Flagged("\\Recent"), view_of([1, 2, 3], rev2=True), 0).run(Batch(records))[0] == b""


FOUND = pack([Rec(2, 0, 30), Rec(10, 0, 10), Rec(11, 0, 12), Rec(12, 0, 15)])
RETURNS = [
    ("", b" ALL 2,5:7", [2, 10, 11, 12]),
    ("MIN", b" MIN 2", [2]),
    ("MAX", b" MAX 7", [12]),
    ("MIN MAX", b" MIN 2 MAX 7", [2, 12]),
    ("COUNT", b" COUNT 4", [2, 10, 11, 12]),
    ("MIN COUNT", b" MIN 2 COUNT 4", [2, 10, 11, 12]),
    ("MAX MIN ALL COUNT", b" MIN 2 MAX 7 COUNT 4 ALL 2,5:7", [2, 10, 11, 12]),
]


@pytest.mark.parametrize(("returns", "said", "saved"), RETURNS, ids=[row[0] for row in RETURNS])
@pytest.mark.parametrize("save", [False, True])
def test_esearch_and_what_it_saves(returns, said, saved, save):
    view = view_of([1, 2, 3, 4, 10, 11, 12])
    found = Found({*returns.split(), *(["SAVE"] if save else [])})
    found.add(FOUND[48:])
    found.add(FOUND[:48])
    if save and not returns:
        assert list(found.esearch(b"A1", view, False, False)) == []
    else:
        assert b"".join(found.esearch(b"A1", view, False, False)) == b'* ESEARCH (TAG "A1")' + said + b"\r\n"
    found.save(view)
    assert unpack32(view.saved) == (saved if save else [])


def test_esearch_of_uids_and_of_nothing():
    view = view_of([2, 10, 11, 12])
    found = Found({"MIN", "MAX", "ALL"})
    assert b"".join(found.esearch(b"A", view, True, True)) == b'* ESEARCH (TAG "A") UID\r\n'
    assert b"".join(Found({"MIN", "COUNT"}).esearch(b"A", view, False, True)) == b'* ESEARCH (TAG "A") COUNT 0\r\n'
    found.add(FOUND)
    assert b"".join(found.esearch(b"A", view, True, True)) == b'* ESEARCH (TAG "A") UID MIN 2 MAX 12 ALL 2,10:12 MODSEQ 30\r\n'
    assert b"".join(found.search(view, False, False)) == b"* SEARCH 1 2 3 4\r\n"
    assert b"".join(found.search(view, True, True)) == b"* SEARCH 2 10 11 12 (MODSEQ 30)\r\n"
    assert b"".join(Found().search(view, True, True)) == b"* SEARCH\r\n"


@pytest.mark.parametrize(("returns", "modseq"), [("MIN", 30), ("MAX", 15), ("MIN MAX", 30), ("MAX COUNT", 30)])
def test_modseq_is_that_of_what_is_returned(returns, modseq):
    """RFC 4731 3.2."""
    found = Found(set(returns.split()))
    found.add(FOUND)
    assert b"".join(found.esearch(b"A", view_of([2, 10, 11, 12]), False, True)).endswith(b" MODSEQ %d\r\n" % modseq)


def test_the_lowest_is_enough_for_min_alone():
    for returns, enough in (("MIN", True), ("MIN SAVE", True), ("MIN MAX", False), ("SAVE", False), ("MIN COUNT", False)):
        found = Found(set(returns.split()))
        assert not found.enough
        found.add(FOUND)
        assert found.enough == enough


def test_results_in_any_order_are_in_order():
    random = Random(1)
    records = [Rec(uid, 0, uid) for uid in random.sample(range(1, 1000), 300)]
    found = Found()
    for at in range(0, 300, 7):
        found.add(pack(sorted(records[at : at + 7])))
    assert unpack32(found.uids()) == sorted(one.uid for one in records)


def test_what_is_false_by_a_dearer_key_is_not_asked_for():
    program, _ = program_of(And((Field("x", "a"), Not(Or(Flagged("\\Seen"), Text("BODY", "b"))))))
    _, batch = program.run(Batch(pack([Rec(1, 1, 1), Rec(2, 0, 1)])))
    assert batch is not None
    assert list(batch.uids) == [2]


def found_by(key: Key, rows: list[Row]) -> list[int]:
    """The UIDs of messages with these rows that match; they begin with 1."""
    batch = Batch(pack([Rec(uid, 0, 1) for uid in range(1, len(rows) + 1)]))
    batch.rows = rows
    return [one.uid for one in unpack(program_of(key, len(rows))[0].run(batch)[0])]


def test_older_and_younger_include_the_second_itself():
    """RFC 5032 2."""
    rows = [Row(NOW - 10_000 + more, 0, 0) for more in (-5001, -1, 0, 4999)]
    for older, uids in ((True, [1, 2, 3]), (False, [3, 4])):
        assert found_by(Age(older, 10), rows) == uids


def test_dates_are_days_of_utc():
    today = date(1970, 1, 1) + timedelta(days=NOW // DAY)
    for which, at in (("INTERNAL", 0), ("SAVED", 1)):
        rows = [Row(*(NOW // DAY * DAY + more if at == n else 0 for n in (0, 1)), 0) for more in (-1, 0, DAY - 1, DAY)]
        for how, uids in (("<", [1]), ("=", [2, 3]), (">", [2, 3, 4])):
            assert found_by(Day(which, how, today), rows) == uids


def test_a_field_of_addresses_is_searched_as_it_stands():
    """HEADER FROM is about the text of the field, FROM about the ENVELOPE."""
    assert program_of(Field("From", "x"))[0].stages == {Stage.HEADER}
    assert program_of(Text("FROM", "x"))[0].stages == {Stage.ENVELOPE}


def test_one_message_is_returned_once():
    found, view = Found({"MIN", "MAX", "SAVE"}), view_of([5])
    found.add(pack([Rec(5, 0, 1)]))
    found.save(view)
    assert unpack32(view.saved) == [5]
