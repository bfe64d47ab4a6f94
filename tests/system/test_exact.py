"""`exact=False`: parts of a shared parameter's gradient are added once a step, up to rounding."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.passes.schedule import KINDS, schedule_for
from autopipe.planning.plan_parts import EACH, ONCE
from autopipe.runtime.executor import Run
from tests.support.early_schedules import WithLoss, assert_same, step
from tests.support.models import MODELS
from tests.support.once import pure_passes_once

WEIGHT = "model.embedding.weight"
TOLERANCE = 1e-6
"""Of the largest entry, in float32."""


@pytest.fixture(scope="module", autouse=True)
def _once():
    with pure_passes_once():
        yield


class Ends(nn.Module):
    """One weight for the first and the last layer only, and a loss."""

    def __init__(self, width: int = 12, tokens: int = 20, *, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight
        self.head.weight.requires_grad_(not frozen)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def ids(samples: int = 8, length: int = 5) -> Tensor:
    return torch.randint(20, (samples, length), generator=torch.Generator().manual_seed(samples))


def eager(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    model = copy.deepcopy(model)
    args, kwargs = inputs
    model(*args, **kwargs).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def assert_near(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def check(model: nn.Module, inputs: Any, weight: str = WEIGHT, **options: Any) -> None:
    """The shared gradient is eager's up to rounding; all else has the bits of ``exact=True``."""
    expected = step(model, inputs, **options)
    found = step(model, inputs, exact=False, **options)
    assert_near(found[weight], expected[weight])
    assert_near(found.pop(weight), eager(model, inputs)[weight])
    del expected[weight]
    assert_same(found, expected)


@pytest.mark.few(4)
@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_of_two_and_of_three_stages(kind: str, remat: str) -> None:
    model, inputs = MODELS["tied"].make()
    for K, M, samples in ((2, 4, 4), (3, 4, 9), (2, 1, 3)):
        check(WithLoss(model), inputs(samples), devices=K, chunks=M, schedule=kind, remat=remat)


@pytest.mark.parametrize("kind", ["gpipe", "zb-v"])
def test_the_first_and_the_last_stage(kind: str) -> None:
    """Under zb-v they are on one device."""
    given = {"devices": 2 if kind == "zb-v" else 4, "chunks": 4, "schedule": kind}
    pipe = autopipe.compile(Ends(), exact=False, args=(ids(),), **given)
    (shared,) = [c for c in pipe.plan.crossings if c.kind == "parameter"]
    assert (shared.source, shared.targets) == (0, (3,))
    assert (pipe.plan.order.homes[3] == 0) == (kind == "zb-v")
    check(Ends(), ((ids(),), {}), "embedding.weight", **given)


def test_a_frozen_weight_has_no_gradient() -> None:
    for exact in (True, False):
        pipe = autopipe.compile(Ends(frozen=True), 2, 2, exact=exact, args=(ids(),))
        pipe(ids()).backward()
        assert pipe.model.embedding.weight.grad is None
        (shared,) = [c for c in pipe.plan.crossings if c.kind == "parameter"]
        assert (shared.gradient, shared.sent) == (None, ONCE)


@pytest.mark.parametrize("kind", ["gpipe", "zb-h1"])
def test_gradients_accumulate_over_calls_of_any_size(kind: str) -> None:
    """From the third size of micro-batches on, sizes are symbolic; lengths are from the start."""
    model, reference = Ends(), Ends()
    pipe = autopipe.compile(model, 3, 3, schedule=kind, exact=False, dynamic={"ids": {1: None}})
    batches = [ids(samples, length) for samples, length in ((6, 5), (7, 4), (4, 5), (1, 3))]
    for batch in batches:
        pipe(batch).backward()
        reference(batch).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_near(p.grad, q.grad), name
    assert autopipe.explain_captures(pipe).count == 1


def test_training_goes_on_alike() -> None:
    losses = []
    for exact in (True, False):
        model = Ends()
        pipe = autopipe.compile(model, 2, 4, schedule="1f1b", exact=exact)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        losses.append([])
        for n in range(5):
            loss = pipe(ids(8 + n))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_higher_derivatives() -> None:
    found = []
    for exact in (True, False):
        model = Ends()
        pipe = autopipe.compile(model, 2, 2, exact=exact)
        (first,) = torch.autograd.grad(pipe(ids()), [model.head.weight], create_graph=True)
        first.square().sum().backward()
        found.append(model.head.weight.grad)
    assert torch.equal(*found)


