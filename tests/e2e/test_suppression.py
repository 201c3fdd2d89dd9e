"""The suppression list of a running relay: as docs/suppression.md has it."""

import contextlib
import json
import os
import shutil
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relaymta import control
from tests.e2e.test_rules import Reloading
from tests.proto.test_arf import REPORT
from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need
from tests.suppression.test_entries import WRITER, started

ON = "suppression.enabled=true"
REFUSED = {
    "bad@d.example": b"550 5.1.1 <bad@d.example>: Recipient address rejected: User unknown\r\n",
    "policy@d.example": b"550 5.7.1 Blocked, see https://x.example\r\n",
    "full@d.example": b"552 5.2.2 Mailbox full\r\n",
}


@pytest.fixture(scope="module")
def peer() -> Iterator[FakeMx]:
    with FakeMx({"RCPT": REFUSED}) as made:
        yield made


@pytest.fixture
def relay(peer: FakeMx, tmp_path: Path) -> Iterator[Relay]:
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", ON, "intake.errors=1000", "intake.tarpit=0", workers=2) as made:
        yield made


def listed(relay: Relay, *options: str) -> dict[str, dict]:
    rows = [json.loads(line) for line in relay.cli("suppression", "list", "--json", *options).stdout.splitlines()]
    return {row["address"]: row for row in rows}


@contextlib.contextmanager
def of_each_worker(relay: Relay) -> Iterator[dict[int, smtplib.SMTP]]:
    """A connection to each of two workers, which the log tells apart: each refuses somebody."""
    found: dict[int, smtplib.SMTP] = {}
    with contextlib.ExitStack() as open_ones:
        while len(found) < 2:
            client = open_ones.enter_context(smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE))
            client.ehlo()
            client.mail("a@b.example")
            name = f"probe-{len(relay.events('rejected'))}-{id(client)}@d.example"
            relay.cli("suppression", "add", name)
            assert client.rcpt(name)[0] == 550
            told = wait_for(lambda name=name: [one for one in relay.events("rejected") if name in one["recipients"]])
            found.setdefault(told[0]["worker"], client)
        yield found


def test_all_workers_know_a_change_with_the_next_recipient(relay):
    with of_each_worker(relay) as clients:
        for n in range(3):
            address = f"u{n}@d.example"
            assert [client.rcpt(address)[0] for client in clients.values()] == [250, 250]
            relay.cli("suppression", "add", address, "--reason", "unsubscribe", "--note", "by letter")
            for client in clients.values():
                code, text = client.rcpt(address.upper())
                assert (code, text[:35]) == (550, f"5.1.8 <{address.upper()}>: suppressed: unsubscribed"[:35].encode())
                assert text.endswith(b" (by letter)")
            relay.cli("suppression", "remove", address)
            assert [client.rcpt(address)[0] for client in clients.values()] == [250, 250]
        relay.cli("suppression", "add", "short@d.example", "--expires", "1s")
        wait_for(lambda: [client.rcpt("short@d.example")[0] for client in clients.values()] == [250, 250])
    assert relay.metric('relaymta_suppressed_total{reason="unsubscribe"}') == 6
    relay.cli("suppression", "add", "x1@d.example", "x2@d.example")
    assert relay.events("audit")[-1]["count"] == 2
    audits = [(one["action"], one["count"], one["about"]) for one in relay.events("audit") if "u1@d" in one["about"]]
    assert audits == [
        ("suppression add", 1, "addresses=['u1@d.example']"), ("suppression remove", 1, "addresses=['u1@d.example']"),
    ]  # fmt: skip


