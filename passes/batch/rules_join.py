"""How the batch runs through what takes tensors apart and puts them together: one rule per kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
from torch import fx

from autopipe.passes.graph import memory_owner, symbolic_size
from autopipe.passes.ir import B

from .lattice import (
    COUNT_AS_VALUE,
    STATIC,
    Reduced,
    Samples,
    State,
    batch_dims,
    depends_on_size,
    factor,
    fresh,
    join,
    reshaped,
)
from .rules_shape import PLACES, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .lattice import OpCall, Shape


def select(call: OpCall) -> State:
    """One entry of a dimension."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    dim = call["dim"] % call.rank(node)
    if dim != state.dim and depends_on_size(call["index"]):
        return call.mixed(COUNT_AS_VALUE)
    if dim == state.dim and state.constant and state.outer == 1:
        return STATIC
    if dim == state.dim:
        return Reduced() if (state.outer, state.inner) == (1, 1) else call.undecided(PLACES)
    return state.at(state.dim - (dim < state.dim))


def narrow(call: OpCall) -> State:
    """slice and narrow; along the batch only whole batches may be taken."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    if (call["dim"] or 0) % call.rank(node) != state.dim:
        moves = any(depends_on_size(call[n]) for n in ("start", "end"))
        return call.mixed(COUNT_AS_VALUE) if moves else state
    whole, taken = call.shape(node)[state.dim], call.out[state.dim]
    start = call["start"]
    begin = symbolic_size(start.meta["val"] if isinstance(start, fx.Node) else start or 0)
    if taken == whole:
        return state
    if state.constant and state.outer == 1 and not taken.free_symbols:
        return STATIC
    unit = whole / state.outer
    blocks = (taken / unit, begin / unit)
    if call["step"] in (None, 1) and all(b.is_Integer for b in blocks):
        return Samples(state.dim, int(blocks[0]), state.inner, state.numbered)
    return call.mixed("a part of the batch is cut out", certain=state.inner == 1)


def split(call: OpCall) -> State | tuple[State, ...]:
    """split, chunk, tensor_split: pieces of equal or given sizes along a dimension."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    if (call["dim"] or 0) % call.rank(node) != state.dim:
        return state
    whole = call.shape(node)[state.dim]
    pieces = [symbolic_size(t.shape[state.dim]) for t in call.node.meta["val"]]
    counts = [p * state.outer / whole for p in pieces]
    if all(c.is_Integer for c in counts):
        return tuple(Samples(state.dim, int(c), state.inner, state.numbered) for c in counts)
    return call.mixed("a part of the batch is cut out")


def unbind(call: OpCall) -> State:
    """Every entry of a dimension."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    dim = call["dim"] % call.rank(node)
    if dim == state.dim:
        return call.mixed(PLACES)
    return state.at(state.dim - (dim < state.dim))


def cat(call: OpCall) -> State:
    """Along the batch, several batches in a row; along another dimension, side by side."""
    states = [call.state(n) for n in call.tensors if call.shape(n) != (0,)]
    dim = call["dim"] % len(call.out)
    along_batch = [s for s in states if isinstance(s, Samples) and s.dim == dim]
    if not along_batch:
        return join(call, states)
    if len(along_batch) < len(states):
        return call.mixed("something else is put beside the batch")
    first = along_batch[0]
    if any((s.inner, s.numbered) != (first.inner, first.numbered) for s in along_batch):
        return call.undecided("batches of different arrangements are put together")
    return Samples(dim, sum(s.outer for s in along_batch), first.inner, first.numbered)


def stack(call: OpCall) -> State:
    """A new dimension before the one at `dim`."""
    dim = call["dim"] % len(call.out)
    state = join(call, [call.state(n) for n in call.tensors])
    return state.at(state.dim + (dim <= state.dim)) if isinstance(state, Samples) else state


def repeat(call: OpCall) -> State:
    """The whole tensor several times: along the batch, several batches in a row."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return fresh(call, call.out, constant=True) if state == STATIC else state
    dim = state.dim + len(call.out) - call.rank(node)
    times = call.out[dim] / call.shape(node)[state.dim]
    if not times.is_Integer:
        return call.mixed("the batch is repeated as often as it has samples")
    return Samples(dim, state.outer * int(times), state.inner, state.numbered)


