"""How the batch runs through new tensors and indexing (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from autopipe.passes.graph import is_integer, is_random, is_size
from autopipe.passes.ir import SUM

from .lattice import (
    COUNT_AS_VALUE,
    REDUCED,
    STATIC,
    Mixed,
    Reduced,
    Samples,
    State,
    aligned,
    batch_dims,
    depends_on_size,
    fresh,
    join,
)
from .partial_reductions import ACCUMULATION
from .rules_shape import ALONG, PLACES, table

if TYPE_CHECKING:
    from .lattice import OpCall

OTHERS = "entries are picked from other samples by index"


def new(call: OpCall) -> State:
    """zeros, ones, full, rand, new_zeros: their own shape counts, not what they are modelled on."""
    return _filled(call, fresh(call, call.out, constant=not is_random(call.node)))


def like(call: OpCall) -> State:
    """zeros_like and the like: only the shape is taken."""
    state, constant = call.state(call.first), not is_random(call.node)
    if isinstance(state, Samples):
        return _filled(call, Samples(state.dim, state.outer, state.inner, constant=constant))
    return _filled(call, fresh(call, call.out, constant=constant))


def _filled(call: OpCall, state: State) -> State:
    """What is made of numbers given as arguments, of which none may be the number of samples."""
    values = [call[n] for n in ("fill_value", "low", "high")]
    if not any(depends_on_size(v) or (isinstance(v, fx.Node) and not is_size(v)) for v in values):
        return state
    return REDUCED if state == STATIC else call.mixed(COUNT_AS_VALUE)


def scalar(call: OpCall) -> State:
    """A number as a tensor."""
    return REDUCED if call.uses_batch_size else STATIC


def arange(call: OpCall) -> State:
    """The numbers of the samples, which only `index` may use."""
    state = fresh(call, call.out)
    start, step = call["start"] or 0, call["step"] or 1
    if not isinstance(state, Samples):
        return STATIC if not call.uses_batch_size else REDUCED
    if start == 0 and step == 1:
        return Samples(0, 1, state.inner, numbered=state.inner)
    return call.undecided("a sample's result depends on its place in the batch")


def among_all(call: OpCall) -> State:
    """eye, randperm: a new tensor in which samples are not alike."""
    if batch_dims(call.out):
        return call.mixed(PLACES)
    return REDUCED if call.uses_batch_size else STATIC


# --------------------------------------------------------------------------------------- indexing


def pointwise_index(call: OpCall) -> State:
    """gather, scatter: operands of one rank, index by index, entries picked along `dim`."""
    nodes = call.tensors
    state = aligned(call, nodes)
    if call["dim"] is None:
        return call.undecided("it flattens the batch") if isinstance(state, Samples) else state
    own = call["dim"] % call.rank(nodes[0])
    if isinstance(state, Samples) and own != state.dim:
        fixed = [n for n in nodes if call.rank(n) == len(call.out) and call.state(n) == STATIC]
        if any(call.shape(n)[state.dim] != 1 for n in fixed):
            return call.mixed(PLACES)
    elif isinstance(state, Samples) and call.state(nodes[0]) != STATIC:
        return call.undecided(OTHERS)
    return state


def scatter_add(call: OpCall) -> State:
    """Entries added to those that indices say, along `dim`; scatter_reduce with "sum" is the same.

    Added to what holds no samples, they are a sum over the batch.
    """
    adds = "reduce" not in call or (call["reduce"] == "sum" and call["include_self"])
    if isinstance(call.state(call["self"]), Samples) or not adds:
        return pointwise_index(call)
    parts = join(call, [call.state(call["index"]), call.state(call["src"])])
    if isinstance(parts, Samples):  # along another dimension it would be row by row
        along = call["dim"] % len(call.out) == parts.dim
        return Reduced(ACCUMULATION) if along else call.mixed(PLACES)
    return parts


def bucketize(call: OpCall) -> State:
    """Where entries would be put into boundaries, which are the same for all."""
    return _among(call, call["boundaries"]) or aligned(call, call.tensors)


def searchsorted(call: OpCall) -> State:
    """Where entries would be put into sorted rows: one row for all, or one for each of theirs."""
    rows, order = call["sorted_sequence"], call["sorter"]
    last = call.rank(rows) - 1
    known = [n for n in (rows, order) if n is not None]
    if any(isinstance(s := call.state(n), Samples) and s.dim == last for n in known):
        return call.mixed(ALONG)
    own_row = _among(call, rows) if last == 0 else None
    return own_row or aligned(call, call.tensors)


def isin(call: OpCall) -> State:
    """Entry by entry, whether it is among others, which are the same for all."""
    elements = call["elements"]
    own = call.state(elements)
    return _among(call, call["test_elements"]) or join(call, [own])


def _among(call: OpCall, others: fx.Node | None) -> Mixed | None:
    """What is wrong if every entry is compared with all of `others`: they depend on the batch."""
    if call.state(others) == STATIC:
        return None
    certain = not (isinstance(others, fx.Node) and is_integer(others))
    return call.mixed("every sample is compared with values that depend on others", certain=certain)


def index_select(call: OpCall) -> State:
    """Entries of one dimension by a tensor of indices."""
    table, index = call["self"], call["index"]
    state, picked = call.state(table), call.state(index)
    dim = call["dim"] % max(call.rank(table), 1)
    return _indexed(call, state, {dim: picked}, rank=1, first=dim)


def index(call: OpCall) -> State:
    """``x[i, j, :]`` with tensors i, j; also `index_put`, whose result is x again."""
    return _picked(call, call.state(call["self"]))


def _picked(call: OpCall, state: State) -> State:
    """What an index picks of a tensor in this state."""
    given = call["indices"]
    if any(i is not None and i.meta["val"].dtype is torch.bool for i in given):
        return call.undecided("entries are picked by a mask")
    at = [d for d, i in enumerate(given) if i is not None]
    rank = max(call.rank(given[d]) for d in at)
    picked: dict[int, State] = {}
    for d in at:
        found = call.state(given[d])
        if isinstance(found, Samples):
            found = found.at(found.dim + rank - call.rank(given[d]))
        picked[d] = found
    adjacent = at == list(range(at[0], at[-1] + 1))
    return _indexed(call, state, picked, rank=rank, first=at[0] if adjacent else 0)


def _indexed(
    call: OpCall, state: State, picked: dict[int, State], *, rank: int, first: int
) -> State:
    """Indices of a joint `rank`, for the dimensions in `picked`, whose result begins at `first`."""
    own = picked.get(state.dim) if isinstance(state, Samples) else None
    if own is not None and isinstance(state, Samples):
        if not isinstance(own, Samples) or (1, own.numbered) != (state.outer, state.inner):
            return call.undecided(OTHERS)
        others = [s for d, s in picked.items() if d != state.dim]
        found = join(call, [Samples(own.dim, own.outer, own.inner), *others])
    else:
        found = join(call, picked.values())
        if isinstance(state, Samples):
            if found != STATIC:
                return (
                    join(call, [found])
                    if isinstance(found, Mixed)
                    else call.undecided("entries are picked by indices that depend on the batch")
                )
            before = sum(d < state.dim for d in picked)
            shift = rank if first < state.dim else 0
            return state.at(state.dim - before + shift)
        if state != STATIC:
            return join(call, [state, found])
    return found.at(found.dim + first) if isinstance(found, Samples) else found


def index_put(call: OpCall) -> State:
    """``x[i, j] = v``: allowed where every sample writes to its own part of x."""
    table, values = call["self"], call["values"]
    state = call.state(table)
    given = [i for i in call["indices"] if i is not None]
    masks = [i for i in given if i.meta["val"].dtype is torch.bool]
    if masks:
        parts = aligned(call, masks, call.rank(masks[0]))
        if call.rank(values) == 0 and call.state(values) == STATIC:
            at_front = call["indices"][0] is masks[0] and len(given) == 1
            return join(call, [state, parts]) if at_front else call.undecided("written by a mask")
        return call.undecided("entries are written by a mask")
    value = call.state(values)
    if isinstance(value, Samples):
        value = value.at(value.dim + _index_rank(call) - call.rank(values))
    if not isinstance(state, Samples):
        joint = join(call, [_picked(call, STATIC), value])
        if isinstance(joint, Samples):
            return Reduced(ACCUMULATION if call["accumulate"] else None)
        return join(call, [state, joint])
    joint = join(call, [_picked(call, state), value])
    return joint if isinstance(joint, Mixed) else state


def _index_rank(call: OpCall) -> int:
    at = [i for i in call["indices"] if i is not None]
    return max(call.rank(i) for i in at) + call.rank(call["self"]) - len(at)


def index_add(call: OpCall) -> State:
    """Rows added to those that indices say; to what holds no samples, a sum over the batch."""
    if isinstance(call.state(call["self"]), Samples):
        return rows(call)
    index, source = call.state(call["index"]), call.state(call["source"])
    if isinstance(index, Samples):
        index = index.at(call["dim"] % max(len(call.out), 1))
    parts = join(call, [index, source])
    return Reduced(ACCUMULATION) if isinstance(parts, Samples) else parts


def rows(call: OpCall) -> State:
    """Rows along `dim` are changed."""
    nodes = call.tensors
    state = call.state(nodes[0])
    dim = call["dim"] % max(call.rank(nodes[0]), 1)
    if state == STATIC and any(call.state(n) != STATIC for n in nodes):
        return REDUCED
    if isinstance(state, Samples) and dim == state.dim:
        return call.undecided("entries are written to other samples by index")
    if isinstance(state, Samples) and call.state(call["index"]) != STATIC:
        return call.undecided("entries are picked by indices that depend on the batch")
    return aligned(call, [n for n in nodes if call.rank(n) == call.rank(nodes[0])])


def histc(call: OpCall) -> State:
    """How many entries fall between fixed numbers."""
    state = join(call, [call.state(call.first)])
    if not isinstance(state, Samples):
        return state
    if call["min"] == call["max"]:
        return call.mixed("its bounds are the batch's smallest and largest entry")
    return Reduced(SUM)


RULES = table(
    {
        new: "zeros ones full empty rand randn randint new_zeros new_ones new_full new_empty"
        " empty_strided new_empty_strided",
        like: "zeros_like ones_like full_like empty_like rand_like randn_like randint_like",
        scalar: "scalar_tensor tensor",
        arange: "arange",
        among_all: "eye randperm tril_indices triu_indices linspace",
        pointwise_index: "gather take_along_dim scatter",
        scatter_add: "scatter_add scatter_reduce",
        bucketize: "bucketize",
        searchsorted: "searchsorted",
        isin: "isin",
        index_select: "index_select",
        index: "index _unsafe_index",
        index_put: "index_put _unsafe_index_put _index_put_impl",
        index_add: "index_add",
        rows: "index_copy index_fill",
        histc: "histc",
    }
)

TAKES_SIZES = {new, like, scalar, arange, among_all}
"""Rules that know what the number of samples means where it is an argument."""
