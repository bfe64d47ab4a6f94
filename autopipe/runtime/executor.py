"""Run a generated program for one training step: `Run` has the methods that the code calls."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from autopipe import interrupts

from . import transfer, workers
from .backpressure import Backpressure
from .caller_streams import CallerStreams
from .failure import stage_error
from .gradient_sums import GradientSums
from .mailbox import AbortError, Mailbox
from .memory import plain_parts, without_rest
from .random import MicroBatchContext
from .saved_values import SavedValues

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor

    from .memory import SavedBytesCounter
    from .program import Program

    EnterModes = Callable[[], AbstractContextManager[None]]


CALLERS_QUEUE = 2
"""How many micro-batches of one of the caller's tensors may be on a stage's device at once, besides
those that are saved."""


@dataclass(eq=False)
class Run:
    """One run of a program's forward and backward: the state that its workers share.

    The caller uses `feed`, `execute` and `drop`; generated code calls the other methods.

    Args:
        program: what to run.
        state_tensors: per stage, its parameters, buffers and constants, then the parameters shared
            with it by other stages, all on its device.
        buffers: name → the buffer that `update_buffer` writes to.
        seed: for the step's random ops.
        memory: counters of saved bytes to update.
        caller_modes: called in the caller's thread; returns what enters the caller's modes in a
            worker's thread.

    Attributes:
        inputs: (value, stage, micro-batch) → a tensor from the caller that is not yet received.
        results: (value, micro-batch) → a tensor for the caller.
        gradients: of parameters, summed over the micro-batches so far.
        caller: the streams of those who have called `execute`.
        destinations: result → the device that the caller wants it on; else it stays where it is.
    """

    program: Program
    state_tensors: Sequence[Sequence[Tensor]]
    buffers: Mapping[str, Tensor]
    seed: int
    memory: SavedBytesCounter
    caller_modes: Callable[[], EnterModes] = field(default=lambda: nullcontext)
    inputs: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    results: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    gradients: GradientSums = field(default_factory=GradientSums)
    destinations: Mapping[str, torch.device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._saved = SavedValues(self.program, self.state_tensors, self.memory)
        self._workers = self.program.workers
        self._mailbox = Mailbox()
        self._fed: dict[int, dict[int, dict[int, int]]] = {}  # see `SavedBytesCounter.add`
        self.caller = CallerStreams(())
        self._backpressure = Backpressure()
        self._returned: list[transfer.SentTensor] = []

    # Called by the pipeline

    def feed(self, value: str, stage: int, m: int, tensor: Tensor) -> None:
        """Pass a tensor of the caller's to a stage, which gets it from `receive`.

        Args:
            value: its name in generated code.
            stage: the stage that receives it.
            m: the micro-batch.
            tensor: on any device.
        """
        self.inputs[value, stage, m] = tensor
        for part in plain_parts(tensor):
            storage = self._fed.setdefault(m, {}).setdefault(part.untyped_storage().data_ptr(), {})
            storage[part.data_ptr()] = part.nbytes

    def execute(self, direction: str) -> None:
        """Run all micro-batches forward, or all of them backward, or both.

        Args:
            direction: "forward", "backward" or "step".

        Raises:
            StageError: a stage failed; everything saved has been dropped.
        """
        self._mailbox = self._new_mailbox()
        self._backpressure = Backpressure()
        with interrupts.deferred(), interrupts.waking(self._mailbox.abort):
            try:
                self._execute(direction)
            except BaseException as error:
                self.drop()
                if not isinstance(error, Exception):
                    raise
                raise stage_error(error, self.program.filename, direction, self._workers) from error
            if interrupts.is_deferred():  # the workers were aborted
                self.drop()
                interrupts.raise_deferred()

    def _execute(self, direction: str) -> None:
        """Run the drivers, and order them with the caller's streams.

        Whatever touches a device here may report the error of an earlier kernel.
        """
        functions, drivers = self._functions(direction), self.program.drivers
        given = [x.device for x in self.inputs.values()]
        devices = [*(w.device for w in self._workers), *given, *self.destinations.values()]
        self.caller = CallerStreams(devices, self.caller)
        enter = self.caller_modes() if len(drivers) > 1 else nullcontext
        tasks = [partial(self._work, f, w, enter) for f, w in zip(functions, drivers, strict=True)]
        cores = workers.cores_per_worker([w.device for w in drivers], self.program.shares_core)
        try:
            workers.run_workers(tasks, self._mailbox.abort, cores, [w.thread for w in drivers])
        except BaseException:
            with suppress(Exception):  # after a kernel that failed, nothing can be queued
                self.caller.wait_for(dict.fromkeys(self._workers))
            raise
        self.caller.wait_for(dict.fromkeys(self._workers))
        self.caller.wait_on_host(self._returned)
        self._returned.clear()
        self.caller.use((*self.results.values(), *self.gradients))

    def _functions(self, direction: str) -> Sequence[Callable[[Any], None]]:
        """What each driver runs in a direction: an attribute of the program."""
        found: Sequence[Callable[[Any], None]] = getattr(self.program, direction)
        return found

    def _new_mailbox(self) -> Mailbox:
        return Mailbox()

    def _work(
        self,
        function: Callable[[Run], None],
        worker: transfer.WorkerDevice,
        enter_modes: EnterModes,
    ) -> None:
        """One worker's part of `execute`, in the worker's thread."""
        if worker.compute is None:
            with enter_modes():
                function(self)
            return
        backend = worker.backend
        with enter_modes(), backend.use_device(worker.device), backend.use_stream(worker.compute):
            for event in self.caller.events(worker.device):
                worker.compute.wait_event(event)
            function(self)

    @property
    def saved(self) -> dict[tuple[int, int], list[Tensor]]:
        """(stage, micro-batch) → the activations that are saved for its backward."""
        return self._saved.tensors

    def drop(self) -> None:
        """Free saved activations, results and gradients."""
        self._saved.clear()
        self.inputs.clear()
        self.results.clear()
        self._returned.clear()
        self.gradients.clear()

    # Called by generated code

    def state(self, stage: int) -> Sequence[Tensor]:
        """Parameters, buffers and constants that a stage computes with."""
        return self.state_tensors[stage]

    def context(self, stage: int, m: int, parameters: Sequence[str] = ()) -> MicroBatchContext:
        """Create the context that a stage's code uses for one micro-batch, besides tensors.

        Args:
            stage: the stage.
            m: the micro-batch.
            parameters: the parameters whose gradients the code computes, in the code's order.
        """
        if interrupts.is_deferred():  # a single worker runs in the main thread
            raise AbortError
        size = self.program.sizes[m]
        return MicroBatchContext(
            self.seed,
            self.program.draws[size][stage],
            m,
            lambda i, gradient: self.accumulate(parameters[i], stage, gradient),
            self.program.symbols[size],
        )

    def receive(self, value: str, stage: int, m: int) -> Tensor:
        """Wait for a value, from the caller or from another stage.

        The caller's tensors get the strides that the stage was traced with. What another stage
        sends is used as it is: it has the strides that eager execution would see here, and kernels
        may choose by them.

        Args:
            value: its name in generated code.
            stage: the stage that receives it.
            m: the micro-batch.

        Returns:
            The tensor, on the stage's device.
        """
        worker = self._workers[stage]
        key = (value, stage, m)
        tensor = self.inputs.pop(key, None)
        earlier = self._backpressure.mark(key[:2], worker.compute)
        if tensor is None:
            return transfer.receive(self._mailbox.take(key), worker)
        if tensor.device != worker.device:
            self._backpressure.wait(key[:2], earlier, CALLERS_QUEUE)
        tensor = transfer.fetch_from_caller(tensor, worker, self.caller.events(tensor.device))
        strides = self.program.strides.get((value, stage, self.program.sizes[m]))
        return tensor if strides is None else transfer.with_strides(tensor, strides)

    def send(self, value: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        """Send a value to another stage, as soon as its queue has space.

        Args:
            value: its name in generated code.
            source: the stage that sends.
            to: the stage that receives.
            m: the micro-batch.
            tensor: on the device of `source`.
        """
        key, capacity = (value, to, m), self.program.queues[value, to]
        earlier = self._mailbox.reserve(key, capacity)
        if transfer.is_copied(self._workers[source], self._workers[to]):
            # The receiver has taken the last message but `capacity`, and marked those before it.
            self._backpressure.wait(key[:2], earlier, capacity + 1)
        self._mailbox.put(key, self._moved(tensor, source, to))

    def return_to_caller(self, value: str, m: int, tensor: Tensor) -> None:
        """Add a value to the step's results, on the device that the caller wants it on.

        Args:
            value: its name in generated code.
            m: the micro-batch.
            tensor: the value.
        """
        if not self.program.trains and len(self.program.sizes) > 1:
            tensor = without_rest(tensor, self._is_kept_anyway)
        device = self.destinations.get(value, tensor.device)
        sent = transfer.send_to_caller(tensor, device, self._workers)
        self._returned.append(sent)
        self.results[value, m] = sent.tensor

    def _is_kept_anyway(self, address: int) -> bool:
        """Whether the storage at an address is the caller's or the model's."""
        held = (x for tensors in self.state_tensors for t in tensors for x in plain_parts(t))
        return any(address in storages for storages in self._fed.values()) or any(
            address == x.untyped_storage().data_ptr() for x in held
        )

    def _moved(self, tensor: Tensor, source: int, to: int) -> transfer.SentTensor:
        return transfer.send(tensor, self._workers[source], self._workers[to])

    def update_buffer(self, name: str, stage: int, value: Tensor) -> None:
        """Write a buffer's new value."""
        self.buffers[name].copy_(value)

    def save(self, stage: int, m: int, tensors: list[Tensor]) -> None:
        """Save activations of a micro-batch for its backward, or for the next part of it."""
        self._saved.add(stage, m, tensors, self._fed.get(m, {}))

    def pop_saved(self, stage: int, m: int) -> list[Tensor]:
        """Remove and return the saved activations of a micro-batch."""
        return self._saved.pop(stage, m)

    def offload(self, stage: int, m: int) -> None:
        """Start to copy the saved activations of a micro-batch to the host."""
        self._saved.offload(stage, m)

    def fetch(self, stage: int, m: int) -> None:
        """Start to copy them back to the stage's device."""
        self._saved.fetch(stage, m)

    def accumulate(self, parameter: str, stage: int, gradient: Tensor) -> None:
        """Add a micro-batch's gradient; called in the order of micro-batches."""
        self.gradients.add(parameter, stage, gradient)
