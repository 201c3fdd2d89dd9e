"""`relaymta bench` as its users run it: with relays, sinks and faults that are real."""

import contextlib
import json
import os
import re
import signal
import smtplib
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from relaymta.bench.profile import SHIPPED
from relaymta.cli import main
from tests.support import commands
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need
from tests.support.prove import in_prove

# What each profile must have done for the run to mean anything: the counts of the sink.
FAULTS = {
    "gmail-like": ["TLS"],
    "greylisting": ["greylisted"],
    "storm-421": ["storm", "421"],
    "slow-dots": ["slow"],
    "cut-in-mid-dot": ["cut in data", "cut at the dot", "cut after the dot", "cut in the reply"],
    "broken-tls": ["TLS handshake"],
    "mixed": ["slow", "refused at RCPT"],
}


def test_every_profile_through_a_relay_loses_and_alters_nothing(tmp_path):
    """One relay with a route to the sink of each, all at the same time."""
    assert set(FAULTS) == {path.stem for path in SHIPPED.glob("*.toml")}
    ports = {name: free_port() for name in FAULTS}
    routes = ", ".join(
        f'{{name="{name}", recipient_domain=["{name}.invalid"], hosts=["127.0.0.1:{port}"]}}' for name, port in ports.items()
    )
    settings = (f"route=[{routes}]", "delivery.first_retry=1", 'rule=[{match="Greylisted", action="retry", for=1}]')
    with Relay(tmp_path, None, *settings) as relay, ThreadPoolExecutor(len(FAULTS)) as pool:

        def through(name: str) -> tuple[str, dict]:
            to = tmp_path / f"{name}.txt"
            to.write_text("# who gets it\n" + "".join(f"r{one}@{name}.invalid\n" for one in range(50)))
            words = ["bench", "--target", f"127.0.0.1:{relay.port}", "--sink", f"127.0.0.1:{ports[name]}", "--profile", name]
            words += [
                "--connections",
                "4",
                "--messages",
                "300",
                "--seed",
                "5",
                "--rate",
                "45",
                "--recipients-file",
                str(to),
                "--size",
                "200",
            ]
            found = commands.run([*words, "--grace", "90s", "--spool", str(relay.spool), "--json", "-"], 280)
            assert found.returncode == 0, (name, found.stdout[-2000:], found.stderr)
            return name, json.loads(found.stdout)["runs"][0]

        for name, run in pool.map(through, FAULTS):
            ledger = run["ledger"]
            assert (ledger["accepted"], ledger["arrived"], ledger["queue_known"]) == (300, 300, True), (name, ledger)
            assert not ledger["lost"] + ledger["altered"] + ledger["duplicated"] + ledger["foreign"], (name, ledger)
            assert all(run["sink"].get(fault) for fault in FAULTS[name]), (name, run["sink"])
            assert (ledger["repeated"] > 0) == (name == "cut-in-mid-dot") or name == "mixed", (name, ledger)


def faulty(port: int, taken: FakeMx, until: threading.Event) -> None:
    """A relay that loses every message whose number ends with 3, alters those with 5, and sends those with 7 twice."""
    done = 0
    while not until.is_set():
        while done < len(taken.messages):
            sender, to, data = taken.messages[done]
            done += 1
            serial = re.search(rb"X-Relaymta-Bench: \w+-(\w+)\r\n", data)
            assert serial is not None
            number = int(serial[1], 16) % 10 if b"Subject: load 0\r\n" not in data else 0
            with contextlib.suppress(OSError), smtplib.SMTP("127.0.0.1", port) as client:
                for _ in range(0 if number == 3 else 2 if number == 7 else 1):
                    added = b"Received: from a stand-in\r\n" + data
                    client.sendmail(sender, to, added[:-4] + b"?\r\n" if number == 5 else added)
        time.sleep(0.01)


def test_a_relay_that_loses_alters_and_duplicates_is_found_out():
    port, until = free_port(), threading.Event()
    with FakeMx({}) as taken:
        thread = threading.Thread(target=faulty, args=(port, taken, until))
        thread.start()
        try:
            words = ["bench", "--target", f"127.0.0.1:{taken.port}", "--sink", f"127.0.0.1:{port}", "--messages", "20"]
            found = commands.run([*words, "--connections", "2", "--size", "200", "--grace", "3s", "--set", "spool=/none"], 120)
        finally:
            until.set()
            thread.join()
    assert found.returncode == 1
    assert "target: 2 lost, 2 altered, 2 duplicated of 20 copies" in found.stdout
    assert [len(re.findall(rf"^  {kind}: \w+-\w+", found.stdout, re.M)) for kind in ("lost", "altered", "duplicated")] == [
        2,
        2,
        2,
    ]


