"""Traced ops have eager torch's strides, also where the pure form of an in-place operator has not.

Each model writes in place into a tensor whose order of dimensions in memory is not that of its
shape, and then views it, which is possible in that order only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autopipe
from tests.support.agreement import assert_agrees, pipelined
from tests.support.nets import random

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("traces_once")]


def columns(x: Tensor) -> Tensor:
    return torch.arange(2, device=x.device)


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill_": lambda x: x.masked_fill_(x > 0.3, 0.0),
    "cumsum_": lambda x: x.cumsum_(1),
    "index_add_": lambda x: x.index_add_(1, columns(x), torch.ones_like(x[:, :2])),
    "index_copy_": lambda x: x.index_copy_(1, columns(x), torch.ones_like(x[:, :2])),
    "scatter_": lambda x: x.scatter_(1, torch.zeros_like(x[:, :1]).long(), 2.0),
    "baddbmm_": lambda x: x.baddbmm_(x.detach() @ x.detach().mT, x.detach().clone()),
    "tril_": lambda x: x.tril_(),
    "triu_": lambda x: x.triu_(1),
    "floor_divide_": lambda x: x.mul_(3).sub_(x.detach().floor_divide_(torch.full((), 0.5))),
    "xlogy_": lambda x: x.xlogy_(torch.full((), 2.0)),
}


class Viewed(nn.Module):
    """Two layers; between them a write into a transposed tensor."""

    def __init__(self, write: Callable[[Tensor], Tensor], *, of_a_view: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(5, 3)
        self.write, self.of_a_view = write, of_a_view
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + 0.5
        if self.of_a_view:
            self.write(x.mT)
            return self.last(x.view(-1, 5))
        x = self.write(x.mT.clone(memory_format=torch.preserve_format))
        return self.last(x.mT.view(-1, 5))


@pytest.mark.parametrize("of_a_view", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_a_tensor_keeps_its_strides_when_it_is_written(name: str, of_a_view: bool) -> None:
    model = Viewed(WRITES[name], of_a_view=of_a_view)
    pipe = pipelined(model, chunks=2)
    assert_agrees(pipe, random(10, 5, 4).requires_grad_())


def test_a_write_that_torch_cannot_trace_is_refused_at_its_line() -> None:
    """Into a view of a view, where the pure form's strides allow no way back."""

    class Twice(Viewed):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)  # a view of a product
            x.mT.masked_fill_(x.mT > 0.3, 0.0)
            return self.last(x.view(-1, 5))

    model = Twice(nn.Identity())
    with pytest.raises(autopipe.errors.CaptureError, match="in place") as caught:
        pipelined(model)(random(10, 5, 4))
    assert "test_stage_runner.py" in (caught.value.source or "")
    assert "out of place" in (caught.value.remedy or "")


OUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, out: torch.add(x, 1.0, out=out),
    "cumsum": lambda x, out: torch.cumsum(x, 1, out=out),
    "tril": lambda x, out: torch.tril(x, out=out),
    "baddbmm": lambda x, out: torch.baddbmm(x, x @ x.mT, x, out=out),
}


@pytest.mark.parametrize("name", OUTS)
def test_and_when_it_is_out(name: str) -> None:
    def write(x: Tensor) -> Tensor:
        with torch.no_grad():  # there is no gradient through `out`
            return OUTS[name](x.contiguous(), torch.empty_like(x))

    pipe = pipelined(Viewed(write), chunks=2)
    assert_agrees(pipe, random(10, 5, 4).requires_grad_())


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli_": lambda x: x.bernoulli_(0.5),
    "bernoulli_ of doubles": lambda x: x.double().bernoulli_(0.5),
    "random_": lambda x: x.random_(-2, 3),
}


@pytest.mark.parametrize("name", DRAWS)
def test_and_when_it_is_drawn(name: str) -> None:
    pipe = pipelined(Viewed(lambda x: x + DRAWS[name](torch.empty_like(x))), chunks=2)
    x = random(10, 5, 4)
    torch.manual_seed(0)
    first = pipe(x)
    first.sum().backward()
    assert not torch.equal(first, pipe(x))


def test_random_between_two_limits_draws_all_numbers_between() -> None:
    """`random_.from` cannot be written in generated code: `from` is a keyword."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 0 + torch.empty_like(x).random_(-2, 3)

    found = autopipe.compile(Drawn(), 2, 2)(torch.randn(100, 4))
    assert set(found.detach().flatten().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_random_without_an_upper_limit_is_refused() -> None:
    model = Viewed(lambda x: x + torch.empty_like(x).random_(3, None))
    with pytest.raises(autopipe.errors.UnsupportedError, match="lower limit only") as caught:
        pipelined(model)(random(10, 5, 4))
    assert caught.value.source is not None
    assert "both limits" in (caught.value.remedy or "")
