"""The straight line through the passes.

    nn.Module ─capture─▶ Captured ─annotate─▶ Annotated                               `costed`
    Annotated ─split─▶ Split                                                         `cut_in_space`
    Split ─phases─▶ Phased                                                           `phases_at`
    Phased ─(schedule)─▶ Scheduled ─codegen─▶ Generated                             `cut_in_time`

Every program is verified where it is made. With ``AUTOPIPE_DUMP=dir`` in the environment each is
also written to that folder, numbered in the order in which it was made.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._torch import lazy_code
from .capture import capture
from .codegen import Generated, codegen
from .cost import annotate
from .phases import Traced, phases
from .schedule import Scheduled, schedule
from .split import Planned, split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn
    from torch.utils._pytree import TreeSpec

    from .aim import Aim
    from .ir import Annotated
    from .phased import Phased
    from .policies import Policy
    from .staged import Split
    from .trace import Look

_dumped = itertools.count(1)


@lazy_code()
def costed(
    model: nn.Module | torch.export.ExportedProgram,
    leaves: Sequence[Any],
    spec: TreeSpec,
    batch_dims: Sequence[int | None],
    *,
    whole: bool,
    single: bool = False,
    batch_norm: str,
    out_reduce: str | None,
    progress: Callable[[str], None] = lambda text: None,
) -> Annotated:
    """Capture a model and cost its calls; arguments as for `capture`."""
    progress("capturing")
    captured = capture(
        model,
        leaves,
        spec,
        batch_dims,
        whole=whole,
        single=single,
        batch_norm=batch_norm,
        out_reduce=out_reduce,
    )
    _dump("captured", captured)
    progress("costing")
    annotated = annotate(captured)
    _dump("annotated", annotated)
    return annotated


@lazy_code()
def cut_in_space(
    annotated: Annotated,
    aim: Aim,
    *,
    planned: Planned | None = None,
    must_fit: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Split:
    """Cut a costed graph into stages; arguments as for `split`."""
    progress("splitting")
    result = split(annotated, aim, planned=planned, must_fit=must_fit)
    _dump("split", result)
    return result


@dataclass(frozen=True)
class Lowered:
    """A split program made runnable for one sequence of micro-batch sizes."""

    phased: Mapping[int, Phased]
    scheduled: Scheduled
    generated: Generated


@lazy_code()
def phases_at(
    split: Split,
    sizes: Sequence[int],
    looks: Mapping[int, Mapping[str, Look]],
    devices: Sequence[torch.device],
    *,
    remat: Sequence[Policy],
    grad: bool,
    differentiated: frozenset[str],
    traced: Traced,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[int, Phased]:
    """A split program's phases at each micro-batch size; `looks` by size, the rest as `phases`."""
    return {
        size: phases(
            split,
            size,
            looks[size],
            devices,
            remat=remat,
            grad=grad,
            differentiated=differentiated,
            traced=traced,
            progress=progress,
        )
        for size in dict.fromkeys(sizes)
    }


@lazy_code()
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
