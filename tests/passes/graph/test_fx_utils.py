"""Questions about fx nodes, on captured graphs and on graphs written by hand."""

from __future__ import annotations

import gc
import operator
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn

from autopipe.passes.graph import add_size, emit_size, symbolic_size, tensor_spec
from autopipe.passes.graph.fx_utils import (
    add_call,
    cache_per_graph,
    functional_variant,
    has_side_effect,
    is_integer,
    is_random,
    is_size,
    memory_owner,
    memory_owners,
    remove_dead_calls,
    source_line,
    tensors_of,
    view_base,
    written_arguments,
)
from autopipe.passes.ir.values import B, TensorSpec
from tests.support.programs import calls, captured_of, user_line

aten = torch.ops.aten


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0] * 3, 2)  # the line of the view
        return (y * 2).view(x.shape)


def graph_of_model() -> fx.Graph:
    return captured_of(Model(), torch.randn(4, 6)).graph_module.graph


def written(*names: str) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph with some placeholders."""
    graph = fx.Graph()
    return graph, [graph.placeholder(n) for n in names]


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, args, kwargs)


def test_sizes_are_expressions_in_the_batch_size() -> None:
    graph = graph_of_model()
    (x,) = (n for n in graph.nodes if n.op == "placeholder")
    assert tensor_spec(x) == TensorSpec(x.name, (B, sympy.Integer(6)), torch.float32)
    (view, _) = calls(graph, aten.view.default)
    assert tensor_spec(view).shape == (3 * B, sympy.Integer(2))
    assert symbolic_size(5) == sympy.Integer(5)


def test_numbers_are_told_from_tensors() -> None:
    graph = graph_of_model()
    sizes = [n for n in calls(graph) if is_size(n)]
    assert sizes
    assert all(tensors_of(n) == [] for n in sizes)
    assert all(len(tensors_of(n)) == 1 for n in calls(graph) if not is_size(n))


def test_integers_are_told_from_booleans_and_floats() -> None:
    (x,) = written("x")[1]
    for dtype, expected in ((torch.long, True), (torch.bool, False), (torch.float, False)):
        x.meta["val"] = torch.zeros(1, dtype=dtype)
        assert is_integer(x) == expected
    x.meta["val"] = 3
    assert not is_integer(x)


def test_a_line_of_the_model_may_look_like_a_frame() -> None:
    """The line of code in a stack trace is no frame, whatever it holds."""
    node = call(aten.relu.default)
    code = 'y = x.relu()  # File "evil.py", line 3, in forward'
    node.meta["stack_trace"] = f'  File "model.py", line 7, in forward\n    {code}\n'
    assert source_line(node) == "model.py:7"


def test_source_lines_are_the_models() -> None:
    view, _ = calls(graph_of_model(), aten.view.default)
    assert source_line(view) == user_line(Model.forward, "# the line " + "of the view")
    assert source_line(call(aten.relu.default)) is None


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call(aten.bernoulli.p, None, 0.5), True),
        (call(aten.dropout.default, None, 0.5, True), True),
        (call(aten.dropout.default, None, 0.0, True), False),
        (call(aten.dropout.default, None, 0.5, False), False),
        (call(aten.scaled_dot_product_attention.default, None, None, None), False),
        (call(aten.scaled_dot_product_attention.default, None, None, None, dropout_p=0.1), True),
        (call(aten.relu.default, None), False),
        (call(operator.add, 1, 2), False),
    ],
)
def test_random_calls(node: fx.Node, expected: bool) -> None:
    assert is_random(node) == expected


@pytest.mark.parametrize(
    "arguments", [{"p": 0.0}, {"dropout_p": 0.0}, {"dropout": 0.0}, {"train": False}]
)
def test_arguments_of_other_libraries_may_mean_anything(arguments: dict[str, Any]) -> None:
    """Only torch's own operators are known to draw nothing with a probability of 0."""
    (name, value), *_ = arguments.items()
    kind = "bool" if isinstance(value, bool) else "float"
    library = torch.library.Library("autopipe_test_random", "FRAGMENT")
    tags = (torch.Tag.nondeterministic_seeded,)
    library.define(f"noise_{name}(Tensor x, {kind} {name}) -> Tensor", tags=tags)
    op = getattr(torch.ops.autopipe_test_random, f"noise_{name}").default
    assert is_random(call(op, None, value))
    assert is_random(call(op, None, **arguments))


