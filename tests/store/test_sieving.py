"""Users' Sieve scripts at delivery: where a message is filed, what its sender is told, what is sent on, and that it is once."""

import asyncio
import re
import threading
from functools import partial

import pytest

from relaymta.disk.big import BigBody, BigFile
from relaymta.errors import StoreError, StoreFull
from relaymta.proto.envelope import Onward
from relaymta.proto.said import Reply
from relaymta.proto.sieve_message import Message
from relaymta.store import sieving
from relaymta.store.deliver import Delivery
from relaymta.store.sieving import Sieving
from tests.store.test_recipients import FILED, Bench, Outbox
from tests.support.daemon import PATIENCE

MESSAGE = b"From: s@x.example\r\nTo: a@a.example\r\nSubject: hello\r\nMessage-ID: <1@x.example>\r\n\r\nbody\r\n"
SENDER = "s@x.example"


class Sorted(Bench):
    """A bench whose delivery runs scripts. `noted`: what was logged."""

    async def __aenter__(self):
        await super().__aenter__()
        self.noted = []
        self.outbox = Outbox()
        self.results = []
        log = lambda **fields: self.noted.append(fields)  # noqa: E731
        sieving = Sieving(self.mailboxes, lambda: "+", "mx.example", log, self.results.append)
        self.sieving = sieving
        self.delivery = Delivery(self.mailboxes, lambda: self.settings, self.counted.append, sieving)
        return self

    async def script(self, name, text, shard=0):
        """A user with an active script."""
        ident = await self.user(name, shard)
        own = self.mailboxes.shards.get(shard, self.other)
        await own.put_script(ident, "main", text.encode())
        await own.activate_script(ident, "main")
        return ident

    async def change(self, ident, text):
        await self.mailboxes.shards[0].put_script(ident, "main", text.encode())

    async def deliver(self, *names, queue_id=1, attempt=0, data=MESSAGE, sender=SENDER):
        given = list(enumerate(name if "@" in name else f"{name}@a.example" for name in names))
        replies, _, onward = await self.delivery.deliver(queue_id, attempt, sender, given, [data], self.outbox)
        return [replies[index] for index, _ in given], onward

    def found(self, ident):
        """(flags, keywords) of the messages in each mailbox of a user that has any."""
        rows, out = self.mailboxes.shards[0].rows, {}
        with rows.reading() as txn:
            for row in rows.mailboxes(txn, ident):
                state = rows.state(txn, row.mailbox)
                some = [(one.flags & 31, [word for n, word in enumerate(state.keywords) if one.flags >> 5 + n & 1])
                        for one in rows.index(txn, row.mailbox)]  # fmt: skip
                if some:
                    out[row.name] = some
        return out


def undated(onward):
    """What is sent on, without the second at which it was written."""
    return [one._replace(data=one.data and re.sub(rb"\r\nDate: [^\r]+", b"", one.data)) for one in onward]


@pytest.fixture
async def bench(tmp_path):
    async with Sorted(tmp_path) as bench:
        yield bench


async def test_a_message_is_filed_where_the_script_says_with_its_flags(bench):
    user = await bench.script(
        "a",
        'require ["fileinto", "mailbox", "imap4flags", "copy"];\n'
        'if header :contains "subject" "hello" { fileinto :create :flags ["\\\\Seen", "$Work"] "Work/New"; }\n'
        'fileinto :copy "nowhere";',
    )
    assert await bench.deliver("a") == ([FILED], [])
    assert bench.found(user) == {"Work/New": [(1, ["$Work"])], "INBOX": [(0, [])]}
    assert bench.noted == [
        {"id": "0000000000001", "user": "a@a.example", "cause": "",
         "actions": ["line 2: fileinto Work/New", "line 3: there is no mailbox nowhere: keep"]},
    ]  # fmt: skip
    with bench.mailboxes.shards[0].rows.reading() as txn:
        names = {row.name: row.subscribed for row in bench.mailboxes.shards[0].rows.mailboxes(txn, user)}
    assert names == {"INBOX": True, "Work": False, "Work/New": True}
    assert await bench.deliver("a") == ([FILED], []), "it was filed before"
    assert len(bench.found(user)["INBOX"]) == 1


