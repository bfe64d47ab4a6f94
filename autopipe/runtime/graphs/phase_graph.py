"""`PhaseGraph`: one phase of a stage, captured for one slot."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autopipe.errors import UnsupportedError
from autopipe.runtime.random import default_generator_lock, keyed_call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autopipe.runtime.backends import Graph, GraphPool
    from autopipe.runtime.random import MicroBatchContext

_in_turn = threading.Lock()
"""Held while a phase is captured: some of what torch sets up for a capture is the process's."""


class CapturingContext:
    """`ctx` in generated code while its operators are captured.

    Args:
        sizes: the values of symbolic sizes.
        generators: by the stage's random ops, generators that are registered with the graph. They
            are given their seeds before each replay.
        sums: by the positions of parameters, the sums of their gradients.
        pool: captures the graph.
    """

    def __init__(
        self,
        ctx: MicroBatchContext,
        generators: Mapping[int, torch.Generator],
        sums: Mapping[int, Tensor],
        pool: GraphPool,
    ) -> None:
        self.sizes = ctx.sizes
        self.with_grad, self.in_suggested_format = ctx.with_grad, ctx.in_suggested_format
        self._generators, self._sums, self._pool = generators, sums, pool

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add to a sum that stays where it is."""
        self._sums[index].add_(gradient)

    def draw(self, index: int, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a random op so that each replay draws what its generator is seeded with by then."""
        generator = self._generators[index]
        keyed = keyed_call(op)
        if keyed is not None:
            return keyed(generator, args, kwargs)
        with self._pool.drawing_from(generator):
            return op(*args, **kwargs)

    def watched(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Refuse an operator that has to be watched whenever it runs."""
        raise UnsupportedError("an operator that cannot be captured", node=str(op))


class PhaseGraph(NamedTuple):
    """A captured phase.

    Attributes:
        graph: what is replayed.
        given: the tensors that it reads besides the stage's state: saved by another phase of its
            slot, or of its own, into which arguments are copied.
        results: what it returns: tensors that each replay writes anew, numbers, None.
        generators: by the stage's random ops, what they draw from.
    """

    graph: Graph
    given: tuple[Tensor, ...]
    results: tuple[Any, ...]
    generators: Mapping[int, torch.Generator]

    def replay(self, ctx: MicroBatchContext, arguments: Sequence[Tensor], sent: int) -> list[Any]:
        """Run the phase, on the current stream.

        Args:
            ctx: of the micro-batch.
            arguments: besides the stage's state, of the same shapes as those that were captured.
            sent: so many results, the first ones, leave the stage: they are copied.

        Returns:
            The results of the phase.
        """
        for x, own in zip(arguments, self.given, strict=True):
            if x is not own:
                own.copy_(x)
        for i, generator in self.generators.items():
            generator.manual_seed(ctx.seed(i))
        self.graph.replay()
        return [*map(copied, self.results[:sent]), *self.results[sent:]]


def copied(value: Any) -> Any:
    """A copy of a tensor; what is none as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def capture(
    pool: GraphPool,
    compute: Callable[[Any, list[Tensor]], Sequence[Any]],
    ctx: CapturingContext,
    state: Sequence[Tensor],
    given: Sequence[Tensor],
    generators: Mapping[int, torch.Generator],
) -> PhaseGraph:
    """Capture a phase; nothing runs.

    Args:
        pool: of the slot.
        compute: the generated function.
        ctx: its context.
        state: the stage's state, in memory that stays.
        given: the other arguments, likewise.
        generators: of `ctx`.

    Raises:
        Exception: of any type: the phase does something that cannot be captured.
    """
    graph = pool.new_graph()
    for generator in generators.values():
        graph.register_generator_state(generator)
    with ExitStack() as stack:
        stack.enter_context(_in_turn)
        stack.enter_context(default_generator_lock)  # it is registered with every graph
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(pool.capturing(graph))
        results = compute(ctx, [*state, *given])
    return PhaseGraph(graph, tuple(given), tuple(results), generators)
