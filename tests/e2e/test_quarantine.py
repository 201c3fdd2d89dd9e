"""The quarantine in the running relay: as docs/filters.md has it."""

import json
import os
import signal
import smtplib
import time
from concurrent.futures import ThreadPoolExecutor

import dkim
import pytest

from relaymta import control
from relaymta.control import Refused
from relaymta.ident import parse_id, shard_of
from tests.support.api import Api
from tests.support.clamd import EICAR, clamd
from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.milters import DkimKey
from tests.support.spamd import spamd

RULE = 'mail_rule=[{name="no invoices",header=["Subject: (?i)invoice"],verdict="hold",enforce=true}]'
INVOICE = "From: a@b.example\r\nSubject: =?utf-8?q?Your_invoice_=E2=82=AC?=\r\nMessage-ID: <%d@b.example>\r\n\r\nplease pay\r\n"


def rows(relay: Relay, *words: str) -> list[dict]:
    return [json.loads(line) for line in relay.cli("quarantine", "list", "--json", *words).stdout.splitlines()]


def post(relay: Relay, text: str, to: str = "c@d.example", sender: str = "a@b.example") -> None:
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        client.sendmail(sender, [to], text)


def test_a_filter_holds_and_an_operator_decides(tmp_path):
    with clamd() as scanner, FakeMx({}) as peer:
        virus = f'filter=[{{name="virus",type="clamd",address=["{scanner.address}"],verdicts={{FOUND="hold"}}}}]'
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus, RULE, 'relay.postmaster="pm@relay.example"', workers=2) as relay:
            text = f"From: a@b.example\r\nSubject: tools\r\n\r\n{EICAR.decode()}\r\n"
            for to in ("one@d.example", "two@d.example", "three@e.example"):
                post(relay, text, to)
            post(relay, INVOICE % 1)
            post(relay, "Subject: hello\r\n\r\nhello\r\n")
            wait_for(lambda: peer.messages)
            found = rows(relay)
            assert [one["quarantine"]["by"] for one in found] == ["filter virus"] * 3 + ["rule no invoices"]
            assert "Eicar" in found[0]["quarantine"]["reason"] and found[3]["quarantine"]["subject"] == "Your invoice €"
            assert all(2_590_000 < one["quarantine"]["until"] - one["quarantine"]["since"] < 2_593_000 for one in found)
            wait_for(lambda: relay.metric("relaymta_quarantine_messages") == 4)
            assert relay.metric("relaymta_quarantine_octets") == sum(one["size"] for one in found)
            assert len(rows(relay, "--filter", "virus")) == 3 == len(rows(relay, "--filter", "virus", "--newer", "10m"))
            assert [one["id"] for one in rows(relay, "--recipient", "three@e.example")] == [found[2]["id"]]
            shown = relay.cli("quarantine", "list").stdout
            assert "rule no invoices" in shown and "Your invoice €" in shown

            shown = relay.cli("quarantine", "show", found[0]["id"], found[3]["id"]).stdout
            assert "held by filter virus: " in shown and "  Subject: tools\n" in shown and "Subject: Your invoice €\n" in shown
            header = json.loads(relay.cli("quarantine", "show", found[3]["id"], "--json").stdout)["header"]
            assert ["Subject", "Your invoice €"] in header

            _may_not_change(relay, found[0]["id"])
            octets = relay.cli("message", "raw", found[0]["id"]).stdout.encode()
            asked = [one for one in relay.events("filtered") if one["id"] == found[0]["id"]]
            assert "1 message matches" in relay.cli("quarantine", "release", found[0]["id"], "--dry-run").stdout
            assert relay.cli("quarantine", "release", found[0]["id"]).stdout == "release: 1 of 1 messages changed\n"
            again = relay.cli("quarantine", "release", found[0]["id"], check=False)
            assert again.returncode == 1 and "no such message in the quarantine" in again.stderr
            wait_for(lambda: len(peer.messages) == 2)
            assert peer.messages[1][:2] == ("a@b.example", ["one@d.example"])
            assert peer.messages[1][2].replace(b"\r\n", b"\n").strip() == octets.strip()
            assert [one for one in relay.events("filtered") if one["id"] == found[0]["id"]] == asked, "it is not asked again"
            history = relay.cli("message", "history", found[0]["id"]).stdout
            assert "held (filter virus: " in history and "released (filter virus: " in history and "delivered" in history

            relay.cli("quarantine", "release", "--recipient", "two@d.example", "--to", "me@x.example", "--to", "you@x.example")
            wait_for(lambda: len(peer.messages) == 3)
            assert peer.messages[2][:2] == ("pm@relay.example", ["me@x.example", "you@x.example"])
            assert relay.events("quarantine")[-1]["to"] == ["me@x.example", "you@x.example"]
            for wrong in ("v@y.example>\r\nRCPT TO:<e@y.example", "nobody", "", "@", "a@"):
                chosen = {"verb": "release quarantined", "idents": [1], "shard": 0, "recipients": [wrong]}
                with pytest.raises(Refused, match="is not an address"):
                    control.ask(relay.spool / "control.sock", "change", **chosen)
            nothing = relay.cli("quarantine", "delete", check=False)
            assert nothing.returncode == 64 and "which messages?" in nothing.stderr
            done = json.loads(relay.cli("quarantine", "delete", "--filter", "virus", "--json").stdout)
            assert done == {"matched": 1, "changed": 1, "dry_run": False}
            assert [one["quarantine"]["by"] for one in rows(relay)] == ["rule no invoices"]
            assert len(peer.messages) == 3
            assert relay.metric('relaymta_quarantine_total{result="released"}') == 2
            assert relay.metric('relaymta_quarantine_total{result="deleted"}') == 1


