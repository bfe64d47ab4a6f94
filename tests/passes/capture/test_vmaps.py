"""`torch.vmap` in a forward: over samples, over weights, for masks; against eager torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from autopipe.errors import CaptureError, CouplingError
from tests.support.agreement import assert_agrees, pipelined
from tests.support.capturing import Model

pytestmark = pytest.mark.few(5)
LENGTH, D = 5, 6


def causal(query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def attended(x: Tensor, mask: Tensor) -> Tensor:
    scores = (x @ x.transpose(-1, -2)).masked_fill(~mask, -1e9)
    return scores.softmax(-1) @ x


def with_a_mask(s: Any, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    over = torch.vmap(torch.vmap(causal, (None, 0)), (0, None))
    return s.last(attended(x, over(positions, positions)))


def with_a_mask_for_each_sample(s: Any, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    kept = x[..., 0] > -1

    def allowed(sample: Tensor) -> Tensor:
        return torch.vmap(lambda query: (query >= positions) & sample)(positions)

    return s.last(attended(x, torch.vmap(allowed)(kept)))


def with_create_mask(s: Any, x: Tensor) -> Tensor:
    mask = create_mask(lambda b, h, q, k: q >= k, 1, 1, LENGTH, LENGTH, device="cpu")
    y = x[:, None]
    return s.last(F.scaled_dot_product_attention(y, y, y, attn_mask=mask)[:, 0])


def without_gradients(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        weights = torch.vmap(lambda a: a.softmax(-1))(x)
    return s.last(x * weights)


FORWARDS: dict[str, Callable[..., Any]] = {
    "a function of each sample": lambda s, x: s.last(torch.vmap(torch.sin)(x)),
    "a layer": lambda s, x: torch.vmap(s.last)(x),
    "a closure over a weight": lambda s, x: torch.vmap(lambda a: a @ s.last.weight)(x),
    "over a weight": lambda s, x: torch.vmap(lambda w: x * w)(s.last.weight).sum(0),
    "another dimension": lambda s, x: s.last(torch.vmap(torch.tanh, 1, 1)(x)),
    "in chunks": lambda s, x: s.last(
        torch.vmap(torch.tanh, chunk_size=2)(x.transpose(0, 1)).transpose(0, 1)
    ),
    "two results": lambda s, x: s.last(sum(torch.vmap(lambda a: (a.exp(), a * 2))(x))),
    "a mask": with_a_mask,
    "a mask for each sample": with_a_mask_for_each_sample,
    "create_mask": with_create_mask,
    "without gradients": without_gradients,
}


PRODUCTS = ("a layer", "a closure over a weight")
"""A matrix product in a vmap; torch 2.11 and 2.12 fix its sizes."""


def words(size: int) -> Tensor:
    torch.manual_seed(size)
    return torch.randn(size, LENGTH, D, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", FORWARDS)
def test_vmap(name: str) -> None:
    if name in PRODUCTS and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 and 2.12 run the vmap of a matrix product for one size only")
    torch.manual_seed(0)
    pipe = pipelined(Model(FORWARDS[name]).double())
    assert_agrees(pipe, words(7))
    assert_agrees(pipe, words(4))


class Double(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


REFUSED: dict[str, Callable[..., Any]] = {
    "random": lambda s, x: torch.vmap(lambda a: a + torch.rand(()), randomness="different")(x),
    "in place": lambda s, x: torch.vmap(lambda a: (a * 2).add_(1))(x),
    "a Function": lambda s, x: torch.vmap(Double.apply)(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_plain_ops_cannot_do_is_refused(name: str) -> None:
    with pytest.raises(CaptureError) as caught:
        pipelined(Model(REFUSED[name]).double())(words(7))
    assert caught.value.remedy is not None
    assert caught.value.source is not None


def test_operators_that_fix_sizes_in_a_vmap_are_refused_by_their_line() -> None:
    class Convolved(Model):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda a: F.conv1d(a, self.last.weight[:5, :5, None]))(x)

    with pytest.raises(CaptureError, match="fixes the size") as caught:
        pipelined(Convolved(torch.sin).double())(words(7))
    assert "torch.vmap" in str(caught.value.remedy)
    assert __file__ in str(caught.value.source)


def test_samples_that_meet_in_a_vmap_are_refused() -> None:
    model = Model(lambda s, x: torch.vmap(lambda a: a.sum(0) * a, in_dims=1)(x).sum((0, 1)) * x)
    with pytest.raises(CouplingError, match="mixes the samples"):
        pipelined(model.double())(words(7))
