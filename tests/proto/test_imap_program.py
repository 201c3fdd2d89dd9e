"""SEARCH: programs equal to an oracle that looks at one message after another, and what is told of what was found."""

import unicodedata
from datetime import date, timedelta
from random import Random

import pytest

from relaymta.proto import imap_program as search
from relaymta.proto.imap_found import Found
from relaymta.proto.imap_program import And, Batch, Flag, Not, Or, Program, Stage, fold
from relaymta.proto.imap_uids import STAR, NoSuchNumber, Shared
from relaymta.proto.imap_view import Mailbox, View
from tests.speedups.index import Rec, pack, pack32, unpack32

DAY = 86_400_000
NOW = 20_000 * DAY + 5_000
NAMES = ["\\Seen", "\\Answered", "\\Flagged", "\\Deleted", "\\Draft", "$Junk"]
WORDS = ["alpha", "Beta", "straße", "STRASSE", "", "x"]


class Message:
    """A message with all that a search may ask for."""

    def __init__(self, random: Random, uid: int) -> None:
        self.uid, self.flags, self.modseq = uid, random.randrange(64), random.randint(1, 50)
        self.row = search.Row(
            NOW - random.randint(0, 4 * DAY), NOW - random.randint(0, 4 * DAY), random.randrange(6), f"M{uid % 3}", f"T{uid % 2}"
        )
        self.sent = random.choice([None, date(2024, 10, 4) + timedelta(days=random.randrange(4))])
        self.fields = {
            name: " ".join(random.sample(WORDS, 2)) for name in ("from", "subject", "message-id") if random.random() < 0.7
        }
        self.others = {"x-a": [random.choice(WORDS)]} if random.random() < 0.5 else {}
        self.parts, self.body = random.choice(WORDS), " ".join(random.sample(WORDS, 2))

    @property
    def whole(self) -> str:
        return "\n".join([*self.fields.values(), *(text for texts in self.others.values() for text in texts)])

    def header(self) -> search.HeaderText:
        fields = {name: [fold(text)] for name, text in self.fields.items()}
        fields |= {name: [fold(text) for text in texts] for name, texts in self.others.items()}
        return search.HeaderText(fields, fold(self.whole))

    def bring(self, stage: Stage):
        match stage:
            case Stage.ROW:
                return self.row
            case Stage.ENVELOPE:
                return search.EnvelopeText(self.sent, {name: fold(text) for name, text in self.fields.items()})
            case Stage.HEADER:
                return self.header()
        return search.BodyText(fold(self.parts), fold(self.body))


def members(ranges, star: int) -> set[int]:
    found: set[int] = set()
    for ends in ranges:
        low, high = sorted(end or star for end in ends)
        found |= set(range(low, high + 1))
    return found


