"""The joint graph itself: pure, with new values of buffers as results and draws by key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopipe.passes.phases.joint_trace import trace_joint
from autopipe.passes.phases.metadata import TensorMeta
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
from tests.support.programs import CPU, calls, sole_stage


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
    joint = trace_joint(
        stage, looks_of(values), [("return", 0, TensorMeta.of(tangent))], CPU, grad=True
    )
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
    joint = trace_joint(
        stage, looks_of(values), [("return", 0, TensorMeta.of(tangent))], CPU, grad=True
    )
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
    joint = trace_joint(
        stage, looks_of([value]), [("return", 0, TensorMeta.of(tangent))], CPU, grad=True
    )
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
    arriving = [("return", 0, TensorMeta.of(torch.randn(shape)))]
    joint = trace_joint(stage, looks_of(values), arriving, CPU, grad=True)
    assert len(joint.draws) == 1


def test_devices_in_the_graph_are_replaced() -> None:
    """Traced for meta, whatever device the model was captured on."""
    model = Call(
        lambda s, x: s.layer(x) + torch.ones(x.shape[0], 6, device="cpu") + torch.arange(6)
    )
    stage = sole_stage(model, x())
    values = values_of(model, stage, x())
    joint = trace_joint(stage, looks_of(values), [], torch.device("meta"), grad=False)
    for node in joint.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            assert node.meta["val"].device.type == "meta", node.name
