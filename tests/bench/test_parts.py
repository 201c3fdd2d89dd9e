"""`relaymta bench` in parts: sizes, pace, messages, the ledger, profiles, the generator beside a scripted server, the report."""

import asyncio
import random
import re
import ssl
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from xxhash import xxh3_64

from relaymta.bench import ledger, trial
from relaymta.bench.generator import Generator, Login, Pace, Target
from relaymta.bench.html import page
from relaymta.bench.ledger import Arrival, Arrivals, LedgerError, Sent, State, account, arrivals_of
from relaymta.bench.load import Load
from relaymta.bench.messages import FIELD, Messages, Recipients, Sizes, digest_of_address
from relaymta.bench.profile import SHIPPED, load_profile
from relaymta.bench.report import MEASURES, compared, report, verdict
from relaymta.bench.sink import certificate
from relaymta.cli import main
from relaymta.errors import ConfigError
from tests.support.fake_mx import CLOSE, FakeMx

# What is sent


def test_sizes_are_those_that_were_asked_for():
    chance = random.Random(1)
    assert {Sizes("4k").draw(chance) for _ in range(9)} == {4096}
    ranged = [Sizes("1k-100k").draw(chance) for _ in range(2000)]
    assert 1024 <= min(ranged) < 1200 and 90_000 < max(ranged) <= 102_400
    assert 0.4 < sum(size < 10_240 for size in ranged) / 2000 < 0.6
    mixed = [Sizes("4k:80%, 1M:20%").draw(chance) for _ in range(2000)]
    assert set(mixed) == {4096, 1 << 20} and 0.17 < mixed.count(1 << 20) / 2000 < 0.23


