"""Where the samples of a batch lie in a tensor: the facts that `follow` works out for every node.

Micro-batches compute what the whole batch would as long as each sample's part of a value depends
on that sample alone. So every value is in one of these states:

    Static   it does not depend on the batch
    Samples  one of its dimensions holds the samples, each computed from itself alone
    Reduced  a sum, a mean or the like over all samples; no dimension of the batch is left
    Mixed    samples were combined in a way that micro-batches would change, or may change
    Size     a number computed from shapes
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
from torch import fx

from autopipe.passes.graph import is_integer, is_size, symbolic_size, tensors_of
from autopipe.passes.ir import B

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from autopipe.passes.ir import Combine

    from .partial_reductions import PartialReduction

Shape: TypeAlias = "tuple[sympy.Expr, ...]"


@dataclass(frozen=True)
class Static:
    """Independent of the batch."""


@dataclass(frozen=True)
class Size:
    """A number computed from shapes: the same for every sample, but not in every micro-batch."""


@dataclass(frozen=True)
class Samples:
    """Dimension `dim` has the size ``outer * B * inner``; sample b is at ``[:, b, :]`` of it.

    ``(B, T, C)`` flattened to ``(B*T, C)`` has inner = T; two batches put one behind the other by
    `torch.cat` have outer = 2.

    constant: every sample's part is the same, as in zeros or in what was expanded.
    numbered: the values are ``numbered * b``, the place of a sample in a dimension with
    ``inner = numbered``: only good for finding that place again (``x[torch.arange(B), i]``).
    """

    dim: int
    outer: int = 1
    inner: int = 1
    numbered: int | None = None
    constant: bool = False

    def at(self, dim: int) -> Samples:
        return replace(self, dim=dim)


@dataclass(frozen=True)
class Reduced:
    """A reduction over all samples, or what was computed from one.

    how: the rule that combines the micro-batches' values, or the two steps that compute the batch's
    value. None: not known, or computed from another reduction.
    """

    how: Combine | PartialReduction | None = None


@dataclass(frozen=True)
class Mixed:
    """A sample's value depends on other samples.

    node: the call that mixed them.
    certain: micro-batches do change the value; otherwise only a trial can tell, as where tokens
    are sorted by expert and put back later.
    """

    node: fx.Node
    reason: str
    certain: bool = True


State: TypeAlias = "Static | Size | Samples | Reduced | Mixed"

STATIC, SIZE, REDUCED = Static(), Size(), Reduced()

COUNT_AS_VALUE = "the number of samples is used as a value"


class OpCall:
    """One node as the rules see it: arguments by name, their states and shapes."""

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
        """The tensor that the call works on."""
        return self.tensors[0]

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensors among the arguments, in order."""
        found: list[fx.Node] = []
        fx.map_arg((self.node.args, self.node.kwargs), found.append)
        return [n for n in found if not is_size(n)]

    @property
    def uses_batch_size(self) -> bool:
        """A number that depends on the batch's size is among the arguments."""
        found: list[fx.Node] = []
        fx.map_arg((self.node.args, self.node.kwargs), found.append)
        return any(map(depends_on_size, found))

    def state(self, node: Any) -> State:
        """An argument's state; numbers and None are static."""
        found = self.states[node] if isinstance(node, fx.Node) else STATIC
        assert not isinstance(found, tuple), "a call on several tensors at once"
        return found

    def shape(self, node: fx.Node) -> Shape:
        return tuple(map(symbolic_size, node.meta["val"].shape))

    def rank(self, node: fx.Node) -> int:
        return int(node.meta["val"].dim())

    @property
    def out(self) -> Shape:
        """The shape of the (first) result."""
        return tuple(map(symbolic_size, tensors_of(self.node)[0].shape))

    def mixed(self, reason: str, *, certain: bool = True) -> Mixed:
        return Mixed(self.node, reason, certain)

    def undecided(self, reason: str) -> Mixed:
        return Mixed(self.node, reason, certain=False)


def depends_on_size(argument: Any) -> bool:
    """An argument that is a number computed from the batch's size."""
    return (
        isinstance(argument, fx.Node)
        and is_size(argument)
        and bool(symbolic_size(argument.meta["val"]).free_symbols)
    )


