"""`Generated`: a program as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopipe.errors import VerifyError

from .source_rules import check_source

if TYPE_CHECKING:
    from autopipe.passes.ir import GraphPart


@dataclass(frozen=True)
class Generated:
    """A program as text.

    Attributes:
        source: a Python module.
        forward: names of its functions that run a step's forward, one per device; each is called
            as ``device_1_forward(run)``. Empty if `step` is not.
        backward: likewise for the backward; empty for inference, too.
        step: likewise for both in one, where backwards begin before all forwards have ended.
        parts: functions of the source that another compiler may replace; none unless asked for.
    """

    source: str
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    step: tuple[str, ...] = ()
    parts: tuple[GraphPart, ...] = ()

    def verify(self) -> None:
        defined = check_source(self.source)
        for name in (
            *self.forward,
            *self.backward,
            *self.step,
        ):
            if name not in defined:
                raise VerifyError("a device without a function", expected=name)
        for part in self.parts:
            if part.name not in defined:
                raise VerifyError("a part without a function", expected=part.name)

    def __str__(self) -> str:
        return self.source
