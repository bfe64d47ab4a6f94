"""Connectionist temporal classification: the loss of a batch from those of micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import CaptureError, CouplingError
from tests.support.agreement import assert_agrees, pipelined

STEPS, CLASSES, LONGEST = 9, 6, 4


pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("double", "traces_once")]


class Recogniser(nn.Module):
    """Features (N, T, C) to a loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(CLASSES, CLASSES)
        self.loss = nn.CTCLoss(**options)

    def forward(self, x: Tensor, targets: Tensor, lengths: Any, labels: Any) -> Tensor:
        scores = self.layer(x).log_softmax(-1).transpose(0, 1)
        result: Tensor = self.loss(scores, targets, lengths, labels)
        return result


def call(size: int, least: int = STEPS - 2) -> tuple[Tensor, ...]:
    """Some targets are empty; with `least` = 1 some inputs are too short for theirs."""
    return (
        torch.randn(size, STEPS, CLASSES, requires_grad=True),
        torch.randint(1, CLASSES, (size, LONGEST)),
        torch.randint(least, STEPS + 1, (size,)),
        torch.randint(0, LONGEST + 1, (size,)),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"zero_infinity": True}, {"blank": CLASSES - 1}])
def test_the_batchs_loss(reduction: str, options: dict[str, Any]) -> None:
    """The mean is over samples, of losses divided by the lengths of their targets."""
    pipe = pipelined(Recogniser(reduction=reduction, **options))
    for size in (7, 6, 2):
        inputs = call(size, 1 if "zero_infinity" in options else STEPS - 2)
        if "blank" in options:
            inputs = (inputs[0], inputs[1] - 1, *inputs[2:])
        assert_agrees(pipe, *inputs)


def test_short_integers_as_lengths() -> None:
    x, targets, lengths, labels = call(7)
    assert_agrees(pipelined(Recogniser()), x, targets.int(), lengths.int(), labels.int())


def test_lengths_of_one_batch_fix_its_size() -> None:
    class Fixed(Recogniser):
        def forward(self, x: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, targets, [STEPS] * 7, [LONGEST] * 7)

    with pytest.raises(CaptureError, match="fixes the size of its batch"):
        pipelined(Fixed())(*call(7)[:2])


def test_targets_one_behind_the_other_are_refused() -> None:
    x, targets, lengths, labels = call(7)
    pipe = pipelined(Recogniser(), in_dims=(0, None, 0, 0))
    with pytest.raises(CaptureError):
        pipe(x, targets.flatten(), lengths, labels)


def test_time_is_not_the_batch() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            one = torch.ones(CLASSES, 1, dtype=torch.long)
            return F.ctc_loss(x.log_softmax(-1), one, one[:, 0] * 2, one[:, 0])

    with pytest.raises(CouplingError, match="along the batch"):
        pipelined(Turned(), devices=1)(torch.randn(7, CLASSES, CLASSES))
