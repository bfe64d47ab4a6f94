"""Phases with symbolic sizes → the same phases with numbers, for costs, plans and checks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from autopipe.passes._torch import storage_id
from autopipe.passes.graph import SizeExpression, full_size, static_fake_mode
from autopipe.passes.ir import B

from .metadata import TensorMeta, number_at

if TYPE_CHECKING:
    from autopipe.passes.ir import Phased, Sizes


def concrete(phased: Phased, sizes: Sizes) -> Phased:
    """Evaluate all sizes of some phases.

    Args:
        phased: with symbolic sizes, or not: then it is returned as it is.
        sizes: the values of its symbols.
    """
    if not phased.symbols:
        return phased
    graphs: dict[int, fx.Graph] = {}
    stages = []
    for stage in phased.stages:
        if id(stage.graph) not in graphs:
            graphs[id(stage.graph)] = concrete_graph(stage.graph, sizes)
        stages.append(replace(stage, graph=graphs[id(stage.graph)], conditions=()))
    return replace(phased, size=sizes[B], stages=tuple(stages), symbols=(), conditions=())


def concrete_graph(graph: fx.Graph, sizes: Sizes) -> fx.Graph:
    """Copy a joint graph with all sizes evaluated, in its arguments and in its metadata.

    Args:
        graph: with symbolic sizes.
        sizes: the values of the symbols.
    """
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    bases: dict[Any, Tensor] = {}
    with static_fake_mode():
        for node in graph.nodes:
            env[node] = copy = new.node_copy(node, env.__getitem__)
            copy.args, copy.kwargs = _evaluated((copy.args, copy.kwargs), sizes)
            copy.meta = dict(node.meta)
            if "val" in node.meta:
                copy.meta["val"] = pytree.tree_map_only(
                    Tensor, lambda t: _tensor(t, sizes, bases), node.meta["val"]
                )
    return new


def _evaluated(arguments: Any, sizes: Sizes) -> Any:
    def evaluated(value: Any) -> Any:
        return value.at(sizes) if isinstance(value, SizeExpression) else value

    return map_aggregate(arguments, evaluated)


def _tensor(value: Tensor, sizes: Sizes, bases: dict[Any, Tensor]) -> Tensor:
    """A tensor of the evaluated shape; those that shared memory still do."""
    meta, storage = TensorMeta.of(value).at(sizes), storage_id(value)
    if storage not in bases:
        nbytes = number_at(full_size(value.untyped_storage().nbytes()), sizes)
        bases[storage] = torch.empty(nbytes, dtype=torch.uint8, device=value.device)
    offset = number_at(full_size(value.storage_offset()), sizes)
    found = bases[storage].view(value.dtype).as_strided(meta.shape, meta.stride, offset)
    return found.requires_grad_() if value.requires_grad else found
