"""The cut in time: who runs what, what is kept, and that the four phases give eager's bits.

Reachability is worked out here once more, from the graphs' edges alone.

Covers phases/assign_phases.py and phases/select_saved.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autopipe.passes._torch import storage_id
from autopipe.passes.ir.phased import StagePhases
from autopipe.passes.ir.values import B, InputKind, at_batch
from autopipe.passes.phases.cut import received_strides
from autopipe.runtime.random import MicroBatchContext
from tests.support.once import pure_passes_once
from tests.support.phased import (
    MODEL_NAMES,
    SIZE,
    Layers,
    cut_model,
    each_model,
    each_policy,
    every,
    parts,
    phase_nodes,
    phased_model,
    saved_in,
)
from tests.support.programs import calls, known, phased_of, split_of, tensors

pytestmark = pytest.mark.few(2)


@pytest.fixture(scope="module", autouse=True)
def _once() -> Iterator[None]:
    """Tracing does not depend on the policy."""
    with pure_passes_once():
        yield


# ------------------------------------------------------------------------------- reachability


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


@each_model
@each_policy
def test_phases_are_reachability(name: str, remat: str) -> None:
    for stage in every(name, remat):
        results, tangents = stage.results(), parts(stage)["tangents"]
        late = {n for n in calls(stage.graph) if above([n]) & set(tangents)}
        forward = above([*results["returns"], *results["updates"], *saved_in(stage)])
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


@each_model
def test_full_keeps_what_was_received_and_nothing_else(name: str) -> None:
    """But for old values of the buffers that F changes, if R reads them (GPipe, section 2.3)."""
    for stage in every(name, "full"):
        groups = parts(stage)
        for kept in saved_in(stage):
            if kept in groups["receives"]:
                continue
            assert kept.target is torch.ops.aten.clone.default
            assert kept.args[0] in groups["state"]
            source = groups["state"].index(kept.args[0])
            assert stage.state[source] in stage.updates


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
        made = [n for n in saved_in(none) if n.op != "placeholder"]
        fresh = [n for n in made if n.target is not torch.ops.aten.clone.default]
        assert bool(fresh) == bool(set(call_numbers(full, "F")) & set(call_numbers(full, "R")))
        repeated += len(fresh)
    assert repeated


def saved_bytes(stage: StagePhases) -> int:
    """Of distinct memory; parameters' own does not count."""
    values = [n.meta["val"] for n in saved_in(stage)]
    theirs = {storage_id(n.meta["val"]) for n in parts(stage)["state"]}
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
    names = [*stage.state, *stage.receives]
    holders = [*groups["state"], *groups["receives"]]
    ctx = MicroBatchContext(0, stage.draws, 0)
    env: dict[fx.Node, Any] = {groups["ctx"][0]: ctx}
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
        kept = {n: env[n] for n in saved_in(stage)}
        env = {groups["ctx"][0]: ctx, **kept}
        for holder, name in zip(groups["state"], stage.state, strict=True):
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
        buffers = {i.name for i in graph.held if i.kind is InputKind.BUFFER}
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
    values = {i: p.detach() for i, p in zip(stage.state, model.parameters(), strict=True)}
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


# ------------------------------------------------------------------------------- looks


@each_model
def test_strides_of_received_values_are_known(name: str) -> None:
    phased = phased_model(name, "full")
    strides = received_strides(phased, {B: SIZE})
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
