"""`message find`: against a plain account of what happened, with a history in pieces and files of several processes."""

import json
import random
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from relaymta import history
from relaymta.cli import finding, main
from relaymta.cli.finding import Finder, Search, moment
from relaymta.cli.options import note_missing
from relaymta.errors import RelayError
from relaymta.history import history_files, history_piece
from relaymta.ident import format_id, parse_id

SHARDS = 2


class Peer:
    """A daemon: messages in its queue, and a history."""

    def __init__(self, folder: Path, queue: dict[str, dict[str, Any]], subjects: dict[str, str] | None = None) -> None:
        self.folder, self.queue, self.subjects_of = folder, queue, subjects or {}
        self.asked: list[str] = []

    def begin(self, op: str, **args: Any) -> Callable[[], Any]:
        self.asked.append(op)
        return lambda: getattr(self, op)(**args)

    def ask(self, op: str, **args: Any) -> Any:
        return self.begin(op, **args)()

    def shards(self) -> list[int]:
        return list(range(SHARDS))

    def page(self, shard: int, after: int, chosen: dict[str, Any]) -> dict[str, Any]:
        """Two messages a page, as the workers choose them."""
        rows = sorted(
            (parse_id(ident), row)
            for ident, row in self.queue.items()
            if parse_id(ident) % SHARDS == shard and parse_id(ident) > after and Search(chosen).may_suit(row | {"message_id": ""})
            and chosen.get("ident", parse_id(ident)) == parse_id(ident)
        )  # fmt: skip
        lines = b"\n".join(msgspec.json.encode(row) for _, row in rows[:2])
        return {"ids": [ident for ident, _ in rows[:2]], "lines": lines, "after": rows[1][0] if len(rows) > 2 else 0, "until": 1}

    def message(self, ident: str) -> dict[str, Any] | None:
        return self.queue.get(ident)

    def subjects(self, shard: int, idents: list[int]) -> list[str | None]:
        return [self.subjects_of.get(format_id(ident)) for ident in idents[:1]]

    def history(self, ident: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for path in self.folder.iterdir() for line in path.read_text().splitlines()]
        return sorted((one for one in lines if one["id"] == ident), key=lambda one: one["ts"])

    def history_files(self) -> list[tuple[str, int]]:
        return history_files(self.folder)

    def history_piece(self, name: str, end: int) -> bytes:
        return history_piece(self.folder, name, end)


PEOPLE = [f"{name}@{domain}" for name in ("ann", "bob") for domain in ("a.example", "b.example")]


