"""Operators of other libraries that draw random numbers without the tag that says so."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import UnsupportedError
from autopipe.runtime import untagged_draws
from autopipe.runtime.untagged_draws import call_watched

CPU = torch.device("cpu")

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch's default generator": lambda x: x * torch.rand_like(x),
    "Python's random": lambda x: x * random.random(),
    "numpy.random": lambda x: x * float(numpy.random.rand()),
}


def watched(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call_watched(op, CPU, threading.Lock(), args, kwargs)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_refused_and_named(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"draws from {name}"):
        watched(DRAWS[name], torch.ones(3))


def test_what_draws_nothing_runs_once() -> None:
    seen: list[int] = []
    assert watched(lambda x, more: seen.append(x) or x + more, 3, more=4) == 7
    assert seen == [3]


def test_a_quiet_operator_is_soon_trusted_but_not_with_other_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[torch.device] = []
    states = untagged_draws._states
    monkeypatch.setattr(untagged_draws, "_states", lambda d: looked.append(d) or states(d))

    def op(x: Tensor, draws: bool) -> Tensor:
        return x * torch.rand(()) if draws else x

    for _ in range(untagged_draws.TRUSTED + 5):
        watched(op, torch.ones(2), False)
    assert len(looked) == 2 * untagged_draws.TRUSTED
    with pytest.raises(UnsupportedError):
        watched(op, torch.ones(2), True)


def test_a_quiet_operator_is_trusted_also_where_others_draw() -> None:
    """It must not run three times for ever because another stage has a dropout."""
    seen: list[int] = []
    draws = iter([True, False] * untagged_draws.TRUSTED)

    def op() -> int:
        seen.append(1)
        if next(draws, False):  # another thread's, in the first of the calls
            torch.rand(())
        return 5

    for _ in range(untagged_draws.TRUSTED):
        assert watched(op) == 5
    before = len(seen)
    assert watched(op) == 5
    assert len(seen) == before + 1
    assert before == 2 * untagged_draws.TRUSTED


def test_another_threads_draw_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """It moved the generator within one of the calls, but not in each."""
    calls = iter([True, False])
    assert watched(lambda: torch.rand(()) if next(calls) else 5) is not None
    calls = iter([True, True, False])
    assert watched(lambda: torch.rand(()) if next(calls) else 5) is not None
    monkeypatch.setattr(untagged_draws, "TRIES", 1)
    with pytest.raises(UnsupportedError):
        watched(lambda: torch.rand(()))


LIBRARY = torch.library.Library("test_untagged_draws", "FRAGMENT")


def dropout(name: str, *tags: torch.Tag) -> Any:
    """A dropout in an operator of its own, with a gradient that reads the mask off the result."""
    LIBRARY.define(f"{name}(Tensor x) -> Tensor", tags=tags)
    path = f"test_untagged_draws::{name}"
    LIBRARY.impl(name, lambda x: x * (torch.rand_like(x) > 0.5), "CompositeExplicitAutograd")
    torch.library.register_fake(path, torch.empty_like, lib=LIBRARY)
    torch.library.register_autograd(
        path,
        lambda ctx, gradient: gradient * (ctx.saved_tensors[0] != 0),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
        lib=LIBRARY,
    )
    return getattr(torch.ops.test_untagged_draws, name).default


HIDDEN = dropout("hidden", torch.Tag.pointwise)
TAGGED = dropout("tagged", torch.Tag.pointwise, torch.Tag.nondeterministic_seeded)


class Drops(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.op = op

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.op(x)
        return y, self.last(self.first(y).sin())


@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_dropout_without_the_tag(remat: str, chunks: int) -> None:
    """Its backward ran it again, with other numbers; the gradient was that of another mask."""
    pipe = autopipe.compile(Drops(HIDDEN), 2, chunks, remat=remat)
    with pytest.raises(UnsupportedError, match="but does not say so"):
        pipe(torch.randn(6, 8, requires_grad=True))


@pytest.mark.parametrize("remat", ["full", "none", "min-cut"])
def test_a_dropout_with_the_tag(remat: str) -> None:
    pipe = autopipe.compile(Drops(TAGGED), 2, 2, remat=remat)
    x = torch.randn(6, 8, requires_grad=True)
    y, z = pipe(x)
    z.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    assert 0 < (y == 0).sum() < 48
