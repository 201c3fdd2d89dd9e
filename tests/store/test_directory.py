"""Who has a mailbox: addresses, aliases, catch-alls, and what may not be."""

import subprocess
import sys
import time

import pytest
from msgspec.structs import replace

from relaymta._speedups.cells import Cells
from relaymta.errors import NoSuch, RelayError
from relaymta.store.directory import DEEPEST, Directory, User

READER = """
import sys
from pathlib import Path
from relaymta.store.directory import Directory
directory = Directory(Path(sys.argv[1]))
for _ in sys.stdin:
    found = directory.find("whoever@local.example")
    print(found and found.users[0].ident, [user.address for user in directory.users(1, 1)], flush=True)
"""


@pytest.fixture
def directory(tmp_path):
    found = Directory(tmp_path / "directory", writable=True)
    for ident, name in enumerate(("alice@local.example", "bob@local.example", "carol@local.example"), 1):
        assert found.next_ident() == ident
        found.add(User(ident, name, 0))
    yield found
    found.close()


def alias(directory, address, *targets):
    directory.set_alias(address, targets, lambda domain: domain == "local.example", "+")


def names(directory, recipient, separator="+"):
    found = directory.find(recipient, separator)
    return None if found is None else ([user.address.partition("@")[0] for user in found.users], found.others)


def test_mail_goes_where_its_address_leads(directory):
    alias(directory, "a@local.example", "alice@local.example")
    alias(directory, "team@local.example", "a@local.example", "bob@local.example", "else@other.example")
    alias(directory, "a+list@local.example", "carol@local.example")
    alias(directory, "@second.example", "bob@local.example")
    table = [
        ("alice@local.example", (["alice"], [])),
        ("ALICE@LOCAL.example", (["alice"], [])),
        ("alice+detail@local.example", (["alice"], [])),
        ("alice+a+b@local.example", (["alice"], [])),
        ("a@local.example", (["alice"], [])),
        ("a+list@local.example", (["carol"], [])),
        ("team@local.example", (["alice", "bob"], ["else@other.example"])),
        ("team+x@local.example", (["alice", "bob"], ["else@other.example"])),
        ("anybody@second.example", (["bob"], [])),
        ("dave@local.example", None),
        ("alice@other.example", None),
        ("+detail@local.example", None),
        ("@local.example", None),
        ("x" * 2000 + "@local.example", None),
        ("alice", None),
        ("", None),
    ]
    for recipient, expected in table:
        assert names(directory, recipient) == expected, recipient
    assert names(directory, "alice+x@local.example", "") is None
    assert names(directory, "alice-x@local.example", "-") == (["alice"], [])


def test_an_internationalized_domain_is_found_in_both_forms(directory):
    ident = directory.next_ident()
    directory.add(User(ident, "dora@xn--bcher-kva.example", 0))
    for form in ("dora@bücher.example", "dora@XN--BCHER-KVA.example", "dora+x@bücher.example"):
        assert names(directory, form) == (["dora"], [])


@pytest.mark.parametrize(
    ("address", "targets", "sentence"),
    [
        ("a@local.example", ["a@local.example"], "a@local.example would be an alias of itself"),
        ("a@local.example", ["alise@local.example"], 'nobody has alise@local.example (did you mean "alice@local.example"?)'),
        ("alice@local.example", ["bob@local.example"], "alice@local.example is a user"),
        ("one@local.example", ["three@local.example"], "would lead back to itself: one@local.example -> three@local.example -> "),
        ("@local.example", ["ghost@local.example"], "@local.example would lead back to itself"),
        ("z@local.example", ["z+detail@local.example", "bob@local.example"], "z@local.example would lead back to itself"),
        ("big@local.example", [f"n{n}@other.example" for n in range(1001)], "1001 addresses: an alias has at most 1000"),
        ("x" * 600 + "@local.example", ["bob@local.example"], "an address has at most 500 octets"),
        ("one@local.example", [], ", and two@local.example leads there"),
    ],
)
def test_an_alias_that_cannot_be_is_refused(directory, address, targets, sentence):
    alias(directory, "one@local.example", "alice@local.example", "bob@local.example")
    alias(directory, "two@local.example", "one@local.example", "carol@local.example")
    alias(directory, "three@local.example", "two@local.example", "carol@local.example")
    before = directory.addresses()
    with pytest.raises(RelayError) as error:
        alias(directory, address, *targets)
    assert sentence in str(error.value)
    assert directory.addresses() == before


