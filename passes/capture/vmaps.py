"""`torch.vmap` in a forward as plain ops: its batching rules are applied once, after the export.

An exported graph calls the steps of a vmap: a level begins, tensors get a hidden dimension, ops run
on them, the dimension comes back, the level ends. Here these nodes run once more, on the graph's
own fake tensors, with torch's batching rules, and the plain ops that this takes are recorded in
their place. They are the ops that eager torch runs, so gradients flow through them as they would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.errors import CaptureError
from autopipe.passes._torch import (
    HigherOrderOperator,
    OpOverload,
    free_symbols,
    is_functorch_call,
    is_mutable,
    make_fx,
)
from autopipe.passes.graph import source_line

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten
BEGIN, END, PREPARE = (
    "_vmap_increment_nesting",
    "_vmap_decrement_nesting",
    "lazy_load_decompositions",
)
STEPS = frozenset({BEGIN, END, PREPARE, "_add_batch_dim", "_remove_batch_dim"})
"""The functions of torch that an exported vmap calls."""

VIEWS = (aten.view.default, aten._unsafe_view.default)
"""Recorded as `reshape`: the strides of real tensors may be others than those of fake ones."""


def flatten_vmaps(module: fx.GraphModule) -> list[str]:
    """Replace every vmap of an exported graph by plain ops.

    Args:
        module: is changed, with the regions in it.

    Returns:
        The lines (``file:line``) of vmaps whose batching rules fixed a size that was symbolic, as
        those of convolutions do, and before torch 2.13 those of matrix products.

    Raises:
        CaptureError: a vmap draws random numbers, writes in place, or holds something with graphs
            or a backward of its own.
    """
    fixing = []
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        found = False
        region: list[fx.Node] = []
        depth = 0
        for node in list(part.graph.nodes):
            name = _step(node)
            depth += name == BEGIN
            if depth:
                region.append(node)
            depth -= name == END
            if region and not depth:
                line = source_line(region[0])
                if _flatten(part.graph, region):
                    fixing.append(line or "")
                region, found = [], True
            elif name == PREPARE and not depth:
                part.graph.erase_node(node)
        if found:
            part.recompile()
    return fixing


def _step(node: fx.Node) -> str:
    """Which step of a vmap a node is; empty if it is none."""
    name = getattr(node.target, "__name__", "")
    return name if is_functorch_call(node.target) and name in STEPS else ""


def _flatten(graph: fx.Graph, region: Sequence[fx.Node]) -> bool:
    """Replace the nodes from the beginning of a vmap to its end; return if that fixed a size."""
    inside = set(region)
    for node in region:
        _check(node)
    inputs = list(dict.fromkeys(a for n in region for a in n.all_input_nodes if a not in inside))
    outputs = [n for n in region if any(u not in inside for u in n.users)]

    def run(*values: Any) -> list[Any]:
        env: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
        for node in region:
            target: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = target(*args, **kwargs)
        return [env[n] for n in outputs]

    values = [n.meta["val"] for n in inputs]
    mode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
    with mode, torch.no_grad():
        plain = make_fx(run)(*values)
    plain.graph.eliminate_dead_code()  # sizes that only the batching rules read
    placeholders = [n for n in plain.graph.nodes if n.op == "placeholder"]
    env: dict[fx.Node, fx.Node] = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(region[0]):
        for node in plain.graph.nodes:
            if node.op == "output":
                for old, new in zip(outputs, node.args[0], strict=True):
                    old.replace_all_uses_with(env[new])
            elif node.op != "placeholder":
                env[node] = graph.node_copy(node, lambda n: env[n])
                env[node].target = aten.reshape.default if node.target in VIEWS else node.target
                about = ("stack_trace", "nn_module_stack")
                env[node].meta = {k: v for k, v in region[0].meta.items() if k in about}
                env[node].meta["val"] = node.meta["val"]
    sizes = [s for n in region if _step(n) == BEGIN for s in n.all_input_nodes if s not in inside]
    fixed = any(not free_symbols(size.meta["val"]) for size in sizes)
    for node in reversed(region):
        graph.erase_node(node)
    return fixed


def _check(node: fx.Node) -> None:
    """Refuse what a vmap would do in another way than the plain ops.

    Raises:
        CaptureError: the node is such an op.
    """
    found = _refused(node)
    if found is not None:
        raise CaptureError(
            "a function transform inside the model cannot be pipelined",
            source=source_line(node),
            found=f"torch.vmap of {found}",
            remedy="write the function for a whole batch, with broadcasting",
        )


def _refused(node: fx.Node) -> str | None:
    """What a node does that plain ops cannot; None if they can."""
    target = node.target
    if _step(node):
        return None
    if node.op != "call_function" or isinstance(target, HigherOrderOperator):
        return f"an operator with graphs of its own ({target})"
    if is_functorch_call(target):
        return f"another function transform ({getattr(target, '__name__', target)})"
    if not isinstance(target, OpOverload):  # arithmetic on sizes
        return None
    if target is torch.ops.autopipe.function.default:
        return "a custom autograd.Function"
    if torch.Tag.nondeterministic_seeded in target.tags:
        return f"random numbers ({target})"
    return f"a change in place ({target})" if is_mutable(target) else None
