"""State rules for ops that slice, split, join or repeat tensors (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
from torch import fx

from autopipe.passes.graph import memory_owner, symbolic_size
from autopipe.passes.ir import B

from .lattice import COUNT_AS_VALUE, STATIC, Reduced, Samples, State, batch_dims, batch_multiple
from .op_call import depends_on_batch_size, join_states, new_tensor_state, view_state
from .rules_shape import BY_POSITION, rule_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .lattice import Shape
    from .op_call import OpCall


def select(call: OpCall) -> State:
    """select: one entry of a dimension."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    dim = call["dim"] % call.rank(node)
    if dim != state.dim and depends_on_batch_size(call["index"]):
        return call.mixed(COUNT_AS_VALUE)
    if dim == state.dim and state.uniform and state.batches == 1:
        return STATIC
    if dim == state.dim:
        return (
            Reduced()
            if (state.batches, state.per_sample) == (1, 1)
            else call.undecided(BY_POSITION)
        )
    return state.with_dim(state.dim - (dim < state.dim))


def narrow(call: OpCall) -> State:
    """slice, narrow: along the batch, only whole batches may be selected."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    if (call["dim"] or 0) % call.rank(node) != state.dim:
        moves = any(depends_on_batch_size(call[n]) for n in ("start", "end"))
        return call.mixed(COUNT_AS_VALUE) if moves else state
    whole, taken = call.shape(node)[state.dim], call.out_shape[state.dim]
    start = call["start"]
    begin = symbolic_size(start.meta["val"] if isinstance(start, fx.Node) else start or 0)
    if taken == whole:
        return state
    if state.uniform and state.batches == 1 and not taken.free_symbols:
        return STATIC
    unit = whole / state.batches
    blocks = (taken / unit, begin / unit)
    if call["step"] in (None, 1) and all(b.is_Integer for b in blocks):
        return Samples(state.dim, int(blocks[0]), state.per_sample, state.index_step)
    return call.mixed("a part of the batch is cut out", proven=state.per_sample == 1)


def split(call: OpCall) -> State | tuple[State, ...]:
    """split, chunk, tensor_split: along the batch every piece must hold whole batches."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    if (call["dim"] or 0) % call.rank(node) != state.dim:
        return state
    whole = call.shape(node)[state.dim]
    pieces = [symbolic_size(t.shape[state.dim]) for t in call.node.meta["val"]]
    counts = [p * state.batches / whole for p in pieces]
    if all(c.is_Integer for c in counts):
        return tuple(Samples(state.dim, int(c), state.per_sample, state.index_step) for c in counts)
    return call.mixed("a part of the batch is cut out")


def unbind(call: OpCall) -> State:
    """unbind: every entry of a dimension."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    dim = call["dim"] % call.rank(node)
    if dim == state.dim:
        return call.mixed(BY_POSITION)
    return state.with_dim(state.dim - (dim < state.dim))


def cat(call: OpCall) -> State:
    """cat: along the batch the numbers of whole batches add up."""
    states = [call.state(n) for n in call.tensors if call.shape(n) != (0,)]
    dim = call["dim"] % len(call.out_shape)
    along_batch = [s for s in states if isinstance(s, Samples) and s.dim == dim]
    if not along_batch:
        return join_states(call, states)
    if len(along_batch) < len(states):
        return call.mixed("the batch is concatenated with something else")
    first = along_batch[0]
    if any(
        (s.per_sample, s.index_step) != (first.per_sample, first.index_step) for s in along_batch
    ):
        return call.undecided("batches that are arranged differently are concatenated")
    return Samples(dim, sum(s.batches for s in along_batch), first.per_sample, first.index_step)


def stack(call: OpCall) -> State:
    """stack: a new dimension at `dim`."""
    dim = call["dim"] % len(call.out_shape)
    state = join_states(call, [call.state(n) for n in call.tensors])
    return state.with_dim(state.dim + (dim <= state.dim)) if isinstance(state, Samples) else state


def repeat(call: OpCall) -> State:
    """repeat, tile: along the batch, k times as many whole batches."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return new_tensor_state(call, call.out_shape, uniform=True) if state == STATIC else state
    dim = state.dim + len(call.out_shape) - call.rank(node)
    times = call.out_shape[dim] / call.shape(node)[state.dim]
    if not times.is_Integer:
        return call.mixed("the batch is repeated as often as it has samples")
    return Samples(dim, state.batches * int(times), state.per_sample, state.index_step)


