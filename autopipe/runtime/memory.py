"""Bytes that stages keep between forward and backward, counted while they are kept.

Counted are distinct storages, whole even if only a view of one is kept, without those of parameters
and buffers; of the caller's own batch, the part that a micro-batch is.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@dataclass
class StageMemory:
    """Bytes of saved values at one stage.

    Attributes:
        now: held at this moment.
        peak: the most held at once since `SavedBytes.reset`.
        per_microbatch: what one micro-batch saves, by its size in samples.
    """

    now: int = 0
    peak: int = 0
    per_microbatch: dict[int, int] = field(default_factory=dict)


class SavedBytes:
    """The counters of a pipeline: `stages[k]` is a `StageMemory`."""

    def __init__(self, stages: int) -> None:
        self.stages = [StageMemory() for _ in range(stages)]
        self._lock = threading.Lock()
        self._known: dict[Any, int] = {}

    def reset(self) -> None:
        """Start a new peak."""
        for stage in self.stages:
            stage.peak = stage.now

    def kept(
        self,
        program: Any,
        stage: int,
        size: int,
        saved: list[Tensor],
        held: Iterable[Tensor],
        borrowed: set[int],
    ) -> int:
        """Note that a micro-batch's values are kept; returns their bytes.

        Shapes are static, so the first micro-batch of a size speaks for all of its program.

        Args:
            program, stage, size: what the count is known by.
            saved: the values.
            held: tensors that are there anyway; their memory counts nothing.
            borrowed: addresses of the caller's memory: of a batch, a micro-batch counts its part.
        """
        key = (program, stage, size)
        if key not in self._known:
            theirs = {t.untyped_storage().data_ptr() for t in held}
            sizes: dict[int, int] = {}
            for tensor in saved:
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                if address in borrowed:
                    sizes[tensor.data_ptr()] = tensor.nbytes
                elif address not in theirs:
                    sizes[address] = storage.nbytes()
            self._known[key] = sum(sizes.values())
        nbytes = self._known[key]
        with self._lock:
            counter = self.stages[stage]
            counter.per_microbatch[size] = nbytes
            counter.now += nbytes
            counter.peak = max(counter.peak, counter.now)
        return nbytes

    def released(self, stage: int, nbytes: int) -> None:
        with self._lock:
            self.stages[stage].now -= nbytes
