"""Costs, stages and plans at other lengths: those of a pipeline captured at that length."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import autopipe

B, LENGTH = sympy.symbols("B length")


class Attention(nn.Module):
    """Two layers of attention: quadratic in the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            q, k, v = layer(h).chunk(3, -1)
            h = h + (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return h.mean()


class Images(nn.Module):
    """Convolutions, one of which halves the size: no polynomial in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).square().mean()


class Cross(nn.Module):
    """Attention of one sequence to another: two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.a(x) @ self.b(y).transpose(1, 2)).softmax(-1) @ y).mean()


def tokens(length: int) -> tuple[Tensor]:
    return (torch.randint(10, (6, length), generator=torch.Generator().manual_seed(length)),)


def images(length: int) -> tuple[Tensor]:
    return (torch.randn(6, 3, length, length),)


def pairs(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, length, 4), torch.randn(6, length + 3, 4)


MODELS: dict[str, tuple[type[nn.Module], Any, Any]] = {
    "attention": (Attention, tokens, {"tokens": {1: "length"}}),
    "images": (Images, images, {"x": {2: "height", 3: "width"}}),
    "two sequences": (Cross, pairs, {"x": {1: "left"}, "y": {1: "right"}}),
}


@pytest.mark.parametrize(("kind", "batch", "dynamic"), MODELS.values(), ids=MODELS)
def test_a_plan_is_that_of_its_length(kind: Any, batch: Any, dynamic: Any) -> None:
    """The independent truth: a pipeline that was captured at this length, with numbers."""
    model = kind()
    pipe = autopipe.compile(model, ["cpu"] * 2, 3, dynamic=dynamic)
    for length in (8, 13):
        pipe(*batch(length))
        found = pipe.plan
        static = autopipe.compile(model, ["cpu"] * 2, 3, plan=found)
        static(*batch(length))
        expected = static.plan
        for mine, other in zip(found.stages, expected.stages, strict=True):
            assert mine.flops == other.flops
            assert mine.activation_bytes == other.activation_bytes
            assert mine.memory_bytes == other.memory_bytes
            assert mine.times == other.times
        assert [c.nbytes for c in found.crossings] == [c.nbytes for c in expected.crossings]
    assert autopipe.explain_captures(pipe).count == 1


def test_stages_are_described_in_lengths() -> None:
    pipe = autopipe.compile(Attention(), ["cpu"] * 2, 3, dynamic={"tokens": {1: "length"}})
    pipe(*tokens(8))
    pipe(*tokens(13))
    first, second = pipe.stages
    received = next(t for t in second.inputs if t.kind == "activation" and len(t.shape) == 3)
    assert str(received).startswith(f"{received.name}: float32[B, length, ")
    assert received.nbytes.free_symbols == {B, LENGTH}
    assert received.at(2, {LENGTH: 13}).nbytes == received.nbytes.subs({B: 2, LENGTH: 13})
    for stage in (first, second):
        assert stage.cost.flops.free_symbols == {B, LENGTH}
    for length in (5, 8, 21):
        other = autopipe.compile(pipe.model, ["cpu"] * 2, 3, plan=pipe.plan)
        other(*tokens(length))
        for mine, fixed in zip((first, second), other.stages, strict=True):
            for fact in ("flops", "backward_flops", "moved_bytes", "saved_bytes"):
                expected = getattr(fixed.cost, fact)
                assert sympy.expand(getattr(mine.cost, fact).subs(LENGTH, length) - expected) == 0


def test_what_is_no_polynomial_is_described_at_its_length() -> None:
    pipe = autopipe.compile(Images(), ["cpu"] * 2, 3, dynamic={"x": {2: "height", 3: "width"}})
    pipe(*images(9))
    pipe(*images(12))
    (flops,) = (s.cost.flops for s in pipe.stages if "b.weight" in s.parameters)
    assert flops.free_symbols == {B}
    alone = autopipe.compile(pipe.model, ["cpu"] * 2, 3, plan=pipe.plan)
    alone(*images(12))
    assert flops == next(s.cost.flops for s in alone.stages if "b.weight" in s.parameters)


def test_lengths_of_the_example_stay_for_later() -> None:
    """Asking for a plan changes nothing that another part reads."""
    pipe = autopipe.compile(Attention(), ["cpu"] * 2, 3, dynamic={"tokens": {1: "length"}})
    pipe(*tokens(8))
    before = pipe.plan
    pipe(*tokens(13))
    assert pipe.plan.stages[0].flops > before.stages[0].flops
    assert pipe.stages is not None
    pipe(*tokens(8))
    assert pipe.plan == before
