"""`SavedValues`: what stages have saved for the backwards of micro-batches, counted.

It is on the stage's device, or, where generated code says so, on the host between an `offload` and
a `fetch`. Bytes count as on the device until `offload` is called, and again from `fetch` on: what
a copy still reads, or already writes, is not seen by the counters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from .memory import plain_parts
from .offload import HostCopies, Offloaded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from .memory import SavedBytes, SavedBytesCounter
    from .program import Program
    from .transfer import WorkerDevice

    Key = tuple[int, int]  # stage, micro-batch


@dataclass
class _Entry:
    """What is saved for one micro-batch at one stage.

    Attributes:
        offloaded: the tensors; nothing is away, or some are on the host, or on their way back.
        nbytes: of all of them.
        counted: the bytes that count on the device, and on the host.
        fetched: whether `fetch` was called.
    """

    offloaded: Offloaded
    nbytes: int
    counted: tuple[SavedBytes, ...]
    fetched: bool = True


@dataclass
class SavedValues:
    """What one run has saved.

    Args:
        program: that runs.
        state: per stage its parameters, buffers and constants.
        memory: counters to update.
    """

    program: Program
    state: Sequence[Sequence[Tensor]]
    memory: SavedBytesCounter
    _entries: dict[Key, _Entry] = field(default_factory=dict)
    _parts: dict[Key, int] = field(default_factory=dict)
    _copies: dict[WorkerDevice, HostCopies] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[Key, list[Tensor]]:
        """(stage, micro-batch) → what is saved; of what is on the host, its bytes there."""
        return {key: entry.offloaded.tensors for key, entry in self._entries.items()}

    @cached_property
    def _of_state(self) -> set[int]:
        """Addresses of the storages of parameters, buffers and constants."""
        parts = (x for t in chain.from_iterable(self.state) for x in plain_parts(t))
        return {x.untyped_storage().data_ptr() for x in parts}

    def add(
        self,
        stage: int,
        m: int,
        tensors: list[Tensor],
        caller: Mapping[int, Mapping[int, int]],
    ) -> None:
        """Save what a phase of a micro-batch computed for later ones.

        Args:
            stage, m: of whom.
            tensors: what is saved.
            caller: as for `SavedBytesCounter.add`.
        """
        part = self._parts[stage, m] = self._parts.get((stage, m), -1) + 1
        size = self.program.sizes[m]
        state = chain.from_iterable(self.state)
        counted = self.memory.add(self.program, stage, size, tensors, state, caller, part)
        found = Offloaded(tensors, {}, {}, 0)
        self._entries[stage, m] = _Entry(found, counted.nbytes, (counted,))

    def pop(self, stage: int, m: int) -> list[Tensor]:
        """Remove and return what a micro-batch saved, on its device."""
        if not self._entries.get((stage, m), _NOTHING).fetched:
            self.fetch(stage, m)
        entry = self._entries.pop((stage, m), _NOTHING)
        if not entry.offloaded.views:
            return entry.offloaded.tensors
        return self._host_copies(stage).restored(entry.offloaded)

    def offload(self, stage: int, m: int) -> None:
        """Start to copy to the host what a micro-batch saved."""
        entry = self._entries.get((stage, m))
        if entry is None:  # it saved nothing
            return
        tensors = entry.offloaded.tensors
        may = {*self.program.offloaded[self.program.sizes[m], stage]}
        parts = (x for i, t in enumerate(tensors) if i not in may for x in plain_parts(t))
        stays = self._of_state.union(x.untyped_storage().data_ptr() for x in parts)
        least = self.program.least_offloaded
        found = self._host_copies(stage).offload(tensors, stays, least)
        del tensors, parts
        del entry
        self._replace((stage, m), found, fetched=False)

    def fetch(self, stage: int, m: int) -> None:
        """Start to copy back to the device what a micro-batch saved."""
        entry = self._entries.get((stage, m))
        if entry is None or entry.fetched:
            return
        found = self._host_copies(stage).fetch(entry.offloaded)
        del entry
        self._replace((stage, m), found, fetched=True)

    def _replace(self, key: Key, found: Offloaded, *, fetched: bool) -> None:
        """Count anew what of an entry is on the device, and what on the host."""
        entry = self._entries.pop(key)
        away = 0 if fetched else found.nbytes
        entry.counted = ()  # so that nothing counts twice, not even for a moment
        counted = self.memory.divide(key[0], entry.nbytes - away, away)
        self._entries[key] = _Entry(found, entry.nbytes, counted, fetched)

    def _host_copies(self, stage: int) -> HostCopies:
        worker = self.program.workers[stage]
        if worker not in self._copies:
            self._copies[worker] = HostCopies(worker)
        return self._copies[worker]

    def clear(self) -> None:
        """Free everything."""
        self._entries.clear()
        self._copies.clear()


_NOTHING = _Entry(Offloaded([], {}, {}, 0), 0, ())
