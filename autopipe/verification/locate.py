"""Find the first value in which a pipeline differs from its model.

The captured graph is run once more, micro-batch by micro-batch. Its values are compared with what
the model's submodules returned on the whole batch, which finds errors of capture, and with what
the stages sent, which finds errors of the pipeline.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes.graph import is_close, tensor_spec
from autopipe.passes.ir import InputKind, at_batch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.compiled import CompiledModel


def locate_value(
    compiled: CompiledModel,
    sizes: Sequence[int],
    leaves: Sequence[Any],
    sent: Mapping[tuple[str, int], Tensor],
    returned: Mapping[str, Tensor],
) -> tuple[int | None, fx.Node] | None:
    """Find the first node whose value differs.

    Args:
        compiled: the captured model.
        sizes: samples per micro-batch.
        leaves: the call's flattened inputs.
        sent: (value, micro-batch) → what a stage sent.
        returned: path of a submodule → what it returned for the whole batch.

    Returns:
        Its stage and the node; None if no value differs.
    """
    captured = compiled.split.captured
    different: set[str] = set()  # names of nodes whose sent value differs
    equal = dict.fromkeys(returned, 0)  # submodule → number of micro-batches in which it is equal
    start = 0
    for m, size in enumerate(sizes):
        tensors = [
            leaves[i.index].detach().narrow(i.batch_dim, start, size)
            if i.kind is InputKind.INPUT and i.batch_dim is not None
            else leaves[i.index].detach()
            if i.kind is InputKind.INPUT
            else compiled.tensor(i.kind, i.target).detach().clone()
            for i in captured.inputs
        ]
        run = _ComparingInterpreter(
            captured.graph_module, m, size, start, sum(sizes), sent, returned
        )
        with torch.no_grad():
            run.run(*tensors)
        different |= run.different
        for path in run.equal:
            equal[path] += 1
        start += size
    nodes = list(captured.graph_module.graph.nodes)
    suspects = [n for n in nodes if n.name in different]
    for path, count in equal.items():
        inside = [n for n in nodes if path in n.meta.get("modules", ())]
        if count < len(sizes) and inside:
            suspects.append(inside[-1])
            break
    first = min(suspects, key=nodes.index, default=None)
    return None if first is None else (_stage(compiled, nodes.index(first)), first)


def locate_gradient(
    compiled: CompiledModel, names: Sequence[str]
) -> tuple[int | None, fx.Node] | None:
    """Find the node whose backward comes first among the users of tensors with wrong gradients.

    Args:
        compiled: the captured model.
        names: of parameters whose gradients differ although the forward does not.

    Returns:
        Its stage and the node; None if no node uses them.
    """
    captured = compiled.split.captured
    targets = {i.name for i in captured.inputs if i.target in names}
    nodes = list(captured.graph_module.graph.nodes)
    users = [u for n in nodes if n.name in targets for u in n.users if u.op == "call_function"]
    last = max(users, key=nodes.index, default=None)
    return None if last is None else (_stage(compiled, nodes.index(last)), last)


def _stage(compiled: CompiledModel, position: int) -> int | None:
    return next((s.index for s in compiled.split.stages if position in s.origins), None)


class _ComparingInterpreter(fx.Interpreter):
    """Run one micro-batch through the captured graph and compare its values."""

    def __init__(
        self,
        module: fx.GraphModule,
        m: int,
        size: int,
        start: int,
        batch: int,
        sent: Mapping[tuple[str, int], Tensor],
        returned: Mapping[str, Tensor],
    ) -> None:
        super().__init__(module)
        self.m, self.size, self.start, self.batch = m, size, start, batch
        self.sent, self.returned = sent, returned
        self.different: set[str] = set()
        self.equal: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, then compare its value."""
        cast = n.meta.get("autocast")
        with torch.autocast(*cast) if cast else nullcontext():
            value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            other = self.sent.get((n.name, self.m))
            if other is not None and not is_close(other.to(value.device), value):
                self.different.add(n.name)
            for path in n.meta.get("modules", ()):
                if path in self.returned and path not in self.equal:
                    part = self._part(n, self.returned[path])
                    if part is not None and is_close(part.to(value.device), value):
                        self.equal.add(path)
        return value

    def _part(self, node: fx.Node, whole: Tensor) -> Tensor | None:
        """The part of a whole batch's value that belongs to this micro-batch, if shapes match."""
        shape = tensor_spec(node).shape
        if tuple(whole.shape) != tuple(at_batch(s, self.batch) for s in shape):
            return None
        for dim, extent in enumerate(shape):
            if extent.free_symbols:
                per_sample = whole.shape[dim] // self.batch
                return whole.narrow(dim, self.start * per_sample, self.size * per_sample)
        return whole
