"""Milters in the running relay: one on libmilter that does what messages say, and those that people run."""

import json
import signal
import smtplib
import socket
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import dkim
import pytest

from tests.conftest import PROVE
from tests.e2e.test_filters import logged
from tests.support.clamd import EICAR, RealClamd, clamd
from tests.support.daemon import PATIENCE, Relay, free_port, heard, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.milters import (
    Acting,
    DkimKey,
    Program,
    acting,
    clamav_milter,
    dkimpy_milter,
    opendkim,
    opendmarc,
    pyspf_milter,
    spamass_milter,
)
from tests.support.rspamd import ADD_HEADER, REJECT, REWRITE, rspamd
from tests.support.spamd import GTUBE, spamd

STAGES = pytest.mark.parametrize("stage", ["mail", "message"])
MESSAGES = 20 if PROVE else 8  # on one connection, and as many on one each


@pytest.fixture(scope="module")
def acts() -> Iterator[Acting]:
    with acting() as running:
        yield running


class Listening(Relay):
    """A relay with a listener for each name in `keys`, and on that alone a filter of this name: the milter, with these keys.
    `peer`: where its mail goes. `port` is that of the listener that was chosen last (`at`)."""

    def __init__(self, folder: Path, peer: FakeMx, address: str, keys: dict[str, tuple[str, ...]]) -> None:
        super().__init__(folder, f"127.0.0.1:{peer.port}")
        self.peer = peer
        self.ports = {name: free_port() for name in keys}
        self.config = folder / "relay.toml"
        lines = []
        for name, more in keys.items():
            here = f"127.0.0.1:{self.ports[name]}"
            lines += ["[[listener]]", f'address = "{here}"', "[[filter]]", f'name = "{name}"', 'type = "milter"']
            lines += [f'address = ["{address}"]', f'listener = ["{here}"]', *more]
        self.config.write_text("\n".join([*lines, ""]))

    def command(self) -> list[str]:
        return with_config(super().command(), self.config)

    def at(self, name: str) -> "Listening":
        """It, at this listener; what was delivered before is forgotten."""
        self.port = self.ports[name]
        self.peer.messages.clear()
        return self


def with_config(command: list[str], config: Path) -> list[str]:
    """A relay's command with this file, which has its listeners."""
    at = command.index("--listen")
    return [*command[:at], "--config", str(config), *command[at + 2 :]]


MAIL_AND_MESSAGE = {stage: (f'stage = "{stage}"',) for stage in ("mail", "message")}
ALL = 'may = ["header", "body", "recipients", "sender"]'


