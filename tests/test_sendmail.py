"""sendmail(1) without a relay: options, messages, statuses, and what it imports."""

import os
import pwd
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import relaymta
from relaymta.accept import dropped
from relaymta.proto.addressees import fields, header_octets
from relaymta.sendmail import dropping, environment, program
from relaymta.sendmail import status as statuses
from relaymta.sendmail.dropping import FOLDER, FOLDER_VARIABLE, PROGRAM_VARIABLE
from relaymta.sendmail.handing import NotNow, hand_over
from relaymta.sendmail.message import Envelope, User, address, author, enveloped, read
from relaymta.sendmail.options import _LETTERS, _MODES, parsed
from relaymta.sendmail.program import SOCKET_VARIABLE
from relaymta.sendmail.standard import say
from relaymta.sendmail.status import Stop

PROGRAM = Path(relaymta.__file__).parent / "sendmail" / "__main__.py"
NOBODY = pwd.getpwnam("nobody").pw_uid
BARE = [sys.executable, "-I", "-S"]


def run(*arguments: str, text: bytes = b"", program: Path = PROGRAM, **environment: str) -> subprocess.CompletedProcess[bytes]:
    there = {"PATH": os.environ["PATH"], "RELAYMTA_SENDMAIL_SOCKET": "/nonexistent/socket", **environment}
    return subprocess.run([*BARE, str(program), *arguments], input=text, capture_output=True, env=there, check=False)


def given(text: bytes, dot: bool = False) -> bytes:
    """What is read of this standard input."""
    ours, theirs = os.pipe()
    os.write(theirs, text)
    os.close(theirs)
    try:
        return read(ours, dot)
    finally:
        os.close(ours)


# Imports


def imported(code: str) -> set[str]:
    """The modules that an interpreter has which has run this."""
    shown = f"import sys; sys.path.insert(0, {str(PROGRAM.parents[2])!r}); {code}; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([*BARE, "-c", shown], input=b"Subject: x\n\nx\n", capture_output=True, check=True)
    return set(done.stdout.decode().split())


@pytest.mark.parametrize(("arguments", "status"), [(["-t"], 64), (["ann@a.example"], 75), (["-bi"], 0), (["-bs"], 75)])
def test_it_imports_next_to_nothing(arguments, status):
    words = ["sendmail", *arguments]
    environment = "import os; os.environ['RELAYMTA_SENDMAIL_SOCKET'] = '/nonexistent/socket'; "
    with_it = imported(f"{environment}from relaymta.sendmail import main; assert main({words}) == {status}")
    more = {one for one in with_it - imported("import os") if not one.startswith("relaymta.sendmail")}
    assert more <= {"relaymta", "relaymta.proto", "relaymta.proto.addressees", "pwd", "_socket", "fcntl", "select"}


# Pages


@pytest.mark.parametrize("page", ["packaging/deb/sendmail.1", "docs/sendmail.md"])
def test_pages_have_all_options_statuses_and_variables(page):
    text = re.sub(r"\\f[A-Z]|\\", "", (PROGRAM.parents[2] / page).read_text())
    missing = [f"-{letter}" for letter in _LETTERS if letter != "b" and not re.search(rf"(?<![\w-])-{letter}(?![a-z])", text)]
    missing += [f"-b{mode}" for mode in _MODES if f"-b{mode}" not in text]
    names = ("OK", "USAGE", "DATA", "NO_INPUT", "UNAVAILABLE", "SOFTWARE", "CANNOT_CREATE", "IO", "TEMPFAIL", "NO_PERMISSION")
    missing += [name for name in names if not re.search(rf"\b{getattr(statuses, name)}\b", text)]
    missing += [one for one in (SOCKET_VARIABLE, FOLDER_VARIABLE, PROGRAM_VARIABLE, "NAME", FOLDER) if one not in text]
    assert missing == []


# Options