def test_a_hard_bounce_is_refused_from_then_on_and_other_failures_are_not(relay):
    relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", *REFUSED)
    wait_for(lambda: len(relay.events("bounced")) == 3)
    wait_for(lambda: listed(relay))
    assert list(listed(relay)) == ["bad@d.example"]
    row = listed(relay)["bad@d.example"]
    assert (row["reason"], row["by"], row["text"]) == (
        "hard-bounce", "relay", "550 5.1.1 <>: Recipient address rejected: User unknown",
    )  # fmt: skip
    assert row["until"] - row["since"] == 180 * 86400
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "bad@d.example")
    ((code, text),) = refused.value.recipients.values()
    assert code == 550 and text.startswith(b"5.1.8 <bad@d.example>: suppressed: hard bounce 20")
    assert text.endswith(b" (550 5.1.1 <>: Recipient address rejected: User unknown)")
    relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "policy@d.example", "full@d.example")
    with smtplib.SMTP("127.0.0.1", relay.port) as client:
        client.ehlo()
        client.mail("")
        assert client.rcpt("bad@d.example")[0] == 250, "a DSN could not be returned"
    sample = 'relaymta_suppression_entries{reason="hard-bounce"}'
    wait_for(lambda: relay.metric(sample) == 1)


def test_a_refusal_of_a_message_for_several_says_not_who_is_meant(tmp_path):
    with FakeMx({"DOT": b"550 5.1.1 one of them is unknown\r\n"}) as refusing:
        with Relay(tmp_path, f"127.0.0.1:{refusing.port}", ON) as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "one@d.example", "two@d.example")
            wait_for(lambda: {"one@d.example", "two@d.example"} <= {one["recipient"] for one in relay.events("bounced")})
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "alone@d.example")
            wait_for(lambda: listed(relay))
            assert list(listed(relay)) == ["alone@d.example"]


def test_dsns_and_our_own_addresses_are_not_added(peer, tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", ON, 'relay.domains=["d.example"]') as relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "bad@d.example")
        wait_for(lambda: relay.events("bounced"))
        time.sleep(2)  # a bounce is in the list by then
        assert listed(relay) == {}
    (tmp_path / "other").mkdir()
    with Relay(tmp_path / "other", f"127.0.0.1:{peer.port}", ON) as relay:
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.sendmail("", ["bad@d.example"], "Subject: x\r\n\r\nx\r\n")
        wait_for(lambda: relay.events("bounced"))
        time.sleep(2)
        assert listed(relay) == {}
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "bad@d.example")
        wait_for(lambda: list(listed(relay)) == ["bad@d.example"], what="the entry")


def test_csv_there_and_back_with_wrong_lines(relay, tmp_path):
    file = tmp_path / "list.csv"
    file.write_bytes(
        b"\xef\xbb\xbfaddress,text,reason,until\r\n"
        b'"""q, x""@d.example","a, ""b"" c",complaint,2099-01-01\r\n'
        b'ann,,,\r\nok@d.example,,,\r\nx@d.example,,nonsense,\r\n"x"y,\r\n'
    )
    done = relay.cli("suppression", "import", str(file), "--app", "shop", "--json", check=False)
    assert done.returncode == 65 and json.loads(done.stdout) == {"added": 2, "replaced": 0, "left_out": 0, "wrong": 3}
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == [f"{file}:{n}" for n in (3, 5, 6)]
    first = relay.cli("suppression", "export").stdout
    relay.cli("suppression", "export", str(tmp_path / "out.csv"))
    before = listed(relay)
    assert before['"q, x"@d.example']["text"] == 'a, "b" c' and before["ok@d.example"]["application"] == "shop"
    assert relay.cli("suppression", "remove", *before).stdout == "2 entries were removed\n" and not listed(relay)
    assert relay.cli("suppression", "import", str(tmp_path / "out.csv")).stdout == "2 entries were added, 0 replaced\n"
    assert listed(relay) == before and relay.cli("suppression", "export").stdout == first