def batch_dims(shape: Shape) -> list[int]:
    """The dimensions whose size depends on the batch."""
    return [d for d, s in enumerate(shape) if s.free_symbols]


def factor(size_: sympy.Expr) -> int | None:
    """k, where a size is k·B."""
    quotient = size_ / B
    return int(quotient) if quotient.is_Integer else None


def fits(state: State, shape: Shape) -> bool:
    """Whether a tensor of this shape can be in this state."""
    dims = batch_dims(shape)
    if isinstance(state, Samples):
        return dims == [state.dim] and shape[state.dim] == state.outer * B * state.inner
    return isinstance(state, Mixed) or not dims


def fresh(call: OpCall, shape: Shape, *, constant: bool = False) -> State:
    """The state of a new tensor whose entries are alike for all samples (zeros, noise)."""
    dims = batch_dims(shape)
    if not dims:
        return STATIC
    inner = factor(shape[dims[0]])
    if len(dims) > 1:
        return call.mixed("a value for every pair of samples")
    if inner is None:
        return call.mixed("its size is no multiple of the batch's")
    return Samples(dims[0], 1, inner, constant=constant)


def reshaped(call: OpCall, state: Samples, old: Shape, new: Shape) -> State:
    """Through any view that keeps the elements' order.

    In row-major order an element's index is (before, sample, behind); the extents of what lies
    before and behind do not change, only where the dimensions are cut.
    """
    before = prod(map(int, old[: state.dim])) * state.outer
    behind = state.inner * prod(map(int, old[state.dim + 1 :]))
    dims = batch_dims(new)
    if len(dims) == 1:
        dim = dims[0]
        ahead, after = prod(map(int, new[:dim])), prod(map(int, new[dim + 1 :]))
        empty = before * behind == 0
        if empty and fits(fresh(call, new), new):
            return fresh(call, new)
        if not empty and before % ahead == 0 and behind % after == 0:
            found = replace(state, dim=dim, outer=before // ahead, inner=behind // after)
            if fits(found, new):
                return found
    return call.mixed("a view that regroups elements of different samples")


def join(call: OpCall, states: Iterable[State]) -> State:
    """The state of a value computed from several, whose dimensions are the result's."""
    found = list(states)
    mixed = [s for s in found if isinstance(s, Mixed)]
    if mixed:
        return next((s for s in mixed if s.certain), mixed[0])
    listed = [s for s in found if isinstance(s, Samples)]
    constant = all(s.constant for s in listed)
    samples = {replace(s, constant=constant) for s in listed}
    if any(isinstance(s, Reduced) for s in found):
        if not samples:
            return REDUCED
        return call.mixed(
            "every sample's result depends on a reduction over all of them",
            certain=not is_integer(call.node),
        )
    if not samples:
        return STATIC
    if any(s.numbered is not None for s in samples):
        return call.mixed(
            "a sample's result depends on its place in the batch", certain=not is_integer(call.node)
        )
    if len({s.dim for s in samples}) > 1:
        return call.mixed("it combines every sample with every other")
    if len(samples) > 1:
        return call.undecided("it combines samples that are arranged in different orders")
    return samples.pop()


def alone(call: OpCall, reason: str = "a further operand depends on the batch") -> State:
    """The first tensor's state, for what takes further ones that must not depend on the batch."""
    first, *others = [call.state(n) for n in call.tensors]
    if any(isinstance(s, Reduced) for s in others):
        return join(call, [first, REDUCED])
    if any(s != STATIC for s in others):
        return call.undecided(reason)
    return join(call, [first])


def aligned(call: OpCall, nodes: Sequence[fx.Node], rank: int | None = None) -> State:
    """The joint state of tensors that are broadcast against one another."""
    rank = rank if rank is not None else max((call.rank(n) for n in nodes), default=0)
    states: list[State] = []
    for node in nodes:
        state = call.state(node)
        if isinstance(state, Samples):
            state = state.at(state.dim + rank - call.rank(node))
        states.append(state)
    return join(call, states)
