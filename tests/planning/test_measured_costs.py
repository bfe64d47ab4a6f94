"""Plans made with measured steps: times of ops add up to what stages took; cuts get better."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import OptionError, UnsupportedError
from autopipe.passes.cost import call_seconds
from autopipe.passes.devices import DEVICES
from autopipe.passes.ir import Annotated
from autopipe.passes.split import OpCosts, objective_of
from autopipe.planning.measured import Measured
from autopipe.planning.measured_costs import NAME, MeasuredCosts, check_model
from autopipe.planning.plans import Plan
from autopipe.runtime.backends.cpu import CpuBackend
from tests.support.measuring import made_measured
from tests.support.programs import policy

DEVICE = DEVICES["cpu-core"]
X = torch.randn(16, 8)


@torch.library.custom_op("autopipe_tests::slow", mutates_args=(), tags=(torch.Tag.pointwise,))
def slow(x: Tensor) -> Tensor:
    """The cost model takes it for one read and one write."""
    y = x
    for _ in range(10):
        y = y.exp().log()
    return y.clone()


slow.register_fake(torch.empty_like)
slow.register_autograd(lambda ctx, gradient: gradient)


class Deep(nn.Module):
    """Eight equal layers; those from `slow_from` on are followed by a slow op."""

    def __init__(self, slow_from: int = 8, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(8))
        self.slow_from = slow_from

    def forward(self, x: Tensor) -> Tensor:
        for at, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if at >= self.slow_from:
                x = torch.ops.autopipe_tests.slow(x)
        return x


def planned(**options: Any) -> tuple[Plan, Annotated, list[list[str]]]:
    """A plan in two stages, the graph that it is of, and the ops of its stages."""
    pipe = autopipe.compile(Deep(), ["cpu"] * 2, 4, args=(X,), **options)
    split = pipe._programs.last[0].split
    return pipe.plan, split.annotated, [[n.name for n in ops] for ops in split.ops]


def stage_seconds(
    costs: MeasuredCosts, ops: Sequence[str], remat: str, size: int
) -> tuple[float, float]:
    """Seconds of a stage's forward, and of the rest, by the times of its ops."""
    times = costs.seconds(size)
    objective = objective_of([DEVICE], size, times=times)
    table = OpCosts(costs.annotated, objective)
    whole = table.seconds(DEVICE, policy(remat))
    nodes = {node.name: node for node in table.ops}
    forward = sum(times[name].forward for name in ops)
    return forward, sum(whole[nodes[name]] for name in ops) - forward


@pytest.mark.parametrize("remat", ["full", "none"])
def test_ops_of_a_stage_add_up_to_what_was_measured(remat: str) -> None:
    plan, annotated, ops = planned(remat=remat)
    step = [{"F": 0.5, "RBW": 2.0}, {"F": 0.25, "RBW": 8.0}]
    costs = MeasuredCosts(made_measured(plan, [step], ops), annotated, DEVICE)
    for names, seconds in zip(ops, step, strict=True):
        found = stage_seconds(costs, names, remat, 4)
        assert found == pytest.approx((seconds["F"], seconds["RBW"]))


def test_within_a_stage_times_keep_their_proportions() -> None:
    plan, annotated, ops = planned()
    step = [{"F": 0.5, "RBW": 2.0}, {"F": 0.25, "RBW": 8.0}]
    costs = MeasuredCosts(made_measured(plan, [step], ops), annotated, DEVICE)
    for size in (4, 2):
        found = costs.seconds(size)
        for names in ops:
            before = [call_seconds(annotated.costs[n], DEVICE, size) for n in names]
            factors = [found[n].forward / t.forward for n, t in zip(names, before, strict=True)
                       if t.forward]  # fmt: skip
            assert factors == pytest.approx([factors[0]] * len(factors))


def test_a_backward_that_was_not_measured_has_the_factor_of_the_forward() -> None:
    plan, annotated, ops = planned(remat="none")
    both = made_measured(plan, [[{"F": 1.0, "RBW": 9.0}] * 2], ops)
    forwards = tuple(
        dataclasses.replace(
            line, spans=tuple(tuple(s for s in r if s.action.phase == "F") for r in line.spans)
        )
        for line in both.steps
    )
    alone = Measured()
    alone.complete(dataclasses.replace(both.found, steps=forwards), others=0, unfinished=0)
    times = MeasuredCosts(alone, annotated, DEVICE).seconds(4)
    for name in ops[0]:
        before = call_seconds(annotated.costs[name], DEVICE, 4)
        if before.forward and before.backward:
            ratio = times[name].forward / before.forward
            assert times[name].backward / before.backward == pytest.approx(ratio)


