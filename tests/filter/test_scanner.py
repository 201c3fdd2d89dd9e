"""Filters behind the queue: what they are shown, and what comes of a message because of what they say."""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from relaymta.filter import scanner as scanner_module
from relaymta.filter.chain import Chains
from relaymta.filter.judgement import Answer, FilterFailure, Mail, NewEnvelope
from relaymta.filter.scanner import Needs, Scanner
from relaymta.filter.signing import Unsignable
from relaymta.proto import reply
from relaymta.proto.edits import Append, Change, Insert
from relaymta.proto.envelope import UNSEEN, Envelope, QueueName, Unseen
from relaymta.queue import Entry, Events, Queue, QueueSettings, wall_ms
from relaymta.shm import Shared
from tests.filter.test_chain import Bench as Filters
from tests.queue.test_queue import assign, until

TEXT = b"Received: x\r\nSubject: hello\r\n\r\nhello\r\n"
FRONT = len(b"Received: x\r\n")


class Told:
    """A filter by which other milters are stood in for: `says(mail)`."""

    alone, looks, begins = True, True, False
    asks: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.says: Callable[[Mail], Any] = lambda mail: Answer("accept")
        self.shown: list[bytes] = []
        self.asked: list[Mail] = []

    def session(self, client: str) -> "Told":
        self.renew = lambda: None
        self.decided = False
        return self

    async def judge(self, mail: Mail) -> Answer:
        self.asked.append(mail)
        self.shown.append(b"".join([piece async for piece in mail.text.pieces(mail.most)]))
        said = self.says(mail)
        if asyncio.iscoroutine(said):
            said = await said
        if isinstance(said, BaseException):
            raise said
        assert isinstance(said, Answer)
        return said

    async def probe(self) -> None:
        said = self.says(Mail("", "", (), "", "", "", "", None))  # type: ignore[arg-type]
        if isinstance(said, BaseException):
            raise said

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bench:
    """One shard with a scanner. `told`: its filters, by their names; `delivered`: what was offered for delivery."""

    def __init__(self, folder: Path, *filters: dict[str, Any], **table: Any) -> None:
        self.folder = folder
        self.filters = Filters(Shared.create())
        self.given = filters
        self.table = table
        self.told: dict[str, Told] = {}
        self.offered: list[Entry] = []
        self.signer: Any = False
        self.marks = SimpleNamespace(add=lambda _: None, remove=lambda _: None, probe=lambda *_: True)
        self.readdressed: Callable[[list[str]], list[str]] = lambda recipients: recipients

    def configure(self, *filters: dict[str, Any], **table: Any) -> Chains:
        chains = self.filters.configure(*({"type": "milter"} | one for one in filters), **table)
        for guard in chains.guards:
            guard.filter = guard._follower = self.told.setdefault(guard.name, Told())  # type: ignore[assignment]
        return chains

    async def __aenter__(self) -> "Bench":
        self.queue = Queue(self.folder, 0, QueueSettings("relay.example"), assign, self, Events())  # type: ignore[arg-type]
        await self.queue.start()
        self.configure(*self.given, **self.table)
        needs = Needs(
            lambda: self.filters.chains, self.signer, lambda to: self.readdressed(to), lambda *_: None, lambda: 50_000_000
        )
        self.scanner = Scanner(self.queue, needs, self.marks, {}, self.filters)  # type: ignore[arg-type]
        self.queue.unseen.noticed = self.scanner.wake
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.queue.unseen.noticed = lambda: None
        await self.scanner.stop()
        assert self.filters.chains is not None
        self.filters.chains.close()
        await self.queue.stop()

    def offer(self, entry: Entry) -> None:
        self.offered.append(entry)

    def awake(self, name: QueueName) -> bool:
        return True

    async def drain(self, seconds: float, data_seconds: float) -> None:
        pass

    async def put(self, *filters: str, data: bytes = TEXT, to: tuple[str, ...] = ("c@d.example",), **more: Any) -> int:
        """Store a message that these filters have not looked at; its id, once it is durable."""
        ident = self.queue.ident()
        unseen = Unseen([*filters], 0, FRONT, **({"trusted": True, "signs": False, "genuine": False} | more))
        envelope = Envelope("a@b.example", list(to), len(data), UNSEEN, wall_ms(), self.queue.deadline(), unseen=unseen)
        done = asyncio.get_running_loop().create_future()
        body: Any = [data]
        if len(data) > self.queue.big_limit:
            file = self.queue.big_body(ident)
            file.write(body)
            body = file.finish([])
        self.queue.submit(ident, envelope, body, done.set_result)
        error = await done
        if error is not None:
            raise error
        return ident

    async def delivered(self, count: int = 1) -> list[tuple[Entry, bytes]]:
        """The messages that are offered for delivery, with their message data; there are no others."""
        await until(lambda: len(self.offered) >= count)
        assert len(self.offered) == count
        return [(entry, await self._data(entry)) for entry in self.offered]

    async def _data(self, entry: Entry) -> bytes:
        body = entry.envelope.body
        if body is not None and not body.segment:
            return b"".join([piece async for piece in self.queue.stream(entry)])
        found = (await self.queue.read([entry]))[0]
        assert isinstance(found, list), found
        return b"".join(found)

    def came(self) -> list[tuple[str, str]]:
        """What has come of messages."""
        return [(one["result"], one["reason"]) for one in self.filters.of("scanned")]


