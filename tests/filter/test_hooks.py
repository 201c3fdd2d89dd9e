"""Hooks in Python in processes of their own: what they say, and what those do that should not be there."""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relaymta.filter import hookpool as module
from relaymta.filter import hookprocess
from relaymta.filter.hookfile import BrokenFile, HookFile, declared
from relaymta.filter.hookframes import HOOKS as ALL
from relaymta.filter.hookframes import Frames, Garbage, pack, unpack_reply
from relaymta.filter.hookframes import Reply as Frame
from relaymta.filter.hookhost import SPENT
from relaymta.filter.hooks import EVENTS_MOST, Hooks
from relaymta.filter.judgement import Answer, FilterFailure, Mail, Text
from relaymta.filter.means import HookMeans
from relaymta.metrics import HOOK_FAILURES, HOOKS
from relaymta.proto.edits import Change, Insert
from tests.queue.test_queue import until
from tests.support.daemon import wait_for

HEADER = b"From: a@b.example\r\nSubject: hello\r\n world\r\nX-A: 1\r\nx-a: 2\r\n\r\n"
MAIL = Mail(
    "ID1", "a@b.example", ["c@d.example"], "192.0.2.1", "helo.example", "ann", "", Text(HEADER, b"body\r\n"),
    parameters=("BODY=8BITMIME",), announced=7, dmarc="pass", application="shop", listener="127.0.0.1:25",
)  # fmt: skip

# Recipients' local parts say what is to happen.
BAD = """
import asyncio, ctypes, os, sys, threading, time
from relaymta.hooks import *

kept = []

async def on_rcpt(client, envelope, recipient):
    what = recipient.partition("@")[0]
    if what in globals():
        return await globals()[what]()

async def sleeps(): time.sleep(600)

async def spins():
    while True: pass

async def keeps_the_lock(): ctypes.PyDLL(None).sleep(600)

async def exits(): os._exit(3)

async def crashes(): os.kill(os.getpid(), 11)

async def calls_exit(): sys.exit(4)

async def interrupts(): raise KeyboardInterrupt

async def raises_what_cannot_be_shown(): raise SyntaxError("no", ("x", 1, 1, 5))

async def raises(): raise ValueError("a secret\\r\\n250 fine MemoryError")

async def leaves_a_task():
    async def blocks():
        await asyncio.sleep(0.01)
        time.sleep(600)
    kept.append(asyncio.create_task(blocks()))

async def waits(): await asyncio.sleep(600)

async def ignores():
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

async def leaks():
    while True: kept.append(bytearray(1 << 20))

async def closes():
    os.closerange(3, 256)
    return reject("closed")

async def writes():
    for descriptor in range(3, 256):
        try: os.write(descriptor, b"\\xff" * 4096)
        except OSError: pass
    return reject("written")

async def answers_for_others():
    import struct, msgspec
    body = msgspec.msgpack.encode([[], "reject"])
    for descriptor in range(3, 256):
        try: os.write(descriptor, struct.pack(">I", len(body)) + body)
        except OSError: pass
    return reject("written")

async def parent_exits():
    if os.fork(): os._exit(5)
    time.sleep(600)

async def child_answers():
    os.fork()
    return reject("once")

async def child_stays():
    if not os.fork(): time.sleep(600)
    return reject("with a child")

async def child_task():
    async def inner(): os._exit(6)
    await asyncio.gather(inner())

async def child_leaves():
    async def inner(): sys.exit(7)
    await asyncio.gather(inner())

async def stops_the_loop():
    asyncio.get_running_loop().stop()
    await asyncio.sleep(600)

async def thread_exits():
    threading.Thread(target=os._exit, args=(8,)).start()
    await asyncio.sleep(600)

async def cancels_all():
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task(): task.cancel()

async def calls_what_blocks():
    asyncio.get_running_loop().call_soon(time.sleep, 600)
    await asyncio.sleep(600)

async def short(): time.sleep(0.12)

async def waits_a_little(): await asyncio.sleep(0.6)

async def stops_iteration(): next(iter(()))

async def prints(): print("said by a hook")
"""


@contextlib.asynccontextmanager
async def hooks(folder: Path, code: str, told: list[Any] | None = None, **more: Any) -> AsyncIterator[Hooks]:
    """Hooks of this file, ready. `told`: gets what is counted, and warnings."""
    file = folder / "policy.py"
    file.write_text(textwrap.dedent(code))
    log = [] if told is None else told
    means = HookMeans(
        lambda: ("fast", "slow"), lambda text: log.append(("log", text)), failed=lambda hook, why: log.append((hook, why)),
        raised=lambda place: log.append(("raised", place)), dropped=lambda hook: log.append(("dropped", hook)),
        took=lambda hook, seconds: log.append(("took", hook)),
    )  # fmt: skip
    given = {"seconds": 60.0, "memory": 1 << 30, "in_loop": False} | more
    one = Hooks(str(file), means=means, name="h", warn=lambda text: log.append(("warn", text)), **given)
    try:
        await one.probe()
        yield one
    finally:
        one.stop()
        await until(lambda: not one.open)
        await asyncio.sleep(0.01)


def pid(one: Hooks) -> int:
    return int(one.pool.version.called.pid)


