"""What the parts of `benchmarks.gpu` ask of a device: streams, memory, and who waits for whom.

Everything that only `torch.cuda` can do is here, so that a test can put a simulated device in its
place (`tests/support/gpu_script.py`) and run the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from autopipe.runtime.backends import backend_of
from autopipe.runtime.executor import Run


class Card:
    """A device without streams, whose memory nobody counts: the CPU.

    Args:
        device: which.

    Attributes:
        is_gpu: errors come late, and kernels show in a trace.
        has_streams: work is queued, and the host goes on.
    """

    is_gpu = has_streams = False

    def __init__(self, device: torch.device) -> None:
        self.device, self.backend = device, backend_of(device)

    def synchronize(self) -> None:
        """Wait for all work."""
        self.backend.synchronize(self.device)

    # Memory, in bytes

    def allocated(self) -> int:
        """In use by tensors; 0 where nobody counts."""
        return 0

    def reserved(self) -> int:
        """Taken from the device by the allocator."""
        return 0

    def empty_cache(self) -> None:
        """Give back what nothing uses."""

    def peak(self, run: Callable[[], None]) -> float:
        """Allocated at most during a call; nan where nobody counts."""
        run()
        return float("nan")

    def short_of_memory(self) -> AbstractContextManager[Any]:
        """Allocations fail while the context is open. (Here: stage 1 is told so.)"""
        return failing_receive(torch.OutOfMemoryError("out of memory, as asked"))

    # Streams

    def new_stream(self) -> Any:
        return self.backend.new_stream(self.device)

    def current_stream(self) -> Any:
        return self.backend.current_stream(self.device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Work on a stream; on the current one if it is None."""
        return nullcontext() if stream is None else self.backend.use_stream(stream)

    def is_idle(self, stream: Any) -> bool:
        """Whether all work queued in a stream is done."""
        return True

    def sleep(self, milliseconds: float) -> None:
        """Queue a kernel that does nothing for so long."""

    def waits_are_errors(self) -> AbstractContextManager[Any]:
        """A host that waits for the device raises while the context is open."""
        return nullcontext()

    def races(self) -> list[str]:
        """Accesses that nothing orders, where something knows; they are told once."""
        return []

    def backward(self, loss: Tensor, of_forward: Any) -> None:
        """``loss.backward()``; its forward ran on the stream `of_forward`."""
        loss.backward()

    # Tensors

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A copy that the device can read by itself."""
        return tensor.clone()

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device."""
        return model.to(self.device)

    def values(self, tensor: Tensor) -> Tensor:
        """A copy in the host's memory."""
        return tensor.detach().cpu().clone()


class CudaCard(Card):
    """A GPU."""

    is_gpu = has_streams = True

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def peak(self, run: Callable[[], None]) -> float:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return float(torch.cuda.max_memory_allocated(self.device))

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """The allocator may take no more than it has, and 64 MiB."""
        self.synchronize()
        self.empty_cache()
        _, total = torch.cuda.mem_get_info(self.device)
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (self.reserved() + 2**26) / total), self.device
        )
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def is_idle(self, stream: Any) -> bool:
        return bool(stream.query())

    def sleep(self, milliseconds: float) -> None:
        """In cycles of a clock of about 1.8 GHz; which one does not matter."""
        with torch.cuda.device(self.device):
            sleep: Any = torch.cuda._sleep
            sleep(int(1.8e6 * milliseconds))

    @contextmanager
    def waits_are_errors(self) -> Iterator[None]:
        """Operators that wait raise, in every thread: the mode is one of the process.

        (`c10::cuda::warning_state()` is a static object.) Torch does not look at waits for events,
        nor at `synchronize`: these are replaced. The mode is set last, since they may be called
        until then, and before it is set nothing is being recorded.
        """
        self.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        with ExitStack() as stack:
            for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda):
                stack.enter_context(mock.patch.object(owner, "synchronize", refused))
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, before)
            yield

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor.clone().pin_memory()


CARDS: dict[str, type[Card]] = {"cpu": Card, "cuda": CudaCard}
"""By device type."""


def refused(*_: Any, **__: Any) -> None:
    """In place of what lets the host wait."""
    raise RuntimeError("the host waits for the device")


@contextmanager
def failing_receive(error: Exception) -> Iterator[None]:
    """Stage 1 raises an error when it receives anything."""
    receive = Run.receive

    def failing(self: Run, value: str, stage: int, m: int) -> Tensor:
        if stage == 1:
            raise error
        return receive(self, value, stage, m)

    with mock.patch.object(Run, "receive", failing):
        yield


@contextmanager
def slow_stages(card: Card, milliseconds: Callable[[], float]) -> Iterator[None]:
    """Each stage's stream sleeps before it uses what it receives, so that a missing wait shows."""
    receive = Run.receive

    def slow(self: Run, value: str, stage: int, m: int) -> Tensor:
        tensor = receive(self, value, stage, m)
        card.sleep(milliseconds())
        return tensor

    with mock.patch.object(Run, "receive", slow):
        yield
