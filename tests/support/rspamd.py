"""rspamd: a real one without DNS, maps and redis, that knows the GTUBE patterns and the symbols of the test's own rules."""

import contextlib
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.daemon import free_port, wait_for
from tests.support.programs import need

__all__ = ["ADD_HEADER", "REJECT", "REWRITE", "RealRspamd", "rspamd"]

# GTUBE patterns, each in two: this file is no spam.
REJECT = "XJS*C4JDBQADN1.NSBN3*2IDNEN*" + "GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
ADD_HEADER = "YJS*C4JDBQADN1.NSBN3*2IDNEN*" + "GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
REWRITE = "ZJS*C4JDBQADN1.NSBN3*2IDNEN*" + "GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"

_ASKS_OTHERS = """
antivirus arc asn aws_s3 bimi clickhouse dcc dkim dkim_signing dmarc elastic emails external_relay external_services
force_actions fuzzy_check greylist hfilter history_redis http_headers maillist metadata_exporter metric_exporter mid
mime_types multimap mx_check neural once_received p0f phishing ratelimit rbl replies reputation rspamd_update spamassassin
spamtrap spf surbl trie url_redirector whitelist"""
_MAIN = "/etc/rspamd/rspamd.conf"


class RealRspamd:
    """`address`: of its normal worker; `milter`: of its proxy, where there is one (`proxy`)."""

    def __init__(self, folder: Path, proxy: bool = False) -> None:
        self.milter = f"127.0.0.1:{free_port()}"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        self._program = need("rspamd")
        local = folder / "local"
        for name in ("local.d", "override.d", "run", "db", "log"):
            (local / name if "." in name else folder / name).mkdir(parents=True)
        (folder / "tld").write_text("com\nexample\norg\nnet\ninvalid\n")  # its own list takes 40 s to compile
        (local / "local.d/options.inc").write_text(
            f'filters = "chartable,regexp";\nurl_tld = "{folder}/tld";\nenable_test_patterns = true;\n'
            'dns { nameserver = ["127.0.0.1:1"]; }\n'
        )
        for name in _ASKS_OTHERS.split():
            (local / f"local.d/{name}.conf").write_text("enabled = false;\n")
        (local / "local.d/worker-normal.inc").write_text(f'bind_socket = "{self.address}";\ncount = 1;\n')
        for name in ("controller", "proxy", "fuzzy"):
            (local / f"local.d/worker-{name}.inc").write_text("enabled = false;\n")
        if proxy:
            (local / "local.d/worker-proxy.inc").write_text(
                f'bind_socket = "{self.milter}";\nmilter = yes;\ntimeout = 20s;\ncount = 1;\n'
                'upstream "local" { default = yes; self_scan = yes; }\n'
            )
            (local / "local.d/milter_headers.conf").write_text(
                'use = ["x-spam-status"];\nauthenticated_headers = ["x-spam-status"];\n'
            )
        (local / "local.d/logging.inc").write_text(f'type = "file";\nfilename = "{folder}/log/rspamd.log";\nlevel = "error";\n')

    def start(self) -> None:
        """Start it, and wait until it answers."""
        folder = self._folder
        variables = {
            "LOCAL_CONFDIR": f"{folder}/local",
            "RUNDIR": f"{folder}/run",
            "DBDIR": f"{folder}/db",
            "LOGDIR": f"{folder}/log",
        }
        shutil.chown(folder, "_rspamd")
        for path in folder.rglob("*"):
            shutil.chown(path, "_rspamd")
        folder.chmod(0o755)
        command = [self._program, "-f", "-u", "_rspamd", "-g", "_rspamd", "-c", _MAIN]
        command += [f"--var={name}={value}" for name, value in variables.items()]
        with (folder / "stderr").open("ab") as log:
            process = self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: process.poll() is not None or self._answers(), what="rspamd")
        assert process.poll() is None, (folder / "stderr").read_text()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/ping", timeout=5) as answer:
            return bool(answer.read().strip() == b"pong")
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def rspamd(proxy: bool = False) -> Iterator[RealRspamd]:
    """A running rspamd. `proxy`: with its proxy as a milter."""
    need("rspamd")
    folder = Path(tempfile.mkdtemp(prefix="rspamd"))
    made = RealRspamd(folder, proxy)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