@pytest.fixture(scope="module")
def listening(acts: Acting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    keys = MAIL_AND_MESSAGE | {f"all-{stage}": (*more, ALL) for stage, more in MAIL_AND_MESSAGE.items()}
    with (
        FakeMx({}) as peer,
        Listening(tmp_path_factory.mktemp("relay"), peer, acts.address, keys | {"nothing": ("may = []",)}) as made,
    ):
        yield made


@pytest.fixture
def relay(listening: Listening, acts: Acting) -> Listening:
    """That of the tests whose milter is `acts`, when the sessions of the test before have ended."""
    wait_for(
        lambda: set({session: letter for session, letter, *_ in acts.told()}.values()) <= {"Q"}, what="the end of all sessions"
    )
    return listening


def milter(program: Program | RealClamd, *more: str) -> str:
    """A setting: the filter `one`. `more`: further keys."""
    keys = ['name="one"', 'type="milter"', f'address=["{program.address}"]', *more]
    return f"filter=[{{{', '.join(keys)}}}]"


def configured(folder: Path, program: Program | RealClamd) -> str:
    """A configuration with this milter."""
    path = folder / "c.toml"
    table = f'[[filter]]\nname = "one"\ntype = "milter"\naddress = ["{program.address}"]\n'
    path.write_text(f'spool = "{folder}/other"\n[[listener]]\naddress = "127.0.0.1:2525"\n{table}')
    return str(path)


def text(*acts: str, body: str = "hello\r\n") -> str:
    return "From: a@b.example\r\nSubject: x\r\n" + "".join(f"X-Act: {act}\r\n" for act in acts) + "\r\n" + body


def header(data: bytes) -> list[bytes]:
    """The fields of a delivered message, without our Received and what tells the milter to act."""
    lines = data.partition(b"\r\n\r\n")[0].replace(b"\r\n\t", b" ").split(b"\r\n")
    return [line for line in lines if not line.startswith((b"Received: from", b"X-Act:"))]


def refusal(relay: Relay, message: str | bytes, sender: str = "a@b.example", to: str = "c@d.example") -> tuple[int, bytes]:
    """Of a message: the code and the text of the first command that is refused."""
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client, pytest.raises(smtplib.SMTPException) as error:
        client.sendmail(sender, [to], message)
    if isinstance(error.value, smtplib.SMTPRecipientsRefused):
        return error.value.recipients[to]
    assert isinstance(error.value, smtplib.SMTPResponseException)
    found = error.value.smtp_error
    return error.value.smtp_code, found if isinstance(found, bytes) else found.encode()


@STAGES
def test_what_a_milter_is_told(acts, relay, stage):
    """One connection for a session, one event after the other, the macros with them, and the message as it came."""
    before = len(acts.told())
    relay.at(stage)
    with smtplib.SMTP("127.0.0.1", relay.port, local_hostname="client.example", timeout=PATIENCE) as client:
        for n in range(2):
            client.sendmail("a@b.example", ["c@d.example", "e@f.example"], f"A:x\r\nB: y\r\nC:\tz\r\n\tmore\r\n\r\n{n}\r\n")
        client.docmd("MAIL FROM:<a@b.example>")
        client.docmd("RCPT TO:<c@d.example>")
        client.docmd("RSET")
        client.sendmail("", ["c@d.example"], text())
    wait_for(lambda: acts.letters()[before:].endswith("Q"))
    told = acts.told()[before:]
    letters = "".join(event[1] for event in told)
    assert letters == ("CHMRRTNEMRRTNEMRAMRTNEQ" if stage == "mail" else "CHMRRTNEMRRTNEMRTNEQ")
    assert len({event[0] for event in told}) == 1
    (_, _, host, address, connected), (_, _, name, _), (_, _, sender, *_, begun), (_, _, recipient, asked) = told[:4]
    assert (host, address, name) == ("[127.0.0.1]", ["127.0.0.1", 0], "client.example")
    assert (sender, recipient) == ("<a@b.example>", "<c@d.example>")
    assert connected["j"] == "relay.example" and connected["{daemon_addr}"] == "127.0.0.1"
    assert asked["{rcpt_addr}"] == "c@d.example"
    wait_for(lambda: {begun["i"], told[-2][-1]["i"]} <= {event["id"] for event in relay.events("queued")})
    headers = [event[2] for event in told if event[1] == "N"]
    assert headers[0] == [["A", "x"], ["B", "y"], ["C", "\tz\n\tmore"]]
    assert [event[2] for event in told if event[1] == "E"] == [3, 3, 7]


@STAGES
def test_changes_of_header_body_and_envelope(relay, stage):
    fields = "add X-Last=1", "insert 0 X-First=2", "insert 1 X-Second=3", "change 1 Subject=new", "change 1 From="
    envelope = "to <new@d.example>", "not-to <C@d.example>", "from <changed@b.example>"
    peer = relay.at(f"all-{stage}").peer
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        to = ["c@d.example", "e@d.example"]
        client.sendmail("a@b.example", to, text(*fields))
        wait_for(lambda: len(peer.messages) == 1)
        client.sendmail("a@b.example", to, text(*envelope))
        wait_for(lambda: len(peer.messages) == 2)
        large = ("x" * 900 + "\r\n") * 2000
        for octets, body in ((2000, "x\r\n"), (3_000_000, "x\r\n"), (2000, large), (3_000_000, large)):
            client.sendmail("a@b.example", to, text(f"body {octets}", body=body))
        wait_for(lambda: len(peer.messages) == 6)
    first, second, *bodies = [(sender, sorted(to), data) for sender, to, data in peer.messages]
    assert header(first[2]) == [b"X-First: 2", b"X-Second: 3", b"Subject: new", b"X-Last: 1"]
    assert (second[0], second[1]) == ("changed@b.example", ["e@d.example", "new@d.example"])
    line, found = b"a line of a new body " * 40 + b"\r\n", [data.partition(b"\r\n\r\n")[2] for _, _, data in bodies]
    assert all(set(body.splitlines(True)) == {line} for body in found)
    assert sorted(len(body) for body in found) == [2 * len(line)] * 2 + [47 * (65000 // 841) * len(line)] * 2


def test_a_new_body_does_not_become_header(relay):
    """Also where the message has no empty line, for whose body there is one."""
    peer = relay.at("mail").peer
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        for octets in (2000, 3_000_000):
            client.sendmail("a@b.example", ["c@d.example"], f"Subject: x\r\nX-Act: body {octets}\r\n")
    wait_for(lambda: len(peer.messages) == 2)
    bodies = [data.partition(b"\r\n\r\n") for _, _, data in peer.messages]
    assert all(body.startswith(b"a line of a new body") for _, _, body in bodies)


def test_what_a_milter_may_not_change_is_left_out(tmp_path, acts, relay):
    acts_of = "to <new@d.example>", "from <changed@b.example>", "add X-A=1", "body 2000"
    peer = relay.at("nothing").peer
    relay.send(text(*acts_of))
    wait_for(lambda: len(peer.messages) == 1)
    sender, to, data = peer.messages[0]
    assert (sender, to) == ("a@b.example", ["c@d.example"]) and data.endswith(b"\r\n\r\nhello\r\n") and b"\r\nX-A:" not in data
    wait_for(lambda: any("4 of its changes" in event["text"] for event in relay.events("warning")))
    config = configured(tmp_path, acts)
    noted = relay.cli("-c", config, "config", "check", check=False)
    assert "may want to change: recipients, sender, which `may` does not allow" in noted.stdout + noted.stderr, noted
    shown = relay.cli("-c", config, "filter", "check")
    assert shown.stdout == f"one at {acts.address}: is a milter of version 6, which may want to change: " + (
        "header, body, recipients, sender, quarantine\n"
    )
    (tmp_path / "x.eml").write_text(text("add X-A=1", "body 2000", "quarantine it is odd"))
    tested = relay.cli("-c", config, "filter", "test", str(tmp_path / "x.eml"), check=False)
    assert tested.returncode == 1 and "+ X-A: 1\n+ another body, of 1684 octets\n" in tested.stdout
    assert "held (filter one: it is odd)" in tested.stdout


@STAGES
def test_verdicts(relay, stage):
    peer, name = relay.at(stage).peer, stage.encode()
    assert refusal(relay, text("reject")) == (554, b"5.7.1 Refused by " + name)
    assert refusal(relay, text("reject own")) == (550, b"5.1.1 100% not reject own")
    assert refusal(relay, text("tempfail")) == (451, b"4.7.1 Not taken now by " + name)
    assert refusal(relay, text(), sender="reject-own@b.example") == (550, b"5.1.1 100% not reject-own@b.example")
    assert refusal(relay, text(), sender="tempfail@b.example") == (451, b"4.7.1 Not taken now by " + name)
    named = b"<reject-own@d.example>: " if stage == "message" else b""
    refused = (550, b"5.1.1 " + named + b"100% not reject-own@d.example")
    assert refusal(relay, text(), to="reject-own@d.example") == refused
    relay.send(text("discard"))
    relay.send(text(), "discard@b.example")
    relay.send(text(), "a@b.example", "discard@d.example")
    relay.send(text("reject"), "accept@b.example")  # its last word was at MAIL
    relay.send(text("quarantine why not"))
    relay.send(text("quarantine first", "quarantine second"))
    assert refusal(relay, text("quarantine why not", "reject own"))[0] == 550
    wait_for(lambda: len(peer.messages) == 1)
    held = [json.loads(line) for line in relay.cli("queue", "list", "--held", "--json").stdout.splitlines()]
    assert sorted(row["held_for"] for row in held) == [f"filter {stage}: second", f"filter {stage}: why not"]
    relay.cli("queue", "release", *[row["id"] for row in held])
    wait_for(lambda: len(peer.messages) == 3)
    relay.send(text("progress"))
    wait_for(lambda: len(peer.messages) == 4)


def test_one_recipient_of_three_is_refused_and_then_all(acts, relay):
    """Case 8: one recipient that the filter refuses."""
    before = len(acts.letters())
    peer = relay.at("mail").peer
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        refused = client.sendmail("a@b.example", ["c@d.example", "reject-own@d.example", "e@d.example"], text())
        assert refused == {"reject-own@d.example": (550, b"5.1.1 100% not reject-own@d.example")}
        client.docmd("MAIL FROM:<a@b.example>")
        for n in range(3):
            assert client.docmd(f"RCPT TO:<reject{n}@d.example>")[0] == 554
        assert client.docmd("DATA")[0] == 554
        client.docmd("RSET")
        assert client.sendmail("a@b.example", ["c@d.example"], text()) == {}
    wait_for(lambda: len(peer.messages) == 2 and acts.letters()[before:].endswith("Q"))
    assert acts.letters()[before:] == "CHMRRRTNEMRRRAMRTNEQ"
    assert sorted(peer.messages[0][1]) == ["c@d.example", "e@d.example"]


def test_pipelined_commands_wait_their_turn(relay):
    """In one segment or octet by octet, the replies are the same."""
    commands = (
        b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nRCPT TO:<reject-own@d.example>\r\nRCPT TO:<e@d.example>\r\n"
        b"BDAT 14 LAST\r\nSubject: x\r\n\r\nMAIL FROM:<reject-own@b.example>\r\nRCPT TO:<c@d.example>\r\nQUIT\r\n"
    )
    peer = relay.at("mail").peer
    for each in (len(commands), 7):
        with socket.create_connection(("127.0.0.1", relay.port), PATIENCE) as sock:
            heard(sock, b"220")
            sock.sendall(b"EHLO x\r\n")
            heard(sock, b"250 ")
            for at in range(0, len(commands), each):
                sock.sendall(commands[at : at + each])
            said = heard(sock, b"221")
            codes = [line[:3] for line in said.split(b"\r\n") if line]
            assert codes == [b"250", b"250", b"550", b"250", b"250", b"550", b"503", b"221"], said
    wait_for(lambda: len(peer.messages) == 2)


def test_the_client_that_goes_while_a_milter_is_asked_leaves_nothing(tmp_path):
    with acting() as one, FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one, 'timeout="20s"')) as relay:
        one.send(signal.SIGSTOP)
        for command in (b"MAIL FROM:<a@b.example>\r\n", b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"):
            with socket.create_connection(("127.0.0.1", relay.port), PATIENCE) as sock:
                heard(sock, b"220")
                sock.sendall(b"EHLO x\r\n" + command)
                heard(sock, b"250 ")
        wait_for(lambda: relay.metric("relaymta_connections") == 0, what="no connection")
        one.send(signal.SIGCONT)
        relay.send(text())
        wait_for(lambda: len(peer.messages) == 1)
        assert not [event for event in relay.events("filtered") if event["verdict"] == "failed"]


@STAGES
def test_a_milter_that_dies_stops_and_comes_back(tmp_path, stage):
    """On one session: each message is shown or gets 451; mail that is not for it goes on; it comes back by itself."""
    keys = f'stage="{stage}"', 'timeout="1s"', 'clients="trusted"', 'on_failure="tempfail"'
    with acting() as one, FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one, *keys)) as relay:
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:

            def sent() -> int:
                try:
                    client.sendmail("a@b.example", ["c@d.example"], text())
                except smtplib.SMTPResponseException as error:
                    return error.smtp_code
                return 250

            assert [sent() for _ in range(3)] == [250] * 3
            one.send(signal.SIGKILL)
            one.start()
            assert [sent() for _ in range(3)] == [250] * 3, "once more on a new connection"
            one.send(signal.SIGKILL)
            assert [sent() for _ in range(4)] == [451] * 4
            wait_for(lambda: relay.metric('relaymta_filter_up{filter="one"}') == 0)
            one.start()
            wait_for(lambda: relay.metric('relaymta_filter_up{filter="one"}') == 1)
            assert [sent() for _ in range(3)] == [250] * 3
            one.send(signal.SIGSTOP)
            assert sent() == 451
            one.send(signal.SIGCONT)
            assert sent() == 250
        wait_for(lambda: len(peer.messages) == 10)
        events = logged(relay, "filtered", 15)
        failed = [event["reason"].split(":")[0] for event in events if event["verdict"] == "failed"]
        assert failed == ["connect"] * 4 + ["timeout"], failed


