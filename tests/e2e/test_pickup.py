"""The pickup folder: messages as files."""

import itertools
import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Relay, wait_for

NOBODY = pwd.getpwnam("nobody").pw_uid
_count = itertools.count()
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    with tempfile.TemporaryDirectory(prefix="relaymta-") as found:
        pickup = Path(found) / "pickup"
        pickup.mkdir()
        with Relay(Path(found), "127.0.0.1:9", f"local.pickup={pickup}") as running:
            yield running


def put(relay: Relay, name: str, text: bytes, uid: int | None = None) -> None:
    """As a program does it: written elsewhere, then renamed."""
    pickup = relay.folder / "pickup"
    part = pickup / f".{name}"
    part.write_bytes(text)
    if uid is not None:
        os.chown(part, uid, -1)
    part.rename(pickup / name)


def taken(relay: Relay, name: str, text: bytes, uid: int | None = None) -> tuple[dict[str, object], str]:
    """Put a file there: the log's record and the message."""
    ident = f"<{next(_count)}@test.example>"
    put(relay, name, f"Message-ID: {ident}\n".encode() + text, uid)
    [event] = wait_for(lambda: [row for row in relay.events("queued") if row["message_id"] == ident])
    wait_for(lambda: not (relay.folder / "pickup" / name).exists())
    return event, relay.cli("message", "raw", event["id"]).stdout


def reason(relay: Relay, name: str, text: bytes, uid: int | None = None) -> str:
    """Put a file there that is moved aside: why."""
    put(relay, name, text, uid)
    bad = relay.folder / "pickup" / "bad"
    wait_for(lambda: (bad / name).exists())
    assert (bad / name).read_bytes() == text
    return (bad / f"{name}.reason").read_text()


def test_a_header_says_who_sends_what_to_whom(relay):
    text = b"From: A <a@x.example>\nTo: b@x.example\nCc: c@x.example\nBcc: d@x.example\nSubject: x\n\n.\n..\nBcc: e\n"
    event, stored = taken(relay, "one.eml", text)
    assert (event["sender"], event["recipients"]) == ("a@x.example", ["b@x.example", "c@x.example", "d@x.example"])
    assert stored.endswith("\nSubject: x\n\n.\n..\nBcc: e\n")
    assert "d@x.example" not in stored
    assert "\nDate: " in stored


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_x_sender_and_x_receiver_are_the_envelope(relay, end):
    envelope = [b"X-Sender: bounce@x.example", b"X-Receiver: <r@x.example>", b"x-receiver: s@x.example,", b" t@x.example"]
    lines = [*envelope, b"From: a@x.example", b"To: b@x.example", b"", b"body", b""]
    event, stored = taken(relay, "x.eml", end.join(lines))
    assert (event["sender"], event["recipients"]) == ("bounce@x.example", ["r@x.example", "s@x.example", "t@x.example"])
    assert "X-" not in stored and "t@x.example" not in stored
    assert stored.endswith("\nFrom: a@x.example\nTo: b@x.example\n\nbody\n")
    assert taken(relay, "null.eml", b"X-Sender: <>\nFrom: a@x.example\nTo: b@x.example\n\n")[0]["sender"] == ""


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_large_file_arrives_whole(relay, end):
    body = b"".join(b"%d %s%s" % (number, b"x" * 90, end) for number in range(30_000))
    _, stored = taken(relay, f"large{len(end)}{end[0]}.eml", b"From: a@x.example\nTo: b@x.example\n\n" + body)
    assert stored.partition("\n\n")[2].encode() == body.replace(end, b"\n")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "empty"),
        (b"hello\n\nTo: a@x.example\n", "does not begin with a header"),
        (b"To: b@x.example\n\n", "neither X-Sender nor From"),
        (b"From: a@x.example\nSubject: x\n\n", "no recipient"),
        (b"From: a@@x.example\nTo: b@x.example\n\n", "From or Sender"),
        (b"From: a@x.example\nTo: b c@x.example\n\n", "no address"),
        (b"From: a@x.example\nTo: b@x.example\n" + b"X-Long: x\n" * 500_000, "too long"),
        (b"From: a@x.example\nX-Receiver: b@\n\n", "501"),
    ],
)
def test_a_broken_file_is_put_aside_with_its_reason(relay, text, why):
    assert why in reason(relay, f"{why.replace(' ', '')}.eml", text)


def test_recipients_that_are_refused_are_named(relay):
    found = reason(relay, "some.eml", b"From: a@x.example\nX-Receiver: b@x.example\nX-Receiver: c@\n\n")
    assert "not to these recipients" in found and "<c@>" in found and "b@x.example" not in found


@root_only
def test_the_owner_of_a_file_is_its_user(relay):
    event, _ = taken(relay, "own.eml", b"From: nobody\nTo: b@x.example\n\n", NOBODY)
    assert (event["user"], event["sender"]) == ("nobody", "nobody@relay.example")
    assert "relay.local_users" in reason(relay, "other.eml", b"From: boss@x.example\nTo: b@x.example\n\n", NOBODY)


def test_other_files_and_those_that_are_not_complete_stay(relay):
    pickup = relay.folder / "pickup"
    (pickup / "note.txt").write_text("x")
    (pickup / ".part.eml").write_text("x")
    taken(relay, "z.eml", b"From: a@x.example\nTo: b@x.example\n\n")
    assert (pickup / "note.txt").exists()
    assert (pickup / ".part.eml").exists()
