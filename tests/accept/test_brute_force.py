"""Login limits: what an attempt takes before it is checked, and gives back."""

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.auth import brute_force
from relaymta.auth.brute_force import WIDER, LoginAttempt, LoginLimits
from relaymta.auth.identity import Identity, Unavailable
from relaymta.auth.logins import Logins
from relaymta.auth.passwords import Checker, argon2id, scram
from relaymta.config import AccountsTable, Config
from relaymta.metrics import Counters
from relaymta.proto.sasl import Password, Proof, Token
from relaymta.shm import ROWS, Shared

HERE = "192.0.2.1"
EXPIRED = '{{ hash = "{}", expires = 2020-01-01T00:00:00Z }}'


class Events(list[dict[str, Any]]):
    """A log that records its events."""

    def event(self, name: str, **fields: Any) -> None:
        self.append({"event": name, **fields})


class BackEnd:
    """A back end that answers as `answer(user, password, address)` says, once `gate` is open."""

    def __init__(self, answer: Callable[[str, str, str], Identity | None]) -> None:
        self.answer = answer
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[tuple[str, str, str]] = []
        self.at_once = self.most = 0
        self.names: dict[str, str] = {}

    async def password(self, user: str, password: str, address: str) -> Identity | None:
        self.asked.append((user, password, address))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            found = self.answer(user, password, address)
        finally:
            self.at_once -= 1
        if found is not None and found.name != user:
            self.names[user] = found.name
        return found


class Bench:
    """The login verification of one machine: one Logins for each of two workers, and one back end."""

    def __init__(self, folder: Path, answer: Callable[[str, str, str], Identity | None], file: str = "", **settings: Any) -> None:
        (folder / "secret").write_bytes(bytes(range(32)))
        if file:
            (folder / "accounts.toml").write_text(file)
            settings["file"] = str(folder / "accounts.toml")
        self.shared = Shared.create()
        self.back_end = BackEnd(answer)
        self.events = Events()
        table = AccountsTable(**({"url": "http://127.0.0.1:1/", "failures": 3, "remember": 0, "answer_after": 0} | settings))
        self.config = Config.model_construct(spool=str(folder), accounts=table)
        self.checker = Checker()
        self.workers = [self._worker(slot) for slot in range(2)]

    def _worker(self, slot: int) -> Logins:
        rates, limits = self.shared.client_rates(2), self.shared.limits(slot, 2)
        counters: Any = Counters(self.shared.counters(slot))
        made = Logins(self.config, self.checker, rates, limits, counters, self.events)  # type: ignore[arg-type]
        made._back_end = self.back_end if made._back_end is not None else None  # type: ignore[assignment]
        made.watched.refresh()
        return made

    async def login(self, user: str, password: str, address: str = HERE, worker: int = 0) -> int:
        """The code of the reply to a login."""
        _, answer = await self.workers[worker].check(Password(user, password), address)
        return int(answer[:3])

    def left(self) -> tuple[int, int]:
        """The failures, and the units that attempts under way hold, of the addresses and accounts of these tests."""
        rates, limits = self.shared.client_rates(2), self.shared.limits(0, 2)
        login_limits = self.workers[0]._login_limits
        keys = [f"login from {HERE}", *(login_limits._key(user) for user in ("ann", "bob"))]
        return max(math.ceil(rates.used(key, 1 / 60)) for key in keys), sum(limits.taken(key) for key in keys)


def right(user: str, password: str, address: str) -> Identity | None:
    return Identity(user) if password == "right" else None


@pytest.mark.parametrize("workers", [1, 2])
async def test_right_logins_of_one_address_all_at_once_are_all_accepted(tmp_path, workers):
    bench = Bench(tmp_path, right)
    bench.back_end.gate.clear()
    logins = [asyncio.create_task(bench.login("ann", "right", worker=n % workers)) for n in range(12)]
    async with asyncio.timeout(60):
        while bench.back_end.most < 3:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    assert bench.back_end.most == 3  # each of them might fail
    bench.back_end.gate.set()
    assert await asyncio.gather(*logins) == [235] * 12
    assert bench.back_end.most == 3 and bench.left() == (0, 0)