def test_complaints_and_what_is_not_there(relay, tmp_path):
    (tmp_path / "report.eml").write_bytes(REPORT)
    relay.cli("suppression", "complaint", "--arf", str(tmp_path / "report.eml"))
    relay.cli("suppression", "complaint", "ann@d.example")
    relay.cli("suppression", "add", "hard@d.example", "--reason", "hard-bounce")
    hard = listed(relay, "--reason", "hard-bounce")["hard@d.example"]
    assert hard["until"] - hard["since"] == 180 * 86400, "as configured"
    rows = listed(relay, "--reason", "complaint")
    assert not any(row["until"] for row in rows.values())
    assert list(rows) == ["ann@d.example", "other@example.com", "user@example.com"]
    assert rows["user@example.com"]["text"] == "abuse, by SomeGenerator/1.0"
    assert list(listed(relay, "--prefix", "USER@")) == ["user@example.com"] and not listed(relay, "--app", "shop")
    (tmp_path / "report.eml").write_bytes(REPORT.replace(b"ABUSE", b"not-spam"))
    for words, status in (
        (("complaint", "--arf", str(tmp_path / "report.eml")), 65), (("complaint", "--arf", "/dev/null"), 65),
        (("complaint",), 64),
        (("show", "z@d.example"), 1), (("remove", "z@d.example"), 1), (("add", "z"), 64), (("import", "/no/such"), 74),
        (("list", "--app", "x", "--all-mail"), 64),
    ):  # fmt: skip
        assert relay.cli("suppression", *words, check=False).returncode == status, words


def test_with_the_relay_stopped_the_list_is_read_and_changed(relay):
    assert relay.stop() == 0
    shutil.rmtree(relay.spool / "suppression")
    assert listed(relay) == {} and json.loads(relay.cli("suppression", "stats", "--json").stdout)["entries"] == 0
    assert relay.cli("suppression", "show", "a@d.example", check=False).returncode == 1
    assert relay.cli("suppression", "remove", "a@d.example", check=False).returncode == 1
    assert not (relay.spool / "suppression").exists(), "reading makes nothing"
    relay.start()
    relay.cli("suppression", "add", "a@d.example")
    assert relay.stop() == 0
    assert relay.cli("suppression", "add", "c@d.example").stdout == "1 entry was added, 0 replaced\n"
    assert relay.cli("suppression", "remove", "a@d.example").stdout == "1 entry was removed\n"
    assert list(listed(relay)) == ["c@d.example"]
    assert json.loads(relay.cli("suppression", "stats", "--json").stdout)["entries"] == 1
    with relay:
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "c@d.example")


def test_a_list_that_is_moved_away_or_replaced_while_the_relay_runs(relay):
    relay.cli("suppression", "add", "a@d.example")
    shutil.copytree(relay.spool / "suppression", relay.spool / "copy")
    relay.cli("suppression", "add", "c@d.example")

    def refused(address: str) -> bool:
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.ehlo()
            client.mail("a@b.example")
            return client.rcpt(address)[0] == 550

    assert refused("a@d.example") and refused("c@d.example")
    os.rename(relay.spool / "suppression", relay.spool / "old")
    os.rename(relay.spool / "copy", relay.spool / "suppression")
    wait_for(lambda: not any(refused("c@d.example") for _ in range(8)))
    assert refused("a@d.example") and list(listed(relay)) == ["a@d.example"]
    os.rename(relay.spool / "suppression", relay.spool / "older")
    wait_for(lambda: not any(refused("a@d.example") for _ in range(8)))
    wait_for(lambda: (relay.spool / "suppression" / "data.mdb").exists())  # the supervisor has made a new one
    relay.cli("suppression", "add", "d@d.example")
    wait_for(lambda: all(refused("d@d.example") for _ in range(8)))


def test_another_writer_that_is_killed_in_the_middle_keeps_nobody_waiting(relay):
    with started(WRITER, relay.spool / "suppression") as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "in the middle\n"
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "ok@d.example")  # readers do not wait
        command = [sys.executable, "-m", "relaymta", "suppression", "add", "after@d.example", "--spool", str(relay.spool)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as adding:
            assert relay.cli("status").returncode == 0, "nor does the supervisor, but for that one request"
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
            assert adding.communicate(timeout=PATIENCE)[0] == "1 entry was added, 0 replaced\n"
    assert set(listed(relay)) == {"after@d.example", "before@b.example"}


def test_another_writer_that_is_stopped_in_the_middle_does_not_keep_the_relay_from_its_end(relay):
    with started(WRITER, relay.spool / "suppression") as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "in the middle\n"
        asked = control.begin(relay.spool / "control.sock", "suppression_put", rows=[{"address": "x@d.example"}])
        try:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "ok@d.example")
            assert relay.stop() == 0
            with pytest.raises(OSError, match="closed the connection"):
                asked()
        finally:
            writer.kill()


