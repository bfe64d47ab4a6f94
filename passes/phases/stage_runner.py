"""Run a stage graph op by op, on any device.

While a stage is traced, it runs on fake tensors, and each recorded node is attributed to the op of
the stage graph that caused it, in the backward too.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.errors import AutopipeError, CaptureError, describe
from autopipe.passes._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    enable_python_dispatcher,
    from_functional,
    set_traced_call,
)
from autopipe.passes._torch_modes import autocast_device_types, without_autocast
from autopipe.passes.graph import source_line
from autopipe.passes.kernels import call_as_cuda, cast_as_cuda, is_substituted, planned_autocast

from .upsample_sizes import with_output_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from autopipe.passes.ir import StageGraph
    from autopipe.passes.kernels import Capability

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.linear.default)
"""Operators that multiply matrices by code in C++ that, before torch 2.13, fixes symbolic sizes."""

ATTENTION = aten.scaled_dot_product_attention.default
"""Another one; but torch's Python version of its dropout rounds in another way."""


def run_stage(
    stage: StageGraph,
    inputs: Sequence[Tensor],
    device: torch.device,
    around: Callable[[int, fx.Node], AbstractContextManager[Any]],
    computed: Callable[[int, fx.Node, Any], None] = lambda position, node, value: None,
    kernels: Capability | None = None,
) -> list[Tensor]:
    """Run a stage graph, op by op.

    Args:
        stage: its graph; every device in it is replaced by `device`.
        inputs: its state, then received tensors.
        device: where it runs.
        around: (position in the graph, op) → the context that the op runs in.
        computed: called with position, op and result after each op.
        kernels: the compute capability of a CUDA device to trace as for, on tensors of another
            device; None: ops call the kernels of `device`.

    Returns:
        Its results.

    Raises:
        CaptureError: a shape depends on the values of tensors.
    """
    env: dict[fx.Node, Any] = {}
    source = iter(inputs)
    for position, node in enumerate(stage.graph_module.graph.nodes):
        if node.op == "placeholder":
            env[node] = next(source)
        elif node.op == "output":
            return [env[n] for n in node.args[0]]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            with around(position, node), _region(node, device):
                args, kwargs = _replace_devices(args, device), _on_device(node, kwargs, device)
                if kernels is None:
                    env[node] = _call(node, node.target, args, kwargs)
                else:
                    env[node] = _call_as_planned(node, args, kwargs, device, kernels)
            computed(position, node, env[node])
    raise AssertionError("a graph without output")


def run_on_device(
    stage: StageGraph,
    inputs: Sequence[Tensor],
    device: torch.device,
    kernels: Capability | None = None,
) -> list[Tensor]:
    """Run a stage graph on the tensors of a trace; attribute what is recorded to the graph's ops.

    Arguments, result and errors are those of `run_stage`.
    """
    attributed: set[Any] = set()

    def around(position: int, node: fx.Node) -> AbstractContextManager[Any]:
        set_traced_call(position, node.meta.get("stack_trace"))
        return nullcontext()

    def computed(position: int, node: fx.Node, value: Any) -> None:
        origin = (position, node.meta.get("stack_trace"))
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                _attribute_backward(tensor.grad_fn, origin, attributed)

    return run_stage(stage, inputs, device, around, computed, kernels)


def _call_as_planned(
    node: fx.Node, args: Any, kwargs: Any, device: torch.device, kernels: Capability
) -> Any:
    """Call an op as the CUDA device does that it is planned for; autocast is CUDA's, too."""

    def substitute(*args: Any, **kwargs: Any) -> Any:
        return call_as_cuda(node.target, args, kwargs, kernels)

    dtype = planned_autocast(device)
    if "autocast" in node.meta:  # a region of the model's own, whatever is active around it
        _, dtype, enabled, _ = node.meta["autocast"]
        dtype = (dtype or torch.get_autocast_dtype("cuda")) if enabled else None
    if dtype is not None:
        args, kwargs = cast_as_cuda(node.target, args, kwargs, dtype)
    with without_autocast(device):
        target = substitute if is_substituted(node.target) else node.target
        return _call(node, target, args, kwargs)


