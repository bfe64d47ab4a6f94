"""What a pipeline tells of itself: its stages, code and plan, and when its actions ran."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from autopipe.module_proxy import ModuleProxy
from autopipe.passes.cost import costed_at, stage_costs
from autopipe.report.stages import StageView, views
from autopipe.report.step_timelines import StepTimelines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from autopipe.options import Options
    from autopipe.passes.cost import StageCost
    from autopipe.passes.ir import Captured
    from autopipe.passes.schedule import Scheduled
    from autopipe.planning.measured import Measured
    from autopipe.planning.plans import Plan
    from autopipe.profiling import Profiler
    from autopipe.program_cache import ProgramCache


class InspectedProxy(ModuleProxy):
    """The part of `Pipeline` that shows what was compiled and measured."""

    options: Options
    _programs: ProgramCache
    _profiler: Profiler

    @property
    def captured(self) -> Captured:
        """The captured forward graph that the last call used."""
        return self._programs.last[0].split.captured

    @property
    def stages(self) -> tuple[StageView, ...]:
        """The stages: graph, code, boundary tensors, parameters, device, costs."""
        compiled, program = self._programs.last

        @cache
        def costs() -> Sequence[StageCost]:
            split = costed_at(compiled.split, dict(program.key.lengths))
            return stage_costs(split, max(program.key.sizes))

        return views(compiled.split, compiled.options.stage_devices, costs)

    @property
    def code(self) -> str:
        """The source of the program that the last call ran."""
        return self._programs.last[1].lowered.generated.source

    @property
    def scheduled(self) -> Scheduled:
        """What each device ran in the last call, in order; `print` it."""
        return self._programs.last[1].lowered.scheduled

    @property
    def plan(self) -> Plan:
        """The stages with predicted costs and timeline; `print` it for a table."""
        compiled, program = self._programs.last
        return compiled.plan(program)

    def explain(self) -> str:
        """The plan as a table: stages, and the tensors sent between them; number of captures.

        With a backend other than "eager" also the phases that it cannot run, and why. (CUDA graphs
        are captured in the second step.)
        """
        count = self._programs.log.count
        captures = f"captures: {count}; autopipe.explain_captures(pipe) says why"
        compiled, _ = self._programs.last
        eager = [
            f"runs eagerly, not by {self.options.backend}: {reason}"
            for reason in compiled.programs.fallbacks
        ]
        return "\n".join((str(self.plan), captures, *eager))

    def profile(self) -> AbstractContextManager[Measured]:
        """Measure the steps that run while the context is open.

        ::

            with pipe.profile() as measured:
                for x, y in batches:
                    loss(pipe(x), y).backward()
            print(measured)

        Calls in all threads count, in training or inference. The start, the end and the waits of
        each action are recorded, on a GPU by events in the workers' streams, so that nothing waits
        for the device until the block ends. Run a few steps before: the first ones are slower.
        Several pipelines may be profiled at once. Steps that fail, and forwards whose backward does
        not run in the block, are left out. A backward with ``create_graph=True`` is not recorded.

        Returns:
            A context manager that gives a `Measured`, which is complete when the block ends, also
            if that raises.

        Raises:
            UnsupportedError: on entry, if a profile of this pipeline is open already.
        """
        taken = self.options.profile
        earlier = None if isinstance(taken, bool) else taken
        return self._profiler.open(self._programs.workers, earlier)

    def timeline(self) -> StepTimelines:
        """When each action of a step runs, on every device: as measured, and as predicted.

        Returns:
            `StepTimelines` of the last profile; before there is one, the prediction for the program
            of the last call, with a line on how to measure. `print` it for tables and charts.

        Raises:
            OptionError: nothing has been compiled yet.
        """
        measured = self._profiler.measured
        if measured is not None:
            return StepTimelines(measured.plan, measured.found.scheduled, measured)
        return StepTimelines(self.plan, self._programs.last[1].lowered.scheduled, None)