def test_a_list_that_is_full_is_told_and_mail_goes_on(peer, tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{peer.port}", ON, "suppression.entries=2") as relay:
        done = relay.cli("suppression", "add", *(f"u{n}@d.example" for n in range(4)), check=False)
        assert done.returncode == 69 and "2 entries were left out: the suppression list is full" in done.stderr
        assert wait_for(lambda: [one for one in relay.events("warning") if "suppression list is full" in one["text"]])
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "ok@d.example")
        assert relay.metric("relaymta_suppression_left_out_total") == 2
        assert relay.metric("relaymta_suppression_entries_most") == 2


def test_a_reload_begins_and_ends_it(peer, tmp_path):
    relay = Reloading(tmp_path, peer)
    relay.config.write_text(relay.base)
    with relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "a@d.example")
        for enabled in (True, False, True):
            relay.config.write_text(relay.base + f"[suppression]\nenabled = {str(enabled).lower()}\n")
            relay.cli("-c", str(relay.config), "reload")
            relay.cli("suppression", "add", "a@d.example")

            def refused() -> bool:
                try:
                    relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "a@d.example")
                except smtplib.SMTPRecipientsRefused:
                    return True
                return False

            wait_for(lambda wanted=enabled: all(refused() == wanted for _ in range(6)))
        # (Events that happened while it was off may be missed, which is told; not the list.)
        warnings = [one["text"] for one in relay.events("warning") if "suppression" in one["text"]]
        assert all("they are dropped" in text for text in warnings), "the list is made before it is missed"


def test_an_upgrade_keeps_it(relay):
    relay.cli("suppression", "add", "a@d.example")
    before = json.loads(relay.cli("status", "--json").stdout)["pid"]
    relay.cli("upgrade")
    assert json.loads(relay.cli("status", "--json").stdout)["pid"] != before
    relay.cli("suppression", "add", "c@d.example")
    for address in ("a@d.example", "c@d.example"):
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", address)
    relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "bad@d.example")
    wait_for(lambda: "bad@d.example" in listed(relay), what="the new program to hear of a bounce")
    assert relay.stop() == 0


def test_over_http(relay):
    def ask(method: str, path: str, body: dict | None = None) -> tuple[int, dict]:
        command = [need("curl"), "-s", "-X", method, "--unix-socket", str(relay.spool / "admin.sock"), "-w", "\n%{http_code}",
                   f"http://localhost/api/v1{path}"]  # fmt: skip
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        text, _, status = said.rpartition("\n")
        return int(status), json.loads(text)

    many = [f"u{n}@d.example" for n in range(5)]
    wait_for(lambda: (relay.spool / "admin.sock").exists())
    assert ask("POST", "/suppressions", {"addresses": many, "app": "shop", "seconds": 60})[1] == {
        "added": 5, "replaced": 0, "missing": [],
    }  # fmt: skip
    found, cursor = [], ""
    while True:
        status, page = ask("GET", f"/suppressions?limit=2&app=shop&cursor={cursor}")
        assert status == 200 and len(page["suppressions"]) <= 2
        found += [row["address"] for row in page["suppressions"]]
        cursor = page["next"]
        if not cursor:
            break
    assert found == many
    status, one = ask("GET", "/suppressions/U1@d.example")
    assert status == 200 and one["suppressions"][0]["application"] == "shop" and "uid" in one["suppressions"][0]["by"]
    assert ask("GET", "/suppressions/stats")[1]["entries"] == 5
    assert ask("POST", "/suppressions/remove", {"addresses": ["u1@d.example"], "all_mail": True})[0] == 404
    assert ask("POST", "/suppressions/remove", {"addresses": ["u1@d.example", "z@d.example"]}) == (
        200,
        {"changed": 1, "missing": []},
    )
    assert ask("GET", "/suppressions/u1@d.example")[0] == 404
    assert ask("POST", "/suppressions", {"addresses": ["nobody"]})[0] == 400
    assert ask("GET", "/suppressions?cursor=%FF")[0] == 400
