"""Clean a traced joint graph and lower random ops to keyed draws of the runtime's `ctx`."""

from __future__ import annotations

from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import is_random, remove_dead_calls
from autopipe.passes.ir import RandomDraw

if TYPE_CHECKING:
    from collections.abc import Container

aten = torch.ops.aten

CONTEXT = "ctx"
"""First placeholder of every joint graph: the object by which a stage's code calls the runtime.

Its methods are `draw` (a keyed random op), `watched` (an op that must not draw),
`in_suggested_format` (a tensor, dense in the memory format that its strides suggest), `with_grad`
(an op with gradients enabled) and `accumulate`."""

RNN_WORKSPACE = 22
"""Position of oneDNN's workspace among the arguments of its LSTM backward."""

LAYOUT_SENSITIVE = (aten.native_group_norm.default, aten.native_group_norm_backward.default)
"""Kernels whose arguments must be dense in the memory format that their strides suggest."""


def lower_joint_graph(graph: fx.Graph, static: Container[int]) -> tuple[RandomDraw, ...]:
    """Remove ops that matter to autograd only, and lower some ops to methods of `ctx`.

    A random op (`autopipe.passes.graph.is_random`) becomes a keyed draw. What it draws depends on
    its key alone, so recomputation draws the same numbers and the order of execution does not
    matter.

    A group norm's argument goes through `ctx.in_suggested_format`. Where a fake tensor's stride of
    a dimension of size one differs from the kernel's (see `graph/fake_strides.py`), the norm was
    traced as if its argument were dense in a memory format that the real argument does not
    suggest. The format is chosen again at run time, as eager execution would.

    An op of another library without that tag is watched: it is refused if it draws after all.

    An LSTM's backward is passed the workspace of its forward.

    Args:
        graph: changed in place.
        static: positions, in the stage graph, of the ops that do not depend on the batch.

    Returns:
        The key of each draw; `call` is the position of its op in the stage graph.
    """
    with graph.inserting_before(next(iter(graph.nodes))):
        ctx = graph.placeholder(CONTEXT)
    draws: list[RandomDraw] = []
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
        elif is_random(node):
            call = node.meta["custom"]["call"]
            with graph.inserting_before(node):
                drawn = graph.call_method(
                    "draw", (ctx, len(draws), node.target, *node.args), node.kwargs
                )
            draws.append(RandomDraw(call, sum(d.call == call for d in draws), call in static))
            drawn.meta = dict(node.meta)
            node.replace_all_uses_with(drawn)
        elif _may_draw(node):
            with graph.inserting_before(node):
                watched = graph.call_method("watched", (ctx, node.target, *node.args), node.kwargs)
            watched.meta = dict(node.meta)
            node.replace_all_uses_with(watched)
        elif node.target is aten.mkldnn_rnn_layer_backward.default:
            _give_workspace(graph, ctx, node)
        elif node.target in LAYOUT_SENSITIVE:
            for source in node.all_input_nodes:
                value = source.meta["val"]
                if isinstance(value, Tensor) and value.ndim == 4 and 1 in value.shape:
                    with graph.inserting_before(node):
                        settled = graph.call_method("in_suggested_format", (ctx, source))
                    settled.meta = dict(source.meta)
                    node.replace_input_with(source, settled)
    remove_dead_calls(graph)
    for node in graph.nodes:
        node.meta.pop("custom", None)
    return tuple(draws)


def _may_draw(node: fx.Node) -> bool:
    """Whether an op of another library could draw random numbers without saying so by the tag."""
    schema = getattr(node.target, "_schema", None)
    return (
        schema is not None
        and schema.name.partition("::")[0] not in ("aten", "prims", "autopipe")
        and not schema.is_mutable
        and not is_random(node)
    )


def _give_workspace(graph: fx.Graph, ctx: fx.Node, backward: fx.Node) -> None:
    """Pass the workspace, the forward's fourth result, to oneDNN's LSTM backward.

    The fake forward has no workspace to save, and the real one returns it only while gradients are
    enabled.
    """
    output: Any = backward.args[7]
    forward = output.args[0]
    if forward.op == "call_function":
        with graph.inserting_before(forward):
            recording = graph.call_method(
                "with_grad", (ctx, forward.target, *forward.args), forward.kwargs
            )
        recording.meta = dict(forward.meta)
        forward.replace_all_uses_with(recording)
        forward = recording
    with graph.inserting_before(backward):
        workspace = graph.call_function(getitem, (forward, 3))
    workspace.meta = {"val": backward.meta["val"][0]}
    backward.update_arg(RNN_WORKSPACE, workspace)
