"""Gradients that can be differentiated again (``create_graph=True``), as gradient penalties need.

The generated program computes gradients without autograd, so nothing can differentiate them. For a
backward with ``create_graph=True`` the stage graphs therefore run again under autograd, micro-batch
by micro-batch, each stage on its device, with the step's random numbers and buffers, and autograd
computes the gradients. It can differentiate these as often as asked. Nothing runs at the same time,
and nothing is rematerialized: autograd saves all activations of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from autopipe.passes._torch import TorchDispatchMode
from autopipe.passes.phases import run_stage
from autopipe.runtime import microbatch
from autopipe.runtime.random import MicroBatchContext

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autopipe.compiled import CompiledModel


def differentiable_gradients(
    compiled: CompiledModel,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    shared: Mapping[str, Sequence[Tensor]],
    wanted: Sequence[Tensor],
    sizes: Sequence[int],
    seed: int,
) -> tuple[Tensor | None, ...]:
    """Compute gradients under autograd.

    Args:
        compiled: the captured model, cut into stages.
        state: parameters, buffers and constants, by placeholder; parameters as the caller's graph
            has them.
        inputs: the call's tensors, by placeholder, for the whole batch.
        shared: for each output with a gradient, the gradients of its micro-batches.
        wanted: the tensors whose gradients are returned.
        sizes: samples per micro-batch.
        seed: of the step's random numbers.

    Returns:
        One gradient per tensor in `wanted`; None where there is none.
    """
    dims = {i.name: i.batch_dim for i in compiled.call_inputs}
    parts = {name: microbatch.scatter(x, dims[name], sizes) for name, x in inputs.items()}
    totals: list[Tensor | None] = [None] * len(wanted)
    for m in range(len(sizes)):
        values = dict(state) | {name: own[m] for name, own in parts.items()}
        _run_stages(compiled, values, seed, m)
        pairs = [(values[name], own[m]) for name, own in shared.items()]
        roots = [(v, g.to(v.device)) for v, g in pairs if v.requires_grad]
        if not roots:
            continue
        found = torch.autograd.grad(
            [v for v, _ in roots],
            list(wanted),
            [g for _, g in roots],
            create_graph=True,
            allow_unused=True,
        )
        totals = [_added(a, b) for a, b in zip(totals, found, strict=True)]
    return tuple(totals)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _run_stages(compiled: CompiledModel, values: dict[str, Tensor], seed: int, m: int) -> None:
    """Run the stages of one micro-batch in order; their results are added to `values`."""
    captured = compiled.split.captured
    for stage, worker in zip(compiled.split.stages, compiled.workers, strict=True):
        origins = stage.origins

        def draws(position: int, node: fx.Node, origins: Sequence[int] = origins) -> _KeyedDraws:
            call = captured.call_index(origins[position])
            return _KeyedDraws(seed, call, m, shared=bool(node.meta.get("static")))

        arguments = [values[name].to(worker.device) for name in stage.signature]
        results = run_stage(stage, arguments, worker.device, draws)
        values |= dict(zip(stage.returns, results, strict=True))


class _KeyedDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random operators draw what the generated program draws for one op of the captured graph.

    Args:
        seed: of the step.
        call: position of the op in the captured graph.
        microbatch: its index.
        shared: whether all micro-batches draw the same numbers.
    """

    def __init__(self, seed: int, call: int, microbatch: int, *, shared: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key = seed, call, microbatch, shared
        self._count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return op(*args, **kwargs)
        seed, call, microbatch, shared = self._key
        draw = MicroBatchContext(seed, [(call, self._count, shared)], microbatch).draw
        self._count += 1
        if op is torch.ops.aten.bernoulli_.float:  # a trace records its functional form
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return args[0].copy_(draw(0, torch.ops.aten.bernoulli.p, args[0], p))
        return draw(0, op, *args, **kwargs)
