"""How the batch runs through losses, which may end it: one rule per kind of call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.ir import MEAN, SUM
from autopipe.passes.ops import CTC_LOSS_OP

from .lattice import STATIC, Reduced, Samples, State, aligned, join
from .partial_reductions import COUNTED_MEAN
from .rules_shape import ALONG, table

if TYPE_CHECKING:
    from autopipe.passes.ir import Combine

    from .lattice import OpCall
    from .partial_reductions import PartialReduction

MEAN_REDUCTION, SUM_REDUCTION = 1, 2
"""ATen's numbers for ``reduction="mean"`` and ``"sum"``."""


def element_loss(call: OpCall) -> State:
    """mse_loss and others that compare entry by entry, then reduce."""
    return _reduced(call, aligned(call, call.tensors))


def sample_loss(call: OpCall) -> State:
    """Losses whose operands have the samples in their first dimension."""
    operands = [n for n in call.tensors if n is not call["target"]]
    state = join(call, [call.state(n) for n in call.tensors])
    if isinstance(state, Samples) and (state.dim != 0 or call.rank(call.first) < 2):
        return call.mixed(ALONG)
    if len({call.rank(n) for n in operands if isinstance(call.state(n), Samples)}) > 1:
        return call.undecided("samples in different dimensions")
    return _reduced(call, state)


def class_loss(call: OpCall) -> State:
    """cross_entropy, nll_loss: logits (N, C, d…) and targets (N, d…), or probabilities."""
    logits, target = call["self"], call["target"]
    states = []
    for node in (logits, target):
        state = call.state(node)
        rank = call.rank(logits)
        if isinstance(state, Samples) and call.rank(node) == rank:
            if state.dim == min(1, rank - 1):
                return call.mixed(ALONG)
            state = state.at(state.dim - (state.dim > 1))
        states.append(state)
    if call["weight"] is not None and call.state(call["weight"]) != STATIC:
        return call.undecided("class weights that depend on the batch")
    probabilities = target.meta["val"].is_floating_point()
    return _reduced(call, join(call, states), mean=MEAN if probabilities else COUNTED_MEAN)


def _reduced(call: OpCall, state: State, mean: Combine | PartialReduction = MEAN) -> State:
    how = {MEAN_REDUCTION: mean, SUM_REDUCTION: SUM}.get(call["reduction"])
    return Reduced(how) if how is not None and isinstance(state, Samples) else state


def ctc_loss(call: OpCall) -> State:
    """See `ctc_loss.sample_losses`: log probabilities (T, N, C), everything else (N, …)."""
    state, *others = [call.state(n) for n in call.tensors]
    if isinstance(state, Samples):
        if state.dim != 1:
            return call.mixed(ALONG)
        state = state.at(0)
    joint = join(call, [state, *others])
    return call.mixed(ALONG) if isinstance(joint, Samples) and joint.dim != 0 else joint


RULES = table(
    {
        element_loss: "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy"
        " binary_cross_entropy_with_logits kl_div soft_margin_loss poisson_nll_loss"
        " hinge_embedding_loss margin_ranking_loss",
        sample_loss: "cosine_embedding_loss triplet_margin_loss multi_margin_loss"
        " multilabel_margin_loss",
        class_loss: "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d",
    }
) | {CTC_LOSS_OP: ctc_loss}
