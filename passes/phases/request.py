"""Arguments of `cut_phases` as one value, and the cache of stages traced earlier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    import torch

    from autopipe.passes.ir import Phased, Split, StagePhases
    from autopipe.passes.remat_policies import RematPolicy

    from .joint_trace import JointGraph, TensorMeta


@dataclass(frozen=True)
class PhaseRequest:
    """What a split program's stages are traced and cut for.

    Attributes:
        split: the stages.
        metadata: by micro-batch size, the metadata of every placeholder of the captured graph.
        devices: one per stage; kernels are chosen for them.
        remat: one policy per stage.
        grad: False for inference: only the forward, traced under no_grad.
        differentiated: names of the outputs that will receive a gradient. Those that are not
            differentiable are ignored; if none remains, all differentiable outputs count.
    """

    split: Split
    metadata: Mapping[int, Mapping[str, TensorMeta]]
    devices: tuple[torch.device, ...]
    remat: tuple[RematPolicy, ...]
    grad: bool
    differentiated: frozenset[str]


@dataclass
class TraceCache:
    """A cache of traced stages, keyed by all that a trace depends on: identical ones share it.

    Attributes:
        results: metadata of stages' results.
        joints: joint graphs, which do not depend on the rematerialization policy.
        stages: joint graphs cut into phases.
    """

    results: dict[Hashable, tuple[TensorMeta, ...]] = field(default_factory=dict)
    joints: dict[Hashable, JointGraph] = field(default_factory=dict)
    stages: dict[Hashable, StagePhases] = field(default_factory=dict)

    def restricted_to(self, programs: Iterable[Phased]) -> TraceCache:
        """Return a cache of these programs' stages only, so that other graphs can be freed.

        It has no joint graphs: stages that are already cut need none.

        Args:
            programs: results of `cut_phases` with this cache.
        """
        graphs = {id(stage.graph) for program in programs for stage in program.stages}
        stages = {key: stage for key, stage in self.stages.items() if id(stage.graph) in graphs}
        return TraceCache(dict(self.results), {}, stages)