def test_verify_and_a_saved_pipeline() -> None:
    pipe = autopipe.compile(Ends(), 3, 4, exact=False)
    checked = pipe.verify(ids())
    assert checked.ok, checked
    copied = copy.deepcopy(pipe)
    copied(ids()).backward()
    pipe(ids()).backward()
    assert torch.equal(copied.model.head.weight.grad, pipe.model.head.weight.grad)


@pytest.mark.full
def test_inductor() -> None:
    model = Ends()
    pipe = autopipe.compile(model, 2, 2, exact=False, backend="inductor")
    pipe(ids()).backward()
    expected = eager(Ends(), ((ids(),), {}))["embedding.weight"]
    torch.testing.assert_close(model.head.weight.grad, expected)


class SparseEnds(Ends):
    """The gradient of the table is sparse in the first stage, dense in the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.sparse = True


def test_a_sparse_part_and_a_dense_one() -> None:
    model = SparseEnds()
    pipe = autopipe.compile(model, 2, 2, exact=False)
    pipe(ids()).backward()
    expected = eager(Ends(), ((ids(),), {}))["embedding.weight"]
    assert_near(model.head.weight.grad, expected)


# ------------------------------------------------------------------------------ traffic and memory


def sent_in_a_step(
    pipe: autopipe.Pipeline, batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """Bytes that stages send one another in a step, by value."""
    found: Counter[str] = Counter()
    send = Run.send

    def counting(run: Run, value: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        found[value] += tensor.nbytes
        send(run, value, source, to, m, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "send", counting)
        pipe(batch).backward()
    return found


@pytest.mark.parametrize("kind", ["gpipe", "zb-h1"])
def test_what_is_sent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient per micro-batch and stage, or none: parts are added when the step has ended."""
    M, found = 8, {}
    for exact in (True, False):
        pipe = autopipe.compile(Ends(), 2, M, schedule=kind, exact=exact)
        found[exact] = sent_in_a_step(pipe, ids(), monkeypatch)
    weight = "grad p_embedding_weight"
    assert found[True].pop(weight) == M * 4 * 20 * 12
    assert found[False] == found[True]


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_bytes_that_are_saved_at_most(kind: str, remat: str) -> None:
    pipe = autopipe.compile(Ends(), 2, 6, schedule=kind, remat=remat, exact=False)
    pipe(ids(12)).backward()
    pipe.memory.reset()
    pipe(ids(12)).backward()
    measured = [stage.peak for stage in pipe.memory.stages]
    assert measured == [stage.peak_saved_bytes for stage in pipe.plan.stages]
    of_devices = [device.peak for device in pipe.memory.devices]
    assert of_devices == [total.peak_saved_bytes for total in pipe.plan.totals]


def test_the_plans_crossings() -> None:
    for exact, often in ((True, EACH), (False, ONCE)):
        plan = autopipe.plan(Ends(), ["cpu"] * 2, 4, args=(ids(),), exact=exact)
        (shared,) = [c for c in plan.crossings if c.kind == "parameter"]
        assert shared.gradient == often
        assert f"960 B once a step, its gradient {often}" in str(plan)
        assert all(c.gradient is None for c in plan.crossings if c is not shared)


def test_a_large_table_needs_less_memory_at_its_owner(tmp_path: Any) -> None:
    """No queued copies of its gradient there; the last stage has its sum."""
    table = 4 * 10_000 * 12
    with torch.device("meta"):
        model, batch = Ends(tokens=10_000), torch.empty(16, 4, dtype=torch.long)
    chain, once = (
        autopipe.plan(model, ["cpu"] * 2, 8, args=(batch,), exact=exact, cut_at=["head"])
        for exact in (True, False)
    )
    assert [s.shared_copy_bytes for s in chain.stages] == [0, table]
    assert once.stages[0].peak_bytes <= chain.stages[0].peak_bytes - 2 * table
    assert once.stages[1].peak_bytes >= chain.stages[1].peak_bytes
    once.save(tmp_path / "plan.json")
    assert autopipe.Plan.load(tmp_path / "plan.json") == once


def test_every_schedule_has_a_plan() -> None:
    """Gradients of copies may wait as all gradients of parameters do (W)."""
    for kind in KINDS:
        plan = autopipe.plan(Ends(), ["cpu"] * 2, 4, args=(ids(),), schedule=kind, exact=False)
        assert len(plan.stages) == schedule_for(kind, 2).stages
        assert plan.step_seconds > 0
