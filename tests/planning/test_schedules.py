"""`schedule="auto"`: which schedules are compared, and which one wins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import MemoryLimitError, PartitionError
from autopipe.passes.schedule import KINDS
from autopipe.planning.plans import Plan
from autopipe.planning.schedules import fastest, schedules_to_try
from tests.support.early_schedules import Layers, assert_same, batch, step
from tests.support.plans import made_plan


class Plain(nn.Module):
    """Equal layers, and no loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def test_every_kind_is_tried_and_the_open_number_of_stages() -> None:
    tried = [(o.name, o.virtual_stages) for o in schedules_to_try(2, early=True)]
    assert {name for name, _ in tried} == set(KINDS)
    assert [v for name, v in tried if name == "interleaved"] == [2, 3, 4]
    assert [o.name for o in schedules_to_try(2, early=False)] == ["gpipe"]


def test_the_fastest_wins_and_a_simpler_one_if_it_is_as_fast() -> None:
    seconds = {"gpipe": 1.0, "1f1b": 0.995, "zb-h1": 0.9, "zb-h2": 0.899}

    def plan(order) -> Plan:
        if order.name == "zb-v":
            raise MemoryLimitError("too large", missing_bytes=5)
        if order.name not in seconds:
            raise PartitionError("too few ops")
        return made_plan(2, gather=seconds[order.name] - made_plan(2).timeline.makespan)

    order, why = fastest(schedules_to_try(2, early=True), plan)
    assert order.name == "zb-h1"
    assert "predicted steps: zb-h2 900 ms, zb-h1 900 ms, 1f1b 990 ms, gpipe 1 s" in why
    assert "too large for the memory: zb-v" in why
    assert "too few ops for the stages of interleaved with 2 stages per device" in why


def test_nothing_fits() -> None:
    def plan(order) -> Plan:
        missing = {"gpipe": 9, "1f1b": 4}.get(order.name)
        if missing is None:
            raise PartitionError("too few ops")
        raise MemoryLimitError("too large", missing_bytes=missing)

    with pytest.raises(MemoryLimitError) as caught:
        fastest(schedules_to_try(2, early=True), plan)
    assert caught.value.missing_bytes == 4


def test_the_chosen_schedule_is_the_fastest_of_the_plans() -> None:
    options = {"devices": 3, "chunks": 6, "args": batch(12), "remat": "none"}
    chosen = autopipe.plan(Layers(12), **options, schedule="auto")
    assert "was chosen; predicted steps" in chosen.notes[-1]
    for order in schedules_to_try(3, early=True):
        v = order.virtual_stages if order.kind.any_virtual_stages else None
        other = autopipe.plan(Layers(12), **options, schedule=order.name, virtual_stages=v)
        assert chosen.step_seconds <= other.step_seconds
    assert chosen.step_seconds < autopipe.plan(Layers(12), **options).step_seconds


@pytest.mark.full
def test_it_runs_what_it_chose() -> None:
    pipe = autopipe.compile(Layers(12), devices=2, chunks=4, schedule="auto")
    pipe(*batch(8)).backward()
    plan = pipe.plan
    assert plan.schedule != "gpipe"
    assert pipe.scheduled.kind == plan.schedule
    assert len(pipe.memory.stages) == len(plan.stages)
    assert [s.peak for s in pipe.memory.stages] == [s.peak_saved_bytes for s in plan.stages]
    stages = len(plan.stages)
    expected = step(Layers(12), (batch(8), {}), devices=stages, chunks=4)
    found = step(Layers(12), (batch(8), {}), devices=2, chunks=4, schedule="auto")
    assert_same(found, expected)


@pytest.mark.full
def test_a_limit_leaves_the_schedules_that_keep_less() -> None:
    options = {"devices": 2, "chunks": 16, "args": batch(64), "remat": "none"}
    plans = [autopipe.plan(Layers(12), **options, schedule=s) for s in ("gpipe", "v-min")]
    most = [max(total.memory_bytes for total in plan.totals) for plan in plans]
    limit = sum(most) // 2
    chosen = autopipe.plan(Layers(12), **options, schedule="auto", memory=limit)
    assert all(t.memory_bytes <= limit for t in chosen.totals)
    assert "too large for the memory: gpipe" in chosen.notes[-1]


def test_without_a_loss_all_forwards_come_first() -> None:
    pipe = autopipe.compile(Plain(), devices=2, chunks=2, schedule="auto")
    x = torch.randn(4, 8)
    pipe(x).sum().backward()
    assert pipe.plan.schedule == "gpipe"
    assert "others need the loss" in pipe.plan.notes[-1]
    assert "returns no loss" in pipe.plan.notes[-1]


def test_a_loss_function_is_captured() -> None:
    pipe = autopipe.compile(Plain(), devices=2, chunks=4, schedule="auto", loss_fn=F.mse_loss)
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    loss = pipe.step(x, target=y)
    assert pipe.plan.schedule != "gpipe"
    model = Plain()
    expected = F.mse_loss(model(x), y)
    expected.backward()
    assert torch.allclose(loss, expected)
    for one, two in zip(pipe.parameters(), model.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.allclose(one.grad, two.grad)


class Squared(nn.Module):
    """A loss whose gradients depend on what all micro-batches compute, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return a.mean().square() + self.b(a).mean().square()


def test_a_loss_that_is_known_too_late_leaves_gpipe() -> None:
    pipe = autopipe.compile(Squared(), devices=2, chunks=2, schedule="auto")
    pipe(torch.randn(4, 4)).backward()
    assert pipe.plan.schedule == "gpipe"
    assert "depend on what all micro-batches compute" in pipe.plan.notes[-1]


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = Layers(8), (torch.empty(8, 6), torch.zeros(8, dtype=torch.long))
    plan = autopipe.plan(model, 2, 4, args=x, schedule="auto")
    assert plan.schedule != "gpipe"
