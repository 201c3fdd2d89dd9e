"""What a provider's failure is said to be: the cause for programs, what operators read, and what `explain` advises."""

import os
import shlex
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme

from relaymta import control
from relaymta.config import Route
from relaymta.errors import Failure
from relaymta.proto.envelope import CATEGORIES, PERMANENT, TRANSIENT, Attempt, category_of
from relaymta.send.cures import cure
from relaymta.send.login import LoginFailed, _password
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import CLOSE, SILENT, FakeMx
from tests.support.resolver import nameserver_with
from tests.support.rows import Row, relay_for
from tests.support.together import together


@pytest.mark.parametrize(
    ("phase", "code", "enhanced", "text", "category"),
    [
        ("connect", 421, "4.3.2", "later", "421"),
        ("auth", 421, "4.3.2", "later", "421"),
        ("rcpt", 421, "4.7.0", "later", "421"),
        ("auth", 535, "5.7.8", "no", "password"),
        ("auth", 454, "4.7.0", "later", "password"),
        ("starttls", 454, "4.7.0", "later", "tls"),
        ("connect", 554, "5.7.1", "blocked", "policy"),
        ("mail", 550, "5.7.26", "DMARC", "policy"),
        ("rcpt", 451, "4.7.1", "greylisted", "policy"),
        ("rcpt", 550, "5.1.1", "no such user", "reply"),
        ("rcpt", 550, "", "no", "reply"),
        ("final", 452, "4.3.1", "full", "reply"),
        ("final", 0, "4.4.2", "connection lost", "network"),
        ("final", 0, "4.4.2", "timed out waiting for the reply to final", "timeout"),
        ("route", 0, "5.1.2", "does not exist", "dns"),
        ("route", 0, "4.4.3", "DNS failed", "dns"),
        ("route", 0, "5.4.6", "is this host", "loop"),
        ("mail", 0, "5.6.7", "needs SMTPUTF8", "message"),
        ("mail", 0, "5.3.4", "too large", "message"),
        ("queue", 0, "5.7.1", "returned by the operator", "operator"),
        ("queue", 0, "4.4.7", "the message expired before it was tried", "expired"),
        ("route", 0, "4.3.0", "internal error", "local"),
    ],
)
def test_the_cause_follows_from_the_reply_and_its_phase(phase, code, enhanced, text, category):
    assert category_of(phase, code, enhanced, text) == category and category in CATEGORIES
    assert Attempt(0, PERMANENT, phase, "h", code, enhanced, text).because == category
    assert Attempt(0, TRANSIENT, phase, "h", code, enhanced, text, "", "refused").because == "refused"
    assert Failure("x").category == ""


def test_every_cause_of_a_failure_has_a_cure():
    route = Route(name="out", hosts=["h"], tls="verify", username="me", password_file="/etc/secret")
    for category in CATEGORIES:
        text = cure(category, route, route.hosts)
        assert bool(text) == (category not in ("operator", "expired")) and "{" not in text
    assert "user me, with the password of password_file /etc/secret" in cure("password", route, route.hosts)
    assert "MX record" in cure("refused", Route(), ["mx.example"])


# Passwords


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("password_env", None, "the variable is not set"),
        ("password_env", b"", "it is empty"),
        ("password_env", b" \n", "it is empty"),
        ("password_env", b"\xff", "not UTF-8"),
        ("password_env", b"secret", None),
        ("password_file", None, "No such file"),
        ("password_file", b"", "is empty"),
        ("password_file", b"\n", "is empty"),
        ("password_file", b"\xff", "not UTF-8"),
        ("password_file", b"secret\n", None),
    ],
)
def test_a_password_is_never_empty(tmp_path, monkeypatch, key, value, problem):
    where = "RELAYMTA_SECRET" if key == "password_env" else str(tmp_path / "secret")
    if value is not None and key == "password_env":
        monkeypatch.setitem(os.environb, b"RELAYMTA_SECRET", value)
    elif value is not None:
        (tmp_path / "secret").write_bytes(value)
    route = Route(hosts=["h"], tls="verify", username="me", **{key: where})
    if problem is None:
        assert _password(route) == "secret"
        return
    with pytest.raises(LoginFailed) as failed:
        _password(route)
    assert problem in str(failed.value) and f"{key} {where}" in str(failed.value)
    assert failed.value.category == "password" and where not in failed.value.public


# A real relay


def context(folder: Path) -> ssl.SSLContext:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(found)
    return found


