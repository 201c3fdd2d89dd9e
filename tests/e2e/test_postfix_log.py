"""The log in the form of Postfix, by the programs that read it: pflogsumm, and fail2ban's filters."""

import base64
import json
import re
import shutil
import signal
import smtplib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relaymta.log import record_of
from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.pages import blocks, section
from tests.support.programs import need

LOGGED_IN, BAD, STRANGER = "127.0.0.3", "127.0.0.66", "127.0.0.67"  # clients; 127.0.0.1 may relay
RULES = {
    "RCPT": {
        "later@d.example": b"450 4.2.0 to=<x@y>, relay=none, delay=1, status=sent (ok)\r\n",
        "gone@d.example": b"550 5.1.1 no such user\r\n", "gone2@d.example": b"550 5.1.1 neither\r\n",
    }
}  # fmt: skip
CONFIG = """
hostname = "relay.example"
[[listener]]
address = "127.0.0.1:{port}"
auth = "may"
auth_in_clear = true
[[route]]
name = "out"
hosts = ["127.0.0.1:{peer}"]
[relay]
networks = ["127.0.0.1/32"]
[accounts]
file = "{folder}/accounts.toml"
[log]
format = "postfix"
[delivery]
first_retry = 1000
"""


class PostfixLike(Relay):
    """A relay whose log is in the form of Postfix. Its events: those of the history. `copy`: the log after a while."""

    def __init__(self, folder: Path, peer: FakeMx) -> None:
        super().__init__(folder, None)
        self.config = folder / "relaymta.toml"
        self.config.write_text(CONFIG.format(port=self.port, peer=peer.port, folder=folder))
        self.copy = folder / "copy.log"

    def command(self) -> list[str]:
        given = super().command()
        listen = given.index("--listen")
        return [*given[:listen], *given[listen + 2 :], "-c", str(self.config)]

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def events(self, name: str) -> list[Any]:
        if name == "started":
            return [line for line in self.lines() if re.search(r" postfix/relaymta\[\d+\]: started ", line)]
        records = (line for path in (self.spool / "history").glob("*.jsonl") for line in path.read_bytes().splitlines())
        return [record for line in records if type(record := record_of(line)).__name__ == name]


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostfixLike]:
    """One after a small load of all kinds."""
    with FakeMx(RULES) as peer:
        made = PostfixLike(tmp_path_factory.mktemp("postfix"), peer)
        command = [made.python, "-m", "relaymta", "user", "add", "ann", "-c", made.config, "--spool", made.spool]
        subprocess.run(command, input=b"right\n", stdout=subprocess.DEVNULL, check=True)
        with made:
            load(made)
            shutil.copy(made.log, made.copy)
            yield made


def load(relay: PostfixLike) -> None:
    relay.send("Message-ID: <1@b.example>\r\n\r\nx\r\n", "a@b.example", "one@d.example", "two@d.example", "gone@d.example")
    relay.send("\r\nx\r\n", '"x>, status=sent (y"@b.example', "later@d.example")
    relay.send("\r\nx\r\n", "", "gone2@d.example")
    with smtplib.SMTP("127.0.0.1", relay.port, source_address=(LOGGED_IN, 0), timeout=60) as client:
        client.login("ann", "right")
        client.sendmail("ann@b.example", ["three@d.example"], "\r\nx\r\n")
    with smtplib.SMTP("127.0.0.1", relay.port, "evil>,helo", source_address=(STRANGER, 0), timeout=60) as client:
        client.ehlo()
        client.mail("s@b.example")
        assert [client.rcpt(f"{n}@elsewhere.example")[0] for n in range(3)] == [550] * 3
    with smtplib.SMTP("127.0.0.1", relay.port, source_address=(BAD, 0), timeout=60) as client:
        client.ehlo()
        for mechanism in ("PLAIN", "LOGIN"):
            secret = base64.b64encode(b"\0ann\0wrong").decode()
            code, _ = client.docmd("AUTH", f"PLAIN {secret}") if mechanism == "PLAIN" else login(client)
            assert code == 535
    # 4 messages and the DSN about gone@
    wait_for(lambda: sum(len(one.recipients) for one in relay.events("delivered")) == 4, what="deliveries")
    wait_for(lambda: relay.events("deferred") and len(relay.events("bounced")) == 2, what="failures")
    wait_for(lambda: sum("removed" in line for line in relay.lines()) == 4, what="the log")


