"""Filters that judge before there is a message, in the running relay: policy services, lists in the DNS, greylisting."""

import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.test_filters import logged
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.policies import policyd_spf, postgrey
from tests.support.resolver import nameserver_with

OUTSIDE = ("relay.networks=[]", 'relay.domains=["d.example"]', 'network=[{networks=["127.0.0.1/32"], xclient=true}]')
TEXT = "Subject: x\r\n\r\nhello\r\n"
LISTED, WELCOME = "203.0.113.9", "203.0.113.10"


def table(**keys: object) -> str:
    """A setting: one filter."""
    return "filter=[" + _toml(keys) + "]"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


@contextmanager
def client(relay: Relay, address: str = WELCOME, helo: str = "client.example") -> Iterator[smtplib.SMTP]:
    """A session of a client at an address."""
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as smtp:
        smtp.ehlo()
        assert smtp.docmd(f"XCLIENT ADDR={'IPV6:' if ':' in address else ''}{address}")[0] == 220
        smtp.ehlo(helo)
        yield smtp


def replies(
    relay: Relay, address: str = WELCOME, to: Sequence[str] = ("c@d.example",), sender: str = "a@b.example", text: str = TEXT
) -> list[str]:
    """What a client is told: to MAIL, each RCPT, DATA and the message, up to a refusal of all of it."""
    with client(relay, address) as smtp:
        return said(smtp, to, sender, text)


def said(smtp: smtplib.SMTP, to: Sequence[str] = ("c@d.example",), sender: str = "a@b.example", text: str = TEXT) -> list[str]:
    found = [smtp.docmd(f"MAIL FROM:<{sender}>")]
    found += [smtp.docmd(f"RCPT TO:<{address}>") for address in to]
    if any(code == 250 for code, _ in found[1:]):
        found.append(smtp.docmd("DATA"))
        if found[-1][0] == 354:
            smtp.send(text.encode() + b".\r\n")
            found.append(smtp.getreply())
    smtp.docmd("RSET")
    return [f"{code} {line.decode()}" for code, line in found]


# Lists in the DNS


def refusals(relay: Relay, count: int) -> list[str]:
    """The warnings about lists that refuse us, once there are so many."""

    def found() -> list[str]:
        return [event["text"] for event in relay.events("warning") if "refuses us" in event["text"]]

    wait_for(lambda: len(found()) >= count)
    return found()


