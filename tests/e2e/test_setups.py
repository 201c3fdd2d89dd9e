"""docs/setups/ and config/examples/: `relaymta config check` accepts each file as it is written, a relay started with it takes a
message as its page says, and the stand-in of the provider gets it; and the commands of the page say what the page has.

What is replaced in a file: folders, addresses to listen on, networks, and names of hosts and of a token endpoint."""

import asyncio
import base64
import contextlib
import json
import re
import shlex
import smtplib
import ssl
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import dkim
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from relaymta import control
from relaymta.config import load
from relaymta.route.shaping import Shaping
from tests.support import commands
from tests.support.clamd import fake_clamd
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.in_thread import in_thread
from tests.support.pages import Said, blocks, is_said
from tests.support.pages import commands as commands_of
from tests.support.prove import in_prove
from tests.support.routed import server_context
from tests.support.token_server import TokenServer
from tests.support.zone import Zone, nameserver

ROOT = Path(__file__).parents[2]
EXAMPLES, PAGES = ROOT / "config/examples", ROOT / "docs/setups"
FILES = sorted(file.name for file in EXAMPLES.iterdir())
TESTED: set[str] = set()
CHECKED = ("relaymta config check", "relaymta route test", "relaymta doctor domain")  # run: they need no daemon, change nothing
LISTENER = re.compile(r'^address = "(?:127\.0\.0\.1|0\.0\.0\.0):(?:25|587)"', re.M)
NOTHING: Mapping[str, str] = {}
MESSAGE = "From: shop@example.com\r\nTo: bob@far.example\r\nSubject: hello\r\n\r\nhello\r\n"
USER = 'user = "relaymta"\n'  # who need not exist here


def about(*files: str, alike: Collection[str] = ()) -> pytest.MarkDecorator:
    """The test of these files, which has the name of one as `file`. `alike`: those that only `make prove` starts a relay with."""
    TESTED.update(files)
    return pytest.mark.parametrize("file", [*(file for file in files if file not in alike), *in_prove(*alike)])


def page_of(file: str) -> Path:
    """The page that the first line of a file names."""
    found = re.match(r"# .*: docs/setups/(\S+\.md)\n", (EXAMPLES / file).read_text())
    assert found is not None, f"{file}: the first line does not name its page"
    return PAGES / found[1]


def part_of(file: str) -> str:
    """What its page has about a file: the section with the file in a block, or the whole page where it is the only one."""
    page, text = page_of(file), (EXAMPLES / file).read_text()
    alone = [other for other in FILES if page_of(other) == page] == [file]
    whole = page.read_text()
    found = [part for part in ([whole] if alone else re.split(r"^(?=## )", whole, flags=re.M)) if text in blocks(part)]
    assert len(found) == 1, f"{page.name} does not have {file} as it is, in one block"
    return found[0]


def replaced(text: str, here: Mapping[str, str]) -> str:
    """A text with what is here in place of what it has."""
    for there, other in here.items():
        assert there in text, f"there is no {there}"
        text = text.replace(there, other)
    return text


