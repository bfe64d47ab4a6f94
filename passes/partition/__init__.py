"""TODO."""

from __future__ import annotations

from .api import Partition, partition
from .chain_cut import bottleneck
from .cost_graph import CostGraph
from .dag import Dag
from .device_loads import DeviceSpec, Loads, Value
from .hetero_cut import cut_on, has_cut
from .max_flow import Edge, source_side
from .order_search import alternatives, solve

__all__ = [
    "CostGraph",
    "Dag",
    "DeviceSpec",
    "Edge",
    "Loads",
    "Partition",
    "Value",
    "alternatives",
    "bottleneck",
    "cut_on",
    "has_cut",
    "partition",
    "solve",
    "source_side",
]
