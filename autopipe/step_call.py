"""One call of a pipeline whose schedule starts backwards before the last forward has ended.

The call runs forward and backward. It starts with the gradients that the outputs will get if the
loss is differentiated (`LossSeeds`). When the caller's backward arrives, its gradients are those
times a factor: 1, a loss scale, or 1/n where n calls are accumulated. What was found is multiplied
by it, and the next call starts with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autopipe import results
from autopipe.loss_factor import common_factor, multiplied
from autopipe.passes.graph import warn_at_user_line
from autopipe.passes.loss_seeds import LossSeeds, loss_seeds
from autopipe.passes.one_at_a_time import one_at_a_time
from autopipe.passes.schedule import DEFAULT_KIND
from autopipe.pipeline_call import PipelineCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from autopipe.passes.ir import Sizes
    from autopipe.runtime.executor import Run


class StepCall(PipelineCall):
    """A call that runs forward and backward at once; otherwise as `PipelineCall`.

    Raises:
        UnsupportedError: gradients cannot be known before the last forward has ended.
    """

    _seeds: LossSeeds
    _batch: Sizes  # the values of all symbols in the whole batch
    _device: torch.device  # of the results
    _given: list[Tensor | None]  # the gradients with which the backward starts, one per output

    def forward(self) -> tuple[Tensor, ...]:
        compiled = self.compiled
        self._batch = self.ready.sizes(sum(self.sizes))
        devices = [self.leaves[i.index].device for i in compiled.call_inputs]
        self._device = results.output_device(compiled.workers[-1].device, devices)
        self._seeds = self._loss_seeds()
        outputs = frozenset(self._seeds.outputs)
        if outputs != self.ready.differentiated:
            self.ready = compiled.program_for_outputs(self.ready, outputs)
        return super().forward()

    def _execute(self, run: Run) -> None:
        self._given = self._first_gradients()
        self._feed_gradients(run, self._given, [None] * len(self._given))
        run.execute("step")

    def _run_backward(
        self, run: Run, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        pattern = self._pattern(gradients)
        if not pattern:
            return (None,) * len(self.wanted)
        loss, fixed = self.compiled.loss_factor, self._seeds.in_common
        factor: float | Tensor | None = loss.ratio(self._given, gradients)
        if factor is None:
            factor = common_factor(self._given, gradients)
            if factor is None:
                return self._run_another(run, pattern, gradients)
            loss.settle(factor, always_one=fixed)
        if isinstance(factor, float) and factor == 1:
            return self._gradients_of(run)
        found, count = self._gradients_of(run), len(self.inputs)
        # With several micro-batches, gradients of parameters are sums, which nobody else has.
        alone = len(self.sizes) > 1
        return multiplied(found[:count], found[count:], factor, in_place=alone)

    def _run_another(
        self, run: Run, pattern: frozenset[str], gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Run the step again, for other gradients than it began with."""
        warn_at_user_line(
            "the backward is not that of the model's loss: the step runs again, all forwards"
            f' first; call backward on that loss, or use schedule="{DEFAULT_KIND}"'
        )
        ready = self.compiled.program_for_outputs(self.ready, pattern, early=False)
        return self._after_forward(self._run_again(run, ready), gradients)

    def _loss_seeds(self) -> LossSeeds:
        """How the first gradients are computed; found out once."""
        known, key = self.compiled.seeds, self.ready.differentiable
        if key not in known:
            captured, examples = self.compiled.split.captured, [*self._examples().values()]
            with one_at_a_time():  # a trace patches torch
                known[key] = loss_seeds(captured, key, self._evaluate, examples)
        return known[key]

    def _evaluate(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Compute the final values, the loss among them, from the outputs of the whole batch."""
        compiled = self.compiled
        buffer = compiled.model.get_buffer
        return results.run_epilogue(compiled.split.captured, outputs, self._batch, buffer)

    def _examples(self) -> dict[str, Tensor]:
        """Tensors like the outputs of the whole batch, all 1."""
        return results.example_outputs(self.compiled.split.captured, self._batch, self._device)

    def _first_gradients(self) -> list[Tensor | None]:
        """The gradients with which the backward starts, one per output."""
        seeds = self._seeds
        values = self._examples() | self._known_values()
        leaves = {n: v.detach() for n, v in values.items()}
        wanted = [leaves[n].requires_grad_() for n in seeds.outputs]
        if seeds.in_common:
            found = [torch.ones_like(x) for x in wanted]
        else:
            factor = self.compiled.loss_factor.for_next_step()
            with torch.enable_grad():
                finals = self._evaluate([*leaves.values()])
                losses = [finals[i] for i in seeds.losses]
                ones = [torch.full_like(x, factor) for x in losses]
                found = list(torch.autograd.grad(losses, wanted, ones))
        given = dict(zip(seeds.outputs, found, strict=True))
        return [given.get(n) for n in leaves]

    def _known_values(self) -> dict[str, Tensor]:
        """The outputs of the whole batch that depend on the call's inputs alone."""
        seeds, captured = self._seeds, self.compiled.split.captured
        if not seeds.known:
            return {}
        scattered = {i.name: self._scattered(i) for i in self.compiled.call_inputs}
        state = {
            i.name: self.compiled.tensor(i.kind, i.target)
            for i in captured.inputs
            if i.name in seeds.inputs and i.name not in scattered
        }
        parts = []
        for m in range(len(self.sizes)):
            arguments = [scattered[n][m] if n in scattered else state[n] for n in seeds.inputs]
            parts.append(seeds.values(*arguments))
        rules = {o.name: o.combine for o in captured.outputs}
        return {
            name: rules[name].gather([p[at].to(self._device) for p in parts], self.sizes)
            for at, name in enumerate(seeds.known)
        }
