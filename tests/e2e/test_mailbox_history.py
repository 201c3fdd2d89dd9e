"""`relaymta mailbox history`: what the log says of one user, by whatever address, in the order of time."""

import json
from typing import Any

from tests.support.daemon import wait_for
from tests.support.imap_relay import PASSWORD, ImapRelay

KEEP = b'require "imap4flags";\nkeep :flags "\\\\Flagged";\n'


def history(relay: ImapRelay, name: str, *words: str) -> list[dict[str, Any]]:
    found = relay.cli("mailbox", "history", f"{name}@local.example", "--json", *words)
    assert found.stderr == ""
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_what_the_log_says_of_a_user(tmp_path):
    with ImapRelay(tmp_path, "limits.sessions_per_user=100") as relay:
        for name in ("alice", "bob"):
            relay.user(name)
        relay.asked("mailbox_alias", "ally", targets=["alice@local.example"])
        relay.asked("mailbox_alias", "team", targets=["alice@local.example", "bob@local.example"])
        (tmp_path / "script").write_bytes(KEEP)
        relay.cli("sieve", "put", "alice@local.example", str(tmp_path / "script"), "--activate")
        for to in ("alice", "ally", "team", "alice+shop", "bob"):
            relay.send(f"Subject: {to}\r\n\r\nx\r\n", "s@x.example", f"{to}@local.example")
        wait_for(lambda: len(relay.events("delivered")) == 5, what="delivery")
        session = relay.session("bob", worker=0)
        session.sock.close()
        for worker in (0, 1):
            session = relay.session("alice", 'ID ("name" "mutt")', "SELECT INBOX", worker=worker)
            session.put("INBOX", "mine")
            session.sock.close()
        wrong = relay.connect()
        wrong.greeting()
        assert wrong.command("LOGIN ally@local.example wrong").status == "NO"
        wrong.sock.close()
        wait_for(lambda: len(relay.events("session")) == 3 and len(relay.events("login")) == 4, what="the log")

        rows = wait_for(lambda: (found := history(relay, "alice")) and len(found) == 15 and found, what="the history")
        mail = [row["recipients"] for row in rows if row["event"] == "delivered"]
        names = ("alice", "ally", "team", "alice+shop")
        assert sorted(mail) == sorted([f"{name}@local.example"] for name in names)
        kinds = [row["event"] for row in rows]
        assert {kind: kinds.count(kind) for kind in kinds} == {"delivered": 4, "sieve": 4, "login": 3, "changed": 2, "session": 2}
        assert [row["good"] for row in rows if row["event"] == "login"] == [True, True, False]
        assert {row["worker"] for row in rows if row["event"] == "session"} == {0, 1}
        assert [row["ts"] for row in rows] == sorted(row["ts"] for row in rows)
        logged = [json.loads(line) for line in relay.log.read_text().splitlines()]
        assert all(row in logged for row in rows)

        assert history(relay, "ally") == rows  # by any address
        assert {row["event"] for row in history(relay, "bob")} == {"delivered", "login", "session"}
        assert history(relay, "alice", "--since", "1h") == rows
        shown = relay.cli("mailbox", "history", "alice@local.example").stdout.splitlines()
        assert len(shown) == 15
        for text in (
            "append of 1 message: INBOX (imap from 127.0.0.1)", "imap from 127.0.0.1, mutt: 0s, 2 commands",
            "as ally@local.example from 127.0.0.1: 535", "to <team@local.example>: 250",
        ):  # fmt: skip
            assert any(text in line for line in shown), (text, shown)
        relay.user("carol")
        found = relay.cli("mailbox", "history", "carol@local.example")
        assert (found.stdout, found.stderr) == ("", "there is nothing about carol@local.example in the history\n")
        for words, status, sentence in (
            (["alicia@local.example"], 1, 'did you mean "alice@local.example"?'),
            (["team@local.example"], 1, "it is an alias of"),
            (["alice@local.example", "--since", "soon"], 64, "--since soon: expected"),
            (["alice@local.example", "--since", ""], 64, "--since: it is empty"),
            ([""], 64, "ADDRESS: it is empty"),
        ):
            found = relay.cli("mailbox", "history", *words, check=False)
            assert (found.returncode, found.stdout) == (status, "") and sentence in found.stderr, found
        assert relay.stop() == 0
        assert history(relay, "alice") == rows  # the relay need not run
        assert PASSWORD not in relay.cli("mailbox", "history", "alice@local.example").stdout


def test_the_history_can_be_off(tmp_path):
    with ImapRelay(tmp_path, "log.history=0", workers=1) as relay:
        relay.user("alice")
        relay.session("alice").sock.close()
        wait_for(lambda: relay.events("session"), what="the end of the session")
        assert history(relay, "alice") == [] and not (relay.spool / "history").exists()
