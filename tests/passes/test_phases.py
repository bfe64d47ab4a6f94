"""The cut in time: who runs what, what is kept, and that the four phases give eager's bits.

Reachability is worked out here once more, from the graphs' edges alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autopipe.errors import InputError
from autopipe.passes import phases as room
from autopipe.passes._torch import storage_id
from autopipe.passes.ir import Kind, at_batch
from autopipe.passes.phases import received_strides
from autopipe.passes.policies import POLICIES
from autopipe.passes.split import split
from autopipe.passes.staged import Phased, Split, StagePhases
from autopipe.runtime.random import Kit
from tests.agreement import assert_agrees, pipelined
from tests.once import pure_passes_once
from tests.programs import (
    aim_at,
    calls,
    known,
    node,
    phased_of,
    split_of,
    tensors,
    user_line,
)

MODEL_NAMES = ["gpt2", "t5", "resnet", "unet", "fan_out", "tied", "two_inputs", "integer_boundary"]
SIZE = 2
STAGES = 3


@pytest.fixture(scope="module", autouse=True)
def _once() -> Iterator[None]:
    """Tracing does not depend on the policy."""
    with pure_passes_once():
        yield


@functools.cache
def cut_model(name: str) -> Split:
    return split(known(name)[2], aim_at(STAGES, SIZE))


def phased_model(name: str, remat: str) -> Phased:
    model, inputs, _ = known(name)
    return phased_of(cut_model(name), model, SIZE, inputs(SIZE), remat=remat)


def every(name: str, remat: str) -> list[StagePhases]:
    return list(phased_model(name, remat).stages)


each_model = pytest.mark.parametrize("name", [*MODEL_NAMES, "gpt2_dropout"])
each_policy = pytest.mark.parametrize("remat", POLICIES)


# ------------------------------------------------------------------------------- reachability


def parts(stage: StagePhases) -> dict[str, list[fx.Node]]:
    """The graph's placeholders by group; results stand in `stage.results()`."""
    kit, *rest = [n for n in stage.graph.nodes if n.op == "placeholder"]
    groups: dict[str, list[fx.Node]] = {"kit": [kit]}
    for group in ("held", "receives", "tangents"):
        count = len(getattr(stage, group))
        groups[group], rest = rest[:count], rest[count:]
    assert rest == []
    return groups


def above(results: Sequence[Any]) -> set[fx.Node]:
    """`results` and all that they are computed from."""
    found: set[fx.Node] = set()
    todo = [r for r in results if isinstance(r, fx.Node)]
    while todo:
        top = todo.pop()
        if top not in found:
            found.add(top)
            todo += top.all_input_nodes
    return found


def phase_nodes(stage: StagePhases, letters: str) -> set[fx.Node]:
    return {n for n in calls(stage.graph) if stage.phase_of[n.name] in letters}


@each_model
@each_policy
def test_phases_are_reachability(name: str, remat: str) -> None:
    for stage in every(name, remat):
        results, tangents = stage.results(), parts(stage)["tangents"]
        late = {n for n in calls(stage.graph) if above([n]) & set(tangents)}
        forward = above([*results["returns"], *results["updates"], *_saved(stage)])
        sent, own = above(results["sent_grads"]), above(results["own_grads"])
        assert phase_nodes(stage, "FRBW") == set(calls(stage.graph))
        # F: what results, new buffers and kept values need; no gradient is part of it
        unpacked = {n for n in phase_nodes(stage, "F") if n.target is getitem}
        assert phase_nodes(stage, "F") - unpacked <= forward
        assert not phase_nodes(stage, "F") & late
        # R: what gradients need that needs no tangent
        assert not phase_nodes(stage, "R") & late
        assert phase_nodes(stage, "R") <= sent | own
        # B: what the gradients sent to earlier stages need, and nothing else
        assert phase_nodes(stage, "B") == late & sent
        # W: all the rest, which nobody is waiting for
        assert phase_nodes(stage, "W") == late & own - sent


def _saved(stage: StagePhases) -> list[fx.Node]:
    return [node(stage.graph, name) for name in stage.saved]


@each_model
def test_full_keeps_what_was_received_and_nothing_else(name: str) -> None:
    """But for old values of the buffers that F changes, if R reads them (GPipe, section 2.3)."""
    for stage in every(name, "full"):
        groups = parts(stage)
        for kept in _saved(stage):
            if kept in groups["receives"]:
                continue
            assert kept.target is torch.ops.aten.clone.default
            assert kept.args[0] in groups["held"]
            source = groups["held"].index(kept.args[0])
            assert stage.held[source] in stage.updates


