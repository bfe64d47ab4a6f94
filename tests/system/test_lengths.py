"""Sizes besides the batch that change from call to call: one more capture, then any size.

Covers autopipe/lengths.py, autopipe/traced_programs.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe import program_cache, traced_stages
from autopipe.errors import CaptureError, OptionError
from tests.support.agreement import assert_close as close_to

VOCABULARY, WIDTH = 13, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).view(-1, length, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(-1, length, WIDTH))


class Language(nn.Module):
    """A causal language model with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.layers = nn.Sequential(Attention(), nn.LayerNorm(WIDTH), Attention())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits = self.head(self.layers(x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The requests of all captures of the test."""
    found: list[Any] = []
    capture = program_cache.capture_with_costs

    def counted(request: Any, *args: Any) -> Any:
        found.append(request)
        return capture(request, *args)

    monkeypatch.setattr(program_cache, "capture_with_costs", counted)
    return found


def text(samples: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (samples, length))


def step_agrees(pipe: Any, model: nn.Module, *args: Tensor) -> None:
    """A training step of the pipeline gives the model's loss and gradients."""
    model.zero_grad()
    expected = model(*args)
    expected["loss"].backward()
    right = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    found = pipe(*args)
    found["loss"].backward()
    close_to(found["loss"], expected["loss"])
    close_to(found["logits"], expected["logits"])
    for name, p in model.named_parameters():
        close_to(p.grad, right[name])


def owners(pipe: Any) -> dict[str, int]:
    stages = pipe._programs.last[0].split.stages
    return {i.target: s.index for s in stages for i in s.held if i.kind.value == "parameter"}


def test_any_length_after_two_captures(captures: list[Any]) -> None:
    model = Language().double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    step_agrees(pipe, model, text(6, 9), text(6, 9))
    places = owners(pipe)
    for samples, length in ((6, 12), (6, 7), (4, 30), (6, 2), (3, 17), (1, 5), (6, 9)):
        ids = text(samples, length)
        step_agrees(pipe, model, ids, ids)
        assert owners(pipe) == places
    assert len(captures) == 2
    assert pipe.captured.lengths == ()  # the last call is of the first length


def test_a_length_that_is_marked_costs_one_capture(captures: list[Any]) -> None:
    model = Language().double()
    marks = {"ids": {1: "length"}, "labels": {1: "length"}}
    pipe = autopipe.compile(model, devices=2, chunks=2, dynamic=marks)
    for samples, length in ((6, 9), (6, 12), (5, 4)):
        step_agrees(pipe, model, text(samples, length), text(samples, length))
    assert len(captures) == 1
    assert [str(x.name) for x in pipe.captured.lengths] == ["length"]
    assert "B, length = ctx.sizes" in pipe.code
    assert "(add, [B*length, 8])" in pipe.code


def test_marks_of_dynamo_count(captures: list[Any]) -> None:
    model = Language().double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    for length in (9, 12):
        ids = text(6, length)
        torch._dynamo.mark_dynamic(ids, 1)
        step_agrees(pipe, model, ids, ids)
    assert len(captures) == 1


@pytest.mark.parametrize("kind", ["eval", "no_grad", "autocast"])
def test_modes_of_one_length(kind: str, captures: list[Any]) -> None:
    """Each mode has programs of its own; the capture is shared if the model's mode is the same."""
    model = Language()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    places = {}
    for length in (9, 12, 5):
        ids = text(6, length)
        if kind == "eval":
            model.train(length == 9)
        with (
            torch.set_grad_enabled(kind != "no_grad"),
            torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
        ):
            expected, found = model(ids, ids), pipe(ids, ids)
        tolerance = 0.02 if kind == "autocast" else 1e-5
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=tolerance)
        places = places or owners(pipe)
        assert owners(pipe) == places
    assert len(captures) == {"eval": 3}.get(kind, 2)


class Fixed(nn.Module):
    """Its forward turns the length into a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        for part in x.unbind(1):
            total = total + self.layer(part).tanh()
        return self.last(total)


def test_a_model_that_fixes_its_length_says_so_once(captures: list[Any]) -> None:
    model = Fixed().double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (3, 4, 5, 4):
            x = torch.randn(4, length, 4, dtype=torch.float64)
            close_to(pipe(x), model(x))
    said = [str(w.message) for w in caught if "dimension 1 of x" in str(w.message)]
    assert len(said) == 1
    assert "each new size costs a capture" in said[0]
    assert len(captures) <= 4


@pytest.mark.parametrize("error", [CaptureError("no"), LookupError("no"), TypeError()])
def test_a_capture_that_fails_with_symbols_only_is_one_with_numbers(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = program_cache.capture_with_costs

    def failing(request: Any, *args: Any) -> Any:
        if any(request.lengths):
            raise error
        return capture(request, *args)

    monkeypatch.setattr(program_cache, "capture_with_costs", failing)
    model = Language().double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    step_agrees(pipe, model, text(6, 9), text(6, 9))
    with pytest.warns(UserWarning, match="each new size costs a capture"):
        step_agrees(pipe, model, text(6, 12), text(6, 12))


@pytest.mark.parametrize("error", [CaptureError("no"), LookupError("no"), TypeError()])
def test_a_trace_that_fails_with_symbols_only_is_one_with_numbers(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = traced_stages.phases_by_size

    def failing(request: Any, *args: Any) -> Any:
        if any(m.is_symbolic for of in request.metadata.values() for m in of.values()):
            raise error
        return phases(request, *args)

    monkeypatch.setattr(traced_stages, "phases_by_size", failing)
    model = Language().double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    step_agrees(pipe, model, text(6, 9), text(6, 9))
    with pytest.warns(UserWarning, match="each new size costs a trace"):
        step_agrees(pipe, model, text(6, 12), text(6, 12))


def test_images_of_several_sizes(captures: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ).double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    for height, width in ((8, 8), (12, 8), (16, 16), (8, 12)):
        x = torch.randn(4, 3, height, width, dtype=torch.float64)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(pipe(x).square().sum(), list(model.parameters()))
        for a, b in zip(found, expected, strict=True):
            close_to(a, b)
    assert len(captures) <= 3  # height alone changes first, then both


def test_micro_batches_of_many_sizes_are_traced_three_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third size is symbolic, and serves all others but one sample."""
    traced = []
    phases = traced_stages.phases_by_size

    def counted(request: Any, *args: Any) -> Any:
        traced.append(dict(request.metadata))
        return phases(request, *args)

    monkeypatch.setattr(traced_stages, "phases_by_size", counted)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    for samples in (4, 6, 8, 10, 12, 20, 7):
        x = torch.randn(samples, 4, dtype=torch.float64)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(pipe(x).square().sum(), list(model.parameters()))
        for a, b in zip(found, expected, strict=True):
            close_to(a, b)
    assert len(traced) == 3


WRONG = {
    "no dict": [("ids", 1)],
    "no dimensions": {"ids": 1},
    "no number": {"ids": {"1": "length"}},
    "no identifier": {"ids": {1: "the length"}},
    "a word of Python": {"ids": {1: "for"}},
    "a name of the program": {"ids": {1: "ctx"}},
}


@pytest.mark.parametrize("dynamic", WRONG.values(), ids=WRONG.keys())
def test_marks_that_cannot_be_meant(dynamic: Any) -> None:
    with pytest.raises(OptionError, match="dynamic"):
        autopipe.compile(Language(), devices=2, chunks=2, dynamic=dynamic)


@pytest.mark.parametrize("dim", [0, 2, -3])
def test_marks_of_dimensions_that_cannot_be_lengths(dim: int) -> None:
    pipe = autopipe.compile(Language(), devices=2, chunks=2, dynamic={"ids": {dim: None}})
    with pytest.raises(OptionError, match="cannot be a length"):
        pipe(text(4, 5), text(4, 5))
