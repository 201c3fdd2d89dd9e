"""Files that are read again when they change."""

import time

from relaymta.watch import Watched


def test_what_took_long_rests(monkeypatch, tmp_path):
    """Whoever may write a file cannot make the relay read it all the time."""
    now, spent, loaded = [100.0], [0.0], []

    def load() -> int:
        spent[0] += 2.0
        loaded.append(1)
        return len(loaded)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: spent[0])
    file = tmp_path / "file"
    watched = Watched([str(file)], load, rest=50)
    watched.refresh()
    file.write_text("changed")
    now[0] += 99.0
    watched.refresh()
    assert watched.value == 1
    now[0] += 1.0
    watched.refresh()
    assert watched.value == 2
    free = Watched([str(file)], load)
    free.refresh()
    file.write_text("again")
    free.refresh()
    assert free.value == 4
