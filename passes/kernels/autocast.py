"""The operators that `torch.autocast("cuda")` casts, applied to fake CPU tensors.

The CPU's autocast casts other operators: softmax and layer norm, which CUDA computes in fp32, stay
in bf16. So a plan for CUDA made under ``torch.autocast("cpu", dtype)`` (or under "cuda", where
torch has CUDA) follows CUDA's lists.

Source: `aten/src/ATen/autocast_mode.h` (which the wheels contain; a test compares), the macros
`AT_FORALL_LOWER_PRECISION_FP`, `AT_FORALL_FP32`, `AT_FORALL_FP32_SET_OPT_DTYPE` and
`AT_FORALL_PROMOTE`. Operators that are composed of such are listed too (`COMPOSED`): autocast sees
their parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER = _names("""
    _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d
    conv_transpose3d convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot
    linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell
    _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    _scaled_dot_product_flash_attention scaled_dot_product_attention
""")
"""They compute in autocast's dtype."""

FP32 = _names("""
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow
    softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm
    cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
    multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
    binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
    _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
""")
"""They compute in fp32."""

FP32_RESULT = _names("""
    prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum
""")
"""They return fp32, unless the caller names a dtype: they read fp16 or bf16."""

PROMOTE = _names("""
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
""")
"""They compute in the widest dtype among their arguments."""

COMPOSED = frozenset(("cross_entropy_loss", "nll_loss_nd", "norm", "multilabel_soft_margin_loss"))
"""Their parts (log_softmax, nll_loss) compute in fp32, so their arguments are cast to it."""


def planned_autocast(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that is active for a plan's stage; None: there is none.

    Args:
        device: the device that the stage is traced on.
    """
    for kind in (device.type, "cuda"):
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return None


def cast_as_cuda(target: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Cast the arguments of an operator as CUDA's autocast does.

    Args:
        target: the operator.
        args, kwargs: its arguments.
        dtype: of autocast.

    Returns:
        args, kwargs.
    """
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    if name in LOWER:
        return _cast((args, kwargs), dtype)
    if name in FP32 or name in COMPOSED:
        return _cast((args, kwargs), torch.float32)
    if name in PROMOTE:
        found = [x.dtype for x in pytree.tree_leaves((args, kwargs)) if _is_cast(x)]
        wide = torch.float32 if torch.float32 in found else dtype
        return _cast((args, kwargs), wide) if found else (args, kwargs)
    if name in FP32_RESULT and args and _is_cast(args[0]):
        return _with_fp32_result(target, args, kwargs)
    return args, kwargs


def _cast(value: tuple[Any, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    args, kwargs = pytree.tree_map(lambda x: x.to(dtype) if _is_cast(x) else x, value)
    return args, kwargs


def _is_cast(value: Any) -> bool:
    """Floating-point tensors but those of fp64: `is_autocast_eligible`, `cached_cast`."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _with_fp32_result(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Name fp32 as the result's dtype, if the caller names none."""
    names = [a.name for a in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if "dtype" not in names or given.get("dtype") is not None:
        return args, kwargs
    positions = [a.name for a in target._schema.arguments if not a.kwarg_only]
    if "dtype" in positions and len(args) > positions.index("dtype"):
        place = positions.index("dtype")
        return (*args[:place], torch.float32, *args[place + 1 :]), kwargs
    return args, {**kwargs, "dtype": torch.float32}
