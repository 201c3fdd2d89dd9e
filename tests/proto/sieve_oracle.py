"""Debian's Pigeonhole (`sieve-test`) as an oracle: what it would do with a message, in the form in which ours is compared."""

import os
import pwd
import re
import subprocess
from pathlib import Path

from relaymta.proto.sieve import SieveError, compile
from relaymta.proto.sieve_message import Message
from relaymta.proto.sieve_outcome import Action, Answered, Discarded, Filed, Kept, Redirected
from relaymta.proto.sieve_run import run

SENDER, RECIPIENT = "ann@a.example", "bob+lists@b.example"
REFUSED, FAILED = ("not valid",), ("failed",)

_CONF = """
base_dir = {folder}/run
state_dir = {folder}/run
log_path = /dev/stderr
mail_uid = {uid}
mail_gid = {gid}
first_valid_uid = 1
first_valid_gid = 1
mail_home = {folder}/home
mail_location = maildir:{folder}/mail
recipient_delimiter = +
"""
_STORED = re.compile(r" \* store message in folder: (.*)\n((?:        \+ .*\n)*)")


class Pigeonhole:
    """`program` with scripts and messages in `folder`, which anybody may read."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program = program
        self.folder = folder
        user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
        for name in ("home", "mail", "run"):
            (folder / name).mkdir()
            os.chown(folder / name, user.pw_uid, user.pw_gid)
        (folder / "conf").write_text(_CONF.format(folder=folder, uid=user.pw_uid, gid=user.pw_gid))

    def actions(self, script: bytes, message: bytes) -> set[tuple[object, ...]] | tuple[str]:
        """What it does with a message; REFUSED: it does not compile the script, FAILED: nor run it to its end."""
        (self.folder / "script.sieve").write_bytes(script)
        (self.folder / "message").write_bytes(message)
        done = subprocess.run(
            [self.program, "-c", "conf", "-C", "-f", SENDER, "-r", RECIPIENT, "-a", RECIPIENT, "script.sieve", "message"],
            cwd=self.folder, capture_output=True, text=True, errors="replace", timeout=60, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        if "failed to compile" in said:
            return REFUSED
        if "final result: success" not in said:
            assert "final result" in said, said
            return FAILED
        found: set[tuple[object, ...]] = set()
        for match in _STORED.finditer(done.stdout):
            flags = re.search(r"\+ add IMAP flags: (.*)", match[2])
            create = "create mailbox" in match[2]
            found.add(("store", match[1], frozenset(flags[1].lower().split()) if flags else frozenset(), create))
        found |= {("redirect", address) for address in re.findall(r" \* redirect message to: <(.*)>", done.stdout)}
        found |= {("reject",)} if " * reject message" in done.stdout else set()
        found |= {("vacation",)} if " * send vacation message" in done.stdout else set()
        return found


def ours(script: bytes, message: bytes) -> set[tuple[object, ...]] | tuple[str]:
    """The same of our own interpreter."""
    try:
        compiled = compile(script)
    except SieveError:
        return REFUSED
    outcome = run(
        compiled, Message(message), sender=SENDER, recipient=RECIPIENT, addresses=("bob@b.example",), seconds=1_795_842_000
    )
    assert not outcome.loop
    if outcome.error:
        return FAILED
    found = {("vacation",) for line, note in outcome.notes}
    return found | {_form(action) for action in outcome.actions if not isinstance(action, Discarded)}


def _form(action: Action) -> tuple[object, ...]:
    if isinstance(action, Kept):
        return "store", "INBOX", frozenset(flag.lower() for flag in action.flags), False
    if isinstance(action, Filed):
        return "store", action.mailbox, frozenset(flag.lower() for flag in action.flags), action.create
    if isinstance(action, Redirected):
        return "redirect", action.address
    return ("vacation",) if isinstance(action, Answered) else ("reject",)
