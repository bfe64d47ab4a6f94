"""`LabelledRun`: a `Run` whose actions and messages have names in torch's profiler.

`torch.profiler` shows "F stage 2 micro-batch 5", and within it "send linear_3 to stage 3"; under
`torch.autograd.profiler.emit_nvtx` they are NVTX ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.profiler import record_function

from .actions import ACTION, with_wrapped_actions
from .executor import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

LETTERS = {"forward": "F", "recompute": "R", "gradients": "B", "weights": "W", "backward": "RBW"}
"""The phases that each kind of action runs."""


@dataclass(eq=False)
class LabelledRun(Run):
    """A run for which a profiler is on."""

    def _functions(self, direction: str) -> Sequence[Callable[[Any], None]]:
        return [with_wrapped_actions(f, _labelled) for f in super()._functions(direction)]

    def receive(self, value: str, stage: int, m: int) -> Tensor:
        with record_function(f"receive {value} at stage {stage}"):
            return super().receive(value, stage, m)

    def send(self, value: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        with record_function(f"send {value} to stage {to}"):
            super().send(value, source, to, m, tensor)


def _labelled(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """An action's function, with a label for the profiler."""
    match = ACTION.match(name)
    assert match is not None
    return partial(_run_labelled, f"{LETTERS[match[1]]} stage {match[2]}", function)


def _run_labelled(
    label: str, function: Callable[..., None], run: Run, m: int, compute: Any
) -> None:
    with record_function(f"{label} micro-batch {m}"):
        function(run, m, compute)
