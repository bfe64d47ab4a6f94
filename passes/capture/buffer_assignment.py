"""Buffers that a forward assigns: ``self.n = self.n + 1``.

For the model this equals ``self.n.copy_(self.n + 1)`` at the end of the forward, because only the
next forward, or a checkpoint, reads the new value. torch.export records only the in-place form.

There is one difference: the backward may need the old value. A buffer that is written within each
micro-batch is therefore copied first (`read_buffer_copies`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from autopipe.errors import UnsupportedError
from autopipe.passes._torch import storage_id, storage_id_of
from autopipe.passes.graph import add_call, full_size, written_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from autopipe.passes.python_state import Change


def is_assigned_buffer(changed: Change) -> bool:
    """Whether the attribute is a buffer, now another tensor of the same shape and dtype."""
    old, new = changed.before, changed.after
    return (
        changed.holder.kind == "buffer"
        and isinstance(old, Tensor)
        and isinstance(new, Tensor)
        and old.dtype == new.dtype
        and list(map(full_size, old.shape)) == list(map(full_size, new.shape))
    )


def write_in_place(
    model: nn.Module, assigned: Sequence[Change], results: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """Write the new values of assigned buffers into the tensors that the model had before.

    Args:
        model: its old buffers have been restored.
        assigned: the buffers that the forward assigned.
        results: the tensors that the forward returned.

    Returns:
        The forward's results; a copy where one is the old value of a buffer.

    Raises:
        UnsupportedError: the assignments change which buffers share memory.
    """
    if not assigned:
        return tuple(results)
    _check_shared_memory(model, assigned)
    memory = {storage_id(c.before) for c in assigned}
    unchanged = tuple(x.clone() if storage_id(x) in memory else x for x in results)
    values = [c.after.detach().clone() for c in assigned]  # may alias old values of others
    with torch.no_grad():
        for changed, value in zip(assigned, values, strict=True):
            changed.before.copy_(value)
    return unchanged


def read_buffer_copies(graph: fx.Graph, buffers: Iterable[fx.Node]) -> None:
    """Let every use of an assigned buffer but the last write use a copy of it.

    Args:
        graph: is changed.
        buffers: placeholders of the assigned buffers.
    """
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for buffer in buffers:
        memory = storage_id_of(buffer)
        last = [n for n in graph.nodes if memory in map(storage_id_of, written_arguments(n))][-1]
        with graph.inserting_before(first):
            copy = add_call(graph, torch.ops.aten.clone.default, buffer)
        buffer.replace_all_uses_with(copy)
        copy.args = (buffer,)
        last.args = (buffer, *last.args[1:])


def _check_shared_memory(model: nn.Module, assigned: Sequence[Change]) -> None:
    before = dict(model.named_buffers(remove_duplicate=False))
    after = before | {str(c): c.after for c in assigned}
    if changed := _groups_in_memory(before) ^ _groups_in_memory(after):
        raise UnsupportedError(
            "the model's assignments change which buffers share memory: a later write to one would"
            " change another, or no longer change it",
            found=" and ".join(sorted(changed.pop())),
            remedy="write to the buffer instead of assigning it: self.a.copy_(self.b)",
        )


def _groups_in_memory(buffers: dict[str, Tensor]) -> set[frozenset[str]]:
    """Groups of names of buffers that share memory."""
    groups: dict[int, set[str]] = {}
    for name, buffer in buffers.items():
        groups.setdefault(storage_id(buffer), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
