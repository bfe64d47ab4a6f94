"""The independent truth: the captured graph under plain autograd over the same chunks.

Nothing of the runtime, of stages or of phases is used here, only the captured graph as an ordinary
GraphModule, `torch.tensor_split`, and `torch.autograd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopipe.passes.ir.captured import Captured
from autopipe.passes.ir.combine import Combine, Concatenate
from autopipe.passes.ir.values import InputKind
from autopipe.results import run_epilogue


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
        for x in pytree.tree_leaves(result)
        if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point()
    ]
    return torch.stack(terms).sum()


def over_chunks(
    captured: Captured, model: nn.Module, leaves: list[Any], chunks: int, *, grad: bool = True
) -> Truth:
    """Forward and backward of the captured graph, chunk by chunk, in the order 0 … M-1."""
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
            outputs.append(captured.graph_module(*arguments))
            start += size
        combined = []
        for n, output in enumerate(captured.outputs):
            parts = [o[n].detach() for o in outputs]
            value = _combine(output.combine, parts, sizes)
            floating = any(o[n].requires_grad for o in outputs)
            combined.append(value.detach().requires_grad_(floating))
        values = run_epilogue(captured, combined, batch, model.get_buffer)
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
        objective(result).backward()
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
