"""Alert rules with a real relay and a real Prometheus, as trouble is made and mended. All durations of the rules are divided by
FASTER, and LOWER has the thresholds that would take hours. Most of them in RELAYMTA_PROVE=1 only."""

import contextlib
import datetime
import os
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lmdb
import pytest
import trustme

from tests.conftest import PROVE
from tests.e2e.test_mailbox_gauges import READER
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.forked_workers import NAME
from tests.support.mailboxes import create
from tests.support.programs import need
from tests.support.prometheus import asked, firing, hastened, prometheus
from tests.support.resolver import nameserver_with
from tests.support.traced import is_traced

RULES = (Path(__file__).resolve().parents[2] / "grafana" / "alerts.yml").read_text()
FASTER = 120
CONFIG = """
[[listener]]
address = "127.0.0.1:{port}"
[[certificate]]
chain = "{folder}/relay.pem"
[accounts]
file = "{folder}/accounts.toml"
[[filter]]
name = "gone"
type = "clamd"
address = ["127.0.0.1:1"]
on_failure = "accept"
[[route]]
name = "down"
recipient_domain = ["down.example"]
hosts = ["127.0.0.1:{down}"]
[[route]]
name = "out"
hosts = ["127.0.0.1:1"]
"""


class Troubled(Relay):
    """A relay with what can be broken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None, workers=2)
        self.authority = trustme.CA()
        self.down = free_port()
        self.config = folder / "relay.toml"
        self.good = CONFIG.format(port=self.port, folder=folder, down=self.down)
        self.config.write_text(self.good)
        self.certify(60)
        (folder / "accounts.toml").write_text("")

    def certify(self, days: int) -> None:
        """A new certificate that ends in so many days."""
        now = datetime.datetime.now(datetime.UTC)
        made = self.authority.issue_cert("relay.example", not_after=now + datetime.timedelta(days=days))
        fresh = self.folder / "new.pem"
        made.private_key_and_cert_chain_pem.write_to_path(str(fresh))
        fresh.rename(self.folder / "relay.pem")

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]

    def reload(self, config: str) -> None:
        self.config.write_text(config)
        self.cli("reload", "--config", str(self.config), check=False)

    def worker(self) -> int:
        """The process of the worker of slot 0."""
        assert self.process is not None
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False).stdout
        pids = [int(pid) for pid in children.split()]
        return min((pid for pid in pids if _is_worker(pid)), default=0)

    def kill_workers(self) -> None:
        """Kill a worker four times, each time once it is ready."""
        for _ in range(4):
            wait_for(self.ready)
            os.kill(wait_for(self.worker), signal.SIGKILL)
            wait_for(lambda: not self.ready())
        wait_for(self.ready)

    def ready(self) -> bool:
        """Whether all workers are ready."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/health", timeout=30) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False


def _is_worker(pid: int) -> bool:
    shown = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "comm")]
    return any(NAME.encode() in one for one in shown)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Troubled, str]]:
    folder = tmp_path_factory.mktemp("alerts")
    with Troubled(folder) as relay, prometheus(folder, relay, hastened(RULES, FASTER)) as url:
        yield relay, url


def test_rules_are_hastened_and_otherwise_unchanged():
    fast = hastened(RULES, FASTER)
    assert "for: 2s" in fast and "[15s]" in fast and "30m" not in fast and "4 * 3600" in fast
    assert fast.count("alert:") == RULES.count("alert:")


def test_alerts_fire_and_fall_silent_as_trouble_is_made_and_mended(watched):
    """All at once, since most of the time goes by with waiting."""
    relay, url = watched
    wait_for(lambda: asked(url, "relaymta_worker_restarts_total"))
    relay.certify(5)
    (relay.folder / "accounts.toml").write_text("this is no table")
    relay.reload(relay.good + "\n[no_such_table]\n")
    relay.kill_workers()
    for _ in range(6):  # each worker finds out by itself that the filter is down
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "a@down.example")
    trouble = {
        "RelaymtaSiteDown", "RelaymtaFilterDown", "RelaymtaCertificateEnds", "RelaymtaKeysOrAccounts", "RelaymtaReloadRefused",
        "RelaymtaWorkersRestart",
    }  # fmt: skip
    shown(url, trouble)
    with FakeMx({}, relay.down) as peer:
        relay.certify(60)
        (relay.folder / "accounts.toml").write_text("")
        without = relay.good.partition("[[filter]]")[0] + relay.good.partition('on_failure = "accept"\n')[2]
        relay.reload(without)
        relay.cli("queue", "flush", "--all")
        wait_for(lambda: peer.messages)
        wait_for(lambda: not trouble & firing(url), what="silence")