def _may_not_change(relay: Relay, ident: str) -> None:
    """A token for the queue, and for policies, does not reach the quarantine."""
    scopes = ("--scope", "queue:write", "--scope", "policy:write")
    api = Api(relay.spool / "admin.sock", relay.cli("token", "create", "--name", "queue", *scopes).stdout.strip())
    for verb, more in (("release", {}), ("delete", {}), ("bounce", {}), ("reroute", {"route_to": "smarthost"})):
        for which in ({"all": True}, {"ids": [ident]}, {"queue": rows(relay)[0]["queues"][0]}):
            status, said = api.post(f"/queue/{verb}", **which, **more)
            assert (status, said.get("matched")) == (200, 0), (verb, which, said)
    status, said = api.post("/policies", kind="bounce", from_="a@b.example", seconds=1)
    assert (status, said["matched"]) == (200, 0), said
    assert api.post("/policies/remove", kind="bounce", about="sender=a@b.example")[0] == 200
    assert len(rows(relay)) == 4


def test_bulk_verbs_reach_every_page_of_both_workers_and_nothing_else(tmp_path):
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", RULE, "mailboxes={}", workers=2) as relay:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda part: _many(relay, part), range(8)))
            assert len(rows(relay)) == 2400
            relay.cli("queue", "hold", "--all")  # what is held already stays what it is
            post(relay, INVOICE % 0, "late@d.example")
            done = json.loads(relay.cli("quarantine", "release", "--domain", "even.example", "--json").stdout)
            assert done == {"matched": 1200, "changed": 1200, "dry_run": False}
            wait_for(lambda: len(peer.messages) == 1200, 60)
            assert {to for _, (to,), _ in peer.messages} == {f"{n}@even.example" for n in range(0, 2400, 2)}
            done = json.loads(relay.cli("quarantine", "delete", "--all", "--json").stdout)
            assert done["changed"] == 1201 and rows(relay) == [] and relay.summary() == []


def _many(relay: Relay, part: int) -> None:
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        for n in range(part, 2400, 8):
            client.sendmail("a@b.example", [f"{n}@{'odd' if n % 2 else 'even'}.example"], INVOICE % n)