async def rewriting(mail: Mail, octets: bytes) -> Answer:
    """It writes a new body."""
    assert mail.rewritten is not None
    body = mail.rewritten()
    await body.write(octets)
    await body.end()
    return Answer("accept", body=body)


LARGE = b"a line of text that is long enough\r\n" * 40_000


async def test_two_filters_that_write_large_bodies_one_after_the_other(tmp_path):
    """The file of the first one is not wanted any more: that of the second one stays."""
    async with Bench(tmp_path, {"name": "one"}, {"name": "two"}) as bench:
        bench.told["one"].says = lambda mail: rewriting(mail, LARGE)
        bench.told["two"].says = lambda mail: rewriting(mail, LARGE + b"and two\r\n")
        for data in (TEXT, TEXT + LARGE):
            await bench.put("one", "two", data=data)
        for entry, data in await bench.delivered(2):
            assert data == TEXT.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + LARGE + b"and two\r\n"
            assert entry.envelope.size == len(data)
        assert bench.told["two"].shown[0].endswith(LARGE)
        await until(lambda: len(list((tmp_path / "bodies").rglob("*.next"))) == 0)


async def test_a_filter_that_begins_a_large_body_anew(tmp_path):
    """As where its connection is lost, and it is asked once more."""
    async with Bench(tmp_path, {"name": "one"}) as bench:

        async def twice(mail: Mail) -> Answer:
            assert mail.rewritten is not None
            first = mail.rewritten()
            await first.write(LARGE)
            first.discard()
            return await rewriting(mail, LARGE)

        bench.told["one"].says = twice
        await bench.put("one", data=TEXT + LARGE)
        [(_, data)] = await bench.delivered()
        assert data.endswith(b"\r\n\r\n" + LARGE)


async def test_a_filter_for_a_domain_looks_though_the_alias_in_it_was_followed(tmp_path):
    """It was to look at the message when that came: recipients that are queued are others."""
    async with Bench(tmp_path, {"name": "one", "stage": "message", "recipient_domain": ["d.example"]}) as bench:
        await bench.put("one", to=("alias@elsewhere.example",))
        await bench.delivered()
        assert bench.told["one"].shown


async def test_a_recipient_that_a_filter_removes_is_not_there_again_by_an_alias(tmp_path):
    """A list that has its own address among its members was followed when the message came."""
    async with Bench(tmp_path, {"name": "one", "may": ["recipients"]}) as bench:
        bench.readdressed = lambda to: [
            one for a in to for one in (["a@d.example", "b@d.example"] if a == "a@d.example" else [a])
        ]
        bench.told["one"].says = lambda mail: Answer("accept", envelope=NewEnvelope(["c@d.example"], ["b@d.example"]))
        await bench.put("one", to=("a@d.example", "b@d.example"))
        [(entry, _)] = await bench.delivered()
        assert entry.envelope.recipients == ["a@d.example", "c@d.example"]


async def test_changes_are_stored_and_shown_to_those_that_look_later(tmp_path):
    for size in (b"small\r\n", LARGE):
        async with Bench(tmp_path / str(len(size)), {"name": "one"}, {"name": "two"}, {"name": "three"}) as bench:
            bench.told["one"].says = lambda mail: Answer("accept", edits=[Append(b"X-One", b" 1"), Insert(0, b"X-Top", b" 1")])
            bench.told["two"].says = lambda mail: FilterFailure("refused", "not yet")
            bench.told["three"].says = lambda mail: Answer(
                "accept", edits=[Insert(0, b"X-Three", b" 3"), Insert(1, b"X-Low", b" 3")]
            )
            ident = await bench.put("one", "two", "three", data=TEXT + size)
            await until(lambda: bench.told["two"].shown and bench.told["three"].shown)
            assert not bench.offered
            bench.told["two"].says = lambda mail: Answer("accept", edits=[Change(b"Subject", 1, b" other")])
            [(entry, data)] = await bench.delivered()
            shown = b"X-Three: 3\r\nX-Top: 1\r\nX-Low: 3\r\n%sSubject: %s\r\nX-One: 1\r\n\r\nhello\r\n" + size
            assert bench.told["two"].shown[-1] == shown % (b"", b"hello")
            assert data == shown % (b"Received: x\r\n", b"other"), data[:200]
            assert entry.ident == ident and entry.envelope.size == len(data)
            assert len(bench.told["one"].shown) == len(bench.told["three"].shown) == 1