def test_a_worker_that_does_not_answer_is_missed(watched):
    relay, url = watched
    missing: Callable[[], Any] = lambda: "RelaymtaWorkersMissing" in firing(url)  # noqa: E731
    pid = wait_for(relay.worker)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(missing)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not missing())


LOWER = {
    "oldest_message_seconds) > 4 * 3600": "oldest_message_seconds) > 10",
    "queue_messages) > 10000": "queue_messages) > 20",
    "unseen_oldest_seconds) > 600": "unseen_oldest_seconds) > 5",
    "oldest_reader_seconds) > 600": "oldest_reader_seconds) > 5",
    "oldest_overdue_seconds) > 3600": "oldest_overdue_seconds) > 5",
}
SITES = 25
TEXT = "Subject: x\r\n\r\nx\r\n"
BESIEGED = """
[relay]
networks = ["127.0.0.1/32"]
domains = ["d.example"]
[limits]
message_size = 100000
[quarantine]
octets = 100000
[delivery]
nameservers = ["{nameserver}"]
[accounts]
file = "{folder}/accounts.toml"
url = "http://127.0.0.1:1/login"
[[listener]]
address = "127.0.0.1:{port}"
auth = "may"
auth_in_clear = true
[[listener]]
address = "127.0.0.1:{shop}"
application = "shop"
[[certificate]]
chain = "{folder}/relay.pem"
[[filter]]
name = "lists"
type = "dnsbl"
lists = [{{ zone = "refusing.test", codes = ["127.0.0.2"], domain = true }}]
[[filter]]
name = "slow"
type = "http"
address = ["http://127.0.0.1:{hook}/slow"]
recipient_domain = ["judged.example"]
timeout = 1
on_failure = "accept"
on_failure_trusted = "accept"
[[filter]]
name = "odd"
type = "http"
address = ["http://127.0.0.1:{hook}/odd"]
recipient_domain = ["judged.example"]
on_failure = "accept"
on_failure_trusted = "accept"
[[filter]]
name = "later"
type = "clamd"
stage = "queued"
address = ["127.0.0.1:{scanner}"]
recipient_domain = ["unseen.example"]
[[mail_rule]]
name = "held"
header = ["Subject: held"]
verdict = "hold"
enforce = true
[[mail_rule]]
name = "counted"
header = ["Subject: counted"]
verdict = "tag"
[[abuse]]
name = "leaked"
watch = "rule"
rule = "counted"
enforce = true
[[route]]
name = "local"
protocol = "mailbox"
recipient_domain = ["local.example"]
[[route]]
name = "bounce"
recipient_domain = ["bounce.example"]
hosts = ["127.0.0.1:{peer}"]
"""
ROUTE = """
[[route]]
name = "{name}"
recipient_domain = ["{name}.example"]
hosts = ["127.0.0.1:{port}"]
"""
OUT = """
[[route]]
name = "out"
hosts = ["127.0.0.1:{port}"]
"""
WAVES = (
    {
        "RelaymtaManySitesDown", "RelaymtaOldMessage", "RelaymtaQueueGrows", "RelaymtaNothingDelivered", "RelaymtaBounces",
        "RelaymtaFilterFails", "RelaymtaFilterSlow", "RelaymtaUnseen", "RelaymtaQuarantineFull", "RelaymtaListRefuses",
        "RelaymtaAbuse", "RelaymtaCorruptBody", "RelaymtaCertificate", "RelaymtaLoginsUnavailable", "RelaymtaBruteForce",
        "RelaymtaMailboxReader",
    },
    {"RelaymtaStoreFull", "RelaymtaMailboxesFull", "RelaymtaLogDropped", "RelaymtaLoopLag", "RelaymtaCommitsSlow"},
    {"RelaymtaListenersPaused", "RelaymtaMapFull"},
    {"RelaymtaStoreStalled", "RelaymtaOverdue"},
    {"RelaymtaMailboxesFail"},
    {"RelaymtaMailboxesStalled"},
)  # fmt: skip
HERE = {
    "RelaymtaSiteDown", "RelaymtaFilterDown", "RelaymtaCertificateEnds", "RelaymtaKeysOrAccounts", "RelaymtaReloadRefused",
    "RelaymtaWorkersRestart", "RelaymtaWorkersMissing",
}  # fmt: skip
# Only tested with made-up series: what they watch takes a quarter of an hour, a full store of events, or a wrong hook.
ELSEWHERE = {"RelaymtaDropWaits", "RelaymtaHookRaises", "RelaymtaWebhookDropped", "RelaymtaWebhookFails"}