def test_a_milter_that_dies_at_one_message_is_shown_it_once_more_and_no_more(tmp_path):
    """Case 1: one bad message must not take the session with it."""
    with (
        acting() as one,
        FakeMx({}) as peer,
        Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one, 'on_failure="accept"')) as relay,
    ):
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.sendmail("a@b.example", ["c@d.example"], text("exit"))
            one.start()
            client.sendmail("a@b.example", ["c@d.example"], text("add X-A=1"))
        wait_for(lambda: len(peer.messages) == 2)
        assert b"X-A: 1" in peer.messages[1][2]
        assert [event["verdict"] for event in logged(relay, "filtered", 2)] == ["failed", "accept"]


def test_another_service_is_no_milter_and_is_told_apart_at_once(tmp_path):
    """Case 2: the address of another service."""
    with clamd() as scanner, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(scanner, 'on_failure="tempfail"')) as relay:
            began = time.monotonic()
            assert refusal(relay, text())[0] == 451
            assert time.monotonic() - began < 5
            (found,) = logged(relay, "filtered")
            assert (
                found["reason"].startswith("protocol: ") and "answers, but not as a milter: begins with 'UNKN" in found["reason"]
            )
            checked = relay.cli("-c", configured(tmp_path, scanner), "filter", "check", check=False)
            assert checked.returncode == 75 and "answers, but not as a milter: begins with 'UNKN" in checked.stdout


