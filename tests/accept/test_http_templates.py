"""Templates of messages by HTTP: what is rendered, and that no template, however it ends, is another request's concern."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from relaymta.accept.http import templates as rendering
from relaymta.accept.http.compose import compose
from relaymta.accept.http.exchange import Job, One
from relaymta.accept.http.models import Mailbox, Wrong, parse
from relaymta.accept.http.places import Places
from relaymta.accept.http.templates import Templates, Unavailable
from relaymta.accept.http.templating import Renderer
from tests.support.http_messages import check, hostile, read

MOST = 1 << 20
ENDLESS = (
    "x\n{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
)
TRIPLED = "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x * 3 %}{% endfor %}"
BASE = {"from": "a@b", "to": "c@d", "text": "x", "substitutions": {}}


class Logged:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, name: str, text: str) -> None:
        assert name == "warning"
        self.texts.append(text)


@pytest.fixture
async def templates(monkeypatch):
    monkeypatch.setattr(rendering, "ANSWER_SECONDS", 200.0)  # however busy the machine is
    monkeypatch.setattr(rendering, "NOTICE_SECONDS", 60.0)
    found = Templates(Logged())
    yield found
    found.end()
    if found._process is not None:
        await asyncio.wait_for(found._process.wait(), 60)


def message(**changes):
    request = BASE | changes
    if "batch" in request:
        del request["to"]
    return parse(json.dumps(request).encode())


def entries(*substitutions):
    return [{"to": f"a{number}@b", "substitutions": one} for number, one in enumerate(substitutions)]


async def rendered(one: Templates, most: int = MOST, seconds: float = 2.0, owner: str = "", **changes):
    async with aclosing(one.rendered(message(**changes), most, seconds, owner)) as found:
        return [each async for each in found]


async def wrong(one: Templates, **changes) -> tuple[str, str]:
    with pytest.raises(Wrong) as caught:
        await rendered(one, **changes)
    return caught.value.field, caught.value.detail


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def child(one: Templates) -> int:
    """The process that renders a request, once there is one that works."""
    for _ in range(6000):
        if one._process is not None and (found := children(one._process.pid)):
            return found[0]
        await asyncio.sleep(0.01)
    raise AssertionError("no process renders")


async def none_left(one: Templates) -> None:
    while children(one._process.pid):
        await asyncio.sleep(0.01)


async def test_all_strings_are_rendered_and_html_is_escaped(templates):
    (found,) = await rendered(
        templates,
        subject="{{ a }}", text="{{ a }}\n", html="<b>{{ a }}</b>{{ a|safe }}{# no #}", headers={"X-A": ["{{ b }}", "{b}"]},
        substitutions={"a": "<&>", "b": 5},
    )  # fmt: skip
    assert (found.subject, found.text, found.html) == ("<&>", "<&>\n", "<b>&lt;&amp;&gt;</b><&>")
    assert [one.value for one in found.headers] == ["5", "{b}"]
    assert (found.to, found.batch, found.substitutions) == ((Mailbox("c@d"),), None, None)


async def test_without_substitutions_nothing_is_a_template(templates):
    one = parse(json.dumps({"from": "a@b", "to": "c@d", "subject": "{{ a }}", "text": "{% x"}).encode())
    async with aclosing(templates.rendered(one, MOST)) as found:
        assert [each.subject async for each in found] == ["{{ a }}"]
    assert templates._process is None


async def test_without_a_template_there_is_no_process(templates):
    found = await rendered(templates, text="a }} {", subject="s", batch=[{"to": "a@b"}, {"to": "c@d", "subject": "t"}])
    assert [one.subject for one in found] == ["s", "t"] and templates._process is None


async def test_a_batch(templates):
    batch = [
        {"to": "a@b", "cc": "c@d", "substitutions": {"name": "A"}},
        {"to": "e@f", "bcc": "g@h", "subject": "Own {{ name }}"},
        {"to": "i@j", "subject": "Own"},
    ]
    found = await rendered(templates, text="{{ name }}", subject="S {{ name }}", substitutions={"name": "all"}, batch=batch)
    assert [(one.text, one.subject) for one in found] == [("A", "S A"), ("all", "Own all"), ("all", "Own")]
    assert [(one.to, one.cc, one.bcc) for one in found] == [
        ((Mailbox("a@b"),), (Mailbox("c@d"),), ()), ((Mailbox("e@f"),), (), (Mailbox("g@h"),)), ((Mailbox("i@j"),), (), ())
    ]  # fmt: skip
    many = await rendered(templates, text="{{ n }}", batch=entries(*({"n": number} for number in range(3000))))
    assert [one.text for one in many] == [str(number) for number in range(3000)]


WRONG = [
    ({"text": "a\nb\n{% if %}"}, "text", "line 3: Expected an expression, got 'end of statement block'"),
    ({"html": "a\n{{ nix }}"}, "html", "line 2: 'nix' is undefined"),
    ({"subject": "{{ a.b }}", "substitutions": {"a": {}}}, "subject", "line 1: 'dict object' has no attribute 'b'"),
    ({"headers": {"X-A": ["", "{{ a }}"]}}, "headers.X-A[1]", "line 1: 'a' is undefined"),
    ({"text": "\n{{ ''.__class__ }}"}, "text", "line 2: access to attribute '__class__' of 'str' object is unsafe."),
    ({"text": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}, "text", "unsafe"),
    ({"text": "{{ cycler.__init__.__globals__.os }}"}, "text", "unsafe"),
    ({"text": "{{ self.__init__.__globals__ }}"}, "text", "unsafe"),
    ({"text": "{{ '{0.__class__}'.format(1) }}"}, "text", "unsafe"),
    ({"text": "{{ '{a.__class__}'.format_map({'a': 1}) }}"}, "text", "unsafe"),
    ({"text": "{{ ''|attr('__class__') }}"}, "text", "unsafe"),
    ({"text": "{{ ''['__class__'] }}"}, "text", "unsafe"),
    ({"text": "{{ [].append(1) }}"}, "text", "unsafe"),
    ({"text": "{{ lipsum() }}"}, "text", "line 1: 'lipsum' is undefined"),
    ({"text": "{{ range(10**9) }}"}, "text", "Range too big"),
    ({"text": "a\n{{ 'a'*10**9 }}"}, "text", "line 2: rendering takes too much memory"),
    ({"text": "{{ ('a'*10**8)*9 }}"}, "text", "too much memory"),
    ({"text": "{{ [[0]*10**8]*9 }}"}, "text", "too much memory"),
    ({"text": "{{ '%1000000000d' % 1 }}"}, "text", "too much memory"),
    ({"text": "{{ 'a'|center(10**9) }}"}, "text", "too much memory"),
    ({"text": TRIPLED}, "text", "too much memory"),
    ({"text": "{{ 9**(9**9) }}"}, "text", "the power is too large"),
    ({"text": "{{ 'a'*2000000 }}"}, "text", "what is rendered has more than 1048576 octets"),
    ({"text": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}"}, "text", "more than 1048576 octets"),
    ({"html": "{{ 'ä'*600000 }}", "text": "a"}, "html", "more than 1048576 octets"),
    ({"html": "{{ 'a'*600000 }}", "text": "{{ 'a'*600000 }}"}, "html", "more than 1048576 octets"),
    ({"text": "a\n{% include 'b' %}"}, "text", "line 2: a template of a request includes no others"),
    ({"text": "{% import 'b' as c %}"}, "text", "includes no others"),
    ({"text": "{% extends 'b' %}"}, "text", "includes no others"),
    ({"text": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "text", "nested too deeply"),
    ({"text": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"}, "text", "nested too deeply"),
    ({"text": "{% for a in [1] %}" * 40 + "{% endfor %}" * 40}, "text", "nested too deeply"),
    ({"text": "{{ '\\ud800' }}"}, "text", "no character at U+D800"),
    ({"text": "{{ '\\x00' }}"}, "text", "a NUL"),
    ({"text": "{{ 1 // 0 }}"}, "text", "line 1: integer division or modulo by zero"),
    ({"subject": "{{ a }}", "substitutions": {"a": "x\r\nBcc: y@z"}}, "subject", "a control character (U+000D)"),
    ({"headers": {"X-A": "{{ a }}"}, "substitutions": {"a": "x\ny"}}, "headers.X-A", "a control character (U+000A)"),
    ({"headers": {"List-Id": "{{ a }}"}, "substitutions": {"a": "ä"}}, "headers.List-Id", "ASCII"),
    ({"subject": "{{ 'a' * 2001 }}"}, "subject", "2001 characters"),
    ({"subject": "{{ 'a' * 100000 }}"}, "subject", "more than 8000 characters"),
    ({"headers": {"X-A": "{{ 'a' * 8001 }}"}}, "headers.X-A", "more than 8000 characters"),
]  # fmt: skip


async def test_mailboxes_of_the_headers_are_rendered(templates):
    named = {"headers": {"Reply-To": "{{ name }} <desk@b>", "Sender": "{{ name }} <s@b>", "X-A": "v"}}
    (found,) = await rendered(templates, **named, substitutions={"name": "Ann Ä"})
    assert (found.reply_to, found.on_behalf) == ((Mailbox("desk@b", "Ann Ä"),), Mailbox("s@b", "Ann Ä"))
    assert [one.name for one in found.headers] == ["X-A"] and "name" not in read(b"".join(compose(found).pieces))["reply-to"]
    batch = [{"to": "a@b", "substitutions": {"desk": f"desk{number}@b"}} for number in range(2)]
    two = await rendered(templates, headers={"Reply-To": "{{ desk }}", "Sender": "plain@b"}, batch=batch)
    assert [one.reply_to[0].address for one in two] == ["desk0@b", "desk1@b"] and two[0].on_behalf == Mailbox("plain@b")
    for value in ("x", "a@b, c@d", "a@b\r\nBcc: c@d", "", "a@b" * 4000):
        for name in ("Reply-To", "Sender"):
            field, _ = await wrong(templates, headers={name: "{{ a }}"}, substitutions={"a": value})
            assert field == f"headers.{name}", value


async def test_one_account_leaves_a_place_for_others(templates):
    """However much it has rendered."""
    tasks = []
    for _ in range(3 * rendering.AT_ONCE):
        tasks.append(asyncio.create_task(rendered(templates, seconds=60.0, owner="a", text=ENDLESS)))
    await child(templates)
    assert (await rendered(templates, owner="b", text="{{ 1 }}"))[0].text == "1"
    assert not any(task.done() for task in tasks) and templates._places[0].free == 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await none_left(templates)


async def test_who_waits_too_long_is_told_so(templates):
    templates._places = (Places(1, 0.01), Places(1, 0.01))
    async with templates._places[0].place("another"):
        with pytest.raises(Unavailable, match="too many"):
            await rendered(templates, text="{{ 1 }}")


async def test_the_line_and_the_reason_are_named(templates):
    for changes, field, detail in WRONG:
        found = await wrong(templates, **changes)
        assert found[0] == field and detail in found[1], (changes, found)
    assert len(await rendered(templates, text="{{ 1 }}")) == 1
    assert templates._log.texts == []


async def test_what_clients_write_is_not_in_the_log(templates):
    """As Python's warnings about it would be. (A process that renders writes to no file, but to a pipe.)"""
    ours, theirs = os.pipe()
    before = os.dup(2)
    os.dup2(theirs, 2)
    try:
        await wrong(templates, text="{{ 1[0:a] }}", substitutions={"a": 1})
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(theirs)
    templates.end()
    assert await asyncio.to_thread(os.read, ours, 1000) == b""
    os.close(ours)