class Hook(BaseHTTPRequestHandler):
    """What is no answer of a hook, or one that is late."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/slow":
            time.sleep(0.7)
        answer = b'{"verdict": "accept"}' if self.path == "/slow" else b"what?"
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def hook() -> Iterator[int]:
    """Its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextlib.contextmanager
def again_and_again(*actions: Callable[[], object], pause: float = 0.25) -> Iterator[None]:
    """Do each in a thread of its own; that it is refused is no failure."""
    over = threading.Event()

    def run(action: Callable[[], object]) -> None:
        while not over.wait(pause):
            with contextlib.suppress(smtplib.SMTPException, OSError):
                action()

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


class Besieged(Troubled):
    """On a small disk; `peer`: the port of the host that mail goes to once all is well."""

    def __init__(self, folder: Path, nameserver: str, hook: int, peer: int) -> None:
        super().__init__(folder)
        self.shop, self.scanner = free_port(), free_port()
        base = BESIEGED.format(
            nameserver=nameserver, folder=folder, port=self.port, shop=self.shop, hook=hook, scanner=self.scanner, peer=peer
        )
        dead = [ROUTE.format(name=f"down{n}", port=free_port()) for n in range(SITES)]
        self.config.write_text(base + "".join(dead) + OUT.format(port=free_port()))
        self.good = (base + OUT.format(port=peer)).replace("octets = 100000", "octets = 1000000")
        self.good = (
            self.good.partition('[[filter]]\nname = "later"')[0] + "[[mail_rule]]" + self.good.partition("[[mail_rule]]")[2]
        )
        self.filler = folder / "filler"

    def post(self, to: str, text: str = TEXT, sender: str = "", port: int = 0, source: str = "127.0.0.1") -> None:
        with smtplib.SMTP("127.0.0.1", port or self.port, timeout=PATIENCE, source_address=(source, 0)) as client:
            client.sendmail(sender, [to], text)

    def login(self, name: str, source: str) -> None:
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE, source_address=(source, 0)) as client:
            client.login(name, "wrong")

    def spoil(self, peer: FakeMx) -> None:
        """A message in the queue whose data is not what it was, and that is sent now."""
        later = {"s@bounce.example": b"450 4.2.0 later\r\n"}
        peer.rules["RCPT"].update(later)
        self.post("s@bounce.example", "Subject: x\r\n\r\nspoil me\r\n")
        wait_for(lambda: self.events("deferred"))
        self.kill()
        for path in self.spool.glob("shard-*/bodies/*.seg"):  # of what is deferred there may be two copies
            path.write_bytes(path.read_bytes().replace(b"spoil me", b"spoilt!!"))
        del peer.rules["RCPT"]["s@bounce.example"]
        self.start()
        wait_for(self.ready)
        self.cli("queue", "flush", "--all")

    def leave(self, free: int) -> None:
        """Fill the disk up to so many octets."""
        self.filler.unlink(missing_ok=True)
        stats = os.statvfs(self.folder)
        with self.filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, stats.f_bavail * stats.f_frsize - free)


@pytest.fixture
def besieged(tmp_path: Path) -> Iterator[tuple[Besieged, str, FakeMx]]:
    folder, other = tmp_path / "small", tmp_path / "other"
    for one in (folder, other):
        one.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)], check=True)  # its floor is 10 MB
    try:
        with (
            nameserver_with(other, ["listed.example.refusing.test. A 127.255.255.254"]) as nameserver,
            hook() as port,
            FakeMx({"RCPT": {"c@bounce.example": b"550 5.1.1 no\r\n"}}) as peer,
            Besieged(folder, nameserver, port, peer.port) as relay,
            prometheus(other, relay, lowered()) as url,
        ):
            yield relay, url, peer
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def lowered() -> str:
    """The rules, hastened, with the thresholds of LOWER."""
    rules = RULES
    for threshold, low in LOWER.items():
        assert threshold in rules
        rules = rules.replace(threshold, low)
    return hastened(rules, FASTER)


