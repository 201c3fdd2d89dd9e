"""`message explain` and `message history`, with a running relay and with a stopped one."""

import json
import re
import socket

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import SILENT, FakeMx


def explained(relay: Relay, ident: str) -> dict:
    return json.loads(relay.cli("message", "explain", ident, "--json").stdout)


def test_explain_shows_what_a_message_waits_for(tmp_path):
    with FakeMx({"RCPT": [b"450 4.2.1 not now\r\n"]}) as peer:
        routes = f'route=[{{name="shop",application=["shop"],hosts=["h"]}},{{name="out",hosts=["127.0.0.1:{peer.port}"]}}]'
        with Relay(tmp_path, None, routes, "delivery.first_retry=60") as relay:
            relay.send()
            (deferred,) = wait_for(lambda: relay.events("deferred"))
            ident = deferred["id"]
            (place,) = explained(relay, ident)["waits"]
            assert place["routes"] == [
                {"route": "shop", "matches": False, "by": "application"}, {"route": "out", "matches": True, "by": ""}
            ]  # fmt: skip
            assert place["site"] == "out"
            assert place["attempts"][0]["reply"] == "450 4.2.1 not now"
            assert place["wait"]["why"].startswith("its schedule")
            assert abs(place["wait"]["until"] - deferred["next"]) < 2
            text = relay.cli("message", "explain", ident).stdout
            assert "450 4.2.1 not now" in text and "would be released by `relaymta queue flush " in text
            relay.cli("queue", "hold", ident)
            assert explained(relay, ident)["waits"][0]["wait"]["why"] == "it is held: by the operator (queue hold)"
            assert "held: by the operator (queue hold)\n" in relay.cli("message", "show", ident).stdout
            assert "  by the operator (queue hold)  450 4.2.1 not now" in relay.cli("queue", "list").stdout
            relay.cli("queue", "release", ident)
            wait_for(lambda: relay.events("delivered"))


def test_explain_of_a_dead_site_and_of_a_delivery_under_way(tmp_path):
    with FakeMx({"DOT": [SILENT]}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
            relay.send()
            wait_for(lambda: "DATA" in peer.commands)
            (ident,) = wait_for(lambda: [event["id"] for event in relay.events("queued")])
            wait = wait_for(lambda: explained(relay, ident)["waits"][0]["wait"])
            assert wait["why"] == "it is being delivered to 127.0.0.1, waiting for the reply to final"
    with Relay(tmp_path, f"127.0.0.1:{free_port()}") as relay:
        for _ in range(3):
            relay.send()
        wait_for(lambda: relay.events("site"))
        ident = wait_for(lambda: [event["id"] for event in relay.events("queued")][2:])[0]
        wait = wait_for(lambda: explained(relay, ident)["waits"][0]["wait"])
        assert wait["why"].startswith(("the site is down: ", "its schedule"))


def test_explain_of_a_connection_that_is_being_opened(tmp_path):
    with FakeMx({"EHLO": SILENT}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        relay.send()
        (ident,) = wait_for(lambda: [event["id"] for event in relay.events("queued")])
        why = "a connection to its site, which is being opened"
        wait_for(lambda: explained(relay, ident)["waits"][0]["wait"]["why"] == why)
        shown = relay.cli("site", "show", "smarthost").stdout
        assert re.search(r"0 connections \([1-9] being opened\)", shown), shown  # the longer it takes, the more are tried


def test_history_of_a_finished_message(tmp_path):
    with FakeMx({"RCPT": [b"450 4.2.1 not now\r\n"]}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=0.3") as relay:
            relay.send()
            (delivered,) = wait_for(lambda: relay.events("delivered"))
            ident = delivered["id"]

            def events() -> list[str]:
                lines = relay.cli("message", "history", ident, "--json", check=False).stdout.splitlines()
                return [json.loads(line)["event"] for line in lines]

            wait_for(lambda: events() == ["queued", "deferred", "delivered"])
            assert "is not in the queue any more" in relay.cli("message", "explain", ident).stdout
            assert relay.cli("message", "history", "0000000000000", check=False).returncode == 1
            relay.stop()
            assert events() == ["queued", "deferred", "delivered"], "with the daemon stopped, too"


def test_explain_of_a_look_up_under_way(tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        with Relay(tmp_path, None, f'delivery.nameservers=["127.0.0.1:{silent.getsockname()[1]}"]') as relay:
            relay.send()
            (ident,) = wait_for(lambda: [event["id"] for event in relay.events("queued")])
            wait = wait_for(lambda: explained(relay, ident)["waits"][0]["wait"])
            assert wait["why"] == "the DNS: d.example is being looked up"
