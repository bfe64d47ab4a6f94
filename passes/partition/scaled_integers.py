"""Scale floats to integers without rounding, so that comparisons are exact.

A float is an integer divided by a power of two. With integer costs the optimum is exact, and no
tolerance decides whether a cut is within a limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from autopipe.errors import OptionError


def to_integers(name: str, values: Sequence[float]) -> list[int]:
    """Multiply the values by one power of two that makes all of them integers.

    Args:
        name: what the values are, for the error message.
        values: finite numbers >= 0.

    Returns:
        The same values in another unit; `unit_of` says which.

    Raises:
        OptionError: a value that is not finite, or below 0.
    """
    for at, value in enumerate(values):
        if not 0 <= value < math.inf:
            found = f"{value} at {at}"
            raise OptionError(f"`{name}`", expected="finite numbers >= 0", found=found)
    exact = (value if isinstance(value, int) else float(value) for value in values)
    ratios = [value.as_integer_ratio() for value in exact]
    scale = max((denominator for _, denominator in ratios), default=1)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def unit_of(values: Sequence[float], costs: Sequence[int]) -> Fraction:
    """The size of one unit of `costs`.

    Args:
        values: N numbers, in seconds for example.
        costs: the same as integers, from `to_integers`.
    """
    pairs = zip(values, costs, strict=True)
    return next((Fraction(value) / cost for value, cost in pairs if cost), Fraction(1))
