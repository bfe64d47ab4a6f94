"""One stage graph, at one micro-batch size → its joint forward and backward as one pure graph.

The stage runs on fake tensors with plain integer sizes, autograd runs on top of it, and everything
the two dispatch is recorded below them by make_fx, through AOTAutograd's functional tensors, which
turn in-place calls and views into pure ones. What is recorded is therefore what eager autograd
would have executed, kernel by kernel and in its order.

`torch.autograd.grad` is asked for what a stage owes its neighbours: the tangents of its results,
and, for a value that later stages use too, their running sum as the tangent *of the input itself*.
Autograd adds such a tangent before any contribution of this stage, which is exactly the order in
which it would sum the contributions in the whole graph.

(AOTAutograd's own joint export guesses the strides of tangents and drops the tangents of results
that alias an input; both are known here, so its pieces are used without its wrapping.)
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
    """A tensor as tracing needs to know it: concrete sizes, and whether a gradient flows to it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def fake(self, device: torch.device) -> Tensor:
        """A tensor that looks so (to be called under a fake mode)."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def settled(self) -> TensorMeta:
        """The same after a copy: dense strides in the same order of dimensions."""
        meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return self._replace(stride=meta.clone().stride())


@dataclass(frozen=True)
class JointGraph:
    """A traced stage. Placeholders: held, received, tangents. Results: returns, updates, grads.

    Attributes:
        graph: the joint graph, pure.
        updates: positions, among held, of the buffers whose new values are returned.
        grads: positions, among held then received, whose gradients are returned.
        draws: for each keyed draw its key, with the position of its call in the stage graph.
    """

    graph: fx.Graph
    updates: tuple[int, ...]
    grads: tuple[int, ...]
    draws: tuple[RandomDraw, ...]


def forward_metadata(
    stage: StageGraph, inputs: Sequence[TensorMeta], device: torch.device, *, grad: bool
) -> tuple[TensorMeta, ...]:
    """What a stage's results look like, given its held and received tensors; without tracing."""
    with (
        static_fake_mode(),
        record_checks_unordered(),
        _uncached_autocast(),
        torch.set_grad_enabled(grad),
    ):
        plain = [look.fake(device) for look in inputs]
        with FunctionalTensorMode():
            leaves = [
                to_functional(x).requires_grad_(look.requires_grad)
                for x, look in zip(plain, inputs, strict=True)
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
        stage: its graph is run as it is, with devices in it replaced by `device`.
        inputs: looks of held, then received tensors.
        arriving: for each tangent that will come ("return" or "input", position, its look).
        device: where the stage will run; kernels are chosen for it.
        grad: False traces the forward alone, under no_grad.
    """
    updates: list[int] = []
    grads: list[int] = []
    marked = [i for i, look in enumerate(inputs) if look.requires_grad]
    wanted = marked if grad else []

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
        before = list(primals)
        with FunctionalTensorMode():
            outer = [to_functional(x) for x in primals]
            # Marked without gradients too: by the mark, matmul chooses its kernel.
            leaves = [
                x.detach().requires_grad_() if i in marked else x for i, x in enumerate(outer)
            ]
            with torch.set_grad_enabled(grad):
                results = _run(stage, leaves, device)
            gradients: list[tuple[int, Tensor | None]] = []
            if arriving and wanted:
                known = {"return": results, "input": leaves}
                with (
                    torch.autocast(device.type, enabled=False),
                    torch.autograd.set_multithreading_enabled(False),
                ):
                    found = _gradients(
                        [known[kind][i] for kind, i, _ in arriving],
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
        primals = [look.fake(device) for look in inputs]
        tangents_ = [look.fake(device) for _, _, look in arriving]
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
            remedy="take gradients of what index_fill writes, and the like, by torch.where instead",
        ) from error


def _resolved(tensor: Tensor) -> Tensor:
    """Without the bits for "to be conjugated" and "to be negated": `TensorMeta` does not tell of
    them."""
    return tensor.resolve_conj().resolve_neg()


def _run(stage: StageGraph, inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Run a stage graph on `device`, attributing what is recorded to the calls that cause it."""
    env: dict[fx.Node, Any] = {}
    known: set[Any] = set()
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
                env[node] = _call(node, _moved(args, device), _placed(node, kwargs, device))
            for tensor in pytree.tree_leaves(env[node]):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    _attribute_backward(tensor.grad_fn, origin, known)
    raise AssertionError("a graph without output")


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if getattr(target, "overloadpacket", None) is aten.randint_like:
        # Python's function knows that there is no gradient, the overload does not.
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


def _attribute_backward(function: Any, origin: tuple[int, str | None], known: set[Any]) -> None:
    """Autograd's new functions belong to the call that made them: so will what they record."""
    todo = [function]
    while todo:
        top = todo.pop()
        if top is not None and top not in known:
            known.add(top)
            top.register_prehook(lambda _: set_traced_call(*origin))
            todo += [f for f, _ in top.next_functions]


def _region(node: fx.Node, device: torch.device) -> Any:
    """The autocast region a call was captured in, for the device that the stage runs on."""
    if "autocast" not in node.meta:
        return nullcontext()
    _, dtype, enabled, _ = node.meta["autocast"]
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False)


def _moved(value: Any, device: torch.device) -> Any:
    """Arguments with every device in them replaced by `device`."""
    return pytree.tree_map(lambda v: device if isinstance(v, torch.device) else v, value)


def _placed(node: fx.Node, kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments likewise; a factory that names no device would use the default one."""
    kwargs = _moved(kwargs, device)
    if kwargs.get("device") is None and _makes_tensors(node.target):
        kwargs["device"] = device
    return kwargs


def _makes_tensors(target: Any) -> bool:
    """A factory such as arange, whose device is the default one unless it is told."""
    schema = getattr(target, "_schema", None)
    if schema is None or not any(a.name == "device" for a in schema.arguments):
        return False
    return not any("Tensor" in str(a.type) for a in schema.arguments)


def _uncached_autocast() -> Any:
    """Keep fake casts of parameters out of autocast's cache while tracing under it."""
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return torch.autocast(kind, dtype=dtype, cache_enabled=False)
    return nullcontext()
