"""Simulated devices: tensors that say they are on ``lazy:k``, with streams that run at any time.

A real GPU runs a stream's work some time after the host has queued it, and two streams in any
order; a wait that is missing shows as a wrong number once in a while. Here every operator is
computed at once on the CPU, and a vector clock per stream (Lamport 1978, Mattern 1989) says what is
certain to have happened before it. So one run finds every pair of accesses that nothing orders,
whatever order the threads happened to run in:

- a read or write that is not ordered after the last write, or a write after the last reads;
- memory that is freed, and used again, while another stream may still use it
  (`Tensor.record_stream` was not called);
- memory of the host that is read before an asynchronous copy into it is known to have ended.

The device type is "lazy", a name that torch knows and that has no kernels in it: its autograd
engine runs such tensors in the calling thread, fake tensors can be on it, and no GPU is touched.

Read in this order:

    `streams`   vector clocks: `Stream`, `Event`, what each host thread knows
    `blocks`    memory and who uses it
    `machine`   the devices, the races found, the virtual time
    `tensors`   `SimulatedTensor`, and how operators and copies run
    `fakes`     fake tensors of simulated ones, for captures
    `backend`   the `Backend` that autopipe's runtime uses, and `simulated`, which registers it
    `engine`    a backward on the streams that autograd's engine takes for GPUs
    `nets`      small models for tests
    `pairs`     a pipeline on simulated devices beside the same one on CPU workers
    `failing`   a step that fails in the middle
    `judge`     a second opinion, by the engine of torch's CUDA sanitizer
    `mutants`   copies of the runtime's functions in which something that orders work is missing
"""

from __future__ import annotations

from .backend import SimulatedBackend, simulated
from .machine import Machine
from .streams import Event, Stream
from .tensors import SimulatedTensor, pinned

__all__ = [
    "Event",
    "Machine",
    "SimulatedBackend",
    "SimulatedTensor",
    "Stream",
    "pinned",
    "simulated",
]
