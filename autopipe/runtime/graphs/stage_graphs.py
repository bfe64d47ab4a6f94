"""`StageGraphs`: the graphs of one stage in one program, and what runs without one."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from autopipe.errors import describe
from autopipe.runtime.memory import plain_parts

from .kept_sums import KeptSums
from .observed import Observed, ObservingContext, OpObserver, memory_like
from .phase_graph import CapturingContext, PhaseGraph, capture, copied
from .slots import StageSlots
from .stage_state import StageState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from autopipe.runtime.executor import Run
    from autopipe.runtime.random import MicroBatchContext
    from autopipe.runtime.transfer import WorkerDevice

    from .slots import Slot

    Action = Callable[..., None]
    Compute = Callable[[Any, list[Tensor]], Sequence[Any]]
    WatchOps = Callable[[OpObserver], AbstractContextManager[None]]


@dataclass(frozen=True)
class GraphedStage:
    """What a stage's graphs must know of its code.

    Attributes:
        index: the stage.
        sent: by kind of action ("forward", "backward" ...), how many results leave the stage.
        parameters: whose gradients it computes, in the order of its code.
        last: the kinds of action after which a micro-batch needs nothing of the stage any more.
    """

    index: int
    sent: Mapping[str, int]
    parameters: Sequence[str]
    last: frozenset[str]


@dataclass(eq=False)
class _Phase:
    """A phase: one function, for one size of its tensors.

    Attributes:
        first: the run that showed what it does.
        seen: what that was.
        threads: the threads, by their identifiers, in which it has run eagerly.
    """

    first: weakref.ref[Run] | None = None
    seen: Observed = field(default_factory=Observed)
    threads: set[int] = field(default_factory=set)

    def may_be_replayed(self, run: Run) -> bool:
        """Whether a later run than the first may replay it, or capture it in the calling thread.

        A capture cannot make what libraries keep per thread (a cuBLAS handle): the thread has run
        the phase before.
        """
        if self.first is None or self.first() is run:
            return False
        known = self.seen.obstacle is None and self.seen.computes  # an empty graph is none
        return known and threading.get_ident() in self.threads


class StageGraphs:
    """The graphs of one stage.

    Args:
        stage: what to know of its code.
        worker: where it runs.
        new_pool: makes the `GraphPool` of a slot.
        watch_ops: calls an `OpObserver` for every operator while its context is open.
        note: called with a text when a phase turns out to be one that cannot be captured.
    """

    def __init__(
        self,
        stage: GraphedStage,
        worker: WorkerDevice,
        new_pool: Callable[[], Any],
        watch_ops: WatchOps,
        note: Callable[[str], None],
    ) -> None:
        self._stage, self._worker = stage, worker
        self._watch_ops, self._note = watch_ops, note
        self._phases: dict[tuple[str, tuple[int, ...]], _Phase] = {}
        self._slots, self._state = StageSlots(new_pool), StageState()
        self._sums = KeptSums(stage.index, worker.device, stage.parameters)
        self._generators: dict[int, torch.Generator] = {}
        # In a graph, seeds of attention are on the device, which eager kernels expect on the host.
        self._moved: MutableMapping[Tensor, torch.device] = WeakTensorKeyDictionary()
        self._checked: weakref.ref[Run] | None = None
        self._ended: weakref.WeakKeyDictionary[Run, int] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # two calls of a pipeline may run at once

    def wrapped(self, kind: str, action: Action) -> Action:
        """An action of generated code that replays graphs.

        Args:
            kind: "forward", "recompute", "gradients", "weights" or "backward".
            action: called as ``(run, m, compute)``.
        """

        def graphed(run: Run, m: int, compute: Compute) -> None:
            action(run, m, partial(self._compute, kind, run, m, compute))
            if kind in self._stage.last:
                with self._lock:
                    self._end(run, m)

        return graphed

    def _end(self, run: Run, m: int) -> None:
        """A micro-batch needs nothing of the stage any more."""
        self._slots.give_back(run, m)
        self._ended[run] = self._ended.get(run, 0) + 1
        if self._ended[run] == len(run.program.sizes):
            self._sums.hand_over(run)

    def _compute(
        self,
        kind: str,
        run: Run,
        m: int,
        compute: Compute,
        ctx: MicroBatchContext,
        arguments: list[Tensor],
    ) -> Sequence[Any]:
        """Run a phase: what generated code calls in place of its function."""
        size = run.program.sizes[m], *ctx.sizes
        phase = self._phases.setdefault((compute.__name__, size), _Phase())
        sent = self._stage.sent.get(kind, 0)
        with self._lock:
            self._use_state(run, run.state(self._stage.index))
            slot = self._slots.of(run, m)
            if phase.may_be_replayed(run):
                if kind == "forward":
                    slot = self._slots.take(run, m, size)
                if slot is not None:
                    results = self._replayed(slot, phase, run, compute, ctx, arguments, sent)
                    if results is not None:
                        return results
                    if kind == "forward":
                        self._slots.give_back(run, m)
                        slot = None
        arguments[:] = [x.to(self._moved[x]) if x in self._moved else x for x in arguments]
        if slot is None:
            return self._eagerly(phase, run, compute, ctx, arguments)
        results = self._eagerly(phase, run, compute, ctx, arguments)
        # What is sent may be memory of the slot: a saved value, or a view of one.
        return [*map(copied, results[:sent]), *results[sent:]]

    def _use_state(self, run: Run, state: Sequence[Tensor]) -> None:
        """Forget graphs that read parameters or buffers where they are no more."""
        if self._checked is not None and self._checked() is run:
            return
        self._checked = weakref.ref(run)
        if not self._state.is_as_before(state):
            if self._worker.compute is not None:
                self._worker.compute.record_event().synchronize()  # replays that still run
            self._slots.clear()

    def _eagerly(
        self,
        phase: _Phase,
        run: Run,
        compute: Compute,
        ctx: MicroBatchContext,
        arguments: list[Tensor],
    ) -> Sequence[Any]:
        """Run a phase without a graph; look at what it does when it is the first time."""
        phase.threads.add(threading.get_ident())
        if phase.first is not None:
            return compute(ctx, arguments)
        seen = Observed()
        if not all(map(plain_parts, arguments)):
            seen.note("it is given a tensor whose memory is unknown, such as a sparse one")
        with self._watch_ops(OpObserver(seen, self._worker.device, arguments)):
            results = compute(ObservingContext(ctx, seen), arguments)
        seen.devices = [x.device if isinstance(x, torch.Tensor) else None for x in results]
        phase.seen, phase.first = seen, weakref.ref(run)
        if seen.obstacle is not None:
            self._explain(compute, seen.obstacle)
        return results

    def _replayed(
        self,
        slot: Slot,
        phase: _Phase,
        run: Run,
        compute: Compute,
        ctx: MicroBatchContext,
        arguments: list[Tensor],
        sent: int,
    ) -> Sequence[Any] | None:
        """Run a phase by its graph; None, with nothing done, if that is impossible."""
        state = run.state(self._stage.index)
        given = arguments[len(state) :]
        graph = slot.graphs.get(compute.__name__)
        if graph is None:
            graph = self._captured(slot, phase, compute, ctx, state, given)
        if graph is None or not self._sums.claim(run, phase.seen.sums):
            return None
        self._state.refresh(state)
        return graph.replay(ctx, given, sent)

    def _captured(
        self,
        slot: Slot,
        phase: _Phase,
        compute: Compute,
        ctx: MicroBatchContext,
        state: Sequence[Tensor],
        given: Sequence[Tensor],
    ) -> PhaseGraph | None:
        """Capture a phase for a slot; None if that fails, which is noted."""
        device, seen, pool = self._worker.device, phase.seen, slot.pool
        for i in seen.draws:
            if i not in self._generators:
                self._generators[i] = self._worker.backend.new_generator(device)
        generators = {i: self._generators[i] for i in seen.draws}
        capturing = CapturingContext(ctx, generators, self._sums.of(seen.sums), pool)
        try:
            own = [x if slot.owns(x) else memory_like(x) for x in given]
            graph = capture(pool, compute, capturing, self._state.in_place(state), own, generators)
        except Exception as error:  # torch raises many kinds, of which none says "capture"
            seen.note(describe(error))
            self._explain(compute, describe(error))
            return None
        slot.keep(compute.__name__, graph)
        for x, place in zip(graph.results, seen.devices, strict=True):
            if place is not None and x.device != place:
                self._moved[x] = place
        return graph

    def _explain(self, compute: Compute, reason: str) -> None:
        letters = compute.__name__.partition("_")[0]
        first = (reason.strip().splitlines() or ["?"])[0]
        self._note(f"phase {letters} of stage {self._stage.index}: {first}")
