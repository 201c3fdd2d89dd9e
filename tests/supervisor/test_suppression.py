"""The suppression list as the supervisor keeps it: made when it is used, swept, bounded; failures are told once."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from relaymta.config import Config
from relaymta.errors import StoreError
from relaymta.supervisor import suppression
from relaymta.supervisor.suppression import Suppressing
from relaymta.suppression import FOLDER, Changed, Entry
from tests.api.serving import LISTENER

NOW = int(time.time())


def entry(address: str, until: int = 0) -> Entry:
    return Entry("", address, "manual", "", NOW, until, "ann")


class Made:
    """`kept`: what is kept, with these settings; `told`: its warnings."""

    def __init__(self, spool: Path, **settings: object) -> None:
        self.spool = spool
        self.configure(**settings)
        self.told: list[str] = []
        self.kept = Suppressing(lambda: self.config, self.told.append)

    def configure(self, **settings: object) -> None:
        self.config = Config.model_validate(LISTENER | {"spool": str(self.spool), "suppression": settings})

    @property
    def there(self) -> bool:
        return (self.spool / FOLDER / "data.mdb").exists()


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_it_is_made_at_the_start_or_by_a_reload_where_it_is_used_and_by_the_first_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(suppression, "LOOK_SECONDS", 3600)
    used, reloaded, by_hand = Made(tmp_path / "a", enabled=True), Made(tmp_path / "b"), Made(tmp_path / "c")
    for made in (used, reloaded, by_hand):
        made.kept.start()
        assert made.there is (made is used)
    reloaded.configure(enabled=True, entries=5)
    reloaded.kept.configured()
    await until(lambda: reloaded.kept.counts.most == 5)
    assert reloaded.there
    assert (await by_hand.kept.count()).entries == 0 and await by_hand.kept.find("a@b.example") == []
    assert await by_hand.kept.remove(["a@b.example"], None) == 0 and not by_hand.there, "reading makes nothing"
    assert await by_hand.kept.put([entry("a@b.example")]) == Changed(added=1)
    assert by_hand.there and [one.address for one in await by_hand.kept.find("a@b.example")] == ["a@b.example"]
    assert [one.address for one in (await by_hand.kept.page(b"", 9, None, "", "")).entries] == ["a@b.example"]
    for made in (used, reloaded, by_hand):
        await made.kept.stop()
        assert made.told == []


async def test_expired_entries_are_swept_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(suppression, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(suppression, "PASS_SECONDS", 0.0)
    monkeypatch.setattr(suppression, "SWEPT_TOGETHER", 7)
    made = Made(tmp_path, enabled=True)
    await made.kept.put([entry(f"u{n}@b.example", NOW - 1 if n % 2 else 0) for n in range(60)])
    made.kept.start()
    await until(lambda: made.kept.counts.entries == 30)
    assert made.kept.counts.by_reason()["manual"] == 30
    await made.kept.put([entry("late@b.example", NOW - 1)])
    await until(lambda: made.kept.counts.entries == 30)
    await made.kept.stop()


async def test_it_is_made_anew_where_it_was_moved_away(tmp_path, monkeypatch):
    monkeypatch.setattr(suppression, "LOOK_SECONDS", 0.01)
    made = Made(tmp_path, enabled=True)
    made.kept.start()
    await made.kept.put([entry("a@b.example")])
    os.rename(tmp_path / FOLDER, tmp_path / "old")
    await until(lambda: made.there)
    await until(lambda: made.kept.counts.entries == 0)
    assert await made.kept.find("a@b.example") == []
    await made.kept.stop()


async def test_a_list_that_cannot_be_opened_is_told_once_and_when_it_can_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(suppression, "LOOK_SECONDS", 0.01)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "data.mdb").write_bytes(b"x" * 20_000)
    made = Made(tmp_path, enabled=True)
    made.kept.start()
    with pytest.raises(StoreError, match="is damaged"):
        await made.kept.put([entry("a@b.example")])
    with pytest.raises(StoreError, match="is damaged"):
        await made.kept.take([{"event": "bounced", "recipient": "a@b.example", "reply": "550 5.1.1 no", "time": NOW * 1000}])
    await asyncio.sleep(0.1)
    assert len(made.told) == 1 and "is damaged" in made.told[0]
    os.rename(tmp_path / FOLDER, tmp_path / "old")
    await until(lambda: made.there and made.kept.counts.most)
    await made.kept.stop()


async def test_bounces_are_noted_as_is_configured_and_counted_where_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(suppression, "LOOK_SECONDS", 3600)
    made = Made(tmp_path, enabled=True, entries=1, hard_bounce_expires=60)
    made.kept.start()
    rows = [{"event": "bounced", "recipient": f"u{n}@b.example", "reply": "550 5.1.1 no", "time": NOW * 1000} for n in range(3)]
    await made.kept.take(rows[:1])
    assert (await made.kept.find("u0@b.example"))[0].until == NOW + 60
    await made.kept.take(rows)
    assert made.kept.left_out == 2 and len(made.told) == 1
    assert (await made.kept.put([entry("z@b.example")])).left_out == 1 and made.kept.left_out == 3 and len(made.told) == 2
    made.configure(enabled=True, hard_bounces=False)
    await made.kept.remove(["u0@b.example"], None)
    await made.kept.take(rows[:1])
    made.configure(enabled=False)
    await made.kept.take(rows[:1])
    assert await made.kept.find("u0@b.example") == []
    await made.kept.stop()
