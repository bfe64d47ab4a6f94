"""Find the program for a call, or build it: capture, choose a plan, cut, trace.

    call ──▶ ModelKey: model state, structure of the inputs, torch's settings
         ──▶ `CompiledModel`s,
             of which the first is used that holds for the call's sizes and for the Python values
             that it was captured with
         ──▶ ProgramKey: micro-batch sizes, grad, outputs with gradients, parameters, metadata
             of the inputs, autocast ──▶ `CompiledProgram`

A model is captured once per `ModelKey`, and once more if sizes besides the batch, or numbers,
change: these stay open from then on. (Rarely more often: for a batch of one sample the model may
take other branches.) Its stages are traced once per `ProgramKey`. All captures follow the cut of
the first, so that parameters stay where they are. At most `cache_size` generated programs are kept:
`CompiledModels` forgets those that were not used for longest.
"""

from __future__ import annotations

import logging
import weakref
from time import perf_counter
from typing import TYPE_CHECKING

from torch import nn

from autopipe.call_guards import plain_autograd
from autopipe.call_signature import CallSignature
from autopipe.capture_log import CaptureLog
from autopipe.capture_reasons import CaptureReason, reason_for
from autopipe.compiled import CompiledModel
from autopipe.compiled_models import CallKey, CompiledModels
from autopipe.cut_positions import cut_positions
from autopipe.errors import OptionError, describe
from autopipe.model_state_key import model_state_key
from autopipe.parameters import replaced_error
from autopipe.passes.driver import capture_with_costs, cut_into_stages
from autopipe.passes.one_at_a_time import one_at_a_time
from autopipe.passes.phases import TraceCache, least_samples
from autopipe.passes.python_state import ambient_settings
from autopipe.passes.split import EarlierCut, objective_of
from autopipe.planning.choice import choose
from autopipe.planning.make_plan import planned_cut
from autopipe.progress import Progress
from autopipe.runtime import microbatch
from autopipe.runtime.transfer import WorkerDevice
from autopipe.runtime.worker_threads import end_threads
from autopipe.varying import Fixed, Varying, varying, warn_of_fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autopipe.call_signature import CallInputs
    from autopipe.compiled_program import CompiledProgram
    from autopipe.options import Options
    from autopipe.passes.ir import Annotated, Split
    from autopipe.planning.plans import Plan

logger = logging.getLogger("autopipe")

MANY_SIGNATURES = 256
"""For how many kinds of calls it is remembered what the model fixes."""

ONE_SAMPLE = CaptureReason("branch", "one sample, traced as two, takes another branch than as one")


