"""Measure how long a traced stage's phases take on a real device.

The stage's generated forward and backward run on tensors of the traced shapes, strides and dtypes
with random values (integers 0, booleans True). CPU workers share caches and memory, so all of them
run the stage at the same time, each with its own tensors and on its own cores, as in a step.
Several micro-batches go forward before the first goes backward, so that saved activations have left
the cache, and gradients are summed, as in a step.

Times are means, not medians: a step's time is a sum over micro-batches, slow ones included.
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
from autopipe.passes.ir import phase_functions
from autopipe.planning.profile_calls import device_name, filled
from autopipe.planning.stage_timers import StageTimer
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
"""The largest number of micro-batches that go forward before the first goes backward."""

WARM_UP, LEAST, MOST, ENOUGH_SECONDS = 1, 4, 20, 0.5
"""Untimed rounds; then timed rounds: at least, at most, and until they took this long in all."""

COPIES = 5
"""Number of timed copies; the result is their median."""


def measured_timers(
    devices: Sequence[torch.device], of_stages: Sequence[torch.device], models: Sequence[Device]
) -> tuple[StageTimer, ...]:
    """Timers that run a stage on its device.

    Args:
        devices: all devices; each has a worker.
        of_stages: the device of each stage.
        models: device models of the stages: for the links, and to split a backward, which is timed
            as a whole, into R, B and W.

    Returns:
        One timer per stage; stages on the same device share one.
    """
    timers = {}
    for device, model in zip(of_stages, models, strict=True):
        if device not in timers:
            same = [d for d in devices if d == device]
            measured = _MeasuredDevice(
                device, workers.cores_per_worker(same) if len(same) > 1 else None, model
            )
            timers[device] = StageTimer(
                f"measured on {device_name(device)}",
                model.link,
                measured.seconds,
                measured.copying,
                model.host_link.seconds if model.host_link else None,
            )
    return tuple(timers[device] for device in of_stages)


@dataclass
class _MeasuredDevice:
    """Measures stages on one device, each graph once.

    Attributes:
        device: where the stages run.
        cores: CPU cores of each worker that runs at the same time; None: one worker.
        model: to split a backward into phases.
        times: by stage graph and micro-batches in flight.
        copy_times: by bytes.
    """

    device: torch.device
    cores: list[set[int]] | None
    model: Device
    times: WeakKeyDictionary[fx.Graph, dict[int, PhaseSeconds]] = field(
        default_factory=WeakKeyDictionary
    )
    copy_times: dict[int, float] = field(default_factory=dict)

    def seconds(self, stage: StagePhases, in_flight: int) -> PhaseSeconds:
        """Mean seconds of each phase for one micro-batch."""
        times = self.times.setdefault(stage.graph, {})
        ahead = min(in_flight, MOST_AHEAD)
        if ahead not in times:
            times[ahead] = self._measured(stage, ahead)
        return times[ahead]

    def copying(self, nbytes: int) -> float:
        """Median seconds of a copy of `nbytes` to newly allocated memory."""
        if nbytes not in self.copy_times:
            source = torch.ones(nbytes, dtype=torch.uint8, device=self.device)
            seconds = []
            for _ in range(COPIES):
                start = now(self.device)
                copy = source.clone()
                seconds.append(now(self.device) - start)
                del copy
            self.copy_times[nbytes] = statistics.median(seconds)
        return self.copy_times[nbytes]

    def _measured(self, stage: StagePhases, ahead: int) -> PhaseSeconds:
        """Run rounds of a stage on all workers at once until there are enough."""
        names = ("forward", "backward")
        parts = [
            stage_function(stage, function, self.device, name)
            for name, function in zip(names, phase_functions(stage, ("F", "RBW")), strict=True)
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
                        # All workers stop after the same round: one decides, between two barriers,
                        # so that all read the decision before the next one is made.
                        if index == 0:
                            done[0] = time.perf_counter() > ends[0]
                        barrier.wait()
                        if done[0]:
                            return
                    both = run.once()
                    if i >= WARM_UP:
                        rounds[index].append(both)
            except BaseException:
                barrier.abort()
                raise

        done = [False]
        with backend_of(self.device).fork_rng(self.device):
            workers.run_workers([partial(task, i) for i in range(count)], barrier.abort, self.cores)
        pairs = [pair for own in rounds for pair in own]
        forward, backward = (statistics.mean(column) for column in zip(*pairs, strict=True))
        estimate = phase_seconds(stage, self.model)
        total = estimate.total - estimate.forward
        rest = [backward * s / total if total else 0.0 for s in estimate[1:]]
        return PhaseSeconds(forward, *rest)


class _Rounds:
    """The tensors of one worker, and rounds of forwards and backwards with them.

    Args:
        stage: the traced stage.
        functions: its generated "forward" and "backward".
        device: where the tensors are.
        ahead: micro-batches in a round.
    """

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

    def _fill(self, traced: Tensor, scale: float = 1.0) -> Tensor:
        tensor = filled(traced.shape, traced.stride(), traced.dtype, self.device)
        return tensor.mul_(scale) if tensor.is_floating_point() else tensor

    def once(self) -> tuple[float, float]:
        """Run one round; return mean seconds of a forward and of a backward."""
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
    """Seconds on the host's clock once the device has finished all queued work."""
    backend_of(device).synchronize(device)
    return time.perf_counter()
