"""Whatever CUDA graphs copy, zero, seed, check and hand over is needed: without it a test fails.

The mutants are found in the source by themselves. Each scenario compares steps with those of the
same pipeline on CPU workers; all are faultless with the runtime as it is.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.graphs import test_slots
from tests.support.simulated import Machine, simulated
from tests.support.simulated.engine import current, run_backward
from tests.support.simulated.graphs import SimulatedGraph
from tests.support.simulated.mutants import GRAPH_MODULES, graph_mutants
from tests.support.simulated.nets import NETS
from tests.support.simulated.pairs import BATCH, WIDTH, Pair, host, replace_values, total

Scenario = Callable[[Machine, pytest.MonkeyPatch], list[str]]
TWO = ["lazy:0", "lazy:1"]
GRAPHS = {"backend": "cudagraphs", "remat": "none"}


class Drawing(nn.Module):
    """Draws by an operator that takes a generator, and by one that takes none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first, second, last = self.layers
        x = torch.dropout(first(x), 0.5, True)
        x = second(x) + torch.rand_like(x)
        return last(x) * mask  # type: ignore[no-any-return]


def differences(found: list[tuple[str, Tensor, Tensor]]) -> list[str]:
    return [what for what, ours, truth in found if not torch.allclose(ours, truth, rtol=1e-3)]


def training(
    net: str,
    devices: list[str],
    place: str,
    replaced: tuple[int, ...] = (),
    captures: int | None = None,
    **options: Any,
) -> Scenario:
    """Steps, of which the last replays all its actions.

    Args:
        net, devices, place, options: as for `Pair`.
        replaced: before these steps the caller puts other tensors in the places of weights.
        captures: how many there must be.
    """

    def run(machine: Machine, patch: pytest.MonkeyPatch) -> list[str]:
        patch.setitem(NETS, "drawing", Drawing)
        pair = Pair(machine, net, devices, **GRAPHS | options)
        wrong = []
        for n in range(6):
            for pipe in pair.pipes if n in replaced else ():
                for parameter in pipe.model.parameters():
                    replace_values(parameter, 0.9)
            replays = machine.counts["replays"]
            wrong += differences(pair.step(patch, place, "default"))
        actions = sum(map(len, pair.pipes[1].scheduled.devices))
        if machine.counts["replays"] - replays != actions:
            wrong.append(f"{machine.counts['replays'] - replays} replays of {actions} actions")
        if captures not in (None, machine.counts["captures"]):
            wrong.append(f"{machine.counts['captures']} captures")
        return wrong

    return run


def overlapping(machine: Machine, patch: pytest.MonkeyPatch) -> list[str]:
    """Two forwards before their backwards, whose gradients the caller keeps."""
    pair = Pair(machine, "chain", TWO, **GRAPHS)
    kept: list[tuple[str, Tensor, Tensor]] = []
    for n in range(4):
        found: list[list[Tensor]] = []
        for pipe, place in zip(pair.pipes, ("cpu", "lazy:0"), strict=True):
            pipe.model.zero_grad()
            losses = []
            for m in (1, 2):
                x = torch.full((BATCH, WIDTH), 0.1 * m + 0.3 * n).to(place)
                losses.append(total(pipe(x, x)))
            for loss in losses[:: -1 if n % 2 else 1]:
                run_backward(machine, loss, current(machine), patch)
            found.append([p.grad for p in pipe.model.parameters() if p.grad is not None])
        names = [name for name, _ in pair.pipes[0].model.named_parameters()]
        kept += zip(names, found[1], found[0], strict=True)
    return differences([(what, host(ours), truth) for what, ours, truth in kept])


def kept(machine: Machine, patch: pytest.MonkeyPatch) -> list[str]:
    """Gradients that were asked for without `backward` are the caller's, too."""
    pair = Pair(machine, "chain", TWO, **GRAPHS)
    found: list[tuple[str, Tensor, Tensor]] = []
    for n in range(4):
        results = []
        for pipe, place in zip(pair.pipes, PLACES, strict=True):
            x = torch.full((BATCH, WIDTH), 0.1 + n).to(place)
            results.append(torch.autograd.grad(total(pipe(x, x)), [*pipe.model.parameters()]))
        found += [("gradient", o, t) for t, o in zip(*results, strict=True)]
    return differences([(what, host(ours), truth) for what, ours, truth in found])


