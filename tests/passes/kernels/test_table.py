"""What CUDA calls in place of the CPU's operators, and what its results are.

Covers kernels/table.py and kernels/rms_norm.py.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.passes.graph import static_fake_mode
from autopipe.passes.kernels import call_as_cuda, correct_results, kept_from_cpu
from autopipe.passes.kernels.table import SUBSTITUTES

aten = torch.ops.aten
H100 = (9, 0)


class Calls(TorchDispatchMode):
    """The names of the operators that are dispatched, without those that only allocate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not name.startswith(("prim.", "aten.empty")) and "detach" not in name:
            self.names.append(name.removeprefix("aten.").removesuffix(".default"))
        return func(*args, **kwargs or {})


def operators(target: Any, *args: Any, backward: bool = False, **kwargs: Any) -> list[str]:
    """What a CUDA device calls for an operator."""
    with Calls() as calls:
        result = call_as_cuda(target, args, kwargs, H100)
        if backward:
            torch.autograd.grad(result, args[0], torch.empty_like(result))
    return calls.names


def empty(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=grad)


def test_dropout_is_one_kernel_that_saves_booleans() -> None:
    with static_fake_mode():
        x = empty(4, 8)
        assert operators(aten.dropout.default, x, 0.1, True) == ["native_dropout"]
        assert operators(aten.dropout.default, x, 0.1, False) == []
        assert operators(aten.dropout.default, x, 0.0, True) == []
        output, mask = aten.native_dropout(x, 0.1, True)
        assert mask.dtype == torch.bool
        assert output.dtype == x.dtype


@pytest.mark.parametrize(
    ("dtype", "weights", "kernel"),
    [
        (torch.float32, torch.float32, "cudnn_batch_norm"),
        (torch.float16, torch.float32, "cudnn_batch_norm"),
        (torch.float16, torch.float16, "native_batch_norm"),
        (torch.bfloat16, torch.float32, "native_batch_norm"),
        (torch.bfloat16, torch.bfloat16, "native_batch_norm"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(dtype: torch.dtype, weights: torch.dtype, kernel: str, training: bool) -> None:
    with static_fake_mode():
        x, (w, b, m, v) = empty(4, 3, 5, 5, dtype=dtype), (empty(3, dtype=weights) for _ in "wbmv")
        rest = (m.detach(), v.detach(), training, 0.1, 1e-5, True)
        assert operators(aten.batch_norm.default, x, w, b, *rest) == [kernel]
        assert operators(aten.batch_norm.default, x, None, None, *rest) == ["native_batch_norm"]
        flat = empty(4, 3, dtype=dtype)
        assert operators(aten.batch_norm.default, flat, w, b, *rest) == ["native_batch_norm"]
        with torch.backends.cudnn.flags(enabled=False):
            assert operators(aten.batch_norm.default, x, w, b, *rest) == ["native_batch_norm"]


def test_batch_norm_keeps_channels_last_and_copies_other_layouts() -> None:
    with static_fake_mode():
        norm = [*(empty(3) for _ in "wb"), None, None, True, 0.1, 1e-5, True]
        last = empty(4, 3, 5, 6).to(memory_format=torch.channels_last)
        assert operators(aten.batch_norm.default, last, *norm) == ["cudnn_batch_norm"]
        found = call_as_cuda(aten.batch_norm.default, (last, *norm), {}, H100)
        assert found.is_contiguous(memory_format=torch.channels_last)
        strided = empty(4, 3, 5, 12)[..., ::2]
        names = operators(aten.batch_norm.default, strided, *norm)
        assert names == ["clone", "cudnn_batch_norm"]


def test_group_norm_makes_its_input_contiguous() -> None:
    with static_fake_mode():
        x = empty(2, 4, 3, 5).to(memory_format=torch.channels_last)
        found = call_as_cuda(aten.group_norm.default, (x, 2), {}, H100)
        assert found.is_contiguous()
        assert operators(aten.group_norm.default, x, 2) == ["clone", "native_group_norm"]
        assert operators(aten.group_norm.default, x.contiguous(), 2)[-1:] == ["native_group_norm"]


@pytest.mark.parametrize("target", [aten.softmax.int, aten.log_softmax.int])
def test_softmax_of_fp16_to_fp32_is_one_kernel(target: Any) -> None:
    name = f"_{target.overloadpacket.__name__}"
    with static_fake_mode():
        half, brain = (empty(4, 8, dtype=d) for d in (torch.float16, torch.bfloat16))
        assert operators(target, half, -1, torch.float32) == [name]
        assert operators(target, half, -1) == [name]
        assert operators(target, brain, -1, torch.float32) == ["_to_copy", name]
        found = call_as_cuda(target, (half, -1), {"dtype": torch.float32}, H100)
        assert found.dtype == torch.float32
        (gradient,) = torch.autograd.grad(found, half, torch.empty_like(found))
        assert gradient.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [True, False])
def test_rms_norm_is_one_kernel_each_way(dtype: torch.dtype, weight: bool) -> None:
    """It saves its input and one fp32 per row (and the weight)."""
    saved: dict[int, Tensor] = {}
    pack = saved.setdefault
    with static_fake_mode():
        x, w = empty(3, 4, 8, dtype=dtype), empty(8, dtype=dtype) if weight else None
        names = operators(aten.rms_norm.default, x, [8], w, backward=True)
        forward, backward = "autopipe.fused_rms_norm", "autopipe.fused_rms_norm_backward"
        assert [n for n in names if "norm" in n] == [forward, backward]
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: pack(t.untyped_storage()._cdata, t), lambda t: t
        )
        with hooks:
            y = call_as_cuda(aten.rms_norm.default, (x, [8], w), {}, H100)
        kept = sum(t.untyped_storage().nbytes() for t in saved.values())
        inputs = x.untyped_storage().nbytes() + (0 if w is None else w.untyped_storage().nbytes())
        assert kept == inputs + 3 * 4 * 4
        assert (y.shape, y.dtype) == (x.shape, dtype)
        leaves = [x] if w is None else [x, w]
        found = torch.autograd.grad(y, leaves, torch.empty_like(y))
        assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t in leaves]
        if w is not None:
            assert "autopipe" not in " ".join(
                operators(aten.rms_norm.default, x, [8], empty(8, dtype=torch.float64))
            )