def test_two_profiles_tell_a_slow_op_from_its_neighbours() -> None:
    """First stages of ops a, b and c; then a alone, and b with c; all estimates are equal."""
    plan, annotated, ops = planned(remat="none")
    every = [name for names in ops for name in names]
    half, most = len(every) // 2, 3 * len(every) // 4
    first = made_measured(
        plan, [[{"F": 1.0, "RBW": 1.0}, {"F": 9.0, "RBW": 1.0}]], [every[:half], every[half:]]
    )
    second = made_measured(
        plan,
        [[{"F": 1.5, "RBW": 1.0}, {"F": 8.5, "RBW": 1.0}]],
        [every[:most], every[most:]],
        earlier=first,
    )
    costs = MeasuredCosts(second, annotated, DEVICE)
    assert costs.history == [first, second]
    times = costs.seconds(4)

    def forward(names: Sequence[str]) -> float:
        return sum(times[n].forward for n in names)

    # The newest agrees exactly, and with it the one before: the two do not contradict each other.
    assert forward(every[:most]) == pytest.approx(1.5)
    assert forward(every[most:]) == pytest.approx(8.5)
    assert forward(every[:half]) == pytest.approx(1.0, rel=1e-3)
    assert forward(every[half:most]) == pytest.approx(0.5, rel=1e-3)


def test_steps_of_another_graph_are_refused() -> None:
    plan, annotated, ops = planned()
    other = made_measured(plan, [[{"F": 1.0, "RBW": 1.0}] * 2], [ops[0], [*ops[1], "another"]])
    with pytest.raises(OptionError, match=r"1 ops that only one of them has, such as another"):
        check_model(other, annotated, [DEVICE])
    with pytest.raises(OptionError, match="measured with another graph"):
        autopipe.plan(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 2, 2, args=(X,), profile=other)
    right = made_measured(plan, [[{"F": 1.0, "RBW": 1.0}] * 2], ops)
    check_model(right, annotated, [DEVICE])
    with pytest.raises(UnsupportedError, match="one kind of device"):
        autopipe.plan(Deep(), 2, 4, args=(X,), profile=right, device=["h100", "l4"])


def test_the_same_cut_is_predicted_to_take_what_it_took() -> None:
    plan, _, ops = planned()
    step = [{"F": 0.5, "RBW": 2.0}, {"F": 0.5, "RBW": 2.0}]
    again = autopipe.plan(Deep(), 2, 4, args=(X,), profile=made_measured(plan, [step], ops))
    assert [s.first for s in again.stages] == [s.first for s in plan.stages]
    assert {s.speeds for s in again.stages} == {NAME}
    for stage in again.stages:
        t = stage.times[0]
        assert (t.forward, t.recompute + t.backward + t.weight) == pytest.approx((0.5, 2.0))


def test_the_second_plan_of_a_training_run_is_better_balanced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ops of the second half are far slower than the cost model believes.

    Times are those that a thread computes, so that other processes do not count.
    """
    monkeypatch.setattr(CpuBackend, "mark", lambda backend, stream: time.thread_time())
    torch.manual_seed(0)
    model, x = Deep(slow_from=4, width=64), torch.randn(1024, 64)
    bottlenecks, slow_layers = [], []
    measured: Measured | bool = False
    for _ in range(2):
        pipe = autopipe.compile(model, ["cpu"] * 2, 4, remat="none", profile=measured, args=(x,))
        pipe(x).sum().backward()
        with pipe.profile() as measured:
            for _ in range(3):
                pipe(x).sum().backward()
        bottlenecks.append(measured.bottleneck)
        slow_layers.append([sum("slow" in name for name in names) for names in measured.found.ops])
    assert slow_layers[0] == [0, 4]
    assert max(slow_layers[1]) < 4
    assert bottlenecks[1] < bottlenecks[0]
    assert measured.earlier is not None
