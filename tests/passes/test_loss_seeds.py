"""What the gradients of a model's outputs depend on, before its loss is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import UnsupportedError
from autopipe.passes.loss_seeds import LossSeeds, has_loss, loss_seeds
from autopipe.results import run_epilogue
from tests.support.agreement import pipelined
from tests.support.capturing import Model


def seeds_of(forward: Callable[..., Any], *inputs: Tensor) -> LossSeeds:
    pipe = pipelined(Model(forward))
    pipe(*inputs)
    captured = pipe.captured
    sizes = {s: 6 for o in captured.outputs for n in o.spec.full_shape for s in n.free_symbols}
    examples = [
        torch.ones([int(n.xreplace(sizes)) for n in o.spec.full_shape], dtype=o.spec.dtype)
        for o in captured.outputs
    ]

    def evaluate(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return run_epilogue(captured, outputs, sizes, pipe.model.get_buffer)

    floating = frozenset(o.name for o in captured.outputs if o.spec.dtype.is_floating_point)
    assert has_loss(captured)
    return loss_seeds(captured, floating, evaluate, examples)


X, LABELS = torch.randn(6, 6), torch.tensor([0, -1, 2, 3, -1, 5])


def test_a_mean_depends_on_nothing() -> None:
    seeds = seeds_of(lambda s, x: s.last(s.first(x)).square().mean(), X)
    assert (seeds.known, seeds.in_common, len(seeds.outputs)) == ((), False, 1)


def test_a_count_of_labels_is_computed_from_them() -> None:
    seeds = seeds_of(lambda s, x, y: F.cross_entropy(s.last(x), y, ignore_index=-1), X, LABELS)
    assert not seeds.in_common
    assert len(seeds.known) == 1
    (count,) = seeds.values(LABELS)
    assert count == 4


def test_a_common_factor_may_be_unknown() -> None:
    assert seeds_of(lambda s, x: s.last(x).square().sum().sqrt(), X).in_common


def test_the_loss_of_a_result_is_the_one_called_so() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = s.last(s.first(x))
        return {"other": y.sum(), "loss": y.square().sum()}

    seeds = seeds_of(forward, X)
    assert len(seeds.outputs) == 1
    assert seeds.losses == (1,)


def test_several_unknown_factors_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="what all micro-batches compute"):
        seeds_of(lambda s, x: s.first(x).square().sum() * s.last(x).sum(), X)


def test_results_without_a_loss() -> None:
    pipe = pipelined(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    pipe(X)
    assert not has_loss(pipe.captured)
