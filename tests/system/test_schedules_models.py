"""Every schedule, named or a user's, gives GPipe's bits: models with one difficulty each.

Sizes are drawn, for each case the same ones every time. GPipe runs on as many devices as there are
stages, so that the model is cut in the same places: another cut may sum in another order.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autopipe
from autopipe.passes.schedule import Scheduled, schedule_for
from tests.support.early_schedules import EARLY
from tests.support.random_schedules import valid_schedules
from tests.support.schedule_models import CASES, Stack, floats

pytestmark = pytest.mark.usefixtures("alike_models_once", "each_stage_cut_alone")

REMAT: tuple[str | float, ...] = ("full", "none", "min-cut", 0.5)

Found = list[Tensor | None]


def one(pipe: nn.Module, inputs: tuple[Tensor, ...]) -> Found:
    """A training step: results, and the inputs' gradients."""
    torch.manual_seed(5)
    result = pipe(*inputs)
    values = list(result.values()) if isinstance(result, dict) else [result]
    values[0].backward()
    return [*(x.detach() for x in values), *(x.grad for x in inputs if x.requires_grad)]


def accumulated(pipe: nn.Module, inputs: tuple[Tensor, ...]) -> Found:
    """Three steps, of which the second has fewer samples, without `zero_grad`."""
    few = tuple(x.detach()[:3].requires_grad_(x.requires_grad) for x in inputs)
    return [*one(pipe, inputs), *one(pipe, few), *one(pipe, inputs)]


def in_bfloat16(pipe: nn.Module, inputs: tuple[Tensor, ...]) -> Found:
    """The forward under autocast."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        result = pipe(*inputs)
    loss = result["loss"] if isinstance(result, dict) else result
    loss.backward()
    return [loss.detach()]


def evaluated(pipe: nn.Module, inputs: tuple[Tensor, ...]) -> Found:
    return one(pipe.eval(), inputs)


def without_gradients(pipe: nn.Module, inputs: tuple[Tensor, ...]) -> Found:
    torch.manual_seed(5)
    with torch.no_grad():
        result = pipe(*inputs)
    return list(result.values()) if isinstance(result, dict) else [result]


def of_a_copy(pipe: nn.Module, inputs: tuple[Tensor, ...]) -> Found:
    """Of a copy that was made after a step, and of another one from a file."""
    pipe(*inputs)
    found: Found = []
    for again in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        again.zero_grad()
        found += [*one(again, inputs), *(p.grad for p in again.parameters())]
    return found


MODES = (one, one, accumulated, in_bfloat16, evaluated, without_gradients, of_a_copy)


def run(
    name: str, mode: Callable[[nn.Module, tuple[Tensor, ...]], Found], samples: int, **options: Any
) -> Found:
    make, inputs, more = CASES[name]
    model = make()
    found = mode(autopipe.compile(model, **options, **more), inputs(samples))
    return [*found, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_equal(found: Found, expected: Found) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None or b is None:
            assert a is b, i
        else:
            assert torch.equal(a, b), i


@pytest.mark.few(8)
@pytest.mark.parametrize("kind", EARLY)
@pytest.mark.parametrize("name", CASES)
def test_a_schedule_has_gpipes_bits(name: str, kind: str) -> None:
    draw = random.Random(f"{name} {kind}")
    v = draw.choice([1, 2, 3]) if kind == "interleaved" else None
    K, M = draw.randint(1, 3 if v == 3 else 4), draw.randint(1, 9)
    stages = schedule_for(kind, K, v).stages
    mode, remat = draw.choice(MODES), draw.choice(REMAT)
    samples = max(2, draw.choice([4, 7, M, 2 * M]))  # batch norm needs two
    options = {"chunks": M, "remat": remat}
    expected = run(name, mode, samples, devices=stages, **options)
    found = run(name, mode, samples, devices=K, schedule=kind, virtual_stages=v, **options)
    assert_equal(found, expected)


def without_r(made: Scheduled) -> list[list[tuple[str, int, int]]]:
    return [
        [(a.phase.replace("R", ""), a.stage, a.microbatch) for a in row if a.phase != "R"]
        for row in made.devices
    ]


@pytest.mark.parametrize("examples", [6, pytest.param(40, marks=pytest.mark.full)])
def test_any_valid_schedule_of_a_user_has_gpipes_bits(examples: int) -> None:
    """Any stage on any device, any of its phases merged or delayed, R placed or not."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        valid_schedules(),
        st.sampled_from(sorted(CASES)),
        st.sampled_from(REMAT),
        st.sampled_from([2, 5, 7]),
        st.booleans(),
    )
    def check(drawn: Any, name: str, remat: str | float, samples: int, placed: bool) -> None:
        made: Scheduled = drawn[0]
        M = made.chunks
        samples = max(samples, 2 * M if "norms" in name else M)  # so that there are M
        rows: Any = made.devices if placed else without_r(made)
        options = {"chunks": M, "remat": remat}
        expected = run(name, one, samples, devices=made.stages, **options)
        own = run(name, one, samples, devices=len(rows), schedule=lambda K, M: rows, **options)
        assert_equal(own, expected)

    check()


@pytest.mark.parametrize("remat", ["full", "none"])
def test_a_single_micro_batch_may_recompute_before_another_stages_forward(remat: str) -> None:
    """Then neither forwards nor micro-batches come first: the loss of one is that of all."""

    def early(K: int, M: int) -> list[list[str]]:
        forward = [a for m in range(M) for a in (f"F0.{m}", f"R0.{m}", f"F1.{m}", f"R1.{m}")]
        return [[*forward, *(a for m in range(M) for a in (f"BW1.{m}", f"BW0.{m}"))]]

    for chunks, samples in ((1, 1), (1, 4), (4, 1), (4, 4)):
        options = {"chunks": chunks, "remat": remat}
        expected = run("plain", one, samples, devices=2, **options)
        assert_equal(run("plain", one, samples, devices=1, schedule=early, **options), expected)


class Tagger(Stack):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(layer(x))
        return nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", EARLY)
def test_lengths_may_change(kind: str) -> None:
    stages = schedule_for(kind, 2).stages
    found = []
    for K, schedule in ((stages, "gpipe"), (2, kind)):
        model = Tagger()
        pipe = autopipe.compile(
            model, K, 3, schedule=schedule, dynamic={"x": {1: "n"}, "labels": {1: "n"}}
        )
        losses = []
        for length in (4, 7, 5, 4):
            draw = torch.Generator().manual_seed(length)
            x = torch.randn(7, length, 6, generator=draw)
            labels = torch.randint(0, 6, (7, length), generator=draw)
            losses += one(pipe, (x, labels))
        assert autopipe.explain_captures(pipe).count == 1
        found.append([*losses, *(p.grad for p in model.parameters())])
    assert_equal(*found)


class Scores(Stack):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = self.drop(layer(x))
        return x


def squared(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", EARLY)
def test_step_with_a_loss_function(kind: str) -> None:
    """`step` captures it with the model; to GPipe it is given as a part of the model."""

    class Scored(Scores):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
            return squared(super().forward(x), target)

    x, target = floats(7)[0], torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    stages = schedule_for(kind, 2).stages
    expected = Scored()
    whole = one(autopipe.compile(expected, devices=stages, chunks=4), (x, target))
    model = Scores()
    pipe = autopipe.compile(model, devices=2, chunks=4, schedule=kind, loss_fn=squared)
    torch.manual_seed(5)
    loss = pipe.step(x, target=target)
    own = [loss, *(p.grad for p in model.parameters())]
    assert_equal(own, [*whole, *(p.grad for p in expected.parameters())])