class SetUp(Relay):
    """A relay with a file of config/examples. `here`: what is on this machine in place of hosts, networks and URLs of the file.
    It trusts `authority`, and asks a nameserver."""

    def __init__(
        self, folder: Path, file: str, dns: str, here: Mapping[str, str], *settings: str, checked: Mapping[str, str] = NOTHING
    ) -> None:
        """`checked`: as `here`, for `relaymta config check` too, which looks at these."""
        super().__init__(folder, None, f'delivery.nameservers=["{dns}"]', *settings)
        self.file = file
        self.etc = folder / "etc"
        for name in ("certs", "dkim"):
            (self.etc / name).mkdir(parents=True)
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        self.environment["SSL_CERT_FILE"] = str(folder / "ca.pem")
        text = (EXAMPLES / file).read_text()
        assert USER in text
        text = text.replace(USER, "").replace("/etc/relaymta", str(self.etc)).replace("/var/lib/relaymta", str(self.spool))
        text, listeners = LISTENER.subn(f'address = "127.0.0.1:{self.port}"', text)
        assert listeners == 1
        text = replaced(text, checked)
        self.written, self.config = folder / "written.toml", folder / "relaymta.toml"
        self.written.write_text(text)
        self.config.write_text(replaced(text, here))

    def options(self) -> list[str]:
        """Those of all commands: what the files do not have."""
        settings = f"metrics.listen=127.0.0.1:{self.metrics_port}", *self.settings
        return [word for setting in settings for word in ("--set", setting)]

    def command(self) -> list[str]:
        log = "--set", f"log.file={self.log}", "--set", "intake.shed_lag=0"
        return [self.python, "-m", "relaymta", "serve", "-c", str(self.config), "--workers", "1", *log, *self.options()]

    def secret(self, name: str, text: str = "") -> None:
        """A file below /etc/relaymta that only its owner can read."""
        file = self.etc / name
        file.write_text(text or f"secret-of-{name}\n")
        file.chmod(0o600)

    def certificate(self, name: str) -> None:
        """A certificate for a name, with its key in another file."""
        made = self.authority.issue_cert(name)
        self.secret(f"certs/{name}.pem", b"".join(blob.bytes() for blob in made.cert_chain_pems).decode())
        self.secret(f"certs/{name}.key", made.private_key_pem.bytes().decode())

    def says(self, *words: str) -> str:
        """What a command says about the file as it is written."""
        done = commands.run([*words, "-c", str(self.written), *self.options()], PATIENCE)
        return (done.stdout + done.stderr).replace(str(self.etc), "/etc/relaymta").rstrip("\n")

    def check(self) -> None:
        """The file is valid, without a remark; and the commands of its page say what they say there."""
        asked = [said for said in commands_of(part_of(self.file)) if said.command.startswith(CHECKED)]
        assert Said("relaymta config check", "the configuration is valid") in asked
        for said in asked:
            found = self.says(*shlex.split(said.command)[1:])
            assert is_said(said.output, found), f"$ {said.command}\n{found}\nbut {page_of(self.file).name} has\n{said.output}"

    def send_by(self, address: str, text: str = MESSAGE, sender: str = "shop@example.com", to: str = "bob@far.example") -> None:
        """Send a message from an address of this machine; smtplib's exception where it is refused."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE, source_address=(address, 0)) as client:
            client.sendmail(sender, [to], text)


NAMES = [  # hosts of the files, and the MX of a domain elsewhere
    *(f"{name}.example.com" for name in ("relay", "mail", "mx", "mx1", "mx2", "exchange.corp", "shop.relay")), "mx.far.example",
    "email-smtp.eu-west-1.amazonaws.com", "smtp.gmail.com", "smtp-relay.gmail.com", "smtp.office365.com", "smtp.mailgun.org",
    "example-com.mail.protection.outlook.com", "smtp.sendgrid.net", "smtp.postmarkapp.com",
]  # fmt: skip
HERE = "127.0.0.1"
INCLUDES = "amazonses.com", "_spf.google.com", "spf.protection.outlook.com", "sendgrid.net", "spf.mtasv.net"


@pytest.fixture(scope="module")
def dns() -> Iterator[str]:
    """A nameserver with what the pages say has to be in the DNS. All mail hosts are here."""
    data: dict[str, list[Any]] = {name: [{"A": HERE}] for name in NAMES}
    spf = f"v=spf1 {' '.join(f'include:{name}' for name in INCLUDES)} ip4:192.0.2.25 -all"
    data["example.com"] = [{"MX": [10, "mail.example.com"]}, {"TXT": spf}]
    data["mg.example.com"] = [{"TXT": "v=spf1 include:mailgun.org -all"}]
    data["_dmarc.example.com"] = [{"TXT": "v=DMARC1; p=none"}]
    data["far.example"] = [{"MX": [10, "mx.far.example"]}, {"TXT": f"v=spf1 ip4:{HERE} -all"}]
    with in_thread(nameserver(Zone(data))) as address:
        yield address


@pytest.mark.parametrize("file", FILES)
def test_each_file_is_on_its_page_and_tested(file):
    assert part_of(file)
    assert file in TESTED, f"no test starts a relay with {file}"
    assert f"({page_of(file).name})" in (PAGES / "README.md").read_text()


LOGINS = {  # file: the host, as in the file; user; file with the password
    "amazon-ses.toml": ("email-smtp.eu-west-1.amazonaws.com", "AKIAIOSFODNN7EXAMPLE", "ses-password"),
    "gmail-app-password.toml": ("smtp.gmail.com", "relay@example.com", "gmail-app-password"),
    "mailgun.toml": ("smtp.mailgun.org", "postmaster@mg.example.com", "mailgun-password"),
    "sendgrid.toml": ("smtp.sendgrid.net", "apikey", "sendgrid-api-key"),
    "postmark.toml": ("smtp.postmarkapp.com", "ACCESS-KEY", "postmark-secret-key"),
}


@about(*LOGINS, alike=("mailgun.toml", "sendgrid.toml", "postmark.toml"))
def test_a_service_with_a_password(file, tmp_path, dns):
    """One message to it; and our bounce about another, which most files send to the MX."""
    host, user, secret = LOGINS[file]
    port = free_port()
    with FakeMx({}) as mx:
        relay = SetUp(tmp_path, file, dns, {f"{host}:587": f"localhost:{port}"}, f"delivery.port={mx.port}")
        relay.secret(secret)
        relay.check()
        rules = {"RCPT": {"nobody@far.example": b"554 5.1.1 nobody\r\n"}}
        with FakeMx(rules, port, tls=server_context(relay.authority)) as service, relay:
            for to in ("bob", "nobody"):
                relay.send(MESSAGE, "shop@example.com", f"{to}@far.example")
            bounces = service if file == "gmail-app-password.toml" else mx
            wait_for(lambda: len(service.messages) + len(mx.messages) == 2)
            first, bounce = service.messages[0], bounces.messages[-1]
            assert first[:2] == ("shop@example.com", ["bob@far.example"]) and b"\r\nMessage-ID: <" in first[2]
            assert bounce[:2] == ("", ["shop@example.com"])
            assert set(service.credentials) == {f"\0{user}\0secret-of-{secret}".encode()}


class Tokens(TokenServer):
    """A token endpoint, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        super().__init__()

    def answer(self, form: dict[str, list[str]]) -> tuple[int, dict[str, Any]]:
        self.asked.append({key: value for key, (value,) in form.items()})
        return 200, {"access_token": "t1", "token_type": "Bearer", "expires_in": 3600}


