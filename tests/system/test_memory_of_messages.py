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


class PartOfAParameter(Parts):
    """Both stages use a part of the first one's parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(100, WIDTH))
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions[:LENGTH]
        hidden = self.first(x + positions).tanh()
        return (self.later(hidden) * positions).square().mean()


class PartOfABuffer(Parts):
    """A part of a buffer passes through the middle stage, which uses it too."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(100, WIDTH))
        self.first = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[:LENGTH]
        hidden = self.first(x * rows).tanh()
        middle = self.later(hidden).tanh() * rows
        return (self.last(middle) * rows[:, :1]).square().mean()


class PartOfTheInput(Parts):
    """Both stages use parts of the caller's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH // 2, WIDTH // 2)
        self.later = nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        return (self.later(self.first(u).tanh()).tanh() * v).square().mean()


class PartsOfTheInputAndAll(PartOfTheInput):
    """The later stage gets the caller's tensor and, from the first, a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        hidden = self.first(u).tanh() * v
        rest = self.later(hidden).tanh() * v
        return (rest.repeat(1, 1, 2) * x).square().mean()


class PartOfAPassedGradient(Parts):
    """The middle stage sends back a part of the gradient that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def rest(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.last(torch.cat([self.later(q).tanh(), k], 1)).tanh()


class ManyUses(Parts):
    """One part of a value goes to both later stages, another only to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def rest(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.last((self.later(q) * v).tanh()) * v * k


MODELS: dict[type[Parts], tuple[str, ...]] = {
    Parts: ("later",),
    OnePart: ("later",),
    PartsOfAGradient: ("later",),
    Passed: ("later", "last"),
    PartOfAParameter: ("later",),
    PartOfABuffer: ("later", "last"),
    PartOfTheInput: ("later",),
    PartsOfTheInputAndAll: ("later",),
    PartOfAPassedGradient: ("later", "last"),
    ManyUses: ("later", "last"),
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
    if kind is not OnePart:
        assert max(len(stage.inputs) for stage in pipe.stages[1:]) > 1
    assert [s.peak for s in pipe.memory.stages] == [s.peak_saved_bytes for s in pipe.plan.stages]


@pytest.mark.parametrize(
    "schedule", [name for name, kind in KINDS.items() if kind.virtual_stages == 1]
)
@pytest.mark.parametrize("kind", [Passed, PartOfABuffer, PartOfAPassedGradient, ManyUses])
def test_under_every_schedule(kind: type[Parts], schedule: str) -> None:
    pipe = trained(kind(), MODELS[kind], remat="none", schedule=schedule)
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
    assert shared_messages(phased, [here, there], 0)[1:] == (None, None)  # copies


def found_at(kind: type[Parts], devices: str, k: int) -> dict[str, int | None]:
    """For each value that a stage receives, then each gradient ("d…"), the bytes of its memory.

    Args:
        kind: of the model.
        devices: a letter for each of three stages.
        k: the stage.
    """
    model, x = kind(), torch.randn(BATCH, LENGTH, WIDTH)
    cut = split_of(model, 3, x)
    phased = phased_of(cut, model, BATCH // CHUNKS, ((x,), {}), remat="none")
    places = [torch.device("cpu" if letter == "a" else "meta") for letter in devices]
    stage = phased.stages[k]
    names = [*stage.receives, *(f"d{name}" for name in stage.tangents)]
    found = shared_messages(phased, places, k)
    return {n: None if m is None else m.nbytes for n, m in zip(names, found, strict=True)}


PART = BATCH // CHUNKS * LENGTH * WIDTH * 4


def test_a_value_comes_from_the_stage_that_computed_it() -> None:
    """A stage between them, on another device, does not make it a copy."""
    assert found_at(ManyUses, "aba", 2) == {
        "getitem_1": 3 * PART,
        "getitem_2": 3 * PART,
        "linear_2": None,
        "dmean": None,
    }
    assert set(found_at(ManyUses, "abb", 2).values()) == {None, PART}  # two copies, and linear_2


def test_a_part_of_a_copied_gradient_keeps_the_copy() -> None:
    assert found_at(PartOfAPassedGradient, "bba", 0)["dgetitem_1"] == 2 * PART
    assert found_at(PartOfAPassedGradient, "bba", 1)["dcat"] is None
    assert found_at(PartOfAPassedGradient, "aba", 0)["dgetitem_1"] is None


def test_a_part_of_a_buffer_counts_where_it_is_copied() -> None:
    assert found_at(PartOfABuffer, "aba", 1)["slice_1"] is None
    assert found_at(PartOfABuffer, "aba", 2)["slice_1"] == 0


def test_the_memory_of_a_projection_counts_once() -> None:
    """What stage 1 saves of a micro-batch, counted by hand: one projection, and its own values."""
    pipe = trained(Parts(), ("later",), remat="full")
    rows = BATCH // CHUNKS * LENGTH * 4
    assert pipe.memory.stages[1].peak == CHUNKS * rows * 3 * WIDTH
    assert pipe.plan.stages[1].peak_saved_bytes == CHUNKS * rows * 3 * WIDTH
