"""How the batch runs through arithmetic: one rule per kind of call (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from autopipe.passes.graph import is_integer
from autopipe.passes.ir import MEAN, SUM

from .lattice import STATIC, Reduced, Samples, State, aligned, alone, batch_dims, join
from .rules_shape import ALONG, last_dims, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .lattice import OpCall

aten = torch.ops.aten

COMBINED_BY = {
    aten.sum: SUM,
    aten.nansum: SUM,
    aten.count_nonzero: SUM,
    aten.mean: MEAN,
}
"""Reductions over the batch whose micro-batch values can be combined."""


def pointwise(call: OpCall) -> State:
    """Broadcast against one another, entry by entry."""
    return aligned(call, call.tensors)


def shifted(call: OpCall) -> State:
    """Multiplication: a sample's number may be multiplied by an integer, see `Samples.numbered`."""
    states = [call.state(n) for n in call.tensors]
    factors = [a for a in (call["other"],) if isinstance(a, int)]
    if len(states) == 1 and isinstance(states[0], Samples) and states[0].numbered and factors:
        own = states[0]
        return Samples(own.dim, own.outer, own.inner, states[0].numbered * factors[0])
    return pointwise(call)


def same(call: OpCall) -> State:
    """A copy, whole or of another type; a sample's number survives while it is an integer."""
    state = call.state(call.first)
    if isinstance(state, Samples) and state.numbered is not None and not is_integer(call.node):
        return join(call, [state])
    return state


def written(call: OpCall) -> State:
    """copy_: what is copied is broadcast to the shape of what is written."""
    return aligned(call, call.tensors, len(call.out))


def reduction(call: OpCall) -> State:
    """Over the dimensions in `dim`, or all."""
    node = call.first
    state = join(call, [call.state(node)])
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
    return state.at(state.dim - sum(d < state.dim for d in gone))


# ------------------------------------------------------------------------------- sums of products


def contract(
    call: OpCall, operands: Sequence[tuple[fx.Node, str]], out: str, *, bias: bool = False
) -> State:
    """A sum of products, in einsum's letters: a letter that is not in `out` is summed over."""
    letters: dict[str, list[State]] = {}
    states = [call.state(n) for n, _ in operands]
    if any(isinstance(s, Reduced) for s in states) or not any(
        isinstance(s, Samples) for s in states
    ):
        return join(call, states)
    for (_, names), state in zip(operands, states, strict=True):
        if isinstance(state, Samples):
            letters.setdefault(names[state.dim], []).append(state.at(0))
    if len(letters) > 1:
        return call.mixed("it combines every sample with every other")
    letter, found = next(iter(letters.items()))
    joint = join(call, found)
    if not isinstance(joint, Samples):
        return joint
    if letter in out:
        return joint.at(out.index(letter))
    return Reduced(None if bias else SUM)


def _letters(last: str, leading: int) -> str:
    """Letters for `leading` dimensions, counted from the last one, before those in `last`."""
    return "".join(chr(ord("A") + i) for i in reversed(range(leading))) + last


def matmul(call: OpCall) -> State:
    """matmul, mm, bmm, mv, dot by the operands' ranks; addmm and baddbmm add a tensor."""
    added, (a, b) = None, call.tensors[-2:]
    if len(call.tensors) == 3:
        added = call.tensors[0]
    ra, rb = call.rank(a), call.rank(b)
    left = _letters("nk", ra - 2) if ra > 1 else "k"
    right = _letters("km", rb - 2) if rb > 1 else "k"
    lead = max(left, right, key=lambda s: len(s))[:-2] if max(ra, rb) > 2 else ""
    out = lead + ("n" if ra > 1 else "") + ("m" if rb > 1 else "")
    state = contract(call, [(a, left), (b, right)], out, bias=added is not None)
    if added is None:
        return state
    own = call.state(added)
    if isinstance(own, Samples):
        own = own.at(own.dim + len(out) - call.rank(added))
    return state if own == STATIC else join(call, [state, own])


