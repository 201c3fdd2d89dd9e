"""How often somebody may guess: what a login takes before it is checked, and gives back."""

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.accept import guesses
from relaymta.accept.guesses import WIDER, Guess, Guesses
from relaymta.accept.identity import Identity, Unavailable
from relaymta.accept.logins import Logins
from relaymta.accept.passwords import Checker, argon2id, scram
from relaymta.config import AccountsTable, Config
from relaymta.metrics import Counters
from relaymta.proto.sasl import Password, Proof, Token
from relaymta.shm import Shared

HERE = "192.0.2.1"
EXPIRED = '{{ hash = "{}", expires = 2020-01-01T00:00:00Z }}'


class Events(list[dict[str, Any]]):
    """A log that remembers."""

    def event(self, name: str, **fields: Any) -> None:
        self.append({"event": name, **fields})


class BackEnd:
    """Knows passwords as `answer(user, password, address)` says, when `gate` is open."""

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


class House:
    """The logins of one machine, one Logins for each worker, before one back end."""

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
        made._others = self.back_end if made._others is not None else None  # type: ignore[assignment]
        made.watched.refresh()
        return made

    async def login(self, user: str, password: str, address: str = HERE, worker: int = 0) -> int:
        """The reply's code."""
        _, answer = await self.workers[worker].check(Password(user, password), address)
        return int(answer[:3])

    def left(self) -> tuple[int, int]:
        """How many failures count, and how many logins under way, of all whom these tests know."""
        rates, limits = self.shared.client_rates(2), self.shared.limits(0, 2)
        guesses = self.workers[0]._guesses
        keys = [f"login from {HERE}", *(guesses._key(user) for user in ("ann", "bob"))]
        return max(math.ceil(rates.used(key, 1 / 60)) for key in keys), sum(limits.taken(key) for key in keys)


def right(user: str, password: str, address: str) -> Identity | None:
    return Identity(user) if password == "right" else None


@pytest.mark.parametrize("workers", [1, 2])
async def test_right_logins_of_one_address_all_at_once_are_all_heard(tmp_path, workers):
    house = House(tmp_path, right)
    house.back_end.gate.clear()
    going = [asyncio.create_task(house.login("ann", "right", worker=n % workers)) for n in range(12)]
    await asyncio.sleep(0.01)
    assert house.back_end.most == 3  # each of them might be wrong
    house.back_end.gate.set()
    assert await asyncio.gather(*going) == [235] * 12
    assert house.back_end.most == 3 and house.left() == (0, 0)


@pytest.mark.parametrize("workers", [1, 2])
async def test_of_wrong_logins_all_at_once_no_more_reach_the_back_end_than_may_fail(tmp_path, workers):
    house = House(tmp_path, right)
    house.back_end.gate.clear()
    going = [asyncio.create_task(house.login("ann", f"wrong {n}", worker=n % workers)) for n in range(40)]
    await asyncio.sleep(0.01)
    house.back_end.gate.set()
    codes = await asyncio.gather(*going)
    assert (codes.count(535), codes.count(454), len(house.back_end.asked)) == (3, 37, 3)
    assert await house.login("ann", "right") == 454  # too late
    assert house.left()[1] == 0


async def test_right_ones_among_wrong_ones_cost_nothing(tmp_path):
    house = House(tmp_path, right)
    assert [await house.login("ann", word) for word in ("wrong", "right", "right", "wrong", "right", "wrong")] == [
        535, 235, 235, 535, 235, 535,
    ]  # fmt: skip
    assert await house.login("ann", "right") == 454


async def test_passwords_of_the_file_are_heard_all_at_once_too(tmp_path):
    file = f'[[account]]\nname = "ann"\nsecrets = [{{ hash = "{argon2id("right")}" }}]\n'
    house = House(tmp_path, right, file, url="")
    assert await asyncio.gather(*(house.login("ann", "right") for _ in range(12))) == [235] * 12
    codes = await asyncio.gather(*(house.login("ann", "wrong") for _ in range(9)))
    assert (codes.count(535), codes.count(454)) == (3, 6)


@pytest.mark.parametrize("how", ["unavailable", "cancelled", "a mistake"])
async def test_what_could_not_be_checked_was_no_guess(tmp_path, how):
    def fails(user: str, password: str, address: str) -> Identity | None:
        raise Unavailable("away") if how == "unavailable" else ZeroDivisionError

    house = House(tmp_path, fails)
    for _ in range(9):
        house.back_end.gate.clear()
        going = asyncio.create_task(house.login("ann", "x"))
        await asyncio.sleep(0)
        assert house.left() == (1, 2)  # of the address, and of the account
        if how == "cancelled":
            going.cancel()
        house.back_end.gate.set()
        (found,) = await asyncio.gather(going, return_exceptions=True)
        assert found == 454 if how == "unavailable" else isinstance(found, BaseException)
        assert house.left() == (0, 0)