# The real ones: each by one session of MESSAGES, and by as many connections.


def sent_twice(relay: Relay, peer: FakeMx, message: str | bytes, client_address: str = "127.0.0.1") -> list[bytes]:
    """The messages as they are delivered."""
    source = client_address, 0
    before = len(peer.messages)
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE, source_address=source) as client:
        for _ in range(MESSAGES):
            client.sendmail("a@b.example", ["c@d.example"], message)
    for _ in range(MESSAGES):
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE, source_address=source) as client:
            client.sendmail("a@b.example", ["c@d.example"], message)
    wait_for(lambda: len(peer.messages) == before + 2 * MESSAGES)
    return [data for _, _, data in peer.messages[before:]]


def test_opendkim_signs(tmp_path):
    with opendkim() as (one, key), FakeMx({}) as peer, Listening(tmp_path, peer, one.address, MAIL_AND_MESSAGE) as relay:
        for stage in MAIL_AND_MESSAGE:
            for data in sent_twice(relay.at(stage), peer, text()):
                assert dkim.verify(data, dnsfunc=lambda name, timeout=5: key.record.encode()), data


def test_opendkim_verifies_simple_canonicalization_of_any_form_of_field(tmp_path):
    """Case 5: simple canonicalization that failed through a milter."""
    message = b"From: a@b.example\r\nA:x\r\nB: x\r\nC:  x\r\nD:\tx\r\nE: x\r\n\ty\r\nSubject: x\r\n\r\nhello\r\n"
    with opendkim("InternalHosts 192.0.2.9", "Mode v") as (one, key), FakeMx({}) as peer:
        names = [b"From", b"A", b"B", b"C", b"D", b"E", b"Subject"]
        private = key.path.read_bytes()
        signed = dkim.sign(message, b"s", b"b.example", private, canonicalize=(b"simple", b"simple"), include_headers=names)
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one)) as relay:
            for data in sent_twice(relay, peer, signed + message):
                first = data.partition(b"\r\nReceived:")[0]
                assert first.startswith(b"Authentication-Results: opendkim.example;") and b"dkim=pass" in first, data
                assert data.endswith(signed + message)


