"""Which attention kernel torch takes on a CUDA device, and how it calls it.

Source: torch 2.11 to 2.13, in `aten/src/ATen/native/transformers/`: `cuda/sdp_utils.cpp` (which
kernel) and `attention.cpp` (masks, padding). Its functions are named below. On GPUs of compute
capability 9 and 10 (H100, H200, B200) the order is cuDNN, flash, memory-efficient, plain kernels
("math"), if cuDNN's version is above 9.15 (`check_prefer_cudnn_attention`), as it is in the wheels
of these torch versions (2.11: 9.19); elsewhere flash, memory-efficient, plain.

What the kernels save beside q, k, v and the result, for B samples, H heads, L queries:

    cuDNN, flash      log-sum-exp, fp32 (B, H, L), and the Philox seed and offset
    memory-efficient  log-sum-exp, fp32 (B, H, L rounded up to a multiple of 32), seed and offset
    plain             the probabilities (B, H, L, S), and with dropout its mask

The switches of `torch.backends.cuda` and `torch.nn.attention.sdpa_kernel` are respected.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
cuda_switches: Any = torch.backends.cuda

Capability: TypeAlias = tuple[int, int]
"""A GPU's compute capability, major and minor: (9, 0) for an H100."""

HALF = (torch.float16, torch.bfloat16)

CUDNN_HEAD = 128
"""The largest head that cuDNN takes: `check_cudnn_tensor_shapes`; with cuDNN 9.22 it is 256."""

FLASH_HEAD = 256
"""The largest head that flash attention takes: `check_head_dim_size_flash`."""


class Attention(NamedTuple):
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def needs_grad(self) -> bool:
        """Whether the backward will want the log-sum-exp: `should_compute_logsumexp`."""
        inputs = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    @property
    def scaling(self) -> float:
        """The factor of the scores; that of the head before it is padded."""
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale


def attention(capability: Capability, *args: Any, **kwargs: Any) -> Tensor:
    """The first of these that takes the call: cuDNN's (on H100, H200; fp16 and bf16), flash (fp16
    and bf16, no mask), memory-efficient (also fp32, and masks), plain kernels.
    `cuda/sdp_utils.cpp`.

    Args:
        capability: of the device.
        args, kwargs: of the operator.
    """
    given = Attention(*args, **kwargs)
    return CALLS[attention_kernel(given, capability)](given)


def attention_kernel(given: Attention, capability: Capability) -> str:
    """Choose the kernel: "cudnn", "flash", "efficient" or "math".

    Args:
        given: the call.
        capability: of the device.
    """
    first = ["cudnn"] if capability[0] in (9, 10) else []
    order = [*first, "flash", "efficient"]
    fused = _same_rank(given) and capability >= (8, 0)
    return next((kind for kind in order if fused and FITS[kind](given, capability)), "math")


def _same_rank(given: Attention) -> bool:
    """`check_tensor_shapes`; one batch size, no empty sequence, one dtype, dense last dims."""
    q, k, v, mask = given[:4]
    return (
        q.dim() == k.dim() == v.dim() == 4
        and q.shape[0] == k.shape[0] == v.shape[0]
        and q.shape[2] > 0
        and k.shape[2] > 0
        and q.dtype == k.dtype == v.dtype
        and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k, v))
        and (mask is None or mask.stride(-1) == 1)
    )


def _heads_fit(given: Attention, *, grouped: bool) -> bool:
    """`check_batch_size_and_num_heads_dense`."""
    q, k, v = (x.shape[1] for x in given[:3])
    if given.enable_gqa and grouped:
        return bool(k == v and q % k == 0)
    return bool(q == k == v)


def _cudnn_fits(given: Attention, capability: Capability) -> bool:
    """`can_use_cudnn_attention`. (Its rule that dropout is a multiple of 1/16 came after 2.11; an
    older torch takes cuDNN for others too, which saves 8 bytes less.)"""
    q, k, v, mask = given[:4]
    head, value_head = q.shape[-1], v.shape[-1]
    small = head <= CUDNN_HEAD and value_head <= CUDNN_HEAD
    wide = capability[0] in (9, 10) and (head, value_head) == (192, 128)
    return (
        cuda_switches.cudnn_sdp_enabled()
        and q.dtype in HALF
        and not torch.are_deterministic_algorithms_enabled()
        and (mask is None or _mask_fits(given))
        and (given.dropout_p * 16).is_integer()
        and (small or wide)
        and head % 8 == 0
        and value_head % 8 == 0
        and k.shape[2] != 1
        and (given.dropout_p == 0 or q.shape[2] != 1)
        and _heads_fit(given, grouped=True)
    )


