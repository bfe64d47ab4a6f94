"""`Split`, the cut in space: the graphs of stages, and the routes between them (see `ir`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import fx

from autopipe.errors import require

from .captured import Annotated, Captured
from .values import Input, InputKind, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.remat_policies import RematPolicy

CALLER = -1
"""The "stage" that model inputs come from: whoever calls the pipeline."""


@dataclass(frozen=True)
class Route:
    """A value that more than one party knows: who makes it, who needs it.

    Attributes:
        spec: its looks.
        kind: "activation" (made by a stage), "input" (a tensor of the call) or "parameter" (held
            by `source`, lent to other stages once a step).
        source: the stage that makes or holds it, or `CALLER`.
        consumers: the stages that receive it, ascending.
        output: position among the pipeline's outputs, or None.
    """

    spec: TensorSpec
    kind: str
    source: int
    consumers: tuple[int, ...]
    output: int | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def holders(self) -> tuple[int, ...]:
        """All stages that know the value, ascending; the caller is not one."""
        return self.consumers if self.source == CALLER else (self.source, *self.consumers)

    def gradient_from(self, stage: int) -> int | None:
        """The stage whose running gradient sum `stage` adds its own share to, if any.

        Shares are summed from the last holder to the first: the order in which autograd visits
        the consumers of a value in the whole graph.
        """
        later = [k for k in self.holders if k > stage]
        return later[0] if later else None

    def gradient_to(self, stage: int) -> int | None:
        """The party that takes the sum over from `stage`; None if it stays there."""
        earlier = [k for k in self.holders if k < stage]
        if earlier:
            return earlier[-1]
        return CALLER if self.source == CALLER else None


@dataclass(frozen=True, eq=False)
class StageGraph:
    """One stage's forward, with an explicit signature.

    graph_module: placeholders `held`, `lent`, `receives`; returns `returns`, all in order.
    held: the stage's own parameters, buffers and constants.
    lent: parameters that an earlier stage holds, once a step.
    receives: values that come with every micro-batch.
    origins: for each node of its graph, its position in the captured graph (-1: none).
    fingerprint: equal for stages whose graphs make the same calls.
    """

    index: int
    graph_module: fx.GraphModule
    held: tuple[Input, ...]
    lent: tuple[str, ...]
    receives: tuple[str, ...]
    returns: tuple[str, ...]
    origins: tuple[int, ...]
    fingerprint: str

    @property
    def signature(self) -> list[str]:
        """Names of the graph's placeholders."""
        return [*(i.name for i in self.held), *self.lent, *self.receives]


@dataclass(frozen=True)
class StageEstimates:
    """Estimated costs of the K stages of a cut.

    Attributes:
        seconds: time of a micro-batch in each stage: forward, backward, recomputation, and the
            transfers of what the stage receives and of the gradients that it sends back.
        nbytes: memory of each stage.
        remat: the policy that each stage is estimated with.
        lower_bound: seconds that the largest stage of no convex cut of the graph is below; 0 if
            none is known.
    """

    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]
    remat: tuple[RematPolicy, ...]
    lower_bound: float = 0.0

    @property
    def bottleneck(self) -> float:
        """Seconds of the largest stage."""
        return max(self.seconds)

    @property
    def gap(self) -> float:
        """How far the largest stage is above the bound, as a fraction of the bound."""
        return self.bottleneck / self.lower_bound - 1 if self.lower_bound else 0.0

    def fits(self, limits: Sequence[int | None]) -> bool:
        """Whether each stage keeps its limit.

        Args:
            limits: bytes for each stage; None: no limit.
        """
        pairs = zip(self.nbytes, limits, strict=True)
        return all(limit is None or size <= limit for size, limit in pairs)


@dataclass(frozen=True, eq=False)
class Split:
    """K stage graphs, the routes of the values between them, and what the cut was chosen by.

    duplicated: the ops that several stages compute, by name, and which stages do.
    """

    annotated: Annotated
    stages: tuple[StageGraph, ...]
    routes: Mapping[str, Route]
    estimates: StageEstimates
    duplicated: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def captured(self) -> Captured:
        return self.annotated.captured

    @cached_property
    def calls(self) -> tuple[tuple[fx.Node, ...], ...]:
        """For each stage the calls it makes, as nodes of the captured graph.

        (Not by name: in its own graph a stage works out sizes, which may take the names of calls.)
        """
        nodes = list(self.captured.graph_module.graph.nodes)
        return tuple(tuple(nodes[i] for i in s.origins if i >= 0) for s in self.stages)

    @property
    def firsts(self) -> tuple[str | None, ...]:
        """The first call of each stage that no stage before makes as well; None: it has no call."""
        own = (
            (n.name for n in calls if self.duplicated.get(n.name, (k,))[0] == k)
            for k, calls in enumerate(self.calls)
        )
        return tuple(next(names, None) for names in own)

    def verify(self) -> None:
        placed: dict[str, int] = {}
        for stage in self.stages:
            stage.graph_module.graph.lint()
            names = [n.name for n in stage.graph_module.graph.nodes]
            expected = stage.signature
            require(
                names[: len(expected)] == expected,
                f"stage {stage.index}: placeholders differ from its signature",
                expected=str(expected),
                found=str(names[: len(expected)]),
            )
            for item in stage.held:
                if item.kind is InputKind.PARAMETER:
                    require(
                        item.name not in placed, "a parameter held by two stages", node=item.name
                    )
                    placed[item.name] = stage.index
        for route in self.routes.values():
            require(
                list(route.holders) == sorted(set(route.holders)),
                "a value must flow from earlier to later stages",
                node=route.name,
                found=str(route.holders),
            )
            for k in route.consumers:
                require(
                    route.name in (*self.stages[k].lent, *self.stages[k].receives),
                    f"stage {k} does not receive a value routed to it",
                    node=route.name,
                )
            if route.kind == "activation":
                require(
                    route.name in self.stages[route.source].returns,
                    f"stage {route.source} does not return a value that others need",
                    node=route.name,
                )
        for index, output in enumerate(self.captured.outputs):
            route_of = self.routes.get(output.name)
            require(
                route_of is not None and route_of.output == index,
                "an output without a route",
                node=output.name,
            )

    def __str__(self) -> str:
        lines = []
        for s in self.stages:
            lines.append(f"stage {s.index}: " + s.graph_module.print_readable(print_output=False))
        lines += [
            f"  {r.spec}  {r.kind} {r.source} -> {list(r.consumers)}" for r in self.routes.values()
        ]
        return "\n".join(lines)
