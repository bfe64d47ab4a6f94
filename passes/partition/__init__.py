"""Partition a DAG of costs into pipeline stages: minimize the largest stage, and bound the optimum.

Needs neither torch nor a model.

In: a `CostGraph`, or the integer `Dag` and `DeviceLoads` that `split` derives from a model.
Out: a `Partition` with a proven lower bound; for `split`, orders of items and where to cut them.

Files, in reading order:

- `api`: `partition`, the public function, and its result.
- `cost_graph`: `CostGraph`, its checks, and PipeDream's profile format.
- `scaled_integers`: floats as integers without rounding, so that every comparison is exact.
- `dag`: the graph that searches work on.
- `chain_cut`: the exact cut of one order over equal devices.
- `device_loads`: times and memory of items on different devices.
- `stage_reach`: how far a stage can reach within a time and its memory.
- `hetero_cut`: the exact cut of one order over different devices.
- `device_balance`: even devices, where each has several stages.
- `cut_traffic`: few bytes across boundaries among equally good cuts.
- `order_search`: the search over topological orders, which uses
- `lower_bounds`: bounds that hold for every cut,
- `list_scheduling`: orders by priority rules, and
- `ideal_search`: beam and exhaustive search over ideals.
- `max_flow`: minimum cut of a small network.
"""

from __future__ import annotations

from .api import Partition, partition
from .chain_cut import cut_chain, min_bottleneck
from .cost_graph import CostGraph
from .cut_traffic import crossing_at
from .dag import Dag
from .device_balance import balance_devices
from .device_loads import BoundaryValue, DeviceLoads, DeviceSpec
from .hetero_cut import cut_for_devices, has_cut_within
from .max_flow import Edge, min_cut_source_side
from .order_search import alternative_orders, search_orders

__all__ = [
    "BoundaryValue",
    "CostGraph",
    "Dag",
    "DeviceLoads",
    "DeviceSpec",
    "Edge",
    "Partition",
    "alternative_orders",
    "balance_devices",
    "crossing_at",
    "cut_chain",
    "cut_for_devices",
    "has_cut_within",
    "min_bottleneck",
    "min_cut_source_side",
    "partition",
    "search_orders",
]
