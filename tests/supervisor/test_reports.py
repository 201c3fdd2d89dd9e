"""The process of the webhooks, as the supervisor keeps it."""

import pytest

from relaymta.config import Config
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
