"""Types of the options that are one of a few names, for type checkers and editors.

What runs is decided by the tables that the options are checked against; tests/test_option_names.py
compares them with these types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from torch import nn

    from autopipe.passes.schedule import Scheduled

Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "auto"
]
"""`schedule`: the kinds, or "auto"."""

OwnSchedule: TypeAlias = "Scheduled | Callable[[int, int], Sequence[Sequence[Any]]]"
"""`schedule`: a user's own, or a function from K and M to lists of actions."""

Remat = Literal["full", "none", "min-cut", "offload", "auto"]
"""`remat`: the policies with a name, or "auto". (A number is a policy too.)"""

StageRemat = Literal["full", "none", "min-cut", "offload"]
"""`remat` of one stage in a list."""

BatchNorm = Literal["deferred", "micro"]
"""`batch_norm`."""

OutReduce = Literal["mean", "sum"]
"""`out_reduce`."""

Backend = Literal["eager", "inductor", "cudagraphs"]
"""`backend`."""

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""`mode` of inductor."""

CutAtOption: TypeAlias = "str | type[nn.Module] | Sequence[str | type[nn.Module]] | None"
"""`cut_at`: "blocks", or names or classes of modules."""