async def test_while_a_filter_is_down_nobody_looks_at_what_waits_for_it(tmp_path):
    """Also where, since a reload, its failure would be a reply that cannot be given any more."""
    async with Bench(tmp_path, {"name": "one"}) as bench:
        for what in ("later", "tempfail", "disconnect"):
            bench.configure({"name": "one", "on_failure": what})
            assert bench.filters.chains is not None
            [guard] = bench.filters.chains.guards
            guard._down = 0.0, "gone"
            assert bench.filters.chains.waited_for(True) == bench.filters.chains.waited_for(False) == {"one"}
            guard._down = None


async def test_mail_that_comes_in_while_thousands_wait_does_not_have_all_of_them_looked_through_each_time(tmp_path, monkeypatch):
    """A look that costs something is followed by a pause, however often there is more; a cheap one is not."""
    monkeypatch.setattr(scanner_module, "LOOK_EVERY", 60.0)
    async with Bench(tmp_path, {"name": "one"}, {"name": "two"}) as bench:
        bench.told["one"].says = lambda mail: FilterFailure("connect", "nobody is there")
        for _ in range(3):  # it is down then
            await bench.put("one")
        assert bench.filters.chains is not None
        await until(lambda: bench.filters.chains.waited_for(True) == {"one"})
        real, slow = bench.queue.unseen.page, False
        looks: list[tuple[float, float]] = []

        async def page(*arguments: Any) -> Any:
            began = asyncio.get_running_loop().time()
            await asyncio.sleep(0.02 if slow else 0)
            found = await real(*arguments)
            looks.append((began, asyncio.get_running_loop().time()))
            return found

        monkeypatch.setattr(bench.queue.unseen, "page", page)
        for n in range(3):
            await bench.put("two")
            await bench.delivered(n + 1)
        slow = True
        looks.clear()
        while len(looks) < 3:
            await bench.put("one")
        for (began, ended), (further, _) in itertools.pairwise(looks):
            assert further - ended > ended - began
        slow = False
        await bench.put("two")
        await bench.delivered(4)


async def test_where_unseen_messages_cannot_be_looked_for_it_is_not_tried_with_each_message_that_comes(tmp_path, monkeypatch):
    async with Bench(tmp_path, {"name": "one"}) as bench:
        real = bench.queue.unseen.page
        looks = 0

        async def page(*arguments: Any) -> Any:
            nonlocal looks
            looks += 1
            raise ValueError("a defect")

        monkeypatch.setattr(bench.queue.unseen, "page", page)
        for _ in range(20):
            await bench.put("one")
            await asyncio.sleep(0)
        assert looks == 1 and len(bench.filters.of("warning")) == 1
        monkeypatch.setattr(bench.queue.unseen, "page", real)
        monkeypatch.setattr(scanner_module, "STORE_SECONDS", 0.01)
        bench.scanner.wake()
        await bench.delivered(20)


async def test_what_cannot_be_signed_is_told_of_and_never_leaves_unsigned(tmp_path, monkeypatch):
    """Not when an operator releases it either: then it is looked at, and signed, once more."""
    monkeypatch.setattr(scanner_module, "REST_LEAST", 0.01)

    class Refuses:
        error: Unsignable | None = Unsignable(reply.NOT_SIGNED)

        def draft(self, *arguments: object) -> None:
            if self.error is not None:
                raise self.error

    async with Bench(tmp_path, {"name": "one"}) as bench:
        bench.signer = signer = Refuses()
        bench.scanner._needs = bench.scanner._needs._replace(signer=signer)  # type: ignore[arg-type]
        bench.told["one"].says = lambda mail: Answer("accept", edits=[Append(b"X-One", b" 1")])
        ident = await bench.put("one", signs=True)
        await until(lambda: len(bench.told["one"].shown) > 2)
        [warning] = bench.filters.of("warning")
        assert "could not be signed" in warning["text"]
        signer.error = Unsignable(reply.BAD_AUTHOR)
        await until(bench.came)
        assert [(word, reason[:20]) for word, reason in bench.came()] == [("held", "it cannot be signed:")]
        await bench.queue.change_messages("release", [ident], "")
        await until(lambda: len(bench.came()) == 2)
        assert not bench.offered
        signer.error = None
        await bench.queue.change_messages("release", [ident], "")
        [(_, data)] = await bench.delivered()
        assert data == TEXT.replace(b"\r\n\r\n", b"\r\nX-One: 1\r\n\r\n")


