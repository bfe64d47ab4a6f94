"""The program between two passes: what each pass is given and what it must give back.

    Captured   one forward graph of the whole model, its batch dimension symbolic
    Annotated  the same, with costs on every node
    Split      K stage graphs and the values that cross between them (cut in space)
    Phased     each stage's joint forward+backward graph, cut into F R B W (cut in time)

(`Scheduled` and `Generated`, which hold no graphs, stand beside the passes that make them.)

All are frozen. Sizes are sympy expressions in the batch size `B`; facts are fields with units in
their names. `verify()` raises `VerifyError` on a program that breaks the rules of its level, and
`str()` prints it for a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx

from .spec import B, Input, Kind, Leaf, Output, TensorSpec, at_batch, require, results_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.utils._pytree import TreeSpec

__all__ = [
    "CALLER",
    "PHASES",
    "Annotated",
    "B",
    "Captured",
    "Input",
    "Kind",
    "Leaf",
    "NodeCost",
    "Output",
    "Phased",
    "Route",
    "Split",
    "StageGraph",
    "StagePhases",
    "TensorSpec",
    "at_batch",
    "require",
    "results_of",
]


@dataclass(frozen=True, eq=False)
class Captured:
    """The whole model as one flat graph of ATen calls.

    Attributes:
        graph_module: placeholders in the order of `inputs`, a tuple in the order of `outputs`.
        inputs: parameters, buffers, constants and the call's tensors.
        outputs: what each micro-batch yields.
        constants: tensors that the model holds outside parameters and buffers.
        epilogue: graph to the final values, run once a step on the whole batch; its placeholders
            are named after the outputs, ``batch_size``, and buffers as they were before the call.
            None where the combined outputs are the final values.
        leaves: how the final values fill the model's result.
        out_spec: the result's structure.
        updates: (buffer, index of its value after the call among the final values).
        batch_range: smallest and largest micro-batch that the graph holds for (None: no limit).
        notes: what capture did that a reader should know.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, Tensor]
    epilogue: fx.GraphModule | None
    leaves: tuple[Leaf, ...]
    out_spec: TreeSpec
    updates: tuple[tuple[str, int], ...] = ()
    batch_range: tuple[int, int | None] = (1, None)
    notes: tuple[str, ...] = ()

    def verify(self) -> None:
        graph = self.graph_module.graph
        graph.lint()
        placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
        require(
            placeholders == [i.name for i in self.inputs],
            "placeholders and inputs differ",
            expected=str([i.name for i in self.inputs]),
            found=str(placeholders),
        )
        returned = [n.name for n in results_of(graph)]
        require(
            returned == [o.name for o in self.outputs],
            "the graph's results and outputs differ",
            expected=str([o.name for o in self.outputs]),
            found=str(returned),
        )
        for output in self.outputs:
            output.verify()
        for node in graph.nodes:
            require(
                node.op in ("placeholder", "call_function", "output"),
                "only plain calls stand in a captured graph",
                node=node.name,
                found=node.op,
            )
            require("val" in node.meta or node.op == "output", "no looks known", node=node.name)
        for item in self.inputs:
            require(
                item.kind is not Kind.CONSTANT or item.target in self.constants,
                "a constant without a value",
                node=item.name,
            )

    def finish(
        self, combined: Sequence[Tensor], batch: int, buffer: Callable[[str], Tensor]
    ) -> Sequence[Tensor]:
        """The final values.

        Args:
            combined: one value per output.
            batch: number of samples in the whole batch.
            buffer: a buffer of the model by its qualified name.
        """
        if self.epilogue is None:
            return combined
        given: dict[str, Any] = {o.name: v for o, v in zip(self.outputs, combined, strict=True)}
        given["batch_size"] = batch
        targets = {i.name: i.target for i in self.inputs if i.kind is Kind.BUFFER}
        names = [str(n.target) for n in self.epilogue.graph.nodes if n.op == "placeholder"]
        values: Sequence[Tensor] = self.epilogue(
            *(given[n] if n in given else buffer(targets[n]) for n in names)
        )
        return values

    def __str__(self) -> str:
        lines = ["captured: " + self.graph_module.print_readable(print_output=False)]
        lines += [f"  {o.spec}  combined by {o.combine}" for o in self.outputs]
        if self.epilogue is not None:
            lines.append("epilogue: " + self.epilogue.print_readable(print_output=False))
        return "\n".join(lines)


@dataclass(frozen=True)
class NodeCost:
    """What one node costs, as expressions in `B`.

    flops: floating-point operations of the forward (multiply and add counted as two).
    moved_bytes: bytes read plus bytes written by the forward.
    activation_bytes: bytes of new memory that its result takes (0 for a view).
    """

    flops: sympy.Expr
    moved_bytes: sympy.Expr
    activation_bytes: sympy.Expr


@dataclass(frozen=True, eq=False)
class Annotated:
    """A captured graph with a cost on every computing node (key: the node's name)."""

    captured: Captured
    costs: Mapping[str, NodeCost]

    def verify(self) -> None:
        for node in self.captured.graph_module.graph.nodes:
            if node.op == "call_function":
                require(node.name in self.costs, "a node without a cost", node=node.name)
        for name, cost in self.costs.items():
            for expr in (cost.flops, cost.moved_bytes, cost.activation_bytes):
                require(
                    expr.free_symbols <= {B},
                    "a cost may depend on the batch size only",
                    node=name,
                    found=str(expr),
                )

    def __str__(self) -> str:
        rows = [
            f"{n:40} {c.flops!s:>28} flops {c.moved_bytes!s:>24} B moved"
            for n, c in self.costs.items()
        ]
        return "\n".join(["annotated:", *rows])


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
    seconds: estimated time of forward and backward, on the rough device of the cost pass.
    """

    index: int
    graph_module: fx.GraphModule
    held: tuple[Input, ...]
    lent: tuple[str, ...]
    receives: tuple[str, ...]
    returns: tuple[str, ...]
    origins: tuple[int, ...]
    fingerprint: str
    seconds: float

    @property
    def signature(self) -> list[str]:
        """Names of the graph's placeholders."""
        return [*(i.name for i in self.held), *self.lent, *self.receives]


@dataclass(frozen=True, eq=False)
class Split:
    """K stage graphs and the routes of the values between them."""

    annotated: Annotated
    stages: tuple[StageGraph, ...]
    routes: Mapping[str, Route]

    @property
    def captured(self) -> Captured:
        return self.annotated.captured

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
                if item.kind is Kind.PARAMETER:
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


PHASES = ("F", "R", "B", "W")


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
        draws: for each keyed draw, the captured call that makes it and which of its draws it is.
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
    draws: tuple[tuple[int, int], ...]
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
        remat: the rule by which `saved` was chosen.
        differentiable: names of the outputs that depend on a tensor which requires a gradient.
        differentiated: those among them that a gradient will come for; none for inference.
        stages: the cut stages; identical ones share their graph.
    """

    split: Split
    size: int
    remat: str
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
        lines = [f"phased: micro-batch of {self.size}, remat={self.remat}"]
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