def happened(rng: random.Random, folder: Path) -> tuple[Peer, list[dict[str, Any]]]:
    """Messages at random times: the daemon, and what there is to find, the newest first."""
    events: list[tuple[int, dict[str, Any]]] = []
    queue, told = dict[str, Any](), []
    for number in range(60):
        at, ident, worker = 1000.0 + number, format_id((1 << 40) + number), rng.randrange(2)
        sender, recipients = rng.choice([*PEOPLE, ""]), rng.sample(PEOPLE, rng.choice([1, 1, 2, 3]))
        application, kind = (
            rng.choice(["", "shop"]),
            rng.choice(["left", "left", "left", "queue", "queue", "deleted", "filter", "refused"]),
        )
        common = {"id": ident, "sender": sender, "recipients": recipients, "client": "192.0.2.1"}
        if kind in ("filter", "refused"):
            action = "discard" if kind == "filter" else "reject"
            what = {"event": "filtered", "filter": "f", "action": action, "reason": "bad", "verdict": "reject"}
            events.append((worker, common | what | {"ts": at}))
            if kind == "filter":
                states = dict.fromkeys(recipients, "pending")
                told.append((at, ident, sender, states, "", "gone", "discarded by filter f: bad"))
            continue
        events.append(
            (worker, common | {"event": "queued", "ts": at, "size": 5, "application": application, "message_id": f"<{number}@x>"})
        )
        states, late = {}, rng.randrange(2)
        for address in recipients:
            end = "pending" if kind == "deleted" else rng.choice(["delivered", "failed"] + ["pending"] * (kind == "queue"))
            for attempt in range(rng.randrange(3)):
                events.append(
                    (worker, {"event": "deferred", "id": ident, "ts": at + 2 + attempt, "recipient": address, "reply": "450 x"})
                )
            if end == "delivered":
                events.append(
                    (late, {"event": "delivered", "id": ident, "ts": at + 9, "recipients": [address], "reply": "250 x"})
                )
            if end == "failed":
                events.append((late, {"event": "bounced", "id": ident, "ts": at + 9, "recipient": address, "reply": "550 x"}))
            states[address] = end
        if "pending" in states.values() and kind == "queue":
            state = rng.choice(["queued", "in flight", "deferred", "held", "quarantined", "unseen"])
            rows = [
                {"address": address, "state": one, "last": "" if one == "pending" else "x"} for address, one in states.items()
            ]
            queue[ident] = {
                "id": ident, "state": state, "sender": sender, "recipients": rows, "size": 5, "arrived": at,
                "client": "192.0.2.1", "application": application, "held_for": "", "quarantine": None,
            }  # fmt: skip
        else:
            ends = set(states.values())
            state = "gone" if "pending" in ends else "bounced" if "failed" in ends else "delivered"
        told.append((at, ident, sender, states, application, state, ""))
    for worker in range(2):
        lines = [json.dumps(event) for one, event in sorted(events, key=lambda pair: pair[1]["ts"]) if one == worker]
        cut = rng.randrange(len(lines))
        for number, part in enumerate((lines[:cut], lines[cut:]), 3):
            (folder / f"{worker}.{number}.jsonl").write_text("".join(f"{line}\n" for line in part))
    names = ("arrived", "id", "sender", "states", "application", "state", "why")
    return Peer(folder, queue), [dict(zip(names, one, strict=True)) for one in reversed(told)]


IN_QUEUE = {"queued": "queued", "in flight": "queued", "unseen": "queued", "deferred": "deferred", "held": "held",
            "quarantined": "held"}  # fmt: skip


def suits(one: dict[str, Any], chosen: dict[str, Any], statuses: tuple[str, ...]) -> bool:
    """What is asked for, said plainly."""
    to, domain = chosen.get("recipient", ""), chosen.get("recipient_domain", "")
    concerned = [a for a in one["states"] if to in ("", a) and (not domain or a.endswith("@" + domain))] or list(one["states"])
    found = {IN_QUEUE.get(one["state"], one["state"])}
    found |= {{"delivered": "delivered", "failed": "bounced"}.get(one["states"][address], "") for address in concerned}
    return (
        chosen.get("sender", one["sender"] or "<>") == (one["sender"] or "<>")
        and (not to or to in one["states"])
        and (not domain or any(address.endswith("@" + domain) for address in one["states"]))
        and chosen.get("application", one["application"]) == one["application"]
        and chosen.get("newer", 0) <= one["arrived"] * 1000 < chosen.get("older", 1e18)
        and (not statuses or bool(found & set(statuses)))
    )


