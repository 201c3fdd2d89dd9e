"""Operators' verbs for queued mail, beyond hold and delete; policies; suspensions."""

import json
import smtplib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from relaymta import control
from relaymta.ident import parse_id
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx

TEXT = "Subject: x\r\n\r\nx\r\n"


def changed(relay: Relay, *arguments: str) -> dict:
    return json.loads(relay.cli("queue", *arguments, "--json").stdout)


def test_mail_for_a_dead_smart_host_is_moved_to_another_route(tmp_path):
    with FakeMx({}) as other:
        routes = f'route=[{{name="dead",hosts=["127.0.0.1:{free_port()}"]}},{{name="other",hosts=["127.0.0.1:{other.port}"]}}]'
        with Relay(tmp_path, None, routes) as relay:
            for number in range(5):
                relay.send(f"Subject: {number}\r\n\r\nx\r\n", "a@b", "c@d", "e@f")
            wait_for(lambda: relay.events("deferred"))
            assert changed(relay, "reroute", "--all", "--to", "other", "--dry-run")["matched"] == 5
            wrong = relay.cli("queue", "reroute", "--all", "--to", "othre", check=False)
            assert wrong.returncode == 1 and 'no such route: othre (did you mean "other"?)' in wrong.stderr
            assert changed(relay, "reroute", "--all", "--to", "other")["changed"] == 5
            wait_for(lambda: len(other.messages) == 5)
            assert sorted(to for _, to, _ in other.messages) == [["c@d", "e@f"]] * 5
            wait_for(lambda: relay.summary() == [])


def test_whole_queues_move_to_another_smart_host_and_stay_there(tmp_path):
    with FakeMx({"RCPT": {"slow@d": b"450 4.2.1 later\r\n"}}) as other:
        routes = f'route=[{{name="dead",hosts=["127.0.0.1:{free_port()}"]}},{{name="other",hosts=["127.0.0.1:{other.port}"]}}]'
        with Relay(tmp_path, None, routes, "delivery.first_retry=1", workers=2) as relay:
            for number in range(20):
                relay.send(f"Subject: {number}\r\n\r\nx\r\n", "a@b", "slow@d" if number == 7 else "c@d")
            wait_for(lambda: relay.events("deferred"))
            held = next(event["id"] for event in relay.events("queued") if event["recipients"] == ["c@d"])
            wait_for(lambda: changed(relay, "hold", held)["changed"])  # unless it is in flight
            assert changed(relay, "reroute", "--queue", "dead", "--to", "other", "--dry-run")["matched"] == 20
            assert changed(relay, "reroute", "--queue", "dead", "--to", "other")["matched"] == 20
            wait_for(lambda: len(other.messages) == 18)
            wait_for(lambda: {row["queue"]: (row["messages"], row["held"]) for row in relay.summary()} == {"other": (2, 1)})
            found = json.loads(relay.cli("message", "explain", held, "--json").stdout)
            assert [wait["queue"] for wait in found["waits"]] == ["other"]
            # What is deferred again stays on the new route, also after a kill -9.
            relay.kill()
            relay.start()
            relay.cli("queue", "release", held)
            wait_for(lambda: len(other.messages) == 19)
            tried = other.commands.count("RCPT")
            wait_for(lambda: other.commands.count("RCPT") > tried)
            assert [row["queue"] for row in relay.summary()] == ["other"]


def test_a_dsn_for_mail_bounced_by_hand_has_the_reason(tmp_path):
    with FakeMx({"RCPT": {"c@d": b"450 4.2.1 later\r\n"}}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=60") as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b", "c@d")
            relay.send("Subject: y\r\n\r\ny\r\n", "a@b", "c@d")
            wait_for(lambda: len(relay.events("deferred")) == 2)
            relay.cli("queue", "hold", relay.events("queued")[1]["id"])
            assert changed(relay, "bounce", "--all", "--reason", "the campaign was stopped") == {
                "matched": 2, "changed": 2, "in_flight": 0, "dry_run": False
            }  # fmt: skip
            wait_for(lambda: len(peer.messages) == 2)
            assert all(
                sender == "" and to == ["a@b"] and b"the campaign was stopped" in data for sender, to, data in peer.messages
            )
            wait_for(lambda: relay.summary() == [])


