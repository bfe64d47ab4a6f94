"""The cut in space: nothing lost, nothing twice, and the same bits as the uncut graph.

Covers split/op_groups.py and split/extract_stages.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopipe.errors import PartitionError, UnsupportedError
from autopipe.passes.capture.model import capture
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.cost.node_costs import annotate, call_seconds
from autopipe.passes.cost.stage_cost import cost_of_stage
from autopipe.passes.devices import DEFAULT
from autopipe.passes.graph.fx_utils import is_size
from autopipe.passes.ir.split import CALLER, Route, Split, StageGraph
from autopipe.passes.ir.values import B, InputKind
from autopipe.passes.remat_policies import NONE
from autopipe.passes.split.assign_stages import SLACK
from autopipe.passes.split.cut import split
from autopipe.passes.split.objective import objective_of
from tests.support.models import MODELS
from tests.support.programs import (
    calls,
    captured_of,
    known,
    objective_for,
    run_stages,
    split_of,
    tensors,
    user_line,
)

pytestmark = pytest.mark.few(2)

aten = torch.ops.aten
STAGES = range(1, 7)


def stages_of(cut: Split) -> Iterator[tuple[StageGraph, list[Any]]]:
    """Each stage with its calls, but for those that work out sizes, which it makes itself."""
    for stage in cut.stages:
        nodes = zip(stage.graph_module.graph.nodes, stage.origins, strict=True)
        yield stage, [n for n, origin in nodes if origin >= 0]


# ------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", MODELS)
def test_every_call_is_in_exactly_one_stage(name: str) -> None:
    _, _, annotated = known(name)
    expected = Counter(
        n.name for n in calls(annotated.captured.graph_module.graph) if not is_size(n)
    )
    for count in _possible(name):
        cut = split(annotated, objective_for(count, 2))
        nodes = list(cut.captured.graph_module.graph.nodes)
        assert [s.index for s in cut.stages] == list(range(count))
        found: list[str] = []
        for stage, own in stages_of(cut):
            assert own, f"stage {stage.index} of {count} computes nothing"
            origins = [nodes[i] for i in stage.origins if i >= 0]
            assert [n.name for n in origins] == [n.name for n in own]
            assert [n.target for n in origins] == [n.target for n in own]
            found += [n.name for n in own]
        assert Counter(found) == expected
        assert found == [n for n in (x.name for x in nodes) if n in expected]


def _possible(name: str) -> Iterator[int]:
    """The numbers of stages that a model has enough calls for: all but the smallest has for 6."""
    for count in STAGES:
        if name == "two_inputs" and count > 5:
            continue
        yield count


@pytest.mark.parametrize("name", [n for n, e in MODELS.items() if not e.random])
def test_stages_run_by_hand_equal_the_uncut_graph(name: str) -> None:
    """Bit for bit, at batch sizes that the capture at 4 has not seen; buffers included."""
    model, inputs, annotated = known(name)
    captured = annotated.captured
    cuts = [split(annotated, objective_for(count, 2)) for count in _possible(name)]
    for size in (1, 2, 5):
        if size == 1 and name == "integer_boundary":
            continue  # eager refuses a batch norm over one sample
        whole = _values(captured, model, inputs(size))
        with torch.no_grad():
            expected = captured.graph_module(*whole.values())
        for cut in cuts:
            values = _values(captured, model, inputs(size))
            with torch.no_grad():
                found = run_stages(cut, values)
            for output, value in zip(captured.outputs, expected, strict=True):
                assert torch.equal(found[output.name], value), f"{output.name} in {len(cut.stages)}"
            for item in captured.inputs:
                if item.kind is InputKind.BUFFER:
                    assert torch.equal(values[item.name], whole[item.name]), item.name


def _values(captured: Any, model: nn.Module, call: Any) -> dict[str, Tensor]:
    """name → tensor for the captured graph's placeholders, copies where they are written."""
    args, kwargs = call
    found = zip(captured.inputs, tensors(captured, model, (args, kwargs)), strict=True)
    return {
        i.name: t.detach().clone() if i.kind is InputKind.BUFFER else t.detach() for i, t in found
    }


