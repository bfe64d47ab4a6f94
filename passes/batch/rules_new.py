"""State rules for ops that create tensors (see `rules_shape`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from autopipe.passes.graph import is_random, is_size

from .lattice import COUNT_AS_VALUE, REDUCED, STATIC, Samples, State, batch_dims
from .op_call import depends_on_batch_size, join_states, new_tensor_state
from .rules_math import pointwise
from .rules_shape import BY_POSITION, rule_table

if TYPE_CHECKING:
    from .op_call import OpCall


def new_tensor(call: OpCall) -> State:
    """zeros, ones, full, rand, new_zeros: only the result's shape matters."""
    return _filled(call, new_tensor_state(call, call.out_shape, uniform=not is_random(call.node)))


def new_like(call: OpCall) -> State:
    """zeros_like, rand_like and other ops that only use an operand's shape."""
    state, uniform = call.state(call.first), not is_random(call.node)
    if isinstance(state, Samples):
        return _filled(call, Samples(state.dim, state.batches, state.per_sample, uniform=uniform))
    return _filled(call, new_tensor_state(call, call.out_shape, uniform=uniform))


def normal(call: OpCall) -> State:
    """normal: a new tensor of a size, or entry by entry where a mean or a deviation is a tensor."""
    if "size" in call:
        return new_tensor(call)
    state = pointwise(call)
    return _with_batch_size(call, state) if call.uses_batch_size else state


def _filled(call: OpCall, state: State) -> State:
    """The state of a tensor filled with argument values, or drawn from a distribution with them."""
    values = [call[n] for n in ("fill_value", "low", "high", "mean", "std")]
    state = join_states(call, [state, *(call.state(v) for v in values if _is_tensor(v))])
    return _with_batch_size(call, state) if any(map(depends_on_batch_size, values)) else state


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and not is_size(value)


def _with_batch_size(call: OpCall, state: State) -> State:
    """The state of a result that is also computed from the batch size."""
    if isinstance(state, Samples):
        return call.mixed(COUNT_AS_VALUE)
    return REDUCED if state == STATIC else state


def scalar_tensor(call: OpCall) -> State:
    """A number as a tensor; reduced if the number is computed from the batch size."""
    return REDUCED if call.uses_batch_size else STATIC


def arange(call: OpCall) -> State:
    """arange(B·k) is the first index of each sample's k entries: only indexing may use it."""
    state = new_tensor_state(call, call.out_shape)
    start, step = call["start"] or 0, call["step"] or 1
    if not isinstance(state, Samples):
        return STATIC if not call.uses_batch_size else REDUCED
    if start == 0 and step == 1:
        return Samples(0, 1, state.per_sample, index_step=state.per_sample)
    return call.undecided("a sample's result depends on its position in the batch")


def position_dependent(call: OpCall) -> State:
    """eye, randperm: new tensors whose entries differ by position."""
    if batch_dims(call.out_shape):
        return call.mixed(BY_POSITION)
    return REDUCED if call.uses_batch_size else STATIC


RULES = rule_table(
    {
        new_tensor: "zeros ones full empty rand randn randint new_zeros new_ones new_full new_empty"
        " empty_strided new_empty_strided",
        new_like: "zeros_like ones_like full_like empty_like rand_like randn_like randint_like",
        normal: "normal",
        scalar_tensor: "scalar_tensor tensor",
        arange: "arange",
        position_dependent: "eye randperm tril_indices triu_indices linspace",
    }
)

USES_BATCH_SIZE = {new_tensor, new_like, normal, scalar_tensor, arange, position_dependent}
"""Rules that handle a batch size among the arguments themselves."""
