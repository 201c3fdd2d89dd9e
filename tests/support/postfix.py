"""The installed Postfix with some configuration: what cleanup(8) makes of a recipient, and what trivial-rewrite(8)
says of an address. Nothing is delivered: there is no queue manager."""

import contextlib
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tests.support.daemon import PATIENCE, wait_for
from tests.support.programs import need

__all__ = ["CONFIGURATIONS", "Postfix", "Resolved", "addresses", "postfix"]

CONFIGURATIONS = Path(__file__).parents[1] / "postfix"
SERVICES = """\
rewrite   unix  -       -       n       -       -       trivial-rewrite
cleanup   unix  n       -       n       -       0       cleanup
postlog   unix-dgram n  -       n       -       1       postlogd
"""
# What smtpd(8) needs beside these.
FOR_LISTENERS = """\
anvil     unix  -       -       n       -       1       anvil
proxymap  unix  -       -       n       -       -       proxymap
"""
OWNED = (
    "active", "bounce", "corrupt", "data", "defer", "deferred", "flush", "hold", "incoming", "maildrop", "private", "public",
    "saved", "trace",
)  # fmt: skip
# Types of tables that are read from the same text file, without postmap(1), or that Debian has in a package of its own.
TYPES = {"hash": "texthash", "btree": "texthash", "lmdb": "texthash", "pcre": "regexp"}
CLASS_DEFAULT = 1 << 12  # of the flags of an answer
MAP_OK = 1 << 5  # flags of cleanup(8): canonical_maps and virtual_alias_maps are used


class Resolved(NamedTuple):
    """What trivial-rewrite(8) answers. `is_default`: the domain is none of those that Postfix takes mail for from anybody."""

    transport: str
    nexthop: str
    recipient: str
    is_default: bool


def addresses(config: Path) -> list[tuple[str, str]]:
    """(Sender, "" for the null sender; recipient) of each line of the file `addresses` of a configuration."""
    lines = (config / "addresses").read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return [("" if sender == "<>" else sender, recipient) for sender, recipient in pairs]