def options(*words: str) -> dict[str, object]:
    return vars(parsed(["sendmail", *words]))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-t", "-i"], {"from_header": True, "dot": True}),
        (["-ti"], {"from_header": True, "dot": True}),
        (["-oi", "-oem", "ann"], {"dot": True, "recipients": ["ann"]}),
        (["-i", "-f", "x@a.example", "--", "-rcpt"], {"sender": "x@a.example", "recipients": ["-rcpt"]}),
        (["-fx@a.example", "ann"], {"sender": "x@a.example", "recipients": ["ann"]}),
        (["-f", ""], {"sender": ""}),
        (["-f<>"], {"sender": ""}),
        (["-r", "x"], {"sender": "x"}),
        (
            ["-FCronDaemon", "-i", "-B8BITMIME", "-oem", "root"],
            {"full_name": "CronDaemon", "eight_bit": True, "recipients": ["root"]},
        ),
        (["-N", "success,Failure"], {"notify": "SUCCESS,FAILURE"}),
        (["-Nnever", "-R", "hdrs", "-V", "an id"], {"notify": "NEVER", "ret": "HDRS", "envid": "an id"}),
        (["-i", "ann", "-t", "bob"], {"from_header": False, "recipients": ["ann", "-t", "bob"]}),
        (["ann", "-f", "x", "-bs", "--"], {"sender": None, "mode": "m", "recipients": ["ann", "-f", "x", "-bs", "--"]}),
        (["-", "-t"], {"from_header": False, "recipients": ["-", "-t"]}),
        (["-N", "often", "ann"], {"notify": "", "recipients": ["ann"]}),
        (["-R", "all", "-V", "a\nb", "ann"], {"ret": "", "envid": "", "recipients": ["ann"]}),
        (["-O", "IgnoreDots=true"], {"dot": True}),
        (
            ["-o7", "-m", "-h", "3", "-L", "tag", "-U", "-x", "-G", "-p", "smtp", "-X", "log", "-em", "ann"],
            {"recipients": ["ann"]},
        ),
        (["-bp"], {"mode": "p"}),
        (["-bs"], {"mode": "s"}),
        (["-q"], {"mode": "q", "flush": ("all", "")}),
        (["-q15m"], {"mode": "q", "flush": ("all", "")}),
        (["-qI1M8"], {"mode": "q", "flush": ("id", "1M8")}),
        (["-qRa.example"], {"mode": "q", "flush": ("site", "a.example")}),
        (["-I"], {"mode": "i"}),
    ],
)
def test_options(words, found):
    assert {name: value for name, value in options(*words).items() if name in found} == found


@pytest.mark.parametrize(
    "words",
    [["-bd"], ["-bt"], ["-n"], ["-Z"], ["-f"], ["-B", "9BIT"], ["-qX"], ["-qI"]],
)
def test_what_is_no_option_is_a_usage_error(words):
    with pytest.raises(Stop) as stopped:
        options(*words)
    assert stopped.value.status == 64


def test_the_name_decides(tmp_path):
    for name, mode in (("mailq", "p"), ("newaliases", "i"), ("sendmail", "m"), ("/usr/sbin/sendmail", "m")):
        assert parsed([name]).mode == mode
    link = tmp_path / "newaliases"
    link.symlink_to(PROGRAM)
    done = run(program=link)
    assert (done.returncode, done.stderr) == (0, b"")


# Messages


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"a\nb\n", b"a\r\nb\r\n"),
        (b"a\r\nb", b"a\r\nb"),
        (b"a\n.\nb\n", b"a\r\n"),
        (b"a\r\n.\r\nb\n", b"a\r\n"),
        (b".\nb\n", b""),
        (b"a\n.", b"a\r\n"),
        (b"a\n..\nb\n", b"a\r\n..\r\nb\r\n"),
        (b"", b""),
        (b"10 %\r20 %\r\0\n", b"10 %\r\n20 %\r\n \r\n"),
        (b"A: x\r\r\n\r\r\nb\r\r\r\nc\r\n", b"A: x\r\n\r\nb\r\nc\r\n"),
        (b"b\r\r\n.\r\r\nc\n", b"b\r\n"),
        (b".\r\r\nc\n", b""),
        (b"b\n.\r\r", b"b\r\n"),
        (b"A: x\rBcc: v\r\n\nb\rc\n", b"A: x Bcc: v\r\n\r\nb\r\nc\r\n"),
        (b"A: x\r\rBcc: v\n B\r: v\r", b"A: x  Bcc: v\r\n B : v "),
        (b"From x\rBcc: v\n>From y\nA: x\rBcc: v\n\n", b"From x Bcc: v\r\n>From y\r\nA: x Bcc: v\r\n\r\n"),
        (b"X\0: a\rBcc: v\n\n", b"X : a Bcc: v\r\n\r\n"),
        (b"x" * 65535 + b"\n.\nb\n", b"x" * 65535 + b"\r\n"),
        (b"x" * 65536 + b"\n.\r\nb\n", b"x" * 65536 + b"\r\n"),
    ],
)
def test_a_line_of_a_single_dot_ends_a_message(text, found, monkeypatch):
    chunks = [text[at : at + 65535] for at in range(0, len(text), 65535)]
    if len(text) < 60000:
        chunks = [bytes((one,)) for one in text]  # any split
    waiting = iter([*chunks, b""])
    monkeypatch.setattr(os, "read", lambda descriptor, octets: next(waiting))
    assert read(0, False) == found


