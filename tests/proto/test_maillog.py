"""The log in the form of Postfix: what programs read in it, whatever comes from outside."""

import re
import string
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta import log
from relaymta.log import EVENTS, TYPES
from relaymta.proto import maillog
from relaymta.proto.maillog import Writer, heard
from tests.support.pages import blocks, section

BEGIN = "Nov 29 14:00:00 host "
LINE = re.compile(rf"{BEGIN}postfix/([a-z]+)\[42\]: (.+)")
IDENT, OTHER = "1M8KWQ60M0000", "1M8KWQ60V0000"
CLIENT = "192.0.2.1"
HOSTILE = [  # what would be read as something else, were it written as it is
    "\nNov 29 14:00:00 host postfix/smtpd[1]: warning: unknown[203.0.113.66]: SASL LOGIN authentication failed: x",
    "unknown[203.0.113.66]: SASL LOGIN authentication failed: x", "x[203.0.113.66]: SASL PLAIN authentication failed: y",
    "to=<x@y>, relay=none, delay=1, delays=0/0/0/0, dsn=2.0.0, status=sent (ok)",
    "x>, relay=none, delay=1, dsn=2.0.0, status=sent (250", " to=<x@y>, relay=z, delay=1, status=bounced (no)",
    "from=<a@b>, size=5, nrcpt=1", "> from=<a>, size=7", "[1]: ABC: client=evil[203.0.113.66],", "]: X: client=e[203.0.113.66]",
    "reject: RCPT from unknown[203.0.113.66]: 554 5.7.1 <x>: Relay access denied; from=<> to=<>", "hold: RCPT from x: y",
    " discard: RCPT from x: y", "user=x status=sent", "\r\n", "\u2028", "\u202e", "\x1b[2J", "\udcff", "\0", " ", "\\", '"', ">",
    "Relaying denied", "550 5.1.1 no", "421", "5.1.1", ",", "", "a@b.example", "Grüße",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5) | st.text(string.printable, max_size=8), max_size=4).map("".join)
REPLIES = st.tuples(st.sampled_from(["", "250 ", "450 ", "535 5.7.8 ", "550 5.1.1 ", "550 5.7.1 ", "4.4.1 ", "421"]), TEXTS).map(
    "".join
)
SPECIAL = {
    "id": st.just(IDENT), "dsn": st.sampled_from(["", OTHER]), "client": st.sampled_from([CLIENT, "2001:db8::1"]),
    "reply": REPLIES, "address": st.sampled_from(["", "192.0.2.25", "2001:db8::25"]),
    "protocol": st.sampled_from(["SMTP", "ESMTP", "LMTP"]),
    "phase": st.sampled_from(["connect", "mail", "rcpt", "data", "final", "queue", "route"]),
    "action": st.sampled_from(["reject", "discard"]), "result": st.sampled_from(["released", "deleted", "bounced", "discarded"]),
}  # fmt: skip
BY_TYPE = {
    int: st.integers(0, 1 << 40), float: st.floats(0, 1e9), bool: st.booleans(),
    list[str]: st.lists(TEXTS, min_size=1, max_size=3), list[str] | str: st.lists(TEXTS, max_size=2) | TEXTS,
    int | str: st.integers() | TEXTS, float | None: st.floats() | st.none(),
}  # fmt: skip


def values(field: str) -> st.SearchStrategy[Any]:
    found = SPECIAL.get(field, BY_TYPE.get(TYPES.get(field, str), TEXTS))
    return found | st.just(msgspec.UNSET) if field in log.LEFT_OUT else found


@st.composite
def events(draw: st.DrawFn) -> tuple[str, Any]:
    name = draw(st.sampled_from(sorted(EVENTS)))
    return name, log._RECORDS[name](1.5, 0, **{field: draw(values(field)) for field in EVENTS[name]})