async def test_the_entry_of_a_batch_is_named(templates):
    batch = entries({"a": 1}, {"a": 2}, {"b": 3}, {"a": 4})
    seen = []
    with pytest.raises(Wrong) as caught:
        async with aclosing(templates.rendered(message(text="\n{{ a }}", batch=batch), MOST)) as found:
            async for one in found:
                seen.append(one.text)
    assert seen == ["\n1", "\n2"]
    assert (caught.value.field, caught.value.detail) == ("text", "line 2: 'a' is undefined (batch[2])")
    assert await wrong(templates, text="{% x", batch=batch) == ("text", "line 1: Encountered unknown tag 'x'.")
    batch[1]["subject"] = "{{ c }}"
    assert await wrong(templates, batch=batch) == ("subject", "line 1: 'c' is undefined (batch[1])")
    batch[1]["subject"] = "a\n{{ a }}"
    assert await wrong(templates, batch=batch) == ("subject", "it has a control character (U+000A) (batch[1])")
    one = message(text="{{ a }}", batch=entries({"a": 1}, {"a": 2}), substitutions={"b": 3})
    assert one.batch is not None
    for broken, field in (
        (structs.replace(one, substitutions=b"{"), "substitutions"),
        (structs.replace(one, batch=(one.batch[0], one.batch[1]._replace(substitutions=b"[]"))), "batch[1].substitutions"),
    ):
        with pytest.raises(Wrong) as caught:
            async with aclosing(templates.rendered(broken, MOST)) as found:
                assert [one async for one in found]
        assert caught.value.field == field


