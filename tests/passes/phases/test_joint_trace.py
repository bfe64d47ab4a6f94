"""A stage's joint graph against eager autograd on the same stage graph: not a bit may differ.

Covers phases/stage_runner.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.passes.ir.split import StageGraph
from autopipe.passes.phases.joint_trace import forward_metadata, trace_joint
from autopipe.passes.phases.metadata import TensorMeta
from autopipe.passes.split.cut import split
from tests.support.joints import (
    ALIASES,
    Call,
    aten,
    check,
    looks_of,
    run,
    tangents,
    traced,
    values_of,
    x,
)
from tests.support.programs import CPU, known, objective_for, sole_stage, tensors

pytestmark = pytest.mark.few(2)

# ------------------------------------------------------------------------------- the models


class Called(TorchDispatchMode):
    """The operators that are executed under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_without_gradients_the_kernels_are_those_of_a_trainable_model() -> None:
    """matmul folds its argument for a weight that requires a gradient, under no_grad too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(1, 2))

    model, x = Net(), torch.randn(8, 6, 5)
    stage = sole_stage(model, x)
    joint = trace_joint(stage, looks_of(values_of(model, stage, x)), (), CPU, grad=False)
    with torch.no_grad(), Called() as eager_calls:
        model(x)
    found = [n.target for n in joint.graph.nodes if n.op == "call_function"]
    assert found == eager_calls.seen
    assert aten.mm.default in found


@pytest.mark.parametrize(
    "name", ["gpt2", "t5", "resnet", "unet", "fan_out", "two_inputs", "tied", "integer_boundary"]
)
def test_stages_of_models(name: str) -> None:
    """Both halves; every value that gets a gradient also gets one from "later stages"."""
    model, inputs, annotated = known(name)
    cut = split(annotated, objective_for(2, 2))
    args, kwargs = inputs(2)
    state = zip(cut.captured.inputs, tensors(cut.captured, model, (args, kwargs)), strict=True)
    known_values = {i.name: t.detach().clone().requires_grad_(t.requires_grad) for i, t in state}
    for stage in cut.stages:
        values = [known_values[n] for n in stage.signature]
        results = stage.graph_module(*(v.clone() for v in values))  # it may write to buffers
        received = range(len(values) - len(stage.receives), len(values))
        arriving = tangents(results) + [
            ("input", i, torch.randn(values[i].shape)) for i in received if values[i].requires_grad
        ]
        check(stage, values, arriving)
        known_values |= {
            n: r.detach().requires_grad_(r.requires_grad)
            for n, r in zip(stage.returns, results, strict=True)
        }


# ------------------------------------------------------------------------------- tangents of inputs


def uses_thrice(model: Any, x: Tensor) -> Tensor:
    return torch.tanh(x) * x + model.layer(x)


def test_a_tangent_of_an_input_is_added_first_as_in_the_whole_graph() -> None:
    """Later stages' share comes before this stage's shares: the order in which autograd sums."""
    model = Call(uses_thrice)
    value, factor = x(), torch.randn(4, 6)
    stage = sole_stage(model, value)
    values = values_of(model, stage, value)
    out, late = torch.randn(4, 6), torch.randn(4, 6)

    whole = uses_thrice(model, value)
    later = value * factor  # recorded after everything in the stage
    (expected,) = torch.autograd.grad([whole, later], [value], [out, late])

    place = len(values) - 1
    arriving = [("return", 0, out), ("input", place, late * factor)]
    joint = check(stage, values, arriving)
    found = run(joint, *(v.detach() for v in values), *(t for *_, t in arriving))
    assert torch.equal(found[-1], expected)

    # Were it added last, the bits would differ: the test can tell.
    (own,) = torch.autograd.grad(uses_thrice(model, value), [value], [out])
    assert not torch.equal(own + late * factor, expected)
    torch.testing.assert_close(own + late * factor, expected)


def test_a_tangent_of_an_input_that_no_result_needs() -> None:
    """The stage passes the sum on, unchanged."""
    model = Call(lambda s, x: x.detach().tanh())
    stage = sole_stage(model, x())
    share = torch.randn(4, 6)
    joint = check(stage, [x()], [("input", 0, share)])
    assert torch.equal(run(joint, x().detach(), share)[-1], share)


# ------------------------------------------------------------------------------- aliases


@pytest.mark.parametrize("name", ALIASES)
def test_results_that_share_memory(name: str) -> None:
    traced(ALIASES[name], x())


def by_hand(stage: StageGraph, returned: Sequence[str]) -> StageGraph:
    """The stage with other results."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(stage.graph_module.graph, env)
    by_name = {n.name: env[n] for n in stage.graph_module.graph.nodes if n in env}
    graph.output(tuple(by_name[n] for n in returned))
    module = fx.GraphModule({}, graph, "ByHand")
    return dataclasses.replace(stage, graph_module=module, returns=tuple(returned))


