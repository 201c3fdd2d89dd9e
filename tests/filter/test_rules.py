"""Rules about mail: what matches, what is done, and what is counted."""

import asyncio
import base64
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import pytest

from relaymta.config import Config
from relaymta.filter import rules as rules_module
from relaymta.filter.chain import Chains, Outcome
from relaymta.filter.judgement import Mail, Text, Verdict
from relaymta.filter.revision import Revision
from relaymta.metrics import RuleTotals, rule_name
from relaymta.proto.header import header_end
from relaymta.shm import Shared
from tests.conftest import PROVE
from tests.filter.test_chain import STRANGER, TRUSTED, Told

PROGRAM = b'Subject: x\r\nContent-Type: application/octet-stream; name="Setup.EXE"\r\n\r\nMZ\x90\r\n'


class Bench:
    """The rules of one worker, and filters beside them."""

    def __init__(self, *rules: dict[str, Any], filters: tuple[dict[str, Any], ...] = ()) -> None:
        self.shared = Shared.create()
        self.events: list[dict[str, Any]] = []
        self.chains: Chains | None = None
        self.told: dict[str, Told] = {}
        self.configure(*rules, filters=filters)

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name} | fields)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == name]

    def configure(self, *rules: dict[str, Any], filters: tuple[dict[str, Any], ...] = ()) -> None:
        config = Config.model_validate({
            "hostname": "relay.example", "listener": [{"address": "127.0.0.1:25"}],
            "mail_rule": [{"name": f"r{n}"} | one for n, one in enumerate(rules)],
            "filter": [{"name": f"f{n}", "type": "rspamd", "address": ["unix:/x"]} | one for n, one in enumerate(filters)],
        })  # fmt: skip
        before, loop = self.chains, asyncio.get_running_loop()
        self.chains = Chains(config, self.shared.limits(0, 1), self.shared.named(0), self, loop, before)  # type: ignore[arg-type]
        self.chains.begin(before)
        self.listener = config.listener[0]
        for guard in self.chains.guards:
            guard.filter = self.told.setdefault(guard.name, Told())

    async def judge(
        self, data: bytes, client: str = STRANGER, application: str = "", to: tuple[str, ...] = ("c@d.example",), dmarc: str = "",
        sender: str = "a@b.example", ident: str = "id",
    ) -> Outcome:  # fmt: skip
        assert self.chains is not None
        chain = self.chains.chain_for(self.listener, client, application, client == TRUSTED)
        if chain is None:
            return Outcome(Verdict.ACCEPT)
        end = header_end(data)
        mail = Mail(ident, sender, to, client, "h", application, "", Text(data[:end], data[end:]), dmarc=dmarc)
        self.revision = Revision(mail)
        return await chain.judge(self.revision)

    def totals(self, name: str) -> RuleTotals:
        return RuleTotals.of(self.shared.named().of(rule_name(name)))


@pytest.mark.parametrize(("verdict", "reply", "expected"), [
    ("reject", "", b"554 5.7.1 Refused by the rule r0: Setup.EXE\r\n"),
    ("reject", "552 5.7.0 {match} is not taken here ({rule})", b"552 5.7.0 Setup.EXE is not taken here (r0)\r\n"),
    ("tempfail", "", b"451 4.7.1 Refused by the rule r0: Setup.EXE\r\n"),
    ("tempfail", "450 4.7.1 Later", b"450 4.7.1 Later\r\n"),
    ("hold", "", b""), ("discard", "", b""), ("tag", "", b""), ("accept", "", b""),
])  # fmt: skip
async def test_what_is_done(verdict, reply, expected):
    bench = Bench({"attachment": ["*.exe"], "verdict": verdict, "reply": reply, "enforce": True})
    outcome = await bench.judge(PROGRAM)
    assert (outcome.verdict.word, outcome.reply) == (verdict, expected)
    assert outcome.held == ("rule r0: Setup.EXE" if verdict == "hold" else "")
    assert (b"X-Spam: Yes\r\n" in bench.revision.header) == (verdict == "tag")
    (told,) = bench.of("rule")
    assert (told["rule"], told["verdict"], told["enforced"], told["match"]) == ("r0", verdict, True, "Setup.EXE")
    assert not bench.of("filtered") and bench.totals("r0")[:3] == (1, 0, 1)
    assert (await bench.judge(b"Subject: x\r\n\r\nhello\r\n")).verdict is Verdict.ACCEPT and bench.totals("r0")[:3] == (1, 0, 2)


