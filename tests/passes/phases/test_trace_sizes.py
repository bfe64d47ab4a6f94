"""Traces with symbolic sizes, and the conditions under which they hold.

Covers phases/metadata.py, phases/lower_sizes.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx

from autopipe.passes.graph import SizeExpression
from autopipe.passes.ir import B, all_hold
from autopipe.passes.phases import TensorMeta
from autopipe.passes.phases.lower_sizes import lower_sizes
from autopipe.passes.phases.trace_sizes import SharedSymbols, TraceSizes

LENGTH = sympy.Symbol("length")
SIZES = {B: 4, LENGTH: 9}
CPU = torch.device("cpu")


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_strides_of_dense_tensors(order: tuple[int, ...]) -> None:
    """By the order of dimensions in an example, for any sizes."""
    shape = (B, LENGTH, 8)
    meta = TensorMeta(shape, (0, 0, 0), torch.float32)

    def example(sizes: Any) -> Tensor:
        known = meta.at(sizes).shape
        back = sorted(range(3), key=order.__getitem__)
        return torch.empty([known[d] for d in order]).permute(back)

    found = meta.dense_as(example(SIZES).stride(), SIZES)
    for sizes in (SIZES, {B: 2, LENGTH: 31}):
        assert found.at(sizes).stride == example(sizes).stride()
        assert found.at(sizes).shape == tuple(example(sizes).shape)
    assert found.after_copy(SIZES) == found
    contiguous = found.contiguous(SIZES)
    assert contiguous.at(SIZES).stride == torch.empty(4, 9, 8).stride()
    assert found.is_symbolic


def test_numbers_stay_numbers() -> None:
    tensor = torch.randn(4, 9).t().requires_grad_()
    meta = TensorMeta.of(tensor)
    assert meta == ((9, 4), (1, 9), torch.float32, True)
    assert not meta.is_symbolic
    assert meta.after_copy({}) == meta
    sizes = TraceSizes([meta], {})
    assert sizes.conditions() == ()
    with sizes.fake_mode(), sizes.remembered():
        assert TensorMeta.of(sizes.fake(meta, CPU)) == meta._replace(requires_grad=False)


@pytest.mark.parametrize(
    ("make", "follows"),
    [
        (lambda b, n: torch.empty(b, n, 8), True),
        (lambda b, n: torch.empty(n, b, 8).transpose(0, 1), True),
        (lambda b, n: torch.empty(1, n, 8).expand(b, n, 8), True),
        (lambda b, n: torch.empty(n, 1).expand(b, n, 8), True),
        (lambda b, n: torch.empty(b, n, 9)[:, :, :8], False),
        (lambda b, n: torch.empty(b, 1, 8)[:, :, ::2].expand(b, n, 4), False),
    ],
)
def test_an_example_for_all_sizes(make: Any, follows: bool) -> None:
    """Strides follow from the shape if the memory has no gaps, but for expanded dimensions."""
    example = TensorMeta.of(make(*SIZES.values()))
    shape = (B, LENGTH, sympy.Integer(example.shape[2]))
    found = example.with_shape(shape, SIZES)
    if not follows:
        assert found is None
        return
    for sizes in (SIZES, {B: 2, LENGTH: 31}):
        assert found is not None
        assert found.at(sizes) == TensorMeta.of(make(*sizes.values()))
    assert example.with_shape((B, LENGTH + 1, shape[2]), SIZES) is None


def test_traces_share_symbols_until_one_fixes_a_size() -> None:
    """What one trace has asked is a condition of the next, too; a fixed size is not."""
    meta = TensorMeta((B, LENGTH), (LENGTH, 1), torch.float32)
    shared = SharedSymbols()

    def trace(*, fixes: bool) -> tuple[sympy.Basic, ...]:
        sizes = TraceSizes([meta], SIZES, shared)
        with sizes.fake_mode(), sizes.remembered():
            n = sizes.fake(meta, CPU).shape[1]
            assert int(n) == 9 if fixes else n > 5
        return sizes.conditions()

    asked = trace(fixes=False)
    assert not all_hold(asked, {B: 4, LENGTH: 5})
    fixed = trace(fixes=True)
    assert not all_hold(fixed, {B: 4, LENGTH: 8})
    assert trace(fixes=False) == asked
    sizes = TraceSizes([meta], SIZES, shared)
    assert sizes.conditions() == asked


def test_conditions_are_what_the_trace_asked() -> None:
    meta = TensorMeta((B, 2 * LENGTH), (2 * LENGTH, 1), torch.float32)
    sizes = TraceSizes([meta], SIZES)
    with sizes.fake_mode(), sizes.remembered():
        x = sizes.fake(meta, CPU)
        assert TensorMeta.of(x) == meta
        assert x.shape[1] > 10
        assert x.shape[0] * x.shape[1] % 8 == 0
    conditions = sizes.conditions()
    assert all_hold(conditions, SIZES)
    assert all_hold(conditions, {B: 8, LENGTH: 6})
    for other in ({B: 4, LENGTH: 5}, {B: 3, LENGTH: 9}, {B: 1, LENGTH: 8}):
        assert not all_hold(conditions, other)


def test_sizes_become_expressions_where_they_are_used() -> None:
    meta = TensorMeta((B, LENGTH), (LENGTH, 1), torch.float32)
    sizes = TraceSizes([meta], SIZES)
    graph = fx.Graph()
    x = graph.placeholder("x")
    with sizes.fake_mode(), sizes.remembered():
        x.meta["val"] = value = sizes.fake(meta, CPU)
        n = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
        n.meta["val"] = value.shape[0]
        two = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
        two.meta["val"] = 2
        y = graph.call_function(torch.ops.aten.view.default, (x, [n, -1, two]))
        y.meta["val"] = value
        graph.output((y,))
    lower_sizes(graph)
    assert [node.name for node in graph.nodes if node.op == "call_function"] == [y.name]
    assert y.args[1] == [SizeExpression(B), -1, 2]
