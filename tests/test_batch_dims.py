"""The batch dimension of each input, and what a message says of inputs without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.batch_dims import batch_of
from autopipe.errors import InputError


class Model(nn.Module):
    def forward(self, x: Tensor, parts: Any = None, mask: Any = None) -> Tensor:
        return x


def test_tensors_without_dimensions_are_not_batched() -> None:
    args: Any = (torch.ones(3, 2), [torch.tensor(1.0), torch.ones(3)])
    assert batch_of(0, Model(), args, {"mask": 3}) == ((0, None, 0, None), 3)


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ((), "no inputs"),
        ((torch.tensor(3),), "Tensor of shape ()"),
        ((torch.ones(2).numpy(),), "numpy.ndarray"),
        (([1.0, 2.0], "a"), "float, str"),
    ],
)
def test_a_call_without_a_batch_says_what_came(args: Any, found: str) -> None:
    with pytest.raises(InputError, match="no input has a batch dimension") as caught:
        batch_of(0, Model(), args, {})
    assert caught.value.found == found
    assert "torch.as_tensor" in str(caught.value.remedy)


def test_inputs_that_differ_are_named_to_the_entry() -> None:
    args: Any = (torch.ones(6, 2), [torch.ones(6), {"a": torch.ones(5)}])
    with pytest.raises(InputError, match="differ in their number of samples") as caught:
        batch_of(0, Model(), args, {"mask": torch.ones(4)})
    assert caught.value.found == (
        "x: 6 in dimension 0 of (6, 2); parts[0]: 6 in dimension 0 of (6,);"
        " parts[1]['a']: 5 in dimension 0 of (5,); mask: 4 in dimension 0 of (4,)"
    )
