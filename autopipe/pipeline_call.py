"""One call of a pipeline: scatter the batch, run the program, gather the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopipe import results
from autopipe.call_guards import refuse_transforms
from autopipe.errors import StageError
from autopipe.passes.ir import InputKind
from autopipe.runtime import microbatch
from autopipe.runtime.executor import Run
from autopipe.runtime.random import step_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from autopipe.compiled import CompiledModel, CompiledProgram
    from autopipe.passes.ir import Input
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
        self.run: Run | None = None
        self._saved: tuple[Any, ...] = ()  # for `share_gradients`
        self._versions: list[int] = []  # of `wanted`, at the forward
        self._buffers: dict[str, Tensor] = {}  # their values before the forward

    def differentiable(self) -> list[bool]:
        return [o.name in self.ready.differentiable for o in self.compiled.split.captured.outputs]

    def forward(self) -> tuple[Tensor, ...]:
        """Run the forward of all micro-batches; returns the gathered outputs."""
        self.run = run = self._new_run(self.ready, {})
        if self.ready.program.backward:
            self._versions = [t._version for t in self.wanted]
            self._buffers |= {name: b.clone() for name, b in run.buffers.items()}
        run.execute("forward")
        devices = [self.leaves[i.index].device for i in self.compiled.call_inputs]
        gathered = results.gather_outputs(
            self.compiled.split.captured.outputs,
            run.results,
            self.sizes,
            results.output_device(self.compiled.workers[-1].device, devices),
        )
        self._saved = gathered.saved
        return gathered.values

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Run the backward of all micro-batches.

        Args:
            gradients: one per output; None if the output got none.

        Returns:
            The gradients of `wanted`.

        Raises:
            StageError: a second backward, or a tensor that was changed since the forward.
            UnsupportedError: a gradient within a function transform.
        """
        refuse_transforms([g for g in gradients if g is not None])
        run = self._take_run()
        outputs = self.compiled.split.captured.outputs
        pattern = frozenset(
            o.name for o, g in zip(outputs, gradients, strict=True) if g is not None
        )
        if not pattern:  # autograd reached this node without any gradient
            run.drop()
            return (None,) * len(self.wanted)
        if pattern != self.ready.differentiated:
            # The program was compiled for gradients from other outputs. Run the forward of the
            # right program once, with the same seed and buffers; the next step starts with it.
            run.drop()
            self.ready = self.compiled.program_for_outputs(self.ready, pattern)
            run = self._new_run(self.ready, self._buffers)
            run.execute("forward")
            run.results.clear()
        shared = results.share_gradients(outputs, gradients, self._saved, self.sizes)
        for name, parts in shared.items():
            holder = self.compiled.split.routes[name].holders[-1]
            for m, part in enumerate(parts):
                run.feed(f"grad {name}", holder, m, part)
        run.execute("backward")
        found = [
            results.input_gradient(i, run.results, self.sizes, self.leaves[i.index].device)
            for i in self.inputs
        ]
        found += [run.gradients.get(i.name) for i in self.parameters]
        run.drop()
        return tuple(found)

    def _take_run(self) -> Run:
        """Take the forward's run, which can do one backward."""
        run = self.run
        if run is None:
            raise StageError(
                "backward through the same call a second time: its saved values are gone",
                stage=None,
                microbatch=None,
                phase=None,
                remedy="call the pipeline again, or add the losses up and call backward once",
            )
        if [t._version for t in self.wanted] != self._versions:
            raise StageError(
                "a parameter or input was changed in place between forward and backward",
                stage=None,
                microbatch=None,
                phase=None,
                remedy="call backward before optimizer.step()",
            )
        self.run = None
        return run

    def _new_run(self, ready: CompiledProgram, before: dict[str, Tensor]) -> Run:
        """Create a run and pass its stages their tensors and inputs.

        Args:
            ready: the program.
            before: buffers to use in place of the model's own, which then do not change.
        """
        buffers: dict[str, Tensor] = {}
        held = self._held(ready, before, buffers)
        run = Run(ready.program, held, buffers, self.seed, self.memory)
        for item in self.compiled.call_inputs:
            route = self.compiled.split.routes.get(item.name)
            if route is None:
                continue
            parts = self._scattered(item)
            for k in route.consumers:
                for m, part in enumerate(parts):
                    run.feed(item.name, k, m, part)
        return run

    def _scattered(self, item: Input) -> Sequence[Tensor]:
        leaf: Tensor = self.leaves[item.index].detach()
        if item.batch_dim is None:
            return [leaf] * len(self.sizes)
        return microbatch.scatter(leaf, item.batch_dim, self.sizes)

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
                    written = item.name in ready.updates
                    tensor = compiled.on(worker, item.kind, item.target, written=written)
                    if item.target in changing and ready.program.backward:
                        # Written at the end of the forward, and read again by its recomputation.
                        tensor = self._buffers[item.name] = tensor.clone()
                if item.name in ready.updates:
                    buffers[item.name] = tensor
                tensors.append(tensor)
            for name in stage.shared:
                tensors.append(
                    compiled.on(worker, InputKind.PARAMETER, targets[name], written=False)
                )
            held.append(tensors)
        return held
