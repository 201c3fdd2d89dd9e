"""The suppression list as CSV."""

import io
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta.cli.suppression_csv import COLUMNS, read_rows, written
from relaymta.control.requests import REQUESTS, Suppression
from relaymta.errors import RelayError
from relaymta.proto.address import quoted_if_needed
from relaymta.proto.suppression import listed, listed_application
from relaymta.suppression import entries_of
from relaymta.suppression.entries import cut

DEFAULT = {"application": "", "reason": "manual", "until": 0}


def read(text: bytes | str, **default) -> tuple[list[dict], list[str]]:
    wrong: list[str] = []
    octets = text if isinstance(text, bytes) else text.encode()
    return list(read_rows(io.BytesIO(octets), "f.csv", DEFAULT | default, wrong.append)), wrong


def row(address: str, **more) -> dict:
    return {"address": address, **DEFAULT, **more}


def test_what_is_written_is_read_again():
    rows = [
        row("a@b.example", application="shop", reason="hard-bounce", text='550 5.1.1 "no", <none>', since=1777593600,
            until=4102444800, by="ann, uid 1"),
        row('"a,b"@b.example', text="  ", since=1, by=""), row("x@xn--bcher-kva.example", text="ö", since=5, by="relay"),
    ]  # fmt: skip
    octets = written(rows)
    assert octets.startswith(",".join(COLUMNS).encode() + b"\r\n") and octets.count(b"\r\n") == 4
    found, wrong = read(octets)
    assert not wrong and [{**DEFAULT, "text": "", "by": "", **one} for one in found] == [
        {**one, "text": one["text"].strip()} for one in rows
    ]
    assert written([], head=False) == b""
    put = REQUESTS["suppression_put"].read({"rows": found})
    assert put.rows[0].until == 4102444800


@pytest.mark.parametrize("text", [
    "address\na@b.example\nc@b.example\n", "a@b.example\r\nc@b.example", "\ufeffEmail,x\r\na@b.example,1\r\nc@b.example,2\r\n",
    "\ufeffa@b.example\n\n\nC@B.EXAMPLE\n", 'x,"ADDRESS"\n,a@b.example\n,"c@b.example"\n',
], ids=repr)  # fmt: skip
def test_forms_of_a_file(text):
    assert read(text) == ([row("a@b.example"), row("c@b.example")], [])


def test_what_a_line_lacks_is_said_by_the_options_and_values_are_one_line():
    text = 'address,text,reason,until\r\na@b.example,"one \t two",,\r\nc@b.example,,complaint,2030-01-01T00:00:00+01:00\r\n'
    found, wrong = read(text, reason="unsubscribe", until=7, application="shop")
    assert not wrong
    assert found == [
        row("a@b.example", text="one two", reason="unsubscribe", until=7, application="shop"),
        row("c@b.example", reason="complaint", until=1893452400, application="shop"),
    ]


def test_wrong_lines_are_named_with_file_and_line_and_the_others_are_read():
    lines = [
        "address,reason,since,text", "ann", "a@b.example,nonsense", "a@b.example,,yesterday", "a@b.example,,2026-05-01T10:00:00",
        "ok@b.example", "a@b.example,,,,more", '"a@b.example"x,', 'a@b.example,,,"x\n\n y"', "a@b.example,,1969-01-01", ",manual",
        "ok2@b.example,,2026-05-01",
    ]  # fmt: skip
    octets = "\n".join(lines).encode() + b"\n\xff@b.example\nu@b.example,,,\xff\n" + b'"open,\n' + b"x\n" * 70_000
    found, wrong = read(octets)
    assert [one["address"] for one in found] == ["ok@b.example", "ok2@b.example"]
    assert found[1]["since"] == 1777593600
    numbers = [int(one.split(":")[1]) for one in wrong]
    assert numbers[:12] == [2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16] and all(one.startswith("f.csv:") for one in wrong)
    assert numbers[12:] == [*range(17, 70_018)], "each of them"
    for number, what in enumerate([
        "'ann' is not an address", "reason: 'nonsense' is none of", "since: 'yesterday' is no day", "is no day and no time",
        "5 fields, and 4 columns", "',' expected after", "text: a line end in it",
        "'y\"' is not an address", "since: '1969-01-01'", "'' is not an address", "address: not UTF-8",
        "text: not UTF-8",
    ]):  # fmt: skip
        assert what in wrong[number], wrong[number]
    assert "a quote that is not closed" in wrong[12]


@pytest.mark.parametrize("first", ["application,reason", "address,email", "x", "a@b.example,manual", '"', "a" * 200_000])
def test_a_file_whose_columns_are_not_known_is_not_read(first):
    found, wrong = read(first + "\na@b.example\nc@b.example,shop\n")
    assert len(found) <= 2 and wrong and wrong[0].startswith("f.csv:1: ")
    if "\n" not in first and '"' not in first and len(first) < 100:
        assert not found and "columns" in wrong[0]


def test_memory_does_not_depend_on_the_length_of_a_file():
    class Endless(io.RawIOBase):
        lines = 50_000

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            if not self.lines:
                return 0
            self.lines -= 1
            line = b"u%d@b.example\r\n" % self.lines
            buffer[: len(line)] = line
            return len(line)

    tracemalloc.start()
    assert sum(1 for _ in read_rows(io.BufferedReader(Endless()), "f", DEFAULT, pytest.fail)) == 50_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 << 20


