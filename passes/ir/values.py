"""What a value looks like, for every pass: sizes in `B`, dtypes, kinds, rules of combination."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import sympy
import torch
from torch import fx

from autopipe.errors import require as require  # used by the programs that import from here

B = sympy.Symbol("B")
"""The batch size of whatever runs: the whole batch, or one micro-batch.

It carries no assumptions, so that ``expr.subs("B", 8)`` means this symbol."""


def at_batch(expr: sympy.Expr | int, batch: int) -> int:
    """The integer that a size expression takes at one batch size."""
    return expr if isinstance(expr, int) else int(sympy.sympify(expr).subs(B, batch))


def results_of(graph: fx.Graph) -> list[Any]:
    """What a graph returns: nodes, now and then a constant."""
    returned: Any = graph.output_node().args[0]
    return list(returned)


class InputKind(str, Enum):
    """Where a value that no node computes comes from."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INPUT = "input"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class TensorSpec:
    """A tensor known by its looks: shape (each size an expression in `B`) and dtype."""

    name: str
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> sympy.Expr:
        return sympy.Mul(*self.shape)

    @property
    def nbytes(self) -> sympy.Expr:
        """Bytes, as an expression in `B`."""
        return self.numel * self.dtype.itemsize

    @property
    def batch_dim(self) -> int | None:
        """The first dimension whose size depends on `B`, or None."""
        return next((d for d, s in enumerate(self.shape) if s.free_symbols), None)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Input:
    """A placeholder of the captured graph.

    Attributes:
        spec: its looks.
        kind: parameter, buffer, constant or input of a call.
        target: qualified name in the model, or key in `Captured.constants`; "" for inputs.
        index: position among the call's flattened leaves; -1 for everything else.
        batch_dim: the dimension that is cut into micro-batches; None where there is none.
        requires_grad: whether it wanted a gradient when it was captured. (Costs go by it; programs
            go by what it wants when they run.)
    """

    spec: TensorSpec
    kind: InputKind
    target: str = ""
    index: int = -1
    batch_dim: int | None = None
    requires_grad: bool = False

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Output:
    """A tensor that every micro-batch yields, and how the M of them make one.

    combine: "cat" along `dim`; "sum"; "mean" weighted by the micro-batches' sizes; "same" where
    the value does not depend on the batch (its gradient is shared out by size).
    internal: it serves the new value of a buffer, no result: no gradient will come for it.
    """

    spec: TensorSpec
    combine: str
    dim: int | None = None
    internal: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    def verify(self) -> None:
        require(
            self.combine in ("cat", "sum", "mean", "same"),
            "unknown combination",
            found=self.combine,
        )
        require(
            (self.combine == "cat") == (self.dim is not None),
            "a concatenation needs a dimension, nothing else has one",
            node=self.name,
        )


@dataclass(frozen=True)
class ResultLeaf:
    """One leaf of the model's result: `kind` is "value" (index into the final values), "input"
    (index into the call's leaves), "parameter" (qualified name), "size" (a function of the batch's
    size) or "constant" (the object)."""

    kind: str
    value: Any


@dataclass(frozen=True)
class SizeGuards:
    """The batch sizes that a captured graph is valid for.

    Attributes:
        conditions: conditions on `B`: branches that the model took, sizes that it used as numbers.
        valid_for_one: whether a batch of one sample, which is traced as two, takes the same
            branches.
    """

    conditions: tuple[sympy.Basic, ...] = ()
    valid_for_one: bool = True

    def hold_for(self, batch: int) -> bool:
        """Whether the graph computes what the model computes for a batch of this size."""
        return (batch > 1 or self.valid_for_one) and all(
            holds_at(c, batch) for c in self.conditions
        )


ANY_BATCH_SIZE = SizeGuards()
"""Guards of a graph that is valid for every batch size."""

SINGLE_SAMPLE = SizeGuards((sympy.Eq(B, 1),))
"""Guards of a graph that was traced with one sample and is valid for one sample only."""


def holds_at(condition: sympy.Basic, batch: int) -> bool:
    """Evaluate a condition on `B` at one batch size."""
    return bool(condition.subs(B, batch) == sympy.true)
