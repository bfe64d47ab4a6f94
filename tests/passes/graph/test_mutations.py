"""In-place writes by the memory that they change, on graphs written by hand."""

from __future__ import annotations

import torch
from torch import fx

from autopipe.passes.graph.mutations import InPlaceWrites
from tests.support.programs import calls

aten = torch.ops.aten


def program() -> tuple[fx.Graph, fx.Node, fx.Node, fx.Node]:
    """A tensor, a view of it, a write through the view; and the tensor's later user."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.clone.default, (x,))
    view = graph.call_function(aten.view.default, (made, [6]))
    write = graph.call_function(aten.add_.Tensor, (view, 1))
    return graph, made, view, write


def test_writers_are_found_through_views() -> None:
    graph, made, view, write = program()
    second = graph.call_function(aten.mul_.Tensor, (made, 2))
    writes = InPlaceWrites(graph)
    for node in (made, view, write, second):
        assert writes.writers_of(node) == [write, second]


def test_memory_that_no_call_allocated_has_no_writers() -> None:
    graph, *_ = program()
    x = next(iter(graph.nodes))
    graph.call_function(aten.add_.Tensor, (x, 1))
    assert InPlaceWrites(graph).writers_of(x) == []


def test_writes_are_removed_if_nothing_reads_them() -> None:
    graph, made, _, _ = program()
    writes = InPlaceWrites(graph)
    graph.output(next(iter(graph.nodes)))
    writes.remove_unread([made])
    assert calls(graph) == []


def test_writes_stay_if_something_reads_them() -> None:
    graph, made, _, write = program()
    graph.output(graph.call_function(aten.sum.default, (made,)))
    writes = InPlaceWrites(graph)
    writes.remove_unread([made])
    assert write in calls(graph)


def test_users_that_were_appended_before_the_write_read_the_value_before() -> None:
    graph, made, view, write = program()
    writes = InPlaceWrites(graph)
    with graph.inserting_before(view):
        early = graph.call_function(aten.sum.default, (made,))
    graph.output(early)
    assert writes.new_users_before_write(made) == [early]
    writes.remove_unread([made])
    assert calls(graph) == [made, early]
    assert write not in graph.nodes
