"""`HostCopies`: saved tensors wait in pinned memory of the host (PipeOffload, arXiv 2503.01328).

Whole storages are copied, each once, whatever views of it are saved. What stays on the device:

- parameters, buffers and constants, which are there anyway;
- what a stage receives from the caller or from a stage on its device, or passes to one: others may
  keep it, so that a copy would free nothing, and the caller may write to it;
- small tensors, wrappers of others, and tensors of a kind whose memory is not plain numbers.

The host may be far ahead of its devices. Memory that a copy reads, or that was freed while a stream
uses it, serves again only once the host knows that it is not in use. So the host waits: after an
offload for the one before it, and before a fetch for the device to get to the call before it, of
this worker. It is ahead by an action then, which is enough to keep a device busy.

Where there are no streams (CPU workers), the device's memory is the host's: nothing is copied, and
only the bytes are counted, as on a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .memory import plain_parts
from .transfer import SentTensor, receive

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from torch import Tensor

    from .backends import Event
    from .transfer import WorkerDevice


class Leaving(NamedTuple):
    """A storage that is offloaded.

    Attributes:
        tensor: one that uses it.
        nbytes: its size.
    """

    tensor: Tensor
    nbytes: int


def leaving_storages(
    tensors: Iterable[Tensor], device: torch.device, stays: Container[int], least: int
) -> dict[int, Leaving]:
    """The storages that are worth a copy.

    Args:
        tensors: that a stage saves for a micro-batch.
        device: of the stage; what is elsewhere stays there.
        stays: addresses of storages that stay.
        least: bytes of the smallest storage that is offloaded.

    Returns:
        By address.
    """
    found: dict[int, Leaving] = {}
    staying: set[int] = set()
    for tensor in tensors:
        for part in plain_parts(tensor):
            storage = part.untyped_storage()
            address, nbytes = storage.data_ptr(), storage.nbytes()
            plain = part is tensor and tensor.layout is torch.strided and not tensor.is_quantized
            whole = plain and nbytes % tensor.itemsize == 0 and not _is_lazy(tensor)
            small = nbytes < max(least, 1)
            if address in stays or small or tensor.device != device or not whole:
                staying.add(address)
            else:
                found.setdefault(address, Leaving(tensor, nbytes))
    return {address: one for address, one in found.items() if address not in staying}


def _is_lazy(tensor: Tensor) -> bool:
    """Whether its values are not those in its memory, but their conjugates or negatives."""
    return tensor.is_conj() or tensor.is_neg()


class _SavedPart(NamedTuple):
    """A saved tensor as a part of a storage.

    Attributes:
        address: of the storage, when the tensor was saved.
        dtype, size, stride, offset: of the tensor; in elements.
    """

    address: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offloaded(NamedTuple):
    """What a micro-batch saved at a stage, with what was offloaded.

    Attributes:
        tensors: what was saved; in place of what was offloaded, the bytes of its storage on the
            host. They must not be used.
        views: by index among `tensors`, what was offloaded.
        copies: by address of a storage, its bytes: on the host, or, when fetched, on the device.
        nbytes: of all that was offloaded.
    """

    tensors: list[Tensor]
    views: Mapping[int, _SavedPart]
    copies: Mapping[int, SentTensor]
    nbytes: int


def replaced(tensors: Sequence[Tensor], copies: Mapping[int, SentTensor], nbytes: int) -> Offloaded:
    """Replace the tensors whose storages were copied.

    Args:
        tensors: what was saved.
        copies: by address of a storage, its bytes on the host.
        nbytes: of all of them.
    """
    kept, views = [*tensors], {}
    for i, x in enumerate(tensors):
        address = next((p.untyped_storage().data_ptr() for p in plain_parts(x)), 0)
        if address in copies:
            views[i] = _SavedPart(address, x.dtype, x.shape, x.stride(), int(x.storage_offset()))
            kept[i] = copies[address].tensor
    return Offloaded(kept, views, copies, nbytes)


class HostCopies:
    """The copies to and from the host that one worker starts in one run.

    Args:
        worker: whose device the tensors are on.
    """

    def __init__(self, worker: WorkerDevice) -> None:
        self._worker = worker
        self._left: Event | None = None
        self._reached: Event | None = None

    def offload(self, tensors: Sequence[Tensor], stays: Container[int], least: int) -> Offloaded:
        """Start to copy saved tensors to the host.

        Args:
            tensors: computed on the worker's compute stream so far.
            stays, least: as for `leaving_storages`.

        Returns:
            What replaces them; the copies may not have ended.
        """
        worker = self._worker
        leaving = leaving_storages(tensors, worker.device, stays, least)
        nbytes = sum(one.nbytes for one in leaving.values())
        if worker.compute is None or not leaving:
            return Offloaded([*tensors], {}, {}, nbytes)
        out, _ = worker.host_lanes
        self._reached = computed = worker.compute.record_event()
        copies = {a: out.copy(all_bytes(one), (computed,)) for a, one in leaving.items()}
        if self._left is not None:
            self._left.synchronize()
        self._left = [*copies.values()][-1].ready
        return replaced(tensors, copies, nbytes)

    def fetch(self, offloaded: Offloaded) -> Offloaded:
        """Start to copy what was offloaded back to the device.

        Args:
            offloaded: what `offload` returned.

        Returns:
            The same, with copies on the device; these may not have ended.
        """
        compute, (_, into) = self._worker.compute, self._worker.host_lanes
        if compute is None or not offloaded.copies:
            return offloaded
        if self._reached is not None:
            self._reached.synchronize()
        self._reached = reached = compute.record_event()
        copies = {
            address: into.copy(tensor, (reached, *(() if left is None else (left,))), lasting=True)
            for address, (tensor, left) in offloaded.copies.items()
        }
        return offloaded._replace(copies=copies)

    def restored(self, fetched: Offloaded) -> list[Tensor]:
        """The saved tensors, safe to read on the worker's compute stream.

        Args:
            fetched: what `fetch` returned.
        """
        copies = {a: receive(sent, self._worker) for a, sent in fetched.copies.items()}
        tensors = [*fetched.tensors]
        for i, view in fetched.views.items():
            flat = copies[view.address].view(view.dtype)
            tensors[i] = flat.as_strided(view.size, view.stride, view.offset)
        return tensors


def all_bytes(leaving: Leaving) -> Tensor:
    """All bytes of a storage, as a tensor of one dimension.

    Args:
        leaving: the storage.
    """
    count = leaving.nbytes // leaving.tensor.itemsize
    return leaving.tensor.as_strided((count,), (1,), 0).view(torch.uint8)
