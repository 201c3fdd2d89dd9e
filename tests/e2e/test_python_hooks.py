"""Hooks in Python in the running relay: at each stage, routes, afterwards, changed files, and those that should not be there."""

import json
import os
import smtplib
import subprocess
import textwrap
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx

TWO = 'route=[{{name="out",hosts=["127.0.0.1:{}"]}},{{name="fast",hosts=["127.0.0.1:{}"],application=["x"]}}]'
STAGES = """
    import json, os
    from relaymta.hooks import *

    async def on_connect(client):
        if os.path.exists(FOLDER + "/closed"): return reject("closed today")
        if os.path.exists(FOLDER + "/later"): return tempfail("too many")

    async def on_helo(client):
        if client.helo == "bad.example": return reject("", "550 5.7.1 No such name")

    async def on_auth(client):
        if client.user == "eve": return reject("not eve", "535 5.7.8 Not you")

    async def on_mail(client, envelope):
        if envelope.sender.startswith("bad"): return reject("bad sender")

    async def on_rcpt(client, envelope, recipient):
        if recipient.startswith("nobody"): return reject("nobody", "550 5.1.1 Nobody")
        if recipient.startswith("tag"): return tag("of the recipient")

    async def on_data(client, envelope):
        if len(envelope.recipients) > 2: return reject("too many")

    @wants_body
    async def on_message(mail):
        if b"spam" in mail.body.read(): return reject("spam in it")
        return accept(Add("X-Hook", f"{mail.client.helo} {mail.client.user} {mail.body.size} {len(mail.envelope.recipients)}"))

    async def choose_route(mail):
        return {"fast": "fast", "wrong": "nowhere"}.get(mail.header.get("Subject"))

    async def tells(event, attempt):
        with open(FOLDER + "/told", "a") as file:
            row = event, attempt.result, attempt.recipients, attempt.route, attempt.reply, attempt.phase
            file.write(json.dumps(row) + "\\n")

    async def on_attempt(attempt): await tells("attempt", attempt)
    async def on_delivered(attempt): await tells("delivered", attempt)
    async def on_deferred(attempt): await tells("deferred", attempt)
    async def on_bounced(attempt): await tells("bounced", attempt)
"""


def written(folder: Path, code: str) -> Path:
    file = folder / "policy.py"
    file.write_text(f"FOLDER = {str(folder)!r}\n" + textwrap.dedent(code))
    return file


@contextmanager
def client(relay: Relay, helo: str = "good.example") -> Iterator[smtplib.SMTP]:
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as one:
        assert one.ehlo(helo)[0] == 250
        yield one


def sent(relay: Relay, subject: str, *to: str, body: str = "hello", sender: str = "a@b.example") -> tuple[int, str]:
    with client(relay) as one:
        one.mail(sender)
        for address in to or ("c@d.example",):
            one.rcpt(address)
        code, text = one.data(f"Subject: {subject}\r\n\r\n{body}\r\n")
    return code, text.decode()


