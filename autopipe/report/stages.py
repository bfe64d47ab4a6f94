"""`pipe.stages[k]`: one stage, to inspect and to run by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

import sympy

from autopipe.errors import printable
from autopipe.formatting import format_bytes, notebook_table
from autopipe.passes.ir import CALLER, B, InputKind
from autopipe.passes.split import modules_by_stage
from autopipe.planning.plan_parts import Boundary, Crossing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import fx

    from autopipe.passes.cost import StageCost
    from autopipe.passes.ir import Route, Sizes, Split, StageGraph

MOST_SHOWN = 16
"""Stages in the text of `pipe.stages`, at most."""


@dataclass(frozen=True)
class BoundaryTensor(Boundary):
    """A boundary tensor with its symbolic metadata.

    Attributes:
        shape: sizes, as sympy expressions in the batch size B and the names of lengths.
        dtype: element type.
        nbytes: bytes, as an expression in the same.
    """

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    nbytes: sympy.Expr

    @classmethod
    def of(cls, route: Route) -> BoundaryTensor:
        """Describe the value of a route."""
        spec = route.spec
        dtype = str(spec.dtype).removeprefix("torch.")
        return cls(
            name=route.name,
            kind=route.kind,
            tensor_type=f"{dtype}[{', '.join(map(str, spec.full_shape))}]",
            source=None if route.source == CALLER else route.source,
            targets=route.consumers,
            returned=route.output is not None,
            shape=spec.full_shape,
            dtype=spec.dtype,
            nbytes=sympy.Mul(*spec.full_shape) * spec.dtype.itemsize,
        )

    def at(
        self, batch: int, lengths: Sizes = MappingProxyType({}), gradient: str | None = None
    ) -> Crossing:
        """The entry of a plan for it: its size at a batch size instead of its metadata.

        Args:
            batch: samples.
            lengths: the value of each length.
            gradient: see `Crossing`.
        """
        parts = {f.name: getattr(self, f.name) for f in fields(Boundary)}
        nbytes = int(self.nbytes.subs({B: batch, **lengths}))
        return Crossing(**parts, nbytes=nbytes, gradient=gradient)


@dataclass(frozen=True, repr=False)
class StageView:
    """One stage.

    Attributes:
        index: position in the pipeline.
        device: the device that it runs on.
        modules: the first and the last module that it computes; empty if no op is in one.
        graph_module: its forward as an fx graph: ``graph_module(*held, *inputs) -> outputs``.
        held: names of the graph's first placeholders: its parameters, buffers and constants.
        parameters: qualified names of the parameters that it owns.
        inputs: the tensors that it receives, shared parameters first.
        outputs: the tensors that it returns.
        parameter_bytes: bytes of the parameters that it owns.
    """

    index: int
    device: torch.device
    modules: str
    graph_module: fx.GraphModule = field(repr=False)
    held: tuple[str, ...] = field(repr=False)
    parameters: tuple[str, ...] = field(repr=False)
    inputs: tuple[BoundaryTensor, ...]
    outputs: tuple[BoundaryTensor, ...]
    parameter_bytes: int
    _costs: Callable[[], Sequence[StageCost]] = field(repr=False, compare=False)

    @property
    def cost(self) -> StageCost:
        """See `autopipe.passes.cost.stage_cost.StageCost`."""
        return self._costs()[self.index]

    def __repr__(self) -> str:
        """One line: ``Stage 0 on cpu: h.0 … h.2, 9.4 MiB of parameters, 1 input, 2 outputs``."""
        return f"Stage {self.index} on {self.device}: " + ", ".join(self._facts())

    def _facts(self) -> tuple[str, ...]:
        parameters = f"{format_bytes(self.parameter_bytes)} of parameters"
        counts = ((len(self.inputs), "input"), (len(self.outputs), "output"))
        modules = [printable(self.modules)] if self.modules else []
        return (*modules, parameters, *(f"{n} {what}{'s' * (n != 1)}" for n, what in counts))

    @property
    def code(self) -> str:
        """The graph as Python, with shapes and the model's own lines; to read, not to run.

        Control characters in the model's lines are escaped.
        """
        return printable(self.graph_module.print_readable(print_output=False), lines=True)


class StageViews(tuple[StageView, ...]):
    """``pipe.stages``: a tuple with a short text."""

    def __repr__(self) -> str:
        lines = [repr(stage) for stage in self[:MOST_SHOWN]]
        more = [f"… {len(self) - MOST_SHOWN} more"] * (len(self) > MOST_SHOWN)
        return "\n".join(lines + more)

    def _repr_html_(self) -> str:
        headings = ("stage", "device", "modules", "parameters", "receives", "returns")

        def names(tensors: Sequence[BoundaryTensor]) -> str:
            return ", ".join(f"{t.name} {t.tensor_type}" for t in tensors) or "nothing"

        rows = [
            (
                str(stage.index),
                str(stage.device),
                stage.modules,
                format_bytes(stage.parameter_bytes),
                names(stage.inputs),
                names(stage.outputs),
            )
            for stage in self
        ]
        return notebook_table(f"{len(self)} stages", headings, rows)


def views(
    split: Split,
    devices: Sequence[torch.device],
    costs: Callable[[], Sequence[StageCost]],
) -> StageViews:
    """Describe all stages of a split program.

    Args:
        split: the program.
        devices: one for each stage.
        costs: returns the cost of each stage; is called when one is asked for.
    """
    placed = zip(split.stages, devices, modules_by_stage(split), strict=True)
    return StageViews(_view(split, *one, costs) for one in placed)


def _view(
    split: Split,
    stage: StageGraph,
    device: torch.device,
    modules: str,
    costs: Callable[[], Sequence[StageCost]],
) -> StageView:
    parameters = [i for i in stage.held if i.kind is InputKind.PARAMETER]
    return StageView(
        index=stage.index,
        device=device,
        modules=modules,
        graph_module=stage.graph_module,
        held=tuple(i.name for i in stage.held),
        parameters=tuple(i.target for i in parameters),
        inputs=tuple(BoundaryTensor.of(split.routes[n]) for n in (*stage.shared, *stage.receives)),
        outputs=tuple(BoundaryTensor.of(split.routes[n]) for n in stage.returns),
        parameter_bytes=sum(int(i.spec.nbytes) for i in parameters),
        _costs=costs,
    )