@pytest.mark.parametrize("text", [b"To: a@x.example\nSubject: hi\r%s\n\nx\n", b"To: a@x.example\n b@x.example\r%s\r\n\r\nx\n"])
@pytest.mark.parametrize("field", [b"Bcc: v@y.example", b"From: ceo@y.example", b"\rBcc: v@y.example", b" \rFrom: ceo@y.example"])
def test_a_carriage_return_in_the_header_makes_no_field(text, field):
    """Of a text that somebody else has given for a subject."""
    taken = given(text % field)
    header = taken[: header_octets(taken)]
    assert taken[len(header) :] == b"\r\nx\r\n"
    assert [name for name, _ in fields(header, (b"to", b"bcc", b"from"))] == [b"to"]
    found = message(taken, "a@x.example")[2]
    assert found == b'From: "Ann Doe" <ann>\r\n' + taken


def test_with_i_it_does_not():
    assert given(b"a\n.\nb\n", dot=True) == b"a\r\n.\r\nb\r\n"


def test_the_end_by_a_dot_is_seen_at_once():
    """A terminal, or a program that waits for the status, sends no more."""
    with subprocess.Popen([*BARE, str(PROGRAM), "a@b.example"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"hello\n.\n")
        process.stdin.flush()
        assert process.wait(60) == 75
        process.stdin.close()


class Ann(User):
    def __init__(self) -> None:
        self.name, self.full_name = "ann", "Ann Doe"


def message(
    text: bytes, *to: str, header: bool = False, sender: str | None = None, name: str = ""
) -> tuple[bytes, list[bytes], bytes]:
    """(sender, recipients, message data without its key)."""
    made = enveloped(text, Ann(), sender, list(to), header, name)
    data, keys = re.subn(rb"(?m)^X-Relay-Idempotency: sendmail-[0-9a-f]{32}\r\n", b"", made.data)
    assert keys == 1
    return made.sender, made.recipients, data


def test_each_message_has_a_key_of_its_own_and_one_that_it_has_is_kept():
    plain, keyed = b"From: x\r\n\r\nb\r\n", b"From: x\r\nx-relay-idempotency: mine\r\n\r\nb\r\n"
    first, second = (enveloped(plain, Ann(), None, ["a"], False, "").data for _ in range(2))
    assert first != second and first.endswith(plain)
    assert enveloped(keyed, Ann(), None, ["a"], False, "").data == keyed
    assert b"\r\n\r\nno header\r\n" in enveloped(b"no header\r\n", Ann(), None, ["a"], False, "").data


def test_the_envelope():
    text = b"From: x\r\nTo: a@x.example\r\nBcc: b@x.example\r\n\r\nCc: c@x.example\r\n"
    assert message(text, "r@x.example") == (b"ann", [b"r@x.example"], text)
    assert message(text, header=True) == (b"ann", [b"a@x.example", b"b@x.example"], text)
    assert message(text, "r@x.example", "a@x.example", header=True)[1] == [b"r@x.example", b"a@x.example", b"b@x.example"]
    assert message(text, "r@x.example", sender="") == (b"", [b"r@x.example"], text)
    assert message(text, "<r@x.example>", sender="<s@x.example>")[:2] == (b"s@x.example", [b"r@x.example"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            b"Subject: report\nThese hosts failed:\n  web1\nBcc: were empty\n",
            b"Subject: report\n\nThese hosts failed:\n  web1\nBcc: were empty\n",
        ),
        (b"A: x\n \t\nBcc: b\n", b"A: x\n\n \t\nBcc: b\n"),
        (b"From: a\nx", b"From: a\n\nx"),
        (b"x: y\n", b"x: y\n"),
        (b" x\nBcc: b\n", b"\n x\nBcc: b\n"),
        (b"From a\nx y\nBcc: b\n", b"\nx y\nBcc: b\n"),
        (b"A: x\n\nb", b"A: x\n\nb"),
        (b"A: x", b"A: x"),
    ],
)
def test_text_behind_the_header_is_the_body_without_an_empty_line_too(text, found):
    data = message(given(text), "r")[2].removeprefix(b'From: "Ann Doe" <ann>\r\n')
    assert data == found.replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("to", "found"),
    [
        (["ann,bob"], [b"ann", b"bob"]),
        (["ann, bob@x.example,"], [b"ann", b"bob@x.example"]),
        (["Bob <b@y.example>", "b@y.example"], [b"b@y.example"]),
        (['"Doe, Bob" <b@y.example>'], [b"b@y.example"]),
        (['"a, b"@y.example'], [b'"a, b"@y.example']),
        (["b@y.example (Bob)"], [b"b@y.example"]),
        (["a@x.example b@y.example"], [b"a@x.example", b"b@y.example"]),
        (["a@x.example  b@y.example, c"], [b"a@x.example", b"b@y.example", b"c"]),
        (["a @ x.example"], [b"a@x.example"]),
        (["a@x.example>"], [b"a@x.example"]),
        (["", "ann", " "], [b"ann"]),
    ],
)
def test_an_argument_is_read_as_in_a_header(to, found):
    assert message(b"From: x\r\n\r\n", *to)[1] == found


