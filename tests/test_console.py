"""Text from outside is escaped, by every verb and in every line of the log."""

import ast
import asyncio
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from relaymta.cli import console, main, sink
from relaymta.cli.options import Configuration
from relaymta.log import History, Log, find_history
from relaymta.proto.printable import printable, printable_json
from tests.support.daemon import Relay, dialog, wait_for
from tests.support.fake_mx import FakeMx

CLI = Path(console.__file__).parent
OTHERS = {"console.py"}

SHOWN = [  # (text, as it is shown, its effect on a terminal)
    ("plain text, <a@b.example>: 100% [red]", "plain text, <a@b.example>: 100% [red]", "nothing"),
    ("Grüße, 你好, привет", "Grüße, 你好, привет", "nothing"),
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07", "ECMA-48 8.3.39 ED, xterm's OSC 0"),
    ("\x9b2J\x85\x90q\x9c", r"\x9b2J\x85\x90q\x9c", "the same by C1 (ECMA-48 5.3)"),
    ("one\ntwo\rthree\tfour", r"one\ntwo\rthree\tfour", "a line of its own, over the line, over the columns"),
    ("a\x00b\x08c\x7fd", r"a\x00b\x08c\x7fd", "NUL, backspace, DEL"),
    ("\u202egpj.exe\u2066x\u2069", r"\u202egpj.exe\u2066x\u2069", "bidi (UAX 9)"),
    ("a\u2028b\u2029c", r"a\u2028b\u2029c", "line ends for some programs"),
    ("a\u200bb\u200dc\ufeffd\u00ade", r"a\u200bb\u200dc\ufeffd\xade", "invisible"),
    ("a\u00a0b\u3000c", r"a\xa0b\u3000c", "white space that looks like a space"),
    ("\udc9b\U000e0041", r"\udc9b\U000e0041", "a lone surrogate; a tag character"),
]


@pytest.mark.parametrize(("text", "shown", "does"), SHOWN)
def test_what_is_not_printable_is_escaped(text, shown, does, capsys):
    assert printable(text) == shown
    console.say(text)
    console.say("two", "lines", err=True)
    console.table("", ["column"], [[text]])
    written = capsys.readouterr()
    assert written.out.startswith(shown + "\n") and written.err == "two\nlines\n"
    assert shown in written.out.partition("\n")[2].replace("\n", " "), "in the table"


def test_markup_and_emoji_in_a_table_are_text(capsys):
    console.table("", ["column"], [["[red]x[/red] :smile: [link=http://evil.example]y[/link]"]])
    assert "[red]x[/red] :smile: [link=http://evil.example]y[/link]" in capsys.readouterr().out


@given(st.text())
def test_json_means_the_same_and_is_printable(text):
    text = text.encode("utf-8", "replace").decode()
    for made in (json.dumps({"x": text}), json.dumps({"x": text}, ensure_ascii=False)):
        shown = printable_json(made.encode()).decode()
        assert json.loads(shown) == {"x": text}
        assert shown.isprintable()


def test_characters_that_the_terminals_encoding_lacks_are_escaped(monkeypatch):
    octets = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(octets, encoding="ascii"))
    console.say("Grüße")
    assert octets.getvalue() == rb"Gr\xfc\xdfe" + b"\n"


def test_verbs_write_through_the_console_alone():
    """click.echo, print and sys.stdout would write a peer's text unescaped."""
    found = []
    for path in CLI.glob("*.py"):
        if path.name in OTHERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            if name in ("print", "click.echo", "click.secho", "sys.stdout", "sys.stderr"):
                found.append(f"{path.name}:{node.lineno}: {name}")
    assert not found


CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
REPLY = "450 4.2.1 \x1b]0;title\x07 \x9b2J \u202e [red]x :smile: \x08\x7f"


def test_lines_of_the_log_are_printable_and_survive_what_cannot_be_encoded(tmp_path):
    log = Log(str(tmp_path / "log"), 0, History(tmp_path / "history", 0, 1 << 20))
    link = {"address": "", "port": 0, "tls": "", "cipher": ""}
    common = {"recipients": ["b"], "route": "r", "peer": "p", "delay": 0.1, "attempt": 1, **link}
    log.event("delivered", id="ONE", reply=REPLY, **common)
    log.event("delivered", id="ONE", reply="\udcff a lone surrogate", **common)
    log.event("delivered", id="ONE", reply="after it", **common)
    log.close()
    text = (tmp_path / "log").read_text()
    assert not CONTROL.search(text)
    assert [json.loads(line)["reply"] for line in text.splitlines()] == [REPLY, "? a lone surrogate", "after it"]
    assert [event["reply"] for event in find_history(tmp_path / "history", "ONE")] == [REPLY, "? a lone surrogate", "after it"]


def run(*words: str) -> str:
    """The output of a verb."""
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def on_a_terminal(*command: str) -> str:
    """The output of a command to a terminal."""
    leader, follower = pty.openpty()
    done = subprocess.run(command, stdout=follower, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=60, check=False)
    os.close(follower)
    written = b""
    while True:
        try:
            written += (piece := os.read(leader, 65536))
        except OSError:
            break
        if not piece:
            break
    os.close(leader)
    assert done.returncode == 0
    return written.decode().replace("\r\n", "\n")