@pytest.mark.parametrize("seed", range(12))
def test_against_a_plain_account(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(history, "PIECE", rng.choice([300, 1000, 1 << 20]))
    peer, told = happened(rng, tmp_path)
    for _ in range(25):
        every = {
            "sender": rng.choice([*PEOPLE, "<>"]), "recipient": rng.choice(PEOPLE),
            "recipient_domain": rng.choice(["a.example", "b.example"]), "application": "shop",
            "newer": rng.randrange(1000, 1060) * 1000, "older": rng.randrange(1000, 1060) * 1000,
        }  # fmt: skip
        chosen = {key: every[key] for key in rng.sample(list(every), rng.choice([0, 0, 1, 1, 2]))}
        statuses = tuple(rng.sample(["queued", "deferred", "held", "delivered", "bounced", "gone"], rng.choice([0, 0, 0, 1, 2])))
        most = rng.choice([1, 3, 1000])
        expected = [one for one in told if suits(one, chosen, statuses)][:most]
        with click.Context(main).scope():
            found = list(Finder(peer, Search(chosen, statuses)).find(most))
        assert [one["id"] for one in found] == [one["id"] for one in expected], (chosen, statuses)
        for record, one in zip(found, expected, strict=True):
            assert (record["state"], record["sender"], record["arrived"]) == (one["state"], one["sender"], one["arrived"])
            assert {r["address"]: r["state"] for r in record["recipients"]} == one["states"]
            assert record["why"] == one["why"]


def test_one_message_by_its_id_and_by_its_message_id(tmp_path):
    peer, told = happened(random.Random(3), tmp_path)
    one = next(one for one in told if one["state"] == "delivered")
    waits = next(one for one in told if one["state"] in IN_QUEUE)
    with click.Context(main).scope():
        for each in (one, waits):
            (found,) = Finder(peer, Search({"ident": parse_id(each["id"])})).find(10)
            assert (found["id"], found["state"]) == (each["id"], each["state"])
        assert "history_files" not in peer.asked, "an id needs no search"
        for each in (one, waits):
            number = parse_id(each["id"]) - (1 << 40)
            for text in (f"<{number}@x>", f"{number}@x"):
                (found,) = Finder(peer, Search({}, (), text)).find(10)
                assert (found["id"], found["state"], found["message_id"]) == (each["id"], each["state"], f"<{number}@x>")


def test_a_subject_is_looked_for_in_the_queue_and_it_is_said(tmp_path):
    peer, _ = happened(random.Random(5), tmp_path)
    idents = list(peer.queue)
    peer.subjects_of = {idents[0]: "Your Invoice", idents[1]: "ﬁne GRÜSSE", idents[-1]: "Invoice 2"}
    with click.Context(main).scope():
        finder = Finder(peer, Search({}, (), "", "invoice"))
        assert [(one["id"], one["subject"]) for one in finder.find(9)] == [(idents[-1], "Invoice 2"), (idents[0], "Your Invoice")]
        assert list(finder.notes(2, 9)) == ["only messages in the queue were searched, since the log has no Subject"]
        assert [one["id"] for one in Finder(peer, Search({}, (), "", "fine grüsse")).find(9)] == [idents[1]]
    assert "history_files" not in peer.asked


def test_what_an_answer_does_not_have_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "PIECE", 500)
    empty = Peer(tmp_path / "none", {})
    with click.Context(main).scope():
        finder = Finder(empty, Search({}))
        assert list(finder.find(5)) == []
        assert list(finder.notes(0, 5)) == ["only messages in the queue were searched: there is no history (log.history)"]
        (tmp_path / "some").mkdir()
        peer, _ = happened(random.Random(1), tmp_path / "some")
        finder = Finder(peer, Search({"sender": "nobody@a.example"}))
        assert list(finder.find(5)) == [] and next(finder.notes(0, 5)).startswith("the history begins 1970-01-01 00:16:4")
        finder, peer.asked = Finder(peer, Search({})), []
        assert len(list(finder.find(5))) == 5 and list(finder.notes(5, 5)) == ["there may be older ones: --limit"]
        octets = sum(size for _, size in peer.history_files())
        assert peer.asked.count("history_piece") < octets / 500 / 2, "the newest are found without a look at all of it"


def test_old_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "PIECE", 1000)
    peer, _ = happened(random.Random(2), tmp_path)
    with click.Context(main).scope():
        found = list(Finder(peer, Search({"newer": 1_055_000}, ("delivered", "bounced"))).find(1000))
    octets = sum(size for _, size in peer.history_files())
    assert peer.asked.count("history_piece") * 1000 < octets / 2 and all(one["arrived"] >= 1055 for one in found)


