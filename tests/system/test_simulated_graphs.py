"""CUDA graphs on simulated devices: what is copied in and out, replayed, seeded and summed.

Covers runtime/graphs/phase_graph.py, runtime/graphs/stage_graphs.py and
autopipe/graphed_stages.py. The truth is the same pipeline on CPU workers, without graphs.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.passes.cost import replayed_calls
from autopipe.passes.devices import CALL
from autopipe.runtime.graphs import stage_state
from tests.support.simulated import Machine, simulated
from tests.support.simulated.engine import current, run_backward
from tests.support.simulated.failing import fail_and_go_on
from tests.support.simulated.graphs import SimulatedGraph
from tests.support.simulated.nets import NETS
from tests.support.simulated.pairs import BATCH, CHUNKS, WIDTH, Pair, host, replace_values, total
from tests.support.simulated.tensors import Simulation

DEVICES = {
    "one": ["lazy:0"],
    "one twice": ["lazy:0"] * 2,
    "two": ["lazy:0", "lazy:1"],
    "the CPU last": ["lazy:0", "lazy:1", "cpu"],
}
GRAPHS = {"backend": "cudagraphs"}


def check(machine: Machine, found: list[tuple[str, Tensor, Tensor]]) -> None:
    for what, ours, expected in found:
        torch.testing.assert_close(ours, expected, msg=lambda m, what=what: f"{what}: {m}")
    gc.collect()
    assert machine.races == []


def steps(
    machine: Machine,
    pair: Pair,
    patch: pytest.MonkeyPatch,
    count: int = 4,
    place: str = "lazy:0",
) -> None:
    """Steps of which the first runs eagerly, and the second captures; `count` in all."""
    for n in range(count):
        replays = machine.counts["replays"]
        check(machine, pair.step(patch, place, "default"))
        assert (machine.counts["replays"] > replays) == (n > 0)


COMBINATIONS = [
    pytest.param(name, devices, remat)
    for name in NETS
    for devices in DEVICES
    for remat in ("none", "full", "min-cut")
]


@pytest.mark.few(8)
@pytest.mark.parametrize(("name", "devices", "remat"), COMBINATIONS)
def test_steps_have_the_same_numbers(
    name: str, devices: str, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, name, DEVICES[devices], remat=remat, **GRAPHS)
        steps(machine, pair, monkeypatch)
        captures = machine.counts["captures"]
        steps_before = machine.counts["replays"]
        check(machine, pair.step(monkeypatch, "lazy:5", "side"))
        assert machine.counts["replays"] > steps_before
        assert machine.counts["captures"] == captures  # all of them are replayed from then on
        text = pair.pipes[1].explain()
        assert ("runs eagerly" in text) == ("cpu" in DEVICES[devices])


@pytest.mark.few(3)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved", "zb-v", "v-half"])
def test_schedules(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "loss", ["lazy:0", "lazy:1"], schedule=schedule, **GRAPHS)
        steps(machine, pair, monkeypatch)


def test_as_many_slots_as_micro_batches_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """1f1b has K - k micro-batches in flight at stage k, each with a graph of F and one of BW."""
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "loss", ["lazy:0", "lazy:1"], schedule="1f1b", remat="none", **GRAPHS)
        steps(machine, pair, monkeypatch)
        assert machine.counts["captures"] == 2 * (2 + 1)
        assert machine.counts["replays"] == 3 * 2 * 2 * CHUNKS


def test_a_step_is_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for backend in ("eager", "cudagraphs"):
        with simulated(monkeypatch, 6) as machine:
            net = NETS["chain"](WIDTH)
            pipe = autopipe.compile(net, ["lazy:0"], CHUNKS, remat="none", backend=backend)
            x = torch.ones(BATCH, WIDTH, device="lazy:0")
            for _ in range(3):
                before = machine.counts["kernels"]
                total(pipe(x, x))
                gc.collect()  # a forward whose backward may come keeps its slots
                counts[backend] = machine.counts["kernels"] - before
    # By micro-batch: 6 layers of 2 operators and a product; one graph, 2 copies in, 1 out.
    assert counts["eager"] - counts["cudagraphs"] == CHUNKS * ((6 * 2 + 1) - (1 + 2 + 1))


def test_a_plan_counts_the_launches_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, calls = [], []
    for chunks in (2, 4):
        with simulated(monkeypatch, 6) as machine:
            pipe = autopipe.compile(
                NETS["chain"](WIDTH), ["lazy:0"], chunks, remat="none", **GRAPHS
            )
            x = torch.ones(BATCH, WIDTH, device="lazy:0")
            for _ in range(3):
                before = machine.counts["kernels"]
                loss = (pipe(x, x) * x).sum()  # its gradient needs no copy to be dense
                run_backward(machine, loss, current(machine), monkeypatch)
                counts.append(machine.counts["kernels"] - before)
            program = pipe._programs.last[1]
            (stage,) = program.lowered.phased[BATCH // chunks].stages
            calls.append(replayed_calls(stage))
            (planned,) = pipe.plan.stages
            assert planned.kept_bytes == sum(p.nbytes for p in pipe.parameters())
            assert pipe.plan.issue_seconds == pytest.approx(chunks * calls[-1] * CALL)
    assert calls[0] == calls[1]
    assert counts[5] - counts[2] == 2 * calls[0]


class Model(nn.Module):
    """Two layers with an operator of the test's between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.between(self.first(x))) * mask  # type: ignore[no-any-return]