def call_numbers(stage: StagePhases, letters: str) -> list[Any]:
    """What each call computes, as a term over placeholders; equal terms are equal values."""
    terms: dict[fx.Node, Any] = {}
    numbers: dict[Any, int] = {}
    for n in stage.graph.nodes:
        if n.op == "placeholder":
            term: Any = n.name
        else:
            args = fx.map_arg((n.args, n.kwargs), lambda x: terms[x])
            term = (str(n.target), str(args))
        if n.name in stage.saved and n.target is torch.ops.aten.clone.default:
            terms[n] = terms[n.args[0]]  # a copy of a buffer's old value
            continue
        terms[n] = f"#{numbers.setdefault(term, len(numbers))}"
    return [terms[n] for n in calls(stage.graph) if stage.phase_of[n.name] in letters]


@each_model
def test_none_repeats_nothing_that_the_forward_has_computed(name: str) -> None:
    for stage in every(name, "none"):
        forward, again = call_numbers(stage, "F"), call_numbers(stage, "R")
        assert not set(forward) & set(again)


@each_model
def test_full_repeats_whatever_the_backward_needs_of_the_forward(name: str) -> None:
    """Only received values are there, so every kept activation of "none" is computed again."""
    repeated = 0
    for full, none in zip(every(name, "full"), every(name, "none"), strict=True):
        made = [n for n in _saved(none) if n.op != "placeholder"]
        fresh = [n for n in made if n.target is not torch.ops.aten.clone.default]
        assert bool(fresh) == bool(set(call_numbers(full, "F")) & set(call_numbers(full, "R")))
        repeated += len(fresh)
    assert repeated


def saved_bytes(stage: StagePhases) -> int:
    """Of distinct memory; parameters' own does not count."""
    values = [n.meta["val"] for n in _saved(stage)]
    theirs = {storage_id(n.meta["val"]) for n in parts(stage)["held"]}
    sizes = {storage_id(v): v.untyped_storage().nbytes() for v in values}
    return sum(size for identity, size in sizes.items() if identity not in theirs)


@each_model
def test_min_cut_keeps_no_more_than_everything(name: str) -> None:
    everything = sum(map(saved_bytes, every(name, "none")))
    assert 0 < sum(map(saved_bytes, every(name, "min-cut"))) <= everything


# ------------------------------------------------------------------------------- the four in turn


