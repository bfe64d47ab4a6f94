"""What an eager run shows of a phase: what a graph needs, and what prevents one.

Covers autopipe/graphed_stages.py (`_WatchOps`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from autopipe.errors import UnsupportedError
from autopipe.graphed_stages import _WatchOps
from autopipe.runtime.graphs.observed import (
    Observed,
    ObservingContext,
    OpObserver,
    TensorLayout,
    memory_like,
)
from autopipe.runtime.random import MicroBatchContext

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 12).reshape(3, 4)


def observed(function: Callable[[Tensor], Any], device: torch.device = CPU) -> Observed:
    seen, x = Observed(), X.clone()
    with _WatchOps(OpObserver(seen, device, [x])):
        function(x)
    return seen


@pytest.mark.parametrize(
    "function",
    [
        torch.tanh,
        lambda x: x @ x.t(),
        lambda x: torch.cat([x, x]).add_(1),
        lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
        lambda x: torch.split(x, 2)[0] * 2,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: torch.zeros(3) + 1,
    ],
)
def test_what_graphs_can_do(function: Callable[[Tensor], Any]) -> None:
    seen = observed(function)
    assert seen.obstacle is None
    assert seen.computes


@pytest.mark.parametrize(
    ("function", "obstacle"),
    [
        (lambda x: x.sum().item(), "waits for its result"),
        (lambda x: torch.equal(x, x), "waits for its result|returns a number"),
        (torch.nonzero, "waits for its result"),
        (lambda x: torch.masked_select(x, x > 0), "waits for its result"),
        (lambda x: x[x > 0], "mask selects"),
        (lambda x: torch.zeros(3, 4).index_put((x > 0,), torch.ones(())), "mask selects"),
        (lambda x: x.add_(1), "writes to what the phase is given"),
        (lambda x: torch.unique(x), "waits for its result"),
    ],
)
def test_what_they_cannot(function: Callable[[Tensor], Any], obstacle: str) -> None:
    with pytest.raises(AssertionError, match=obstacle):
        raise AssertionError(observed(function).obstacle)


def test_what_runs_on_another_device() -> None:
    seen = observed(torch.tanh, torch.device("cuda", 0))
    assert seen.obstacle == "aten.tanh.default computes on cpu, not on cuda:0"


def test_numbers_that_the_host_makes_are_constants() -> None:
    """As those of ``torch.where(mask, x, 0.0)``; not what it draws, or computes from tensors."""
    gpu = torch.device("meta")
    with torch.device("cpu"):
        assert observed(lambda x: torch.scalar_tensor(2.0) * torch.zeros(()), gpu).obstacle is None
        assert "computes on cpu" in str(observed(lambda x: torch.rand(()), gpu).obstacle)
        assert "computes on cpu" in str(observed(lambda x: torch.zeros(()) + x, gpu).obstacle)


def test_views_compute_nothing() -> None:
    seen = observed(lambda x: x.t()[1:].reshape(-1, 1).detach())
    assert (seen.obstacle, seen.computes) == (None, True)  # this reshape copies
    assert not observed(lambda x: x.t()[1:].view(3, 3)).computes


def test_the_first_obstacle_is_kept() -> None:
    seen = Observed()
    seen.note("one")
    seen.note("two")
    assert seen.obstacle == "one"


def context(added: list[tuple[int, Tensor]]) -> tuple[Observed, Any]:
    draws = [(0, 0, False), (1, 0, False)]
    ctx = MicroBatchContext(7, draws, 0, lambda i, g: added.append((i, g)), (5,))
    seen = Observed()
    return seen, ObservingContext(ctx, seen)


def test_sums_and_draws_are_noted_and_done() -> None:
    added: list[tuple[int, Tensor]] = []
    seen, ctx = context(added)
    gradient = torch.ones(4).expand(3, 4)
    ctx.accumulate(1, gradient)
    drawn = ctx.draw(1, torch.ops.aten.bernoulli.p, X, 0.5)
    assert added == [(1, gradient)]
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert (seen.obstacle, list(seen.draws), ctx.sizes) == (None, [1], (5,))
    assert seen.sums == {1: TensorLayout((3, 4), (0, 1), torch.float32)}
    assert seen.sums[1].dense() == TensorLayout((3, 4), (4, 1), torch.float32)


def test_sparse_gradients_and_untagged_operators_are_obstacles() -> None:
    seen, ctx = context([])
    ctx.accumulate(0, X.to_sparse())
    assert seen.obstacle == "a gradient is sparse"
    seen, ctx = context([])
    assert torch.equal(ctx.watched(torch.ops.aten.neg.default, X), -X)
    assert seen.obstacle == "aten.neg.default has no tag that says whether it draws random numbers"


def test_memory_like_a_tensor() -> None:
    part = X.t()[1:]
    found = memory_like(part)
    assert TensorLayout.of(found) == TensorLayout.of(part)
    with pytest.raises(Exception, match="cannot receive an expanded tensor"):
        memory_like(X[0].expand(3, 4))


def test_own_memory_is_written_in_any_mode() -> None:
    """`torch.inference_mode` is over when another call of the same program runs."""
    with torch.inference_mode():
        own = memory_like(torch.ones(3))
    with torch.no_grad():
        own.copy_(torch.ones(3))
    assert own.tolist() == [1, 1, 1]


def test_what_is_not_one_piece_of_memory_has_nothing_like_it() -> None:
    for tensor in (torch.eye(3).to_sparse(), TwoTensor(torch.ones(3), torch.ones(3))):
        with pytest.raises(UnsupportedError, match="sparse tensor or a wrapper"):
            memory_like(tensor)
