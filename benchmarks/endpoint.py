"""The endpoint for clients: `python -m benchmarks.endpoint [--scale X] [--only PART]`.

signed    CPU of a message that is signed (RSA-2048, 4 kB) beside one that is not, and beside a bare `key.sign`; signing one
          message beside dkimpy; canonicalizing and hashing 4 kB
verified  CPU of a message of an unauthenticated client (DKIM with RSA-2048, SPF, DMARC; 4 kB), with and without verification
hostile   time per octet of hostile bodies and headers, relative to an ordinary body
tls       one connection a message over STARTTLS, sessions resumed, beside Postfix with the same certificate
attack    acceptance of mail, logins with the right password, and memory, during 200 failed attempts a second from 50 addresses
"""

import argparse
import base64
import json
import os
import resource
import smtplib
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dkim
import trustme
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from benchmarks.crowd import accepting
from benchmarks.run import TRIALS, Load, Postfix, Relaymta, Sink, cpu_seconds, measure
from relaymta.config import Dkim
from relaymta.filter.keys import Key, load_key, zone_line
from relaymta.filter.keys import record as record_of
from relaymta.filter.signatory import sign_hash
from relaymta.filter.signing import Draft
from relaymta.proto.dkim import BodyHash, signed, split_fields
from relaymta.proto.header import header_end
from tests.support.daemon import wait_for
from tests.support.resolver import nameserver_with

HEADER = (
    b"From: a@b.example\r\nTo: c@d.example\r\nSubject: hello\r\nDate: Wed, 25 Nov 2026 22:00:00 +0000\r\n"
    b"Message-ID: <x@y>\r\n\r\n"
)
LINE = b"The quick brown fox jumps over the lazy dog, and runs away from the hunters..\r\n"


def timed(function: Any, times: int = 1) -> float:
    """CPU seconds of one call: the least of five runs of `times`."""
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(times):
            function()
        found.append((time.process_time() - began) / times)
    return min(found)


