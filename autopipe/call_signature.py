"""Flatten a call's inputs, and compare their structure with that of captured calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from autopipe.errors import InputError
from autopipe.passes.capture import register_dataclasses

if TYPE_CHECKING:
    from collections.abc import Mapping


def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten a call's inputs; dataclasses are containers.

    Keywords are sorted, because their order makes no difference.

    Args:
        args, kwargs: of the call.

    Returns:
        Leaves and structure.
    """
    register_dataclasses((args, kwargs))
    return pytree.tree_flatten((args, dict(sorted(kwargs.items()))))


class CallInputs(NamedTuple):
    """A call's inputs, flattened.

    Attributes:
        leaves: tensors and other values.
        spec: structure of ``(args, kwargs)``.
        batch_dims: for each leaf the dimension that micro-batches split, or None.
        batch: number of samples.
    """

    leaves: list[Any]
    spec: pytree.TreeSpec
    batch_dims: tuple[int | None, ...]
    batch: int

    def static_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The tensors' shapes without their batch dimensions."""
        return tuple(
            tuple(n for d, n in enumerate(x.shape) if d != dim)
            for x, dim in zip(self.leaves, self.batch_dims, strict=True)
            if isinstance(x, Tensor)
        )


class CallSignature(NamedTuple):
    """What a call must have in common with a captured one; sizes may differ.

    Attributes:
        spec: structure of ``(args, kwargs)``.
        leaves: dtype and number of dimensions of tensors; ("", repr) of other values.
    """

    spec: pytree.TreeSpec
    leaves: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, inputs: CallInputs) -> CallSignature:
        """The signature of a call."""
        leaves = (
            (x.dtype, x.ndim) if isinstance(x, Tensor) else ("", repr(x)) for x in inputs.leaves
        )
        return cls(inputs.spec, tuple(leaves))

    def __hash__(self) -> int:
        return hash((str(self.spec), self.leaves))


def structure_error(expected: CallSignature, found: CallSignature) -> InputError:
    """Return the error for a call whose structure differs from the captured ones.

    Args:
        expected: the signature of a captured call.
        found: the signature of the call.
    """
    return InputError(
        "the inputs differ in structure from those that the pipeline was compiled for",
        expected=_described(expected),
        found=_described(found),
        remedy="call it as it was compiled; pipe.capture(...) with these inputs makes it accept"
        " them too",
    )


def _described(structure: CallSignature) -> str:
    """Write a call as code, with tensors as dtype and number of dimensions."""

    class Shown(str):
        __repr__ = str.__str__

    shown = [
        Shown(f"{str(a).removeprefix('torch.')} {b}-d" if isinstance(b, int) else b)
        for a, b in structure.leaves
    ]
    args, kwargs = pytree.tree_unflatten(shown, structure.spec)
    parts = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
    return f"pipe({', '.join(parts)})"