def test_policies_hold_and_bounce_queued_and_new_mail(tmp_path):
    networks = 'network=[{networks=["127.0.0.9/32"],application="news"}]'
    with FakeMx({"RCPT": {"slow@d": b"450 4.2.1 later\r\n"}}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", networks, workers=2) as relay:
            relay.send_from("127.0.0.9", to=("slow@d",))
            wait_for(lambda: relay.events("deferred"))
            assert "1 queued messages would be held" in relay.cli("policy", "hold", "--app", "news", "--dry-run").stdout
            assert "1 queued messages were held" in relay.cli("policy", "hold", "--app", "news", "--for", "1h").stdout
            for _ in range(5):
                relay.send_from("127.0.0.9")
            relay.send()
            wait_for(lambda: len(peer.messages) == 1)
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 6)
            held = json.loads(relay.cli("queue", "list", "--held", "--json").stdout.splitlines()[-1])
            explained = json.loads(relay.cli("message", "explain", held["id"], "--json").stdout)
            why = explained["waits"][0]["wait"]["why"]
            assert why == "hold policy application=news: held by the operator"
            assert held["held_for"] == "hold policy application=news"
            assert relay.cli("shaping", "active").stderr.startswith("nothing is suspended")
            relay.stop()
            relay.start()  # policies outlive a restart
            relay.send_from("127.0.0.9")
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 7)
            relay.cli("queue", "hold", held["id"])  # by hand, and so beyond the end of the policy
            wait = json.loads(relay.cli("message", "explain", held["id"], "--json").stdout)["waits"][0]["wait"]
            assert (wait["why"], wait["command"]) == ("it is held: by the operator (queue hold)", f"queue release {held['id']}")
            assert relay.cli("policy", "remove", "hold", "application=other", check=False).returncode == 1
            relay.cli("policy", "remove", "hold", "application=news")
            wait_for(lambda: len(peer.messages) == 6)
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 1)

            relay.cli("policy", "bounce", "--domain", "d.example", "--for", "30m", "--reason", "the list was stolen")
            relay.send()
            wait_for(lambda: any(sender == "" for sender, _, _ in peer.messages))
            assert b"the list was stolen" in peer.messages[-1][2]
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "one@d.example", "two@e.example", "three@D.example")
            wait_for(lambda: any(to == ["two@e.example"] for _, to, _ in peer.messages))
            wait_for(lambda: sum(sender == "" for sender, _, _ in peer.messages) == 2)
            dsn = [data for sender, _, data in peer.messages if sender == ""][-1]
            assert b"one@d.example" in dsn and b"three@D.example" in dsn and b"two@e.example" not in dsn
            # The policy does not match our own DSNs, though they are sent to that domain.
            relay.send("Subject: x\r\n\r\nx\r\n", "boss@d.example", "one@d.example")
            wait_for(lambda: any(to == ["boss@d.example"] for _, to, _ in peer.messages))
            policies = [json.loads(line) for line in relay.cli("policy", "list", "--json").stdout.splitlines()]
            assert [(policy["kind"], policy["about"]) for policy in policies] == [("bounce", "recipient_domain=d.example")]


def test_a_site_is_suspended_by_any_of_its_names(tmp_path):
    """By its route, also while it has no mail; by a host; by the name that its limits are counted by."""
    with FakeMx({}) as peer:
        host = f"127.0.0.1:{peer.port}"
        tables = (f'route=[{{name="other",hosts=["{host}"]}}]', 'site=[{name="both",hosts=["127.0.0.1"],connections=5}]')
        with Relay(tmp_path, None, *tables) as relay:
            for number, name in enumerate(("other", host, "both", "other"), 1):
                found = relay.cli("site", "suspend", name)
                assert "mail to both is suspended" in found.stdout
                assert found.stderr == ("" if name == "both" else f"note: {name} is counted as both\n")
                relay.send()
                wait_for(lambda: [row["waiting"] for row in sites(relay)] == [1])
                assert len(peer.messages) == number - 1
                relay.cli("site", "resume", name)
                wait_for(lambda number=number: len(peer.messages) == number)


