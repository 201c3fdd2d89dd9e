"""What becomes of events of delivery: who is added to the suppression list, and who is not."""

import pytest

from relaymta.errors import StoreFull
from relaymta.suppression import Changed, Entry, Suppressions, Suppressor, Terms
from relaymta.suppression.suppressor import without_address

NOW = 1_800_000_000
TERMS = Terms(hard_bounce_seconds=100)


def event(reply: str = "550 5.1.1 <a@b.example>: User unknown", **more) -> dict:
    about = {"event": "bounced", "application": "shop", "recipient": "A@b.example", "reply": reply, "time": NOW * 1000}
    return about | more


@pytest.fixture
def entries(tmp_path):
    made = Suppressions(tmp_path)
    yield made
    made.close()


@pytest.fixture
def suppressor(entries):
    return Suppressor(lambda: entries, TERMS, pytest.fail)


@pytest.mark.parametrize("reply", [
    "550 5.1.1 User unknown", "553 5.1.3 bad", "550 5.1.6 moved", "556 5.1.10 no mail", "550-5.2.1 disabled", "550 5.2.1 off",
])  # fmt: skip
def test_a_bad_address_is_added(entries, suppressor, reply):
    assert suppressor.take([event(reply)]) == Changed(added=1)
    assert entries.find("a@b.example") == [Entry("shop", "a@b.example", "hard-bounce", reply, NOW, NOW + 100, "relay")]


@pytest.mark.parametrize("more", [
    {"reply": "550 5.7.1 blocked"}, {"reply": "554 5.7.26 DMARC"}, {"reply": "552 5.2.2 full"}, {"reply": "552 5.3.4 size"},
    {"reply": "550 No such user"}, {"reply": "450 4.1.1 unknown"}, {"reply": "550 4.1.1 unknown"}, {"reply": "450 5.1.1 unknown"},
    {"reply": "554 5.6.0 content"}, {"reply": "550 5.1.2 no such domain"}, {"reply": "550 5.1.8 bad sender"}, {"reply": ""},
    {"reply": "550 5.4.4 no route"}, {"expired": True}, {"event": "deferred"}, {"event": "delivered"}, {"event": None},
    {"recipient": "no address"}, {"recipient": None}, {"time": "x"}, {"class": "policy"}, {"reply": None},
    {"application": "x" * 600}, {"application": "a\0b"},
], ids=str)  # fmt: skip
def test_what_says_nothing_of_the_address_adds_nobody(entries, suppressor, more):
    assert suppressor.take([event(**more)]) == Changed()
    assert entries.counts().entries == 0


@pytest.mark.parametrize(("phase", "recipients", "added"), [
    ("rcpt", 5, 1), ("route", 5, 1), (None, 5, 1), ("final", 1, 1), ("data", 1, 1), ("final", 2, 0), ("data", 2, 0),
    ("mail", 1, 0), ("greeting", 1, 0),
])  # fmt: skip
def test_a_reply_has_to_be_about_this_recipient(suppressor, phase, recipients, added):
    assert suppressor.take([event(phase=phase, recipients=recipients)]).added == added


def test_a_class_that_the_event_has_counts_in_place_of_its_reply(entries, suppressor):
    assert suppressor.take([event("550 5.7.1 we know no such user", **{"class": "bad-mailbox"})]) == Changed(added=1)


def test_a_complaint_is_kept_for_ever_and_an_event_without_application_is_about_all_mail(entries, suppressor):
    complained = event("", event="complained", application="")
    assert suppressor.take([complained, event(recipient="c@b.example", application=None)]) == Changed(added=2)
    assert entries.find("a@b.example") == [Entry("", "a@b.example", "complaint", "", NOW, 0, "relay")]
    assert entries.find("c@b.example")[0].application == ""


@pytest.mark.parametrize(
    ("terms", "added"), [(Terms(hard_bounces=False), 1), (Terms(complaints=False), 1), (Terms(False, False), 0)]
)
def test_what_is_not_wanted_is_not_added(entries, terms, added):
    done = Suppressor(lambda: entries, terms, pytest.fail).take([event(), event("", event="complained", recipient="c@b.example")])
    assert done.added == added


def test_events_that_come_again_change_nothing_more(entries, suppressor):
    suppressor.take([event(), event()])
    assert suppressor.take([event()]) == Changed(replaced=1) and entries.counts().entries == 1
    assert suppressor.take([event(time=(NOW - 50) * 1000)]) == Changed(kept=1), "an older one does not shorten it"
    assert suppressor.take([event(time=(NOW + 50) * 1000)]) == Changed(replaced=1)
    assert entries.find("a@b.example")[0].until == NOW + 150


def test_a_bounce_replaces_no_complaint_and_nothing_of_an_operator_unless_it_has_expired(entries, suppressor):
    suppressor.take([event("", event="complained")])
    assert suppressor.take([event()]) == Changed(kept=1)
    entries.put([Entry("shop", "a@b.example", "manual", "note", NOW, NOW + 10, "ann")])
    assert suppressor.take([event(), event("", event="complained")]) == Changed(kept=1)
    assert entries.find("a@b.example")[0].by == "ann"
    assert suppressor.take([event(time=(NOW + 10) * 1000)]) == Changed(replaced=1)
    assert suppressor.take([event("", event="complained")]) == Changed(replaced=1), "a complaint is more than a bounce"


def test_a_list_that_is_full_is_told_once_until_there_is_room(entries):
    told: list[str] = []
    entries.limit(1)
    suppressor = Suppressor(lambda: entries, TERMS, told.append)
    rows = [event(recipient=f"u{n}@b.example") for n in range(3)]
    assert suppressor.take(rows) == Changed(added=1, left_out=2) and suppressor.take(rows).left_out == 2
    assert len(told) == 1 and "full" in told[0]
    entries.limit(9)
    suppressor.take(rows)
    entries.limit(1)
    assert suppressor.take([event(recipient="z@b.example")]).left_out == 1 and len(told) == 2


def test_replies_lose_the_recipient_s_address():
    assert without_address("550 5.1.1 <A@b.example>: no", "a@b.example") == "550 5.1.1 <>: no"
    assert without_address("550 5.1.1 no a@b.example here", "a@b.example") == "550 5.1.1 no <> here"
    assert without_address("550 5.1.1 no", "a@b.example") == "550 5.1.1 no"
    assert without_address("550 \u0130 a@b.example", "a@b.example") == "550 \u0130 a@b.example", "which is longer in lower case"


def test_a_disk_that_is_full_is_an_error_so_that_the_events_come_again(tmp_path):
    with_no_room = Suppressions(tmp_path, map_size=256 * 1024)
    suppressor = Suppressor(lambda: with_no_room, TERMS, pytest.fail)
    with pytest.raises(StoreFull):
        for start in range(0, 100_000, 500):
            suppressor.take([event(recipient=f"u{n}@b.example") for n in range(start, start + 500)])
    with_no_room.close()
