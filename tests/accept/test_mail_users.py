"""Logins of users whose mail is kept here: their rules hold whoever verifies them, and by whatever name they come."""

from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.auth.identity import Identity
from relaymta.auth.logins import Logins
from relaymta.auth.passwords import PEOPLE_ITERATIONS, argon2id, scram
from relaymta.config.mailboxes import Mailboxes as Settings
from relaymta.metrics import Counters
from relaymta.proto.sasl import Password, Token
from relaymta.store.directory import Directory, User
from relaymta.store.recipients import Recipients
from relaymta.view.access import Access
from tests.accept.test_brute_force import HERE
from tests.accept.test_brute_force import Bench as Base

ALICE = "alice@x.example"
ACCOUNT = '[[account]]\nname = "{}"\n{}secrets = [{{ hash = "{}" }}]\n'


class Bench(Base):
    """As there, with a directory of users whose mail is kept here."""

    def __init__(self, folder, answer=lambda *claim: None, **more):
        self.directory = Directory(folder / "directory", writable=True)
        self.mailboxes: Any = SimpleNamespace(directory=self.directory)
        self.known = Recipients(self.mailboxes, Settings)
        super().__init__(folder, answer, **more)

    def user(self, address, password="", **fields):
        secret = scram(password, PEOPLE_ITERATIONS) if password else ""
        self.directory.add(User(self.directory.next_ident(), address, 0, secret=secret, **fields))

    def alias(self, address, *targets):
        self.directory.set_alias(address, targets, lambda domain: True)

    def _worker(self, slot):
        rates, limits = self.shared.client_rates(2), self.shared.limits(slot, 2)
        counters = Counters(self.shared.counters(slot))
        made = Logins(self.config, self.checker, rates, limits, counters, self.events, self.known.login)  # type: ignore[arg-type]
        made._back_end = self.back_end if made._back_end is not None else None  # type: ignore[assignment]
        made.watched.refresh()
        return made

    async def identity(self, user, password):
        return (await self.workers[0].check(Password(user, password), HERE))[0]

    async def by_token(self, token):
        self.workers[0]._bearer = Bearer()
        return (await self.workers[0].check(Token("", token), HERE))[0]


class Bearer:
    async def user(self, token):
        return token


def right(user, password, address):
    return Identity(user) if password == "right" else None


async def test_a_user_verified_by_the_back_end_has_one_name_and_its_senders(tmp_path):
    bench = Bench(tmp_path, right)
    bench.user(ALICE)
    bench.alias("info@x.example", ALICE)
    for name in (ALICE, "Alice@X.example", "info@x.example"):
        found = await bench.identity(name, "right")
        assert found.name == ALICE and found.may_send_as("info@x.example") and not found.may_send_as("ceo@x.example")
    assert (await bench.identity("other", "right")).senders == ()


async def test_senders_of_the_back_end_and_of_the_account_come_first(tmp_path):
    def answer(user, password, address):
        return Identity(user, senders=("@y.example",))

    bench = Bench(tmp_path, answer, file='[[account]]\nname = "bob@x.example"\nsenders = ["@z.example"]\n')
    bench.user(ALICE)
    bench.user("bob@x.example")
    assert (await bench.identity(ALICE, "right")).senders == ("@y.example",)
    assert (await bench.identity("BOB@x.example", "right")).senders == ("@z.example",)


async def test_a_user_who_logs_in_by_token_has_its_senders_and_a_disabled_one_none(tmp_path):
    bench = Bench(tmp_path, url="")
    bench.user(ALICE)
    bench.user("bob@x.example", disabled=True)
    assert not (await bench.by_token(ALICE)).may_send_as("ceo@x.example")
    assert await bench.by_token("bob@x.example") is None


@pytest.mark.parametrize(("password", "disabled"), [("", True), ("here", True), ("here", False)])
async def test_a_user_who_is_not_the_back_ends_is_none_by_another_name_either(tmp_path, password, disabled):
    def answer(user, password, address):
        return Identity(ALICE) if password == "right" else None

    bench = Bench(tmp_path, answer, remember=60)
    bench.user(ALICE, password, disabled=disabled)
    for name in (ALICE, "alice", "alice"):
        assert await bench.identity(name, "right") is None


async def test_a_disabled_user_is_none_by_the_account_of_the_file_either(tmp_path):
    bench = Bench(tmp_path, url="", file=ACCOUNT.format(ALICE, "", argon2id("file")))
    bench.user(ALICE, disabled=True)
    assert await bench.identity(ALICE, "file") is None


async def tried(folder, names):
    """How many passwords were compared, two from each of many addresses."""
    folder.mkdir()
    bench = Bench(folder, url="")
    bench.user(ALICE, "right")
    for address in ("info@x.example", "sales@x.example", "alice@bücher.example"):
        bench.alias(address, ALICE)
    answers = [await bench.workers[0].check(Password(name, "wrong"), f"192.0.2.{n // 2}") for n, name in enumerate(names)]
    return sum(answer.startswith(b"535") for _, answer in answers)


async def test_the_failure_budget_of_a_user_is_that_of_all_spellings_and_addresses(tmp_path):
    others = ["info@x.example", "sales@x.example", '"alice"@x.example', "ALICE@x.example", "alice@bücher.example"]
    names = [*others, *(f"alice({n})@x.example" for n in range(11))]
    assert await tried(tmp_path / "1", [ALICE] * 16) == await tried(tmp_path / "2", names)


async def test_names_of_nobody_are_counted_in_the_same_way(tmp_path):
    bench = Bench(tmp_path, url="")
    assert {bench.workers[0]._canonical(name) for name in ("no@x.example", '"no"@X.example', "no(1)@x.example")} == {
        "no@x.example"
    }
    assert bench.workers[0]._canonical("App") == "App"


async def test_scram_does_not_tell_who_exists(tmp_path):
    bench = Bench(tmp_path, url="", file=ACCOUNT.format("app", "", scram("key", 4096)))
    bench.user(ALICE, "right")
    keys = bench.workers[0].keys
    for name in (ALICE, "nobody@x.example"):
        found = {(keys(one).salt, keys(one).iterations) for one in (name, name.upper(), name.replace("@", "(x)@"))}
        assert len(found) == 1 and found.pop()[1] == PEOPLE_ITERATIONS
    assert keys("nobody@x.example").salt != keys("nobody@y.example").salt
    assert keys("other").iterations == keys("app").iterations == 4096


@pytest.mark.parametrize("name", [ALICE, "Alice@X.example"])
async def test_an_account_of_the_file_comes_first_however_its_name_is_spelled(tmp_path, name):
    bench = Bench(tmp_path, url="", failures=100, file=ACCOUNT.format(name, 'application = "app"\n', argon2id("file")))
    bench.user(ALICE, "mailbox")
    for spelled in (name, ALICE, "ALICE@x.example", '"alice"@x.example'):
        assert await bench.identity(spelled, "mailbox") is None
        found = await bench.identity(spelled, "file")
        assert (found.name, found.application) == (name, "app")


async def test_a_catch_all_is_neither_a_sender_nor_a_name(tmp_path):
    bench = Bench(tmp_path, right)
    bench.user(ALICE, "right")
    bench.user("bob@y.example")
    bench.alias("@x.example", ALICE)
    bench.alias("@y.example", "bob@y.example")
    found = await bench.identity(ALICE, "right")
    assert found.may_send_as(ALICE) and not found.may_send_as("bob@x.example")
    assert bench.known.login("@x.example") is None and bench.known.login("@X.example.") is None
    access = Access(bench.mailboxes)
    assert access.user("@y.example") is None and access.user("bob@y.example") is not None
    access.close()