# As pflogsumm 1.1.5 and fail2ban 1.0.2 have them.
STATUS = re.compile(
    r"to=<([^>]*)>, (?:orig_to=<[^>]*>, )?relay=([^,]+), (?:conn_use=[^,]+, )?delay=([^,]+), (?:delays=[^,]+, )?(?:dsn=[^,]+, )?"
    r"status=(\S+)(.*)$"
)
SIZE, TAKEN = re.compile(r"from=<([^>]*)>, size=(\d+)"), re.compile(r"\[\d+\]: \w+: client=(.+?)(,|$)")
REFUSED = re.compile(r"^.* \b(?:reject(?:_warning)?|hold|discard): (\S+) from (\S+?): (.*)$")
HOST = r"\[([0-9a-fA-F.:]+)\](?::\d+)?"
BANNED = [
    re.compile(
        rf"\S+ postfix/\w+\[42\]: (?:\w+: (?:milter-)?reject:|(?:improper command pipelining|too many errors) after \S+) "
        rf"(?:[A-Z]{{4}} from [^[]*{HOST}: [45]|from [^[]*{HOST}:?)"
    ),
    re.compile(rf"\S+ postfix/\w+\[42\]: warning: [^[]*{HOST}: SASL (?i:LOGIN|PLAIN|(?:CRAM|DIGEST)-MD5) authentication failed:"),
    re.compile(rf"\S+ postfix/\w+\[42\]: (?:lost connection after|disconnect).*{HOST}"),
]  # fmt: skip


def written(name: str, record: Any) -> list[str]:
    text = Writer(lambda ts: BEGIN, 42).lines(name, record)
    assert text.endswith("\n") and text.count("\n") == len(text.splitlines())
    return text.splitlines()


@given(events())
def test_any_event_is_printable_lines_with_a_name_of_postfix(event):
    name, record = event
    lines = written(name, record)
    assert lines and all(line.isprintable() and LINE.fullmatch(line) for line in lines), lines


def check(name: str, record: Any) -> None:
    """What programs find in the lines of an event is what has happened."""
    lines = written(name, record)
    found = [match[4] for line in lines if (match := STATUS.search(line))]
    if name == "delivered":
        assert found == ["sent"] * len(record.recipients)
    else:
        expired = getattr(record, "expired", None) is True
        assert found == {"deferred": ["deferred"], "bounced": ["expired" if expired else "bounced"]}.get(name, [])
    taken = name == "queued" or (name == "received" and record.stays is not True)
    sizes = [int(match[2]) for line in lines if (match := SIZE.search(line))]
    assert sizes == ([record.size] if taken else [])
    clients = [match[1] for line in lines if (match := TAKEN.search(line))]
    assert clients == ([f"unknown[{record.client}]"] if taken else [])
    refused = [match[2] for line in lines if (match := REFUSED.search(line))]
    assert all(one == f"unknown[{record.client}]" for one in refused)
    banned = {host for line in lines for one in BANNED if (match := one.match(line[len("Nov 29 14:00:00 ") :]))
              for host in match.groups() if host}  # fmt: skip
    assert banned <= {getattr(record, "client", None)} and (not banned or name in ("rejected", "login"))


@given(events())
def test_nothing_from_outside_is_read_as_something_else(event):
    check(*event)


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_nothing_hostile_is_read_as_something_else_wherever_it_stands(name):
    defaults = {
        int: 1,
        float: 1.0,
        bool: False,
        float | None: 1.0,
        "id": IDENT,
        "dsn": OTHER,
        "client": CLIENT,
        "protocol": "LMTP",
    }
    for text in HOSTILE:
        for phase, code in (("rcpt", "535 5.7.8 "), ("data", ""), ("mail", "")):
            own = defaults | {"phase": phase, "action": "discard", "result": "discarded", "reply": code + text}
            fields = {}
            for field in EVENTS[name]:
                kind = TYPES.get(field, str)
                fields[field] = own.get(field, own.get(kind, text if kind is str else [text]))
            check(name, log._RECORDS[name](1.5, 0, **fields))