async def test_the_first_that_is_enforced_decides_and_all_are_counted():
    everything = {"attachment": ["*.exe"]}
    bench = Bench(
        everything, everything | {"verdict": "tag", "enforce": True}, everything | {"enforce": True}, {"recipients_min": 2}
    )
    assert (await bench.judge(PROGRAM)).verdict is Verdict.TAG
    assert [bench.totals(f"r{n}")[:3] for n in range(4)] == [(0, 1, 1), (1, 0, 1), (1, 0, 1), (0, 0, 1)]
    assert [(one["rule"], one["enforced"]) for one in bench.of("rule")] == [("r0", False), ("r1", True), ("r2", True)]


async def test_what_a_rule_refuses_no_filter_is_asked_about():
    rule = {"attachment": ["*.exe"], "enforce": True}
    bench = Bench(rule, filters=({},))
    await bench.judge(PROGRAM)
    assert not bench.told["f0"].shown
    bench.configure(rule | {"enforce": False}, filters=({},))
    await bench.judge(PROGRAM)
    assert len(bench.told["f0"].shown) == 1


HELLO = b"From: a@b.example\r\nSubject: =?utf-8?q?Your_In=76oice?=\r\n of today\r\nX-Two: 1\r\nX-Two: 2\r\n\r\nhello\r\n"


@pytest.mark.parametrize(("conditions", "mail", "matches"), [
    ({"header": ["subject: your Invoice OF"]}, {}, None),
    ({"header": ["subject: (?i)your Invoice OF"]}, {}, "Your Invoice of"),
    ({"header": ["X-Two: 2"]}, {}, "2"),
    ({"header": ["X-Three: .*", "X-Two: 9", "From: b\\.example$"]}, {}, "b.example"),
    ({"body": ["h(el+)o"]}, {}, "hello"), ({"body": ["^x"]}, {}, None),
    ({"header": ["X-Two: 2"], "body": ["nothing"]}, {}, None),
    ({"recipients_min": 2}, {}, None), ({"recipients_min": 2}, {"to": ("a@b", "c@d")}, ""),
    ({"min_size": 5}, {}, ""), ({"min_size": "1MB"}, {}, None),
    ({"dmarc": ["fail", "none"]}, {"dmarc": "fail"}, ""), ({"dmarc": ["fail"]}, {}, None),
    ({"sender": ["A@B.example"]}, {}, ""), ({"sender": [""]}, {}, None), ({"sender": [""]}, {"sender": ""}, ""),
    ({"sender": ['"A"@b.example.']}, {}, ""), ({"recipient": ["C@B\u00dc.example"]}, {"to": ("c@xn--b-eha.example",)}, ""),
    ({"sender_domain": [".example"]}, {}, ""), ({"sender_domain": ["example"]}, {}, None),
    ({"recipient": ["x@y", "C@D.EXAMPLE"]}, {}, ""), ({"recipient_domain": ["d.example"]}, {}, ""),
    ({"clients": "trusted"}, {}, None), ({"clients": "trusted"}, {"client": TRUSTED}, ""),
    ({"clients": "unauthenticated"}, {"client": TRUSTED}, None), ({"clients": "unauthenticated"}, {}, ""),
    ({"application": ["shop"]}, {}, None), ({"application": ["shop"]}, {"client": TRUSTED, "application": "shop"}, ""),
    ({"networks": ["192.0.2.0/24"]}, {}, ""), ({"networks": ["2001:db8::/32"]}, {}, None),
])  # fmt: skip
async def test_conditions(conditions, mail, matches):
    bench = Bench(conditions)
    await bench.judge(HELLO, **mail)
    assert [one["match"] for one in bench.of("rule")] == ([] if matches is None else [matches])


