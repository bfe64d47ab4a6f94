"""GPUs through `torch.cuda` (NVIDIA's CUDA; in torch, AMD's ROCm has the same name)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .base import Backend
from .cuda_graphs import CudaGraphPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from .base import GraphPool, Stream, T


class CudaBackend(Backend):
    """Each worker computes on its own stream; copies to and from other devices have others."""

    def __init__(self) -> None:
        super().__init__("cuda")

    @property
    def blocking_launches(self) -> str:
        return "AMD_SERIALIZE_KERNEL=3" if torch.version.hip else "CUDA_LAUNCH_BLOCKING=1"

    def devices(self) -> tuple[torch.device, ...]:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(torch.device("cuda", i) for i in range(count))

    def find(self, device: torch.device) -> torch.device | None:
        found = torch.device("cuda", device.index or 0)
        return found if found in self.devices() else None

    def name(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    def new_stream(self, device: torch.device) -> Stream:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def current_stream(self, device: torch.device) -> Stream:
        return torch.cuda.current_stream(device)

    def default_stream(self, device: torch.device) -> Stream:
        return torch.cuda.default_stream(device)

    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def use_device(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.device(device)

    def record_use(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def new_capture_stream(self, device: torch.device) -> Stream:
        """Of a priority that nobody else asks for: torch has 32 streams of each, for all who ask.

        What another thread launched on it during a capture would be captured, too.
        """
        return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def new_graph_pool(self, device: torch.device, stream: Stream) -> GraphPool:
        return CudaGraphPool(device, stream)

    def default_generator(self, device: torch.device) -> torch.Generator:
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]

    def fork_rng(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.random.fork_rng(devices=[device])

    def timed(self, device: torch.device, run: Callable[[], T]) -> tuple[T, float]:
        """Time a function by the GPU's clock, between two events of its current stream.

        The host's time to launch kernels does not count while the GPU is busy.
        """
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            make: Any = torch.cuda.Event
            start, end = make(enable_timing=True), make(enable_timing=True)
            start.record()
            result = run()
            end.record()
            end.synchronize()
        return result, float(start.elapsed_time(end)) / 1000

    def mark(self, stream: Any) -> Any:
        """An event of the GPU's clock, recorded in `stream`."""
        make: Any = torch.cuda.Event
        event = make(enable_timing=True)
        event.record(stream)
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds of the GPU's clock between two events."""
        first.synchronize()
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000
