"""The gradients with which a backward starts, known before the loss is.

Where backwards begin before all forwards have ended, the loss of the batch is not computed yet. But
the gradients of the pipeline's outputs seldom depend on it: for a mean over the labels that count,
``loss = sum / count``, the gradient of `sum` is ``1 / count``, and `count` depends on the labels
alone. So what gradients depend on is traced: what is computed from the call's inputs alone is
computed first; a factor that all gradients have in common may be applied at the end; anything else
cannot be known in time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.errors import UnsupportedError
from autopipe.passes._torch import make_fx
from autopipe.passes.graph import InPlaceWrites, graph_module, is_random
from autopipe.passes.ir import SAME, InputKind, results_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autopipe.passes.ir import Captured

REMEDY = (
    'use schedule="gpipe", which computes the loss of the whole batch before the first backward'
)


@dataclass(frozen=True, eq=False)
class LossSeeds:
    """How to compute the gradients of a captured model's outputs before its loss.

    Attributes:
        losses: which of the final values are losses: their sum is differentiated.
        outputs: names of the outputs that get a gradient.
        known: names of the outputs on whose values these gradients depend.
        inputs: names of the inputs from which these are computed.
        values: graph from `inputs` (of a micro-batch) to the values of `known`.
        in_common: whether the gradients have an unknown common factor; they are 1 then.
    """

    losses: tuple[int, ...]
    outputs: tuple[str, ...]
    known: tuple[str, ...]
    inputs: tuple[str, ...]
    values: fx.GraphModule
    in_common: bool


def loss_seeds(
    captured: Captured,
    differentiable: frozenset[str],
    evaluate: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    examples: Sequence[Tensor],
) -> LossSeeds:
    """Find out what the gradients of a model's outputs depend on.

    Args:
        captured: the model's graph.
        differentiable: names of the outputs that can receive a gradient.
        evaluate: computes the final values from the outputs of the whole batch.
        examples: tensors like these outputs; their values do not matter.

    Raises:
        UnsupportedError: the model returns no loss, or gradients depend on what all micro-batches
            compute, in different ways.
    """
    positions = _loss_positions(captured)
    wanted = [i for i, o in enumerate(captured.outputs) if o.name in differentiable]
    found: list[int] = []

    def gradients(*outputs: Tensor) -> list[Tensor | None]:
        leaves = [o.detach() for o in outputs]
        for i in wanted:
            leaves[i].requires_grad_()
        with torch.enable_grad():
            values = evaluate(leaves)
        found[:] = [i for i in positions if values[i].requires_grad]
        if not found:
            return []
        losses = [values[i] for i in found]
        ones = [torch.ones(x.shape, dtype=x.dtype, device=x.device) for x in losses]
        sources = [leaves[i] for i in wanted]
        return list(torch.autograd.grad(losses, sources, ones, allow_unused=True))

    traced = make_fx(gradients)(*examples).graph
    traced.eliminate_dead_code()
    seeds = results_of(traced)
    if not found or all(s is None for s in seeds):
        raise UnsupportedError(
            "the model returns no loss: a schedule that starts backwards early needs it",
            expected="one number that the parameters' gradients belong to",
            remedy="let the model return its loss (labels=...); or give compile a loss_fn, and call"
            " pipe.step(x, target=y); or " + REMEDY,
        )
    names = [o.name for o in captured.outputs]
    outputs = tuple(names[i] for i, s in zip(wanted, seeds, strict=True) if s is not None)
    placeholders = [n for n in traced.nodes if n.op == "placeholder"]
    read = [name for name, n in zip(names, placeholders, strict=True) if n.users]
    unknown = next((n for n in read if not _is_known(captured, n)), None)
    in_common = unknown is not None and len({s for s in seeds if s is not None}) == 1
    if unknown is not None and not in_common:
        raise UnsupportedError(
            "gradients of the loss depend on what all micro-batches compute, so no backward can"
            " start before the last forward has ended",
            node=unknown,
            found=f"gradients of {', '.join(outputs)} that depend on it",
            remedy=REMEDY,
        )
    known = () if in_common else tuple(read)
    inputs, values = _values_from_inputs(captured, known)
    return LossSeeds(tuple(found), outputs, known, inputs, values, in_common)


def has_loss(captured: Captured) -> bool:
    """Whether a model returns what may be its loss: a single number of the whole batch.

    Args:
        captured: the model's graph.
    """
    return bool(_loss_positions(captured))


def needs_parameters(captured: Captured) -> frozenset[str]:
    """The names of the outputs that depend on parameters, so that they may get a gradient.

    Args:
        captured: the model's graph.
    """
    parameters = {i.name for i in captured.inputs if i.kind is InputKind.PARAMETER}
    return frozenset(
        o.name
        for o in captured.outputs
        if o.spec.dtype.is_floating_point
        and any(n.name in parameters for n in _ancestors(captured, {o.name}))
    )


def _loss_positions(captured: Captured) -> list[int]:
    """The final values that may be the loss: `loss` of the result, else all single numbers."""
    marks = list(range(len(captured.leaves)))
    result: Any = pytree.tree_unflatten(marks, captured.out_spec)
    named = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(named, int) and captured.leaves[named].kind == "value":
        return [captured.leaves[named].value]
    values = [leaf.value for leaf in captured.leaves if leaf.kind == "value"]
    return [v for v in values if _is_number(captured, v)] or [
        v for v in values if _is_number_of_one(captured, v)
    ]


def _is_number(captured: Captured, position: int) -> bool:
    """Whether a final value is a single floating point number of the whole batch."""
    if captured.epilogue is None:
        output = captured.outputs[position]
        return output.spec.numel == 1 and output.combine.is_reduction
    value = results_of(captured.epilogue.graph)[position].meta["val"]
    return isinstance(value, Tensor) and value.numel() == 1


def _is_number_of_one(captured: Captured, position: int) -> bool:
    """Whether a final value is a single number, captured for one micro-batch: nothing combines."""
    if captured.epilogue is not None:
        return False
    output = captured.outputs[position]
    return not output.spec.shape and output.combine == SAME


def _is_known(captured: Captured, name: str) -> bool:
    """Whether an output depends on nothing but the call's inputs, constants and buffers."""
    changed = {target for target, _ in captured.updates}
    known = {
        i.name
        for i in captured.inputs
        if i.kind is not InputKind.PARAMETER and i.target not in changed
    }
    return all(
        n.name in known if n.op == "placeholder" else not is_random(n)
        for n in _ancestors(captured, {name})
    )


def _ancestors(captured: Captured, names: set[str]) -> list[fx.Node]:
    """The nodes that some values depend on, themselves included, in the order of the graph."""
    nodes = list(captured.graph_module.graph.nodes)
    writes = InPlaceWrites(captured.graph_module.graph)
    needed: set[fx.Node] = set()
    todo = [n for n in nodes if n.name in names]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [*node.all_input_nodes, *writes.writers_of(node)]
    return [n for n in nodes if n in needed]


def _values_from_inputs(
    captured: Captured, names: Sequence[str]
) -> tuple[tuple[str, ...], fx.GraphModule]:
    """The inputs that some outputs depend on, and the graph that computes them."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in _ancestors(captured, set(names)):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    by_name = {n.name: copy for n, copy in copies.items()}
    graph.output(tuple(by_name[n] for n in names))
    inputs = tuple(n.name for n in copies if n.op == "placeholder")
    return inputs, graph_module(graph, "KnownValues")
