"""`GraphPart`: ops of a generated function that another compiler may compile as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, fx

from autopipe.errors import printable, require

from .values import results_of

if TYPE_CHECKING:
    import sympy
    import torch


@dataclass(frozen=True, eq=False)
class GraphPart:
    """A pure part of a phase: tensors in, tensors out, nothing random, no gradient sums.

    Its function in the generated source has the signature ``name(ctx, args)``, and empties `args`.

    Attributes:
        name: of its function.
        stage: the stage that the function was written for; identical stages call it, too.
        graph: a placeholder for each argument, and a list of results.
        device: where it runs.
        traced: the device in the graph.
        symbols: the symbolic sizes; their values are in ``ctx.sizes``, in this order.
        conditions: on these, under which the graph holds.
    """

    name: str
    stage: int
    graph: fx.Graph
    device: torch.device
    traced: torch.device
    symbols: tuple[sympy.Symbol, ...] = ()
    conditions: tuple[sympy.Basic, ...] = ()

    @property
    def phase(self) -> str:
        """The letters of the phases that it belongs to."""
        return self.name.partition("_")[0]

    @property
    def arguments(self) -> list[fx.Node]:
        """Its placeholders, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def verify(self) -> None:
        self.graph.lint()
        for node in self.graph.nodes:
            if node.op == "output":
                continue
            require(
                node.op in ("placeholder", "call_function"),
                f"{self.name}: an op that only the runtime can call",
                node=node.name,
            )
        for node in (*self.arguments, *results_of(self.graph)):
            tensor = isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)
            require(tensor, f"{self.name}: a value that is no tensor", node=str(node))

    def __str__(self) -> str:
        return printable(f"{self.name} on {self.device}:\n{self.graph}", lines=True)
