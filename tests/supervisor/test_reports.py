"""The process of the webhooks, as the supervisor keeps it."""

import fcntl
import time
from pathlib import Path

import pytest

from relaymta.config import Config
from relaymta.errors import RelayError
from relaymta.supervisor.reports import Reports
from tests.queue.test_queue import until


@pytest.mark.parametrize("kept", [False, True])
async def test_where_nobody_has_kept_a_journal_the_suppression_list_hears_of_the_first_event(tmp_path, monkeypatch, kept):
    journal = tmp_path / "shard-0" / "journal"
    journal.mkdir(parents=True)
    if kept:
        (journal / "00000001").touch()
    config = {"listener": [{"address": "127.0.0.1:25"}], "spool": str(tmp_path), "suppression": {"enabled": True}}
    reports = Reports(Config.model_validate(config), lambda text: None, lambda events: pytest.fail("no events"))
    began: list[list[str]] = []

    async def run() -> int:
        began.append(reports._fresh)
        return 0

    monkeypatch.setattr(reports, "_run", run)
    reports.start()
    await until(lambda: began)
    await reports.close()
    assert began == [[] if kept else ["+suppression"]]


def waiting(folder: Path, *webhooks: str) -> Config:
    rows = [{"name": name, "url": "https://shop.example/", "secret_file": str(folder / "secret")} for name in webhooks]
    return Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "spool": str(folder), "webhook": rows})


async def test_while_another_program_reports_it_waits_and_knows_the_last_reload_then(tmp_path):
    (tmp_path / "secret").write_text("whsec_" + "A" * 44)
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "report").mkdir()
    said: list[str] = []
    reports = Reports(waiting(tmp_path, "one"), said.append, lambda events: pytest.fail("no events"))
    with (tmp_path / "report" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reports.start()
        with pytest.raises(RelayError, match="is starting"):
            await reports.ask("rows", 60)
        reports.configured(waiting(tmp_path, "two"))
    for _ in range(1000):
        names = [row["name"] for row in await reports.ask("rows", 60)]
        if names == ["two"]:
            break
    assert names == ["two"] and not said
    await reports.close()


async def test_it_ends_at_once_also_while_it_waits(tmp_path):
    (tmp_path / "report").mkdir()
    reports = Reports(waiting(tmp_path, "one"), lambda text: None, lambda events: pytest.fail("no events"))
    with (tmp_path / "report" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reports.start()
        await until(lambda: reports._channel is not None)
        began = time.monotonic()
        await reports.close()
        assert time.monotonic() - began < 60, "it is killed where it does not end by itself"
