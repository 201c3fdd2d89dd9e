"""IMAP client programs of Debian, configured for an account and run once: what users have, with its own view of the protocol."""

import contextlib
import os
import pty
import shutil
import subprocess
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from tests.support.imap_mail import WIRE, Found, Mail, found
from tests.support.imap_servers import Account, someone
from tests.support.programs import need

PATIENCE = 120  # seconds

_LETTERS = {"D": "\\Draft", "F": "\\Flagged", "R": "\\Answered", "S": "\\Seen", "T": "\\Deleted"}


def run(home: Path, *command: str, input: str | None = None, status: tuple[int, ...] = (0,)) -> str:
    """Run a program whose home directory is `home`; what it says on standard output. It ends with one of these statuses."""
    done = subprocess.run(
        command, cwd=home, env=_environment(home), input=input, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode in status, (done.returncode, done.stdout[-4000:], done.stderr[-4000:])
    return done.stdout


def _environment(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "USER": "bob", "TZ": "Asia/Kolkata"}


def maildir(folder: Path) -> dict[str, list[Found]]:
    """The messages of each Maildir below a folder, by its path there; without Maildirs that are empty."""
    everything = {}
    for current in sorted(folder.rglob("cur")):
        files = [*current.iterdir(), *(current.parent / "new").iterdir()]
        if files:
            letters = _LETTERS | _keywords(current.parent)
            everything[str(current.parent.relative_to(folder))] = sorted(_kept(file, letters) for file in files)
    return everything


def _keywords(folder: Path) -> dict[str, str]:
    """The letters of keywords in a Maildir of Dovecot's."""
    file = folder / "dovecot-keywords"
    lines = file.read_text().splitlines() if file.exists() else []
    return {chr(ord("a") + int(number)): name for number, _, name in (line.partition(" ") for line in lines)}


def _kept(file: Path, letters: dict[str, str]) -> Found:
    flags = [letters[letter] for letter in file.name.partition(":2,")[2] if letter in letters]
    return found(file.read_bytes().replace(b"\n", b"\r\n"), flags, int(file.stat().st_mtime))


def file_of(folder: Path, subject: str) -> Path:
    """The file in a Maildir whose message has this subject."""
    files = [*(folder / "cur").iterdir(), *(folder / "new").iterdir()]
    return next(file for file in files if f"\nSubject: {subject}\n".encode() in file.read_bytes())


def mark(file: Path, letters: str) -> None:
    """Give a message of a Maildir other flags, as another program does."""
    file.rename(file.parent.parent / "cur" / f"{file.name.partition(':')[0]}:2,{letters}")


def put(folder: Path, mails: list[Mail]) -> None:
    """Put messages into a Maildir, as another program does."""
    for name in ("cur", "new", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, mail in enumerate(mails):
        letters = "".join(letter for letter, flag in _LETTERS.items() if flag in mail.flags)
        file = folder / "cur" / f"{mail.date}.{number}_put.here:2,{letters}"
        file.write_bytes(mail.data.replace(b"\r\n", b"\n"))
        os.utime(file, (mail.date, mail.date))


def mbsync(account: Account, home: Path) -> str:
    """Synchronise all mailboxes with the Maildirs in home/mail, both ways; what it says that it did."""
    security = {"clear": "None", "starttls": "STARTTLS", "implicit": "IMAPS"}[account.security]
    for name in ("mail", "state"):
        (home / name).mkdir(exist_ok=True)
    for folder in (home / "mail").rglob("[cn][ue][rw]"):
        os.utime(folder, (1, 1))  # it waits for a second where a directory has just been changed
    (home / "mbsyncrc").write_text(f"""\
FSync no
IMAPStore far
Host {account.host}
Port {account.port}
User {account.user}
Pass {account.password}
SSLType {security}
SystemCertificates no
CertificateFile {account.ca}

MaildirStore near
Path {home}/mail/
Inbox {home}/mail/INBOX
SubFolders Verbatim

Channel all
Far :far:
Near :near:
Patterns *
Sync All
Create Both
Remove Both
Expunge Both
CopyArrivalDate yes
SyncState {home}/state/
""")
    return run(home, need("mbsync"), "-c", str(home / "mbsyncrc"), "-a")


def offlineimap(account: Account, home: Path) -> str:
    """Synchronise all mailboxes with the Maildirs in home/mail, both ways."""
    security = {"clear": "ssl = no\nstarttls = no", "starttls": "ssl = no\nstarttls = yes", "implicit": "ssl = yes"}
    (home / "offlineimaprc").write_text(f"""\
[general]
accounts = a
metadata = {home}/state
fsync = no
[Account a]
localrepository = near
remoterepository = far
utf8foldernames = yes
[Repository near]
type = Maildir
localfolders = {home}/mail
sep = /
[Repository far]
type = IMAP
remotehost = {account.host}
remoteport = {account.port}
remoteuser = {account.user}
remotepass = {account.password}
{security[account.security]}
sslcacertfile = {account.ca}
""")
    return run(home, need("offlineimap"), "-c", str(home / "offlineimaprc"), "-o", "-u", "basic")


def _stored(home: Path, seconds: float = 0) -> Path:
    """A script that stores a message from its standard input as a file of its own in home/out, and ends after so long."""
    (home / "out").mkdir(exist_ok=True)
    script = home / "store"
    script.write_text(f'#!/bin/sh\ncat > "{home}/$$" && mv "{home}/$$" "{home}/out" && sleep {seconds:g}\n')
    script.chmod(0o755)
    return script


def _texts(home: Path) -> list[bytes]:
    return [file.read_bytes() for file in (home / "out").iterdir()]


def _fetchmail(account: Account, home: Path, mailbox: str, *options: str) -> list[str]:
    """The command line."""
    trusted = f'sslcertck sslcertfile "{account.ca}"'
    security = {"clear": 'sslproto ""', "starttls": f'sslproto "TLS1.2+" {trusted}', "implicit": f"ssl {trusted}"}
    control = home / "fetchmailrc"
    control.write_text(
        f"set invisible\npoll {account.host} protocol imap port {account.port} "
        f'user "{account.user}" password "{account.password}" folder "{WIRE[mailbox]}" {security[account.security]} '
        f'mda "{_stored(home)}" no rewrite {" ".join(options)}\n'
    )
    control.chmod(0o600)
    return [need("fetchmail"), "-f", str(control), "--nosyslog", "--pidfile", str(home / "pid")]


def fetchmail(account: Account, home: Path, mailbox: str, *options: str) -> list[bytes]:
    """Fetch the messages of a mailbox into home/out; those that are there then."""
    run(home, *_fetchmail(account, home, mailbox, *options), status=(0, 1))  # 1: there was no mail
    return _texts(home)


@contextlib.contextmanager
def idle_fetchmail(account: Account, home: Path) -> Iterator[Callable[[], list[bytes]]]:
    """It waits for messages in INBOX; those that it has fetched so far."""
    command = _fetchmail(account, home, "INBOX", "keep", "idle")
    process = subprocess.Popen(command, cwd=home, env=_environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield lambda: _texts(home)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def getmail(account: Account, home: Path, mailbox: str, *options: str) -> list[bytes]:
    """Fetch the new messages of a mailbox, or of "ALL", into home/out; those that are there then."""
    kind = "SimpleIMAPSSLRetriever" if account.security == "implicit" else "SimpleIMAPRetriever"
    lines = [
        "[retriever]", f"type = {kind}", f"server = {account.host}", f"port = {account.port}", f"username = {account.user}",
        f"password = {account.password}", f"mailboxes = ('{mailbox}',)",
        *([f"ca_certs = {account.ca}"] if account.security == "implicit" else []),
        # Of a program that ends before it waits for it getmail never hears.
        "[destination]", "type = MDA_external", f"path = {_stored(home, 0.2)}", "allow_root_commands = true",
        "[options]", "delivered_to = false", "received = false", *options,
    ]  # fmt: skip
    (home / "rc").write_text("\n".join(lines) + "\n")
    run(home, need("getmail"), "--getmaildir", str(home), "--rcfile", str(home / "rc"))
    return _texts(home)


def path_of(mailbox: str) -> str:
    """A mailbox in a URL (RFC 5092), as curl understands it: the name as IMAP4rev1 writes it."""
    return quote(WIRE[mailbox])


def curl(account: Account, path: str, *options: str) -> bytes:
    """What it says of the URL of this path and query."""
    scheme = "imaps" if account.security == "implicit" else "imap"
    command = [
        need("curl"),
        "-sS",
        "--max-time",
        str(PATIENCE),
        "-u",
        f"{account.user}:{account.password}",
        "--cacert",
        account.ca,
    ]
    command += ["--ssl-reqd"] * (account.security == "starttls")
    url = f"{scheme}://{account.host}:{account.port}/{path}"
    done = subprocess.run([*command, url, *options], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, (url, options, done)
    return done.stdout


def s_nail(account: Account, home: Path, *commands: str) -> str:
    """Open the INBOX of the account and give commands; what is said. `@NAME` in them stands for a mailbox's address."""
    scheme = "imaps" if account.security == "implicit" else "imap"
    base = f"{scheme}://{quote(account.user, safe='')}@{account.host}:{account.port}"
    settings = [
        "v15-compat=y", f"password={account.password}", "imap-auth=login", f"folder={base}", "ttycharset=utf-8",
        f"tls-ca-file={account.ca}", "tls-ca-no-defaults", "tls-verify=strict",
        *["imap-use-starttls"] * (account.security == "starttls"),
    ]  # fmt: skip
    options = [word for setting in settings for word in ("-S", setting)]
    return run(home, need("s-nail"), "-:/", "-#", *options, "-f", f"{base}/INBOX", input="\n".join(commands) + "\n")


def mutt(account: Account, home: Path, mailbox: str, *keys: str, settings: str = "") -> str:
    """Open a mailbox (a name, or a path) on a terminal and type keys; what was on the terminal. `=NAME` is a mailbox. The
    dialog with the server is in home/.muttdebug0."""
    scheme = "imaps" if account.security == "implicit" else "imap"
    starttls = "yes" if account.security == "starttls" else "no"
    for name in ("cache", "mail"):
        (home / name).mkdir(exist_ok=True)
    (home / "muttrc").write_text(f"""\
set folder="{scheme}://{account.host}:{account.port}/" spoolfile="=INBOX" record="" postponed="" mbox_type=Maildir
set imap_user="{account.user}" imap_pass="{account.password}"
set ssl_starttls={starttls} ssl_force_tls={starttls} ssl_ca_certificates_file="{account.ca}" certificate_file=""
set header_cache="{home}/cache" message_cachedir="{home}/cache" tmpdir="{home}"
set confirmappend=no confirmcreate=no delete=yes quit=yes wait_key=no mark_old=no sort=threads sleep_time=0
bind editor <space> noop
{settings}
push '{"".join(keys)}<quit>'
""")
    return on_terminal(home, need("mutt"), "-d2", "-n", "-F", str(home / "muttrc"), "-f", mailbox)


def on_terminal(home: Path, *command: str) -> str:
    """Run a program on a terminal until it ends, with 0; what it has written there."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (50, 100))
    environment = _environment(home) | {"TERM": "xterm"}
    process = subprocess.Popen(command, cwd=home, env=environment, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    patience = threading.Timer(PATIENCE, process.kill)
    patience.start()
    said = b""
    with contextlib.suppress(OSError):  # EIO: it has ended
        while piece := os.read(terminal, 65536):
            said += piece
    os.close(terminal)
    status = process.wait()
    patience.cancel()
    assert status == 0, (status, said[-4000:])
    return said.decode("utf-8", "replace")


_DSYNC = """
base_dir = {place}/run
state_dir = {place}/state
log_path = /dev/stderr
mail_home = {place}
mail_location = maildir:{place}/mail:LAYOUT=fs:INBOX={place}/mail/INBOX
mail_uid = {uid}
mail_gid = {gid}
first_valid_uid = 1
first_valid_gid = 1
ssl_client_ca_file = {place}/ca.pem
imapc_host = 127.0.0.1
imapc_port = {port}
imapc_user = {user}
imapc_password = {password}
imapc_ssl = {security}
namespace {{
  inbox = yes
  separator = /
}}
"""


def doveadm(account: Account) -> dict[str, list[Found]]:
    """Pull all mailboxes by Dovecot's dsync into Maildirs; what is there then, by mailbox."""
    whose = someone()
    security = {"clear": "no", "starttls": "starttls", "implicit": "imaps"}[account.security]
    with tempfile.TemporaryDirectory(prefix="dsync-") as folder:
        place = Path(folder)
        shutil.copy(account.ca, place / "ca.pem")
        (place / "conf").write_text(
            _DSYNC.format(
                place=place, uid=whose.pw_uid, gid=whose.pw_gid, security=security, port=account.port,
                user=account.user, password=account.password,
            )
        )  # fmt: skip
        os.chown(place, whose.pw_uid, whose.pw_gid)
        drop = ("setpriv", "--reuid", str(whose.pw_uid), "--regid", str(whose.pw_gid), "--clear-groups")
        command = (need("doveadm"), "-c", str(place / "conf"), "backup", "-R", "imapc:")
        run(place, *(drop if os.getuid() == 0 else ()), *command)
        return maildir(place / "mail")
