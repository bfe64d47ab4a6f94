"""Branches on the batch size: each batch gets the branch that eager torch would take for it.

Covers capture/canonicalize.py (squeezes) and capture/size_uses.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopipe.errors import CaptureError
from tests.support.agreement import assert_agrees, pipelined

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("traces_once")]


class Model(nn.Module):
    """``forward(x)`` is ``f(layer(x), x)``."""

    def __init__(self, f: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.f = nn.Linear(6, 6), f
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.f(self.layer(x), x)


def batch(size: int) -> Tensor:
    return torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


BRANCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "even": lambda h, x: h * 2 if x.shape[0] % 2 == 0 else h * 3,
    "more than five": lambda h, x: h * 2 if x.shape[0] > 5 else h * 3,
    "not four": lambda h, x: h * 2 if x.shape[0] != 4 else h * 2.0,
    "one": lambda h, x: h * 2 if x.shape[0] == 1 else h * 3,
    "a multiple of three, up to nine": lambda h, x: (
        h.sin() if x.shape[0] % 3 == 0 and x.shape[0] <= 9 else h.cos()
    ),
    "a number made of the size": lambda h, x: F.scaled_dot_product_attention(
        h.view(-1, 2, 3), h.view(-1, 2, 3), h.view(-1, 2, 3), scale=1 / x.shape[0]
    ),
    "none": lambda h, x: h.tanh(),
}


@pytest.mark.parametrize("first", [8, 3, 1])
@pytest.mark.parametrize("name", BRANCHES)
def test_every_batch_takes_its_own_branch(name: str, first: int) -> None:
    pipe = pipelined(Model(BRANCHES[name]))
    for size in (first, 6, 8, 1, 3, 12, 7):
        assert_agrees(pipe, batch(size))


def test_a_branch_is_captured_once() -> None:
    pipe = pipelined(Model(BRANCHES["even"]))
    captured = []
    for size in (8, 6, 7, 3, 4, 9):
        pipe(batch(size))
        captured.append(pipe.captured)
    assert [captured.index(c) for c in captured] == [0, 0, 2, 2, 0, 2]


def test_a_model_without_branches_is_captured_once() -> None:
    pipe = pipelined(Model(BRANCHES["none"]))
    captured = set()
    for size in (8, 3, 1, 20):
        pipe(batch(size))
        captured.add(id(pipe.captured))
    assert len(captured) == 1


def test_a_branch_for_one_size_alone_is_refused_by_line() -> None:
    """The exporter cannot keep a size open that was found to be four."""

    def four(h: Tensor, x: Tensor) -> Tensor:
        return h * 2 if x.shape[0] == 4 else h * 3

    pipe = pipelined(Model(four))
    assert_agrees(pipe, batch(8))
    with pytest.raises(CaptureError, match="fixes the size of its batch") as caught:
        pipe(batch(4))
    assert str(caught.value.source).startswith(__file__)


SQUEEZES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all": lambda h, x: h[:, :1].squeeze(),
    "in place": lambda h, x: (h[:, :1] * 1).squeeze_(),
    "a copy": lambda h, x: torch.squeeze_copy(h[:, :1]),
    "one": lambda h, x: h[:, None].squeeze(1),
    "two": lambda h, x: h[:, None, :1].squeeze((1, 2)),
    "the batch's": lambda h, x: h.squeeze(0).sin(),
    "before a loss": lambda h, x: F.mse_loss(h[:, :1].squeeze(), x[:, 0]),
}


@pytest.mark.parametrize("name", SQUEEZES)
def test_squeezes_leave_a_micro_batch_of_one_alone(name: str) -> None:
    """7 samples in 4 chunks are 2, 2, 2, 1; of a batch of one eager squeezes that away too."""
    pipe = pipelined(Model(SQUEEZES[name]), chunks=4)
    for size in (8, 7, 3, 2):
        assert_agrees(pipe, batch(size))
    if name != "before a loss":  # there eager warns of shapes that differ
        assert_agrees(pipe, batch(1))


@pytest.mark.parametrize(
    "f",
    [
        lambda h, x: torch.stack(list(h)),
        lambda h, x: torch.stack([row * 2 for row in h]),
        lambda h, x: torch.stack(h.unbind(0)),
        lambda h, x: torch.stack(torch.unbind(h)),
        lambda h, x: h * len(x),
    ],
    ids=["list", "for", "unbind", "torch.unbind", "len"],
)
def test_going_through_the_batch_is_refused_by_line(f: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match="fixes the size of its batch") as caught:
        pipelined(Model(f))(batch(8))
    assert str(caught.value.source).startswith(__file__)
    assert "sample by sample" in str(caught.value)


def test_a_batch_of_one_in_a_model_that_makes_a_table() -> None:
    """It is traced as itself; what the first call leaves is tried with that one sample."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6).double()
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(6.0, dtype=x.dtype).sin()
            y = self.layer(x) * self.table
            return y.tanh() if x.shape[0] == 1 else y.sin()

    pipe = pipelined(Made())
    for size in (7, 1, 4):
        assert_agrees(pipe, batch(size))