async def test_who_waits_long_looks_seldom(tmp_path, monkeypatch):
    """Thousands of connections that waited looked ten times a second each, and left no time for others."""
    house = House(tmp_path, right)
    house.back_end.gate.clear()
    first = [asyncio.create_task(house.login("ann", "right")) for _ in range(3)]
    await asyncio.sleep(0.01)
    pauses: list[float] = []

    async def wait(futures: list[Any], timeout: float) -> None:
        pauses.append(timeout)
        if len(pauses) == 10:
            house.back_end.gate.set()
        await asyncio.sleep(0.01)

    monkeypatch.setattr(guesses, "asyncio", SimpleNamespace(**{**vars(asyncio), "wait": wait}))
    assert await house.login("ann", "right") == 235
    assert pauses[0] == guesses.LOOK_AGAIN and sum(pauses[:10]) > 10
    assert await asyncio.gather(*first) == [235] * 3


async def test_who_is_gone_while_waiting_for_a_turn_leaves_nothing(tmp_path):
    house = House(tmp_path, right)
    house.back_end.gate.clear()
    going = [asyncio.create_task(house.login("ann", "right")) for _ in range(8)]
    await asyncio.sleep(0.01)
    for task in going[3:6]:
        task.cancel()
    house.back_end.gate.set()
    codes = await asyncio.gather(*going, return_exceptions=True)
    assert [code for code in codes if isinstance(code, int)] == [235] * 5
    guesses = house.workers[0]._guesses
    assert house.left() == (0, 0) and not guesses._waiting and not guesses._here


async def test_ending_twice_gives_back_once(tmp_path):
    house = House(tmp_path, right)
    guesses = house.workers[0]._guesses
    first, second = await guesses.begin("ann", HERE, 9), await guesses.begin("ann", HERE, 9)
    assert isinstance(first, Guess) and isinstance(second, Guess)
    first.end(False)
    first.end(False)
    first.end(True)
    assert house.left() == (1, 2)


async def test_one_ipv6_site_has_a_limit_beside_that_of_each_64(tmp_path):
    house = House(tmp_path, right)
    tried = [await house.login(f"user{n}", "wrong", f"2001:db8:1:{n:x}::1") for n in range(3 * WIDER + 5)]
    assert tried == [535] * (3 * WIDER) + [454] * 5
    assert await house.login("ann", "right", "2001:db8:2::1") == 235


async def test_a_site_does_not_fill_the_queue_of_passwords(tmp_path):
    file = f'[[account]]\nname = "ann"\nsecrets = [{{ hash = "{argon2id("right")}" }}]\n'
    house = House(tmp_path, right, file, url="", failures=1000)
    waits = 0

    async def run(check: Callable[[], bool], failures: int) -> bool:
        nonlocal waits
        waits += 1
        await asyncio.sleep(3600)
        return False

    house.checker.run = run  # type: ignore[method-assign]
    going = [asyncio.create_task(house.login("x", "x", f"2001:db8:1:{n:x}::1")) for n in range(100)]
    await asyncio.sleep(0.05)
    assert waits == 3 * WIDER
    for task in going:
        task.cancel()


async def test_who_attacks_one_account_locks_no_other(tmp_path):
    house = House(tmp_path, right)
    for n in range(200):  # from everywhere, until ann is heard only from where nobody has failed
        await house.login("ann", "wrong", f"198.51.100.{n}")
    assert await house.login("ann", "right", "198.51.100.7") == 454
    others = [f"user{n}" for n in range(150)]
    assert [await house.login(user, "right", f"198.51.100.{n}") for n, user in enumerate(others)] == [235] * 150


@pytest.mark.parametrize("name", ["ANN", "ann ", " Ann", "\uff21\uff2e\uff2e", "ann@corp.example"])
async def test_another_way_to_say_a_name_is_the_same_account(tmp_path, name):
    """By the back end's word: it is limited, logged and charged as that."""

    def answer(user: str, password: str, address: str) -> Identity | None:
        return Identity("ann") if password == "right" else None

    house = House(tmp_path, answer, '[[account]]\nname = "ann"\nmessages = "5/m"\nsenders = ["ann@corp.example"]\n')
    who, _ = await house.workers[0].check(Password(name, "right"), HERE)
    assert who is not None and (who.name, who.quotas, who.senders) == ("ann", {"messages": "5/m"}, ("ann@corp.example",))
    assert house.events[-1]["user"] == "ann"
    for n in range(3):
        await house.login(name, "wrong", f"198.51.100.{n}")
    assert await house.login("ann", "right", "198.51.100.1") == 454  # under attack, and from where somebody has failed


@pytest.mark.parametrize("name", ["ANN", "ann ", " Ann", "\uff21\uff2e\uff2e"])
async def test_guesses_by_another_spelling_are_guesses_of_the_same_account(tmp_path, name):
    """Before the back end has said a word about it, too."""
    house = House(tmp_path, right)
    for n in range(3):
        await house.login(name, "wrong", f"198.51.100.{n}")
    assert await house.login("ann", "right", "198.51.100.1") == 454
    assert await house.login("ann", "right", "198.51.100.99") == 235