async def said(one: Hooks, what: str, session: Any = None) -> Answer | str:
    """The answer about a recipient, or the reason of the failure."""
    own = session or one.session("192.0.2.1")
    try:
        return await own.rcpt(MAIL, f"{what}@d.example")
    except FilterFailure as failure:
        assert failure.own, "others are not kept from the hooks"
        return failure.reason
    finally:
        if session is None:
            own.close()


SAYS = """
    from relaymta.hooks import *
    async def on_connect(client): return reject(repr(client))
    async def on_mail(client, envelope): return tempfail(f"{envelope}", "452 4.2.0 not\\r\\n now")
    async def on_data(client, envelope): return hold("why\\nnot")
    @wants_body
    async def on_message(mail):
        body = mail.body.open().readline() + mail.body.read()
        return Verdict("accept", f"{mail.id} {mail.size} {mail.results.dmarc} {mail.header.get('subject')} {body}", score=1.5,
                       changes=(Add("X-New", "1\\r\\nX-Evil: 2"), Replace("X-A", "3", 2), Remove("x-a"),
                                AddRecipient("n@d.example"), AddRecipient("not an address"), SetSender("")))
    async def choose_route(mail): return "slow"
"""


async def test_what_hooks_say(tmp_path):
    async with hooks(tmp_path, SAYS) as one:
        session = one.session("192.0.2.1")
        answer = await session.client("CONNECT", MAIL)
        assert answer.word == "reject" and "application='shop'" in answer.reason and "user='ann'" in answer.reason
        answer = await session.mail(MAIL)
        assert answer.reply == b"452 4.2.0 not\\r\\n now\r\n", "one line, whatever is in it"
        assert "sender='a@b.example'" in answer.reason and "parameters=('BODY=8BITMIME',), size=7" in answer.reason
        assert (await session.data(MAIL)).reason == "why\\nnot"
        session.reset()
        session._asked.update(["MAIL", "DATA", "c@d.example"])
        answer = await session.judge(MAIL)
        assert answer.reason == f"ID1 {len(HEADER) + 6} pass hello world b'body\\r\\nbody\\r\\n'" and answer.score == 1.5
        assert answer.edits == [
            Change(b"X-A", 2, b" 3"), Change(b"x-a", 1, b""), Change(b"x-a", 2, b""), Insert(1, b"X-New", b" 1\r\nX-Evil: 2"),
        ]  # fmt: skip
        assert answer.envelope is not None and answer.envelope.added == ["n@d.example"] and answer.envelope.sender == ""
        assert answer.dropped == 1 and answer.route == "slow"
        session.close()
        assert await one.prove() == f"on_connect, on_mail, on_data, on_message, choose_route ({tmp_path}/policy.py)"


async def test_a_message_of_nobody_who_is_followed_is_asked_about_at_each_stage(tmp_path):
    code = """
        from relaymta.hooks import *
        async def on_mail(client, envelope): return accept(Add("X-M", "1"))
        async def on_rcpt(client, envelope, recipient): return hold("rcpt") if recipient == "h@d.example" else None
        async def on_message(mail): return tag("t", Add("X-T", "1"))
    """
    async with hooks(tmp_path, code) as one:
        assert (await one.judge(MAIL)).word == "tag"
        answer = await one.judge(replace(MAIL, recipients=["c@d.example", "h@d.example"]))
        assert (answer.word, answer.reason) == ("hold", "rcpt") and [edit.name for edit in answer.edits] == [b"X-M", b"X-T"]


@pytest.mark.parametrize("returned, why", [
    ("1", "returns int"), ("'reject'", "returns str"), ("Verdict('refuse')", "'refuse'"), ("Verdict('reject', 5)", "understood"),
    ("Verdict('accept', changes=('x',))", "understood"), ("Verdict('accept', changes=(Add(1, 2),))", "understood"),
    ("Verdict('accept', '\\ud800')", "understood"), ("Verdict('accept', 'x' * (2 << 20))", "octets"),
    ("Verdict('accept', score='much')", "understood"), ("Verdict('hold')", "there is no message yet"),
    ("Verdict(['reject'])", "cannot be read: TypeError"),
    ("Verdict('accept', changes=(1 / 0 for _ in 'x'))", "cannot be read: ZeroDivisionError"),
])  # fmt: skip
async def test_what_is_no_verdict_is_a_failure_that_says_what_it_was(tmp_path, returned, why):
    told: list[Any] = []
    code = f"from relaymta.hooks import *\nasync def on_helo(client): return {returned}\n"
    async with hooks(tmp_path, code, told) as one:
        session = one.session("")
        with pytest.raises(FilterFailure, match=why) as failure:
            await session.client("HELO", MAIL)
        assert failure.value.reason == "protocol" and failure.value.own and ("on_helo", "answer") in told
        session.close()
        assert one.pool.version.called is not None, "the process is well"


@pytest.mark.parametrize("hook, word", [
    ("on_rcpt", "route"), ("on_rcpt", "ready"), ("on_rcpt", "x" * 100), ("choose_route", "reject"), ("on_attempt", "hold"),
])  # fmt: skip
async def test_a_word_that_no_such_hook_says_is_a_failure(tmp_path, monkeypatch, hook, word):
    async with hooks(tmp_path, BAD) as one:

        async def call(*_: object) -> Frame:
            return Frame(1, word)

        monkeypatch.setattr(one.pool, "call", call)
        with pytest.raises(FilterFailure, match=f"{hook} says") as failure:
            await one.call(one.pool.version, hook, [])
        assert failure.value.own