@pytest.mark.parametrize(("text", "why"), [
    ("", "a size such as 4k"), ("x", "a size such as"), ("4k,8k", "need a share each"), ("4k:80%,8k:30%", "110% together"),
    ("8k-4k", "the smaller size first"), ("1", "from 64 octets"), ("1G", "to 64M"), ("4k:", "a size such as"),
])  # fmt: skip
def test_wrong_sizes_are_explained(text, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        Sizes(text)


@pytest.mark.parametrize("size", [64, 100, 1000, 4096, 100_000])
def test_a_message_is_recognized_and_stuffed(size):
    messages = Messages(7, Sizes(str(size)))
    header, text, end, digest = messages.make(12)
    assert FIELD + b": 0000000000000007-c\r\n" in header and header.endswith(b"\r\n\r\n")
    wire = text + end
    assert wire.endswith(b"\r\n.\r\n") and max(map(len, wire.split(b"\r\n"))) <= 998
    lines = wire[:-3].split(b"\r\n")
    assert not [line for line in lines if line.startswith(b".") and not line.startswith(b"..")]
    body = b"\r\n".join(line.removeprefix(b".") for line in lines)
    assert abs(len(body) - size) <= 78 and xxh3_64(body).intdigest() == digest
    assert messages.make(13)[3] != digest


def test_the_pace_is_kept_whatever_happens():
    pace = Pace(100, 2)
    assert pace.due(0) == 0 and pace.due(100) == 2 and pace.due(300) == 4
    assert [pace.due(one) for one in range(400)] == sorted(pace.due(one) for one in range(400))
    assert Pace(100, 0).due(50) == 0.5


def sent_with(each: int, *states: State) -> Sent:
    sent = Sent(5, Recipients(each))
    for serial, state in enumerate(states):
        sent.add(1.0 + serial, 100 + serial)
        sent.states[serial] = state
        sent.dotted[serial] = sent.answered[serial] = 2.0 + serial
        sent.names[serial] = b"Q%d" % serial
    return sent


def copy(
    serial: int, number: int = 0, at: float = 3.0, answered: bool = True, digest: int = 0, run: int = 5, each: int = 1
) -> Arrival:
    recipient = digest_of_address(Recipients(each).of(serial)[number])
    return Arrival(run, serial, digest or 100 + serial, recipient, at, 1000, answered)


def test_the_ledger_tells_what_was_lost_altered_and_duplicated():
    sent = sent_with(1, *[State.ACCEPTED] * 6, State.IN_DOUBT, State.REJECTED)
    rows = [copy(0), copy(1), copy(1), copy(2, digest=9), copy(3, answered=False), copy(3, at=4.0), copy(6), copy(0, run=4)]
    found = account(sent, iter(rows), {b"Q4"})
    assert (found.expected, found.arrived, found.queued, found.lost) == (6, 4, 1, 1)
    assert (found.altered, found.duplicated, found.repeated, found.foreign) == (1, 1, 1, 1)
    assert (found.in_doubt, found.arrived_in_doubt, found.rejected) == (1, 1, 1)
    assert not found.sound and found.first[3] == 3.0
    assert [one.partition(" ")[2] for one in found.examples["lost"]] == ["(Q5)"]
    assert "1 lost, 1 altered, 1 duplicated of 6 copies" in verdict({"name": "x", "ledger": found.as_json()})[0]


def test_a_copy_that_comes_again_after_250_is_no_copy_in_doubt():
    found = account(sent_with(1, State.ACCEPTED), iter([copy(0), copy(0, answered=False), copy(0)]), None)
    assert (found.duplicated, found.repeated) == (2, 0)


def test_the_ledger_counts_by_recipient():
    sent = sent_with(3, State.ACCEPTED, State.ACCEPTED)
    sent.refused[1] = {0}
    rows = [copy(0, number, 3.0 + number, each=3) for number in range(3)] + [copy(1, 1, each=3)]
    found = account(sent, iter(rows), None)
    assert (found.expected, found.arrived, found.lost, found.first[0]) == (5, 4, 1, 5.0)
    assert "recipient 2" in found.examples["lost"][0]


def test_ledgers_are_kept_in_files(tmp_path):
    sent = sent_with(2, State.ACCEPTED, State.DEFERRED)
    sent.refused[0] = {1}
    sent.write(tmp_path / "sent")
    again, head = Sent.read(tmp_path / "sent")
    assert (again.run, again.digests, again.states, again.refused) == (5, sent.digests, sent.states, {0: {1}})
    assert again.recipients.of(1) == sent.recipients.of(1) and head["offset"] > 0
    arrivals = Arrivals(tmp_path / "arrived")
    rows = [copy(0, each=2), copy(1, 1, answered=False, each=2)]
    for row in rows:
        arrivals.note(row)
    arrivals.flush()
    assert ledger.Counter(tmp_path / "arrived")() == 2
    with (tmp_path / "arrived").open("ab") as file:
        file.write(b"cut off")
    assert list(arrivals_of(tmp_path / "arrived")[0]) == rows
    found = CliRunner().invoke(main, ["bench", "account", str(tmp_path / "sent"), str(tmp_path / "arrived")])
    assert found.exit_code == 0 and "1 of 1 copies have arrived" in found.stdout
    for name in ("sent", "arrived"):
        (tmp_path / "short").write_bytes((tmp_path / name).read_bytes()[:-30])
    for one in ("short", "arrived"):
        with pytest.raises(LedgerError):
            Sent.read(tmp_path / one)


# Profiles


class Listings:
    """A sink to which nothing comes, and what listings of the relay's queue show, one after the other."""

    def __init__(self, folder, *listings: set[bytes]) -> None:
        self.arrivals, self.left, self.asked = folder / "arrived", list(listings), 0
        Arrivals(self.arrivals)

    def count(self) -> int:
        return 0

    def report(self) -> dict:
        return {}

    def queued(self) -> set[bytes]:
        self.asked += 1
        return self.left.pop(0) if self.left else set()


def a_trial(folder, sink: Listings) -> trial._Trial:
    setup = trial.Setup(peer="", target=Target("127.0.0.1", 1), queued=sink.queued, grace=30.0)
    made = trial._Trial(setup, lambda progress: None, trial.Interrupted(), folder, sink, None)
    made._sent.add(0.0, 0)
    made._sent.states[0], made._sent.names[0] = State.ACCEPTED, b"A1"
    return made


def test_one_listing_of_a_queue_in_which_messages_are_moved_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "LOOK_SECONDS", 0.01)
    sink = Listings(tmp_path, set(), {b"A1"}, set(), set())
    a_trial(tmp_path, sink)._wait()
    assert sink.asked == 4
    for listings in ((set(), {b"A1"}), ({b"A1"}, set())):
        shown = Listings(tmp_path, *listings)
        found, _ = (made := a_trial(tmp_path, shown))._compared(made._left(), end=True)
        assert (found.lost, found.queued) == (0, 1)


