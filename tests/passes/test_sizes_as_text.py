"""Numbers that are computed from symbolic sizes: as text, and as ops. Truth: Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import fx, nn

from autopipe.passes._torch import ShapeEnv, emit_expression, size_text
from autopipe.passes._torch_sizes import create_size_symbol

NUMBERS = {
    "root": lambda n: n**0.5,
    "quotient": lambda n: n / 3,
    "floor": lambda n: math.floor(n / 2),
    "ceil": lambda n: math.ceil(n / 2),
    "trunc": lambda n: math.trunc(n / 2),
    "round": lambda n: round(n * 0.7),
    "absolute": lambda n: abs(5 - n / 2),
    "at most": lambda n: torch.sym_min(n, 4) + torch.sym_max(n // 2, 3),
    "condition": lambda n: (n > 4) & (n < 9),
}


def expression(function: Callable[[Any], Any]) -> sympy.Expr:
    """What a function computes from a size, as an expression."""
    environment = ShapeEnv()
    symbol, size = create_size_symbol(environment, "n", 7)
    found: sympy.Expr = function(size).node.expr
    return found.xreplace({symbol: sympy.Symbol("n", integer=True)})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_from_sizes_are_written_with_builtins(name: str) -> None:
    text = size_text(expression(NUMBERS[name]))
    for n in range(2, 30):
        found = eval(text, {"n": n})
        assert found == NUMBERS[name](n)
        assert type(found) is type(NUMBERS[name](n))


def test_other_functions_of_sizes_are_not_written() -> None:
    with pytest.raises(NotImplementedError, match="by a function"):
        size_text(expression(torch.sym_sqrt))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_from_sizes_are_ops_of_a_graph(name: str) -> None:
    graph = fx.Graph()
    expr = expression(NUMBERS[name])
    (symbol,) = expr.free_symbols
    graph.output(emit_expression(expr, {symbol: graph.placeholder("n")}))
    run = fx.GraphModule(nn.Module(), graph)
    assert [run(n) for n in range(2, 30)] == [NUMBERS[name](n) for n in range(2, 30)]
