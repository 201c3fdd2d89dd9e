"""Authentication-Results in our name that come in from outside are removed (RFC 8601 5): whoever the client is, but a host of our
own network that has not logged in; whether mail is verified or not; in small messages and large ones."""

import contextlib
import smtplib
from collections.abc import Iterator

import pytest

from tests.accept.test_endpoints import SECRET, Endpoint
from tests.filter.test_signing import write_key
from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx

FORGED = b'Authentication-Results:\r\n (x) "RELAY\\.example" 1;\r\n spf=pass smtp.mailfrom=ceo@bank.test\r\n'
OTHERS = b"Authentication-Results: other.example; spf=pass smtp.mailfrom=ann@shop.test\r\n"
HEADER = b"From: ann@shop.test\r\nSubject: x\r\n"
BODY = b"".join(b"Authentication-Results: relay.example; line %d\r\n" % number for number in range(22_000))  # above 1 MB
NO_POLICY = ('relay.networks=["127.0.0.9/32"]', 'relay.domains=["ours.test"]', 'delivery.nameservers=["127.0.0.1:1"]')


@pytest.fixture(scope="module")
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


@pytest.fixture(scope="module", params=["plain", "verified and signed"])
def relay(request: pytest.FixtureRequest, peer: FakeMx, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One that neither verifies mail nor signs it, and one that does both. 127.0.0.9 is its own network."""
    folder, more = tmp_path_factory.mktemp("relay"), ["verify.results=false"]
    if request.param != "plain":
        key = write_key(folder / "key.pem", "rsa", 1024)
        more = ["verify.results=true", f'dkim=[{{domain="shop.test", selector="s", key="{key}"}}]']
    with Endpoint(folder, f"127.0.0.1:{peer.port}", *NO_POLICY, *more) as made:
        yield made


@pytest.fixture
def does_both(request: pytest.FixtureRequest) -> bool:
    return request.node.callspec.params["relay"] != "plain"


@contextlib.contextmanager
def logged_in(relay: Endpoint, source: str) -> Iterator[smtplib.SMTP]:
    """A client at the address `source` that has logged in as ann."""
    with smtplib.SMTP("127.0.0.1", relay.submission, "client.test", source_address=(source, 0)) as client:
        client._host = "relay.example"  # type: ignore[attr-defined]
        client.starttls(context=relay.context())
        client.login("ann", SECRET)
        yield client


def send(client: smtplib.SMTP, message: bytes, to: str, chunks: int = 0) -> tuple[int, bytes]:
    """The reply to a message, sent by DATA, or in so many chunks (BDAT)."""
    client.ehlo_or_helo_if_needed()
    client.mail("ann@shop.test")
    client.rcpt(to)
    if not chunks:
        return client.data(message)
    size = len(message) // chunks + 1
    for start in range(0, len(message), size):
        part = message[start : start + size]
        client.send(b"BDAT %d%s\r\n" % (len(part), b"" if start + size < len(message) else b" LAST") + part)
        code, text = client.getreply()
        assert code == 250, text
    return code, text


def arrived(peer: FakeMx, to: str, count: int) -> list[bytes]:
    """The messages to this recipient, when there are so many."""
    wait_for(lambda: sum(recipients == [to] for _, recipients, _ in peer.messages) == count)
    return [text for _, recipients, text in peer.messages if recipients == [to]]


def test_a_user_who_has_logged_in_forges_no_results(peer, relay, does_both):
    to, count = f"user-{does_both}@ours.test", 0
    headers = FORGED + HEADER, HEADER + FORGED, FORGED + OTHERS + HEADER + FORGED
    with logged_in(relay, "127.0.0.9") as client:
        for body, some in ((b"end\r\n", headers), (BODY, headers[2:])):
            for header in some:
                for chunks in (0, 7):
                    assert send(client, header + b"\r\n" + body, to, chunks)[0] == 250
                    count += 1
                    head, _, rest = arrived(peer, to, count)[-1].partition(b"\r\n\r\n")
                    assert rest == body and b"RELAY" not in head and head.endswith(HEADER[:-2])
                    assert head.count(b"Authentication-Results:") == header.count(b"other.example")
                    assert (b"DKIM-Signature" in head) == does_both


def test_an_unauthenticated_client_forges_none_and_our_own_network_keeps_ours(peer, relay, does_both):
    to, count = f"client-{does_both}@ours.test", 0
    for source, kept in (("127.0.0.4", False), ("127.0.0.9", True)):
        with smtplib.SMTP("127.0.0.1", relay.port, "client.test", source_address=(source, 0)) as client:
            for body in (b"end\r\n", BODY):
                for chunks in (0, 3):
                    assert send(client, FORGED + OTHERS + HEADER + b"\r\n" + body, to, chunks)[0] == 250
                    count += 1
                    head, _, rest = arrived(peer, to, count)[-1].partition(b"\r\n\r\n")
                    assert rest == body and head.endswith(HEADER[:-2]) and OTHERS in head
                    assert (FORGED in head) is kept
                    ours = head.count(b"Authentication-Results: relay.example;")
                    assert ours == (1 if does_both and not kept else 0)


@pytest.mark.parametrize("relay", ["plain"], indirect=True)
def test_results_do_not_hide_behind_a_long_header(peer, relay):
    """What is too long to be parsed is refused where it has such a field, or may have one."""
    long = b"X-Long: " + b"x" * 900 + b"\r\n" + (b" " + b"x" * 900 + b"\r\n") * 150
    endless = b"X-Long: " + b"x" * 900 + b"\r\n" + (b" " + b"x" * 900 + b"\r\n") * 4000  # most of it arrives after the decision
    to = "long@ours.test"
    with logged_in(relay, "127.0.0.9") as client:
        for chunks in (0, 5):
            assert send(client, HEADER + long + b"\r\nend\r\n", to, chunks)[0] == 250
        for message in (
            HEADER + long + FORGED + b"\r\nend\r\n",
            HEADER + endless + b"\r\nend\r\n",
            FORGED + endless + b"\r\nend\r\n",
        ):
            assert send(client, message, to) == (554, b"5.6.0 The header is too long"), len(message)
        # A text without a header has none that could be forged.
        for text in (b"hello\r\n", b"hello\r\n" + (b"x" * 900 + b"\r\n") * 1300, FORGED[:22] + b"\r\n", b"x\r\n" + FORGED):
            assert send(client, text, to)[0] == 250
    assert any(message.endswith(b"\r\n\r\nx\r\n" + FORGED) for message in arrived(peer, to, 6))
