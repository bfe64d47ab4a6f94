"""The error of a device without free memory: the stage, what its plan says, what would help."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from autopipe.errors import StageError
from autopipe.formatting import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autopipe.planning.plans import Plan


@contextmanager
def explained_out_of_memory(plan: Callable[[], Plan]) -> Iterator[None]:
    """Add what the plan says to an error of a stage that found no memory.

    Args:
        plan: makes the plan of the program that runs.

    Raises:
        StageError: likewise, and more helpful.
    """
    try:
        yield
    except StageError as error:
        cause = error.__cause__
        if not isinstance(cause, torch.OutOfMemoryError) or error.stage is None:
            raise
        raise _explained(error, plan(), error.stage) from cause


def _explained(error: StageError, plan: Plan, k: int) -> StageError:
    device = plan.order.homes[k]
    total = plan.totals[device]
    together = [i for i, home in enumerate(plan.order.homes) if home == device]
    stages = f"stage {k}" if together == [k] else f"stages {', '.join(map(str, together))}"
    planned = f"{format_bytes(total.memory_bytes)}, planned for {stages}"
    return StageError(
        error.problem,
        stage=k,
        microbatch=error.microbatch,
        phase=error.phase,
        node=error.node,
        source=error.source,
        expected=f"{planned} on {plan.stages[k].device}",
        found=str(error.__cause__).splitlines()[0],
        remedy='plan with a limit, memory="..." (remat and micro-batches are chosen for it), or'
        ' choose remat="full", more chunks or more devices; other programs on the device count,'
        " too; the pipeline can be called again",
    )
