"""`make run`: starts a relay and a sink on loopback, sends a message through them, to a mailbox and to the sink, and suggests
commands to try."""

import contextlib
import signal
import smtplib
import socket
import subprocess
import sys
import time
from pathlib import Path

from relaymta.cli.console import say
from relaymta.control import program

RELAY_PORT, SINK_PORT, METRICS_PORT, IMAP_PORT = 2525, 2526, 9125, 2143
USER, PASSWORD = "you@demo.invalid", "demo"
CONFIG = Path("config/demo.toml")
SPOOL = Path("var/demo-spool")
LOG = Path("var/demo.log")


def main() -> int:
    """Run until Ctrl-C; the exit status."""
    for port, what in ((RELAY_PORT, "the relay"), (SINK_PORT, "the sink"), (METRICS_PORT, "metrics"), (IMAP_PORT, "IMAP")):
        if _busy(port):
            say(
                f"Port {port} on 127.0.0.1, which {what} needs, is in use. "
                f"Stop what uses it (ss -ltnp 'sport = :{port}'), then try again."
            )
            return 1
    SPOOL.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    sink = subprocess.Popen([*program("relaymta.cli"), "sink", "--listen", f"127.0.0.1:{SINK_PORT}"], start_new_session=True)
    relay = subprocess.Popen([*program("relaymta.cli"), "serve", "-c", str(CONFIG)], start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell's `&` makes it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        if not _wait(RELAY_PORT, relay) or not _wait(SINK_PORT, sink):
            say("The relay did not start; see its messages above.")
            return 1
        _create_user()
        _send()
        _explain()
        return relay.wait()
    except KeyboardInterrupt:
        say("", "Stopping: messages under way are finished first ...")
        return 0
    finally:
        for process in (relay, sink):
            if process.poll() is None:
                process.terminate()
        for process in (relay, sink):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(50)
        say(f"Stopped. The queue stays in {SPOOL.absolute()}")


def _busy(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _wait(port: int, process: "subprocess.Popen[bytes]") -> bool:
    for _ in range(300):
        if process.poll() is not None:
            return False
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
            if sock.recv(3) == b"220":
                return True
        time.sleep(0.05)
    return False


def _create_user() -> None:
    """Where the spool has the user already, this changes nothing."""
    command = [*program("relaymta.cli"), "mailbox", "create", "--password", USER, "-c", str(CONFIG)]
    subprocess.run(command, input=PASSWORD + "\n", text=True, capture_output=True, timeout=30)


def _send() -> None:
    with smtplib.SMTP("127.0.0.1", RELAY_PORT, local_hostname="demo.invalid") as client:
        client.sendmail(USER, ["friend@example.com", USER], "Subject: hello from relaymta\r\n\r\nIt works.\r\n")
    for _ in range(100):
        if LOG.exists() and LOG.read_text(encoding="utf-8").count('"delivered"') == 2:
            return
        time.sleep(0.05)


def _explain() -> None:
    say(*f"""
The relay is running. It accepted one message on 127.0.0.1:{RELAY_PORT}, stored it in {SPOOL.absolute()},
and delivered it to the sink (the line above that begins with "sink:") and to the mailbox of {USER}.
Its log, one JSON object for each event: {LOG.absolute()}

Try, in another terminal:
  export PATH={Path(sys.executable).parent}:$PATH RELAYMTA_CONFIG={CONFIG.absolute()}
  cd {Path.cwd()}
  relaymta status
  relaymta mailbox show --messages {USER}
  curl -s 'imap://127.0.0.1:{IMAP_PORT}/INBOX;UID=1' -u {USER}:{PASSWORD}     # reads it, as does:
  mutt -n -e 'set ssl_force_tls=no folder=~' -f 'imap://{USER.replace("@", "%40")}:{PASSWORD}@127.0.0.1:{IMAP_PORT}/INBOX'
  printf 'Subject: mine\\n\\nhi\\n' | curl --crlf -T - --mail-from me@demo.invalid \\
    --mail-rcpt you@example.com smtp://127.0.0.1:{RELAY_PORT}
  relaymta site suspend sink                 # what is sent now waits
  relaymta queue list                        # as mailq; then: relaymta message explain ID
  relaymta site resume sink                  # and is delivered
  curl -s http://127.0.0.1:{METRICS_PORT}/metrics | grep ^relaymta_messages
  tail -f {LOG.absolute()}

Ctrl-C stops it.
""".split("\n"))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
