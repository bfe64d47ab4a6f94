"""`Profiler`: the profile of a pipeline that is open, and the last one that was measured."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from autopipe.errors import UnsupportedError
from autopipe.planning.measured import Measured
from autopipe.planning.measured_data import MeasuredSteps
from autopipe.planning.measured_timeline import measured_timeline
from autopipe.runtime.recorded_run import RecordedRun
from autopipe.runtime.recording import Clock, StepRecording

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from autopipe.compiled import CompiledModel
    from autopipe.compiled_program import CompiledProgram
    from autopipe.pipeline_call import PipelineCall
    from autopipe.runtime.transfer import WorkerDevice


class _RecordedStep(NamedTuple):
    """A run that was recorded, and its program."""

    compiled: CompiledModel
    ready: CompiledProgram
    recording: StepRecording

    @property
    def is_whole(self) -> bool:
        """Whether it ran to its end, backward included."""
        program = self.ready.program
        if program.step:
            return self.recording.finished == ["step"]
        passes = ["forward", "backward"] if program.backward else ["forward"]
        return self.recording.finished == passes


class _OpenProfile:
    """What is recorded while a profile is open.

    Args:
        workers: of the pipeline.
    """

    def __init__(self, workers: Sequence[WorkerDevice]) -> None:
        self.clocks: Mapping[WorkerDevice, Clock] = {w: Clock(w) for w in dict.fromkeys(workers)}
        self.steps: list[_RecordedStep] = []

    def watch(self, call: PipelineCall) -> None:
        """Record the runs of a call."""
        caller = ref(call)  # the call holds the function: no cycle may keep its tensors

        def make_run(*args: Any, **kwargs: Any) -> RecordedRun:
            run, own = RecordedRun(*args, **kwargs, clocks=self.clocks), caller()
            assert own is not None
            self.steps.append(_RecordedStep(own.compiled, own.ready, run.recording))
            return run

        call.make_run = make_run

    def complete(self, measured: Measured) -> None:
        """Fill in what was measured, with the steps of the program that ran most often."""
        whole: dict[CompiledProgram, list[_RecordedStep]] = {}
        steps = list(self.steps)
        for step in steps:
            if step.is_whole:
                whole.setdefault(step.ready, []).append(step)
        kept = max(whole.values(), key=len, default=[])
        every = sum(map(len, whole.values()))
        others, unfinished = every - len(kept), len(steps) - every
        measured.complete(_measured_steps(kept) if kept else None, others, unfinished)


def _measured_steps(steps: Sequence[_RecordedStep]) -> MeasuredSteps:
    """The steps of one program."""
    compiled, ready, _ = steps[0]
    scheduled, passes = ready.lowered.scheduled, 2 if ready.program.backward else 1
    return MeasuredSteps(
        compiled.plan(ready),
        scheduled,
        tuple(tuple(node.name for node in ops) for ops in compiled.split.ops),
        tuple(measured_timeline(scheduled, s.recording.times(), passes=passes) for s in steps),
    )


class Profiler:
    """Records the calls of one pipeline while a profile is open.

    Attributes:
        measured: by the last profile that has ended and measured a step; None: there was none.
    """

    def __init__(self) -> None:
        self.measured: Measured | None = None
        self._open: _OpenProfile | None = None
        self._lock = threading.Lock()

    @contextmanager
    def open(self, workers: Sequence[WorkerDevice], earlier: Measured | None) -> Iterator[Measured]:
        """Record all calls of the pipeline, of any thread, while the context is open.

        Args:
            workers: of the pipeline.
            earlier: what its plan was made with.

        Raises:
            UnsupportedError: a profile of this pipeline is open.
        """
        opened = _OpenProfile(workers)
        with self._lock:
            if self._open is not None:
                raise UnsupportedError(
                    "a profile of this pipeline is open already",
                    remedy="use the `measured` of the outer `with pipe.profile() as measured:`",
                )
            self._open = opened
        measured = Measured(earlier)
        try:
            yield measured
        except BaseException:
            self._open = None
            with suppress(Exception):  # what the block raised says more
                self._finish(opened, measured)
            raise
        self._open = None
        self._finish(opened, measured)

    def _finish(self, opened: _OpenProfile, measured: Measured) -> None:
        opened.complete(measured)
        if measured.steps:
            self.measured = measured

    def watch(self, call: PipelineCall) -> None:
        """Record a call if a profile is open.

        Args:
            call: which has not run yet.
        """
        opened = self._open
        if opened is not None:
            opened.watch(call)