@pytest.mark.parametrize("name", MODELS)
def test_boundaries_are_consistent(name: str) -> None:
    """Who receives what: worked out here from the captured graph alone."""
    _, _, annotated = known(name)
    graph = annotated.captured.graph_module.graph
    for count in _possible(name):
        cut = split(annotated, objective_for(count, 2))
        home = {n.name: s.index for s, own in stages_of(cut) for n in own}
        returned = {o.name for o in annotated.captured.outputs}
        for node in graph.nodes:
            if node.name not in home:
                continue
            users = {home[u.name] for u in node.users if u.name in home}
            away = tuple(sorted(users - {home[node.name]}))
            route = cut.routes.get(node.name)
            if not away and node.name not in returned:
                assert route is None, node.name
                continue
            assert route is not None
            assert route.source == home[node.name]
            assert set(away) <= set(route.consumers)  # one more may read the batch size off it
            assert node.name in cut.stages[route.source].returns
        for item in annotated.captured.inputs:
            (node,) = [n for n in graph.nodes if n.name == item.name]
            users = sorted({home[u.name] for u in node.users if u.name in home})
            if item.kind is InputKind.PARAMETER:
                assert [s.index for s in cut.stages if item in s.held] == users[:1]
                assert [s.index for s in cut.stages if item.name in s.shared] == users[1:]
            elif item.kind is InputKind.INPUT:
                assert set(users) <= {s.index for s in cut.stages if item.name in s.receives}
                assert item.name not in cut.routes or cut.routes[item.name].source == CALLER
            else:
                assert [s.index for s in cut.stages if item in s.held] == users


@pytest.mark.parametrize("name", ["resnet", "bert", "integer_boundary"])
def test_calls_in_place_stay_with_the_memory_that_they_change(name: str) -> None:
    """Every call that knows a written tensor before its last write is in the writer's stage."""
    _, _, annotated = known(name)
    graph = annotated.captured.graph_module.graph
    written = [
        n
        for n in calls(graph)
        if getattr(n.target, "_schema", None) and n.target._schema.is_mutable
    ]
    if name == "resnet":
        assert {n.target for n in written} >= {aten.add_.Tensor}
    for count in _possible(name):
        cut = split(annotated, objective_for(count, 2))
        home = {n.name: s.index for s, own in stages_of(cut) for n in own}
        for node in written:
            target = node.args[0]
            assert isinstance(target, fx.Node)
            if target.op == "placeholder":
                assert [s.index for s in cut.stages if target.name in s.signature] == [
                    home[node.name]
                ]
                continue
            assert home[target.name] == home[node.name]
            before = [u for u in target.users if u < node and u.name in home]
            assert {home[u.name] for u in before} <= {home[node.name]}


# ------------------------------------------------------------------------------- the cut