@pytest.mark.parametrize("name", ["fast", "none", "other"])
async def test_a_route_has_to_be_there(tmp_path, name):
    code = f"async def choose_route(mail): return {name!r} if {name!r} != 'none' else None\n"
    async with hooks(tmp_path, code) as one:
        if name == "other":
            with pytest.raises(FilterFailure, match="there is no route 'other'"):
                await one.judge(MAIL)
        else:
            assert (await one.judge(MAIL)).route == ("fast" if name == "fast" else "")


def test_a_file_may_lie_above_the_relay_and_what_is_installed(tmp_path):
    """As that of a project with a virtual environment in it."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/relaymta").symlink_to(Path(module.__file__).parents[1])
    (tmp_path / "venv/other.py").touch()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").touch()
    file = tmp_path / "policy.py"
    file.write_text("import other, own\nfrom relaymta.hooks import *\nasync def on_helo(c): return reject('here')\n")
    code = f"""
        import asyncio
        from relaymta.filter.hookfile import HookFile
        one = HookFile({str(file)!r})
        print(asyncio.run(one.call(1, "on_helo", [()], None)).word, *(path for path, *_ in one.files))
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}/venv"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["reject", str(file), f"{tmp_path}/own/__init__.py"], done.stderr


# What should not be there


async def test_octets_of_a_client_that_are_no_text_are_shown_and_cost_nobody_the_process(tmp_path):
    """As of `MAIL FROM:<a@b.example> AUTH=\\xff`."""
    code = """
        from relaymta.hooks import *
        async def on_mail(client, envelope): return reject(ascii(envelope.parameters))
    """
    async with hooks(tmp_path, code) as one:
        before, session = pid(one), one.session("")
        answer = await session.mail(replace(MAIL, parameters=("AUTH=\udcff",)))
        assert answer.reason == r"('AUTH=\ufffd',)"
        assert not one.pool.version.called.pending and pid(one) == before
        session.close()


ENDED = {"exits": "status 3", "crashes": "SIGSEGV", "closes": "closed its socket|status", "writes": "no sense",
         "answers_for_others": "no sense", "parent_exits": "status 5", "child_task": "status 6",
         "child_leaves": "status 1", "stops_the_loop": "status 1", "thread_exits": "status 8"}  # fmt: skip


@pytest.mark.parametrize("what", ENDED)
async def test_a_process_that_ends_costs_nobody_else_anything(tmp_path, what):
    told: list[Any] = []
    async with hooks(tmp_path, BAD, told) as one:
        before, session = pid(one), one.session("")
        others = [asyncio.create_task(said(one, "waits", session)) for _ in range(3)]
        await until(lambda: len(one.pool.version.called.pending) == 3)
        assert await said(one, what, session) == "refused"
        assert ("on_rcpt", "ended") in told
        await until(lambda: one.pool.version.called is not None)
        assert pid(one) != before, "another process is called"
        assert (await said(one, "nothing", session)) == Answer("continue")
        await until(lambda: len(one.pool.version.called.pending) == 3)  # they are asked once more
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        assert any(kind == "warn" and module_says(text, ENDED[what]) for kind, text in told), told
        await until(lambda: not there(before))
        session.close()


def module_says(text: str, words: str) -> bool:
    return any(word in text for word in words.split("|"))


def there(process: int) -> bool:
    """Whether any process of the group is there, and not a zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "--pgroup", str(process)], capture_output=True, text=True, check=False)
    done = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=False) if done.returncode else done
    rows = [line.split() for line in done.stdout.splitlines()]
    return any(len(row) == 2 and row[0] == str(process) and not row[1].startswith("Z") for row in rows)


@pytest.mark.parametrize("what", ["sleeps", "spins", "keeps_the_lock"])
async def test_one_that_blocks_is_killed_when_its_time_is_up_and_the_others_do_not_wait_for_that(tmp_path, what):
    told: list[Any] = []
    async with hooks(tmp_path, BAD, told, seconds=3.0) as one:
        await until(lambda: one.pool.version.spares)
        before, order, session = pid(one), [], one.session("")
        blocks = asyncio.create_task(said(one, what, session))
        blocks.add_done_callback(lambda _: order.append("blocks"))
        await asyncio.sleep(0)
        for number in range(5):
            assert await said(one, "nothing", session) == Answer("continue")
            order.append(str(number))
        assert await blocks == "timeout"
        assert order == ["0", "1", "2", "3", "4", "blocks"]
        assert ("on_rcpt", "timeout") in told and told.count(("on_rcpt", "timeout")) == 1
        await until(lambda: not there(before))
        if what != "keeps_the_lock":  # nobody in the process can tell where it is then
            assert any(kind == "log" and f"more than 50 ms at {tmp_path}/policy.py:" in text for kind, text in told)
        session.close()


async def test_one_that_only_holds_its_process_for_a_while_is_answered_and_its_process_is_used_again(tmp_path):
    code = "import time\nasync def on_rcpt(client, envelope, recipient):\n    if recipient[0] == 'h': time.sleep(0.4)\n"
    told: list[Any] = []
    async with hooks(tmp_path, code, told) as one:
        await until(lambda: one.pool.version.spares)
        first, second, session = pid(one), one.pool.version.spares[0].pid, one.session("")
        held = asyncio.create_task(said(one, "held", session))
        await until(lambda: pid(one) == second)
        assert await said(one, "nothing", session) == Answer("continue") == await held
        await until(lambda: first in [spare.pid for spare in one.pool.version.spares])
        assert not [row for row in told if row[0] == "warn"]
        session.close()


async def test_a_call_that_is_moved_has_no_more_time_than_others_and_is_not_moved_without_need(tmp_path):
    """One client after the other blocks for a moment; those that wait meanwhile, in the same process, go on there."""
    async with hooks(tmp_path, BAD) as one:
        session = one.session("")
        waits = [asyncio.create_task(said(one, "waits_a_little", session)) for _ in range(5)]
        for _ in range(200):
            await said(one, "short")
            await asyncio.sleep(0.02)
            if all(one.done() for one in waits):
                break
        else:
            pytest.fail("they begin again and again")
        assert await asyncio.gather(*waits) == [Answer("continue")] * 5
        session.close()


async def test_of_many_that_block_for_a_moment_each_is_called_once_as_far_as_there_is_time(tmp_path):
    code = BAD.replace(
        "async def short(): time.sleep(0.12)",
        """