@pytest.mark.parametrize("workers", [1, 2])
async def test_of_wrong_logins_all_at_once_no_more_reach_the_back_end_than_may_fail(tmp_path, workers):
    bench = Bench(tmp_path, right)
    bench.back_end.gate.clear()
    logins = [asyncio.create_task(bench.login("ann", f"wrong {n}", worker=n % workers)) for n in range(40)]
    await asyncio.sleep(0.01)
    bench.back_end.gate.set()
    codes = await asyncio.gather(*logins)
    assert (codes.count(535), codes.count(454), len(bench.back_end.asked)) == (3, 37, 3)
    assert await bench.login("ann", "right") == 454  # the limit is reached
    assert bench.left()[1] == 0


async def test_right_logins_among_wrong_ones_take_nothing_from_the_limits(tmp_path):
    bench = Bench(tmp_path, right)
    assert [await bench.login("ann", word) for word in ("wrong", "right", "right", "wrong", "right", "wrong")] == [
        535, 235, 235, 535, 235, 535,
    ]  # fmt: skip
    assert await bench.login("ann", "right") == 454


async def test_right_passwords_of_the_file_all_at_once_are_all_accepted_too(tmp_path):
    file = f'[[account]]\nname = "ann"\nsecrets = [{{ hash = "{argon2id("right")}" }}]\n'
    bench = Bench(tmp_path, right, file, url="")
    assert await asyncio.gather(*(bench.login("ann", "right") for _ in range(12))) == [235] * 12
    codes = await asyncio.gather(*(bench.login("ann", "wrong") for _ in range(9)))
    assert (codes.count(535), codes.count(454)) == (3, 6)


@pytest.mark.parametrize("how", ["unavailable", "cancelled", "an error"])
async def test_an_attempt_that_could_not_be_checked_is_no_failure(tmp_path, how):
    def fails(user: str, password: str, address: str) -> Identity | None:
        raise Unavailable("away") if how == "unavailable" else ZeroDivisionError

    bench = Bench(tmp_path, fails)
    for _ in range(9):
        bench.back_end.gate.clear()
        attempt = asyncio.create_task(bench.login("ann", "x"))
        await asyncio.sleep(0)
        assert bench.left() == (0, 2)  # one of the address, one of the account
        if how == "cancelled":
            attempt.cancel()
        bench.back_end.gate.set()
        (found,) = await asyncio.gather(attempt, return_exceptions=True)
        assert found == 454 if how == "unavailable" else isinstance(found, BaseException)
        assert bench.left() == (0, 0)


async def test_waiting_attempts_poll_less_and_less_often(tmp_path, monkeypatch):
    """Thousands of waiting attempts that poll ten times a second each would take all CPU time."""
    bench = Bench(tmp_path, right)
    bench.back_end.gate.clear()
    first = [asyncio.create_task(bench.login("ann", "right")) for _ in range(3)]
    await asyncio.sleep(0.01)
    pauses: list[float] = []

    async def wait(futures: list[Any], timeout: float) -> None:
        pauses.append(timeout)
        if len(pauses) == 10:
            bench.back_end.gate.set()
        await asyncio.sleep(0.01)

    monkeypatch.setattr(brute_force, "asyncio", SimpleNamespace(**{**vars(asyncio), "wait": wait}))
    assert await bench.login("ann", "right") == 235
    assert pauses[0] == brute_force.POLL_FIRST and sum(pauses[:10]) > 10
    assert await asyncio.gather(*first) == [235] * 3


async def test_an_attempt_cancelled_while_it_waits_leaves_nothing(tmp_path):
    bench = Bench(tmp_path, right)
    bench.back_end.gate.clear()
    logins = [asyncio.create_task(bench.login("ann", "right")) for _ in range(8)]
    await asyncio.sleep(0.01)
    for task in logins[3:6]:
        task.cancel()
    bench.back_end.gate.set()
    codes = await asyncio.gather(*logins, return_exceptions=True)
    assert [code for code in codes if isinstance(code, int)] == [235] * 5
    login_limits = bench.workers[0]._login_limits
    assert bench.left() == (0, 0) and not login_limits._waiting and not login_limits._under_way