def test_what_is_suspended_is_resumed_by_each_of_its_names(tmp_path):
    """Also a site that is down, which is known by its pool; and the name that was suspended, whatever has it by now."""
    hosts = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"]
    routes = ",".join(
        f'{{name="{name}",recipient_domain=["{name}.example"],hosts=["{host}"]}}'
        for name, host in zip(("one", "two"), hosts, strict=True)
    )
    tables = (f'route=[{routes},{{name="mx"}}]', 'site=[{name="both",hosts=["127.0.0.1"]}]')
    with Relay(tmp_path, None, *tables, "delivery.first_retry=600") as relay:
        refused = relay.cli("site", "suspend", "mx", check=False)
        assert refused.returncode == 69 and "mx is a route without hosts of its own" in refused.stderr
        assert "suspended" not in refused.stdout
        for name in ("both", "one", hosts[0]):
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "c@one.example", "c@two.example")
            wait_for(lambda: {row["state"] for row in sites(relay)} == {"down"} and len(sites(relay)) == 2)
            assert "resumed" in relay.cli("site", "resume", name).stdout  # they are tried, and down again
            relay.cli("shaping", "clear", "--all")
            relay.cli("queue", "delete", "--all")
        relay.cli("site", "suspend", "one")
        assert {row["site"] for row in _states(relay) if row["kind"] == "suspended"} == {"both"}
        relay.cli("shaping", "clear", "one")
        relay.cli("site", "suspend", "elsewhere.example")
        assert "elsewhere.example is resumed" in relay.cli("site", "resume", "elsewhere.example").stdout
        assert [row for row in _states(relay) if row["kind"] == "suspended"] == []


def _states(relay: Relay) -> list[dict[str, Any]]:
    return [json.loads(line) for line in relay.cli("shaping", "active", "--json").stdout.splitlines()]


def sites(relay: Relay) -> list[dict[str, Any]]:
    return [json.loads(line) for line in relay.cli("site", "list", "--json").stdout.splitlines()]