def test_a_relay_that_does_not_route_to_the_sink_gets_one_message(tmp_path):
    with FakeMx({}) as taken:
        script = "import relaymta.bench.trial as t; t.PROBE_SECONDS = 0.5; from relaymta.cli import main; main()"
        words = ["bench", "--target", f"127.0.0.1:{taken.port}", "--sink", f"127.0.0.1:{free_port()}"]
        found = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode == 69 and "does it route everything there? Nothing more was sent" in found.stderr
        assert len(taken.messages) == 1


def processes_of(folder: Path) -> list[int]:
    """Those whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def running(folder: Path, *words: str):
    """`relaymta bench` with its queue in a folder, once the load has begun."""
    said = folder.with_suffix(".said")
    command = [
        sys.executable,
        "-m",
        "relaymta",
        "bench",
        "--duration",
        "200s",
        "--spool-dir",
        str(folder),
        "--connections",
        "4",
        *words,
    ]
    with said.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or re.search(rb": load: [1-9]", said.read_bytes()), what="the load to begin")
        assert process.poll() is None, said.read_text()
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), *in_prove((signal.SIGTERM, 143), (signal.SIGHUP, 129))])
def test_a_signal_ends_the_load_and_leaves_nothing(tmp_path, number, status):
    folder = tmp_path / "spools"
    folder.mkdir()
    with running(folder) as process:
        assert len(processes_of(folder)) > 2
        process.send_signal(number)
        out = process.communicate(timeout=90)[0].decode()
    assert process.returncode == status
    assert re.search(r"^messages accepted +[1-9]", out, re.M) and "lost, altered or duplicated" in out, out
    assert not list(folder.iterdir()) and not processes_of(folder)


def test_a_bench_that_is_killed_leaves_no_processes(tmp_path):
    folder = tmp_path / "spools"
    folder.mkdir()
    with running(folder) as process:
        process.kill()
    wait_for(lambda: not processes_of(folder), what="its processes to end")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_tls_login_and_files_beside_an_earlier_run(tmp_path):
    """Our relay, and its report."""
    old, new, html = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "report.html"
    words = [
        "bench",
        "--messages",
        "60",
        "--connections",
        "3",
        "--size",
        "1k-20k",
        "--recipients",
        "2",
        "--spool-dir",
        str(tmp_path),
    ]
    found = commands.run([*words, "--tls", "implicit", "--auth", "login", "--json", str(old), "--html", str(html)], 120)
    assert found.returncode == 0, found.stderr
    assert "nothing lost, altered or duplicated: 120 of 120 copies" in found.stdout
    assert f"written: {old}" in found.stderr
    page, text = Page(), html.read_text()
    page.feed(text)
    assert (
        page.tags.count("svg") == 3
        and "script" not in page.tags
        and not page.links
        and not re.search(r"https?:|url\(|@import", text)
    )
    run = json.loads(old.read_text())["runs"][0]
    assert run["ledger"]["accepted"] == 60 and run["cpu"]["relay_per_1000"] > 0 and run["memory_mb"] > 5
    assert 0 < run["syncs_per_message"] < 4 and run["latency_ms"]["reply"]["p50"] <= run["latency_ms"]["reply"]["p99"]
    found = commands.run([*words, "--compare", str(old), "--json", str(new)], 120)
    assert found.returncode == 0 and "relaymta before" in found.stdout
    assert "the earlier load of relaymta was another one: 3 reused connections, 1k-20k each, 2 recipients" in found.stderr
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.skipif(os.geteuid() != 0, reason="Postfix is started by root")
def test_the_same_load_through_postfix():
    need("smtp-source")
    words = ["bench", "--messages", "150", "--connections", "5", "--peer", "postfix", "--profile", "cut-in-mid-dot"]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # where Postfix's users may go, and its paths are short
        os.chmod(folder, 0o755)
        found = commands.run([*words, "--spool-dir", folder], 200)
        assert not os.listdir(folder)
    assert found.returncode == 0, (found.stdout, found.stderr)
    assert re.search(r"^ +relaymta +postfix +ratio$", found.stdout, re.M)
    assert re.search(r"^messages accepted +150 +150 +1.00 x$", found.stdout, re.M)
    assert "fsync of the queue file before 250" in found.stdout
    assert found.stdout.count("nothing lost, altered or duplicated: 150 of 150 copies") == 2


def test_a_peer_that_is_not_installed_is_named_with_its_package(tmp_path, monkeypatch):
    from relaymta.bench import peers

    monkeypatch.setattr(peers, "PATH", str(tmp_path))
    for name, package in (("postfix", "postfix"), ("exim", "exim4-daemon-light")):
        found = CliRunner().invoke(main, ["bench", "--peer", name])
        assert (found.exit_code, found.stderr) == (69, f"{name} is not installed: apt-get install {package}\n")


@pytest.mark.parametrize(("words", "status", "why"), [
    (["--target", "192.0.2.1:25"], 64, "is not this machine: a load may stop its service. If it is yours, add --yes-load-this"),
    (["--target", "127.0.0.1"], 64, "--target '127.0.0.1': expected host:port"),
    (["--target", "127.0.0.1:25", "--peer", "postfix"], 64, "--peer and --target: one of both"),
    (["--target", "127.0.0.1:25", "--no-sink", "--profile", "mixed"], 64, "not with --no-sink"),
    (["--target", "127.0.0.1:25", "--auth", "plain"], 64, "--auth and --user: both, or none"),
    (["--no-sink"], 64, "--no-sink is for --target"),
    (["--spool", "/x"], 64, "--spool-dir says on which disk"),
    (["--spool-dir", "/none"], 73, "--spool-dir /none: there is no such folder"),
    (["--size", "4k-1k"], 64, "the smaller size first"),
    (["--rate", "fast"], 64, "--rate fast: a rate such as 500/s"),
    (["--duration", "0"], 64, "--duration 0: longer than 0"),
    (["--ramp", "40s"], 64, "--ramp 40s: not longer than --duration"),
    (["--grace", "soon"], 64, "--grace soon: a duration such as"),
    (["--profile", "storm"], 64, 'no such profile: storm (did you mean "storm-421"?)'),
    (["--profile", "./none.toml"], 78, "none.toml: No such file or directory"),
    (["--recipients-file", "/none"], 74, "--recipients-file /none: No such file or directory"),
    (["--compare", "/none"], 74, "--compare /none: No such file or directory"),
    (["--compare", __file__], 65, "not a report of `relaymta bench --json`"),
    (["--json", "/none/x"], 73, "/none/x: No such file or directory"),
    (["--html", "/"], 73, "/: Is a directory"),
    (["--connections", "0"], 64, "0 is not in the range"),
    (["sink", "--listen", "25"], 64, "--listen '25': expected host:port"),
    (["sink", "--show"], 64, "--show needs --profile"),
    (["account", "/none", "/none"], 74, "/none: No such file or directory"),
    (["account", __file__, __file__], 65, "not a ledger of messages that were sent"),
])  # fmt: skip
def test_wrong_input_is_explained_before_anything_starts(words, status, why):
    found = CliRunner().invoke(main, ["bench", *words])
    assert (found.exit_code, why in found.stderr, found.stdout) == (status, True, ""), found.stderr


def test_recipients_that_are_none_are_named_with_their_line(tmp_path):
    path = tmp_path / "to.txt"
    for text, why in (("a@b.example\nnonsense\n", ":2: 'nonsense' is not an address"), ("# x\n", ": there is no address in it")):
        path.write_text(text)
        found = CliRunner().invoke(main, ["bench", "--recipients-file", str(path)])
        assert found.exit_code == 65 and f"{path}{why}" in found.stderr


def test_a_spool_in_memory_is_named():
    if not Path("/dev/shm").is_mount():
        pytest.skip("/dev/shm is no tmpfs here")
    words = ["bench", "--spool-dir", "/dev/shm", "--messages", "5", "--connections", "1", "--size", "200"]
    found = commands.run(words, 120)
    assert found.returncode == 0 and "note: /dev/shm is in memory (tmpfs): a sync costs nothing there" in found.stderr