def test_a_sender_may_have_a_name():
    assert message(b"From: x\r\n\r\n", "r", sender="Ann <ann@x.example>")[0] == b"ann@x.example"


@pytest.mark.parametrize("wrong", ["ann bob", ",", "Bob <>", "x\n<b@y.example>", "x\0,b", 'a@x.example "b c@x'])
def test_what_is_no_address_on_the_command_line_is_refused(wrong):
    for to, sender in (wrong, None), ("r", wrong):
        with pytest.raises(Stop) as stopped:
            message(b"From: x\r\n\r\n", to, sender=sender)
        assert stopped.value.status == 65
    with pytest.raises(Stop):
        message(b"From: x\r\n\r\n", "r", sender="ann,bob")


def test_a_recipient_that_is_no_address_keeps_nobody_else_from_the_message():
    text = b"From: x\r\nTo: good@x.example, Bob Smith, c@x.example d@x.example\r\n\r\n"
    made = enveloped(text, Ann(), None, ["x\n<b@y.example>", "ann, b c", "<>"], True, "")
    assert made.recipients == [b"ann", b"good@x.example", b"c@x.example", b"d@x.example"]
    assert made.wrong == [f"{one}: this is no address" for one in (r"'x\n<b@y.example>'", "'b c'", "'<>'", "'Bob Smith'")]
    with pytest.raises(Stop) as stopped:
        enveloped(text, Ann(), None, ["a b", "c d"], False, "")
    assert (stopped.value.status, str(stopped.value)) == (65, "'a b': this is no address\n'c d': this is no address")


def test_a_message_without_author_gets_one():
    own = b'From: "Ann Doe" <ann>\r\n'
    assert message(b"Subject: x\r\n\r\nx", "r")[2] == own + b"Subject: x\r\n\r\nx"
    assert message(b"no header\r\n", "r")[2] == own + b"\r\nno header\r\n"
    assert message(b"\r\nFrom: x\r\n", "r")[2] == own + b"\r\nFrom: x\r\n"
    assert message(b"", "r")[2] == own + b"\r\n"
    assert message(b"Subject: x\r\n\r\n", "r", name="Bob")[2].startswith(b'From: "Bob" <ann>\r\n')
    assert message(b"From: z\r\n\r\n", "r", name="Bob")[2] == b"From: z\r\n\r\n"


def test_lines_of_a_mailbox_in_front_of_a_message_are_removed():
    assert message(b"From a Mon\r\n>From b\r\nFrom: x\r\n\r\n", "r")[2] == b"From: x\r\n\r\n"


@pytest.mark.parametrize(
    ("field", "own"),
    [
        (b"From: root (Cron Daemon)", b"From: ann (Cron Daemon)"),
        (b'From: "(Cron Daemon)" <root>', b'From: "(Cron Daemon)" <ann>'),
        (b"From: root", b"From: root"),
    ],
)
def test_what_crons_write_for_all_users_is_their_own(field, own):
    rest = b"\r\nTo: root\r\n\r\nroot"
    assert message(field + rest, "ann")[2] == own + rest


@pytest.mark.parametrize(
    "given",
    ["a\nRCPT TO:<b@x.example>", "a\r\nb", "a> SIZE=1", "a b", "a\0b", "", "<>", "a@x.example>", 'x"@y z', "a" * 1001, "a\x7f"],
)
def test_what_is_no_address_never_becomes_a_command(given):
    with pytest.raises(Stop) as stopped:
        address(given.encode())
    assert stopped.value.status == 65


