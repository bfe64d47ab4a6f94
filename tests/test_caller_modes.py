"""Modes around a call see what the stages run, in whatever thread, as in eager torch.

Covers passes/_torch_modes.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import autopipe
from autopipe.errors import StageError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


class Doubles(TorchDispatchMode):
    """Doubles the results of tanh, and counts them."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.tanh.default:
            self.count += 1
            return result * 2
        return result


class Fails(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.tanh.default:
            raise ArithmeticError("no tanh")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_operations_are_counted(devices: int, first: bool) -> None:
    net, x = model(), torch.randn(6, 4)
    pipe = autopipe.compile(net, devices=devices, chunks=3, remat="none")
    if not first:
        pipe(x).sum().backward()
    with FlopCounterMode(display=False) as found:
        pipe(x).sum().backward()
    with FlopCounterMode(display=False) as wanted:
        net(x).sum().backward()
    assert found.get_total_flops() == wanted.get_total_flops() > 0


def test_operations_that_run_again_are_counted_again() -> None:
    net, x = model(), torch.randn(6, 4)
    pipe = autopipe.compile(net, devices=2, chunks=3, remat="full")
    pipe(x).sum().backward()
    with FlopCounterMode(display=False) as found:
        pipe(x).sum().backward()
    with FlopCounterMode(display=False) as wanted:
        net(x).sum().backward()
    assert found.get_total_flops() > wanted.get_total_flops()


def test_a_mode_is_no_reason_for_a_capture() -> None:
    net, x = model(), torch.randn(6, 4)
    pipe = autopipe.compile(net, devices=2, chunks=3, args=(x,))
    first = pipe.captured
    with FlopCounterMode(display=False):
        pipe(x).sum().backward()
    assert pipe.captured is first


@pytest.mark.parametrize("devices", [1, 2])
def test_a_mode_may_change_results(devices: int) -> None:
    net, x = model(), torch.randn(6, 4)
    pipe = autopipe.compile(net, devices=devices, chunks=3)
    plain = pipe(x)
    with Doubles() as mode:
        found = pipe(x)
        assert mode.count == 2 * 3
        wanted = net(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(pipe(x), plain)


@pytest.mark.parametrize("devices", [1, 2])
def test_an_error_of_a_mode_is_a_stages(devices: int) -> None:
    net, x = model(), torch.randn(6, 4)
    pipe = autopipe.compile(net, devices=devices, chunks=3)
    plain = pipe(x)
    with Fails(), pytest.raises(StageError, match="no tanh"):
        pipe(x)
    torch.testing.assert_close(pipe(x), plain)


def test_within_a_selective_checkpoint() -> None:
    """Its modes take values by the order of the ops, which workers do not keep."""
    net, x = model(), torch.randn(6, 4)
    pipe = autopipe.compile(net, devices=2, chunks=3)
    pipe(x).sum().backward()
    wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(
            lambda context, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE
        )

    y: Tensor = checkpoint(pipe, x, use_reentrant=False, context_fn=contexts)
    y.sum().backward()
    found = [p.grad for p in net.parameters()]
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