def run_phases(
    stage: StagePhases, values: Mapping[str, Tensor], tangents: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run F, forget all but what is saved, then R, B and W one after the other.

    Buffers that F has new values for are filled with nan in between: what R needs of their old
    values must be among the saved ones.

    Returns:
        What F returns (results, then new buffers), and the gradients by name.
    """
    groups, results = parts(stage), stage.results()
    names = [*stage.held, *stage.receives]
    holders = [*groups["held"], *groups["receives"]]
    kit = Kit(0, stage.draws, 0)
    env: dict[fx.Node, Any] = {groups["kit"][0]: kit}
    env |= {h: values[n] for h, n in zip(holders, names, strict=True)}

    def execute(letter: str) -> None:
        for n in calls(stage.graph):
            if stage.phase_of[n.name] == letter:
                args, kwargs = fx.map_arg((n.args, n.kwargs), lambda x: env[x])
                if n.op == "call_method":
                    env[n] = getattr(args[0], str(n.target))(*args[1:], **kwargs)
                else:
                    env[n] = n.target(*args, **kwargs)  # type: ignore[operator]

    with torch.no_grad():
        execute("F")
        returned = [env[n] for n in (*results["returns"], *results["updates"])]
        kept = {n: env[n] for n in _saved(stage)}
        env = {groups["kit"][0]: kit, **kept}
        for holder, name in zip(groups["held"], stage.held, strict=True):
            value = values[name]
            env[holder] = torch.full_like(value, _broken(value)) if name in stage.updates else value
        env |= dict(zip(groups["tangents"], tangents, strict=True))
        execute("R")
        execute("B")
        sent = [env[n] for n in results["sent_grads"]]
        execute("W")
        own = [env[n] for n in results["own_grads"]]
    gradients = dict(zip((*stage.sent_grads, *stage.own_grads), (*sent, *own), strict=True))
    return returned, gradients


def _broken(value: Tensor) -> float:
    return float("nan") if value.is_floating_point() else -(10**6)


@pytest.mark.parametrize("name", MODEL_NAMES)
@each_policy
def test_phases_run_one_after_another_give_eagers_bits(name: str, remat: str) -> None:
    """Each stage on its own: the results and gradients of autograd on the stage's own graph."""
    model, inputs, _ = known(name)
    cut = cut_model(name)
    phased = phased_model(name, remat)
    state = zip(cut.captured.inputs, tensors(cut.captured, model, inputs(SIZE)), strict=True)
    values = {i.name: t.detach().clone().requires_grad_(t.requires_grad) for i, t in state}
    generator = torch.Generator().manual_seed(0)
    for graph, stage in zip(cut.stages, phased.stages, strict=True):
        leaves = {
            n: values[n].detach().clone().requires_grad_(values[n].requires_grad)
            for n in graph.signature
        }
        buffers = {i.name for i in graph.held if i.kind is Kind.BUFFER}
        before = {n: v.detach().clone() if n in buffers else v.detach() for n, v in leaves.items()}
        results = dict(zip(graph.returns, graph.graph_module(*leaves.values()), strict=True))
        tangents = [
            torch.randn((leaves | results)[n].shape, generator=generator) for n in stage.tangents
        ]
        wanted = {n: v for n, v in leaves.items() if v.requires_grad}
        gradients = torch.autograd.grad(
            [(results | leaves)[n] for n in stage.tangents],
            list(wanted.values()),
            tangents,
            allow_unused=True,
        )
        expected = {n: g for n, g in zip(wanted, gradients, strict=True) if g is not None}
        returned, found = run_phases(stage, before, tangents)
        names = [*stage.returns, *(n for n in stage.updates)]
        now = {n: r.detach() for n, r in results.items()} | {n: leaves[n] for n in stage.updates}
        for value, n in zip(returned, names, strict=True):
            assert torch.equal(value, now[n]), n
        assert found.keys() == expected.keys()
        for n, gradient in expected.items():
            assert torch.equal(found[n], gradient), n
        values |= {n: r.detach().requires_grad_(r.requires_grad) for n, r in results.items()}


@each_policy
def test_what_is_drawn_again_is_what_was_drawn(remat: str) -> None:
    """R draws under the forward's keys, so dropout's gradients fit its results."""
    model = Dropped()
    x = torch.randn(SIZE, 6)
    (stage,) = phased_of(split_of(model, 1, x), model, SIZE, ((x,), {}), remat=remat).stages
    values = {i: p.detach() for i, p in zip(stage.held, model.parameters(), strict=True)}
    values[stage.receives[0]] = x
    tangent = torch.randn(SIZE, 6)
    (result,), gradients = run_phases(stage, values, [tangent])
    kept = (result != 0).double()
    assert 0 < kept.sum() < kept.numel()
    (bias,) = [n for n in gradients if n.endswith("bias")]
    torch.testing.assert_close(gradients[bias], (tangent * 2 * kept).sum(0).float())
    drawing = [n for n in calls(stage.graph) if n.target == "draw"]
    assert {n.args[1] for n in drawing} == {0}
    expected = ["F", "R"] if remat == "full" else ["F"]
    assert sorted(stage.phase_of[n.name] for n in drawing) == expected


class Dropped(nn.Module):
    """The mask is needed by the backward, and so is the value that it is applied to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5)


# ------------------------------------------------------------------------------- buffers


def test_old_statistics_are_kept_for_the_repetition() -> None:
    """The running mean is read, changed, and read again by R, which must see the old value."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.norm(x) * self.scale.clone())
            self.scale *= 1.5
            return x * x

    model, x = Centred(), torch.randn(4, 6)
    cut = split_of(model, 1, x)
    (stage,) = phased_of(cut, model, 4, ((x,), {}), remat="full").stages
    updated = {i.name for i in cut.stages[0].held if i.kind is Kind.BUFFER}
    assert set(stage.updates) == updated
    old = [n for n in _saved(stage) if n.op != "placeholder"]
    sources = {stage.held[parts(stage)["held"].index(n.args[0])] for n in old}
    assert "b_scale" in sources
    readers = {u for n in phase_nodes(stage, "RBW") for u in n.all_input_nodes}
    written = {
        h for h, n in zip(parts(stage)["held"], stage.held, strict=True) if n in stage.updates
    }
    assert not readers & written  # by then they hold new values


@each_policy
def test_a_buffer_that_changes_every_micro_batch(remat: str) -> None:
    """End to end: the gradient belongs to the value that the forward saw."""

    class Scheduled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.layer(x) * self.scale.clone())
            self.scale *= 1.5
            return torch.tanh(x * self.scale)

    model = Scheduled().double()
    model.scale = model.scale.double()
    pipe = pipelined(model, remat=remat, chunks=1)
    for _ in range(2):
        assert_agrees(pipe, torch.randn(4, 6, dtype=torch.float64))
    # three micro-batches are three steps of the schedule, one after another
    x = torch.randn(6, 6, dtype=torch.float64)
    expected, scale = [], model.scale.clone()
    for part in x.split(2):
        y = torch.tanh(model.layer(part) * scale)
        scale = scale * 1.5
        expected.append(torch.tanh(y * scale))
    want = torch.autograd.grad(torch.cat(expected).sum(), list(model.parameters()))
    model.zero_grad()
    pipelined(model, remat=remat, batch_norm="micro")(x).sum().backward()
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.scale, scale)


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x))  # the line of the norm


@pytest.mark.parametrize(
    ("norm", "shape", "refused"),
    [
        (nn.BatchNorm1d(6), (6,), True),
        (nn.BatchNorm2d(6), (6, 1, 1), True),
        (nn.BatchNorm1d(6), (6, 3), False),
        (nn.BatchNorm2d(6), (6, 1, 2), False),
        (nn.BatchNorm1d(6).eval(), (6,), False),
        (nn.BatchNorm1d(6, track_running_stats=False).eval(), (6,), True),
    ],
)
def test_batch_norm_over_a_single_value(
    norm: nn.Module, shape: tuple[int, ...], refused: bool
) -> None:
    """Where eager refuses a batch of one sample, so do micro-batches of one."""
    model, x = Normalised(norm), torch.randn(3, *shape)
    eagerly: Callable[..., Any] = model
    if not refused:
        assert eagerly(x[:1]).shape == x[:1].shape
        assert pipelined(model, devices=1, chunks=3)(x).shape == x.shape
        return
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        eagerly(x[:1])
    pipe = pipelined(model, devices=1, chunks=3)
    with pytest.raises(InputError, match="needs more than one value per channel") as caught:
        pipe(x)
    assert caught.value.source == user_line(Normalised.forward, "# the line " + "of the norm")
    assert "fewer chunks" in str(caught.value)
    larger = torch.randn(6, *shape)
    assert pipe(larger).shape == larger.shape  # micro-batches of two


# ------------------------------------------------------------------------------- tracing once


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the stages that are traced from now on."""
    seen: list[int] = []
    trace = room.trace

    def counting(stage: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(stage.index)
        return trace(stage, *args, **kwargs)

    monkeypatch.setattr(room, "trace", counting)
    return seen


def test_identical_stages_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage sends no gradient; all that follow are alike."""
    seen = counted(monkeypatch)
    model, x = Layers(5), torch.randn(4, 6)
    cut = split_of(model, 5, x)
    traced = room.Traced()
    phased = phased_of(cut, model, SIZE, ((x,), {}), traced=traced)
    assert seen == [4, 0]
    assert len({id(s.graph) for s in phased.stages}) == 2
    assert [s.index for s in phased.stages] == list(range(5))
    for k, stage in enumerate(phased.stages):
        assert stage.held == (f"p_layers_{k}_weight", f"p_layers_{k}_bias")
        assert stage.own_grads == stage.held
        assert stage.sent_grads == (cut.stages[k].receives if k else ())
        assert stage.tangents == cut.stages[k].returns
    # again, at the same size: nothing is traced
    phased_of(cut, model, SIZE, ((x,), {}), traced=traced)
    assert seen == [4, 0]
    phased_of(cut, model, SIZE + 1, ((x,), {}), traced=traced)
    assert seen == [4, 0, 4, 0]


def test_a_frozen_stage_is_not_taken_for_one_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    model, x = Layers(4), torch.randn(4, 6).requires_grad_()
    model.layers[2].requires_grad_(False)
    phased = phased_of(split_of(model, 4, x), model, SIZE, ((x,), {}))
    assert seen == [3, 2]
    assert [bool(s.own_grads) for s in phased.stages] == [True, True, False, True]
    assert [len(s.sent_grads) for s in phased.stages] == [1, 1, 1, 1]


def test_draws_of_identical_stages_differ() -> None:
    """They share a graph, not what they draw: a key names the call in the captured graph."""

    class Noisy(Layers):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = F.dropout(torch.tanh(layer(x)), 0.5)
            return x

    model, x = Noisy(4), torch.randn(4, 6).requires_grad_()
    cut = split_of(model, 4, x)
    phased = phased_of(cut, model, SIZE, ((x,), {}))
    assert len({id(s.graph) for s in phased.stages}) == 1
    draws = [d for s in phased.stages for d in s.draws]
    assert len(draws) == len(set(draws)) == 4
    nodes = list(cut.captured.graph_module.graph.nodes)
    assert {str(nodes[call].target) for call, *_ in draws} == {"aten.dropout.default"}


# ------------------------------------------------------------------------------- what is wanted


def test_inference_has_a_forward_only() -> None:
    model, x = Layers(3), torch.randn(4, 6)
    phased = phased_of(split_of(model, 3, x), model, SIZE, ((x,), {}), grad=False)
    assert phased.differentiable == phased.differentiated == frozenset()
    for stage in phased.stages:
        assert set(stage.phase_of.values()) == {"F"}
        assert (stage.saved, stage.tangents, stage.own_grads, stage.sent_grads) == ((), (), (), ())


def test_only_wanted_gradients_are_computed() -> None:
    """A gradient of the first result alone needs nothing of the last stages."""

    class TwoHeads(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            first = torch.tanh(self.layers[0](x))
            return first, torch.tanh(self.layers[1](first.detach()))

    model, x = TwoHeads(2), torch.randn(4, 6)
    cut = split_of(model, 2, x)
    first, last = (o.name for o in cut.captured.outputs)
    both = phased_of(cut, model, SIZE, ((x,), {}))
    assert both.differentiable == both.differentiated == {first, last}
    one = phased_of(cut, model, SIZE, ((x,), {}), differentiated=[first])
    assert one.differentiated == {first}
    assert [len(s.own_grads) for s in both.stages] == [2, 2]
    assert [len(s.own_grads) for s in one.stages] == [2, 0]
    assert set(one.stages[1].phase_of.values()) == {"F"}


def test_integer_results_are_not_differentiable() -> None:
    class Both(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            y = torch.tanh(self.layers[0](x))
            return y, y.argmax(-1), y.detach() * 2

    model, x = Both(1), torch.randn(4, 6)
    phased = phased_of(split_of(model, 2, x), model, SIZE, ((x,), {}))
    assert phased.differentiable == {phased.split.captured.outputs[0].name}


def test_shared_values_pass_their_gradients_on() -> None:
    """Each later holder adds its share to the sum and hands it to the holder before."""
    cut = cut_model("fan_out")
    (shared,) = [r.name for r in cut.routes.values() if len(r.consumers) == 2]
    stages = phased_model("fan_out", "none").stages
    assert [shared in s.tangents for s in stages] == [True, True, False]
    assert [shared in s.sent_grads for s in stages] == [False, True, True]


# ------------------------------------------------------------------------------- looks


@each_model
def test_strides_of_received_values_are_known(name: str) -> None:
    phased = phased_model(name, "full")
    strides = received_strides(phased)
    expected = set()
    for stage in phased.stages:
        expected |= {(n, stage.index) for n in stage.receives}
        expected |= {(f"grad {n}", stage.index) for n in stage.tangents}
    assert strides.keys() == expected
    for (what, _), stride in strides.items():
        spec = phased.split.routes[what.removeprefix("grad ")].spec
        assert len(stride) == len(spec.shape)


@each_model
@each_policy
def test_shapes_are_those_of_the_micro_batch(name: str, remat: str) -> None:
    phased = phased_model(name, remat)
    assert phased.size == SIZE
    for stage in phased.stages:
        groups, results = parts(stage), stage.results()
        pairs = [*zip(stage.receives, groups["receives"], strict=True)]
        pairs += zip(stage.returns, results["returns"], strict=True)
        pairs += zip(stage.tangents, groups["tangents"], strict=True)
        pairs += zip(stage.sent_grads, results["sent_grads"], strict=True)
        for n, value in pairs:
            spec = phased.split.routes[n].spec
            assert tuple(value.meta["val"].shape) == tuple(at_batch(s, SIZE) for s in spec.shape)
            assert value.meta["val"].dtype == spec.dtype


def test_cutting_changes_nothing() -> None:
    model, x = Layers(3), torch.randn(4, 6)
    cut = split_of(model, 3, x)
    before = str(cut)
    first = str(phased_of(cut, model, SIZE, ((x,), {}), remat="min-cut"))
    assert str(phased_of(cut, model, SIZE, ((x,), {}), remat="min-cut")) == first
    assert str(cut) == before
