"""The modes around a call: what is refused, what is switched off for tracing, what is restored."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import autopipe
from autopipe.call_guards import (
    autocast_state,
    plain_autograd,
    refuse_transforms,
    restore_autocast,
)
from autopipe.errors import InputError, UnsupportedError

X = torch.ones(3)


def test_transforms_are_refused() -> None:
    def refused(x: Tensor) -> Tensor:
        with pytest.raises(UnsupportedError, match="a function transform"):
            refuse_transforms([1, x])
        return x.sum()

    torch.func.vmap(refused)(torch.ones(2, 3))
    torch.func.grad(refused)(X)
    refuse_transforms([X, 1, "text"])


def test_forward_mode_is_refused() -> None:
    with forward_ad.dual_level():
        refuse_transforms([X])  # a tensor without a tangent
        with pytest.raises(UnsupportedError, match="forward-mode"):
            refuse_transforms([forward_ad.make_dual(X, X)])


def test_hooks_and_anomaly_detection_are_off_while_tracing() -> None:
    seen: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x)
    x = X.clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True), hooks:
        with plain_autograd():
            assert not torch.is_anomaly_enabled()
            x.exp()
        assert seen == []
        assert torch.is_anomaly_enabled()
        x.exp()
    assert len(seen) == 1


def test_autocast_is_restored() -> None:
    outside = autocast_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = autocast_state()
        with restore_autocast(outside):
            assert not torch.is_autocast_enabled("cpu")
        assert autocast_state() == inside
    assert autocast_state() == outside != inside
    with restore_autocast(inside):
        assert autocast_state() == inside
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype is torch.bfloat16
    assert autocast_state() == outside


class Doubling(TorchDispatchMode):
    """A mode that changes what operators compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.addmm.default else result


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def test_a_mode_around_a_capture_changes_nothing_in_it() -> None:
    pipe, x = autopipe.compile(layers(), ["cpu", "cpu"], 2), torch.randn(4, 4)
    with Doubling():
        pipe.capture(x)
    torch.testing.assert_close(pipe(x), pipe.model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_need_not_see_the_operators(reentrant: bool) -> None:
    pipe, x = autopipe.compile(layers(), ["cpu", "cpu"], 2), torch.randn(4, 4, requires_grad=True)
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    options: Any = {} if reentrant else {"context_fn": context}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint(pipe, x, use_reentrant=reentrant, **options).sum().backward()
    (expected,) = torch.autograd.grad(pipe.model(x).sum(), x)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "record",
    [
        lambda pipe, x: torch.export.export(pipe, (x,)),
        lambda pipe, x: make_fx(pipe)(x),
        torch.jit.trace,
    ],
)
def test_tracers_are_refused(record: Any) -> None:
    pipe, x = autopipe.compile(layers(), ["cpu", "cpu"], 2), torch.randn(4, 4)
    pipe.capture(x)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"pipe\.model"):
            record(pipe, x)
        pipe(x)


def test_an_input_without_values() -> None:
    pipe, x = autopipe.compile(layers(), ["cpu", "cpu"], 2), torch.randn(4, 4)
    with pytest.raises(InputError, match="meta device"):
        pipe(x.to("meta"))
    pipe.capture(x.to("meta"))
    assert pipe(x).shape == (4, 4)
