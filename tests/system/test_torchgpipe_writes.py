"""What torchgpipe 0.0.7 promises its users of changes in place; truth is eager, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.errors import CaptureError, UnsupportedError
from tests.support.agreement import assert_agrees, pipelined
from tests.support.nets import REMATS, random

pytestmark = pytest.mark.usefixtures("alike_models_once")


class Written(nn.Module):
    """Layers, and something in place after each."""

    def __init__(self, change: Callable[[Tensor], Any], count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))
        self.change = change
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.change(x)
        return x


def of_a_view(x: Tensor) -> None:
    x[:, 1:3].mul_(2).tanh_()


def of_the_base_of_a_view(x: Tensor) -> None:
    view = x.view(-1, 2, 3)
    x.mul_(2)
    view[:, 0].add_(x[:, :3].sum(1, keepdim=True).detach())


def by_index(x: Tensor) -> None:
    x[:, 0] = 0.5
    x[:, 4] = x[:, 3]


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu": nn.ReLU(inplace=True),
    "a view": of_a_view,
    "the base of a view": of_the_base_of_a_view,
    "entries": by_index,
}


@pytest.mark.parametrize(("devices", "remat"), [(1, "none"), (2, "full"), (4, "min-cut")])
@pytest.mark.parametrize("name", IN_PLACE)
def test_changing_a_layers_value_in_place(name: str, devices: int, remat: str) -> None:
    """Wherever the cuts fall, nobody sees another stage's memory change."""
    pipe = pipelined(Written(IN_PLACE[name]), devices=devices, remat=remat)
    assert_agrees(pipe, random(5, 6).requires_grad_())


def test_a_result_that_a_stage_has_sent_is_not_changed_by_another() -> None:
    """ReLU in place right behind a cut, of a value that is also a result."""

    class Sent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.tanh(self.first(x))
            return self.last(F.relu(x.clone(), inplace=True)), x

    torch.manual_seed(0)
    assert_agrees(pipelined(Sent().double()), random(5, 6))


@pytest.mark.parametrize("remat", REMATS)
def test_what_autograd_still_needs_cannot_be_changed_in_place(remat: str) -> None:
    """The derivative of exp is its result: eager refuses, and so does the pipeline."""

    def change(x: Tensor) -> None:
        x.exp_().add_(1)

    x = random(5, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Written(change)(x).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pipelined(Written(change), remat=remat)(x).sum().backward()


class Input(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(F.relu(x, inplace=True)))


def test_an_input_that_wants_a_gradient_cannot_be_changed_in_place() -> None:
    x = random(5, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        Input().double()(x)
    before = x.detach().clone()
    with pytest.raises(CaptureError, match="leaf Variable that requires grad"):
        pipelined(Input().double())(x)
    assert torch.equal(x, before)


def test_an_input_changed_in_place_is_refused_before_it_is_touched() -> None:
    """Eager would change the caller's tensor; micro-batches of it do not promise to."""
    x = random(5, 6)
    before = x.clone()
    with pytest.raises(UnsupportedError, match="in place") as caught:
        pipelined(Input().double())(x)
    assert "clone" in str(caught.value.remedy)
    assert torch.equal(x, before)
