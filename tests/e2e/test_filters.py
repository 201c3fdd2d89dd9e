"""Filters in the running relay, with the real clamd: what clients, the next host, operators and dashboards see."""

import base64
import io
import json
import signal
import smtplib
import socket
import threading
import zipfile
from collections.abc import Iterator
from email.message import EmailMessage

import pytest

from tests.support.clamd import EICAR, RealClamd, clamd
from tests.support.daemon import PATIENCE, Relay, heard, wait_for
from tests.support.fake_mx import FakeMx

TEXT = "Subject: hello\r\n\r\nhello\r\n"
VIRUS = "Subject: hello\r\n\r\n" + EICAR.decode() + "\r\n"


@pytest.fixture(scope="module")
def scanner() -> Iterator[RealClamd]:
    with clamd() as running:
        yield running


def virus(scanner: RealClamd, *more: str) -> str:
    """A setting: the filter `virus`. `more`: further keys."""
    keys = ['name="virus"', 'type="clamd"', f'address=["{scanner.address}"]', *more]
    return f"filter=[{{{', '.join(keys)}}}]"


def refused(relay: Relay, text: str | bytes, *to: str) -> tuple[int, bytes]:
    """The reply to message data that is refused."""
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client, pytest.raises(smtplib.SMTPDataError) as error:
        client.sendmail("a@b.example", list(to) or ["c@d.example"], text)
    found = error.value.smtp_error
    return error.value.smtp_code, found if isinstance(found, bytes) else found.encode()


def logged(relay: Relay, name: str, count: int = 1) -> list[dict]:
    """The events of this name, once there are so many."""
    wait_for(lambda: len(relay.events(name)) >= count, what=f"{count} events {name}")
    found = relay.events(name)
    assert len(found) == count, found
    return found


def attached(*files: tuple[str, bytes]) -> bytes:
    message = EmailMessage()
    message["Subject"] = "files"
    message.set_content("see the attachment\n")
    for name, data in files:
        message.add_attachment(data, maintype="application", subtype="octet-stream", filename=name)
    return message.as_bytes().replace(b"\n", b"\r\n")


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", EICAR)
    return packed.getvalue()


def test_a_virus_is_refused_by_name_however_it_is_sent_and_all_else_arrives(tmp_path, scanner):
    large = b"Subject: large\r\n\r\n" + b"a line of text that is long enough\r\n" * 150_000
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner)) as relay:
        for text in (VIRUS, attached(("x.com", EICAR)), attached(("x.zip", zipped())), large + EICAR + b"\r\n"):
            assert refused(relay, text) == (554, b"5.7.1 Refused by virus: Eicar-Within.UNOFFICIAL"), text[:60]
        data = b"Subject: chunks\r\n\r\n" + EICAR
        with socket.create_connection(("127.0.0.1", relay.port), PATIENCE) as sock:
            heard(sock, b"220")
            sock.sendall(b"EHLO x\r\n")
            heard(sock, b"250 ")
            sock.sendall(
                b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d.example>\r\nBDAT %d\r\n%bBDAT 20 LAST\r\n%b" % (len(data), data, b"y" * 20)
            )
            assert b"554 5.7.1 Refused by virus" in heard(sock, b"554")
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:  # on one connection: refused, taken, refused ...
            for n in range(20):
                if n % 3:
                    client.sendmail("a@b.example", ["c@d.example"], f"Subject: {n}\r\n\r\nx\r\n")
                else:
                    with pytest.raises(smtplib.SMTPDataError):
                        client.sendmail("a@b.example", ["c@d.example"], VIRUS)
        fewer = large[:400_000] + b"\r\n"
        relay.send(fewer.decode())
        wait_for(lambda: len(peer.messages) == 14)
        assert not any(EICAR in data for _, _, data in peer.messages)
        assert max(len(data) for _, _, data in peer.messages) > len(fewer)
        assert relay.metric('relaymta_filter_verdicts_total{filter="virus",verdict="reject"}') == 12
        assert relay.metric('relaymta_filter_verdicts_total{filter="virus",verdict="accept"}') == 14
        assert relay.metric('relaymta_filter_seconds_count{filter="virus"}') == 26
        found = logged(relay, "filtered", 26)[0]
        assert (found["filter"], found["verdict"], found["action"]) == ("virus", "reject", "reject")
        assert (found["sender"], found["recipients"], found["reason"]) == (
            "a@b.example",
            ["c@d.example"],
            "Eicar-Within.UNOFFICIAL",
        )
        history = relay.cli("message", "history", logged(relay, "queued", 14)[0]["id"])
        assert "virus" in history.stdout and "accept" in history.stdout


