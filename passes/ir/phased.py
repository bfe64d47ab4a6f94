"""`Phased`, the cut in time: the joint graphs of stages, and who runs each node when (see `ir`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx

from autopipe.errors import require

from .split import CALLER, Split
from .values import results_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipe.passes.remat_policies import RematPolicy

PHASES = ("F", "R", "B", "W")


class RandomDraw(NamedTuple):
    """What a random draw is keyed by, beside the step's seed and the micro-batch.

    Attributes:
        call: position of the call that makes it, in the stage graph or in the captured one.
        nth: which of that call's draws it is.
        shared: the call does not depend on the batch, so all micro-batches draw the same.
    """

    call: int
    nth: int
    shared: bool


@dataclass(frozen=True, eq=False)
class StagePhases:
    """One stage at one micro-batch size: a functional joint graph and who runs each node when.

    The graph's placeholders are, in order: the runtime's kit, `held` (here with what is lent to the
    stage), `receives` and one tangent per name in
    `tangents`. Its results are, in order: `returns`, one new value per buffer in `updates`, one
    gradient per name in `own_grads`, one per name in `sent_grads`.

    Attributes:
        graph: joint forward and backward; pure, but for random draws and kernels' own caches.
        phase_of: node name → "F", "R", "B" or "W"; placeholders and the output have none.
        saved: values that F keeps for the other phases (placeholders among `receives` included).
        draws: for each keyed draw its key, with the captured call that makes it.
        device: the device it was traced for.
    """

    index: int
    graph: fx.Graph
    phase_of: Mapping[str, str]
    saved: tuple[str, ...]
    held: tuple[str, ...]
    receives: tuple[str, ...]
    tangents: tuple[str, ...]
    returns: tuple[str, ...]
    updates: tuple[str, ...]
    own_grads: tuple[str, ...]
    sent_grads: tuple[str, ...]
    draws: tuple[RandomDraw, ...]
    device: torch.device

    def results(self) -> dict[str, list[Any]]:
        """The joint graph's results, grouped: returns, updates, own_grads, sent_grads."""
        values = results_of(self.graph)
        groups: dict[str, list[Any]] = {}
        for group in ("returns", "updates", "own_grads", "sent_grads"):
            count = len(getattr(self, group))
            groups[group], values = values[:count], values[count:]
        return groups

    def verify(self) -> None:
        self.graph.lint()
        rank = {"F": 0, "R": 1, "B": 2, "W": 3}
        saved = set(self.saved)
        for node in self.graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            phase = self.phase_of.get(node.name)
            require(phase in rank, f"stage {self.index}: a node in no phase", node=node.name)
            for source in node.all_input_nodes:
                made = self.phase_of.get(source.name)
                if made is None or made == phase:
                    continue
                require(
                    rank[made] < rank[str(phase)],
                    f"stage {self.index}: phase {phase} needs a value of the later phase {made}",
                    node=node.name,
                    found=source.name,
                )
                require(
                    made != "F" or source.name in saved,
                    f"stage {self.index}: phase {phase} needs a value that F does not keep",
                    node=node.name,
                    found=source.name,
                )


@dataclass(frozen=True, eq=False)
class Phased:
    """All stages cut in time, for one micro-batch size.

    Attributes:
        split: what was cut.
        size: samples in the micro-batch.
        remat: for each stage, the policy by which `saved` was chosen.
        differentiable: names of the outputs that depend on a tensor which requires a gradient.
        differentiated: those among them that a gradient will come for; none for inference.
        stages: the cut stages; identical ones share their graph.
    """

    split: Split
    size: int
    remat: tuple[RematPolicy, ...]
    differentiable: frozenset[str]
    differentiated: frozenset[str]
    stages: tuple[StagePhases, ...]

    def verify(self) -> None:
        for stage in self.stages:
            stage.verify()
        for route in self.split.routes.values():
            for k in route.holders:
                taker = route.gradient_to(k)
                if taker is None or taker == CALLER:
                    continue
                require(
                    (route.name in self.stages[k].sent_grads)
                    == (route.name in self.stages[taker].tangents),
                    f"stages {k} and {taker} disagree about a gradient",
                    node=route.name,
                )

    def __str__(self) -> str:
        lines = [
            f"phased: micro-batch of {self.size}, remat {', '.join(p.name for p in self.remat)}"
        ]
        for stage in self.stages:
            counts = {p: sum(q == p for q in stage.phase_of.values()) for p in PHASES}
            lines.append(f"stage {stage.index}: nodes {counts}, saved {list(stage.saved)}")
            lines += [
                f"  {self._letter(stage, n)} {n.format_node() or 'return ' + str(n.args[0])}"
                for n in stage.graph.nodes
            ]
        return "\n".join(lines)

    @staticmethod
    def _letter(stage: StagePhases, node: fx.Node) -> str:
        return stage.phase_of.get(node.name, " ")
