"""`OpCall`, one op as the rules see it; compute a result's state from those of its operands."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from torch import fx

from autopipe.passes.graph import is_integer, is_size, symbolic_size, tensors_of

from .lattice import (
    REDUCED,
    STATIC,
    Mixed,
    Reduced,
    Samples,
    State,
    batch_dims,
    batch_multiple,
    fits_shape,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .lattice import Shape


class OpCall:
    """One op as the rules see it: arguments by name, their states and shapes.

    Args:
        node: the op.
        states: of the nodes before it.
    """

    def __init__(self, node: fx.Node, states: Mapping[fx.Node, Any]) -> None:
        self.node = node
        self.states = states
        schema = getattr(node.target, "_schema", None)
        self.arguments: dict[str, Any] = {}
        if schema is not None:
            for i, argument in enumerate(schema.arguments):
                if i < len(node.args) and not argument.kwarg_only:
                    self.arguments[argument.name] = node.args[i]
                elif argument.name in node.kwargs:
                    self.arguments[argument.name] = node.kwargs[argument.name]
                elif argument.has_default_value():
                    self.arguments[argument.name] = argument.default_value

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self.arguments

    @property
    def first(self) -> fx.Node:
        """The first tensor among the arguments."""
        return self.tensors[0]

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensors among the arguments, in order."""
        found: list[fx.Node] = []
        fx.map_arg((self.node.args, self.node.kwargs), found.append)
        return [n for n in found if not is_size(n)]

    @property
    def uses_batch_size(self) -> bool:
        """Whether a number that depends on the batch size is among the arguments."""
        found: list[fx.Node] = []
        fx.map_arg((self.node.args, self.node.kwargs), found.append)
        return any(map(depends_on_batch_size, found))

    def state(self, node: Any) -> State:
        """An argument's state; numbers and None are `Static`."""
        found = self.states[node] if isinstance(node, fx.Node) else STATIC
        assert not isinstance(found, tuple), "a call on several tensors at once"
        return found

    def shape(self, node: fx.Node) -> Shape:
        return tuple(map(symbolic_size, node.meta["val"].shape))

    def rank(self, node: fx.Node) -> int:
        return int(node.meta["val"].dim())

    @property
    def out_shape(self) -> Shape:
        """The shape of the (first) result."""
        return tuple(map(symbolic_size, tensors_of(self.node)[0].shape))

    def mixed(self, reason: str, *, proven: bool = True) -> Mixed:
        """The state of a result that mixes samples."""
        return Mixed(self.node, reason, proven)

    def undecided(self, reason: str) -> Mixed:
        """The state of a result that may mix samples: a trial can decide it."""
        return Mixed(self.node, reason, proven=False)


def depends_on_batch_size(argument: Any) -> bool:
    """Whether an argument is a number computed from the batch size."""
    return (
        isinstance(argument, fx.Node)
        and is_size(argument)
        and bool(symbolic_size(argument.meta["val"]).free_symbols)
    )


def new_tensor_state(call: OpCall, shape: Shape, *, uniform: bool = False) -> State:
    """The state of a new tensor whose entries are equal or independent (zeros, noise).

    Args:
        call: the op that creates it.
        shape: of the tensor.
        uniform: whether all entries are equal.
    """
    dims = batch_dims(shape)
    if not dims:
        return STATIC
    per_sample = batch_multiple(shape[dims[0]])
    if len(dims) > 1:
        return call.mixed("a value for every pair of samples")
    if per_sample is None:
        return call.mixed("its size is no multiple of the batch's")
    return Samples(dims[0], 1, per_sample, uniform=uniform)


def view_state(call: OpCall, state: Samples, old: Shape, new: Shape) -> State:
    """The state of a view that keeps the elements in row-major order.

    Such a view keeps the flat index, which is ``(before, b, behind)`` with sample b in the middle.
    The extents of ``before`` and ``behind`` do not change; only their split into dimensions does:

        before = Π old[:dim] · batches      batches'    = before / Π new[:dim']
        behind = per_sample · Π old[dim+1:]  per_sample' = behind / Π new[dim'+1:]

    Args:
        call: the view.
        state: of its operand.
        old: the operand's shape.
        new: the result's shape.
    """
    before = prod(map(int, old[: state.dim])) * state.batches
    behind = state.per_sample * prod(map(int, old[state.dim + 1 :]))
    dims = batch_dims(new)
    if len(dims) == 1:
        dim = dims[0]
        ahead, after = prod(map(int, new[:dim])), prod(map(int, new[dim + 1 :]))
        empty = before * behind == 0
        if empty and fits_shape(new_tensor_state(call, new), new):
            return new_tensor_state(call, new)
        if not empty and before % ahead == 0 and behind % after == 0:
            found = replace(state, dim=dim, batches=before // ahead, per_sample=behind // after)
            if fits_shape(found, new):
                return found
    return call.mixed("a view that regroups elements of different samples")


def join_states(call: OpCall, states: Iterable[State]) -> State:
    """The state of a value computed entry by entry from values in these states.

    Static changes nothing; Samples must be equal but for `uniform`; Samples and Reduced give Mixed.
    """
    found = list(states)
    mixed = [s for s in found if isinstance(s, Mixed)]
    if mixed:
        return next((s for s in mixed if s.proven), mixed[0])
    listed = [s for s in found if isinstance(s, Samples)]
    uniform = all(s.uniform for s in listed)
    samples = {replace(s, uniform=uniform) for s in listed}
    if any(isinstance(s, Reduced) for s in found):
        if not samples:
            return REDUCED
        return call.mixed(
            "every sample's result depends on a reduction over all of them",
            proven=not is_integer(call.node),
        )
    if not samples:
        return STATIC
    if any(s.index_step is not None for s in samples):
        return call.mixed(
            "a sample's result depends on its position in the batch",
            proven=not is_integer(call.node),
        )
    if len({s.dim for s in samples}) > 1:
        return call.mixed("it combines every sample with every other")
    if len(samples) > 1:
        return call.undecided("it combines samples that are arranged in different orders")
    return samples.pop()


def first_operand_state(
    call: OpCall, reason: str = "a further operand depends on the batch"
) -> State:
    """The first tensor's state, for ops whose other operands must not depend on the batch."""
    first, *others = [call.state(n) for n in call.tensors]
    if any(isinstance(s, Reduced) for s in others):
        return join_states(call, [first, REDUCED])
    if any(s != STATIC for s in others):
        return call.undecided(reason)
    return join_states(call, [first])


def broadcast_state(call: OpCall, nodes: Sequence[fx.Node], rank: int | None = None) -> State:
    """The joint state of tensors that are broadcast against each other, aligned at the right.

    Args:
        call: the op.
        nodes: the tensors.
        rank: the result's; by default the largest of the tensors'.
    """
    rank = rank if rank is not None else max((call.rank(n) for n in nodes), default=0)
    states: list[State] = []
    for node in nodes:
        state = call.state(node)
        if isinstance(state, Samples):
            state = state.with_dim(state.dim + rank - call.rank(node))
        states.append(state)
    return join_states(call, states)
