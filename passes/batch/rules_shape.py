"""How the batch runs through views and what works along dimensions: one rule per kind of call.

A rule takes a `OpCall` (of which no tensor is `Mixed`) and gives the state of the result, or of
each result. `follow` checks what it gives against the result's shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes.graph import is_integer, symbolic_size, tensors_of

from .lattice import STATIC, Samples, State, aligned, alone, fresh, join, reshaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .lattice import OpCall

aten = torch.ops.aten

ALONG = "it works along the batch"
PLACES = "a part of the batch is picked by place"


def reshape(call: OpCall) -> State:
    """view, flatten, squeeze and all that keep the elements in order."""
    state = call.state(call.first)
    if not isinstance(state, Samples):
        return state
    return reshaped(call, state, call.shape(call.first), call.out)


def reshape_each(call: OpCall) -> State | tuple[State, ...]:
    """atleast_2d and the like, of one tensor or of several."""
    states: list[State] = []
    for node, out in zip(call.tensors, tensors_of(call.node), strict=True):
        state, shape = call.state(node), tuple(map(symbolic_size, out.shape))
        if isinstance(state, Samples):
            state = reshaped(call, state, call.shape(node), shape)
        states.append(state)
    return tuple(states) if isinstance(call.node.meta["val"], (tuple, list)) else states[0]


def expand(call: OpCall) -> State:
    """New dimensions and repeated ones; a static tensor may be expanded to the batch."""
    node = call.first
    state = call.state(node)
    if isinstance(state, Samples):
        return state.at(state.dim + len(call.out) - call.rank(node))
    alike = fresh(call, call.out, constant=True)
    return alike if state == STATIC else join(call, [state, alike])


def broadcast_tensors(call: OpCall) -> tuple[State, ...]:
    """Each tensor expanded to the joint shape."""
    states: list[State] = []
    for node in call.tensors:
        state = call.state(node)
        if isinstance(state, Samples):
            states.append(state.at(state.dim + len(call.out) - call.rank(node)))
        else:
            states.append(join(call, [state, fresh(call, call.out, constant=True)]))
    return tuple(states)


def rearrange(call: OpCall) -> State:
    """Permutations of dimensions: where a dimension goes is tried on sizes that tell them apart."""
    state = call.state(call.first)
    if not isinstance(state, Samples):
        return state
    marked = torch.empty([d + 2 for d in range(call.rank(call.first))], device="meta")
    target: Any = call.node.target
    moved = target(marked, *call.node.args[1:], **call.node.kwargs)
    return state.at(list(moved.shape).index(state.dim + 2))


def along(call: OpCall) -> State:
    """What works along some dimensions and keeps the others: softmax, cumsum, sort, flip, fft."""
    node = call.first
    state = aligned(call, call.tensors)
    if isinstance(state, Samples) and state.dim in _dims(call, max(map(call.rank, call.tensors))):
        return call.mixed(ALONG, certain=not (is_integer(node) and is_integer(call.node)))
    return state


def _dims(call: OpCall, rank: int) -> set[int]:
    """The dimensions that a call names; all of them where it names none."""
    named = next((call[n] for n in ("dim", "dims", "axis", "dimension") if n in call), None)
    if named is None or named == []:
        return set(range(rank))
    return {d % rank for d in (named if isinstance(named, (list, tuple)) else [named])}


def last_dims(count: int) -> Callable[[OpCall], State]:
    """What works on the last `count` dimensions: pooling, matrix factorisations, padding."""

    def rule(call: OpCall) -> State:
        state = alone(call)
        if isinstance(state, Samples) and state.dim >= call.rank(call.first) - count:
            return call.mixed(ALONG)
        return state

    return rule


def pad(call: OpCall) -> State:
    """Values put around the last dimensions; an amount of nothing leaves a dimension alone."""
    amounts: Any = call["pad"] or call["padding"] or ()
    state = join(call, [call.state(call.first)])
    if isinstance(state, Samples):
        n = 2 * (call.rank(call.first) - 1 - state.dim)  # the last dimension's stand first
        if any(isinstance(a, fx.Node) or a for a in amounts[n : n + 2]):
            return call.mixed("it works along the batch")
    return state


def _packets(names: Iterable[str]) -> list[Any]:
    """Operators by name; those that this torch does not have are left out."""
    return [getattr(aten, n) for n in names if hasattr(aten, n)]


def table(groups: dict[Callable[[OpCall], Any], str]) -> dict[Any, Callable[[OpCall], Any]]:
    """operator → rule, from rule → the names of operators (also their in-place forms)."""
    return {
        packet: rule
        for rule, names in groups.items()
        for name in names.split()
        for packet in _packets((name, name + "_"))
    }


RULES = table(
    {
        reshape: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze ravel view_as"
        " reshape_as _reshape_alias view_copy squeeze_copy unsqueeze_copy",
        reshape_each: "atleast_1d atleast_2d atleast_3d",
        expand: "expand expand_as broadcast_to",
        broadcast_tensors: "broadcast_tensors",
        rearrange: "permute transpose t numpy_T mT mH adjoint movedim moveaxis swapaxes swapdims",
        along: "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod logcumsumexp"
        " cummax cummin sort argsort topk flip roll fft_fft fft_ifft fft_rfft fft_irfft fft_fft2"
        " fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfft"
        " fft_ihfft fft_fftshift fft_ifftshift glu diff _fft_r2c _fft_c2r _fft_c2c softmin unfold"
        " trapezoid cumulative_trapezoid gradient",
        pad: "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"
        " replication_pad1d replication_pad2d replication_pad3d _pad_circular",
    }
)

TAKES_SIZES = {reshape, expand}
"""Rules that know what the number of samples means where it is an argument."""