TOKENS = {  # file: the host and the token endpoint, as in the file; files with secrets; what the endpoint is asked; the sender
    "gmail-oauth2.toml": (
        "smtp.gmail.com", "https://oauth2.googleapis.com/token", ["google-client-secret", "google-refresh-token"],
        {
            "grant_type": "refresh_token", "client_id": "123456789012-abcdef.apps.googleusercontent.com",
            "client_secret": "secret-of-google-client-secret", "refresh_token": "secret-of-google-refresh-token",
        },
        "shop@example.com",
    ),
    "microsoft-365-oauth2.toml": (
        "smtp.office365.com", "https://login.microsoftonline.com/00000000-0000-0000-0000-000000000000/oauth2/v2.0/token",
        ["microsoft-client-secret"],
        {
            "grant_type": "client_credentials", "client_id": "11111111-1111-1111-1111-111111111111",
            "client_secret": "secret-of-microsoft-client-secret", "scope": "https://outlook.office365.com/.default",
        },
        "relay@example.com",
    ),
}  # fmt: skip


@about(*TOKENS)
def test_a_service_with_tokens(file, tmp_path, dns):
    host, url, secrets, form, sender = TOKENS[file]
    port, endpoint, said = free_port(), Tokens(), list[bytes]()
    relay = SetUp(tmp_path, file, dns, {f"{host}:587": f"localhost:{port}", url: endpoint.url})
    for secret in secrets:
        relay.secret(secret)
    relay.check()

    def answer(line: bytes) -> bytes:
        said.append(line)
        return b"235 2.7.0 welcome\r\n"

    tls = server_context(relay.authority)
    with FakeMx({}, port, tls=tls, auth=(b"LOGIN XOAUTH2", answer)) as peer, relay:
        relay.send(MESSAGE, "shop@example.com", "bob@far.example")
        wait_for(lambda: peer.messages)
        assert peer.messages[0][:2] == (sender, ["bob@far.example"])
    (line,) = set(said)
    assert line.startswith(b"AUTH XOAUTH2 ")
    assert base64.b64decode(line.split()[2]) == b"user=relay@example.com\1auth=Bearer t1\1\1"
    assert endpoint.asked == [form]
    endpoint.server.shutdown()