def test_a_result_that_is_an_input() -> None:
    """Its tangent must not vanish, nor that of the input itself."""
    model = Call(lambda s, x: s.layer(x))
    value = x()
    stage = sole_stage(model, value)
    (y,) = stage.returns
    (name,) = stage.receives
    stage = by_hand(stage, [y, name])
    values = values_of(model, stage, value)
    arriving = tangents(stage.graph_module(*values))
    assert len(arriving) == 2
    check(stage, values, arriving)
    check(stage, values, [*arriving, ("input", len(values) - 1, torch.randn(4, 6))])


def test_a_result_that_is_returned_twice() -> None:
    model = Call(lambda s, x: s.layer(x))
    stage = sole_stage(model, x())
    stage = by_hand(stage, stage.returns * 2)
    values = values_of(model, stage, x())
    check(stage, values, tangents(stage.graph_module(*values)))


def test_a_result_that_is_a_parameter() -> None:
    model = Call(lambda s, x: s.layer(x))
    stage = sole_stage(model, x())
    stage = by_hand(stage, [*stage.returns, stage.held[0].name])
    values = values_of(model, stage, x())
    check(stage, values, tangents(stage.graph_module(*values)))


# ------------------------------------------------------------------------------- which gradients


def test_integers_and_frozen_tensors_get_no_gradient() -> None:
    model = Call(lambda s, x: (s.layer(x), x.argmax(-1), x > 0, x.detach()))
    model.layer.bias.requires_grad_(False)
    stage = sole_stage(model, x(grad=False))
    values = values_of(model, stage, x(grad=False))
    joint = check(stage, values, tangents(stage.graph_module(*values)))
    held = [i.target for i in stage.held]
    assert [held[i] for i in joint.grads] == ["layer.weight"]


def test_only_the_tangents_that_come_are_followed() -> None:
    """A result without tangent gives no gradient; absent ones are not zeros."""
    model = Call(lambda s, x, y: (s.layer(x), y.tanh()))
    stage = sole_stage(model, x(), x())
    values = values_of(model, stage, x(), x())
    everything = tangents(stage.graph_module(*values))
    assert len(check(stage, values, everything).grads) == 4
    only = check(stage, values, everything[1:])
    assert only.grads == (len(values) - 1,)


def test_without_gradients_only_the_forward_is_traced() -> None:
    model = Call(uses_thrice)
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    arriving = [("return", 0, TensorMeta.of(torch.randn(4, 6)))]
    for joint in (
        trace_joint(stage, looks_of(values), [], CPU, grad=False),
        trace_joint(stage, looks_of(values), arriving, CPU, grad=False),
    ):
        assert joint.grads == ()
        assert len(list(joint.graph.output_node().args[0])) == 1
    plain = trace_joint(stage, looks_of(values), [], CPU, grad=False)
    (found,) = run(plain, *(v.detach() for v in values))
    with torch.no_grad():
        assert torch.equal(found, stage.graph_module(*values)[0])


@pytest.mark.parametrize(
    "tangent",
    [torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2], torch.ones(()).expand(4, 6)],
    ids=["transposed", "strided", "expanded"],
)
def test_tangents_may_have_any_strides(tangent: Tensor) -> None:
    model = Call(lambda s, x: torch.tanh(s.layer(x)).view(-1).view(x.shape[0], 6))
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    check(stage, values, [("return", 0, tangent)])


def test_inputs_may_have_any_strides() -> None:
    model = Call(lambda s, x: torch.tanh(s.layer(x)))
    stage = sole_stage(model, x())
    value = torch.randn(6, 4).t().requires_grad_()
    values = [*values_of(model, stage, x())[:-1], value]
    check(stage, values, [("return", 0, torch.randn(4, 6))])


def test_looks_of_results_are_known_without_tracing() -> None:
    model = Call(lambda s, x: (s.layer(x).t(), x.argmax(-1), x.detach().half(), x[:, ::2]))
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    found = forward_metadata(stage, looks_of(values), CPU, grad=True).results
    assert list(found) == looks_of(stage.graph_module(*values))
    without = forward_metadata(stage, looks_of(values), CPU, grad=False).results
    assert [look.requires_grad for look in without] == [False] * 4