def test_a_wrong_target_is_compared_with_some_addresses(directory, monkeypatch):
    """All of them would take seconds where there are very many."""
    compared = []
    monkeypatch.setattr("relaymta.store.directory.near", lambda word, known: compared.extend(known) or "")
    monkeypatch.setattr("relaymta.store.directory.LIKE_MOST", 2)
    for name in ("a1@local.example", "a2@else.example", "a3@local.example", "a4@local.example", "bo@local.example"):
        directory.add(User(directory.next_ident(), name, 0))
    with pytest.raises(RelayError, match="nobody has ax@"):
        alias(directory, "list@local.example", "ax@local.example", "bob@local.example")
    assert compared == ["a1@local.example", "a3@local.example"]


def test_idents_of_users(directory):
    assert directory.known_idents([1, 3, 4, 0, 1 << 60]) == {1, 3}


def test_an_alias_may_lead_to_a_detail(directory):
    alias(directory, "list@local.example", "alice+list@local.example", "bob@local.example")
    assert names(directory, "list@local.example") == (["alice", "bob"], [])


def test_aliases_are_followed_to_a_bound(directory):
    """Nobody is left out without a word: what would lead too deep cannot be made, from whichever end."""
    alias(directory, "n0@local.example", "alice@local.example", "bob@local.example")
    for number in range(1, DEEPEST):
        alias(directory, f"n{number}@local.example", f"n{number - 1}@local.example", "carol@local.example")
    top = f"n{DEEPEST - 1}@local.example"
    assert names(directory, top) == (["carol", "alice", "bob"], [])
    with pytest.raises(RelayError, match="more than 10 deep"):
        alias(directory, f"n{DEEPEST}@local.example", top, "x@other.example")
        alias(directory, f"n{DEEPEST + 1}@local.example", f"n{DEEPEST}@local.example", "x@other.example")
    alias(directory, "deep@local.example", "dave@other.example", "bob@local.example")
    for number in range(5):
        below = f"d{number - 1}@local.example" if number else "deep@local.example"
        alias(directory, f"d{number}@local.example", below, "x@other.example")
    with pytest.raises(RelayError, match="more than 10 deep"):
        alias(directory, "n0@local.example", "d4@local.example", "bob@local.example")
    assert names(directory, top) == (["carol", "alice", "bob"], [])


def test_aliases_that_fan_out_are_followed_in_linear_time(directory):
    for level in range(8):
        for number in range(6):
            below = (
                [f"f{level - 1}-{n}@local.example" for n in range(6)] if level else ["alice@local.example", "bob@local.example"]
            )
            alias(directory, f"f{level}-{number}@local.example", *below)
    began = time.thread_time()
    assert names(directory, "f7-0@local.example") == (["alice", "bob"], [])
    assert time.thread_time() - began < 1, "it was 2.4 s, and six times that for each further level"


def test_an_alias_leads_to_a_bounded_number_of_addresses(directory):
    for number in range(5):
        alias(directory, f"l{number}@local.example", *(f"{number}-{n}@other.example" for n in range(1000)))
    with pytest.raises(RelayError, match="more than 5000 addresses"):
        alias(directory, "all@local.example", *(f"l{number}@local.example" for number in range(5)))
    alias(directory, "most@local.example", *(f"l{number}@local.example" for number in range(4)))
    assert len(names(directory, "most@local.example")[1]) == 4000


def test_users_are_changed_renamed_and_removed(directory):
    alias(directory, "a@local.example", "alice@local.example")
    assert directory.owned(1) == ["a@local.example", "alice@local.example"]
    assert directory.replace("ALICE@local.example", lambda user: replace(user, octets=5)).octets == 5
    assert directory.rename("alice@local.example", "anna@local.example").octets == 5
    assert directory.named("alice@local.example") is None, "an address, but no longer the name"
    assert names(directory, "alice@local.example") == (["anna"], [])
    directory.remove(1)
    assert directory.user(1) is None
    assert [directory.find(f"{name}@local.example") for name in ("a", "alice", "anna")] == [None] * 3
    assert directory.next_ident() == 4, "an id is never given again"
    assert directory.count() == 2


