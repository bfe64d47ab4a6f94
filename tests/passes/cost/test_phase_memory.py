"""Bytes of a traced stage, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopipe.passes.cost.phase_memory import StageBytes, stage_bytes
from tests.support.programs import phased_of, split_of

ROWS = 4 * 6 * 4  # bytes of a micro-batch of 4 between layers of 6 features, in float32
WEIGHT, BIAS = 6 * 6 * 4, 6 * 4


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(torch.tanh(self.first(x))))


def bytes_of(stage: int, remat: str) -> StageBytes:
    model, x = Layers(), torch.randn(8, 6)
    cut = split_of(model, 2, x)
    return stage_bytes(phased_of(cut, model, 4, ((x,), {}), remat=remat).stages[stage])


def test_what_f_saves() -> None:
    """With "full" what the stage received; with "none" also the result of tanh."""
    for stage in (0, 1):
        assert bytes_of(stage, "full").saved == ROWS
        assert bytes_of(stage, "none").saved == 2 * ROWS


def test_values_between_stages() -> None:
    first, last = bytes_of(0, "full"), bytes_of(1, "full")
    assert (*first.received.values(), *first.tangents.values()) == (ROWS, ROWS)
    assert (*last.received.values(), *last.tangents.values()) == (ROWS, ROWS)
    assert list(first.received) == ["x"]
    assert list(first.tangents) == list(last.received)


@pytest.mark.parametrize("remat", ["full", "none"])
def test_the_peak_of_a_forward(remat: str) -> None:
    """While tanh runs: what was received, the product, the result. Views of weights are free."""
    assert bytes_of(0, remat).forward == bytes_of(1, remat).forward == 3 * ROWS


def test_the_peak_of_a_backward() -> None:
    """Of the last stage, with nothing to recompute: two products of matrices.

    tanh's backward ends with x and its result g. Then g times the weight gives the gradient to
    send. While g times x gives the weight's gradient, all four are there.
    """
    assert bytes_of(1, "none").first_backward == 3 * ROWS + WEIGHT


def test_later_micro_batches_find_sums_of_gradients() -> None:
    """The sums are allocated all the time, beside what the first micro-batch needs."""
    found = bytes_of(1, "none")
    assert found.backward == found.first_backward + WEIGHT + BIAS
