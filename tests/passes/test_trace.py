"""A stage's joint graph against eager autograd on the same stage graph: not a bit may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.passes.ir import Kind
from autopipe.passes.split import split
from autopipe.passes.staged import StageGraph
from autopipe.passes.trace import Joint, Look, forward_looks, trace
from autopipe.runtime.random import Kit
from tests.programs import CPU, aim_at, calls, known, sole_stage, tensors

aten = torch.ops.aten


def run(joint: Joint, *arguments: Tensor, seed: int = 0, m: int = 0) -> list[Any]:
    """The joint graph on real tensors, as generated code would run it."""
    with torch.no_grad():
        program = fx.Interpreter(fx.GraphModule({}, joint.graph))
        kit = Kit(seed, joint.draws, m)
        return list(program.run(kit, *arguments, enable_io_processing=False))


def looks_of(values: Sequence[Tensor]) -> list[Look]:
    return [Look.of(v)._replace(requires_grad=v.requires_grad) for v in values]


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
) -> Joint:
    """Trace, run, and compare results, buffers and gradients bit for bit."""
    looks = [(kind, i, Look.of(t)) for kind, i, t in arriving]
    joint = trace(stage, looks_of(values), looks, CPU, grad=True)
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
        elif named[name].kind is Kind.PARAMETER:
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


def traced(f: Callable[..., Any], *args: Tensor) -> Joint:
    model = Call(f)
    stage = sole_stage(model, *args)
    values = values_of(model, stage, *args)
    return check(stage, values, tangents(stage.graph_module(*values)))


def x(grad: bool = True) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_(grad)


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
    joint = trace(stage, looks_of(values_of(model, stage, x)), (), CPU, grad=False)
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
    cut = split(annotated, aim_at(2, 2))
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
    arriving = [("return", 0, Look.of(torch.randn(4, 6)))]
    for joint in (
        trace(stage, looks_of(values), [], CPU, grad=False),
        trace(stage, looks_of(values), arriving, CPU, grad=False),
    ):
        assert joint.grads == ()
        assert len(list(joint.graph.output_node().args[0])) == 1
    plain = trace(stage, looks_of(values), [], CPU, grad=False)
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
    found = forward_looks(stage, looks_of(values), CPU, grad=True)
    assert list(found) == looks_of(stage.graph_module(*values))
    without = forward_looks(stage, looks_of(values), CPU, grad=False)
    assert [look.requires_grad for look in without] == [False] * 4


# ------------------------------------------------------------------------------- buffers


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("total", torch.zeros(6))
        self.register_buffer("fixed", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.total[2:4] += x.detach().sum(0)[2:4]
        return x * self.steps + self.total * self.fixed


def test_buffers_are_returned_not_written() -> None:
    model = Counts()
    stage = sole_stage(model, x(), whole=True)
    values = values_of(model, stage, x())
    joint = check(stage, values, tangents(stage.graph_module(*[v.clone() for v in values])))
    assert sorted(stage.held[i].target for i in joint.updates) == ["steps", "total"]


def test_batch_norm_returns_its_statistics() -> None:
    model = nn.BatchNorm1d(6)
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    joint = check(stage, values, tangents(stage.graph_module(*[v.clone() for v in values])))
    targets = {stage.held[i].target for i in joint.updates}
    assert targets >= {"running_mean", "running_var"}


# ------------------------------------------------------------------------------- the graph itself


def test_the_graph_is_pure_and_has_no_leftovers() -> None:
    joint = traced(ALIASES["written through a view"], x())
    for node in calls(joint.graph):
        assert not node.target._schema.is_mutable
        assert node.target not in (aten.detach.default, aten.alias.default)
        assert node.users


def test_random_calls_become_keyed_draws() -> None:
    model = Call(lambda s, x: F.dropout(s.layer(F.dropout(x, 0.5)), 0.5) + torch.rand_like(x))
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    tangent = torch.randn(4, 6)
    joint = trace(stage, looks_of(values), [("return", 0, Look.of(tangent))], CPU, grad=True)
    draws = calls(joint.graph)
    draws = [n for n in draws if n.op == "call_method" and n.target == "draw"]
    assert [n.args[1] for n in draws] == list(range(len(draws)))
    assert len(draws) == len(joint.draws) == len(set(joint.draws)) == 3
    # each is attributed to the call in the stage graph that draws
    nodes = list(stage.graph_module.graph.nodes)
    targets = [str(nodes[call].target) for call, *_ in joint.draws]
    assert targets == ["aten.dropout.default", "aten.dropout.default", "aten.rand_like.default"]
    arguments = [*(v.detach() for v in values), tangent]
    first, again = run(joint, *arguments), run(joint, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], run(joint, *arguments, seed=1)[0])
    assert not torch.equal(first[0], run(joint, *arguments, m=1)[0])


def test_draws_that_do_not_depend_on_the_batch_are_marked() -> None:
    """The call's first and later draws alike; the marks of the captured graph are carried along."""

    def noisy(model: Any, x: Tensor) -> Tensor:
        weight = F.dropout(model.layer.weight, 0.5)
        return F.dropout(F.linear(x, weight), 0.5) * torch.rand(()) + torch.rand_like(x)

    model = Call(noisy)
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    tangent = torch.randn(4, 6)
    joint = trace(stage, looks_of(values), [("return", 0, Look.of(tangent))], CPU, grad=True)
    assert [d.shared for d in joint.draws] == [True, False, True, False]
    arguments = [*(v.detach() for v in values), tangent]
    first, second = run(joint, *arguments), run(joint, *arguments, m=1)
    masks = [gradients[1 + joint.grads.index(0)] == 0 for gradients in (first, second)]
    assert stage.held[0].target == "layer.weight"
    assert torch.equal(*masks)
    assert not torch.equal(first[0], second[0])


def test_dropout_of_nothing_draws_nothing_of_consequence() -> None:
    """In evaluation no key is spent, and results are eager's."""
    model = Call(lambda s, x: F.dropout(s.layer(x), 0.5, training=False))
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    joint = check(stage, values, tangents(stage.graph_module(*values)))
    assert joint.draws == ()


def test_gradients_of_dropout_match_what_was_drawn() -> None:
    model = Call(lambda s, x: F.dropout(x, 0.5))
    stage = sole_stage(model, x())
    value, tangent = x(), torch.randn(4, 6)
    joint = trace(stage, looks_of([value]), [("return", 0, Look.of(tangent))], CPU, grad=True)
    result, gradient = run(joint, value.detach(), tangent)
    kept = result != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(result, torch.where(kept, value.detach() * 2, 0.0))
    assert torch.equal(gradient, torch.where(kept, tangent * 2, 0.0))


def test_attention_with_dropout_draws_once() -> None:
    def attend(model: Any, x: Tensor) -> Tensor:
        q = model.layer(x).view(-1, 2, 3)[:, None]
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)

    model = Call(attend)
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    shape = stage.graph_module(*values)[0].shape
    arriving = [("return", 0, Look.of(torch.randn(shape)))]
    joint = trace(stage, looks_of(values), arriving, CPU, grad=True)
    assert len(joint.draws) == 1


def test_devices_in_the_graph_are_replaced() -> None:
    """Traced for meta, whatever device the model was captured on."""
    model = Call(
        lambda s, x: s.layer(x) + torch.ones(x.shape[0], 6, device="cpu") + torch.arange(6)
    )
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    joint = trace(stage, looks_of(values), [], torch.device("meta"), grad=False)
    for node in joint.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            assert node.meta["val"].device.type == "meta", node.name
