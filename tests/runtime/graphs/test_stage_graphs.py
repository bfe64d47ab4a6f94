"""What a stage runs eagerly beside its graphs: where, and with what."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from autopipe.graphed_stages import _WatchOps
from autopipe.runtime.graphs import GraphedStage, StageGraphs
from autopipe.runtime.graphs.slots import Slot
from autopipe.runtime.random import MicroBatchContext

CPU, META = torch.device("cpu"), torch.device("meta")
CTX = MicroBatchContext(0, (), 0)


class FakeRun:
    """As much of a run as a stage without parameters asks for."""

    program = SimpleNamespace(sizes=(2,))

    def state(self, stage: int) -> list[Tensor]:
        return []


def stage_graphs(notes: list[str]) -> Any:
    stage = GraphedStage(0, {"forward": 1, "backward": 1}, (), frozenset({"backward"}))
    worker: Any = SimpleNamespace(device=CPU, compute=None)
    return StageGraphs(stage, worker, object, _WatchOps, notes.append)


def twice(ctx: Any, arguments: list[Tensor]) -> list[Tensor]:
    return [x * 2 for x in arguments]


def test_the_first_run_says_what_cannot_be_captured_and_where() -> None:
    notes: list[str] = []

    def F_0_b2(ctx: Any, arguments: list[Tensor]) -> list[Any]:  # noqa: N802
        return [arguments[0].sum().item()]

    graphs, run = stage_graphs(notes), FakeRun()
    for _ in range(3):
        assert graphs._compute("forward", run, 0, F_0_b2, CTX, [torch.ones(2)]) == [2.0]
    assert notes == [
        "phase F of stage 0: aten._local_scalar_dense.default: the host waits for its result"
    ]


def test_eager_kernels_get_what_they_expect_on_the_host() -> None:
    """A graph keeps the seeds of attention on the device, an eager forward on the host."""
    graphs, run, seed = stage_graphs([]), FakeRun(), torch.ones(2)
    (x,) = graphs._compute("forward", run, 0, twice, CTX, [seed])
    assert x.tolist() == [2, 2]
    (phase,) = graphs._phases.values()
    assert phase.seen.devices == [CPU]
    phase.seen.devices = [META]
    slot = Slot(SimpleNamespace(new_graph=object, capturing=lambda graph: nullcontext()))
    graph = graphs._captured(slot, phase, twice, CTX, [], [seed])
    assert graph is not None

    def backward(ctx: Any, arguments: list[Tensor]) -> list[Tensor]:
        return arguments

    for _ in range(2):  # also when it is looked at, and when another run has cleared the slots
        (x,) = graphs._compute("backward", run, 0, backward, CTX, [*graph.results])
        assert x.device == META
        graphs._slots.take(run, 0, (2,))


def test_what_is_sent_from_a_slot_is_a_copy() -> None:
    graphs, run = stage_graphs([]), FakeRun()

    def backward(ctx: Any, arguments: list[Tensor]) -> list[Tensor]:
        return [*arguments, *arguments]

    graphs._slots.take(run, 0, (2,))
    for _ in range(2):  # also while it is looked at
        saved = torch.ones(2)
        sent, kept = graphs._compute("backward", run, 0, backward, CTX, [saved])
        assert kept is saved
        assert sent is not saved
        assert torch.equal(sent, saved)


def test_a_thread_captures_what_it_has_run_before() -> None:
    graphs, first, later = stage_graphs([]), FakeRun(), FakeRun()
    graphs._compute("forward", first, 0, twice, CTX, [torch.ones(2)])
    (phase,) = graphs._phases.values()
    assert phase.first == weakref.ref(first)
    assert not phase.may_be_replayed(first)
    assert phase.may_be_replayed(later)
    found: list[bool] = []

    def elsewhere() -> None:
        found.append(phase.may_be_replayed(later))

    for _ in range(2):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        phase.threads.clear()
    phase.threads.add(threading.get_ident())
    assert found[1] is False