async def test_what_is_done_is_logged_and_counted_once_when_it_is_done(bench):
    user = await bench.script("a", 'require "fileinto"; fileinto "INBOX";')
    bench.settings = type(bench.settings)(messages=1)
    assert (await bench.deliver("a"))[0][0].code == 250
    assert (await bench.deliver("a", queue_id=2))[0][0].code == 452 and len(bench.noted) == 1
    (landed,) = await bench.delivery.deliver_now(SENDER, ["a@a.example"], [MESSAGE])
    assert landed.reply.code == 452 and len(bench.noted) == 1 and bench.results == ["filed"]
    bench.settings = type(bench.settings)()
    await bench.deliver("a", queue_id=2)
    await bench.delivery.deliver_now(SENDER, ["a@a.example"], [MESSAGE])
    assert [one["id"][-1:] for one in bench.noted] == ["1", "2", ""] and bench.results == ["filed"] * 3
    await bench.change(user, 'redirect "new@z.example";')
    (landed,) = await bench.delivery.deliver_now(SENDER, ["a@a.example"], [MESSAGE])
    assert landed.rest == ["a@a.example"] and len(bench.noted) == 3, "it goes by way of the queue,"
    await bench.deliver("a", queue_id=3)
    assert len(bench.noted) == 4 and bench.noted[3]["actions"] == ["line 1: redirect new@z.example"], "which notes it"


@pytest.mark.parametrize(("text", "results"), [
    ("keep;", ["kept"]),
    ("discard;", ["discarded"]),
    ('require "reject"; reject "no";', ["rejected"]),
    ('require "reject"; reject "a"; keep;', ["failed"]),
    ('require ["copy", "vacation"]; redirect :copy "b@z.example"; vacation "away";', ["kept", "redirected", "replied"]),
    ('require "fileinto"; fileinto "nowhere";', ["kept"]),
])  # fmt: skip
async def test_what_scripts_do_is_counted(bench, text, results):
    await bench.script("a", text)
    await bench.deliver("a")
    assert bench.results == results


async def test_a_message_is_parsed_once_for_all_scripts(bench, monkeypatch):
    made = []

    class Counted(Message):
        def __init__(self, *given):
            made.append(self)
            super().__init__(*given)

    monkeypatch.setattr(sieving, "Message", Counted)
    script = 'require "fileinto"; if header :is "subject" "hello" { fileinto "INBOX"; }'
    users = [await bench.script(name, script) for name in "abc"]
    assert (await bench.deliver(*"abc"))[0] == [FILED] * 3 and len(made) == 1
    await bench.change(users[1], f'require ["body", "fileinto"]; if body :contains "body" {{ {script[20:]} }}')
    assert (await bench.deliver(*"bca", queue_id=2))[0] == [FILED] * 3 and len(made) == 2
    assert [one["actions"] for one in bench.noted] == [["line 1: fileinto INBOX"]] * 6


async def test_a_script_that_takes_long_delays_scripts_alone_and_those_of_others_little(bench, monkeypatch):
    """It runs in a pool of its own, one of a user at a time."""
    users = [await bench.script(name, "keep;") for name in "ab"]
    go_on, begun = threading.Event(), []
    run = sieving.run

    def slow(*given, **more):
        begun.append(more["recipient"])
        assert threading.current_thread().name.startswith("sieve")
        if more["recipient"].startswith("a@"):
            assert go_on.wait(PATIENCE)
        return run(*given, **more)

    monkeypatch.setattr(sieving, "run", slow)
    hostile = [asyncio.ensure_future(bench.deliver("a", queue_id=number)) for number in range(1, 20)]
    try:
        async with asyncio.timeout(PATIENCE):
            assert (await bench.deliver("b", queue_id=30))[0] == [FILED]
            while "a@a.example" not in begun:
                await asyncio.sleep(0.01)
        assert begun.count("a@a.example") == 1 and not any(one.done() for one in hostile)
    finally:
        go_on.set()
    await asyncio.gather(*hostile)
    assert len(bench.found(users[0])["INBOX"]) == 19


async def test_discard_and_reject(bench):
    user = await bench.script("a", "discard;")
    assert await bench.deliver("a") == ([FILED], []) and bench.found(user) == {}
    await bench.change(user, 'require "reject"; reject "No,\r\nthank you\xfc";')
    assert await bench.deliver("a", queue_id=2) == ([Reply(550, "5.7.1", "No, thank you?")], [])
    assert await bench.deliver("a", queue_id=3, sender="") == ([FILED], []), "nobody would hear of it"
    assert bench.found(user) == {}


