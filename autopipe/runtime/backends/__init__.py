"""One `Backend` per device type: everything in autopipe that differs between CPU, CUDA and others.

A new device type is a file here with a subclass of `Backend`, and its entry in `BACKENDS`.

Read in this order:

    `base`  the interface, and the behaviour of a device type without streams
    `cpu`   workers on the host's cores
    `cuda`  NVIDIA and AMD GPUs, through torch.cuda; their graphs in `cuda_graphs`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Backend, Event, Graph, GraphPool, Stream
from .cpu import CpuBackend
from .cuda import CudaBackend

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKENDS",
    "Backend",
    "Event",
    "Graph",
    "GraphPool",
    "Stream",
    "accelerators",
    "autocast_types",
    "backend_of",
]

BACKENDS: dict[str, Backend] = {b.type: b for b in (CpuBackend(), CudaBackend())}
"""By device type. Where several accelerators are present, the first one is the default."""


def backend_of(device: torch.device) -> Backend:
    """The backend of a device.

    Args:
        device: any device.

    Returns:
        The registered backend; for other device types (a tensor of the caller may be on any device)
        a plain `Backend`, which leaves everything to torch and has no devices for workers.
    """
    return BACKENDS.get(device.type) or Backend(device.type)


def accelerators() -> tuple[torch.device, ...]:
    """The devices that ``devices=4`` chooses from: all of the first accelerator type present.

    Returns:
        Devices in the order of their indices; empty on a machine that has a CPU only.
    """
    found = (b.devices() for b in BACKENDS.values() if b.type != "cpu")
    return next((devices for devices in found if devices), ())


def autocast_types() -> tuple[str, ...]:
    """The device types for which `torch.autocast` can be on."""
    return tuple(dict.fromkeys(t for b in BACKENDS.values() if (t := b.autocast_type)))
