"""The description of one kind of schedule; the kinds are in `kinds`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopipe.errors import OptionError, shown

RawAction = tuple[str, int, int]
"""Letters of the phases, stage, micro-batch."""

Order = list[list[RawAction]]
"""For each device, the actions that it runs, in order."""


@dataclass(frozen=True)
class ScheduleKind:
    """One kind of schedule.

    Attributes:
        name: what users write.
        order: (K devices, M micro-batches, v stages per device) → each device's list.
        summary: one line for help texts, with the paper.
        virtual_stages: v, the stages per device; the default if users may choose it.
        any_virtual_stages: users may choose any v >= 1.
        forwards_first: all forwards end before the first backward, so that the caller may compute
            the loss between them.
        example_chunks: a number of micro-batches for which `order` shows where stages are; None:
            one is enough.
        most_chunks: the largest number of micro-batches that `order` takes; None: any.
    """

    name: str
    order: Callable[[int, int, int], Order]
    summary: str
    virtual_stages: int = 1
    any_virtual_stages: bool = False
    forwards_first: bool = False
    example_chunks: int | None = None
    most_chunks: int | None = None

    def stages_per_device(self, virtual_stages: int | None = None) -> int:
        """The number v of stages per device.

        Args:
            virtual_stages: what the user asked for; None: the default.

        Raises:
            OptionError: this kind does not have that v.
        """
        if virtual_stages is None:
            return self.virtual_stages
        if not hasattr(type(virtual_stages), "__index__") or isinstance(virtual_stages, bool):
            found = shown(virtual_stages)
            raise OptionError("`virtual_stages`", expected="an integer >= 1", found=found)
        if self.any_virtual_stages and virtual_stages >= 1:
            return virtual_stages
        if self.any_virtual_stages:
            raise OptionError("`virtual_stages`", expected=">= 1", found=str(virtual_stages))
        if virtual_stages != self.virtual_stages:
            raise OptionError(
                f"`virtual_stages` of schedule {self.name!r}",
                expected=str(self.virtual_stages),
                found=str(virtual_stages),
                remedy='leave it out, or use schedule="interleaved", which has any number',
            )
        return virtual_stages