def test_only_clients_that_lists_name_are_refused_and_a_list_that_refuses_us_refuses_nobody(tmp_path):
    """Also case 10: codes by which a list says that it does not answer; of ten lists one refuses us, one lies, one is silent."""
    reverse = "9.113.0.203"
    records = [
        f"{reverse}.bl.test. A 127.0.0.4", f"{reverse}.half.test. A 127.0.0.2", f"{reverse}.other.test. A 127.0.0.9",
        "10.113.0.203.refusing.test. A 127.255.255.254", "11.113.0.203.lying.test. A 203.0.113.9",
        "12.113.0.203.bl.test. A 127.0.0.4", "12.113.0.203.good.test. A 127.0.9.1", "13.113.0.203.a.test. A 127.0.0.1",
        f"{'1.' + '0.' * 23 + '8.b.d.0.1.0.0.2'}.bl.test. A 127.0.0.2", "spam.example.domains.test. A 127.0.1.2",
    ]  # fmt: skip
    codes = {"codes": ["127.0.0.2-4"]}
    zones = ["bl", "refusing", "lying", "a", "b", "c", "d"]
    lists = [{"zone": f"{zone}.test", **codes} for zone in zones] + [
        {"zone": "half.test", "score": 0.5, **codes}, {"zone": "other.test", **codes}, {"zone": "dead.example", **codes},
        {"zone": "good.test", "codes": ["127.0.0.0/16"], "score": -2},
        {"zone": "domains.test", "codes": ["127.0.1.2"], "domain": True},
    ]  # fmt: skip
    with nameserver_with(tmp_path, records) as server, FakeMx({}) as peer:
        setting = table(name="lists", type="dnsbl", lists=lists, timeout="2s")
        dns = f'delivery.nameservers=["{server}"]'
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", setting, dns, *OUTSIDE) as relay:
            answer = replies(relay, LISTED, ["c@d.example", "postmaster@d.example"])
            assert [one[:3] for one in answer] == ["250", "554", "250", "354", "250"]
            shown = f"{LISTED} is listed by bl.test (127.0.0.4), {LISTED} is listed by half.test (127.0.0.2)"
            assert answer[1] == f"554 5.7.1 Refused by lists: {shown}"
            for last in (10, 11, 12, 13):
                assert replies(relay, f"203.0.113.{last}")[-1].startswith("250 2.0.0"), last
            assert replies(relay, "2001:db8::1")[1].startswith("554 5.7.1 Refused by lists: 2001:db8::1 is listed by bl.test")
            assert replies(relay, sender="a@spam.example")[1].endswith("spam.example is listed by domains.test (127.0.1.2)")
            by_author = replies(relay, text="From: a@SPAM.example\r\n" + TEXT)
            assert [one[:3] for one in by_author] == ["250", "250", "354", "554"]
            assert [text.split()[2] for text in refusals(relay, 3)] == ["refusing.test", "lying.test", "a.test"]
            assert relay.metric('relaymta_dnsbl_total{result="refused",zone="refusing.test"}') == 1
            assert relay.metric('relaymta_dnsbl_total{result="paused",zone="refusing.test"}') >= 3
            assert relay.metric('relaymta_dnsbl_total{result="listed",zone="half.test"}') == 1
            assert relay.metric('relaymta_dnsbl_total{result="failed",zone="dead.example"}') >= 3
            (event,) = [one for one in relay.events("filtered") if one["client"] == LISTED and one["verdict"] == "reject"]
            assert (event["score"], event["recipients"]) == (1.5, ["c@d.example"])


def test_what_each_list_says_is_shown(tmp_path):
    records = ["9.113.0.203.bl.test. A 127.0.0.4", "2.0.0.127.bl.test. A 127.0.0.2"]
    with nameserver_with(tmp_path, records) as server:
        config = tmp_path / "c.toml"
        config.write_text(
            f'hostname = "relay.example"\nspool = "{tmp_path}/other"\n[[listener]]\naddress = "127.0.0.1:2525"\n'
            f'[delivery]\nnameservers = ["{server}"]\n[[filter]]\nname = "lists"\ntype = "dnsbl"\n'
            'lists = [{ zone = "bl.test", codes = ["127.0.0.2-11"] }, { zone = "gone.test", codes = ["127.0.0.2"] }]\n'
        )
        relay = Relay(tmp_path, None)
        found = relay.cli("filter", "test", "--client", LISTED, "-c", str(config), check=False)
        assert found.returncode == 2 and "9.113.0.203.bl.test    listed  127.0.0.4" in found.stdout, found.stdout
        assert "9.113.0.203.gone.test  clean" in found.stdout
        assert found.stdout.endswith(f"refused: 554 5.7.1 Refused by lists: {LISTED} is listed by bl.test (127.0.0.4)\n")
        found = relay.cli("filter", "test", "--client", WELCOME, "--json", "-c", str(config), check=False)
        row = json.loads(found.stdout)
        assert found.returncode == 0 and [one["result"] for one in row["lists"]] == ["clean", "clean"]
        with config.open("a") as file:
            file.write('[relay]\nnetworks = ["203.0.113.0/24"]\n')
        found = relay.cli("filter", "test", "--client", LISTED, "-c", str(config), check=False)
        assert found.returncode == 0 and "no filter looks at mail of this client" in found.stdout
        found = relay.cli("filter", "test", "--client", LISTED, "--only", "lists", "-c", str(config), check=False)
        assert found.returncode == 2 and "is listed by bl.test (127.0.0.4)" in found.stdout
        found = relay.cli("filter", "check", "-c", str(config), check=False)
        assert found.returncode == 75 and "gone.test does not list 2.0.0.127, which each list does" in found.stdout