@pytest.mark.parametrize(
    "given", ["ann", "ann@x.example", '"a b"@x.example', '"a > \\" b"@x.example', "ä@ö.example", "-x@y.example"]
)
def test_addresses(given):
    assert address(given.encode()) == given.encode()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Ann", b'"Ann" <ann>'),
        ("", b"ann"),
        ("Ann\r\nBcc: x@y.example", b'"Ann Bcc: x@y.example" <ann>'),
        ('A "b" \\', b'"A \\"b\\" \\\\" <ann>'),
        ("Marks & Spencer", b'"Marks & Spencer" <ann>'),
        ("Käthe", b"=?utf-8?B?S8OkdGhl?= <ann>"),
        ("Kä\nthe\u2028x", b"=?utf-8?B?S8OkIHRoZSB4?= <ann>"),
    ],
)
def test_no_name_becomes_another_field(name, found):
    assert author(name, b"ann") == found


# Handing over


TOO_MANY = b"452 4.5.3 too many"
LATER = b"450 4.3.0 later"


def dialogue(
    folder: Path, replies: list[tuple[bytes, bytes]], recipients: list[bytes]
) -> tuple[object, list[bytes], list[bytes]]:
    """Hand a message over to a relay that answers commands that begin with these words so, each time once, and the others by 250.
    What comes of it, the recipients that are left, and the commands."""
    commands: list[bytes] = []
    path = str(folder / "socket")

    def relay(listening: socket.socket) -> None:
        with listening.accept()[0] as sock, sock.makefile("rwb", buffering=0) as file:
            file.write(b"220 x\r\n")
            while (line := file.readline().strip()) and line != b"QUIT":
                commands.append(line)
                if line.startswith(b"BDAT"):
                    file.read(int(line.split()[1]))
                found = next((one for one in replies if line.startswith(one[0])), None)
                if found is not None:
                    replies.remove(found)
                file.write((b"250 ok" if found is None else found[1]) + b"\r\n")

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        thread = threading.Thread(target=relay, args=(listening,))
        thread.start()
        envelope = Envelope(b"s", recipients, b"x")
        try:
            found: object = hand_over(path, envelope, parsed(["sendmail"]))
        except (NotNow, Stop) as error:
            found = NotNow, error.status if isinstance(error, NotNow) else Stop  # the error itself would keep the connection open
        thread.join()
    return found, envelope.recipients, commands[1:]


def test_more_recipients_than_the_relay_takes_at_once_are_several_messages(tmp_path):
    replies = [(b"RCPT TO:<c>", TOO_MANY), (b"RCPT TO:<a>", b"550 5.1.1 no")]
    found, left, commands = dialogue(tmp_path, replies, [b"a", b"b", b"c", b"d"])
    words = [b"MAIL", b"RCPT TO:<a>", b"RCPT TO:<b>", b"RCPT TO:<c>", b"BDAT", b"MAIL", b"RCPT TO:<c>", b"RCPT TO:<d>", b"BDAT"]
    assert [command.startswith(word) for command, word in zip(commands, words, strict=True)] == [True] * 9
    assert (found, left) == (65, [b"a"])


@pytest.mark.parametrize(
    "replies",
    [
        [(b"RCPT TO:<c>", TOO_MANY), (b"BDAT", b"250 ok"), (b"BDAT", b"451 4.3.0 later")],
        [(b"RCPT TO:<c>", TOO_MANY), (b"RCPT TO:<c>", TOO_MANY), (b"RCPT TO:<d>", LATER)],
        [(b"RCPT TO:<c>", LATER), (b"RCPT TO:<d>", b"452 4.7.1 too many an hour")],
        [(b"RCPT TO:<c>", TOO_MANY), (b"RCPT TO:<c>", b"421 4.3.0 closing")],
    ],
)
def test_what_is_refused_for_now_later_on_is_left_for_those_who_do_not_have_it(replies, tmp_path):
    found, left, _ = dialogue(tmp_path, replies, [b"a", b"b", b"c", b"d"])
    assert (found, left) == ((NotNow, 0), [b"c", b"d"])


def test_who_was_set_aside_is_not_forgotten_where_a_later_part_fails(tmp_path):
    replies = [(b"RCPT TO:<a>", LATER), (b"RCPT TO:<c>", TOO_MANY), (b"BDAT", b"250 ok"), (b"BDAT", b"451 4.3.0 later")]
    found, left, _ = dialogue(tmp_path, replies, [b"a", b"b", b"c", b"d"])
    assert (found, left) == ((NotNow, 0), [b"a", b"c", b"d"])


