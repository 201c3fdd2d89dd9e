"""The history of messages, which is kept in addition to the log."""

from relaymta.log import History, Log, find_history


def test_history_is_bounded_by_octets(tmp_path):
    history = History(tmp_path / "history", 0, 80_000)
    for number in range(2000):
        history.write(b'{"event":"queued","ts":%d,"id":"ID%05d"}\n' % (number, number))
    used = sum(path.stat().st_size for path in (tmp_path / "history").iterdir())
    assert 60_000 < used <= 80_000
    assert [event["ts"] for event in find_history(tmp_path / "history", "ID01999")] == [1999]
    assert find_history(tmp_path / "history", "ID00000") == []
    again = History(tmp_path / "history", 0, 80_000)
    again.write(b'{"event":"queued","ts":5000,"id":"ID05000"}\n')
    assert find_history(tmp_path / "history", "ID05000")


def test_only_events_of_messages_are_kept_in_order(tmp_path):
    log = Log(str(tmp_path / "log"), 0, History(tmp_path / "history", 0, 1 << 20))
    log.event("warning", text="not about a message")
    log.event("queued", id="ONE", sender="a", recipients=["b"], size=1, client="", helo="", user="", application="")
    log.event("delivered", id="ONE", recipients=["b"], route="r", peer="p", reply="ok", delay=0.1, attempt=1)
    log.close()
    assert [event["event"] for event in find_history(tmp_path / "history", "ONE")] == ["queued", "delivered"]
    assert (tmp_path / "log").read_text().count("\n") == 3
