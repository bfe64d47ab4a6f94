"""Tensors from one worker's device to another's.

On a GPU a worker computes on a stream of its own. What it sends to another GPU is copied on a
second stream, so that the copy overlaps the next micro-batch's work; the receiver's stream waits
for an event, the host for nothing. Tensors that cross streams are recorded on both, so that the
allocator does not give their memory away early. Between CPU workers a tensor is simply handed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Parcel(NamedTuple):
    """A tensor on its way, and the event after which it may be read (None: at once)."""

    tensor: Tensor
    ready: torch.cuda.Event | None


class WorkerDevice:
    """A worker's device, with its streams if it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.compute: torch.cuda.Stream | None = None
        self.copy: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.copy = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def send(tensor: Tensor, source: WorkerDevice, target: torch.device) -> Parcel:
    """Start moving a tensor made on `source`'s compute stream; the current stream is that one."""
    if source.compute is None:
        moved = tensor.to(target, non_blocking=True)
        event = torch.cuda.current_stream(target).record_event() if moved.is_cuda else None
        return Parcel(moved, event)
    if tensor.device == target:
        return Parcel(tensor, source.compute.record_event())
    assert source.copy is not None
    source.copy.wait_stream(source.compute)
    with torch.cuda.stream(source.copy):
        moved = tensor.to(target, non_blocking=target.type == "cuda")
        tensor.record_stream(source.copy)
        return Parcel(moved, source.copy.record_event())


def receive(parcel: Parcel, place: WorkerDevice) -> Tensor:
    """Make a parcel's tensor safe to read on `place`'s compute stream."""
    tensor, ready = parcel
    if place.compute is not None:
        if ready is not None:
            place.compute.wait_event(ready)
        tensor.record_stream(place.compute)
    elif ready is not None:
        ready.synchronize()
    return tensor


def fetch(
    tensor: Tensor, place: WorkerDevice, streams: Mapping[torch.device, torch.cuda.Stream]
) -> Tensor:
    """Bring a tensor of the caller's to `place`; `streams` are those that the caller works on.

    `place`'s compute stream waits for the caller's work already (`Run.execute`); a copy from one
    GPU to another is made on the caller's stream, behind that work.
    """
    if place.compute is None:
        return tensor.to(place.device)
    if not tensor.is_cuda:
        return tensor.to(place.device, non_blocking=True)
    if tensor.device == place.device:
        tensor.record_stream(place.compute)
        return tensor
    stream = streams.get(tensor.device) or torch.cuda.default_stream(tensor.device)
    with torch.cuda.stream(stream):
        moved = tensor.to(place.device, non_blocking=True)
        return receive(Parcel(moved, stream.record_event()), place)


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor with the strides that a stage was traced for.

    A copy, unless they are those already, or differ only where the size is one.
    """
    own = tensor.stride()
    if own == strides or all(
        a == b or n == 1 for a, b, n in zip(own, strides, tensor.shape, strict=True)
    ):
        return tensor
    result = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return result.copy_(tensor)
