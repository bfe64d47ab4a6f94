"""Five ordinary things that break torch.distributed.pipelining 2.13, one small model each.

`tests/test_peers.py` trains them as pipelines and compares with eager torch;
`benchmarks/pipelining.py` does the same with torch's own pipelining. Everything is float64, so that
what is wrong cannot be called rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

WIDTH = 32
"""Wide enough that a cut falls between layers: the linear maps outweigh what stands between."""


class Skip(nn.Module):
    """The first layer's value goes into the second layer and past it into the third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shared = torch.tanh(self.first(x))
        x = torch.tanh(self.second(shared))
        return self.third(x) + shared


class Auxiliary(nn.Module):
    """The middle layer's value is a result too, as for an auxiliary classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.first(x))
        middle = torch.tanh(self.second(x))
        return torch.tanh(self.third(middle)), middle


class Tied(nn.Module):
    """One weight in the first layer and in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Plain(nn.Module):
    """Two layers: here the batch is the difficulty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Named(Plain):
    """The result is a dict."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"prediction": super().forward(x)}


def _of_both(result: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    prediction, middle = result
    return mse_loss(prediction, target) + mse_loss(middle, target)


def _of_prediction(result: dict[str, Tensor], target: Tensor) -> Tensor:
    return mse_loss(result["prediction"], target)


@dataclass(frozen=True)
class Case:
    """One difficulty.

    Attributes:
        says: what is difficult, in a few words.
        model: its class.
        split: the modules before which a stage begins, for those who cut by hand.
        loss: ``loss(result, target)``, a mean over the batch.
        batch: samples.
        chunks: micro-batches.
    """

    says: str
    model: Callable[[], nn.Module]
    split: tuple[str, ...]
    loss: Callable[[Any, Tensor], Tensor] = mse_loss
    batch: int = 8
    chunks: int = 4

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The model, its input and the loss's target: the same ones every time."""
        torch.manual_seed(0)
        model = self.model().double()
        x, target = torch.randn(2, self.batch, WIDTH, dtype=torch.float64)
        return model, x, target


CONTROL = Case("nothing of the kind, for control", Plain, ("second",))
"""What both train, so that a failure of the others is not one of the benchmark."""

CASES = {
    "skip": Case("a value that two later stages use", Skip, ("second", "third")),
    "auxiliary": Case(
        "an auxiliary output of a middle stage", Auxiliary, ("second", "third"), _of_both, batch=12
    ),
    "tied": Case("a weight tied across stages", Tied, ("second",)),
    "indivisible": Case("10 samples in 4 micro-batches", Plain, ("second",), batch=10),
    "dict": Case("a dict as the result", Named, ("second",), _of_prediction),
}