class ProgramCache:
    """All programs of a pipeline.

    Args:
        model: the user's module.
        options: checked; options left open are chosen on the first call in each mode.

    Attributes:
        workers: one per device. Their threads end with this object.
        log: why and when the model was captured.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.workers = tuple(WorkerDevice(d) for d in options.devices)
        # A loss that the user keeps refers to programs, and so to workers: it keeps no thread.
        weakref.finalize(self, end_threads, [w.thread for w in self.workers]).atexit = False
        self.log = CaptureLog()
        self._options = options
        self._models = CompiledModels(model, options.cache_size)
        self._plan: Plan | None = None  # the chosen one
        self._cut: EarlierCut | None = None  # of the first capture, which all others follow
        self._fixed: dict[CallSignature, Fixed] = {}
        self._last: tuple[CompiledModel, CompiledProgram] | None = None
        self._seconds = 0.0, 0.0  # of the last capture and its cut

    def program_for(
        self, inputs: CallInputs, *, asked: bool
    ) -> tuple[CompiledModel, CompiledProgram]:
        """Find the program for a call, or build it by capturing and tracing.

        Args:
            inputs: the call.
            asked: whether the user asked for a capture, so that there is no need to warn of one.

        Returns:
            The captured model and the program.

        Raises:
            InputError: an argument can be neither passed on nor compared.
            CaptureError, CouplingError, PartitionError, MemoryLimitError: see `autopipe.compile`.
        """
        call = self._call_key(inputs)
        with Progress(self.options.order.stages) as progress, plain_autograd():
            compiled = _fitting(self._models.candidates(call), inputs)
            if compiled is None:
                with one_at_a_time():  # another thread may have captured the same just now
                    # While it did, torch's settings were not the caller's: export switches some.
                    call = self._call_key(inputs)
                    candidates = self._models.candidates(call)
                    compiled = _fitting(candidates, inputs)
                    if compiled is None:
                        reason = reason_for(self.model, call, inputs, self._models.known())
                        if not asked:
                            self.log.warn(reason)
                        compiled = self._capture(candidates, inputs, reason, progress)
            program = compiled.program(inputs, progress)
        self._models.use(compiled, compiled.used)
        self.log.used(compiled)
        self._last = compiled, program
        return self._last

    @property
    def captured(self) -> bool:
        """Whether the model was captured and cut, so that each parameter has a stage."""
        return self._cut is not None

    @property
    def last(self) -> tuple[CompiledModel, CompiledProgram]:
        """The captured model and program that the last call used.

        Raises:
            OptionError: there was no call.
        """
        if self._last is None:
            raise OptionError(
                "nothing has been compiled yet",
                remedy="call the pipeline once, or pass example inputs: compile(..., args=(x,))",
            )
        return self._last

    @property
    def options(self) -> Options:
        """The options, with the plan chosen for them."""
        return self._options if self._plan is None else self._options.planned(self._plan)

    def _call_key(self, inputs: CallInputs) -> CallKey:
        return CallKey(
            self.model.training,
            CallSignature.of(inputs),
            ambient_settings(),
        )

    def _capture(
        self,
        candidates: Sequence[CompiledModel],
        inputs: CallInputs,
        reason: CaptureReason,
        progress: Callable[[str], None],
    ) -> CompiledModel:
        """Capture the model for a call that no captured graph fits."""
        model_state_key(self.model)  # which checks that layers have shapes
        sizes = ((c, c.calls.sizes(inputs)) for c in candidates)
        single = inputs.batch == 1 and any(s and not c.calls.holds(s) for c, s in sizes)
        compiled = self._compile_varying(candidates, inputs, progress, single=single)
        self._remember(compiled, inputs, reason)
        if inputs.batch == 1 and not compiled.calls.holds(compiled.calls.sizes(inputs)):
            # One sample was traced as two, which gave another branch: trace it as one.
            compiled = self._compile_varying(candidates, inputs, progress, single=True)
            self._remember(compiled, inputs, ONE_SAMPLE)
        if self._plan is None and self._options.needs_planning:
            self._plan = compiled.options.plan
        if self._cut is None:
            self._cut = EarlierCut.of(compiled.split)
        return compiled

    def _compile_varying(
        self,
        candidates: Sequence[CompiledModel],
        inputs: CallInputs,
        progress: Callable[[str], None],
        *,
        single: bool,
    ) -> CompiledModel:
        """Capture and cut the model; what may change stays open as far as that is possible."""
        if len(self._fixed) > MANY_SIGNATURES:
            self._fixed.clear()
        fixed = self._fixed.setdefault(CallSignature.of(inputs), Fixed())
        same = [c for c in candidates if c.calls.changed_read(inputs) is None]
        wanted = varying(self.model, inputs, same, self._options.dynamic, fixed)
        *attempts, closed = wanted.attempts()
        reason = "the model turns it into a number"
        for attempt in attempts:
            try:
                compiled = self._compile(inputs, progress, attempt, single=single)
                break
            except Exception as error:  # what is wrong with the model itself is raised again below
                line = getattr(error, "source", None)
                reason = describe(error) + (f", {line}" if line else "")
        else:
            compiled = self._compile(inputs, progress, closed, single=single)
        dims = wanted.dims - {(n, d) for n, of in enumerate(compiled.calls.lengths) for d in of}
        numbers = wanted.numbers - set(compiled.calls.numbers)
        fixed.dims |= dims
        fixed.numbers |= numbers
        warn_of_fixed(self.model, inputs, dims, numbers, reason)
        return compiled

    def _compile(
        self,
        inputs: CallInputs,
        progress: Callable[[str], None],
        kept_open: Varying,
        *,
        single: bool,
    ) -> CompiledModel:
        model, options = self.model, self.options
        for name, tensor in model.named_parameters():
            if not isinstance(tensor, nn.Parameter):
                raise replaced_error(name)
        lengths, numbers = kept_open
        inputs = inputs.with_tensors(numbers)
        leaves, spec, dims, batch = inputs
        request = options.capture_request(
            model, leaves, spec, dims, lengths, numbers=numbers, single=single
        )
        start = perf_counter()
        annotated = capture_with_costs(request, progress)
        captured = perf_counter()
        split, traces = None, TraceCache()
        planned = options.needs_planning
        if planned:
            chosen = choose(model, annotated, leaves, batch, options, progress)
            options, split, traces = options.planned(chosen.plan), chosen.split, chosen.traces
        else:
            split = self._split(annotated, options, batch, progress)
        workers = options.by_stage(self.workers)
        compiled = CompiledModel(model, options, workers, split, traces, inputs, numbers)
        self._seconds = captured - start, perf_counter() - captured
        logger.info("captured in %.2f s", self._seconds[0])
        logger.info("%s in %.2f s", "planned" if planned else "cut", self._seconds[1])
        return compiled

    def _split(
        self,
        annotated: Annotated,
        options: Options,
        batch: int,
        progress: Callable[[str], None],
    ) -> Split:
        """Cut as before; else as in the plan, or balanced if there is none."""
        plan, (chunks, remat) = options.plan, options.resolved
        sizes = microbatch.sizes(batch, chunks, least_samples(annotated.captured, batch))
        models = options.stage_models
        in_flight = options.order.scheduled(len(sizes)).in_flight()
        cut_at = cut_positions(self.model, options.cut_at)
        objective = objective_of(
            models,
            max(sizes),
            remat=remat,
            in_flight=in_flight,
            cut_at=cut_at,
            exact=options.exact,
            homes=options.order.homes,
        )
        return cut_into_stages(
            annotated,
            objective,
            planned=None if plan is None else planned_cut(plan),
            must_fit=plan is not None and plan.training == self.model.training,
            earlier=self._cut,
            progress=progress,
        )

    def _remember(self, compiled: CompiledModel, inputs: CallInputs, reason: CaptureReason) -> None:
        """Record a captured model, under a key that is made after the capture."""
        self._models.add(compiled, self._call_key(inputs))
        self.log.add(compiled, reason, *self._seconds)


def _fitting(candidates: Sequence[CompiledModel], inputs: CallInputs) -> CompiledModel | None:
    """A captured model that takes the same branches for a call, with the same numbers.

    It is the first, or one whose stages need not be traced for this call, if there is one: a graph
    for all lengths may be traced for a batch for which that of a single length is not.
    """
    fitting = (c for c in candidates if c.calls.fits(inputs))
    first = next(fitting, None)
    if first is None or len(candidates) == 1 or first.is_traced(inputs):
        return first
    return next((c for c in fitting if c.is_traced(inputs)), first)
