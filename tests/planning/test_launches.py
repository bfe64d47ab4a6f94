"""A plan knows when the process that issues operators is slower than the devices that run them.

Covers planning/stage_timers.py. The truth: calls counted while plain autograd runs the model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autopipe
from autopipe.passes.devices import CALL, H100
from autopipe.planning.plans import Plan
from autopipe.planning.stage_timers import modeled_timers
from autopipe.report.page_data import with_chunks

SLOW = replace(H100, name="slow", half_flops=1e9, fp32_flops=1e9, gbytes_per_second=1)


class Calls(TorchDispatchMode):
    """Counts operators, without `detach`, which only autograd needs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is not torch.ops.aten.detach.default
        return func(*args, **kwargs or {})


def layers(count: int = 6, width: int = 8) -> nn.Sequential:
    pairs = ((nn.Linear(width, width), nn.Tanh()) for _ in range(count))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def plan(device: Any, devices: int = 2, chunks: int = 4, width: int = 8, **more: Any) -> Plan:
    x = torch.zeros(8, width)
    model = layers(width=width)
    return autopipe.plan(model, devices, chunks, device=device, remat="none", args=(x,), **more)


def counted(model: nn.Module, x: Tensor) -> int:
    """Calls of a forward and backward, and one for each sum of gradients."""
    y = model(x)
    with Calls() as calls:
        y = model(x)
        torch.autograd.grad(y, list(model.parameters()), torch.ones_like(y))
    return calls.count - 1 + len(list(model.parameters()))  # without ones_like


def test_all_devices_share_the_calls_of_one_process() -> None:
    calls = counted(layers(), torch.zeros(2, 8))
    for devices in (1, 2, 3):
        found = plan("h100", devices)
        assert found.issue_seconds == pytest.approx(4 * calls * CALL)


def test_a_step_takes_as_long_as_the_slower_of_both() -> None:
    bound = plan("h100", 3)
    assert bound.launch_bound
    assert bound.step_seconds == bound.issue_seconds + bound.gather_seconds
    assert any("bound by launches" in advice for advice in bound.advice)
    assert "bound by launches" in str(bound)
    free = plan(SLOW, width=512)
    assert not free.launch_bound
    assert free.step_seconds == free.timeline.makespan + free.gather_seconds
    assert not any("launches" in advice for advice in free.advice)
    assert "issuing the step's operator calls takes the process" in str(free)


def test_larger_micro_batches_help() -> None:
    many, few = plan("h100", chunks=8), plan("h100", chunks=2)
    assert many.issue_seconds == pytest.approx(4 * few.issue_seconds)
    assert with_chunks(many, 2).issue_seconds == pytest.approx(few.issue_seconds)
    assert len(plan("h100", chunks=None).sizes) == 1


def test_where_nothing_is_known_of_calls() -> None:
    """A CPU's operators run where they are called; compiled phases have fewer calls."""
    here = plan(None)
    assert here.issue_seconds == 0
    assert "issuing" not in str(here)
    eager, compiled = (modeled_timers([H100], b)[0] for b in ("eager", "inductor"))
    assert (eager.call_seconds, compiled.call_seconds) == (CALL, 0.0)


def test_recomputed_calls_count() -> None:
    x = torch.zeros(8, 8)
    none, full = (
        autopipe.plan(layers(), 1, 4, device="h100", remat=remat, args=(x,))
        for remat in ("none", "full")
    )
    assert full.issue_seconds > none.issue_seconds


def test_saved_with_the_plan(tmp_path: Path) -> None:
    made = plan("h100")
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").issue_seconds == made.issue_seconds
