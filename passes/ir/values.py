"""Values of a program: sizes, shapes in the batch size `B`, inputs, outputs, results, guards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch
from torch import fx

from autopipe.errors import require as require  # used by the programs that import from here

from .combine import Combine, Concatenate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

B = sympy.Symbol("B")
"""The batch size: number of samples of the whole batch, or of one micro-batch.

It has no sympy assumptions, so that ``expr.subs("B", 8)`` replaces this symbol."""


def at_batch(expr: sympy.Expr | int, batch: int) -> int:
    """Evaluate a size expression in `B` at one batch size."""
    return expr if isinstance(expr, int) else int(sympy.sympify(expr).subs(B, batch))


Sizes: TypeAlias = "Mapping[Any, int]"
"""The values of symbols: of `B`, and of the names of lengths."""


@dataclass(frozen=True)
class Length:
    """A size besides the batch that may change from call to call, such as a sequence length.

    Attributes:
        name: its symbol in size expressions.
        example: its value in the example that was captured.
        places: where a call has it: (position of a leaf, dimension).
    """

    name: sympy.Symbol
    example: int
    places: tuple[tuple[int, int], ...]

    def read(self, leaves: Sequence[Any]) -> int | None:
        """Read it off a call's flattened inputs; None: they contradict one another."""
        found = {leaves[position].shape[dim] for position, dim in self.places}
        return int(found.pop()) if len(found) == 1 else None


def results_of(graph: fx.Graph) -> list[Any]:
    """Return what a graph returns: nodes, and sometimes a constant."""
    returned: Any = graph.output_node().args[0]
    return list(returned)


class InputKind(str, Enum):
    """The kinds of tensors that a graph's placeholders represent."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INPUT = "input"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class TensorSpec:
    """Metadata of a tensor in a captured graph.

    Attributes:
        name: of its node.
        shape: each size an expression in `B`, with lengths as in the example.
        dtype: of its elements.
        in_lengths: `shape` as expressions in `B` and lengths; None: it depends on no length.
    """

    name: str
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    in_lengths: tuple[sympy.Expr, ...] | None = None

    @property
    def full_shape(self) -> tuple[sympy.Expr, ...]:
        """Each size as an expression in `B` and lengths."""
        return self.shape if self.in_lengths is None else self.in_lengths

    @property
    def numel(self) -> sympy.Expr:
        """Number of elements, as an expression in `B`."""
        return sympy.Mul(*self.shape)

    @property
    def nbytes(self) -> sympy.Expr:
        """Size in bytes, as an expression in `B`."""
        return self.numel * self.dtype.itemsize

    @property
    def batch_dim(self) -> int | None:
        """The first dimension whose size depends on `B`, or None."""
        return next((d for d, s in enumerate(self.shape) if s.free_symbols), None)

    def at_lengths(self, lengths: Sizes) -> TensorSpec:
        """Return it with other lengths than those of the example.

        Args:
            lengths: the value of each.
        """
        values = {symbol: sympy.Integer(n) for symbol, n in lengths.items()}
        return replace(self, shape=tuple(n.xreplace(values) for n in self.full_shape))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype}[{', '.join(map(str, self.full_shape))}]"


@dataclass(frozen=True)
class Input:
    """A placeholder of the captured graph.

    Attributes:
        spec: its metadata.
        kind: parameter, buffer, constant or input of a call.
        target: qualified name in the model, or key in `Captured.constants`; "" for an input.
        index: position among the call's flattened inputs; -1 for the other kinds.
        batch_dim: the dimension that is divided into micro-batches; None if there is none.
        requires_grad: whether it required a gradient at capture. (Costs use this; a program uses
            the flag at run time.)
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
    """A tensor that every micro-batch returns, and how the M of them are combined.

    combine: the rule that gathers the values and shares the gradient.
    internal: it is for a buffer's new value, not for a result: it gets no gradient.
    """

    spec: TensorSpec
    combine: Combine
    internal: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    def verify(self) -> None:
        combine = self.combine
        require(
            isinstance(combine, Combine),
            "unknown combination",
            node=self.name,
            found=str(combine),
        )
        if isinstance(combine, Concatenate):
            require(
                0 <= combine.dim < len(self.spec.shape),
                "a concatenation along a dimension that the output does not have",
                node=self.name,
                found=str(combine.dim),
            )


@dataclass(frozen=True)
class ResultLeaf:
    """One leaf of the model's result.

    Attributes:
        kind: "value", "input", "parameter", "size" or "constant".
        value: depending on the kind, an index into the final values, an index into the call's
            flattened inputs, a qualified name, a function of `Sizes`, or the object itself.
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class SizeGuards:
    """The sizes that a captured graph is valid for.

    Attributes:
        conditions: conditions on `B` and on lengths, from branches that the model took and sizes
            used as numbers.
        valid_for_one: whether a batch of one sample, which is traced as two, takes the same
            branches.
    """

    conditions: tuple[sympy.Basic, ...] = ()
    valid_for_one: bool = True

    def hold_for(self, sizes: Sizes) -> bool:
        """Whether the graph computes what the model computes for these sizes."""
        return (sizes[B] > 1 or self.valid_for_one) and all_hold(self.conditions, sizes)


def number_symbol(position: int) -> sympy.Symbol:
    """The symbol for a number that is an argument.

    Args:
        position: of the argument among the leaves of a call.
    """
    return sympy.Symbol(f"number{position}")


@dataclass(frozen=True)
class NumberGuards:
    """The numbers that a captured graph is valid for, among those that are its inputs.

    Attributes:
        conditions: on `number_symbol`s, from branches that the model took.
    """

    conditions: tuple[sympy.Basic, ...] = ()

    def hold_for(self, leaves: Sequence[Any] | Mapping[int, float]) -> bool:
        """Whether the graph computes what the model computes for these numbers.

        Args:
            leaves: the flattened call, or its numbers by position.
        """
        symbols = {s for c in self.conditions for s in c.free_symbols}
        values = {s: sympy.sympify(leaves[int(s.name.removeprefix("number"))]) for s in symbols}
        try:
            return all(c.xreplace(values) == sympy.true for c in self.conditions)
        except (TypeError, ArithmeticError):  # nan is not comparable; as in Python, 1 / 0 fails
            return False


ANY_NUMBER = NumberGuards()
"""Guards of a graph that is valid for every number."""

ANY_BATCH_SIZE = SizeGuards()
"""Guards of a graph that is valid for every batch size."""

SINGLE_SAMPLE = SizeGuards((sympy.Eq(B, 1),))
"""Guards of a graph that was traced with one sample and is valid for one sample only."""


def holds_at(condition: sympy.Basic, sizes: Sizes) -> bool:
    """Evaluate a condition on `B` and lengths."""
    return all_hold((condition,), sizes)


def all_hold(conditions: Iterable[sympy.Basic], sizes: Sizes) -> bool:
    """Whether all of some conditions on `B` and lengths hold."""
    values = {symbol: sympy.Integer(n) for symbol, n in sizes.items()}
    return all(c.xreplace(values) == sympy.true for c in conditions)
