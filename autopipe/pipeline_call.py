"""One call of a pipeline: scatter the batch, run the program, gather the results."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

from autopipe import interrupts, results
from autopipe.call_guards import refuse_transforms, restore_autocast
from autopipe.caller_modes import caller_modes
from autopipe.errors import StageError
from autopipe.higher_derivatives import differentiable_gradients
from autopipe.out_of_memory import explained_out_of_memory
from autopipe.passes._torch_modes import is_profiled
from autopipe.passes.ir import InputKind
from autopipe.runtime import microbatch
from autopipe.runtime.executor import Run
from autopipe.runtime.labelled_run import LabelledRun
from autopipe.runtime.random import step_seed
from autopipe.version_watch import VersionWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from autopipe.compiled import CompiledModel
    from autopipe.compiled_program import CompiledProgram
    from autopipe.passes.ir import Input, StagePhases
    from autopipe.runtime.memory import SavedBytesCounter


class PipelineCall:
    """One training step's forward and backward, as `autopipe.runtime.autograd` calls them.

    Args:
        compiled: the captured model.
        ready: the program to run.
        leaves: the call's flattened inputs.
        memory: counts the bytes saved between forward and backward.

    Attributes:
        wanted: the tensors whose gradients `backward` returns, in its order.
        make_run: makes the runs of its programs; `Pipeline.profile` makes runs that are recorded.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        ready: CompiledProgram,
        leaves: Sequence[Any],
        memory: SavedBytesCounter,
    ) -> None:
        self.compiled, self.ready = compiled, ready
        self.leaves, self.memory = leaves, memory
        self.sizes = ready.program.sizes
        self.seed = step_seed() if ready.program.is_random else 0
        self.inputs = [i for i in compiled.call_inputs if leaves[i.index].requires_grad]
        tensors = [(i, compiled.tensor(i.kind, i.target)) for i in compiled.parameters]
        self.parameters = [i for i, tensor in tensors if tensor.requires_grad]
        self.wanted: list[Tensor] = [leaves[i.index] for i in self.inputs]
        self.wanted += [tensor for _, tensor in tensors if tensor.requires_grad]
        self.make_run: Callable[..., Run] = LabelledRun if is_profiled() else Run
        self.run: Run | None = None
        self._saved: tuple[Any, ...] = ()  # for `share_gradients`
        self._state = VersionWatch()  # what the forward read
        self._activations = VersionWatch()  # what it saved
        self._buffers: dict[str, Tensor] = {}  # their values before the forward

    def differentiable(self) -> list[bool]:
        return [o.name in self.ready.differentiable for o in self.compiled.split.captured.outputs]

    def forward(self) -> tuple[Tensor, ...]:
        """Run the forward of all micro-batches; returns the gathered outputs."""
        self.run = run = self._new_run(self.ready, {})
        if self.ready.program.trains:
            self._buffers |= {name: b.clone() for name, b in run.buffers.items()}
            for stage, tensors in zip(self._stages(), run.state_tensors, strict=True):
                kept = [name not in run.buffers for name in stage.state]  # `_buffers` has others
                self._state.add([*compress(stage.state, kept)], [*compress(tensors, kept)])
            inputs = self.compiled.call_inputs
            self._state.add([i.name for i in inputs], [self.leaves[i.index] for i in inputs])
        with self._explained():
            self._execute(run)
        for (k, m), tensors in run.saved.items():
            self._activations.add(self._stages(m)[k].saved, tensors)
        outputs = self.compiled.split.captured.outputs
        gathered = results.gather_outputs(outputs, run.results, self.sizes)
        self._saved = gathered.saved
        return gathered.values

    def _explained(self) -> AbstractContextManager[None]:
        """Explain a lack of memory by the plan of what runs in the context."""
        return explained_out_of_memory(lambda: self.compiled.plan(self.ready))

    def _execute(self, run: Run) -> None:
        run.execute("forward")

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Compute gradients; for ``create_graph=True`` such that can be differentiated again.

        Args:
            gradients: one per output; None if the output got none.

        Returns:
            The gradients of `wanted`.

        Raises:
            StageError: a second backward, or a tensor that was changed since the forward.
            UnsupportedError: a gradient within a function transform.
        """
        refuse_transforms([g for g in gradients if g is not None])
        run = self.run
        if run is None:
            raise _backward_error(
                "backward through the same call a second time: its saved values are gone",
                remedy="call the pipeline again, or add the losses up and call backward once",
            )
        with interrupts.deferred(), self._explained():
            if torch.is_grad_enabled():  # create_graph=True
                return self._differentiable_backward(gradients)
            found = self._run_backward(run, gradients)
            self._release()
            return found

    def _run_backward(
        self, run: Run, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Run the backward of all micro-batches."""
        pattern = self._pattern(gradients)
        if not pattern:  # autograd reached this node without any gradient
            return (None,) * len(self.wanted)
        if pattern == self.ready.differentiated:
            self._refuse_changes(self.ready.read_by_backward)
        else:
            run = self._run_again(run, self.compiled.program_for_outputs(self.ready, pattern))
        return self._after_forward(run, gradients)

    def _pattern(self, gradients: Sequence[Tensor | None]) -> frozenset[str]:
        """Names of the outputs that got a gradient."""
        outputs = self.compiled.split.captured.outputs
        return frozenset(o.name for o, g in zip(outputs, gradients, strict=True) if g is not None)

    def _run_again(self, run: Run, ready: CompiledProgram) -> Run:
        """Run the forward of another program, with the same seed and buffers."""
        self._refuse_changes(None)
        run.drop()
        self.ready = ready
        callers = run.caller
        self.run = run = self._new_run(ready, self._buffers)
        run.caller = callers
        run.execute("forward")
        run.results.clear()
        return run

    def _after_forward(
        self, run: Run, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Run the backward of a program whose forward has run."""
        self._activations.clear()  # the backward frees each activation after its use
        self._feed_gradients(run, gradients, self._saved)
        run.execute("backward")
        return self._gradients_of(run)

    def _feed_gradients(
        self, run: Run, gradients: Sequence[Tensor | None], saved: Sequence[Any]
    ) -> None:
        """Pass the outputs' gradients to the stages that compute the outputs.

        Args:
            run: of the program.
            gradients: one per output; None if the output got none.
            saved: `GatheredOutputs.saved`.
        """
        split = self.compiled.split
        shared = results.share_gradients(split.captured.outputs, gradients, saved, self.sizes)
        for name, parts in shared.items():
            holder = split.routes[name].holders[-1]
            for m, part in enumerate(parts):
                run.feed(f"grad {name}", holder, m, part)

    def _gradients_of(self, run: Run) -> tuple[Tensor | None, ...]:
        """The gradients of `wanted` that a run has found."""
        found = [results.input_gradient(i, run.results, self.sizes) for i in self.inputs]
        tensors = zip(self.parameters, self.wanted[len(self.inputs) :], strict=True)
        return (*found, *run.gradients.totals({i.name: x.device for i, x in tensors}))

    def _differentiable_backward(
        self, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Compute gradients under autograd; the saved values stay for another backward."""
        self._refuse_changes(None)
        compiled, captured = self.compiled, self.compiled.split.captured
        shared = results.share_gradients(captured.outputs, gradients, self._saved, self.sizes)
        state = {
            i.name: compiled.tensor(i.kind, i.target)
            for i in captured.inputs
            if i.kind is not InputKind.INPUT
        }
        state |= {name: buffer.clone() for name, buffer in self._buffers.items()}
        with restore_autocast(self.ready.key.autocast):
            return differentiable_gradients(
                compiled,
                state,
                {i.name: self.leaves[i.index] for i in compiled.call_inputs},
                shared,
                self.wanted,
                self.sizes,
                self.seed,
            )

    def _refuse_changes(self, state: frozenset[str] | None) -> None:
        """Refuse a backward if a tensor that it reads was changed in place since the forward.

        Args:
            state: names of the parameters, buffers and constants that it reads; None: it runs the
                forward again, and reads all of them and the inputs.
        """
        name = self._state.changed(state) or self._activations.changed()
        if name is not None:
            raise _backward_error(
                "a tensor was changed in place between forward and backward, which reads it",
                node=self.ready.described(name),
                remedy="call backward before optimizer.step() and before the batch or a buffer is"
                " overwritten, or pass a copy of it",
            )

    def _release(self) -> None:
        """Free what a second backward would need: the caller may keep the loss for long."""
        if self.run is not None:
            self.run.drop()
        self.run, self.leaves, self.wanted = None, (), []
        self._saved, self._buffers = (), {}
        self._state.clear()
        self._activations.clear()

    def _stages(self, m: int = 0) -> Sequence[StagePhases]:
        """The stages cut into phases for the size of a micro-batch."""
        return self.ready.lowered.phased[self.sizes[m]].stages

    def _new_run(self, ready: CompiledProgram, before: dict[str, Tensor]) -> Run:
        """Create a run and pass its stages their tensors and inputs.

        Args:
            ready: the program.
            before: buffers to use in place of the model's own, which then do not change.
        """
        buffers: dict[str, Tensor] = {}
        held = self._held(ready, before, buffers)
        run = self.make_run(ready.program, held, buffers, self.seed, self.memory, caller_modes)
        inputs, split = self.compiled.call_inputs, self.compiled.split
        last = self.compiled.workers[-1].device
        run.destinations = results.destinations(split.captured, inputs, self.leaves, last)
        routes = split.routes
        for item in (i for i in inputs if i.name in routes):
            parts = self._scattered(item)
            for k in routes[item.name].consumers:
                for m, part in enumerate(parts):
                    run.feed(item.name, k, m, part)
        return run

    def _scattered(self, item: Input) -> Sequence[Tensor]:
        return microbatch.scatter(self.leaves[item.index].detach(), item.batch_dim, self.sizes)

    def _held(
        self, ready: CompiledProgram, before: dict[str, Tensor], buffers: dict[str, Tensor]
    ) -> list[list[Tensor]]:
        """The tensors of each stage's state; buffers that it writes to are added to `buffers`."""
        compiled, split = self.compiled, self.compiled.split
        held = []
        targets = {i.name: i.target for i in compiled.parameters}
        changing = {target for target, _ in split.captured.updates}
        for stage, worker in zip(split.stages, compiled.workers, strict=True):
            tensors = []
            for item in stage.held:
                tensor = before.get(item.name)
                if tensor is None:
                    tensor = compiled.on(worker, item.kind, item.target)
                    if item.target in changing and ready.program.trains:
                        # Written at the end of the forward, and read again by its recomputation.
                        tensor = self._buffers[item.name] = tensor.clone()
                if item.name in ready.updates:
                    buffers[item.name] = tensor
                tensors.append(tensor)
            for name in stage.shared:
                tensors.append(compiled.on(worker, InputKind.PARAMETER, targets[name]))
            held.append(tensors)
        return held


def _backward_error(problem: str, *, remedy: str, node: str | None = None) -> StageError:
    return StageError(problem, stage=None, microbatch=None, phase=None, node=node, remedy=remedy)