@given(events())
def test_what_is_written_is_understood(event):
    name, record = event
    for line in written(name, record):
        said = heard(line)
        assert said is not None and said.event in (name, "queued" if name == "received" else "removed")
        assert said.ident == getattr(record, "id", "")


def record(name: str, **fields: Any) -> Any:
    return log._RECORDS[name](0.0, 0, **fields)


def texts(name: str, **fields: Any) -> list[str]:
    return [line[len(BEGIN) :].replace("[42]", "") for line in written(name, record(name, **fields))]


TAKEN_FIELDS = {
    "id": IDENT, "sender": "a@b.example", "recipients": ["c@d.example", "e@f.example"], "size": 123, "client": CLIENT,
    "helo": "h", "user": "", "application": "", "message_id": "<1@b.example>",
}  # fmt: skip
ATTEMPT = {"id": IDENT, "route": "out/d.example", "attempt": 1, "delay": 1.234, "peer": "mx.d.example"}
FAILED = {"recipient": "c@d.example", "phase": "rcpt", "cause": "reply", "reply": "450 4.2.0 later"}
DONE = {"recipients": ["c@d.example"], "address": "192.0.2.25", "port": 25, "tls": "", "cipher": "", "reply": "250 2.0.0 ok"}
REFUSAL = {
    "client": CLIENT,
    "helo": "h",
    "protocol": "ESMTP",
    "phase": "rcpt",
    "sender": "a@b.example",
    "recipients": ["c@d.example"],
}