class Postfix:
    """A running master(8) with no more than what resolves addresses. `spool`: its queue_directory."""

    def __init__(self, config: Path, spool: Path) -> None:
        self._config, self._spool = config, spool

    def resolve(self, sender: str, recipient: str) -> Resolved:
        """Transport and next hop of a recipient's mail, as the queue manager would hear it."""
        with self._service("private/rewrite") as (sock, stream):
            sock.sendall(_octets(request="resolve", sender=sender, address=recipient))
            found = _attributes(stream)
            return Resolved(found["transport"], found["nexthop"], found["recipient"], bool(int(found["flags"]) & CLASS_DEFAULT))

    def recipients(self, recipient: str) -> list[str]:
        """The recipients that a message to this one has in the queue."""
        with self._service("public/cleanup") as (sock, stream):
            name = self.announced["queue_id"]
            sock.sendall(_octets(flags=str(MAP_OK)))
            envelope = [
                ("T", "1795000000"),
                ("S", "ann@a.example"),
                ("R", recipient),
                ("M", ""),
                ("N", "Received: x"),
                ("X", ""),
                ("E", ""),
            ]
            sock.sendall(b"".join(f"{kind}{chr(len(text))}{text}".encode() for kind, text in envelope))
            ended = _attributes(stream)
            assert ended["status"] == "0", (ended, (self._spool.parent / "log").read_text())
        shown = subprocess.run(["postcat", "-c", self._config, "-eq", name], capture_output=True, text=True, check=True).stdout
        return re.findall(r"^recipient: (\S+)", shown, re.M)

    def takes(self, listener: str, client: str, recipients: list[str]) -> list[bool]:
        """Whether a listener takes each recipient from a client with this address."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self._spool / "public" / listener))
            with sock.makefile("rb") as stream:
                spoken = [
                    "EHLO x",
                    f"XCLIENT ADDR={'IPV6:' if ':' in client else ''}{client}",
                    "EHLO x",
                    "MAIL FROM:<ann@b.example>",
                ]
                replies = [_reply(stream)]
                for line in [*spoken, *(f"RCPT TO:<{one}>" for one in recipients)]:
                    with contextlib.suppress(OSError):  # where the restrictions are none that Postfix takes, it has hung up
                        sock.sendall(f"{line}\r\n".encode())
                    replies.append(_reply(stream))
        return [code.startswith("2") for code in replies[len(spoken) + 1 :]]

    @contextlib.contextmanager
    def _service(self, name: str) -> Iterator[tuple[socket.socket, BufferedReader]]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self._spool / name))
            with sock.makefile("rb") as stream:
                self.announced = _attributes(stream)
                yield sock, stream


def _reply(stream: BufferedReader) -> str:
    """The code of a reply, "" at the end of the connection."""
    line = stream.readline()
    while line[3:4] == b"-":
        line = stream.readline()
    return line[:3].decode()


def _octets(**attributes: str) -> bytes:
    """attr_print0(3): names and values, each with a NUL behind it, and an empty name."""
    return b"".join(f"{name}\0{value}\0".encode() for name, value in attributes.items()) + b"\0"


def _attributes(stream: BufferedReader) -> dict[str, str]:
    found: dict[str, str] = {}
    while name := _word(stream):
        found[name] = _word(stream)
    return found


def _word(stream: BufferedReader) -> str:
    word = b""
    while (octet := stream.read(1)) != b"\0":
        assert octet, "the service has gone"
        word += octet
    return word.decode()


@contextlib.contextmanager
def postfix(configuration: Path, listeners: Mapping[str, Mapping[str, str]] | None = None) -> Iterator[Postfix]:
    """Postfix with a configuration: a folder with main.cf, whose tables are in it. `listeners`: of smtpd(8) by a name, parameters
    that it starts with: for others the wait would be a minute."""
    need("sendmail")
    folder = Path(tempfile.mkdtemp(prefix="postfix"))  # a short one: the path of a socket has at most 107 octets
    folder.chmod(0o755)
    config, spool = folder / "config", folder / "spool"
    shutil.copytree(configuration, config)
    _adapt(config, folder, listeners or {})
    for one in ("pid", *OWNED):
        (spool / one).mkdir(parents=True)
        if one in OWNED:
            shutil.chown(spool / one, "postfix")
    daemons = subprocess.run(["postconf", "-h", "daemon_directory"], capture_output=True, text=True, check=True).stdout.strip()
    with (folder / "err").open("wb") as errors:
        process = subprocess.Popen(
            [f"{daemons}/master", "-c", config, "-d"], stdout=errors, stderr=errors, start_new_session=True
        )
    try:
        ready = [spool / "private/rewrite", spool / "public/cleanup"]
        wait_for(lambda: process.poll() is not None or all(map(_listens, ready)), what="Postfix")
        assert process.poll() is None, (folder / "err").read_text()
        yield Postfix(config, spool)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def _adapt(config: Path, folder: Path, listeners: Mapping[str, Mapping[str, str]]) -> None:
    """Make the configuration one of this folder."""
    text = (config / "main.cf").read_text()
    for there, here in TYPES.items():
        text = re.sub(rf"\b{there}:", f"{here}:", text)
    text = text.replace("/etc/postfix/", f"{config}/").replace("/etc/mailname", f"{config}/copy/etc/mailname")
    own = {
        "config_directory": config, "queue_directory": folder / "spool", "data_directory": folder / "spool/data",
        "inet_interfaces": "127.0.0.1", "maillog_file": folder / "log", "maillog_file_prefixes": folder,
        "content_filter": "", "in_flow_delay": "0",
    }  # fmt: skip
    (config / "main.cf").write_text(f"{text}\n" + "".join(f"{key} = {value}\n" for key, value in own.items()))
    services = SERVICES + (FOR_LISTENERS if listeners else "")
    for listener, settings in listeners.items():
        settings = {"smtpd_authorized_xclient_hosts": "127.0.0.1", "smtpd_peername_lookup": "no", **settings}
        services += f"{listener} unix n - n - - smtpd\n" + "".join(
            f"  -o {{ {key} = {text} }}\n" for key, text in settings.items()
        )
    (config / "master.cf").write_text(services.replace("/etc/postfix/", f"{config}/"))
