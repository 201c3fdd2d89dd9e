"""Webhooks of a running relay, and consumers of every kind."""

import contextlib
import json
import os
import random
import re
import signal
import smtplib
import threading
import time
from pathlib import Path

from relaymta.ident import parse_id, shard_of
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.webhooks import DROP, consumer, secret_file, table


def settings(*tables: str) -> str:
    return f"webhook=[{', '.join(tables)}]"


def process_of(relay: Relay) -> int:
    """The process that reports."""
    assert relay.process is not None
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"relaymta.report" in (path / "cmdline").read_bytes():
                parent = int(re.search(r"\) \w (\d+)", (path / "stat").read_text())[1])
                if parent == relay.process.pid:
                    return int(path.name)
    return 0


def test_a_complaint_is_told_and_who_complains_gets_no_more(tmp_path):
    secret = secret_file(tmp_path / "secret")
    with FakeMx({}) as peer, consumer(secret) as shop:
        hook = settings(table("shop", shop.url, tmp_path / "secret"))
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", hook, "suppression.enabled=true") as relay:
            relay.cli("suppression", "complaint", "c@d.example", "--application", "shop", "--expires", "30d")
            wait_for(lambda: shop.events, 30, "the event")
            (event,) = shop.events
            assert (event["event"], event["recipient"], event["application"]) == ("complained", "c@d.example", "shop")
            assert event["message"] == event["sender"] == ""
            time.sleep(1)  # whoever follows the events leaves what the operator has said
            entry = json.loads(relay.cli("suppression", "show", "c@d.example", "--json").stdout)
            assert entry["by"].startswith("operator") and entry["until"]


def test_a_hard_bounce_reaches_the_list_though_all_die_in_between(tmp_path):
    with FakeMx({"RCPT": {f"u{n}@d.example": b"550 5.1.1 nobody\r\n" for n in range(40)}}) as peer:
        relay = Relay(tmp_path, f"127.0.0.1:{peer.port}", "suppression.enabled=true")
        with relay:
            for number in range(40):
                relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", f"u{number}@d.example")
            wait_for(lambda: len(relay.events("bounced")) >= 40, what="the bounces")
            relay.kill()
        with relay:
            listed = lambda: relay.cli("suppression", "list").stdout.count("@d.example")  # noqa: E731
            wait_for(lambda: listed() == 40, what="all entries")


def test_each_message_is_told_from_its_acceptance_to_its_end(tmp_path):
    secret = secret_file(tmp_path / "secret")
    with FakeMx({}) as peer, consumer(secret) as shop:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", settings(table("shop", shop.url, tmp_path / "secret"))) as relay:
            relay.send("Subject: x\r\nMessage-ID: <1@b.example>\r\n\r\nx\r\n", "a@b.example", "c@d.example", "e@d.example")
            wait_for(lambda: len(shop.events) == 4, 30, "the events")
            found = shop.events
            assert [(one["event"], one["recipient"]) for one in found] == [
                ("accepted", "c@d.example"), ("accepted", "e@d.example"), ("delivered", "c@d.example"),
                ("delivered", "e@d.example"),
            ]  # fmt: skip
            (queued,) = relay.events("queued")
            assert {one["message"] for one in found} == {queued["id"]}
            assert all(one["sender"] == "a@b.example" and one["message_id"] == "<1@b.example>" for one in found)
            assert found[2]["peer"] and found[2]["reply"]["code"] == 250
            request = shop.requests[0]
            assert request.told["type"] == "events" and request.fields["content-type"] == "application/json"
            (row,) = json.loads("[" + relay.cli("webhook", "list", "--json").stdout + "]")
            assert row["state"] == "ok" and row["delivered"] == 4 and row["lag_events"] == 0
            shown = relay.cli("webhook", "show", "shop").stdout
            assert "4 delivered" in shown and shop.url in shown
            sample = 'relaymta_webhook_events_total{result="delivered",webhook="shop"} 4.0'
            wait_for(lambda: sample in relay.monitored("/metrics")[1].splitlines())
            assert not shop.wrong


