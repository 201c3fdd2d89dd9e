"""`message find`, with a running relay and with a stopped one: what is in the queue, and what has left it."""

import json
from typing import Any

from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx

LATER = b"450 4.2.1 not now\r\n"
REPLIES = {"no@d.example": b"550 5.1.1 nobody\r\n", "later@d.example": LATER, "later@e.example": LATER}


def found(relay: Relay, *words: str) -> list[dict[str, Any]]:
    done = relay.cli("message", "find", *words, "--json")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_messages_in_the_queue_and_out_of_it(tmp_path):
    with (
        FakeMx({"RCPT": REPLIES}) as peer,
        Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=600", workers=2) as relay,
    ):
        for number, (to, subject) in enumerate({
            "ok@d.example": "one", "no@d.example": "two", "later@d.example": "Your =?utf-8?q?R=C3=BCckfrage?=\r\n =?utf-8?q?_3?=",
            "later@e.example": "large\r\n\r\n" + "x" * 70 + "\r\n" * 2_000_000,
        }.items(), 1):  # fmt: skip
            relay.send(f"Subject: {subject}\r\n\r\nhello\r\n", "a@b.example", to)
            wait_for(lambda number=number: len([one for one in relay.events("queued") if one["sender"]]) == number)
        relay.send("Subject: both\r\n\r\n", "c@b.example", "ok@d.example", "later@d.example")
        wait_for(lambda: len(relay.events("deferred")) == 3 and len(relay.events("bounced")) == 1)
        wait_for(lambda: len(peer.messages) == 3)  # the DSN, too
        *mine, both = [one["id"] for one in relay.events("queued") if one["sender"]]
        one, two, three, large = mine
        wait_for(
            lambda: (
                [row["state"] for row in found(relay, "--from", "a@b.example")]
                == ["deferred", "deferred", "bounced", "delivered"]
            )
        )

        def ids(*words: str) -> list[str]:
            return [row["id"] for row in found(relay, *words)]

        def answers() -> None:
            assert ids("--from", "a@b.example") == [large, three, two, one]
            assert len(ids()) == 6 and ids("--limit", "2") == ids()[:2]
            (dsn,) = found(relay, "--from", "<>")
            assert dsn["recipients"][0]["address"] == "a@b.example" and dsn["state"] == "delivered"
            assert ids("--to", "later@d.example") == [both, three] and ids("--domain", "e.example") == [large]
            assert ids("--status", "bounced") == [two] and ids("--status", "deferred", "--to", "later@d.example") == [both, three]
            (shared,) = found(relay, "--status", "delivered", "--from", "c@b.example")
            assert (shared["id"], shared["state"]) == (both, "deferred")
            replies = {row["address"]: (row["state"], row["reply"][:3]) for row in shared["recipients"]}
            assert replies["ok@d.example"][0] == "delivered" and replies["later@d.example"][0] == "pending"
            assert "not now" in shared["recipients"][1]["reply"]
            assert (
                ids("--subject", "rückfrage 3") == [three]
                and ids("--subject", "LARGE") == [large]
                and ids("--subject", "one") == []
            )
            assert ids("--id", three.lower()) == [three] and ids("--id", one) == [one]
            assert ids("--since", "1h", "--status", "delivered", "--to", "ok@d.example") == [both, one]
            assert ids("--until", "1h") == [] and ids("--since", "0s") == []
            text = relay.cli("message", "find", "--to", "no@d.example").stdout
            assert (
                text.startswith(two)
                and "bounced" in text
                and "<a@b.example> -> <no@d.example>" in text
                and "550 5.1.1 nobody" in text
            )
            note = relay.cli("message", "find", "--subject", "nothing").stderr
            assert note == "no such messages\nnote: only messages in the queue were searched, since the log has no Subject\n"

        answers()
        relay.cli("queue", "hold", three)
        relay.cli("queue", "delete", large)
        (held,) = found(relay, "--status", "held")
        assert (held["id"], held["why"]) == (three, "by the operator (queue hold)")
        (gone,) = found(relay, "--to", "later@e.example")
        assert (gone["id"], gone["state"]) == (large, "gone")
        assert ids("--status", "gone") == [large]
        before = found(relay)
        relay.stop()
        assert found(relay) == before, "with the daemon stopped, too"
        assert ids("--subject", "rückfrage") == [three]