def test_opendmarc_finds_what_opendkim_has_found(tmp_path):
    """Case 6: DMARC that was judged before DKIM."""
    with opendkim("InternalHosts 192.0.2.9", "Mode v") as (one, key), opendmarc() as two, FakeMx({}) as peer:
        message = text().encode()
        signed = dkim.sign(message, b"s", b"b.example", key.path.read_bytes())
        both = ",".join(f'{{name="{name}",type="milter",address=["{of.address}"]}}' for name, of in (("k", one), ("m", two)))
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", f"filter=[{both}]") as relay:
            for data in sent_twice(relay, peer, signed + message, "127.0.0.9"):
                fields = header(data)
                assert fields[0].startswith(b"Authentication-Results: dmarc.example; dmarc=")
                assert fields[1].startswith(b"Authentication-Results: opendkim.example; dkim=pass")


def test_clamav_milter_refuses_a_virus_however_it_is_sent(tmp_path):
    encoded = EmailMessage()
    encoded["Subject"] = "files"
    encoded.set_content("see the attachment\n")
    encoded.add_attachment(EICAR, maintype="application", subtype="octet-stream", filename="x.com")
    large = b"Subject: large\r\n\r\n" + b"a line of text that is long enough\r\n" * 150_000 + EICAR + b"\r\n"
    messages = text(body=EICAR.decode() + "\r\n").encode(), encoded.as_bytes().replace(b"\n", b"\r\n"), large
    with clamd() as scanner, clamav_milter(scanner.address) as one, FakeMx({}) as peer:
        with Listening(tmp_path, peer, one.address, MAIL_AND_MESSAGE) as relay:
            for stage in MAIL_AND_MESSAGE:
                for message in messages:
                    code, answer = refusal(relay.at(stage), message)
                    assert code == 550 and answer.startswith(b"5.7.1 Virus Eicar-"), answer
                for data in sent_twice(relay, peer, text()):
                    assert b"\r\nX-Virus-Status: Clean" in data