@torch.library.custom_op("autopipe_tests::waits", mutates_args=(), tags=(torch.Tag.pointwise,))
def waits(x: Tensor) -> Tensor:
    """A copy; the host reads a number meanwhile."""
    assert x.sum().item() is not None
    return x.clone()


@waits.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return waits(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def pair_of(machine: Machine, patch: pytest.MonkeyPatch, between: Any, **options: Any) -> Pair:
    patch.setitem(NETS, "own", lambda width: Model(between))
    return Pair(machine, "own", ["lazy:0", "lazy:1"], **GRAPHS, **options)


def test_what_waits_for_the_host_runs_eagerly_and_the_rest_by_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = pair_of(machine, monkeypatch, Waits.apply, remat="none")
        steps(machine, pair, monkeypatch, place="cpu")
        text = pair.pipes[1].explain()
        assert text.count("runs eagerly, not by cudagraphs: phase F of stage") == 1
        assert "autopipe_tests.waits.default has no tag that says whether it draws" in text
        assert machine.counts["captures"] == CHUNKS * 2  # of the other stage


def dropout(x: Tensor) -> Tensor:
    return torch.dropout(torch.rand_like(x) + x, 0.5, True)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_draws_differ_by_step_and_micro_batch(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rand_like` takes no generator in this form; dropout does."""
    with simulated(monkeypatch, 6) as machine:
        pair = pair_of(machine, monkeypatch, dropout, remat=remat)
        steps(machine, pair, monkeypatch)
        ones = torch.ones(BATCH, WIDTH)
        found = []
        for _ in range(2):
            with torch.no_grad():
                found.append(host(pair.pipes[1](ones, ones)))
        assert not torch.equal(*found)
        assert len({tuple(part.flatten().tolist()) for part in found[0].split(2)}) == CHUNKS


def gradients(model: nn.Module) -> list[Tensor]:
    return [host(p.grad).clone() for p in model.parameters()]


def test_gradients_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up over steps; and those that the caller has taken do not change any more."""
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "chain", ["lazy:0", "lazy:1"], **GRAPHS)
        taken: list[list[Tensor]] = []
        for n in range(5):
            grads = []
            for pipe, place in zip(pair.pipes, ("cpu", "lazy:0"), strict=True):
                x = torch.full((BATCH, WIDTH), 0.1 * (n + 1)).to(place)
                loss = total(pipe(x, x))
                run_backward(machine, loss, current(machine), monkeypatch)
                grads.append(gradients(pipe.model))
            for ours, truth in zip(grads[1], grads[0], strict=True):
                torch.testing.assert_close(ours, truth)
            kept = [p.grad for p in pair.pipes[1].model.parameters()]
            if n == 2:
                taken = [[g for g in kept if g is not None], grads[1]]
                for pipe in pair.pipes:
                    pipe.model.zero_grad(set_to_none=True)
        for tensor, values in zip(*taken, strict=True):
            assert torch.equal(host(tensor), values)
        assert machine.races == []


def test_two_forwards_before_their_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "chain", ["lazy:0", "lazy:1"], **GRAPHS)
        for _ in range(3):
            for pipe, place in zip(pair.pipes, ("cpu", "lazy:0"), strict=True):
                pipe.model.zero_grad()
                losses = []
                for n in (1, 2):
                    x = torch.full((BATCH, WIDTH), 0.1 * n).to(place)
                    losses.append(total(pipe(x, x)))
                for loss in losses:
                    run_backward(machine, loss, current(machine), monkeypatch)
            found, truth = (gradients(pipe.model) for pipe in reversed(pair.pipes))
            for ours, expected in zip(found, truth, strict=True):
                torch.testing.assert_close(ours, expected)
        assert machine.counts["replays"] > 0
        assert machine.races == []


def test_the_first_backward_is_that_of_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward is a graph by then; it runs eagerly on what that has saved."""
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "skip and mask", ["lazy:0", "lazy:1"], **GRAPHS)
        x = torch.ones(BATCH, WIDTH, device="lazy:0")
        total(pair.pipes[1](x.clone().requires_grad_(), x))
        gc.collect()
        for replays in (2 * CHUNKS, 5 * CHUNKS, 5 * CHUNKS):  # without and with R0, BW0, RBW1
            before = machine.counts["replays"]
            check(machine, pair.step(monkeypatch, "lazy:0", "default"))
            assert machine.counts["replays"] - before == replays


def test_forwards_without_a_backward_give_their_slots_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "chain", ["lazy:0", "lazy:1"], **GRAPHS)
        steps(machine, pair, monkeypatch, 3)
        captures = machine.counts["captures"]
        x = torch.ones(BATCH, WIDTH, device="lazy:0")
        for _ in range(3):
            total(pair.pipes[1](x.clone().requires_grad_(), x))
        gc.collect()
        check(machine, pair.step(monkeypatch, "lazy:0", "default"))
        assert machine.counts["captures"] == captures


def test_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "chain", ["lazy:0", "lazy:1"], **GRAPHS)
        with torch.no_grad():  # a capture is not for two threads at once
            pair.pipes[1](torch.ones(BATCH, WIDTH), torch.ones(BATCH, WIDTH))
        results: dict[int, list[Tensor]] = {0: [], 1: []}

        def call(n: int) -> None:
            x = torch.full((BATCH, WIDTH), 0.1 * (n + 1))
            for _ in range(4):
                with Simulation(machine), torch.no_grad():
                    results[n].append(host(pair.pipes[1](x, x)).clone())

        threads = [threading.Thread(target=call, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for n, found in results.items():
            x = torch.full((BATCH, WIDTH), 0.1 * (n + 1))
            with torch.no_grad():
                truth = pair.pipes[0](x, x)
            assert len(found) == 4
            for ours in found:
                torch.testing.assert_close(ours, truth)
        assert machine.counts["replays"] > 0
        assert machine.races == []


def test_weights_that_are_moved_or_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "chain", ["lazy:0", "lazy:1"], **GRAPHS)
        steps(machine, pair, monkeypatch, 3)
        for _ in range(3):
            for pipe in pair.pipes:
                for parameter in pipe.model.parameters():
                    replace_values(parameter, 0.9)
            for _ in range(2):
                check(machine, pair.step(monkeypatch, "lazy:0", "default"))
        replays = machine.counts["replays"]
        check(machine, pair.step(monkeypatch, "lazy:0", "default"))
        assert machine.counts["replays"] > replays


def test_a_changed_setting_of_torch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[bool] = []
    monkeypatch.setattr(stage_state, "SETTINGS", (lambda: len(settings),))
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "chain", ["lazy:0"], **GRAPHS)
        steps(machine, pair, monkeypatch, 3)
        captures = machine.counts["captures"]
        settings.append(True)
        check(machine, pair.step(monkeypatch, "lazy:0", "default"))
        assert machine.counts["captures"] == 2 * captures


def test_other_sizes_and_modes_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "norms", ["lazy:0", "lazy:1"], batch_norm="micro", **GRAPHS)
        for batch in (8, 7, 7, 7, 8, 8):
            x = torch.linspace(-1, 1, batch * WIDTH).reshape(batch, WIDTH)
            found = []
            for pipe in pair.pipes:
                pipe.model.zero_grad()
                loss = total(pipe.train()(x, x))
                run_backward(machine, loss, current(machine), monkeypatch)
                with torch.no_grad():
                    evaluated = pipe.eval()(x, x)
                found.append([host(loss), host(evaluated), *gradients(pipe.model)])
            for ours, truth in zip(*found, strict=True):
                torch.testing.assert_close(ours, truth)
        assert machine.counts["replays"] > 0
        assert machine.races == []


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_after_a_failed_step(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "skip and mask", ["lazy:0", "lazy:1"], **GRAPHS)
        fail_and_go_on(machine, pair.pipes[1], "lazy:0", direction, monkeypatch)
        check(machine, [])


def test_a_stage_that_offloads_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch, 6) as machine:
        remat = ["none", "offload"]
        pair = Pair(machine, "chain", ["lazy:0", "lazy:1"], remat=remat, **GRAPHS)
        steps(machine, pair, monkeypatch)
        assert machine.counts["captures"] == 2 * CHUNKS
        assert "stage 1: what it saves leaves the device (remat='offload')" in (
            pair.pipes[1].explain()
        )


def test_without_graphs_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = NETS["chain"](WIDTH)
    pipe = autopipe.compile(model, 2, CHUNKS, **GRAPHS)
    x = torch.ones(BATCH, WIDTH)
    torch.testing.assert_close(pipe(x, x), model(x, x))
    assert "stage 1: a cpu device has no graphs" in pipe.explain()


def refuse(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let captures of backwards fail."""
    record = SimulatedGraph.record

    def fails(self: SimulatedGraph, op: Any, *args: Any) -> Any:
        if op is torch.ops.aten.threshold_backward.default:
            raise RuntimeError(message)
        return record(self, op, *args)

    monkeypatch.setattr(SimulatedGraph, "record", fails)


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is replayed nevertheless; the error is in `explain`, its first line."""
    with simulated(monkeypatch, 6) as machine:
        refuse("not permitted\nwhile capturing", monkeypatch)
        pair = Pair(machine, "chain", ["lazy:0", "lazy:1"], remat="none", **GRAPHS)
        steps(machine, pair, monkeypatch)
        assert machine.counts["captures"] == 2 * CHUNKS
        text = pair.pipes[1].explain()
        for stage in (0, 1):
            assert f"phase RBW of stage {stage}: RuntimeError: not permitted\n" in f"{text}\n"
