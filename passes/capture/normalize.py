"""The exporter's graph → the form the later passes rely on.

Plain calls only (regions with gradients off or with autocast inlined), no assertions, one
placeholder per tensor (tied parameters merged), every size in terms of one symbol, `B`.
"""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from autopipe.errors import CaptureError, UnsupportedError
from autopipe.passes._torch import (
    HigherOrderOperator,
    is_functorch_call,
    storage_id_of,
    wrap_with_autocast,
    wrap_with_set_grad_enabled,
)
from autopipe.passes.graph import remove_dead_calls, source_line, tensor_spec, trim_to_user_frame
from autopipe.passes.ir import Input, InputKind

from .canonicalize import SQUEEZES, does_nothing, squeeze_ones
from .scalar_reads import keep_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


class Normalized(NamedTuple):
    """A graph of plain calls, its placeholders described, and the constants they refer to."""

    graph: fx.Graph
    inputs: tuple[Input, ...]
    constants: Mapping[str, Tensor]


def normalize(
    program: torch.export.ExportedProgram, model: nn.Module, prefix: str, names: Sequence[str]
) -> Normalized:
    """Rewrite an exported program's graph.

    Args:
        program: its graph is not changed.
        model: the module behind it, for the identity of its tensors.
        prefix: what stands before the model's own names in the program's signature.
        names: what to call the inputs of the call, in order.
    """
    graph = fx.Graph()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs: list[Input] = []
    constants: dict[str, Tensor] = {}
    env: dict[fx.Node, Any] = {}
    first_of: dict[int, fx.Node] = {}
    calls = 0
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        kind = _kind(spec.kind.name, node)
        target, index = "", -1
        if kind is InputKind.INPUT:
            index, calls = calls, calls + 1
        elif kind is InputKind.CONSTANT:
            target = str(spec.target)
            value = program.constants[target]
            if not isinstance(value, Tensor):
                raise UnsupportedError(
                    "a constant of the model is no tensor",
                    node=node.name,
                    found=type(value).__name__,
                )
            constants[target] = value
        else:
            target = str(spec.target).removeprefix(prefix)
            tensor = _tensor(model, kind, target)
            if id(tensor) in first_of:  # tied: one tensor, one placeholder
                env[node] = first_of[id(tensor)]
                continue
        new = graph.placeholder(_name(kind, target) if target else _safe(names[index]))
        new.target = new.name  # fx has made the name unique, not the target
        new.meta = _facts(node) | {"kind": kind}
        env[node] = new
        if kind in (InputKind.PARAMETER, InputKind.BUFFER):
            first_of[id(tensor)] = new
        wants = kind is InputKind.PARAMETER and tensor.requires_grad
        inputs.append(Input(tensor_spec(new), kind, target, index, requires_grad=wants))
    result = _inline(program.graph_module, env, graph, autocast=None)
    graph.output(tuple(result))
    remove_dead_calls(graph)
    keep_tensors(graph)
    unused = {n.name for n in graph.nodes if n.op == "placeholder" and not n.users}
    kept = []
    for item in inputs:  # inputs of the call stay: their gradients and structure are the user's
        if item.name in unused and item.kind is not InputKind.INPUT:
            graph.erase_node(next(n for n in graph.nodes if n.name == item.name))
        else:
            kept.append(item)
    remove_dead_calls(graph)
    return Normalized(graph, tuple(kept), constants)


def _name(kind: InputKind, target: str) -> str:
    """The placeholder of a tensor that the model holds: p_, b_ or c_ and its qualified name."""
    return f"{kind.value[0]}_{re.sub(r'[^0-9a-zA-Z]', '_', target)}"


RESERVED = {"args", "compute", "device", "inf", "kit", "m", "nan", "results", "run", "torch"}
"""Words that generated programs use for something else."""


def _safe(name: str) -> str:
    return f"{name}_" if name in RESERVED else name


def _kind(name: str, node: fx.Node) -> InputKind:
    kinds = {
        "PARAMETER": InputKind.PARAMETER,
        "BUFFER": InputKind.BUFFER,
        "CONSTANT_TENSOR": InputKind.CONSTANT,
        "USER_INPUT": InputKind.INPUT,
    }
    if name not in kinds:
        raise UnsupportedError(
            "the model holds something that is neither tensor nor number",
            node=node.name,
            found=name.lower(),
        )
    return kinds[name]


def _tensor(model: nn.Module, kind: InputKind, target: str) -> Tensor:
    return model.get_parameter(target) if kind is InputKind.PARAMETER else model.get_buffer(target)