LOGINS = {  # the key of the route with the password; what the operator reads
    "unset": ('password_env="RELAYMTA_UNSET"', ["password_env RELAYMTA_UNSET", "not set"]),
    "refused": ('password_env="RELAYMTA_SECRET"', ["535 5.7.8 no", "user me", "password_env RELAYMTA_SECRET"]),
    "no-file": ('password_file="/nonexistent"', ["password_file /nonexistent", "No such file", "user me"]),
}


def test_a_failed_login_names_host_user_and_where_the_password_is(tmp_path):
    attempts: dict[str, list[bytes]] = {name: [] for name in LOGINS}
    made = context(tmp_path)

    def refuse(name: str) -> Callable[[bytes], bytes]:
        def refused(line: bytes) -> bytes:
            attempts[name].append(line)
            return b"535 5.7.8 no: hunter2 aHVudGVyMg== AG1lAGh1bnRlcjI=\r\n"  # as some hosts do

        return refused

    with ExitStack() as stack:
        rows = {}
        for name, (keys, _) in LOGINS.items():
            peer = stack.enter_context(FakeMx({}, tls=made, auth=(b"PLAIN", refuse(name))))
            rows[name] = Row(name, f"localhost:{peer.port}", keys=f'tls="verify",username="me",{keys}')
        relay = relay_for(tmp_path, rows.values(), "delivery.first_retry=3600")
        relay.environment = {"SSL_CERT_FILE": str(tmp_path / "ca.pem"), "RELAYMTA_SECRET": "hunter2"}
        stack.enter_context(relay)
        for row in rows.values():
            row.send(sender="a")

        def check(name: str) -> None:
            row = rows[name]
            deferred, *_ = wait_for(lambda: row.events("deferred"))
            for part in ["localhost", *LOGINS[name][1]]:
                assert part in deferred["reply"], deferred["reply"]
            assert (deferred["cause"], deferred["phase"]) == ("password", "auth")
            site = row.events("site")[0]
            assert (site["cause"], site["fault"]) == ("password", "us")
            assert len(attempts[name]) == (name == "refused"), "an empty password is never tried"
            assert "username" in (wait := row.wait())["cure"] or "user me" in wait["cure"]

        together({name: lambda name=name: check(name) for name in LOGINS})  # type: ignore[misc]
        for shown in (relay.log.read_text(), str(rows["refused"].explained())):
            assert not any(secret in shown for secret in ("hunter2", "aHVudGVyMg==", "AG1lAGh1bnRlcjI=")), shown
        warned = [event["text"] for event in relay.events("warning") if "RELAYMTA_" in event["text"]]
        assert warned and all("RELAYMTA_UNSET" in text for text in warned)


HOSTS = {  # what the host does, or why there is none: (rules of FakeMx or None, cause)
    "refused": (None, "refused"),
    "closed": ({"EHLO": CLOSE}, "network"),
    "421": ({"EHLO": b"421 4.3.2 later\r\n"}, "421"),
    "policy": ({"EHLO": b"554 5.7.1 blocked\r\n"}, "policy"),
    "recipient": ({"RCPT": b"450 4.7.1 greylisted\r\n"}, "policy"),
    "other": ({"RCPT": b"450 4.2.1 not now\r\n"}, "reply"),
    "silent": ({"EHLO": SILENT}, "timeout"),
}


