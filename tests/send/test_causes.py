"""What a provider's failure is said to be: the cause for programs, what operators read, and what `explain` advises."""

import json
import os
import shlex
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from relaymta.config import Route
from relaymta.errors import Failure
from relaymta.proto.envelope import CATEGORIES, PERMANENT, TRANSIENT, Attempt, category_of
from relaymta.send.cures import cure
from relaymta.send.login import LoginFailed, _password
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import CLOSE, SILENT, FakeMx
from tests.support.resolver import nameserver_with


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


def explained(relay: Relay, ident: str) -> dict:
    (place,) = json.loads(relay.cli("message", "explain", ident, "--json").stdout)["waits"]
    return place["wait"]


def login(folder: Path, port: int, keys: str) -> Relay:
    route = f'route=[{{name="out", hosts=["localhost:{port}"], tls="verify", username="me", {keys}}}]'
    made = Relay(folder, None, route, "delivery.first_retry=3600")
    made.environment = {"SSL_CERT_FILE": str(folder / "ca.pem"), "RELAYMTA_SECRET": "hunter2"}
    return made


def context(folder: Path) -> ssl.SSLContext:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(found)
    return found


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ('password_env="RELAYMTA_UNSET"', ["password_env RELAYMTA_UNSET", "not set"]),
        ('password_env="RELAYMTA_SECRET"', ["535 5.7.8 no", "user me", "password_env RELAYMTA_SECRET"]),
        ('password_file="/nonexistent"', ["password_file /nonexistent", "No such file", "user me"]),
    ],
)
def test_a_failed_login_names_host_user_and_where_the_password_is(tmp_path, keys, expected):
    attempts: list[bytes] = []

    def refuse(line: bytes) -> bytes:
        attempts.append(line)
        return b"535 5.7.8 no\r\n"

    with FakeMx({}, tls=context(tmp_path), auth=(b"PLAIN", refuse)) as peer, login(tmp_path, peer.port, keys) as relay:
        relay.send()
        (deferred, *_) = wait_for(lambda: relay.events("deferred"))
        for part in ["localhost", *expected]:
            assert part in deferred["reply"], deferred["reply"]
        assert (deferred["cause"], deferred["phase"]) == ("password", "auth")
        assert relay.events("site")[0]["cause"] == "password" and relay.events("site")[0]["fault"] == "us"
        assert "hunter2" not in relay.log.read_text()
        assert len(attempts) == ("RELAYMTA_SECRET" in keys), "an empty password is never tried"
        assert "username" in (wait := explained(relay, deferred["id"]))["cure"] or "user me" in wait["cure"]
        warned = [event["text"] for event in relay.events("warning")]
        assert any("RELAYMTA_UNSET" in text for text in warned) == ("UNSET" in keys)


HOSTS = {  # what the host does, or why there is none: (rules of FakeMx or None, cause)
    "refused": (None, "refused"),
    "closed": ({"EHLO": CLOSE}, "network"),
    "421": ({"EHLO": b"421 4.3.2 later\r\n"}, "421"),
    "policy": ({"EHLO": b"554 5.7.1 blocked\r\n"}, "policy"),
    "recipient": ({"RCPT": b"450 4.7.1 greylisted\r\n"}, "policy"),
    "other": ({"RCPT": b"450 4.2.1 not now\r\n"}, "reply"),
    "silent": ({"EHLO": SILENT}, "timeout"),
}


@pytest.mark.parametrize("how", HOSTS)
def test_the_cause_is_in_the_log_and_the_command_of_explain_works(tmp_path, how):
    rules, cause = HOSTS[how]
    port = free_port()
    peer = FakeMx(rules, port) if rules is not None else None
    settings = ["delivery.first_retry=3600", "delivery.patience=0.01"]
    with Relay(tmp_path, f"127.0.0.1:{port}", *settings) as relay:
        relay.send()
        (deferred, *_) = wait_for(lambda: relay.events("deferred"))
        assert deferred["cause"] == cause
        if deferred["phase"] != "rcpt":
            assert relay.events("site")[0]["cause"] == cause
            wait_for(lambda: relay.metric("relaymta_sites_down") == 1)
            assert relay.metric(f'relaymta_site_down{{cause="{cause}",hosts="smart",site="smarthost"}}') == 1
        text = relay.cli("message", "explain", deferred["id"]).stdout
        assert "  cure: " in text and "127.0.0.1" in text.partition("  cure: ")[2]
        command = text.partition("  command: ")[2].splitlines()[0]
        assert command == f"relaymta queue flush {deferred['id']} --spool {relay.spool}"
        if peer is not None:
            peer.__exit__()
        with FakeMx({}, port) as better:
            words = [sys.executable, "-m", *shlex.split(command)]
            assert subprocess.run(words, capture_output=True, timeout=90).returncode == 0
            wait_for(lambda: better.messages)
        wait_for(lambda: relay.events("delivered"))
        wait_for(lambda: relay.metric("relaymta_sites_down") == 0)


def test_commands_for_sites_with_special_names_and_for_policies_work(tmp_path):
    """Names of MX sites have parentheses and bars in them; those of policies, blanks and equals signs."""
    zone = ["d.test. MX 10 a.mx.test.", "d.test. MX 20 b.mx.test.", "a.mx.test. A 127.0.0.1", "b.mx.test. A 127.0.0.1"]
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
                wait_for(lambda ident=ident, begins=begins: explained(relay, ident)["command"].startswith(begins))
                text = relay.cli("message", "explain", ident).stdout
                command = text.partition("  command: ")[2].splitlines()[0].replace("relaymta", f"{sys.executable} -m relaymta", 1)
                done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=90)
                assert done.returncode == 0, done
            wait_for(lambda: len(peer.messages) == 3)


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_delivered_mail_has_its_address_port_and_tls(tmp_path, protocol):
    if protocol == "lmtp":
        path = str(tmp_path / "s")
        peer, host = FakeMx({"RCPT": {"b@d.example": b"450 4.2.1 no\r\n"}}, path=path, lmtp=True), f"unix:{path}"
        expected: tuple[object, ...] = ("", 0, "", "")
    else:
        peer = FakeMx({"RCPT": {"b@d.example": b"450 4.2.1 no\r\n"}})
        host, expected = f"127.0.0.1:{peer.port}", ("127.0.0.1", peer.port, "", "")
    with peer, Relay(tmp_path, None, f'route=[{{name="out",hosts=["{host}"],protocol="{protocol}"}}]') as relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "", "a@d.example")
        relay.send("Subject: x\r\n\r\nx\r\n", "", "a@d.example", "b@d.example")
        for event in wait_for(lambda: len(relay.events("delivered")) == 2 and relay.events("delivered")):
            assert (event["address"], event["port"], event["tls"], event["cipher"]) == expected
