"""What the supervisor keeps for all workers: site states on a failing disk, and OAuth tokens that are exchanged once."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from relaymta.config import OAuth
from relaymta.errors import StoreError
from relaymta.log import Log
from relaymta.node import SUSPENDED, TOKEN, SiteState, SiteStates, Store
from relaymta.send.oauth import Exchanges, TokenError, Tokens
from relaymta.shm import Shared
from relaymta.supervisor import machine as module
from relaymta.supervisor.machine import Machine
from tests.queue.test_queue import until
from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx
from tests.support.routed import Routed, server_context
from tests.support.token_server import TokenServer


class Family(TokenServer):
    """A token endpoint that rotates refresh tokens, takes each only once, and revokes all when one comes again. For one request
    of all it waits `slow` seconds."""

    def __init__(self, slow: float = 0.3) -> None:
        self.next = 1
        self.asked: list[str] = []
        self.together = self.most = 0
        self._slow = slow
        super().__init__()

    def answer(self, form: dict[str, list[str]]) -> tuple[int, dict[str, object]]:
        self.together += 1
        self.most = max(self.most, self.together)
        given = form["refresh_token"][0]
        self.asked.append(given)
        good = given == f"r{self.next}"
        self.next = self.next + 1 if good else 10**6
        time.sleep(self._slow)
        self.together -= 1
        answer = {"access_token": f"t{self.next}", "refresh_token": f"r{self.next}", "expires_in": 3600}
        return (200, answer) if good else (400, {"error": "invalid_grant"})


@pytest.fixture
def family() -> Iterator[Family]:
    made = Family()
    yield made
    made.server.shutdown()


def settings(family: Family, folder, scope: str = "smtp") -> OAuth:
    (folder / "refresh").write_text("r1\n")
    return OAuth(token_url=family.url, client_id="app", refresh_token_file=str(folder / "refresh"), scope=scope)


class Kept:
    """A store of refresh tokens."""

    def __init__(self) -> None:
        self.tokens: dict[str, str] = {}

    def get(self, name: str) -> str:
        return self.tokens.get(name, "")

    async def keep(self, name: str, token: str) -> None:
        await asyncio.sleep(0.05)
        self.tokens[name] = token


async def test_workers_and_scopes_share_one_family(tmp_path, family):
    exchanges = Exchanges((kept := Kept()).get, kept.keep)
    workers = [Tokens(exchanges.get) for _ in range(3)]
    one, other = settings(family, tmp_path), settings(family, tmp_path, "imap")
    found = await asyncio.gather(*(worker.get(one) for worker in workers), workers[0].get(other))
    assert found[0] == found[1] == found[2] != found[3]
    assert family.asked == ["r1", "r2"] and family.most == 1
    for worker in workers:  # a host rejects it, for each
        worker.refused(one, found[0])
    assert len({await worker.get(one) for worker in workers}) == 1
    assert family.asked == ["r1", "r2", "r3"]


async def test_a_rotated_token_is_stored_before_it_is_used_and_though_nobody_waits(tmp_path, family):
    kept, order = Kept(), []

    async def keep(name: str, token: str) -> None:
        await kept.keep(name, token)
        order.append("stored")

    exchanges = Exchanges(kept.get, keep)
    asking = asyncio.create_task(exchanges.get(settings(family, tmp_path)))
    asking.add_done_callback(lambda _: order.append("answered"))
    await asking
    await asyncio.sleep(0)
    assert order == ["stored", "answered"]
    gone = asyncio.create_task(exchanges.get(settings(family, tmp_path), "t2"))
    while len(family.asked) < 2:
        await asyncio.sleep(0.01)
    gone.cancel()  # its worker has died
    await exchanges.close()
    assert list(kept.tokens.values()) == ["r3"]


async def test_a_failure_is_the_answer_for_all_who_wait_and_is_not_repeated_at_once(tmp_path, family):
    exchanges = Exchanges((kept := Kept()).get, kept.keep)
    one = settings(family, tmp_path)
    family.next = 7
    found = await asyncio.gather(*(Tokens(exchanges.get).get(one) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(error, TokenError) and "invalid_grant" in str(error) for error in found)
    with pytest.raises(TokenError):
        await exchanges.get(one)
    assert family.asked == ["r1"]


def test_two_workers_do_not_lose_the_family(tmp_path, family):
    (tmp_path / "refresh").write_text("r1\n")
    keys = f'token_url="{family.url}",client_id="app",refresh_token_file="{tmp_path}/refresh",scope="smtp"'
    route = ("out", "d.example", f'hosts=["localhost:$out"],tls="verify",username="me",oauth={{{keys}}}')
    relay = Routed(tmp_path, [route], "delivery.first_retry=0.5", workers=2)
    answer = lambda line: b"235 2.7.0 welcome\r\n"  # noqa: E731
    with FakeMx({}, relay.port_of("out"), tls=server_context(relay.authority), auth=(b"XOAUTH2", answer)) as peer, relay:
        for _ in range(20):
            relay.send()
        wait_for(lambda: len(peer.messages) == 20)
        wait_for(lambda: {event["worker"] for event in relay.events("delivered")} == {0, 1})
        assert family.asked == ["r1"] and relay.events("deferred") == []


class Workers:
    """In place of the slots: what all workers are sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def notify(self, op: str, **args: object) -> None:
        self.sent.append(op)

    def ready(self) -> list[object]:
        return []


