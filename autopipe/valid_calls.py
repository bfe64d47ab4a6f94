"""`ValidCalls`: the calls for which a captured graph computes what the model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from autopipe.call_numbers import changed_numbers, number_keys
from autopipe.lengths import lengths_of

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

    from autopipe.call_signature import CallInputs
    from autopipe.passes.ir import Captured, Sizes

MANY_SHAPES = 512
"""How many shapes of inputs are remembered to fit or not."""


class ValidCalls:
    """The calls that a captured graph is valid for, among those with its `CallKey`.

    Args:
        captured: the graph.
        inputs: the call that it was captured for, with tensors for the numbers that are inputs.
        numbers: positions of these among the leaves.

    Attributes:
        numbers: likewise.
        constants: keys of the numbers that are constants of the graph, by position.
        shapes: of that call's tensors; () for leaves that are no tensors.
        lengths: for each leaf the dimensions, besides the batch, that may have any size.
    """

    def __init__(
        self, captured: Captured, inputs: CallInputs, numbers: Collection[int] = ()
    ) -> None:
        self._captured, self.numbers = captured, numbers
        self.constants = number_keys(inputs.leaves)
        self.shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in inputs.leaves]
        self.lengths = lengths_of(captured, len(inputs.leaves))
        dims = enumerate(inputs.batch_dims)
        self._free = {*dims, *((n, d) for n, of in enumerate(self.lengths) for d in of)}
        self._sizes: dict[Hashable, Sizes | None] = {}
        self._holds: dict[Hashable, bool] = {}

    def fits(self, inputs: CallInputs) -> bool:
        """Whether the model would take the captured branches, with the captured numbers.

        Args:
            inputs: of the call.
        """
        sizes = self.sizes(inputs)
        return (
            sizes is not None
            and not changed_numbers(inputs.leaves, self.constants)
            and self._captured.number_guards.hold_for(inputs.leaves)
            and self.changed_read(inputs) is None
            and self.holds(sizes)
        )

    def changed_read(self, inputs: CallInputs) -> str | None:
        """Return the name of a Python value that the forward read and that is another one now.

        Args:
            inputs: of the call.
        """
        leaves = inputs.with_tensors(self.numbers).leaves
        return self._captured.reads.changed(leaves)

    def holds(self, sizes: Sizes | None) -> bool:
        """Whether the model would take the captured branches for a call of these sizes.

        Args:
            sizes: what `sizes` returned.
        """
        if sizes is None:
            return False
        key = tuple(sizes.values())
        if key not in self._holds:
            if len(self._holds) >= MANY_SHAPES:
                self._holds.clear()
            self._holds[key] = self._captured.size_guards.hold_for(sizes)
        return self._holds[key]

    def sizes(self, inputs: CallInputs) -> Sizes | None:
        """Return the sizes of a call; None: the graph is for inputs of other shapes.

        Args:
            inputs: of the call.
        """
        key = inputs.batch, inputs.static_shapes()
        if key not in self._sizes:
            if len(self._sizes) >= MANY_SHAPES:
                self._sizes.clear()
            same = all(
                new == old or (n, d) in self._free
                for n, (leaf, shape) in enumerate(zip(inputs.leaves, self.shapes, strict=True))
                if isinstance(leaf, Tensor)
                for d, (new, old) in enumerate(zip(leaf.shape, shape, strict=True))
            )
            found = self._captured.sizes(inputs.leaves, inputs.batch) if same else None
            self._sizes[key] = found
        return self._sizes[key]
