"""The suppression list on disk: what is put, counted, paged, removed and swept; several processes; a writer that is killed."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from random import Random

import lmdb
import pytest

from relaymta.errors import StoreError, StoreFull
from relaymta.proto.suppression import REASONS, listed
from relaymta.suppression import Changed, Entry, Lookup, Suppressions
from relaymta.suppression import entries as module

NOW = 1_800_000_000


def entry(address: str, application: str = "", reason: str = "manual", **more) -> Entry:
    return Entry(application, address, reason, more.get("text", ""), NOW, more.get("until", 0), more.get("by", "ann"))


def all_of(found: Suppressions, most: int = 3, **chosen) -> list[Entry]:
    rows, after = [], b""
    while True:
        page = found.page(after, most, **chosen)
        assert len(page.entries) <= most
        rows += page.entries
        after = page.after
        if not after:
            return rows


@pytest.fixture
def suppressions(tmp_path):
    made = Suppressions(tmp_path / "list")
    yield made
    made.close()


def test_what_is_put_is_found_and_what_is_put_again_replaces_it(suppressions):
    first = entry("a@b.example", text="550 5.1.1 no", reason="hard-bounce", until=NOW + 5)
    assert suppressions.put([first, entry("a@b.example", "shop")]) == Changed(added=2)
    assert suppressions.find("a@b.example") == [first, entry("a@b.example", "shop")]
    assert suppressions.put([entry("a@b.example", text="other")]) == Changed(replaced=1)
    assert [one.text for one in suppressions.find("a@b.example")] == ["other", ""]
    assert suppressions.put([entry("a@b.example", text="third")], lambda there, new: False) == Changed(kept=1)
    assert suppressions.counts().each == {("", "manual"): 1, ("shop", "manual"): 1} and suppressions.counts().entries == 2
    assert suppressions.find("b@b.example") == []


def test_addresses_are_compared_as_everywhere_else():
    assert listed("Ann@EXAMPLE.org.") == "ann@example.org" == listed('"Ann"@example.org')
    assert listed("x@bücher.example") == "x@xn--bcher-kva.example"
    for wrong in ("", "ann", "a b@c", "a@b@c", "x" * 2000 + "@a.example"):
        with pytest.raises(ValueError, match="is not an address"):
            listed(wrong)


def test_texts_are_one_line_and_short_and_stored_once(suppressions):
    long = entry("a@b.example", text="x\r\n\x1b[31m" + "y" * 300, by="operator\0")
    suppressions.put([long])
    found = suppressions.find("a@b.example")[0]
    assert found.text.isprintable() and len(found.text) == module.TEXT_MOST and found.text.endswith("...")
    assert found.by == "operator"
    before = suppressions.counts().octets
    for start in range(0, 20_000, 1000):
        suppressions.put([entry(f"user{n}@b.example", text="550 5.1.1 the same sentence of a host, again and again, for all" * 2)
                          for n in range(start, start + 1000)])  # fmt: skip
    assert suppressions.counts().octets - before < 20_000 * 110


def test_texts_beyond_the_bound_are_stored_with_their_entries(suppressions, monkeypatch):
    monkeypatch.setattr(module, "TEXTS_MOST", 3)
    suppressions.put([entry(f"u{n}@b.example", text=f"text {n}", by="") for n in range(6)])
    assert [one.text for one in all_of(suppressions)] == [f"text {n}" for n in range(6)]


def test_an_address_that_is_too_long_for_a_key_is_in_the_list_all_the_same(suppressions):
    application = "an application with a name of some length"
    twins = [f"{'l' * 240}.{n}@{'.'.join(['d' * 60] * 4)}.example"[:520] for n in range(3)]
    assert all(len(f"{application}\0{one}") > 511 for one in twins)
    suppressions.put([entry(one, application, text=one[-20:]) for one in twins])
    assert [suppressions.find(one)[0].address for one in twins] == twins
    assert sorted(one.address for one in all_of(suppressions)) == sorted(twins)
    assert suppressions.remove([twins[1]]) == 1 and suppressions.find(twins[1]) == [] and suppressions.find(twins[2])
    assert suppressions.counts().each == {(application, "manual"): 2}


def test_pages_have_every_entry_once_in_order_whatever_their_size(suppressions):
    drawn = Random(5)
    names = ["", "a", "a\1", "a b", "aé", "b"]
    rows = {
        (one.application, one.address): one
        for one in (
            entry(f"{drawn.choice('abcxyz')}{drawn.randrange(99)}@h.example", drawn.choice(names), drawn.choice(REASONS))
            for _ in range(400)
        )
    }
    suppressions.put(list(rows.values()))
    wanted = sorted(rows.values(), key=lambda one: (one.application.encode(), one.address))
    for most in (1, 7, 1000):
        assert all_of(suppressions, most) == wanted
        assert all_of(suppressions, most, application="a") == [one for one in wanted if one.application == "a"]
        assert all_of(suppressions, most, application="") == [one for one in wanted if not one.application]
        assert all_of(suppressions, most, prefix="x1") == [one for one in wanted if one.address.startswith("x1")]
        assert all_of(suppressions, most, reason="complaint") == [one for one in wanted if one.reason == "complaint"]
        assert all_of(suppressions, most, application="b", prefix="z", reason="manual") == [
            one for one in wanted if one.application == "b" and one.address.startswith("z") and one.reason == "manual"
        ]
    assert all_of(suppressions, application="c") == []
    page = suppressions.page(b"", 1000, reason="complaint", looked_at=10)
    assert page.after and len(page.entries) < 10, "it looks at so many, and says where to go on"


def test_removing(suppressions):
    suppressions.put([entry("a@b.example", name) for name in ("", "shop", "news")] + [entry("c@b.example")])
    assert suppressions.remove(["a@b.example", "x@b.example"], "shop") == 1
    assert suppressions.remove(["a@b.example"], "") == 1
    assert [one.application for one in suppressions.find("a@b.example")] == ["news"]
    assert suppressions.remove(["a@b.example", "c@b.example"]) == 2
    assert suppressions.counts().entries == 0 and suppressions.counts().each == {}


def test_expired_entries_are_swept_and_counted_out_and_the_others_stay(suppressions):
    suppressions.put([entry(f"u{n}@b.example", until=0 if n % 3 == 0 else NOW + n) for n in range(30)])
    removed, after = 0, b""
    for _ in range(10):
        done, after = suppressions.sweep(after, NOW + 10, 7)
        removed += done
        if not after:
            break
    assert removed == 7 == 30 - suppressions.counts().entries == 30 - suppressions.counts().each["", "manual"]
    assert not [one for one in all_of(suppressions) if not one.holds(NOW + 10)]
    assert not entry("a@b", until=NOW).holds(NOW) and entry("a@b", until=NOW + 1).holds(NOW) and entry("a@b").holds(NOW)


def test_a_list_that_is_full_leaves_out_what_is_new_and_renews_what_is_there(tmp_path):
    found = Suppressions(tmp_path, most=3)
    assert found.put([entry(f"u{n}@b.example") for n in range(5)]) == Changed(added=3, left_out=2)
    assert found.put([entry("u1@b.example", text="new"), entry("u9@b.example")]) == Changed(replaced=1, left_out=1)
    found.close()
    again = Suppressions(tmp_path)
    assert again.most == 3, "whoever opens it without saying so keeps to it"
    again.limit(4)
    assert again.put([entry("u9@b.example"), entry("u8@b.example")]) == Changed(added=1, left_out=1)
    again.close()


def test_a_map_that_is_full_changes_nothing(tmp_path):
    found = Suppressions(tmp_path, map_size=256 * 1024)
    kept = 0
    with pytest.raises(StoreFull):
        for start in range(0, 100_000, 500):
            found.put([entry(f"u{n}@b.example") for n in range(start, start + 500)])
            kept += 500
    assert found.counts().entries == kept == found.counts().each["", "manual"] > 0
    assert found.remove(["u1@b.example"]) == 1
    found.close()


def test_a_damaged_file_is_an_error_and_not_a_crash(tmp_path):
    for octets in (b"", b"x" * 20_000, b"\0" * 4096):
        (tmp_path / "data.mdb").write_bytes(octets)
        (tmp_path / "lock.mdb").unlink(missing_ok=True)
        with pytest.raises(StoreError, match="is damaged"):
            Suppressions(tmp_path).close()


# Several processes

WRITER = """
    import os, sys, time
    from pathlib import Path
    from relaymta.suppression import Entry, Suppressions
    found = Suppressions(Path(sys.argv[1]))
    found.put([Entry("", "before@b.example", "manual", "", 1, 0, "")])

    def entries():
        for n in range(5000):
            yield Entry("", f"half{n}@b.example", "manual", "", 1, 0, "")
        print("in the middle", flush=True)
        time.sleep(600)

    found.put(entries())