def checked(found: list[dict]) -> dict[str, list[str]]:
    """What happened to each message, by its one recipient. No event is missing: their numbers in each shard follow each other."""
    numbers: dict[int, list[int]] = {}
    words: dict[str, list[str]] = {}
    for event in found:
        ident, _, number = event["id"].partition("-")
        assert ident == event["message"]
        numbers.setdefault(shard_of(parse_id(ident)), []).append(int(number))
        words.setdefault(event["recipient"], []).append(event["event"])
    for each in numbers.values():
        assert each == [*range(len(each))], "in order, each once, none missing"
    return words


def test_workers_that_are_killed_lose_no_event_and_make_none_up(tmp_path):
    """Mail flows while workers, and the process that reports, are killed at any moment, and the consumer fails now and then: at
    the end each message that a worker has taken has come to its end once, and that is what was told."""
    secret = secret_file(tmp_path / "secret")
    chosen, acked, stop = random.Random(7), list[str](), threading.Event()

    def send(client: int) -> None:
        for number in range(400):
            if stop.is_set():
                return
            to = f"r{client}.{number}@d.example"
            with contextlib.suppress(OSError, smtplib.SMTPException):
                relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", to)
                acked.append(to)

    with FakeMx({"RCPT": [b"451 4.2.0 not now\r\n", *[None] * 30] * 3}) as peer, consumer(secret) as shop:
        shop.reply = lambda request: (200, {}, b"") if chosen.random() < 0.8 else (500, {}, b"")
        keys = settings(table("shop", shop.url, tmp_path / "secret"))
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", keys, "delivery.first_retry=1", workers=2) as relay:
            threads = [threading.Thread(target=send, args=(client,)) for client in range(4)]
            for thread in threads:
                thread.start()
            for turn in range(6):
                time.sleep(chosen.uniform(0.2, 1.0))
                pids = relay.worker_pids()
                victim = process_of(relay) if turn == 3 else chosen.choice(pids) if pids else 0
                if victim:
                    os.kill(victim, signal.SIGKILL)
            stop.set()
            for thread in threads:
                thread.join()
            wait_for(lambda: relay.summary() == [], 60, "the queue to be empty")

            def complete() -> bool:
                done = relay.cli("webhook", "list", "--json", check=False)  # its process may just be started again
                rows = [json.loads(line) for line in done.stdout.splitlines()]
                told = [(event["event"], event["recipient"]) for event in list(shop.events)]
                ends = {recipient for word, recipient in told if word == "delivered"}
                # How far it is behind is what was known a moment ago; and a worker that starts has a queue that nobody shows.
                mail = {*acked, *(recipient for word, recipient in told if word == "accepted")}
                return bool(rows) and rows[0]["lag_events"] == 0 and not rows[0]["dropped"] and ends >= mail

            wait_for(complete, 60, "all events")
            assert not relay.events("warning") or not any("dropped" in row["text"] for row in relay.events("warning"))
        words = checked(shop.events)
    assert set(acked) <= set(words) and len(acked) > 50
    for recipient, told in words.items():
        assert told[0] == "accepted" and told[-1] == "delivered" and set(told[1:-1]) <= {"deferred"}, (recipient, told)
    assert set(words) <= {to for _, recipients, _ in peer.messages for to in recipients}
    assert not shop.wrong


