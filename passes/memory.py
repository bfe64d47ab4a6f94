"""What a stage keeps from forward to backward, in bytes, read off its joint graph.

Counted are distinct storages, whole even if only a view of one is kept, without those of
parameters, buffers and constants: what `runtime.memory` counts while it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._torch import storage_id

if TYPE_CHECKING:
    from .staged import StagePhases


def saved_bytes(stage: StagePhases) -> int:
    """Bytes that one micro-batch saves at a stage."""
    _, *holders = [n for n in stage.graph.nodes if n.op == "placeholder"]
    held = {storage_id(n.meta["val"]) for n in holders[: len(stage.held)]}
    names = set(stage.saved)
    saved = [n.meta["val"] for n in stage.graph.nodes if n.name in names]
    sizes = {storage_id(t): int(t.untyped_storage().nbytes()) for t in saved}
    return sum(nbytes for storage, nbytes in sizes.items() if storage not in held)
