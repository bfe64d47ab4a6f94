"""State rules for losses, which may reduce the batch (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.ir import MEAN, SUM
from autopipe.passes.ops import CTC_LOSS_OP

from .lattice import STATIC, Reduced, Samples, State
from .op_call import broadcast_state, join_states
from .partial_reductions import COUNTED_MEAN
from .rules_shape import ALONG_BATCH, rule_table

if TYPE_CHECKING:
    from autopipe.passes.ir import Combine

    from .op_call import OpCall
    from .partial_reductions import PartialReduction

MEAN_REDUCTION, SUM_REDUCTION = 1, 2
"""ATen's numbers for ``reduction="mean"`` and ``"sum"``."""


def element_loss(call: OpCall) -> State:
    """mse_loss and other losses that compare entry by entry and then reduce."""
    return _reduced_state(call, broadcast_state(call, call.tensors))


def sample_loss(call: OpCall) -> State:
    """Losses whose operands must have the samples in their first dimension."""
    operands = [n for n in call.tensors if n is not call["target"]]
    state = join_states(call, [call.state(n) for n in call.tensors])
    if isinstance(state, Samples) and (state.dim != 0 or call.rank(call.first) < 2):
        return call.mixed(ALONG_BATCH)
    if len({call.rank(n) for n in operands if isinstance(call.state(n), Samples)}) > 1:
        return call.undecided("samples in different dimensions")
    return _reduced_state(call, state)


def class_loss(call: OpCall) -> State:
    """cross_entropy, nll_loss: logits (N, C, d…); targets (N, d…), or probabilities (N, C, d…)."""
    logits, target = call["self"], call["target"]
    states = []
    for node in (logits, target):
        state = call.state(node)
        rank = call.rank(logits)
        if isinstance(state, Samples) and call.rank(node) == rank:
            if state.dim == min(1, rank - 1):
                return call.mixed(ALONG_BATCH)
            state = state.with_dim(state.dim - (state.dim > 1))
        states.append(state)
    if call["weight"] is not None and call.state(call["weight"]) != STATIC:
        return call.undecided("class weights that depend on the batch")
    probabilities = target.meta["val"].is_floating_point()
    return _reduced_state(
        call, join_states(call, states), mean=MEAN if probabilities else COUNTED_MEAN
    )


def _reduced_state(call: OpCall, state: State, mean: Combine | PartialReduction = MEAN) -> State:
    how = {MEAN_REDUCTION: mean, SUM_REDUCTION: SUM}.get(call["reduction"])
    return Reduced(how) if how is not None and isinstance(state, Samples) else state


def ctc_loss(call: OpCall) -> State:
    """ctc_loss: log probabilities (T, N, C); everything else, the result too, (N, …)."""
    state, *others = [call.state(n) for n in call.tensors]
    if isinstance(state, Samples):
        if state.dim != 1:
            return call.mixed(ALONG_BATCH)
        state = state.with_dim(0)
    joint = join_states(call, [state, *others])
    return call.mixed(ALONG_BATCH) if isinstance(joint, Samples) and joint.dim != 0 else joint


RULES = rule_table(
    {
        element_loss: "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy"
        " binary_cross_entropy_with_logits kl_div soft_margin_loss poisson_nll_loss"
        " hinge_embedding_loss margin_ranking_loss",
        sample_loss: "cosine_embedding_loss triplet_margin_loss multi_margin_loss"
        " multilabel_margin_loss",
        class_loss: "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d",
    }
) | {CTC_LOSS_OP: ctc_loss}
