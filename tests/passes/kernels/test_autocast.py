"""The lists are those of the header that torch's wheel contains.

Covers kernels/autocast.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from autopipe.passes.graph import static_fake_mode
from autopipe.passes.kernels.autocast import (
    FP32,
    FP32_RESULT,
    LOWER,
    PROMOTE,
    cast_as_cuda,
    planned_autocast,
)

aten = torch.ops.aten
HEADER = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
BF16, FP16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.skipif(not HEADER.exists(), reason="this torch has no headers")
@pytest.mark.parametrize(
    ("macro", "names"),
    [
        ("AT_FORALL_LOWER_PRECISION_FP", LOWER),
        ("AT_FORALL_FP32", FP32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", FP32_RESULT),
        ("AT_FORALL_PROMOTE", PROMOTE),
    ],
)
def test_lists_are_those_of_the_header(macro: str, names: frozenset[str]) -> None:
    text = HEADER.read_text()
    body = re.search(rf"#define {macro}\(_\)(.*?[^\\])\n", text, re.S)
    assert body is not None
    assert set(re.findall(r"_\((\w+)", body[1])) - {"ADD_NS"} == names


def dtypes(target: Any, *given: torch.dtype, **kwargs: Any) -> Any:
    """The dtypes of the arguments, cast for autocast to bf16."""
    args, kwargs = cast_as_cuda(
        target, tuple(torch.empty(2, 2, dtype=d) for d in given), kwargs, BF16
    )
    return [x.dtype if isinstance(x, torch.Tensor) else x for x in args], kwargs


def test_casts() -> None:
    with static_fake_mode():
        assert dtypes(aten.linear.default, F32, F32)[0] == [BF16, BF16]
        assert dtypes(aten.mm.default, FP16, F32)[0] == [BF16, BF16]
        assert dtypes(aten.matmul.default, F64, F32)[0] == [F64, BF16]
        assert dtypes(aten.embedding.default, F32, torch.int64)[0] == [F32, torch.int64]
        assert dtypes(aten.layer_norm.default, BF16, BF16)[0] == [F32, F32]
        assert dtypes(aten.cross_entropy_loss.default, BF16, torch.int64)[0] == [F32, torch.int64]
        assert dtypes(aten.add.Tensor, BF16, F32)[0] == [BF16, F32]
        assert dtypes(aten.dot.default, BF16, F32)[0] == [F32, F32]
        assert dtypes(aten.dot.default, BF16, BF16)[0] == [BF16, BF16]
        weights = [torch.empty(2, 2), torch.empty(2, 2)]
        args, _ = cast_as_cuda(aten.einsum.default, ("ab,bc->ac", weights), {}, BF16)
        assert [x.dtype for x in args[1]] == [BF16, BF16]


def test_results_in_fp32() -> None:
    with static_fake_mode():
        x = torch.empty(2, 2, dtype=BF16)
        assert cast_as_cuda(aten.softmax.int, (x, -1), {}, BF16)[1] == {"dtype": F32}
        assert cast_as_cuda(aten.softmax.int, (x, -1, BF16), {}, BF16) == ((x, -1, BF16), {})
        assert cast_as_cuda(aten.softmax.int, (x, -1, None), {}, BF16)[0] == (x, -1, F32)
        assert cast_as_cuda(aten.sum.default, (x,), {}, BF16)[1] == {"dtype": F32}
        whole = torch.empty(2, dtype=torch.int64)
        assert cast_as_cuda(aten.sum.default, (whole,), {}, BF16)[1] == {}
        assert cast_as_cuda(aten.sum.dim_IntList, (x, [0]), {"dtype": BF16}, BF16)[1] == {
            "dtype": BF16
        }


def test_a_plan_s_autocast_is_that_of_the_device_that_traces() -> None:
    cpu = torch.device("cpu")
    assert planned_autocast(cpu) is None
    with torch.autocast("cpu", torch.float16):
        assert planned_autocast(cpu) == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert planned_autocast(cpu) is None
