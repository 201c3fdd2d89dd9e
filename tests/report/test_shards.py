"""The journal of one shard as who reports reads it."""

from relaymta.disk.journal import JournalWriter, Rows
from relaymta.proto.envelope import encode
from relaymta.report.shards import Shard


def test_a_replay_begins_early_enough_though_the_clock_was_set_back(tmp_path, monkeypatch):
    shard = Shard(tmp_path, 0)
    writer = JournalWriter(tmp_path / "shard-0" / "journal", Rows(), 1, 1 << 20, 1 << 40)
    for number, moment in enumerate((1000, 2000, 1200, 3000)):  # each in a file of its own
        writer.add(encode([("accepted", moment, number, ("", "", "", [], "x" * 140_000, ""), [("a@d.example",)], 0, {})]))
        writer.write(1)
        writer.settle()
    monkeypatch.setattr(shard, "end", lambda: writer.end)
    assert [shard.from_time(moment).number for moment in (0, 1500, 2500, 9000)] == [0, 0, 2, 3]
    writer.close()
