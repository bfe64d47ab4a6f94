"""The table of substitutes: operator of a captured graph → what a CUDA device calls for it.

Each entry says where torch decides by device. Sources are files of torch 2.11 to 2.13. What is not
here calls the same operators on both: linear and convolution (`convolution` keeps the memory format
that its input or weight suggests on both, `ConvUtils.h`), embeddings, losses, activations, pooling
(int64 indices on both), upsampling.

Not here, though it differs (`kept_from_cpu`): LSTM, GRU and RNN. cuDNN runs one kernel per call and
saves a reserve whose size only cuDNN knows; a plan counts the CPU's kernels and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .attention import Capability, attention
from .rms_norm import fused_rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

aten = torch.ops.aten

CUDNN_SAMPLES, CUDNN_SAMPLES_EVAL, CUDNN_NUMBERS = 880801, 65535, 2**31 - 1
"""The most samples in training and in evaluation, and numbers, that cuDNN's batch norm takes."""


def _dropout(capability: Capability, x: Tensor, p: float, train: bool) -> Tensor:
    """One kernel, which saves a mask of booleans; the CPU draws factors of the input's dtype. (So
    does CUDA for feature, alpha and in-place dropouts.) `Dropout.cpp`,
    `is_fused_kernel_acceptable`.
    """
    if train and 0 < p < 1 and x.numel() > 0:
        found: Tensor = aten.native_dropout(x, p, True)[0]
        return found
    return aten.dropout(x, p, train)  # type: ignore[no-any-return]


def _batch_norm(
    capability: Capability,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    """cuDNN for fp32 and fp16 images with weight and bias, else the native kernel. cuDNN also saves
    a reserve, whose size only cuDNN knows: it counts as nothing. `Normalization.cpp`,
    `_select_batch_norm_backend`.
    """
    given = (weight, bias, mean, variance, training, momentum, eps, cudnn)
    if weight is None or bias is None or not _cudnn_norm_fits(x, weight, mean, variance, training):
        return aten.batch_norm(x, *given)  # type: ignore[no-any-return]
    channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    last = x.dim() in (4, 5) and x.is_contiguous(memory_format=channels_last)
    dense = x if last else x.contiguous()
    found: Tensor = aten.cudnn_batch_norm(dense, *given[:-1])[0]
    return found


def _cudnn_norm_fits(
    x: Tensor, weight: Tensor, mean: Tensor | None, variance: Tensor | None, training: bool
) -> bool:
    half = x.dtype == torch.float16
    return (
        torch.backends.cudnn.enabled
        and torch.bfloat16 not in (x.dtype, weight.dtype)
        and (not half or weight.dtype == torch.float32)
        and ((mean is None) == (variance is None))
        and (mean is not None or training)
        and x.dim() >= 3
        and x.shape[0] <= (CUDNN_SAMPLES if training else CUDNN_SAMPLES_EVAL)
        and 0 < x.numel() < CUDNN_NUMBERS
    )


def _group_norm(capability: Capability, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The input is made contiguous; the CPU keeps channels-last. `group_norm.cpp`."""
    return aten.group_norm(x.contiguous(), *args, **kwargs)  # type: ignore[no-any-return]


def _softmax(logarithm: bool) -> Callable[..., Tensor]:
    """From fp16 to fp32 in one kernel (`half_to_float`); the CPU converts first. `SoftMax.cpp`."""
    full = aten.log_softmax.int if logarithm else aten.softmax.int
    kernel = aten._log_softmax if logarithm else aten._softmax

    def call(
        capability: Capability, x: Tensor, dim: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        if x.dtype == torch.float16 and dtype == torch.float32:
            return kernel(x, dim, True)  # type: ignore[no-any-return]
        return full(x, dim, dtype)  # type: ignore[no-any-return]

    call.__doc__ = _softmax.__doc__
    return call


SUBSTITUTES: Mapping[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.dropout.default: _dropout,
    aten.batch_norm.default: _batch_norm,
    aten.group_norm.default: _group_norm,
    aten.rms_norm.default: fused_rms_norm,
    aten.softmax.int: _softmax(False),
    aten.log_softmax.int: _softmax(True),
}
"""Operator → function of the compute capability and the operator's arguments."""


def is_substituted(target: Any) -> bool:
    """Whether CUDA calls something else for an operator."""
    return target in SUBSTITUTES


def call_as_cuda(target: Any, args: Any, kwargs: Any, capability: Capability | None) -> Any:
    """Call an operator as a CUDA device would, on tensors without memory.

    Args:
        target: the operator.
        args, kwargs: its arguments.
        capability: the device's compute capability; None: the operator is called as it is.

    Returns:
        What CUDA's operator returns.
    """
    substitute = SUBSTITUTES.get(target)
    if substitute is None or capability is None:
        return target(*args, **kwargs)
    return substitute(capability, *args, **kwargs)


def _fp32_if_half(value: Tensor) -> Tensor:
    return value.float() if value.dtype.itemsize == 2 else value


def _empty(value: Tensor) -> Tensor:
    return value.new_empty(0)


CORRECTIONS: Mapping[Any, Mapping[int, Callable[[Tensor], Tensor]]] = {
    aten.native_layer_norm.default: dict.fromkeys((1, 2), _fp32_if_half),
    aten.native_batch_norm.default: dict.fromkeys((1, 2), _fp32_if_half),
    aten._native_batch_norm_legit_functional.default: dict.fromkeys((1, 2), _fp32_if_half),
    aten.cudnn_batch_norm.default: dict.fromkeys((1, 2), _fp32_if_half),
    aten.log_sigmoid_forward.default: {1: _empty},
}
"""Operator of a joint graph → by position, what CUDA returns in place of the CPU's result.

Means and deviations of fp16 and bf16 are fp32 on CUDA (`toAccumulateType` in `layer_norm_kernel.cu`
and `Normalization.cuh`), and of the input's dtype on the CPU. `log_sigmoid_forward` needs no buffer
there (`Activation.cpp`)."""


def correct_results(graph: fx.Graph, capability: Capability | None) -> None:
    """Replace the metadata of results that are of another type on CUDA.

    Args:
        graph: a joint graph; its metadata is changed.
        capability: of the CUDA device as for which it was traced; None: nothing is changed.
    """
    for node in graph.nodes if capability is not None else ():
        corrections = CORRECTIONS.get(node.target)
        if corrections is None:
            continue
        values = list(node.meta["val"])
        for position, correct in corrections.items():
            with values[position].fake_mode:
                values[position] = correct(values[position])
        node.meta["val"] = tuple(values)
        for user in node.users:
            if user.target.__name__ == "getitem" and user.args[1] in corrections:
                user.meta["val"] = values[user.args[1]]


RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def kept_from_cpu(targets: Iterable[Any]) -> list[str]:
    """Return the names of operators that CUDA runs by kernels that this table does not know.

    Args:
        targets: of a captured graph.
    """
    names = (getattr(getattr(t, "overloadpacket", None), "__name__", "") for t in targets)
    return sorted({n for n in names if n in RECURRENT})
