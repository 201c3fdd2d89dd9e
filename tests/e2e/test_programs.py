"""Programs that send mail, the real ones: each configured as docs/programs.md says, by a running relay to a sink."""

import email
import email.policy
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import pytest

from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx
from tests.support.postfix_sendmail import PostfixSendmail
from tests.support.programs import need
from tests.support.sending import FAILED, WAYS, Done, Mail, Sending, Way

TEXT = "Grüße\n.\n..\n...more\n.end\n\nFrom here on\n" + "long " * 300 + "\nlast\n"
ATTACHED = bytes(range(256)) + b"\r\n.\r\n.\n\n"
EVERYBODY = ["bob@x.example", "carl@y.example", "dora@y.example", "eve@x.example"]
SENDMAIL = {name: way for name, way in WAYS.items() if way.sendmail}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@pytest.fixture(scope="module")
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as found:
        yield found


@pytest.fixture(scope="module")
def relay(peer: FakeMx) -> Iterator[Sending]:
    """In a folder that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="relaymta-") as folder:
        Path(folder).chmod(0o755)
        with Sending(Path(folder), peer.port) as found:
            yield found


def mail(way: Way, subject: str, *to: str) -> Mail:
    return Mail(list(to) or EVERYBODY[:1], [EVERYBODY[1]], EVERYBODY[2:], subject, TEXT, ATTACHED if way.attaches else b"")


def arrived(peer: FakeMx, subject: str) -> list[tuple[str, list[str], bytes, EmailMessage]]:
    """(sender, recipients, octets, message) of each message with this subject."""
    read = [(*one, email.message_from_bytes(one[2], policy=email.policy.default)) for one in list(peer.messages)]
    return [one for one in read if subject in str(one[3]["Subject"])]


def ended(done: Done, status: int) -> bool:
    return done.status == status or (status == FAILED and done.status != 0)


@every_way
def test_a_message_arrives_as_it_was_given(relay, peer, way, request):
    subject = f"Grüße über {request.node.callspec.id}"
    given = mail(way, subject)
    done = way.send(relay, given)
    assert done.status == 0, done.said
    sender, recipients, octets, message = wait_for(lambda: arrived(peer, subject))[0]
    assert (sender, sorted(recipients)) == ("ann@example.org" if way.named else "root@example.org", EVERYBODY)
    assert b"\nbcc:" not in octets.lower() and not any(one.encode() in octets for one in EVERYBODY[2:])
    assert str(message["Subject"]) == subject
    assert message["From"].addresses[0].addr_spec == (sender if way is WAYS["bsd-mailx"] else "ann@example.org")
    assert message["Date"].datetime is not None and message["Message-ID"]
    body = message.get_body()
    assert body is not None
    text = TEXT.replace("\nFrom ", "\n>From ") if way.quotes else TEXT
    assert body.get_content().replace("\r\n", "\n") == text + ("" if way.attaches else way.adds)
    assert [part.get_payload(decode=True) for part in message.iter_attachments()] == ([ATTACHED] if way.attaches else [])
    if way.whole:  # octet by octet
        whole = given.message.as_bytes(policy=email.policy.SMTP) + way.adds.replace("\n", "\r\n").encode()
        assert octets.partition(b"\r\n\r\n")[2] == whole.partition(b"\r\n\r\n")[2]


@every_way
def test_a_refused_recipient_is_told(relay, peer, way, request):
    """By sendmail the others get the message (Postfix takes it for all, and sends a bounce). By SMTP the program decides."""
    subject = f"Refused by {request.node.callspec.id}"
    status, said, sends = way.refused
    done = way.send(relay, mail(way, subject, "bob@x.example", "nobody@kept.example"))
    assert ended(done, status), done
    assert said in done.said
    if sends:
        _, recipients, _, _ = wait_for(lambda: arrived(peer, subject))[0]
        assert sorted(recipients) == EVERYBODY
    else:
        marker = f"{subject}: the end"  # what was taken before it would have been sent before it
        assert WAYS["smtplib"].send(relay, mail(way, marker)).status == 0
        wait_for(lambda: arrived(peer, marker))
        assert len(arrived(peer, subject)) == 1


def test_curl_sends_a_file_with_line_feeds_by_its_option_alone(relay):
    """Postfix makes them CRLF (smtpd_forbid_bare_newline is `normalize` since 3.9); here the networks have to be named."""
    file = relay.file("plain.eml", b"Subject: x\n\nx\n")
    words = shlex.split(relay.line("curl").replace("\\\n", "").replace("message.eml", file).replace("--crlf", "--verbose"))
    done = relay.run(*words)
    assert done.status == 8 and "550 5.5.2" in done.said, done


def test_what_comes_while_the_relay_is_down(tmp_path, peer):
    """What is sent by sendmail is kept, as by Postfix, and goes out at the start. By SMTP the program knows."""
    relay = Sending(tmp_path, peer.port)
    for name, way in WAYS.items():
        done = way.send(relay, mail(way, f"Down: {name}."))
        assert ended(done, way.down[0]) and way.down[1] in done.said, (name, done)
    with relay:
        for name, way in WAYS.items():
            if way.sendmail:
                (sender, recipients, octets, _), *more = wait_for(lambda name=name: arrived(peer, f"Down: {name}."))
                assert (sender, sorted(recipients)) == ("ann@example.org" if way.named else "root@example.org", EVERYBODY)
                assert not more and b"\nbcc:" not in octets.lower()
        wait_for(lambda: not list(relay.drop.glob("*.drop")))
        assert not (relay.drop / "bad").exists()
    assert not [name for name, way in WAYS.items() if not way.sendmail and arrived(peer, f"Down: {name}.")]


@pytest.mark.parametrize("way", SENDMAIL.values(), ids=SENDMAIL.keys())
def test_sendmail_understands_what_the_sendmail_of_postfix_does(relay, peer, way, request, tmp_path):
    """The envelope, and the text octet by octet, of what a program hands to it."""
    subject = f"Both {request.node.callspec.id}"
    postfix = PostfixSendmail(tmp_path)
    given = mail(way, subject)._replace(attached=b"")
    assert way.send(relay, given).status == 0
    relay.variables["POSTFIX"] = str(tmp_path)
    try:
        assert way.send(relay, given).status == 0
    finally:
        del relay.variables["POSTFIX"]
    sender, recipients, octets, _ = wait_for(lambda: arrived(peer, subject))[0]
    assert {one.encode() for one in recipients} == postfix.recipients
    assert sender.encode() == postfix.sender + (b"" if b"@" in postfix.sender else b"@example.org")
    assert octets.replace(b"\r\n", b"\n").partition(b"\n\n")[2] == postfix.message.partition(b"\n\n")[2]


def cron(relay: Sending, crontab: str, user: str) -> subprocess.Popen[bytes]:
    """A running cron(8) with this crontab of a user, whose sendmail is ours: in a mount namespace of its own, in which the system
    has just been started, so that `@reboot` means now."""
    place = relay.folder / f"cron-{len(list(relay.folder.glob('cron-*')))}"
    spool = place / "spool/crontabs"
    for folder in (spool, place / "run", place / "cron.d"):
        folder.mkdir(parents=True)
    (place / "crontab").touch()
    file = spool / user
    file.write_text(crontab)
    file.chmod(0o600)
    shutil.chown(file, user)
    binds = {"spool": "/var/spool/cron", "cron.d": "/etc/cron.d", "crontab": "/etc/crontab", "run": "/run"}
    mounts = [f"mount --bind {place}/{here} {there}" for here, there in binds.items()]
    script = [*mounts, f"mount --bind {relay.sendmail} /usr/sbin/sendmail", f"exec {need('cron')} -f -L 15"]
    return subprocess.Popen([need("unshare"), "--mount", "--propagation", "private", "sh", "-ec", "\n".join(script)])


@pytest.mark.skipif(os.geteuid() != 0, reason="cron needs root")
def test_what_a_job_of_cron_prints(relay, peer):
    """The lines of the page, but for when and what; by users of whom the one may send as others, and the other not."""
    if not os.access(sys.executable, os.X_OK):
        pytest.skip("other users cannot run this interpreter")
    mailto, job = relay.line("cron").splitlines()
    when, what = job.rsplit(maxsplit=1)
    assert when == "0 3 * * *"
    for user in ("root", "nobody"):
        printed = f"echo {user} prints; echo .; printf 'Gr\\303\\274\\303\\237e\\n..end'"
        running = cron(relay, f"{mailto}\n{job.replace(when, '@reboot').replace(what, printed)}\n", user)
        try:
            (sender, recipients, octets, message), *_ = wait_for(lambda user=user: arrived(peer, f"{user} prints"))
        finally:
            running.kill()
            running.wait()
        assert (sender, sorted(recipients)) == (f"{user}@example.org", ["ann@example.org", "ops@example.org"])
        assert f"\r\nFrom: {user}@example.org (Cron Daemon)\r\n".encode() in octets
        assert str(message["Subject"]).startswith(f"Cron <{user}@")
        assert message.get_content().replace("\r\n", "\n") == f"{user} prints\n.\nGrüße\n..end\n"