def test_the_profiles_that_come_with_it_are_valid_and_listed():
    names = {path.stem for path in SHIPPED.glob("*.toml")}
    assert names == {"gmail-like", "greylisting", "storm-421", "slow-dots", "cut-in-mid-dot", "broken-tls", "mixed"}
    shown = CliRunner().invoke(main, ["bench", "sink", "--list"]).stdout
    for name in names:
        assert load_profile(SHIPPED / f"{name}.toml").description in shown


@pytest.mark.parametrize(("text", "why"), [
    ("[storm]\nevry = 3", '2: storm.evry: no such key (did you mean "every"?)'),
    ("[storms]\nevery = 3", '1: storms: no such key (did you mean "storm"?)'),
    ("[cut]\nat_dot = 2", "2: cut.at_dot: Input should be less than or equal to 1 (it is 2)"),
    ("[storm]\nevery = 3\nlasts = 3", "3: storm.lasts: longer than 0, and shorter than every"),
    ("[tls]\nbroken = 'handshake'", "2: tls.broken: needs offer = true"),
    ("[greylisting]\nreply = '250 ok'", """2: greylisting.reply: '250 ok': a reply such as "421 4.7.0 Try again later\""""),
    ("[greylisting]\ndelay = 'soon'", "2: greylisting.delay: a duration such as"),
    ("[cut\n", "1: the closing ] of the table is missing"),
])  # fmt: skip
def test_a_mistake_in_a_profile_has_its_line(tmp_path, text, why):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_profile(path)
    assert error.value.problems[0].startswith(f"{path}:{why}")
    found = CliRunner().invoke(main, ["bench", "sink", "--profile", str(path)])
    assert (found.exit_code, found.stderr.startswith(f"{path}:{why}")) == (78, True)


# The generator


def generated(port: int, load: Load, login: Login | None = None) -> tuple[Sent, Generator]:
    sent = Sent(9, Recipients(load.recipients))
    generator = Generator(Target("127.0.0.1", port), load, sent, Messages(9, Sizes(load.size)), login)
    asyncio.run(generator.run())
    return sent, generator


@pytest.mark.parametrize("pipelining", [True, False])
def test_each_reply_is_booked(pipelining):
    rules = {
        "MAIL": [None, b"451 4.3.0 later\r\n"],
        "RCPT": [None, None, b"550 5.1.1 unknown\r\n", b"550 5.1.1 unknown\r\n"],
        "DOT": [None, b"452 4.3.1 full\r\n", b"554 5.7.1 spam\r\n", CLOSE],
    }
    if pipelining:  # MAIL that is refused is followed by RCPT and DATA
        rules["RCPT"] = [None, None, None, None, b"550 5.1.1 unknown\r\n", b"550 5.1.1 unknown\r\n"]
    with FakeMx(rules) as mx:
        sent, generator = generated(mx.port, Load(1, 7, 30, recipients=2, pipelining=pipelining, size="200"))
    states = [State(one) for one in sent.states]
    assert states == [
        State.ACCEPTED, State.DEFERRED, State.REJECTED, State.IN_DOUBT, State.REJECTED, State.IN_DOUBT, State.ACCEPTED,
    ], states  # fmt: skip
    assert len(mx.messages) == 2 and generator.connections == 2 and b"550 5.1.1 unknown" in sent.replies
    header, text, end, _ = Messages(9, Sizes("200")).make(0)
    assert mx.messages[0][2] == header + (text + end)[:-3].replace(b"\r\n..", b"\r\n.")


def test_a_refused_recipient_is_not_expected():
    with FakeMx({"RCPT": [b"550 5.1.1 unknown\r\n"]}) as mx:
        sent, _ = generated(mx.port, Load(1, 2, 30, recipients=2, size="200"))
    assert sent.refused == {0: {0}} and list(sent.states) == [State.ACCEPTED] * 2


def test_a_connection_for_each_message_or_for_some():
    for per, connections in ((1, 6), (4, 2), (0, 1)):
        with FakeMx({}) as mx:
            sent, generator = generated(mx.port, Load(1, 6, 30, per_connection=per, size="200"))
            assert (generator.connections, sent.count(State.ACCEPTED), mx.commands.count("EHLO")) == (connections, 6, connections)


