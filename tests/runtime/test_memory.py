"""Bytes kept between forward and backward: counted by hand, and by autograd's own hooks."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.runtime.executor import Run
from autopipe.runtime.memory import SavedBytesCounter, without_rest
from tests.support.agreement import pipelined

pytestmark = pytest.mark.usefixtures("alike_models_once")

WIDTH, BATCH, CHUNKS = 8, 8, 4
SIZE = BATCH // CHUNKS
ROW = WIDTH * 4
"""Bytes of one sample between layers."""


class Layers(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Program:
    """Stands for a program: shapes are static in each."""


P, Q = Program(), Program()


def kept(memory: SavedBytesCounter, saved: list[Tensor], state: list[Tensor], **more: Any) -> int:
    caller = more.get("caller", {})
    found = memory.add(more.get("program", P), 0, more.get("size", 2), saved, state, caller)
    return found.nbytes


# ------------------------------------------------------------------------------- the counter


def test_bytes_are_added_and_taken_away() -> None:
    memory = SavedBytesCounter([0, 1])
    first = memory.add(P, 0, 2, [torch.zeros(10)], [], {})
    other = memory.add(P, 1, 2, [torch.zeros(5, dtype=torch.float64)], [], {})
    again = memory.add(P, 0, 2, [torch.zeros(10)], [], {})
    assert [x.nbytes for x in (first, other, again)] == [40, 40, 40]
    assert [s.now for s in memory.stages] == [80, 40]
    del first
    assert [(s.now, s.peak) for s in memory.stages] == [(40, 80), (40, 40)]
    del again, other
    assert [(s.now, s.peak) for s in memory.stages] == [(0, 80), (0, 40)]
    memory.reset()
    assert [(s.now, s.peak) for s in memory.stages] == [(0, 0), (0, 0)]


def test_a_counter_keeps_no_program_alive() -> None:
    memory, program = SavedBytesCounter([0]), Program()
    kept(memory, [torch.zeros(10)], [], program=program)
    ref = weakref.ref(program)
    del program
    assert ref() is None
    assert len(memory._nbytes) == 0


def test_a_new_peak_starts_from_what_is_held() -> None:
    memory = SavedBytesCounter([0])
    kept(memory, [torch.zeros(10)], [])
    held = memory.add(P, 0, 2, [torch.zeros(10)], [], {})
    assert memory.stages[0].peak == held.nbytes
    memory.reset()
    assert memory.stages[0].peak == 40


def test_a_collection_while_bytes_are_added() -> None:
    """It may free a forward that had no backward: nothing of it waits for a lock."""
    pipe = pipelined(Layers(), chunks=CHUNKS, remat="none")
    x = torch.randn(BATCH, WIDTH)
    pipe(x).sum().backward()

    class Collects(dict[int, int]):
        def __setitem__(self, size: int, nbytes: int) -> None:
            gc.collect()
            super().__setitem__(size, nbytes)

    for stage in pipe.memory.stages:
        stage.per_microbatch = Collects()
    cycle: list[Any] = [pipe(x)]
    cycle.append(cycle)
    del cycle
    thread = threading.Thread(target=lambda: pipe(x).sum().backward(), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert [s.now for s in pipe.memory.stages] == [0, 0]


def test_memory_counts_once_and_whole() -> None:
    """Views share their storage; a slice keeps all of it alive."""
    value = torch.zeros(100)
    memory = SavedBytesCounter([0])
    assert kept(memory, [value, value.view(10, 10), value[:3]], []) == 400
    assert kept(memory, [value[:3]], [], program=Q) == 400


def test_parameters_and_their_views_do_not_count() -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    memory = SavedBytesCounter([0])
    assert kept(memory, [weight.detach().t(), torch.zeros(6)], [weight]) == 24


def test_of_the_callers_batch_a_micro_batch_counts_its_part() -> None:
    batch = torch.zeros(8, 6)
    memory = SavedBytesCounter([0])
    part = batch[2:4]
    caller = {batch.untyped_storage().data_ptr(): {part.data_ptr(): part.nbytes}}
    assert kept(memory, [part, part.view(-1)], [], caller=caller) == 2 * 6 * 4
    assert kept(memory, [part[:, 3:]], [], caller=caller, size=3) == 2 * 6 * 4


def test_two_arguments_may_be_parts_of_one_tensor_of_the_callers() -> None:
    """Tokens and labels of a language model are often slices of the same rows."""
    rows = torch.zeros(8, 6)
    tokens, labels = rows[2:4, :-1], rows[2:4, 1:]
    fed = {t.data_ptr(): t.nbytes for t in (tokens, labels)}
    caller = {rows.untyped_storage().data_ptr(): fed}
    memory = SavedBytesCounter([0])
    assert kept(memory, [tokens, labels], [], caller=caller) == 2 * 2 * 5 * 4
    assert kept(memory, [labels[1:]], [], caller=caller, size=3) == 2 * 5 * 4


def test_each_size_and_program_is_counted_for_itself() -> None:
    memory = SavedBytesCounter([0])
    assert kept(memory, [torch.zeros(3)], [], size=3) == 12
    assert kept(memory, [torch.zeros(2)], [], size=2) == 8
    assert kept(memory, [torch.zeros(30)], [], size=3, program=Q) == 120
    assert memory.stages[0].per_microbatch == {3: 120, 2: 8}


# ------------------------------------------------------------------------------- a pipeline's


def saved_by_autograd(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct memory that eager autograd saves for a forward, parameters aside."""
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(sizes.values())


