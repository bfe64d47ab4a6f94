"""Move tensors between the devices of workers.

On a device with streams, each worker computes on a stream of its own. A copy between two devices
runs on a `Lane`: streams that nothing but these copies use. So a copy waits only for the tensor
that it reads, and only the reader waits for the copy; the host waits for neither. A tensor that is
used on several streams is recorded on them, so that the allocator does not reuse its memory too
early. Between CPU workers a tensor is passed without a copy. Streams and events of a device type
are in its `Backend`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from .backends import backend_of
from .worker_threads import KeptThread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from .backends import Event, GraphPool, Stream


HOST = torch.device("cpu")


class SentTensor(NamedTuple):
    """A tensor on its receiver's device, and the event after which it may be read (None: now)."""

    tensor: Tensor
    ready: Event | None


class Lane:
    """Streams for copies from one device to another.

    ATen copies on the current stream of the source; the result's memory belongs to the current
    stream of the target, and each of the two streams waits for the other. Were they streams that
    compute, a copy would wait for work that it does not need, and the other way round.

    Args:
        source: the device that is read; it may be the host.
        target: the device that is written; it may be the host.
    """

    def __init__(self, source: torch.device, target: torch.device) -> None:
        self._source, self._target = backend_of(source), backend_of(target)
        self.source, self.target = source, target
        self.out = self._source.new_stream(source)
        self.into = self._target.new_stream(target)

    def copy(self, tensor: Tensor, after: Iterable[Event], *, lasting: bool = False) -> SentTensor:
        """Start to copy a tensor.

        Args:
            tensor: on the lane's source.
            after: events that the copy must wait for, on the source; from the host, on the target.
            lasting: whether nobody writes to the tensor until the copy has ended.

        Returns:
            The copy on the lane's target; it may not have ended.
        """
        first = self.out or self.into
        if first is not None:
            for event in after:
                first.wait_event(event)
        with ExitStack() as stack:
            for backend, stream in ((self._target, self.into), (self._source, self.out)):
                if stream is not None:
                    stack.enter_context(backend.use_stream(stream))
            # From pinned memory a copy runs by itself; its owner may overwrite it meanwhile.
            on_its_own = lasting or self.out is not None or not tensor.is_pinned()
            moved = tensor.to(self.target, non_blocking=on_its_own)
            if self.out is not None:
                self._source.record_use(tensor, self.out)
            last = self.out or self.into
            return SentTensor(moved, None if last is None else last.record_event())

    def streams(self) -> Iterator[tuple[torch.device, Stream]]:
        """Its streams and their devices."""
        for device, stream in ((self.source, self.out), (self.target, self.into)):
            if stream is not None:
                yield device, stream


class WorkerDevice:
    """The device of one worker, with the worker's streams and its thread.

    Args:
        device: where the worker computes.

    Attributes:
        backend: of the device's type.
        compute: the stream that the worker's operators run on; None without streams.
        thread: keeps the worker's thread from step to step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.backend = backend_of(device)
        self.compute = self.backend.new_stream(device)
        self.thread = KeptThread()
        self._lanes: dict[tuple[torch.device, torch.device], Lane] = {}

    @cached_property
    def host_lanes(self) -> tuple[Lane, Lane]:
        """The lanes to and from the host for what is offloaded, and for nothing else.

        They are not among `streams`: what they copy is the runtime's own, so nobody waits for them
        at the end of a run.
        """
        return Lane(self.device, HOST), Lane(HOST, self.device)

    def lane(self, source: torch.device, target: torch.device) -> Lane:
        """The lane for copies that this worker starts from one device to another."""
        key = source, target
        if key not in self._lanes:
            self._lanes[key] = Lane(source, target)
        return self._lanes[key]

    @cached_property
    def captures(self) -> Stream | None:
        """The stream on which graphs of its phases are captured; None: its device has no graphs."""
        return self.backend.new_capture_stream(self.device)

    def new_graph_pool(self) -> GraphPool:
        """What captures graphs of its phases."""
        assert self.captures is not None
        return self.backend.new_graph_pool(self.device, self.captures)

    def streams(self) -> Iterator[tuple[torch.device, Stream]]:
        """All streams that the worker uses, and their devices."""
        if self.compute is not None:
            yield self.device, self.compute
        for lane in [*self._lanes.values()]:  # another call may add one
            yield from lane.streams()


def is_copied(source: WorkerDevice, target: WorkerDevice) -> bool:
    """Whether what is sent from one worker to another is a copy, in memory of its own."""
    return source.device != target.device


def send(tensor: Tensor, source: WorkerDevice, target: WorkerDevice) -> SentTensor:
    """Start to move a tensor from one worker to another.

    Args:
        tensor: computed on the compute stream of `source`, which is the current stream.
        source: the worker that sends.
        target: the worker that receives.

    Returns:
        The tensor on the target's device; its copy may not have finished.
    """
    if source is target:  # two stages of one worker: one after the other on its stream
        return SentTensor(tensor, None)
    computed = None if source.compute is None else source.compute.record_event()
    if tensor.device == target.device:  # `Tensor.to` would let another thread have the GIL
        return SentTensor(tensor, computed)
    lane = source.lane(tensor.device, target.device)
    return lane.copy(tensor, () if computed is None else (computed,))


def receive(sent: SentTensor, worker: WorkerDevice) -> Tensor:
    """Make a sent tensor safe to read on a worker's compute stream.

    Args:
        sent: what `send` returned.
        worker: the one that receives.

    Returns:
        The tensor.
    """
    tensor, ready = sent
    if worker.compute is None:
        if ready is not None:
            ready.synchronize()
        return tensor
    if ready is not None:
        worker.compute.wait_event(ready)
    worker.backend.record_use(tensor, worker.compute)
    return tensor


def send_to_caller(
    tensor: Tensor, device: torch.device, workers: Iterable[WorkerDevice]
) -> SentTensor:
    """Start to move a result to the device where the pipeline's caller wants it.

    Args:
        tensor: computed on the current stream of its device.
        device: the caller's.
        workers: of the pipeline; one of them has computed the tensor.

    Returns:
        The tensor on that device; its copy may not have finished.
    """
    if tensor.device == device:
        return SentTensor(tensor, None)
    stream = backend_of(tensor.device).current_stream(tensor.device)
    for worker in workers:
        if worker.device == tensor.device and worker.compute in (None, stream):
            after = () if stream is None else (stream.record_event(),)
            return worker.lane(tensor.device, device).copy(tensor, after)
    return SentTensor(tensor.to(device), None)  # a number of the host, from another device's stage


def fetch_from_caller(tensor: Tensor, worker: WorkerDevice, after: Sequence[Event]) -> Tensor:
    """Move a tensor of the pipeline's caller to a worker.

    Args:
        tensor: on any device.
        worker: the one that will read it. On its own device it waits for the caller already, who
            waits for it before the tensor can be freed.
        after: events on the tensor's device, after which the caller has computed it.

    Returns:
        The tensor on the worker's device, safe to read on its compute stream.
    """
    if tensor.device == worker.device:
        return tensor
    return receive(worker.lane(tensor.device, worker.device).copy(tensor, after), worker)


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Give a tensor the strides with which the stage that receives it was traced.

    Args:
        tensor: with any strides.
        strides: the wanted ones, in elements.

    Returns:
        The tensor itself if its strides are equal, or differ only where the size is one; else a
        copy.
    """
    own = tensor.stride()
    if own == strides or all(
        a == b or n == 1 for a, b, n in zip(own, strides, tensor.shape, strict=True)
    ):
        return tensor
    result = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return result.copy_(tensor)
