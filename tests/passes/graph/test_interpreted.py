"""Graph modules of plain and of odd graphs: both compute what the ops compute."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopipe.passes.graph import graph_module

X = torch.tensor([1.0, -2.0])
PLAIN = [None, True, 3, -(2**63), 0.5, -0.0, inf, nan, torch.float32, [1, (2.0, None)], "a,b"]
ODD = [0j, complex(1, -0.0), complex(inf, nan), -nan, 2**65, "# COUNTER: 1", "#", "\x0c", b"a"]


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    made = torch.library.Library("autopipe_test_odd", "FRAGMENT")
    for name in ("lambda", "plain"):
        made.define(f"{name}(Tensor x, *, float from=2.0, float to=3.0) -> Tensor")
        made.impl(name, scaled, "CompositeExplicitAutograd")
    yield
    made._destroy()


def scaled(x: Tensor, **kwargs: float) -> Tensor:
    return x * kwargs.get("from", 2.0) + kwargs.get("to", 3.0)


def recorded(target: Any, *args: Any, name: str = "x", **kwargs: Any) -> fx.GraphModule:
    """A module of one call, whose first argument is the input."""
    graph = fx.Graph()
    x = graph.placeholder(name)
    y = graph.call_function(target, (x, *args), kwargs)
    z = graph.call_function(operator.add, (y, 1) if isinstance(x, Tensor) else (y, y))
    graph.output((y, z))
    return graph_module(graph, "Captured")


def is_interpreted(module: fx.GraphModule) -> bool:
    return any(c.__name__ == "_InterpretedModule" for c in type(module).__mro__)


def pair(x: Tensor, *values: Any) -> tuple[Any, ...]:
    return values


@pytest.mark.parametrize(("value", "odd"), [(v, False) for v in PLAIN] + [(v, True) for v in ODD])
def test_constants_arrive_as_they_are(value: Any, odd: bool) -> None:
    """Compared by `repr`, which shows the signs of zeros and tells NaNs equal."""
    for nested in (value, [value], (1, [value])):
        module = recorded(pair, nested)
        values, twice = module(X)
        assert repr(values) == repr((nested,))
        assert repr(twice) == repr((nested, nested))
        assert is_interpreted(module) == odd


@pytest.mark.parametrize(
    ("name", "kwargs", "odd"),
    [
        ("plain", {}, False),
        ("plain", {"to": 5.0}, False),
        ("plain", {"from": 5.0}, True),
        ("lambda", {}, True),
        ("lambda", {"to": 1.0}, True),
    ],
)
def test_operators_and_keywords(name: str, kwargs: dict[str, float], odd: bool) -> None:
    op = getattr(torch.ops.autopipe_test_odd, name).default
    module = recorded(op, **kwargs)
    found, twice = module(X)
    assert torch.equal(found, scaled(X, **kwargs))
    assert torch.equal(twice, 2 * found)
    assert is_interpreted(module) == odd


def test_an_input_called_self() -> None:
    module = recorded(torch.neg, name="self")
    assert is_interpreted(module)
    assert torch.equal(module(X)[0], -X)


def test_odd_modules_are_copied_and_printed() -> None:
    module = recorded(torch.mul, complex(1, -0.0))
    again = copy.deepcopy(module)
    assert torch.equal(again(X)[0], X * complex(1, -0.0))
    assert "torch.mul" in module.print_readable(print_output=False)
    assert "torch.mul" in module.code
    assert "torch.mul" in str(module)
