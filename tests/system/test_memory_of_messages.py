"""Messages between stages that are parts of one tensor: planned bytes are the measured ones.

Covers cost/message_memory.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.passes.cost import shared_messages, stage_bytes
from autopipe.passes.schedule import KINDS
from tests.support.programs import phased_of, split_of

BATCH, LENGTH, WIDTH, CHUNKS = 8, 6, 16, 4


class Parts(nn.Module):
    """Cut so that `later` gets parts of what `first` computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 3 * WIDTH)
        self.later = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).tanh().chunk(3, -1)
        return self.rest(q, k, v).square().mean()

    def rest(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.later(q) @ k.mT).softmax(-1) @ v


class OnePart(Parts):
    """Only one part goes on: it keeps the memory of all."""

    def rest(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.later(q).tanh()


class Join(nn.Linear):
    """A layer for two values, one below the other."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([a, b], 1)).tanh()


class PartsOfAGradient(Parts):
    """Later stages send back parts of one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.later = Join(WIDTH, WIDTH)

    def rest(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.later(q.exp(), k.sin())


class Passed(Parts):
    """A stage in the middle passes its parts of a value on."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def rest(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        middle = self.later(q).tanh() * k
        a, b = middle.chunk(2, 1)
        return self.last(a).tanh() * b * v[:, : LENGTH // 2]


MODELS: dict[type[Parts], tuple[str, ...]] = {
    Parts: ("later",),
    OnePart: ("later",),
    PartsOfAGradient: ("later",),
    Passed: ("later", "last"),
}
"""Model → the modules with which its stages start."""


def trained(model: nn.Module, cut_at: tuple[str, ...], **options: object) -> autopipe.Pipeline:
    """A pipeline after a training step."""
    pipe = autopipe.compile(
        model,
        devices=["cpu"] * (1 + len(cut_at)),
        chunks=CHUNKS,
        cut_at=cut_at,
        **options,  # type: ignore[arg-type]
    )
    pipe(torch.randn(BATCH, LENGTH, WIDTH)).backward()
    return pipe


@pytest.mark.parametrize("remat", ["none", "full", "min-cut"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_is_what_was_planned(kind: type[Parts], remat: str) -> None:
    pipe = trained(kind(), MODELS[kind], remat=remat)
    assert kind is OnePart or len(pipe.stages[1].inputs) > 1
    assert [s.peak for s in pipe.memory.stages] == [s.peak_saved_bytes for s in pipe.plan.stages]


@pytest.mark.parametrize(
    "schedule", [name for name, kind in KINDS.items() if kind.virtual_stages == 1]
)
def test_under_every_schedule(schedule: str) -> None:
    pipe = trained(Passed(), MODELS[Passed], remat="none", schedule=schedule)
    assert [s.peak for s in pipe.memory.stages] == [s.peak_saved_bytes for s in pipe.plan.stages]
    assert [d.peak for d in pipe.memory.devices] == [t.peak_saved_bytes for t in pipe.plan.totals]


def test_parts_of_a_gradient_are_queued_once() -> None:
    """Both gradients are parts of that of the joined value, twice as large as each."""
    model = PartsOfAGradient()
    cut = split_of(model, 2, torch.randn(BATCH, LENGTH, WIDTH))
    assert cut.stages[1].receives == ("exp", "sin")
    phased = phased_of(cut, model, 2, ((torch.randn(BATCH, LENGTH, WIDTH),), {}), remat="none")
    one = 2 * LENGTH * WIDTH * 4
    here, there = torch.device("cpu"), torch.device("meta")
    found = stage_bytes(phased.stages[0], shared_messages(phased, [here, here], 0))
    assert list(found.tangents.values()) == [2 * one, 0]
    assert shared_messages(phased, [here, there], 0) == (None, None, None)  # copies


def test_the_memory_of_a_projection_counts_once() -> None:
    """What stage 1 saves of a micro-batch, counted by hand: one projection, and its own values."""
    pipe = trained(Parts(), ("later",), remat="full")
    rows = BATCH // CHUNKS * LENGTH * 4
    assert pipe.memory.stages[1].peak == CHUNKS * rows * 3 * WIDTH
    assert pipe.plan.stages[1].peak_saved_bytes == CHUNKS * rows * 3 * WIDTH
