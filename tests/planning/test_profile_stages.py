"""Stages timed on the real device: what is measured, and that a plan made of it holds together."""

from __future__ import annotations

import mmap
import os
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.passes.cost.phase_time import PhaseSeconds
from autopipe.passes.devices import CPU_CORE
from autopipe.planning import profile_calls as measure_calls
from autopipe.planning import profile_stages as measure
from autopipe.planning.profile_stages import measured_timers
from autopipe.runtime.backends import BACKENDS
from autopipe.runtime.backends.cpu import CpuBackend
from tests.support.models import gpt2
from tests.support.programs import CPU, phased_of, split_of

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls take is remembered on disk: not on the user's."""
    monkeypatch.setenv("HOME", str(tmp_path))


class Sized(nn.Module):
    """Two layers of which the second makes many times the work of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(64, 64), nn.Linear(64, 4096)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(torch.tanh(self.small(x))).square().mean()


def test_times_are_those_of_the_work() -> None:
    """Independent truth: the same products, timed here by hand."""
    model, x = Sized(), torch.randn(256, 64)
    (stage,) = phased_of(split_of(model, 1, x), model, 256, ((x,), {}), remat="none").stages
    (clock,) = measured_timers([CPU], [CPU], [CPU_CORE])
    found = clock.seconds(stage, 3)
    again = clock.seconds(stage, 3)
    assert found == again, "a stage is timed once"
    best = min(_timed(model, x) for _ in range(10))
    assert isinstance(found, PhaseSeconds)
    assert min(found.forward, found.backward + found.weight) > 0
    assert best / 4 < found.total < best * 4, "of the order of eager's"


def _timed(model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    model(x).backward()
    return time.perf_counter() - start


def test_a_failure_ends_all_workers() -> None:
    """A stage that cannot run alone is an error, and nobody waits for the others."""

    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.cholesky(x).sum()

    x = torch.eye(3).expand(4, 3, 3)
    (stage,) = phased_of(split_of(Inverse(), 1, x), Inverse(), 4, ((x,), {}), remat="none").stages
    clock = measured_timers([CPU] * 2, [CPU] * 2, [CPU_CORE] * 2)[0]
    try:
        clock.seconds(stage, 3)
    except RuntimeError:
        return  # of random numbers a root may not be there
    assert clock.seconds(stage, 3).forward > 0


def test_a_slow_worker_stops_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers stop after the same round, however late one sees that there are enough."""

    class Late(threading.Barrier):
        def wait(self, timeout: float | None = None) -> int:
            place = super().wait(timeout)
            if threading.current_thread().name == "autopipe-worker-1":
                late = time.perf_counter() + 0.2  # the other may be at its end
                while not self.n_waiting and time.perf_counter() < late:
                    os.sched_yield()
            return place

    monkeypatch.setattr(measure.threading, "Barrier", Late)
    rounds: list[str] = []  # of the worker that decides; there are enough after the sixth

    def once(self: Any) -> tuple[float, float]:
        if threading.current_thread().name == "autopipe-worker-0":
            rounds.append("once")
        return 0.001, 0.002

    clock = types.SimpleNamespace(perf_counter=lambda: 0.0 if len(rounds) < 6 else 100.0)
    monkeypatch.setattr(measure._Rounds, "once", once)
    monkeypatch.setattr(measure, "time", clock)
    model, x = Sized(), torch.randn(4, 64)
    (stage,) = phased_of(split_of(model, 1, x), model, 4, ((x,), {}), remat="none").stages
    found: list[PhaseSeconds] = []
    timers = measured_timers([CPU] * 2, [CPU] * 2, [CPU_CORE] * 2)
    assert timers[0] is timers[1]

    def measured() -> None:
        found.append(timers[0].seconds(stage, 3))

    thread = threading.Thread(target=measured, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "a worker waits for one that has stopped"
    assert found[0].forward == 0.001


@pytest.mark.parametrize("remat", ["full", "none", 0.5])
def test_a_measured_plan_is_one_to_run(remat: str | float) -> None:
    model, inputs = gpt2()
    _, kwargs = inputs(4)
    plan = autopipe.plan(model, ["cpu"] * 2, 2, remat=remat, profile=True, kwargs=kwargs)
    assert {s.speeds.split(" on ")[0] for s in plan.stages} == {"measured"}
    assert all(s.forward_seconds > 0 and s.backward_seconds > 0 for s in plan.stages)
    assert plan.step_seconds >= max(2 * s.seconds for s in plan.stages)
    pipe = autopipe.compile(model, plan=plan)
    loss = pipe(**kwargs).loss
    loss.backward()
    assert torch.allclose(loss, model(**kwargs).loss)
    assert pipe.plan == plan, "what was measured is not forgotten"


@pytest.mark.full
def test_random_state_is_left_alone() -> None:
    model, inputs = gpt2(dropout=0.1)
    _, kwargs = inputs(4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    autopipe.plan(model, ["cpu"] * 2, 2, profile=True, kwargs=kwargs)
    assert torch.equal(torch.rand(3), expected)


def test_random_state_of_the_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device draws the stage's tensors from its own generator, which its `Backend` restores.

    Here a CPU with a generator that `torch.random.fork_rng` does not know of, as a GPU's is without
    its device among the arguments.
    """
    own = torch.Generator().manual_seed(5)

    class Device(CpuBackend):
        @contextmanager
        def fork_rng(self, device: torch.device) -> Iterator[None]:
            before = own.get_state()
            with super().fork_rng(device):
                yield
            own.set_state(before)

    def filled(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        drawn.append(torch.rand((), generator=own))
        return measure_calls.filled(shape, stride, dtype, device)

    drawn: list[Tensor] = []
    monkeypatch.setitem(BACKENDS, "cpu", Device())
    monkeypatch.setattr(measure, "filled", filled)
    model, x = Sized(), torch.randn(256, 64)
    (stage,) = phased_of(split_of(model, 1, x), model, 256, ((x,), {}), remat="none").stages
    before = own.get_state()
    measured_timers([CPU], [CPU], [CPU_CORE])[0].seconds(stage, 3)
    assert drawn
    assert torch.equal(own.get_state(), before)


def test_copies_are_timed() -> None:
    """Against copies timed here by hand, from memory at hand to fresh memory.

    An allocator may give back the pages of the copy before (then a copy is as fast as one into
    memory at hand) or fresh ones, which the system clears first: several times slower.
    """
    (clock,) = measured_timers([CPU], [CPU], [CPU_CORE])
    nbytes = 32 * 2**20
    found, small = clock.copy_seconds(nbytes), clock.copy_seconds(2**10)
    source = torch.ones(nbytes, dtype=torch.uint8)
    at_hand = torch.zeros_like(source)
    to_memory_at_hand, to_fresh_memory = [], []
    for _ in range(10):
        start = time.perf_counter()
        at_hand.copy_(source)
        to_memory_at_hand.append(time.perf_counter() - start)
        start = time.perf_counter()
        mmap.mmap(-1, nbytes).write(source.numpy().data)
        to_fresh_memory.append(time.perf_counter() - start)
    assert min(to_memory_at_hand) / 4 < found < max(to_fresh_memory) * 4
    assert 0 < small < found
    assert clock.copy_seconds(nbytes) == found, "a size is timed once"


@pytest.mark.parametrize("in_flight", [1, 3, 100])
def test_as_many_micro_batches_are_ahead_as_are_in_flight(
    in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards that run before the first backward of a round, up to a limit."""
    model, x = Sized(), torch.randn(4, 64)
    (stage,) = phased_of(split_of(model, 1, x), model, 4, ((x,), {}), remat="none").stages
    seen: list[list[str]] = []
    once = measure._Rounds.once

    def watched(self: measure._Rounds) -> tuple[float, float]:
        calls: list[str] = []
        seen.append(calls)

        def told(name: str) -> Any:
            function = self.functions[name]
            return lambda *args: (calls.append(name), function(*args))[1]

        own, self.functions = self.functions, {name: told(name) for name in self.functions}
        try:
            return once(self)
        finally:
            self.functions = own

    monkeypatch.setattr(measure._Rounds, "once", watched)
    (clock,) = measured_timers([CPU], [CPU], [CPU_CORE])
    clock.seconds(stage, in_flight)
    ahead = min(in_flight, measure.MOST_AHEAD)
    assert len(seen) > measure.LEAST
    assert all(calls == ["forward"] * ahead + ["backward"] * ahead for calls in seen)


@pytest.mark.full
def test_one_micro_batch_that_was_chosen_is_no_whole_batch() -> None:
    """A batch of one sample leaves no other choice; it was not asked for."""
    model, inputs = gpt2()
    _, kwargs = inputs(1)
    plan = autopipe.plan(model, ["cpu"] * 2, None, profile=True, kwargs=kwargs)
    assert len(plan.sizes) == 1
    assert not plan.whole
    assert torch.allclose(autopipe.compile(model, plan=plan)(**kwargs).loss, model(**kwargs).loss)