def test_a_list_that_is_silent_is_named(tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        config = tmp_path / "c.toml"
        config.write_text(
            f'hostname = "relay.example"\nspool = "{tmp_path}/other"\n[[listener]]\naddress = "127.0.0.1:2525"\n'
            f'[delivery]\nnameservers = ["127.0.0.1:{silent.getsockname()[1]}"]\n[[filter]]\nname = "lists"\ntype = "dnsbl"\n'
            'timeout = 0.1\nlists = [{ zone = "bl.test", codes = ["127.0.0.2-11"] }]\n'
        )
        found = Relay(tmp_path, None).cli("filter", "check", "-c", str(config), check=False)
        assert (found.returncode, found.stdout) == (75, "lists: bl.test does not answer\n")


def test_a_score_marks_and_the_mark_is_on_the_message(tmp_path):
    records = ["9.113.0.203.bl.test. A 127.0.0.4"]
    lists = [{"zone": "bl.test", "codes": ["127.0.0.4"], "score": 3}]
    with nameserver_with(tmp_path, records) as server, FakeMx({}) as peer:
        setting = table(name="lists", type="dnsbl", lists=lists, score=[{"at": 2.0, "verdict": "tag"}])
        more = f'delivery.nameservers=["{server}"]', 'filters.tag=["X-Spam: {score} {reason}"]'
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", setting, *more, *OUTSIDE) as relay:
            assert replies(relay, LISTED)[-1].startswith("250 2.0.0") and replies(relay)[-1].startswith("250 2.0.0")
            wait_for(lambda: len(peer.messages) == 2)
            marked = [f"X-Spam: 3 {LISTED} is listed by bl.test (127.0.0.4)".encode() in data for _, _, data in peer.messages]
            assert sorted(marked) == [False, True]


# Greylisting


def test_greylisting_of_two_workers_and_across_restarts(tmp_path):
    setting = table(name="grey", type="greylist", delay="1s")
    with FakeMx({}) as peer:
        relay = Relay(tmp_path, f"127.0.0.1:{peer.port}", setting, 'delivery.nameservers=["127.0.0.1:1"]', *OUTSIDE, workers=2)
        with relay:
            first = replies(relay, "203.0.113.1")
            assert first == ["250 2.1.0 Sender ok", "250 2.1.5 Recipient ok", "451 4.7.1 Greylisted: try again in 1 seconds"]
            wait_for(lambda: replies(relay, "203.0.113.2")[-1].startswith("250 2.0.0"))  # of one network, by either worker
            assert all(replies(relay, f"203.0.113.{n}")[-1].startswith("250 2.0.0") for n in range(1, 9))
            pid = relay.worker_pids()[0]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: len(relay.worker_pids()) == 2 and pid not in relay.worker_pids(), what="another worker")
            assert all(replies(relay, f"203.0.113.{n}")[-1].startswith("250 2.0.0") for n in range(1, 9))
            assert replies(relay, "2001:db8::1")[-1].startswith("451")
            assert replies(relay, to=["postmaster@d.example"])[-1].startswith("250 2.0.0")
            assert relay.metric('relaymta_greylist_total{result="new"}') == 2
            assert relay.metric('relaymta_greylist_total{result="passed"}') == 1
            assert relay.stop() == 0 and (tmp_path / "spool/node/triplets").exists()
        with relay:
            assert replies(relay)[-1].startswith("250 2.0.0") and replies(relay, "2001:db8::1")[-1].startswith("250 2.0.0")
            assert replies(relay, sender="other@b.example")[-1].startswith("451")


def test_mail_of_those_who_may_relay_is_not_greylisted(tmp_path):
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", table(name="grey", type="greylist")) as relay:
        relay.send(TEXT)
        wait_for(lambda: len(peer.messages) == 1)


