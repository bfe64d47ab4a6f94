"""Trace one stage graph at one micro-batch size into one pure joint graph, forward and backward.

The stage runs on fake tensors with integer sizes, autograd runs on top, and make_fx records below
them everything that the two dispatch. AOTAutograd's functional tensors turn in-place calls and
views into pure ones. So the joint graph contains the kernels that eager autograd would execute, in
its order.

`torch.autograd.grad` computes the gradients that a stage sends to other stages. It takes the
tangents of the stage's results. For a value that later stages use too, it also takes the sum of
their gradients, as a tangent of the stage's *input itself*. Autograd adds such a tangent before any
contribution of this stage: the order in which it would sum the contributions in the whole graph.

(AOTAutograd's own joint export guesses the strides of tangents and drops tangents of results that
alias an input. Both are known here, so its parts are used directly.)
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError
from autopipe.passes._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FunctionalTensorMode,
    autocast_device_types,
    from_functional,
    make_fx,
    preserve_node_meta,
    record_checks_unordered,
    set_traced_call,
    to_functional,
)
from autopipe.passes.graph import source_line, static_fake_mode

from .function_constants import inline_constants, watch_constants
from .lower_random import lower_joint_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.passes.ir import RandomDraw, StageGraph

aten = torch.ops.aten


class TensorMeta(NamedTuple):
    """Metadata of a tensor at one micro-batch size: what tracing must know of it.

    Attributes:
        shape: sizes in elements.
        stride: in elements.
        dtype: of the elements.
        requires_grad: whether a gradient flows to it.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        """Read the metadata of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def fake(self, device: torch.device) -> Tensor:
        """Create a tensor with this metadata; call it under a fake tensor mode."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def after_copy(self) -> TensorMeta:
        """Return the metadata of a copy: dense strides in the same order of dimensions."""
        meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return self._replace(stride=meta.clone().stride())


@dataclass(frozen=True)
class JointGraph:
    """A traced stage: its forward and backward as one pure graph.

    Placeholders: the runtime's `ctx`, the stage's state (`held`: parameters, buffers, constants),
    received values, tangents. Results: returned values, new values of buffers, gradients.

    Attributes:
        graph: the joint graph.
        updates: positions among the state of the buffers whose new values are results.
        grads: positions among state and received values of those whose gradients are results.
        draws: the key of each random draw, with the position of its call in the stage graph.
    """

    graph: fx.Graph
    updates: tuple[int, ...]
    grads: tuple[int, ...]
    draws: tuple[RandomDraw, ...]


def forward_metadata(
    stage: StageGraph, inputs: Sequence[TensorMeta], device: torch.device, *, grad: bool
) -> tuple[TensorMeta, ...]:
    """Compute the metadata of a stage's results without tracing it.

    Args:
        stage: runs on fake tensors.
        inputs: metadata of its state, then of received tensors.
        device: where the stage will run.
        grad: whether gradients are recorded.
    """
    with (
        static_fake_mode(),
        record_checks_unordered(),
        _uncached_autocast(),
        torch.set_grad_enabled(grad),
    ):
        plain = [meta.fake(device) for meta in inputs]
        with FunctionalTensorMode():
            leaves = [
                to_functional(x).requires_grad_(meta.requires_grad)
                for x, meta in zip(plain, inputs, strict=True)
            ]
            results = _run(stage, leaves, device)
            return tuple(
                TensorMeta.of(from_functional(r))._replace(requires_grad=grad and r.requires_grad)
                for r in results
            )


def trace_joint(
    stage: StageGraph,
    inputs: Sequence[TensorMeta],
    arriving: Sequence[tuple[str, int, TensorMeta]],
    device: torch.device,
    *,
    grad: bool,
) -> JointGraph:
    """Trace a stage.

    Args:
        stage: its graph is run with every device in it replaced by `device`.
        inputs: metadata of its state, then of received tensors.
        arriving: for each tangent that the stage will receive: "return" or "input", the position of
            its value among these, and its metadata.
        device: where the stage will run; kernels are chosen for it.
        grad: False traces the forward alone, under no_grad.

    Returns:
        The joint graph, its random calls replaced by keyed draws.

    Raises:
        CaptureError: a shape depends on the values of tensors, or a custom autograd.Function uses a
            tensor that is not one of its arguments.
    """
    updates: list[int] = []
    grads: list[int] = []
    differentiable = [i for i, meta in enumerate(inputs) if meta.requires_grad]
    wanted = differentiable if grad else []

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
        before = list(primals)
        with FunctionalTensorMode():
            outer = [to_functional(x) for x in primals]
            # Also for a forward alone: matmul chooses its kernel by requires_grad.
            leaves = [
                x.detach().requires_grad_() if i in differentiable else x
                for i, x in enumerate(outer)
            ]
            with torch.set_grad_enabled(grad):
                results = _run(stage, leaves, device)
            gradients: list[tuple[int, Tensor | None]] = []
            if arriving and wanted:
                values = {"return": results, "input": leaves}
                with (
                    torch.autocast(device.type, enabled=False),
                    torch.autograd.set_multithreading_enabled(False),
                ):
                    found = _gradients(
                        [values[kind][i] for kind, i, _ in arriving],
                        [leaves[i] for i in wanted],
                        [to_functional(t) for t in tangents],
                    )
                gradients = list(zip(wanted, found, strict=True))
            plain = [from_functional(_resolved(r.detach())) for r in results]
            now = [from_functional(x) for x in outer]
            updates[:] = [i for i, x in enumerate(now) if x is not before[i]]
            pairs = [(i, from_functional(_resolved(g))) for i, g in gradients if g is not None]
        grads[:] = [i for i, _ in pairs]
        return plain + [now[i] for i in updates] + [g for _, g in pairs]

    with (
        static_fake_mode(),
        record_checks_unordered(),
        preserve_node_meta(),
        _uncached_autocast(),
        watch_constants(stage),
    ):
        primals = [meta.fake(device) for meta in inputs]
        tangents_ = [meta.fake(device) for _, _, meta in arriving]
        module = make_fx(joint, _allow_non_fake_inputs=True)(primals, tangents_)
    inline_constants(stage, module)
    calls = enumerate(stage.graph_module.graph.nodes)
    static = {position for position, node in calls if node.meta.get("static")}
    return JointGraph(
        module.graph, tuple(updates), tuple(grads), lower_joint_graph(module.graph, static)
    )


