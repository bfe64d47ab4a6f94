"""Weights of classes of their own: what acts below autograd runs; the rest is refused by name.

Truth is eager torch. (The weights of torchao and bitsandbytes are refused like `Reading` here: by
hand, with torchao 0.18 and bitsandbytes 0.50.) Covers capture/explain.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError
from autopipe.runtime.memory import plain_parts
from tests.support.agreement import assert_close, pipelined

aten = torch.ops.aten


class Quantised(Tensor):
    """Eight bits and a scale for each row; every operator but a few gets it dequantised."""

    values: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype)  # type: ignore

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    def __tensor_flatten__(self) -> Any:
        return ["values", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, meta: Any, size: Any, stride: Any) -> Any:
        return cls(parts["values"], parts["scales"])

    def plain(self) -> Tensor:
        return self.values.to(self.scales.dtype) * self.scales

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(func(args[0].values), func(args[0].scales))
        plain = pytree.tree_map_only(Quantised, Quantised.plain, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Reading(Quantised):
    """Reads its parts where autograd and a trace see it, as torchao's weights do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.values.to(x.dtype) * weight.scales, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def quantised(layer: nn.Linear, kind: type[Quantised], *, grad: bool = False) -> nn.Linear:
    weight = layer.weight.detach()
    scales = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scales).round().to(torch.int8)
    layer.weight = nn.Parameter(kind(values, scales), requires_grad=grad)
    return layer


def model(position: int, kind: type[Quantised], *, grad: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8).double() for _ in range(3)]
    quantised(layers[position], kind, grad=grad)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


X = torch.randn(6, 8, dtype=torch.float64)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(("position", "grad"), [(0, False), (1, False), (2, False), (2, True)])
def test_a_wrapper_that_acts_below_autograd(position: int, grad: bool, remat: str) -> None:
    net = model(position, Quantised, grad=grad)
    trained = [p for p in net.parameters() if p.requires_grad]
    expected = net(X)
    gradients = torch.autograd.grad(expected.square().sum(), trained)
    pipe = pipelined(net, remat=remat)
    found = pipe(X)
    assert_close(found, expected, "result")
    found.square().sum().backward()
    for p, g in zip(trained, gradients, strict=True):
        assert_close(p.grad, g, "gradient")
    assert isinstance(net[2 * position].weight.data, Quantised)


def test_a_buffer_that_is_a_wrapper() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8).double()
            self.register_buffer("weight", quantised(nn.Linear(8, 3).double(), Quantised).weight)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x), self.weight)

    net = Model()
    assert_close(pipelined(net, devices=1)(X), net(X), "result")


@pytest.mark.parametrize("position", [0, 2])
def test_a_wrapper_whose_parts_are_read_is_refused_by_name(position: int) -> None:
    with pytest.raises(CaptureError, match="a weight is of a class with operations") as caught:
        pipelined(model(position, Reading))(X)
    assert caught.value.node == f"{2 * position}.weight"
    assert "Reading" in str(caught.value.found)


class Attributed(Tensor):
    """Has values that are no tensors, like the weights of bitsandbytes."""


def test_a_weight_with_attributes_of_its_own_is_refused_by_name() -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight.factor

    layer = Layer(8, 8).double()
    weight = layer.weight.detach().as_subclass(Attributed)
    weight.factor = 2.0
    layer.weight = nn.Parameter(weight)
    layer.weight.factor = 2.0
    assert layer(X).shape == X.shape
    with pytest.raises(CaptureError, match="a weight is of a class with operations") as caught:
        pipelined(nn.Sequential(nn.Linear(8, 8).double(), layer))(X)
    assert caught.value.node == "1.weight"
    assert "factor" in str(caught.value.found)


def test_the_memory_of_a_wrapper_is_that_of_its_parts() -> None:
    weight = quantised(nn.Linear(8, 4), Quantised).weight
    assert [x.nbytes for x in plain_parts(weight)] == [32, 16]
    assert plain_parts(X) == [X]
