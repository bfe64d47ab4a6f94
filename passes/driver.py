"""Run the passes one after another.

    nn.Module ─capture─▶ Captured ─annotate─▶ Annotated                     `capture_with_costs`
    Annotated ─split─▶ Split                                                `cut_into_stages`
    Split ─cut_phases─▶ Phased                                              `phases_by_size`
    Phased ─(schedule)─▶ Scheduled ─codegen─▶ Generated                     `lower_to_code`

Every program is verified when it is created (a schedule by `codegen`). With ``AUTOPIPE_DUMP=dir``
in the environment each is also written to that folder, numbered in the order of creation, after
the files that are there. A folder that cannot be written is one warning; the passes go on.
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.errors import printable, require
from autopipe.interrupts import raise_deferred
from autopipe.passes.capture import capture
from autopipe.passes.cost import annotate, recomputes
from autopipe.passes.graph import warn_at_user_line
from autopipe.passes.phases import TraceCache, cut_phases
from autopipe.passes.schedule import Queue, Scheduled, queue_sizes
from autopipe.passes.split import PlannedCut, split

from ._torch import lazy_graph_code
from ._torch_patches import free_trace_state, interruptible_traces
from .codegen import Generated, codegen, stage_messages
from .one_at_a_time import one_at_a_time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from autopipe.passes.capture import CaptureRequest
    from autopipe.passes.ir import Annotated, Phased, Split
    from autopipe.passes.kernels import Capability
    from autopipe.passes.phases import PhaseRequest
    from autopipe.passes.schedule import DeviceSchedule
    from autopipe.passes.split import EarlierCut, Objective

_dumped = itertools.count(1)


@one_at_a_time()
@free_trace_state()
@interruptible_traces()
@lazy_graph_code()
def capture_with_costs(
    request: CaptureRequest,
    progress: Callable[[str], None] = lambda text: None,
    kernels: Capability | None = None,
) -> Annotated:
    """Capture a model and cost its ops.

    Args:
        request: the model, its example inputs, and how micro-batches will be used.
        progress: is called with the name of each step.
        kernels: see `annotate`.

    Raises:
        AutopipeError: as `capture` does.
    """
    progress("capturing")
    captured = capture(request)
    _dump("captured", captured)
    raise_deferred()
    progress("costing")
    annotated = annotate(captured, kernels)
    _dump("annotated", annotated)
    return annotated


@one_at_a_time()
@free_trace_state()
@interruptible_traces()
@lazy_graph_code()
def cut_into_stages(
    annotated: Annotated,
    objective: Objective,
    *,
    planned: PlannedCut | None = None,
    must_fit: bool = False,
    earlier: EarlierCut | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Split:
    """Cut a graph with costs into stages.

    Args:
        annotated: the graph.
        objective: what the cut is optimized for.
        planned: the cut of a plan, to use instead.
        must_fit: whether the graph must be the one of the plan.
        earlier: the cut of another capture of the model, to follow.
        progress: is called with the name of the step.

    Raises:
        PartitionError, PlanError: as `split` does.
    """
    progress("splitting")
    result = split(annotated, objective, planned=planned, must_fit=must_fit, earlier=earlier)
    _dump("split", result)
    return result


@dataclass(frozen=True)
class Lowered:
    """A split program as code, for one sequence of micro-batch sizes.

    Attributes:
        phased: the stages' phases, by micro-batch size.
        scheduled: the actions of each device.
        generated: the source.
        queues: for each queue between stages its size, in messages.
    """

    phased: Mapping[int, Phased]
    scheduled: Scheduled
    generated: Generated
    queues: Mapping[Queue, int]

    def with_phases(self, phased: Mapping[int, Phased]) -> Lowered:
        """The same code for other micro-batch sizes that have the same phases."""
        return replace(self, phased=phased)


@one_at_a_time()
@free_trace_state()
@interruptible_traces()
@lazy_graph_code()
def phases_by_size(
    request: PhaseRequest,
    cache: TraceCache | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[int, Phased]:
    """Trace and cut a split program's stages at each micro-batch size of a request.

    Args:
        request: the stages and their metadata, devices and policies.
        cache: stages that were traced so far; new ones are added. None: an empty cache.
        progress: is called with each stage that is traced.

    Raises:
        InputError: a batch norm would see a single value per channel.
    """
    cache = TraceCache() if cache is None else cache
    phased = {}
    for size in request.metadata:
        raise_deferred()
        phased[size] = cut_phases(request, size, cache, progress)
    return phased


@one_at_a_time()
@free_trace_state()
@interruptible_traces()
@lazy_graph_code()
def lower_to_code(
    phased: Mapping[int, Phased],
    sizes: Sequence[int],
    devices: Sequence[torch.device],
    *,
    order: DeviceSchedule,
    early_backward: bool,
    least_queue: Callable[[int, int], int],
    parted: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Lowered:
    """Schedule a split program and generate its source.

    Args:
        phased: the stages' phases, by micro-batch size.
        sizes: samples in each micro-batch.
        devices: one per stage.
        order: the schedule.
        early_backward: whether a backward may start before the last forward has ended.
        least_queue: (sending stage, receiving stage) -> messages that a queue holds at least.
        parted: whether functions consist of parts that another compiler may compile.
        progress: is called with the name of the step.

    Raises:
        VerifyError: the stages were traced for a plan of another device.
    """
    for cut in phased.values():
        _dump("phased", cut)
        for stage in cut.stages:
            what = f"stage {stage.index} was traced for a plan, with another device's kernels"
            require(stage.kernels is None, what, found=str(stage.kernels))
    backward = any(cut.differentiated for cut in phased.values())
    stages = zip(*(cut.stages for cut in phased.values()), strict=True)
    early = order.waiting([any(map(recomputes, same)) for same in stages])
    scheduled = order.scheduled(len(sizes), backward=backward, early_recompute=early)
    if not early_backward:
        scheduled = scheduled.forwards_first()
    _dump("scheduled", scheduled)
    progress("writing the program")
    generated = codegen(scheduled, phased, sizes, devices, parted=parted)
    _dump("generated", generated, suffix="py")
    first = next(iter(phased.values()))
    messages = [stage_messages(first.split, stage) for stage in first.stages]
    return Lowered(phased, scheduled, generated, queue_sizes(scheduled, messages, least_queue))


def _dump(name: str, program: object, suffix: str = "txt") -> None:
    folder = os.environ.get("AUTOPIPE_DUMP")
    if folder:
        path = Path(folder)
        content = printable(f"{program}\n", lines=True).encode()
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write_new(path, f"{name}.{suffix}", content)
        except OSError as error:
            _warn_once(f"AUTOPIPE_DUMP: no program is written to {folder!r}: {error.strerror}")


def _write_new(folder: Path, name: str, content: bytes) -> None:
    """Write a file under the next free number: other processes may write to the folder, too."""
    while True:
        number = next(_dumped)
        if any(folder.glob(f"{number:03d}-*")):
            continue
        with suppress(FileExistsError), (folder / f"{number:03d}-{name}").open("xb") as file:
            file.write(content)
            return


@cache
def _warn_once(text: str) -> None:
    warn_at_user_line(text)
