"""Sketches: how many different ones, within 2 % or so, in any order and in parts; and their stored form."""

import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from relaymta.filter.sketch import FEW, REGISTERS, Sketch


def hashed(number: int) -> int:
    return xxhash.xxh3_64_intdigest(b"%d.example" % number)


@pytest.mark.parametrize("count", [0, 1, 2, 10, 100, 500, 700, 2000, 10_000, 100_000, 400_000])
def test_the_estimate_is_near(count):
    sketch = Sketch()
    for number in range(count):
        sketch.add(hashed(number))
        if number < 50:
            sketch.add(hashed(number))
    assert abs(sketch.count() - count) <= max(0.06 * count, 2)
    assert len(sketch.dump()) <= REGISTERS and (count > 500 or len(sketch.dump()) <= 3 * count)


@given(st.lists(st.lists(st.integers(0, 5000), max_size=300), max_size=6), st.randoms())
def test_parts_in_any_order_are_the_whole(parts, rng):
    whole, merged = Sketch(), Sketch()
    for number in (number for part in parts for number in part):
        whole.add(hashed(number))
    rng.shuffle(parts)
    for part in parts:
        one = Sketch()
        for number in part:
            one.add(hashed(number))
        merged.merge(Sketch(one.dump()))
    assert merged.dump() == whole.dump() and merged.count() == whole.count()


def test_many_registers_take_the_other_form_and_say_the_same():
    few, many = Sketch(), Sketch()
    rng = random.Random(1)
    hashes = [rng.getrandbits(64) for _ in range(FEW * 3)]
    for one in hashes:
        few.add(one)
    for one in reversed(hashes):
        many.merge(_of(one))
    assert few.dump() == many.dump() and len(few.dump()) == REGISTERS
    assert Sketch(few.dump()).count() == few.count()


def _of(hashed: int) -> Sketch:
    found = Sketch()
    found.add(hashed)
    return found


@given(st.binary(max_size=80))
def test_any_octets_are_a_sketch_or_refused(octets):
    try:
        found = Sketch(octets)
    except ValueError:
        return
    assert found.count() >= 0 and Sketch(found.dump()).dump() == found.dump()


@given(st.integers(0, (1 << 64) - 1))
def test_any_hash_is_one(value):
    assert _of(value).count() == 1
