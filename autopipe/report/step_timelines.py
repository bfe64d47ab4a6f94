"""`StepTimelines`: a step as measured beside the step as predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopipe.errors import printable
from autopipe.formatting import format_seconds
from autopipe.passes.schedule import check_unit, trace_file

from .measured_text import measured_text
from .page import page

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipe.passes.schedule import Scheduled, Timeline
    from autopipe.planning.measured_data import MeasuredData
    from autopipe.planning.plans import Plan

HOW_TO_MEASURE = (
    "nothing was measured yet: run some steps within `with pipe.profile() as measured:`,"
    " then ask again"
)

LEGEND = (
    "a digit is a forward, a letter a backward (a: micro-batch 0; capitals: weight gradients),"
    " - a wait within an action, . idle"
)


class StepTimelines:
    """When each action of a step runs, on every device; from `Pipeline.timeline`.

    `print` it for a table and charts.

    Args:
        plan: with predicted times.
        scheduled: what the devices run.
        measured: what was measured; None: nothing.
    """

    def __init__(self, plan: Plan, scheduled: Scheduled, measured: MeasuredData | None) -> None:
        self._plan, self._scheduled, self._measured = plan, scheduled, measured

    @property
    def measured(self) -> Timeline | None:
        """The median step of the last profile, in seconds; None: nothing was measured yet."""
        return None if self._measured is None else self._measured.timeline

    @property
    def predicted(self) -> Timeline:
        """The step simulated with the plan's times, in seconds."""
        return self._plan.simulated(self._scheduled)

    @property
    def simulated(self) -> Timeline | None:
        """The step simulated with the measured times of phases, in seconds.

        Between `predicted` and this one, times of phases differ; between this one and `measured`,
        the rest: uneven actions, workers that start late, the caller's time between two passes.
        None: nothing was measured yet.
        """
        return None if self._measured is None else self._measured.simulated

    @property
    def timelines(self) -> Mapping[str, Timeline]:
        """All that there are, by name: "measured", "predicted", "simulated"."""
        every = {
            "measured": self.measured,
            "predicted": self.predicted,
            "simulated": self.simulated,
        }
        return {name: line for name, line in every.items() if line is not None}

    def to_chrome_trace(self, microseconds: float = 1e6) -> str:
        """All timelines as one trace file for Perfetto or chrome://tracing.

        Each is a process ("measured", "predicted", "simulated"), with a thread per device.

        Args:
            microseconds: how long a second is in the file.

        Raises:
            OptionError: `microseconds` is not finite and > 0.
        """
        check_unit(microseconds)
        events: list[dict[str, object]] = []
        for process, (name, line) in enumerate(self.timelines.items()):
            events += line.trace_events(microseconds, process, name)
        return trace_file(events)

    def to_html(self) -> str:
        """The plan's report as an HTML page, with the measured timeline below the predicted one."""
        return page(self._plan, self._measured)

    def __str__(self) -> str:
        lines = [measured_text(self._measured)] if self._measured else [HOW_TO_MEASURE]
        longest = max(line.makespan for line in self.timelines.values())
        for name, line in self.timelines.items():
            length = format_seconds(line.makespan)
            lines += ["", f"{name}: {length}, bubble {line.bubble:.1%}", *line.chart(longest)]
        return printable("\n".join([*lines, LEGEND]), lines=True)

    def __repr__(self) -> str:
        lengths = (f"{n} {format_seconds(line.makespan)}" for n, line in self.timelines.items())
        return f"{type(self).__name__}({', '.join(lengths)})"
