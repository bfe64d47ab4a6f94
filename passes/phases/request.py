"""Arguments of `cut_phases` as one value, and the cache of stages traced earlier."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import sympy

from autopipe.passes.ir import B, all_hold

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    import torch

    from autopipe.passes.ir import Phased, Sizes, Split, StagePhases
    from autopipe.passes.kernels import Capability
    from autopipe.passes.remat_policies import RematPolicy

    from .joint_trace import Conditions, ForwardMetadata, JointGraph
    from .metadata import TensorMeta


class _Conditional(Protocol):
    @property
    def conditions(self) -> Conditions: ...


Traced = TypeVar("Traced", bound=_Conditional)


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
        lengths: the call's values of the names of lengths.
        exact: whether the gradient of a parameter that several stages share goes from stage to
            stage with every micro-batch, and is summed as in the whole graph. False: each stage
            sums that of its own copy.
        kernels: for each stage the compute capability of the CUDA device that it is planned for and
            whose kernels it is traced with, though it is traced on another device; None: it is
            traced with the kernels of its own device. (): None for all. A trace with another
            device's kernels never runs.
    """

    split: Split
    metadata: Mapping[int, Mapping[str, TensorMeta]]
    devices: tuple[torch.device, ...]
    remat: tuple[RematPolicy, ...]
    grad: bool
    differentiated: frozenset[str]
    lengths: Sizes = field(default_factory=dict)
    exact: bool = True
    kernels: tuple[Capability | None, ...] = ()

    def kernels_of(self, stage: int) -> Capability | None:
        """The compute capability whose kernels a stage is traced with; None: its device's own."""
        return self.kernels[stage] if self.kernels else None

    def symbols(self, size: int) -> tuple[sympy.Symbol, ...]:
        """The symbols in the metadata for this micro-batch size, `B` first."""
        numbers = (n for meta in self.metadata[size].values() for n in meta.shape)
        found = {s for n in numbers if isinstance(n, sympy.Basic) for s in n.free_symbols}
        return tuple(sorted(found, key=lambda s: (s != B, str(s))))

    def sizes(self, size: int) -> Sizes:
        """The values of all symbols for a micro-batch of this size."""
        return {B: size, **self.lengths}


@dataclass
class TraceCache:
    """A cache of traced stages, keyed by all that a trace depends on: identical ones share it.

    A key has several traces if sizes are symbolic, each for the sizes that its conditions allow.

    Attributes:
        results: metadata of stages' results.
        joints: joint graphs, which do not depend on the rematerialization policy.
        stages: joint graphs cut into phases.
    """

    results: dict[Hashable, list[ForwardMetadata]] = field(default_factory=dict)
    joints: dict[Hashable, list[JointGraph]] = field(default_factory=dict)
    stages: dict[Hashable, list[StagePhases]] = field(default_factory=dict)

    def restricted_to(self, programs: Iterable[Phased]) -> TraceCache:
        """Return a cache of these programs' stages only, so that other graphs can be freed.

        It has no joint graphs: stages that are already cut need none.

        Args:
            programs: results of `cut_phases` with this cache.
        """
        graphs = {id(stage.graph) for program in programs for stage in program.stages}
        kept = {k: [s for s in found if id(s.graph) in graphs] for k, found in self.stages.items()}
        return TraceCache(dict(self.results), {}, {k: found for k, found in kept.items() if found})


def first_that_holds(found: Iterable[Traced], sizes: Sizes) -> Traced | None:
    """Return the first trace whose conditions hold for some sizes, or None."""
    return next((t for t in found if all_hold(t.conditions, sizes)), None)