def test_mail_that_was_never_tried_is_counted_while_its_site_is_down(tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", "delivery.first_retry=600") as relay:
        relay.send()
        wait_for(lambda: relay.events("deferred"))
        relay.send_all(6)
        wait_for(lambda: [(row["waiting"], row["deferred"]) for row in sites(relay)] == [(6, 1)])
        assert "6 wait, 1 deferred" in relay.cli("site", "show", "smarthost").stdout
        event = relay.events("site")[0]
        assert event["ends"] == event["until"] / 1000


def test_released_mail_that_a_policy_holds_again_is_noted(tmp_path):
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        relay.cli("policy", "hold", "--from", "a@b.example")
        relay.send()
        wait_for(lambda: sum(row["held"] for row in relay.summary()) == 1)
        found = relay.cli("queue", "release", "--all")
        assert "a hold policy matches is held again at once: sender=a@b.example" in found.stderr
        relay.cli("policy", "remove", "hold", "sender=a@b.example")
        wait_for(lambda: len(peer.messages) == 1)


def test_a_hold_policy_that_ends_releases_its_mail(tmp_path):
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        relay.cli("policy", "hold", "--from", "a@b.example", "--for", "3s")
        relay.send()
        wait_for(lambda: sum(row["held"] for row in relay.summary()) == 1)
        wait_for(lambda: len(peer.messages) == 1)
        assert relay.cli("policy", "list").stderr == "no policy is in effect\n"


def test_a_hold_policy_that_is_removed_at_once_releases_its_mail(tmp_path):
    """It began and ended between two looks at the policies; and a change for it that comes later holds nothing for ever."""
    about = "sender=a@b.example"
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=600") as relay:

            def ask(op: str, **args: object) -> Any:
                return control.ask(relay.spool / "control.sock", op, **args)

            for number in range(1, 6):
                ask("policy", kind="hold", about=about, seconds=3600, reason="")
                relay.send()
                wait_for(lambda: sum(row["held"] for row in relay.summary()) == 1)
                assert ask("clear", kind="hold", site=about, about="", resume=False)
                wait_for(lambda number=number: len(peer.messages) == number)
            peer.rules["RCPT"] = b"450 4.2.1 later\r\n"
            relay.send()
            (deferred,) = wait_for(lambda: relay.events("deferred"))
            peer.rules.clear()
            ident = parse_id(deferred["id"])
            assert ask("change", verb="policy", shard=0, idents=[ident], word=about) == [1, 0]
            wait_for(lambda: len(peer.messages) == 6)


def test_mail_is_selected_by_its_sender_as_lists_show_it(tmp_path):
    with FakeMx({"RCPT": b"450 4.2.1 later\r\n"}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=600") as relay:
            relay.send(TEXT, "", "c@d.example")
            relay.send(TEXT, "a@b.example", "c@d.example")
            relay.send(TEXT, "A@B.example", "c@d.example")
            wait_for(lambda: len(relay.events("deferred")) == 3)

            def senders(chosen: str) -> list[str]:
                rows = relay.cli("queue", "list", "--from", chosen, "--json").stdout.splitlines()
                return sorted(json.loads(row)["sender"] for row in rows)

            assert senders("<>") == [""]
            for chosen in ("a@b.example", "<a@b.example>", "A@B.EXAMPLE", "a@b.example.", '"a"@b.example'):
                assert senders(chosen) == ["A@B.example", "a@b.example"], chosen
            relay.cli("policy", "hold", "--from", "<>", "--for", "1h")
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 1)
            relay.cli("policy", "remove", "hold", "sender=<>")
            wait_for(lambda: sum(row["held"] for row in relay.summary()) == 0)
            wait_for(lambda: len(relay.events("deferred")) == 4)  # it is due at once, and what is in flight is not changed
            assert changed(relay, "delete", "--from", "<>")["changed"] == 1


def test_flush_reports_throttled_mail_and_filters_match_routes_sites_and_applications(tmp_path):
    networks = 'network=[{networks=["127.0.0.9/32"],application="news"}]'
    with FakeMx({"RCPT": {"c@d.example": b"450 4.2.1 later\r\n"}}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", networks) as relay:
            for _ in range(3):
                relay.send()
                relay.send_from("127.0.0.9")
            wait_for(lambda: len(relay.events("deferred")) == 6)
            label = "smarthost"
            for filters, count in (
                (("--app", "news"), 3), (("--route", label), 6), (("--site", label), 6), (("--site", label, "--app", "news"), 3),
                (("--site", f"127.0.0.1:{peer.port}"), 6), (("--site", "127.0.0.1"), 0), (("--route", "mx"), 0),
            ):  # fmt: skip
                assert changed(relay, "flush", *filters, "--dry-run")["matched"] == count, filters
            relay.cli("site", "suspend", label, "--app", "news", "--for", "30m")
            found = changed(relay, "flush", "--all")
            assert (found["matched"], found["throttled"]) == (6, 3)
            assert 1700 < found["until"] - time.time() < 1810
            shown = relay.cli("queue", "flush", "--all").stdout
            assert "3 are tried now, 3 are throttled by their sites until in 29m" in shown
            shape = json.loads(relay.cli("queue", "shape", "--json").stdout)
            assert sum(sum(row["ages"]) for row in shape["queues"]) == 6
            assert "TOTAL" in relay.cli("queue", "shape").stdout
            relay.stop()
            assert json.loads(relay.cli("queue", "shape", "--json").stdout)["queues"][0]["ages"][0] == 3


def test_an_applications_mail_to_all_sites_is_suspended_and_resumed(tmp_path):
    networks = 'network=[{networks=["127.0.0.9/32"],application="news"}]'
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", networks) as relay:
        assert relay.cli("site", "suspend", check=False).returncode == 64
        assert (
            "mail of news to all sites" in relay.cli("site", "suspend", "--app", "news", "--reason", "too many complaints").stdout
        )
        relay.send_from("127.0.0.9")
        relay.send()
        wait_for(lambda: len(peer.messages) == 1)
        (waiting,) = [json.loads(line) for line in relay.cli("queue", "list", "--json").stdout.splitlines()]
        assert waiting["application"] == "news"
        assert "too many complaints" in relay.cli("message", "explain", waiting["id"]).stdout
        relay.cli("site", "resume", "--app", "news")
        wait_for(lambda: len(peer.messages) == 2)


def test_changed_provider_profiles_are_logged_and_shown(tmp_path):
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
            assert "no other profiles" in relay.cli("shaping", "diff").stdout
            relay.stop()
            used = relay.spool / "node" / "providers.toml"
            used.write_text(used.read_text().replace("messages_per_connection = 100", "messages_per_connection = 7", 1))
            relay.start()
            wait_for(lambda: any("shaping diff" in event["text"] for event in relay.events("warning")))
            assert "site google: messages_per_connection 7 -> 100" in relay.cli("shaping", "diff").stdout


WRONG = [  # (arguments, exit status, error message)
    (("message", "show", "zz"), 64, "not a message id: 'zz'"),
    (("message", "raw", ""), 64, "not a message id: ''"),
    (("message", "explain", "1000000000000x"), 64, "not a message id"),
    (("message", "history", "zz"), 64, "not a message id"),
    (("queue", "delete", "zz"), 64, "not a message id"),
    (("site", "suspend", "x", "--for", "999999999999d"), 64, 'at most "36500d"'),
    (("policy", "hold", "--domain", "d", "--for", "99999999999d"), 64, 'at most "36500d"'),
    (("site", "suspend", "x", "--for", "9" * 400), 64, 'at most "36500d"'),
]


def test_invalid_arguments_are_reported_and_change_nothing(tmp_path):
    def all_are_reported(wrong: list) -> None:
        for verb, status, message in wrong:
            done = relay.cli(*verb, check=False)
            assert (done.returncode, done.stdout) == (status, "") and message in done.stderr and "Traceback" not in done.stderr, (
                verb
            )

    with Relay(tmp_path, f"127.0.0.1:{free_port()}", workers=1) as relay:
        all_are_reported(WRONG)
        assert relay.cli("site", "suspend", "x", "--for", "36500d").returncode == 0  # a hundred years can be stored and shown
        assert "suspended until 21" in relay.cli("shaping", "active").stdout
        relay.stop()
        all_are_reported([(verb, *rest) for verb, *rest in WRONG if verb[0] == "message"])
        with relay:
            assert "suspended until 21" in relay.cli("shaping", "active").stdout


def test_a_queue_is_one_line_also_with_the_daemon_stopped(tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", "delivery.first_retry=600", workers=2) as relay:

        def shown() -> list:
            rows = [json.loads(line) for line in relay.cli("queue", "summary", "--json").stdout.splitlines()]
            shape = json.loads(relay.cli("queue", "shape", "--json").stdout)
            return [[(row["queue"], row["messages"], row["bytes"]) for row in rows], shape["queues"]]

        while len({ident[-4:] for event in relay.events("queued") if (ident := event["id"])}) < 2:  # of both workers
            relay.send()
        wait_for(lambda: relay.events("deferred"))
        running = shown()
        assert len(running[0]) == len(running[1]) == 1
        relay.stop()
        assert shown() == running


def test_all_mail_is_bounced_and_every_sender_gets_a_dsn(tmp_path):
    """More than two pages: the DSNs for the first one do not match in the next."""
    count = 2400
    with FakeMx({"RCPT": {"later@d": b"450 4.2.1 later\r\n"}}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=600") as relay:

            def send(first: int) -> None:
                with smtplib.SMTP("127.0.0.1", relay.port) as client:
                    for number in range(first, count, 24):
                        client.sendmail(f"s{number}@b", ["later@d"], "Subject: x\r\n\r\nx\r\n")

            with ThreadPoolExecutor(24) as clients:
                list(clients.map(send, range(24)))
            wait_for(lambda: len(relay.events("deferred")) == count, 60)
            found = changed(relay, "bounce", "--all", "--reason", "the campaign was stopped")
            assert (found["matched"], found["changed"]) == (count, count)
            wait_for(lambda: len(peer.messages) == count, 60)
            assert sorted(to[0] for sender, to, _ in peer.messages) == sorted(f"s{number}@b" for number in range(count))
            wait_for(lambda: relay.summary() == [])
