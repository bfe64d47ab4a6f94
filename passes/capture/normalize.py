"""Normalize an exported graph to the form that later passes rely on.

The normalized graph has plain ops only (no_grad and autocast regions are inlined), no assertions,
one placeholder for each tensor (tied parameters are merged), and sizes that are expressions in the
batch size `B` and in lengths.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from autopipe.errors import UnsupportedError
from autopipe.passes.graph import remove_dead_calls, tensor_spec
from autopipe.passes.ir import Input, InputKind

from .inlining import copied_meta, inline_ops
from .scalar_reads import scalars_to_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Normalized(NamedTuple):
    """A graph of plain ops.

    Attributes:
        graph: the ops.
        inputs: its placeholders, in order.
        constants: name → value of each constant among them.
    """

    graph: fx.Graph
    inputs: tuple[Input, ...]
    constants: Mapping[str, Tensor]


def normalize(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    prefix: str,
    names: Sequence[str],
    reserved: Sequence[str] = (),
) -> Normalized:
    """Rewrite an exported program's graph.

    Args:
        program: its graph is not changed.
        model: the exported module; tells which of its tensors are the same object.
        prefix: prefix of the model's own names in the program's signature.
        names: what to call the inputs of the call, in order.
        reserved: names that no node may have.

    Returns:
        The normalized graph; unused parameters, buffers and constants have no placeholder.

    Raises:
        CaptureError: the graph holds an op with graphs of its own, or reads numbers from tensors.
        UnsupportedError: the model holds a constant that is not a tensor.
    """
    placeholders = _Placeholders(program, model, prefix, names, reserved)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            placeholders.add(node)
    graph = placeholders.graph
    graph.output(tuple(inline_ops(program.graph_module, placeholders.env, graph, autocast=None)))
    remove_dead_calls(graph)
    scalars_to_tensors(graph)
    inputs = _drop_unused(graph, placeholders.inputs)
    remove_dead_calls(graph)
    return Normalized(graph, inputs, placeholders.constants)


class _Placeholders:
    """The placeholders of a normalized graph, and the tensors that they represent.

    Attributes:
        graph: the normalized graph, at first only placeholders.
        inputs: one for each placeholder.
        constants: name → value.
        env: node of the exported graph → placeholder.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        model: nn.Module,
        prefix: str,
        names: Sequence[str],
        reserved: Sequence[str],
    ) -> None:
        """Start with an empty graph; arguments as for `normalize`."""
        self.graph = fx.Graph()
        for name in (*RESERVED, *reserved):  # fx gives no name twice, even if the node was erased
            self.graph.erase_node(self.graph.placeholder(name))
        self.inputs: list[Input] = []
        self.constants: dict[str, Tensor] = {}
        self.env: dict[fx.Node, Any] = {}
        self._program = program
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self._model = model
        self._prefix = prefix
        self._names = iter(enumerate(names))
        self._by_tensor: dict[int, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        """Add a placeholder for `node`, or map it to the existing one of the same tensor."""
        spec = self._specs[node.name]
        kind = _kind(spec.kind.name, node)
        if kind is InputKind.INPUT:
            index, name = next(self._names)
            self._append(node, kind, name, index=index)
        elif kind is InputKind.CONSTANT:
            target = str(spec.target)
            self.constants[target] = self._constant(target, node)
            self._append(node, kind, _placeholder_name(kind, target), target)
        else:
            self._add_state(node, kind, str(spec.target).removeprefix(self._prefix))

    def _add_state(self, node: fx.Node, kind: InputKind, target: str) -> None:
        """A parameter or buffer; tied ones share a placeholder."""
        is_parameter = kind is InputKind.PARAMETER
        model = self._model
        tensor = model.get_parameter(target) if is_parameter else model.get_buffer(target)
        if id(tensor) in self._by_tensor:
            self.env[node] = self._by_tensor[id(tensor)]
            return
        wants = is_parameter and tensor.requires_grad
        name = _placeholder_name(kind, target)
        self._by_tensor[id(tensor)] = self._append(node, kind, name, target, requires_grad=wants)

    def _append(
        self,
        node: fx.Node,
        kind: InputKind,
        name: str,
        target: str = "",
        index: int = -1,
        *,
        requires_grad: bool = False,
    ) -> fx.Node:
        new = self.graph.placeholder(name)
        new.target = new.name  # fx makes names unique, but not targets
        new.meta = copied_meta(node) | {"kind": kind}
        self.env[node] = new
        spec = tensor_spec(new)
        self.inputs.append(Input(spec, kind, target, index, requires_grad=requires_grad))
        return new

    def _constant(self, target: str, node: fx.Node) -> Tensor:
        value = self._program.constants[target]
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                "a constant of the model is not a tensor",
                node=node.name,
                found=type(value).__name__,
            )
        return value


def _drop_unused(graph: fx.Graph, inputs: Sequence[Input]) -> tuple[Input, ...]:
    """Erase unused placeholders, except the call's inputs: the user may ask for their gradients."""
    unused = {n.name: n for n in graph.nodes if n.op == "placeholder" and not n.users}
    kept = []
    for item in inputs:
        if item.name in unused and item.kind is not InputKind.INPUT:
            graph.erase_node(unused[item.name])
        else:
            kept.append(item)
    return tuple(kept)


def _placeholder_name(kind: InputKind, target: str) -> str:
    """Name for a tensor of the model: p_, b_ or c_, then its qualified name."""
    return f"{kind.value[0]}_{re.sub(r'[^0-9a-zA-Z]', '_', target)}"


RESERVED = (
    *("args", "compute", "ctx", "device", "inf", "m", "nan", "results", "run", "torch"),
    *("batch_size", "self"),
)
"""Names that no input, and no op, may have.

Generated programs use the first ten for other things, the epilogue has an input `batch_size`, and
torch.fx calls the module of a graph `self`."""


def _kind(name: str, node: fx.Node) -> InputKind:
    kinds = {
        "PARAMETER": InputKind.PARAMETER,
        "BUFFER": InputKind.BUFFER,
        "CONSTANT_TENSOR": InputKind.CONSTANT,
        "USER_INPUT": InputKind.INPUT,
    }
    if name not in kinds:
        raise UnsupportedError(
            "the model holds something that is neither a tensor nor a number",
            node=node.name,
            found=name.lower(),
        )
    return kinds[name]
