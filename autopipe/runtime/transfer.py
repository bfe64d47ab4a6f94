"""Move tensors between the devices of workers.

On a device with streams, each worker computes on its own stream. A tensor for another device is
copied on a second stream, so that the copy overlaps the next micro-batch's work; the receiver's
stream waits for an event, and the host does not wait. A tensor that crosses streams is recorded on
both, so that the allocator does not reuse its memory too early. Between CPU workers a tensor is
passed without a copy. Streams and events of a device type are in its `Backend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .backends import backend_of
from .worker_threads import KeptThread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .backends import Event, Stream


class SentTensor(NamedTuple):
    """A tensor on its receiver's device, and the event after which it may be read (None: now)."""

    tensor: Tensor
    ready: Event | None


class WorkerDevice:
    """The device of one worker, with the worker's streams on it, and its thread.

    Args:
        device: where the worker computes.

    Attributes:
        backend: of the device's type.
        compute: the stream that the worker's operators run on; None without streams.
        copy: the stream for copies to other devices; None without streams.
        thread: keeps the worker's thread from step to step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.backend = backend_of(device)
        self.compute = self.backend.new_stream(device)
        self.copy = self.backend.new_stream(device)
        self.thread = KeptThread()


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
    if source.compute is None:
        if tensor.device == target.device:
            return SentTensor(tensor, None)  # `Tensor.to` would let another thread have the GIL
        moved = tensor.to(target.device, non_blocking=True)
        if target.compute is None:
            return SentTensor(moved, None)
        stream = target.backend.current_stream(target.device)
        return SentTensor(moved, None if stream is None else stream.record_event())
    if tensor.device == target.device:
        return SentTensor(tensor, source.compute.record_event())
    assert source.copy is not None
    source.copy.wait_stream(source.compute)
    with source.backend.use_stream(source.copy):
        moved = tensor.to(target.device, non_blocking=target.compute is not None)
        source.backend.record_use(tensor, source.copy)
        return SentTensor(moved, source.copy.record_event())


def receive(sent: SentTensor, worker: WorkerDevice) -> Tensor:
    """Make a sent tensor safe to read on a worker's compute stream.

    Args:
        sent: what `send` returned.
        worker: the one that receives.

    Returns:
        The tensor.
    """
    tensor, ready = sent
    if worker.compute is not None:
        if ready is not None:
            worker.compute.wait_event(ready)
        worker.backend.record_use(tensor, worker.compute)
    elif ready is not None:
        ready.synchronize()
    return tensor


def fetch_from_caller(
    tensor: Tensor, worker: WorkerDevice, streams: Mapping[torch.device, Stream]
) -> Tensor:
    """Move a tensor of the pipeline's caller to a worker.

    The worker's compute stream waits for the caller's work already (`Run.execute`). A copy from one
    accelerator to another runs on the caller's stream, after that work.

    Args:
        tensor: on any device.
        worker: the one that will read it.
        streams: by device, the streams that the caller works on.

    Returns:
        The tensor on the worker's device, safe to read on its compute stream.
    """
    if worker.compute is None:
        return tensor if tensor.device == worker.device else tensor.to(worker.device)
    if tensor.device == worker.device:
        worker.backend.record_use(tensor, worker.compute)
        return tensor
    backend = backend_of(tensor.device)
    stream = streams.get(tensor.device) or backend.default_stream(tensor.device)
    if stream is None:
        return tensor.to(worker.device, non_blocking=True)
    with backend.use_stream(stream):
        moved = tensor.to(worker.device, non_blocking=True)
        return receive(SentTensor(moved, stream.record_event()), worker)


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
