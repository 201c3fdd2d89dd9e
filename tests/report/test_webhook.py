"""The requests of webhooks: signatures, responses of every kind, addresses that must not be connected to, TLS."""

import asyncio
import contextlib
import json
import socket
import ssl
import threading

import aiohttp
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from standardwebhooks.webhooks import Webhook as Standard

from relaymta.config import Webhook as Settings
from relaymta.config.webhooks import is_private
from relaymta.proto.webhook import key_of, signed
from relaymta.report import webhook as module
from relaymta.report.streams import NotTaken
from relaymta.report.webhook import Webhook
from tests.support.webhooks import DROP, consumer, secret_file

EVENTS = [{"id": f"m-{number}", "event": "accepted", "application": "shop", "recipient": "a@b"} for number in range(3)]


@contextlib.asynccontextmanager
async def asking(folder, url: str, **more):
    made = {"name": "shop", "url": url, "secret_file": str(folder / "secret"), "private": True} | more
    webhook = Webhook(Settings(**made))
    try:
        yield webhook
    finally:
        await webhook.close()


@pytest.fixture
def shop(tmp_path):
    with consumer(secret_file(tmp_path / "secret")) as found:
        yield found


@given(st.binary(max_size=200), st.binary(min_size=24, max_size=64), st.integers(0, 1 << 33))
def test_signatures_are_those_of_the_published_implementation(body, key, seconds):
    import base64
    from datetime import UTC, datetime

    text = base64.b64encode(key).decode()
    assert key_of("whsec_" + text) == key_of(text.rstrip("=")) == key
    try:
        data = body.decode()
    except UnicodeDecodeError:
        return
    expected = Standard("whsec_" + text).sign("msg_1", datetime.fromtimestamp(seconds, UTC), data)
    found = signed("msg_1", seconds, body, [key, b"k" * 24])["webhook-signature"]
    assert found.split(" ")[0] == expected and len(found.split(" ")) == 2


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!!!", "whsec_" + "A" * 20, "whsec_" + "A" * 200, "hello"])
def test_a_secret_that_is_none_is_refused_and_not_repeated(secret):
    with pytest.raises(ValueError) as raised:
        key_of(secret)
    assert not secret or secret not in str(raised.value)


async def test_a_batch_has_the_same_id_and_body_each_time(tmp_path, shop):
    async with asking(tmp_path, shop.url) as webhook:
        shop.reply = lambda request: (500, {}, b"not now\r\nor later")
        with pytest.raises(NotTaken, match=r"HTTP 500: not now\\r\\nor later"):
            await webhook.take(EVENTS)
        shop.reply = lambda request: (204, {}, b"")
        await webhook.take(EVENTS)
        await webhook.take(EVENTS[:2])
    first, second, third = shop.refused[0], *shop.requests
    assert first.ident == second.ident != third.ident and first.body == second.body
    assert json.loads(second.body) == {"type": "events", "events": EVENTS} and not shop.wrong


async def test_two_secrets_sign_while_one_goes_over_to_the_other(tmp_path, shop, monkeypatch):
    monkeypatch.setattr(module, "SECRET_SECONDS", 0.0)
    old = shop.secrets[0]
    new = secret_file(tmp_path / "new")
    async with asking(tmp_path, shop.url, other_secret_file=str(tmp_path / "new")) as webhook:
        shop.secrets = [old, new]  # each of them verifies it
        await webhook.take(EVENTS)
        (tmp_path / "secret").write_text(new)  # the files are read again when they change
        (tmp_path / "new").write_text(secret_file(tmp_path / "third"))
        shop.secrets = [new]
        await webhook.take(EVENTS)
        shop.secrets = [old]
        with pytest.raises(NotTaken, match="HTTP 400"):
            await webhook.take(EVENTS)
        (tmp_path / "secret").unlink()
        shop.secrets = [new]
        await webhook.take(EVENTS)  # what was read before stays in use
    assert len(shop.wrong) == 1


async def test_without_a_secret_nothing_is_sent(tmp_path, shop):
    (tmp_path / "secret").write_text("hello")
    async with asking(tmp_path, shop.url) as webhook:
        with pytest.raises(NotTaken, match=r"it cannot be signed: .*secret: it is not"):
            await webhook.take(EVENTS)
        (tmp_path / "secret").write_text(shop.secrets[0])
        await webhook.take(EVENTS)
    assert not shop.wrong and len(shop.requests) == 1


async def test_a_redirect_is_not_followed(tmp_path, shop):
    with consumer(shop.secrets[0]) as other:
        shop.reply = lambda request: (301, {"Location": other.url}, b"")
        async with asking(tmp_path, shop.url) as webhook:
            with pytest.raises(NotTaken, match="HTTP 301"):
                await webhook.take(EVENTS)
        assert not other.requests and not other.wrong


