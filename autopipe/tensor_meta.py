"""Build `PhaseRequest`s: metadata of a call's tensors, and which outputs receive a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopipe.passes.ir import InputKind
from autopipe.passes.phases import PhaseRequest, TensorMeta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    from autopipe.passes.ir import Captured, Input, Split
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
        found[item.name] = meta.after_copy()
    return found


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
) -> PhaseRequest:
    """Build the request to trace a split program in training, with gradients of the usual outputs.

    Args:
        model: what was captured; its weights are not needed.
        split: the stages.
        leaves: a call's flattened inputs.
        sizes: samples in each micro-batch.
        devices: one per stage.
        remat: one policy per stage.
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
    )