def test_a_scanner_that_is_gone_costs_what_was_said_it_may_cost_and_comes_back_by_itself(tmp_path):
    """kill -9, then a restart; meanwhile mail that is not for it goes on."""
    with clamd() as scanner, FakeMx({}) as peer:
        settings = virus(scanner, 'recipient_domain=["d.example"]', 'timeout="5s"', 'on_failure="tempfail"')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", settings) as relay:
            relay.send()
            scanner.send(signal.SIGKILL)
            for _ in range(4):
                assert refused(relay, TEXT) == (451, b"4.7.1 virus does not answer now; try again later")
                relay.send(TEXT, "a@b.example", "c@else.example")
            (event,) = logged(relay, "filter")
            assert (event["filter"], event["state"]) == ("virus", "down") and event["reason"].startswith("connect: ")
            wait_for(lambda: relay.metric('relaymta_filter_up{filter="virus"}') == 0)
            listed = json.loads(relay.cli("filter", "list", "--json").stdout)
            assert not listed["up"] and listed["failures"]["connect"] == 4
            scanner.path.unlink(missing_ok=True)
            scanner.start()
            assert logged(relay, "filter", 2)[1]["state"] == "up"
            assert refused(relay, VIRUS)[0] == 554
            relay.send()
            wait_for(lambda: len(peer.messages) == 6)
            assert logged(relay, "filtered", 7)[-1]["verdict"] == "accept"
            assert "up" in relay.cli("filter", "list").stdout


def test_messages_beyond_the_scanners_own_limit_do_not_keep_it_from_others(tmp_path):
    with clamd("StreamMaxLength 100K") as scanner, FakeMx({}) as peer:
        settings = virus(scanner, 'oversize="head"', 'on_failure="accept"')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", settings) as relay:
            for _ in range(4):
                relay.send("Subject: large\r\n\r\n" + "a line of text\r\n" * 20_000)
            assert refused(relay, VIRUS)[0] == 554
            assert relay.metric('relaymta_filter_failures_total{filter="virus",reason="oversize"}') == 4
            assert not relay.events("filter")


def test_held_mail_says_which_filter_wants_it_and_is_released_as_it_is(tmp_path, scanner):
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner, 'verdicts={FOUND="hold"}')) as relay:
            relay.send(VIRUS)
            ident = logged(relay, "queued")[0]["id"]
            reason = "filter virus: Eicar-Within.UNOFFICIAL"
            assert reason in relay.cli("queue", "list", "--held").stdout
            assert reason in relay.cli("message", "explain", ident).stdout
            relay.kill()
            relay.start()
            relay.cli("queue", "release", ident)
            wait_for(lambda: peer.messages)
            assert EICAR in peer.messages[0][2]
            assert len(relay.events("filtered")) == 1  # it is not looked at again


def test_discarded_mail_is_answered_as_if_it_had_been_taken(tmp_path, scanner):
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner, 'verdicts={FOUND="discard"}')) as relay:
            relay.send(VIRUS)
            relay.send()
            wait_for(lambda: len(peer.messages) == 1)
            assert EICAR not in peer.messages[0][2]
            logged(relay, "queued")
            found = logged(relay, "filtered", 2)[0]
            assert found["action"] == "discard"
            assert "discard" in relay.cli("message", "history", found["id"]).stdout


