"""Refuse models whose module attributes carry state from one call to the next.

The captured graph has no Python attributes, so it cannot read what an earlier call stored in them.
An attribute that is recomputed in every call (a cache of masks) is harmless. A counter that a loss
warm-up reads, or a state that is carried to the next batch, is not.

So a model that sets attributes is traced a second time, with the attributes that the first call
left. If the second graph differs, the model is called on two samples to decide. Buffers are part of
the model's state: if the forward creates or replaces one, calls decide at once. (Assigning a buffer
of the same shape and dtype counts as a write, see `buffer_assignment`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.errors import AutopipeError, CaptureError
from autopipe.passes._torch import FakeTensor, storage_id_of
from autopipe.passes.graph import fingerprint, is_close, source_line, written_arguments
from autopipe.passes.ir import InputKind
from autopipe.passes.python_state import Forgotten, is_same, set_changes

from .buffer_state import preserve_buffers, restore_values
from .far_values import far

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from autopipe.passes.python_state import Change

    from .flat_module import FlatModel
    from .normalize import Normalized


LIFTED = torch.ops.aten.lift_fresh_copy.default


def check_hidden_state(
    flat: FlatModel,
    traced: Normalized,
    trace_again: Callable[[], Normalized],
    examples: Sequence[Tensor],
    dims: Sequence[int | None],
) -> list[str]:
    """Check that the attributes which a forward sets do not change later calls.

    Args:
        flat: the model, just `traced`.
        traced: its graph.
        trace_again: traces it once more.
        examples: its tensors, with at least two samples in their entry of `dims`.
        dims: the batch dimension of each, or None.

    Returns:
        Names of the attributes that the forward sets; all are harmless.

    Raises:
        CaptureError: the next call would compute something else.
    """
    changed = flat.result.changed
    if not changed:
        return []
    same = False
    if all(c.holder.kind == "attribute" and c.after is not Forgotten for c in changed):
        set_changes(changed, "after")
        try:
            again = _is_same_program(traced, trace_again())
            if again and (counted := far(changed, flat.result.changed)):
                set_changes(counted, "after")
                again = _is_same_program(traced, trace_again())
            same = again
        except AutopipeError:
            pass
        finally:
            set_changes(changed, "before")
    if not same and not _later_calls_agree(flat, examples, dims):
        raise CaptureError(
            "the model keeps state in attributes of its modules: its next call would compute"
            " something else, a captured model would not",
            expected="a second call on the same inputs that gives the same results",
            found=", ".join(map(str, changed)),
            remedy="keep the state in a buffer (register_buffer) that has its final shape and dtype"
            " from the start, or pass it in as an argument",
        )
    return [str(c) for c in flat.result.changed]


def check_clock(traced: Normalized, again: Normalized, calls: Mapping[str, str]) -> None:
    """Check that the time does not reach the graph of a model that asks for it.

    Args:
        traced, again: graphs of the model, traced one after the other.
        calls: function that was called → the line that calls it.

    Raises:
        CaptureError: they differ.
    """
    if not _is_same_program(traced, again):
        raise CaptureError(
            "the model computes with the time: it would become a constant",
            source=next(iter(calls.values())),
            found=", ".join(calls),
            remedy="pass it as an argument, a tensor",
        )


def refuse_written_constants(traced: Normalized, prefix: str) -> None:
    """Refuse a forward that writes to tensors of the model which are not registered.

    Each micro-batch would write to them.

    Args:
        traced: the model's graph.
        prefix: of the model's own names in it.

    Raises:
        CaptureError: it writes to one.
    """
    constants = {
        i.name: i.target.removeprefix(prefix) for i in traced.inputs if i.kind is InputKind.CONSTANT
    }
    storages = {
        storage_id_of(n): constants[n.name]
        for n in traced.graph.nodes
        # ``torch.tensor([1, 2])`` is a constant, too; what it returns is a copy.
        if n.name in constants and any(u.target is not LIFTED for u in n.users)
    }
    for node in traced.graph.nodes:
        for written in written_arguments(node):
            if storage_id_of(written) in storages:
                raise CaptureError(
                    "the forward writes to a tensor that is not a buffer of the model",
                    node=node.name,
                    source=source_line(node),
                    found=storages[storage_id_of(written)],
                    remedy="register it: self.register_buffer(name, tensor); what a forward writes"
                    " to a buffer is written once a step",
                )


def _is_same_program(a: Normalized, b: Normalized) -> bool:
    pairs = zip(a.constants.values(), b.constants.values(), strict=False)
    return (
        fingerprint(a.graph) == fingerprint(b.graph)
        and len(a.constants) == len(b.constants)
        and all(torch.equal(x, y) for x, y in pairs)
    )


def _later_calls_agree(
    flat: FlatModel, examples: Sequence[Tensor], dims: Sequence[int | None]
) -> bool:
    """Whether a call on two samples returns the same results after a call on other samples."""
    model = flat.model
    tensors = [*examples, *model.parameters(), *model.buffers()]
    if any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
        return False

    def samples(*indices: int) -> list[Tensor]:
        return [
            x.detach() if d is None else x.detach().index_select(d, x.new_tensor(indices).long())
            for x, d in zip(examples, dims, strict=True)
        ]

    first_call = _run_calls(flat, [samples(0, 1)])
    second_call = _run_calls(flat, [samples(0, 0), samples(0, 1)])
    try:
        many_calls = _run_calls(flat, [samples(0, 0), samples(0, 0), samples(0, 1)], many=True)
    except Exception:  # of the user's code
        return False
    return all(
        len(first_call) == len(call) and all(map(_agree, first_call, call))
        for call in (second_call, many_calls)
    )


def _run_calls(
    flat: FlatModel, calls: Sequence[Sequence[Tensor]], *, many: bool = False
) -> list[Any]:
    """Run the model several times, then restore its state.

    Args:
        flat: the model.
        calls: the tensors of each.
        many: run the last one with what its numbers and lists may be after many calls.

    Returns:
        The last call's results, the values that it gave the model's buffers (each call starts from
        those before the first), and (name, value) of the buffers created or replaced by any call.
    """
    saved = [(b, b.clone()) for b in flat.model.buffers()]
    changed: list[list[Change]] = []
    results: list[Tensor] = []
    with preserve_buffers(flat.model):
        try:
            for inputs in calls:
                with torch.no_grad(), torch.random.fork_rng():
                    torch.manual_seed(0)
                    results = [*flat(*inputs)]
                results += [b.clone() for b, _ in saved]
                changed.append(flat.result.changed)
                set_changes(changed[-1], "after")
                if many and len(changed) == len(calls) - 1:
                    set_changes(far(*changed[-2:]), "after")
                restore_values(saved)
            created = {
                str(a): a.holder.get(a.key) for c in changed for a in c if a.holder.kind == "buffer"
            }
            return [*results, *created.items()]
        finally:
            restore_values(saved)
            for values in reversed(changed):
                set_changes(values, "before")


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):  # a buffer and its name
        return a[0] == b[0] and _agree(a[1], b[1])
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return is_close(a, b)
    return is_same(a, b)
