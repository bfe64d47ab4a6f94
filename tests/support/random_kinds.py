"""What the values of a random model look like, and what an operator makes of them.

A `Kind` is a type with the batch left symbolic; a rule is a function from the kinds of an
operator's arguments (and one small number, its choice of dimension, size or variant) to a `Made`,
or to None where the operator does not apply. So a program is checked when it is drawn, and none
but valid ones are run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "float": torch.float64,
    "complex": torch.complex128,
    "long": torch.int64,
    "bool": torch.bool,
}


class Brief:
    """Dataclasses that print without the fields that have their default: what one would write."""

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Kind(Brief):
    """The type of a value.

    Attributes:
        shape: sizes, without the batch dimension.
        dtype: a key of `DTYPES`.
        batch: where the batch dimension stands among the others; None: there is none.
        rows: how many rows of it belong to one sample (``x.flatten(0, 1)``).
        high: entries of a "long" lie in [0, high).
        reduced: the batch has been summed over; only further losses may be made of it.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float"
    batch: int | None = 0
    rows: int = 1
    high: int = 0
    reduced: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes, the batch's as the negative number of its rows per sample."""
        if self.batch is None:
            return self.shape
        return (*self.shape[: self.batch], -self.rows, *self.shape[self.batch :])

    @property
    def numel(self) -> int:
        """Entries per sample."""
        return torch.Size(self.shape).numel() * self.rows

    def axis(self, n: int) -> int:
        """The position in the tensor of the n-th dimension of `shape`."""
        return n + (self.batch is not None and n >= self.batch)

    def of_sizes(self, sizes: tuple[int, ...], **changes: Any) -> Kind | None:
        """The same with other sizes; None if the batch would be there twice."""
        batch = [i for i, s in enumerate(sizes) if s < 0]
        if len(batch) > 1:
            return None
        return replace(
            self,
            shape=tuple(s for s in sizes if s >= 0),
            batch=batch[0] if batch else None,
            rows=-sizes[batch[0]] if batch else 1,
            **changes,
        )

    def tensor(self, batch: int, generator: torch.Generator) -> Tensor:
        """Random entries."""
        sizes = [-s * batch if s < 0 else s for s in self.sizes]
        if self.dtype == "long":
            return torch.randint(self.high, sizes, generator=generator)
        if self.dtype == "bool":
            return torch.rand(sizes, generator=generator) < 0.6
        return torch.randn(sizes, generator=generator, dtype=DTYPES[self.dtype])


@dataclass(frozen=True)
class Made:
    """An operator on given kinds.

    Attributes:
        run: called with the layer, if there is one, and the tensors.
        kinds: of the results; a single one is returned bare.
        layer: the module it needs: a key of `random_models.LAYERS` and its sizes.
        view: the results share the memory of the first argument.
        writes: it changes the first argument and returns it.
        fixed: nothing that shares memory with the results may be written to: whether they do
            depends on strides, or torch forbids it.
        saves: what autograd keeps: "i" for the arguments, "o" for the results.
    """

    run: Callable[..., Any]
    kinds: tuple[Kind, ...]
    layer: tuple[Any, ...] | None = None
    view: bool = False
    writes: bool = False
    fixed: bool = False
    saves: str = "io"


Rule = Callable[..., Made | None]
"""``rule(number, *kinds)``."""

RULES: dict[str, Rule] = {}
"""Every operator by name."""


def rule(function: Rule) -> Rule:
    """Enter a rule under its function's name, without the underscore that avoids a builtin's."""
    RULES[function.__name__.removeprefix("op_")] = function
    return function


def arity(function: Rule) -> int:
    """How many values an operator takes."""
    return len(inspect.signature(function).parameters) - 1


# ------------------------------------------------------------------------------- questions on kinds


def plain(*kinds: Kind, dtype: str = "float") -> bool:
    """All of this dtype, and none a loss."""
    return all(k.dtype == dtype and not k.reduced for k in kinds)


def featured(*kinds: Kind) -> bool:
    """Floats whose last dimension is a feature dimension with entries."""
    return plain(*kinds) and all(
        k.shape and k.shape[-1] > 0 and k.batch != len(k.shape) for k in kinds
    )


def batch_first(*kinds: Kind) -> bool:
    """All batched in dimension 0, with the same number of rows per sample."""
    return all(k.batch == 0 and not k.reduced for k in kinds) and len({k.rows for k in kinds}) == 1


def broadcast(*kinds: Kind) -> Kind | None:
    """The kind of an elementwise operator's result (dtype of the first); None if they differ."""
    sizes: list[int] = []
    for kind in kinds:
        other = list(kind.sizes)
        length = max(len(sizes), len(other))
        sizes = [1] * (length - len(sizes)) + sizes
        other = [1] * (length - len(other)) + other
        if any(a != b and 1 not in (a, b) for a, b in zip(sizes, other, strict=True)):
            return None
        sizes = [b if a == 1 else a for a, b in zip(sizes, other, strict=True)]
    return kinds[0].of_sizes(tuple(sizes), reduced=any(k.reduced for k in kinds))


def ramp(x: Tensor, n: int = 0) -> Tensor:
    """Numbers apart from one another, one per feature: what they are added to has no ties."""
    return torch.linspace(0.1 + 0.01 * n, 0.9, x.shape[-1], dtype=x.dtype) ** 2
