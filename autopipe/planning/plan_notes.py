"""What a plan says about itself in words: notes of the capture, and what it could not count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.passes.kernels import kept_from_cpu

if TYPE_CHECKING:
    from autopipe.options import Options
    from autopipe.passes.ir import Split


def notes_of(split: Split, options: Options) -> tuple[str, ...]:
    """Return the notes of a plan.

    Args:
        split: the stages.
        options: of the plan.
    """
    planned = any(kernels is not None for kernels in options.stage_kernels)
    targets = [n.target for n in split.captured.graph_module.graph.nodes] if planned else []
    names = kept_from_cpu(targets)
    if not names:
        return split.captured.notes
    unknown = (
        f"{', '.join(names)}: times and memory are those of the CPU's kernels; a GPU runs cuDNN's,"
        " whose memory only cuDNN knows"
    )
    return (*split.captured.notes, unknown)
