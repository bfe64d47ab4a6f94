"""`StageGrapher`: let the stages of loaded programs replay CUDA graphs.

A program is loaded as it is. Each action of a stage, in the program's names, is then replaced by
one that captures and replays the stage's phases (`autopipe.runtime.graphs`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves

from autopipe.passes._torch import TorchDispatchMode
from autopipe.runtime.graphs import GraphedStage, StageGraphs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autopipe.passes.ir import Phased, StagePhases
    from autopipe.runtime.transfer import WorkerDevice

logger = logging.getLogger("autopipe")

KINDS = ("forward", "recompute", "gradients", "weights", "backward")
"""The actions of generated code."""


class _WatchOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of each operator that the calling thread runs, and of tensors in lists.

    Args:
        told: is called with the operator, its arguments and its results.
    """

    def __init__(self, told: Callable[[Any, Sequence[Any], Sequence[Any]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = told

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._told(func, tree_leaves((args, kwargs or {})), tree_leaves(result))
        return result


class StageGrapher:
    """Binds the programs of one model.

    Args:
        workers: one per stage.

    Attributes:
        reasons: what runs without a graph, and why.
    """

    def __init__(self, workers: Sequence[WorkerDevice]) -> None:
        self._workers = workers
        self.reasons: list[str] = []

    def bind(self, phased: Phased, names: dict[str, Any]) -> None:
        """Replace the actions of a loaded program.

        Args:
            phased: its stages, for any size of micro-batches.
            names: what its source defines.
        """
        for stage, worker in zip(phased.stages, self._workers, strict=True):
            if worker.captures is None:
                self._note(f"stage {stage.index}: a {worker.device.type} device has no graphs")
                continue
            policy = phased.remat[stage.index]
            if policy.least_offloaded is not None:
                self._note(
                    f"stage {stage.index}: what it saves leaves the device (remat={policy.name!r}),"
                    " and a graph's memory stays"
                )
                continue
            kinds = [kind for kind in KINDS if f"{kind}_{stage.index}" in names]
            described, new_pool = _described(stage, kinds), worker.new_graph_pool
            graphs = StageGraphs(described, worker, new_pool, _WatchOps, self._note)
            for kind in kinds:
                name = f"{kind}_{stage.index}"
                names[name] = graphs.wrapped(kind, names[name])

    def _note(self, reason: str) -> None:
        if reason not in self.reasons:
            logger.info("without a graph: %s", reason)
            self.reasons.append(reason)


def _described(stage: StagePhases, kinds: Sequence[str]) -> GraphedStage:
    """What a stage's graphs must know.

    Args:
        stage: cut into phases.
        kinds: of its actions.
    """
    last = [kind for kind in ("weights", "backward") if kind in kinds]
    last = last or [kind for kind in ("gradients", "forward") if kind in kinds][:1]
    sent = {"forward": len(stage.returns)}
    sent |= dict.fromkeys(("gradients", "backward"), len(stage.sent_grads))
    return GraphedStage(stage.index, sent, tuple(stage.own_grads), frozenset(last))
