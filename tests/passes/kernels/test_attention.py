"""Which attention kernel a CUDA device takes, and what it saves: by torch's rules, written out.

Covers kernels/attention.py. The truth is torch's source (`sdp_utils.cpp`), read case by case.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopipe.passes.graph import static_fake_mode
from autopipe.passes.kernels.attention import Attention, Capability, attention, attention_kernel

H100, A100, L4, V100 = (9, 0), (8, 0), (8, 9), (7, 0)
BF16, FP32 = torch.bfloat16, torch.float32


def call(
    heads: int = 4,
    length: int = 40,
    head: int = 64,
    *,
    dtype: torch.dtype = BF16,
    keys: int | None = None,
    key_heads: int | None = None,
    mask: Any = None,
    **more: Any,
) -> Attention:
    keys, key_heads = keys or length, key_heads or heads
    query = torch.empty(2, heads, length, head, dtype=dtype, requires_grad=True)
    key, value = (torch.empty(2, key_heads, keys, head, dtype=dtype) for _ in "kv")
    if mask is not None:
        mask = torch.empty(*mask, dtype=torch.bool)
    return Attention(query, key, value, mask, **more)


@pytest.mark.parametrize(
    ("device", "options", "kernel"),
    [
        (H100, {}, "cudnn"),
        (A100, {}, "flash"),
        (L4, {}, "flash"),
        (V100, {}, "math"),
        (H100, {"dtype": FP32}, "efficient"),
        (A100, {"dtype": FP32}, "efficient"),
        (H100, {"dtype": torch.float64}, "math"),
        # dropout: cuDNN takes sixteenths
        (H100, {"dropout_p": 0.1}, "flash"),
        (H100, {"dropout_p": 0.125}, "cudnn"),
        (A100, {"dropout_p": 0.1}, "flash"),
        # masks: flash takes none
        (H100, {"mask": (40, 40)}, "cudnn"),
        (H100, {"mask": (2, 1, 40, 40)}, "cudnn"),
        (H100, {"mask": (2, 1, 40, 40), "dropout_p": 0.1}, "efficient"),
        (A100, {"mask": (40, 40)}, "efficient"),
        (H100, {"mask": (1, 40, 40)}, "efficient"),
        # heads: cuDNN to 128 in eights, flash to 256, efficient in eights or fours
        (H100, {"head": 256}, "flash"),
        (H100, {"head": 72}, "cudnn"),
        (H100, {"head": 36}, "flash"),
        (H100, {"head": 264}, "efficient"),
        (A100, {"head": 36, "mask": (40, 40)}, "math"),
        (A100, {"head": 36, "dtype": FP32}, "efficient"),
        (A100, {"head": 34, "dtype": FP32}, "math"),
        (L4, {"head": 200}, "efficient"),
        (L4, {"head": 232}, "flash"),
        (L4, {"head": 232, "dropout_p": 0.1}, "efficient"),
        (A100, {"head": 200}, "flash"),
        # lengths
        (A100, {"keys": 24, "is_causal": True}, "efficient"),
        (H100, {"keys": 1}, "flash"),
        # grouped queries
        (H100, {"key_heads": 2, "enable_gqa": True}, "cudnn"),
        (A100, {"key_heads": 2, "enable_gqa": True}, "flash"),
        (A100, {"key_heads": 2}, "math"),
    ],
)
def test_the_kernel_that_torch_takes(
    device: Capability, options: dict[str, Any], kernel: str
) -> None:
    with static_fake_mode():
        assert attention_kernel(call(**options), device) == kernel


def test_grouped_queries_in_fp32() -> None:
    """The documentation of torch below 2.14 names flash attention and the plain kernels only."""
    with static_fake_mode():
        found = attention_kernel(call(key_heads=2, enable_gqa=True, dtype=FP32), H100)
    assert found == ("efficient" if torch.__version__ >= "2.14" else "math")


def test_other_layouts_go_to_the_plain_kernels() -> None:
    with static_fake_mode():
        three = Attention(*(torch.empty(2, 40, 64, dtype=BF16) for _ in "qkv"))
        flipped = Attention(*(torch.empty(2, 4, 64, 40, dtype=BF16).mT for _ in "qkv"))
        mixed = Attention(*(torch.empty(2, 4, 40, 64, dtype=d) for d in (BF16, BF16, FP32)))
        assert [attention_kernel(x, H100) for x in (three, flipped, mixed)] == ["math"] * 3


def test_switches() -> None:
    with static_fake_mode():
        given = call()
        for backend, kernel in [
            (SDPBackend.MATH, "math"),
            (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
            (SDPBackend.FLASH_ATTENTION, "flash"),
        ]:
            with sdpa_kernel(backend):
                assert attention_kernel(given, H100) == kernel
        torch.use_deterministic_algorithms(True)
        try:
            assert attention_kernel(given, H100) == "flash"
        finally:
            torch.use_deterministic_algorithms(False)


def saved_by(given: Attention, device: Capability) -> tuple[Tensor, dict[int, Tensor]]:
    """The result, and each memory that autograd saves beside q, k and v."""
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x.detach()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = attention(device, *given)
    for x in (*given[:3], result):
        saved.pop(x.untyped_storage()._cdata, None)
    return result, saved


@pytest.mark.parametrize(
    ("device", "options", "nbytes"),
    [
        # fp32 log-sum-exp of 2 samples, 4 heads, 40 queries; seed and offset
        (H100, {}, 2 * 4 * 40 * 4 + 16),
        (A100, {}, 2 * 4 * 40 * 4 + 24),
        (A100, {"dropout_p": 0.1}, 2 * 4 * 40 * 4 + 24),
        (A100, {"key_heads": 2, "enable_gqa": True}, 2 * 4 * 40 * 4 + 24),
        # memory-efficient: 40 queries count as 64
        (A100, {"dtype": FP32}, 2 * 4 * 64 * 4 + 16),
        (A100, {"dtype": FP32, "dropout_p": 0.1}, 2 * 4 * 64 * 4 + 16),
        # a boolean mask becomes numbers of the query's dtype, one sample's for all
        (A100, {"mask": (40, 40)}, 2 * 4 * 64 * 4 + 16 + 40 * 40 * 2),
        (H100, {"mask": (40, 40)}, 2 * 4 * 40 * 4 + 16 + 40 * 40 * 2),
        # rows that are not aligned are padded to the next multiple of 8
        (A100, {"length": 37, "mask": (37, 37)}, 2 * 4 * 64 * 4 + 16 + 37 * 40 * 2),
    ],
)
def test_what_a_kernel_saves(device: Capability, options: dict[str, Any], nbytes: int) -> None:
    with static_fake_mode():
        result, saved = saved_by(call(**options), device)
        assert sum(x.untyped_storage().nbytes() for x in saved.values()) == nbytes
        assert result.shape == (2, 4, options.get("length", 40), 64)


def test_without_gradients_no_sum_is_computed() -> None:
    with static_fake_mode(), torch.no_grad():
        given = call(dtype=FP32)
        assert not given.needs_grad
        _, saved = saved_by(given, A100)
    assert not saved


def test_heads_are_padded_for_flash_attention() -> None:
    """36 → 40: three copies that are saved, and the result's; the scale is that of 36."""
    with static_fake_mode():
        given = call(head=36)
        result, saved = saved_by(given, A100)
        padded = 2 * 4 * 40 * 40 * 2
        assert sum(x.untyped_storage().nbytes() for x in saved.values()) == 3 * padded + 1280 + 24
        assert result.untyped_storage().nbytes() == padded
        assert result.shape == given.query.shape
    assert given.scaling == 1 / 6
    assert given._replace(scale=0.5).scaling == 0.5


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"key_heads": 2, "enable_gqa": True}])
def test_plain_kernels_with_dropout_are_those_of_torch(options: dict[str, Any]) -> None:
    """On real numbers, with a dropout that drops nothing: torch's own result."""
    torch.manual_seed(0)
    given = call(head=34, dtype=FP32, **options)
    given = given._replace(
        **{n: torch.randn_like(getattr(given, n)) for n in ("query", "key", "value")}
    )
    drops = given._replace(dropout_p=1e-12)
    assert attention_kernel(given, A100) == attention_kernel(drops, A100) == "math"
    torch.testing.assert_close(attention(A100, *drops), attention(A100, *given))
    truth = torch.nn.functional.scaled_dot_product_attention(
        *given[:3], is_causal=given.is_causal, enable_gqa=given.enable_gqa
    )
    torch.testing.assert_close(attention(A100, *given), truth)
    assert math.isclose(given.scaling, 34**-0.5)