def test_no_verb_lets_a_peer_act_on_the_terminal(tmp_path):
    """By a smart host's replies, and by message data."""
    data = "Subject: \x1b[31mred\u202e\r\n\r\n\x1b]0;title\x07\tx\r\n"
    with FakeMx({"RCPT": REPLY.encode() + b"\r\n"}) as peer:
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=300") as relay:
            relay.send(data.encode(), "a@b", "c@d")
            (deferred,) = wait_for(lambda: relay.events("deferred"))
            ident, own = deferred["id"], ("--spool", str(relay.spool))
            relay.cli("site", "suspend", "--app", "news", "--reason", "because \x1b[31m\u202e\ninjected")
            verbs = [["queue", "list"], ["queue", "summary"], ["message", "show", ident], ["message", "explain", ident],
                     ["message", "history", ident], ["site", "list"], ["shaping", "active"], ["status"]]  # fmt: skip
            for verb in verbs:
                shown = run(*verb, *own)
                assert not CONTROL.search(shown) and "\ninjected" not in shown, verb
                if verb[0] in ("message", "queue") and verb[1] != "summary":
                    assert r"\x1b]0;title\x07 \x9b2J \u202e [red]x :smile: \x08\x7f" in shown, verb
                as_json = run(*verb, *own, "--json")
                assert not CONTROL.search(as_json), verb
                for line in as_json.splitlines():
                    json.loads(line)
            program = [sys.executable, "-m", "relaymta"]
            shown = on_a_terminal(*program, "message", "raw", ident, *own)
            assert not CONTROL.search(shown) and r"Subject: \x1b[31mred\u202e" + "\n\n" + r"\x1b]0;title\x07\tx" + "\n" in shown
            raw = subprocess.run([*program, "message", "raw", ident, *own], capture_output=True, check=True).stdout
            assert raw.endswith(data.encode()), "unchanged into a pipe"
            assert not CONTROL.search(relay.log.read_text())
            relay.stop()
            for verb in verbs[:3]:  # answered from the spool
                assert not CONTROL.search(run(*verb, *own)), verb


def test_octets_in_a_command_that_are_not_utf8_do_not_stop_the_log(tmp_path):
    with FakeMx({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        dialog(relay.port, b"EHLO \xff\xfe.example\r\nMAIL FROM:<\xff@b> X=\xff\r\nRCPT TO:<c@d>\r\nAUTH PLAIN \xff\r\nQUIT\r\n")
        relay.send()
        wait_for(lambda: relay.events("delivered"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sink", "--listen", "x"), "--listen 'x': expected host:port\n"),
        (("sink", "--listen", "127.0.0.1:99999"), "--listen '127.0.0.1:99999': expected host:port\n"),
        (("dkim", "keygen", "a b", "--selector", "s", "--out", "k"), "domain: 'a b' is not a valid domain name\n"),
    ],
)
def test_an_invalid_argument_is_reported(words, message):
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stderr) == (64, message)


class Nowhere(asyncio.Transport):
    def write(self, data: bytes) -> None: ...


def test_the_sink_shows_subjects_escaped(capsys):
    one = sink.Sink()
    one.connection_made(Nowhere())
    one.data_received(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
    one.data_received("Subject: \x1b[31m\u202e\r\n\r\nx\r\n.\r\n".encode())
    shown = capsys.readouterr().out
    assert r"Subject: \x1b[31m\u202e" in shown and not CONTROL.search(shown)


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({"spool": "/x"}, "/x/control.sock"),
        ({"spool": "/x", "control.socket": "/y"}, "/y"),
        ({"spool": "/x", "control.socket": ""}, "/x/control.sock"),
        ({"control.socket": "/y"}, "/y"),
        ({}, None),
        ({"spool": "/x", "control.socket": False}, None),
        ({"spool": 5, "control.socket": "/y"}, None),
        ({"spool": "/x", "control": {"socket": "/y"}}, None),
        ({"spool": "/x", "workers": 2}, None),
    ],
)
def test_the_place_of_the_control_socket(tmp_path, overrides, path):
    """None: the whole configuration says where it is, or what is wrong."""
    assert Configuration(None, overrides).control_path() == (path and Path(path))
    file = tmp_path / "relaymta.toml"
    file.write_text('spool = "/a"\n[control]\nsocket = "/b"\n[nonsense]\n')
    assert Configuration(file, {}).control_path() == Path("/b")
    for wrong in ("spool = ", "control = 5", "[control]\nsocket = 0\n"):
        file.write_text(wrong)
        assert Configuration(file, {}).control_path() is None


def test_a_configuration_in_a_pipe_is_read_once(tmp_path):
    command = f"{sys.executable} -P -m relaymta status -c <(printf 'spool = \"{tmp_path}/none\"')"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 69 and f"{tmp_path}/none" in done.stderr


def test_a_verb_that_is_misspelt_is_guessed():
    assert "Did you mean 'status'?" in CliRunner().invoke(main, ["statu"]).stderr


@pytest.mark.parametrize(("text", "lines"), [
    ("", [""]), ("one two", ["one two"]), ("one two  three", ["one two", "three"]), ("onetwothree", ["onetwoth", "ree"]),
    ("\u6f22" * 6, ["\u6f22" * 4, "\u6f22" * 2]), ("\u6f22\u6f22 \u6f22\u6f22", ["\u6f22\u6f22", "\u6f22\u6f22"]),
    ("e\u0301" * 10, ["e\u0301" * 8, "e\u0301" * 2]),
])  # fmt: skip
def test_a_text_is_folded_by_its_columns(text, lines):
    assert console._folded(text, 8) == lines


def test_a_long_text_is_folded_in_linear_time(monkeypatch):
    """By the characters whose columns are counted: a log event may name a thousand recipients."""
    counted: list[int] = []
    columns_of = console._columns_of
    monkeypatch.setattr(console, "_columns_of", lambda text: counted.append(len(text)) or columns_of(text))
    assert len(console._folded("a" * 8000 + "\u6f22", 80)) == 101
    assert sum(counted) < 20_000
