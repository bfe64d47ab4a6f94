"""The independent truth: the captured graph under plain autograd over the same chunks.

Nothing of the runtime, of stages or of phases is used here, only the captured graph as an ordinary
GraphModule, `torch.tensor_split`, and `torch.autograd`; and for random numbers, which have a key
each, the function that draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.passes.capture import take_apart
from autopipe.passes.ir.captured import Captured
from autopipe.passes.ir.combine import Combine, Concatenate
from autopipe.passes.ir.values import B, InputKind
from autopipe.results import run_epilogue
from autopipe.runtime.random import MicroBatchContext

aten = torch.ops.aten


@dataclass
class Truth:
    result: Any
    parameters: dict[str, Tensor | None]
    inputs: list[Tensor | None]
    buffers: dict[str, Tensor]


def objective(result: Any) -> Tensor:
    """The model's own loss, or a sum over everything differentiable that weighs entries apart."""
    if isinstance(result, dict) and result.get("loss") is not None:
        return result["loss"]
    terms = [
        (x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum()
        for x in pytree.tree_leaves(take_apart(result))
        if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()
    ]
    return torch.stack(terms).sum()


class _KeyedDraws(TorchDispatchMode):
    """Random operators draw with the key of an op of the captured graph, in one micro-batch."""

    def __init__(self, seed: int, position: int, shared: bool, m: int) -> None:
        super().__init__()
        self.seed, self.position, self.shared, self.m = seed, position, shared, m
        self.draws = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return op(*args, **kwargs or {})
        key = (self.position, self.draws, self.shared)
        self.draws += 1
        draw = MicroBatchContext(self.seed, [key], self.m).draw
        if op is aten.bernoulli_.float:  # in its pure form: in the order of the shape
            return args[0].copy_(draw(0, aten.bernoulli.p, *args, **kwargs or {}))
        return draw(0, op, *args, **kwargs or {})


class _Keyed(fx.Interpreter):
    """The captured graph in one micro-batch, op by op."""

    def __init__(self, captured: Captured, seed: int, m: int) -> None:
        super().__init__(captured.graph_module)
        self.seed, self.m = seed, m
        nodes = enumerate(captured.graph_module.graph.nodes)
        self.positions = {node: captured.call_index(i) for i, node in nodes}

    def run_node(self, n: fx.Node) -> Any:
        shared = bool(n.meta.get("static"))
        with _KeyedDraws(self.seed, self.positions[n], shared, self.m):
            return super().run_node(n)


def over_chunks(
    captured: Captured,
    model: nn.Module,
    leaves: list[Any],
    chunks: int,
    *,
    grad: bool = True,
    seed: int | None = None,
    loss: Callable[[Any], Tensor] = objective,
) -> Truth:
    """Forward and backward of the captured graph, chunk by chunk, in the order 0 … M-1.

    Args:
        captured: its graph is run.
        model: has the values of parameters and buffers.
        leaves: arguments of the call.
        chunks: how many.
        grad: with the backward.
        seed: of the step's random numbers, if there are any.
        loss: what is differentiated.
    """
    batch = next(
        leaves[i.index].shape[i.batch_dim] for i in captured.inputs if i.batch_dim is not None
    )
    sizes = [len(c) for c in torch.arange(batch).tensor_split(chunks) if len(c)]
    state: dict[str, Tensor] = {}
    for item in captured.inputs:
        if item.kind is InputKind.PARAMETER:
            parameter = model.get_parameter(item.target)
            state[item.name] = parameter.detach().clone().requires_grad_(parameter.requires_grad)
        elif item.kind is InputKind.BUFFER:
            state[item.name] = model.get_buffer(item.target).detach().clone()
        elif item.kind is InputKind.CONSTANT:
            state[item.name] = captured.constants[item.target]
        else:
            leaf = leaves[item.index]
            state[item.name] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    with torch.set_grad_enabled(grad):
        outputs: list[tuple[Tensor, ...]] = []
        start = 0
        for size in sizes:
            arguments = [
                state[i.name]
                if i.batch_dim is None
                else state[i.name].narrow(i.batch_dim, start, size)
                for i in captured.inputs
            ]
            run = captured.graph_module
            if seed is not None:
                run = _Keyed(captured, seed, len(outputs)).run
            outputs.append(run(*arguments))
            start += size
        combined = []
        for n, output in enumerate(captured.outputs):
            parts = [o[n].detach() for o in outputs]
            value = _combine(output.combine, parts, sizes)
            floating = any(o[n].requires_grad for o in outputs)
            combined.append(value.detach().requires_grad_(floating))
        values = run_epilogue(captured, combined, {B: batch}, model.get_buffer)
        for target, index in captured.updates:
            name = next(i.name for i in captured.inputs if i.target == target)
            state[name] = values[index].detach()
        kinds = {
            "value": lambda i: values[i],
            "input": lambda i: state[next(c.name for c in captured.inputs if c.index == i)],
            "parameter": model.get_parameter,
            "constant": lambda x: x,
        }
        filled = [kinds[leaf.kind](leaf.value) for leaf in captured.leaves]
        result = pytree.tree_unflatten(filled, captured.out_spec)
    if grad:
        loss(result).backward()
        for m in range(len(sizes)):
            roots, tangents = [], []
            for output, value, whole in zip(captured.outputs, outputs[m], combined, strict=True):
                if whole.grad is None or not value.requires_grad:
                    continue
                roots.append(value)
                tangents.append(_share(output, whole.grad, outputs, m, sizes, captured))
                assert tangents[-1].shape == value.shape
            torch.autograd.backward(roots, tangents)
    calls = [i for i in captured.inputs if i.kind is InputKind.INPUT]
    return Truth(
        result,
        {i.target: state[i.name].grad for i in captured.inputs if i.kind is InputKind.PARAMETER},
        [state[i.name].grad for i in calls if leaves[i.index].requires_grad],
        {i.target: state[i.name] for i in captured.inputs if i.kind is InputKind.BUFFER},
    )


def _combine(combine: Combine, parts: list[Tensor], sizes: list[int]) -> Tensor:
    if combine.name == "same" or len(parts) == 1:
        return parts[0]
    if isinstance(combine, Concatenate):
        return torch.cat(parts, combine.dim)
    if combine.name == "mean":
        parts = [p * (n / sum(sizes)) for p, n in zip(parts, sizes, strict=True)]
    total = parts[0]
    assert combine.name in ("mean", "sum")
    for part in parts[1:]:
        total = total + part
    return total


def _share(
    output: Any, gradient: Tensor, outputs: Any, m: int, sizes: list[int], captured: Captured
) -> Tensor:
    combine = output.combine
    if combine.name == "sum" or len(sizes) == 1:
        return gradient.contiguous()  # a leaf's gradient has the leaf's strides
    if isinstance(combine, Concatenate):
        n = captured.outputs.index(output)
        lengths = [o[n].shape[combine.dim] for o in outputs]
        return gradient.split(lengths, combine.dim)[m].contiguous()
    assert combine.name in ("mean", "same")
    return gradient * (sizes[m] / sum(sizes))
