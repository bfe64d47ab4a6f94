"""The smallest change that fits, where trying a plan is a comparison of numbers."""

from __future__ import annotations

import pytest

from autopipe.planning.remedies import _smallest


@pytest.mark.parametrize("high", [1, 2, 7, 16, 33])
def test_the_smallest_number_that_fits(high: int) -> None:
    for low in range(1, high + 1):
        for least in range(low, high + 2):
            tried: list[int] = []

            def fits(number: int, least: int = least, tried: list[int] = tried) -> bool:
                tried.append(number)
                return number >= least

            assert _smallest(fits, low, high) == (least if least <= high else None)
            assert all(low <= number <= high for number in tried)
            assert len(tried) == len(set(tried)) <= 2 * (high - low + 1).bit_length() + 1


def test_nothing_to_try() -> None:
    assert _smallest(lambda number: True, 1, 0) is None