KEY = (
    b"-----BEGIN RSA PRIVATE KEY-----\n"
    + b"MIIEowIBAAKCAQEA7bq1Zt9sX0fVw3yJp4mK8nRcQ5eHd2LgTuYi\n" * 6
    + b"-----END RSA PRIVATE KEY-----\n"
)
CARD = b"card 4111 1111 1111 1111\n"
FILES = {
    "text": (b"text/plain", KEY, "RSA private key"), "a file": (b"application/octet-stream", KEY, "RSA private key"),
    "a script": (b"application/x-sh", b"#!/bin/sh\n" + KEY, "RSA private key"),
    "of PowerShell": (b"application/octet-stream", b"\xff\xfe" + KEY.decode().encode("utf-16-le"), "RSA private key"),
    "a card": (b"text/csv", CARD, "card number 4111...1111"), "an image": (b"image/png", b"\x89PNG\r\n\x1a\n\0" + KEY, None),
    "words": (b"text/plain", b"send me the -----BEGIN RSA PRIVATE KEY----- please\n", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
async def test_secrets_are_found_in_texts_and_files_and_never_shown(name):
    kind, octets, what = FILES[name]
    part = b"Content-Type: %s\r\nContent-Transfer-Encoding: base64\r\n\r\n" % kind + base64.encodebytes(octets)
    data = b"Subject: x\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n" + part + b"\r\n--b--\r\n"
    bench = Bench(
        {"secrets": ["private key", "card number"], "enforce": True, "reply": "552 5.7.0 {match}"}, {"secrets": ["cloud key"]}
    )
    outcome = await bench.judge(data)
    assert [one["match"] for one in bench.of("rule")] == ([what] if what else [])
    assert outcome.reply == (f"552 5.7.0 {what}\r\n".encode() if what else b"")
    assert "MIIEow" not in str(bench.events) + outcome.reply.decode()


async def test_a_score_is_known_behind_the_filters():
    from relaymta.filter.judgement import Answer

    bench = Bench({"score_min": 4, "enforce": True, "sender": ["a@b.example"]}, filters=({}, {}))
    for name, score in (("f0", 1.0), ("f1", 5.0)):
        bench.told[name].says = Answer("no action", score=score)
    assert (await bench.judge(HELLO)).verdict is Verdict.REJECT
    bench.told["f1"].says = Answer("no action", score=3.9)
    assert (await bench.judge(HELLO)).verdict is Verdict.ACCEPT
    bench.told["f1"].says = Answer("no action")
    assert (await bench.judge(HELLO, sender="x@b.example")).verdict is Verdict.ACCEPT


async def test_what_is_counted_and_known_survives_a_reload():
    bench = Bench({"attachment": ["*.exe"]}, {"min_size": 1})
    for n in range(30):
        await bench.judge(PROGRAM, ident=f"{n:03}")
    bench.configure({"name": "r1", "min_size": 2}, {"name": "r0", "attachment": ["*.exe", "*.com"], "enforce": True})
    await bench.judge(PROGRAM, ident="last")
    assert bench.chains is not None
    rows = {row["rule"]: row for row in bench.chains.ruled()}
    assert (rows["r0"]["enforced"], rows["r0"]["dry"], rows["r0"]["looked"]) == (1, 30, 31)
    assert rows["r0"]["last"] == [*(f"{n:03}" for n in range(11, 30)), "last"]
    assert rows["r1"]["dry"] == 31


async def test_dry_run_and_enforcement_count_the_same():
    rng, corpus = random.Random(7), []
    for n in range(2000 if PROVE else 200):
        name = rng.choice(["a.exe", "b.js", "c.pdf", "d.txt"])
        subject = rng.choice(["invoice", "hello", "=?utf-8?b?aW52b2ljZQ==?="])
        corpus.append(
            f'Subject: {subject}\r\nContent-Type: text/x; name="{name}"\r\n\r\n{rng.choice(["MZ", "x"])} {n}\r\n'.encode()
        )
    rules = ({"attachment": ["*.exe", "*.js"]}, {"header": ["Subject: invoice"]}, {"body": ["[0-9]*7\\s*$"]})
    counts = []
    for enforce in (False, True):
        bench = Bench(*({"enforce": enforce} | rule for rule in rules))
        for data in corpus:
            await bench.judge(data)
        counts.append([sum(bench.totals(f"r{n}")[:2]) for n in range(3)])
    assert counts[0] == counts[1] and all(0 < count < len(corpus) for count in counts[0])


async def test_hostile_expressions_and_texts_take_no_time():
    bench = Bench({"body": ["(a+)+$", "(a|aa)*b$", "(x+x+)+y"]}, {"header": ["Subject: (.*a){20}$"]})
    data = b"Subject: " + b"a" * 900 + b"c\r\n\r\n" + b"a" * 2_000_000 + b"x" * 100_000 + b"b!\r\n"
    began = time.process_time()
    await bench.judge(data)
    assert time.process_time() - began < 10 and not bench.of("warning")


async def test_a_large_text_is_looked_at_on_a_thread_and_its_first_64_mb_alone(monkeypatch):
    monkeypatch.setattr(rules_module, "MOST", 1000)
    bench = Bench({"body": ["needle"]})
    await bench.judge(b"Subject: x\r\n\r\n" + b"x" * 2000 + b" needle\r\n")
    assert not bench.of("rule")
    monkeypatch.setattr(rules_module, "MOST", 1 << 20)
    monkeypatch.setattr(rules_module, "AT_ONCE", 100)
    await bench.judge(b"Subject: x\r\n\r\n" + b"x" * 2000 + b" needle\r\n")
    assert [one["match"] for one in bench.of("rule")] == ["needle"]


async def test_a_defect_of_a_rule_costs_no_more_than_the_rule(monkeypatch):
    bench = Bench({"attachment": ["*.exe"], "enforce": True}, {"header": ["Subject: x"], "enforce": True})
    monkeypatch.setattr(rules_module, "parts", lambda header, body: 1 / 0)
    assert (await bench.judge(PROGRAM)).reply == b"554 5.7.1 Refused by the rule r1: x\r\n"
    assert Counter(one["text"] for one in bench.of("warning")) == {"rule r0: ZeroDivisionError: division by zero": 1}


async def test_mail_that_no_rule_is_about_has_no_chain():
    bench = Bench({"clients": "unauthenticated", "min_size": 1})
    assert bench.chains is not None
    assert bench.chains.chain_for(bench.listener, TRUSTED, "", True) is None
    assert bench.chains.chain_for(bench.listener, STRANGER, "", False) is not None


@pytest.mark.parametrize(("conditions", "data", "match"), [
    ({"header": ["Subject: ^my invoice"]}, b"Subject: my invoice =?utf-7?q?+2AA-?=\r\n\r\nx\r\n", "my invoice"),
    ({"body": ["hello .$"]}, b"Content-Type: text/plain; charset=utf-7\r\n\r\nhello +2AA-", "hello \ufffd"),
    ({"attachment": ["*.exe"]}, b'Content-Type: a/b; name="=?utf-7?q?+2AA-a.exe?="\r\n\r\nx\r\n', "\\ud800a.exe"),
])  # fmt: skip
async def test_text_that_is_no_unicode_evades_no_rule(conditions, data, match):
    bench = Bench(conditions | {"enforce": True})
    assert (await bench.judge(data)).verdict is Verdict.REJECT
    assert not bench.of("warning") and bench.of("rule")[0]["match"] == match


@pytest.mark.parametrize(
    "name", [b"SUBJECT", b"Subject ", b"Subject\t", b"Subject\r\n ", b"Subject\x00", b"Subject\x7f", b"\x0bSubject"]
)
async def test_a_field_is_known_however_its_name_is_written(name):
    bench = Bench({"header": ["Subject: invoice"]})
    await bench.judge(b"A: b\r\n" + name + b": invoice\r\n\r\nx\r\n")
    assert [one["match"] for one in bench.of("rule")] == ["invoice"]


@pytest.mark.parametrize(("subject", "reply", "expected"), [
    (b"y" * 10_000, "552 5.7.0 " + "{match} " * 30, b"552 5.7.0 " + (b"y" * 80 + b" ") * 6 + b"y" * 14 + b"\r\n"),
    (b"", "552 5.7.0 {match}", b"552 5.7.0 Refused by the rule r0\r\n"),
    (b"::", "552 5.7.0 {match}:", b"552 5.7.0 Refused by the rule r0\r\n"),
    (b"{rule} {match} %s =?utf-8?q?=0D=0A250_=C3=BC?=", "552 5.7.0 {match}.", b"552 5.7.0 {rule} {match} %s \\r\\n250 ?.\r\n"),
])  # fmt: skip
async def test_what_is_found_is_no_more_than_text_in_a_reply(subject, reply, expected):
    bench = Bench({"header": ["Subject: (?s).*"], "reply": reply, "enforce": True})
    assert (await bench.judge(b"Subject: " + subject + b"\r\n\r\nx\r\n")).reply == expected and len(expected) <= 512


@pytest.mark.parametrize(("rule", "data", "elsewhere"), [
    ({"header": ["X: a"]}, b"X: " + b"a" * 200 + b"\r\n\r\nx\r\n", True),
    ({"header": ["X: a"]}, b"X: a\r\n\r\n" + b"x" * 200 + b"\r\n", False),
    ({"body": ["x"]}, b"X: a\r\n\r\n" + b"x" * 200 + b"\r\n", True),
    ({"min_size": 1}, b"X: " + b"a" * 200 + b"\r\n\r\nx\r\n", False),
])  # fmt: skip
async def test_what_is_large_and_looked_at_is_so_on_a_thread(monkeypatch, rule, data, elsewhere):
    seen, match = list[bool](), rules_module.Rule.match
    monkeypatch.setattr(rules_module, "AT_ONCE", 100)
    monkeypatch.setattr(
        rules_module.Rule, "match",
        lambda rule, message: seen.append(threading.current_thread() is not threading.main_thread()) or match(rule, message),
    )  # fmt: skip
    bench = Bench(rule)
    await bench.judge(data)
    assert seen == [elsewhere] and len(bench.of("rule")) == 1


CONFIG = """hostname = "relay.example"
[[listener]]
address = "127.0.0.1:25"
[relay]
networks = ["192.0.2.0/24"]
[[network]]
networks = ["192.0.2.9/32"]
relay = false
[[network]]
networks = ["198.51.100.1/32"]
relay = true
[[mail_rule]]
name = "late"
score_min = 4
enforce = true
[[mail_rule]]
name = "r"
clients = "trusted"
min_size = 1
enforce = true
"""


@pytest.mark.parametrize(("arguments", "done"), [
    (["--client", "192.0.2.1"], ["", "reject"]), (["--client", "::ffff:192.0.2.1"], ["", "reject"]),
    (["--client", "192.0.2.9"], ["", ""]), (["--client", "198.51.100.1"], ["", "reject"]),
    (["--client", "198.51.100.2"], ["", ""]), (["--client", "198.51.100.2", "--as", "shop"], ["", "reject"]),
    (["--client", "192.0.2.1", "--score", "5"], ["reject", "reject"]),
])  # fmt: skip
def test_by_hand_it_is_about_the_same_clients(tmp_path, arguments, done):
    (tmp_path / "c.toml").write_text(CONFIG)
    (tmp_path / "m.eml").write_bytes(PROGRAM)
    call = [sys.executable, "-m", "relaymta", "-c", str(tmp_path / "c.toml"), "rule", "test", str(tmp_path / "m.eml"), "--json"]
    found = subprocess.run([*call, *arguments], capture_output=True, text=True, timeout=30)
    assert [json.loads(line)["done"] for line in found.stdout.splitlines()] == done, found.stderr
    assert found.returncode == (2 if any(done) else 0)


async def test_accept_keeps_nothing_from_the_rules_behind_it():
    everything = {"attachment": ["*.exe"], "enforce": True}
    bench = Bench(everything | {"verdict": "accept"}, everything)
    assert (await bench.judge(PROGRAM)).verdict is Verdict.REJECT


async def test_an_expression_that_may_take_long_is_evaluated_on_a_thread(monkeypatch):
    threads = []
    real = rules_module._evaluate

    def evaluate(*arguments: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(*arguments)

    monkeypatch.setattr(rules_module, "_evaluate", evaluate)
    for expression in ("a[ab]{900}c", "a[ab]{9}c"):
        await Bench({"body": [expression]}).judge(b"Subject: x\r\n\r\n" + b"ab" * 50 + b"\r\n")
    assert threads == [False, True]