def test_full_keeps_boundary_inputs_and_nothing_else() -> None:
    pipe = pipelined(Layers(), chunks=CHUNKS, remat="full")
    loss = pipe(torch.randn(BATCH, WIDTH)).sum()
    for stage in pipe.memory.stages:
        assert stage.per_microbatch == {SIZE: SIZE * ROW}
        assert stage.now == stage.peak == CHUNKS * SIZE * ROW  # GPipe: all are in flight
    loss.backward()
    assert [s.now for s in pipe.memory.stages] == [0, 0]


def test_none_keeps_what_autograd_would() -> None:
    model = Layers()
    pipe = pipelined(model, chunks=CHUNKS, remat="none")
    pipe(torch.randn(BATCH, WIDTH)).sum().backward()
    first, last = Layers(2), Layers(2)
    assert [[len(s.parameters)] for s in pipe.stages] == [[4], [4]]
    x = torch.randn(SIZE, WIDTH)
    assert pipe.memory.stages[0].per_microbatch[SIZE] == saved_by_autograd(first, x)
    assert pipe.memory.stages[1].per_microbatch[SIZE] == saved_by_autograd(last, x)


def test_policies_in_order() -> None:
    peaks = {}
    for remat in ("full", "min-cut", "none"):
        pipe = pipelined(Layers(8), chunks=CHUNKS, remat=remat)
        pipe(torch.randn(BATCH, WIDTH)).sum().backward()
        peaks[remat] = sum(s.peak for s in pipe.memory.stages)
    assert peaks["full"] < peaks["none"]
    assert peaks["full"] <= peaks["min-cut"] <= peaks["none"]


def test_uneven_micro_batches() -> None:
    pipe = pipelined(Layers(), chunks=3, remat="full")
    pipe(torch.randn(7, WIDTH)).sum()
    assert pipe.memory.stages[1].per_microbatch == {3: 3 * ROW, 2: 2 * ROW}
    assert pipe.memory.stages[1].peak == 7 * ROW


def test_inference_keeps_nothing() -> None:
    pipe = pipelined(Layers(), chunks=CHUNKS, remat="none")
    with torch.no_grad():
        result = pipe(torch.randn(BATCH, WIDTH))
    assert result.shape == (BATCH, WIDTH)
    assert [(s.now, s.peak) for s in pipe.memory.stages] == [(0, 0), (0, 0)]


def test_a_forward_whose_backward_never_comes() -> None:
    pipe = pipelined(Layers(), chunks=CHUNKS, remat="none")
    loss = pipe(torch.randn(BATCH, WIDTH)).sum()
    assert all(s.now > 0 for s in pipe.memory.stages)
    del loss
    gc.collect()
    assert [s.now for s in pipe.memory.stages] == [0, 0]


def test_two_forwards_are_counted_together() -> None:
    pipe = pipelined(Layers(), chunks=CHUNKS, remat="full")
    first = pipe(torch.randn(BATCH, WIDTH)).sum()
    second = pipe(torch.randn(BATCH, WIDTH)).sum()
    once = CHUNKS * SIZE * ROW
    assert [s.now for s in pipe.memory.stages] == [2 * once] * 2
    second.backward()
    assert [s.now for s in pipe.memory.stages] == [once] * 2
    first.backward()
    again = 2 * SIZE * ROW  # of its two layers, while it waits for the gradient
    peaks = [(s.now, s.peak) for s in pipe.memory.stages]
    assert peaks == [(0, 2 * once + again), (0, 2 * once)]


@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
def test_nothing_that_was_kept_is_left(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    save = Run.save

    def watch(self: Run, stage: int, m: int, saved: list[Tensor]) -> None:
        seen.extend(weakref.ref(t) for t in saved)
        save(self, stage, m, saved)

    monkeypatch.setattr(Run, "save", watch)
    pipe = pipelined(Layers(), chunks=CHUNKS, remat=remat)
    x = torch.randn(BATCH, WIDTH)
    pipe(x).sum().backward()
    gc.collect()
    assert seen
    assert [r for r in seen if r() is not None] == []


@pytest.mark.full
def test_steps_do_not_grow() -> None:
    pipe = pipelined(Layers(), chunks=CHUNKS, remat="none")
    x = torch.randn(BATCH, WIDTH)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(2):
        pipe(x).sum().backward()
    before = tensors()
    for _ in range(20):
        pipe(x).sum().backward()
    assert tensors() == before


def test_a_part_of_a_tensor_is_copied_if_nothing_else_keeps_the_whole() -> None:
    whole = torch.randn(4, 8)
    part = whole[:, :2]
    copy = without_rest(part, lambda address: False)
    assert torch.equal(copy, part)
    assert copy.untyped_storage().nbytes() == part.nbytes
    assert without_rest(whole, lambda address: False) is whole
    own = whole.untyped_storage().data_ptr()
    assert without_rest(part, lambda address: address == own) is part
    wide = whole[0].expand(9, 8)  # more entries than memory: a copy would take more
    assert without_rest(wide[:, :4], lambda address: False).untyped_storage().nbytes() <= 9 * 4 * 4
