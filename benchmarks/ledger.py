"""Bytes that each stage really occupies while a pipeline runs, as if its devices were apart.

Every operator that a worker calls is watched (a dispatch mode on its thread): the storages that it
makes are that stage's until they are gone. What one stage sends to another is copied, as between
two devices, and the copy is the receiver's; so is what the caller gives. Parameters and buffers are
left out, also where a stage sends a part of one: the plans are of one device, on which all stages
have them. Gradients that are summed are in. Workspaces within a kernel are not seen.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from autopipe.runtime import executor, transfer, workers


class Ledger:
    """Live bytes and their peak, by stage."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._state = {t.untyped_storage().data_ptr() for t in tensors}
        self._lock = threading.Lock()
        self._known: set[int] = set()
        self.now: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()

    def is_state(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer, or a part of one."""
        return tensor.untyped_storage().data_ptr() in self._state

    def hold(self, tensor: Tensor, stage: int) -> None:
        """A storage is a stage's until it is gone; seen again, nothing happens."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        with self._lock:
            if not address or address in self._state or address in self._known:
                return
            self._known.add(address)
            self.now[stage] += storage.nbytes()
            self.peak[stage] = max(self.peak[stage], self.now[stage])
        weakref.finalize(storage, self._gone, address, stage, storage.nbytes())

    def _gone(self, address: int, stage: int, nbytes: int) -> None:
        with self._lock:
            self._known.discard(address)
            self.now[stage] -= nbytes


class _Watch(TorchDispatchMode):
    def __init__(self, ledger: Ledger, stage: int) -> None:
        super().__init__()
        self.ledger, self.stage = ledger, stage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.ledger.hold(value, self.stage)
        return result


@contextmanager
def watching(model: nn.Module) -> Iterator[Ledger]:
    """Keep a ledger of the pipelines of CPU workers that run meanwhile."""
    ledger = Ledger(model)
    run = workers.run_workers

    def watched(tasks: Sequence[Callable[[], None]], abort: Callable[[], None], *more: Any) -> None:
        def task(stage: int) -> None:
            with _Watch(ledger, stage):
                tasks[stage]()

        run([partial(task, k) for k in range(len(tasks))], abort, *more)

    def copied(tensor: Tensor, stage: int) -> Tensor:
        if ledger.is_state(tensor):
            return tensor
        with _disable_current_modes():
            copy = tensor.clone()
        ledger.hold(copy, stage)
        return copy

    def moved(self: executor.Run, tensor: Tensor, source: int, to: int) -> transfer.SentTensor:
        return move(self, copied(tensor, to), source, to)

    def received(self: executor.Run, what: str, stage: int, m: int) -> Tensor:
        if (fed := self.inputs.get((what, stage, m))) is not None:
            self.inputs[what, stage, m] = copied(fed, stage)
        return take(self, what, stage, m)

    move, take = executor.Run._moved, executor.Run.receive
    workers.run_workers = watched
    executor.Run.receive = received  # type: ignore[method-assign]
    executor.Run._moved = moved  # type: ignore[method-assign]
    try:
        yield ledger
    finally:
        workers.run_workers = run
        executor.Run._moved = move  # type: ignore[method-assign]
        executor.Run.receive = take  # type: ignore[method-assign]