async def test_a_back_end_that_overlooks_case_makes_nobody_a_second_account(tmp_path):
    house = House(tmp_path, right, '[[account]]\nname = "ann"\nmessages = "5/m"\n')
    for name in ("ANN", "ann "):
        who, _ = await house.workers[0].check(Password(name, "right"), HERE)
        assert who is not None and who.name == "ann" and who.quotas == {"messages": "5/m"}


@pytest.mark.parametrize("name", ["ann", "ANN", "ann "])
async def test_an_account_whose_keys_have_expired_is_not_for_a_back_end(tmp_path, name):
    kept = EXPIRED.format(argon2id("right"))
    house = House(tmp_path, right, f'[[account]]\nname = "ann"\nsecrets = [{kept}]\n', remember=60)
    assert [await house.login(name, "right"), await house.login("bob", "right")] == [535, 235]
    assert (name in {user for user, _, _ in house.back_end.asked}) == (name != "ann")  # which it may call somebody else


async def test_an_account_whose_keys_have_expired_is_for_no_token_either(tmp_path):
    kept, alive = EXPIRED.format(argon2id("right")), f'{{ hash = "{argon2id("right")}" }}'
    file = "".join(f'[[account]]\nname = "{n}"\nsecrets = [{s}]\n' for n, s in (("ann", kept), ("bob", f"{kept}, {alive}")))
    house = House(tmp_path, right, file)

    async def user(token: str) -> str:
        return token

    house.workers[0]._bearer = SimpleNamespace(user=user)  # type: ignore[assignment]
    codes = [(await house.workers[0].check(Token("", name), HERE))[1][:3] for name in ("ann", "bob", "cat")]
    assert codes == [b"535", b"235", b"235"]


async def test_a_remembered_login_holds_for_the_address_that_made_it(tmp_path):
    def answer(user: str, password: str, address: str) -> Identity | None:
        return Identity(user) if address == "127.0.0.2" else None

    house = House(tmp_path, answer, remember=60)
    where = ["127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.1"]
    assert [await house.login("ann", "right", address) for address in where] == [535, 235, 235, 535]
    assert len(house.back_end.asked) == 3


@pytest.mark.parametrize("name", ["a\r\nb", "a\x00", "\x1b[2J", ""])
async def test_nobody_is_called_what_cannot_be_shown(tmp_path, name):
    house = House(tmp_path, lambda user, password, address: Identity(name))
    assert await house.login("ann", "right") == 535


async def test_scram_is_limited_before_anybody_hears_whether_it_was_right(tmp_path):
    house = House(tmp_path, right, f'[[account]]\nname = "ann"\nsecrets = [{{ hash = "{argon2id("right")}" }}]\n')
    codes = [(await house.workers[0].check(Proof("ann", good), HERE))[1][:3] for good in (False, False, False, True)]
    assert codes == [b"535", b"535", b"535", b"454"]


def test_a_table_that_is_full_gives_back_what_it_gave(tmp_path):
    shared = Shared.create()
    guesses = Guesses(AccountsTable(file="x", failures=1), b"secret", shared.client_rates(1), shared.limits(0, 1))
    for number in range(5000):  # more addresses and names than there are rows
        found = guesses._reserved(f"user{number}", f"10.0.{number >> 8}.{number & 255}", 3)
        assert isinstance(found, Guess)
        found.end(False)
    again = guesses._reserved("user4999", "10.0.19.135", 3)
    assert isinstance(again, Guess)


@pytest.mark.parametrize(
    ("secrets", "offered"),
    [
        ([("a", None)], True),
        ([("a", None), ("a", 1)], True),  # as `app rotate` makes them
        ([("a", None), ("b", 1)], False),  # another salt: the server cannot know which key the client has
        ([("a", None), ("b", -1)], True),
        ([("a", 1), ("b", 1)], False),
        ([("a", None), ("argon2id", -1)], True),
        ([("a", None), ("argon2id", 1)], False),
        ([("argon2id", None)], False),
        ([], False),
    ],
)
async def test_scram_is_offered_while_one_salt_is_for_all(tmp_path, secrets, offered):
    salts = {"a": b"a" * 16, "b": b"b" * 16}
    rows = []
    for number, (kind, hours) in enumerate(secrets):
        hashed = scram(f"key {number}", 4096, salts[kind]) if kind in salts else argon2id(f"key {number}")
        until = f", expires = {(datetime.now(UTC) + timedelta(hours=hours)).isoformat()}" if hours else ""
        rows.append(f'{{ hash = "{hashed}"{until} }}')
    house = House(tmp_path, right, f'[[account]]\nname = "shop"\nsecrets = [{", ".join(rows)}]\n', url="")
    assert ("SCRAM-SHA-256" in house.workers[0].mechanisms) == offered
    alive = [number for number, (kind, hours) in enumerate(secrets) if hours != -1]
    if offered:
        keys = house.workers[0].keys("shop")
        assert len(keys.others) == len(alive) - 1
