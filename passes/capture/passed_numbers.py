"""`PassedNumbers`: arguments that are numbers without a value while a model is traced.

A branch on such a number (``if beta > 0``, ``min(1.0, step / 1000)``) is taken as in the example,
and its condition is recorded: the graph is valid for the numbers that satisfy it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch

from autopipe.errors import CaptureError
from autopipe.passes.ir import NumberGuards, number_symbol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


class PassedNumbers:
    """The numbers of a call that are inputs of its graph.

    Args:
        values: by their positions among the leaves of the call.

    Attributes:
        values: likewise.
    """

    def __init__(self, values: Mapping[int, float]) -> None:
        self.values = values
        self._symbols: dict[Any, int] = {}  # of the last trace → position
        self._conditions: dict[Any, None] = {}

    def __contains__(self, position: int) -> bool:
        return position in self.values

    def start(self) -> None:
        """Begin a trace, which has symbols of its own."""
        self._symbols.clear()

    def number(self, position: int, tensor: Tensor) -> Any:
        """Return the number that a tensor of one entry holds, and remember its symbol.

        Args:
            position: of the leaf.
            tensor: in its place.
        """
        found = tensor.item()
        if isinstance(found, (torch.SymInt, torch.SymFloat)):
            self._symbols[found.node.expr] = position
        return found

    @property
    def examples(self) -> dict[Any, float]:
        """The values of the symbols in the last trace."""
        return {symbol: self.values[n] for symbol, n in self._symbols.items()}

    @property
    def names(self) -> set[str]:
        """What torch calls these numbers in the last trace."""
        return set(map(str, self._symbols))

    def answer(self, condition: torch.SymBool) -> bool | None:
        """Decide a condition on these numbers as the example does, and record it.

        Args:
            condition: of a branch.

        Returns:
            Its value; None if it depends on something else.
        """
        expr = condition.node.expr
        if not self._symbols or not expr.free_symbols <= self._symbols.keys():
            return None
        named = self._named(expr)
        for guard, value in ((named, True), (sympy.Not(named), False)):
            if NumberGuards((guard,)).hold_for(self.values):
                self._conditions[guard] = None
                return value
        return None

    def require(self, conditions: Iterable[sympy.Basic]) -> None:
        """Record conditions on the symbols of the last trace.

        Raises:
            CaptureError: they do not hold for the example.
        """
        for condition in map(self._named, conditions):
            if not NumberGuards((condition,)).hold_for(self.values):
                raise CaptureError("Python computes with this number what no tensor does")
            if condition != sympy.true:
                self._conditions[condition] = None

    def _named(self, expr: sympy.Basic) -> sympy.Basic:
        return expr.xreplace({s: number_symbol(n) for s, n in self._symbols.items()})

    @property
    def guards(self) -> NumberGuards:
        """The numbers for which the traces hold."""
        return NumberGuards(tuple(self._conditions))
