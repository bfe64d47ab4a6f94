"""Fingerprints of graphs: equal graphs share their traces, and a plan knows its graph."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import fx

from .source_text import literal


def fingerprint(graph: fx.Graph) -> str:
    """Hash a graph: equal for graphs with the same ops on the same arguments, under any names.

    (`static` is included because a static op draws its random numbers with another key.)
    """
    index = {node: f"%{i}" for i, node in enumerate(graph.nodes)}

    def text(value: Any) -> str:
        try:  # which tells all constants apart, as the generated program does
            return literal(value, lambda v: index[v] if isinstance(v, fx.Node) else None)
        except TypeError:  # a constant that no program can hold: `codegen` refuses it
            return repr(fx.map_arg(value, index.__getitem__))

    rows = [
        f"{n.op} {n.target if n.op == 'call_function' else ''} {n.meta.get('autocast')}"
        f" {n.meta.get('static')} {text(n.args)} {text(n.kwargs)}"
        for n in graph.nodes
    ]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
