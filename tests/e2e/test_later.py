"""Filters that look at messages in the queue: those of stage "queued", and those that were down when a message came."""

import os
import signal
import smtplib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dkim
import pytest

from tests.conftest import PROVE
from tests.support.clamd import EICAR, RealClamd, clamd
from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.milters import Acting, DkimKey, acting
from tests.support.prove import in_prove

TEXT = "Subject: hello\r\n\r\nhello\r\n"
VIRUS = "Subject: virus\r\n\r\n" + EICAR.decode() + "\r\n"
LARGE = "Subject: large\r\n\r\n" + "a line of text that is long enough\r\n" * 60_000
OUTSIDE = "127.0.0.2"
LEDGER = 20_000 if PROVE else 600
STRANGERS = ('relay.networks=["127.0.0.1/32"]', 'relay.domains=["d.example"]', "verify.results=false")


def virus(scanner: RealClamd, *more: str) -> str:
    """A setting: the filter `virus`. `more`: further keys."""
    keys = ['name="virus"', 'type="clamd"', f'address=["{scanner.address}"]', *more]
    return f"filter=[{{{', '.join(keys)}}}]"


def unseen(relay: Relay) -> int:
    return sum(row["unseen"] for row in relay.summary())


def scanned(relay: Relay, count: int) -> list[tuple[str, str]]:
    """What has come of messages that filters have looked at in the queue."""
    wait_for(lambda: len(relay.events("scanned")) >= count, what=f"{count} messages to be looked at")
    found = [(one["result"], one["reason"]) for one in relay.events("scanned")]
    assert len(found) == count, found
    return found


def test_staff_can_send_while_the_scanner_is_down_and_nothing_is_delivered_unseen(tmp_path):
    """Case 12: the scanner is down, and staff cannot send."""
    with clamd() as scanner, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner), *STRANGERS) as relay:
            scanner.send(signal.SIGKILL)
            with pytest.raises(smtplib.SMTPDataError, match=r"451.*virus does not answer now"):
                relay.send_from(OUTSIDE, TEXT)
            for text in (TEXT, VIRUS, LARGE, TEXT):
                relay.send(text)
            wait_for(lambda: unseen(relay) == 4)
            wait_for(lambda: relay.metric("relaymta_unseen") == 4)
            wait_for(lambda: relay.metric("relaymta_unseen_oldest_seconds") > 0)
            first = relay.events("queued")[0]
            assert first["unseen"] == ["virus"]
            told = relay.cli("message", "explain", first["id"]).stdout
            assert "waits for filter virus, down since 20" in told and "Connection refused" in told
            assert "not looked at by filter virus" in relay.cli("queue", "list", "--unseen").stdout
            relay.cli("queue", "release", "--all", check=False)
            relay.cli("queue", "flush", first["id"], check=False)
            relay.kill()
            relay.start()
            time.sleep(0.5)
            assert not peer.messages and unseen(relay) == 4
            scanner.path.unlink(missing_ok=True)
            scanner.start()
            back = time.monotonic()
            assert sorted(scanned(relay, 4)) == [
                ("held", "filter virus: Eicar-Within.UNOFFICIAL"), ("passed", ""), ("passed", ""), ("passed", "")
            ]  # fmt: skip
            wait_for(lambda: len(peer.messages) == 3)
            assert time.monotonic() - back < PATIENCE
            assert not any(EICAR in data for _, _, data in peer.messages)
            assert unseen(relay) == 0
            assert "Eicar-Within" in relay.cli("queue", "list", "--held").stdout


def milter(one: Acting, *more: str) -> str:
    """A setting: the milter `acts`. `more`: further keys."""
    keys = ['name="acts"', 'type="milter"', f'address=["{one.address}"]', *more]
    return f"filter=[{{{', '.join(keys)}}}]"


def signing(tmp_path: Path) -> tuple[str, DkimKey]:
    """A setting, and the key."""
    key = DkimKey(tmp_path)
    key.path.chmod(0o600)
    return f'dkim=[{{domain="b.example", selector="s", key="{key.path}"}}]', key