def failing(machine: Machine, patch: pytest.MonkeyPatch) -> list[str]:
    """Forwards cannot be captured; backwards could, but would have to copy all that was saved."""
    record = SimulatedGraph.record

    def fails(self: SimulatedGraph, op: Any, *args: Any) -> Any:
        if op is torch.ops.aten.relu.default:
            raise RuntimeError("not permitted")
        return record(self, op, *args)

    patch.setattr(SimulatedGraph, "record", fails)
    pair = Pair(machine, "chain", TWO, **GRAPHS)
    wrong = [w for _ in range(3) for w in differences(pair.step(patch, "cpu", "default"))]
    machine.counts["replays"] += 1  # none is right here
    return wrong + ["captured"] * machine.counts["captures"]


def slots(machine: Machine, patch: pytest.MonkeyPatch) -> list[str]:
    """What a slot's own test sees."""
    test_slots.test_cleared_slots_are_nobodys()
    machine.counts["replays"] += 1
    return []


def abandoned(machine: Machine, patch: pytest.MonkeyPatch) -> list[str]:
    """Each second forward has no backward, and each backward takes its slots from a forward."""
    pair = Pair(machine, "chain", TWO, **GRAPHS)
    wrong = differences(pair.step(patch, "lazy:0", "default"))
    for _ in range(3):
        x = torch.ones(BATCH, WIDTH, device="lazy:0").requires_grad_()
        loss = total(pair.pipes[1](x, x.detach()))
        replays = machine.counts["replays"]
        del loss
        gc.collect()
        wrong += differences(pair.step(patch, "lazy:0", "default"))
        if machine.counts["replays"] == replays:
            wrong.append("nothing is replayed")
    if machine.counts["captures"] != 2 * 4 * 2:
        wrong.append(f"{machine.counts['captures']} captures")
    return wrong


def evaluated(machine: Machine, patch: pytest.MonkeyPatch) -> list[str]:
    """Sizes that differ, without gradients."""
    pair = Pair(machine, "outputs", ["lazy:0"] * 2, **GRAPHS)
    wrong = []
    for n, batch in enumerate((8, 7, 8, 7, 8, 7, 8)):
        x = torch.linspace(-1, n, batch * WIDTH).reshape(batch, WIDTH)
        with torch.no_grad():
            results = [pipe(x.to(p), x.to(p)) for pipe, p in zip(pair.pipes, PLACES, strict=True)]
        wrong += differences([("result", host(o), t) for t, o in zip(*results, strict=True)])
    return wrong


PLACES = ("cpu", "lazy:0")

SCENARIOS: dict[str, Scenario] = {
    "drawing": training("drawing", TWO, "lazy:0", remat="full"),
    "norms": training("norms", TWO, "lazy:0", batch_norm="micro", remat="full"),
    "tied": training("tied", TWO, "cpu"),
    "replaced": training("chain", TWO, "lazy:0", (3, 4)),
    "overlapping": overlapping,
    "abandoned": abandoned,
    "evaluated": evaluated,
    "early": training("loss", TWO, "lazy:1", schedule="1f1b", captures=2 * (2 + 1)),
    "split": training("loss", TWO, "lazy:1", schedule="zb-h1"),
    "kept": kept,
    "failing": failing,
    "slots": slots,
}


def faults(name: str, patch: pytest.MonkeyPatch) -> list[str]:
    with patch.context() as inner, simulated(inner, 6) as machine:
        try:
            found = SCENARIOS[name](machine, inner)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        gc.collect()
        return [*found, *machine.races, *([] if machine.counts["replays"] else ["no replay"])]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_runtime_as_it_is_has_no_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(name, monkeypatch) == []


MUTANTS = {mutant.name: mutant for mutant in graph_mutants()}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", MUTANTS)
def test_nothing_can_be_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    original = getattr(mutant.owner, mutant.attribute)
    for owner in (mutant.owner, *map(sys.modules.get, GRAPH_MODULES)):
        if getattr(owner, mutant.attribute, None) is original:  # imported by name
            monkeypatch.setattr(owner, mutant.attribute, mutant.function)
    assert any(faults(scenario, monkeypatch) for scenario in SCENARIOS)
