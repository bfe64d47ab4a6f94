"""What of a call may differ in later calls that use the same graph: lengths and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from autopipe.call_numbers import changed_numbers
from autopipe.lengths import LengthDims, changed_lengths, marked_lengths, named_lengths
from autopipe.passes.capture import leaf_names
from autopipe.passes.graph import warn_at_user_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence, Set

    from autopipe.call_signature import CallInputs
    from autopipe.compiled import CompiledModel


class Varying(NamedTuple):
    """What a capture is asked to keep open.

    Attributes:
        lengths: for each leaf the dimensions whose sizes are symbolic, with their names or None.
        numbers: positions of the numbers that are inputs of the graph.
    """

    lengths: LengthDims
    numbers: frozenset[int]

    @property
    def dims(self) -> set[tuple[int, int]]:
        """The lengths, as (position of a leaf, dimension)."""
        return {(n, d) for n, dims in enumerate(self.lengths) for d in dims}

    def attempts(self) -> Iterator[Varying]:
        """This, and what to try if it cannot be captured; the last leaves nothing open."""
        nothing: LengthDims = ({},) * len(self.lengths)
        if self.numbers and any(self.lengths):
            yield self
            yield self._replace(numbers=frozenset())
        if self.numbers:
            yield self._replace(lengths=nothing)
        elif any(self.lengths):
            yield self
        yield Varying(nothing, frozenset())


class Fixed:
    """What the model fixes, found by trying.

    Attributes:
        dims: (position of a leaf, dimension).
        numbers: positions of leaves.
    """

    def __init__(self) -> None:
        self.dims: set[tuple[int, int]] = set()
        self.numbers: set[int] = set()


def varying(
    model: Any,
    inputs: CallInputs,
    captured: Sequence[CompiledModel],
    dynamic: Mapping[str, Mapping[int, str | None]] | None,
    fixed: Fixed,
) -> Varying:
    """Find what differs between a call and the captured ones, or is marked by the user.

    Args:
        model: for the names of its arguments.
        inputs: the call.
        captured: what was captured of calls like this.
        dynamic: the option.
        fixed: what the model fixes.

    Raises:
        OptionError: a tensor does not have a dimension that is marked.
    """
    marked = marked_lengths(dynamic, model, inputs)
    changed = changed_lengths(inputs, [(c.calls.shapes, c.calls.lengths) for c in captured], marked)
    lengths = named_lengths(inputs, changed, [c.calls.shapes for c in captured], model, fixed.dims)
    numbers = {n for c in captured for n in c.calls.numbers}
    numbers |= {n for c in captured for n in changed_numbers(inputs.leaves, c.calls.constants)}
    return Varying(lengths, frozenset(numbers - fixed.numbers))


def warn_of_fixed(
    model: Any, inputs: CallInputs, dims: Set[tuple[int, int]], numbers: Set[int], reason: str
) -> None:
    """Warn that sizes and numbers which change cost a capture each.

    Args:
        model: for the names of its arguments.
        inputs: the call.
        dims: (position of a leaf, dimension) for each size that the model fixes.
        numbers: positions of numbers that it fixes.
        reason: why it does.
    """
    names = leaf_names(model, inputs.leaves, inputs.spec)
    if dims:
        found = ", ".join(f"dimension {d} of {names[n]}" for n, d in sorted(dims))
        warn_at_user_line(
            f"{found}: this model cannot be captured for any size there, so each new size costs a"
            f" capture ({reason}); pad to few sizes"
        )
    if numbers:
        found = ", ".join(names[n] for n in sorted(numbers))
        warn_at_user_line(
            f"{found}: this model cannot be captured for any number there, so each new one costs a"
            f" capture ({reason}); pass a tensor, or few different numbers"
        )
