"""One captured model: its stages, and a runnable program for each `ProgramKey`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autopipe.call_guards import autocast_state, plain_autograd, restore_autocast
from autopipe.compiled_program import ProgramKey
from autopipe.errors import DeviceError, MemoryLimitError
from autopipe.loss_factor import LossFactor
from autopipe.parameters import move, parameter
from autopipe.passes.cost import costed_at
from autopipe.passes.ir import B, InputKind
from autopipe.passes.phases import concrete, least_samples
from autopipe.planning.fitting import misfits, missing_bytes
from autopipe.planning.make_plan import make_plan
from autopipe.planning.stage_timers import modeled_timers
from autopipe.progress import silent
from autopipe.runtime import microbatch
from autopipe.tensor_meta import input_metadata, usual_outputs
from autopipe.traced_programs import TracedPrograms
from autopipe.traced_stages import TracedStages
from autopipe.valid_calls import ValidCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

    from autopipe.call_signature import CallInputs
    from autopipe.compiled_program import CompiledProgram
    from autopipe.options import Options
    from autopipe.passes.ir import Input, Split
    from autopipe.passes.loss_seeds import LossSeeds
    from autopipe.passes.phases import TraceCache
    from autopipe.planning.plans import Plan
    from autopipe.runtime.transfer import WorkerDevice

MANY_PROGRAMS = 512
"""How many programs are remembered to fit the limits of memory."""


class CompiledModel:
    """A model captured in one mode with one structure of inputs, cut into stages.

    Args:
        model: the user's module.
        options: resolved: the planner has nothing left to choose.
        workers: one per stage.
        split: the stages.
        traces: traces of these stages so far.
        inputs: the call that it was captured for, with tensors for the numbers that are inputs.
        numbers: positions of these among the leaves.

    Attributes:
        calls: those that the graph is valid for.
        programs: what was traced and generated.
        used: the key, in `programs`, of the code that the last call used.
        expected: names of the outputs that the next call expects gradients for.
        loss_factor: by what the last gradient of the loss was larger than 1 (a loss scale).
        seeds: by the outputs that can receive a gradient, how those of the loss are computed first.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        workers: tuple[WorkerDevice, ...],
        split: Split,
        traces: TraceCache,
        inputs: CallInputs,
        numbers: Collection[int] = (),
    ) -> None:
        self.model, self.options, self.workers, self.split = model, options, workers, split
        captured = split.captured
        self.parameters = tuple(i for i in captured.inputs if i.kind is InputKind.PARAMETER)
        self.call_inputs = tuple(i for i in captured.inputs if i.kind is InputKind.INPUT)
        updated = {target for target, _ in captured.updates}  # at the end of the forward
        self._updated = frozenset(i.name for i in captured.inputs if i.target in updated)
        self.expected = usual_outputs(captured)
        self.loss_factor = LossFactor()
        self.seeds: dict[frozenset[str], LossSeeds] = {}
        self.calls = ValidCalls(captured, inputs, numbers)
        stages = TracedStages(split, options, workers, traces, self._tensor)
        self.programs = TracedPrograms(stages, options, workers)
        self.used: Hashable = None
        self._within_limits: dict[ProgramKey, None] = {}
        self._least: dict[int, int] = {}
        self._copies: dict[tuple[str, torch.device], tuple[int, Tensor, Tensor]] = {}

    def _least_samples(self, batch: int) -> int:
        if batch not in self._least:
            self._least[batch] = least_samples(self.split.captured, batch)
        return self._least[batch]

    def tensor(self, kind: InputKind, target: str) -> Tensor:
        """Return a parameter, buffer or constant of the model.

        Args:
            kind: which of these.
            target: its qualified name.
        """
        if kind is InputKind.CONSTANT:
            return self.split.captured.constants[target]
        if kind is InputKind.PARAMETER:
            return parameter(self.model, target)
        return self.model.get_buffer(target)

    def place(self, program: CompiledProgram) -> None:
        """Move what stages own, in place, to their devices.

        These are the parameters, with their gradients, and the buffers that the forward writes to
        (of several stages that read such a buffer, the first one's device).

        Args:
            program: one of this model's.

        Raises:
            DeviceError: a parameter or buffer is on the meta device.
        """
        written = {*self._updated, *program.updates}
        for stage, worker in zip(self.split.stages, self.workers, strict=True):
            for item in stage.held:
                if item.kind is InputKind.CONSTANT:
                    continue
                tensor = self._tensor(item)
                if tensor.is_meta:
                    raise DeviceError(
                        f"a {item.kind} is on the meta device: it has no values to compute with",
                        node=item.target,
                        remedy="give the model values first: model.to_empty(device='cpu') and then"
                        " initialise, or model.load_state_dict(..., assign=True) (which leaves out"
                        " buffers that are not persistent)",
                    )
                owned = item.kind is InputKind.PARAMETER or item.name in written
                if owned and tensor.device != worker.device:
                    move(tensor, worker.device)
                written.discard(item.name)

    def on(self, worker: WorkerDevice, kind: InputKind, target: str) -> Tensor:
        """Return a tensor as a stage uses it, on the stage's device.

        What the stage owns is there (`place`). Copies of constants are cached until the original
        changes; others are made for each step.

        Args:
            worker: the stage's worker.
            kind, target: as for `tensor`.
        """
        tensor = self.tensor(kind, target)
        if tensor.device == worker.device:
            return tensor.detach()
        if kind is not InputKind.CONSTANT:  # `.data` may change it without changing its version
            return tensor.detach().to(worker.device)
        key = (target, worker.device)
        cached = self._copies.get(key)
        if cached is None or cached[0] != tensor._version or cached[1] is not tensor:
            copy = tensor.detach().to(worker.device)
            cached = self._copies[key] = (tensor._version, tensor, copy)
        return cached[2]

    def is_traced(self, inputs: CallInputs) -> bool:
        """Whether the stages need not be traced for a call, under the current modes.

        Args:
            inputs: the call.
        """
        return self.programs.is_traced(self._key(inputs))

    def program(
        self, inputs: CallInputs, progress: Callable[[str], None] = silent
    ) -> CompiledProgram:
        """Return the program for a call, under the current grad and autocast modes.

        Args:
            inputs: the call.
            progress: called with a text for each step.

        Raises:
            MemoryLimitError: the batch needs more memory than the devices have.
            InputError: a batch norm would see a single value per channel even in one micro-batch.
        """
        return self._program(self._key(inputs), progress)

    def _key(self, inputs: CallInputs) -> ProgramKey:
        inputs = inputs.with_tensors(self.calls.numbers)
        captured, leaves = self.split.captured, inputs.leaves
        least = self._least_samples(inputs.batch)
        sizes = microbatch.sizes(inputs.batch, self.options.resolved.chunks, least)
        parameters = tuple(self._tensor(i) for i in self.parameters)
        tensors = [*(leaves[i.index] for i in self.call_inputs), *parameters]
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return ProgramKey(
            sizes,
            grad,
            self.expected if grad else frozenset(),
            tuple((p.requires_grad, p.dtype) for p in parameters),
            tuple(
                tuple(input_metadata(captured, leaves, size).items())
                for size in dict.fromkeys(sizes)
            ),
            autocast_state(),
            tuple((s, n) for s, n in (self.calls.sizes(inputs) or {}).items() if s != B),
            self.model.training,  # in evaluation, a loss is often computed without a backward
        )

    def program_for_outputs(
        self, program: CompiledProgram, names: frozenset[str], *, early: bool = True
    ) -> CompiledProgram:
        """Return a program for gradients of other outputs, which the next call then expects too.

        Args:
            program: one of this model's.
            names: of the outputs that receive a gradient.
            early: whether its backwards may start before all forwards have ended.
        """
        self.expected = names
        early = early and program.key.early_backward
        key = program.key._replace(expected=names, early_backward=early)
        # A backward runs outside of the call's autocast.
        with plain_autograd(), restore_autocast(program.key.autocast):
            return self._program(key, silent)

    def _program(self, key: ProgramKey, progress: Callable[[str], None]) -> CompiledProgram:
        program, code = self.programs.program(key, progress)
        if self.options.limits is not None and key.grad and key not in self._within_limits:
            self._check_limits(program)
            if len(self._within_limits) >= MANY_PROGRAMS:
                self._within_limits.clear()
            self._within_limits[key] = None
        self.used = code
        return program

    def plan(self, program: CompiledProgram) -> Plan:
        """The plan of a program: the one that it was compiled with, or one by the device table."""
        return self._plan(program, costed_at(self.split, dict(program.key.lengths)))

    def _plan(self, program: CompiledProgram, split: Split) -> Plan:
        options, sizes = self.options, program.key.sizes
        timers = modeled_timers(options.stage_models, options.backend)
        phased = {s: concrete(cut, program.sizes(s)) for s, cut in program.lowered.phased.items()}
        plan = make_plan(self.model, split, phased, sizes, options, timers)
        given = options.plan
        # The times of a given plan may have been measured on the devices.
        return given if given is not None and plan.is_of(given) else plan

    def _check_limits(self, program: CompiledProgram) -> None:
        """Refuse a batch that needs more memory than the planned one and does not fit."""
        plan = self._plan(program, self.split)  # memory needs no costs of ops
        k, stage = max(enumerate(plan.stages), key=lambda one: missing_bytes(one[1]))
        if missing_bytes(stage) > 0:
            total = plan.totals[plan.order.homes[k]]
            raise MemoryLimitError(
                f"{misfits(plan, k)} with this batch",
                expected=f"at most {total.limit_bytes} bytes",
                found=f"{total.memory_bytes} bytes for {sum(program.key.sizes)} samples",
                remedy="use a smaller batch, or a new pipeline, planned for the largest one",
                missing_bytes=missing_bytes(stage),
            )

    def _tensor(self, item: Input) -> Tensor:
        return self.tensor(item.kind, item.target)
