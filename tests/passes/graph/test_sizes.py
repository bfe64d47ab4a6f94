"""Sizes in the batch size and in lengths."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import fx

from autopipe.passes._torch import ShapeEnv
from autopipe.passes._torch_sizes import create_size_symbol
from autopipe.passes.graph import (
    SizeExpression,
    SizeNames,
    add_product,
    emit_size,
    emit_symbol,
    fake_mode,
    full_size,
    name_sizes,
    readable_symbols,
    size_symbols,
    symbolic_size,
)
from autopipe.passes.ir import B

LENGTH = sympy.Symbol("length")


@pytest.fixture
def sizes() -> tuple[Any, Any, ShapeEnv]:
    """A batch of 6 samples and a length of 9, as a tracer has them."""
    environment = ShapeEnv()
    batch, n = create_size_symbol(environment, "batch", 6)
    length, t = create_size_symbol(environment, "length", 9)
    name_sizes(environment, SizeNames({batch: B, length: LENGTH}, {LENGTH: sympy.Integer(9)}))
    return n, t, environment


def test_a_size_by_its_names_and_by_the_batch_alone(sizes: tuple[Any, Any, ShapeEnv]) -> None:
    n, t, _ = sizes
    assert full_size(2 * n * t + 1) == 2 * B * LENGTH + 1
    assert symbolic_size(2 * n * t + 1) == 18 * B + 1
    assert size_symbols(n * t) == {B, LENGTH}
    assert (full_size(7), symbolic_size(7), size_symbols(7)) == (7, 7, set())


def test_a_symbol_without_a_name_is_the_batch_size() -> None:
    _, n = create_size_symbol(ShapeEnv(), "any", 6)
    assert full_size(n + 1) == B + 1 == symbolic_size(n + 1)


@pytest.mark.parametrize(
    ("expr", "value"),
    [(B * LENGTH, 12), (LENGTH / 2, 1.5), (sympy.Gt(LENGTH, B), False), (sympy.Integer(7), 7)],
)
def test_expressions_have_values(expr: Any, value: Any) -> None:
    found = SizeExpression(expr).at({B: 4, LENGTH: 3})
    assert found == value
    assert type(found) is type(value)


def run(graph: fx.Graph, *args: Any) -> Any:
    return fx.GraphModule(torch.nn.Module(), graph)(*args)


def test_sizes_are_read_off_shapes(sizes: tuple[Any, Any, ShapeEnv]) -> None:
    n, t, environment = sizes
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    with fake_mode(environment):
        wide, tall = torch.empty(3 * n, 4), torch.empty(2, t)
    x.meta["val"], y.meta["val"] = wide, tall
    assert readable_symbols(wide) == {B}
    assert readable_symbols(tall) == {LENGTH}
    values = [(x, wide), (y, tall)]
    found = emit_size(2 * n * t + n, lambda symbol: emit_symbol(graph, symbol, values))
    assert emit_size(5, lambda symbol: pytest.fail(str(symbol))) == 5
    with pytest.raises(LookupError, match="other"):
        emit_symbol(graph, sympy.Symbol("other"), values)
    graph.output((found, add_product(graph, x, [0, 1]), add_product(graph, y, [0])))
    assert run(graph, torch.empty(21, 4), torch.empty(2, 5)) == (2 * 7 * 5 + 7, 84, 2)
