"""What a forward asked of its arguments that are tensors, besides their values and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autopipe.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence


@dataclass(frozen=True)
class ArgumentReads:
    """What a forward asked of its tensor arguments, to be compared in later calls.

    Attributes:
        identity: whether it may tell whether two arguments are the same object.
        flags: whether it asked if tensors require gradients.
        layout: whether it asked how an argument lies in memory.
        history: whether it asked if an argument is the result of an earlier computation.
        names: of all attributes that it can have read; None: unknown.
    """

    identity: bool = False
    flags: bool = False
    layout: bool = False
    history: bool = False
    names: frozenset[str] | None = frozenset()

    def key(self, leaves: Sequence[Any]) -> Hashable:
        """Return what distinguishes a call, as far as the forward asked for it.

        Args:
            leaves: the flattened call.
        """
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        return (
            tuple(shared(tensors).items()) if self.identity else None,
            tuple(x.requires_grad for x in tensors) if self.flags else None,
            tuple((n, what) for n, x in enumerate(tensors) if (what := self._hidden(x))),
        )

    def check(self, leaves: Sequence[Any], names: Sequence[str], source: str | None) -> None:
        """Check that the tensors which stand for the arguments in a trace are like them.

        Args:
            leaves: the flattened call.
            names: of the tensors among the leaves.
            source: where the forward is.

        Raises:
            CaptureError: the forward can tell an argument from the one that it was traced with.
        """
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        for name, what in zip(names, map(self._hidden, tensors), strict=True):
            if what is not None:
                found, remedy = what
                raise CaptureError(
                    "the forward asks for more of an argument than a captured graph knows",
                    node=name,
                    source=source,
                    found=found,
                    remedy=remedy,
                )

    def _hidden(self, tensor: Tensor) -> tuple[str, str] | None:
        """What a trace does not show of a tensor, though the forward asks for it; the remedy."""
        own: Mapping[str, Any] = tensor.__dict__
        if own:
            read = own.keys() if self.names is None else own.keys() & self.names
            if read:
                return (
                    f"a tensor with the attribute {min(read)}",
                    "pass it as an argument of its own",
                )
        if self.layout and not tensor.is_contiguous():
            return "a tensor that is not contiguous", "pass tensor.contiguous()"
        if self.history and not tensor.is_leaf:
            return "a tensor with a history (is_leaf, grad_fn)", "do not ask for it in the forward"
        return None


def shared(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Find tensors that are the same object.

    Args:
        tensors: of a call.

    Returns:
        For each that was there before: its position → the position of the first.
    """
    first: dict[int, int] = {}
    places = [(n, first.setdefault(id(x), n)) for n, x in enumerate(tensors)]
    return {n: other for n, other in places if n != other}
