"""What torch tells a forward about the process: later calls with other answers capture again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopipe

X = torch.randn(4, 4)


class Asks(nn.Module):
    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.b, self.ask = nn.Linear(4, 4), nn.Linear(4, 4), ask

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) * (3.0 if self.ask() else 1.0)


@contextmanager
def precision(_: Path) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def benchmarked(_: Path) -> Iterator[None]:
    with torch.backends.cudnn.flags(benchmark=not torch.backends.cudnn.benchmark):
        yield


@contextmanager
def tf32(_: Path) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def group(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@contextmanager
def seeded(_: Path) -> Iterator[None]:
    before = torch.initial_seed()
    torch.manual_seed(before + 1)
    yield
    torch.manual_seed(before)


@contextmanager
def threads(_: Path) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


QUESTIONS: dict[str, tuple[Callable[[], Any], Callable[[Path], AbstractContextManager[None]]]] = {
    "precision": (lambda: torch.get_float32_matmul_precision() == "high", precision),
    "cudnn.benchmark": (lambda: torch.backends.cudnn.benchmark, benchmarked),
    "allow_tf32": (lambda: torch.backends.cuda.matmul.allow_tf32, tf32),
    "is_initialized": (lambda: dist.is_initialized(), group),
    "imported name": (lambda: initialized(), group),
    "initial_seed": (lambda: torch.initial_seed() % 2, seeded),
    "an error": (lambda: rank(), group),
    "threads": (lambda: torch.get_num_threads() % 2, threads),
}


def rank() -> bool:
    """Without a group, `get_rank` raises; with one, it is asked, and raises later."""
    try:
        return dist.get_rank() == 0
    except ValueError:
        return False


initialized = dist.is_initialized


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_of_the_call_counts(name: str, tmp_path: Path) -> None:
    ask, other = QUESTIONS[name]
    model = Asks(ask)
    pipe = autopipe.compile(model, devices=2, chunks=2, args=(X,))
    before = model(X)
    torch.testing.assert_close(pipe(X), before)
    with other(tmp_path):
        torch.testing.assert_close(pipe(X), model(X))
        assert not torch.allclose(model(X), before)
    torch.testing.assert_close(pipe(X), before)


def test_an_answer_that_holds_within_the_forward_only_is_not_compared() -> None:
    """And so there is one capture."""

    def ask() -> bool:
        with torch.backends.cudnn.flags(enabled=False, benchmark=True):
            return bool(torch.backends.cudnn.benchmark)

    model = Asks(ask)
    pipe = autopipe.compile(model, devices=2, chunks=2, args=(X,))
    first = pipe.captured
    torch.testing.assert_close(pipe(X), model(X))
    assert pipe.captured is first


def test_a_capture_says_that_it_compiles() -> None:
    """As under torch.compile; no call captures again for it."""
    model = Asks(lambda: torch.compiler.is_compiling())
    pipe = autopipe.compile(model, devices=2, chunks=2, args=(X,))
    with torch.no_grad():
        expected = model(X) * 3.0
    torch.testing.assert_close(pipe(X), expected)


class Losses(nn.Module):
    """Asks torch for functions that a capture replaces while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        scale = 2.0 if torch.is_grad_enabled() else 1.0
        scores = self.norm(self.a(x)).log_softmax(-1)[None].expand(3, -1, -1)
        lengths = torch.full((x.shape[0],), 3), torch.full((x.shape[0],), 1)
        return nn.functional.ctc_loss(scores, targets, *lengths) * scale


def test_what_a_capture_replaces_costs_no_other_capture() -> None:
    model, x, targets = Losses(), torch.randn(6, 4), torch.randint(1, 4, (6, 1))
    pipe = autopipe.compile(model, devices=1, chunks=1)
    pipe(x, targets)
    first = pipe.captured
    pipe(x, targets)
    assert pipe.captured is first