@pytest.mark.parametrize("at", [b"MAIL", b"BDAT"])
def test_where_a_later_part_is_refused_for_good_those_are_named_who_do_not_have_it(tmp_path, capfd, at):
    replies = [
        (b"RCPT TO:<a>", LATER), (b"RCPT TO:<b>", b"550 5.1.1 gone"), (b"RCPT TO:<d>", TOO_MANY), (at, b"250 ok"),
        (at, b"550 5.6.0 refused"),
    ]  # fmt: skip
    found, left, _ = dialogue(tmp_path, replies, [b"a", b"b", b"c", b"d", b"e"])
    assert (found, left) == ((NotNow, 65), [b"a"]), "who is refused for now gets it later"
    assert capfd.readouterr().err == "sendmail: b: 5.1.1 gone\nsendmail: d: 5.6.0 refused\nsendmail: e: 5.6.0 refused\n"


@pytest.mark.parametrize(
    ("replies", "status", "left"),
    [
        ([(b"RCPT TO:<b>", LATER)], 0, [b"b"]),
        ([(b"RCPT TO:<a>", LATER), (b"RCPT TO:<d>", LATER)], 0, [b"a", b"d"]),
        ([(b"RCPT TO:<a>", TOO_MANY)], 0, [b"a"]),
        ([(b"RCPT TO:<b>", LATER), (b"RCPT TO:<c>", b"550 5.1.1 no")], 65, [b"b"]),
        ([(b"RCPT TO:<%c>" % one, LATER) for one in b"abcd"], 0, [b"a", b"b", b"c", b"d"]),
        ([(b"RCPT TO:<b>", b"421 4.3.0 closing")], 0, [b"a", b"b", b"c", b"d"]),
        ([(b"RCPT TO:<b>", LATER), (b"BDAT", b"451 4.3.0 later")], 0, [b"a", b"b", b"c", b"d"]),
    ],
)
def test_a_recipient_that_is_refused_for_now_keeps_nobody_else_waiting(replies, status, left, tmp_path, capfd):
    found, kept, commands = dialogue(tmp_path, list(replies), [b"a", b"b", b"c", b"d"])
    assert (found, sorted(kept)) == ((NotNow, status), left)
    assert sum(command.startswith(b"MAIL") for command in commands) == 1
    assert capfd.readouterr().err == ("sendmail: c: 5.1.1 no\n" if status else "")


# Statuses


@pytest.mark.parametrize(
    ("words", "text", "status", "said"),
    [
        ([], b"x\n", 64, b"no recipient"),
        (["-t"], b"Subject: x\n\n", 64, b"names no recipient"),
        ([""], b"x\n", 64, b"no recipient"),
        (["-t"], b"To: a b@x.example\n\n", 65, b"no address"),
        (["-bd"], b"", 64, b"not supported"),
        (["-n", "a"], b"", 64, b"not supported"),
        (["-bv"], b"", 64, b"no recipient"),
        (["-bi"], b"", 0, b""),
        (["a@x.example"], b"x\n", 75, b"/nonexistent/socket: No such file"),
    ],
)
def test_statuses(words, text, status, said):
    done = run(*words, text=text)
    assert done.returncode == status
    assert said in done.stderr
    assert done.stderr.count(b"\n") == (1 if said else 0)


def test_the_relay_can_read_what_is_dropped_whatever_the_umask_is(tmp_path):
    words = ["sh", "-c", 'umask 077; exec "$@"', "sh", *BARE, str(PROGRAM), "a@x.example"]
    environment = {
        "PATH": os.environ["PATH"], "RELAYMTA_SENDMAIL_SOCKET": "/nonexistent/socket", "RELAYMTA_DROP": str(tmp_path),
        "RELAYMTA_DROP_PROGRAM": "/nonexistent/program",
    }  # fmt: skip
    subprocess.run(words, input=b"x\n", env=environment, check=True)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o644]


@pytest.mark.parametrize(("name", "own"), [("CORP\\ann", "ann"), ("ann@corp.example", "ann@corp.example")])
def test_names_of_users_of_a_directory(name, own, monkeypatch):
    """As Winbind and SSSD have them."""
    found = pwd.struct_passwd((name, "x", 1000, 1000, "Ann,,,", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: found)
    assert (User().name, User().full_name) == (own, "Ann")


def test_the_user_is_who_has_the_rights(monkeypatch):
    """As the socket has it: a set-uid program sends as its owner. `&` in the system's list is the name."""
    names = {1000: "ann", 2000: "bob"}
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd((names[uid], "x", uid, uid, "& Doe,,,", "/", "/bin/sh")))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "geteuid", lambda: 2000)
    assert (User().name, User().full_name) == ("bob", "bob Doe")


