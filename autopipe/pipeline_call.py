"""One call of a pipeline: the batch scattered, the program run, the results put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autopipe.call_guards import refuse_transforms
from autopipe.errors import StageError
from autopipe.passes.ir import InputKind
from autopipe.runtime import microbatch
from autopipe.runtime.executor import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autopipe.compiled import Compiled, CompiledProgram
    from autopipe.runtime.memory import SavedBytes


class PipelineCall:
    """A `Step` for the autograd node (`autopipe.runtime.autograd`).

    Args:
        compiled: the captured model.
        ready: the program to run.
        leaves: the call's flattened inputs.
        replan: makes the program for another set of outputs that gradients come for.
        seed: of the random calls.
        memory: counters.

    Attributes:
        wanted: the tensors whose gradients `backward` returns, in its order.
    """

    def __init__(
        self,
        compiled: Compiled,
        ready: CompiledProgram,
        leaves: Sequence[Any],
        replan: Callable[[frozenset[str]], CompiledProgram],
        seed: int,
        memory: SavedBytes,
    ) -> None:
        self.compiled, self.ready, self.leaves = compiled, ready, leaves
        self.replan, self.seed, self.memory = replan, seed, memory
        self.sizes = ready.program.sizes
        self.inputs = [i for i in compiled.calls if leaves[i.index].requires_grad]
        self.parameters = [
            i for i in compiled.parameters if compiled.tensor(i.kind, i.target).requires_grad
        ]
        self.wanted: list[Tensor] = [leaves[i.index] for i in self.inputs]
        self.wanted += [compiled.tensor(i.kind, i.target) for i in self.parameters]
        self.run: Run | None = None
        self._extents: dict[str, list[int]] = {}
        self._before: dict[str, Tensor] = {}

    def differentiable(self) -> list[bool]:
        return [o.name in self.ready.differentiable for o in self.compiled.split.captured.outputs]

    def forward(self) -> tuple[Tensor, ...]:
        self.run = run = self._new_run(self.ready, {})
        if self.ready.program.backward:
            self._versions = [t._version for t in self.wanted]
            self._before |= {name: b.clone() for name, b in run.buffers.items()}
        run.execute("forward")
        return tuple(self._combined(run))

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        refuse_transforms([g for g in gradients if g is not None])
        if self.run is None:
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
        run, self.run = self.run, None
        outputs = self.compiled.split.captured.outputs
        pattern = frozenset(
            o.name for o, g in zip(outputs, gradients, strict=True) if g is not None
        )
        if not pattern:  # autograd came by with nothing
            run.drop()
            return (None,) * len(self.wanted)
        if pattern != self.ready.differentiated:
            # The program was made for gradients from other outputs. Same seed, same buffers as
            # then: run the forward of the right one, once; the next step starts with it.
            run.drop()
            self.ready = self.replan(pattern)
            run = self._new_run(self.ready, self._before)
            run.execute("forward")
            run.results.clear()
        for output, gradient in zip(outputs, gradients, strict=True):
            if gradient is None:
                continue
            holder = self.compiled.split.routes[output.name].holders[-1]
            parts = microbatch.share(
                output.combine, output.dim, gradient, self._extents[output.name], self.sizes
            )
            for m, part in enumerate(parts):
                run.give(f"grad {output.name}", holder, m, part)
        run.execute("backward")
        found = [self._input_gradient(run, i) for i in self.inputs]
        found += [run.gradients.get(i.name) for i in self.parameters]
        run.drop()
        return tuple(found)

    def _new_run(self, ready: CompiledProgram, before: dict[str, Tensor]) -> Run:
        """A run with its tensors in place; `before` replaces buffers, which stay as they are."""
        compiled, split = self.compiled, self.compiled.split
        buffers: dict[str, Tensor] = {}
        held = []
        targets = {i.name: i.target for i in compiled.parameters}
        changing = {target for target, _ in split.captured.updates}
        for stage, place in zip(split.stages, compiled.places, strict=True):
            tensors = []
            for item in stage.held:
                tensor = before.get(item.name)
                if tensor is None:
                    written = item.name in ready.updates
                    tensor = compiled.on(place, item.kind, item.target, written=written)
                    if item.target in changing and ready.program.backward:
                        # Written at the end of the forward, and read again by its recomputation.
                        tensor = self._before[item.name] = tensor.clone()
                if item.name in ready.updates:
                    buffers[item.name] = tensor
                tensors.append(tensor)
            for name in stage.lent:
                tensors.append(
                    compiled.on(place, InputKind.PARAMETER, targets[name], written=False)
                )
            held.append(tensors)
        run = Run(ready.program, held, buffers, self.seed, self.memory)
        for item in compiled.calls:
            leaf = self.leaves[item.index].detach()
            route = split.routes.get(item.name)
            if route is None:
                continue
            if item.batch_dim is None:
                parts: Sequence[Tensor] = [leaf] * len(self.sizes)
            else:
                parts = microbatch.scatter(leaf, item.batch_dim, self.sizes)
            for k in route.consumers:
                for m, part in enumerate(parts):
                    run.give(item.name, k, m, part)
        return run

    def _combined(self, run: Run) -> list[Tensor]:
        device = self._output_device()
        values = []
        for output in self.compiled.split.captured.outputs:
            parts = [run.results.pop((output.name, m)) for m in range(len(self.sizes))]
            dim = output.dim
            self._extents[output.name] = [] if dim is None else [p.shape[dim] for p in parts]
            parts = [p.to(device, non_blocking=True) for p in parts]
            values.append(microbatch.gather(output.combine, output.dim, parts, self.sizes))
        return values

    def _output_device(self) -> torch.device:
        """Where results go: to the inputs' GPU, as the model itself would put them; else to the
        last stage's device."""
        last = self.compiled.places[-1].device
        if last.type != "cuda":
            return last
        devices = [self.leaves[i.index].device for i in self.compiled.calls]
        return next((d for d in devices if d.type == "cuda"), last)

    def _input_gradient(self, run: Run, item: Any) -> Tensor | None:
        leaf = self.leaves[item.index]
        parts = [run.results.get((f"grad {item.name}", m)) for m in range(len(self.sizes))]
        here = [p.to(leaf.device) for p in parts if p is not None]
        if not here:
            return None
        how = "sum" if item.batch_dim is None else "cat"
        return microbatch.gather(how, item.batch_dim, here, self.sizes)
