"""Programs are kept up to a limit, the least recently used are forgotten, and memory stays bounded.

Covers autopipe/traced_programs.py, autopipe/traced_stages.py.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import autopipe
from autopipe.errors import OptionError
from autopipe.runtime.program import Program
from tests.support.phased import Layers

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """These tests capture more often than one should."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Scaled(Layers):
    def forward(self, x: Tensor, scale: str) -> Tensor:  # type: ignore[override]
        return super().forward(x) * float(scale)


def live(kind: type) -> int:
    gc.collect()
    return sum(type(x) is kind for x in gc.get_objects())


def captures(pipe: Any) -> int:
    return autopipe.explain_captures(pipe).count


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "32", None])
def test_what_is_no_size_of_a_cache(value: Any) -> None:
    with pytest.raises(OptionError, match="cache_size is the number of generated programs"):
        autopipe.compile(Layers(2), ["cpu"] * 2, 2, cache_size=value)


def test_the_least_recently_used_program_is_forgotten() -> None:
    model = Scaled(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=2)
    for scale in ("1", "2", "1", "3"):  # "2" is forgotten
        torch.testing.assert_close(pipe(X, scale), model(X, scale))
    assert captures(pipe) == 3
    pipe(X, "1")
    pipe(X, "3")
    assert captures(pipe) == 3
    torch.testing.assert_close(pipe(X, "2"), model(X, "2"))
    assert captures(pipe) == 4
    store = pipe._programs._models
    assert len(store._order) == len(store._keys) == 2
    assert len(store._names) == len(store._models) == 2  # one for each signature


def test_one_program_serves_training_and_evaluation_in_turns() -> None:
    model = Layers(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=1)
    for training in (True, False, True):
        pipe.train(training)
        torch.testing.assert_close(pipe(X), model(X))
    assert captures(pipe) == 3


def test_code_of_one_captured_model_is_bounded_too() -> None:
    model = Layers(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=2)
    for samples in (2, 4, 6, 8, 3, 5):
        torch.testing.assert_close(pipe(X[:samples]), model(X[:samples]))
        assert len(pipe._programs._models._order) <= 2
    assert captures(pipe) == 1
    compiled = pipe._programs.last[0]
    assert len(compiled.programs.codes) <= 2
    assert not compiled.programs.is_empty


def test_a_backward_outlives_its_program() -> None:
    model = Scaled(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=1)
    x = X.clone().requires_grad_()
    model(x, 1.0).square().sum().backward()
    expected = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    x.grad = None
    loss = pipe(x, 1.0).square().sum()
    forgotten = weakref.ref(pipe._programs.last[0])
    with torch.no_grad():
        pipe(X, 2.0)
    assert forgotten() not in pipe._programs._models._keys
    loss.backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    torch.testing.assert_close(found, expected)
    del loss
    gc.collect()
    assert forgotten() is None


class Two(Layers):
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:  # type: ignore[override]
        first = torch.tanh(self.layers[0](x)) * scale
        return first, torch.tanh(self.layers[1](first))


def test_a_backward_that_needs_another_program_after_its_own_was_forgotten() -> None:
    """Gradients of one output only: the backward traces a program for these."""
    model = Two(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=1)
    model(X)[0].sum().backward()
    expected = model.layers[0].weight.grad
    model.zero_grad()
    loss = pipe(X)[0].sum()
    pipe(X, 2.0)
    loss.backward()
    torch.testing.assert_close(model.layers[0].weight.grad, expected)


def test_code_that_backwards_generate_counts() -> None:
    pipe = autopipe.compile(Two(2), ["cpu"] * 2, 2, cache_size=1)
    for n in (0, 1, 0, 1):
        pipe(X)[n].sum().backward()
    pipe(X[:4])
    assert len(pipe._programs.last[0].programs.codes) == 1


def test_threads_share_a_small_cache() -> None:
    model = Scaled(2)
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=1)
    expected = {scale: model(X, scale) for scale in ("1", "2")}
    wrong: list[Any] = []

    def work(scale: str) -> None:
        try:
            for _ in range(3):
                torch.testing.assert_close(pipe(X, scale), expected[scale])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).mean(1)


class Fixed(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * int(x.shape[1])  # a number: one capture for each length


def counts_over(
    pipe: Any, model: nn.Module, lengths: range, every: int = 1
) -> list[tuple[int, int]]:
    """Live programs and graphs after each length, or after every so many."""
    found = []
    for length in lengths:
        x = torch.randn(4, length, 4)
        result = pipe(x)
        result.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(result, model(x))
        del result
        model.zero_grad()
        if length % every == 0:
            found.append((live(Program), live(fx.Graph)))
    return found


def test_memory_does_not_grow_with_programs_of_fixed_sizes() -> None:
    model = Fixed()
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=2)
    found = counts_over(pipe, model, range(3, 11))
    assert max(found[4:]) <= max(found[2:4])


@pytest.mark.full
@pytest.mark.parametrize(("kind", "lengths"), [(Sequence, 200), (Fixed, 20)])
def test_memory_does_not_grow_over_many_lengths(kind: type[Sequence], lengths: int) -> None:
    """`Fixed` is captured for each of them."""
    model = kind()
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, cache_size=4)
    found = counts_over(pipe, model, range(2, 2 + lengths), every=lengths // 20)
    assert len(found) == 20
    programs, graphs = (max(n) for n in zip(*found[10:], strict=True))
    assert programs <= max(p for p, _ in found[:10])
    assert graphs <= max(g for _, g in found[:10])