def key_in(folder: Path) -> Dkim:
    """A new RSA key of 2048 bits."""
    private = rsa.generate_private_key(65537, 2048)
    path = folder / "key.pem"
    form = serialization.PrivateFormat.TraditionalOpenSSL
    path.write_bytes(private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return Dkim(domain="b.example", selector="s", key=str(path))


def with_signature(key: Key, data: bytes) -> bytes:
    """A message, signed as the relay does."""
    end = header_end(data)
    draft = Draft(split_fields(data[:end]), [key], end, int(time.time()))
    draft.body.feed(data)
    (one,) = draft.unsigned()
    return signed(one.own, sign_hash(key.private, one.hashed)) + data


def side_by_side(work: Callable[[int], None], clients: int) -> None:
    """Each client's work, its number given, at the same time."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# A process that only signs, as often as the relay does; on its end it prints the cost of one signature.
SIGNING = """
import signal, sys, time
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
key, count, began = rsa.generate_private_key(65537, 2048), 0, time.process_time()
signal.signal(signal.SIGTERM, lambda *_: (print((time.process_time() - began) / count * 1e6), sys.exit()))
while True:
    key.sign(bytes(400), padding.PKCS1v15(), hashes.SHA256())
    count += 1
    time.sleep(0.0002)
"""


def signing(scale: float) -> dict[str, Any]:
    """Messages with and without a signature, in turn."""
    with tempfile.TemporaryDirectory() as name:
        settings = key_in(Path(name))
        key = load_key(settings)
        data = bytes(400)
        bare = lambda: timed(lambda: key.private.sign(data, padding.PKCS1v15(), hashes.SHA256()), 500) * 1e6  # type: ignore[union-attr, arg-type, call-arg]  # noqa: E731
        message = HEADER + LINE * (4096 // len(LINE))
        fields = split_fields(HEADER)
        table = f'dkim=[{{domain="b.example",selector="s",key="{settings.key}"}}]'
        rows = []
        for _ in range(TRIALS):
            row = {"bare us": bare()}
            for label, more in (("unsigned", ()), ("signed", (table,))):
                folder = Path(tempfile.mkdtemp(dir=name))
                sink = Sink()
                relay = Relaymta(folder, sink.port, 1, more)
                load = Load("signed", int(20_000 * scale))
                measure(relay, Load("warm-up", 1000))
                row[label] = measure(relay, load)["cpu_us"]
                if more:
                    assert relay.counter("relaymta_dkim_signatures_total") >= 20_000 * scale
                else:
                    busy = subprocess.Popen([sys.executable, "-c", SIGNING], stdout=subprocess.PIPE, text=True)
                    measure(relay, load)
                    busy.terminate()
                    row["bare beside such a load us"] = float(busy.communicate()[0])
                relay.close()
                sink.close()
            more_us = row["signed"] - row["unsigned"]
            beside = more_us / row["bare beside such a load us"]
            row["bare us"] = (row["bare us"] + bare()) / 2  # before and behind: the machine is not the same all the time
            rows.append(row | {"more, in bare signatures": more_us / row["bare us"], "more, in bare ones beside a load": beside})

        def hashed() -> str:
            one = BodyHash(True)
            one.feed(message[len(HEADER) :])
            return one.finish()

        pem = Path(settings.key).read_bytes()
        include = [b"from", b"to", b"subject", b"date", b"message-id"]
        forms = (b"relaxed", b"relaxed")
        theirs = timed(lambda: dkim.sign(message, b"s", b"b.example", pem, canonicalize=forms, include_headers=include), 20)
        rows.sort(key=lambda row: row["more, in bare signatures"])
        return rows[TRIALS // 2] | {
            "each trial": [row["more, in bare signatures"] for row in rows],
            "canonicalizing and hashing 4 kB us": timed(lambda: (hashed(), key.signature.unsigned(fields, "", 0)), 2000) * 1e6,
            "one message us": timed(lambda: with_signature(key, message), 200) * 1e6, "one message by dkimpy us": theirs * 1e6,
        }  # fmt: skip


def verified(scale: float) -> dict[str, float]:
    """The same signed message from unauthenticated clients, with and without verification; the DNS (unbound) is queried once."""
    found, messages = {}, int(4000 * scale)
    with tempfile.TemporaryDirectory() as name:
        key = load_key(key_in(Path(name)).model_copy(update={"domain": "b.test"}))
        message = with_signature(key, HEADER.replace(b"b.example", b"b.test") + LINE * (4096 // len(LINE)))
        record = zone_line("s._domainkey.b.test", record_of(key))
        records = [record, 'b.test. TXT "v=spf1 ip4:127.0.0.1 -all"', '_dmarc.b.test. TXT "v=DMARC1; p=reject"']
        with nameserver_with(Path(name), records) as nameserver:
            for label, more in (("not verified, us", "false"), ("verified, us", "true")):
                networks = ('relay.networks=["192.0.2.1/32"]', 'relay.domains=["d.example"]')
                settings_of = (*networks, f'delivery.nameservers=["{nameserver}"]', f"verify.results={more}")
                sink = Sink()
                relay = Relaymta(Path(tempfile.mkdtemp(dir=name)), sink.port, 1, settings_of)
                reused(relay.port, message, 200)
                before = cpu_seconds(relay.root)
                reused(relay.port, message, messages)
                wait_for(lambda relay=relay: relay.delivered() >= 200 + messages, 60)  # type: ignore[misc]
                found[label] = (cpu_seconds(relay.root) - before) / messages * 1e6
                if more == "true":
                    passed = relay.counter('relaymta_dmarc_total{result="pass"}')
                    assert passed == 200 + messages, passed
                relay.close()
                sink.close()
    return found


def reused(port: int, message: bytes, messages: int, clients: int = 20) -> None:
    """The same message again and again, on so many sessions."""

    def client(number: int) -> None:
        with smtplib.SMTP("127.0.0.1", port) as session:
            for _ in range(messages // clients):
                session.sendmail("a@b.test", ["c@d.example"], message)

    side_by_side(client, clients)


def hostile() -> dict[str, float]:
    """Time per octet, relative to an ordinary body in pieces of 64 kB."""

    def body(data: bytes) -> float:
        def run() -> None:
            one = BodyHash(True)
            for start in range(0, len(data), 65536):
                one.feed(data[start : start + 65536])
            one.finish()

        return timed(run) / len(data)

    def head(block: bytes) -> float:
        with tempfile.TemporaryDirectory() as name:
            signature = load_key(key_in(Path(name))).signature
            return timed(lambda: signature.unsigned(split_fields(block), "", 0)) / len(block)

    ordinary = body(LINE * 125_000)
    usual = head(b"Subject: an ordinary header field of some length, as they are in mail\r\n" * 1000)
    return {
        "ordinary body, ns an octet": ordinary * 1e9,
        "10 MB of spaces in one line": body(b" " * 10_000_000 + b"\r\n") / ordinary,
        "1,000,000 empty lines": body(b"\r\n" * 1_000_000) / ordinary,
        "space and CR in turn, 10 MB": body(b" \r" * 5_000_000) / ordinary,
        "100,000 fields beside 1,000": head(
            b"Subject: an ordinary header field of some length, as they are in mail\r\n" * 100_000
        )
        / usual,
    }


def certificate(folder: Path) -> tuple[Path, trustme.CA]:
    """A certificate with its key (ECDSA P-256) in one file, and who issued it."""
    authority = trustme.CA()
    found = authority.issue_cert("relay.example")
    path = folder / "relay.pem"
    path.write_bytes(found.private_key_pem.bytes() + b"".join(blob.bytes() for blob in found.cert_chain_pems))
    return path, authority


def submit(port: int, context: ssl.SSLContext, messages: int, clients: int = 20) -> int:
    """One connection a message, STARTTLS, each client resuming its session; how many were resumed."""
    resumed = [0] * clients

    def client(number: int) -> None:
        session = None
        for _ in range(messages // clients):
            with socket.create_connection(("127.0.0.1", port)) as plain:
                ask(plain, b"", b"EHLO me\r\n", b"STARTTLS\r\n")
                with context.wrap_socket(plain, server_hostname="relay.example", session=session) as sock:
                    ask(sock, b"EHLO me\r\n", b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n", b"DATA\r\n",
                        HEADER + LINE * 50 + b".\r\n")  # fmt: skip
                    session = sock.session
                    resumed[number] += bool(sock.session_reused)
                    ask(sock, b"QUIT\r\n")

    side_by_side(client, clients)
    return sum(resumed)


def ask(sock: socket.socket, *parts: bytes) -> None:
    """Send each and read its reply."""
    for part in parts:
        if part:
            sock.sendall(part)
        reply = b""
        while not reply.endswith(b"\r\n") or reply.splitlines()[-1][3:4] == b"-":
            piece = sock.recv(4096)
            if not piece:
                raise ConnectionError(reply.decode())
            reply += piece
        if reply[:1] not in b"23":
            raise ConnectionError(reply.decode())


def tls(scale: float) -> dict[str, Any]:
    """The same clients into the relay and into Postfix."""
    found: dict[str, Any] = {}
    messages = int(3000 * scale)
    for label in ("relaymta", "Postfix"):
        with tempfile.TemporaryDirectory() as name:
            folder, sink = Path(name), Sink()
            path, authority = certificate(folder)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            authority.configure_trust(context)
            if label == "relaymta":
                relay: Relaymta | Postfix = Relaymta(folder, sink.port, 1, (f'certificate=[{{chain="{path}"}}]',))
            else:
                path.chmod(0o600)
                relay = Postfix(folder, sink.port)
                more = f"smtpd_tls_security_level=may\nsmtpd_tls_chain_files={path}\nsmtpd_tls_received_header=no\n"
                main = relay.config / "main.cf"
                main.write_text(main.read_text().replace("smtpd_tls_security_level=none\n", more))
                subprocess.run(["postfix", "-c", str(relay.config), "reload"], check=True, capture_output=True)
                time.sleep(2)
            try:
                submit(relay.port, context, 200)
                wait_for(lambda relay=relay: relay.delivered() >= 200, 60)  # type: ignore[misc]
                before = cpu_seconds(relay.root)
                resumed = submit(relay.port, context, messages)
                wait_for(lambda relay=relay: relay.delivered() >= 200 + messages, 300)  # type: ignore[misc]
                found[label] = {"cpu_us": (cpu_seconds(relay.root) - before) / messages * 1e6, "resumed": resumed / messages}
            finally:
                relay.close()
                sink.close()
    return found | {"share of Postfix's": found["relaymta"]["cpu_us"] / found["Postfix"]["cpu_us"]}


# 200 login attempts a second, 4 from each of 50 addresses, each on its own connection, which waits two seconds for the reply.
ATTACKER = """
import base64, collections, random, socket, sys, time
port, count = int(sys.argv[1]), int(200 * float(sys.argv[2]))
began, waiting = time.monotonic(), collections.deque()
for number in range(count):
    time.sleep(max(0, began + number / 200 - time.monotonic()))
    sock = socket.socket()
    sock.bind((f"127.{number % 50 + 10}.0.1", 0))
    try:
        sock.connect(("127.0.0.1", port))
        sock.recv(200)
        response = base64.b64encode(f"\\0user{random.randrange(100)}\\0{random.random()}".encode())
        sock.sendall(b"EHLO attacker\\r\\nAUTH PLAIN " + response + b"\\r\\n")
    except OSError:
        pass
    waiting.append(sock)
    if len(waiting) > 400:
        waiting.popleft().close()
"""


def attack(seconds: float) -> dict[str, Any]:
    """Brute force from 50 addresses beside mail, and logins with the right password from other addresses."""
    with tempfile.TemporaryDirectory() as name:
        folder, sink = Path(name), Sink()
        accounts = folder / "accounts.toml"
        config = folder / "relay.toml"
        config.write_text(f'[[listener]]\naddress = "127.0.0.1:1"\n[accounts]\nfile = "{accounts}"\n')
        command = [sys.executable, "-m", "relaymta", "user", "add", "right", "--password", "secret", "-c", str(config)]
        subprocess.run(command, check=True, capture_output=True)
        endpoint = ',auth="may",auth_in_clear=true'
        relay = Relaymta(folder, sink.port, 1, (f"accounts.file={accounts}", "accounts.remember=0"), listener=endpoint)
        before = accepting(relay, lambda: time.sleep(seconds))
        memory = resident(relay.root)
        logins: list[float] = []

        def work() -> None:
            attacker = subprocess.Popen([sys.executable, "-c", ATTACKER, str(relay.port), str(seconds)])
            time.sleep(seconds / 4)
            for number in range(10):
                logins.append(login(relay.port, f"127.0.9.{number + 1}"))
                time.sleep(seconds / 20)
            attacker.wait()

        during = accepting(relay, work)
        found = {
            "accept before ms": before, "accept while attacked ms": during, "memory more MB": resident(relay.root) - memory,
            "right passwords logged in after s": logins,
        } | {
            result: relay.counter(f'relaymta_logins_total{{result="{result}"}}') / seconds
            for result in ("wrong", "limited", "unavailable")
        }  # fmt: skip
        relay.close()
        sink.close()
    return found


def login(port: int, source: str) -> float:
    """Seconds of a login with the right password."""
    began = time.monotonic()
    with smtplib.SMTP("127.0.0.1", port, "client.example", source_address=(source, 0)) as client:
        client.ehlo()
        code, _ = client.docmd("AUTH", "PLAIN " + base64.b64encode(b"\0right\0secret").decode())
        assert code == 235, code
    return time.monotonic() - began


def resident(root: int) -> float:
    """MB of a process and its children."""
    pids = [root, *map(int, subprocess.run(["pgrep", "-P", str(root)], capture_output=True, text=True).stdout.split())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", choices=["signed", "verified", "hostile", "tls", "attack"])
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("Postfix needs root")
    parts = {
        "signed": lambda: signing(options.scale),
        "verified": lambda: verified(options.scale),
        "hostile": hostile,
        "tls": lambda: tls(options.scale),
        "attack": lambda: attack(20 * options.scale),
    }
    print(json.dumps({name: part() for name, part in parts.items() if options.only in (None, name)}, indent=1))


if __name__ == "__main__":
    main()