async def test_an_endless_loop_ends_and_stops_nobody(templates):
    ends = [asyncio.create_task(wrong(templates, seconds=0.3, text=ENDLESS)) for _ in range(6)]
    goods = [asyncio.create_task(rendered(templates, text="{{ a }}", batch=entries({"a": number}))) for number in range(20)]
    assert [(await one)[0].text for one in goods] == [str(number) for number in range(20)]
    for one in ends:
        assert await one == ("text", "line 2: rendering takes more than 0.3 s of CPU time")
    await none_left(templates)


async def test_what_no_signal_interrupts_ends_too(templates):
    """10 to the 11th comparisons in one step of the interpreter."""
    text = "{% set x = 0 %}{% set a = [x] * 99999 %}{% set b = [x] * 99999 %}{{ [a] * 999999 == [b] * 999999 }}"
    found = await wrong(templates, seconds=0.5, text="a", html=text, subject="{{ 1 }}")
    assert found == ("html", "rendering takes more than 0.5 s of CPU time")


async def test_cpu_time_is_in_proportion_to_the_batch(monkeypatch, templates):
    monkeypatch.setattr(rendering, "TOGETHER", 2)
    assert (await wrong(templates, seconds=0.1, text=ENDLESS, batch=entries(*[{}] * 5)))[1].endswith(
        "0.25 s of CPU time (batch[0])"
    )


