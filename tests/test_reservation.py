"""Reservations: units are given back once, whatever happens to their owner."""

import gc
from collections import Counter
from functools import partial

import pytest

from relaymta.reservation import Reservation


@pytest.mark.parametrize("end", ["give back", "twice", "block", "error", "dropped", "kept", "kept and dropped"])
def test_units_are_given_back_once(end):
    given: Counter[str] = Counter()
    one: Reservation | None = Reservation(partial(given.update, ["unit"]))
    assert one is not None and one.held
    if end in ("give back", "twice"):
        one.give_back()
    if end == "twice":
        one.give_back()
    if end in ("block", "error"):
        try:
            with one:
                if end == "error":
                    raise ValueError
        except ValueError:
            pass
    if end.startswith("kept"):
        one.keep()
        one.give_back()
    if end.endswith("dropped"):
        one = None
        gc.collect()
    assert given["unit"] == (not end.startswith("kept"))
    assert one is None or not one.held