async def test_ending_twice_gives_back_once(tmp_path):
    bench = Bench(tmp_path, right)
    login_limits = bench.workers[0]._login_limits
    first, second = await login_limits.begin("ann", HERE, 9), await login_limits.begin("ann", HERE, 9)
    assert isinstance(first, LoginAttempt) and isinstance(second, LoginAttempt)
    first.end(False)
    first.end(False)
    first.end(True)
    assert bench.left() == (0, 2)
    second.end(True)
    second.end(True)
    assert bench.left() == (1, 0)


async def test_attempts_of_a_worker_that_was_killed_are_no_failures(tmp_path):
    """Webmail logs in all of its users from one address."""
    bench = Bench(tmp_path, right)
    silent = bench.workers[1]._back_end = BackEnd(right)  # type: ignore[assignment]
    silent.gate.clear()
    lost = [asyncio.create_task(bench.login("ann", "right", worker=1)) for _ in range(3)]
    waiting = asyncio.create_task(bench.login("ann", "right"))
    await asyncio.sleep(0.01)
    assert silent.at_once == 3 and not waiting.done()
    bench.shared.clear_limits(1)  # as the supervisor does
    assert await waiting == 235
    assert await bench.login("bob", "right") == 235
    for one in lost:
        one.cancel()


async def test_two_workers_never_let_more_attempts_begin_than_may_fail(tmp_path):
    bench = Bench(tmp_path, right)
    bench.back_end.gate.clear()
    tried = [asyncio.create_task(bench.login("ann", "wrong", worker=n % 2)) for n in range(10)]
    await asyncio.sleep(0.01)
    assert bench.back_end.at_once == 3
    bench.back_end.gate.set()
    assert sorted(await asyncio.gather(*tried)) == [454] * 7 + [535] * 3
    assert len(bench.back_end.asked) == 3


async def test_where_the_table_of_limits_is_full_each_worker_has_its_share(tmp_path):
    """Each session of a user has a row of it. A share is one unit at least, so the last one may be taken by each."""
    bench = Bench(tmp_path, right)
    others = bench.shared.limits(2, 2)
    for number in range(30 * ROWS):
        others.take(f"imap {number}", 9)
    bench.back_end.gate.clear()
    tried = [asyncio.create_task(bench.login("ann", "wrong", worker=n % 2)) for n in range(10)]
    await asyncio.sleep(0.01)
    assert 1 <= bench.back_end.at_once <= 3
    bench.back_end.gate.set()
    codes = await asyncio.gather(*tried)
    assert 3 <= codes.count(535) <= 4 and codes.count(535) + codes.count(454) == 10


async def test_an_attempt_that_met_another_ones_is_not_refused(tmp_path):
    """Each has seen the other, and none has the last unit: that is not used up."""
    bench = Bench(tmp_path, right, failures=1)
    other, limits = bench.shared.limits(1, 2), bench.workers[0]._login_limits._limits
    met: list[str] = []

    class Met:
        def taken(self, key: str) -> int:
            if key in met:
                return limits.taken(key)
            met.append(key)
            other.take(key, 1 << 30)
            found = limits.taken(key)
            other.give(key)
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(limits, name)

    bench.workers[0]._login_limits._limits = Met()  # type: ignore[assignment]
    assert await bench.login("ann", "right") == 235
    assert met and bench.left() == (0, 0)


async def test_one_ipv6_site_has_a_limit_beside_that_of_each_64(tmp_path):
    bench = Bench(tmp_path, right)
    tried = [await bench.login(f"user{n}", "wrong", f"2001:db8:1:{n:x}::1") for n in range(3 * WIDER + 5)]
    assert tried == [535] * (3 * WIDER) + [454] * 5
    assert await bench.login("ann", "right", "2001:db8:2::1") == 235


async def test_a_site_does_not_fill_the_queue_of_passwords(tmp_path):
    file = f'[[account]]\nname = "ann"\nsecrets = [{{ hash = "{argon2id("right")}" }}]\n'
    bench = Bench(tmp_path, right, file, url="", failures=1000)
    waits = 0

    async def run(check: Callable[[], bool], failures: int) -> bool:
        nonlocal waits
        waits += 1
        await asyncio.sleep(3600)
        return False

    bench.checker.run = run  # type: ignore[method-assign]
    logins = [asyncio.create_task(bench.login("x", "x", f"2001:db8:1:{n:x}::1")) for n in range(100)]
    await asyncio.sleep(0.05)
    assert waits == 3 * WIDER
    for task in logins:
        task.cancel()


