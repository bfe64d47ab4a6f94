"""`Observed`: what an eager run of a phase shows of it, before it is captured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autopipe.errors import UnsupportedError
from autopipe.runtime.memory import plain_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipe.runtime.random import MicroBatchContext

UNKNOWN_SHAPES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)

BY_MASK = {torch.ops.aten.index, torch.ops.aten.index_put}
"""Operators whose indices may be masks, which the host then turns into positions."""


class TensorLayout(NamedTuple):
    """How a tensor lies in memory.

    Attributes:
        shape, stride: in elements.
        dtype: of the elements.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        """The layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def dense(self) -> TensorLayout:
        """The layout of a tensor of its own that is like this one: without gaps or overlaps."""
        like = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return TensorLayout.of(torch.empty_like(like))

    def new(self, device: torch.device) -> Tensor:
        """A tensor with this layout, without values, that may be written in any mode."""
        with torch.inference_mode(False):
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one piece of memory: neither sparse, nor a wrapper of others."""
    parts = plain_parts(tensor)
    return len(parts) == 1 and parts[0] is tensor


def memory_like(tensor: Tensor) -> Tensor:
    """A tensor with the layout of another, into which its values can be copied.

    Raises:
        UnsupportedError: several elements of it are one place in memory, or it has none.
    """
    if not is_plain(tensor):
        raise UnsupportedError("a graph cannot receive a sparse tensor or a wrapper")
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in sizes):
        raise UnsupportedError("a graph cannot receive an expanded tensor")
    return TensorLayout.of(tensor).new(tensor.device)


@dataclass(eq=False)
class Observed:
    """What a phase needs of a graph.

    Attributes:
        obstacle: why it cannot be captured; None: nothing is known to prevent it.
        draws: which of the stage's random ops it runs.
        sums: by the positions of parameters, the layouts of the gradients that it adds up.
        computes: whether it launches anything at all.
        devices: of the tensors that it returns; None for what is no tensor.
    """

    obstacle: str | None = None
    draws: dict[int, None] = field(default_factory=dict)
    sums: dict[int, TensorLayout] = field(default_factory=dict)
    computes: bool = False
    devices: list[torch.device | None] = field(default_factory=list)

    def note(self, obstacle: str) -> None:
        """Note why the phase cannot be captured; the first reason is kept."""
        self.obstacle = self.obstacle or obstacle


class ObservingContext:
    """`ctx` in generated code: does what another one does, and notes it.

    Args:
        ctx: the other one.
        seen: gets the notes.
    """

    def __init__(self, ctx: MicroBatchContext, seen: Observed) -> None:
        self._ctx, self._seen = ctx, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """As `MicroBatchContext.accumulate`."""
        if gradient.layout is torch.strided:
            self._seen.sums[index] = TensorLayout.of(gradient)
        else:
            self._seen.note("a gradient is sparse")
        self._ctx.accumulate(index, gradient)

    def draw(self, index: int, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As `MicroBatchContext.draw`."""
        self._seen.draws[index] = None
        return self._ctx.draw(index, op, *args, **kwargs)

    def watched(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As `MicroBatchContext.watched`."""
        self._seen.note(f"{op} has no tag that says whether it draws random numbers")
        return self._ctx.watched(op, *args, **kwargs)


class OpObserver:
    """Is told of every operator of a phase, and notes what no graph can do.

    Args:
        seen: gets the notes.
        device: where the phase runs.
        arguments: the tensors that the phase was called with.
    """

    def __init__(self, seen: Observed, device: torch.device, arguments: Sequence[Tensor]) -> None:
        self._seen, self._device = seen, device
        self._given = {id(x) for x in arguments}
        self._constants: dict[int, Tensor] = {}  # on the host, the same in each replay

    def __call__(self, op: Any, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """One operator has run.

        Args:
            op: which.
            inputs: its arguments, those in lists as well.
            results: what it returned.
        """
        schema = op._schema
        tensors = [x for x in results if isinstance(x, Tensor)]
        if op.overloadpacket in BY_MASK:
            if any(map(_is_mask, inputs[1:])):
                self._seen.note(f"{op}: the host counts the elements that a mask selects")
        elif any(tag in op.tags for tag in UNKNOWN_SHAPES):
            self._seen.note(f"{op}: the host waits for its result")
        elif results and not tensors:
            self._seen.note(f"{op} returns a number to the host")
        elif tensors and not any(x.device == self._device for x in tensors):
            if not self._is_constant(op, inputs):
                self._seen.note(f"{op} computes on {tensors[0].device}, not on {self._device}")
            self._constants |= {id(x): x for x in tensors}
        if schema.is_mutable and any(id(x) in self._given for x in inputs):
            self._seen.note(f"{op} writes to what the phase is given")
        if any(r.alias_info is None for r in schema.returns) or schema.is_mutable:
            self._seen.computes = True

    def _is_constant(self, op: Any, inputs: Sequence[Any]) -> bool:
        """Whether an operator of the host gives the same in each replay: it makes a number."""
        read = (x for x in inputs if isinstance(x, Tensor))
        is_random = torch.Tag.nondeterministic_seeded in op.tags
        return not is_random and all(id(x) in self._constants for x in read)


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
