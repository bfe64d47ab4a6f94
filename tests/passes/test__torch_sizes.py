"""Symbolic sizes that remember their arithmetic."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from autopipe.passes._torch import ShapeEnv, make_fx
from autopipe.passes._torch_sizes import (
    create_size_symbol,
    remembered_sizes,
    size_in_graph,
    size_of_expression,
)
from autopipe.passes.graph import fake_mode


def test_operations_and_answers_are_those_of_torch() -> None:
    results = []
    for remember in (True, False):
        environment = ShapeEnv()
        _, n = create_size_symbol(environment, "n", 6)
        with remembered_sizes(environment, {}) if remember else nullcontext():
            for _ in range(2):
                found = [n + 1, 2 * n, n * n - n, n // 4, n % 4, -n, torch.sym_max(n, 7)]
                answers = [bool(n > 3), bool(n == 6), n + 1 == 7, bool(n * n != 36)]
        results.append(
            ([str(x) for x in found], answers, [str(g.expr) for g in environment.guards])
        )
    assert results[0] == results[1]


def test_the_expression_of_a_size() -> None:
    environment = ShapeEnv()
    symbol, n = create_size_symbol(environment, "n", 6)
    assert n.node.expr == symbol
    assert size_of_expression(environment, 3 * symbol, 18).node.expr == (3 * n).node.expr


def test_a_trace_records_sizes_where_they_are_used() -> None:
    """Arithmetic in between is not recorded."""
    environment = ShapeEnv()
    _, n = create_size_symbol(environment, "n", 6)

    def flat(x: Tensor) -> Tensor:
        rows = x.shape[0] * 2 + 4 - x.shape[0]
        return x.new_zeros(rows * x.shape[0])

    with fake_mode(environment), remembered_sizes(environment, {}):
        traced = make_fx(flat)(torch.empty(n, 4))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets.count(size_in_graph) == 1
    assert len(targets) == 2
    with pytest.raises(AssertionError, match="not replaced"):
        size_in_graph("n")


def test_other_environments_are_left_alone() -> None:
    guards = []
    for remember in (True, False):
        other = ShapeEnv()
        _, n = create_size_symbol(other, "n", 6)
        with remembered_sizes(ShapeEnv(), {}) if remember else nullcontext():
            assert bool(n > 3)
        guards.append([str(g.expr) for g in other.guards])
    assert guards[0] == guards[1]