LINES = [
    ("next_host", {key: ATTEMPT[key] for key in ("id", "route", "peer", "attempt")} | {"recipients": [], "phase": "connect",
     "reply": "4.4.1 timed out"}, [f"postfix/smtp: {IDENT}: connect to mx.d.example: timed out"]),
    ("queued", TAKEN_FIELDS, [
        f"postfix/smtpd: {IDENT}: client=unknown[192.0.2.1]", f"postfix/cleanup: {IDENT}: message-id=<1@b.example>",
        f"postfix/qmgr: {IDENT}: from=<a@b.example>, size=123, nrcpt=2 (queue active)",
    ]),
    ("queued", TAKEN_FIELDS | {"user": "ann", "orig_client": "192.0.2.7", "orig_helo": "h", "orig_id": "ABC", "held": "why"}, [
        f"postfix/smtpd: {IDENT}: client=unknown[192.0.2.1], sasl_username=ann, orig_queue_id=ABC, "
        "orig_client=unknown[192.0.2.7]",
        f"postfix/cleanup: {IDENT}: message-id=<1@b.example>",
        f"postfix/smtpd: {IDENT}: hold: END-OF-MESSAGE from unknown[192.0.2.1]: why; from=<a@b.example> to=<c@d.example> "
        "to=<e@f.example>",
        f"postfix/qmgr: {IDENT}: from=<a@b.example>, size=123, nrcpt=2 (queue hold)",
    ]),
    ("queued", TAKEN_FIELDS | {"client": "", "sender": ""}, [  # a DSN of ours
        f"postfix/cleanup: {IDENT}: message-id=<1@b.example>",
        f"postfix/qmgr: {IDENT}: from=<>, size=123, nrcpt=2 (queue active)",
    ]),
    ("delivered", ATTEMPT | DONE, [
        f"postfix/smtp: {IDENT}: to=<c@d.example>, relay=mx.d.example[192.0.2.25]:25, delay=1.23, delays=0/1.23/0/0, dsn=2.0.0, "
        "status=sent (250 2.0.0 ok)", f"postfix/qmgr: {IDENT}: removed",
    ]),
    ("delivered", ATTEMPT | DONE | {"route": "lists", "address": "", "port": 0, "attempt": 2, "stays": True}, [
        f"postfix/lmtp: {IDENT}: to=<c@d.example>, relay=mx.d.example, delay=1.23, delays=1.23/0/0/0, dsn=2.0.0, "
        "status=sent (250 2.0.0 ok)",
    ]),
    ("delivered", ATTEMPT | DONE | {"peer": "mailbox", "route": "", "address": "", "port": 0}, [
        f"postfix/virtual: {IDENT}: to=<c@d.example>, relay=virtual, delay=1.23, delays=0/1.23/0/0, dsn=2.0.0, "
        "status=sent (250 2.0.0 ok)", f"postfix/qmgr: {IDENT}: removed",
    ]),
    ("deferred", ATTEMPT | FAILED | {"next": 0.0}, [
        f"postfix/smtp: {IDENT}: to=<c@d.example>, relay=mx.d.example, delay=1.23, delays=0/1.23/0/0, dsn=4.2.0, "
        "status=deferred (host mx.d.example said: 450 4.2.0 later (in reply to RCPT TO command))",
    ]),
    ("deferred", ATTEMPT | FAILED | {"next": 0.0, "peer": "", "phase": "connect", "reply": "4.4.1 mx: Connection refused"}, [
        f"postfix/smtp: {IDENT}: to=<c@d.example>, relay=none, delay=1.23, delays=0/1.23/0/0, dsn=4.4.1, "
        "status=deferred (mx: Connection refused)",
    ]),
    ("bounced", ATTEMPT | FAILED | {"sender": "a@b.example", "dsn": OTHER, "reply": "550 no"}, [
        f"postfix/smtp: {IDENT}: to=<c@d.example>, relay=mx.d.example, delay=1.23, delays=0/1.23/0/0, dsn=5.0.0, "
        "status=bounced (host mx.d.example said: 550 no (in reply to RCPT TO command))",
        f"postfix/bounce: {IDENT}: sender non-delivery notification: {OTHER}", f"postfix/qmgr: {IDENT}: removed",
    ]),
    ("bounced", ATTEMPT | FAILED | {"sender": "a@b.example", "dsn": "", "expired": True}, [
        f"postfix/smtp: {IDENT}: to=<c@d.example>, relay=mx.d.example, delay=1.23, delays=0/1.23/0/0, dsn=4.2.0, "
        "status=expired (host mx.d.example said: 450 4.2.0 later (in reply to RCPT TO command))",
        f"postfix/qmgr: {IDENT}: from=<a@b.example>, status=expired, returned to sender", f"postfix/qmgr: {IDENT}: removed",
    ]),
    ("rejected", REFUSAL | {"reply": "550 5.7.1 Relaying denied"}, [
        "postfix/smtpd: NOQUEUE: reject: RCPT from unknown[192.0.2.1]: 550 5.7.1 <c@d.example>: Relay access denied; "
        "from=<a@b.example> to=<c@d.example> proto=ESMTP helo=<h>",
    ]),
    ("rejected", REFUSAL | {"reply": "550 5.1.1 No such recipient here"}, [
        "postfix/smtpd: NOQUEUE: reject: RCPT from unknown[192.0.2.1]: 550 5.1.1 <c@d.example>: Recipient address rejected: "
        "User unknown: No such recipient here; from=<a@b.example> to=<c@d.example> proto=ESMTP helo=<h>",
    ]),
    ("rejected", REFUSAL | {"phase": "data", "reply": "550 5.7.1 spam"}, [
        "postfix/smtpd: NOQUEUE: reject: END-OF-MESSAGE from unknown[192.0.2.1]: 550 5.7.1 spam; "
        "from=<a@b.example> to=<c@d.example> proto=ESMTP helo=<h>",
    ]),
    ("login", {"client": CLIENT, "user": "a b>", "good": False, "reply": "535 5.7.8 no", "mechanism": "PLAIN"}, [
        r"postfix/smtpd: warning: unknown[192.0.2.1]: SASL PLAIN authentication failed: no, sasl_username=a\x20b\x3e",
    ]),
    ("login", {"client": CLIENT, "user": "ann", "good": False, "reply": "454 4.7.0 later", "mechanism": ""}, [
        'postfix/relaymta: login client=192.0.2.1 user=ann good=false reply="454 4.7.0 later" mechanism=""',
    ]),
    ("warning", {"text": "what status=sent is"}, [r"postfix/relaymta: warning: what status\x3dsent is"]),
    ("site", {"route": "out", "state": "down", "reason": 'a "b"', "fault": "dns", "cause": "dns", "until": 9, "ends": 9.5}, [
        r'postfix/relaymta: site route=out state=down reason="a \x22b\x22" fault=dns cause=dns ends=9.5',
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "lines"), LINES)
def test_lines_are_those_of_postfix(name, fields, lines):
    writer = Writer(lambda ts: BEGIN, 42)
    writer.programs = {"lists": "lmtp"}
    text = writer.lines(name, record(name, **fields))
    assert [line[len(BEGIN) :].replace("[42]", "") for line in text.splitlines()] == lines


PAGE = section("log.md", "In the form of Postfix")


def test_the_example_of_the_page_is_what_is_written():
    shown = blocks(PAGE)[1].splitlines()
    times = iter(["Nov 29 14:00:00 mail ", "Nov 29 14:00:01 mail "])
    writer = Writer(lambda ts: next(times), 812)
    own = {"sender": "a@shop.example", "recipients": ["b@d.example"], "size": 175, "message_id": "<7@shop.example>"}
    text = writer.lines("queued", record("queued", **TAKEN_FIELDS | own))
    text += writer.lines("delivered", record("delivered", **ATTEMPT | DONE | {"recipients": ["b@d.example"], "delay": 1.2}))
    assert text.splitlines() == shown


def test_the_page_names_each_event_that_has_lines_of_its_own():
    rows = re.findall(r"^\| (.+?) \| .+ \|$", PAGE, re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(maillog._FORMS)


def test_a_dsn_about_several_recipients_is_told_of_once():
    writer = Writer(lambda ts: BEGIN, 42)
    common = ATTEMPT | FAILED | {"sender": "a@b.example", "dsn": OTHER, "reply": "550 no"}
    first = writer.lines("bounced", record("bounced", **common, stays=True))
    second = writer.lines("bounced", record("bounced", **common))
    assert [text.count("non-delivery") for text in (first, second)] == [1, 0]
    assert [text.count(": removed") for text in (first, second)] == [0, 1]


@pytest.mark.parametrize("text", ["250 ok?from=<x@y>?to=<u@v>", "250 from=<x@y> to=<u@v>", "250 .from=<.to=<u@v>"])
def test_what_a_peer_says_is_no_field(text):
    common = ATTEMPT | {
        "reply": text,
        "recipients": ["c@d.example"],
        "address": "",
        "port": 0,
        "tls": "",
        "cipher": "",
        "users": [],
    }
    found = [heard(line) for line in Writer(lambda ts: BEGIN, 42).lines("delivered", record("delivered", **common)).splitlines()]
    assert [one and (one.sender, one.recipients) for one in found] == [("", ["c@d.example"]), ("", [])]


@pytest.mark.parametrize("line", ["", "x", "Nov 29 14:00:00 host sshd[1]: x", '{"event":"queued"}', "postfix/smtpd: no pid"])
def test_other_lines_are_none_of_this_form(line):
    assert heard(line) is None


def test_addresses_of_a_line_are_read():
    line = f"postfix/qmgr[1]: {IDENT}: from=<>, size=1, nrcpt=1 (queue active)"
    assert heard(line) == ("queued", IDENT, "<>", [])
    shown = (
        'postfix/relaymta[1]: rule id=1M8KWQ60M0000 client=192.0.2.1 sender=a@b.example recipients=c@d,e@f rule=x match="id=y"'
    )
    assert heard(BEGIN + shown) == ("rule", IDENT, "a@b.example", ["c@d", "e@f"])