@pytest.mark.parametrize("size", [100, 400_000], ids=["small", "large"])
def test_tags_are_added_and_forged_ones_from_outside_are_gone(tmp_path, scanner, size):
    """Case 13. Also where the message is signed: by a key that signs what is sent."""
    head = "X-Spam: No\r\nSubject: =?utf-8?q?h=C3=A4?=\r\n hello\r\nx-spam : folded\r\n no\r\nTo: c@d.example\r\n\r\n"
    text = head + EICAR.decode() + "\r\n" + "line\r\n" * (size // 6)
    settings = (
        virus(scanner, 'verdicts={FOUND="tag"}'), 'filters.subject="[SPAM] {subject}"', "relay.networks=[]",
        'relay.domains=["d.example"]',
    )  # fmt: skip
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings) as relay:
        relay.send(text)
        wait_for(lambda: peer.messages)
        header, _, body = peer.messages[0][2].partition(b"\r\n\r\n")
        assert header.endswith(b"\r\nX-Spam: Yes\r\nSubject: [SPAM] =?utf-8?q?h=C3=A4?=\r\n hello\r\nTo: c@d.example"), header
        assert header.lower().count(b"x-spam") == 1
        assert body.startswith(EICAR) and body.count(b"line\r\n") == size // 6


def test_a_client_that_hangs_up_while_filters_look_leaves_nothing(tmp_path, scanner):
    with clamd() as slow, FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(slow, 'timeout="60s"')) as relay:
        relay.send()
        slow.send(signal.SIGSTOP)
        try:
            for size in (10, 400_000):
                with socket.create_connection(("127.0.0.1", relay.port), PATIENCE) as sock:
                    heard(sock, b"220")
                    sock.sendall(b"EHLO x\r\n")
                    heard(sock, b"250 ")
                    sock.sendall(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
                    heard(sock, b"354")
                    sock.sendall(b"Subject: gone\r\n\r\n" + b"x\r\n" * (size // 3) + b".\r\n")
                    wait_for(lambda: json.loads(relay.cli("status", "--json").stdout)["workers"][0]["connections"] == 1)
        finally:
            slow.send(signal.SIGCONT)
        wait_for(lambda: json.loads(relay.cli("status", "--json").stdout)["workers"][0]["connections"] == 0)
        relay.send("Subject: last\r\n\r\nx\r\n")
        wait_for(lambda: len(peer.messages) == 2)
        logged(relay, "queued", 2)
        assert not list((relay.spool / "shard-0/bodies/big").glob("*"))
        assert [one["reply"] for one in logged(relay, "rejected", 2)] == [
            "451 4.3.0 You have hung up while filters looked at the message; it is not taken"
        ] * 2


def test_a_reload_adds_a_filter_to_a_running_relay(tmp_path, scanner):
    config = tmp_path / "relaymta.toml"
    with FakeMx({}) as peer:
        relay = Relay(tmp_path, None)
        base = (
            f'spool = "{relay.spool}"\nhostname = "relay.example"\nworkers = 1\n'
            f'[[listener]]\naddress = "127.0.0.1:{relay.port}"\n'
            f'[[route]]\nname = "all"\nhosts = ["127.0.0.1:{peer.port}"]\n[log]\nfile = "{relay.log}"\n'
            f'[metrics]\nlisten = "127.0.0.1:{relay.metrics_port}"\n'
        )
        config.write_text(base)
        relay.command = lambda: [relay.python, "-m", "relaymta", "-c", str(config), "serve", "--ephemeral"]  # type: ignore[method-assign]
        with relay:
            relay.send(VIRUS)
            added = f'[[filter]]\nname = "virus"\ntype = "clamd"\naddress = ["{scanner.address}"]\nenforce = false\n'
            config.write_text(base + added)
            relay.cli("reload")
            relay.send(VIRUS)
            found = logged(relay, "filtered")
            assert [(one["verdict"], one["action"]) for one in found] == [("reject", "accept")]
            config.write_text(base + added.replace("false", "true"))
            relay.cli("reload")
            assert refused(relay, VIRUS)[0] == 554
            config.write_text(base + added.replace("clamd.ctl", "x").replace('type = "clamd"', 'type = "clam"'))
            wrong = relay.cli("reload", check=False)
            assert wrong.returncode == 78 and "filter.0.type: there is no type 'clam' (did you mean" in wrong.stdout
            config.write_text(base)
            relay.cli("reload")
            relay.send(VIRUS)
            wait_for(lambda: len(peer.messages) == 3)


def test_two_workers_share_places_and_counters(tmp_path, scanner):
    with FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus(scanner, "concurrency=2"), workers=2) as relay:
            threads = [threading.Thread(target=relay.send_all, args=(5,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_for(lambda: len(peer.messages) == 40)
            row = json.loads(relay.cli("filter", "list", "--json").stdout)
            assert (row["asked"], row["verdicts"]["accept"], row["waiting"]) == (40, 40, 0)
            assert relay.metric('relaymta_filter_verdicts_total{filter="virus",verdict="accept"}') == 40


def test_by_hand_a_message_is_tried_and_a_wrong_address_is_named(tmp_path, scanner):
    config, file = tmp_path / "relaymta.toml", tmp_path / "x.eml"
    file.write_bytes(b"Subject: x\n\n" + base64.b64encode(b"nothing") + b"\n" + EICAR + b"\n")
    config.write_text(
        f'spool = "{tmp_path}"\n[[listener]]\naddress = "127.0.0.1:2525"\n[[filter]]\nname = "virus"\ntype = "clamd"\n'
        f'address = ["{scanner.address}"]\n'
    )
    relay = Relay(tmp_path, None)
    tried = relay.cli("-c", str(config), "filter", "test", str(file), check=False)
    assert tried.returncode == 2 and "refused: 554 5.7.1 Refused by virus: Eicar-Within.UNOFFICIAL" in tried.stdout
    assert (
        relay.cli("-c", str(config), "filter", "check").stdout == f"virus at {scanner.address}: finds Eicar-Within.UNOFFICIAL\n"
    )
    config.write_text(config.read_text().replace("ctl", "clt"))
    checked = relay.cli("-c", str(config), "config", "check", check=False)
    where = f"{config}:7: filter.0.address.0: {scanner.address.replace('ctl', 'clt')}: No such file or directory"
    assert f"note: {where}" in checked.stdout
    wrong = relay.cli("-c", str(config), "filter", "check", check=False)
    assert wrong.returncode == 75 and "No such file or directory" in wrong.stdout
    assert relay.cli("-c", str(config), "filter", "test", str(file), check=False).returncode == 75


def test_what_filters_tag_is_routed_by_the_tag_and_no_forged_one_is(tmp_path, scanner):
    with FakeMx({}) as peer, FakeMx({}) as junk:
        routes = (
            f'route=[{{name="junk",header=["X-Spam: ^Yes"],hosts=["127.0.0.1:{junk.port}"]}},'
            f'{{name="out",hosts=["127.0.0.1:{peer.port}"]}}]'
        )
        settings = (virus(scanner, 'verdicts={FOUND="tag"}'), "relay.networks=[]", 'relay.domains=["d.example"]', routes)
        with Relay(tmp_path, None, *settings) as relay:
            for text in (VIRUS, "X-Spam: Yes\r\n" + TEXT, VIRUS + "x\r\n" * 150_000):
                relay.send(text)
            wait_for(lambda: len(junk.messages) == 2 and len(peer.messages) == 1)
            assert EICAR not in peer.messages[0][2] and b"X-Spam" not in peer.messages[0][2]