@pytest.fixture
def made(tmp_path):
    log = Log(str(tmp_path / "log"), -1)
    one = Machine(tmp_path / "node", Shared.create(), 1, log, Workers(), b"secret")  # type: ignore[arg-type]
    yield one
    log.close()


def suspended(site: str) -> SiteState:
    now = time.time_ns() // 1_000_000
    return SiteState(SUSPENDED, site, "", now, now + 3_600_000, "operator", "")


async def test_a_failing_disk_loses_no_state(made, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WRITE_AGAIN_SECONDS", 0.01)
    write, left = made._store.write, [3]

    def fails(learned, forgotten):
        if left[0]:
            left[0] -= 1
            raise StoreError("the disk is full")
        write(learned, forgotten)

    monkeypatch.setattr(made._store, "write", fails)
    state, gone = suspended("a.example"), suspended("b.example")
    for one in (state, gone):
        made.set_site_state(one, one.key)
    made.set_site_state(None, gone.key)  # in the same batch: the last change holds
    await made._keep_token("name", "secret")
    assert made._kept_token("name") == "secret"
    async with asyncio.timeout(30):
        while made._writing is not None:
            await asyncio.sleep(0.01)
    await made.stop()
    found = SiteStates(Store(tmp_path / "node").load())
    assert found.get(SUSPENDED, "a.example") and not found.get(SUSPENDED, "b.example")
    assert found.get(TOKEN, "name").reply == "secret"
    await until(lambda: (tmp_path / "log").read_text().count("the disk is full") == 1)  # a thread writes it


async def test_workers_get_no_refresh_tokens(made):
    await made._keep_token("name", "secret")
    assert made._slots.sent == [] and made.known_by_workers() == []
    assert [state.reply for state in made.states] == ["secret"]
    await made.stop()


async def test_a_disk_that_stays_bad_does_not_hold_up_the_stop(made, monkeypatch):
    def fails(learned, forgotten):
        raise StoreError("the disk is full")

    monkeypatch.setattr(made._store, "write", fails)
    state = suspended("a.example")
    made.set_site_state(state, state.key)
    async with asyncio.timeout(60):
        await made.stop()


async def test_another_program_reads_the_refresh_token_that_was_rotated_meanwhile(made, tmp_path, family):
    asked = asyncio.create_task(made.token(settings(family, tmp_path).model_dump(), ""))
    while not family.asked:
        await asyncio.sleep(0.01)
    await made.settle()
    ((token,),) = [[state for state in made._store.load() if state.kind == TOKEN]]
    assert token.reply == "r2" and (await asked)[0] == "t2"
    await made.leave()
