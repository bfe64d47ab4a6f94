"""What a traced joint graph is rid of, and what it leaves to the runtime's kit."""

from __future__ import annotations

from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes.graph import is_random, remove_dead_calls
from autopipe.passes.ir import RandomDraw

if TYPE_CHECKING:
    from collections.abc import Container

aten = torch.ops.aten

KIT = "kit"
"""First placeholder of every joint graph: what the runtime lends to a stage's code. Its methods
are `draw` (a random call, keyed), `settled` (a tensor in the memory format that it suggests) and
`recording` (a call with gradients on)."""

RNN_WORKSPACE = 22
"""Position of oneDNN's workspace among the arguments of its LSTM backward."""

PICKY = (aten.native_group_norm.default, aten.native_group_norm_backward.default)
"""Kernels that want their tensors dense in the memory format which those suggest."""


def lower_joint_graph(graph: fx.Graph, static: Container[int]) -> tuple[RandomDraw, ...]:
    """Drop what does nothing below autograd, and hand two kinds of calls to the runtime's kit.

    Random calls become keyed draws: what they draw depends on the key and on nothing else, so that
    a repetition draws the same and no order of execution matters.

    A group norm's argument is settled. Where a fake's stride of a dimension of size one is not the
    kernel's (see `fakes`), the norm was traced as if its argument were dense in a memory format
    which the real one does not even suggest. When it runs, the question is asked again, as eager
    would.

    Args:
        graph: changed in place.
        static: positions, in the stage graph, of the calls that do not depend on the batch.

    Returns:
        For each draw its key; its call is named by the position in the stage graph.
    """
    with graph.inserting_before(next(iter(graph.nodes))):
        kit = graph.placeholder(KIT)
    keys: list[RandomDraw] = []
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
        elif is_random(node):
            call = node.meta["custom"]["call"]
            with graph.inserting_before(node):
                drawn = graph.call_method(
                    "draw", (kit, len(keys), node.target, *node.args), node.kwargs
                )
            keys.append(RandomDraw(call, sum(k.call == call for k in keys), call in static))
            drawn.meta = dict(node.meta)
            node.replace_all_uses_with(drawn)
        elif node.target is aten.mkldnn_rnn_layer_backward.default:
            _give_workspace(graph, kit, node)
        elif node.target in PICKY:
            for source in node.all_input_nodes:
                looks = source.meta["val"]
                if looks.ndim == 4 and 1 in looks.shape:
                    with graph.inserting_before(node):
                        settled = graph.call_method("settled", (kit, source))
                    settled.meta = dict(source.meta)
                    node.replace_input_with(source, settled)
    remove_dead_calls(graph)
    for node in graph.nodes:
        node.meta.pop("custom", None)
    return tuple(keys)


def _give_workspace(graph: fx.Graph, kit: fx.Node, backward: fx.Node) -> None:
    """Hand oneDNN's LSTM backward its workspace, the fourth result of the forward.

    The fake forward has none to save, and the real one makes it only while gradients are on.
    """
    output: Any = backward.args[7]
    forward = output.args[0]
    if forward.op == "call_function":
        with graph.inserting_before(forward):
            recording = graph.call_method("recording", (kit, forward.target, *forward.args))
        recording.meta = dict(forward.meta)
        forward.replace_all_uses_with(recording)
        forward = recording
    with graph.inserting_before(backward):
        workspace = graph.call_function(getitem, (forward, 3))
    workspace.meta = {"val": backward.meta["val"][0]}
    backward.update_arg(RNN_WORKSPACE, workspace)