def test_no_consumer_keeps_another_one_waiting(tmp_path):
    """One fails for a while, one is gone, one redirects, one is slow, one drops connections: each as it is, and mail as ever."""
    secret = secret_file(tmp_path / "secret")
    stop = threading.Event()
    begun = time.monotonic()

    def slow(request):
        stop.wait(60)
        return 200, {}, b""

    replies = {
        "good": lambda request: (200, {}, b""),
        "late": lambda request: (500, {}, b"not yet") if time.monotonic() < begun + 4 else (200, {}, b""),
        "gone": lambda request: (410, {}, b""),
        "moved": lambda request: (301, {"Location": "http://127.0.0.1:9/"}, b""),
        "slow": slow,
        "drops": lambda request: DROP,
    }
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(FakeMx({}))
        consumers = {name: stack.enter_context(consumer(secret)) for name in replies}
        for name, reply in replies.items():
            consumers[name].reply = reply
        tables = [table(name, one.url, tmp_path / "secret") for name, one in consumers.items()]
        relay = stack.enter_context(Relay(tmp_path, f"127.0.0.1:{peer.port}", settings(*tables)))
        relay.send_all(20)
        for name in ("good", "late"):
            wait_for(lambda name=name: len(consumers[name].events) == 40, 30, name)
            checked_one = [event["event"] for event in consumers[name].events]
            assert checked_one.count("delivered") == 20
        wait_for(lambda: len(consumers["drops"].refused) > 1 and len(consumers["moved"].refused) > 1, 30, "more attempts")
        first, second = consumers["moved"].refused[:2]
        assert (first.ident, first.body) == (second.ident, second.body), "the same batch has the same id"
        assert len(consumers["gone"].refused) == 1
        rows = {row["name"]: row for row in map(json.loads, relay.cli("webhook", "list", "--json").stdout.splitlines())}
        states = {name: row["state"] for name, row in rows.items()}
        assert states["good"] == states["late"] == "ok" and states["gone"] == "gone" and states["moved"] == "failing"
        assert rows["gone"]["lag_events"] == 40 and rows["slow"]["lag_seconds"] > 0
        text = relay.cli("webhook", "list").stdout
        assert "HTTP 301" in text and "HTTP 410" in text
        relay.cli("reload", check=False)
        wait_for(lambda: len(consumers["gone"].refused) == 2, 30, "that it is asked again after a reload")
        consumers["gone"].reply = replies["good"]
        done = relay.cli("webhook", "test", "gone")
        assert done.stdout.startswith("HTTP 200 after")
        wait_for(lambda: len({one["id"] for one in consumers["gone"].events if one["event"] != "test"}) == 40, 30, "the rest")
        stop.set()


def test_a_test_says_what_is_wrong(tmp_path):
    secret = secret_file(tmp_path / "secret")
    with FakeMx({}) as peer, consumer(secret) as shop:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", settings(table("shop", shop.url, tmp_path / "secret"))) as relay:
            done = wait_for(lambda: (found := relay.cli("webhook", "test", "shop", check=False)).returncode == 0 and found)
            assert re.match(r"HTTP 200 after \d+\.\d\d s\n", done.stdout)
            assert shop.requests[0].told["type"] == "test" and shop.requests[0].events[0]["event"] == "test"
            shop.reply = lambda request: (503, {}, b"closed for today")
            done = relay.cli("webhook", "test", "shop", check=False)
            assert done.returncode == 1 and "HTTP 503" in done.stdout and "closed for today" in done.stdout
            done = relay.cli("webhook", "test", "shop", "--json", check=False)
            assert done.returncode == 1 and json.loads(done.stdout)["status"] == 503
            done = relay.cli("webhook", "test", "shp", check=False)
            assert done.returncode == 1 and 'no such webhook: shp (did you mean "shop"?)' in done.stderr
            assert relay.cli("webhook", "show", "shp", check=False).returncode == 1
            assert relay.cli("webhook", "replay", "shop", "--since", "nonsense", check=False).returncode == 64
            shop.reply = lambda request: DROP
            done = relay.cli("webhook", "test", "shop", check=False)
            assert done.returncode == 1 and re.match(r"\S.* \(after \d+\.\d\d s\)\n", done.stdout) and "HTTP" not in done.stdout
            done = relay.cli("webhook", "test", "shop", "--json", check=False)
            assert json.loads(done.stdout)["seconds"] > 0
            (tmp_path / "secret").write_text("hello")


def test_what_was_sent_is_sent_again_on_request(tmp_path):
    secret = secret_file(tmp_path / "secret")
    with FakeMx({}) as peer, consumer(secret) as shop:
        with Relay(
            tmp_path, f"127.0.0.1:{peer.port}", settings(table("shop", shop.url, tmp_path / "secret")), workers=2
        ) as relay:
            for _ in range(6):
                relay.send()
            wait_for(lambda: len(shop.events) == 12, 30, "the events")
            before, shop.requests = shop.events, []
            done = relay.cli("webhook", "replay", "shop", "--since", "1h", "--event", "delivered", "--json")
            assert json.loads(done.stdout)["events"] == 12
            wait_for(lambda: len(shop.events) == 6, 30, "them again")
            assert shop.events == [one for one in before if one["event"] == "delivered"] or {
                one["id"] for one in shop.events
            } == {one["id"] for one in before if one["event"] == "delivered"}
            wait_for(lambda: not list((relay.spool / "report/shop/replays").iterdir()), 30, "its end")
            assert json.loads(relay.cli("webhook", "show", "shop", "--json").stdout)["replayed"] == 6


