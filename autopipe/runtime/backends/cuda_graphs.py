"""CUDA graphs through `torch.cuda`."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class CudaGraphPool:
    """Captures graphs of one worker on a stream of its own.

    What another thread may launch meanwhile, on any other stream, is not captured. Memory of the
    pool is used by replays only, which the worker queues in one stream: so graphs may be replayed
    in any order, as long as what they return is held.

    Args:
        device: of the worker.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._handle = torch.cuda.graph_pool_handle()

    def new_graph(self) -> Any:
        return torch.cuda.CUDAGraph()

    @contextmanager
    def capturing(self, graph: Any) -> Iterator[None]:
        """Capture; only what the calling thread does can spoil it ("thread_local").

        (`torch.cuda.graph` would also synchronize the device and empty the allocator's cache.)
        """
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # the capture is invalid: what caused that is raised
                    graph.capture_end()
                raise
            graph.capture_end()

    @contextmanager
    def drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        """Let the device's default generator have another one's state, which is registered."""
        default = torch.cuda.default_generators[self._device.index]
        own = default.graphsafe_get_state()
        default.graphsafe_set_state(generator.graphsafe_get_state())
        try:
            yield
        finally:
            default.graphsafe_set_state(own)
