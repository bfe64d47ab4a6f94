"""State rules for views and for ops that work along dimensions.

A rule gets an `OpCall` without `Mixed` tensors and returns the state of the result, or a tuple of
states for several results. `propagate_states` checks the state against the result's shape. Each
line of a rule table gives a rule and the names of its operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes.graph import is_integer, symbolic_size, tensors_of

from .lattice import STATIC, Samples, State
from .op_call import broadcast_state, first_operand_state, join_states, new_tensor_state, view_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .op_call import OpCall

aten = torch.ops.aten

ALONG_BATCH = "it works along the batch"
BY_POSITION = "a part of the batch is picked by position"


def reshape(call: OpCall) -> State:
    """view, flatten, squeeze and other views that keep the row-major order."""
    state = call.state(call.first)
    if not isinstance(state, Samples):
        return state
    return view_state(call, state, call.shape(call.first), call.out_shape)


def reshape_each(call: OpCall) -> State | tuple[State, ...]:
    """atleast_1d, _2d and _3d, of one tensor or of several."""
    states: list[State] = []
    for node, out in zip(call.tensors, tensors_of(call.node), strict=True):
        state, shape = call.state(node), tuple(map(symbolic_size, out.shape))
        if isinstance(state, Samples):
            state = view_state(call, state, call.shape(node), shape)
        states.append(state)
    return tuple(states) if isinstance(call.node.meta["val"], (tuple, list)) else states[0]


def expand(call: OpCall) -> State:
    """New dimensions in front and repeated ones; a static tensor may be expanded to the batch."""
    node = call.first
    state = call.state(node)
    if isinstance(state, Samples):
        return state.with_dim(state.dim + len(call.out_shape) - call.rank(node))
    alike = new_tensor_state(call, call.out_shape, uniform=True)
    return alike if state == STATIC else join_states(call, [state, alike])


def broadcast_tensors(call: OpCall) -> tuple[State, ...]:
    """Each tensor expanded to the joint shape."""
    states: list[State] = []
    for node in call.tensors:
        state = call.state(node)
        if isinstance(state, Samples):
            states.append(state.with_dim(state.dim + len(call.out_shape) - call.rank(node)))
        else:
            states.append(
                join_states(call, [state, new_tensor_state(call, call.out_shape, uniform=True)])
            )
    return tuple(states)


def permute_dims(call: OpCall) -> State:
    """Permutations of dimensions.

    The op runs on a meta tensor whose sizes are all different, to see where each dimension goes.
    """
    state = call.state(call.first)
    if not isinstance(state, Samples):
        return state
    marked = torch.empty([d + 2 for d in range(call.rank(call.first))], device="meta")
    target: Any = call.node.target
    moved = target(marked, *call.node.args[1:], **call.node.kwargs)
    return state.with_dim(list(moved.shape).index(state.dim + 2))


def along_dims(call: OpCall) -> State:
    """Ops along given dimensions, separately along the others: softmax, cumsum, sort, flip, fft."""
    node = call.first
    state = broadcast_state(call, call.tensors)
    if isinstance(state, Samples) and state.dim in _named_dims(
        call, max(map(call.rank, call.tensors))
    ):
        return call.mixed(ALONG_BATCH, proven=not (is_integer(node) and is_integer(call.node)))
    return state


def _named_dims(call: OpCall, rank: int) -> set[int]:
    """The dimensions in an op's arguments; all dimensions if there are none."""
    named = next((call[n] for n in ("dim", "dims", "axis", "dimension") if n in call), None)
    if named is None or named == []:
        return set(range(rank))
    return {d % rank for d in (named if isinstance(named, (list, tuple)) else [named])}


def last_dims(count: int) -> Callable[[OpCall], State]:
    """A rule for ops on the last `count` dimensions: pooling, matrix factorisations."""

    def rule(call: OpCall) -> State:
        state = first_operand_state(call)
        if isinstance(state, Samples) and state.dim >= call.rank(call.first) - count:
            return call.mixed(ALONG_BATCH)
        return state

    return rule


def pad(call: OpCall) -> State:
    """Padding of the last dimensions; an amount of 0 does not change a dimension."""
    amounts: Any = call["pad"] or call["padding"] or ()
    state = join_states(call, [call.state(call.first)])
    if isinstance(state, Samples):
        n = 2 * (call.rank(call.first) - 1 - state.dim)  # amounts start with the last dimension's
        if any(isinstance(a, fx.Node) or a for a in amounts[n : n + 2]):
            return call.mixed(ALONG_BATCH)
    return state


def _packets(names: Iterable[str]) -> list[Any]:
    """Operators by name, without those that this version of torch lacks."""
    return [getattr(aten, n) for n in names if hasattr(aten, n)]


def rule_table(groups: dict[Callable[[OpCall], Any], str]) -> dict[Any, Callable[[OpCall], Any]]:
    """Build operator → rule from rule → operator names, in-place variants included.

    Args:
        groups: for each rule the names of its operators, separated by spaces.
    """
    return {
        packet: rule
        for rule, names in groups.items()
        for name in names.split()
        for packet in _packets((name, name + "_"))
    }


RULES = rule_table(
    {
        reshape: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze ravel view_as"
        " reshape_as _reshape_alias view_copy squeeze_copy unsqueeze_copy",
        reshape_each: "atleast_1d atleast_2d atleast_3d",
        expand: "expand expand_as expand_copy broadcast_to",
        broadcast_tensors: "broadcast_tensors",
        permute_dims: "permute transpose t numpy_T mT mH adjoint movedim moveaxis swapaxes"
        " swapdims",
        along_dims: "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod"
        " logcumsumexp cummax cummin sort argsort topk flip roll"
        " fft_fft fft_ifft fft_rfft fft_irfft fft_fft2"
        " fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfft"
        " fft_ihfft fft_fftshift fft_ifftshift glu diff _fft_r2c _fft_c2r _fft_c2c softmin unfold"
        " trapezoid cumulative_trapezoid gradient",
        pad: "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"
        " replication_pad1d replication_pad2d replication_pad3d _pad_circular",
    }
)

USES_BATCH_SIZE = {reshape, expand}
"""Rules that handle a batch size among the arguments themselves."""
