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
from torch import Tensor, nn

import autopipe
from tests.support.offloading import offload_all
from tests.support.simulated import Machine, simulated
from tests.support.simulated.engine import on_streams, run_backward
from tests.support.simulated.failing import fail_and_go_on
from tests.support.simulated.judge import Judge
from tests.support.simulated.mutants import mutants
from tests.support.simulated.nets import NETS, MaskFirst
from tests.support.simulated.pairs import BATCH, CHUNKS, WIDTH, Pair, placed

aten = torch.ops.aten
Scenario = Callable[[pytest.MonkeyPatch], list[str]]
MICRO_BATCHES = 16
MESSAGE = 2 * WIDTH * 4
"""Bytes of what a stage sends for a micro-batch of two samples."""


SLOW = "lazy:2"


def cost(op: Any, device: torch.device) -> float:
    if op not in (aten.addmm.default, aten.mm.default):
        return 0.0
    return 2.0 if str(device) == SLOW else 1.0


def training(
    machine: Machine, net: str, devices: list[str], place: str, streams: str, **options: Any
) -> Scenario:
    pair = Pair(machine, net, devices, **options)

    def run(patch: pytest.MonkeyPatch) -> list[str]:
        for _ in range(2):
            found = pair.step(patch, place, streams)
        return [what for what, ours, truth in found if not torch.allclose(ours, truth, rtol=1e-3)]

    return run


def inference(machine: Machine, devices: list[str]) -> Scenario:
    """The caller overwrites pinned tensors as soon as the call returns."""
    pipe = autopipe.compile(NETS["chain"](WIDTH), devices, CHUNKS)

    def run(patch: pytest.MonkeyPatch) -> list[str]:
        inputs = [placed(machine, torch.ones(BATCH, WIDTH), "pinned") for _ in range(2)]
        with torch.no_grad():
            pipe(*inputs)
            for tensor in inputs:
                tensor.zero_()
        return []

    return run


class Several(nn.Module):
    """Two results, a constant, and a batch norm behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.BatchNorm1d(WIDTH)
        for layer in (*self.layers[1:], self.norm):
            layer.requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        first = x = torch.relu(self.layers[0](x))
        for layer in self.layers[1:]:
            x = torch.relu(layer(x))
        constant = torch.tensor([0.5] * WIDTH, device=x.device)
        return first * 2, self.norm(x) * constant * mask


def dropped(machine: Machine) -> Scenario:
    """The caller drops its tensors after the forward, and the pipeline after the backward.

    The second backward is of another output than the first, so its forward runs again.
    """

    def run(patch: pytest.MonkeyPatch) -> list[str]:
        pipe = autopipe.compile(Several(), ["lazy:0", "lazy:1"], CHUNKS)
        streams = machine.side_streams
        for output in (1, 1, 0, 1):
            with on_streams(machine, streams):
                x = torch.ones(BATCH, WIDTH).to("lazy:0")
                mask = torch.ones(BATCH, WIDTH).to("lazy:1")
                loss = pipe(x, mask)[output].sum()
                del x, mask
                run_backward(machine, loss, streams, patch)
                del loss
                for device in machine.devices:
                    torch.zeros(1, device=device)
        del pipe
        gc.collect()
        with on_streams(machine, streams):
            for device in machine.devices:
                torch.zeros(1, device=device)
        return []

    return run


def failing(machine: Machine, devices: list[str], place: str) -> Scenario:
    pipe = autopipe.compile(NETS["skip and mask"](WIDTH), devices, CHUNKS)

    def run(patch: pytest.MonkeyPatch) -> list[str]:
        for direction in ("forward", "backward"):
            fail_and_go_on(machine, pipe, place, direction, patch)
        return []

    return run


def timed(machine: Machine, devices: list[str]) -> Scenario:
    """Many micro-batches: how long they take, and how much memory messages take."""
    pipe = autopipe.compile(MaskFirst(WIDTH), devices, MICRO_BATCHES)
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


def offloading(machine: Machine) -> Scenario:
    """Many micro-batches on one device: how much of what they save is there at once."""
    pipe = autopipe.compile(MaskFirst(WIDTH), ["lazy:0"], MICRO_BATCHES, remat="offload")
    x, mask = torch.ones(2 * MICRO_BATCHES, WIDTH), torch.ones(2 * MICRO_BATCHES, WIDTH)

    def run(patch: pytest.MonkeyPatch) -> list[str]:
        for _ in range(2):
            gc.collect()
            machine.rest()
            pipe(x, mask).sum().backward()
        (worker,) = pipe._programs.last[1].program.workers
        set_of_one = next(iter(pipe.memory.stages[0].per_microbatch.values()))
        into = worker.host_lanes[1].into
        assert into is not None
        assert worker.compute is not None
        found = ["fetched tensors fill a device"] * (into.memory.peak > 3 * set_of_one)
        most = 4 * set_of_one + worker.compute.memory.now  # gradients; they live on
        return found + ["saved tensors fill a device"] * (worker.compute.memory.peak > most)

    return run


@pytest.fixture(scope="module")
def laboratory() -> Iterator[tuple[Machine, list[Scenario]]]:
    """A machine, and scenarios on it, of which the ones that find most come first."""
    patch = pytest.MonkeyPatch()
    offload_all(patch)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), simulated(patch, 6, cost, Judge(patch)) as machine:
        warnings.simplefilter("ignore")
        two, host_last = ["lazy:0", "lazy:1"], ["lazy:0", "lazy:1", "cpu"]
        scenarios = [
            training(machine, "skip and mask", two, "lazy:5", "forward on side"),
            training(machine, "outputs", host_last, "lazy:0", "side"),
            training(machine, "tied", two, "cpu", "side"),
            training(machine, "norms", ["cpu", *two], "pinned", "forward on side"),
            training(machine, "skip and mask", ["lazy:0"] * 2, "lazy:0", "side"),
            training(machine, "chain", two, "pinned", "default"),
            training(machine, "tied", two, "cpu", "forward on side", frozen=True),
            inference(machine, two),
            dropped(machine),
            training(machine, "tied", two, "cpu", "side", remat="offload"),
            offloading(machine),
            timed(machine, ["lazy:0"]),
            timed(machine, ["lazy:0", "lazy:1", SLOW]),
            failing(machine, two, "lazy:5"),
            failing(machine, host_last, "lazy:0"),
        ]
        gc.collect()
        gc.freeze()  # collections need not look at what is there for good
        yield machine, scenarios
        gc.unfreeze()
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


MUTANTS = {mutant.name: mutant for mutant in mutants()}
WAITS = [name for name in MUTANTS if "wait_event" in name]


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.few(6)
def test_nothing_can_be_left_out(
    name: str, laboratory: tuple[Machine, list[Scenario]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, scenarios = laboratory
    mutant = MUTANTS[name]
    monkeypatch.setattr(mutant.owner, mutant.attribute, mutant.function)
    assert any(faults(machine, scenario) for scenario in scenarios)


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.few(1)
def test_the_sanitizer_of_torch_sees_a_missing_wait_too(
    name: str, laboratory: tuple[Machine, list[Scenario]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, scenarios = laboratory
    mutant = MUTANTS[name]
    monkeypatch.setattr(mutant.owner, mutant.attribute, mutant.function)
    seen = False
    for scenario in scenarios[:4]:
        scenario(monkeypatch)
        seen = seen or bool(machine.races and machine.judge.errors)
        machine.forget()
    assert seen