@about("google-smtp-relay.toml", "microsoft-365-connector.toml")
def test_a_service_that_knows_us_by_our_address_or_certificate(file, tmp_path, dns):
    hosts = {
        "google-smtp-relay.toml": "smtp-relay.gmail.com:587",
        "microsoft-365-connector.toml": "example-com.mail.protection.outlook.com:25",
    }
    by_certificate = file == "microsoft-365-connector.toml"
    port = free_port()
    relay = SetUp(tmp_path, file, dns, {hosts[file]: f"localhost:{port}"})
    tls = server_context(relay.authority)
    if by_certificate:
        relay.certificate("relay.example.com")
        relay.authority.configure_trust(tls)
        tls.verify_mode = ssl.CERT_REQUIRED
    relay.check()
    with FakeMx({}, port, tls=tls) as peer, relay:
        relay.send(MESSAGE, "shop@example.com", "bob@far.example")
        wait_for(lambda: peer.messages)
        assert peer.messages[0][:2] == ("shop@example.com", ["bob@far.example"])
        assert peer.greetings[-1] == "relay.example.com" and "AUTH" not in peer.commands
        names = [name for certificate in peer.certificates for _, name in certificate.get("subjectAltName", ())]
        assert names == (["relay.example.com"] if by_certificate else [])


def key(relay: SetUp, domain: str) -> None:
    """The DKIM key of a domain, made as its page says."""
    relay.says("dkim", "keygen", domain, "--selector", "r1", "--out", str(relay.etc / f"dkim/{domain}.r1.pem"))


def signers(relay: SetUp, message: bytes) -> list[str]:
    """The domains whose signatures are valid."""
    found = []
    for domain in re.findall(rb"\sd=([a-z.]+);", message.partition(b"\r\n\r\n")[0]):
        public = dns_record(relay.etc / f"dkim/{domain.decode()}.r1.pem")
        assert dkim.verify(message, dnsfunc=lambda name, timeout=5, public=public: public)
        found.append(domain.decode())
    return found