def test_side_effects_and_written_arguments() -> None:
    graph, (x, y, m, v) = written("x", "y", "m", "v")
    add = graph.call_function(aten.add_.Tensor, (x, y))
    out = graph.call_function(aten.mul.out, (x, y), {"out": m})
    norm = graph.call_function(
        aten.batch_norm.default, (x, None, None, m, v, True, 0.1, 1e-5, False)
    )
    still = graph.call_function(
        aten.batch_norm.default, (x, None, None, m, v, False, 0.1, 1e-5, False)
    )
    pure = graph.call_function(aten.add.Tensor, (x, y))
    assert [written_arguments(n) for n in (add, out, norm, still, pure)] == [
        [x],
        [m],
        [m, v],
        [],
        [],
    ]
    assert [has_side_effect(n) for n in (add, out, norm, still, pure)] == [True] * 4 + [False]


def test_owners_of_memory() -> None:
    graph, (x,) = written("x")
    view = graph.call_function(aten.view.default, (x, [2, 3]))
    part = graph.call_function(operator.getitem, (view, 0))
    copy = graph.call_function(aten.clone.default, (part,))
    again = graph.call_function(aten.add_.Tensor, (copy, 1))
    assert [view_base(n) for n in (x, view, part, copy, again)] == [None, x, view, None, copy]
    assert [memory_owner(n) for n in (view, part, again)] == [x, x, copy]
    assert memory_owners(graph) == {n: memory_owner(n) for n in graph.nodes}


def test_dead_calls_are_removed_but_writes_stay() -> None:
    graph, (x,) = written("x")
    for target in (aten.relu.default, aten.rand_like.default, aten.relu_.default):
        graph.call_function(target, (graph.call_function(aten.neg.default, (x,)),))
    graph.output(x)
    remove_dead_calls(graph)
    assert [n.target for n in calls(graph)] == [aten.neg.default, aten.relu_.default]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.div.out, aten.div.Tensor),
        (aten.zero_.default, aten.zeros_like.default),
        (aten.normal_.default, aten.normal_functional.default),
        (aten.set_.source_Tensor, None),
    ],
)
def test_functional_variants(target: Any, expected: Any) -> None:
    found = functional_variant(target)
    assert found is expected or (expected is None and target.overloadpacket is aten.set_)


def test_appended_calls_have_metadata_and_the_source_of_their_arguments() -> None:
    graph = graph_of_model()
    view, _ = calls(graph, aten.view.default)
    size = next(n for n in calls(graph) if is_size(n))
    with graph.inserting_before(graph.output_node()):
        total = add_call(graph, aten.sum.dim_IntList, view, [1])
        double = add_size(graph, operator.mul, size, 2)
    assert tensor_spec(total).shape == (3 * B,)
    assert source_line(total) == source_line(view)
    assert symbolic_size(double.meta["val"]) == 2 * symbolic_size(size.meta["val"])


def test_sizes_are_written_as_calls_on_the_batch_size() -> None:
    view, _ = calls(graph_of_model(), aten.view.default)
    graph, (batch,) = written("batch")
    rows, columns = (emit_size(s, lambda symbol: batch) for s in view.meta["val"].shape)
    graph.output((rows, columns))
    assert columns == 2
    assert fx.GraphModule({}, graph)(5) == (15, 2)


def test_results_are_cached_as_long_as_the_graph_lives() -> None:
    counted: list[fx.Graph] = []

    @cache_per_graph
    def size_of(holder: Any) -> int:
        counted.append(holder.graph)
        return len(holder.graph.nodes)

    first, second = (SimpleNamespace(graph=written("x")[0]) for _ in range(2))
    twin = SimpleNamespace(graph=first.graph)
    assert [size_of(h) for h in (first, twin, second, first)] == [1] * 4
    assert len(counted) == 2
    alive = weakref.ref(first.graph)
    counted.clear()
    del first, twin
    gc.collect()
    assert alive() is None
