"""`CaptureRequest`: everything that decides what a captured graph computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch.utils._pytree import TreeSpec

    from .frontends import UserModel


@dataclass(frozen=True, eq=False)
class CaptureRequest:
    """Arguments of `capture`.

    Attributes:
        model: the model, in the mode (train or eval) to capture; an ExportedProgram must have been
            exported with a dynamic batch dimension.
        leaves: the flattened ``(args, kwargs)``; leaves that are not tensors become constants.
        spec: structure of ``(args, kwargs)``.
        batch_dims: for each leaf the dimension that micro-batches split, or None.
        lengths: for each leaf its other dimensions whose sizes may change, with the names that the
            user gave them, or None.
        numbers: positions of tensors of one entry in the place of numbers: the model gets a number
            whose value the graph does not know.
        whole: there is always a single micro-batch, so results need not be combined.
        single: the batch has one sample, and the graph need only hold for that size.
        batch_norm: "deferred": buffers change as if the whole batch had been seen once; "micro":
            once per micro-batch.
        out_reduce: how scalar results are combined over micro-batches if no rule can be derived:
            "mean", "sum" or None (an error).
        loss_fn: is captured behind the model, for a call with the keyword `TARGET`.
    """

    model: UserModel
    leaves: Sequence[Any]
    spec: TreeSpec
    batch_dims: Sequence[int | None]
    lengths: Sequence[Mapping[int, str | None]] = ()
    numbers: Collection[int] = ()
    whole: bool = False
    single: bool = False
    batch_norm: str = "deferred"
    out_reduce: str | None = None
    loss_fn: Callable[..., Any] | None = None

    @property
    def symbolic_batch_dims(self) -> Sequence[int | None]:
        """For each leaf the batch dimension if its size is symbolic in the graph, or None."""
        return [None] * len(self.leaves) if self.single else self.batch_dims

    def lengths_of(self, position: int) -> Mapping[int, str | None]:
        """The entry of `lengths` for a leaf."""
        return self.lengths[position] if self.lengths else {}
