"""The bounds of docs/mailboxes.md that are the store's or a session's at it, each from both sides; see also
tests/proto/test_mailbox_limits.py."""

import asyncio
import threading

import msgspec
import pytest

from relaymta.store.rows import KEYWORDS_MOST
from relaymta.view import search, sort
from relaymta.view.access import ARRANGED, FEW
from relaymta.view.imap_append import MESSAGES_MOST
from relaymta.view.search import BODIES_MOST
from tests.view.test_imap_failures import SMALL, desk

__all__ = ["desk"]  # the fixture

BODIES = b"1 NO [LIMIT] At most 32 keys may look into all of a message\r\n"


@pytest.mark.parametrize(
    ("front", "said"),
    [
        (b"SEARCH", b"* SEARCH 1\r\n1 OK Searched\r\n"),
        (b"UID SEARCH RETURN (COUNT)", b'* ESEARCH (TAG "1") UID COUNT 1\r\n1 OK Searched\r\n'),
        (b"SORT (DATE) UTF-8", b"* SORT 1\r\n1 OK Sorted\r\n"),
        (b"THREAD REFERENCES UTF-8", b"* THREAD (1)\r\n1 OK Threaded\r\n"),
    ],
)  # fmt: skip
async def test_keys_into_bodies(desk, front, said):
    await desk.file(SMALL)
    await desk.say(b"0 SELECT INBOX\r\n")
    assert await desk.say(b"1 " + front + b" NOT BODY y NOT TEXT q" * (BODIES_MOST // 2) + b" ALL" * 100 + b"\r\n") == said
    assert await desk.say(b"1 " + front + b" NOT BODY y NOT TEXT q" * (BODIES_MOST // 2) + b" OR BODY b SEEN\r\n") == BODIES


async def test_messages_of_one_append(desk):
    message, many = b" {17+}\r\n" + SMALL, MESSAGES_MOST
    assert len(SMALL) == 17
    assert (await desk.told(b"APPEND INBOX" + message * many)).startswith(b"x OK [APPENDUID ")
    refused = b"x NO [LIMIT] 1000 messages are the most of one APPEND\r\n"
    assert await desk.told(b"APPEND INBOX" + message * (many + 1)) == refused
    assert b" (MESSAGES 1000)" in await desk.say(b"3 STATUS INBOX (MESSAGES)\r\n")


async def test_keywords_of_a_mailbox(desk):
    await desk.file(SMALL, SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    words = b" ".join(b"k%d" % number for number in range(KEYWORDS_MOST))
    assert b"2 OK" in await desk.say(b"2 STORE 1 FLAGS.SILENT (%b)\r\n" % words)
    for command in (b"STORE 2 +FLAGS (more)", b"APPEND INBOX (more) {17+}\r\n" + SMALL):
        assert await desk.say(b"3 " + command + b"\r\n") == (
            b"3 NO [LIMIT] 59 keywords are the most that a mailbox may have\r\n"
        ), command
    assert b"4 OK" in await desk.say(b"4 STORE 2 +FLAGS.SILENT (K0 k58)\r\n")


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (b"a" * 255, b"a" * 256, b"a level of the name has more than 255 octets"),
        (b"b/" * 19 + b"b", b"b/" * 20 + b"b", b"the name has more than 20 levels"),
        (b"/".join([b"c" * 249] * 4) + b"d", b"/".join([b"c" * 249] * 4) + b"de", b"the name has more than 1000 octets"),
        (b"d", b'""', b"the name is empty"),
        (b"e/f", b"e//f", b"a level of the name is empty"),
        (b"g/", b"/g", b"a level of the name is empty"),
        (b'"h h"', b'"h%"', b"the name has a wildcard (* or %)"),
        (b"&AKA-", b"&AJ8-", b"the name has a control character"),
    ],
)  # fmt: skip
async def test_names_that_are_created(desk, good, bad, says):
    """And renamed to: the same bounds, the same replies."""
    for number, command in enumerate((b"CREATE ", b"CREATE old\r\n9 RENAME old ")):
        assert b"9 OK" in await desk.say(b"9 " + command + (good if not number else b"new") + b"\r\n")
    for command in (b"CREATE ", b"RENAME new "):
        assert await desk.say(b"1 " + command + bad + b"\r\n") == b"1 NO [CANNOT] " + says + b"\r\n"


async def test_mailboxes_of_a_user(desk, monkeypatch):
    """Parents that are missing count, and names that are only subscribed."""
    for module in ("change", "names"):
        monkeypatch.setattr(f"relaymta.store.{module}.MAILBOXES_MOST", 10)
    before = (await desk.say(b'1 LIST "" *\r\n')).count(b"* LIST")
    path = b"/".join([b"x"] * (10 - before))
    full = b"1 NO [LIMIT] 10 mailboxes are the most that a user may have\r\n"
    assert await desk.say(b"1 CREATE " + path + b"/y\r\n") == full
    assert (await desk.say(b"1 CREATE " + path + b"\r\n")).startswith(b"1 OK ")
    for command in (b"CREATE y", b"SUBSCRIBE y", b"RENAME x/x x/y/z"):
        assert await desk.say(b"1 " + command + b"\r\n") == full, command
    assert (await desk.say(b"1 DELETE " + path + b"\r\n")).startswith(b"1 OK ")
    assert (await desk.say(b"1 SUBSCRIBE y\r\n")).startswith(b"1 OK ")
    assert await desk.say(b"1 CREATE z\r\n") == full


# What many searches, or many of one user, may take of others


async def test_a_slice_of_sort_ends_with_the_message_amid_which_its_time_is_over(desk, monkeypatch):
    await desk.file(*(b"Subject: %d\r\n\r\n" % (number % 3) for number in range(7)))
    await desk.say(b"0 SELECT INBOX\r\n")
    slices, run = [], sort._slice
    monkeypatch.setattr(sort, "_slice", lambda *given: (slices.append(run(*given)), slices[-1])[1])
    monkeypatch.setattr(sort, "SECONDS", -1.0)
    assert await desk.told(b"SORT (SUBJECT) UTF-8 ALL") == b"* SORT 1 4 7 2 5 3 6\r\nx OK Sorted\r\n"
    assert slices == [24] * 7


async def test_what_takes_long_to_look_into_is_looked_into_by_itself(desk, monkeypatch):
    """Of messages of many parts, or with a large header, two at most."""
    parts = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\r\n" * 5000
    header = b"".join(b"X-%d: %b\r\n" % (number, b"y" * 70) for number in range(8000)) + b"\r\n"
    subject = b"Subject: " + b"=?utf-8?q?=C3=A4?=\r\n " * 9000 + b"\r\n\r\n"
    together, bring = [], search.bring
    monkeypatch.setattr(search, "bring", lambda *given, **how: (found := bring(*given, **how), together.append(len(found[0])))[0])
    for text, keys in ((parts, b"BODY q"), (header, b"HEADER X-1 q"), (subject, b"SUBJECT q"), (SMALL, b"SUBJECT q")):
        await desk.file(*[text] * 3)
        await desk.say(b"0 SELECT INBOX\r\n")
        together.clear()
        await desk.told(
            b"UID SEARCH UID %d:* %b" % (int((await desk.say(b"1 STATUS INBOX (UIDNEXT)\r\n")).split()[4][:-1]) - 3, keys)
        )
        assert together == [3] if text is SMALL else max(together) <= 2, (keys, together)


WORDS = b"To: " + b",\r\n ".join(b"=?utf-8?q?J=C3=BCrg?= <%d@b.example>" % number for number in range(20)) + b"\r\n"
KEYS = b" ".join(b"NOT TO z%d" % number for number in range(240))


@pytest.mark.parametrize("text, keys, on_loop", [
    (SMALL, b"OR SUBJECT q FROM q", True), (SMALL, b"LARGER 10", True), (WORDS + SMALL, b"TO q", True),
    (WORDS + SMALL, KEYS, False), (b"Subject: " + b"=?utf-8?q?=C3=A4?=\r\n " * 900 + SMALL, b"SUBJECT q", False),
])  # fmt: skip
async def test_what_is_searched_on_the_loop_is_little_at_a_time_however_many_keys_look_into_it(
    desk, monkeypatch, text, keys, on_loop
):
    """Octets of rows times keys; the rest is searched on a thread."""
    await desk.file(*[text] * 100)
    await desk.say(b"0 SELECT INBOX\r\n")
    loop, steps, bring = threading.current_thread(), list[tuple[bool, int, int]](), search.bring

    def noted(shard, mailbox, batch, stage, **how):
        first, rest = bring(shard, mailbox, batch, stage, **how)
        octets = sum(len(row) for _, row, _ in search._rows(shard, mailbox, first, stage))
        steps.append((threading.current_thread() is loop, octets * max(keys.count(b"TO z"), 1), len(first)))
        return first, rest

    monkeypatch.setattr(search, "bring", noted)
    assert b"x OK Searched" in await desk.told(b"SEARCH " + keys)
    assert [octets for here, octets, _ in steps if here and octets > 20_000] == []
    assert any(here for here, _, _ in steps) == on_loop
    if keys is KEYS:
        assert max(messages for _, _, messages in steps) <= 2


async def test_a_users_searches_wait_for_one_another(desk):
    """One slice of each user at a time; of SORTs of large mailboxes one at a time, in the order of users."""
    access, one = desk.access, desk.access.user("a@a.example")
    other, go, begun = msgspec.structs.replace(one, ident=one.ident + 1), threading.Event(), []
    running = [asyncio.ensure_future(access.search(one, lambda n=n: (begun.append(n), go.wait(60)))) for n in range(5)]
    running.append(asyncio.ensure_future(access.search(other, lambda: (begun.append("other"), go.wait(60)))))
    while len(begun) < 2:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    assert begun == [0, "other"]
    go.set()
    await asyncio.gather(*running)
    assert sorted(begun, key=str) == [0, 1, 2, 3, 4, "other"] and not access._turns
    inside, end = [], asyncio.Event()

    async def arrange(user, messages=FEW + 1):
        async with access.arranging(user, messages):
            inside.append(user.ident)
            await end.wait()

    users = [msgspec.structs.replace(one, ident=number // 2) for number in range(8)]
    running = [asyncio.ensure_future(arrange(user)) for user in users]
    await asyncio.sleep(0.01)
    assert inside == [0] and len(inside) == ARRANGED
    running.append(asyncio.ensure_future(arrange(one, FEW)))
    await asyncio.sleep(0)
    assert inside == [0, one.ident], "a small one waits for nobody"
    inside.pop()
    end.set()
    await asyncio.gather(*running)
    assert inside == [0, 1, 2, 3, 0, 1, 2, 3] and not access._turns