def login(client: smtplib.SMTP) -> tuple[int, bytes]:
    client.docmd("AUTH", "LOGIN")
    client.docmd(base64.b64encode(b"ann").decode())
    return client.docmd(base64.b64encode(b"wrong").decode())


EXPECTED = {"received": 4, "delivered": 4, "forwarded": 0, "deferred": 1, "bounced": 2, "rejected": 3, "held": 0, "discarded": 0}


def test_pflogsumm_counts_what_has_happened(relay):
    done = subprocess.run([need("pflogsumm"), relay.copy], capture_output=True, text=True, check=True)
    found = {name: int(number) for number, name in re.findall(r"^ +(\d+) +([a-z]+)\b", done.stdout, re.M)}
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert (found["senders"], found["recipients"]) == (4, 4)  # not those of the DSN
    assert re.search(
        r"^message reject detail\n-+\n  RCPT\n    Relay access denied \(total: 3\)\n +3 +127\.0\.0\.67$", done.stdout, re.M
    )
    assert "\n  127.0.0.1 (total: 2)\n" in done.stdout and " 5.1.1 no such user (in reply to RCPT TO command)\n" in done.stdout
    lines = relay.copy.read_text()
    received = sum(one.size for one in relay.events("queued") if one.client and one.id in lines)
    assert f" {received}   bytes received\n" in done.stdout
    assert "size" not in done.stdout.partition("message deferral detail")[2], "each message has its size"


def banned(log: Path, jail: str) -> list[str]:
    """The addresses that a filter of fail2ban finds."""
    done = subprocess.run([need("fail2ban-regex"), "-o", "ip", log, jail], capture_output=True, text=True, check=False)
    return sorted(set(done.stdout.split()))


@pytest.mark.parametrize(
    ("jail", "clients"),
    [
        ("postfix", [STRANGER]), ("postfix[mode=auth]", [BAD]), ("postfix[mode=aggressive]", [BAD, STRANGER]),
    ],
)  # fmt: skip
def test_fail2ban_finds_who_is_bad_and_nobody_else(relay, jail, clients):
    assert banned(relay.copy, jail) == clients


def test_lines_name_the_message_and_are_one_each(relay):
    lines = relay.copy.read_text().splitlines()
    (first,) = [one for one in relay.events("queued") if one.message_id == "<1@b.example>"]
    about = [re.sub(r"^.*? postfix/(\w+)\[\d+\]: ", r"\1 ", line) for line in lines if first.id in line]
    assert about[:3] == [
        f"smtpd {first.id}: client=unknown[127.0.0.1]", f"cleanup {first.id}: message-id=<1@b.example>",
        f"qmgr {first.id}: from=<a@b.example>, size={first.size}, nrcpt=3 (queue active)",
    ]  # fmt: skip
    assert about[-1] == f"qmgr {first.id}: removed" and sum("status=sent" in line for line in about) == 2
    (bounce,) = [line for line in lines if "sender non-delivery notification" in line]
    assert bounce.rpartition(" ")[2] in {one.id for one in relay.events("queued") if not one.sender and not one.client}
    assert all(re.match(r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+ postfix/[a-z]+\[\d+\]: \S", line) for line in lines)


def test_the_history_is_as_ever(relay):
    (first,) = [one for one in relay.events("queued") if one.message_id == "<1@b.example>"]
    rows = [json.loads(line) for line in relay.cli("message", "history", first.id, "--json").stdout.splitlines()]
    assert [row["event"] for row in rows] == ["queued", "delivered", "delivered", "bounced"]
    assert [row.get("stays", False) for row in rows] == [False, True, True, False], "the last one has ended it"
    assert all(row["delay"] < 100 for row in rows[1:]) and rows[3]["sender"] == "a@b.example" and "expired" not in rows[3]


def test_commands_show_it(relay):
    def shown(*options: str) -> list[str]:
        return relay.cli("logs", "tail", "-n", "1000", *options, "--set", f"log.file={relay.copy}").stdout.splitlines()

    assert shown() == relay.copy.read_text().splitlines()
    (later,) = relay.events("deferred")
    assert {line.partition(": ")[2].split()[0] for line in shown("--id", later.id)} == {f"{later.id}:"}
    assert all("status=sent" in line for line in shown("--event", "delivered")) and len(shown("--event", "delivered")) == 4
    assert len(shown("--event", "rejected", "--domain", "elsewhere.example")) == 3
    assert len(shown("--to", "gone@d.example")) == 1 and len(shown("--from", '"x>, status=sent (y"@b.example')) == 1
    done = relay.cli("logs", "tail", "--json", "--set", f"log.file={relay.copy}", "--set", "log.format=postfix", check=False)
    assert done.returncode == 64 and "message history" in done.stderr


def test_the_journal_gets_no_time_and_the_recipes_of_the_page_read_it(relay, tmp_path):
    """As systemd's journal shows lines that came from standard error: `journalctl -o short`."""
    pattern = r"^([A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S+) (postfix/.*)$"
    lines = relay.copy.read_text().splitlines()
    journal = [re.sub(pattern, r"\1 relaymta[1]: \2", line) for line in lines]
    text = "".join(f"{line}\n" for line in journal)
    recipes = "".join(blocks(section("log.md", "In the form of Postfix")))
    (pipe,) = re.findall(r"^journalctl -u relaymta -o short \| (sed .*) \| pflogsumm$", recipes, re.M)
    done = subprocess.run(["bash", "-c", pipe], input=text, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == lines
    (jail,) = re.findall(r"^filter = (postfix\[.*__hostname.*\])$", recipes, re.M)
    (tmp_path / "journal").write_text(text)
    assert banned(tmp_path / "journal", jail) == [BAD, STRANGER]


def test_the_file_is_rotated_and_followed(relay, tmp_path):
    command = [relay.python, "-m", "relaymta", "logs", "tail", "-f", "-n", "0", "--event", "queued", "--spool", relay.spool]
    before, shown, sent = relay.log.read_text(), tmp_path / "shown", 0
    with shown.open("wb") as output:
        follower = subprocess.Popen([*command, "--set", f"log.file={relay.log}"], stdout=output)
    try:

        def follows() -> bool:
            """Whether it has begun: messages are sent until it shows one."""
            nonlocal sent
            sent += 1
            relay.send("\r\nx\r\n", f"a{sent}@b.example")
            return bool(shown.read_text())

        wait_for(follows, what="the follower")
        rotated = relay.log.with_suffix(".log.1")
        relay.log.rename(rotated)
        relay.send("\r\nx\r\n", "moved@b.example")
        wait_for(lambda: "from=<moved@b.example>" in rotated.read_text(), what="the line in the old file")
        assert relay.process is not None
        relay.process.send_signal(signal.SIGUSR1)
        wait_for(relay.log.exists, what="the new file")
        wait_for(
            lambda: relay.send("\r\nx\r\n", "new@b.example") or "new@b.example" in relay.log.read_text(), what="a line there"
        )
        wait_for(lambda: "from=<new@b.example>" in shown.read_text(), what="what follows")
        assert "from=<moved@b.example>" in shown.read_text() and rotated.read_text().startswith(before)
    finally:
        follower.send_signal(signal.SIGINT)
        assert follower.wait(60) == 0
