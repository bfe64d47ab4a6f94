"""Which micro-batch has which slot: as many as are in flight, given back with their run."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import torch

from autopipe.runtime.graphs.phase_graph import PhaseGraph
from autopipe.runtime.graphs.slots import StageSlots


class FakeRun:
    """As much of a run as has micro-batches."""

    program = SimpleNamespace(sizes=(2, 2, 2))


def run() -> Any:
    return FakeRun()


SIZE = (2,)


def test_a_slot_is_taken_and_given_back() -> None:
    slots, one = StageSlots(object), run()
    first = slots.take(one, 0, SIZE)
    second = slots.take(one, 1, SIZE)
    assert first is not None
    assert first is not second
    assert (slots.of(one, 0), slots.of(one, 1), slots.of(one, 2)) == (first, second, None)
    slots.give_back(one, 0)
    assert slots.of(one, 0) is None
    assert slots.take(one, 2, SIZE) is first
    assert slots.take(one, 0, (3,)) not in (first, second, None)
    assert second is not None
    assert first.pool is not second.pool  # they are replayed in any order


def test_no_more_than_a_run_has_micro_batches() -> None:
    slots, one, other = StageSlots(object), run(), run()
    taken = [slots.take(one, m, SIZE) for m in range(3)]
    assert slots.take(other, 0, SIZE) is None
    del one
    gc.collect()
    assert slots.take(other, 0, SIZE) is taken[0]


def test_cleared_slots_are_nobodys() -> None:
    slots, one = StageSlots(object), run()
    first = slots.take(one, 0, SIZE)
    slots.clear()
    assert slots.of(one, 0) is None
    assert slots.take(one, 0, SIZE) is not first
    slots.give_back(run(), 0)


def test_a_slot_owns_what_its_graphs_read_and_write() -> None:
    slot = StageSlots(object).take(run(), 0, SIZE)
    assert slot is not None
    given, result, other = (torch.ones(2) for _ in range(3))
    graph: Any = SimpleNamespace()
    slot.keep("F_0", PhaseGraph(graph, (given,), (result, None, 3), {}))
    assert list(slot.graphs) == ["F_0"]
    assert [slot.owns(x) for x in (given, result, other)] == [True, True, False]
