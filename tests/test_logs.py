"""The logger "autopipe": what it says, and the environment variable that shows it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe import logs, traced_stages

SCRIPT = """
import torch, autopipe
pipe = autopipe.compile(torch.nn.Linear(4, 4), devices=1, chunks=2)
pipe(torch.ones(4, 4))
"""


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The texts that are logged."""
    texts: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logger, handler = logging.getLogger("autopipe"), Kept()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield texts
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_captures_are_logged_with_reasons_and_times(said: list[str]) -> None:
    pipe = autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2)
    pipe(torch.ones(4, 4))
    pipe.eval()
    pipe(torch.ones(4, 4))
    kinds = [text.split(" in ")[0] for text in said]
    assert kinds == [
        *("captured", "cut", "capture 1, because: the first call", "traced"),
        *("captured", "cut", "capture 2, because: mode: training → evaluation", "traced"),
    ]
    assert all(" s" in text for text in said if " in " in text)
    before = len(said)
    pipe(torch.ones(4, 4))
    assert len(said) == before


@pytest.mark.parametrize(("level", "shown"), [("info", True), ("DEBUG", True), ("", False)])
def test_the_environment_shows_them(level: str, shown: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "AUTOPIPE_LOGS": level},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("autopipe: captured in 0." in done.stderr) is shown
    assert ("capture 1, because: the first call" in done.stderr) is shown
    assert done.stdout == ""


def test_an_unknown_level_is_a_warning() -> None:
    before = logging.getLogger("autopipe").handlers[:]
    with pytest.warns(UserWarning, match="AUTOPIPE_LOGS='loud': expected info or debug"):
        logs.configure({"AUTOPIPE_LOGS": "loud"})
    assert logging.getLogger("autopipe").handlers == before


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).tanh().mean(1)


def test_traces_for_each_shape_are_said_once(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = traced_stages.phases_by_size

    def failing(request: object, *args: object) -> object:
        if any(request.symbols(size) for size in request.metadata):  # type: ignore[attr-defined]
            raise TypeError("no integer")
        return trace(request, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(traced_stages, "phases_by_size", failing)
    model = Mean()
    pipe = autopipe.compile(model, devices=1, chunks=2, dynamic={"x": {1: "length"}})
    with pytest.warns(UserWarning, match=r"each new size costs a trace .*TypeError: no int"):
        pipe(torch.ones(4, 3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(4, 5, 4)
        torch.testing.assert_close(pipe(x), model(x))
    assert any("stages are traced for each shape" in text for text in said)