def test_a_replay_goes_on_when_its_process_was_killed(tmp_path):
    secret = secret_file(tmp_path / "secret")
    with FakeMx({}) as peer, consumer(secret) as shop:
        keys = settings(table("shop", shop.url, tmp_path / "secret", "private = true, batch = 3"))
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", keys, workers=2) as relay:
            for _ in range(10):
                relay.send()
            wait_for(lambda: len(shop.events) == 20, 30, "the events")
            before, shop.requests = {one["id"] for one in shop.events}, []
            shop.reply = lambda request: (200, {}, b"") if len(shop.requests) < 3 else (500, {}, b"")
            relay.cli("webhook", "replay", "shop", "--since", "1h")
            wait_for(lambda: len(shop.refused) > 0, 30, "a failure")
            os.kill(process_of(relay), signal.SIGKILL)
            shop.reply = lambda request: (200, {}, b"")
            wait_for(lambda: {one["id"] for one in shop.events} == before, 30, "the rest")
            wait_for(lambda: not list((relay.spool / "report/shop/replays").iterdir()), 30, "its end")
            assert any("the process of the webhooks has ended (-9)" in row["text"] for row in relay.events("warning"))


def test_a_relay_that_starts_again_goes_on_where_it_was(tmp_path):
    secret, port = secret_file(tmp_path / "secret"), free_port()
    keys = settings(table("shop", f"http://127.0.0.1:{port}/", tmp_path / "secret"))
    with FakeMx({}) as peer:
        with consumer(secret, port) as shop, Relay(tmp_path, f"127.0.0.1:{peer.port}", keys) as relay:
            relay.send()
            wait_for(lambda: len(shop.events) == 2, 30, "the events")
            time.sleep(0.5)  # its place is written when this consumer has answered
            relay.stop()
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", keys) as relay:  # nobody listens there
            relay.send()
            failing = lambda: "failing" in relay.cli("webhook", "list", check=False).stdout  # its process may be starting  # noqa: E731
            wait_for(failing, 30, "a failure")
            relay.kill()
        with consumer(secret, port) as shop, Relay(tmp_path, f"127.0.0.1:{peer.port}", keys) as relay:
            wait_for(lambda: len(shop.events) == 2, 30, "what was not taken")
            assert [one["id"].partition("-")[2] for one in shop.events] == ["2", "3"]


def test_a_reload_adds_changes_and_removes_webhooks(tmp_path):
    secret = secret_file(tmp_path / "secret")
    with FakeMx({}) as peer, consumer(secret) as one, consumer(secret) as other:
        file = tmp_path / "relay.toml"
        base = f'[[route]]\nname = "out"\nhosts = ["127.0.0.1:{peer.port}"]\ntls = "off"\n'

        def tables(*rows: str) -> str:
            return base + "".join(f"[[webhook]]\n{row}\nprivate = true\nsecret_file = '{tmp_path}/secret'\n" for row in rows)

        file.write_text(base)
        relay = Relay(tmp_path, None, workers=2)
        command = relay.command()
        relay.command = lambda: [*command, "--config", str(file)]  # type: ignore[method-assign]
        with relay:
            relay.send()
            assert process_of(relay) == 0 and relay.cli("webhook", "list").stderr.startswith("there are no webhooks")
            assert not list(relay.spool.glob("shard-*/journal"))
            file.write_text(tables(f'name = "one"\nurl = "{one.url}"'))
            relay.cli("reload")
            wait_for(lambda: "ok" in relay.cli("webhook", "list", check=False).stdout, 30, "the process")
            relay.send()
            wait_for(lambda: len(one.events) == 2, 30, "its events")
            pid = process_of(relay)
            file.write_text(
                tables(f'name = "one"\nurl = "{one.url}"', f'name = "other"\nurl = "{other.url}"\nevents = ["delivered"]')
            )
            relay.cli("reload")
            wait_for(lambda: relay.cli("webhook", "show", "other", check=False).returncode == 0, 30, "the other")
            wait_for(lambda: len(list((relay.spool / "report/other").glob("shard-*"))) == 2, 30, "its places")
            relay.send()
            wait_for(lambda: len(one.events) == 4 and len(other.events) == 1, 30, "events of both")
            assert other.events[0]["event"] == "delivered" and process_of(relay) == pid
            file.write_text(base)
            relay.cli("reload")
            wait_for(lambda: process_of(relay) == 0, 30, "the end of the process")
            relay.send()
            assert relay.summary() == [] or wait_for(lambda: relay.summary() == [])
            assert len(one.events) == 4
            file.write_text(tables(f'name = "one"\nurl = "{one.url}"'))
            relay.cli("reload")
            wait_for(lambda: process_of(relay), 30, "another process")
            relay.send()

            def row() -> dict:
                found = relay.cli("webhook", "show", "one", "--json", check=False).stdout
                return json.loads(found) if found else {}

            wait_for(lambda: len(one.events) == 6 and row()["dropped"] == 2, 30, "what happens, and how much it lacks")
            assert not any("the suppression list" in each["text"] for each in relay.events("warning"))


