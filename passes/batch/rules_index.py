"""State rules for indexing (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from autopipe.passes.graph import is_integer
from autopipe.passes.ir import SUM

from .lattice import REDUCED, STATIC, Mixed, Reduced, Samples, State
from .op_call import broadcast_state, join_states
from .partial_reductions import ACCUMULATION
from .rules_shape import ALONG_BATCH, BY_POSITION, rule_table

if TYPE_CHECKING:
    from .op_call import OpCall

FROM_OTHERS = "entries are picked from other samples by index"
TAKEN = "every sample takes the entries of the source that the samples before it left"


def pointwise_index(call: OpCall) -> State:
    """gather, scatter: ``out[i, j] = x[i, index[i, j]]`` for operands of one rank and dim = 1.

    The samples may be in any dimension except `dim`: along `dim`, an index could pick entries of
    other samples.
    """
    nodes = call.tensors
    state = broadcast_state(call, nodes)
    if call["dim"] is None:
        return call.undecided("it flattens the batch") if isinstance(state, Samples) else state
    own = call["dim"] % call.rank(nodes[0])
    if isinstance(state, Samples) and own != state.dim:
        fixed = [
            n for n in nodes if call.rank(n) == len(call.out_shape) and call.state(n) == STATIC
        ]
        if any(call.shape(n)[state.dim] != 1 for n in fixed):
            return call.mixed(BY_POSITION)
    elif isinstance(state, Samples) and call.state(nodes[0]) != STATIC:
        return call.undecided(FROM_OTHERS)
    return state


def scatter_add(call: OpCall) -> State:
    """scatter_add and scatter_reduce with "sum": ``x[index[i, j], j] += src[i, j]`` for dim = 0.

    If x holds no samples and src does along `dim`, this is a sum over the batch.
    """
    adds = "reduce" not in call or (call["reduce"] == "sum" and call["include_self"])
    if isinstance(call.state(call["self"]), Samples) or not adds:
        return pointwise_index(call)
    parts = join_states(call, [call.state(call["index"]), call.state(call["src"])])
    if isinstance(parts, Samples):  # along another dimension each sample writes to its own entries
        along = call["dim"] % len(call.out_shape) == parts.dim
        return Reduced(ACCUMULATION) if along else call.mixed(BY_POSITION)
    return parts


def bucketize(call: OpCall) -> State:
    """bucketize: per entry, its position among boundaries that do not depend on the batch."""
    return _compared_with_all(call, call["boundaries"]) or broadcast_state(call, call.tensors)


def searchsorted(call: OpCall) -> State:
    """searchsorted: per entry, its position in a sorted row: one row for all, or one per sample."""
    write_rows, order = call["sorted_sequence"], call["sorter"]
    last = call.rank(write_rows) - 1
    known = [n for n in (write_rows, order) if n is not None]
    if any(isinstance(s := call.state(n), Samples) and s.dim == last for n in known):
        return call.mixed(ALONG_BATCH)
    own_row = _compared_with_all(call, write_rows) if last == 0 else None
    return own_row or broadcast_state(call, call.tensors)


def isin(call: OpCall) -> State:
    """isin: per entry, whether it is among values that do not depend on the batch."""
    elements = call["elements"]
    own = call.state(elements)
    return _compared_with_all(call, call["test_elements"]) or join_states(call, [own])


def _compared_with_all(call: OpCall, others: fx.Node | None) -> Mixed | None:
    """The state if every entry is compared with all of `others`, which depend on the batch.

    Returns:
        None if they do not depend on it.
    """
    if call.state(others) == STATIC:
        return None
    proven = not (isinstance(others, fx.Node) and is_integer(others))
    return call.mixed("every sample is compared with values that depend on others", proven=proven)


def index_select(call: OpCall) -> State:
    """index_select: picks entries of one dimension by a vector of indices."""
    indexed, index = call["self"], call["index"]
    state, picked = call.state(indexed), call.state(index)
    dim = call["dim"] % max(call.rank(indexed), 1)
    return _state_after_index(call, state, {dim: picked}, rank=1, first=dim)


def index(call: OpCall) -> State:
    """``x[i, j, :]`` with tensors i and j."""
    return _index_state(call, call.state(call["self"]))


def _index_state(call: OpCall, state: State) -> State:
    """The state of ``x[indices]`` for an x in this state."""
    indices = call["indices"]
    if any(i is not None and i.meta["val"].dtype is torch.bool for i in indices):
        return call.undecided("entries are picked by a mask")
    at = [d for d, i in enumerate(indices) if i is not None]
    rank = max(call.rank(indices[d]) for d in at)
    picked: dict[int, State] = {}
    for d in at:
        found = call.state(indices[d])
        if isinstance(found, Samples):
            found = found.with_dim(found.dim + rank - call.rank(indices[d]))
        picked[d] = found
    adjacent = at == list(range(at[0], at[-1] + 1))
    return _state_after_index(call, state, picked, rank=rank, first=at[0] if adjacent else 0)


def _state_after_index(
    call: OpCall, state: State, picked: dict[int, State], *, rank: int, first: int
) -> State:
    """The state after indexing.

    Args:
        call: the op.
        state: of the indexed tensor.
        picked: indexed dimension → state of its index, broadcast to `rank` dimensions.
        rank: of the broadcast indices.
        first: the first dimension of the result that comes from the indices.
    """
    own = picked.get(state.dim) if isinstance(state, Samples) else None
    if own is not None and isinstance(state, Samples):
        if not isinstance(own, Samples) or (1, own.index_step) != (state.batches, state.per_sample):
            return call.undecided(FROM_OTHERS)
        others = [s for d, s in picked.items() if d != state.dim]
        found = join_states(call, [Samples(own.dim, own.batches, own.per_sample), *others])
    else:
        found = join_states(call, picked.values())
        if isinstance(state, Samples):
            if found != STATIC:
                return (
                    join_states(call, [found])
                    if isinstance(found, Mixed)
                    else call.undecided("entries are picked by indices that depend on the batch")
                )
            before = sum(d < state.dim for d in picked)
            shift = rank if first < state.dim else 0
            return state.with_dim(state.dim - before + shift)
        if state != STATIC:
            return join_states(call, [state, found])
    return found.with_dim(found.dim + first) if isinstance(found, Samples) else found


def index_put(call: OpCall) -> State:
    """``x[i, j] = v``: every sample must write to its own part of x.

    If x holds no samples, ``x[i, j] += v`` is a sum over the batch.
    """
    indexed, values = call["self"], call["values"]
    state = call.state(indexed)
    indices = [i for i in call["indices"] if i is not None]
    masks = [i for i in indices if i.meta["val"].dtype is torch.bool]
    if masks:
        parts = broadcast_state(call, masks, call.rank(masks[0]))
        if call.rank(values) == 0 and call.state(values) == STATIC:
            at_front = call["indices"][0] is masks[0] and len(indices) == 1
            return (
                join_states(call, [state, parts])
                if at_front
                else call.undecided("written by a mask")
            )
        return call.undecided("entries are written by a mask")
    value = call.state(values)
    if isinstance(value, Samples):
        value = value.with_dim(value.dim + _index_rank(call) - call.rank(values))
    if not isinstance(state, Samples):
        joint = join_states(call, [_index_state(call, STATIC), value])
        if isinstance(joint, Samples):
            return Reduced(ACCUMULATION if call["accumulate"] else None)
        return join_states(call, [state, joint])
    joint = join_states(call, [_index_state(call, state), value])
    return joint if isinstance(joint, Mixed) else state


def _index_rank(call: OpCall) -> int:
    at = [i for i in call["indices"] if i is not None]
    return max(call.rank(i) for i in at) + call.rank(call["self"]) - len(at)


def index_add(call: OpCall) -> State:
    """index_add: ``x[index[i]] += source[i]``; if x holds no samples, a sum over the batch."""
    if isinstance(call.state(call["self"]), Samples):
        return write_rows(call)
    index, source = call.state(call["index"]), call.state(call["source"])
    if isinstance(index, Samples):
        index = index.with_dim(call["dim"] % max(len(call.out_shape), 1))
    parts = join_states(call, [index, source])
    return Reduced(ACCUMULATION) if isinstance(parts, Samples) else parts


def write_rows(call: OpCall) -> State:
    """index_copy, index_fill: ``x[index[i]] = source[i]`` along `dim`."""
    nodes = call.tensors
    state = call.state(nodes[0])
    dim = call["dim"] % max(call.rank(nodes[0]), 1)
    if state == STATIC and any(call.state(n) != STATIC for n in nodes):
        return REDUCED
    if isinstance(state, Samples) and dim == state.dim:
        return call.undecided("entries are written to other samples by index")
    if isinstance(state, Samples) and call.state(call["index"]) != STATIC:
        return call.undecided("entries are picked by indices that depend on the batch")
    return broadcast_state(call, [n for n in nodes if call.rank(n) == call.rank(nodes[0])])


def masked_scatter(call: OpCall) -> State:
    """masked_scatter: ``x[mask] = source``, the source's entries taken one after the other.

    A source that is not batched is used up sample by sample: a sample's entries come after those
    of the samples before. If the source is batched too, each sample must take as many entries as
    its own part of the source has. A trial looks at that, and a check in every step (see
    `shares`).
    """
    into, mask, source = call["self"], call["mask"], call["source"]
    state = broadcast_state(call, [into, mask], len(call.out_shape))
    own = call.state(source)
    if isinstance(own, Reduced):
        return join_states(call, [state, own])
    if not isinstance(state, Samples):
        return call.undecided(TAKEN)
    if own == STATIC and not _repeats(source):
        return call.mixed(f"{TAKEN}; batch the source too, with as many for each sample")
    return call.undecided(TAKEN)


def _repeats(node: fx.Node) -> bool:
    """Whether a tensor's entries may be equal because it repeats one or is filled with one."""
    while node.op == "call_function":
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if name.startswith(("expand", "broadcast", "repeat", "zeros", "ones", "full", "new_")):
            return True
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def histc(call: OpCall) -> State:
    """histc: counts of entries between fixed bounds, a sum over the batch."""
    state = join_states(call, [call.state(call.first)])
    if not isinstance(state, Samples):
        return state
    if call["min"] == call["max"]:
        return call.mixed("its bounds are the batch's smallest and largest entry")
    return Reduced(SUM)


RULES = rule_table(
    {
        pointwise_index: "gather take_along_dim scatter",
        scatter_add: "scatter_add scatter_reduce",
        bucketize: "bucketize",
        searchsorted: "searchsorted",
        isin: "isin",
        index_select: "index_select",
        index: "index _unsafe_index",
        index_put: "index_put _unsafe_index_put _index_put_impl",
        index_add: "index_add",
        write_rows: "index_copy index_fill",
        masked_scatter: "masked_scatter",
        histc: "histc",
    }
)
