"""A pipeline as its model: names, state, modes, moves, `install`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import UnsupportedError
from autopipe.module_proxy import ModuleProxy

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.config = {"width": 3}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.mask


class Doubling(ModuleProxy):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.model(x)


def proxy() -> tuple[Model, Doubling]:
    model = Model()
    return model, Doubling(model, [CPU])


def test_names_and_objects_are_the_models() -> None:
    model, outer = proxy()
    assert [*outer.state_dict()] == [*model.state_dict()] == ["layer.weight", "layer.bias"]
    pairs = zip(outer.named_parameters(), model.named_parameters(), strict=True)
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in pairs)
    assert outer.config is model.config
    outer.extra = nn.Linear(1, 1)
    assert model.extra is outer.extra
    with pytest.raises(AttributeError, match="nothing"):
        _ = outer.nothing


def test_state_is_loaded_into_the_model() -> None:
    model, outer = proxy()
    outer.load_state_dict({n: torch.zeros_like(t) for n, t in model.state_dict().items()})
    assert model.layer.weight.abs().sum() == 0


def test_modes_are_shared() -> None:
    model, outer = proxy()
    assert outer.training
    outer.eval()
    assert not model.training
    assert not model.layer.training


def test_moves_that_change_nothing_are_accepted() -> None:
    model, outer = proxy()
    weight = model.layer.weight
    assert outer.to("cpu") is outer
    assert outer.float() is outer
    assert model.layer.weight is weight
    for move in (outer.double, outer.half, lambda: outer.to("meta"), outer.share_memory):
        with pytest.raises(UnsupportedError, match="on the devices of its stages"):
            move()
    assert model.layer.weight.dtype is torch.float32


def test_install_and_uninstall() -> None:
    model, outer = proxy()
    x = torch.ones(2, 3)
    expected = model.forward(x)
    assert outer.install() is model
    calls = []
    object.__setattr__(outer, "model", lambda x: calls.append(1) or expected)
    assert torch.equal(model(x), 2 * expected)
    assert calls == [1]
    assert copy.deepcopy(model)._compiled_call_impl is None
    object.__setattr__(outer, "model", model)
    assert outer.uninstall() is model
    assert torch.equal(model(x), expected)