def counted(relay: Relay, name: str) -> dict[str, float]:
    """The samples of a metric that are above 0, by their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{relay.metrics_port}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    rows = [line.rpartition(" ") for line in text.splitlines() if line.startswith(name)]
    return {labels.removeprefix(name): float(value) for labels, _, value in rows if float(value)}


def table(file: Path, more: str = "") -> str:
    return f'filter=[{{name="hook",type="python",file="{file}"{more}}}]'


class WithLogins(Relay):
    """A relay with the applications `ann` and `eve`, which log in with `keys`."""

    def __init__(self, folder: Path, smarthost: str | None, *settings: str) -> None:
        super().__init__(folder, smarthost, *settings)
        self.config = folder / "relay.toml"
        self.config.write_text(
            f'[[listener]]\naddress = "127.0.0.1:{self.port}"\nauth = "may"\nauth_in_clear = true\n'
            f'[accounts]\nfile = "{folder}/accounts.toml"\n'
        )
        said = {name: self.cli("app", "create", name, "--config", str(self.config)).stdout for name in ("ann", "eve")}
        self.keys = {name: text.partition("secret: ")[2].split()[0] for name, text in said.items()}

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]


def test_hooks_at_each_stage(tmp_path: Path) -> None:
    file = written(tmp_path, STAGES)
    with FakeMx({"RCPT": {"bounce@d.example": b"550 5.1.1 no such user\r\n"}}) as peer, FakeMx({}) as fast:
        routes = TWO.format(peer.port, fast.port)
        more = ',on_failure_trusted="tempfail"'
        with WithLogins(tmp_path, None, table(file, more), routes) as relay:
            _of_clients(relay, tmp_path)
            _of_logins(relay)
            _of_messages(relay, peer, fast)
            _afterwards(relay, tmp_path)


def _of_clients(relay: Relay, folder: Path) -> None:
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as one:
        assert one.ehlo("bad.example") == (550, b"5.7.1 No such name")
        assert one.docmd("MAIL FROM:<a@b.example>")[0] == 503
        assert one.ehlo("good.example")[0] == 250
        assert one.helo("bad.example") == (550, b"5.7.1 No such name")
    for name, code, text in (("closed", 554, b"5.7.1 Refused by hook: closed today"), ("later", 421, b"4.7.1 Not taken now")):
        (folder / name).touch()
        one = smtplib.SMTP(timeout=PATIENCE)
        found = one.connect("127.0.0.1", relay.port)
        assert found[0] == code and found[1].startswith(text)
        one.close()
        (folder / name).unlink()
    wait_for(lambda: len(relay.events("rejected")) >= 4, what="the log")
    phases = [(event["phase"], event["reply"][:3]) for event in relay.events("rejected")]
    assert phases == [("connect", "550"), ("connect", "550"), ("connect", "554"), ("connect", "421")]


def _of_logins(relay: WithLogins) -> None:
    with client(relay) as one:
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            one.login("eve", relay.keys["eve"])
        assert (refused.value.smtp_code, refused.value.smtp_error) == (535, b"5.7.8 Not you")
        assert one.login("ann", relay.keys["ann"])[0] == 235, "nobody was logged in"
        assert one.mail("a@b.example")[0] == 250


def _of_messages(relay: Relay, peer: FakeMx, fast: FakeMx) -> None:
    with client(relay) as one:
        assert one.mail("bad@b.example") == (554, b"5.7.1 Refused by hook: bad sender")
        assert one.mail("a@b.example")[0] == 250
        assert one.rcpt("nobody@d.example") == (550, b"5.1.1 Nobody")
        for name in ("a", "b", "c"):
            assert one.rcpt(f"{name}@d.example")[0] == 250
        assert one.docmd("DATA") == (554, b"5.7.1 Refused by hook: too many")
        one.rset()
    assert sent(relay, "x", body="spam") == (554, "5.7.1 Refused by hook: spam in it")
    assert sent(relay, "x", body="y" * 70 + "\r\n" + ("y" * 70 + "\r\n") * 30_000 + "spam")[0] == 554, "one in a file"
    assert sent(relay, "x", "tag@d.example")[0] == 250
    assert sent(relay, "fast")[0] == 250
    assert sent(relay, "wrong") == (451, "4.7.1 hook does not answer now; try again later")
    assert sent(relay, "x", "bounce@d.example")[0] == 250
    wait_for(lambda: len(peer.messages) >= 1 and len(fast.messages) == 1)
    (_, _, data), (_, _, by_fast) = peer.messages[0], fast.messages[0]
    assert b"X-Hook: good.example  7 1\r\n" in by_fast and b"X-Spam" not in by_fast
    assert b"X-Hook: good.example  7 1\r\n" in data and b"X-Spam: Yes\r\n" in data


def _afterwards(relay: Relay, folder: Path) -> None:
    def told() -> list[Any]:
        path = folder / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    wait_for(lambda: {row[0] for row in told()} >= {"delivered", "bounced"})
    rows = told()
    assert ["delivered", "delivered", ["c@d.example"], "fast", "250 2.0.0 taken", ""] in rows
    assert ["bounced", "bounced", ["bounce@d.example"], "out", "550 5.1.1 no such user", "rcpt"] in rows
    wait_for(lambda: len([row for row in told() if row[0] == "attempt"]) >= 3)
    seconds = counted(relay, "relaymta_hook_seconds_count")
    assert seconds['{hook="on_connect"}'] >= 5 and seconds['{hook="choose_route"}'] == 4 and seconds['{hook="on_delivered"}'] >= 2


BAD = """
    import os, sys, time
    from relaymta.hooks import *
    kept = []
    async def on_rcpt(client, envelope, recipient):
        match recipient.partition("@")[0]:
            case "blocks": time.sleep(600)
            case "raises": raise ValueError("a secret")
            case "exits": os._exit(3)
            case "leaks":
                while True: kept.append(bytearray(1 << 20))
            case "forks":
                if os.fork(): os._exit(4)
                time.sleep(600)
            case "ok": return None
