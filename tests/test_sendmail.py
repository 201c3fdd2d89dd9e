"""sendmail(1) without a relay: options, messages, statuses, and what it imports."""

import os
import pwd
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import relaymta
from relaymta.sendmail import status as statuses
from relaymta.sendmail.dropping import FOLDER, FOLDER_VARIABLE, PROGRAM_VARIABLE
from relaymta.sendmail.handing import NotNow, hand_over
from relaymta.sendmail.message import Envelope, User, address, author, enveloped, read
from relaymta.sendmail.options import _LETTERS, _MODES, parsed
from relaymta.sendmail.program import SOCKET_VARIABLE
from relaymta.sendmail.status import Stop

PROGRAM = Path(relaymta.__file__).parent / "sendmail" / "__main__.py"
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


@pytest.mark.parametrize(("arguments", "status"), [(["-t"], 65), (["ann@a.example"], 75), (["-bi"], 0), (["-bs"], 75)])
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
        (["ann", "-t", "bob"], {"from_header": True, "recipients": ["ann", "bob"]}),
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
    [["-bd"], ["-bt"], ["-n"], ["-Z"], ["-f"], ["-N", "often"], ["-R", "all"], ["-V", "a\nb"], ["-B", "9BIT"], ["-qX"], ["-qI"]],
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
    ("to", "found"),
    [
        (["ann,bob"], [b"ann", b"bob"]),
        (["ann, bob@x.example,"], [b"ann", b"bob@x.example"]),
        (["Bob <b@y.example>", "b@y.example"], [b"b@y.example"]),
        (['"Doe, Bob" <b@y.example>'], [b"b@y.example"]),
        (['"a, b"@y.example'], [b'"a, b"@y.example']),
        (["b@y.example (Bob)"], [b"b@y.example"]),
    ],
)
def test_an_argument_is_read_as_in_a_header(to, found):
    assert message(b"From: x\r\n\r\n", *to)[1] == found


def test_a_sender_may_have_a_name():
    assert message(b"From: x\r\n\r\n", "r", sender="Ann <ann@x.example>")[0] == b"ann@x.example"


@pytest.mark.parametrize("wrong", ["ann bob", ",", "Bob <>", "x\n<b@y.example>", "ann, b c", "x\0,b"])
def test_what_is_no_address_on_the_command_line_is_refused(wrong):
    for to, sender in (wrong, None), ("r", wrong):
        with pytest.raises(Stop) as stopped:
            message(b"From: x\r\n\r\n", to, sender=sender)
        assert stopped.value.status == 65
    with pytest.raises(Stop):
        message(b"From: x\r\n\r\n", "r", sender="ann,bob")


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
        ("& Doe", b'"ann Doe" <ann>'),
        ("Käthe", b"=?utf-8?B?S8OkdGhl?= <ann>"),
        ("Kä\nthe\u2028x", b"=?utf-8?B?S8OkIHRoZSB4?= <ann>"),
    ],
)
def test_no_name_becomes_another_field(name, found):
    assert author(name, b"ann") == found


# Handing over


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
            found = type(error)  # the error itself would keep the connection open
        thread.join()
    return found, envelope.recipients, commands[1:]


TOO_MANY = b"452 4.5.3 too many"


def test_more_recipients_than_the_relay_takes_at_once_are_several_messages(tmp_path):
    replies = [(b"RCPT TO:<c>", TOO_MANY), (b"RCPT TO:<a>", b"550 5.1.1 no")]
    found, left, commands = dialogue(tmp_path, replies, [b"a", b"b", b"c", b"d"])
    words = [b"MAIL", b"RCPT TO:<a>", b"RCPT TO:<b>", b"RCPT TO:<c>", b"BDAT", b"MAIL", b"RCPT TO:<c>", b"RCPT TO:<d>", b"BDAT"]
    assert [command.startswith(word) for command, word in zip(commands, words, strict=True)] == [True] * 9
    assert (found, left) == (65, [b"a"])


@pytest.mark.parametrize(
    "replies",
    [
        [(b"RCPT TO:<c>", TOO_MANY), (b"RCPT TO:<c>", TOO_MANY)],
        [(b"RCPT TO:<c>", TOO_MANY), (b"RCPT TO:<d>", b"450 4.3.0 later")],
        [(b"RCPT TO:<c>", TOO_MANY), (b"BDAT", b"250 ok"), (b"BDAT", b"451 4.3.0 later")],
    ],
)
def test_what_is_refused_for_now_later_on_is_left_for_those_who_do_not_have_it(replies, tmp_path):
    found, left, _ = dialogue(tmp_path, replies, [b"a", b"b", b"c", b"d"])
    assert (found, left) == (NotNow, [b"c", b"d"])


def test_what_is_full_for_the_first_recipient_is_refused_for_now(tmp_path):
    found, left, _ = dialogue(tmp_path, [(b"RCPT TO:<a>", TOO_MANY)], [b"a", b"b"])
    assert (found, left) == (NotNow, [b"a", b"b"])


# Statuses


@pytest.mark.parametrize(
    ("words", "text", "status", "said"),
    [
        ([], b"x\n", 64, b"no recipient"),
        (["-t"], b"Subject: x\n\n", 65, b"names no recipient"),
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


def test_without_standard_input_there_is_no_message():
    words = [*BARE, str(PROGRAM), "a@x.example"]
    done = subprocess.run(words, preexec_fn=lambda: os.close(0), capture_output=True, check=False)
    assert (done.returncode, b"standard input" in done.stderr) == (66, True)


def test_what_it_says_cannot_drive_a_terminal():
    done = run("\x1b[31m@x.example\n", text=b"x")
    assert done.returncode == 65
    assert b"\x1b" not in done.stderr