def test_a_mistake_is_named_with_its_line(tmp_path):
    file = tmp_path / "relay.toml"
    file.write_text(
        '[[listener]]\naddress = "127.0.0.1:2525"\n'
        '[[webhook]]\nname = "shop"\nurl = "https://10.0.0.1/x"\nsecret_file = "/x"\n'
        '[[webhook]]\nname = "shop"\nurl = "http://a.example/x"\nsecret_file = ""\nevents = ["opened"]\n'
    )
    done = Relay(tmp_path, None).cli("config", "check", "--config", str(file), check=False)
    assert done.returncode == 78
    assert f"{file}:5: webhook.0.url: 10.0.0.1 is not an address in the Internet: set private = true" in done.stderr
    assert f"{file}:11: webhook.1.events.0: " in done.stderr


def test_a_dead_consumer_costs_disk_up_to_the_bound_and_hears_the_rest(tmp_path):
    """Twice as many events as there is room for: the oldest are gone, counted and named, and mail was taken as ever."""
    secret, many = secret_file(tmp_path / "secret"), [f"{number:040}@d.example" for number in range(100)]
    with FakeMx({}) as peer, consumer(secret) as shop:
        shop.reply = lambda request: (500, {}, b"")
        keys = settings(table("shop", shop.url, tmp_path / "secret"))
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", keys, "webhooks.store=1048576") as relay:
            for _ in range(120):
                relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", *many)
            wait_for(lambda: relay.summary() == [], 60, "the queue to be empty")
            assert 500_000 < sum(path.stat().st_size for path in relay.spool.glob("shard-*/journal/*")) <= 1 << 20
            shop.reply = lambda request: (200, {}, b"")

            def row() -> dict:
                found = relay.cli("webhook", "show", "shop", "--json", check=False).stdout
                return json.loads(found) if found else {}

            found = wait_for(lambda: (now := row()) and now["lag_events"] == 0 and now["delivered"] and now, 60, "the rest")
            assert found["dropped"] > 0 and found["dropped"] + found["delivered"] == 2 * 120 * 100
            warnings = [one["text"] for one in relay.events("warning") if "were there no more" in one["text"]]
            assert sum(int(text.split()[2]) for text in warnings) == found["dropped"]
            numbers = [int(event["id"].partition("-")[2]) for event in shop.events]
            assert numbers[-1] == 2 * 120 * 100 - 1 and len(numbers) == found["delivered"]


def test_the_journals_of_workers_that_there_are_no_more_are_within_the_bound_too(tmp_path):
    secret, many = secret_file(tmp_path / "secret"), [f"{number:0100}@d.example" for number in range(100)]
    with FakeMx({}) as peer, consumer(secret) as shop:
        shop.reply = lambda request: (500, {}, b"")
        keys = settings(table("shop", shop.url, tmp_path / "secret"))
        for workers in (3, 1):
            with Relay(tmp_path, f"127.0.0.1:{peer.port}", keys, "webhooks.store=1048576", workers=workers) as relay:
                for _ in range(60):
                    relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", *many)
                wait_for(lambda: relay.summary() == [], 60, "the queue to be empty")
                relay.stop()
        each = [sum(path.stat().st_size for path in shard.iterdir()) for shard in relay.spool.glob("shard-*/journal")]
        assert len(each) == 3 and min(each) > 0 and sum(each) <= 1 << 20
