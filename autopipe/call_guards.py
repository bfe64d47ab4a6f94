"""Handle the modes of a call: function transforms, hooks, anomaly detection, autocast."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.errors import UnsupportedError
from autopipe.passes._torch_modes import (
    dispatch_modes,
    has_tangent,
    in_functorch_transform,
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


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Trace without the caller's dispatch modes, hooks on saved tensors and anomaly detection.

    They would see fake tensors; they are meant for the real ops, which run later.
    """
    with ExitStack() as stack:
        stack.enter_context(without_saved_tensor_hooks())
        if dispatch_modes():
            stack.enter_context(without_dispatch_modes())
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False, check_nan=False))
        yield


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
