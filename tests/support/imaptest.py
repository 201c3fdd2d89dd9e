"""Dovecot's imaptest: scripts of commands with the answers expected, and many clients at once that compare what they see.

It is no part of this tree. IMAPTEST is the path of the program, IMAPTEST_TESTS that of its scripts (without it: the folder
`tests` beside the program, as it is where it was built), IMAPTEST_SECONDS how long each stress test lasts."""

import imaplib
import os
import random
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.daemon import PATIENCE
from tests.support.imap_servers import Account
from tests.support.messages import ATTACHED

__all__ = ["PROGRAM", "SCRIPTS", "SECONDS", "Scripted", "Stressed", "needs", "scripted", "session", "stressed"]

PROGRAM = os.environ.get("IMAPTEST", "")
SCRIPTS = Path(os.environ.get("IMAPTEST_TESTS") or Path(PROGRAM).parent / "tests")
SECONDS = int(os.environ.get("IMAPTEST_SECONDS", "3"))

_SCRIPTS_PATIENCE = 30 * PATIENCE  # each command that is not answered takes imaptest 30 seconds
_RESULT = re.compile(
    r"(\d+) test groups: (\d+) failed, (\d+) skipped.*\n"
    r"base protocol: (\d+)/(\d+) individual commands failed\n"
    r"extensions: (\d+)/(\d+) individual commands failed\n"
)
_COMPLAINT = re.compile(r"(Error|Warning|Panic|Fatal|Info): | - \d+ stalled for ")
_TOTALS = re.compile(r"^Totals:\n(.+)\n(?:.*%.*\n)+([ \d]+)$", re.MULTILINE)


class Scripted(NamedTuple):
    """What the scripts came to: how many there are, how many failed, how many were skipped for want of a capability. `commands`:
    how many commands were tried, of the base protocol and of extensions; `bad`: how many of these failed."""

    scripts: int
    failed: int
    skipped: int
    bad: tuple[int, int]
    commands: tuple[int, int]
    output: str


class Stressed(NamedTuple):
    """What a stress test came to. `answered`: commands answered OK, by the first letters of their names as imaptest shows them
    ("Logi", "Fetc"; "ChkP": sessions that agreed with the others at a checkpoint). `complaints`: what it said was wrong."""

    answered: dict[str, int]
    complaints: list[str]
    output: str


def session(account: Account) -> imaplib.IMAP4:
    """A session of the user, logged in."""
    made = imaplib.IMAP4("127.0.0.1", account.ports["imap"], timeout=PATIENCE)
    made.login(account.user, account.password)
    return made


def needs() -> dict[str, set[str]]:
    """The names of the scripts, and the capabilities (in capitals) that each needs."""
    found = {}
    for path in SCRIPTS.iterdir():
        if path.is_file() and path.suffix != ".mbox" and not path.name.startswith("."):
            header = path.read_bytes().partition(b"\n\n")[0].decode("latin-1").upper()
            found[path.name] = {
                word for line in header.splitlines() if line.startswith("CAPABILITIES:") for word in line.split()[1:]
            }
    return found


def scripted(account: Account, folder: Path, *words: str) -> Scripted:
    """Run all scripts as a user whose mail may be lost. `folder` gets what was said by both sides (rawlog.*)."""
    status, output = _run(account, folder, _SCRIPTS_PATIENCE, f"test={SCRIPTS.resolve()}", "rawlog", *words)
    result = _RESULT.search(output)
    assert status in (0, 2) and result is not None, output
    scripts, failed, skipped, bad, base, bad_extensions, extensions = map(int, result.groups())
    return Scripted(scripts, failed, skipped, (bad, bad_extensions), (base, extensions), output)


def stressed(account: Account, folder: Path, words: Sequence[str], seconds: int) -> Stressed:
    """Let clients do what `words` (arguments of imaptest) say for so many seconds, all as this user."""
    messages = folder / "messages"
    messages.write_bytes(_messages(100))
    arguments = (f"secs={seconds}", "seed=1", f"mbox={messages}", *words)
    status, output = _run(account, folder, seconds + 2 * PATIENCE, *arguments)
    totals = _TOTALS.search(output)
    assert status == 0 and totals is not None, output
    answered = dict(zip(totals[1].split(), map(int, totals[2].split()), strict=True))
    return Stressed(answered, [line for line in output.splitlines() if _COMPLAINT.match(line)], output)


def _run(account: Account, folder: Path, patience: float, *words: str) -> tuple[int, str]:
    """Its exit status (negative: a signal), and all that it said."""
    port = account.ports["imaps" if account.security == "implicit" else "imap"]
    secure = ["ssl=any-cert"] if account.security == "implicit" else []
    command = [PROGRAM, "host=127.0.0.1", f"port={port}", *secure, f"user={account.user}", f"pass={account.password}", *words]
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=patience, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode("utf-8", "replace")
        raise AssertionError(f"imaptest has not ended after {patience:.0f} s: {said}") from None
    return done.returncode, done.stdout


def _messages(count: int) -> bytes:
    """An mbox of messages, each with a Message-ID of its own, by which imaptest knows it again."""
    chance = random.Random(1)
    made = []
    for number in range(count):
        header = (
            f"From s@x.example  Thu Jan  1 10:{number // 60:02}:{number % 60:02} 2026\r\n"
            f"Message-ID: <{number}@x.example>\r\nDate: Thu, 1 Jan 2026 10:00:00 +0100\r\n"
            f'Subject: message {number}\r\nTo: "A \\"B\\" C" <a@local.example>, undisclosed-recipients:;\r\n'
        )
        text = "From: s@x.example\r\n\r\n" + "".join(f"{chance.randbytes(30).hex()}\r\n" for _ in range(chance.randint(0, 60)))
        made.append(header.encode() + (ATTACHED if number % 4 == 0 else text.encode()) + b"\r\n")
    return b"".join(made)
