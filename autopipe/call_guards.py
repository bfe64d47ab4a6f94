"""Handle the modes of a call: tracers, transforms, dispatch modes, hooks, autocast, and so on."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.errors import InputError, UnsupportedError
from autopipe.passes._torch import FakeTensor
from autopipe.passes._torch_modes import (
    dispatch_modes,
    has_tangent,
    in_functorch_transform,
    tracing_modes,
    without_dispatch_modes,
    without_saved_tensor_hooks,
)
from autopipe.runtime.backends import autocast_types

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def refuse_transforms(leaves: Sequence[Any]) -> None:
    """Refuse function transforms: they wrap tensors to intercept ops, but a pipeline runs kernels.

    Args:
        leaves: flattened inputs of a call, or gradients.

    Raises:
        UnsupportedError: a call, or a gradient, within torch.func.grad, vmap, jvp and the like.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if in_functorch_transform(tensors):
        raise UnsupportedError(
            "a function transform around a pipeline (torch.func, vmap, gradients in batches)",
            remedy="transform the model itself (pipe.model), or call the pipeline outside",
        )
    if any(map(has_tangent, tensors)):
        raise UnsupportedError(
            "forward-mode differentiation through a pipeline", remedy="use backward()"
        )


def refuse_tracers(leaves: Sequence[Any]) -> None:
    """Refuse a call that another tracer records: the stages run in threads that it does not see.

    Args:
        leaves: flattened inputs of a call.

    Raises:
        UnsupportedError: a call within torch.export, make_fx, torch.jit.trace or another capture.
    """
    tracing = bool(tracing_modes())
    tracing |= torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    # While one thread exports, all are told so; but only that one passes fakes.
    exporting = torch.compiler.is_exporting() and any(isinstance(x, FakeTensor) for x in leaves)
    if tracing or exporting:
        raise UnsupportedError(
            "a pipeline is called while something records a graph (autopipe, torch.export, make_fx,"
            " torch.jit.trace)",
            remedy="record the model itself: pipe.model; in a larger model, use that in place of"
            " the pipeline",
        )


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Trace without the caller's dispatch modes, hooks on saved tensors and anomaly detection.

    They would see fake tensors, and a mode could change what is recorded; they are meant for the
    real call and its backward, which run later.
    """
    with ExitStack() as stack:
        stack.enter_context(without_saved_tensor_hooks())
        if dispatch_modes():
            stack.enter_context(without_dispatch_modes())
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False, check_nan=False))
        yield


def refuse_meta(leaves: Sequence[Any]) -> None:
    """Refuse tensors without values.

    Args:
        leaves: flattened inputs of a call.

    Raises:
        InputError: one is on the meta device.
    """
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_meta and not isinstance(leaf, FakeTensor):
            raise InputError(
                "an input is on the meta device: it has no values to compute with",
                found=f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)}",
                remedy="pass a tensor with values; autopipe.plan and pipe.capture take such inputs",
            )


def autocast_state() -> tuple[tuple[bool, torch.dtype], ...]:
    """For each device type, whether autocast is on, and its dtype."""
    return tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in autocast_types()
    )


@contextmanager
def restore_autocast(state: Sequence[tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Run under an earlier autocast state.

    Args:
        state: what `autocast_state` returned.
    """
    with ExitStack() as stack:
        for kind, (enabled, dtype) in zip(autocast_types(), state, strict=True):
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield
