"""What a cut is made for, and what stages are estimated to take, worked out here by definition."""

from __future__ import annotations

import dataclasses
import math
import operator
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autopipe.errors import OptionError, PartitionError
from autopipe.passes.aim import Aim, Facts, aim_of
from autopipe.passes.callfacts import CallFacts
from autopipe.passes.cost import Seconds, annotate, run_again, seconds
from autopipe.passes.devices import DEFAULT, H100, L4, Device, Link
from autopipe.passes.graphs import tensors_of
from autopipe.passes.ir import Kind, at_batch
from autopipe.passes.loads import Rows
from autopipe.passes.runs import operands_of
from autopipe.passes.split import SLACK, split
from autopipe.passes.staged import Split
from autopipe.passes.taken import taken
from tests.programs import CPU, captured_of, known

SIZE = 2


def aim(models: list[Device], **change: Any) -> Aim:
    K = len(models)
    plain = Aim(SIZE, tuple(models), ("none",) * K, (1,) * K, (None,) * K)
    return replace(plain, **change)


def saves_of(cut: Split, call: fx.Node) -> tuple[int, ...]:
    flow = cut.annotated.flows.get(call.name)
    return () if flow is None else flow.saves


def gets_gradient(cut: Split, name: str) -> bool:
    """Does a gradient come for a value: found from eager's rule, not from the costs."""
    graph = cut.captured.graph_module.graph
    trained = {i.name for i in cut.captured.inputs if i.requires_grad}
    needs: set[fx.Node] = set()
    for node in graph.nodes:
        detached = node.target is torch.ops.aten.detach.default
        floating = any(t.is_floating_point() for t in tensors_of(node))
        from_some = any(source in needs for source in node.all_input_nodes)
        if node.name in trained or (from_some and floating and not detached):
            needs.add(node)
    return any(node.name == name for node in needs)


def expected_seconds(cut: Split, wanted: Aim, k: int) -> float:
    """Of stage k: its calls, and what it receives and sends back."""
    annotated, device = cut.annotated, wanted.devices[k]
    every = [n for calls in cut.calls for n in calls]
    again = run_again(every, annotated.flows)
    total = 0.0
    for node in cut.calls[k]:
        times = seconds(annotated.costs[node.name], device, SIZE)
        total += times.forward + times.backward
        total += wanted.again(k) * times.recompute if node in again else 0.0
    for route in cut.routes.values():
        if k in route.consumers:
            once = device.link.seconds(at_batch(route.spec.nbytes, SIZE))
            if route.kind == "activation":
                total += once * (1 + gets_gradient(cut, route.name))
            elif route.kind == "parameter":
                total += once
    return total


def expected_bytes(cut: Split, wanted: Aim, k: int) -> int:
    annotated, stage, n = cut.annotated, cut.stages[k], wanted.in_flight[k]
    kept, factor = wanted.kept(k), wanted.factor(k)
    every = [node for calls in cut.calls for node in calls]
    read = {operands_of(c)[i].name for c in every for i in saves_of(cut, c)}
    total = 0
    for item in stage.held:
        size = at_batch(item.spec.nbytes, SIZE)
        first = not any(item in s.held for s in cut.stages[:k])
        trained = item.kind is Kind.PARAMETER and first
        total += size + (size + 2 * size if trained else 0)
    total += sum(2 * at_batch(cut.routes[name].spec.nbytes, SIZE) for name in stage.lent)
    costs = [annotated.costs[node.name].saved_bytes for node in cut.calls[k]]
    saved = sum(at_batch(cost, SIZE) for cost in costs)
    total += math.ceil(saved * factor * (1 + kept * (n - 1)))
    for name in stage.receives:
        if kept < 1 or name in read:
            total += math.ceil(at_batch(cut.routes[name].spec.nbytes, SIZE) * n * factor)
    return total


@pytest.mark.parametrize("name", ["gpt2", "unet", "t5", "tied", "resnet"])
@pytest.mark.parametrize("remat", ["full", "none", 0.25])
def test_facts_are_those_of_the_stages(name: str, remat: str | float) -> None:
    _, _, annotated = known(name)
    for devices in ([L4] * 3, [H100, L4, DEFAULT]):
        wanted = aim(devices, remat=(remat,) * 3, in_flight=(3, 2, 1), scale=(1.0, 1.5, 1.0))
        cut = split(annotated, wanted)
        for k in range(3):
            assert cut.facts.seconds[k] == pytest.approx(expected_seconds(cut, wanted, k), rel=1e-9)
            # (a size is rounded up item by item)
            assert cut.facts.nbytes[k] == pytest.approx(expected_bytes(cut, wanted, k), abs=400)
        assert cut.facts.lower_bound <= cut.facts.bottleneck
        assert cut.facts.gap >= 0


@pytest.mark.parametrize("name", ["gpt2", "t5", "tied", "integer_boundary"])
def test_rows_in_order_take_what_stages_take(name: str) -> None:
    """The two ways of adding up: of runs of calls, and of any assignment."""
    _, _, annotated = known(name)
    wanted = aim([H100, L4, DEFAULT], remat=("full", "none", 0.5), in_flight=(3, 2, 1))
    facts = CallFacts(annotated, wanted)
    N = len(facts.calls)
    loads = Rows(facts, facts.calls, range(N)).loads()
    generator = random.Random(0)
    places = [p for p in range(1, N) if facts.calls[p].target is not operator.getitem]
    for _ in range(20):
        starts = sorted(generator.sample(places, 2))
        bounds = [0, *starts, N]
        made = {n: (k,) for k in range(3) for n in facts.calls[bounds[k] : bounds[k + 1]]}
        found = taken(facts, made)
        times = [float(time * loads.unit) for time in loads.stage_times(starts)]
        assert times == pytest.approx(found.seconds, rel=1e-9)
        assert loads.stage_bytes(starts) == pytest.approx(found.nbytes, abs=N)
        assert found.fits([None] * 3)
        assert found.fits(found.nbytes)
        assert not found.fits([None, found.nbytes[1] - 1, None])


class Layers(nn.Module):
    def __init__(self, count: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


LAYERS = annotate(captured_of(Layers(8), torch.randn(4, 8)))


def layers(cut: Split) -> list[int]:
    return [sum("linear" in str(n.target) for n in calls) for calls in cut.calls]


def test_a_device_three_times_as_fast_takes_three_times_as_much() -> None:
    fast = replace(DEFAULT, fp32_flops=3e11, gbytes_per_second=120, launch_seconds=2e-6 / 3)
    assert layers(split(LAYERS, aim([DEFAULT, fast]))) == [2, 6]
    assert layers(split(LAYERS, aim([fast, DEFAULT]))) == [6, 2]


def test_a_limit_moves_the_cut_and_more_micro_batches_in_flight_move_it_further() -> None:
    free = split(LAYERS, aim([DEFAULT] * 2))
    assert layers(free) == [4, 4]
    limit = free.facts.nbytes[0] - 4 * 72 * 4  # but one layer's parameters less
    found = split(LAYERS, aim([DEFAULT] * 2, limits=(limit, None)))
    assert layers(found) == [3, 5]
    assert found.facts.nbytes[0] <= limit
    many = aim([DEFAULT] * 2, limits=(limit, None), in_flight=(19, 1))
    assert layers(split(LAYERS, many)) == [1, 7]
    again = split(LAYERS, replace(many, remat=("full", "full")))
    assert layers(again) == [2, 6]
    assert again.facts.nbytes[0] <= limit


def test_what_does_not_fit_is_named_by_its_calls() -> None:
    with pytest.raises(
        PartitionError, match=r"stage 1 does not fit its device: \d+ bytes"
    ) as error:
        split(LAYERS, aim([DEFAULT] * 2, limits=(3000, 3000)))
    assert "calls linear" in str(error.value)
    assert "to tanh_7" in str(error.value)


def test_measured_times_take_the_place_of_the_devices() -> None:
    nodes = [n.name for n in LAYERS.captured.graph_module.graph.nodes if n.name in LAYERS.costs]
    times = {name: Seconds(1.0, 2.0, 1.0) for name in nodes}
    times[nodes[0]] = Seconds(30.0, 9.0, 1.0)
    cut = split(LAYERS, aim([DEFAULT] * 2, times=times))
    assert len(cut.calls[0]) <= 2
    assert cut.facts.bottleneck == 42.0
    assert cut.facts.lower_bound == pytest.approx((39 + 15 * 3) / 2)
    with pytest.raises(OptionError, match="`times`") as error:
        split(LAYERS, aim([DEFAULT] * 2, times={nodes[0]: times[nodes[0]]}))
    assert error.value.node == nodes[1]


class Bottle(nn.Module):
    """Wide values, but for one; the middle of the work is where they are wide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in [(512, 512), (512, 4), (4, 512), *[(512, 512)] * 3]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_slow_link_moves_the_cut_to_where_less_crosses() -> None:
    annotated = annotate(captured_of(Bottle(), torch.randn(4, 512)))
    slow = replace(DEFAULT, link=Link(0.001))
    assert layers(split(annotated, aim([DEFAULT] * 2))) == [4, 2]
    cut = split(annotated, aim([slow] * 2))
    assert layers(cut) == [2, 4]
    assert cut.stages[1].receives == ("tanh_1",)


def test_equal_devices_are_cut_within_the_slack_of_the_bound_where_costs_are_fine() -> None:
    _, _, annotated = known("gpt2")
    facts = split(annotated, aim_of([CPU] * 2, SIZE)).facts
    assert facts.bottleneck <= facts.lower_bound * (1 + SLACK) * 1.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "no such pipeline"),
        ({"devices": (), "remat": (), "in_flight": (), "limits": ()}, "no such pipeline"),
        ({"remat": ("full",)}, "`remat`"),
        ({"remat": ("full", "half")}, "`remat`"),
        ({"remat": ("full", 1.5)}, "`remat`"),
        ({"in_flight": (1, 0)}, "`in_flight`"),
        ({"limits": (None, -1)}, "`limits`"),
        ({"scale": (1.0, 0.5)}, "`scale`"),
        ({"scale": (1.0,)}, "`scale`"),
        ({"state_bytes": -1}, "`state_bytes`"),
    ],
)
def test_aims_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        aim([DEFAULT] * 2, **change)


def test_the_aim_of_plain_devices() -> None:
    found = aim_of([CPU, torch.device("cuda", 1)], 3, remat=0.5, in_flight=[2, 1])
    assert found == Aim(3, (DEFAULT, H100), (0.5, 0.5), (2, 1), (None, None))
    assert (found.stages, found.again(0), found.kept(1), found.factor(0)) == (2, 0.5, 0.5, 1.0)


def test_the_gap_of_nothing_is_none() -> None:
    assert Facts((0.0,), (0,), 0.0).gap == 0.0
    assert dataclasses.replace(Facts((2.0, 3.0), (0, 0), 2.5)).gap == pytest.approx(0.2)
