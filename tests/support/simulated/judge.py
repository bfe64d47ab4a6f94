"""A second opinion: the engine of torch's CUDA sanitizer, fed with what happens here.

`torch.cuda._sanitizer` (``TORCH_CUDA_SANITIZER=1`` on a GPU) follows streams, events and tensors
and reports accesses that nothing orders. Its engine needs no GPU. It knows nothing of frees, and
takes what one host thread has waited for as known to all.
"""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from torch.cuda import _sanitizer

from .blocks import Block
from .streams import Event, Stream


class _NoStacks:
    """In place of the module `traceback`."""

    class StackSummary(traceback.StackSummary):
        @classmethod
        def extract(cls, *_: Any, **__: Any) -> Any:
            return cls()

    @staticmethod
    def walk_stack(_: Any) -> Any:
        return ()


class Judge:
    """Passes what a machine does to the sanitizer.

    Args:
        monkeypatch: while it is in force, the sanitizer notes no stacks, which take its time.

    Attributes:
        errors: what it has found.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_sanitizer, "traceback", _NoStacks)
        self.errors: list[str] = []
        self._handler = _sanitizer.EventHandler()
        self._events: list[Event] = []  # their ids stay theirs

    def stream(self, stream: Stream) -> None:
        self._handler._handle_stream_creation(id(stream))

    def recorded(self, event: Event) -> None:
        self._events.append(event)
        self._handler._handle_event_record(id(event), id(event.stream))

    def waited(self, stream: Stream, event: Event) -> None:
        self._handler._handle_event_wait(id(event), id(stream))

    def host_waits(self, event: Event) -> None:
        self._handler._handle_event_synchronization(id(event))

    def made(self, block: Block, stream: Stream, operator: str) -> None:
        self._handler._handle_memory_allocation(block.number)
        self._launched(stream, set(), {block.number}, operator)

    def launched(self, stream: Stream, operator: str, tensors: Any, written: set[int]) -> None:
        """An operator reads all its tensors and writes to the blocks whose ids are `written`."""
        blocks = {id(x.block): x.block for x in tensors}
        read = {b.number for i, b in blocks.items() if i not in written}
        self._launched(stream, read, {blocks[i].number for i in written}, operator)

    def _launched(self, stream: Stream, read: set[int], write: set[int], operator: str) -> None:
        names = {number: [operator] for number in read | write}
        found = self._handler._handle_kernel_launch(id(stream), read, write, set(), operator, names)
        self.errors += map(str, found)