@pytest.mark.parametrize(
    ("field", "after"), [("120", 120), ("99999999", 3600), ("nonsense", 0), ("-5", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)]
)
async def test_when_to_ask_again(tmp_path, shop, field, after):
    shop.reply = lambda request: (503, {"Retry-After": field}, b"")
    async with asking(tmp_path, shop.url) as webhook:
        with pytest.raises(NotTaken) as raised:
            await webhook.take(EVENTS)
    assert raised.value.after == after and not raised.value.gone


async def test_one_that_is_gone_says_so(tmp_path, shop):
    shop.reply = lambda request: (410, {}, b"")
    async with asking(tmp_path, shop.url) as webhook:
        with pytest.raises(NotTaken) as raised:
            await webhook.take(EVENTS)
    assert raised.value.gone


async def test_one_that_drops_connections_or_is_slow_or_away_is_a_failure(tmp_path, shop):
    stop = threading.Event()

    def slow(request):
        stop.wait(30)
        return 200, {}, b""

    async with asking(tmp_path, shop.url, timeout=0.3) as webhook:
        shop.reply = lambda request: DROP
        with pytest.raises(NotTaken):
            await webhook.take(EVENTS)
        shop.reply = slow
        with pytest.raises(NotTaken, match=r"no response within 0\.3 s"):
            await webhook.take(EVENTS)
        stop.set()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        async with asking(tmp_path, f"http://127.0.0.1:{sock.getsockname()[1]}/") as webhook:
            with pytest.raises(NotTaken, match=r"Connect call failed|refused"):
                await webhook.take(EVENTS)


async def test_little_of_a_response_is_read(tmp_path):
    """A response without an end neither takes memory nor keeps the status from being heard."""
    secret_file(tmp_path / "secret")
    sent = 0

    async def serve(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while sent < 50_000_000:
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
                sent += 65536

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        async with asking(tmp_path, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") as webhook:
            await webhook.take(EVENTS)
    assert sent < 20_000_000


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "127.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fd00:ec2::254", "2001:db8::1", "ff02::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "::ffff:0:127.0.0.1", "2001::1", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_that_are_of_no_host_in_the_internet(address):
    assert is_private(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.15.0.1", "100.63.0.1", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_hosts_in_the_internet(address):
    assert not is_private(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "10.1.2.3", "[::ffff:127.0.0.1]", "169.254.169.254"])
def test_a_private_address_in_the_url_is_a_mistake_unless_it_is_meant(host):
    about = {"name": "shop", "secret_file": "/s", "url": f"https://{host}/x"}
    with pytest.raises(ValidationError, match="is not an address in the Internet"):
        Settings(**about)
    Settings(**about, private=True)
    Settings(**about, networks=["127.0.0.0/8", "10.0.0.0/8", "::1/128", "169.254.169.254/32"])


def test_plain_http_to_another_host_is_a_mistake():
    with pytest.raises(ValidationError, match="plain http"):
        Settings(name="shop", secret_file="/s", url="http://shop.example/x")


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
async def test_a_name_that_means_a_private_address_by_now_is_not_connected_to(tmp_path, shop, monkeypatch, address):
    """The check is where sockets are made: what a look-up before has said does not count."""
    port, asked = int(shop.url.rpartition(":")[2].partition("/")[0]), []

    async def resolve(self, host, at=0, family=socket.AF_INET):
        asked.append(host)
        version = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [{"hostname": host, "host": address, "port": at, "family": version, "proto": 0, "flags": socket.AI_NUMERICHOST}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    async with asking(tmp_path, f"https://shop.example:{port}/", private=False) as webhook:
        with pytest.raises(NotTaken, match="is not an address in the Internet"):
            await webhook.take(EVENTS)
    assert asked == ["shop.example"] and not shop.requests and not shop.wrong
    async with asking(tmp_path, f"http://shop.example:{port}/", private=True) as webhook:
        await webhook.take(EVENTS)
    async with asking(tmp_path, f"https://shop.example:{port}/", private=False, networks=["127.0.0.0/8"]) as webhook:
        with pytest.raises(NotTaken) as raised:  # it is connected to, and speaks no TLS
            await webhook.take(EVENTS)
        assert "Internet" not in str(raised.value)
    assert len(shop.requests) == 1


async def test_certificates_are_verified(tmp_path):
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for authority, name, good in ((ours, "127.0.0.1", True), (others, "127.0.0.1", False), (ours, "other.example", False)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        with consumer(secret_file(tmp_path / "secret"), context=context) as shop:
            async with asking(tmp_path, shop.url, ca_file=str(tmp_path / "ca.pem")) as webhook:
                if good:
                    await webhook.take(EVENTS)
                else:
                    with pytest.raises(NotTaken, match="certificate"):
                        await webhook.take(EVENTS)
            assert len(shop.requests) == good


async def test_who_asks_first_and_second_at_once_have_the_same_secret(tmp_path, shop):
    """As the streams of two shards do at each start."""
    async with asking(tmp_path, shop.url) as webhook:
        await asyncio.gather(*(webhook.take([event]) for event in EVENTS))
    assert len(shop.requests) == 3