async def with_the_first(one: Templates, after_first, count: int = 300) -> list[str]:
    """The numbers in the texts of a batch; `after_first()` is called as the first was read, and most are still to be rendered."""
    batch = entries(*({"a": number} for number in range(count)))
    async with aclosing(one.rendered(message(text="{{ a }} " + "x" * 30_000, batch=batch), MOST, 60.0)) as found:
        first = await anext(found)
        await after_first()
        return [first.text.split()[0], *[each.text.split()[0] async for each in found]]


async def test_a_process_that_is_killed_is_replaced_once(templates):
    killed = []

    async def kill() -> None:
        killed.append(await child(templates))
        os.kill(killed[0], signal.SIGKILL)

    assert await with_the_first(templates, kill) == [str(number) for number in range(300)]
    await none_left(templates)
    task = asyncio.create_task(rendered(templates, seconds=60.0, text=ENDLESS))
    for _ in range(2):
        pid = await child(templates)
        os.kill(pid, signal.SIGKILL)
        while pid in children(templates._process.pid):
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable, match="twice"):
        await task


async def test_the_process_that_forks_is_killed(templates):
    """Those that render go on; a further request starts it anew."""

    async def kill() -> None:
        templates._process.kill()
        await templates._process.wait()

    assert await with_the_first(templates, kill) == [str(number) for number in range(300)]
    while templates._socket is not None:
        await asyncio.sleep(0.01)
    assert templates._log.texts == ["the process that renders templates has ended; it is started again when it is needed"]
    assert (await rendered(templates, text="{{ 1 }}"))[0].text == "1"


async def test_a_request_that_finds_the_process_gone_starts_it(templates):
    """Before the event loop has seen that it is gone."""
    await rendered(templates, text="{{ 1 }}")
    pid = templates._process.pid
    os.kill(pid, signal.SIGKILL)
    while _state(pid) not in ("", "Z"):
        time.sleep(0.01)  # noqa: ASYNC251 (so it does not see it)
    assert (await rendered(templates, text="{{ 2 }}"))[0].text == "2"
    assert templates._process.pid != pid


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