async def test_an_attack_on_one_account_locks_no_other(tmp_path):
    bench = Bench(tmp_path, right)
    for n in range(200):  # from many addresses, until ann can log in only from addresses without failures
        await bench.login("ann", "wrong", f"198.51.100.{n}")
    assert await bench.login("ann", "right", "198.51.100.7") == 454
    others = [f"user{n}" for n in range(150)]
    assert [await bench.login(user, "right", f"198.51.100.{n}") for n, user in enumerate(others)] == [235] * 150


@pytest.mark.parametrize("name", ["ANN", "ann ", " Ann", "\uff21\uff2e\uff2e", "ann@corp.example"])
async def test_another_spelling_of_a_name_is_the_same_account(tmp_path, name):
    """Where the back end says so: it is limited, logged and charged as that account."""

    def answer(user: str, password: str, address: str) -> Identity | None:
        return Identity("ann") if password == "right" else None

    bench = Bench(tmp_path, answer, '[[account]]\nname = "ann"\nmessages = "5/m"\nsenders = ["ann@corp.example"]\n')
    who, _ = await bench.workers[0].check(Password(name, "right"), HERE)
    assert who is not None and (who.name, who.quotas, who.senders) == ("ann", {"messages": "5/m"}, ("ann@corp.example",))
    assert bench.events[-1]["user"] == "ann"
    for n in range(3):
        await bench.login(name, "wrong", f"198.51.100.{n}")
    assert await bench.login("ann", "right", "198.51.100.1") == 454  # the account is under attack, and this address has failed


@pytest.mark.parametrize("name", ["ANN", "ann ", " Ann", "\uff21\uff2e\uff2e"])
async def test_failures_under_another_spelling_count_for_the_same_account(tmp_path, name):
    """Even before the back end has given the account's name."""
    bench = Bench(tmp_path, right)
    for n in range(3):
        await bench.login(name, "wrong", f"198.51.100.{n}")
    assert await bench.login("ann", "right", "198.51.100.1") == 454
    assert await bench.login("ann", "right", "198.51.100.99") == 235


async def test_a_back_end_that_ignores_case_gives_no_second_account(tmp_path):
    bench = Bench(tmp_path, right, '[[account]]\nname = "ann"\nmessages = "5/m"\n')
    for name in ("ANN", "ann "):
        who, _ = await bench.workers[0].check(Password(name, "right"), HERE)
        assert who is not None and who.name == "ann" and who.quotas == {"messages": "5/m"}


@pytest.mark.parametrize("name", ["ann", "ANN", "ann "])
async def test_an_account_whose_keys_have_expired_is_not_verified_by_a_back_end(tmp_path, name):
    kept = EXPIRED.format(argon2id("right"))
    bench = Bench(tmp_path, right, f'[[account]]\nname = "ann"\nsecrets = [{kept}]\n', remember=60)
    assert [await bench.login(name, "right"), await bench.login("bob", "right")] == [535, 235]
    assert (name in {user for user, _, _ in bench.back_end.asked}) == (name != "ann")  # a name that it may map to another user


async def test_an_account_whose_keys_have_expired_accepts_no_token_either(tmp_path):
    kept, alive = EXPIRED.format(argon2id("right")), f'{{ hash = "{argon2id("right")}" }}'
    file = "".join(f'[[account]]\nname = "{n}"\nsecrets = [{s}]\n' for n, s in (("ann", kept), ("bob", f"{kept}, {alive}")))
    bench = Bench(tmp_path, right, file)

    async def user(token: str) -> str:
        return token

    bench.workers[0]._bearer = SimpleNamespace(user=user)  # type: ignore[assignment]
    codes = [(await bench.workers[0].check(Token("", name), HERE))[1][:3] for name in ("ann", "bob", "cat")]
    assert codes == [b"535", b"235", b"235"]


