"""A running relay from outside: mail through it, its replies, its CLI, its metrics."""

import hashlib
import json
import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from click.testing import CliRunner

from relaymta.cli import main
from tests.support.daemon import Relay, dialog, free_port, wait_for
from tests.support.programs import need


def test_a_message_passes_with_its_trace_and_is_counted(relay, ledger):
    relay.send("X-Ledger: one\r\nSubject: hi\r\n\r\n.dots\r\nbody\r\n")
    wait_for(lambda: ledger.taken, what="the message")
    ident, digest, to = ledger.taken[0]
    assert ident == "one"
    assert digest == hashlib.sha256(b".dots\r\nbody\r\n").hexdigest()
    assert to == ["c@d.example"]
    (queued,) = wait_for(lambda: relay.events("queued"))
    (delivered,) = wait_for(lambda: relay.events("delivered"))
    assert queued["id"] == delivered["id"]
    assert delivered["reply"] == "250 2.0.0 taken"
    wait_for(lambda: relay.summary() == [], what="an empty queue")
    # The metrics are what Prometheus wants.
    wait_for(lambda: relay.metric('relaymta_recipients_total{result="delivered"}') == 1)
    text = urllib.request.urlopen(f"http://127.0.0.1:{relay.metrics_port}/metrics", timeout=10).read()
    assert b"relaymta_messages_received_total 1.0" in text
    assert b'relaymta_recipients_total{result="delivered"} 1.0' in text
    assert relay.monitored("/health") == (200, "ok\n") and relay.unready() == []
    done = subprocess.run([need("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_large_and_chunked_messages_arrive_whole(relay, ledger):
    body = b"".join(b"%07d\r\n" % i for i in range(400_000))
    data = b"X-Ledger: big\r\n\r\n" + body
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=60) as client:
        client.sendmail("a@b", ["c@d"], data)
        client.docmd("MAIL FROM:<a@b>")
        client.docmd("RCPT TO:<c@d>")
        half = len(data) // 2
        client.send(b"BDAT %d\r\n" % half + data[:half])
        assert client.getreply()[0] == 250
        client.send(b"BDAT %d LAST\r\n" % (len(data) - half) + data[half:])
        assert client.getreply()[0] == 250
        small = b"X-Ledger: chunk\r\n\r\n.x"
        client.docmd("MAIL FROM:<a@b>")
        client.docmd("RCPT TO:<c@d>")
        client.send(b"BDAT %d LAST\r\n" % len(small) + small)
        assert client.getreply()[0] == 250
    wait_for(lambda: len(ledger.taken) == 3, 30, "three messages")
    digests = {ident: digest for ident, digest, _ in ledger.taken}
    assert ledger.counts() == {"big": 2, "chunk": 1}
    assert digests["big"] == hashlib.sha256(body).hexdigest()
    assert digests["chunk"] == hashlib.sha256(b".x\r\n").hexdigest()
    wait_for(lambda: relay.summary() == [])
    assert not list((relay.spool / "shard-0/bodies/big").iterdir()), "files of delivered bodies are removed"


def test_rejections_have_the_right_replies(tmp_path, ledger):
    settings = ["relay.networks=[]", 'relay.domains=["ours.example"]', "limits.message_size=2000"]
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", *settings) as relay:
        replies = dialog(
            relay.port,
            b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@theirs.example>\r\n"
            b"RCPT TO:<c@ours.example>\r\nRCPT TO:<postmaster>\r\nQUIT\r\n",
        )
        assert b"550 5.7.1" in replies
        assert b"550 5.1.1" in replies
        assert replies.count(b"250 2.1.5") == 1
        replies = dialog(
            relay.port, b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@ours.example>\r\nDATA\r\n", b"x" * 3000 + b"\r\n.\r\nQUIT\r\n"
        )
        assert b"SIZE 2000" in replies
        assert b"552 5.3.4" in replies
        loop = b"Received: x\r\n" * 51 + b"\r\nx\r\n.\r\n"
        replies = dialog(relay.port, b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@ours.example>\r\nDATA\r\n", loop)
        assert b"554 5.4.6" in replies
    assert ledger.taken == []


def test_swaks_agrees(relay, ledger):
    swaks = need("swaks")
    done = subprocess.run(
        [swaks, "--server", f"127.0.0.1:{relay.port}", "--from", "a@b.example", "--to", "c@d.example,e@f.example",
         "--header", "X-Ledger: swaks", "--pipeline"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    wait_for(lambda: ledger.counts()["swaks"] == 1, what="swaks' message")
    assert ledger.taken[0][2] == ["c@d.example", "e@f.example"]


def test_failed_recipients_are_reported_to_the_sender_in_a_dsn(tmp_path, ledger):
    from tests.support.fake_mx import FakeMx

    refuse = {"RCPT": {"gone@d.example": b"550 5.1.1 no such user\r\n"}}
    with FakeMx(refuse) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        relay.send("X-Ledger: half\r\nSubject: mine\r\n\r\nx\r\n", "me@b.example", "gone@d.example", "here@d.example")
        wait_for(lambda: len(peer.messages) == 2, what="the message and the DSN")
        dsn = next(data for sender, _, data in peer.messages if sender == "")
        assert b"To: <me@b.example>" in dsn
        assert b"Final-Recipient: rfc822; gone@d.example\r\nAction: failed\r\nStatus: 5.1.1" in dsn
        assert b"Diagnostic-Code: smtp; 550 5.1.1 no such user" in dsn
        assert b"Subject: mine" in dsn
        assert b"here@d.example" not in dsn
        peer.rules["RCPT"]["gone@d.example"] = b"550 5.1.1 no\r\n"
        relay.send("Subject: null\r\n\r\nx\r\n", "", "gone@d.example")
        wait_for(lambda: any(e["dsn"] == "" for e in relay.events("bounced")), what="the bounce of null-sender mail")
        time.sleep(0.3)
        assert len(peer.messages) == 2, "no DSN for mail with the null sender"
        wait_for(lambda: relay.summary() == [])


def test_an_outage_counts_as_one_failure_and_the_queue_sleeps(tmp_path):
    port = free_port()
    with Relay(tmp_path, f"127.0.0.1:{port}", "delivery.first_retry=3600") as relay:
        for _ in range(20):
            relay.send()
        wait_for(lambda: relay.events("deferred"), what="the first failure")
        time.sleep(0.5)
        assert len(relay.events("deferred")) == 1, "the failure of one message is enough to mark the site as down"
        (row,) = relay.summary()
        assert (row["messages"], row["deferred"], row["parked"]) == (20, 1, True)
        listed = [json.loads(line) for line in relay.cli("queue", "list", "--json").stdout.splitlines()]
        assert len(listed) == 20
        assert all(row["next"] > time.time() + 3000 for row in listed), "none before its site is tried again"
        tried = next(r for r in listed if r["attempts"])
        shown = json.loads(relay.cli("message", "show", tried["id"], "--json").stdout)
        assert shown["recipients"][0]["attempts"][0]["phase"] == "connect"
        assert b"Received: from" in subprocess.run(
            [sys.executable, "-m", "relaymta", "message", "raw", tried["id"], "--spool", str(relay.spool)],
            capture_output=True, check=True,
        ).stdout  # fmt: skip
        assert "20 messages" in relay.cli("queue", "delete", "--all", "--dry-run").stdout
        relay.cli("queue", "hold", listed[0]["id"])
        assert relay.summary()[0]["held"] == 1
        relay.cli("queue", "release", "--held")
        assert relay.summary()[0]["held"] == 0
        assert relay.cli("queue", "flush", check=False).returncode == 64
        unknown = relay.cli("message", "show", "0000000000000", check=False)
        assert unknown.returncode == 1 and "no such message" in unknown.stderr
        assert relay.stop() == 0
        offline = [json.loads(line) for line in relay.cli("queue", "list", "--json").stdout.splitlines()]
        assert {r["id"] for r in offline} == {r["id"] for r in listed}
        assert relay.cli("queue", "delete", "--all").stdout.startswith("delete: ")
        assert not relay.cli("queue", "list", "--json").stdout


def test_flush_delivers_at_once_when_the_site_is_back(tmp_path, ledger):
    port = free_port()
    with Relay(
        tmp_path, f"127.0.0.1:{port}", f'route=[{{hosts=["127.0.0.1:{port}","127.0.0.1:{port}"]}}]', "delivery.first_retry=3600"
    ) as relay:
        relay.send("X-Ledger: late\r\n\r\nx\r\n")
        wait_for(lambda: relay.events("deferred"))
        from tests.support.fake_mx import FakeMx

        with FakeMx({}, port) as peer:
            relay.cli("queue", "flush", "--all")
            wait_for(lambda: peer.messages, what="the flushed message")
            wait_for(lambda: relay.summary() == [])


def test_a_busy_port_and_a_busy_spool_are_reported(relay, tmp_path):
    command = relay.command()
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (75, f"{relay.spool}/shard-0 is in use by another relaymta\n")
    elsewhere = [part.replace(str(relay.spool), str(tmp_path / "spool2")) for part in command]
    done = subprocess.run(elsewhere, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 78
    assert re.fullmatch(r"listener.address: 127.0.0.1:\d+: another program listens on this port; .*\n", done.stderr)
    other = [
        part.replace(str(relay.port), str(free_port())).replace(str(relay.metrics_port), str(free_port())) for part in command
    ]
    done = subprocess.run(other, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 75
    assert "another relaymta" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[listener]]\nadress = "127.0.0.1:1"\n', 'r.toml:2: listener.0.adress: no such key (did you mean "address"?)'),
        ("workers = 2000\n", "r.toml:1: workers:"),
        ("[relay\n", "r.toml:1: "),
        ('[[listener]]\naddress = "127.0.0.1:25"\n[relay]\nnetworks = ["0.0.0.0/0"]\n', "open relay"),
        (
            '[[listener]]\naddress = "127.0.0.1:25"\ntls = "require"\n',
            "r.toml:3: listener.0.tls: 'require' needs a [[certificate]]",
        ),
        ('[[listener]]\naddress = "127.0.0.1:25"\n[verify]\ndmarc = "enforce"\n', ":4: verify.dmarc: 'enforce' needs"),
        ('[[listener]]\naddress = "x"\n[queue]\nmax_age = "5 lightyears"\n', "r.toml:4: queue.max_age: a duration such as"),
        ('[[listener]]\naddress = "x"\n[queue]\nmax_age = "999999999999d"\n', "r.toml:4: queue.max_age: a duration of at most"),
        ('[[listener]]\naddress = "127.0.0.1:25"\n' * 2, "r.toml:4: listener.1.address: two listeners have"),
        ('[[route]]\nhosts = ["a b"]\n', "r.toml:2: route.0.hosts.0: 'a b': it has white space in it"),
        ('[metrics]\nlisten = "x"\n', "r.toml:2: metrics.listen: 'x': expected host:port"),
        ('[[listener]]\naddress = "x"\n[queue]\nmax_age = inf\n', "r.toml:4: queue.max_age: a duration of at most"),
    ],
)
def test_problems_of_the_configuration_name_the_place(tmp_path, text, expected):
    path = tmp_path / "r.toml"
    path.write_text(text)
    done = CliRunner().invoke(main, ["config", "check", "-c", str(path)])
    assert isinstance(done.exception, SystemExit) and done.exit_code == 78
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_probable_mistakes_in_the_configuration_give_a_warning(tmp_path, ledger):
    more = ("config", "check", "--set", 'listener=[{address="127.0.0.1:1"}]', "--set", 'relay.domains=["ours.example"]')
    assert "backscatter risk" in Relay(tmp_path, None).cli(*more).stdout
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", 'relay.domains=["ours.example"]') as relay:
        assert any("backscatter risk" in event["text"] for event in relay.events("warning"))


def test_reload_applies_new_limits_and_refuses_an_invalid_file(tmp_path, ledger):
    path = tmp_path / "r.toml"
    path.write_text("[limits]\nmessage_size = 1000\n")
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}")
    plain = relay.command
    relay.command = lambda: [*plain(), "-c", str(path)]  # type: ignore[method-assign]
    with relay:
        assert b"SIZE 1000" in dialog(relay.port, b"EHLO x\r\nQUIT\r\n")
        path.write_text("[limits]\nmessage_size = 2000\n")
        assert relay.cli("reload").stdout.startswith("reloaded")
        assert b"SIZE 2000" in dialog(relay.port, b"EHLO x\r\nQUIT\r\n")
        path.write_text("[limits]\nmessage_sise = 2000\n")
        done = relay.cli("reload", check=False)
        assert done.returncode == 78
        assert "did you mean" in done.stdout
        assert b"SIZE 2000" in dialog(relay.port, b"EHLO x\r\nQUIT\r\n")


def test_a_client_that_sends_before_the_greeting_is_disconnected(relay):
    worker = relay.worker_pids()[0]
    os.kill(worker, signal.SIGSTOP)  # so that the octets arrive before the greeting
    try:
        with socket.create_connection(("127.0.0.1", relay.port), 10) as sock:
            sock.settimeout(10)
            sock.sendall(b"EHLO early\r\n")
            time.sleep(0.1)
            os.kill(worker, signal.SIGCONT)
            assert sock.recv(200).startswith(b"554 5.5.1")
    finally:
        os.kill(worker, signal.SIGCONT)
    relay.send()


def test_a_stopped_listing_does_not_make_the_database_grow(tmp_path, ledger):
    """Its output is not read (Ctrl-Z, or a pager): it keeps no transaction open."""
    dead = f'{{recipient_domain=["dead.example"],hosts=["127.0.0.1:{free_port()}"]}}'
    route = f'route=[{dead},{{hosts=["127.0.0.1:{ledger.port}"]}}]'
    sender = f"{'a' * 60}@{'.'.join(['b' * 60] * 3)}.example"
    with Relay(tmp_path, None, route) as relay, smtplib.SMTP("127.0.0.1", relay.port) as client:
        for _ in range(800):  # lines of some 700 octets: more than the pipe and the control socket hold
            client.sendmail(sender, [f"{'c' * 60}@dead.example"], "Subject: x\r\n\r\nx\r\n")
        command = [sys.executable, "-m", "relaymta", "queue", "list", "--json", "--spool", str(relay.spool)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as listing:
            assert listing.stdout is not None
            line = listing.stdout.readline()
            assert 800 * len(line) > 500_000
            file = relay.spool / "shard-0/lmdb/data.mdb"
            before = file.stat().st_size
            for _ in range(200):  # a commit each, of some 20 kB that an open transaction would keep from being reused
                client.sendmail("a@b.example", ["c@d.example"], "Subject: x\r\n\r\nx\r\n")
            assert file.stat().st_size - before < 1 << 20
            assert listing.poll() is None, "it is still stopped"
            listing.kill()
