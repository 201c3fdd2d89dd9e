"""The suppression list as CSV."""

import io
import tracemalloc

import pytest

from relaymta.cli.suppression_csv import COLUMNS, read_rows, written
from relaymta.control.requests import REQUESTS, Suppression
from relaymta.errors import RelayError
from relaymta.suppression import entries_of

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
    text = 'address,text,reason,until\r\na@b.example,"one\r\n  two",,\r\nc@b.example,,complaint,2030-01-01T00:00:00+01:00\r\n'
    found, wrong = read(text, reason="unsubscribe", until=7, application="shop")
    assert not wrong
    assert found == [
        row("a@b.example", text="one two", reason="unsubscribe", until=7, application="shop"),
        row("c@b.example", reason="complaint", until=1893452400, application="shop"),
    ]


def test_wrong_lines_are_named_with_file_and_line_and_the_others_are_read():
    lines = [
        "address,reason,since,text", "ann", "a@b.example,nonsense", "a@b.example,,yesterday", "a@b.example,,2026-05-01T10:00:00",
        "ok@b.example", "a@b.example,,,,more", '"a@b.example"x,', 'a@b.example,,,"x\n\ny"', "a@b.example,,1969-01-01", ",manual",
        "ok2@b.example,,2026-05-01",
    ]  # fmt: skip
    octets = "\n".join(lines).encode() + b"\n\xff@b.example\nu@b.example,,,\xff\n" + b'"open,\n' + b"x\n" * 70_000
    found, wrong = read(octets)
    assert [one["address"] for one in found] == ["ok@b.example", "a@b.example", "ok2@b.example"]
    assert found[1]["text"] == "x y" and found[2]["since"] == 1777593600
    numbers = [int(one.split(":")[1]) for one in wrong]
    assert numbers[:10] == [2, 3, 4, 5, 7, 8, 12, 13, 15, 16] and all(one.startswith("f.csv:") for one in wrong)
    for number, what in enumerate([
        "'ann' is not an address", "reason: 'nonsense' is none of", "since: 'yesterday' is no day", "is no day and no time",
        "5 fields, and 4 columns", "',' expected after", "since: '1969-01-01'", "'' is not an address", "address: not UTF-8",
        "text: not UTF-8",
    ]):  # fmt: skip
        assert what in wrong[number], wrong[number]
    assert "field larger than field limit" in wrong[10]


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