async def test_a_remembered_login_holds_for_the_address_that_made_it(tmp_path):
    def answer(user: str, password: str, address: str) -> Identity | None:
        return Identity(user) if address == "127.0.0.2" else None

    bench = Bench(tmp_path, answer, remember=60)
    where = ["127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.1"]
    assert [await bench.login("ann", "right", address) for address in where] == [535, 235, 235, 535]
    assert len(bench.back_end.asked) == 3


@pytest.mark.parametrize("name", ["a\r\nb", "a\x00", "\x1b[2J", ""])
async def test_a_user_name_with_control_characters_is_rejected(tmp_path, name):
    bench = Bench(tmp_path, lambda user, password, address: Identity(name))
    assert await bench.login("ann", "right") == 535


async def test_scram_is_limited_before_its_result_is_sent(tmp_path):
    bench = Bench(tmp_path, right, f'[[account]]\nname = "ann"\nsecrets = [{{ hash = "{argon2id("right")}" }}]\n')
    codes = [(await bench.workers[0].check(Proof("ann", good), HERE))[1][:3] for good in (False, False, False, True)]
    assert codes == [b"535", b"535", b"535", b"454"]


def test_a_full_table_still_gives_units_back(tmp_path):
    shared = Shared.create()
    login_limits = LoginLimits(AccountsTable(file="x", failures=1), b"secret", shared.client_rates(1), shared.limits(0, 1))
    for number in range(5000):  # more addresses and names than there are rows
        found = login_limits._reserve(f"user{number}", [(f"10.0.{number >> 8}.{number & 255}", 1)], 3)
        assert isinstance(found, LoginAttempt)
        found.end(False)
    again = login_limits._reserve("user4999", [("10.0.19.135", 1)], 3)
    assert isinstance(again, LoginAttempt)


@pytest.mark.parametrize(
    ("secrets", "offered"),
    [
        ([("a", None)], True),
        ([("a", None), ("a", 1)], True),  # as `app rotate` creates them
        ([("a", None), ("b", 1)], False),  # another salt: the server cannot know which key the client has
        ([("a", None), ("b", -1)], True),
        ([("a", 1), ("b", 1)], False),
        ([("a", None), ("argon2id", -1)], True),
        ([("a", None), ("argon2id", 1)], False),
        ([("argon2id", None)], False),
        ([], False),
    ],
)
async def test_scram_is_offered_while_all_secrets_have_one_salt(tmp_path, secrets, offered):
    salts = {"a": b"a" * 16, "b": b"b" * 16}
    rows = []
    for number, (kind, hours) in enumerate(secrets):
        hashed = scram(f"key {number}", 4096, salts[kind]) if kind in salts else argon2id(f"key {number}")
        until = f", expires = {(datetime.now(UTC) + timedelta(hours=hours)).isoformat()}" if hours else ""
        rows.append(f'{{ hash = "{hashed}"{until} }}')
    bench = Bench(tmp_path, right, f'[[account]]\nname = "shop"\nsecrets = [{", ".join(rows)}]\n', url="")
    assert ("SCRAM-SHA-256" in bench.workers[0].mechanisms) == offered
    alive = [number for number, (kind, hours) in enumerate(secrets) if hours != -1]
    if offered:
        keys = bench.workers[0].keys("shop")
        assert len(keys.others) == len(alive) - 1


async def test_clients_of_unknown_address_are_limited_by_proxy(tmp_path):
    """One proxy's attackers neither lock out another's clients nor the proxy itself, and have no more attempts than a network."""
    bench = Bench(tmp_path, right)

    async def login(user: str, password: str, behind: str, address: str = "0.0.0.0") -> bytes:
        return (await bench.workers[0].check(Password(user, password), address, behind))[1][:3]

    codes = [await login(f"user{number}", "wrong", "10.0.0.1") for number in range(3 * WIDER + 2)]
    assert codes == [b"535"] * 3 * WIDER + [b"454"] * 2
    assert await login("ann", "right", "10.0.0.1") == b"454"
    assert await login("ann", "right", "10.0.0.2") == await login("ann", "right", "", "10.0.0.1") == b"235"
