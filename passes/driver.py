"""The straight line through the passes.

    nn.Module ─capture─▶ Captured ─annotate─▶ Annotated                               `costed`
    Annotated ─split─▶ Split                                                         `cut_in_space`
    Split ─cut_phases─▶ Phased                                                  `phases_by_size`
    Phased ─(schedule)─▶ Scheduled ─codegen─▶ Generated                             `cut_in_time`

Every program is verified where it is made. With ``AUTOPIPE_DUMP=dir`` in the environment each is
also written to that folder, numbered in the order in which it was made.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.passes.capture import capture
from autopipe.passes.cost import annotate
from autopipe.passes.phases import TraceCache, cut_phases
from autopipe.passes.schedule import Scheduled, schedule
from autopipe.passes.split import PlannedCut, split

from ._torch import lazy_graph_code
from .codegen import Generated, codegen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from autopipe.passes.capture import CaptureRequest
    from autopipe.passes.ir import Annotated, Phased, Split
    from autopipe.passes.phases import PhaseRequest
    from autopipe.passes.split import Objective

_dumped = itertools.count(1)


@lazy_graph_code()
def costed(
    request: CaptureRequest, progress: Callable[[str], None] = lambda text: None
) -> Annotated:
    """Capture a model and cost its ops.

    Args:
        request: the model, its example inputs, and how micro-batches will be used.
        progress: is called with the name of each step.

    Raises:
        AutopipeError: as `capture` does.
    """
    progress("capturing")
    captured = capture(request)
    _dump("captured", captured)
    progress("costing")
    annotated = annotate(captured)
    _dump("annotated", annotated)
    return annotated


@lazy_graph_code()
def cut_in_space(
    annotated: Annotated,
    objective: Objective,
    *,
    planned: PlannedCut | None = None,
    must_fit: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Split:
    """Cut a costed graph into stages; arguments as for `split`."""
    progress("splitting")
    result = split(annotated, objective, planned=planned, must_fit=must_fit)
    _dump("split", result)
    return result


@dataclass(frozen=True)
class Lowered:
    """A split program made runnable for one sequence of micro-batch sizes."""

    phased: Mapping[int, Phased]
    scheduled: Scheduled
    generated: Generated


@lazy_graph_code()
def phases_by_size(
    request: PhaseRequest,
    cache: TraceCache | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[int, Phased]:
    """Trace and cut a split program's stages at each micro-batch size of a request.

    Args:
        request: the stages and what they are traced for.
        cache: what was traced so far; grows. None: nothing.
        progress: is called with each stage that is traced.

    Raises:
        InputError: a batch norm would see a single value per channel.
    """
    cache = TraceCache() if cache is None else cache
    return {size: cut_phases(request, size, cache, progress) for size in request.metadata}


@lazy_graph_code()
def cut_in_time(
    phased: Mapping[int, Phased],
    sizes: Sequence[int],
    devices: Sequence[torch.device],
    *,
    kind: str,
    progress: Callable[[str], None] = lambda text: None,
) -> Lowered:
    """Schedule and source, for phases by micro-batch size."""
    for cut in phased.values():
        _dump("phased", cut)
    backward = any(cut.differentiated for cut in phased.values())
    scheduled = schedule(kind, len(devices), len(sizes), backward=backward)
    scheduled.verify()
    _dump("scheduled", scheduled)
    progress("writing the program")
    generated = codegen(scheduled, phased, sizes, devices)
    _dump("generated", generated, suffix="py")
    return Lowered(phased, scheduled, generated)


def _dump(name: str, program: object, suffix: str = "txt") -> None:
    folder = os.environ.get("AUTOPIPE_DUMP")
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{next(_dumped):03d}-{name}.{suffix}").write_text(f"{program}\n")