async def test_without_descriptors_or_processes_it_says_so(monkeypatch, templates):
    def none(*arguments: object, **named: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(rendering.socket, "socketpair", none)
        with pytest.raises(Unavailable, match="Too many open files"):
            await rendered(templates, text="{{ 1 }}")
    with monkeypatch.context() as patched:
        patched.setattr(rendering.asyncio, "create_subprocess_exec", none)
        with pytest.raises(Unavailable, match="cannot be started: Too many open files"):
            await rendered(templates, text="{{ 1 }}")
    assert (await rendered(templates, text="{{ 1 }}"))[0].text == "1"


def test_a_worker_imports_no_template_engine():
    """It is 10 MB of a worker that has no use for it."""
    code = (
        "import sys, relaymta.accept.http.templates, relaymta.accept.http.compose; print(*{'jinja2', 'aiohttp'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


async def test_one_that_does_not_answer(monkeypatch, templates):
    monkeypatch.setattr(rendering, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(rendering, "NOTICE_SECONDS", 2.0)
    await rendered(templates, text="{{ 1 }}")
    forks = templates._process
    task = asyncio.create_task(rendered(templates, seconds=0.01, text="{{ 1 }}"))
    os.kill(forks.pid, signal.SIGSTOP)  # it does not even fork
    with pytest.raises(Unavailable, match="in time"):
        await task
    assert await asyncio.wait_for(forks.wait(), 60) == -signal.SIGKILL
    monkeypatch.setattr(rendering, "ANSWER_SECONDS", 30)
    assert (await rendered(templates, text="{{ 1 }}"))[0].text == "1"
    assert templates._process is not forks


async def test_nothing_is_left_when_nobody_reads_on(templates):
    for _ in range(3):
        async with aclosing(templates.rendered(message(text="{{ a }}", batch=entries(*[{"a": 1}] * 500)), MOST)) as found:
            async for _ in found:
                break
    task = asyncio.create_task(rendered(templates, seconds=60.0, text=ENDLESS))
    await child(templates)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await none_left(templates)
    assert templates._ended == {}
    assert all(place.free == rendering.AT_ONCE for place in templates._places)


async def test_nothing_is_left_when_a_caller_is_cancelled(templates):
    """At whatever it waits for."""
    for steps in [*range(12), *range(12)]:  # the first has the process to start
        task = asyncio.create_task(rendered(templates, seconds=60.0, text=ENDLESS))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert templates._ended == {}
    assert (await rendered(templates, text="{{ 1 }}"))[0].text == "1"
    await none_left(templates)
    assert all(place.free == rendering.AT_ONCE for place in templates._places)


async def test_it_ends_with_the_worker():
    one = Templates(Logged())
    task = asyncio.create_task(rendered(one, seconds=60.0, text=ENDLESS))
    pid = await child(one)
    one.end()
    assert await asyncio.wait_for(one._process.wait(), 60) == 0
    with pytest.raises(Unavailable):
        await task
    while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC240
        await asyncio.sleep(0.01)
    with pytest.raises(Unavailable, match="the worker ends"):
        await rendered(one, text="{{ 1 }}")


async def test_a_process_that_renders_can_open_no_file(templates):
    task = asyncio.create_task(rendered(templates, seconds=60.0, text=ENDLESS))
    pid = await child(templates)
    limits = await asyncio.to_thread(_limits, pid)
    assert limits["open files"] == "0" and limits["file size"] == "0" and limits["core file size"] == "0"
    assert int(limits["address space"]) < 1 << 30
    task.cancel()


def _limits(pid: int) -> dict[str, str]:
    while True:
        rows = [line.split("  ") for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]]
        found = {row[0].removeprefix("Max "): next(filter(None, row[1:])).strip() for row in rows}
        if found["open files"] == "0":
            return found


async def test_a_text_is_bounded_also_after_it_was_rendered(templates):
    """However many octets a message may have."""
    for name in ("text", "html"):
        with pytest.raises(Wrong) as caught:
            await rendered(templates, most=100 << 20, **{name: "{{ 'ab ' * 1500000 }}"})
        assert (caught.value.field, caught.value.detail) == (name, "what is rendered has more than 4194304 characters")


async def test_memory_that_is_needed_for_a_large_text_is_there(templates):
    (found,) = await rendered(templates, most=20_000_000, text="{% for i in range(160) %}{{ '😀' * 25000 }}{% endfor %}")
    assert len(found.text) == 160 * 25000


@given(
    st.text(st.sampled_from("ab \n{}%#'\"|.()[]_=<&>"), max_size=30), st.dictionaries(st.sampled_from("ab"), st.text(max_size=5))
)
def test_no_template_ends_the_renderer(text, substitutions):
    """In this process: errors are answers."""
    job = Job([("text", "{{ a }}" + text), ("html", text)], b"", 1e9, 10_000)
    answer = Renderer(job).render(One(json.dumps(substitutions).encode(), "{{ a }}{{ b }}"))
    assert (answer.wrong is None) == (set(answer.texts) == {"text", "html", "subject"})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile, st.sampled_from(["subject", "text", "html", "header"]))
def test_no_substitution_adds_a_field_or_a_part(value, where):
    """As values of the request: what is rendered is checked like them."""
    strings = {"subject": "S", "text": "T", "html": "H", "header": "V"} | {where: "{{ a }}"}
    one = message(
        subject=strings["subject"], text=strings["text"], html=strings["html"], headers={"X-A": strings["header"]},
        substitutions={"a": value},
    )  # fmt: skip
    templates = [(name, "{{ a }}") for name in (where.replace("header", "headers.X-A"),)]
    answer = Renderer(Job(templates, one.substitutions, 1e9, MOST)).render(One(b"", None))
    assert answer.wrong is None
    try:
        found = compose(rendering._filled(one, 0, answer.texts))
    except Wrong:
        return
    data = b"".join(found.pieces)
    check(data, False)
    assert read(data).keys() == ["From", "To", "Subject", "X-A", "MIME-Version", "Content-Type"]
    assert len(list(read(data).walk())) == 3


def test_the_limits_of_this_process_are_not_changed():
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
