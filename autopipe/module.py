"""`Pipeline`: the model's own module, run as a pipeline."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.batch import batch_of
from autopipe.call_guards import plain_autograd, refuse_transforms
from autopipe.call_signature import CallSignature, flatten, other_structure
from autopipe.compiled import Compiled, CompiledProgram
from autopipe.errors import OptionError
from autopipe.model_state_key import model_state_key
from autopipe.module_proxy import ModuleProxy
from autopipe.options import Options
from autopipe.pipeline_call import PipelineCall
from autopipe.planning.plans import Plan
from autopipe.progress import Progress, silent
from autopipe.report.stages import StageView, views
from autopipe.results import finish
from autopipe.runtime import microbatch
from autopipe.runtime.autograd import PipelineFunction
from autopipe.runtime.backends import autocast_types
from autopipe.runtime.memory import SavedBytesCounter
from autopipe.runtime.transfer import WorkerDevice
from autopipe.verification.compare import Verification, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from autopipe.passes.ir import Captured


MANY = 16
"""Configurations of a model (training flags, attributes) after which a warning is due."""


class Pipeline(ModuleProxy):
    """A model that runs as a pipeline of stages; made by `autopipe.compile`.

    Its parameters, buffers and submodules are the model's own objects, under the model's own
    names, so that optimizers, checkpoints and hooks made for one work with the other.

    The model is captured on the first call in each mode (train, eval), or by `capture`; and again
    if its modules, their plain attributes, hooks or ties have changed (`model_state_key`). What it
    lacks itself, the model has: ``pipe.config``.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options.devices)
        self.options = options
        self._reset()

    def _reset(self) -> None:
        """Forget everything that was compiled."""
        self._workers = tuple(WorkerDevice(d) for d in self.options.devices)
        self._compiled: dict[Hashable, list[Compiled]] = {}
        self._structures: dict[Hashable, set[CallSignature]] = {}
        self._last: tuple[Compiled, CompiledProgram] | None = None
        self._chosen: dict[bool, Plan] = {}
        self.memory = SavedBytesCounter(len(self._workers))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_workers", "_compiled", "_structures", "_last", "_chosen", "memory"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()
        self._reset()

    # Running

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch, cut into micro-batches.

        Returns:
            What the model returns: same structure, same shapes; a loss is the whole batch's.

        Raises:
            InputError: inputs whose structure is not the captured one.
            CaptureError, CouplingError, PartitionError: on a first call; see `autopipe.compile`.
            StageError: a stage failed while it ran.
        """
        leaves, spec = flatten(args, kwargs)
        refuse_transforms(leaves)
        compiled, ready, replan = self._prepare(args, kwargs, leaves, spec, strict=True)
        compiled.place_parameters()
        call = PipelineCall(compiled, ready, replan, leaves, self.memory)
        if ready.program.backward:
            values = PipelineFunction.apply(call, *call.wanted)  # type: ignore[no-untyped-call]
        else:
            values = call.forward()
        return finish(compiled.split.captured, self.model, values, leaves, sum(call.sizes))

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> Tensor:
        """Forward, loss and backward of one batch; gradients are added to ``.grad``.

        Args:
            args, kwargs: the model's inputs.
            target: second argument of the `loss_fn` given to `autopipe.compile`.

        Returns:
            The loss, detached: ``loss_fn(output, target)``; without a `loss_fn` the model's own,
            its output's ``loss`` or its output itself.
        """
        output = self(*args, **kwargs)
        if self.options.loss_fn is not None:
            loss = self.options.loss_fn(output, target)
        else:
            loss = output["loss"] if isinstance(output, dict) else getattr(output, "loss", output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise OptionError(
                "step needs a loss",
                expected="one number",
                found=type(loss).__name__,
                remedy="pass loss_fn to autopipe.compile, or use a model that returns its loss",
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Compile for inputs like these now, in the current mode, without running.

        Also the way to make a pipeline accept a further structure of inputs: a call with another
        structure than the captured ones is otherwise an error.
        """
        leaves, spec = flatten(args, kwargs)
        self._prepare(args, kwargs, leaves, spec, strict=False)

    def verify(self, *args: Any, tolerance: float | None = None, **kwargs: Any) -> Verification:
        """Compare a training step of this pipeline with one of the model itself, on one batch.

        Random calls are stilled in both, and the model's batch norm is made to normalise
        micro-batch by micro-batch. Parameters, gradients, buffers and random state stay as they
        are. The model runs on the whole batch where its parameters lie: it must fit there.

        Args:
            args, kwargs: the model's inputs.
            tolerance: what counts as rounding, relative to the largest entry; without it, by
                dtype (1e-5 for float32).

        Returns:
            A `Verification`: ``ok``, the largest difference of every result, gradient and buffer,
            and, if one is more than rounding, the stage and node where the first is made.
        """
        return compare(self, args, kwargs, tolerance)

    def _prepare(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        leaves: list[Any],
        spec: pytree.TreeSpec,
        *,
        strict: bool,
    ) -> tuple[Compiled, CompiledProgram, Callable[[frozenset[str]], CompiledProgram]]:
        dims, batch = batch_of(self.options.in_dims, self.model, args, kwargs)
        mode = model_state_key(self.model)
        structure = CallSignature.of(leaves, spec)
        known = self._structures.setdefault(mode, set())
        if strict and known and structure not in known:
            raise other_structure(next(iter(known)), structure)
        shapes = tuple(
            _without(x.shape, d) for x, d in zip(leaves, dims, strict=True) if isinstance(x, Tensor)
        )
        key = (mode, structure, shapes)
        with Progress(len(self._workers)) as progress, plain_autograd():
            fitting = [c for c in self._compiled.setdefault(key, []) if c.fits(batch)]
            if not fitting:
                make = partial(
                    Compiled,
                    self.model,
                    self._options(),
                    self._workers,
                    leaves,
                    spec,
                    dims,
                    batch,
                    progress,
                )
                compiled = make(single=batch == 1 and bool(self._compiled[key]))
                if batch == 1 and not compiled.fits(1):
                    # One sample is traced as two, which took another branch: as itself, then.
                    self._compiled[key].append(compiled)
                    compiled = make(single=True)
                fitting = [compiled]
                self._compiled[key] += fitting
                if self.options.is_open and compiled.options.plan is not None:
                    self._chosen.setdefault(self.model.training, compiled.options.plan)
                known.add(structure)
                self._remember(mode, key[1:])
            compiled = fitting[0]
            sizes = microbatch.sizes(batch, compiled.options.given.chunks)
            tensors = [leaves[i.index] for i in compiled.calls]
            tensors += [compiled.tensor(i.kind, i.target) for i in compiled.parameters]
            grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

            casting = [
                (kind, torch.get_autocast_dtype(kind))
                for kind in autocast_types()
                if torch.is_autocast_enabled(kind)
            ]

            def replan(expected: frozenset[str]) -> CompiledProgram:
                compiled.expected = expected
                with ExitStack() as stack:  # backward runs outside of the call's autocast
                    stack.enter_context(plain_autograd())
                    for kind, dtype in casting:
                        stack.enter_context(torch.autocast(kind, dtype=dtype))
                    return compiled.ready(
                        sizes, leaves, grad=grad, expected=expected, progress=silent
                    )

            ready = compiled.ready(
                sizes,
                leaves,
                grad=grad,
                expected=compiled.expected if grad else frozenset(),
                progress=progress,
            )
        self._last = (compiled, ready)
        return compiled, ready, replan

    def _options(self) -> Options:
        """With what was chosen on the first batch, if it was in this mode or to train."""
        plan = self._chosen.get(self.model.training) or self._chosen.get(True)
        return self.options if plan is None else self.options.planned(plan)

    def _remember(self, before: Hashable, rest: tuple[Any, ...]) -> None:
        """What the model changed in itself while it was captured is no reason to capture again."""
        after = model_state_key(self.model)
        if after != before:
            self._compiled[(after, *rest)] = self._compiled[(before, *rest)]
            self._structures.setdefault(after, set()).update(self._structures[before])
        if len(self._structures) > MANY:
            warnings.warn(
                f"the model has been captured in {len(self._structures)} configurations: attributes"
                " of its modules change from call to call, and each change costs a capture",
                stacklevel=4,
            )

    # Looking inside

    def _compiled_or_raise(self) -> tuple[Compiled, CompiledProgram]:
        if self._last is None:
            raise OptionError(
                "nothing has been compiled yet",
                remedy="call the pipeline once, or pass example inputs: compile(..., args=(x,))",
            )
        return self._last

    @property
    def captured(self) -> Captured:
        """The captured forward graph that the last call used."""
        return self._compiled_or_raise()[0].split.captured

    @property
    def stages(self) -> tuple[StageView, ...]:
        """The stages: graph, code, boundary tensors, parameters, device, costs."""
        compiled, ready = self._compiled_or_raise()
        return views(compiled.split, ready.program.sizes, self.options.devices)

    @property
    def code(self) -> str:
        """The source of the program that the last call ran."""
        return self._compiled_or_raise()[1].lowered.generated.source

    @property
    def plan(self) -> Plan:
        """Who runs what, with predicted costs and timeline; `print` it for a table."""
        compiled, ready = self._compiled_or_raise()
        return compiled.plan(ready)

    def explain(self) -> str:
        """The plan as a table: the stages and what crosses between them."""
        return str(self.plan)

    def __repr__(self) -> str:
        options = self._options()
        devices = ", ".join(map(str, options.devices))
        policies = tuple(p.option for p in options.remat or ()) or ("auto",)
        remat = policies[0] if len(set(policies)) == 1 else policies
        return (
            f"Pipeline({type(self.model).__name__}, devices=[{devices}], chunks={options.chunks},"
            f" schedule={options.schedule or 'auto'!r}, remat={remat!r})"
        )


def _without(shape: torch.Size, dim: int | None) -> tuple[int, ...]:
    return tuple(n for d, n in enumerate(shape) if d != dim)
