"""`StageSlots`: which micro-batch in flight has which graphs, and so which memory."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from autopipe.runtime.executor import Run

    from .phase_graph import PhaseGraph


class Slot:
    """The graphs, and the memory, of one micro-batch at a time.

    Args:
        pool: a `GraphPool`, of its graphs. They run in the order in which they are captured, and
            only so may one use memory that another has freed: those of two slots run in any order.

    Attributes:
        pool: likewise.
        graphs: by the names of phases' functions.
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.graphs: dict[str, PhaseGraph] = {}
        self._own: dict[int, Any] = {}
        self._lease: weakref.ref[_Lease] | None = None

    @property
    def is_free(self) -> bool:
        """Whether no micro-batch has it."""
        return self._lease is None or self._lease() is None

    def keep(self, function: str, graph: PhaseGraph) -> None:
        """Add the graph of a phase, with the memory that it reads and writes.

        Args:
            function: of the phase.
            graph: captured for this slot.
        """
        self.graphs[function] = graph
        self._own |= {id(x): x for x in (*graph.given, *graph.results)}

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor is one that the slot's graphs read or write: it stays where it is."""
        return id(tensor) in self._own

    def lease(self) -> _Lease:
        """Give it to a micro-batch, until the lease is dropped."""
        lease = _Lease(self)
        self._lease = weakref.ref(lease)
        return lease


class _Lease:
    """Says that a micro-batch has a slot. It goes with the run that holds it."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot


class StageSlots:
    """The slots of a stage, for each size of micro-batches.

    Args:
        new_pool: makes the pool of a slot.
    """

    def __init__(self, new_pool: Callable[[], Any]) -> None:
        self._new_pool = new_pool
        self._slots: dict[tuple[int, ...], list[Slot]] = {}
        self._leases: weakref.WeakKeyDictionary[Run, dict[int, _Lease]]
        self._leases = weakref.WeakKeyDictionary()

    def take(self, run: Run, m: int, sizes: tuple[int, ...]) -> Slot | None:
        """Give a micro-batch a slot.

        Args:
            run: in which it runs.
            m: the micro-batch.
            sizes: of its tensors.

        Returns:
            The slot; None if there are as many in use as a run has micro-batches.
        """
        slots = self._slots.setdefault(sizes, [])
        slot = next((s for s in slots if s.is_free), None)
        if slot is None:
            if len(slots) >= len(run.program.sizes):
                return None
            slot = Slot(self._new_pool())
            slots.append(slot)
        self._leases.setdefault(run, {})[m] = slot.lease()
        return slot

    def of(self, run: Run, m: int) -> Slot | None:
        """The slot that a micro-batch has; None if it has none."""
        lease = self._leases.get(run, {}).get(m)
        return None if lease is None else lease.slot

    def give_back(self, run: Run, m: int) -> None:
        """A micro-batch is done with its slot, if it has one."""
        self._leases.get(run, {}).pop(m, None)

    def clear(self) -> None:
        """Forget all slots; micro-batches that have one lose it."""
        self._slots.clear()
        self._leases.clear()