async def short():
    with open(__file__ + ".called", "a") as file: file.write("x")
    time.sleep(0.12)
""",
    )
    async with hooks(tmp_path, code, seconds=1.0) as one:
        began = time.monotonic()
        found = await asyncio.gather(*(said(one, "short") for _ in range(40)))
        taken = time.monotonic() - began
        good = found.count(Answer("continue"))
        assert good and found.count("timeout")
        assert taken < 30, "the time of each ends, however often it is moved"
        assert len((tmp_path / "policy.py.called").read_text()) <= good + 15


async def test_what_a_hook_cancels_of_others_is_called_once_more(tmp_path):
    async with hooks(tmp_path, BAD) as one:
        session = one.session("")
        waits = [asyncio.create_task(said(one, "waits_a_little", session)) for _ in range(3)]
        await until(lambda: len(one.pool.version.called.pending) == 3)
        assert await said(one, "cancels_all") == Answer("continue")
        assert await asyncio.gather(*waits) == [Answer("continue")] * 3
        session.close()


async def test_who_goes_before_its_call_has_begun_costs_the_process_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STOPPING", 5.0)  # on a machine that is busy
    told: list[Any] = []
    async with hooks(tmp_path, BAD, told) as one:
        session, before = one.session("192.0.2.1"), pid(one)
        waits = asyncio.create_task(said(one, "waits_a_little", session))
        await until(lambda: one.pool.version.called.pending)
        gone = [asyncio.create_task(said(one, "waits", session)) for _ in range(20)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()  # the process reads the calls and that nobody waits for them at the same time
        assert await waits == Answer("continue")
        await until(lambda: not one.pool.version.called.cancelling)
        assert pid(one) == before and not [text for kind, text in told if kind == "warn"]
        session.close()


async def test_who_is_late_beside_one_that_blocks_does_not_end_it(tmp_path):
    async with hooks(tmp_path, BAD + "\nasync def long(): time.sleep(1.6)\n", seconds=4.0) as one:
        session = one.session("192.0.2.1")
        late = asyncio.create_task(said(one, "waits", session))
        await until(lambda: one.pool.version.called.pending)
        await asyncio.sleep(3.0)
        assert await said(one, "long", session) == Answer("continue")
        assert await late == "timeout"
        session.close()


async def test_a_callback_that_blocks_keeps_nobody_else_waiting(tmp_path):
    told: list[Any] = []
    async with hooks(tmp_path, BAD, told, seconds=5.0) as one:
        session = one.session("")
        waits = [asyncio.create_task(said(one, "waits_a_little", session)) for _ in range(3)]
        await until(lambda: len(one.pool.version.called.pending) == 3)
        before = pid(one)
        bad = asyncio.create_task(said(one, "calls_what_blocks"))
        assert await asyncio.gather(*waits) == [Answer("continue")] * 3
        assert await bad == "timeout"
        await until(lambda: not there(before))
        session.close()


async def test_an_exception_without_a_frame_of_its_own_has_the_place_of_its_cause(tmp_path):
    told: list[Any] = []
    async with hooks(tmp_path, BAD, told) as one:
        assert (await said(one, "stops_iteration")).word == "raised"
        assert [place.rpartition(":")[0] for what, place in told if what == "raised"] == [str(tmp_path / "policy.py")]


@pytest.mark.parametrize("what, killed", [("waits", False), ("ignores", True)])
async def test_one_that_waits_for_too_long_is_stopped_and_the_process_goes_on_unless_it_will_not_stop(tmp_path, what, killed):
    async with hooks(tmp_path, BAD, seconds=0.5) as one:
        before = pid(one)
        assert await said(one, what) == "timeout"
        await until(lambda: not any(process.cancelling for process in one.pool.version._tasks))
        assert there(before) is not killed
        assert await said(one, "nothing") == Answer("continue")


@pytest.mark.parametrize("what", ["waits", "sleeps", "ignores"])
async def test_who_is_gone_does_not_wait_and_what_it_has_begun_is_stopped(tmp_path, what):
    async with hooks(tmp_path, BAD) as one:
        before = pid(one)
        task = asyncio.create_task(said(one, what))
        await until(lambda: one.pool.version.called.pending and one.pool.version.called.now[1])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not any(one.pending or one.cancelling for one in one.pool.version._tasks))
        await until(lambda: there(before) is (what == "waits"))
        assert await said(one, "nothing") == Answer("continue")


async def test_a_task_that_blocks_after_its_hook_has_answered_costs_others_nothing(tmp_path):
    told: list[Any] = []
    async with hooks(tmp_path, BAD, told, seconds=3.0) as one:
        await until(lambda: one.pool.version.spares)
        before, session = one.pool.version.called, one.session("")
        assert await said(one, "leaves_a_task", session) == Answer("continue")
        await until(lambda: before.now == (1, 3))
        assert await asyncio.gather(*(said(one, "nothing", session) for _ in range(3))) == [Answer("continue")] * 3
        assert one.pool.version.called is not before
        await until(lambda: any("50 ms" in text and "in blocks" in text for kind, text in told if kind == "log"))
        session.close()


@pytest.mark.parametrize("what", ["raises", "calls_exit", "interrupts", "raises_what_cannot_be_shown", "leaks"])
async def test_an_exception_is_a_refusal_for_now_and_a_place_in_the_metrics(tmp_path, what):
    told: list[Any] = []
    async with hooks(tmp_path, BAD, told, memory=256 << 20) as one:
        before = pid(one)
        for _ in range(2):
            answer = await said(one, what)
            assert isinstance(answer, Answer) and answer.word == "raised"
            assert answer.reply == b"451 4.3.0 Internal error; try again later\r\n" and "secret" not in answer.reason
            if what == "leaks":  # what it has is not given back: another process goes on
                await until(lambda gone=before: not there(gone))
                before = pid(one)
        places = [text for kind, text in told if kind == "raised"]
        assert len(places) == 2 and set(places) == {places[0]} and places[0].startswith(f"{tmp_path}/policy.py:")
        logged = [text for kind, text in told if kind == "log" and "has raised" in text]
        assert len(logged) == 1 and "\r" not in logged[0] and "\n" not in logged[0]
        assert told.count(("on_rcpt", "raised")) == 2
        if what != "leaks":
            assert pid(one) == before, "a client may have written the text of an exception"
        else:
            assert any(kind == "warn" and f"status {SPENT}" in text for kind, text in told)
        assert await said(one, "nothing") == Answer("continue")


@pytest.mark.parametrize("what", ["child_answers", "child_stays"])
async def test_what_a_hook_has_forked_says_nothing_in_its_name_and_ends_with_it(tmp_path, what):
    async with hooks(tmp_path, BAD) as one:
        before = pid(one)
        answer = await said(one, what)
        assert isinstance(answer, Answer) and answer.word == "reject"
        for _ in range(20):
            assert await said(one, "nothing") == Answer("continue")
        assert pid(one) == before
    await until(lambda: not there(before))


async def test_an_innocent_call_is_asked_once_more_and_not_for_ever(tmp_path):
    """Two processes end under it, and it cannot be known that it was not its fault."""
    async with hooks(tmp_path, BAD) as one:
        session = one.session("")
        waits = asyncio.create_task(said(one, "waits", session))
        for _ in range(2):
            await until(lambda: one.pool.version.called is not None and one.pool.version.called.pending)
            process = one.pool.version.called
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda gone=process: one.pool.version.called is not gone)
        assert await waits == "refused"
        session.close()


@pytest.mark.parametrize("what", ["exits", "leaks"])
async def test_an_innocent_call_outlives_several_bad_ones_in_a_row(tmp_path, what):
    async with hooks(tmp_path, BAD, memory=256 << 20) as one:
        session = one.session("")
        waits = asyncio.create_task(said(one, "waits", session))
        for _ in range(3):
            await until(lambda: one.pool.version.called is not None and one.pool.version.called.pending)
            found = await said(one, what)
            assert found == "refused" or found.word == "raised"
        await until(lambda: one.pool.version.called is not None and one.pool.version.called.pending)
        assert not waits.done()
        waits.cancel()
        await asyncio.wait([waits])
        session.close()


def test_a_process_that_is_at_its_end_is_known():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not hookprocess._is_ending(process.pid)
        process.kill()
        wait_for(lambda: hookprocess._is_ending(process.pid))  # a zombie: nobody has asked for its status
    assert not hookprocess._is_ending(process.pid)


async def test_a_process_that_is_killed_is_started_anew_and_who_comes_meanwhile_waits(tmp_path):
    async with hooks(tmp_path, BAD) as one:
        await until(lambda: one.pool.version.spares)
        for process in [*one.pool.version._tasks]:
            os.kill(process.pid, signal.SIGKILL)
        await until(lambda: one.pool.version.called is None)
        assert await said(one, "nothing") == Answer("continue")


def test_processes_end_with_the_worker_also_while_a_hook_blocks(tmp_path):
    (tmp_path / "policy.py").write_text(BAD)
    code = f"""
        import asyncio
        from relaymta.filter.hooks import Hooks
        from relaymta.filter.means import HookMeans
        from tests.filter.test_hooks import MAIL
        async def main():
            one = Hooks({str(tmp_path / "policy.py")!r}, 600.0, 0, False, HookMeans(), "h")
            await one.probe()
            while not one.pool.version.spares: await asyncio.sleep(0.01)
            asyncio.create_task(one.session("").rcpt(MAIL, "sleeps@d.example"))
            await asyncio.sleep(0.2)
            print(*(process.pid for process in one.pool.version._tasks), flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    wait_for(lambda: not any(there(one) for one in pids), what="the processes to end")


async def test_no_descriptor_is_left(tmp_path):
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    async with hooks(tmp_path, BAD):
        pass
    before = count()
    for _ in range(3):
        async with hooks(tmp_path, BAD, seconds=0.3) as one:
            for what in ("nothing", "exits", "waits", "raises"):
                await said(one, what)
    await until(lambda: count() <= before)


async def test_a_process_inherits_next_to_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    code = """
        import os
        from relaymta.hooks import *
        async def on_connect(client): return reject(f"{sorted(os.environ)} {sorted(map(target, os.listdir('/proc/self/fd')))}")
        def target(number):
            try: return os.readlink(f"/proc/self/fd/{number}").partition(":")[0].partition(" ")[0]
            except OSError: return ""
    """
    with (tmp_path / "open").open("w") as open_file:
        os.set_inheritable(open_file.fileno(), True)
        async with hooks(tmp_path, code) as one:
            session = one.session("")
            answer = await session.client("CONNECT", MAIL)
            session.close()
    assert "SECRET" not in answer.reason
    targets = answer.reason.partition("] ")[2]
    assert targets.count("socket") == 3 and "memfd" not in targets and "open" not in targets.replace("eventpoll", "")
    assert targets.count(",") <= 3 + 6, targets  # its socket, the memory, what the event loop has, and the folder itself


# Bodies


async def test_a_large_body_is_read_from_the_message_s_own_file_which_a_hook_cannot_change(tmp_path):
    code = """
        import os
        from relaymta.hooks import *
        @wants_body
        async def on_message(mail):
            file = mail.body.open()
            file.seek(-5, 2)
            try:
                os.write(mail.body._descriptor, b"x")
            except OSError as error:
                return hold(f"{mail.body.size} {mail.body.read()[:3]} {file.read()} {error.errno}")
    """
    path = tmp_path / "message"
    path.write_bytes(b"in front of it" + b"abc" + b"." * 100_000 + b"end\r\n" + b"behind it")
    octets = 3 + 100_000 + 5

    def lend() -> tuple[int, int]:
        return os.open(path, os.O_RDONLY), 14

    async def read(at: int, most: int) -> bytes:
        raise AssertionError("it is not copied")

    async with hooks(tmp_path, code) as one:
        await until(lambda: one.pool.version.spares)
        before = len(os.listdir("/proc/self/fd"))
        answer = await one.judge(replace(MAIL, text=Text(HEADER, b"", octets, read, lend)))
        assert (answer.word, answer.reason) == ("hold", rf"{octets} b'abc' b'end\r\n' 9")
        text = Text(HEADER, b"", octets, read, lend)
        answer = await one.judge(replace(MAIL, text=text, most=len(HEADER) + 10))
        assert answer.reason == "10 b'abc' b'.....' 9"
        assert len(os.listdir("/proc/self/fd")) == before


async def test_a_body_that_no_file_has_is_copied(tmp_path):
    code = """
        from relaymta.hooks import *
        async def on_message(mail): return hold(f"{len(mail.body.read())} {mail.body.read()[-3:]}")
        on_message.wants_body = True
    """

    async def read(at: int, most: int) -> bytes:
        return (b"x" * 3_000_000 + b"end")[at : at + most]

    async with hooks(tmp_path, code) as one:
        answer = await one.judge(replace(MAIL, text=Text(HEADER, b"", 3_000_003, read)))
        assert answer.reason == "3000003 b'end'"


# Versions


def write(path: Path, text: str) -> None:
    """Another content, at another time: file systems may have coarse ones."""
    path.write_text(textwrap.dedent(text))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))


