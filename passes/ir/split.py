"""`Split`: the stages' forward graphs and the routes of values between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import fx

from autopipe.errors import printable, require

from .captured import Annotated, Captured
from .values import Input, InputKind, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.passes.remat_policies import RematPolicy

CALLER = -1
"""The "stage" number of the pipeline's caller, which sends inputs and receives outputs."""


@dataclass(frozen=True)
class Route:
    """A value that crosses stage boundaries: where it comes from and which stages receive it.

    Attributes:
        spec: its name, shape and dtype.
        kind: "activation" (computed by a stage), "input" (a tensor that the caller passes) or
            "parameter" (owned by stage `source`, copied to the consumers once a step).
        source: the stage that computes or owns it, or `CALLER`.
        consumers: the stages that receive it, ascending.
        output: its position among the pipeline's outputs; None if it is not one.
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
        """All stages that have the value, ascending; the caller does not count."""
        return self.consumers if self.source == CALLER else (self.source, *self.consumers)

    def gradient_from(self, stage: int) -> int | None:
        """The stage that sends `stage` the sum of later stages' gradients; None if there is none.

        Each holder adds its own gradient to the sum, from the last holder to the first: the order
        in which autograd visits the consumers of a value in the whole graph.

        Args:
            stage: one of the holders.
        """
        later = [k for k in self.holders if k > stage]
        return later[0] if later else None

    def gradient_to(self, stage: int) -> int | None:
        """The stage (or `CALLER`) that `stage` sends the gradient sum to; None if it stays there.

        Args:
            stage: one of the holders.
        """
        earlier = [k for k in self.holders if k < stage]
        if earlier:
            return earlier[-1]
        return CALLER if self.source == CALLER else None


@dataclass(frozen=True, eq=False)
class StageGraph:
    """One stage's forward, with an explicit signature.

    The graph takes `held`, `shared` and `receives`, in this order, and returns `returns`::

        stage(*held, *shared, *receives) -> [*returns]

    For three linear layers a, b, c with tanh and relu between them, a loss against `y` in the last
    stage, and one layer per stage::

        Stage0(p_a_weight, p_a_bias, x) -> [tanh]
        Stage1(p_b_weight, p_b_bias, tanh) -> [relu]
        Stage2(p_c_weight, p_c_bias, y, relu) -> [mse_loss]

    If layers a and c shared their weight, stage 0 would own it and stage 2 get a copy::

        Stage2(p_c_bias, p_a_weight, y, relu) -> [mse_loss]

    Tracing it with its backward gives `StagePhases`, which shows the functions that are generated.

    Attributes:
        index: the stage's number.
        graph_module: the forward.
        held: parameters that the stage owns, buffers and constants.
        shared: names of parameters that an earlier stage owns; copied from there once a step.
        receives: names of values that arrive with every micro-batch.
        returns: names of values that other stages or the caller need.
        origins: for each node of its graph, its position in the captured graph (-1: none).
        fingerprint: equal for stages whose graphs are the same program.
    """

    index: int
    graph_module: fx.GraphModule
    held: tuple[Input, ...]
    shared: tuple[str, ...]
    receives: tuple[str, ...]
    returns: tuple[str, ...]
    origins: tuple[int, ...]
    fingerprint: str

    @property
    def signature(self) -> list[str]:
        """Names of the graph's placeholders, in order."""
        return [*(i.name for i in self.held), *self.shared, *self.receives]


@dataclass(frozen=True)
class StageEstimates:
    """Estimated costs of the K stages of a cut.

    Attributes:
        seconds: time of a micro-batch in each stage: forward, backward, recomputation, and the
            transfers of what the stage receives and of the gradients that it sends back.
        nbytes: memory of each stage.
        remat: the policy that each stage is estimated with.
        lower_bound: seconds; the largest stage of every convex cut of the graph takes at least
            that; 0 if no bound is known.
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
        """Whether each stage stays within its limit.

        Args:
            limits: bytes for each stage; None: no limit.
        """
        pairs = zip(self.nbytes, limits, strict=True)
        return all(limit is None or size <= limit for size, limit in pairs)


@dataclass(frozen=True, eq=False)
class Split:
    """K stage graphs, the routes of the values between them, and the estimates of the cut.

    Attributes:
        annotated: the whole program, its ops stage by stage.
        stages: the stage graphs.
        routes: the values that cross between stages, or between a stage and the caller, by name.
        estimates: estimated time and memory of the stages.
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
    def ops(self) -> tuple[tuple[fx.Node, ...], ...]:
        """For each stage its ops, as nodes of the captured graph.

        (Not by name: sizes that a stage computes in its own graph may have the names of ops.)
        """
        nodes = list(self.captured.graph_module.graph.nodes)
        return tuple(tuple(nodes[i] for i in s.origins if i >= 0) for s in self.stages)

    @property
    def firsts(self) -> tuple[str | None, ...]:
        """The first op of each stage that no earlier stage computes as well; None: it has none."""
        own = (
            (n.name for n in ops if self.duplicated.get(n.name, (k,))[0] == k)
            for k, ops in enumerate(self.ops)
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
                    route.name in (*self.stages[k].shared, *self.stages[k].receives),
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
        return printable("\n".join(lines), lines=True)
