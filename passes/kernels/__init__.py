"""CUDA's kernels for plans: which operator a CUDA device runs where the CPU runs another.

A plan for a device that is not here is traced on fake CPU tensors. (A build of torch without CUDA
ends the process when an operator asks a fake CUDA tensor for its device.) Most operators are the
same on all devices. Those that are not are called as CUDA calls them, by name.

Such a trace has the operators, the bytes and the FLOPs of the planned device. **It never runs**:
stages that run are traced for the device that runs them.

In: the call of an operator, with fake (or meta) tensors, and the device's compute capability.
Out: what CUDA's operators return.

Read the files in this order:

    `table`        operator → what CUDA calls; results that differ in type
    `attention`    which of CUDA's attention kernels torch takes, and how it calls it
    `rms_norm`     CUDA's fused kernel, which has no name that the CPU's autograd knows
    `autocast`     the operators that `torch.autocast("cuda")` casts
"""

from __future__ import annotations

from .attention import Capability, attention_kernel
from .autocast import cast_as_cuda, planned_autocast
from .table import call_as_cuda, correct_results, is_substituted, kept_from_cpu

__all__ = [
    "Capability",
    "attention_kernel",
    "call_as_cuda",
    "cast_as_cuda",
    "correct_results",
    "is_substituted",
    "kept_from_cpu",
    "planned_autocast",
]
