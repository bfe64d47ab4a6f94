"""One step of a generated program: the words it is written in, and what lies behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from . import transfer, workers
from .failure import explain
from .mailbox import Mailbox, room
from .random import Kit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from .memory import SavedBytes

CALLER = -1


@dataclass(frozen=True, eq=False)
class Program:
    """A generated program, loaded, with the facts that running it needs.

    Attributes:
        forward: one function of a `Run` per device.
        backward: likewise; empty for inference.
        places: one worker per stage (stage k runs on worker k).
        sizes: samples per micro-batch.
        draws: per micro-batch size, per stage, the identities of its random calls.
        strides: what a stage was traced to receive: (what, stage, size) → strides.
        filename: under which `linecache` knows the source.
    """

    forward: tuple[Callable[[Run], None], ...]
    backward: tuple[Callable[[Run], None], ...]
    places: tuple[transfer.WorkerDevice, ...]
    sizes: tuple[int, ...]
    draws: Mapping[int, Sequence[Sequence[tuple[int, int, bool]]]]
    strides: Mapping[tuple[str, int, int], tuple[int, ...]]
    filename: str

    @property
    def is_random(self) -> bool:
        """Whether some call draws random numbers."""
        return any(draws for stages in self.draws.values() for draws in stages)


@dataclass(eq=False)
class Run:
    """One step: what its workers share. Generated code calls the methods without underscore.

    Args:
        program: what to run.
        held_tensors: per stage, its parameters, buffers and constants, and the parameters that
            other stages lend it, on its device.
        buffers: name → the buffer that `update` writes to.
        seed: of the step's random calls.
        memory: counters to keep.
    """

    program: Program
    held_tensors: Sequence[Sequence[Tensor]]
    buffers: Mapping[str, Tensor]
    seed: int
    memory: SavedBytes
    given: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    results: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._saved: dict[tuple[int, int], tuple[list[Tensor], int]] = {}
        self._places = self.program.places
        self._mailbox = Mailbox()
        self._summed: set[str] = set()
        self._borrowed: set[int] = set()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._start: list[torch.cuda.Event] = []

    # What the caller does

    def give(self, what: str, stage: int, microbatch: int, tensor: Tensor) -> None:
        """Hand a stage a tensor from outside, to be taken by its `receive`."""
        self.given[what, stage, microbatch] = tensor
        self._borrowed.add(tensor.untyped_storage().data_ptr())

    def execute(self, way: str) -> None:
        """Run the forward or the backward of the step to its end.

        Raises:
            StageError: a stage failed; everything kept has been dropped.
        """
        functions = self.program.forward if way == "forward" else self.program.backward
        devices = [p.device for p in self._places]
        self._mailbox = Mailbox()
        # What the caller's streams hold so far, workers wait for; what workers made, the caller's.
        self._streams = {d: torch.cuda.current_stream(d) for d in devices if d.type == "cuda"}
        self._start = [stream.record_event() for stream in self._streams.values()]
        tasks = [partial(self._work, f, p) for f, p in zip(functions, self._places, strict=True)]
        try:
            workers.run(tasks, self._mailbox.abort, workers.cores_for(devices))
        except Exception as error:
            self.drop()
            raise explain(error, self.program.filename, way) from error
        except BaseException:
            self.drop()
            raise
        for place in self._places:
            if place.compute is not None:
                self._streams[place.device].wait_stream(place.compute)
        for tensor in (*self.results.values(), *self.gradients.values()):
            if tensor.device in self._streams:
                tensor.record_stream(self._streams[tensor.device])

    def _work(self, function: Callable[[Run], None], place: transfer.WorkerDevice) -> None:
        if place.compute is None:
            function(self)
            return
        with torch.cuda.device(place.device), torch.cuda.stream(place.compute):
            for event in self._start:
                place.compute.wait_event(event)
            function(self)

    def drop(self) -> None:
        """Let go of everything kept."""
        for (stage, _), (_, nbytes) in self._saved.items():
            self.memory.released(stage, nbytes)
        self._saved.clear()
        self.given.clear()
        self.results.clear()
        self.gradients.clear()

    def __del__(self) -> None:
        # A forward whose backward never came: its bytes are free now.
        self.drop()

    # What generated code says

    def held(self, stage: int) -> Sequence[Tensor]:
        """Parameters, buffers and constants of a stage."""
        return self.held_tensors[stage]

    def kit(self, stage: int, m: int, parameters: Sequence[str] = ()) -> Kit:
        """Randomness and the like for one micro-batch at one stage.

        `parameters` are those whose gradients it will make, in its own order.
        """
        draws = self.program.draws[self.program.sizes[m]][stage]
        return Kit(
            self.seed, draws, m, lambda i, gradient: self.accumulate(parameters[i], m, gradient)
        )

    def receive(self, what: str, stage: int, m: int) -> Tensor:
        """Wait for a value, from the caller or from another stage.

        What the caller gives is laid out as it was traced. What a stage sends is used as it is:
        its strides are those that eager would see here, and kernels may choose by them.
        """
        place = self._places[stage]
        key = (what, stage, m)
        tensor = self.given.pop(key, None)
        if tensor is None:
            return transfer.receive(self._mailbox.take(key), place)
        tensor = transfer.fetch(tensor, place, self._streams)
        strides = self.program.strides.get((what, stage, self.program.sizes[m]))
        return tensor if strides is None else transfer.laid_out(tensor, strides)

    def send(self, what: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        """Send a value to another stage, as soon as there is room, or hand it to the caller."""
        if to == CALLER:
            self.results[what, m] = tensor
            return
        key = (what, to, m)
        self._mailbox.reserve(key, room(source, to))
        self._mailbox.put(key, self._moved(tensor, source, to))

    def _moved(self, tensor: Tensor, source: int, to: int) -> transfer.Parcel:
        return transfer.send(tensor, self._places[source], self._places[to].device)

    def update(self, name: str, stage: int, value: Tensor) -> None:
        """Write a buffer's new value."""
        self.buffers[name].copy_(value)

    def keep(self, stage: int, m: int, saved: list[Tensor]) -> None:
        """Keep values for the backward."""
        size = self.program.sizes[m]
        nbytes = self.memory.kept(
            self.program, stage, size, saved, self.held_tensors[stage], self._borrowed
        )
        self._saved[stage, m] = (saved, nbytes)

    def kept(self, stage: int, m: int) -> list[Tensor]:
        """Hand out what was kept, once."""
        saved, nbytes = self._saved.pop((stage, m), ([], 0))
        self.memory.released(stage, nbytes)
        return saved

    def accumulate(self, name: str, m: int, gradient: Tensor) -> None:
        """Add a micro-batch's gradient of a parameter, in the order of micro-batches."""
        total = self.gradients.get(name)
        if total is None:
            self.gradients[name] = gradient
        elif name in self._summed:
            total.add_(gradient)
        else:  # the first gradient may also be somebody else's: only the sum is ours to change
            self.gradients[name] = total + gradient
            self._summed.add(name)
