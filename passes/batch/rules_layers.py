"""State rules for layers: convolutions, norms, pooling, embeddings (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autopipe.passes.graph import is_random

from .lattice import STATIC, Samples, State, batch_dims
from .op_call import first_operand_state, join_states
from .rules_shape import ALONG_BATCH, last_dims, rule_table

if TYPE_CHECKING:
    from .op_call import OpCall

aten = torch.ops.aten


def batch_first(call: OpCall) -> State:
    """Group norm and other ops whose samples must be in the first dimension."""
    state = first_operand_state(call, "a weight that depends on the batch")
    if isinstance(state, Samples) and state.dim != 0:
        return call.mixed(ALONG_BATCH)
    return state


def feature_dropout(call: OpCall) -> State:
    """feature_dropout, feature_alpha_dropout: one draw for each entry of the first two dimensions.

    Along another dimension all samples share a draw, but each micro-batch would draw its own.
    """
    state = call.state(call.first)
    if isinstance(state, Samples) and state.dim > 1 and is_random(call.node):
        return call.mixed(ALONG_BATCH)
    return join_states(call, [state])


def native_group_norm(call: OpCall) -> State:
    """native_group_norm: as `batch_first`; the batch size is among its arguments."""
    return batch_first(call)


def convolution(call: OpCall) -> State:
    """Convolutions: samples in the first dimension; without it, the input is one sample."""
    if call.rank(call.first) < call.rank(call["weight"]) and batch_dims(call.shape(call.first)):
        return call.mixed(ALONG_BATCH)
    return batch_first(call)


def upsample(call: OpCall) -> State:
    """Upsampling does not change the first two dimensions: samples and channels."""
    state = join_states(call, [call.state(call.first)])
    if isinstance(state, Samples) and state.dim > 1:
        return call.mixed(ALONG_BATCH)
    return state


def batch_norm(call: OpCall) -> State:
    """batch_norm: statistics per micro-batch, the one coupling that GPipe allows (section 2.2)."""
    state = call.state(call.first)
    weights = [call.state(call[n]) for n in ("weight", "bias")]
    if isinstance(state, Samples) and state.dim == 0 and all(s == STATIC for s in weights):
        return state
    return batch_first(call)


def layer_norm(call: OpCall) -> State:
    """layer_norm, rms_norm: over the last dimensions."""
    return last_dims(len(call["normalized_shape"]))(call)


def embedding(call: OpCall) -> State:
    """embedding: looks up rows of a table."""
    if call.state(call["weight"]) != STATIC:
        return call.undecided("a table that depends on the batch")
    if call["scale_grad_by_freq"]:
        return call.mixed("gradients are divided by how often the batch has an entry")
    return join_states(call, [call.state(call["indices"])])


def recurrent(call: OpCall) -> tuple[State, ...] | State:
    """lstm, gru: the output, then states of shape (layers, N, H)."""
    state = call.state(call["input"])
    if not isinstance(state, Samples):
        return state
    expected = 0 if call["batch_first"] else 1
    if state.dim != expected or call.rank(call["input"]) != 3:
        return call.mixed(ALONG_BATCH)
    first = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    if any(call.state(n) != STATIC for n in call["params"] or ()):
        return call.undecided("a weight that depends on the batch")
    joint = join_states(call, [state.with_dim(1), *map(call.state, first)])
    if not isinstance(joint, Samples):
        return joint
    return (joint.with_dim(expected), *[joint] * (len(call.node.meta["val"]) - 1))


RULES = rule_table(
    {
        convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
        " convolution",
        batch_first: "group_norm instance_norm im2col col2im multinomial",
        feature_dropout: "feature_dropout feature_alpha_dropout",
        native_group_norm: "native_group_norm",
        upsample: "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d"
        " upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d"
        " _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        batch_norm: "batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm",
        layer_norm: "layer_norm native_layer_norm rms_norm _fused_rms_norm",
        last_dims(1): "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d"
        " max_pool1d_with_indices _weight_norm_interface_ _sample_dirichlet",
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

USES_BATCH_SIZE = {native_group_norm}
"""Rules that handle a batch size among the arguments themselves."""
