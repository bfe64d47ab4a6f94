"""Graphs on simulated devices: operators that are captured, and run when they are replayed.

As on CUDA, a captured operator does not run: what it returns holds no values before a replay. A
replay is one launch in the current stream. It uses the memory that the capture saw, whoever has
freed it since. What a capture frees is used by the next ones of the same pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autopipe.runtime.random import default_generator_lock

from .blocks import Block

if TYPE_CHECKING:
    from .machine import Machine
    from .streams import Stream

NO_INTEGER = 1 << 40
"""What integers hold before a replay."""


class CaptureFailedError(RuntimeError):
    """Something that a stream cannot do while it captures."""


class Captured(NamedTuple):
    """One captured operator.

    Attributes:
        op: what is called.
        leaves, spec: its arguments, with CPU tensors.
        results: the CPU tensors that it writes anew, by their positions among its results.
        generator: what it draws from although it takes no generator.
    """

    op: Any
    leaves: list[Any]
    spec: Any
    results: dict[int, Tensor]
    generator: torch.Generator | None


class SimulatedGraph:
    """What was captured.

    Args:
        pool: of the worker.
    """

    def __init__(self, pool: SimulatedGraphPool) -> None:
        self.pool = pool
        self.generators: list[torch.Generator] = []
        self.ops: list[Captured] = []
        self.seconds = 0.0
        self._read: dict[int, tuple[weakref.ref[Block], str]] = {}
        self._made: dict[int, weakref.ref[Block]] = {}
        self._written: set[int] = set()
        self._places: set[int] = set()

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def record(self, op: Any, args: Any, kwargs: Any, changed: set[int]) -> Any:
        """Capture an operator.

        Args:
            op, args, kwargs: the call.
            changed: the tensors, by id, that it writes to.
        """
        from .tensors import SimulatedTensor, is_view, on_cpu

        machine = self.pool.machine
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, SimulatedTensor)]
        known = {id(x) for x in tensors}
        odd = [x for x in leaves if isinstance(x, Tensor) and id(x) not in known and x.ndim]
        if odd:
            raise CaptureFailedError(f"{op} reads memory of the host")
        plain = [x.values if isinstance(x, SimulatedTensor) else on_cpu(x) for x in leaves]
        tried = [
            x.values.clone() if id(x) in changed else y for x, y in zip(leaves, plain, strict=True)
        ]
        a, k = pytree.tree_unflatten(tried, spec)
        with _disable_current_modes():
            found = op(*a, **k)
        self.seconds += 0.0 if is_view(op) and not changed else machine.cost(op, self.pool.device)
        for x in tensors:
            if x.block.number not in self._made:
                self._read[x.block.number] = weakref.ref(x.block), x.block.what
            if id(x) in changed:
                self._written.add(x.block.number)
        blocks = {x.values.untyped_storage()._cdata: x.block for x in tensors}
        originals = {id(t): x for t, x in zip(tried, leaves, strict=True) if id(x) in changed}
        results: dict[int, Tensor] = {}
        values, result_spec = pytree.tree_flatten(found)
        if not any(isinstance(v, Tensor) for v in values) and values:
            raise CaptureFailedError(f"{op} returns a number: the host would have to wait")
        wrapped = []
        for i, value in enumerate(values):
            if not isinstance(value, Tensor) or id(value) in originals:
                wrapped.append(originals.get(id(value), value))
                continue
            storage = value.untyped_storage()._cdata
            if storage not in blocks:
                blocks[storage] = block = Block(machine, None, str(op))
                self._made[block.number] = weakref.ref(block)
                self._places.add(self.pool.place(block, value.untyped_storage().nbytes(), value))
                results[i] = value
            elif not is_view(op):
                results[i] = value
            wrapped.append(SimulatedTensor(value, self.pool.device, blocks[storage]))
        self.ops.append(Captured(op, plain, spec, results, self._generator(op, leaves)))
        return pytree.tree_unflatten(wrapped, result_spec)

    def _generator(self, op: Any, leaves: list[Any]) -> torch.Generator | None:
        """What an operator draws from, if it takes no generator; it must be registered."""
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return None
        given = [x for x in leaves if isinstance(x, torch.Generator)]
        used = [*given, *self.pool.default[-1:]]
        if not used or not any(used[0]._cdata == g._cdata for g in self.generators):
            raise CaptureFailedError(f"{op} draws from a generator that is not registered")
        return None if given else used[0]

    def forget_values(self) -> None:
        """Nothing has run: no result holds a value."""
        for op in self.ops:
            for value in op.results.values():
                if value.is_floating_point() or value.is_complex():
                    value.fill_(float("nan"))
                elif value.dtype is not torch.bool:
                    value.fill_(NO_INTEGER % torch.iinfo(value.dtype).max)

    def replay(self) -> None:
        machine = self.pool.machine
        with default_generator_lock, machine.lock:
            stream = machine.current_stream(self.pool.device)
            tick = stream.tick(self.seconds)
            machine.counts["replays"] += 1
            machine.counts["kernels"] += 1
            for number, (reference, what) in self._read.items():
                block = reference()
                if block is None:
                    machine.race(f"a graph is replayed that uses memory of {what}, which is freed")
                else:
                    block.access(stream.clock, stream, tick, "a graph", number in self._written)
            for made in self._made.values():
                block = made()
                if block is not None:
                    block.access(stream.clock, stream, tick, "a graph", True)
            with _disable_current_modes():
                self.pool.overwrite(self._places - {*self._live_places()})
                for op in self.ops:
                    _run(op)

    def _live_places(self) -> Iterator[int]:
        """Where the blocks lie that this graph has made, and that are still held."""
        for number in self._made:
            if number in self.pool.live:
                yield self.pool.live[number].place


def _run(captured: Captured) -> None:
    """Run a captured operator."""
    args, kwargs = pytree.tree_unflatten(captured.leaves, captured.spec)
    state = torch.default_generator.get_state()
    if captured.generator is not None:
        torch.default_generator.set_state(captured.generator.get_state())
    try:
        found = pytree.tree_leaves(captured.op(*args, **kwargs))
    finally:
        if captured.generator is not None:
            torch.default_generator.set_state(state)
    for i, value in captured.results.items():
        value.copy_(found[i])


class Placed(NamedTuple):
    """A block that is held, in a pool.

    Attributes:
        place: one number for each place; two blocks have it only if one is freed.
        values: what it holds.
    """

    place: int
    values: Tensor


class SimulatedGraphPool:
    """Captures the graphs of one worker.

    Args:
        machine: where the worker is.
        device: its device.
        stream: on which they are captured.
    """

    def __init__(self, machine: Machine, device: torch.device, stream: Stream) -> None:
        self.machine, self.device = machine, device
        self.default: list[torch.Generator] = []
        self.live: dict[int, Placed] = {}
        self._free: dict[int, list[int]] = {}
        self._count = 0
        self._stream = stream

    def place(self, block: Block, nbytes: int, values: Tensor) -> int:
        """Give a block a place in the pool, a free one of its size if there is one."""
        free, number = self._free.setdefault(nbytes, []), block.number
        if not free:
            self._count += 1
        place = free.pop() if free else self._count
        self.live[number] = Placed(place, values)

        def released() -> None:
            del self.live[number]
            free.append(place)

        weakref.finalize(block, released).atexit = False
        return place

    def overwrite(self, places: set[int]) -> None:
        """A graph writes to what it had freed; another one's results may lie there."""
        for placed in self.live.values():
            if placed.place in places and placed.values.is_floating_point():
                placed.values.fill_(float("nan"))

    def new_graph(self) -> SimulatedGraph:
        return SimulatedGraph(self)

    @contextmanager
    def capturing(self, graph: SimulatedGraph) -> Iterator[None]:
        before = self.machine.set_stream(self.device, self._stream)
        self.machine.capturing[self._stream] = graph
        try:
            yield
        finally:
            del self.machine.capturing[self._stream]
            self.machine.set_stream(self.device, before)
        graph.forget_values()
        self.machine.counts["captures"] += 1

    @contextmanager
    def drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        self.default.append(generator)
        try:
            yield
        finally:
            self.default.pop()
