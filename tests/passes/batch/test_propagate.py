"""Models that mix samples are refused; those that only seem to agree with eager.

Covers batch/propagate.py, batch/lattice.py, batch/op_call.py and the rules: batch/rules_shape.py,
batch/rules_join.py, batch/rules_new.py, batch/rules_index.py, batch/rules_math.py and
batch/rules_layers.py (every operator by itself: `tests/system/test_operators.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import CouplingError
from tests.support.agreement import assert_agrees, pipelined
from tests.support.combining import BATCH, C, Model, agrees, inputs

pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.few(5)]

# ------------------------------------------------------------------------------- what mixes samples


def written(y: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    """`y` beside zeros of its shape that something was written to."""
    zeros = torch.zeros_like(y)
    write(zeros)
    return y + zeros


COUPLED: dict[str, Callable[[Tensor], Any]] = {
    "less the mean": lambda y: y - y.mean(0),
    "less the mean, detached": lambda y: y - y.mean(0).detach(),
    "times a mean": lambda y: (y * y.mean()).sum(),
    "less the first": lambda y: y - y[0],
    "normalised over the batch": lambda y: F.normalize(y, dim=0),
    "masked if any": lambda y: y * (y > 0).any(),
    "softmax": lambda y: y.softmax(0),
    "log softmax": lambda y: y.log_softmax(0),
    "cumulated": lambda y: y.cumsum(0),
    "sorted": lambda y: y.sort(0).values,
    "ranked": lambda y: y * y.argsort(0),
    "flipped": lambda y: y.flip(0),
    "rolled": lambda y: y.roll(1, 0),
    "all but the first": lambda y: y[1:],
    "differences": lambda y: y.diff(dim=0),
    "shuffled": lambda y: y[torch.randperm(y.shape[0])],
    "gathered from others": lambda y: y.gather(0, y.argsort(1) % y.shape[0]),
    "similarities": lambda y: y @ y.T,
    "sum of similarities": lambda y: (y @ y.T).sum(),
    "weighted by similarities": lambda y: (y @ y.T) @ y,
    "contrastive": lambda y: F.cross_entropy(y @ y.T, torch.arange(y.shape[0])),
    "all pairs": lambda y: (y[:, None] - y[None]).square().sum(-1).mean(),
    "distances": lambda y: torch.cdist(y, y).sum(),
    "attention among samples": lambda y: F.scaled_dot_product_attention(y[None], y[None], y[None]),
    "layer norm over the batch": lambda y: F.layer_norm(y.t(), (y.shape[0],)),
    "convolved over the batch": lambda y: F.conv1d(
        y.t()[None], torch.ones(C, C, 3, dtype=y.dtype), padding=1
    ),
    "regrouped": lambda y: y.reshape(C, y.shape[0]),
    "numbered": lambda y: y + torch.arange(y.shape[0])[:, None],
    "written by place": lambda y: written(y, lambda z: z[0].fill_(1)),
    "written from the second on": lambda y: written(y, lambda z: z[1:].fill_(1)),
    "a reduction written to all": lambda y: written(y, lambda z: z.copy_(y.mean(0))),
    "by the number of samples": lambda y: y / y.shape[0],
    "by the number of samples, summed": lambda y: (y / y.shape[0]).square().sum(),
    "maximum": lambda y: y.max(),
    "maximum over the batch": lambda y: y.amax(0),
    "median": lambda y: y.median(),
    "variance": lambda y: y.var(),
    "deviation over the batch": lambda y: y.std(0),
    "norm": lambda y: y.norm(),
    "product": lambda y: y.prod(),
    "log of summed exponentials": lambda y: y.logsumexp(0),
    "layer norm by a mean": lambda y: F.layer_norm(y, (C,), weight=y.mean(0)),
    "batch norm by a mean": lambda y: F.batch_norm(y, None, None, y.mean(0), training=True),
    "likeness to the mean": lambda y: F.cosine_similarity(y, y.mean(0, keepdim=True)),
    "likeness in another order": lambda y: F.cosine_similarity(
        y.repeat(2, 1), y.repeat_interleave(2, 0)
    ),
    "differences in another order": lambda y: y.repeat(2, 1).diff(
        dim=1, prepend=y.repeat_interleave(2, 0)
    ),
    "integrated along a mean": lambda y: torch.trapezoid(y, y.mean(0).cumsum(0)),
    "put into others' boundaries": lambda y: y + torch.bucketize(y[:, 0], y[:, 0])[:, None],
    "searched for among others": lambda y: y + torch.searchsorted(y[:, 0], y),
    "is among others": lambda y: y * torch.isin(y.argmax(1), y.argmin(1))[:, None],
    "distances to others": lambda y: torch.cdist(y, y * 2),
    "triplets of single numbers": lambda y: F.triplet_margin_loss(y[:, 0], y[:, 1], y[:, 2]),
    "one margin for all": lambda y: F.multi_margin_loss(y[:, 0], torch.tensor(1)),
    "filled with the number of samples": lambda y: y / torch.full_like(y, y.shape[0]),
    "a product times that number": lambda y: torch.addmm(y, y, torch.ones(C, C), alpha=y.shape[0]),
    "rolled by that number": lambda y: y.roll(y.shape[0], 1),
    "a norm of that power": lambda y: y.norm(p=y.shape[0], dim=1),
    "a triangle of that size": lambda y: (y[:, None] * y[..., None]).tril(y.shape[0] - 6),
    "that number written by index": lambda y: y.index_fill(1, torch.tensor([0]), y.shape[0]),
    "up to that number": lambda y: y * torch.linspace(0, y.shape[0], C),
    "another column for every size": lambda y: y[:, y.shape[0] - BATCH],
    "scattered to the first samples": lambda y: y.scatter(
        1, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    ),
    "the first sample": lambda y: y[0],
    "the last sample": lambda y: y[-1:],
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_mixes_samples_is_refused(name: str) -> None:
    """Micro-batches would compute something else: an error before anything runs (promise 6)."""
    f = COUPLED[name]
    with pytest.raises(CouplingError) as caught:
        pipelined(Model(f))(inputs())
    assert caught.value.node
    path, _, line = str(caught.value.source).rpartition(":")
    codes = (g.__code__ for g in (f, Model.forward))
    lines = {(code.co_filename, at) for code in codes for *_, at in code.co_lines()}
    assert (path, int(line)) in lines  # torch keeps the frames of functions called `forward`
    assert "what to do: " in str(caught.value)


@pytest.mark.parametrize("name", ["less the mean", "softmax", "contrastive", "maximum", "numbered"])
def test_with_a_single_micro_batch_samples_may_mix(name: str) -> None:
    pipe = pipelined(Model(COUPLED[name]), chunks=1)
    assert_agrees(pipe, inputs())


UNCOUPLED: dict[str, Callable[[Tensor], Any]] = {
    "softmax over classes": lambda y: y.softmax(-1),
    "likeness to a vector": lambda y: F.cosine_similarity(y, torch.ones(C)),
    "distances to a code book": lambda y: torch.cdist(y, torch.eye(C)),
    "put into boundaries": lambda y: y + torch.bucketize(y, torch.linspace(-1, 1, 5)),
    "searched for in its own row": lambda y: y + torch.searchsorted(y.cumsum(1).sort(1)[0], y),
    "is among some": lambda y: y * torch.isin(y.argmax(1), torch.tensor([0, 2]))[:, None],
    "whole divided": lambda y: y + (y.argmax(1) // 2)[:, None],
    "ranked pairs": lambda y: F.margin_ranking_loss(y, y * 2, y.sign()),
    "inverted per sample": lambda y: torch.linalg.inv(y[:, :, None] * y[:, None] + torch.eye(C)),
    "solved per sample": lambda y: torch.linalg.solve(y[:, :, None] * 0 + torch.eye(C), y),
    "scattered per sample": lambda y: y.scatter_add(1, y.argsort(1), y * 2),
    "less its own mean": lambda y: y - y.mean(1, keepdim=True),
    "normalised per sample": lambda y: F.normalize(y, dim=1),
    "cumulated per sample": lambda y: y.cumsum(1),
    "sorted per sample": lambda y: y.sort(1).values,
    "shifted per sample": lambda y: y.roll(1, 1) + y.flip(1),
    "layer norm": lambda y: F.layer_norm(y, (C,)),
    "group norm": lambda y: F.group_norm(y[:, :, None], 2),
    "outer product per sample": lambda y: y[:, :, None] @ y[:, None, :],
    "attention per sample": lambda y: F.scaled_dot_product_attention(*[y.view(-1, 1, 3, 2)] * 3),
    "picked per sample": lambda y: y[torch.arange(y.shape[0]), y.argmax(-1)],
    "gathered per sample": lambda y: y.gather(1, y.argsort(1)),
    "repeated in place": lambda y: y.repeat_interleave(2, 0),
    "entries repeated in a row": lambda y: y.repeat_interleave(2).view(-1, C, 2).sin(),
    "turned entries repeated": lambda y: y.t().contiguous().repeat_interleave(2).view(C, -1, 2),
    "transposed and back": lambda y: y.t().softmax(0).t(),
    "two per sample": lambda y: y.view(y.shape[0] * 2, -1).sum(-1),
    "sequence first": lambda y: y.view(-1, 3, 2).transpose(0, 1).softmax(0),
    "added to zeros of its size": lambda y: y + torch.zeros(y.shape[0], C),
    "the first of equal rows": lambda y: y + torch.arange(C).expand(y.shape[0], -1)[:1],
    "one of equal rows": lambda y: y + torch.ones(C).expand(y.shape[0], -1)[0],
    "zeros written to": lambda y: written(y, lambda z: z.copy_(y * 2)),
    "columns written to": lambda y: written(y, lambda z: z[:, 1:].copy_(y[:, :-1])),
    "doubled": lambda y: torch.cat([y, y * 2], 0),
    "repeated": lambda y: y.repeat(2, 1),
    "two halves": lambda y: sum(torch.cat([y, y * 2], 0).chunk(2)),
    "convolved per sample": lambda y: F.conv1d(y[:, None], torch.ones(1, 1, 3, dtype=y.dtype)),
}


@pytest.mark.parametrize("name", UNCOUPLED)
def test_what_keeps_samples_apart_is_not_refused(name: str) -> None:
    agrees(UNCOUPLED[name])


def test_a_micro_batch_of_one_sample_keeps_its_dimension() -> None:
    """`squeeze` removes what has one entry in the whole batch, not what has one by chance."""
    for f in (lambda y: y[:, :1].squeeze(), lambda y: y.squeeze(0), lambda y: y.squeeze((0, 1))):
        pipe = pipelined(Model(f), chunks=BATCH)
        assert_agrees(pipe, inputs())


def test_states_of_a_recurrent_layer_in_another_order() -> None:
    class Recurrent(Model):
        def __init__(self) -> None:
            super().__init__(lambda: None)
            self.rnn = nn.GRU(C, C, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            first = x.repeat_interleave(2, 0)[None]
            result: Tensor = self.rnn(x.repeat(2, 1)[:, None], first)[0]
            return result

    with pytest.raises(CouplingError, match="different orders"):
        pipelined(Recurrent(), devices=1)(inputs())


def test_windows_over_an_inputs_own_memory() -> None:
    """A micro-batch is a part of the batch's memory, which begins with the first one's."""

    class Windows(nn.Module):
        def __init__(self, *begin: int) -> None:
            super().__init__()
            self.begin = begin

        def forward(self, x: Tensor) -> Tensor:
            return x.as_strided((x.shape[0], 2), (C, 1), *self.begin) * 2

    assert_agrees(pipelined(Windows(), devices=1), inputs())
    with pytest.raises(CouplingError, match="memory of the whole batch"):
        pipelined(Windows(0), devices=1)(inputs())


def test_reductions_of_inputs_without_batch_are_not_refused() -> None:
    pipe = pipelined(Model(lambda y, table: y - table.mean(0) + table.max()), in_dims=(0, None))
    assert_agrees(pipe, inputs(), inputs(9))


def test_a_reduction_without_known_sum_says_what_to_do() -> None:
    with pytest.raises(CouplingError, match="no known sum") as caught:
        pipelined(Model(lambda y: y.max()))(inputs())
    assert re.search(r"node: max", str(caught.value))
    assert "aten.max" in str(caught.value)
    assert "return the unreduced values" in str(caught.value)