def _inline(
    module: fx.GraphModule,
    env: dict[fx.Node, Any],
    graph: fx.Graph,
    *,
    autocast: tuple[Any, ...] | None,
    without_grad: bool = False,
) -> list[Any]:
    """Copy `module`'s calls to the end of `graph`; returns what it returns."""

    def mapped(value: Any) -> Any:
        return fx.map_arg(value, lambda n: env[n])

    for node in module.graph.nodes:
        if node.op == "placeholder" or node.op == "get_attr":
            continue
        if node.op == "output":
            return list(mapped(node.args[0]))
        if node.target in ASSERTIONS:
            continue
        if node.target in (wrap_with_set_grad_enabled, wrap_with_autocast):
            env[node] = _region(module, node, mapped, graph, autocast, without_grad)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
        elif does_nothing(node):
            env[node] = mapped(node.args[0])
        elif is_functorch_call(node.target):
            raise CaptureError(
                "a function transform inside the model cannot be pipelined",
                source=source_line(node),
                found="torch.vmap",
                remedy="write the function for a whole batch, with broadcasting",
            )
        elif node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                "an operator that contains graphs of its own cannot be pipelined",
                node=node.name,
                source=source_line(node),
                found=str(node.target),
                remedy="write torch.cond, scan and the like with plain operators (torch.where)",
            )
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = _facts(node)
            if node.target in SQUEEZES:
                squeeze_ones(env[node])
            if autocast is not None:
                env[node].meta["autocast"] = autocast
    raise AssertionError("a graph without output")


def _region(
    module: fx.GraphModule,
    node: fx.Node,
    mapped: Callable[[Any], Any],
    graph: fx.Graph,
    autocast: tuple[Any, ...] | None,
    without_grad: bool,
) -> list[Any]:
    """Inline a region that export outlined because gradients or autocast were switched in it.

    Where gradients were off, the region is given detached values. Then nothing in it has a
    gradient, not even what it writes to in place; and what it only passes through keeps its own.
    """
    if node.target is wrap_with_set_grad_enabled:
        enabled, body, *args = node.args
        if enabled and without_grad:
            raise UnsupportedError(
                "gradients are switched on inside a region where they are off",
                node=node.name,
                source=source_line(node),
                remedy="leave the no_grad region first",
            )
        without_grad = without_grad or not enabled
    else:
        autocast, body, args = node.args[:4], node.args[4], list(node.args[5:])
    assert isinstance(body, fx.Node)
    inner = getattr(module, str(body.target))
    holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
    given = list(mapped(tuple(args)))
    values = [_detached(graph, v) for v in given] if without_grad else given
    original = dict(zip(values, given, strict=True))
    results = _inline(
        inner,
        dict(zip(holes, values, strict=True)),
        graph,
        autocast=autocast,
        without_grad=without_grad,
    )
    return [original.get(_object(r), r) for r in results]


def _object(value: Any) -> Any:
    """The first node that stands for the same tensor object as `value`.

    A call may return what it was given: one that writes in place, ``x.contiguous()``, dropout in
    evaluation, the broadcasting in a loss. What comes after it knows the object by its result.
    """
    while isinstance(value, fx.Node) and value.op == "call_function":
        call, index = value, None
        if value.target is operator.getitem and isinstance(value.args[0], fx.Node):
            call, index = value.args[0], value.args[1]
        storage = storage_id_of(value)
        aliases = [n for n in call.all_input_nodes if storage_id_of(n) == storage]
        if storage is None or not aliases:
            break
        args, kwargs = fx.map_arg((call.args, call.kwargs), lambda n: n.meta["val"])
        target: Any = call.target
        with aliases[0].meta["val"].fake_mode, torch.no_grad():
            result = target(*args, **kwargs)
        result = result if index is None else result[index]
        same = [n for n in aliases if n.meta["val"] is result]
        if not same:
            break
        value = same[0]
    return value


def _facts(node: fx.Node) -> dict[str, Any]:
    """What later passes ask of a node: its looks and where the model made it."""
    facts = {"val": node.meta["val"]} if "val" in node.meta else {}
    trace = trim_to_user_frame(node.meta.get("stack_trace"))
    stack = (node.meta.get("nn_module_stack") or {}).values()
    modules = [path.removeprefix("model.") for path, _ in stack if path.startswith("model.")]
    if modules:
        facts["modules"] = modules  # the submodules that it was called in, outermost first
    return facts | ({"stack_trace": trace} if trace else {})


def _detached(graph: fx.Graph, value: Any) -> Any:
    """A value without its gradient; buffers and integers have none."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
        return value
    if value.meta.get("kind") is InputKind.BUFFER or not _can_have_grad(value.meta["val"]):
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def _can_have_grad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