class Layers(nn.Module):
    def __init__(self, count: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_equal_layers_are_shared_out_evenly() -> None:
    cut = split_of(Layers(6), 3, torch.randn(4, 8))
    assert [len(calls(s.graph_module.graph, aten.linear.default)) for s in cut.stages] == [2, 2, 2]
    assert len({s.fingerprint for s in cut.stages}) == 1
    first, second, third = (cost_of_stage(cut, s, 2).seconds for s in cut.stages)
    assert second == third
    assert first < second  # its first layer owes the input no gradient


def test_the_largest_stage_is_near_the_least_possible() -> None:
    _, _, annotated = known("gpt2")
    times = {name: call_seconds(cost, DEFAULT, 2) for name, cost in annotated.costs.items()}
    balanced = {name: t.forward + t.backward for name, t in times.items()}
    everything, heaviest = sum(balanced.values()), max(balanced.values())
    for count in STAGES:
        cut = split(annotated, objective_of([DEFAULT] * count, 2, remat=NONE))
        loads = [sum(balanced[n.name] for n in own) for _, own in stages_of(cut)]
        bound = max(everything / count, heaviest)
        assert max(loads) <= (bound + heaviest) * (1 + SLACK)
        assert cut.estimates.seconds == pytest.approx(loads)
        assert bound <= cut.estimates.lower_bound * (1 + 1e-9)


def test_more_stages_than_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(PartitionError, match="cannot be cut into 4 stages") as caught:
        split_of(model, 4, torch.randn(4, 4))
    assert "3 ops" in str(caught.value)
    assert "use fewer devices" in str(caught.value)


def test_more_stages_than_groups_of_calls() -> None:
    """Three calls, but the last two are one: a result of several tensors and its unpacking."""

    class Largest(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = x.tanh().max(1)
            return values, indices

    x = torch.randn(4, 4)
    assert len(split_of(Largest(), 2, x).stages) == 2
    with pytest.raises(PartitionError):
        split_of(Largest(), 3, x)


def test_splitting_changes_nothing() -> None:
    _, _, annotated = known("fan_out")
    before = str(annotated.captured)
    first, second = split(annotated, objective_for(3, 2)), split(annotated, objective_for(3, 2))
    assert str(annotated.captured) == before
    assert str(first) == str(second)
    assert [s.fingerprint for s in first.stages] == [s.fingerprint for s in second.stages]


# ------------------------------------------------------------------------------- sizes


class NeedsOnlyTheSize(nn.Module):
    """Its last calls use nothing that was computed before but the number of samples."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x * 2)
        return y, torch.ones(x.shape[0], 3).cumsum(1)


def test_a_stage_may_need_nothing_but_the_batch_size() -> None:
    model, x = NeedsOnlyTheSize(), torch.randn(4, 3)
    cut = split_of(model, 4, x)
    last = cut.stages[-1]
    assert [n.target for n in calls(last.graph_module.graph)] == [aten.cumsum.default]
    alone = next(s for s in cut.stages if calls(s.graph_module.graph, aten.ones.default))
    assert alone.receives  # something to read the size off
    for size in (1, 2, 5):
        data = torch.randn(size, 3)
        found = run_stages(cut, {cut.captured.inputs[0].name: data})
        values = [found[o.name] for o in cut.captured.outputs]
        assert all(torch.equal(a, b) for a, b in zip(values, model(data), strict=True))


def test_sizes_are_read_off_multiples_of_the_batch() -> None:
    """After the first call no tensor has a dimension of the batch's size itself."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.reshape(-1)
            y = torch.tanh(y) * 2
            return y.view(x.shape[0], 3, 2)

    model, x = Flat(), torch.randn(4, 6)
    for count in (2, 3, 4):
        cut = split_of(model, count, x)
        for size in (1, 2, 5):
            data = torch.randn(size, 6)
            found = run_stages(cut, {cut.captured.inputs[0].name: data})
            assert torch.equal(found[cut.captured.outputs[0].name], model(data))


# ------------------------------------------------------------------------------- writing in place


class WritesToItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)  # a write to its input
        return torch.tanh(x)


class WritesToAViewOfItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0].zero_()  # a write to a view
        return torch.tanh(x)


class WritesToItsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(2)  # a write to a parameter
        return torch.tanh(x * self.weight)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (WritesToItsInput, "its input"),
        (WritesToAViewOfItsInput, "a view"),
        (WritesToItsParameter, "a parameter"),
    ],
)
def test_writing_to_inputs_and_parameters_is_refused(model: type[nn.Module], what: str) -> None:
    with pytest.raises(UnsupportedError, match="changes one of its inputs or parameters") as caught:
        split_of(model(), 1, torch.randn(4, 4))
    assert caught.value.source == user_line(model.forward, f"# a write to {what}")
    assert "clone" in str(caught.value)


