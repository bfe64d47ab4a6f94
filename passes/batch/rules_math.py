"""State rules for arithmetic, reductions and products (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from autopipe.passes.graph import is_integer
from autopipe.passes.ir import MEAN, SUM

from .lattice import STATIC, Reduced, Samples, State
from .op_call import broadcast_state, join_states
from .rules_shape import ALONG_BATCH, rule_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .op_call import OpCall

aten = torch.ops.aten

COMBINED_BY = {
    aten.sum: SUM,
    aten.nansum: SUM,
    aten.count_nonzero: SUM,
    aten.mean: MEAN,
}
"""Reductions over the batch whose micro-batch values can be combined."""


def pointwise(call: OpCall) -> State:
    """Entry by entry, operands broadcast against each other."""
    return broadcast_state(call, call.tensors)


def multiply(call: OpCall) -> State:
    """mul: ``k * arange(B)`` is an index of samples too; see `Samples.index_step`."""
    states = [call.state(n) for n in call.tensors]
    factors = [a for a in (call["other"],) if isinstance(a, int)]
    if len(states) == 1 and isinstance(states[0], Samples) and states[0].index_step and factors:
        own = states[0]
        return Samples(own.dim, own.batches, own.per_sample, states[0].index_step * factors[0])
    return pointwise(call)


def copy_or_cast(call: OpCall) -> State:
    """Copies and casts; an index of samples stays one as long as it is an integer."""
    state = call.state(call.first)
    if isinstance(state, Samples) and state.index_step is not None and not is_integer(call.node):
        return join_states(call, [state])
    return state


def copy_into(call: OpCall) -> State:
    """copy_: broadcasts the source to the shape of the destination."""
    return broadcast_state(call, call.tensors, len(call.out_shape))


def reduce_dims(call: OpCall) -> State:
    """Reductions over the dimensions in `dim`, or over all; see `COMBINED_BY`."""
    node = call.first
    state = join_states(call, [call.state(node)])
    if not isinstance(state, Samples):
        return state
    rank = call.rank(node)
    dims = next((call[n] for n in ("dim", "axis") if n in call), None)
    listed = dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
    gone = {d % rank for d in listed} or set(range(rank))
    if state.dim in gone:
        packet = call.node.target.overloadpacket  # type: ignore[union-attr]
        return Reduced(COMBINED_BY.get(packet))
    if call["keepdim"]:
        return state
    return state.with_dim(state.dim - sum(d < state.dim for d in gone))


# ------------------------------------------------------------------------------- sums of products


def sum_of_products(
    call: OpCall, operands: Sequence[tuple[fx.Node, str]], out: str, *, bias: bool = False
) -> State:
    """The state of a sum of products, in einsum's notation.

    Args:
        call: the op.
        operands: each with a letter per dimension.
        out: the letters of the result; dimensions with other letters are summed over.
        bias: whether the op also adds a bias (then a sum over the batch has no rule).
    """
    letters: dict[str, list[State]] = {}
    states = [call.state(n) for n, _ in operands]
    if any(isinstance(s, Reduced) for s in states) or not any(
        isinstance(s, Samples) for s in states
    ):
        return join_states(call, states)
    for (_, names), state in zip(operands, states, strict=True):
        if isinstance(state, Samples):
            letters.setdefault(names[state.dim], []).append(state.with_dim(0))
    if len(letters) > 1:
        return call.mixed("it combines every sample with every other")
    letter, found = next(iter(letters.items()))
    joint = join_states(call, found)
    if not isinstance(joint, Samples):
        return joint
    if letter in out:
        return joint.with_dim(out.index(letter))
    return Reduced(None if bias else SUM)


def _letters(last: str, leading: int) -> str:
    """Letters for `leading` dimensions, aligned at the right, followed by `last`."""
    return "".join(chr(ord("A") + i) for i in reversed(range(leading))) + last


def matmul(call: OpCall) -> State:
    """matmul, mm, bmm, mv, dot: ``…nk, …km -> …nm``; addmm and baddbmm also add a tensor."""
    added, (a, b) = None, call.tensors[-2:]
    if len(call.tensors) == 3:
        added = call.tensors[0]
    ra, rb = call.rank(a), call.rank(b)
    left = _letters("nk", ra - 2) if ra > 1 else "k"
    right = _letters("km", rb - 2) if rb > 1 else "k"
    lead = max(left, right, key=lambda s: len(s))[:-2] if max(ra, rb) > 2 else ""
    out = lead + ("n" if ra > 1 else "") + ("m" if rb > 1 else "")
    state = sum_of_products(call, [(a, left), (b, right)], out, bias=added is not None)
    if added is None:
        return state
    own = call.state(added)
    if isinstance(own, Samples):
        own = own.with_dim(own.dim + len(out) - call.rank(added))
    return state if own == STATIC else join_states(call, [state, own])


def linear(call: OpCall) -> State:
    """linear: ``…i, oi -> …o``."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    names = _letters("i", call.rank(x) - 1)
    rows = "oi" if call.rank(weight) == 2 else "i"
    if bias is not None and call.state(bias) != STATIC:
        return call.undecided("a bias that depends on the batch")
    out = names[:-1] + rows[:-1]
    return sum_of_products(call, [(x, names), (weight, rows)], out, bias=bias is not None)


