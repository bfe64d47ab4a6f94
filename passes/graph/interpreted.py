"""Create graph modules from any graph: what torch.fx cannot write as Python runs node by node."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopipe.passes._torch import HigherOrderOperator, OpOverload

from .source_text import DECIMAL_BITS, is_identifier, operator_path

if TYPE_CHECKING:
    from collections.abc import Sequence

PLAIN = (fx.Node, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types whose values torch.fx writes as they are. Numbers and strings are checked one by one."""


def graph_module(graph: fx.Graph, name: str) -> fx.GraphModule:
    """Return a module that runs a graph.

    torch.fx writes each graph as Python source and executes that. It does so for plain graphs only:
    an operator called `lambda` is no Python, a string with a comment in it may lose its line, and a
    complex number its signs. Other graphs are interpreted.

    Args:
        graph: of placeholders, calls of functions and an output.
        name: of the class, for print-outs.
    """
    nodes = [n for n in graph.nodes if n.op != "output"]
    kind = fx.GraphModule if all(map(_is_plain, nodes)) else _InterpretedModule
    return kind({}, graph, name)


class _InterpretedModule(fx.GraphModule):
    """A graph module that runs without Python source."""

    def recompile(self) -> Any:
        """Write the source for print-outs, which need not be valid; `forward` reads the graph."""
        code = self.graph.python_code("self")
        self._code = code.src
        return code

    def forward(self, *args: Any) -> Any:
        return fx.Interpreter(self).run(*args)


def _is_plain(node: fx.Node) -> bool:
    """Whether torch.fx writes a node as Python that computes the same."""
    if node.name == "self" or not all(map(is_identifier, (node.name, *node.kwargs))):
        return False
    if isinstance(node.target, (OpOverload, HigherOrderOperator)):
        try:
            if "getattr" in operator_path(node.target):
                return False
        except TypeError:
            return False
    return _are_plain(node.args) and _are_plain(tuple(node.kwargs.values()))


def _are_plain(values: Sequence[Any]) -> bool:
    return all(map(_is_plain_constant, values))


def _is_plain_constant(value: Any) -> bool:
    """Whether torch.fx writes an argument as it is."""
    if isinstance(value, (tuple, list)):
        return not hasattr(value, "_fields") and _are_plain(value)
    if isinstance(value, slice):
        return _are_plain((value.start, value.stop, value.step))
    if isinstance(value, int):
        return type(value) in (int, bool) and value.bit_length() <= DECIMAL_BITS
    if isinstance(value, float):
        return type(value) is float and not (math.isnan(value) and math.copysign(1.0, value) < 0)
    if isinstance(value, str):
        return type(value) is str and value.isprintable() and "#" not in value
    return isinstance(value, PLAIN)
