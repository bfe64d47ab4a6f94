"""The modes around a call: what is refused, what is switched off for tracing, what is restored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from autopipe.call_guards import (
    autocast_state,
    plain_autograd,
    refuse_transforms,
    restore_autocast,
)
from autopipe.errors import UnsupportedError

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
