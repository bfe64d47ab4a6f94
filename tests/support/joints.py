"""A stage's joint graph against eager autograd on the same stage graph: not a bit may differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopipe.passes.ir.split import StageGraph
from autopipe.passes.ir.values import InputKind
from autopipe.passes.phases.joint_trace import JointGraph, trace_joint
from autopipe.passes.phases.metadata import TensorMeta
from autopipe.runtime.random import MicroBatchContext
from tests.support.programs import CPU, sole_stage

aten = torch.ops.aten


def run(joint: JointGraph, *arguments: Tensor, seed: int = 0, m: int = 0) -> list[Any]:
    """The joint graph on real tensors, as generated code would run it."""
    with torch.no_grad():
        program = fx.Interpreter(fx.GraphModule({}, joint.graph))
        ctx = MicroBatchContext(seed, joint.draws, m)
        return list(program.run(ctx, *arguments, enable_io_processing=False))


def looks_of(values: Sequence[Tensor]) -> list[TensorMeta]:
    return [TensorMeta.of(v)._replace(requires_grad=v.requires_grad) for v in values]


def eager(
    stage: StageGraph, values: Sequence[Tensor], arriving: Sequence[tuple[str, int, Tensor]]
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Results, gradients of what requires one, and `values` as they are afterwards."""
    state = [v.detach().clone() for v in values]
    leaves = [s.requires_grad_(v.requires_grad) for s, v in zip(state, values, strict=True)]
    results = list(stage.graph_module(*leaves))
    wanted = [x for x in leaves if x.requires_grad]
    roots = {"return": results, "input": leaves}
    found: Sequence[Tensor | None] = ()
    if arriving:
        found = torch.autograd.grad(
            [roots[kind][i] for kind, i, _ in arriving],
            wanted,
            [t for *_, t in arriving],
            allow_unused=True,
        )
    return [r.detach() for r in results], list(found), [x.detach() for x in leaves]


def check(
    stage: StageGraph, values: Sequence[Tensor], arriving: Sequence[tuple[str, int, Tensor]]
) -> JointGraph:
    """Trace, run, and compare results, buffers and gradients bit for bit."""
    looks = [(kind, i, TensorMeta.of(t)) for kind, i, t in arriving]
    joint = trace_joint(stage, looks_of(values), looks, CPU, grad=True)
    before = [v.detach().clone() for v in values]
    found = run(joint, *(v.detach() for v in values), *(t for *_, t in arriving))
    results, gradients, after = eager(stage, values, arriving)
    for n, result in enumerate(results):
        assert torch.equal(found[n], result), f"result {n}"
        assert found[n].stride() == result.stride(), f"result {n}"
    changed = [
        i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)
    ]
    assert set(changed) <= set(joint.updates)
    for n, i in enumerate(joint.updates, len(results)):
        assert torch.equal(found[n], after[i]), f"new value of {stage.signature[i]}"
    assert all(torch.equal(v, b) for v, b in zip(values, before, strict=True))  # the graph is pure
    wanted = [i for i, v in enumerate(values) if v.requires_grad]
    expected = {i: g for i, g in zip(wanted, gradients, strict=False) if g is not None}
    assert joint.grads == tuple(expected)
    ending = len(results) + len(joint.updates)
    for n, i in enumerate(joint.grads, ending):
        assert torch.equal(found[n], expected[i]), f"gradient of {stage.signature[i]}"
    assert len(found) == ending + len(joint.grads)
    return joint


class Call(nn.Module):
    """A function of a tensor and of a layer."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.f = f

    def forward(self, *args: Tensor) -> Any:
        return self.f(self, *args)


def values_of(model: nn.Module, stage: StageGraph, *args: Tensor) -> list[Tensor]:
    """Real tensors for the stage's placeholders."""
    arguments = iter(args)
    named = {i.name: i for i in stage.held}
    values = []
    for name in stage.signature:
        if name not in named:
            values.append(next(arguments))
        elif named[name].kind is InputKind.PARAMETER:
            values.append(model.get_parameter(named[name].target))
        else:
            values.append(model.get_buffer(named[name].target).detach())
    return values


def tangents(results: Sequence[Tensor], *, seed: int = 1) -> list[tuple[str, int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ("return", i, torch.randn(r.shape, generator=generator, dtype=r.dtype))
        for i, r in enumerate(results)
        if r.requires_grad
    ]


def traced(f: Callable[..., Any], *args: Tensor) -> JointGraph:
    model = Call(f)
    stage = sole_stage(model, *args)
    values = values_of(model, stage, *args)
    return check(stage, values, tangents(stage.graph_module(*values)))


def x(grad: bool = True) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_(grad)


ALIASES: dict[str, Callable[..., Any]] = {
    "a view of the input": lambda s, x: (x.view(-1), s.layer(x)),
    "several views of the input": lambda s, x: (x[:, :3], x.t(), x.unsqueeze(0)),
    "a value and its views": lambda s, x: (lambda y: (y, y.view(-1), y.t()))(s.layer(x)),
    "views that overlap": lambda s, x: (lambda y: (y[:, :4], y[:, 2:]))(s.layer(x)),
    "an expanded value": lambda s, x: s.layer(x)[:, None].expand(-1, 3, -1),
    "a view of a parameter": lambda s, x: (s.layer(x), s.layer.weight.t() * 2),
    "written in place": lambda s, x: s.layer(x).mul_(2).tanh_(),
    "written through a view": lambda s, x: (lambda y: (y[:, 0].mul_(3), y)[1])(s.layer(x) * 1),
    "chunks": lambda s, x: s.layer(x).chunk(2, 1),
}