def _gradients(
    results: list[Tensor], leaves: list[Tensor], tangents: list[Tensor]
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(results, leaves, tangents, allow_unused=True)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise CaptureError(
            "a shape in the backward depends on the values of tensors",
            found=str(error),
            remedy="use torch.where instead of index_fill and similar calls",
        ) from error


def _resolved(tensor: Tensor) -> Tensor:
    """Materialize lazy conjugation and negation, which `TensorMeta` does not describe."""
    return tensor.resolve_conj().resolve_neg()


def _run(stage: StageGraph, inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Run a stage graph on `device` and attribute what is recorded to the call that causes it."""
    env: dict[fx.Node, Any] = {}
    attributed: set[Any] = set()
    source = iter(inputs)
    for position, node in enumerate(stage.graph_module.graph.nodes):
        if node.op == "placeholder":
            env[node] = next(source)
        elif node.op == "output":
            return [env[n] for n in node.args[0]]
        else:
            origin = (position, node.meta.get("stack_trace"))
            set_traced_call(*origin)
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            with _region(node, device):
                env[node] = _call(
                    node, _replace_devices(args, device), _on_device(node, kwargs, device)
                )
            for tensor in pytree.tree_leaves(env[node]):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    _attribute_backward(tensor.grad_fn, origin, attributed)
    raise AssertionError("a graph without output")


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if getattr(target, "overloadpacket", None) is aten.randint_like:
        # torch's Python function passes no gradient, but the overload would ask for one.
        args = pytree.tree_map_only(Tensor, Tensor.detach, args)
    try:
        return target(*args, **kwargs)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise CaptureError(
            "a shape that depends on the values of tensors cannot be pipelined",
            node=node.name,
            source=source_line(node),
            found=str(target),
            remedy="keep the shape and mask instead: torch.where(mask, x, 0) for x[mask]",
        ) from error


def _attribute_backward(function: Any, origin: tuple[int, str | None], seen: set[Any]) -> None:
    """Attribute what autograd's new functions will record to the call that created them."""
    todo = [function]
    while todo:
        top = todo.pop()
        if top is not None and top not in seen:
            seen.add(top)
            top.register_prehook(lambda _: set_traced_call(*origin))
            todo += [f for f, _ in top.next_functions]


def _region(node: fx.Node, device: torch.device) -> Any:
    """Return the autocast region that a call was captured in, for the stage's device."""
    if "autocast" not in node.meta:
        return nullcontext()
    _, dtype, enabled, _ = node.meta["autocast"]
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False)


def _replace_devices(value: Any, device: torch.device) -> Any:
    """Replace every device in some arguments by `device`."""
    return pytree.tree_map(lambda v: device if isinstance(v, torch.device) else v, value)


def _on_device(node: fx.Node, kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Replace the devices in keyword arguments; give a factory that names none its device."""
    kwargs = _replace_devices(kwargs, device)
    if kwargs.get("device") is None and _is_factory(node.target):
        kwargs["device"] = device
    return kwargs


def _is_factory(target: Any) -> bool:
    """Whether a call such as arange creates tensors on the default device if it names none."""
    schema = getattr(target, "_schema", None)
    if schema is None or not any(a.name == "device" for a in schema.arguments):
        return False
    return not any("Tensor" in str(a.type) for a in schema.arguments)


def _uncached_autocast() -> Any:
    """While tracing under autocast: keep fake casts of parameters out of its cache."""
    for kind in autocast_device_types():
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return torch.autocast(kind, dtype=dtype, cache_enabled=False)
    return nullcontext()
