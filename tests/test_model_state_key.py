"""Which changes of a model make it be captured again."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import autopipe
from autopipe.errors import CaptureError
from autopipe.model_state_key import model_state_key

pytestmark = pytest.mark.few(4)


@dataclass
class Settings:
    scale: float = 1.0
    parts: list[int] = field(default_factory=lambda: [1, 2])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again = self.first
        self.register_buffer("table", torch.zeros(3))
        self.settings = Settings()
        self.names = types.SimpleNamespace(mode="a")
        self.known = {"a": (1, 2.0)}
        self.constant = torch.ones(1)
        self.trainer = object()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "training flag": lambda m: m.eval(),
    "flag of a part": lambda m: m.last.eval(),
    "number": lambda m: setattr(m, "temperature", 2.0),
    "dataclass": lambda m: setattr(m.settings, "scale", 2.0),
    "list in a dataclass": lambda m: m.settings.parts.append(3),
    "namespace": lambda m: setattr(m.names, "mode", "b"),
    "dict": lambda m: m.known.update(b=1),
    "tuple in a dict": lambda m: m.known.update(a=(1, 3.0)),
    "another tensor": lambda m: setattr(m, "constant", torch.ones(1)),
    "layer": lambda m: setattr(m, "last", nn.Tanh()),
    "hook": lambda m: m.first.register_forward_hook(lambda *args: None),
    "forward": lambda m: setattr(m.first, "forward", lambda x: x),
    "tie": lambda m: setattr(m.last, "weight", m.first.weight),
    "order of layers that come back": lambda m: setattr(m, "again", m.last),
    "dtype": lambda m: m.double(),
    "shape of a buffer": lambda m: setattr(m, "table", torch.zeros(4)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_count(name: str) -> None:
    model = Model()
    before = model_state_key(model)
    CHANGES[name](model)
    assert model_state_key(model) != before


SAME: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "values of a parameter": lambda m: m.first.weight.data.fill_(1),
    "values of a tensor": lambda m: m.constant.fill_(2),
    "an object of another kind": lambda m: setattr(m, "trainer", object()),
    "an equal parameter": lambda m: setattr(m.last, "bias", nn.Parameter(torch.ones(3))),
    "a flag of gradients": lambda m: m.first.requires_grad_(False),
}


@pytest.mark.parametrize("name", SAME)
def test_changes_that_a_captured_graph_sees(name: str) -> None:
    model = Model()
    before = model_state_key(model)
    SAME[name](model)
    assert model_state_key(model) == before
    assert hash(model_state_key(model)) == hash(before)


def test_containers_may_contain_themselves() -> None:
    model = Model()
    model.known["self"] = model.known  # type: ignore[assignment]
    assert model_state_key(model) == model_state_key(model)


def test_a_lazy_layer_must_be_called_first() -> None:
    with pytest.raises(CaptureError, match="no shape yet") as caught:
        model_state_key(nn.Sequential(nn.LazyLinear(3)))
    assert "LazyLinear.weight" in str(caught.value)


def _traced(model: nn.Module) -> nn.Module:
    traced: nn.Module = torch.jit.trace(model, torch.ones(1, 3))
    return traced


def _frozen(model: nn.Module) -> nn.Module:
    frozen: nn.Module = torch.jit.freeze(torch.jit.script(model.eval()))
    return frozen


@pytest.mark.parametrize("compiled", [torch.jit.script, _traced, _frozen])
def test_layers_of_torchscript(compiled: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"a": compiled(nn.Linear(3, 3))}))
    with pytest.raises(CaptureError, match="a part of the model is compiled by Torch") as caught:
        model_state_key(model)
    assert caught.value.node == "1.a"
    assert str(caught.value.found).startswith("a Linear, as a ")
    with pytest.raises(CaptureError, match="the model is compiled by TorchScript"):
        model_state_key(compiled(nn.Linear(3, 3)))


def test_torchscript_that_is_no_layer() -> None:
    """A layer in a list is found where it is called; functions without parameters just run."""

    class Hidden(nn.Module):
        def __init__(self, part: Any) -> None:
            super().__init__()
            self.first, self.parts = nn.Linear(3, 3), [part]

        def forward(self, x: torch.Tensor) -> Any:
            return self.parts[0](self.first(x))

    x = torch.randn(4, 3)
    with pytest.raises(CaptureError, match="TorchScript"):
        autopipe.compile(Hidden(torch.jit.script(nn.Linear(3, 3))), 1, 2)(x)
    model = Hidden(torch.jit.trace(lambda x: x.tanh() * 2, (x,)))
    torch.testing.assert_close(autopipe.compile(model, 1, 2)(x), model(x))