def test_messages_are_due_at_their_rate_although_the_server_is_slow():
    with FakeMx({}, slow=0.3) as mx:
        sent, generator = generated(mx.port, Load(2, 40, 30, rate=200, ramp=0.1, size="200"))
    pace = Pace(200, 0.1)
    due = [one - generator.began for one in sent.intended]
    assert all(abs(one - pace.due(serial)) < 1e-6 for serial, one in enumerate(due)) and sent.count(State.ACCEPTED) == 40


def test_nobody_listens():
    sent, generator = generated(1, Load(2, 5, 0.3))
    assert len(sent) == 0 and "connecting: Connection refused" in generator.failures


@pytest.mark.parametrize("auth", ["plain", "login"])
def test_it_logs_in_after_starttls(tmp_path, auth):
    said: list[bytes] = []

    def answer(line: bytes) -> bytes:
        said.append(line)
        return b"334 VXNlcm5hbWU6\r\n" if auth == "login" and len(said) < 3 else b"235 2.7.0 welcome\r\n"

    with FakeMx({}, tls=certificate(tmp_path), auth=(auth.upper().encode(), answer)) as mx:
        sent, _ = generated(mx.port, Load(1, 2, 30, tls="starttls", auth=auth, size="200"), Login("me", "secret"))
    assert sent.count(State.ACCEPTED) == 2 and mx.resumed == [False]
    expected = [b"AUTH PLAIN AG1lAHNlY3JldA==\r\n"] if auth == "plain" else [b"AUTH LOGIN\r\n", b"bWU=\r\n", b"c2VjcmV0\r\n"]
    assert said == expected


def test_a_certificate_that_nobody_signed_is_refused_where_it_is_to_be_verified(tmp_path):
    with FakeMx({}, tls=certificate(tmp_path)) as mx:
        sent = Sent(9, Recipients())
        target = Target("127.0.0.1", mx.port, verify=True)
        generator = Generator(target, Load(1, 2, 1, tls="starttls"), sent, Messages(9, Sizes("200")), None)
        asyncio.run(generator.run())
    assert len(sent) == 0 and any("CERTIFICATE_VERIFY_FAILED" in why for why in generator.failures), ssl.OPENSSL_VERSION


# The report


def a_run(name: str, lost: int = 0) -> dict:
    found = account(sent_with(1, *[State.ACCEPTED] * 3), iter([copy(one) for one in range(3 - lost)]), None)
    series = {"step": 0.5, **{key: [1.0, 5.0, 2.0] for key in ("accepted", "arrived", "not accepted")}}
    series |= {key: [1.0, None, 2.0] for key in ("accepted p50", "accepted p99", "arrived p50", "arrived p99")}
    return {
        "name": name, "version": "1", "durability": "fsync", "disk": "ext4", "load": {}, "load_in_words": "4k each",
        "profile": "", "ended": "time", "rate": {"accepted": 100.0, "arrived": None}, "latency_ms": {"reply": {"p50": 2.0}},
        "ledger": found.as_json(), "replies": {}, "failures": {}, "sink": {}, "limits": [], "series": series,
    }  # fmt: skip


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_hostile_text_is_escaped_in_the_report():
    bad = '<script src="//evil.example/x.js">&"\x1b[31m'
    run = a_run(bad, lost=1) | {"replies": {bad: 3}, "failures": {bad: 1}, "sink": {bad: 2}, "limits": [bad], "durability": bad}
    text = page(report([run, a_run("b")]))
    parsed = Links()
    parsed.feed(text)
    assert "script" not in parsed.tags and "\x1b" not in text and parsed.tags.count("svg") == 6
    assert not [name for name, _ in parsed.attributes if name in ("src", "href", "action", "onload", "style")]
    assert "http" not in text.replace("http-equiv", "")


def test_runs_beside_each_other():
    columns, rows = compared([a_run("a"), a_run("b") | {"rate": {"accepted": 50.0, "arrived": None}}], ["a", "b"])
    assert columns == ["", "a", "b", "ratio"] and ["accepted, messages a second", "100", "50", "0.50 x"] in rows
    assert {row[0] for row in rows} <= {one[0] for one in MEASURES}