async def changed(one: Hooks, condition: Callable[[], bool]) -> None:
    def look() -> bool:
        one.pool._look_after = 0.0
        one.refresh()
        return condition()

    await until(look)


VERSIONS = "from helper import WORD\nfrom relaymta.hooks import *\nasync def on_rcpt(c, e, r): return reject(WORD)\n"


async def test_a_changed_file_is_for_new_sessions_and_those_under_way_keep_the_old_code(tmp_path):
    (tmp_path / "helper.py").write_text("WORD = 'one'\n")
    told: list[Any] = []
    async with hooks(tmp_path, VERSIONS, told) as one:
        old, first = one.session(""), one.pool.version
        before = pid(one)
        write(tmp_path / "helper.py", "WORD = 'two'\n")
        await changed(one, lambda: one.pool.version is not first)
        new = one.session("")
        assert [(await one_.rcpt(MAIL, "c@d.example")).reason for one_ in (old, new, old)] == ["one", "two", "one"]
        assert there(before)
        old.close()
        await until(lambda: not there(before))
        new.close()

        second = one.pool.version
        await until(lambda: second.spares)
        write(tmp_path / "policy.py", "import helper\nthis is broken (\n")
        await changed(one, lambda: any(kind == "warn" and "stays in use" in text for kind, text in told))
        assert any(text.startswith(f"{tmp_path}/policy.py:2: ") for kind, text in told if kind == "warn")
        assert one.pool.version is second and (await said(one, "x")).reason == "two"  # type: ignore[union-attr]
        count = len(told)
        await changed(one, lambda: True)
        await asyncio.sleep(0.3)
        assert not [text for kind, text in told[count:] if kind == "warn"], "told once"

        write(tmp_path / "policy.py", VERSIONS + "async def on_helo(c): pass\n")
        shapes: list[frozenset[str]] = []
        one.changed_shape = lambda: shapes.append(one.asks)
        await changed(one, lambda: one.pool.version is not second)
        assert shapes == [frozenset({"RCPT", "HELO"})], "what is asked is another"