def shown(url: str, trouble: set[str]) -> None:
    """Wait until each has fired."""
    seen: set[str] = set()

    def all_seen() -> bool:
        seen.update(firing(url))
        return trouble <= seen

    try:
        wait_for(all_seen)
    except AssertionError:
        raise AssertionError(f"silent: {trouble - seen}") from None


def silent(url: str, trouble: set[str]) -> None:
    try:
        wait_for(lambda: not trouble & firing(url))
    except AssertionError:
        raise AssertionError(f"still firing: {trouble & firing(url)}") from None


def test_every_rule_is_here():
    named = [*HERE, *ELSEWHERE, *(name for wave in WAVES for name in wave)]
    assert sorted(named) == sorted(line.split()[-1] for line in RULES.splitlines() if "- alert:" in line)


@pytest.mark.prove
@pytest.mark.skipif(not PROVE, reason="minutes: make prove")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
@pytest.mark.timeout(900)
def test_the_other_alerts_fire_and_fall_silent(besieged):
    relay, url, peer = besieged
    wait_for(lambda: asked(url, "relaymta_worker_restarts_total"))
    mail_is_in_trouble(relay, url, peer)
    the_machine_is_in_trouble(relay, url)


def mail_is_in_trouble(relay: Besieged, url: str, peer: FakeMx) -> None:
    relay.spoil(peer)
    relay.post("c@unseen.example")
    relay.post("c@x.example", "Subject: held\r\n\r\n" + ("x" * 68 + "\r\n") * 1250)
    relay.post("c@x.example", "Subject: counted\r\n\r\nx\r\n", port=relay.shop)
    with contextlib.suppress(smtplib.SMTPException):
        relay.post("c@d.example", sender="a@listed.example", source="127.0.0.2")
    for number in range(SITES):
        relay.post(f"c@down{number}.example")
    create(relay, "ann", password="geheim")
    with contextlib.ExitStack() as readers:
        for path in relay.spool.glob("mail/shard-*/lmdb"):
            command = [sys.executable, "-c", READER, str(path)]
            reader = readers.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            readers.callback(reader.kill)
            assert reader.stdout is not None and reader.stdout.readline() == b"reading\n"
        relay.post("ann@local.example")  # what they read is old now
        (relay.folder / "relay.pem").write_text("this is no certificate")
        feeders = [lambda: relay.post("c@bounce.example"), lambda: relay.post("c@down1.example")]
        feeders += [lambda: relay.post("c@judged.example"), lambda: relay.login("bob", "127.0.0.5")]
        feeders += 6 * [lambda: relay.login("ann@local.example", "127.0.0.4")]
        with again_and_again(*feeders):
            shown(url, WAVES[0])
    peer.rules.clear()
    relay.certify(60)
    relay.reload(relay.good)
    relay.cli("queue", "flush", "--all")
    lasting = {"RelaymtaOldMessage", "RelaymtaNothingDelivered"}
    silent(url, WAVES[0] - lasting)
    relay.cli("queue", "delete", "--domain", "bounce.example")  # what is spoilt, which waits
    silent(url, lasting)


def the_machine_is_in_trouble(relay: Besieged, url: str) -> None:
    first, second = sorted(relay.worker_pids())

    def stop() -> None:
        os.kill(first, signal.SIGSTOP)
        time.sleep(1)
        os.kill(first, signal.SIGCONT)

    slow = [need("strace"), "-qq", "-f", "-p", str(second), "-o", "/dev/null", "-e", "trace=fdatasync,pwrite64"]
    strace = subprocess.Popen([*slow, "-e", "inject=fdatasync:delay_enter=1500000"])
    try:
        with again_and_again(stop, lambda: relay.post("c@x.example"), lambda: relay.post("c@y.example")):
            shown(url, {"RelaymtaLoopLag", "RelaymtaCommitsSlow"})
    finally:
        strace.terminate()
        strace.wait()
    with again_and_again(lambda: relay.post("c@x.example")):
        relay.leave(2 << 20)
        shown(url, WAVES[1] - {"RelaymtaLoopLag", "RelaymtaCommitsSlow"})
        relay.filler.unlink()
        silent(url, WAVES[1])