def _call(node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
    if getattr(target, "overloadpacket", None) is aten.randint_like:
        # torch's Python function has no gradient, but the overload would require one.
        args = pytree.tree_map_only(Tensor, Tensor.detach, args)
    target, args, kwargs = with_output_size(target, args, kwargs)
    try:
        with _with_symbols(target, args, kwargs):
            result = target(*args, **kwargs)
        for tensor in _written(target, args, kwargs):
            _keep_strides(tensor)
        return result
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise CaptureError(
            "a shape that depends on the values of tensors cannot be pipelined",
            node=node.name,
            source=source_line(node),
            found=str(target),
            remedy="keep the shape and mask instead: torch.where(mask, x, 0) for x[mask]",
        ) from error
    except (ValueError, RuntimeError) as error:
        if isinstance(error, AutopipeError) or not _written(target, args, kwargs):
            raise
        raise CaptureError(
            "torch cannot trace what is written in place here",
            node=node.name,
            source=source_line(node),
            found=describe(error),
            remedy="write it out of place: x = x.masked_fill(...) for x.masked_fill_(...)",
        ) from error


def _with_symbols(
    target: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> AbstractContextManager[Any]:
    """Let an operator keep symbolic sizes, by torch's Python version of what it calls."""
    draws = target is ATTENTION and any([*args[4:5], kwargs.get("dropout_p")])
    if target not in (*PRODUCTS, ATTENTION) or draws or torch.__version__ >= "2.13":
        return nullcontext()
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    symbolic = any(isinstance(n, torch.SymInt) for x in tensors for n in x.shape)
    return enable_python_dispatcher() if symbolic else nullcontext()


def _written(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an op writes, `out` among them."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | kwargs
    names = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [x for x in map(given.get, names) if isinstance(x, Tensor)]


def _keep_strides(tensor: Any) -> None:
    """Give a functional tensor that was written in place the strides that it had before.

    The pure form of an in-place operator may return others: `masked_fill` is always contiguous. A
    copy is recorded only where strides differ, and only of a tensor without gaps in memory.
    """
    value = from_functional(tensor)
    sizes, strides = tensor.shape, tensor.stride()
    if value is tensor or value.stride() == strides:
        return
    order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], -sizes[d]))
    back = sorted(range(tensor.ndim), key=order.__getitem__)
    with torch.no_grad():
        copied = tensor.detach().permute(order).clone(memory_format=torch.contiguous_format)
        copied = copied.permute(back)
    if all(a == b for n, a, b in zip(sizes, copied.stride(), strides, strict=True) if n > 1):
        tensor.replace_(from_functional(copied))
        tensor.commit_update()
        tensor.sync()


def _attribute_backward(function: Any, origin: tuple[int, str | None], seen: set[Any]) -> None:
    """Attribute the nodes that autograd's new functions will record to the op that created them."""
    todo = [function]
    while todo:
        top = todo.pop()
        if top is not None and top not in seen:
            seen.add(top)
            top.register_prehook(lambda _: set_traced_call(*origin))
            todo += [f for f, _ in top.next_functions]


def _region(node: fx.Node, device: torch.device) -> Any:
    """Return the autocast region that an op was captured in, for the stage's device."""
    if "autocast" not in node.meta:
        return nullcontext()
    _, dtype, enabled, _ = node.meta["autocast"]
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False)


def _replace_devices(value: Any, device: torch.device) -> Any:
    """Replace every device in some arguments by `device`."""
    return pytree.tree_map(lambda v: device if isinstance(v, torch.device) else v, value)


def _on_device(node: fx.Node, kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Replace devices in keyword arguments; set the device of a factory op that names none."""
    kwargs = _replace_devices(kwargs, device)
    if kwargs.get("device") is None and _is_factory(node.target):
        kwargs["device"] = device
    return kwargs


def _is_factory(target: Any) -> bool:
    """Whether an op such as arange creates tensors on the default device if it names none."""
    schema = getattr(target, "_schema", None)
    if schema is None or not any(a.name == "device" for a in schema.arguments):
        return False
    return not any("Tensor" in str(a.type) for a in schema.arguments)


def uncached_autocast() -> Any:
    """While tracing under autocast: keep fake casts of parameters out of autocast's cache."""
    for kind in autocast_device_types():
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return torch.autocast(kind, dtype=dtype, cache_enabled=False)
    return nullcontext()