async def test_a_session_that_keeps_code_that_nobody_has_any_more_goes_on_with_the_new_one(tmp_path):
    (tmp_path / "helper.py").write_text("WORD = 'one'\n")
    async with hooks(tmp_path, VERSIONS) as one:
        old, first, before = one.session(""), one.pool.version, pid(one)
        write(tmp_path / "helper.py", "WORD = 'two'\n")
        await changed(one, lambda: one.pool.version is not first)
        os.kill(before, signal.SIGKILL)
        await until(lambda: not there(before))
        await until(lambda: first.called is None)
        assert (await old.rcpt(MAIL, "c@d.example")).reason == "two"
        old.close()


async def test_sessions_keep_what_no_configuration_has_any_more_until_they_end(tmp_path, monkeypatch):
    """Nothing else would be asked for them: a client may stay for days."""
    monkeypatch.setattr(module, "OLD", 0.05)
    async with hooks(tmp_path, BAD) as one:
        session = one.session("")
        one.close()
        await asyncio.sleep(0.2)
        assert await said(one, "exits", session) == "refused"
        assert await said(one, "nothing", session) == Answer("continue"), "a process is started for it"
        session.close()
        await until(lambda: not one.open)


NEWER = "from relaymta.hooks import *\nasync def on_rcpt(c, e, r): return reject('{}')\n"