async def test_all_mailboxes_or_none_when_there_is_no_room(bench):
    user = await bench.script("a", 'require ["fileinto", "copy"]; fileinto :copy "INBOX/a"; fileinto :copy "INBOX/b";')
    own = bench.mailboxes.shards[0]
    for name in ("INBOX/a", "INBOX/b"):
        await own.create(user, name)
    bench.settings = type(bench.settings)(messages=2)
    ((reply,), _) = await bench.deliver("a")
    assert reply.code == 452 and bench.found(user) == {}
    bench.settings = type(bench.settings)(messages=3)
    assert (await bench.deliver("a"))[0] == [FILED] and sorted(bench.found(user)) == ["INBOX", "INBOX/a", "INBOX/b"]


async def test_a_script_that_fails_or_loops_keeps_the_message(bench):
    user = await bench.script("a", 'require "reject"; reject "a"; keep;')
    assert (await bench.deliver("a"))[0] == [FILED] and list(bench.found(user)) == ["INBOX"]
    assert bench.noted[-1]["cause"].startswith("line 1: ")
    await bench.change(user, "discard;")
    await bench.deliver("a", queue_id=2, data=b"Delivered-To: a@a.example\r\n" + MESSAGE)
    assert len(bench.found(user)["INBOX"]) == 2 and "delivered to a@a.example before" in bench.noted[-1]["cause"]


async def test_what_is_sent_comes_with_the_outcome_of_the_attempt_and_once(bench):
    user = await bench.script("a", 'require ["vacation", "copy"]; redirect :copy "new@z.example"; vacation "away";')
    replies, onward = await bench.deliver("a+x")
    assert replies == [FILED] and [(one.sender, one.recipient) for one in onward] == [(SENDER, "new@z.example"), ("", SENDER)]
    assert onward[0].front == b"Delivered-To: a+x@a.example\r\n" and onward[0].data is None
    assert b"Auto-Submitted: auto-replied" in onward[1].data and b"In-Reply-To: <1@x.example>" in onward[1].data
    again, once_more = await bench.deliver("a+x")
    assert (again, undated(once_more)) == (replies, undated(onward)), "the outcome was lost: it is asked for again"
    assert len(bench.found(user)["INBOX"]) == 1
    assert await bench.deliver("a+x", attempt=1) == ([FILED], []), "the outcome was recorded, with what was sent"
    replies, onward = await bench.deliver("a", queue_id=2)
    assert [one.recipient for one in onward] == ["new@z.example"], "one reply in seven days"
    assert bench.noted[-1]["actions"][-1] == "no vacation reply: this sender has had one"


async def test_an_alias_of_whom_one_cannot_have_it_now(bench):
    one = await bench.script("a", 'redirect "new@z.example"; keep;')
    await bench.user("b", messages=1)
    bench.alias("team@a.example", ["a@a.example", "b@a.example"])
    await bench.file(b"x", "b")
    ((reply,), onward) = await bench.deliver("team", queue_id=5)
    assert reply.code == 452 and [one.recipient for one in onward] == ["new@z.example"]
    ((reply,), onward) = await bench.deliver("team", queue_id=5, attempt=1)
    assert reply.code == 452 and onward == [] and len(bench.found(one)["INBOX"]) == 1


async def test_what_a_script_sends_is_not_lost_when_a_reply_cannot_be_remembered(bench, monkeypatch):
    user = await bench.script("a", 'require "vacation"; redirect "new@z.example"; vacation "away";')

    async def fails(*given):
        raise StoreFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(bench.mailboxes, "change", fails)
        ((reply,), onward) = await bench.deliver("a")
        assert reply.code == 451 and onward == []
    replies, onward = await bench.deliver("a", attempt=1)
    assert replies == [FILED] and [one.recipient for one in onward] == ["new@z.example", SENDER]
    assert bench.found(user) == {}


async def test_what_a_script_sends_is_made_before_the_message_is_filed(bench, monkeypatch):
    """Behind that nothing can fail which would have to be sent and is not: whether it is filed is not asked again."""
    user = await bench.script("a", 'require "copy"; redirect :copy "new@z.example";')

    async def fails(messages):
        raise StoreFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(bench.outbox, "make", fails)
        ((reply,), onward) = await bench.deliver("a")
        assert reply.code == 451 and onward == [] and bench.found(user) == {} and bench.noted == []
    bench.settings = type(bench.settings)(quota=1)
    ((reply,), onward) = await bench.deliver("a", attempt=1)
    assert reply.code == 452 and onward == [] and [one.recipient for one in bench.outbox.dropped] == ["new@z.example"]
    bench.settings = type(bench.settings)()
    ((reply,), onward) = await bench.deliver("a", attempt=2)
    assert reply == FILED and [one.recipient for one in onward] == ["new@z.example"] and len(bench.outbox.dropped) == 1