def test_spamass_milter_refuses_and_marks(tmp_path):
    with spamd() as address, spamass_milter(address) as one, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one, 'timeout="30s"')) as relay:
            assert refusal(relay, text(body=GTUBE + "\r\n")) == (550, b"5.7.1 Blocked by SpamAssassin")
            relay.send(text())
            wait_for(lambda: len(peer.messages) == 1)
            assert b"\r\nX-Spam-Checker-Version: SpamAssassin" in peer.messages[0][2]


def test_dkimpy_milter_signs(tmp_path):
    with dkimpy_milter() as (one, key), FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one)) as relay:
            for data in sent_twice(relay, peer, text()):
                assert dkim.verify(data, dnsfunc=lambda name, timeout=5: key.record.encode()), data


def test_pyspf_milter_says_what_it_has_found(tmp_path):
    with pyspf_milter() as one, FakeMx({}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(one, 'timeout="30s"')) as relay:
            relay.send(text(), "a@[127.0.0.1]")
            wait_for(lambda: len(peer.messages) == 1)
            assert b"spf=" in peer.messages[0][2], peer.messages[0][2]


def test_rspamds_proxy_refuses_marks_and_rewrites(tmp_path):
    with rspamd(proxy=True) as scanner, FakeMx({}) as peer:
        keys = {stage: (*more, 'timeout = "30s"') for stage, more in MAIL_AND_MESSAGE.items()}
        with Listening(tmp_path, peer, scanner.milter, keys) as relay:
            for stage in keys:
                assert refusal(relay.at(stage), text(body=REJECT + "\r\n")) == (554, b"5.7.1 Gtube pattern")
                for data in sent_twice(relay, peer, text()):
                    assert b"Subject: x\r\n" in data
                relay.send(text(body=ADD_HEADER + "\r\n"))
                relay.send(text(body=REWRITE + "\r\n"))
                wait_for(lambda: len(peer.messages) == 2 * MESSAGES + 2)
                added, rewritten = (data.partition(b"\r\n\r\n")[0] for _, _, data in peer.messages[-2:])
                assert b"\r\nX-Spam: Yes" in added
                assert b"\r\nSubject: *** SPAM *** x" in rewritten and rewritten.count(b"\r\nSubject:") == 1