async def test_of_old_code_there_is_little_at_once_however_often_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.0)
    monkeypatch.setattr(module, "OLD_MOST", 2)
    async with hooks(tmp_path, NEWER.format(0)) as one:
        sessions = []
        for number in range(1, 5):
            sessions.append(one.session(""))
            known = one.pool.version
            (tmp_path / "policy.py").write_text(NEWER.format(number) + "#" * number)
            one.refresh()
            await until(lambda known=known: one.pool.version is not known)
        said = [(await session.rcpt(MAIL, "c@d.example")).reason for session in sessions]
        assert said == ["4", "4", "2", "3"] and len(one.pool._versions) == 3
        for session in sessions:
            session.close()


async def test_old_code_ends_after_a_while_whoever_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OLD", 0.1)
    (tmp_path / "helper.py").write_text("WORD = 'one'\n")
    async with hooks(tmp_path, VERSIONS) as one:
        old, first, before = one.session(""), one.pool.version, pid(one)
        write(tmp_path / "helper.py", "WORD = 'two'\n")
        await changed(one, lambda: one.pool.version is not first)
        await until(lambda: not there(before))
        assert (await old.rcpt(MAIL, "c@d.example")).reason == "two"
        old.close()


@pytest.mark.parametrize("code, why", [
    ("x = 1\ny = (\n", ":2: '(' was never closed"), ("import nothing_of_this_name\n", ":1: ModuleNotFoundError: No module"),
    ("def on_rcpt(c, e, r): pass\n", ":1: on_rcpt has to be an `async def`"), ("\nraise SystemExit(3)\n", ":2: SystemExit: 3"),
    ("import os\nos._exit(9)\n", "has ended with status 9"),
])  # fmt: skip
async def test_a_file_that_cannot_be_imported_fails_at_once_and_says_where(tmp_path, code, why):
    (tmp_path / "policy.py").write_text(code)
    told: list[str] = []
    one = Hooks(str(tmp_path / "policy.py"), 60.0, 0, False, HookMeans(), "h", told.append)
    try:
        with pytest.raises(FilterFailure) as failure:
            await one.probe()
        assert why in str(failure.value) and failure.value.reason == "connect"
        session = one.session("")
        one.hooks = frozenset({"on_rcpt"})
        with pytest.raises(FilterFailure) as failure:
            await session.rcpt(MAIL, "c@d.example")
        assert why in str(failure.value) and failure.value.reason == "connect" and not failure.value.own
        (tmp_path / "policy.py").write_text("async def on_rcpt(c, e, r): pass\n")
        await until(lambda: one.pool.version.known)
        assert await session.rcpt(MAIL, "c@d.example") == Answer("continue"), "it is tried again"
        session.close()
    finally:
        one.stop()
        await until(lambda: not one.open)


@pytest.mark.parametrize(
    "code",
    [
        "from mypolicy import *",
        "exec('async def on_rcpt(*_): pass')",
        "globals()['on_' + 'rcpt'] = 1",
        "import sys\nsetattr(1, 2, 3)",
    ],
)
def test_a_file_that_may_define_more_than_it_shows_may_judge_everything(tmp_path, code):
    file = tmp_path / "policy.py"
    file.write_text(f"from relaymta.hooks import *\n{code}\n")
    assert {"on_connect", "on_rcpt", "on_message"} <= declared(str(file))
    file.write_text("from relaymta.hooks import *\nasync def on_mail(client, envelope): ...\n")
    assert declared(str(file)) == {"on_mail"}


