"""Clocks, files, threads, the state of random numbers: refused, or named in a warning."""

from __future__ import annotations

import datetime
import logging
import os
import pathlib
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopipe
from autopipe.errors import CaptureError

X = torch.randn(4, 4)


class Asks(nn.Module):
    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.b, self.ask = nn.Linear(4, 4), nn.Linear(4, 4), ask

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) * float(self.ask())


def compiled(ask: Callable[[], Any]) -> autopipe.Pipeline:
    return autopipe.compile(Asks(ask), devices=2, chunks=2, args=(X,))


CLOCKS: dict[str, Callable[[], Any]] = {
    "time": lambda: time.time(),
    "time_ns": lambda: time.time_ns() % 1000,
    "imported": lambda: perf_counter(),
    "monotonic": lambda: time.monotonic(),
    "process time": lambda: time.process_time(),
    "now": lambda: datetime.datetime.now().microsecond,
    "utc": lambda: datetime.datetime.now(datetime.timezone.utc).timestamp(),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_result_that_depends_on_the_time_is_refused(clock: str) -> None:
    with pytest.raises(CaptureError, match="computes with the time") as error:
        compiled(CLOCKS[clock])
    assert "test_outside_world.py:" in str(error.value)


def test_a_model_that_measures_its_time_is_warned_of() -> None:
    seen: list[float] = []

    def ask() -> float:
        start = time.perf_counter()
        seen.append(time.perf_counter() - start)
        return 2.0

    with pytest.warns(UserWarning, match=r"calls time.perf_counter \(.*test_outside_world.py:"):
        pipe = compiled(ask)
    torch.testing.assert_close(pipe(X), pipe.model(X))


def scale_file(folder: Path) -> Path:
    (folder / "scale").write_text("2.0")
    return folder / "scale"


WORLD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "open": (lambda p: open(p).read(), "io.open"),  # noqa: SIM115
    "pathlib": (lambda p: p.read_text(), "io.open"),
    "exists": (lambda p: os.path.exists(p), "os.stat"),
    "listdir": (lambda p: len(os.listdir(p.parent)), "os.listdir"),
    "cwd": (lambda p: len(os.getcwd()), "os.getcwd"),
    "process": (lambda p: os.getpid() % 3 + 1, "os.getpid"),
    "thread": (lambda p: len(threading.current_thread().name), "threading.get_ident"),
    "date": (lambda p: datetime.date.today().year, "datetime.date.today"),
}


@pytest.mark.parametrize("name", WORLD)
def test_what_is_outside_of_the_process_is_named(name: str, tmp_path: Path) -> None:
    ask, function = WORLD[name]
    path = scale_file(tmp_path)
    with pytest.warns(UserWarning, match=rf"forward calls {function} \(") as caught:
        compiled(lambda: ask(path))
    assert any(w.filename == __file__ for w in caught)


def test_logging_and_imports_are_no_questions() -> None:
    def ask() -> float:
        import colorsys

        logging.getLogger("test").info("the time is in every record")
        os.path.join(pathlib.PurePath("a"), "b")  # only computes a name
        warnings.warn("of the model's own", DeprecationWarning, stacklevel=1)
        return colorsys.rgb_to_hsv(0.5, 0.5, 0.5)[2]

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = compiled(ask)
    torch.testing.assert_close(pipe(X), pipe.model(X))


def forked() -> float:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return 1.0


own = torch.Generator()
STATE: dict[str, Callable[[], Any]] = {
    "manual_seed": lambda: torch.manual_seed(0) and 1.0,
    "seed": lambda: torch.seed() % 5,
    "fork_rng": forked,
    "get_rng_state": lambda: torch.get_rng_state().shape[0],
    "default_generator": lambda: torch.default_generator.manual_seed(3) and 1.0,
    "own generator": lambda: own.manual_seed(3) and 1.0,
    "cuda": lambda: torch.cuda.manual_seed_all(3) or 1.0,
}


@pytest.mark.parametrize("name", STATE)
def test_the_state_of_random_numbers_is_refused(name: str) -> None:
    with (
        torch.random.fork_rng(),
        pytest.raises(CaptureError, match="state of torch's random numbers") as error,
    ):
        compiled(STATE[name])
    assert "test_outside_world.py:" in str(error.value)


def test_checkpoint_keeps_the_state_of_random_numbers_itself() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = checkpoint(self.a, x, use_reentrant=False)
            return self.b(h.tanh())

    model = Kept()
    pipe = autopipe.compile(model, devices=2, chunks=2, args=(X,))
    torch.testing.assert_close(pipe(X), model(X))