SMALL_MAP = 4 << 20
SMALLER = """import lmdb
opened = lmdb.open
lmdb.open = lambda *names, map_size, **options: opened(*names, map_size=min(map_size, {most}), **options)
"""
FAILING = """
[delivery]
first_retry = 1
[[listener]]
address = "127.0.0.1:{port}"
[[route]]
name = "local"
protocol = "mailbox"
recipient_domain = ["local.example"]
[[route]]
name = "out"
hosts = ["127.0.0.1:{down}"]
"""


def interpreter(folder: Path, first: str) -> str:
    """One with the modules of this one, that runs `first` before anything else, in the relay's isolated processes, too."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "first.py").write_text(first)
    ours = Path(lmdb.__file__).parents[1]
    (packages / "first.pth").write_text(f"import site; site.addsitedir({str(ours)!r}); import first\n")
    return str(folder / "bin" / "python")


class Failing(Troubled):
    """One worker, with few descriptors, and with small maps: filling those of 64 GB takes hours."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.workers = 1
        self.wrap = (need("prlimit"), "--nofile=300:300")
        self.good = FAILING.format(port=self.port, down=self.down)
        self.config.write_text(self.good)
        self.python = interpreter(folder / "python", SMALLER.format(most=SMALL_MAP))

    @contextlib.contextmanager
    def disk_failing(self, calls: str, *paths: Path) -> Iterator[None]:
        """The disk fails the worker: these system calls end with EIO; with `paths`, only those about these files."""
        pid = self.worker()
        command = [need("strace"), "-qq", "-f", "-p", str(pid), "-o", "/dev/null", "-e", f"trace={calls}"]
        only = [option for path in paths for option in ("-P", str(path))]
        strace = subprocess.Popen([*command, "-e", f"inject={calls}:error=EIO", *only])
        try:
            wait_for(lambda: is_traced(pid), what="strace to be attached to every thread")
            yield
        finally:
            strace.terminate()
            strace.wait()


@pytest.mark.prove
@pytest.mark.skipif(not PROVE, reason="minutes: make prove")
@pytest.mark.timeout(900)
def test_alerts_about_limits_and_failing_disks_fire_and_fall_silent(tmp_path):
    with Failing(tmp_path) as relay, prometheus(tmp_path, relay, lowered()) as url:
        wait_for(lambda: asked(url, "relaymta_worker_restarts_total"))
        limits_are_reached(relay, url)
        the_disk_of_the_queue_fails(relay, url)
        the_disk_of_the_mailboxes_fails(relay, url)


def limits_are_reached(relay: Failing, url: str) -> None:
    with contextlib.ExitStack() as clients:
        for _ in range(200):
            clients.enter_context(socket.create_connection(("127.0.0.1", relay.port), PATIENCE))
        shown(url, {"RelaymtaListenersPaused"})
    silent(url, {"RelaymtaListenersPaused"})
    many = [f"{'x' * 60}{number}@d.example" for number in range(500)]
    with again_and_again(lambda: relay.send(TEXT, "", *many)):
        shown(url, {"RelaymtaMapFull"})
    relay.cli("queue", "delete", "--all")
    silent(url, {"RelaymtaMapFull"})


def the_disk_of_the_queue_fails(relay: Failing, url: str) -> None:
    """As a message expires, which cannot be written then."""
    relay.reload(relay.good + "[queue]\nmax_age = 10\n")
    relay.send(TEXT, "")
    with relay.disk_failing("fdatasync"):
        shown(url, WAVES[3])
    silent(url, WAVES[3])


def the_disk_of_the_mailboxes_fails(relay: Failing, url: str) -> None:
    """Commits fail; then, after such a failure, LMDB cannot be opened again, either."""
    create(relay, "ann")
    file = relay.spool / "mail" / "shard-0" / "lmdb" / "data.mdb"
    with again_and_again(lambda: relay.send(TEXT, "", "ann@local.example")):
        with relay.disk_failing("fdatasync", file):
            shown(url, WAVES[4])
        silent(url, WAVES[4])
        with relay.disk_failing("fdatasync,openat", file):
            shown(url, WAVES[5])
        silent(url, WAVES[5])
