"""Results that are written in place: losses collected in a tensor, added up, scaled, masked.

Covers batch/epilogue.py and batch/epilogue_cut.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import CouplingError
from tests.support.agreement import assert_agrees, pipelined

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("traces_once")]


class Model(nn.Module):
    """``forward(h, y, weight)`` is `f` of logits, labels and a parameter."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 5)
        self.f = f
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.f(self.last(torch.tanh(self.first(x))), y, self.first.weight)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (7,), generator=generator)
    y[:2] = -100
    return torch.randn(7, 4, dtype=torch.float64, generator=generator), y


def zeros(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)


def collected(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    losses = zeros(3)
    losses[0] = h.square().mean()
    losses[1] = F.cross_entropy(h, y)
    losses[2] = 0.5
    return losses.sum()


def read_through_its_base(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    base = zeros(6)
    view = base.view(2, 3)
    view[:, 1:] += h.mean(0)[:4].view(2, 2)
    return base.square().sum()


def masked(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    m = h.mean(0).square()
    m[0] = 0.0
    return m.sum()


def constant_in_a_sum(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    total = h.sum(0)
    total[0] = 1.0
    return total


def added_to(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss = F.cross_entropy(h, y)
    loss += 0.1 * h.square().mean()
    loss += w.square().sum()
    return loss


def scaled(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss = F.cross_entropy(h, y)
    loss *= 0.5
    loss /= 3
    return loss


def accumulated(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss = zeros()
    for part in h.unbind(1):
        loss += part.square().mean()
    return loss


def accumulated_in_what_is_static(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss = w.square().sum()
    loss += h.square().mean()
    return loss


def read_before_and_after(h: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = h.mean(0)
    before = z.exp().sum()
    z[1:].mul_(2)
    after = z.exp().sum()
    z[0] = 0
    return before, after, z


def static_and_written_after_it_was_read(h: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    z = w.sum(0)
    first = h.sum(0)[:4] + z
    z.add_(1)
    return first, z


def used_by_samples_first(h: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    z = zeros(5)
    z.fill_(2)
    k = h + z
    z += h.mean(0)
    return k, z.sum()


def logits_that_are_written_after_the_loss(h: Tensor, y: Tensor, w: Tensor) -> Any:
    loss = F.cross_entropy(h.detach() * w.sum(), y)
    g = h.detach() * w.sum()
    second = F.cross_entropy(g, y)
    g.mul_(0)
    return loss + second, g


def counted(h: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.zeros((), dtype=torch.long)
    n += (y != -100).sum()
    return (h.square().sum() / n), n


def put_by_index(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    losses = zeros(4)
    losses[torch.tensor([1, 3])] = h.mean(0)[:2]
    losses[[0]] += 1
    return losses.square().sum()


WRITTEN: list[Callable[..., Any]] = [
    collected,
    read_through_its_base,
    masked,
    constant_in_a_sum,
    added_to,
    scaled,
    accumulated,
    accumulated_in_what_is_static,
    read_before_and_after,
    static_and_written_after_it_was_read,
    used_by_samples_first,
    logits_that_are_written_after_the_loss,
    counted,
    put_by_index,
]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("f", WRITTEN, ids=lambda f: f.__name__)
def test_results_written_in_place(f: Callable[..., Any], chunks: int) -> None:
    pipe = pipelined(Model(f), chunks=chunks)
    assert_agrees(pipe, *inputs())
    assert_agrees(pipe, *inputs())  # nothing of the first call is left


def test_what_moved_to_the_epilogue_left_the_stages() -> None:
    pipe = pipelined(Model(collected), args=inputs())
    names = [n.name for n in pipe.captured.graph_module.graph.nodes]
    assert not [n for n in names if n.startswith(("copy_", "fill_", "select"))]


def samples_into_a_sum(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    counts = zeros(5)
    counts.addmv_(h.T, h[:, 0])
    return counts


def a_sample_into_a_tensor(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    first = zeros(2)
    first[0] = h[0, 0]
    return first


def a_mean_into_samples(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    h = h * 1
    h[:, 0] = h.mean()
    return h


@pytest.mark.parametrize("f", [samples_into_a_sum, a_sample_into_a_tensor, a_mean_into_samples])
def test_what_has_no_known_sum_is_refused(f: Callable[..., Any]) -> None:
    with pytest.raises(CouplingError) as caught:
        pipelined(Model(f), args=inputs())
    assert __file__ in str(caught.value.source)
