"""`Program`: a generated program that is loaded, and what running it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .transfer import WorkerDevice


@dataclass(frozen=True, eq=False)
class Program:
    """A loaded program and what running it needs.

    Attributes:
        forward: one function of a `Run` per device; empty if there is a `step`.
        backward: likewise; empty for inference, too.
        step: likewise: forward and backward in one, where a backward begins before the last forward
            has ended.
        drivers: the worker that runs each function.
        workers: the worker of each stage.
        sizes: samples per micro-batch.
        draws: per micro-batch size and stage, its random ops (see `MicroBatchContext`).
        strides: (value, stage, micro-batch size) → the strides that the stage was traced with, in
            elements, for values that the caller passes in.
        filename: the name under which `linecache` has the source.
        symbols: per micro-batch size, the values of the symbolic sizes in the code, in its order.
        queues: (value, receiving stage) → messages that may be in transit at once.
        offloaded: (micro-batch size, stage) → indices of the saved tensors that may be offloaded.
        least_offloaded: bytes of the smallest that is.
        shares_core: whether CPU workers are faster on one core: see `cores_per_worker`.
    """

    forward: tuple[Callable[[Any], None], ...]
    backward: tuple[Callable[[Any], None], ...]
    step: tuple[Callable[[Any], None], ...]
    drivers: tuple[WorkerDevice, ...]
    workers: tuple[WorkerDevice, ...]
    sizes: tuple[int, ...]
    draws: Mapping[int, Sequence[Sequence[tuple[int, int, bool]]]]
    strides: Mapping[tuple[str, int, int], tuple[int, ...]]
    filename: str
    symbols: Mapping[int, tuple[int, ...]]
    queues: Mapping[tuple[str, int], int]
    offloaded: Mapping[tuple[int, int], Sequence[int]] = field(default_factory=dict)
    least_offloaded: int = 0
    shares_core: bool = False

    @property
    def trains(self) -> bool:
        """Whether it computes gradients."""
        return bool(self.backward or self.step)

    @property
    def is_random(self) -> bool:
        """Whether some op draws random numbers."""
        return any(draws for stages in self.draws.values() for draws in stages)
