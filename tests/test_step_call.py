"""By what factor gradients are larger than others.

The calls themselves: `tests/system/test_schedules.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autopipe.step_call import common_factor

X = torch.tensor([0.5, 0.0, -2.0])


@pytest.mark.parametrize(
    ("given", "arrived", "factor"),
    [
        ([X], [X], 1.0),
        ([X], [X * 8], 8.0),
        ([X], [X * 0], 0.0),
        ([X, X * 3], [X / 3, X], 1 / 3),
        ([X, None], [X * 2, None], 2.0),
        ([X, None], [X, X * 0], 1.0),
        ([X, None], [X, X], None),
        ([X, X], [X, X * 2], None),
        ([X, X], [X, None], None),
        ([X], [X + 1], None),
        ([X], [X * math.nan], math.nan),
        ([X], [X * math.inf], math.nan),
    ],
)
def test_common_factor(
    given: list[Tensor | None], arrived: list[Tensor | None], factor: float | None
) -> None:
    found = common_factor(given, arrived)
    if factor is None:
        assert found is None
    else:
        assert found == pytest.approx(factor, rel=1e-6, nan_ok=True)