async def test_what_is_refused_goes_back_only_where_the_sender_is_not_forged(tmp_path):
    async with Bench(tmp_path, {"name": "one", "refused": "bounce"}, {"name": "two", "refused": "discard"}) as bench:
        bench.told["one"].says = bench.told["two"].says = lambda mail: Answer("reject", "spam")
        await bench.put("one", trusted=False)
        await until(lambda: len(bench.came()) == 1)
        await bench.put("two")
        await until(lambda: len(bench.came()) == 2)
        assert [word for word, _ in bench.came()] == ["held", "discarded"] and not bench.offered
        await bench.put("one", trusted=False, genuine=True)
        [(entry, _)] = await bench.delivered()
        assert (entry.envelope.sender, entry.envelope.recipients) == ("", ["a@b.example"])


async def test_what_one_holds_and_another_has_not_seen_is_seen_once_it_is_released(tmp_path):
    async with Bench(tmp_path, {"name": "one"}, {"name": "two"}) as bench:
        bench.told["one"].says = lambda mail: Answer("quarantine", "odd")
        bench.told["two"].says = lambda mail: FilterFailure("refused", "not yet")
        ident = await bench.put("one", "two")
        await until(bench.came)
        bench.told["two"].says = lambda mail: Answer("accept")
        await bench.queue.change_messages("release", [ident], "")
        await bench.delivered()
        assert len(bench.told["one"].shown) == 1 and len(bench.told["two"].shown) == 2


async def test_a_message_over_which_a_filter_fails_leaves_the_others_alone(tmp_path):
    async with Bench(tmp_path, {"name": "one"}, scans=1) as bench:

        def says(mail: Mail) -> Any:
            return FilterFailure("refused", "poison") if "poison@d.example" in mail.recipients else Answer("accept")

        bench.told["one"].says = says
        await bench.put("one", to=("poison@d.example",))
        for _ in range(20):
            await bench.put("one")
        await bench.delivered(20)
        assert len(bench.told["one"].shown) < 25


async def test_a_filter_that_is_not_configured_any_more_is_not_waited_for(tmp_path):
    async with Bench(tmp_path, {"name": "one"}, {"name": "two"}) as bench:
        bench.told["one"].says = lambda mail: FilterFailure("refused", "not yet")
        await bench.put("gone", "one")
        await until(lambda: bench.told["one"].shown)
        assert not bench.offered and not bench.told["two"].shown
        bench.configure()
        bench.scanner._rests.clear()
        bench.scanner.wake()
        await bench.delivered()


async def test_all_recipients_removed_and_bodies_that_become_small(tmp_path):
    async with Bench(tmp_path, {"name": "one", "may": ["recipients", "body", "header", "sender"]}) as bench:
        bench.told["one"].says = lambda mail: Answer("accept", envelope=NewEnvelope((), ["c@d.example"]))
        await bench.put("one")
        await until(bench.came)
        for octets in (b"small\r\n", b"", b"x" * 400_000 + b"\r\n"):
            bench.offered.clear()
            bench.told["one"].says = lambda mail, octets=octets: rewriting(mail, octets)
            await bench.put("one", data=TEXT + LARGE)
            [(entry, data)] = await bench.delivered()
            assert data == TEXT.partition(b"hello\r\n")[0] + b"hello\r\n\r\n" + octets and entry.envelope.size == len(data)
        assert bench.came()[0][0] == "discarded"


async def test_a_body_that_is_stored_before_another_filter_looks(tmp_path):
    """From a segment into a file, and into others; of all these one is left."""
    async with Bench(tmp_path, {"name": "one"}, {"name": "two"}, {"name": "three"}) as bench:
        first, second = LARGE + b"first\r\n", LARGE + b"second\r\n"
        bench.told["one"].says = lambda mail: rewriting(mail, first)
        bench.told["two"].says = bench.told["three"].says = lambda mail: FilterFailure("refused", "not yet")
        await bench.put("one", "two", "three")
        head = b"Subject: hello\r\n\r\n"
        await until(lambda: bench.told["two"].shown[-1:] == [head + first] and not bench.scanner._scans)
        bench.told["two"].says = lambda mail: rewriting(mail, second)
        await until(lambda: bench.told["three"].shown[-1:] == [head + second])
        assert not bench.offered
        bench.told["three"].says = lambda mail: rewriting(mail, b"small\r\n")
        [(entry, data)] = await bench.delivered()
        assert (data == b"Received: x\r\n" + head + b"small\r\n") is True and entry.envelope.size == len(data)
        assert [len(bench.told[name].shown) for name in ("one",)] == [1]
        await until(lambda: len(list((tmp_path / "shard-0/bodies/big").iterdir())) == 1)
