"""relaymta.client with a running relay."""

import email
import email.policy
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path

import pytest

from relaymta.client import Attachment, Client, Failed, Problem, Unreachable
from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx
from tests.support.injecting import Injecting


@pytest.fixture(scope="module")
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, peer: FakeMx) -> Iterator[Injecting]:
    folder = tmp_path_factory.mktemp("relay")
    with Injecting(folder, f"127.0.0.1:{peer.port}", workers=2) as running:
        yield running


@pytest.fixture
def client(relay: Injecting) -> Iterator[Client]:
    with Client(f"https://localhost:{relay.https}", "shop", "secret", context=relay.context) as made:
        yield made


def arrived(peer: FakeMx, ident: str) -> EmailMessage:
    """A message of this id, as the next host has it."""

    def found() -> list[bytes]:
        return [data for _, _, data in peer.messages if f" id {ident}".encode() in data]

    message = email.message_from_bytes(wait_for(found)[0], policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def test_a_message_with_files_is_sent_and_followed_to_its_end(
    relay: Injecting, client: Client, peer: FakeMx, tmp_path: Path
) -> None:
    file = tmp_path / "Rechnung für Zoë.pdf"
    file.write_bytes(bytes(range(256)) * 1000)
    sent = client.send(
        from_={"email": "shop@shop.example", "name": "Shöp"}, to=["Ann <ann@d.example>", {"email": "bob@d.example"}],
        bcc="archive@d.example", subject="Ihre Rechnung №1", text="see the file\n", html='<img src="cid:logo">',
        attachments=[file, Attachment(b"\x89PNG", "logo.png", content_id="logo")], tags=["invoice"],
        headers={"X-Order": "17"}, priority="express", traceparent=f"00-{'a' * 32}-{'b' * 16}-01",
    )  # fmt: skip
    assert sent.complete and not sent.replayed and len(sent.messages) == 1
    wait_for(lambda: client.message(sent.id).ended)
    state = client.message(sent.id)
    assert state.sender == "shop@shop.example" and state.tags == ["invoice"] and state.message_id
    assert {one.address: one.state for one in state.recipients} == dict.fromkeys(
        ("ann@d.example", "bob@d.example", "archive@d.example"), "delivered"
    )
    assert client.receipt(sent.key).messages == [state]
    message = arrived(peer, sent.id)
    assert message["Subject"] == "Ihre Rechnung №1" and "archive" not in str(message["To"]) and message["Bcc"] is None
    files = {part.get_filename(): part.get_content() for part in message.walk() if part.get_filename()}
    assert files == {file.name: file.read_bytes(), "logo.png": b"\x89PNG"}


def test_the_same_key_sends_nothing_twice(client: Client, peer: FakeMx) -> None:
    first = client.send(key="order 17".replace(" ", "/"), from_="a@shop.example", to="c@d.example", text="one")
    again = client.send(key="order/17", from_="a@shop.example", to="c@d.example", text="one")
    assert again.replayed and again.id == first.id and client.receipt("order/17").messages[0].id == first.id
    with pytest.raises(Problem) as found:
        client.send(key="order/17", from_="a@shop.example", to="c@d.example", text="two")
    assert found.value.status == 422 and found.value.argument == "Idempotency-Key" and found.value.key == "order/17"
    arrived(peer, first.id)
    assert sum(f" id {first.id}".encode() in data for _, _, data in peer.messages) == 1


def test_a_check_sends_nothing_and_says_what_would_be(client: Client, relay: Injecting) -> None:
    found = client.check(from_="a@shop.example", to=["checked@d.example"], text="hello")
    assert found.valid and found.recipients[0].status == "accepted" and found.recipients[0].route == "smarthost"
    with pytest.raises(Problem) as problem:
        client.check(from_="a@shop.example", to=["nobody"], text="hello")
    assert problem.value.argument == "to[0]"
    client.send(from_="a@shop.example", to="c@d.example", text="hello")
    wait_for(lambda: relay.events("queued"))
    assert b"checked@d.example" not in relay.log.read_bytes()


def test_messages_as_they_are(client: Client, peer: FakeMx, tmp_path: Path) -> None:
    raw = b"From: a@shop.example\nTo: c@d.example\nBcc: d@d.example\nSubject: raw\n\nhello\n"
    made = email.message_from_bytes(raw)
    (tmp_path / "m.eml").write_bytes(raw)
    for one in (raw, made, tmp_path / "m.eml"):
        sent = client.send_raw(one)
        assert [row.address for row in sent.messages[0].recipients] == ["c@d.example", "d@d.example"]
        message = arrived(peer, sent.id)
        assert message["Subject"] == "raw" and message["Bcc"] is None
    sent = client.send_raw(raw, sender="", to=["x@d.example"], tags=["a", "b"], priority="bulk")
    state = client.message(sent.id)
    assert state.sender == "" and state.tags == ["a", "b"] and [one.address for one in state.recipients] == ["x@d.example"]


def test_a_message_for_later(client: Client) -> None:
    at = datetime.now(UTC) + timedelta(days=1)
    for sent in (
        client.send(from_="a@shop.example", to="c@d.example", text="later", send_at=at),
        client.send_raw(b"From: a@shop.example\n\nlater\n", to=["c@d.example"], send_at=at),
    ):
        assert client.message(sent.id).recipients[0].state == "scheduled"


def test_errors_are_exceptions_with_the_problem(client: Client, relay: Injecting) -> None:
    clear, secure = f"http://127.0.0.1:{relay.http}", f"https://localhost:{relay.https}"
    for do, status in (
        (lambda: client.message("1ZZZZZZZZZZZZ"), 404), (lambda: client.message("a/b?c"), 404),
        (lambda: client.receipt("never"), 404),
        (lambda: client.send(from_="a@shop.example", text="x"), 422),
        (lambda: Client(clear, "shop", "wrong", patience=0).send(from_="a@shop.example", to="c@d.example", text="x"), 401),
        (lambda: Client(secure, context=relay.context, patience=0).message("1ZZZZZZZZZZZZ"), 401),
    ):  # fmt: skip
        with pytest.raises(Problem) as found:
            do()
        assert found.value.status == status and isinstance(found.value, Failed) and found.value.detail
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        Client(secure, "shop", "secret", patience=0).message("1ZZZZZZZZZZZZ")


def test_large_files_are_in_the_memory_of_neither(client: Client, peer: FakeMx, tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    with file.open("wb") as writing:
        writing.truncate(24 << 20)
    tracemalloc.start()
    try:
        sent = client.send(from_="a@shop.example", to="c@d.example", text="large", attachments=[file])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent.complete and most < 4 << 20, most
    (part,) = [part for part in arrived(peer, sent.id).walk() if part.get_filename()]
    assert part.get_payload(decode=True) == bytes(24 << 20)


def test_a_request_that_comes_with_the_end_of_the_handshake_is_read_in_its_order(relay: Injecting) -> None:
    """The first of a connection over TLS comes in pieces, some before the session has begun."""
    for number in range(12):
        with Client(f"https://localhost:{relay.https}", "shop", "secret", context=relay.context, patience=0) as client:
            assert client.send(from_="a@shop.example", to="c@d.example", text=f"{number}\n" * 100_000).complete


def test_an_answer_before_the_whole_body_is_the_answer(relay: Injecting, tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    with file.open("wb") as writing:
        writing.truncate(200 << 20)
    with Client(f"http://127.0.0.1:{relay.http}", "shop", "secret", patience=0) as client:
        with pytest.raises(Problem) as found:
            client.send(from_="a@shop.example", to="c@d.example", text="large", attachments=[file])
        assert found.value.status == 413
        assert client.send(from_="a@shop.example", to="c@d.example", text="small").complete


def test_a_relay_that_is_killed_meanwhile_gets_it_once(tmp_path: Path) -> None:
    """The message that was accepted just before is not sent again, and one while nobody listens arrives."""
    with FakeMx({}) as peer, Injecting(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        with Client(f"http://127.0.0.1:{relay.http}", "shop", "secret", patience=90) as client:
            first = client.send(key="one", from_="a@shop.example", to="c@d.example", text="one")
            relay.kill()
            relay.start()
            again = client.send(key="one", from_="a@shop.example", to="c@d.example", text="one")
            assert again.replayed and again.id == first.id
            arrived(peer, first.id)
