"""Build `PhaseRequest`s: metadata of a call's tensors, and which outputs receive a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy

from autopipe.passes.ir import B, InputKind
from autopipe.passes.phases import PhaseRequest, TensorMeta

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from autopipe.passes.ir import Captured, Input, Sizes, Split
    from autopipe.passes.kernels import Capability
    from autopipe.passes.remat_policies import RematPolicy


def input_metadata(captured: Captured, leaves: Sequence[Any], size: int) -> dict[str, TensorMeta]:
    """Return the metadata of a call's tensors in a micro-batch.

    Args:
        captured: the graph with the placeholders.
        leaves: the call's flattened inputs.
        size: samples in the micro-batch.
    """
    found = {}
    for item in captured.inputs:
        if item.kind is not InputKind.INPUT:
            continue
        tensor = leaves[item.index].detach()
        if item.batch_dim is not None:
            tensor = tensor.narrow(item.batch_dim, 0, size)
        meta = TensorMeta.of(tensor)._replace(requires_grad=leaves[item.index].requires_grad)
        found[item.name] = meta.after_copy({})
    return found


def symbolic_metadata(
    captured: Captured, inputs: Mapping[str, TensorMeta], sizes: Sizes, symbols: Container[Any]
) -> dict[str, TensorMeta]:
    """Return the metadata of a call's tensors with some sizes symbolic.

    Args:
        captured: the graph with the placeholders.
        inputs: the metadata for one micro-batch size.
        sizes: the values of all symbols.
        symbols: those that stay symbolic.
    """
    places: dict[tuple[int, int], Any] = {(n, d): size for n, d, size in captured.derived_sizes}
    places |= {place: x.name for x in captured.lengths for place in x.places}
    places |= {(i.index, i.batch_dim): B for i in captured.inputs if i.batch_dim is not None}
    known = {s: sympy.Integer(n) for s, n in sizes.items() if s not in symbols}
    index = {i.name: i.index for i in captured.inputs}
    found = {}
    for name, meta in inputs.items():
        dims = enumerate(meta.shape)
        exprs = ((n, places.get((index[name], d))) for d, n in dims)
        shape = tuple(n if e is None else _known(e.xreplace(known)) for n, e in exprs)
        found[name] = meta._replace(shape=shape).dense_as(meta.stride, sizes)
    return found


def _known(expr: sympy.Expr) -> Any:
    return int(expr) if expr.is_Integer else expr


def state_metadata(captured: Captured, tensor: Callable[[Input], Tensor]) -> dict[str, TensorMeta]:
    """Return the metadata of a model's parameters, buffers and constants.

    Args:
        captured: the graph with the placeholders.
        tensor: returns the tensor of a placeholder.
    """
    return {
        i.name: TensorMeta.of(tensor(i)) for i in captured.inputs if i.kind is not InputKind.INPUT
    }


def usual_outputs(captured: Captured) -> frozenset[str]:
    """Return the names of outputs that receive a gradient in an ordinary training loop.

    If the model returns a loss, only that does; otherwise any output may.

    Args:
        captured: the graph with the outputs.
    """
    results = [o for o in captured.outputs if not o.internal]
    reduced = {o.name for o in results if o.combine.is_reduction}
    return frozenset(reduced or {o.name for o in results})


def training_request(
    model: nn.Module,
    split: Split,
    leaves: Sequence[Any],
    sizes: Sequence[int],
    devices: Sequence[torch.device],
    remat: Sequence[RematPolicy],
    *,
    exact: bool = True,
    kernels: Sequence[Capability | None] = (),
) -> PhaseRequest:
    """Build the request to trace a split program in training, with gradients of the usual outputs.

    Args:
        model: what was captured; its weights are not needed.
        split: the stages.
        leaves: a call's flattened inputs.
        sizes: samples in each micro-batch.
        devices: one per stage.
        remat: one policy per stage.
        exact, kernels: see `PhaseRequest`.
    """
    captured = split.captured
    state = state_metadata(captured, lambda item: captured.tensor_of(model, item))
    return PhaseRequest(
        split,
        {size: state | input_metadata(captured, leaves, size) for size in dict.fromkeys(sizes)},
        tuple(devices),
        tuple(remat),
        grad=True,
        differentiated=usual_outputs(captured),
        exact=exact,
        kernels=tuple(kernels),
    )