def repeat_interleave(call: OpCall) -> State:
    """repeat_interleave: along the batch, k times as many entries per sample."""
    state: State = call.state(call.first)
    shape, dim = call.shape(call.first), call["dim"]
    if dim is None and isinstance(state, Samples):  # it repeats the flattened entries
        whole, dim = shape, 0
        shape = (sympy.prod(whole),)
        state = view_state(call, state, whole, shape)
    if not isinstance(state, Samples):
        return state
    if dim % len(shape) != state.dim or state.index_step is not None:
        return join_states(call, [state])
    times = call.out_shape[state.dim] / shape[state.dim]
    if not times.is_Integer:
        return call.mixed("the batch is repeated as often as it has samples")
    return Samples(state.dim, state.batches, state.per_sample * int(times))


def as_strided(call: OpCall) -> State:
    """as_strided: each sample's windows must be within that sample's memory.

    If the samples' dimension has the stride t, address a belongs to sample
    ``a // (t * per_sample) % B``, whether or not the batch is the first dimension in memory.
    Micro-batches of an input are themselves views of the whole batch's memory. There, only strides
    that do not depend on the batch size are allowed, and no offset.
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
    dims = batch_dims(call.out_shape)
    times = batch_multiple(call.out_shape[dims[0]]) if len(dims) == 1 else None
    block = own[state.dim] * state.per_sample
    if times is None or block.free_symbols or offset != begin or state.batches != 1:
        return call.undecided("windows over memory that is no plain array")
    before = _stays_within(block, begin, own, call.shape(node), state.dim, state.per_sample)
    after = strides[dims[0]] * times == block and _stays_within(
        block, begin, strides, call.out_shape, dims[0], times
    )
    if before and after:
        return Samples(dims[0], 1, times)
    return call.undecided("windows that may overlap several samples")


def _number(argument: Any) -> Any:
    return symbolic_size(argument.meta["val"] if isinstance(argument, fx.Node) else argument)


def _stays_within(
    block: Any, begin: Any, strides: Sequence[Any], shape: Shape, dim: int, times: int
) -> bool:
    """Whether moving along other dimensions stays in a sample's block or skips whole batches."""
    reach = begin + (times - 1) * strides[dim]
    for d, (stride, extent) in enumerate(zip(strides, shape, strict=True)):
        if d != dim and not (stride / (block * B)).is_Integer:
            reach += (extent - 1) * stride
    return bool(not reach.free_symbols and reach < block)


def as_strided_scatter(call: OpCall) -> State:
    """as_strided_scatter: only a trial can decide which samples read what is written."""
    if memory_owner(call.first).op == "placeholder" and isinstance(call.state(call.first), Samples):
        return call.mixed("windows over memory of the whole batch")
    return call.undecided("windows that may overlap several samples")


def diagonal(call: OpCall) -> State:
    """diagonal: two dimensions become one, which is the last."""
    node, state = call.first, call.state(call.first)
    if not isinstance(state, Samples):
        return state
    rank = call.rank(node)
    taken = {call["dim1"] % rank, call["dim2"] % rank}
    if state.dim in taken:
        return call.mixed("a diagonal through the batch")
    return state.with_dim(state.dim - sum(d < state.dim for d in taken))


RULES = rule_table(
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

USES_BATCH_SIZE = {select, narrow, split, repeat, repeat_interleave, as_strided, as_strided_scatter}
"""Rules that handle a batch size among the arguments themselves."""