def test_the_cause_is_in_the_log_and_the_command_of_explain_works(tmp_path):
    """All hosts fail at the same time. The text of `message explain` is that of the answer for programs, here of a site that is
    down and of mail that waits for its schedule."""
    ports = {how: free_port() for how in HOSTS}
    peers = {how: FakeMx(rules, ports[how]) for how, (rules, _) in HOSTS.items() if rules is not None}
    rows = {how: Row(how, f"127.0.0.1:{port}") for how, port in ports.items()}
    down = [how for how, (rules, _) in HOSTS.items() if rules is None or "RCPT" not in rules]
    with relay_for(tmp_path, rows.values(), "delivery.first_retry=3600", "delivery.patience=0.01") as relay:
        for row in rows.values():
            row.send()

        def fails(how: str) -> None:
            row, cause = rows[how], HOSTS[how][1]
            deferred, *_ = wait_for(lambda: row.events("deferred"))
            assert deferred["cause"] == cause
            assert (deferred["phase"] != "rcpt") == (how in down)
            if how in down:
                assert row.events("site")[0]["cause"] == cause
                sample = f'relaymta_site_down{{cause="{cause}",hosts="smart",site="{how}"}}'
                wait_for(lambda: relay.metric("relaymta_sites_down") == len(down))
                assert relay.metric(sample) == 1
            wait = row.wait()
            assert "127.0.0.1" in wait["cure"]
            assert wait["command"] == f"queue flush {deferred['id']}"

        together({how: lambda how=how: fails(how) for how in HOSTS})  # type: ignore[misc]
        commands = {}
        for how in ("refused", "other"):
            (ident,) = rows[how].ids()
            text = relay.cli("message", "explain", ident).stdout
            assert "  cure: " in text and "127.0.0.1" in text.partition("  cure: ")[2]
            commands[how] = text.partition("  command: ")[2].splitlines()[0]
            assert commands[how] == f"relaymta queue flush {ident} --spool {relay.spool}"
        others = [how for how in HOSTS if how not in commands]
        commands["others"] = f"relaymta queue flush {' '.join(rows[how].ids()[0] for how in others)} --spool {relay.spool}"
        for name, command in commands.items():  # the other hosts go on failing
            with ExitStack() as stack:
                better = {}
                for how in others if name == "others" else [name]:
                    if how in peers:
                        peers[how].__exit__()
                    better[how] = stack.enter_context(FakeMx({}, ports[how]))
                words = [sys.executable, "-m", *shlex.split(command)]
                done = subprocess.run(words, capture_output=True, text=True, timeout=90)
                gone = [how for how in better if rows[how].ids()[0] in done.stderr]  # its site was found up before
                assert (done.returncode == 0) == (not gone) and set(gone) <= set(down), done
                for how, peer in better.items():
                    wait_for(lambda peer=peer: peer.messages, what=how)
                    wait_for(lambda how=how: rows[how].events("delivered"), what=how)
        wait_for(lambda: relay.metric("relaymta_sites_down") == 0)


def test_commands_for_sites_with_special_names_and_for_policies_work(tmp_path):
    """Names of MX sites have parentheses and bars in them; those of policies, blanks and equals signs."""
    zone = ["d.test. MX 10 a.mx.test.", "d.test. MX 20 b.mx.test.", "a.mx.test. A 127.0.0.1", "b.mx.test. A 127.0.0.1"]

    def command(ident: str) -> str:
        (place,) = control.ask(relay.spool / "control.sock", "explain", ident=ident)["waits"]
        return str(place["wait"]["command"])

    with FakeMx({}) as peer, nameserver_with(tmp_path, zone) as nameserver:
        settings = [f'delivery.nameservers=["{nameserver}"]', f"delivery.port={peer.port}"]
        with Relay(tmp_path, None, *settings) as relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "x@d.test")
            wait_for(lambda: peer.messages)
            relay.cli("site", "suspend", "mx/(a|b).mx.test", "--for", "1h")
            relay.cli("policy", "hold", "--domain", "d.test", "--from", "z@b.example", "--for", "1h")
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "x@d.test")
            relay.send("Subject: x\r\n\r\nx\r\n", "z@b.example", "x@d.test")
            queued = wait_for(lambda: len(relay.events("queued")) == 3 and relay.events("queued"))
            first, second = (event["id"] for event in queued[1:])
            for ident, begins in ((second, "policy remove hold "), (first, "site resume ")):
                wait_for(lambda ident=ident, begins=begins: command(ident).startswith(begins))
                text = relay.cli("message", "explain", ident).stdout
                line = text.partition("  command: ")[2].splitlines()[0].replace("relaymta", f"{sys.executable} -m relaymta", 1)
                done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=90)
                assert done.returncode == 0, done
            wait_for(lambda: len(peer.messages) == 3)


def test_delivered_mail_has_its_address_port_and_tls(tmp_path):
    path = str(tmp_path / "s")
    rules = {"RCPT": {f"b@{name}.test": b"450 4.2.1 no\r\n" for name in ("smtp", "lmtp")}}
    with FakeMx(rules) as smtp, FakeMx(rules, path=path, lmtp=True):
        rows = {
            "smtp": Row("smtp", f"127.0.0.1:{smtp.port}"),
            "lmtp": Row("lmtp", f"unix:{path}", keys='protocol="lmtp"'),
        }
        expected = {"smtp": ("127.0.0.1", smtp.port, "", ""), "lmtp": ("", 0, "", "")}
        with relay_for(tmp_path, rows.values()):
            for row in rows.values():
                row.send("Subject: x\r\n\r\nx\r\n", "a")
                row.send("Subject: x\r\n\r\nx\r\n", "a", "b")
            for name, row in rows.items():
                for event in wait_for(lambda row=row: len(row.events("delivered")) == 2 and row.events("delivered")):
                    assert (event["address"], event["port"], event["tls"], event["cipher"]) == expected[name], name
