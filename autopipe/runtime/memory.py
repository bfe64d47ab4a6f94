"""Count the bytes of saved activations per stage while a pipeline runs.

Each storage counts once, and as a whole even if only a view of it is saved. Storages of parameters
and buffers do not count. Of the caller's batch, only the micro-batch counts, as a whole even
if only a part of it is saved.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors whose memory a tensor uses.

    Args:
        tensor: a wrapper of others (a quantised weight) has no memory of its own.

    Returns:
        The tensor itself; of a wrapper the tensors that it lists (``__tensor_flatten__``), none if
        it lists none.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [x for name in names for x in plain_parts(getattr(tensor, name))]
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper that does not tell its parts
        return []
    return [tensor]


def without_rest(tensor: Tensor, is_kept_anyway: Callable[[int], bool]) -> Tensor:
    """A tensor that keeps no more memory alive than it needs.

    Args:
        tensor: that is kept for long.
        is_kept_anyway: from the address of a storage, whether it is kept by others too.

    Returns:
        A copy if the tensor is a part of a larger one that nothing else keeps; else the tensor.
    """
    parts = plain_parts(tensor)
    if not (len(parts) == 1 and parts[0] is tensor):
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() <= tensor.nbytes or is_kept_anyway(storage.data_ptr()):
        return tensor
    return tensor.clone()


class SavedBytes:
    """Bytes that count for as long as this object lives.

    (A destructor in Python would be called in the middle of anything: within a lock that it needs,
    or when Ctrl-C arrives, which it would lose.)
    """

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class _Counted(weakref.ref[SavedBytes]):
    """Refers to bytes that count, and remembers how many after they are gone."""

    __slots__ = ("nbytes",)
    nbytes: int


@dataclass
class StageMemory:
    """Bytes of saved activations at one stage, or on one device.

    Attributes:
        peak: the largest value of `now` since `SavedBytesCounter.reset`.
        per_microbatch: bytes that one micro-batch saves, by its size in samples.
    """

    peak: int = 0
    per_microbatch: dict[int, int] = field(default_factory=dict)
    _saved: set[_Counted] = field(default_factory=set, repr=False)
    _total: int = field(default=0, repr=False)  # of `_saved`
    _gone: deque[_Counted] = field(default_factory=deque, repr=False)  # those no longer saved

    @property
    def now(self) -> int:
        """Bytes saved at this moment."""
        return self._total - sum(ref.nbytes for ref in self._gone.copy())

    def add(self, saved: SavedBytes) -> None:
        """Count bytes, and forget those that are no longer saved."""
        while self._gone:
            ref = self._gone.popleft()
            self._total -= ref.nbytes
            self._saved.discard(ref)
        # What is called when `saved` is freed is no Python code: see `SavedBytes`.
        ref = _Counted(saved, self._gone.append)
        ref.nbytes = saved.nbytes
        self._saved.add(ref)
        self._total += ref.nbytes
        self.peak = max(self.peak, self._total)


class SavedBytesCounter:
    """``pipe.memory``: the counters of a pipeline.

    Args:
        homes: for each stage the index of its device.

    Attributes:
        stages: a `StageMemory` for each stage.
        devices: a `StageMemory` for each device: of all its stages at the same time.
        hosts: a `StageMemory` for each stage: what it has offloaded to the host.
    """

    homes: tuple[int, ...] = ()

    def __init__(self, homes: Sequence[int]) -> None:
        self.place(homes)
        self._lock = threading.Lock()
        # Of one micro-batch, by program, and by stage, size and part.
        self._nbytes: WeakKeyDictionary[Any, dict[tuple[int, int, int], int]] = WeakKeyDictionary()

    def place(self, homes: Sequence[int]) -> None:
        """Say where stages are; counts start anew if they were elsewhere.

        Args:
            homes: for each stage the index of its device.
        """
        if self.homes == tuple(homes):
            return
        self.homes = tuple(homes)
        self.stages = [StageMemory() for _ in homes]
        self.devices = [StageMemory() for _ in set(homes)]
        self.hosts = [StageMemory() for _ in homes]

    def reset(self) -> None:
        """Reset the peaks to the bytes saved now."""
        for part in (*self.stages, *self.devices, *self.hosts):
            part.peak = part.now

    def add(
        self,
        program: Any,
        stage: int,
        size: int,
        saved: list[Tensor],
        state: Iterable[Tensor],
        caller: Mapping[int, Mapping[int, int]],
        part: int = 0,
    ) -> SavedBytes:
        """Count the saved activations of one micro-batch.

        Shapes are static: the first micro-batch of a size is measured, and the others of the same
        program, stage, size and part count the same.

        Args:
            program: an object that identifies the program and its shapes; it is not kept alive.
            stage: the stage that saves.
            size: samples in the micro-batch.
            saved: the tensors.
            state: parameters, buffers and constants of all stages, which do not count.
            caller: the address of each storage of the caller's → the address of each tensor in it
                that the micro-batch was fed with → its bytes.
            part: 0 after the forward; 1, 2 … after parts of the backward.

        Returns:
            The bytes, which count until the caller drops them.
        """
        known, key = self._nbytes.setdefault(program, {}), (stage, size, part)
        if key not in known:
            not_counted = {x.untyped_storage().data_ptr() for t in state for x in plain_parts(t)}
            sizes: dict[int, int] = {}
            for tensor in (x for t in saved for x in plain_parts(t)):
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                if address in caller:
                    fed = caller[address]
                    start = max((a for a in fed if a <= tensor.data_ptr()), default=min(fed))
                    sizes[start] = fed[start]
                elif address not in not_counted:
                    sizes[address] = storage.nbytes()
            known[key] = sum(sizes.values())
        saved_bytes = SavedBytes(known[key])
        with self._lock:
            if part == 0:
                self.stages[stage].per_microbatch[size] = saved_bytes.nbytes
            self.stages[stage].add(saved_bytes)
            self.devices[self.homes[stage]].add(saved_bytes)
        return saved_bytes

    def divide(self, stage: int, here: int, away: int) -> tuple[SavedBytes, SavedBytes]:
        """Count anew what a micro-batch saves, when a part of it leaves its device or returns.

        Args:
            stage: the stage that saves.
            here: bytes on the stage's device.
            away: bytes on the host.

        Returns:
            Both, which count until the caller drops them.
        """
        one, two = SavedBytes(here), SavedBytes(away)
        with self._lock:
            self.stages[stage].add(one)
            self.devices[self.homes[stage]].add(one)
            self.hosts[stage].add(two)
        return one, two