def linear(call: OpCall) -> State:
    """The last dimension against a weight."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    names = _letters("i", call.rank(x) - 1)
    rows = "oi" if call.rank(weight) == 2 else "i"
    if bias is not None and call.state(bias) != STATIC:
        return call.undecided("a bias that depends on the batch")
    out = names[:-1] + rows[:-1]
    return contract(call, [(x, names), (weight, rows)], out, bias=bias is not None)


def einsum(call: OpCall) -> State:
    """Explicit equations; others are left to a trial."""
    equation = str(call["equation"]).replace(" ", "")
    nodes = list(call["tensors"])
    if "." in equation or "->" not in equation:
        return call.undecided("an einsum without explicit letters")
    given, out = equation.split("->")
    return contract(call, list(zip(nodes, given.split(","), strict=True)), out)


def outer(call: OpCall) -> State:
    """Every entry of one vector with every entry of another."""
    return contract(call, list(zip(call.tensors, "ab", strict=True)), "ab")


def attention(call: OpCall) -> State:
    """Queries see keys: neither may run along the batch."""
    state = aligned(call, call.tensors)
    if isinstance(state, Samples) and state.dim >= call.rank(call["query"]) - 2:
        return call.mixed("attention among samples")
    return state


def pairs(call: OpCall) -> State:
    """cdist: the rows of one matrix against those of another, of which only one may be samples."""
    a, b = call.tensors
    lead = len(call.out) - 2
    rows = [(a, _letters("nk", call.rank(a) - 2)), (b, _letters("mk", call.rank(b) - 2))]
    state = contract(call, rows, _letters("nm", lead))
    return call.mixed(ALONG) if state == Reduced(SUM) else state


def distance(call: OpCall) -> State:
    """cosine_similarity, pairwise_distance: of two tensors, one dimension of which is summed up."""
    state = aligned(call, call.tensors)
    if not isinstance(state, Samples):
        return state
    rank = max(map(call.rank, call.tensors))
    dim = (-1 if call["dim"] is None else call["dim"]) % rank
    if dim == state.dim:
        return call.mixed(ALONG)
    return state if call["keepdim"] else state.at(state.dim - (dim < state.dim))


# ---------------------------------------------------------------------------------------- layers


def batch_first(call: OpCall) -> State:
    """Convolutions, group norm and others whose samples must be in the first dimension."""
    state = alone(call, "a weight that depends on the batch")
    if isinstance(state, Samples) and state.dim != 0:
        return call.mixed(ALONG)
    return state


def native_group_norm(call: OpCall) -> State:
    """It is told the number of samples."""
    return batch_first(call)


def convolution(call: OpCall) -> State:
    """Samples in the first dimension; one without it is taken for a single sample."""
    if call.rank(call.first) < call.rank(call["weight"]) and batch_dims(call.shape(call.first)):
        return call.mixed(ALONG)
    return batch_first(call)


def first_dims(call: OpCall) -> State:
    """Upsampling: the first two dimensions, samples and channels, are left alone."""
    state = join(call, [call.state(call.first)])
    if isinstance(state, Samples) and state.dim > 1:
        return call.mixed(ALONG)
    return state


def batch_norm(call: OpCall) -> State:
    """The one coupling that GPipe's paper allows (section 2.2): statistics per micro-batch."""
    state = call.state(call.first)
    weights = [call.state(call[n]) for n in ("weight", "bias")]
    if isinstance(state, Samples) and state.dim == 0 and all(s == STATIC for s in weights):
        return state
    return batch_first(call)


def layer_norm(call: OpCall) -> State:
    """Normalised over the last dimensions."""
    return last_dims(len(call["normalized_shape"]))(call)


def embedding(call: OpCall) -> State:
    """Rows of a table."""
    if call.state(call["weight"]) != STATIC:
        return call.undecided("a table that depends on the batch")
    if call["scale_grad_by_freq"]:
        return call.mixed("gradients are divided by how often the batch has an entry")
    return join(call, [call.state(call["indices"])])


def recurrent(call: OpCall) -> tuple[State, ...] | State:
    """lstm, gru: results, then states of shape (layers, N, H)."""
    state = call.state(call["input"])
    if not isinstance(state, Samples):
        return state
    expected = 0 if call["batch_first"] else 1
    if state.dim != expected or call.rank(call["input"]) != 3:
        return call.mixed(ALONG)
    first = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    if any(call.state(n) != STATIC for n in call["params"] or ()):
        return call.undecided("a weight that depends on the batch")
    joint = join(call, [state.at(1), *map(call.state, first)])
    if not isinstance(joint, Samples):
        return joint
    return (joint.at(expected), *[joint] * (len(call.node.meta["val"]) - 1))


RULES = table(
    {
        shifted: "mul",
        same: "clone contiguous detach alias lift_fresh lift_fresh_copy to _to_copy type_as"
        " positive conj _conj conj_physical _conj_physical _neg_view resolve_conj resolve_neg"
        " view_as_real view_as_complex real imag _to_dtype expand_copy long int",
        written: "copy",
        pointwise: "dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout"
        " where fill zero masked_fill rrelu prelu softplus hardtanh gelu silu bernoulli normal"
        " uniform exponential floor_divide isreal one_hot hardswish hardsigmoid mish elu celu selu"
        " isclose nan_to_num clamp clip lerp addcmul addcdiv float_power square complex polar isnan"
        " isfinite isinf rsub cauchy log_normal geometric random poisson _standard_gamma binomial"
        " _sample_dirichlet __and__ __or__ __xor__ relu6 threshold logit",
        reduction: "sum mean amax amin max min all any prod logsumexp norm linalg_vector_norm var"
        " std argmax argmin nansum nanmean median nanmedian mode var_mean std_mean count_nonzero"
        " kthvalue aminmax",
        distance: "cosine_similarity pairwise_distance",
        matmul: "matmul mm bmm mv dot vdot inner addmm baddbmm addmv",
        linear: "linear",
        einsum: "einsum",
        outer: "outer ger",
        attention: "scaled_dot_product_attention",
        pairs: "cdist",
        convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
        " convolution",
        batch_first: "group_norm instance_norm im2col col2im multinomial",
        native_group_norm: "native_group_norm",
        first_dims: "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d"
        " upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d"
        " _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        batch_norm: "batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm",
        layer_norm: "layer_norm native_layer_norm rms_norm _fused_rms_norm",
        last_dims(1): "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d"
        " max_pool1d_with_indices _weight_norm_interface_",
        last_dims(2): "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"
        " max_pool2d_with_indices tril triu inverse linalg_inv linalg_inv_ex cholesky"
        " linalg_cholesky linalg_det linalg_qr linalg_svd linalg_eigh linalg_eigvalsh logdet"
        " linalg_slogdet matrix_exp linalg_matrix_exp linalg_pinv linalg_cholesky_ex linalg_lu"
        " linalg_lu_factor linalg_lu_factor_ex _lu_with_info linalg_ldl_factor"
        " linalg_ldl_factor_ex linalg_matrix_rank",
        last_dims(3): "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d"
        " max_pool3d_with_indices pixel_shuffle pixel_unshuffle",
        embedding: "embedding",
        recurrent: "lstm gru rnn_tanh rnn_relu",
    }
)

TAKES_SIZES = {native_group_norm}
"""Rules that know what the number of samples means where it is an argument."""