def repeat_interleave(call: OpCall) -> State:
    """Each entry several times: along the batch, more of each sample."""
    state: State = call.state(call.first)
    shape, dim = call.shape(call.first), call["dim"]
    if dim is None and isinstance(state, Samples):  # of all entries in a row
        whole, dim = shape, 0
        shape = (sympy.prod(whole),)
        state = reshaped(call, state, whole, shape)
    if not isinstance(state, Samples):
        return state
    if dim % len(shape) != state.dim or state.numbered is not None:
        return join(call, [state])
    times = call.out[state.dim] / shape[state.dim]
    if not times.is_Integer:
        return call.mixed("the batch is repeated as often as it has samples")
    return Samples(state.dim, state.outer, state.inner * int(times))


def as_strided(call: OpCall) -> State:
    """Windows cut by stride: each sample's must lie in that sample's memory.

    Where the samples' dimension has the stride t, address a belongs to sample
    ``a // (t * inner) % B``, be the batch the first dimension of the memory or a later one.
    Micro-batches of an input are windows themselves, over the memory of the whole batch: there
    only strides that do not depend on its size, counted from the window's own begin, will do.
    """
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    own = list(map(symbolic_size, node.meta["val"].stride()))
    if memory_owner(node).op == "placeholder" and (
        call["storage_offset"] is not None or any(s.free_symbols for s in own)
    ):
        return call.mixed("windows over memory of the whole batch")
    begin = symbolic_size(node.meta["val"].storage_offset())
    offset = begin if call["storage_offset"] is None else _number(call["storage_offset"])
    strides = list(map(_number, call["stride"]))
    dims = batch_dims(call.out)
    times = factor(call.out[dims[0]]) if len(dims) == 1 else None
    block = own[state.dim] * state.inner
    if times is None or block.free_symbols or offset != begin or state.outer != 1:
        return call.undecided("windows over memory that is no plain array")
    before = _stays_within(block, begin, own, call.shape(node), state.dim, state.inner)
    after = strides[dims[0]] * times == block and _stays_within(
        block, begin, strides, call.out, dims[0], times
    )
    if before and after:
        return Samples(dims[0], 1, times)
    return call.undecided("windows that may overlap several samples")


def _number(argument: Any) -> Any:
    return symbolic_size(argument.meta["val"] if isinstance(argument, fx.Node) else argument)


def _stays_within(
    block: Any, begin: Any, strides: Sequence[Any], shape: Shape, dim: int, times: int
) -> bool:
    """Whether steps along other dimensions lead through one sample's block, or to whole batches."""
    reach = begin + (times - 1) * strides[dim]
    for d, (stride, extent) in enumerate(zip(strides, shape, strict=True)):
        if d != dim and not (stride / (block * B)).is_Integer:
            reach += (extent - 1) * stride
    return bool(not reach.free_symbols and reach < block)


def as_strided_scatter(call: OpCall) -> State:
    """Windows written to: by which samples they are read only a trial can tell."""
    if memory_owner(call.first).op == "placeholder" and isinstance(call.state(call.first), Samples):
        return call.mixed("windows over memory of the whole batch")
    return call.undecided("windows that may overlap several samples")


def diagonal(call: OpCall) -> State:
    """Two dimensions become one, the last."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    rank = call.rank(node)
    taken = {call["dim1"] % rank, call["dim2"] % rank}
    if state.dim in taken:
        return call.mixed("a diagonal through the batch")
    return state.at(state.dim - sum(d < state.dim for d in taken))


RULES = table(
    {
        select: "select",
        narrow: "slice narrow",
        split: "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk"
        " unsafe_split_with_sizes",
        unbind: "unbind",
        cat: "cat concat concatenate",
        stack: "stack",
        repeat: "repeat tile",
        repeat_interleave: "repeat_interleave",
        as_strided: "as_strided as_strided_copy",
        as_strided_scatter: "as_strided_scatter",
        diagonal: "diagonal",
    }
)

TAKES_SIZES = {select, narrow, split, repeat, repeat_interleave, as_strided, as_strided_scatter}
"""Rules that know what the number of samples means where it is an argument."""