def test_the_norm_of_plans_cannot_run() -> None:
    with pytest.raises(NotImplementedError, match="plans"):
        call_as_cuda(aten.rms_norm.default, (torch.randn(2, 8), [8]), {}, H100)


def test_means_of_half_precision_are_fp32() -> None:
    """As the kernels' documentation of results says, for layer norm and both batch norms."""
    with static_fake_mode():
        graph = fx.Graph()
        x = graph.placeholder("x")
        given = empty(4, 8, dtype=torch.bfloat16, grad=False)
        weight = empty(8, dtype=torch.bfloat16, grad=False)
        x.meta["val"] = given
        norm = graph.call_function(aten.native_layer_norm.default, (x, [8], None, None, 1e-5))
        norm.meta["val"] = aten.native_layer_norm(given, [8], weight, weight, 1e-5)
        parts = []
        for i in range(3):
            part = graph.call_function(getitem, (norm, i))
            part.meta["val"] = norm.meta["val"][i]
            parts.append(part)
        buffer = graph.call_function(aten.log_sigmoid_forward.default, (x,))
        buffer.meta["val"] = aten.log_sigmoid_forward(given)
        before = [p.meta["val"].dtype for p in parts]
    correct_results(graph, None)
    assert [p.meta["val"].dtype for p in parts] == before
    correct_results(graph, H100)
    assert before == [torch.bfloat16] * 3
    assert [p.meta["val"].dtype for p in parts] == [torch.bfloat16, torch.float32, torch.float32]
    assert parts[1].meta["val"] is norm.meta["val"][1]
    assert [x.shape for x in buffer.meta["val"]] == [(4, 8), (0,)]


def test_other_operators_are_called_as_they_are() -> None:
    with static_fake_mode():
        assert operators(aten.gelu.default, empty(4)) == ["gelu"]
        assert operators(aten.linear.default, empty(4, 8), empty(3, 8))[-1] == "mm"


def test_convolutions_keep_channels_last() -> None:
    with static_fake_mode():
        weight = empty(4, 3, 3, 3)
        last = torch.channels_last
        for x, w in ((empty(2, 3, 8, 8).to(memory_format=last), weight),
                     (empty(2, 3, 8, 8), weight.to(memory_format=last))):  # fmt: skip
            found = call_as_cuda(aten.conv2d.default, (x, w), {}, H100)
            assert found.is_contiguous(memory_format=last)


def test_recurrent_operators_are_named() -> None:
    lstm: list[Any] = [aten.lstm.input, aten.gelu.default, aten.gru.data, aten.lstm.data]
    assert kept_from_cpu(lstm) == ["gru", "lstm"]
    assert kept_from_cpu([aten.gelu.default, len]) == []
    assert not {aten.lstm.input, aten.gru.input} & set(SUBSTITUTES)


def test_the_names_are_torch_s() -> None:
    """What models call ends in the table's operators."""
    layer = nn.RMSNorm(8)
    program = torch.export.export(layer, (torch.randn(2, 8),))
    assert aten.rms_norm.default in SUBSTITUTES
    assert any(n.target is aten.rms_norm.default for n in program.graph.nodes)