async def test_a_loop_through_a_catch_all_is_noticed_at_its_user(bench):
    user = await bench.script("a", 'require "variables"; redirect "x@c.example";')
    bench.alias("@a.example", ["a@a.example"])
    _, (one,) = await bench.deliver("any1")
    assert one.front == b"Delivered-To: any1@a.example\r\nDelivered-To: a@a.example\r\n"
    replies, onward = await bench.deliver("any2", queue_id=2, data=one.front + MESSAGE)
    assert replies == [FILED] and onward == [] and list(bench.found(user)) == ["INBOX"]


async def test_what_is_filed_nowhere_needs_no_room(bench):
    user = await bench.script("a", "keep;")
    await bench.deliver("a")
    await bench.change(user, 'redirect "new@z.example";')
    bench.settings = type(bench.settings)(quota=1)
    replies, onward = await bench.deliver("a", queue_id=2)
    assert replies == [FILED] and [one.recipient for one in onward] == ["new@z.example"]


async def test_nothing_is_sent_of_a_message_that_is_not_filed(bench):
    await bench.script("a", 'require ["vacation", "copy"]; redirect :copy "new@z.example"; vacation "away";')
    bench.settings = type(bench.settings)(quota=1)
    ((reply,), onward) = await bench.deliver("a")
    assert reply.code == 452 and onward == []
    bench.settings = type(bench.settings)()
    replies, onward = await bench.deliver("a", attempt=1)
    assert replies == [FILED] and [one.recipient for one in onward] == ["new@z.example", SENDER]


async def test_a_script_of_a_user_whose_shard_another_process_owns(bench):
    await bench.script("far", "discard;", shard=1)
    assert await bench.deliver("far") == ([FILED], [])
    with bench.other.rows.reading() as txn:
        assert [row.messages for _, row in bench.other.rows.users(txn)] == [0]


async def test_a_user_who_comes_back_to_a_shard_has_the_script_of_now(bench):
    """Ids of scripts begin anew where a user comes to, as by a move and another one back."""
    user, own = await bench.script("a", "discard;"), bench.mailboxes.shards[0]
    await bench.deliver("a")
    await own.purge(user)
    await own.task(lambda change: change.add_user(user, [], 2))
    await own.put_script(user, "main", b"keep;")
    await own.activate_script(user, "main")
    await bench.deliver("a", queue_id=2)
    assert list(bench.found(user)) == ["INBOX"]


async def test_what_cannot_be_read_now_is_asked_for_again(bench, monkeypatch):
    await bench.script("a", "discard;")

    def fails(*given):
        raise StoreError("no")

    monkeypatch.setattr(bench.sieving, "_script", fails)
    ((reply,), onward) = await bench.deliver("a")
    assert reply.code == 451 and onward == [] and bench.noted == []


async def test_an_lmtp_client_has_its_answer_or_the_queue_sends_what_is_to_be_sent(bench):
    user = await bench.script("a", 'require ["fileinto", "reject", "copy"];\n'
        'if header :contains "subject" "no" { reject "no"; }\n'
        'elsif header :contains "subject" "on" { redirect :copy "new@z.example"; }\n'
        'else { fileinto "Box"; }')  # fmt: skip
    await bench.mailboxes.shards[0].create(user, "Box")
    await bench.user("b")
    bench.alias("team@a.example", ["a@a.example", "b@a.example"])
    (landed,) = await bench.file(b"Subject: x\r\n\r\n", "a")
    assert (landed.reply, landed.users, landed.rest) == (FILED, ["a@a.example"], []) and list(bench.found(user)) == ["Box"]
    (landed,) = await bench.file(b"Subject: no\r\n\r\n", "a")
    assert (landed.reply, landed.rest) == (Reply(550, "5.7.1", "no"), [])
    (landed,) = await bench.file(b"Subject: on\r\n\r\n", "a+x")
    assert (landed.reply.code, landed.users, landed.rest) == (250, [], ["a+x@a.example"])
    (landed,) = await bench.file(b"Subject: on\r\n\r\n", "team")
    assert (landed.reply.code, landed.users, landed.rest) == (250, ["b@a.example"], ["a@a.example"])