def test_our_signature_is_over_what_a_milter_has_made_of_a_message(tmp_path, acts):
    """Case 7. A banner that is added does not break it. Of small messages and of large ones."""
    key = DkimKey(tmp_path)
    key.path.chmod(0o600)
    signing = f'dkim=[{{domain="b.example",selector="s",key="{key.path}"}}]'
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", milter(acts), signing) as relay:
        for lines in (1, 2000):
            body = ("x" * 900 + "\r\n") * lines
            relay.send(text("body 300000", "add X-Last=1", "change 1 Subject=new", body=body))
            relay.send(text("add X-Last=1", body=body))
        wait_for(lambda: len(peer.messages) == 4)
        for _, _, data in peer.messages:
            assert b"\r\nX-Last: 1\r\n" in data and dkim.verify(data, dnsfunc=lambda name, timeout=5: key.record.encode())


class WithLogin(Relay):
    """A relay with the application `shop`, which logs in with `key`, and this filter."""

    def __init__(self, folder: Path, port: int, one: Program) -> None:
        super().__init__(folder, f"127.0.0.1:{port}")
        self.config = folder / "relay.toml"
        self.config.write_text(
            f'[[listener]]\naddress = "127.0.0.1:{self.port}"\nauth = "may"\nauth_in_clear = true\n'
            f'[accounts]\nfile = "{folder}/accounts.toml"\n'
            f'[[filter]]\nname = "one"\ntype = "milter"\naddress = ["{one.address}"]\n'
        )
        said = self.cli("app", "create", "shop", "--config", str(self.config)).stdout
        self.key = said.partition("secret: ")[2].split()[0]

    def command(self) -> list[str]:
        return with_config(super().command(), self.config)


def test_opendkim_signs_for_who_has_logged_in(tmp_path):
    """In the middle of a session: what a milter knows of a client is what the client is."""
    with opendkim("InternalHosts 192.0.2.9") as (one, key), FakeMx({}) as peer, WithLogin(tmp_path, peer.port, one) as relay:
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.sendmail("a@b.example", ["c@d.example"], text())
            client.login("shop", relay.key)
            client.sendmail("a@b.example", ["c@d.example"], text())
        wait_for(lambda: len(peer.messages) == 2)
        first, second = (data for _, _, data in peer.messages)
        assert b"DKIM-Signature" not in first
        assert dkim.verify(second, dnsfunc=lambda name, timeout=5: key.record.encode()), second


def test_what_a_milter_is_told_of_a_login(tmp_path, acts):
    before = len(acts.told())
    with FakeMx({}) as peer, WithLogin(tmp_path, peer.port, acts) as relay:
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.login("shop", relay.key, initial_response_ok=False)
            client.sendmail("a@b.example", ["c@d.example"], text())
        wait_for(lambda: len(peer.messages) == 1)
        (mail,) = [event for event in acts.told()[before:] if event[1] == "M"]
        assert mail[-1]["{auth_authen}"] == "shop" and mail[-1]["{auth_type}"] in ("PLAIN", "LOGIN", "SCRAM-SHA-256", "CRAM-MD5")
