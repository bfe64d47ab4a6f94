"""One captured model: its stages, and a runnable program per sequence of micro-batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopipe.errors import DeviceError, MemoryLimitError
from autopipe.parameters import move, parameter, replaced
from autopipe.passes.driver import Lowered, costed, cut_in_space, cut_in_time, phases_by_size
from autopipe.passes.ir import InputKind
from autopipe.passes.phases import PhaseRequest, TraceCache, received_strides
from autopipe.passes.schedule import schedule
from autopipe.passes.split import objective_of
from autopipe.planning.choice import choose, models_of
from autopipe.planning.fitting import missing_bytes
from autopipe.planning.planner import clocks_of, cut_of, plan
from autopipe.runtime import microbatch
from autopipe.runtime.backends import autocast_types
from autopipe.runtime.executor import Program
from autopipe.runtime.load import load_source
from autopipe.tensor_meta import differentiated, input_metadata, state_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch.utils._pytree import TreeSpec

    from autopipe.options import Options
    from autopipe.passes.ir import Annotated, Split
    from autopipe.planning.plans import Plan
    from autopipe.runtime.transfer import WorkerDevice


@dataclass(frozen=True, eq=False)
class CompiledProgram:
    """A program that can run, and the passes' results that it was made from."""

    program: Program
    lowered: Lowered

    @cached_property
    def updates(self) -> frozenset[str]:
        """Names of the buffers that the forward writes to."""
        cuts = self.lowered.phased.values()
        return frozenset(n for cut in cuts for stage in cut.stages for n in stage.updates)

    @property
    def differentiable(self) -> frozenset[str]:
        return next(iter(self.lowered.phased.values())).differentiable

    @property
    def differentiated(self) -> frozenset[str]:
        return next(iter(self.lowered.phased.values())).differentiated


