"""Parameters of tests that `make prove` alone has: `make test` has others which take the same ways through the code."""

import pytest
from _pytest.mark import ParameterSet

__all__ = ["in_prove"]


def in_prove(*values: object) -> list[ParameterSet]:
    """Each value, or tuple of values, as a parameter that `make test` leaves out."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.prove) for value in values]