@pytest.mark.parametrize("sought", ["needle", "absent"])
async def test_a_large_message_is_looked_into_as_far_as_the_script_needs(bench, tmp_path, sought):
    user = await bench.script(
        "a", f'require ["body", "fileinto"]; if allof (size :over 1M, body :raw :contains "{sought}") {{ discard; }}'
    )
    file = BigBody(tmp_path / "big", 7)
    file.write([MESSAGE, b"x" * 70 + b"\r\n", b"y" * 1_500_000, b"needle\r\n"])
    data = BigFile(str(tmp_path / "big"), 7, file.finish([]))
    deliver = partial(bench.delivery.deliver, 1, 0, SENDER, [(0, "a@a.example")], outbox=bench.outbox)
    replies, _, _ = await deliver(data=data)
    assert replies == {0: FILED} and bool(bench.found(user)) == (sought == "absent")


def test_the_scripts_that_were_run_last_are_kept_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(sieving.sieve, "compile", lambda text: compiled.append(text) or text)
    scripts = sieving._Compiled()
    many = sieving.COMPILED_OCTETS // sieving.SCRIPT_COST
    for number in range(2 * many):
        assert scripts.script(b"%d" % number) == b"%d" % number
        scripts.script(b"0")
    assert len(compiled) == 2 * many and len(scripts._scripts) <= many
    scripts.script(b"1")
    assert compiled[-1] == b"1" and len(compiled) == 2 * many + 1
    scripts.script(b"x" * sieving.COMPILED_OCTETS)
    assert len(scripts._scripts) <= 1


@pytest.mark.parametrize("in_memory", [False, True])
async def test_of_a_large_message_a_script_sees_the_first_part_and_the_size(bench, tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(sieving, "BODY_MOST", 2000)
    user = await bench.script(
        "a",
        'require ["body", "imap4flags"]; if body :contains "first" { addflag "first"; }'
        'if body :contains "last" { addflag "last"; } if size :over 3000 { addflag "large"; }',
    )
    file, pieces = BigBody(tmp_path / "large", 7), [MESSAGE, b"first ", b"x" * 4000, b" last\r\n"]
    file.write(pieces)
    data = pieces if in_memory else BigFile(str(tmp_path / "large"), 7, file.finish([]))
    replies, _, _ = await bench.delivery.deliver(1, 0, SENDER, [(0, "a@a.example")], data, Outbox())
    assert replies[0] == FILED and bench.found(user) == {"INBOX": [(0, ["first", "large"])]}


async def test_what_an_alias_leads_to_elsewhere_is_sent_there_when_it_is_delivered(bench):
    """As of a DSN, or of mail that was accepted before the alias led there."""
    a, b = await bench.user("a"), await bench.user("b")
    bench.alias("far@a.example", ["x@far.example", "y@far.example"])
    bench.alias("mixed@a.example", ["a@a.example", "b@a.example", "x@far.example"])
    to = lambda first, *others: [Onward(SENDER, first, b"", None, others)]  # noqa: E731
    assert await bench.deliver("far") == ([FILED], to("x@far.example", "y@far.example"))
    assert await bench.deliver("mixed", queue_id=2) == ([FILED], to("x@far.example"))
    assert [len(bench.found(one)["INBOX"]) for one in (a, b)] == [1, 1]
    bench.settings = type(bench.settings)(messages=1)
    assert await bench.deliver("mixed", queue_id=3) == ([FILED], to("x@far.example", "a@a.example", "b@a.example"))

    async def fails(messages):
        raise StoreError("full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.outbox, "make", fails)
        (reply,), sent = await bench.deliver("mixed", queue_id=4)
        assert (reply.code, sent) == (451, [])


async def test_mail_for_an_alias_of_several_is_not_replied_to(bench):
    """RFC 5230 4.5: each would tell the sender, who has written to none of them, that this one is away."""
    await bench.script("a", 'require "vacation"; vacation "I am away";')
    await bench.user("b")
    bench.alias("team@a.example", ["a@a.example", "b@a.example"])
    bench.alias("far@a.example", ["a@a.example", "x@far.example"])
    bench.alias("sales@a.example", ["a@a.example"])
    for number, name in enumerate(("team", "team+x", "far")):
        text = MESSAGE.replace(b"To: a@", b"To: %b@" % name.encode())
        (reply,), sent = await bench.deliver(name, queue_id=10 + number, data=text)
        assert reply == FILED and [one.recipient for one in sent] == ["x@far.example"] * (name == "far")
    _, sent = await bench.deliver("team", queue_id=20, data=MESSAGE.replace(b"To: a@", b"To: team@a.example, a@"))
    assert [one.recipient for one in sent] == [SENDER], "a is named as well"
    _, sent = await bench.deliver("sales", queue_id=21, data=MESSAGE.replace(b"To: a@", b"To: sales@"), sender="t@x.example")
    assert [one.recipient for one in sent] == ["t@x.example"]
