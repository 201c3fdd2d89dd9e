"""HTTP hooks in the running relay: the program of docs/filters.md, with another function that judges."""

import json
import smtplib
from pathlib import Path
from typing import Any

from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.hooks import running

# It says what the message wants it to say.
JUDGE = """def judge(mail):
    found = dict(mail["header"]).get("Subject", "")
    assert mail["message"] and mail["client"]["helo"]
    return json.loads(found) if found.startswith("{") else {"verdict": "accept"}
"""


def settings(address: str, secret: str, more: str = "") -> str:
    return f'filter=[{{name="hook",type="http",address=["{address}"],secret_file="{secret}",body=true{more}}}]'


def sent(relay: Relay, answer: Any, *to: str) -> tuple[int, str]:
    """Send a message about which the hook is to say this; the reply."""
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        client.ehlo()
        client.mail("a@b.example")
        for address in to or ("c@d.example",):
            client.rcpt(address)
        code, text = client.data(f"From: a@b.example\r\nSubject: {json.dumps(answer) if answer else 'hello'}\r\n\r\nhello\r\n")
    return code, text.decode()


def test_what_a_hook_says_is_done_and_one_that_dies_costs_what_was_said_and_comes_back_by_itself(tmp_path: Path) -> None:
    port = free_port()
    more = ',may=["header","recipients","sender"],on_failure="tempfail"'
    with running(tmp_path, judge=JUDGE, port=port) as (address, secret, process), FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", settings(address, secret, more), workers=2) as relay:
            _says(relay, peer)
            _changes(relay, peer)
            checked = relay.cli("-c", str(_file(tmp_path, relay, address, secret)), "filter", "check")
            assert checked.stdout == f"hook at {address}: is a hook that says accept\n"
            process.kill()
            _comes_back(tmp_path, relay, peer, port)


def _says(relay: Relay, peer: FakeMx) -> None:
    assert sent(relay, None)[0] == 250
    assert sent(relay, {"verdict": "tag", "score": 2.5})[0] == 250
    wait_for(lambda: len(peer.messages) == 2)
    plain, tagged = sorted((data for _, _, data in peer.messages), key=lambda data: b"X-Spam: Yes\r\n" in data)
    assert b"X-Spam" not in plain and b"X-Spam: Yes\r\nFrom:" in tagged
    reason = "no\r\n250 2.0.0 fine, \u00fc"
    assert sent(relay, {"verdict": "reject", "reason": reason}) == (554, r"5.7.1 Refused by hook: no\r\n250 2.0.0 fine, ?")
    assert sent(relay, {"verdict": "tempfail", "reason": "later"}) == (451, "4.7.1 Not taken now by hook: later")
    assert sent(relay, {"verdict": "discard"})[0] == 250
    assert sent(relay, {"verdict": "hold", "reason": "look at it"})[0] == 250
    assert "filter hook: look at it" in relay.cli("queue", "list", "--held").stdout
    ident = json.loads(relay.cli("queue", "list", "--held", "--json").stdout)["id"]
    assert len(peer.messages) == 2
    relay.cli("queue", "release", ident)
    wait_for(lambda: len(peer.messages) == 3)
    words = [one["verdict"] for one in relay.events("filtered")]
    assert sorted(words) == ["accept", "discard", "hold", "reject", "tag", "tempfail"]


def _changes(relay: Relay, peer: FakeMx) -> None:
    changes = [
        {"do": "add", "name": "X-Hook", "value": "seen\nX-Evil: 1\n\nbody"},
        {"do": "replace", "name": "Subject", "value": "other"},
        {"do": "add_recipient", "address": "archive@d.example"}, {"do": "remove_recipient", "address": "gone@d.example"},
        {"do": "set_sender", "address": "bounces@b.example"},
    ]  # fmt: skip
    assert sent(relay, {"verdict": "accept", "changes": changes}, "c@d.example", "gone@d.example")[0] == 250
    wait_for(lambda: {to for _, tos, _ in peer.messages[3:] for to in tos} >= {"c@d.example", "archive@d.example"})
    assert {to for _, tos, _ in peer.messages[3:] for to in tos} == {"c@d.example", "archive@d.example"}
    for sender, _, data in peer.messages[3:]:
        assert sender == "bounces@b.example"
        assert b"\r\nX-Hook: seen\r\n\tX-Evil: 1\r\n\tbody\r\nFrom: a@b.example\r\nSubject: other\r\n\r\nhello" in data


def _comes_back(folder: Path, relay: Relay, peer: FakeMx, port: int) -> None:
    before = len(peer.messages)
    for _ in range(8):  # to both workers
        assert sent(relay, None) == (451, "4.7.1 hook does not answer now; try again later")
    wait_for(lambda: "down for" in relay.cli("filter", "list").stdout)
    assert len(peer.messages) == before
    with running(folder, judge=JUDGE, port=port):
        wait_for(lambda: sent(relay, None)[0] == 250)
        wait_for(lambda: "down for" not in relay.cli("filter", "list").stdout)
        wait_for(lambda: len(peer.messages) > before)
        states = [one["state"] for one in relay.events("filter")]
        assert "down" in states and states[-1] == "up"
    assert "Traceback" not in (folder / "hook.log").read_text()


def _file(folder: Path, relay: Relay, address: str, secret: str) -> Path:
    made = folder / "check.toml"
    made.write_text(
        f'spool = "{relay.spool}"\n[[filter]]\nname = "hook"\ntype = "http"\naddress = ["{address}"]\nsecret_file = "{secret}"\n'
        'body = true\n[[listener]]\naddress = "127.0.0.1:2525"\n'
    )
    return made


def test_behind_the_reply_a_message_waits_for_a_hook_that_is_not_there_yet(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "hook-secret").write_text("correct horse\n")
    address = f"http://127.0.0.1:{port}/hook"
    with FakeMx({}) as peer:
        keys = settings(address, str(tmp_path / "hook-secret"), ',stage="queued"')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", keys) as relay:
            changes = [{"do": "add", "name": "X-Hook", "value": "seen"}]
            assert sent(relay, {"verdict": "accept", "changes": changes})[0] == 250
            wait_for(lambda: relay.events("filtered"))
            wait_for(lambda: relay.metric("relaymta_unseen") == 1)
            assert not peer.messages
            with running(tmp_path, judge=JUDGE, port=port):
                wait_for(lambda: peer.messages)
            assert b"\r\nX-Hook: seen\r\nFrom: a@b.example\r\n" in peer.messages[0][2]
