"""The benchmarks that compare steps: sharing of cores worked out by hand, and the smallest runs.

Covers benchmarks/shared_cores.py, losses.py, rounds.py, step_cases.py and dispatch.py. No time is
judged.
"""

from __future__ import annotations

import pytest
import torch

import autopipe
from autopipe.passes.schedule import KINDS, Action, schedule
from autopipe.passes.schedule.simulator import simulate_schedule
from benchmarks import dispatch
from benchmarks.four_on_two import BOUNDS, K
from benchmarks.losses import losses_of
from benchmarks.rounds import check_gradients, gradients
from benchmarks.shared_cores import shared_makespan
from benchmarks.step_cases import accumulation, tiny_case, transformer_case


def work(action: Action) -> float:
    """F = 1, B = 2, W = 1.5."""
    return sum({"F": 1.0, "B": 2.0, "W": 1.5, "R": 0.0}[letter] for letter in action.phase)


def unbounded(letter: str, to: int) -> int:
    return 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_core_for_each_device_is_the_usual_simulation(kind: str) -> None:
    scheduled = schedule(kind, 4, 8)
    usual = simulate_schedule(scheduled, forward=1.0, backward=2.0, weight=1.5).makespan
    assert shared_makespan(scheduled, work, unbounded, cores=4) == pytest.approx(usual)


@pytest.mark.parametrize("kind", KINDS)
def test_one_core_is_never_idle(kind: str) -> None:
    scheduled = schedule(kind, 4, 8)
    whole = sum(work(action) for row in scheduled.devices for action in row)
    assert shared_makespan(scheduled, work, unbounded, cores=1) == pytest.approx(whole)


def test_three_devices_share_two_cores() -> None:
    """F0.0 alone, F0.1 and F1.0 at once, then F1.1 and F2.0 at once, then F2.1 alone."""
    scheduled = schedule("gpipe", 3, 2, backward=False)
    assert shared_makespan(scheduled, lambda a: 1.0, unbounded) == 4.0
    four = schedule("gpipe", 3, 4, backward=False)
    # 0-1 F0.0; 1-2 F0.1 F1.0; 2-3.5 F0.2 F1.1 F2.0; 3.5-5 F0.3 F1.2 F2.1; 5-6 F1.3 F2.2; 6-7 F2.3
    assert shared_makespan(four, lambda a: 1.0, unbounded) == pytest.approx(7.0)


@pytest.mark.parametrize("kind", ["gpipe", "zb-h1"])
def test_losses_add_up(kind: str) -> None:
    """Whatever was measured, and on whichever device."""
    case = tiny_case(8)
    pipe = autopipe.compile(case.model, ["cpu"] * 2, 4, schedule=kind, remat="none")
    with pipe.profile() as measured:
        for _ in range(3):
            pipe(case.x, case.target).backward()
    found = losses_of(measured, 2.0)
    assert sum(found) == pytest.approx(2.0 - measured.simulated.makespan)
    assert found.outside == pytest.approx(
        2.0 - measured.step_seconds + measured.timeline.pause_length
    )
    assert found.between >= 0


def test_a_full_queue_stops_its_sender() -> None:
    """Stage 0 is fast: with one place it ends when stage 1 takes its third micro-batch."""
    scheduled = schedule("gpipe", 2, 4, backward=False)
    seconds = {0: 1.0, 1: 5.0}
    with_room = shared_makespan(scheduled, lambda a: seconds[a.stage], unbounded)
    assert with_room == shared_makespan(scheduled, lambda a: seconds[a.stage], lambda x, to: 1)
    with pytest.raises(ValueError, match="too small"):
        shared_makespan(scheduled, work, lambda letter, to: 0)


@pytest.mark.parametrize("kind", BOUNDS)
def test_published_bounds_hold_for_the_schedules(kind: str) -> None:
    for chunks in (8, 16):
        bounds = [BOUNDS[kind](k, chunks) for k in range(K)]
        scheduled = schedule(kind, K, chunks)
        for row, bound in zip(scheduled.devices, bounds, strict=True):
            until = "B" if kind in ("zb-h1", "zb-h2") else "W"
            now = most = 0
            for action in row:
                now += (action.phase == "F") - (until in action.phase)
                most = max(most, now)
            assert most <= bound


def test_a_chain_of_layers_has_the_gradients_of_its_model() -> None:
    case = transformer_case(layers=2, width=64, batch=4)
    case.model(case.x, case.target).backward()
    expected = gradients(case.layers.parameters())
    case.layers.zero_grad()
    case.loss(case.layers(case.x), case.target).backward()
    check_gradients("chain", gradients(case.layers.parameters()), expected)
    accumulation(case, 2)()
    check_gradients("micro-batches", gradients(case.layers.parameters()), expected)
    assert all(0 < split < len(case.layers) for split in case.splits())
    with pytest.raises(AssertionError, match=r"wrong: gradients are off by"):
        check_gradients("wrong", [torch.zeros_like(g) for g in expected], expected)


@pytest.mark.parametrize("kind", dispatch.OURS)
def test_dispatch_runs_so_many_actions(kind: str) -> None:
    timed, case = dispatch.ours(kind, 48)
    assert 40 <= timed.actions <= 56
    dispatch.check(kind, case, timed, lambda: gradients(case.layers.parameters()))
    expected = tiny_case(timed.chunks)
    assert torch.equal(case.x, expected.x)
