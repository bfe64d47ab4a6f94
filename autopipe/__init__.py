"""autopipe: any PyTorch model as a micro-batch pipeline, in one line."""

from autopipe.api import compile, plan
from autopipe.module import Pipeline
from autopipe.passes.partition import CostGraph, DeviceSpec, Partition, partition
from autopipe.passes.simulate import Timeline, simulate
from autopipe.plans import Plan

__version__ = "0.1.0"

__all__ = [
    "CostGraph",
    "DeviceSpec",
    "Partition",
    "Pipeline",
    "Plan",
    "Timeline",
    "compile",
    "partition",
    "plan",
    "simulate",
]