def dns_record(file: Path) -> bytes:
    """The record of a private key."""
    private = serialization.load_pem_private_key(file.read_bytes(), None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return b"v=DKIM1; k=rsa; p=" + base64.b64encode(private.public_key().public_bytes(serialization.Encoding.DER, form))


@about("internal-relay.toml")
def test_an_internal_relay(file, tmp_path, dns):
    """Two hosts: one in the network, and one that is not."""
    inside = free_port()
    with FakeMx({}) as far:
        here = {"10.0.0.0/8": "127.0.0.2/32", "mail.example.com:25": f"localhost:{inside}"}
        relay = SetUp(tmp_path, file, dns, here, f"delivery.port={far.port}")
        key(relay, "example.com")
        relay.check()
        with FakeMx({}, inside) as mail, relay:
            text = MESSAGE.replace("shop@example.com", "root@web1.example.com")
            relay.send_by("127.0.0.2", text)
            relay.send_by("127.0.0.2", text, to="ann@example.com")
            wait_for(lambda: far.messages and mail.messages)
            assert (far.messages[0][1], mail.messages[0][1]) == (["bob@far.example"], ["ann@example.com"])
            assert signers(relay, far.messages[0][2]) == ["example.com"]
            assert refused(relay, "127.0.0.3") == (550, b"5.7.1 Relaying denied")


def refused(relay: SetUp, client: str, **envelope: str) -> tuple[int, bytes]:
    """The reply to the one recipient of a message from an address."""
    with pytest.raises(smtplib.SMTPRecipientsRefused) as raised:
        relay.send_by(client, **envelope)
    ((reply),) = raised.value.recipients.values()
    return reply


@about("devices.toml")
def test_devices(file, tmp_path, dns):
    """A printer, and a build job, whose senders do not exist."""
    port = free_port()
    here = {"10.20.0.0/24": "127.0.0.2/32", "10.30.0.0/16": "127.0.0.3/32", "mail.example.com:25": f"localhost:{port}"}
    relay = SetUp(tmp_path, file, dns, here)
    relay.secret("recipients", "ann@example.com\n")
    relay.check()
    with FakeMx({}, port, tls=server_context(relay.authority)) as mail, relay:
        relay.send_by("127.0.0.2", sender="scan@mfp-3.local", to="ann@example.com")
        relay.send_by("127.0.0.3", sender="root@runner-7.build.internal", to="ann@example.com")
        wait_for(lambda: len(mail.messages) == 2)
        assert sorted(sender for sender, _, _ in mail.messages) == ["root@ci.example.com", "scanner@example.com"]
        assert refused(relay, "127.0.0.2") == (550, b"5.7.1 Relaying denied")
        assert refused(relay, "127.0.0.3", to="nobody@example.com") == (550, b"5.1.1 No such recipient here")


@about("backup-mx.toml")
def test_a_backup_mx(file, tmp_path, dns):
    """Mail comes in while the first MX is down, and is there as soon as that is up."""
    port = free_port()
    relay = SetUp(tmp_path, file, dns, {"mx1.example.com:25": f"localhost:{port}"})
    relay.certificate("mx2.example.com")
    relay.secret("recipients", "ann@example.com\n@example.net\n")
    relay.check()
    with relay:
        text = MESSAGE.replace("shop@example.com", "bob@far.example")
        relay.send_by("127.0.0.2", text, "bob@far.example", "ann@example.com")
        assert refused(relay, "127.0.0.2", sender="bob@far.example", to="nobody@example.com")[0] == 550
        relay.send_by("127.0.0.2", text, "bob@far.example", "whoever@example.net")
        wait_for(lambda: relay.events("site"))
        with FakeMx({}, port) as first:
            wait_for(lambda: len(first.messages) == 2)
            assert sorted(to for _, (to,), _ in first.messages) == ["ann@example.com", "whoever@example.net"]


async def rspamd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What finds no spam."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = b"pong\r\n" if head.startswith(b"GET /ping") else b'{"action": "no action", "score": 0.5, "symbols": {}}'
    if length := re.search(rb"(?i)content-length: *(\d+)", head):
        await reader.readexactly(int(length[1]))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def scanners() -> AsyncIterator[tuple[str, str]]:
    """The addresses of clamd and rspamd."""
    async with fake_clamd() as (_, clamd), await asyncio.start_server(rspamd, HERE, 0) as server:
        yield clamd, f"{HERE}:{server.sockets[0].getsockname()[1]}"


@about("exchange.toml")
def test_in_front_of_exchange(file, tmp_path, dns):
    port = free_port()
    with in_thread(scanners()) as (clamd, spam), FakeMx({}) as far:
        filters = {"unix:/run/clamav/clamd.ctl": clamd, "127.0.0.1:11333": spam}
        here = {"exchange.corp.example.com:25": f"localhost:{port}", "10.0.0.10/32": "127.0.0.2/32"}
        relay = SetUp(tmp_path, file, dns, here, f"delivery.port={far.port}", checked=filters)
        relay.certificate("mx.example.com")
        relay.secret("recipients", "ann@example.com\n")
        key(relay, "example.com")
        relay.check()
        with FakeMx({}, port, tls=server_context(trustme.CA())) as exchange, relay:
            text = MESSAGE.replace("shop@example.com", "bob@far.example")
            relay.send_by("127.0.0.3", text, "bob@far.example", "ann@example.com")
            relay.send_by("127.0.0.2")
            wait_for(lambda: exchange.messages and far.messages)
            assert exchange.messages[0][:2] == ("bob@far.example", ["ann@example.com"])
            assert b"Authentication-Results: mx.example.com;" in exchange.messages[0][2]
            assert signers(relay, far.messages[0][2]) == ["example.com"]
            assert refused(relay, "127.0.0.3", to="nobody@example.com") == (550, b"5.1.1 No such recipient here")


@about("tenants.toml")
def test_several_tenants(file, tmp_path, dns):
    """One application by the MX and from an address of its own, the other by a service, each with its key."""
    port = free_port()
    with FakeMx({}) as far:
        source = {"192.0.2.10": "127.0.0.5"}
        relay = SetUp(
            tmp_path, file, dns, {"smtp.sendgrid.net:587": f"localhost:{port}"}, f"delivery.port={far.port}", checked=source
        )
        relay.certificate("relay.example.com")
        relay.secret("sendgrid-api-key")
        keys = {}
        for domain in ("shop.example", "news.example"):
            key(relay, domain)
            name = domain.partition(".")[0]
            made = relay.says("app", "create", name, "--sender", f"@{domain}", "--json")
            keys[name] = json.loads(made)["secret"]
        with (relay.etc / "accounts.toml").open("a") as accounts:
            accounts.write(next(block for block in blocks(page_of(file).read_text()) if "messages = " in block))  # of news
        relay.check()
        with FakeMx({}, port, tls=server_context(relay.authority)) as service, relay:
            for name, secret in keys.items():
                with smtplib.SMTP("localhost", relay.port, timeout=PATIENCE) as client:
                    client._host = "relay.example.com"  # type: ignore[attr-defined]
                    client.starttls(context=ssl.create_default_context(cafile=str(tmp_path / "ca.pem")))
                    client.login(name, secret)
                    text = MESSAGE.replace("shop@example.com", f"us@{name}.example")
                    client.sendmail(f"us@{name}.example", ["bob@far.example"], text)
            wait_for(lambda: far.messages and service.messages)
            assert signers(relay, far.messages[0][2]) == ["shop.example"]
            assert (set(far.clients), set(far.greetings)) == ({"127.0.0.5"}, {"shop.relay.example.com"})
            assert signers(relay, service.messages[0][2]) == ["news.example"]
            assert set(service.credentials) == {b"\0apikey\0secret-of-sendgrid-api-key"}
            used = {"messages": ("20000/d", 1), "recipients": ("50000/d", 1)}  # of several workers, each tells its own
            asked = lambda: control.ask(relay.spool / "control.sock", "usage")  # noqa: E731
            wait_for(lambda: {row["what"]: (row["quota"], row["used"]) for row in asked()} == used)


@about("staging.toml")
def test_staging(file, tmp_path, dns):
    """Somebody who is on the list, and somebody who is not."""
    with FakeMx({}) as people, FakeMx({}) as sink:
        here = {"mail.example.com:25": f"localhost:{people.port}", "127.0.0.1:2526": f"localhost:{sink.port}"}
        relay = SetUp(tmp_path, file, dns, here)
        relay.check()
        with relay:
            relay.send(MESSAGE, "shop@example.com", "ceo@far.example", "qa@example.com", "x@test.example.com")
            wait_for(lambda: sink.messages and len(people.messages) == 2)
            assert sorted(to for _, (to,), _ in people.messages) == ["qa@example.com", "x@test.example.com"]
            assert sink.messages[0][1] == ["everybody@sink.invalid"]
            assert sink.messages[0][2].startswith(b"X-Staging-Recipients: <ceo@far.example>\r\n")


@pytest.mark.parametrize(
    ("file", "host", "reply", "action"),
    [
        (
            "amazon-ses.toml",
            "email-smtp.eu-west-1.amazonaws.com",
            "454 Throttling failure: Maximum sending rate exceeded",
            "slow",
        ),
        (
            "amazon-ses.toml",
            "email-smtp.eu-west-1.amazonaws.com",
            "454 Throttling failure: Daily message quota exceeded",
            "suspend",
        ),
    ],
)
def test_what_replies_of_services_mean(file, host, reply, action):
    rule = Shaping(load(EXAMPLES / file, {})).rule(host, reply)
    assert rule is not None and rule.action == action