class Compiled:
    """A model captured in one mode with one structure of inputs, cut into stages.

    Args:
        model: the user's module.
        options: checked.
        workers: the worker of each stage.
        leaves: flattened example inputs.
        spec: their structure.
        dims: their batch dimensions.
        batch: their number of samples.
        progress: told what is being done.
        single: hold for this one sample only.

    Attributes:
        options: the same, with nothing left open: what was not given was chosen for this batch.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        workers: tuple[WorkerDevice, ...],
        leaves: Sequence[Any],
        spec: TreeSpec,
        dims: Sequence[int | None],
        batch: int,
        progress: Callable[[str], None],
        *,
        single: bool = False,
    ) -> None:
        for name, tensor in model.named_parameters():
            if not isinstance(tensor, nn.Parameter):
                raise replaced(name)
        self.model = model
        self.workers = workers
        request = options.capture_request(model, leaves, spec, dims, single=single)
        annotated = costed(request, progress)
        if options.is_open:
            chosen = choose(model, annotated, leaves, batch, options, progress)
            self.options = options.planned(chosen.plan)
            self.split: Split = chosen.split
        else:
            self.options, self.split = options, self._cut(annotated, options, batch, progress)
        captured = self.split.captured
        self.parameters = tuple(i for i in captured.inputs if i.kind is InputKind.PARAMETER)
        self.calls = tuple(i for i in captured.inputs if i.kind is InputKind.INPUT)
        self.expected = differentiated(captured)
        self._fits: dict[int, bool] = {}
        self._programs: dict[Hashable, CompiledProgram] = {}
        self._traced = TraceCache()
        self._copies: dict[tuple[str, torch.device], tuple[int, Tensor, Tensor]] = {}

    def _cut(
        self,
        annotated: Annotated,
        options: Options,
        batch: int,
        progress: Callable[[str], None],
    ) -> Split:
        """Where a plan says, or else balanced; if nothing was left to choose."""
        plan, (chunks, remat) = options.plan, options.given
        sizes = microbatch.sizes(batch, chunks)
        models = options.models or models_of(options.devices)
        in_flight = schedule(options.kind, len(models), len(sizes)).in_flight()
        objective = objective_of(models, max(sizes), remat=remat, in_flight=in_flight)
        return cut_in_space(
            annotated,
            objective,
            planned=None if plan is None else cut_of(plan),
            must_fit=plan is not None and plan.training == self.model.training,
            progress=progress,
        )

    def fits(self, batch: int) -> bool:
        """Whether the model takes the captured branches for a batch of this size."""
        if batch not in self._fits:
            self._fits[batch] = self.split.captured.size_guards.hold_for(batch)
        return self._fits[batch]

    def tensor(self, kind: InputKind, target: str) -> Tensor:
        """A tensor of the model by its qualified name."""
        if kind is InputKind.CONSTANT:
            return self.split.captured.constants[target]
        if kind is InputKind.PARAMETER:
            return parameter(self.model, target)
        return self.model.get_buffer(target)

    def place_parameters(self) -> None:
        """Move each parameter, in place, to the device of the stage that holds it.

        Raises:
            DeviceError: a parameter or buffer is on the meta device.
        """
        for stage, worker in zip(self.split.stages, self.workers, strict=True):
            for item in stage.held:
                if item.kind is InputKind.CONSTANT:
                    continue
                parameter = self.tensor(item.kind, item.target)
                if parameter.is_meta:
                    raise DeviceError(
                        f"a {item.kind} is on the meta device: it has no values to compute with",
                        node=item.target,
                        remedy="give the model values first: model.to_empty(device='cpu') and then"
                        " initialise, or model.load_state_dict(..., assign=True) (which leaves out"
                        " buffers that are not persistent)",
                    )
                if item.kind is InputKind.BUFFER or parameter.device == worker.device:
                    continue
                move(parameter, worker.device)

    def on(self, worker: WorkerDevice, kind: InputKind, target: str, *, written: bool) -> Tensor:
        """A tensor as a stage on `worker` uses it; copies are kept while the original is the same.

        A buffer that a stage writes to moves there for good.
        """
        tensor = self.tensor(kind, target)
        if tensor.device == worker.device:
            return tensor.detach()
        if written:
            move(tensor, worker.device)
            return tensor.detach()
        key = (target, worker.device)
        known = self._copies.get(key)
        if known is None or known[0] != tensor._version or known[1] is not tensor:
            copy = tensor.detach().to(worker.device)
            known = self._copies[key] = (tensor._version, tensor, copy)
        return known[2]

    def ready(
        self,
        sizes: tuple[int, ...],
        leaves: Sequence[Any],
        *,
        grad: bool,
        expected: frozenset[str],
        progress: Callable[[str], None],
    ) -> CompiledProgram:
        """The program for these sizes, made now or before.

        Args:
            sizes: samples per micro-batch.
            leaves: the call's flattened inputs.
            grad: whether gradients are wanted.
            expected: names of the outputs that a gradient will come for.
            progress: told what is being done.
        """
        frozen = tuple((p.requires_grad, p.dtype) for p in map(self._parameter, self.parameters))
        captured = self.split.captured
        chunks = {size: input_metadata(captured, leaves, size) for size in dict.fromkeys(sizes)}
        key = (
            *(sizes, grad, expected, frozen, tuple(tuple(c.items()) for c in chunks.values())),
            *(
                (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
                for d in autocast_types()
            ),
        )
        if key not in self._programs:
            constant = state_metadata(captured, lambda i: self.tensor(i.kind, i.target))
            devices = [w.device for w in self.workers]
            request = PhaseRequest(
                self.split,
                {size: constant | chunk for size, chunk in chunks.items()},
                tuple(devices),
                self.options.given.remat,
                grad,
                expected,
            )
            phased = phases_by_size(request, self._traced, progress)
            kind = self.options.kind
            lowered = cut_in_time(phased, sizes, devices, kind=kind, progress=progress)
            ready = CompiledProgram(self._load(lowered, sizes), lowered)
            if self.options.limits is not None and grad:
                self._check_limits(ready)
            self._programs[key] = ready
        return self._programs[key]

    def plan(self, ready: CompiledProgram) -> Plan:
        """The plan of a program: what it was planned to take, or is now."""
        options, sizes = self.options, ready.program.sizes
        clocks = clocks_of(options.models or models_of(options.devices))
        made = plan(self.model, self.split, ready.lowered.phased, sizes, options, clocks)
        known = options.plan
        # A measured plan of this very program knows more than the table of devices.
        return known if known is not None and made.is_of(known) else made

    def _check_limits(self, ready: CompiledProgram) -> None:
        """Another batch than the planned one may need more.

        Raises:
            MemoryLimitError: it does.
        """
        stages = enumerate(self.plan(ready).stages)
        k, stage = max(stages, key=lambda one: missing_bytes(one[1]))
        if missing_bytes(stage) > 0:
            raise MemoryLimitError(
                f"stage {k} does not fit its device with this batch",
                expected=f"at most {stage.limit_bytes} bytes",
                found=f"{stage.memory_bytes} bytes for {sum(ready.program.sizes)} samples",
                remedy="use a smaller batch, or a new pipeline, planned for the largest one",
                missing_bytes=missing_bytes(stage),
            )

    def _parameter(self, item: Any) -> nn.Parameter:
        return parameter(self.model, item.target)

    def _load(self, lowered: Lowered, sizes: tuple[int, ...]) -> Program:
        generated = lowered.generated
        names, filename = load_source(generated.source)
        return Program(
            forward=tuple(names[n] for n in generated.forward),
            backward=tuple(names[n] for n in generated.backward),
            workers=self.workers,
            sizes=sizes,
            draws={s: [k.draws for k in cut.stages] for s, cut in lowered.phased.items()},
            strides={
                (*key, size): strides
                for size, cut in lowered.phased.items()
                for key, strides in received_strides(cut).items()
            },
            filename=filename,
        )
