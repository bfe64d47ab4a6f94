"""`pipe.stages[k]`: one stage, as something to look at and to run by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autopipe.passes.cost import StageCost, stage_cost
from autopipe.passes.ir import CALLER, InputKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sympy
    import torch
    from torch import fx

    from autopipe.passes.ir import Route, Split, StageGraph


@dataclass(frozen=True)
class Boundary:
    """A tensor that crosses into or out of a stage.

    Attributes:
        name: of the value, the same at both ends.
        kind: "input" of the call, "activation", or a shared "parameter".
        shape: sizes, as sympy expressions in the batch size B.
        dtype: element type.
        nbytes: bytes, as an expression in B.
        source: the stage that makes or holds it; None for the caller.
        targets: the stages that receive it.
        returned: whether it is (part of) a result of the model.
    """

    name: str
    kind: str
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    nbytes: sympy.Expr
    source: int | None
    targets: tuple[int, ...]
    returned: bool

    @classmethod
    def of(cls, route: Route) -> Boundary:
        return cls(
            name=route.name,
            kind=route.kind,
            shape=route.spec.shape,
            dtype=route.spec.dtype,
            nbytes=route.spec.nbytes,
            source=None if route.source == CALLER else route.source,
            targets=route.consumers,
            returned=route.output is not None,
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        source = "caller" if self.source is None else f"stage {self.source}"
        targets = [f"stage {k}" for k in self.targets] + ["caller"] * self.returned
        shape = ", ".join(map(str, self.shape))
        return f"{self.name}: {dtype}[{shape}] {source} -> {', '.join(targets)}"


@dataclass(frozen=True)
class StageView:
    """One stage.

    Attributes:
        index: position in the pipeline.
        device: where it runs.
        graph_module: its forward as fx; takes the held tensors, then `inputs`, returns `outputs`.
        held: names of the graph's first placeholders: its parameters, buffers and constants.
        parameters: qualified names of the parameters that live here.
        inputs: what it receives.
        outputs: what it returns.
        cost: see `autopipe.passes.cost.stage_cost.StageCost`.
    """

    index: int
    device: torch.device
    graph_module: fx.GraphModule = field(repr=False)
    held: tuple[str, ...] = field(repr=False)
    parameters: tuple[str, ...] = field(repr=False)
    inputs: tuple[Boundary, ...]
    outputs: tuple[Boundary, ...]
    cost: StageCost

    @property
    def code(self) -> str:
        """The graph as Python, with shapes and the model's own lines."""
        return self.graph_module.print_readable(print_output=False)


def views(
    split: Split, sizes: Sequence[int], devices: Sequence[torch.device]
) -> tuple[StageView, ...]:
    """All stages of a split program; times are those of its largest micro-batch."""
    placed = zip(split.stages, devices, strict=True)
    return tuple(_view(split, stage, device, max(sizes)) for stage, device in placed)


def _view(split: Split, stage: StageGraph, device: torch.device, batch: int) -> StageView:
    return StageView(
        index=stage.index,
        device=device,
        graph_module=stage.graph_module,
        held=tuple(i.name for i in stage.held),
        parameters=tuple(i.target for i in stage.held if i.kind is InputKind.PARAMETER),
        inputs=tuple(Boundary.of(split.routes[n]) for n in (*stage.lent, *stage.receives)),
        outputs=tuple(Boundary.of(split.routes[n]) for n in stage.returns),
        cost=stage_cost(split, stage, batch),
    )