@pytest.mark.parametrize(
    ("size", "body"),
    [
        (100, ""),
        (100, "body 3000"),
        (3_000_000, "body 2000000"),
        *in_prove((100, "body 2000000"), (3_000_000, ""), (3_000_000, "body 3000")),
    ],
    ids=["header of small", "footer of small", "large for large", "large for small", "header of large", "footer of large"],
)
def test_what_a_queued_filter_changes_is_signed_behind_it(tmp_path, size, body):
    """A header, a body in memory and one in a file, of small mail and of large mail; and of the second of two filters."""
    lines = f"X-Act: add X-Added=yes\r\n{f'X-Act: {body}' if body else 'X-None: 1'}\r\n"
    text = f"From: a@b.example\r\n{lines}Subject: x\r\n\r\n" + "a line of the old body\r\n" * (size // 24)
    settings, key = signing(tmp_path)
    with acting() as one, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one, 'stage="queued"'), settings) as relay:
            relay.send(text)
            assert scanned(relay, 1) == [("changed", "")]
            wait_for(lambda: peer.messages)
            data = peer.messages[0][2]
            header, _, rest = data.partition(b"\r\n\r\n")
            assert header.endswith(b"\r\nX-Added: yes") and header.count(b"DKIM-Signature:") == 1
            assert (b"a line of a new body" in rest) == bool(body) != (b"of the old body" in rest)
            assert dkim.verify(data, dnsfunc=lambda name, timeout=5: key.record.encode())
            wait_for(lambda: not relay.summary())
            assert not list((relay.spool / "shard-0/bodies/big").iterdir())
            (ident,) = {one["id"] for one in relay.events("queued")}
            wait_for(lambda: [one["id"] for one in relay.events("delivered")] == [ident])


def test_mail_that_filters_let_pass_is_signed_and_mail_of_others_is_not(tmp_path):
    settings, key = signing(tmp_path)
    with clamd() as scanner, FakeMx({}) as peer:
        queued = virus(scanner, 'stage="queued"')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", queued, settings, *STRANGERS) as relay:
            for text in ("From: a@b.example\r\n" + TEXT, "From: a@b.example\r\n" + LARGE):
                relay.send(text)
            relay.send_from(OUTSIDE, "From: a@b.example\r\nX-Spam: No\r\n" + TEXT)
            assert scanned(relay, 3) == [("passed", "")] * 3
            wait_for(lambda: len(peer.messages) == 3)
            for _, _, data in peer.messages:
                mine = b"X-Spam" not in data and OUTSIDE.encode() not in data
                assert data.count(b"DKIM-Signature:") == mine
                assert not mine or dkim.verify(data, dnsfunc=lambda name, timeout=5: key.record.encode())
            assert not any(b"X-Spam" in data for _, _, data in peer.messages)


@pytest.mark.parametrize("refused", ["hold", "discard", "bounce"])
def test_what_is_refused_after_250_is_held_discarded_or_bounced_and_no_forged_sender_gets_a_dsn(tmp_path, refused):
    with clamd() as scanner, FakeMx({}) as peer:
        keys = 'stage="queued"', f'refused="{refused}"'
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner, *keys), *STRANGERS) as relay:
            relay.send(VIRUS, "ours@b.example")
            relay.send_from(OUTSIDE, VIRUS)
            relay.send(VIRUS, "")
            relay.send()
            found = Counter(result for result, _ in scanned(relay, 4))
            result = {"hold": "held", "discard": "discarded", "bounce": "bounced"}[refused]
            expected = {"passed": 1, "bounced": 1, "held": 2} if refused == "bounce" else {"passed": 1, result: 3}
            assert found == expected
            wait_for(lambda: len(peer.messages) == (2 if refused == "bounce" else 1))
            assert not any(EICAR in data for _, _, data in peer.messages)
            dsns = [(to, data) for _, to, data in peer.messages if b"multipart/report" in data]
            assert [to for to, _ in dsns] == ([["ours@b.example"]] if refused == "bounce" else [])
            assert all(b"refused by filter virus: Eicar-Within.UNOFFICIAL" in b" ".join(data.split()) for _, data in dsns)
            ident = next(one["id"] for one in relay.events("scanned") if one["result"] != "passed")
            assert relay.events("scanned")[0]["reason"] in relay.cli("message", "history", ident).stdout


def test_operators_and_unseen_mail(tmp_path):
    """Hold and release, delete, bounce, reroute; what is released is looked at by those that have not, and by them alone."""
    with clamd() as scanner, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner, 'stage="queued"')) as relay:
            scanner.send(signal.SIGKILL)
            for _ in range(4):
                relay.send()
            wait_for(lambda: unseen(relay) == 4)
            wait_for(lambda: len(relay.events("queued")) == 4)
            held, deleted, bounced, other = (one["id"] for one in relay.events("queued"))
            relay.cli("queue", "hold", held)
            relay.cli("queue", "delete", deleted)
            relay.cli("queue", "bounce", bounced)
            wait_for(lambda: len(peer.messages) == 1)  # the DSN
            assert "hold" in relay.cli("message", "explain", held).stdout
            assert unseen(relay) == 1
            relay.cli("queue", "release", held)
            wait_for(lambda: unseen(relay) == 2)
            relay.kill()
            relay.start()
            scanner.path.unlink(missing_ok=True)
            scanner.start()
            wait_for(lambda: len(peer.messages) == 3)
            wait_for(lambda: {one["id"] for one in relay.events("scanned")} == {held, other})
            wait_for(lambda: not relay.summary())