"""


def started(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_writer_that_is_killed_keeps_nobody_waiting_and_leaves_nothing(tmp_path):
    with started(WRITER, tmp_path) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "in the middle\n"
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        found = Suppressions(tmp_path)
        assert found.put([entry("after@b.example")]) == Changed(added=1)
        assert [one.address for one in all_of(found)] == ["after@b.example", "before@b.example"]
        assert found.counts().entries == 2 == sum(found.counts().each.values())
        found.close()


READER = """
    import sys
    from pathlib import Path
    from relaymta.suppression import Lookup
    found = Lookup(Path(sys.argv[1]), print)
    found.refresh()()
    print("ready", flush=True)
    for line in sys.stdin:
        entry = found.find("shop", line.strip(), 1_800_000_000)
        print(entry.reason if entry else "none", flush=True)
"""


class Reader:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, address: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(address + "\n")
        self.process.stdin.flush()
        return self._line()


def test_two_readers_see_a_change_at_once_and_one_that_is_killed_holds_nothing(tmp_path):
    found = Suppressions(tmp_path)
    with started(READER, tmp_path) as one, started(READER, tmp_path) as other:
        readers = [Reader(one), Reader(other)]
        for n in range(50):
            address = f"u{n}@b.example"
            assert [reader.ask(address) for reader in readers] == ["none", "none"]
            found.put([entry(address, "shop" if n % 2 else "", "complaint")])
            assert [reader.ask(address) for reader in readers] == ["complaint", "complaint"]
            found.remove([address])
            assert [reader.ask(address) for reader in readers] == ["none", "none"]
        one.kill()
        one.wait()
        found.forget_dead_readers()
        found.put([entry("z@b.example")])
        assert readers[1].ask("z@b.example") == "manual"
        other.kill()
    found.close()


# Looking up


def put_once(path: Path, *rows: Entry) -> None:
    found = Suppressions(path)
    found.put(rows)
    found.close()


def test_an_application_s_own_entry_counts_first_then_that_about_all_mail_and_none_that_has_expired(tmp_path):
    put_once(
        tmp_path, entry("a@b.example", text="all"), entry("a@b.example", "shop", text="own", until=NOW + 9),
        entry("c@b.example", "shop", until=NOW), entry("d@b.example", "shop"),
    )  # fmt: skip
    found = Lookup(tmp_path, pytest.fail)
    assert found.find("shop", "a@b.example", NOW) is None, "nothing is read before the first look"
    found.refresh()()
    for application, address, text in (("shop", "a@b.example", "own"), ("", "a@b.example", "all"), ("x", "a@b.example", "all")):
        there = found.find(application, address, NOW)
        assert there is not None and there.text == text
    later = found.find("shop", "a@b.example", NOW + 9)
    assert later is not None and later.text == "all", "the own one has expired"
    assert found.find("shop", "c@b.example", NOW) is found.find("x", "d@b.example", NOW) is None
    found.close()
    assert found.find("", "a@b.example", NOW) is None


def test_a_list_that_is_not_there_is_told_once_and_used_when_it_comes(tmp_path):
    told: list[str] = []
    found = Lookup(tmp_path / "list", told.append)
    found.refresh()()
    assert not told, "it may just be made"
    for _ in range(3):
        found.refresh()()
        assert found.find("", "a@b.example", NOW) is None
    assert len(told) == 1 and "is not there" in told[0]
    put_once(tmp_path / "list", entry("a@b.example"))
    found.refresh()()
    assert found.find("", "a@b.example", NOW) is not None and len(told) == 1
    os.rename(tmp_path / "list", tmp_path / "gone")
    for _ in range(3):
        found.refresh()()
    assert found.find("", "a@b.example", NOW) is None and len(told) == 2
    found.close()


def test_a_list_that_is_put_in_place_of_another_is_read(tmp_path):
    put_once(tmp_path / "list", entry("a@b.example"))
    put_once(tmp_path / "other", entry("c@b.example"))
    found = Lookup(tmp_path / "list", pytest.fail)
    found.refresh()()
    assert found.find("", "a@b.example", NOW) is not None
    os.rename(tmp_path / "list", tmp_path / "old")
    os.rename(tmp_path / "other", tmp_path / "list")
    close = found.refresh()
    assert found.find("", "a@b.example", NOW) is None and found.find("", "c@b.example", NOW) is not None
    close()
    assert found.find("", "c@b.example", NOW) is not None
    found.close()


@pytest.mark.parametrize("octets", [b"", b"x" * 20_000])
def test_a_list_that_is_damaged_refuses_nobody(tmp_path, octets):
    told: list[str] = []
    (tmp_path / "data.mdb").write_bytes(octets)
    found = Lookup(tmp_path, told.append)
    for _ in range(3):
        found.refresh()()
        assert found.find("", "a@b.example", NOW) is None
    assert len(told) == 1 and "damaged" in told[0]
    found.close()


def test_an_entry_that_is_damaged_refuses_nobody_and_is_told_once(tmp_path):
    told: list[str] = []
    made = Suppressions(tmp_path)
    with made._writing() as txn:
        txn.put(module.key_of("", "a@b.example"), b"\xc1", db=made._tables["entry"])
    made.close()
    found = Lookup(tmp_path, told.append)
    found.refresh()()
    assert found.find("", "a@b.example", NOW) is found.find("", "a@b.example", NOW) is None
    assert len(told) == 1 and "refuses nobody" in told[0]
    found.close()


@pytest.mark.parametrize("what", ["pages", "foreign"])
def test_a_list_that_cannot_be_used_is_named_each_time_and_can_be_moved_away(tmp_path, what):
    """Damaged behind its meta pages; or of another program, with tables of the same names."""
    path = tmp_path / "list"
    if what == "pages":
        put_once(path, *(entry(f"u{n}@b.example") for n in range(3000)))
        octets = bytearray((path / "data.mdb").read_bytes())
        for page in range(2, len(octets) // 4096):
            octets[4096 * page + 10 : 4096 * page + 16] = b"\xff" * 6
        (path / "data.mdb").write_bytes(octets)
    else:
        env = lmdb.open(str(path), max_dbs=8)
        tables = {name: env.open_db(name.encode()) for name in module.TABLES}
        with env.begin(write=True) as txn:
            txn.put(b"limit", b"x", db=tables["count"])
        env.close()
    for _ in range(3):
        with pytest.raises(StoreError, match=r"is damaged.*move this folder away"):
            Suppressions(path, most=5)
    os.rename(path, tmp_path / "away")
    put_once(path, entry("a@b.example"))
    found = Suppressions(path, most=5)
    assert len(found.find("a@b.example")) == 1
    found.close()


def test_rows_that_are_damaged_are_told_by_whatever_meets_them(tmp_path):
    found = Suppressions(tmp_path)
    found.put([entry("a@b.example")])
    with found._writing() as txn:
        txn.put(module.key_of("", "a@b.example"), b"\xc1", db=found._tables["entry"])
    for use in (
        lambda: found.find("a@b.example"), lambda: found.page(b"", 9), lambda: found.sweep(b"", 1, 9),
        lambda: found.put([entry("a@b.example")]), lambda: found.remove(["a@b.example"]),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="is damaged"):
            use()
    found.close()
