"""A pipeline steps while other threads compile and train: each gets what it would get alone."""

from __future__ import annotations

import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopipe
from autopipe import program_cache


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def batch() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64)


def compiles() -> None:
    """A new pipeline, and a step of it."""
    model, x = net(), batch()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    torch.testing.assert_close(pipe(x), model(x), rtol=1e-12, atol=1e-12)


def checkpoints() -> None:
    layer, x = nn.Linear(4, 4).double(), batch()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 6.0, dtype=torch.float64))


def applies() -> None:
    x = batch().requires_grad_()
    Cubed.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, 3 * x.detach() ** 2)


def hooks() -> None:
    x, seen = batch().requires_grad_(), []
    y = x * 2
    y.register_hook(seen.append)
    (found,) = torch.autograd.grad(y.sum(), [x])
    assert len(seen) == len(found) / 6 == 1


def draws() -> None:
    assert 0 <= random.random() < 1
    assert numpy.random.rand(3).shape == (3,)


def infers() -> None:
    with torch.inference_mode():
        assert batch().sum().is_inference()


def logs() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.Logger("torch.of_another_thread")
    logger.addHandler(handler)
    logger.warning("heard")
    assert len(records) == 1


OTHERS = [compiles, checkpoints, applies, hooks, draws, infers, logs]


@pytest.mark.parametrize("steps", [4, pytest.param(100, marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore")
def test_steps_beside_other_threads(steps: int) -> None:
    model = net()
    pipe = autopipe.compile(model, devices=2, chunks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stop, rounds = threading.Event(), dict.fromkeys(OTHERS, 0)
    errors: list[BaseException] = []

    def loop(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
                rounds[work] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(work,)) for work in OTHERS]
    for thread in threads:
        thread.start()
    try:
        for _ in range(steps):
            x = batch()
            expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            pipe(x).square().sum().backward()
            for p, right in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, right, rtol=1e-10, atol=1e-12)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert min(rounds.values()) > 0


def test_threads_that_call_one_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their first calls come at once: one captures the model, the others wait for it."""
    model, captures = net(), []
    capture = program_cache.capture_with_costs

    def counted(*args: Any, **kwargs: Any) -> Any:
        captures.append(threading.current_thread())
        return capture(*args, **kwargs)

    monkeypatch.setattr(program_cache, "capture_with_costs", counted)
    pipe = autopipe.compile(model, devices=2, chunks=2)
    batches = [batch() for _ in range(4)]
    expected = [model(x).detach() for x in batches]
    wrong: list[BaseException] = []
    barrier = threading.Barrier(len(batches))

    def work(x: Tensor, right: Tensor) -> None:
        try:
            barrier.wait()
            for _ in range(3):
                torch.testing.assert_close(pipe(x), right, rtol=1e-12, atol=1e-12)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=a) for a in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(captures) == 1


@pytest.mark.filterwarnings("ignore:TF32")
def test_a_call_while_another_thread_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.export` switches MKLDNN off for all threads: no reason to capture once more."""
    captures, exports, waits = [], threading.Event(), threading.Event()
    capture, turn = program_cache.capture_with_costs, program_cache.one_at_a_time

    def captured_while_another_waits(*args: Any, **kwargs: Any) -> Any:
        captures.append(threading.current_thread())
        with torch.backends.mkldnn.flags(enabled=not torch.backends.mkldnn.enabled):
            exports.set()
            assert waits.wait(60)
        return capture(*args, **kwargs)

    def waiting() -> Any:
        if exports.is_set():
            waits.set()
        return turn()

    monkeypatch.setattr(program_cache, "capture_with_costs", captured_while_another_waits)
    monkeypatch.setattr(program_cache, "one_at_a_time", waiting)
    pipe = autopipe.compile(net(), devices=2, chunks=2)
    first = threading.Thread(target=pipe, args=(batch(),))
    first.start()
    assert exports.wait(60)
    pipe(batch())
    first.join()
    assert captures == [first]


def test_another_thread_is_heard_during_an_export(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An export is silent in its own thread only: no switch of the process is thrown for it."""
    exports, spoken = threading.Event(), threading.Event()
    export, streams = torch.export.export, (sys.stdout, sys.stderr)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]

    def speak(whose: str) -> None:
        for name in ("torch._dynamo", "my.training"):
            logging.getLogger(name).warning("%s log of %s", whose, name)
        warnings.warn(f"{whose} warning", stacklevel=1)
        print(f"{whose} line", file=sys.stderr)

    def slow_export(*args: Any, **kwargs: Any) -> Any:
        exports.set()
        assert spoken.wait(60)
        speak("the exporter's")
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", slow_export)
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "my.training")]
    for logger in loggers:
        logger.addHandler(handler)
    pipe = autopipe.compile(net(), devices=["cpu"] * 2, chunks=2)
    thread = threading.Thread(target=pipe, args=(batch(),))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            thread.start()
            assert exports.wait(60)
            try:
                assert (sys.stdout, sys.stderr) == streams
                assert logging.root.manager.disable == 0
                assert all(logger.isEnabledFor(logging.WARNING) for logger in loggers)
                speak("another's")
            finally:
                spoken.set()
                thread.join()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert "another's warning" in [str(w.message) for w in caught]
    assert "the exporter's warning" not in [str(w.message) for w in caught]
    assert [r for r in records if "another's" in r] == [
        "another's log of torch._dynamo",
        "another's log of my.training",
    ]
    assert [r for r in records if "exporter's" in r] == ["the exporter's log of my.training"]
    assert "another's line\n" in capfd.readouterr().err