def holds(key, message: Message, numbered: list[int], saved: list[int]) -> bool:
    """Whether a message matches, from the RFCs alone."""
    day = lambda ms: date(1970, 1, 1) + timedelta(days=ms // DAY)  # noqa: E731
    related = {"before": date.__lt__, "on": date.__eq__, "since": date.__ge__}
    match key:
        case search.All():
            return True
        case Flag(name):
            return name in NAMES and bool(message.flags >> NAMES.index(name) & 1)
        case search.Numbers(ranges):
            return numbered.index(message.uid) + 1 in members(ranges, len(numbered))
        case search.Uids(ranges):
            return message.uid in members(ranges, numbered[-1])
        case search.Saved():
            return message.uid in saved
        case search.ModSeq(modseq):
            return message.modseq >= modseq
        case search.Date("sent", relation, wanted):
            return message.sent is not None and related[relation](message.sent, wanted)
        case search.Date(kind, relation, wanted):
            return related[relation](day(message.row.date if kind == "internal" else message.row.saved), wanted)
        case search.Within("younger", seconds):
            return message.row.date // 1000 >= NOW // 1000 - seconds
        case search.Within(_, seconds):
            return message.row.date // 1000 <= NOW // 1000 - seconds
        case search.Size("larger", octets):
            return message.row.size > octets
        case search.Size(_, octets):
            return message.row.size < octets
        case search.Identifier(kind, text):
            return text == (message.row.email if kind == "email" else message.row.thread)
        case search.Envelope(name, text):
            return name in message.fields and fold(text) in fold(message.fields[name])
        case search.Header(name, text):
            fields = {**{name: [text] for name, text in message.fields.items()}, **message.others}
            return any(fold(text) in fold(value) for value in fields.get(name.lower(), []))
        case search.InBody(text):
            return fold(text) in fold(message.body)
        case search.InText(text):
            return any(fold(text) in fold(part) for part in (message.whole, message.parts, message.body))
        case Not(inner):
            return not holds(inner, message, numbered, saved)
        case Or(one, other):
            return holds(one, message, numbered, saved) or holds(other, message, numbered, saved)
        case And(keys):
            return all(holds(one, message, numbered, saved) for one in keys)
    raise AssertionError(key)


def tree(random: Random, count: int, depth: int = 0):
    """A search key."""
    inner = lambda: tree(random, count, depth + 1)  # noqa: E731
    if depth < 4 and random.random() < 0.5:
        return random.choice(
            [lambda: Not(inner()), lambda: Or(inner(), inner()), lambda: And([inner() for _ in range(random.randrange(4))])]
        )()
    numbers = [(random.randint(0, count), random.randint(0, count)) for _ in range(random.randint(1, 3))]
    word, day = random.choice(WORDS), date(2024, 10, 4) + timedelta(days=random.randrange(4))
    return random.choice(
        [
            search.All(), Flag(random.choice([*NAMES, "$Unknown"])), search.Numbers(numbers), search.Uids(numbers),
            search.Saved(), search.ModSeq(random.randint(0, 50)),
            search.Size(random.choice(["larger", "smaller"]), random.randrange(6)),
            search.Date(random.choice(["internal", "saved", "sent"]), random.choice(["before", "on", "since"]), day),
            search.Within(random.choice(["younger", "older"]), random.randint(1, 4 * DAY // 1000)),
            search.Identifier(*random.choice([("email", "M1"), ("thread", "T0")])),
            search.Envelope(random.choice(["from", "subject", "to"]), random.choice(WORDS)),
            search.Header(random.choice(["X-A", "Subject", "From", "X-None"]), word), search.InBody(word), search.InText(word),
        ]
    )  # fmt: skip


def searched(program: Program, messages: list[Message], random: Random, found: Found) -> set[Stage]:
    """Run a program as a caller does; the stages that it asked for."""
    by_uid, asked = {one.uid: one for one in messages}, set()
    at = 0
    while at < len(messages):
        part = messages[at : at + random.randint(1, 9)]
        at += len(part)
        batch = program.batch(pack([Rec(one.uid, one.flags, one.modseq) for one in part]))
        while batch is not None:
            matching, batch = program.run(batch)
            found.add(matching)
            if batch is not None:
                stage = program.next_stage(batch)
                asked.add(stage)
                data = [by_uid[uid].bring(stage) for uid in batch.uids]
                match stage:
                    case Stage.ROW:
                        batch.rows = data
                    case Stage.ENVELOPE:
                        batch.envelopes = data
                    case Stage.HEADER:
                        batch.headers = data
                    case Stage.BODY:
                        batch.bodies = data
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
    key = And([Not(Flag("\\seen")), Or(Flag("$JUNK"), search.ModSeq(5)), search.Uids([(2, STAR)])])
    program, _ = program_of(key)
    assert program.stages == set()
    assert program.run(Batch(pack([Rec(1, 0, 9), Rec(2, 0, 9), Rec(3, 1, 9)])))[0] == pack([Rec(2, 0, 9)])
    assert program.by_modseq and not program.by_number


def test_only_what_is_undecided_is_asked_for():
    program, _ = program_of(And([search.InBody("x"), search.Envelope("subject", "a"), Not(Flag("\\Seen"))]))
    matching, batch = program.run(Batch(pack([Rec(1, 1, 1), Rec(2, 0, 1), Rec(3, 0, 1)])))
    assert batch is not None
    assert (matching, list(batch.uids), program.next_stage(batch)) == (b"", [2, 3], Stage.ENVELOPE)
    batch.envelopes = [search.EnvelopeText(None, {"subject": "a"}), search.EnvelopeText(None, {})]
    matching, batch = program.run(batch)
    assert batch is not None
    assert (matching, list(batch.uids), program.next_stage(batch)) == (b"", [2], Stage.BODY)
    batch.bodies = [search.BodyText("", "xyz")]
    assert program.run(batch) == (pack([Rec(2, 0, 1)]), None)


def test_a_text_in_the_header_needs_no_body():
    program, _ = program_of(search.InText("a"))
    batch = Batch(pack([Rec(1, 0, 1), Rec(2, 0, 1)]))
    batch.headers = [search.HeaderText({}, "subject: a"), search.HeaderText({}, "")]
    matching, batch = program.run(batch)
    assert (matching, list(batch.uids)) == (pack([Rec(1, 0, 1)]), [2])


def test_numbers_beyond_the_last_are_bad_and_those_of_an_empty_mailbox_find_nothing():
    with pytest.raises(NoSuchNumber):
        program_of(search.Numbers([(1, 4)]))
    with pytest.raises(NoSuchNumber):
        program_of(search.Numbers([(1, 1)]), 0)
    assert program_of(search.Numbers([(1, STAR)]), 0)[0].by_number
    assert program_of(search.Uids([(4, 9)]))[0].run(Batch(pack([Rec(3, 0, 1)]))) == (b"", None)
    assert program_of(search.Uids([(4, STAR)]))[0].run(Batch(pack([Rec(3, 0, 1)])))[0]  # the last one: RFC 9051 6.4.9


def test_recent_is_the_sessions():
    view = View(Shared(), "box", Mailbox(7, 4, 9, [], 3), pack32([1, 2, 3]))
    records = pack([Rec(1, 0, 1), Rec(2, 1, 1), Rec(3, 0, 1)])
    assert Program(Flag("\\Recent"), view, 0).run(Batch(records))[0] == records[48:]
    assert Program(Not(Flag("\\Recent")), view, 0).run(Batch(records))[0] == records[:48]
    assert Program(Flag("\\Recent"), view_of([1, 2, 3], rev2=True), 0).run(Batch(records))[0] == b""


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


def test_folding():
    assert fold("STRASSE") == fold("straße") == fold("ＳＴＲＡＳＳＥ") == "strasse"
    assert fold("É") == fold("E\u0301") == "é"


def test_what_is_false_by_a_dearer_key_is_not_asked_for():
    program, _ = program_of(And([search.Header("x", "a"), Not(Or(Flag("\\Seen"), search.InBody("b")))]))
    _, batch = program.run(Batch(pack([Rec(1, 1, 1), Rec(2, 0, 1)])))
    assert batch is not None
    assert list(batch.uids) == [2]


def test_older_and_younger_include_the_second_itself():
    """RFC 5032 2."""
    rows = [search.Row(NOW - 10_000 + more, 0, 0) for more in (-5001, -1, 0, 4999)]
    for relation, uids in (("older", [1, 2, 3]), ("younger", [3, 4])):
        batch = Batch(pack([Rec(uid, 0, 1) for uid in (1, 2, 3, 4)]))
        batch.rows = rows
        matching, _ = program_of(search.Within(relation, 10), 4)[0].run(batch)
        assert matching == pack([Rec(uid, 0, 1) for uid in uids])


def test_dates_are_days_of_utc():
    rows = [search.Row(NOW // DAY * DAY + more, 0, 0) for more in (-1, 0, DAY - 1, DAY)]
    today = date(1970, 1, 1) + timedelta(days=NOW // DAY)
    for relation, uids in (("before", [1]), ("on", [2, 3]), ("since", [2, 3, 4])):
        batch = Batch(pack([Rec(uid, 0, 1) for uid in (1, 2, 3, 4)]))
        batch.rows = rows
        matching, _ = program_of(search.Date("internal", relation, today), 4)[0].run(batch)
        assert matching == pack([Rec(uid, 0, 1) for uid in uids])


def test_a_field_of_addresses_is_searched_as_it_stands():
    """HEADER FROM is about the text of the field, FROM about the ENVELOPE."""
    batch = Batch(pack([Rec(1, 0, 1)]))
    batch.envelopes = [search.EnvelopeText(None, {"from": "a <a@b.test>"})]
    batch.headers = [search.HeaderText({"from": ["a@b.test (comment)"]}, "")]
    assert program_of(search.Header("From", "COMMENT"))[0].run(batch)[0]
    assert not program_of(search.Envelope("from", "COMMENT"))[0].run(batch)[0]
    assert program_of(search.Header("FROM", ""))[0].run(batch)[0]
    assert not program_of(search.Header("To", ""))[0].run(batch)[0]


def test_one_message_is_returned_once():
    found, view = Found({"MIN", "MAX", "SAVE"}), view_of([5])
    found.add(pack([Rec(5, 0, 1)]))
    found.save(view)
    assert unpack32(view.saved) == [5]


def test_runs_of_combining_marks_are_divided():
    """All characters that normalization makes combining marks of: else it would take the square of their number."""
    marks = [
        chr(code)
        for code in (*range(0xD800), *range(0xE000, 0x110000))
        if any(unicodedata.combining(one) for one in unicodedata.normalize("NFKD", chr(code))[:1])
    ]
    assert len(marks) > 900
    assert [mark for mark in marks if not search._MARKS.fullmatch(mark * 32)] == []
    text = "a" + "\u0323\u0301" * 16 + "b"
    assert fold(text) == unicodedata.normalize("NFKC", text)
