"""How many samples batch norm in training needs: where eager refuses, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import InputError
from autopipe.passes.phases.batch_norm import least_samples
from tests.support.agreement import pipelined
from tests.support.programs import captured_of, user_line

pytestmark = pytest.mark.few(3)


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x))  # the line of the norm


NORMS = [
    (nn.BatchNorm1d(6), (6,), 2),
    (nn.BatchNorm2d(6), (6, 1, 1), 2),
    (nn.BatchNorm1d(6), (6, 3), 1),
    (nn.BatchNorm2d(6), (6, 1, 2), 1),
    (nn.BatchNorm1d(6).eval(), (6,), 1),
    (nn.BatchNorm1d(6, track_running_stats=False).eval(), (6,), 2),
]


@pytest.mark.parametrize(("norm", "shape", "least"), NORMS)
def test_the_least_micro_batch_is_the_least_that_eager_accepts(
    norm: nn.Module, shape: tuple[int, ...], least: int
) -> None:
    model, x = Normalised(norm), torch.randn(6, *shape)
    eagerly: Callable[..., Any] = model
    captured = captured_of(model, x)
    assert [least_samples(captured, batch) for batch in (1, 2, 3, 1000)] == [1, *[least] * 3]
    assert eagerly(x[:least]).shape == x[:least].shape
    pipe = pipelined(model, devices=1, chunks=3)
    assert pipe(x[:3]).shape == x[:3].shape
    assert pipe.plan.sizes == ((3,) if least == 2 else (1, 1, 1))
    assert pipe(x[:5]).shape == x[:5].shape
    assert pipe.plan.sizes == ((3, 2) if least == 2 else (2, 2, 1))


@pytest.mark.parametrize(("norm", "shape"), [n[:2] for n in NORMS if n[2] == 2])
def test_a_batch_with_one_value_is_refused_as_in_eager(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model, x = Normalised(norm), torch.randn(1, *shape)
    eagerly: Callable[..., Any] = model
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        eagerly(x)
    pipe = pipelined(model, devices=1, chunks=3)
    with pytest.raises(InputError, match="a batch of 1 has one") as caught:
        pipe(x)
    assert caught.value.source == user_line(Normalised.forward, "# the line " + "of the norm")
    assert "larger batch" in str(caught.value)
    larger = torch.randn(6, *shape)
    assert pipe(larger).shape == larger.shape  # micro-batches of two