def test_greylisting_by_bdat_refuses_the_chunk(tmp_path):
    settings = table(name="grey", type="greylist"), 'delivery.nameservers=["127.0.0.1:1"]', *OUTSIDE
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings) as relay, client(relay) as smtp:
        smtp.docmd("MAIL FROM:<a@b.example>")
        smtp.docmd("RCPT TO:<c@d.example>")
        smtp.send(b"BDAT 14 LAST\r\nSubject: x\r\n\r\nNOOP\r\n")
        assert smtp.getreply()[0] == 451 and smtp.getreply()[0] == 250 and smtp.docmd("RCPT TO:<c@d.example>")[0] == 503
        (event,) = logged(relay, "rejected")
        assert (event["sender"], event["recipients"], event["reply"][:3]) == ("a@b.example", ["c@d.example"], "451")
        assert relay.metric('relaymta_rejections_total{phase="data",reply="4xx"}') == 1


# Policy services


@pytest.fixture(scope="module")
def grey() -> Iterator[str]:
    with postgrey() as address:
        yield address


def policy(address: str, **more: object) -> str:
    return table(name="policy", type="policy", address=[address], **more)


def test_postgrey(tmp_path, grey):
    """One session of 20 messages, and one of each: deferred, then taken, with the field that it wants above."""
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", policy(grey), *OUTSIDE) as relay:
        senders = [f"{name}@b.example" for name in "abcdefghijklmnopqrst"]
        with client(relay) as smtp:
            assert {said(smtp, sender=sender)[1][:9] for sender in senders} == {"450 4.2.0"}
            time.sleep(1.1)
            assert all(said(smtp, sender=sender)[-1].startswith("250 2.0.0") for sender in senders)
        assert all(replies(relay, sender=sender)[-1].startswith("250 2.0.0") for sender in senders)
        wait_for(lambda: len(peer.messages) == 40)
        assert sum(data.startswith(b"X-Greylist: delayed ") for _, _, data in peer.messages) == 20
        assert relay.metric('relaymta_filter_verdicts_total{filter="policy",verdict="tempfail"}') == 20


def test_policyd_spf(tmp_path):
    with policyd_spf() as address, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", policy(address), *OUTSIDE) as relay:
            assert replies(relay, to=["c@d.example", "e@d.example"])[-1].startswith("250 2.0.0")
            wait_for(lambda: len(peer.messages) == 1)
            assert peer.messages[0][2].startswith(b"Received-SPF: ")


SERVICE = """
import socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"\\n":
                self.wfile.write(b"action=DUNNO\\n\\n")
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("ends", ["killed", "stopped"])
def test_a_policy_service_that_goes_and_comes_back(tmp_path, ends):
    port = free_port()

    def start() -> subprocess.Popen[bytes]:
        made = subprocess.Popen([sys.executable, "-c", SERVICE, str(port)])
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), what="the service")
        return made

    keys = {"timeout": "1s", "on_failure": "tempfail"}
    service = start()
    try:
        with (
            FakeMx({}) as peer,
            Relay(tmp_path, f"127.0.0.1:{peer.port}", policy(f"127.0.0.1:{port}", **keys), *OUTSIDE) as relay,
        ):
            with client(relay) as smtp:
                assert said(smtp)[-1].startswith("250 2.0.0")
                if ends == "killed":
                    service.kill()
                    service.wait()
                else:
                    service.send_signal(signal.SIGSTOP)
                    tasks = Path(f"/proc/{service.pid}/task")  # each of them may still answer
                    wait_for(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()), what="the signal")
                for _ in range(4):
                    assert said(smtp)[1:] == ["451 4.7.1 policy does not answer now; try again later"]
                assert [(event["filter"], event["state"]) for event in logged(relay, "filter")] == [("policy", "down")]
                if ends == "killed":
                    service = start()
                else:
                    service.send_signal(signal.SIGCONT)
                wait_for(lambda: len(relay.events("filter")) == 2, what="it to be up again")
                assert said(smtp)[-1].startswith("250 2.0.0")
            failed = [one for one in relay.events("filtered") if one["verdict"] == "failed"]
            assert len(failed) == 4 and all(one["recipients"] == [] or one["recipients"] == ["c@d.example"] for one in failed)
            wait_for(lambda: len(peer.messages) == 2)
    finally:
        service.kill()
        service.wait()