@pytest.mark.parametrize("piece", [1, 7, 30, 64, 1000])
def test_the_pieces_of_a_file_are_all_of_it_in_whole_lines(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "PIECE", piece)
    text = b"".join(b"x" * length + b"\n" for length in (0, 5, 29, 30, 31, 0, 0, 200, 6, 7)) + b"not ended"
    (tmp_path / "0.0.jsonl").write_bytes(text)
    ((name, end),) = history_files(tmp_path)
    pieces = []
    while found := history_piece(tmp_path, name, end):
        assert end == len(text) or found.endswith(b"\n")
        pieces.append(found)
        end -= len(found)
        assert not end or text[end - 1 : end] == b"\n"
    assert b"".join(reversed(pieces)) == text and end == 0


def test_no_other_file_is_read(tmp_path):
    (tmp_path / "history").mkdir()
    (tmp_path / "secret").write_text("x\n")
    (tmp_path / "history" / "0.1.jsonl").symlink_to(tmp_path / "secret")
    for name in ("../secret", "/etc/passwd", "0.0.jsonl/..", "x.jsonl", "0.0.jsonl\n", ""):
        with pytest.raises(RelayError):
            history_piece(tmp_path / "history", name, 10)
    assert history_piece(tmp_path / "history", "0.0.jsonl", 10) == b""
    with pytest.raises(OSError):
        history_piece(tmp_path / "history", "0.1.jsonl", 10)


@pytest.mark.parametrize(("text", "expected"), [
    ("2h", lambda now: now - 7200), ("90", lambda now: now - 90), ("@12.5", lambda now: 12.5),
    ("2026-11-27", lambda now: datetime(2026, 11, 27).timestamp()),
    ("2026-11-27 09:30", lambda now: datetime(2026, 11, 27, 9, 30).timestamp()),
    ("2026-11-27 09:30:00Z", lambda now: 1795771800.0), ("2026-11-27T10:30:00+01:00", lambda now: 1795771800.0),
])  # fmt: skip
def test_points_in_time(text, expected):
    assert abs(moment("--since", text) - expected(time.time())) < 5


def test_a_time_of_day_is_the_last_one():
    for minutes in (-1, 1, 600):
        clock = datetime.fromtimestamp(time.time() + 60 * minutes)
        found = moment("--since", clock.strftime("%H:%M:%S"))
        assert found <= time.time() and datetime.fromtimestamp(found).strftime("%H:%M:%S") == clock.strftime("%H:%M:%S")
        assert time.time() - found < 90_000


@pytest.mark.parametrize("words", [
    ("--since", "yesterday"), ("--until", "25:00"), ("--since", "0001-01-01"), ("--since", "@x"), ("--id", "nonsense"),
    ("--since", "@nan"), ("--until", "@inf"), ("--since", "@1e18"),
    ("--to", "x y"), ("--domain", "a@b"), ("--limit", "0"), ("--status", "lost"), ("--from", ""), ("--since", "99999999999999d"),
])  # fmt: skip
def test_wrong_usage(words, tmp_path):
    assert CliRunner().invoke(main, ["message", "find", *words, "--spool", str(tmp_path)]).exit_code == 64


def test_where_a_worker_does_not_answer_it_is_not_said_that_a_message_is_gone(tmp_path):
    peer, told = happened(random.Random(6), tmp_path)
    waits = next(one for one in told if one["state"] in IN_QUEUE)
    peer.queue = {}
    with click.Context(main).scope():
        (found,) = Finder(peer, Search({"ident": parse_id(waits["id"])})).find(10)
        assert found["state"] == "gone"
        note_missing([1])
        (found,) = Finder(peer, Search({"ident": parse_id(waits["id"])})).find(10)
        assert found["state"] == "unknown"


def test_what_is_remembered_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "REMEMBERED", 5)
    peer, told = happened(random.Random(4), tmp_path)
    with click.Context(main).scope():
        assert [one["id"] for one in Finder(peer, Search({})).find(1000)] == [one["id"] for one in told]
