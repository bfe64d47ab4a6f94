"""`StageState`: a stage's parameters, buffers and constants, as its graphs read them."""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from autopipe.runtime.memory import plain_parts

from .observed import TensorLayout, is_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

OFTEN = 2
"""A tensor that has moved so many times moves in every step: a user moves a model's weights once
in a while (``load_state_dict(assign=True)``)."""


def settings() -> tuple[Any, ...]:
    """The settings of torch by which operators on a GPU choose their kernels."""
    found = []
    for read in SETTINGS:
        with suppress(RuntimeError):  # one of two interfaces to the same setting was used
            found.append(read())
    return tuple(found)


_CUDNN: Any = torch.backends.cudnn

SETTINGS: tuple[Callable[[], Any], ...] = (
    torch.are_deterministic_algorithms_enabled,
    torch.get_float32_matmul_precision,
    lambda: torch.backends.cuda.matmul.allow_tf32,
    lambda: torch.backends.cuda.matmul.fp32_precision,
    lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
    lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    lambda: torch.backends.cudnn.enabled,
    lambda: torch.backends.cudnn.benchmark,
    lambda: torch.backends.cudnn.deterministic,
    lambda: torch.backends.cudnn.allow_tf32,
    lambda: _CUDNN.conv.fp32_precision,
    lambda: _CUDNN.rnn.fp32_precision,
)


class Place(NamedTuple):
    """Where a tensor is.

    Attributes:
        parts: the addresses and layouts of its memory: several of a wrapper, none of a tensor whose
            memory is unknown (no phase that reads it is captured).
        is_plain: whether it is its only part.
    """

    parts: tuple[tuple[int, TensorLayout], ...]
    is_plain: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """Where a tensor is now."""
        parts = ((x.data_ptr(), TensorLayout.of(x)) for x in plain_parts(tensor))
        return cls(tuple(parts), is_plain(tensor))

    def has_layouts_of(self, other: Place) -> bool:
        """Whether the parts of two tensors have the same layouts."""
        return [layout for _, layout in self.parts] == [layout for _, layout in other.parts]


class StageState:
    """Tensors that a stage's graphs read where they are, or in copies.

    Most stay where they are. A buffer that the forward changes, and a parameter that another device
    has, are new tensors in every step: graphs read a copy, which is written anew when the original
    is another, or has changed.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._settings = settings()
        self._seen = 0
        self._moves: Counter[int] = Counter()
        self._copies: dict[int, Tensor] = {}
        self._copied: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def is_as_before(self, tensors: Sequence[Tensor]) -> bool:
        """Compare the places of tensors with those of the last call.

        Args:
            tensors: of a run.

        Returns:
            Whether graphs that were captured since then can be replayed. If not, a tensor has
            moved (of one that moves often, later graphs read a copy), or the user has changed a
            setting of torch by which kernels are chosen.
        """
        places = [Place.of(x) for x in tensors]
        before, self._places = self._places or places, places
        self._seen += 1
        changed = [
            i
            for i, (old, new) in enumerate(zip(before, places, strict=True))
            if old != new and not (self._is_copied(i, new) and old.has_layouts_of(new))
        ]
        for i in changed:
            # Between the first two runs, before anything is captured, one move is evidence enough.
            self._moves[i] += 1 if self._seen > 2 else OFTEN
            self._copies.pop(i, None)
            self._copied.pop(i, None)
        old, self._settings = self._settings, settings()
        return not changed and old == self._settings

    def in_place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that graphs read, with the values of a run, on the current stream.

        Args:
            tensors: of the run; `is_as_before` has seen them.
        """
        return [
            self._copy_of(i, x) if self._is_copied(i, self._places[i]) else x.detach()
            for i, x in enumerate(tensors)
        ]

    def refresh(self, tensors: Sequence[Tensor]) -> None:
        """Write the values of a run to the copies, on the current stream.

        Args:
            tensors: as for `in_place`.
        """
        for i in self._copies:
            self._copy_of(i, tensors[i])

    def _is_copied(self, i: int, place: Place) -> bool:
        return place.is_plain and self._moves[i] >= OFTEN

    def _copy_of(self, i: int, tensor: Tensor) -> Tensor:
        if i not in self._copies:
            self._copies[i] = TensorLayout.of(tensor).dense().new(tensor.device)
        known = self._copied.get(i)
        version = -1 if tensor.is_inference() else tensor._version  # nobody counts its changes
        if known is None or known[0]() is not tensor or known[1] != version or version < 0:
            self._copies[i].copy_(tensor)
            self._copied[i] = weakref.ref(tensor), version
        return self._copies[i]
