"""CUDA graphs through `torch.cuda`."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class CudaGraphPool:
    """Captures graphs of one worker that are replayed in the order of their captures.

    What another thread may launch meanwhile, on any other stream, is not captured. What a graph
    returns may lie where an earlier one has had temporary values: a replay of that one overwrites
    it, also while it is held.

    Args:
        device: of the worker.
        stream: on which the worker's graphs are captured. It is the worker's own: cuBLAS has a
            workspace for each stream, which captured products keep using.
    """

    def __init__(self, device: torch.device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._handle = torch.cuda.graph_pool_handle()

    def new_graph(self) -> Any:
        return torch.cuda.CUDAGraph()

    @contextmanager
    def capturing(self, graph: Any) -> Iterator[None]:
        """Capture; only what the calling thread does can spoil it ("thread_local")."""
        torch.cuda.empty_cache()  # the pool needs memory of its own, and a capture cannot free any
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
