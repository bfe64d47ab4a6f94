"""How long a traced stage's phases take on a real device, by running what would run.

The stage's own generated functions, forward and backward, on tensors of the right looks with made
up values: floats at random, integers 0, booleans True. CPU workers share caches and memory, so all
of them run the stage at once, each with its own tensors and on its own cores, as they would in a
step; a few micro-batches go forward before they come back, so that what was saved is not still in
the cache. Gradients are added up, as a step does.

Times are means: what a step takes is a sum over many micro-batches, in which the slow ones count.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from autopipe.passes.codegen import HEADER, stage_function
from autopipe.passes.cost import PhaseSeconds, phase_seconds
from autopipe.planning.planner import StageTimer
from autopipe.planning.profile_calls import device_name, filled
from autopipe.runtime import workers
from autopipe.runtime.backends import backend_of
from autopipe.runtime.load import load_source
from autopipe.runtime.random import MicroBatchContext

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, fx

    from autopipe.passes.devices import Device
    from autopipe.passes.ir import StagePhases

MOST_AHEAD = 8
"""Micro-batches that go forward before the first comes back, at most."""

WARM_UP, LEAST, MOST, ENOUGH_SECONDS = 1, 4, 20, 0.5
"""Rounds before any is timed; timed rounds: at least, at most, and until they took so long."""

COPIES = 5
"""Copies that are timed, for the median."""


def measured_timers(
    devices: Sequence[torch.device], models: Sequence[Device]
) -> tuple[StageTimer, ...]:
    """A clock for each stage that runs it on the stage's device.

    Args:
        devices: where the stages will run.
        models: their devices in the table: for links, and for the shares of R, B and W in a
            backward, which runs in one go.
    """
    clocks = {}
    for device, model in zip(devices, models, strict=True):
        if device not in clocks:
            same = [d for d in devices if d == device]
            stopwatch = _Stopwatch(
                device, workers.cores_per_worker(same) if len(same) > 1 else None, model
            )
            clocks[device] = StageTimer(
                f"measured on {device_name(device)}",
                model.link,
                stopwatch.seconds,
                stopwatch.copying,
            )
    return tuple(clocks[device] for device in devices)


@dataclass
class _Stopwatch:
    """Times stages on a device; each graph once.

    Attributes:
        device: where.
        cores: for each worker that runs at the same time; None: one worker.
        model: for the shares of phases.
    """

    device: torch.device
    cores: list[set[int]] | None
    model: Device
    known: WeakKeyDictionary[fx.Graph, dict[int, PhaseSeconds]] = field(
        default_factory=WeakKeyDictionary
    )
    copied: dict[int, float] = field(default_factory=dict)

    def seconds(self, stage: StagePhases, in_flight: int) -> PhaseSeconds:
        """Mean times of the phases of one micro-batch."""
        known = self.known.setdefault(stage.graph, {})
        ahead = min(in_flight, MOST_AHEAD)
        if ahead not in known:
            known[ahead] = self._measured(stage, ahead)
        return known[ahead]

    def copying(self, nbytes: int) -> float:
        """Median time of a copy to new memory."""
        if nbytes not in self.copied:
            source = torch.ones(nbytes, dtype=torch.uint8, device=self.device)
            times = []
            for _ in range(COPIES):
                start = now(self.device)
                copy = source.clone()
                times.append(now(self.device) - start)
                del copy
            self.copied[nbytes] = statistics.median(times)
        return self.copied[nbytes]

    def _measured(self, stage: StagePhases, ahead: int) -> PhaseSeconds:
        names = {"F": "forward", "RBW": "backward"}
        parts = [
            stage_function(stage, letters, self.device, name) for letters, name in names.items()
        ]
        functions, _ = load_source("\n\n".join([HEADER.format(title="a stage by itself"), *parts]))
        count = len(self.cores or [None])
        barrier = threading.Barrier(count)
        rounds: list[list[tuple[float, float]]] = [[] for _ in range(count)]
        ends = [0.0]

        def task(index: int) -> None:
            try:
                run = _Rounds(stage, functions, self.device, ahead)
                for i in range(WARM_UP + MOST):
                    barrier.wait()
                    if i == WARM_UP and index == 0:
                        ends[0] = time.perf_counter() + ENOUGH_SECONDS
                    if i >= WARM_UP + LEAST:
                        barrier.wait()  # all see the same clock
                        if done[0]:
                            return
                    both = run.once()
                    if i >= WARM_UP:
                        rounds[index].append(both)
                    if index == 0 and i >= WARM_UP + LEAST - 1:
                        done[0] = time.perf_counter() > ends[0]
            except BaseException:
                barrier.abort()
                raise

        done = [False]
        with torch.random.fork_rng(devices=[]):
            workers.run_workers([partial(task, i) for i in range(count)], barrier.abort, self.cores)
        pairs = [pair for own in rounds for pair in own]
        forward, backward = (statistics.mean(column) for column in zip(*pairs, strict=True))
        shares = phase_seconds(stage, self.model)
        later = shares.total - shares.forward
        parts_ = [backward * s / later if later else 0.0 for s in shares[1:]]
        return PhaseSeconds(forward, *parts_)


class _Rounds:
    """One worker's tensors, and a round of forwards and backwards with them."""

    def __init__(
        self,
        stage: StagePhases,
        functions: dict[str, Callable[..., Any]],
        device: torch.device,
        ahead: int,
    ) -> None:
        self.stage, self.functions, self.device, self.ahead = stage, functions, device, ahead
        _, *nodes = [n for n in stage.graph.nodes if n.op == "placeholder"]
        holders = [n.meta["val"] for n in nodes]
        held, received = len(stage.state), len(stage.state) + len(stage.receives)
        self.held = [self._fill(t, 0.02) for t in holders[:held]]
        self.received, self.tangents = holders[held:received], holders[received:]

    def _fill(self, look: Tensor, scale: float = 1.0) -> Tensor:
        tensor = filled(look.shape, look.stride(), look.dtype, self.device)
        return tensor.mul_(scale) if tensor.is_floating_point() else tensor

    def once(self) -> tuple[float, float]:
        """Mean seconds of a forward and of a backward."""
        stage = self.stage
        arrived = [[self._fill(t) for t in self.received] for _ in range(self.ahead)]
        results = len(stage.returns) + len(stage.updates)
        totals: dict[int, Tensor] = {}

        def accumulate(i: int, gradient: Tensor) -> None:
            if i in totals:
                totals[i].add_(gradient)
            else:
                totals[i] = gradient.clone()

        contexts = [MicroBatchContext(0, stage.draws, m, accumulate) for m in range(self.ahead)]
        saved = []
        start = now(self.device)
        for ctx, values in zip(contexts, arrived, strict=True):
            found = self.functions["forward"](ctx, [*self.held, *values])
            saved.append(list(found[results:]))
            values.clear()
            del found
        forward = now(self.device) - start
        tangents = [[self._fill(t) for t in self.tangents] for _ in range(self.ahead)]
        start = now(self.device)
        for ctx in contexts:
            self.functions["backward"](ctx, [*self.held, *saved.pop(0), *tangents.pop(0)])
        return forward / self.ahead, (now(self.device) - start) / self.ahead


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    backend_of(device).synchronize(device)
    return time.perf_counter()