def test_without_the_filter_nothing_waits_for_it(tmp_path):
    """It is taken out of the configuration, which is reloaded."""
    with clamd() as scanner, FakeMx({}) as peer:
        config = tmp_path / "relaymta.toml"
        relay = Relay(tmp_path, None)
        base = (
            f'spool = "{relay.spool}"\nhostname = "relay.example"\nworkers = 1\n'
            f'[[listener]]\naddress = "127.0.0.1:{relay.port}"\n'
            f'[[route]]\nname = "all"\nhosts = ["127.0.0.1:{peer.port}"]\n[log]\nfile = "{relay.log}"\n'
        )
        one = f'[[filter]]\nname = "virus"\ntype = "clamd"\naddress = ["{scanner.address}"]\nstage = "queued"\n'
        config.write_text(base + one)
        relay.command = lambda: [relay.python, "-m", "relaymta", "-c", str(config), "serve", "--ephemeral"]  # type: ignore[method-assign]
        with relay:
            scanner.send(signal.SIGKILL)
            relay.send()
            wait_for(lambda: unseen(relay) == 1)
            config.write_text(base)
            relay.cli("reload")
            wait_for(lambda: len(peer.messages) == 1)
            assert scanned(relay, 1) == [("passed", "")]
            assert any("not looked at by filter virus: it is not configured" in one["text"] for one in relay.events("warning"))


def test_a_message_under_whose_scan_a_worker_dies_twice_is_quarantined(tmp_path):
    with clamd() as scanner, FakeMx({}) as peer:
        with Relay(
            tmp_path, f"127.0.0.1:{peer.port}", virus(scanner, 'stage="queued"', 'timeout="60s"'), "filters.budget=60"
        ) as relay:
            scanner.send(signal.SIGSTOP)
            relay.send()
            wait_for(lambda: relay.events("queued"))
            ident = relay.events("queued")[0]["id"]
            for _ in range(2):
                (pid,) = relay.worker_pids()
                time.sleep(0.7)  # it is being looked at
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: relay.worker_pids() not in ([pid], []))
            told = relay.cli("message", "explain", ident).stdout
            assert "quarantined: a worker died twice while filters looked at it" in told
            scanner.send(signal.SIGCONT)
            relay.send()
            wait_for(lambda: len(peer.messages) == 1)
            relay.cli("queue", "release", ident)
            wait_for(lambda: len(peer.messages) == 2)


def test_the_deadline_holds(tmp_path):
    with clamd() as scanner, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner, 'stage="queued"'), *STRANGERS, "queue.max_age=2") as relay:
            scanner.send(signal.SIGKILL)
            relay.send()
            relay.send_from(OUTSIDE, TEXT)
            wait_for(lambda: len(peer.messages) == 1)
            assert b"expired before filters had looked at it" in b" ".join(peer.messages[0][2].split())
            wait_for(lambda: "its sender may be forged, so there is no DSN" in relay.cli("queue", "list", "--held").stdout)
            assert unseen(relay) == 0


def test_all_that_was_taken_while_the_scanner_was_dead_is_looked_at_and_delivered_once(tmp_path):
    """A kill -9 of the relay in the middle, and every fiftieth message a virus."""
    taken: list[int] = []

    def send(numbers: range) -> None:
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            for number in numbers:
                body = EICAR.decode() if number % 50 == 0 else "hello"
                client.sendmail("a@b.example", ["c@d.example"], f"Subject: {number}.\r\n\r\n{body}\r\n")
                taken.append(number)

    with clamd() as scanner, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner), workers=2) as relay:
            scanner.send(signal.SIGKILL)
            for half in (range(1, LEDGER // 2), range(LEDGER // 2, LEDGER + 1)):
                with ThreadPoolExecutor(4) as threads:
                    list(threads.map(send, (half[at::4] for at in range(4))))
                relay.kill()
                relay.start()
            assert len(taken) == LEDGER and unseen(relay) == LEDGER and not peer.messages
            scanner.path.unlink(missing_ok=True)
            scanner.start()
            wait_for(lambda: unseen(relay) == 0 and len(peer.messages) >= LEDGER - LEDGER // 50, 30 + LEDGER / 100)
            subjects = [int(data.partition(b"Subject: ")[2].partition(b".")[0]) for _, _, data in peer.messages]
            assert sorted(subjects) == [number for number in sorted(taken) if number % 50]
            assert sum(row["held"] for row in relay.summary()) == LEDGER // 50
            assert not any(EICAR in data for _, _, data in peer.messages)