def test_an_address_is_there_once(directory):
    with pytest.raises(RelayError, match=r"bob@local\.example exists already"):
        directory.add(User(9, "bob@local.example", 0))
    with pytest.raises(RelayError, match=r"bob@local\.example exists already"):
        directory.rename("alice@local.example", "bob@local.example")
    alias(directory, "b@local.example", "bob@local.example")
    with pytest.raises(RelayError, match=r"b@local\.example is an address of bob@local\.example"):
        directory.add(User(9, "b@local.example", 0))
    assert directory.user(9) is None


def test_what_does_not_exist_is_named_with_what_is_like_it(directory):
    with pytest.raises(NoSuch, match=r'no such mailbox user: alicf@local\.example \(did you mean "alice@local\.example"'):
        directory.replace("alicf@local.example", lambda user: user)
    with pytest.raises(NoSuch, match=r"no such alias: nothing@local\.example"):
        alias(directory, "nothing@local.example")
    with pytest.raises(NoSuch):
        alias(directory, "bob@local.example")
    assert names(directory, "bob@local.example") == (["bob"], [])


def test_readers_see_what_was_written(directory, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "directory")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:

        def asked():
            reader.stdin.write("\n")
            reader.stdin.flush()
            return reader.stdout.readline().strip()

        assert asked() == "None ['bob@local.example']"
        alias(directory, "@local.example", "bob@local.example")
        assert asked() == "2 ['bob@local.example']"
        alias(directory, "@local.example")
        assert asked() == "None ['bob@local.example']"
        reader.stdin.close()


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(RelayError, match="No such file"):
        Directory(tmp_path / "nowhere")


def test_what_was_found_is_in_memory_until_something_changes(tmp_path, monkeypatch):
    directory = Directory(tmp_path, writable=True, version=Cells(bytearray(8), 0, 1))
    directory.add(User(1, "alice@local.example", 0))
    looked_up = []
    look_up = Directory.look_up
    monkeypatch.setattr(Directory, "look_up", lambda self, *what: looked_up.append(what) or look_up(self, *what))
    for _ in range(3):
        assert [user.ident for user in directory.find("alice+x@local.example", "+").users] == [1]
        assert directory.find("info@local.example", "+") is None
    assert len(looked_up) == 2
    directory.set_alias("info@local.example", ["alice@local.example"], lambda domain: True)
    assert [user.ident for user in directory.find("info@local.example", "+").users] == [1]
    directory.replace("alice@local.example", lambda user: replace(user, disabled=True))
    assert directory.find("alice+x@local.example", "+").users[0].disabled
    monkeypatch.setattr("relaymta.store.directory.FOUND_MOST", 10)
    for number in range(100):
        directory.find(f"x{number}@local.example")
    assert len(directory._found) <= 11
    directory.close()


def test_a_user_to_whom_aliases_lead_by_a_detail_or_a_catch_all_is_not_deleted(directory):
    def everywhere(domain):
        return domain == "local.example"

    directory.set_alias("info@local.example", ["alice+info@local.example"], everywhere, "+")
    directory.set_alias("@local.example", ["bob@local.example"], everywhere, "+")
    directory.set_alias("team@local.example", ["whoever@local.example"], everywhere, "+")
    for name, alias in (("alice", "info"), ("bob", "team")):
        with pytest.raises(RelayError, match=f"{alias}@local.example would lead to nobody"):
            directory.delete(f"{name}@local.example", 1_900_000_000_000, "+")
    assert directory.delete("carol@local.example", 1_900_000_000_000, "+").deleted == 1_900_000_000_000


def test_an_alias_that_has_come_to_lead_to_nobody_hinders_no_other(directory):
    directory.set_alias("info@local.example", ["alice@local.example", "bob@local.example"], lambda domain: True)
    directory.replace("alice@local.example", lambda user: replace(user, deleted=5))
    directory.set_alias("other@local.example", ["carol@local.example"], lambda domain: True)
    with pytest.raises(RelayError, match=r"nobody has alice@local\.example"):
        directory.set_alias("info@local.example", ["alice@local.example", "carol@local.example"], lambda domain: True)
    directory.set_alias("info@local.example", ["bob@local.example", "carol@local.example"], lambda domain: True)


def test_an_address_is_given_where_nobody_has_it(directory):
    directory.give(2, "new@local.example")
    assert directory.find("new@local.example").users[0].address == "bob@local.example"
    with pytest.raises(RelayError):
        directory.give(1, "new@local.example")
    directory.set_alias("list@local.example", ["bob@local.example", "carol@local.example"], lambda domain: True)
    with pytest.raises(RelayError):
        directory.give(1, "list@local.example")