"""


def test_what_a_bad_hook_does_costs_the_mail_of_others_nothing(tmp_path: Path) -> None:
    """One client after the other sends what a hook does not survive; meanwhile others send, and each of theirs is taken."""
    file = written(tmp_path, BAD)
    silent, failed = (451, b"4.7.1 hook does not answer now; try again later"), (451, b"4.3.0 Internal error; try again later")
    expected = {"blocks": silent, "raises": failed, "exits": silent, "leaks": failed, "forks": silent}
    more = ',on_failure_trusted="tempfail",memory="256MB",timeout=3'
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", table(file, more)) as relay:
        done, taken, wrong = threading.Event(), [], list[object]()

        def others() -> None:
            while not done.is_set():
                with client(relay) as one:
                    one.mail("a@b.example")
                    found = one.rcpt("ok@d.example")
                    if found[0] == 250:
                        found = one.data(b"Subject: x\r\n\r\nhello\r\n")
                (taken if found[0] == 250 else wrong).append(found)

        threads = [threading.Thread(target=others) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for name, reply in expected.items():
                before = len(taken)
                with client(relay) as one:
                    one.mail("a@b.example")
                    assert one.rcpt(f"{name}@d.example") == reply, name
                    assert one.rcpt(f"{name}@d.example")[0] == 451, "in this transaction it is not asked again, or fails again"
                wait_for(lambda known=before: len(taken) > known + 10, what="mail of others")
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not wrong, wrong[:3]
        failures = counted(relay, "relaymta_hook_failures_total")
        assert failures['{hook="on_rcpt",reason="timeout"}'] == 1 and failures['{hook="on_rcpt",reason="ended"}'] == 2
        assert failures['{hook="on_rcpt",reason="raised"}'] == 4
        places = wait_for(lambda: counted(relay, "relaymta_hook_exceptions_total"))
        wait_for(lambda: sum(counted(relay, "relaymta_hook_exceptions_total").values()) == 4)
        assert all(place.startswith(f'{{place="{file}:') for place in places)
        assert counted(relay, "relaymta_filter_up") == {'{filter="hook"}': 1}, "others are asked all the time"
        texts = [event["text"] for event in relay.events("warning")]
        assert any("more than 50 ms at" in text and "policy.py:8 in on_rcpt" in text for text in texts)
        assert sum("has raised an exception" in text for text in texts) == 2, "each place once a minute"
        wait_for(lambda: len(peer.messages) == len(taken))
        workers = _children(relay.process.pid) if relay.process is not None else []
        processes = [one for worker in workers for one in _children(worker)]
        assert processes
        assert relay.stop() == 0
    wait_for(lambda: not any(os.path.exists(f"/proc/{one}") for one in processes))


def _children(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


ONE = "from relaymta.hooks import *\nasync def on_rcpt(client, envelope, recipient): return reject('WORD')\n"


def test_a_changed_file_is_imported_by_itself_and_sessions_under_way_keep_the_old_code(tmp_path: Path) -> None:
    file = tmp_path / "policy.py"
    file.write_text(ONE.replace("WORD", "one"))
    with Relay(tmp_path, "127.0.0.1:1", table(file), workers=2) as relay:

        def asked(one: smtplib.SMTP) -> bytes:
            one.rset()
            one.mail("a@b.example")
            return one.rcpt("c@d.example")[1].rpartition(b" ")[2]

        def all_new(word: bytes) -> bool:
            found = set()
            for _ in range(8):
                with client(relay) as new:
                    found.add(asked(new))
            return found == {word}

        with client(relay) as old:
            assert asked(old) == b"one"
            file.write_text(ONE.replace("WORD", "second"))
            wait_for(lambda: all_new(b"second"), what="both workers to have the new code")
            assert asked(old) == b"one"
            file.write_text("this is (\n")
            told = f"{file}:1: '(' was never closed; what was read before stays in use"
            wait_for(lambda: any(told in event["text"] for event in relay.events("warning")), what="a warning")
            assert asked(old) == b"one" and all_new(b"second")
        assert "refused" in (relay.cli("reload", check=False).stdout + relay.cli("reload", check=False).stderr)


def test_a_relay_does_not_start_with_hooks_that_cannot_be_imported(tmp_path: Path) -> None:
    file = tmp_path / "policy.py"
    configuration = tmp_path / "relaymta.toml"
    configuration.write_text(
        f'hostname = "relay.example"\nspool = "{tmp_path}/spool"\n[[listener]]\naddress = "127.0.0.1:2525"\n'
        f'[[filter]]\nname = "hook"\ntype = "python"\nfile = "{file}"\n'
    )
    relay = Relay(tmp_path, None)
    for text, why in (
        ("import os\nx = os.nothing\n", f"{file}:2: AttributeError: module 'os' has no attribute 'nothing'"),
        ("async def on_rctp(c): pass\n", f"{file}: none of its functions is a hook"),
        (None, f"{file}: No such file or directory"),
    ):  # fmt: skip
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        done = relay.cli("-c", str(configuration), "config", "check", check=False)
        assert done.returncode == 78 and f"{configuration}:8: filter.0.file: {why}" in done.stdout + done.stderr
        command = [relay.python, "-m", "relaymta", "-c", str(configuration), "serve", "--ephemeral"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 78 and why in done.stderr
    file.write_text("import os\nasync def on_rcpt(c, e, r): pass\n")
    assert relay.cli("-c", str(configuration), "config", "check").returncode == 0
    done = relay.cli("-c", str(configuration), "filter", "check")
    assert done.stdout == f"hook: has on_rcpt ({file})\n"


def test_hooks_look_at_mail_in_the_queue_and_choose_its_route_there(tmp_path: Path) -> None:
    code = """
        from relaymta.hooks import *
        @wants_body
        async def on_message(mail): return accept(Add("X-Queued", str(len(mail.body.read()))))
        async def choose_route(mail): return "fast"
    """
    file = written(tmp_path, code)
    with FakeMx({}) as fast:
        routes = TWO.format(1, fast.port)
        with Relay(tmp_path, None, table(file, ',stage="queued"'), routes) as relay:
            assert sent(relay, "x")[0] == 250
            assert sent(relay, "x", body=("y" * 70 + "\r\n") * 30_000)[0] == 250
            wait_for(lambda: len(fast.messages) == 2)
            assert sorted(data.count(b"X-Queued: 7\r\n") for _, _, data in fast.messages) == [0, 1]
            assert any(b"X-Queued: 2160002\r\n" in data for _, _, data in fast.messages)