def test_a_line_whose_application_can_have_no_entry_is_wrong():
    found, wrong = read(f"address,application\na@b.example,{'x' * 301}\nc@b.example,{'x' * 300}\n")
    assert [one["address"] for one in found] == ["c@b.example"] and wrong[0].startswith("f.csv:2: ")
    with pytest.raises(RelayError, match="at most 300 octets"):
        entries_of([Suppression("a@b.example", "x" * 301)], "ann", {})


def test_a_stray_quote_costs_its_own_line_wherever_it_is():
    many = [f"u{n}@b.example" for n in range(5000)]
    for stray in ('"ann@b.example', 'ann@b.example"', '"', '"ann@b.example,x', 'a"b@b.example'):
        found, wrong = read("\n".join(["address", *many[:7], stray, *many[7:]]))
        assert [one["address"] for one in found] == many and [one.split(":")[1] for one in wrong] == ["9"]
        rows = [f"{one},note" for one in many]
        found, wrong = read("\n".join(["address,text", *rows[:7], f"ann@b.example,{stray}", *rows[7:], 'bob@b.example,"', "x"]))
        assert [one["address"] for one in found if one["text"] == "note"] == many
        assert [one.split(":")[1] for one in wrong][-2:] == ["5003", "5004"]
    found, wrong = read('address,text\na@b.example,"stray\nc@b.example,note"\nd@b.example,\n')
    assert [one["address"] for one in found] == ["c@b.example", "d@b.example"], (
        "a quote in a field that has none around it is text"
    )
    assert [one.split(":")[1] for one in wrong] == ["2"]


def test_a_column_that_is_ignored_may_have_line_ends():
    found, wrong = read('address,remarks,text\na@b.example,"one\nx@b.example\n",t\nc@b.example,"open,\nd@b.example,,u\n')
    assert [(one["address"], one["text"]) for one in found] == [("a@b.example", "t"), ("d@b.example", "u")]
    assert wrong == ["f.csv:5: a quote that is not closed"]


@pytest.mark.parametrize("head", ["", "email\n", '"Address"\n'])
def test_in_a_file_of_addresses_a_local_part_may_be_quoted_and_so_may_the_address_be(head):
    text = head + '"john doe"@b.example\n"a,b"@b.example\n"c@b.example"\n"""d e""@b.example"\n'
    found, wrong = read(text)
    assert not wrong and [one["address"] for one in found] == [
        '"john doe"@b.example', '"a,b"@b.example', "c@b.example", '"d e"@b.example',
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_that_is_too_long_is_named_and_costs_no_memory(end):
    class Long(io.RawIOBase):
        def __init__(self) -> None:
            self.pieces = [f"a@b.example,{end}".encode() * 2, *[b"x" * 8192] * 1000, f'"{end}c@b.example,"x{end}'.encode()]
            self.pieces += [b"y" * 8192] * 1000 + [end.encode(), f"d@b.example,{end}".encode()]

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            if not self.pieces:
                return 0
            piece = self.pieces.pop(0)
            buffer[: len(piece)] = piece
            return len(piece)

    octets, wrong = Long(), list[str]()
    octets.pieces[0] = f"address,text{end}".encode() + octets.pieces[0]
    tracemalloc.start()
    found = list(read_rows(io.BufferedReader(octets), "f.csv", DEFAULT, wrong.append))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [one["address"] for one in found] == ["a@b.example", "a@b.example", "d@b.example"]
    assert wrong == [
        "f.csv:4: more than 65536 characters", "f.csv:5: a quote that is not closed", "f.csv:6: more than 65536 characters",
    ]  # fmt: skip
    assert most < 2 << 20


SEEN = st.characters(exclude_categories=["Cs", "Cc"])


@given(st.text(SEEN, min_size=1, max_size=12), st.text(SEEN, max_size=8), st.text(SEEN, max_size=8))
@example("a  b", "my  shop", "")
@example("a\u00a0b", "a\u200bb", "")
@example("a\u00adb", "a,\tb", "")
def test_what_can_be_listed_can_be_exported_and_imported(local, application, text):
    try:
        address = listed(quoted_if_needed(local) + "@b.example")
        whose = listed_application(application.strip(" \t"))
    except ValueError:
        return
    found, wrong = read(written([row(address, application=whose, text=cut(text, 100), since=1, by="")]))
    assert not wrong and (found[0]["address"], found[0]["application"]) == (address, whose)


@pytest.mark.parametrize("unseen", ["\u200b", "\u00ad", "\u00a0", "\ufeff"])
def test_an_address_with_characters_that_nobody_sees_is_neither_listed_nor_imported(unseen):
    with pytest.raises(ValueError, match="cannot be seen"):
        listed(f"a{unseen}b@b.example")
    found, wrong = read(f"address\na{unseen}b@b.example\nc@b.example\u00a0\n")
    assert [one["address"] for one in found] == ["c@b.example"] and wrong[0].startswith("f.csv:2: ")