def _mask_fits(given: Attention) -> bool:
    """`check_attn_mask_shape`."""
    mask = given.attn_mask
    assert mask is not None
    batch, heads, length, _ = given.query.shape
    wanted = (batch, heads, length, given.key.shape[2])
    shape = tuple(mask.shape)
    fits = all(n in (1, w) for n, w in zip(reversed(shape), reversed(wanted), strict=False))
    return not mask.requires_grad and mask.dim() in (2, 4) and fits


def _flash_fits(given: Attention, capability: Capability) -> bool:
    """`can_use_flash_attention`."""
    q, k, v = given[:3]
    head = q.shape[-1]
    narrow = capability in ((8, 6), (8, 9), (12, 0), (12, 1)) and given.needs_grad
    return (
        cuda_switches.flash_sdp_enabled()
        and given.attn_mask is None
        and q.dtype in HALF
        and head == k.shape[-1] == v.shape[-1] <= FLASH_HEAD
        and (not narrow or head <= 192 or (given.dropout_p == 0 and head > 224))
        and (not given.is_causal or q.shape[2] == k.shape[2])
        and _heads_fit(given, grouped=True)
    )


def _efficient_fits(given: Attention, capability: Capability) -> bool:
    """`can_use_mem_efficient_attention`; heads are multiples of `minimum_gemm_alignment`. Grouped
    queries since torch 2.14 (before, its documentation names flash and the plain kernels only)."""
    q, k, v = given[:3]
    alignment = 8 if q.dtype in HALF else 4
    return (
        cuda_switches.mem_efficient_sdp_enabled()
        and q.dtype in (*HALF, torch.float32)
        and q.shape[-1] == k.shape[-1]
        and q.shape[-1] % alignment == 0
        and v.shape[-1] % alignment == 0
        and all(x.stride(-1) == 1 for x in (q, k, v))
        and _heads_fit(given, grouped=torch.__version__ >= "2.14")
    )


FITS = {"cudnn": _cudnn_fits, "flash": _flash_fits, "efficient": _efficient_fits}


def _additive(given: Attention, excluded: float) -> Tensor | None:
    """The mask as numbers to add to the scores: `convert_boolean_attn_mask`."""
    mask = given.attn_mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=given.query.dtype, device=mask.device)
    return torch.where(mask.logical_not(), excluded, zero)


def _cudnn(given: Attention) -> Tensor:
    """cuDNN's kernel cannot add -inf: `convert_boolean_attn_mask_cudnn`."""
    q, k, v, _, dropout, causal, scale, _ = given
    mask = _additive(given, -65504.0)
    found: Tensor = aten._scaled_dot_product_cudnn_attention(
        q, k, v, mask, given.needs_grad, dropout, causal, False, scale=scale
    )[0]
    return found


def _flash(given: Attention) -> Tensor:
    """Heads are padded to a multiple of 8: `pad_last_dim<8>`, `post_process_flash_output`."""
    head = given.query.shape[-1]
    padded = [F.pad(x, (0, -head % 8)) if head % 8 else x for x in given[:3]]
    found: Tensor = aten._scaled_dot_product_flash_attention(
        *padded, given.dropout_p, given.is_causal, False, scale=given.scaling
    )[0]
    return found[..., :head] if head % 8 else found


def _efficient(given: Attention) -> Tensor:
    """A mask whose rows are not aligned is padded to a multiple of 8, then sliced, so that it stays
    in that memory: `preprocess_mask`, `pad_bias<8>`."""
    q, k, v, _, dropout, causal, scale, _ = given
    mask = _additive(given, -math.inf)
    if mask is not None:
        length = mask.shape[-1]
        if any(n % 8 for n in mask.stride()[:-1]):
            mask = F.pad(mask, (0, 8 - length % 8))[..., :length]
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    found: Tensor = aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, given.needs_grad, dropout, causal, scale=scale
    )[0]
    return found


def _math(given: Attention) -> Tensor:
    """The plain kernels: torch's own; with dropout, which they call by device, their steps
    (`_scaled_dot_product_attention_math`)."""
    q, k, v, mask, dropout, causal, scale, grouped = given
    plain = aten._scaled_dot_product_attention_math
    if dropout == 0:
        found: Tensor = plain(q, k, v, _additive(given, -math.inf), 0.0, causal, None,
                              scale=scale, enable_gqa=grouped)[0]  # fmt: skip
        return found
    dtype, root = q.dtype, math.sqrt(abs(given.scaling))
    if dtype in HALF and not cuda_switches.fp16_bf16_reduction_math_sdp_allowed():
        q, k, v = (x.float() for x in (q, k, v))
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    bias = _additive(Attention(q, k, v, mask), -math.inf)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = torch.matmul(q * root, k.transpose(-2, -1) * root)
    scores = scores if bias is None else scores + bias
    kept = aten.native_dropout(aten._safe_softmax(scores, -1), dropout, True)[0]
    return torch.matmul(kept, v).to(dtype)


CALLS = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "math": _math}