def test_the_bounds_are_the_machines_and_hold_after_a_kill(tmp_path):
    """Some 280 octets a message: 40 of them fit, whichever worker took them."""
    settings = (RULE, 'quarantine.octets="11KB"')
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings, workers=2) as relay:
            for n in range(100):
                post(relay, INVOICE % n)
            wait_for(lambda: sum(one["size"] for one in rows(relay)) <= 11 * 1024)
            found = rows(relay)
            sizes = [one["size"] for one in found]
            assert 11 * 1024 - 3 * max(sizes) < sum(sizes) <= 11 * 1024, "no more than had to go"
            for shard in (0, 1):
                every, left = (
                    [one["id"] for one in some if shard_of(parse_id(one["id"])) == shard]
                    for some in (relay.events("queued"), found)
                )
                assert left and left == every[-len(left) :], "the oldest go"
            gone = [one for one in relay.events("quarantine") if one["result"] == "displaced"]
            assert len(gone) == 100 - len(found) and not {one["id"] for one in gone} & {one["id"] for one in found}
            assert relay.metric('relaymta_quarantine_total{result="displaced"}') == len(gone)
            assert relay.summary()[0]["held"] == len(found) and not relay.events("bounced")

            def workers() -> list[dict]:
                return json.loads(relay.cli("status", "--json").stdout)["workers"]

            os.kill(workers()[0]["pid"], signal.SIGKILL)
            wait_for(lambda: all(one["ready"] for one in workers()))
            assert [one["id"] for one in rows(relay)] == [one["id"] for one in found]
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", RULE, 'quarantine.keep="60s"', workers=1) as relay:
            for one in rows(relay):
                left = one["quarantine"]["until"] - time.time()
                assert -1 < left < 61
            assert not peer.messages


def test_filters_learn_each_text_once_from_the_quarantine_and_from_files(tmp_path):
    with spamd() as address, FakeMx({}) as peer:
        settings = (RULE, f'filter=[{{name="sa",type="spamd",address=["{address}"],clients="unauthenticated"}}]')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings, workers=2) as relay:
            texts = [INVOICE % n + f"buy number {n} now\r\n" * 20 for n in range(3)]
            for text in texts:
                post(relay, text)
            file = tmp_path / "copy.eml"
            file.write_text("Received: by elsewhere\n" + texts[0].replace("\r\n", "\n"))

            def taught(*words: str) -> dict[str, str]:
                done = relay.cli(*words, "--json", *(f"--set={one}" for one in settings), check=False)
                assert done.returncode == 0, done.stderr
                return {row["message"]: row["done"] for row in map(json.loads, done.stdout.splitlines())}

            ids = [one["id"] for one in rows(relay)]
            dry = relay.cli("quarantine", "learn", "spam", "--all", "--dry-run", *(f"--set={one}" for one in settings)).stdout
            assert dry == "3 messages match\n"
            assert taught("quarantine", "learn", "spam", *ids[:2]) == dict.fromkeys(ids[:2], "learned")
            assert taught("filter", "learn", "spam", str(file)) == {str(file): "known already"}
            assert taught("quarantine", "learn", "spam", "--all") == dict(
                zip(ids, ["known already"] * 2 + ["learned"], strict=True)
            )
            assert len(rows(relay)) == 3, "they stay"
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings, workers=1) as relay:
            assert taught("quarantine", "learn", "spam", "--all") == dict.fromkeys(ids, "known already")
            assert taught("quarantine", "learn", "ham", ids[0]) == {ids[0]: "learned"}


def test_mail_that_is_released_without_a_filter_is_signed_all_the_same(tmp_path):
    key = DkimKey(tmp_path)
    key.path.chmod(0o600)
    settings = (
        RULE, f'dkim=[{{domain="b.example",selector="s",key="{key.path}"}}]',
        'filter=[{name="virus",type="clamd",address=["127.0.0.1:1"]}]',
    )  # fmt: skip
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings) as relay:
        for to in ([], ["--to", "me@x.example"]):
            post(relay, INVOICE % 1)
            (one,) = rows(relay)
            assert one["unseen"] == ["virus"]
            told = relay.cli("quarantine", "release", one["id"], "--dry-run")
            assert told.stderr.startswith("note: 1 of them waits for other filters first")
            relay.cli("quarantine", "release", one["id"], "--unscanned", *to)
            wait_for(lambda: peer.messages)
            assert dkim.verify(peer.messages.pop()[2], dnsfunc=lambda name, timeout=5: key.record.encode())