async def test_a_fifo_in_place_of_the_file_is_named_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "policy.py")
    assert "on_rcpt" in declared(str(tmp_path / "policy.py"))
    with pytest.raises(BrokenFile, match="not a plain file"):
        HookFile(str(tmp_path / "policy.py"))


async def test_bodies_are_there_before_it_is_known_who_wants_them(tmp_path):
    code = """
        import time
        time.sleep(0.5)
        from relaymta.hooks import *
        @wants_body
        async def on_message(mail): return reject(str(mail.body.read()))
        async def choose_route(mail): return None if mail.body is None else "slow"
    """
    file = tmp_path / "policy.py"
    file.write_text(textwrap.dedent(code))
    means = HookMeans(lambda: ("slow",), lambda text: None)
    one = Hooks(str(file), 60.0, 0, False, means, "h")
    one.begin()
    session = one.session("192.0.2.1")
    answer = await session.judge(MAIL)
    assert answer.reason == repr(b"body\r\n") and not answer.route
    session.close()
    one.stop()
    await until(lambda: not one.open)


def test_what_a_file_seems_to_define(tmp_path):
    path = tmp_path / "policy.py"
    path.write_text("from x import a as on_helo\nif 1:\n    async def on_rcpt(): pass\non_data = y\ndef other(): on_mail()\n")
    assert declared(str(path)) == {"on_helo", "on_rcpt", "on_data"}
    path.write_text("(")
    assert "on_message" in declared(str(path)) and "on_attempt" not in declared(str(path))
    assert HOOKS == ALL and len(HOOK_FAILURES) == 5


# Afterwards


async def test_events_wait_in_a_bounded_queue(tmp_path):
    told: list[Any] = []
    code = f"""
        import asyncio
        async def on_attempt(attempt):
            with open({str(tmp_path / "told")!r}, "a") as file: file.write(f"{{attempt.id}} {{attempt.recipients}}\\n")
            if attempt.id == "0": await asyncio.sleep(0.5)
        async def on_bounced(attempt): raise ValueError
    """
    async with hooks(tmp_path, code, told) as one:
        assert not one.looks and not one.asks and one.tells == {"on_attempt", "on_bounced"}
        attempt = {"sender": "", "recipients": ["a@b"], "application": "", "result": "delivered", "route": "", "peer": "",
                   "reply": "", "attempt": 1, "delay": 0.5}  # fmt: skip
        for number in range(EVENTS_MOST + 5):
            one.tell("delivered", attempt | {"id": str(number)})
        assert told.count(("dropped", "on_attempt")) == 5
        await until(lambda: told.count(("took", "on_attempt")) == EVENTS_MOST)
        lines = (tmp_path / "told").read_text().splitlines()
        assert len(lines) == EVENTS_MOST and lines[1] == "1 ('a@b',)"
        one.tell("bounced", attempt | {"id": "x", "result": "bounced"})
        await until(lambda: ("on_bounced", "raised") in told)


# On the loop


async def test_on_the_loop_of_the_worker(tmp_path):
    told: list[Any] = []
    (tmp_path / "helper.py").write_text("WORD = 'one'\n")
    code = """
        import asyncio
        from helper import WORD
        from relaymta.hooks import *
        async def on_rcpt(client, envelope, recipient):
            if recipient[0] == "w": await asyncio.sleep(600)
            if recipient[0] == "r": raise ValueError
            return reject(WORD)
        @wants_body
        async def on_message(mail): return hold(mail.body.read().decode())
    """
    async with hooks(tmp_path, code, told, in_loop=True, seconds=0.2) as one:
        assert (await said(one, "x")).reason == "one"  # type: ignore[union-attr]
        assert await said(one, "waits") == "timeout"
        assert (await said(one, "raises")).word == "raised"  # type: ignore[union-attr]
        session = one.session("")
        session._asked.update(["MAIL", "DATA", "c@d.example"])
        assert (await session.judge(MAIL)).reason == "body"
        first = one.pool.version
        write(tmp_path / "helper.py", "WORD = 'two'\n")
        await until(lambda: one.refresh() or one.pool.version is not first)
        assert (await said(one, "x")).reason == "two"  # type: ignore[union-attr]
        assert (await said(one, "x", session)).reason == "one"  # type: ignore[union-attr]
        second = one.pool.version
        write(tmp_path / "policy.py", "(")
        await until(lambda: one.refresh() or any("stays in use" in str(row[1]) for row in told))
        assert one.pool.version is second
        session.close()


# Frames


@pytest.mark.parametrize("data", [
    b"\xff\xff\xff\xff", pack(Frame(1, "accept"))[:4] + b"\xc1" * 40, b"\x00\x00\x00\x01\x01", pack(Frame(1, "none", 5)),  # type: ignore[arg-type]
    b"\x00\x00\x00\x00",
])  # fmt: skip
def test_what_is_no_frame_is_garbage(data):
    frames = Frames(1 << 20)
    with pytest.raises(Garbage):
        for body in frames.feed(data):
            unpack_reply(body)


def test_frames_in_any_portions():
    whole = b"".join(pack(Frame(number, "none", "x" * number)) for number in range(20))
    for size in (1, 2, 3, 5, 7, 100, len(whole)):
        frames, found = Frames(1 << 20), []
        for at in range(0, len(whole), size):
            found += [unpack_reply(body).number for body in frames.feed(whole[at : at + size])]
        assert found == list(range(20))
