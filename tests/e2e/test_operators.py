"""What operators do to queued mail, beyond holding and deleting it."""

import json

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx


def changed(relay: Relay, *arguments: str) -> dict:
    return json.loads(relay.cli("queue", *arguments, "--json").stdout)


def test_mail_for_a_dead_smart_host_goes_by_another_route(tmp_path):
    with FakeMx({}) as other:
        routes = f'route=[{{name="dead",hosts=["127.0.0.1:{free_port()}"]}},{{name="other",hosts=["127.0.0.1:{other.port}"]}}]'
        with Relay(tmp_path, None, routes) as relay:
            for number in range(5):
                relay.send(f"Subject: {number}\r\n\r\nx\r\n", "a@b", "c@d", "e@f")
            wait_for(lambda: relay.events("deferred"))
            assert changed(relay, "reroute", "--all", "--to", "other", "--dry-run")["matched"] == 5
            wrong = relay.cli("queue", "reroute", "--all", "--to", "othre", check=False)
            assert wrong.returncode == 69 and 'did you mean "other"' in wrong.stderr
            assert changed(relay, "reroute", "--all", "--to", "other")["changed"] == 5
            wait_for(lambda: len(other.messages) == 5)
            assert sorted(to for _, to, _ in other.messages) == [["c@d", "e@f"]] * 5
            wait_for(lambda: relay.summary() == [])


def test_bounced_by_hand_the_sender_is_told_why(tmp_path):
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
                sender == "" and to == ["a@b"] and b"the campaign was stopped" in text for sender, to, text in peer.messages
            )
            wait_for(lambda: relay.summary() == [])
