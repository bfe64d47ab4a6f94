"""Buffers that a forward assigns: ``self.n = self.n + 1``.

To the model it is the same as ``self.n.copy_(self.n + 1)`` at the end of the forward, for that is
when the next one, or a checkpoint, looks. Only written so does the graph show it.

There is one difference: what was computed from the old value keeps it for its backward. A buffer
that is written within each micro-batch is therefore copied first (`kept_apart`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from autopipe.errors import UnsupportedError
from autopipe.passes._torch import storage_id, storage_id_of
from autopipe.passes.graph import add_call, symbolic_size, written_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .module_state import Attribute


def is_assigned(changed: Attribute) -> bool:
    """A buffer that is another tensor than before, of the same looks."""
    old, new = changed.before, changed.after
    return (
        changed.is_buffer
        and isinstance(old, Tensor)
        and isinstance(new, Tensor)
        and old.dtype == new.dtype
        and list(map(symbolic_size, old.shape)) == list(map(symbolic_size, new.shape))
    )


def in_place(
    model: nn.Module, assigned: Sequence[Attribute], results: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """Write to the buffers that a forward has assigned; all are again what they were before.

    Returns:
        The forward's results; where one is a buffer as it was before, a copy.

    Raises:
        UnsupportedError: buffers share memory that did not, or no longer do.
    """
    if not assigned:
        return tuple(results)
    _check_memory(model, assigned)
    memory = {storage_id(c.before) for c in assigned}
    kept = tuple(x.clone() if storage_id(x) in memory else x for x in results)
    values = [c.after.detach().clone() for c in assigned]  # some may be others' old values
    with torch.no_grad():
        for changed, value in zip(assigned, values, strict=True):
            changed.before.copy_(value)
    return kept


def kept_apart(graph: fx.Graph, buffers: Iterable[fx.Node]) -> None:
    """Let all but the last write to assigned buffers have copies of them; changes `graph`."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for buffer in buffers:
        memory = storage_id_of(buffer)
        last = [n for n in graph.nodes if memory in map(storage_id_of, written_arguments(n))][-1]
        with graph.inserting_before(first):
            copy = add_call(graph, torch.ops.aten.clone.default, buffer)
        buffer.replace_all_uses_with(copy)
        copy.args = (buffer,)
        last.args = (buffer, *last.args[1:])


def _check_memory(model: nn.Module, assigned: Sequence[Attribute]) -> None:
    before = dict(model.named_buffers(remove_duplicate=False))
    after = before | {str(c): c.after for c in assigned}
    if apart := _shared(before) ^ _shared(after):
        raise UnsupportedError(
            "by assigning buffers the model changes which of them share memory: from then on a"
            " write to one would change another, or no longer",
            found=" and ".join(sorted(apart.pop())),
            remedy="write to the buffer instead of assigning it: self.a.copy_(self.b)",
        )


def _shared(buffers: dict[str, Tensor]) -> set[frozenset[str]]:
    """Names of buffers that lie in the same memory."""
    groups: dict[int, set[str]] = {}
    for name, buffer in buffers.items():
        groups.setdefault(storage_id(buffer), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