def test_without_standard_input_there_is_no_message():
    words = [*BARE, str(PROGRAM), "a@x.example"]
    done = subprocess.run(words, preexec_fn=lambda: os.close(0), capture_output=True, check=False)
    assert (done.returncode, b"standard input" in done.stderr) == (66, True)


def test_what_it_says_cannot_drive_a_terminal():
    done = run("\x1b[31m@x.example\n", text=b"x")
    assert done.returncode == 65
    assert b"\x1b" not in done.stderr


@pytest.mark.parametrize("words", [["-t"], ["a@x.example"], ["-v", "a@x.example"], ["-bd"], ["-N", "often", "-bi"]])
@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&1 | true", ">&- 2>&-"])
def test_a_sentence_that_nobody_reads_changes_no_status(words, where):
    script = f'set -o pipefail; "$@" {where}'
    environment = {"PATH": os.environ["PATH"], "RELAYMTA_SENDMAIL_SOCKET": "/nonexistent/socket"}
    command = ["bash", "-c", script, "bash", *BARE, str(PROGRAM), *words]
    expected = run(*words, text=b"Subject: x\n\n").returncode
    done = subprocess.run(command, input=b"Subject: x\n\n", capture_output=True, env=environment, check=False)
    assert done.returncode == expected != 120


@pytest.mark.parametrize("octets", [b"\x1b[31m", b"\x9b31m", "\x9b31m\x85\x8d".encode(), b"\r", "\u2028\u202e".encode()])
def test_nothing_that_is_said_drives_a_terminal(octets, capfd):
    for text in (octets.decode("utf-8", "surrogateescape"), octets.decode("utf-8", "replace"), octets.decode("latin-1")):
        say(f"a{text}ä\nb")
        found = capfd.readouterr().err
        assert all(one.isprintable() for one in found.replace("\n", ""))
        assert found.startswith("sendmail: a") and found.endswith("ä\nsendmail: b\n")


def test_what_is_closed_gets_no_number_of_another_file(tmp_path):
    """A socket would be standard output. What a mode needs is missed."""
    for words, closed, status in ((["-bs"], 0, 66), (["-bs"], 1, 74), (["-bp"], 1, 74), (["-bv", "a"], 1, 74), (["-bi"], 1, 0)):
        done = subprocess.run(
            [*BARE, str(PROGRAM), *words], preexec_fn=lambda closed=closed: os.close(closed), capture_output=True, check=False
        )  # fmt: skip
        assert (done.returncode, done.stderr.count(b"is closed")) == (status, int(status > 0)), words
    shown = (
        "import os; from relaymta.sendmail.standard import opened; found = opened(); os.write(3, repr(sorted(found)).encode())"
    )
    code = f"import sys; sys.path.insert(0, {str(PROGRAM.parents[2])!r}); {shown}; assert os.open('/dev/null', 0) > 2"
    with open(tmp_path / "found", "wb") as file:
        command = ["sh", "-c", f'exec "$@" 0<&- >&- 2>&- 3>{file.name}', "sh", *BARE, "-c", code]
        subprocess.run(command, check=True)
    assert (tmp_path / "found").read_bytes() == b"[0, 1, 2]"


def test_too_little_memory_is_no_reason_to_give_up(monkeypatch, capfd):
    def failing(options: object) -> int:
        raise MemoryError

    monkeypatch.setitem(program._MODES, "m", failing)
    assert program.main(["sendmail", "ann"]) == 75
    assert "memory" in capfd.readouterr().err


def test_standard_input_that_does_not_wait_is_waited_for():
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    words = [*BARE, str(PROGRAM), "-t"]
    with subprocess.Popen(words, stdin=ours, stderr=subprocess.PIPE) as process:
        for part in (b"To: a b@x.example\n", b"\nx\n"):
            time.sleep(0.2)  # until it has read all
            os.write(theirs, part)
        os.close(theirs)
        assert b"'a b@x.example': this is no address" in process.stderr.read()
        assert process.wait() == 65
    os.close(ours)


# The environment


