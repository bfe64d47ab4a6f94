"""CUDA's fused RMS norm, for plans.

`aten._fused_rms_norm` is one kernel on CUDA, which saves the input and fp32 (rows, 1), and its
backward is another (`layer_norm.cpp`, `rms_norm_symint`; `layer_norm_kernel.cu`). On the CPU the
same name stands for its steps, so it cannot be called by name there. These operators have its
results, and no code that runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .attention import Capability

aten = torch.ops.aten


def _never(*args: Any) -> Any:
    raise NotImplementedError("an operator of plans, which never run")


@torch.library.custom_op("autopipe::fused_rms_norm", mutates_args=())
def planned_rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """The normalized input, and 1 / its root mean square."""
    return _never()  # type: ignore[no-any-return]


@planned_rms_norm.register_fake
def _forward_metadata(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    rows = [*x.shape[: x.dim() - len(normalized_shape)], *[1] * len(normalized_shape)]
    dtype = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    dense = torch.contiguous_format
    return torch.empty_like(x, memory_format=dense), x.new_empty(rows, dtype=dtype)


@torch.library.custom_op("autopipe::fused_rms_norm_backward", mutates_args=())
def planned_rms_norm_backward(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the weight."""
    return _never()  # type: ignore[no-any-return]


@planned_rms_norm_backward.register_fake
def _backward_metadata(
    gradient: Tensor, x: Tensor, deviation: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(x, memory_format=dense), torch.empty_like(weight, memory_format=dense)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, _ = inputs
    ctx.has_weight = weight is not None
    ctx.save_for_backward(x, output[1], *([weight] if ctx.has_weight else []))


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, deviation, *weight = ctx.saved_tensors
    found = planned_rms_norm_backward(gradient, x, deviation, *(weight or [deviation]))
    return found[0], None, found[1] if ctx.has_weight else None, None


planned_rms_norm.register_autograd(_backward, setup_context=_save)


def fused_rms_norm(
    capability: Capability,
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """One kernel that saves its input and an fp32 per row, if input and weight have one dtype; the
    CPU composes it. `layer_norm.cpp`, `rms_norm_symint`.
    """
    if weight is not None and weight.dtype != x.dtype:
        return aten.rms_norm(x, normalized_shape, weight, eps)  # type: ignore[no-any-return]
    found: Tensor = torch.ops.autopipe.fused_rms_norm(x, normalized_shape, weight, eps)[0]
    return found
