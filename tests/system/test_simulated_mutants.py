"""Whatever orders work in the runtime is needed: without it, a simulated device finds fault.

Each mutant lacks one wait, event, stream or recorded use; a new one in the source has its mutant by
itself. Scenarios run until one finds a race, a wrong order of frees, memory that fills up, or time
that is lost. All scenarios are faultless with the runtime as it is.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import autopipe
from tests.support.simulated import Machine, simulated
from tests.support.simulated.failing import fail_and_go_on
from tests.support.simulated.judge import Judge
from tests.support.simulated.mutants import Mutant, mutants
from tests.support.simulated.nets import NETS
from tests.support.simulated.pairs import CHUNKS, WIDTH, Pair

aten = torch.ops.aten
Scenario = Callable[[pytest.MonkeyPatch], list[str]]
MICRO_BATCHES = 16
MESSAGE = 2 * WIDTH * 4
"""Bytes of what a stage sends for a micro-batch of two samples."""


def cost(op: Any) -> float:
    return 1.0 if op in (aten.addmm.default, aten.mm.default) else 0.0


def training(machine: Machine, net: str, devices: list[str], place: str, streams: str) -> Scenario:
    pair = Pair(machine, net, devices)

    def run(patch: pytest.MonkeyPatch) -> list[str]:
        for _ in range(2):
            found = pair.step(patch, place, streams)
        return [what for what, ours, truth in found if not torch.allclose(ours, truth, rtol=1e-3)]

    return run


def failing(machine: Machine, devices: list[str], place: str) -> Scenario:
    def run(patch: pytest.MonkeyPatch) -> list[str]:
        pipe = autopipe.compile(NETS["skip and mask"](WIDTH), devices, CHUNKS)
        for direction in ("forward", "backward"):
            fail_and_go_on(machine, pipe, place, direction, patch)
        return []

    return run


def timed(machine: Machine) -> Scenario:
    """Many micro-batches: how long they take, and how much memory messages take."""
    pipe = autopipe.compile(NETS["chain"](WIDTH), ["lazy:0", "lazy:1", "lazy:2"], MICRO_BATCHES)
    x, mask = torch.ones(2 * MICRO_BATCHES, WIDTH), torch.ones(2 * MICRO_BATCHES, WIDTH)

    def run(patch: pytest.MonkeyPatch) -> list[str]:
        with torch.no_grad():
            pipe(x, mask)
            gc.collect()
            machine.rest()
            pipe(x, mask)
        workers = pipe._programs.last[1].program.workers
        stages = [w.compute.busy / MICRO_BATCHES for w in workers]
        limit = sum(stages) + (MICRO_BATCHES - 1) * max(stages)
        found = [] if machine.makespan <= 1.03 * limit else ["false waits"]
        into = [lane.into for w in workers for lane in w._lanes.values()]
        if max(stream.memory.peak for stream in into) > 4 * MESSAGE:
            found.append("messages fill a device")
        return found

    return run


@pytest.fixture(scope="module")
def laboratory() -> Iterator[tuple[Machine, list[Scenario]]]:
    """A machine, and scenarios on it, of which the ones that find most come first."""
    patch = pytest.MonkeyPatch()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), simulated(patch, 6, cost, Judge()) as machine:
        warnings.simplefilter("ignore")
        two, host_last = ["lazy:0", "lazy:1"], ["lazy:0", "lazy:1", "cpu"]
        yield (
            machine,
            [
                training(machine, "skip and mask", two, "lazy:5", "forward on side"),
                training(machine, "outputs", host_last, "lazy:0", "side"),
                training(machine, "tied", two, "cpu", "side"),
                training(machine, "norms", ["cpu", *two], "pinned", "forward on side"),
                training(machine, "skip and mask", ["lazy:0"] * 2, "lazy:0", "side"),
                training(machine, "chain", two, "pinned", "default"),
                timed(machine),
                failing(machine, two, "lazy:5"),
                failing(machine, host_last, "lazy:0"),
            ],
        )
    logging.disable(logging.NOTSET)
    patch.undo()


def faults(machine: Machine, scenario: Scenario) -> list[str]:
    """What a scenario finds; the machine is as new then."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            found = scenario(patch)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
    gc.collect()
    found += machine.races + machine.judge.errors
    machine.forget()
    return found


def test_the_runtime_as_it_is_has_no_fault(laboratory: tuple[Machine, list[Scenario]]) -> None:
    machine, scenarios = laboratory
    for scenario in scenarios:
        assert faults(machine, scenario) == []


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name) for m in mutants()])
def test_nothing_can_be_left_out(
    mutant: Mutant, laboratory: tuple[Machine, list[Scenario]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, scenarios = laboratory
    monkeypatch.setattr(mutant.owner, mutant.attribute, mutant.function)
    assert any(faults(machine, scenario) for scenario in scenarios)
