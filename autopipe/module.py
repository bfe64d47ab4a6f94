"""`Pipeline`: a module that runs a model as a pipeline of stages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopipe.batch_dims import batch_of
from autopipe.call_guards import refuse_meta, refuse_tracers, refuse_transforms
from autopipe.call_signature import CallInputs, flatten
from autopipe.errors import OptionError, UnsupportedError, shown
from autopipe.inspection import InspectedProxy
from autopipe.interrupts import deferred, raise_deferred
from autopipe.passes.capture import TARGET, is_cache
from autopipe.pipeline_call import PipelineCall
from autopipe.placement import device_map, needs_map
from autopipe.profiling import Profiler
from autopipe.program_cache import ProgramCache
from autopipe.report.memory_view import PipelineMemory
from autopipe.results import finish, loss_of
from autopipe.runtime.autograd import PipelineFunction
from autopipe.step_call import StepCall
from autopipe.verification.compare import ComparedPipeline, Verification, compare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipe.options import Options


class Pipeline(InspectedProxy):
    """A model that runs as a pipeline of stages; returned by `autopipe.compile`.

    Its parameters, buffers and submodules are the model's own objects, under the model's own names,
    so that optimizers, checkpoints and hooks of one work with the other. Other attributes, such as
    ``pipe.config``, are looked up in the model. The names below (``plan``, ``stages``, ``step`` …)
    are the pipeline's: where the model has the same name, its own is ``pipe.model.plan``. Of the
    names that every module has, methods are the pipeline's (``pipe.to``); where the model has
    another value by such a name (``model.type = "bert"``), it is ``pipe.type`` too.

    The model is captured on the first call in each mode (train, eval), or by `capture`; and again
    if its modules, their plain attributes, hooks or ties have changed (`model_state_key`).
    """

    memory: PipelineMemory

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options.devices)
        self._keep("options", options)
        self._reset()

    def _reset(self) -> None:
        """Discard everything that was compiled."""
        self._keep("_programs", ProgramCache(self.model, self.options))
        self._keep("memory", PipelineMemory(self.options.order.homes))
        self._keep("_profiler", Profiler())

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_programs", "memory", "_profiler"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()
        self._reset()

    # Running

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch, split into micro-batches.

        Returns:
            The model's result for the whole batch: same structure, same shapes, one loss.

        Raises:
            InputError: an argument can be neither passed on nor compared.
            UnsupportedError: the call is within a tracer or transform, or lacks a loss.
            CaptureError, CouplingError, PartitionError: on a first call; see `autopipe.compile`.
            StageError: a stage failed while it ran.
        """
        run = self._generate if any(map(is_cache, (*args, *kwargs.values()))) else self._run
        with deferred():  # Ctrl-C interrupts between a step's parts
            return run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        leaves, spec = flatten(args, kwargs)
        refuse_tracers(leaves)
        refuse_transforms(leaves)
        dims, batch = batch_of(self.options.in_dims, self.model, args, kwargs)
        inputs = CallInputs(leaves, spec, dims, batch)
        compiled, program = self._programs.program_for(inputs, asked=False)
        raise_deferred()
        self.memory.place(compiled.options.order.homes)
        compiled.place(program)
        inputs = inputs.with_tensors(compiled.calls.numbers)
        leaves = inputs.leaves
        refuse_meta(leaves)
        kind = StepCall if program.program.step else PipelineCall
        call = kind(compiled, program, leaves, self.memory)
        self._profiler.watch(call)
        if program.program.trains:
            values = PipelineFunction.apply(call, *call.wanted)  # type: ignore[no-untyped-call]
        else:
            values = call.forward()
        return finish(compiled.split.captured, self.model, values, leaves, program.sizes(batch))

    def _generate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the plain model for a call with a key/value cache, which `generate` makes.

        Raises:
            UnsupportedError: the model's parameters are on several devices.
        """
        devices = sorted({str(p.device) for p in self.model.parameters()})
        if len(devices) > 1:
            raise UnsupportedError(
                "a call with a key/value cache runs the plain model, which needs one device",
                found=", ".join(devices),
                remedy="generate with use_cache=False, or with a copy of the model on one device",
            )
        self._programs.log.say_once(
            "cache",
            "a call with a key/value cache (past_key_values) runs the plain model",
        )
        return self.model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """Forward, loss and backward of one batch; gradients are added to ``.grad``.

        Args:
            args, kwargs: the model's inputs.
            target: second argument of the `loss_fn` given to `autopipe.compile`.

        Returns:
            The loss, detached: ``loss_fn(output, target)``; without a `loss_fn` the ``loss`` of
            the output, or the output itself.

        Raises:
            OptionError: there is no loss.
        """
        loss_fn = self.options.loss_fn
        early = self.options.schedule is None or self.options.starts_early
        if loss_fn is not None and early and self.training:
            with deferred():
                output, loss_fn = self._run(args, {**kwargs, TARGET: target}), None
        else:
            output = self(*args, **kwargs)
        loss = loss_of(output, target, loss_fn)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Compile for inputs like these, in the current mode, without running.

        Afterwards each parameter, with its gradient, and each buffer that the forward writes to is
        on the device of its stage, in place: load the state of an optimizer then. A model on the
        meta device is compiled, too; its first call with values moves them. Unlike a call, it does
        not warn if this is one more capture.

        Args:
            args, kwargs: example inputs.

        Raises:
            CaptureError, CouplingError, PartitionError, MemoryLimitError: see `autopipe.compile`.
        """
        compiled, program = self._programs.program_for(self._inputs(args, kwargs), asked=True)
        if not any(t.is_meta for t in (*self.model.parameters(), *self.model.buffers())):
            with deferred():  # a gradient moves with its parameter, Ctrl-C or not
                compiled.place(program)

    def verify(self, *args: Any, tolerance: float | None = None, **kwargs: Any) -> Verification:
        """Compare a training step of this pipeline with one of the model itself, on one batch.

        Randomness is disabled in both runs, and in the model's run, batch norm normalises each
        micro-batch separately. Parameters, gradients, buffers and random state do not change. The
        model itself runs on the whole batch, on one device, and must fit there.

        Args:
            args, kwargs: the model's inputs.
            tolerance: the largest difference that counts as rounding, relative to the largest
                entry; None: by dtype (1e-5 for float32; 1e-4 with ``backend="inductor"``).

        Returns:
            A `Verification`: ``ok``, the largest difference of every output, gradient and buffer,
            and, if one is more than rounding, the stage and node where the first one is computed.

        Raises:
            UnsupportedError: the model draws random numbers that cannot be disabled.
            OptionError: the tolerance is no finite number of at least 0.
        """
        number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
        if tolerance is not None and not (number and 0 <= tolerance < math.inf):
            raise OptionError(
                "`tolerance`", expected="a finite number >= 0", found=shown(tolerance)
            )
        return compare(self._compared(), self._inputs(args, kwargs), tolerance)

    def _compared(self) -> ComparedPipeline:
        def fresh(**options: Any) -> ComparedPipeline:
            return type(self)(self.model, replace(self.options, **options))._compared()

        return ComparedPipeline(self.model, self._programs, self, fresh)

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallInputs:
        dims, batch = batch_of(self.options.in_dims, self.model, args, kwargs)
        return CallInputs(*flatten(args, kwargs), dims, batch)

    def install(self) -> nn.Module:
        """Make calls of the model itself run this pipeline; see `ModuleProxy.install`.

        Returns:
            The model.

        Raises:
            OptionError: as for `hf_device_map`.
        """
        self._refuse_unplaced()
        return super().install()

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """Where the parameters are, for libraries: see `autopipe.placement`.

        A pipeline on the device to which libraries move a model anyway has none.

        Raises:
            AttributeError: it has none.
            OptionError: nothing was captured yet, so that no parameter has a stage.
        """
        if not needs_map(self.options.devices):
            raise AttributeError("hf_device_map")
        self._refuse_unplaced()
        return device_map(self.model)

    def _refuse_unplaced(self) -> None:
        if not self._programs.captured and needs_map(self.options.devices):
            raise OptionError(
                "the model is not on the devices of its stages yet, as trainers must find it",
                expected="a capture before `install`",
                remedy="pass example inputs: compile(..., args=(x,)), or pipe.capture(x)",
            )

    def __repr__(self) -> str:
        options = self._programs.options
        devices = ", ".join(map(str, options.devices))
        policies = tuple(p.option for p in options.remat or ()) or ("auto",)
        schedule = "auto" if options.schedule is None else options.schedule.name
        remat = policies[0] if len(set(policies)) == 1 else policies
        return (
            f"Pipeline({type(self.model).__name__}, devices=[{devices}], chunks={options.chunks},"
            f" schedule={schedule!r}, remat={remat!r})"
        )