def test_the_environment_is_looked_at_in_one_place():
    for path in PROGRAM.parent.glob("*.py"):
        assert ("os.environ" in path.read_text() or "getenv" in path.read_text()) == (path.name == "environment.py"), path


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights need root")
@pytest.mark.parametrize("ids", [lambda: os.setreuid(NOBODY, 0), lambda: os.setregid(NOBODY, 0), lambda: os.setreuid(0, NOBODY)])
def test_what_a_set_uid_program_was_given_counts_for_nothing(ids, tmp_path):
    """Nobody has a program run with the rights of another user, or has mail written to a socket or a folder of his own."""
    if not os.access(sys.executable, os.X_OK):
        pytest.skip("other users cannot run this interpreter")
    tmp_path.chmod(0o777)
    evil = tmp_path / "evil"
    evil.write_text(f"#!/bin/sh\ncat > {tmp_path}/done\n")
    evil.chmod(0o755)
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parents[2])!r})\n"
        "from relaymta.sendmail import dropping, environment, main, program\n"
        "program.SOCKET = dropping.PROGRAM = dropping.FOLDER = '/nonexistent/x'\n"
        "program.PROGRAMS = ()\n"
        "assert program._environment(program.parsed(['sendmail'])) == {'PATH': '/usr/bin:/bin'}\n"
        "assert main(['sendmail', '-bp']) == 69\n"
        "sys.exit(main(['sendmail', 'a@x.example']))"
    )
    given = {"RELAYMTA_DROP_PROGRAM": str(evil), "RELAYMTA_DROP": str(tmp_path), "RELAYMTA_SENDMAIL_SOCKET": str(tmp_path / "s")}
    shown = {**given, "NAME": "CEO", "PATH": str(tmp_path), "RELAYMTA_CONFIG": str(tmp_path / "c")}
    done = subprocess.run([*BARE, "-c", code], input=b"x\n", env=shown, preexec_fn=ids, capture_output=True, check=False)
    assert (done.returncode, b"/nonexistent/x: No such file" in done.stderr) == (75, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["evil"]


def test_the_name_in_the_environment_is_not_that_of_others(monkeypatch):
    monkeypatch.setenv("NAME", "CEO")
    assert environment.variable("NAME") == "CEO"
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert environment.variable("NAME") == ""


# Dropping


def test_what_may_not_be_safe_on_disk_is_not_left_there(tmp_path, monkeypatch):
    """The caller is told so, and sends it again."""
    for failing in (1, 2):
        calls: list[int] = []

        def fsync(descriptor: int, failing: int = failing, calls: list[int] = calls) -> None:
            calls.append(descriptor)
            if len(calls) == failing:
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="output error"):
            dropping._write(str(tmp_path), b"x")
        assert list(tmp_path.iterdir()) == []


def test_many_recipients_are_several_files_each_of_which_the_relay_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAYMTA_DROP_PROGRAM", "/nonexistent")
    monkeypatch.setenv("RELAYMTA_DROP", str(tmp_path))
    many = [f"recipient-with-a-long-name-{number}@department.x.example".encode() for number in range(70_000)]
    dropping.drop(Envelope(b"s", list(many), b"x\r\n"), parsed(["sendmail"]), NotNow("no"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    found: list[bytes] = []
    for name in names:
        descriptor = os.open(tmp_path / name, os.O_RDONLY)
        taken = dropped.opened_drop(descriptor)
        assert os.pread(descriptor, 10, taken.at) == b"x\r\n"
        assert taken.at < dropped.COMMANDS_MOST and taken.mail == b"MAIL FROM:<s> SIZE=3"
        found += (rcpt[9:-1] for rcpt in taken.rcpts)
        os.close(descriptor)
    assert found == many


def test_where_a_later_file_cannot_be_written_those_whom_it_is_for_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAYMTA_DROP_PROGRAM", "/nonexistent")
    monkeypatch.setattr(dropping, "COMMANDS_MOST", 50)
    written: list[bytes] = []

    def write(folder: str, text: bytes) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(text)

    monkeypatch.setattr(dropping, "_write", write)
    with pytest.raises(Stop, match=r"^the message was not taken for b, c: no; and it cannot be dropped: No space"):
        dropping.drop(Envelope(b"s", [b"a", b"b", b"c"], b"x\r\n"), parsed(["sendmail"]), NotNow("no"))


def test_who_does_not_have_it_is_named_where_others_do(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAYMTA_DROP_PROGRAM", "/nonexistent")
    monkeypatch.setenv("RELAYMTA_DROP", str(tmp_path / "none"))
    envelope = Envelope(b"s", [b"a", b"b"], b"x\r\n")
    with pytest.raises(Stop, match=r"^the message was not taken: no; and it cannot be dropped: No such file"):
        dropping.drop(envelope, parsed(["sendmail"]), NotNow("no"))
    envelope.is_partial = True
    with pytest.raises(Stop, match=r"^the message was not taken for a, b: no; and it cannot be dropped"):
        dropping.drop(envelope, parsed(["sendmail"]), NotNow("no"))