class Accumulates(nn.Module):
    """In-place work on memory of its own, with views of it in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        total += self.layer(x)
        half = total[:, :2]
        half.mul_(3)
        y = torch.relu_(torch.tanh(total))
        total.add_(y)
        return torch.sin(torch.cos(total)) + half.sum(1, keepdim=True)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_memory_of_its_own_may_be_written_to(count: int) -> None:
    model, x = Accumulates(), torch.randn(4, 4)
    cut = split_of(model, count, x)
    homes = {s.index for s, own in stages_of(cut) for n in own if n.target._schema.is_mutable}
    assert len(homes) == 1
    with torch.no_grad():
        found = run_stages(cut, _values(cut.captured, model, ((x,), {})))
        assert torch.equal(found[cut.captured.outputs[0].name], model(x))


# ------------------------------------------------------------------------------- who lends to whom


def test_a_tied_parameter_lives_in_its_first_stage() -> None:
    model, _, annotated = known("tied")
    cut = split(annotated, objective_for(4, 2))
    (shared,) = [r for r in cut.routes.values() if r.kind == "parameter"]
    assert shared.source == 0
    assert shared.consumers == (1, 2, 3)
    assert [shared.name in s.shared for s in cut.stages] == [False, True, True, True]
    item = next(i for i in cut.captured.inputs if i.name == shared.name)
    assert model.get_parameter(item.target) is model.head.weight


def test_a_value_for_every_later_stage_is_sent_once_to_each() -> None:
    _, _, annotated = known("fan_out")
    cut = split(annotated, objective_for(4, 2))
    fans = [r for r in cut.routes.values() if r.kind == "activation" and len(r.consumers) > 1]
    assert [(r.source, r.consumers) for r in fans] == [(0, (1, 2, 3))]


def test_an_input_goes_where_it_is_used() -> None:
    _, _, annotated = known("two_inputs")
    cut = split(annotated, objective_for(2, 2))
    routes = {n: r for n, r in cut.routes.items() if r.kind == "input"}
    assert routes["x"] == Route(routes["x"].spec, "input", CALLER, (0,))
    assert routes["scale"].consumers == (1,)
    assert str(routes["scale"].spec.shape) == f"({B}, 1)"


def test_a_buffer_that_is_read_only_is_copied_to_each_stage_that_reads_it() -> None:
    class Shifted(Layers):
        def __init__(self) -> None:
            super().__init__(4)
            self.register_buffer("shift", torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x)) + self.shift
            return x

    cut = split_of(Shifted(), 2, torch.randn(4, 8))
    held = [[i.target for i in s.held if i.kind is InputKind.BUFFER] for s in cut.stages]
    assert held == [["shift"], ["shift"]]
    assert not [r for r in cut.routes.values() if "shift" in r.name]


def test_a_buffer_that_is_written_is_not_read_elsewhere() -> None:
    """The stage that reads it would find what another has made of it for a later micro-batch."""

    class Doubled(Layers):
        def __init__(self) -> None:
            super().__init__(4)
            self.register_buffer("shift", torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[1](self.layers[0](x))
            self.shift.view(-1).mul_(2)
            x = self.layers[2](x) + self.shift
            return torch.tanh(self.layers[3](x))

    x = torch.randn(4, 8)
    leaves, spec = pytree.tree_flatten(((x,), {}))
    request = CaptureRequest(Doubled(), leaves, spec, [0], batch_norm="micro")
    cut = split(annotate(capture(request)), objective_for(3, 2))
    held = [i.target for s in cut.stages for i in s.held if i.kind is InputKind.BUFFER]
    assert held == ["shift"]


def test_fingerprints_tell_different_stages_apart() -> None:
    x = torch.randn(4, 8)

    def prints(*modules: nn.Module) -> list[str]:
        cut = split_of(nn.Sequential(*modules), len(modules), x, batch=2)
        return [s.fingerprint for s in cut.stages]

    same = prints(nn.Tanh(), nn.Tanh())
    assert same[0] == same[1]
    for other in (nn.ReLU(), nn.Softmax(1), nn.LeakyReLU(0.1)):
        first, second = prints(nn.LeakyReLU(0.2), other)
        assert first != second


def test_specs_survive_the_cut() -> None:
    model = Layers(3)
    captured = captured_of(model, torch.randn(4, 8))
    cut = split(annotate(captured), objective_for(3, 2))
    for route in cut.routes.values():
        assert dataclasses.replace(route.spec) == route.spec
        assert route.spec.dtype is torch.float32
        assert [str(s) for s in route.spec.shape] == ["B", "8"]
    assert pytree.tree_leaves([s.shared for s in cut.stages]) == []