def einsum(call: OpCall) -> State:
    """einsum with an explicit result (``->``); other equations are undecided."""
    equation = str(call["equation"]).replace(" ", "")
    nodes = list(call["tensors"])
    if "." in equation or "->" not in equation:
        return call.undecided("an einsum without explicit letters")
    letters, out = equation.split("->")
    return sum_of_products(call, list(zip(nodes, letters.split(","), strict=True)), out)


def outer_product(call: OpCall) -> State:
    """outer, ger: ``a, b -> ab``."""
    return sum_of_products(call, list(zip(call.tensors, "ab", strict=True)), "ab")


def attention(call: OpCall) -> State:
    """Attention: the samples must not be in the dimension of the queries or of the keys."""
    state = broadcast_state(call, call.tensors)
    if isinstance(state, Samples) and state.dim >= call.rank(call["query"]) - 2:
        return call.mixed("attention among samples")
    return state


def cdist(call: OpCall) -> State:
    """cdist: ``…nk, …mk -> …nm``; only n or m may hold samples."""
    a, b = call.tensors
    lead = len(call.out_shape) - 2
    rows = [(a, _letters("nk", call.rank(a) - 2)), (b, _letters("mk", call.rank(b) - 2))]
    state = sum_of_products(call, rows, _letters("nm", lead))
    return call.mixed(ALONG_BATCH) if state == Reduced(SUM) else state


def distance(call: OpCall) -> State:
    """cosine_similarity, pairwise_distance: entry by entry, then summed over `dim`."""
    state = broadcast_state(call, call.tensors)
    if not isinstance(state, Samples):
        return state
    rank = max(map(call.rank, call.tensors))
    dim = (-1 if call["dim"] is None else call["dim"]) % rank
    if dim == state.dim:
        return call.mixed(ALONG_BATCH)
    return state if call["keepdim"] else state.with_dim(state.dim - (dim < state.dim))


RULES = rule_table(
    {
        multiply: "mul",
        copy_or_cast: "clone contiguous detach alias lift_fresh lift_fresh_copy to _to_copy type_as"
        " positive conj _conj conj_physical _conj_physical _neg_view resolve_conj resolve_neg"
        " view_as_real view_as_complex real imag _to_dtype long int",
        copy_into: "copy",
        pointwise: "dropout alpha_dropout native_dropout"
        " where fill zero masked_fill rrelu prelu softplus hardtanh gelu silu bernoulli"
        " uniform exponential floor_divide isreal one_hot hardswish hardsigmoid mish elu celu selu"
        " isclose nan_to_num clamp clip lerp addcmul addcdiv float_power square complex polar isnan"
        " isfinite isinf rsub cauchy log_normal geometric random poisson _standard_gamma binomial"
        " __and__ __or__ __xor__ relu6 threshold logit",
        reduce_dims: "sum mean amax amin max min all any prod logsumexp norm linalg_vector_norm var"
        " std argmax argmin nansum nanmean median nanmedian mode var_mean std_mean count_nonzero"
        " kthvalue aminmax",
        distance: "cosine_similarity pairwise_distance",
        matmul: "matmul mm bmm mv dot vdot inner addmm baddbmm addmv",
        linear: "linear",
        einsum: "einsum",
        outer_product: "outer ger",
        attention: "scaled_dot_product_attention",
        cdist: "cdist",
    }
)
