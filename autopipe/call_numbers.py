"""Numbers among the arguments of a call that change from call to call, such as a weight of a loss.

The first call is captured with its numbers as constants. When one changes, it becomes an input of
the next capture, a tensor of one entry, and the forward gets a number without a value. That works
where the model only computes with it. A model that branches on it, or uses it as a size, is
captured once for each value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from autopipe.passes.python_state import value_key

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    from torch import Tensor

LARGEST = 2**63
"""Integers of this size do not fit a tensor."""


def is_number(value: Any) -> bool:
    """Whether an argument is a number that can become a tensor: no boolean, nothing derived.

    It must be finite: a trace takes ``n - n`` for 0 and ``n == n`` for true.
    """
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and -LARGEST <= value < LARGEST


def number_keys(leaves: Sequence[Any]) -> dict[int, Hashable]:
    """Return the numbers of a call, as keys to compare them by, by their positions.

    Args:
        leaves: the flattened call.
    """
    return {n: value_key(x) for n, x in enumerate(leaves) if is_number(x)}


def changed_numbers(leaves: Sequence[Any], constants: Mapping[int, Hashable]) -> list[int]:
    """Return the positions of the numbers that differ from those of an earlier call.

    Args:
        leaves: the flattened call.
        constants: numbers of the earlier call: what `number_keys` returned.
    """
    return [n for n, key in constants.items() if value_key(leaves[n]) != key]


def as_tensors(leaves: Sequence[Any], numbers: Collection[int]) -> list[Any]:
    """Return the leaves of a call with some numbers as tensors, in double precision or int64.

    Args:
        leaves: the flattened call.
        numbers: positions of the numbers.
    """
    return [_tensor(x) if n in numbers else x for n, x in enumerate(leaves)]


def _tensor(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)
