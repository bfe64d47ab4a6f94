"""Inline an exported graph: copy its ops, and those of its no_grad and autocast regions."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.errors import CaptureError, UnsupportedError
from autopipe.passes._torch import (
    HigherOrderOperator,
    is_functorch_call,
    storage_id_of,
    wrap_with_autocast,
    wrap_with_set_grad_enabled,
)
from autopipe.passes.graph import source_line, trim_to_user_frame
from autopipe.passes.ir import InputKind

from .canonicalize import (
    RANDOM_BETWEEN,
    SQUEEZES,
    is_inactive_dropout,
    name_squeezed_dims,
    shift_random,
)

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
"""Assertion ops; the normalized graph has none."""


def inline_ops(
    module: fx.GraphModule,
    env: dict[fx.Node, Any],
    graph: fx.Graph,
    *,
    autocast: tuple[Any, ...] | None,
    without_grad: bool = False,
) -> list[Any]:
    """Copy the ops of `module` to the end of `graph`.

    Args:
        module: an exported graph, or a region in one.
        env: node of `module` → node of `graph`; has the placeholders, the other nodes are added.
        graph: is changed.
        autocast: the arguments of the autocast region around it; None: there is none.
        without_grad: whether it is in a no_grad region.

    Returns:
        What `module` returns, as nodes of `graph`.
    """

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
            env[node] = _inline_region(module, node, mapped, graph, autocast, without_grad)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
        elif is_inactive_dropout(node):
            env[node] = mapped(node.args[0])
        else:
            _check_plain_op(node)
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = copied_meta(node)
            if node.target in SQUEEZES:
                name_squeezed_dims(env[node])
            if autocast is not None:
                env[node].meta["autocast"] = autocast
            if node.target is RANDOM_BETWEEN:
                env[node] = shift_random(env[node])
    raise AssertionError("a graph without output")


def _check_plain_op(node: fx.Node) -> None:
    if is_functorch_call(node.target):
        raise CaptureError(
            "a function transform inside the model cannot be pipelined",
            source=source_line(node),
            found="torch.vmap",
            remedy="write the function for a whole batch, with broadcasting",
        )
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        raise CaptureError(
            "an operator that contains graphs of its own cannot be pipelined",
            node=node.name,
            source=source_line(node),
            found=str(node.target),
            remedy="write torch.cond, scan and the like with plain operators (torch.where)",
        )


def _inline_region(
    module: fx.GraphModule,
    node: fx.Node,
    mapped: Callable[[Any], Any],
    graph: fx.Graph,
    autocast: tuple[Any, ...] | None,
    without_grad: bool,
) -> list[Any]:
    """Inline a region in which the model disabled gradients or switched autocast.

    A no_grad region gets detached values, so nothing in it has a gradient, not even values that it
    writes in place. A value that it only returns keeps its gradient.
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
    parameters = [n for n in inner.graph.nodes if n.op == "placeholder"]
    outer = list(mapped(tuple(args)))
    values = [_detached(graph, v) for v in outer] if without_grad else outer
    original = dict(zip(values, outer, strict=True))
    results = inline_ops(
        inner,
        dict(zip(parameters, values, strict=True)),
        graph,
        autocast=autocast,
        without_grad=without_grad,
    )
    return [original.get(_first_alias(r), r) for r in results]


def _first_alias(value: Any) -> Any:
    """The first node whose value is the same tensor object as that of `value`.

    An op may return its argument: in-place ops, ``x.contiguous()``, dropout in evaluation, the
    broadcasting in a loss. The exported graph refers to the object by the op's result.
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


def copied_meta(node: fx.Node) -> dict[str, Any]:
    """Copy the metadata of an exported node that later passes need.

    Args:
        node: of an exported graph.

    Returns:
        "val": its value on fake tensors; "stack_trace": the user's stack frame; "modules": the
        paths of the submodules that it was called in, outermost first; "calls": for each of these
        a name of the call, since a module may be called several times.
    """
    meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    trace = trim_to_user_frame(node.meta.get("stack_trace"))
    stack = (node.meta.get("nn_module_stack") or {}).items()
    called = [(path, call) for call, (path, _) in stack if path.startswith("model.")]
    if called:
        meta["modules"] = [path.removeprefix("model.") for path, _ in called]
        meta["calls"] = [call for _, call in called]
    return meta | ({"stack_trace": trace} if trace else {})


def _detached(graph: fx.Graph, value: Any) -> Any:
    """A detached value; buffers and integers need no detaching."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
        return value
    if value.meta.get("kind") is InputKind.BUFFER or not _can_have_grad(value.meta["val"]):
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def _can_have_grad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
