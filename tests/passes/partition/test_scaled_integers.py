"""Floats as integers: exact, and invalid ones refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopipe.errors import OptionError
from autopipe.passes.partition.scaled_integers import to_integers, unit_of


@given(st.lists(st.floats(0, allow_infinity=False, allow_nan=False) | st.integers(0, 2**70)))
def test_integers_times_their_unit_are_the_values(values: list[float]) -> None:
    costs = to_integers("seconds", values)
    assert [cost * unit_of(values, costs) for cost in costs] == list(map(Fraction, values))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_values_that_are_no_costs_are_refused(value: float) -> None:
    with pytest.raises(OptionError, match="`seconds`") as error:
        to_integers("seconds", [1.0, value])
    assert error.value.found == f"{value} at 1"
