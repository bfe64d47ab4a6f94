"""Ctrl-C at any instant of a capture, a step or a backward: it comes soon, and leaves no trace."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor, fx, nn

import autopipe
from autopipe.interrupts import deferred, is_deferred, raise_deferred, raise_interrupt
from tests.support.models import gpt2
from tests.support.process_state import differences, process_state
from tests.support.worker_threads import threads_left

if threading.current_thread() is not threading.main_thread():
    pytest.skip("signals go to the main thread", allow_module_level=True)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """An alarm is a Ctrl-C."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGALRM)}
    for s in before:
        signal.signal(s, signal.default_int_handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for s, handler in before.items():
            signal.signal(s, handler)


def interrupted(work: Callable[[], object], after: float) -> bool:
    """Run something with an alarm after some seconds; whether the alarm came through."""
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()).square().mean()


X = torch.linspace(-1, 1, 64).reshape(8, 8)


def compiled() -> nn.Module:
    return autopipe.compile(Net(), devices=2, chunks=2)


def step(pipe: nn.Module) -> list[Tensor]:
    """The loss and the gradients."""
    pipe.zero_grad()
    loss = pipe(X)
    loss.backward()
    return [loss.detach(), *(p.grad for p in pipe.parameters())]


def capture() -> nn.Module:
    """A pipeline whose first step is about to capture."""
    return compiled()


def ready() -> nn.Module:
    pipe = compiled()
    step(pipe)
    return pipe


def backward(pipe: nn.Module) -> Callable[[], object]:
    loss = pipe(X)
    return loss.backward


PLACES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Callable[[], object]]]] = {
    "capture": (capture, lambda pipe: lambda: pipe(X)),
    "step": (ready, lambda pipe: lambda: pipe(X)),
    "backward": (ready, backward),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.full)])
def test_after_an_interrupt_the_next_step_is_right(place: str, count: int) -> None:
    make, start = PLACES[place]
    threads = set(threading.enumerate())
    pipe = make()
    expected = step(ready())
    # Of several times the shortest, so that most alarms come before the work is done.
    seconds = min(timed(start(pipe)) for _ in range(1 if place == "capture" else 5))
    instants, came = random.Random(0), 0
    pipe = make()
    for _ in range(count):
        pipe = make() if place == "capture" else pipe
        work = start(pipe)
        before = process_state()
        came += interrupted(work, max(1e-6, instants.random() * seconds))
        assert list(differences(before, process_state())) == []
        for found, right in zip(step(pipe), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0)
    assert came > 0
    del pipe, work
    assert threads_left(threads) == []


def test_a_capture_of_many_layers_reacts_soon() -> None:
    """Not at its end: within half a second, wherever it is."""
    model, inputs = gpt2(layers=4)
    sent: list[float] = []

    def handler(signum: int, frame: object) -> None:
        sent.append(time.perf_counter())
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handler)
    args, kwargs = inputs(4)
    delays = []
    for after in (0.05, 0.4, 0.8, 1.3):
        pipe = autopipe.compile(model, devices=2, chunks=2)
        if interrupted(lambda pipe=pipe: pipe.capture(*args, **kwargs), after):
            delays.append(time.perf_counter() - sent[-1])
    assert delays
    assert max(delays) < 0.5


def test_a_timeout_is_not_swallowed() -> None:
    """An `Exception` of a handler waits where costs are estimated, which catches exceptions."""

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGALRM)
            assert is_deferred()
            return (x * 2).sum()

    def expired(signum: int, frame: object) -> None:
        raise TimeoutError("too slow")

    signal.signal(signal.SIGALRM, expired)
    pipe = autopipe.compile(Slow(), devices=1, chunks=2)
    with pytest.raises(TimeoutError, match="too slow"):
        pipe(X)


class Raises(nn.Module):
    """Its forward is interrupted; what it calls next must not run."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        with suppress(Exception):
            signal.raise_signal(signal.SIGINT)
            self.function(y)
            raise AssertionError("it went on")
        return y.sum()


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y + 1,
        lambda y: torch.cat([y, y]),
        lambda y: nn.functional.layer_norm(y, (8,)),
        lambda y: y[:, 0],
        lambda y: torch.nn.functional.dropout(y),
    ],
    ids=["operator", "cat", "layer_norm", "index", "dropout"],
)
def test_the_next_op_of_the_model_is_a_safe_place(function: Callable[[Tensor], Tensor]) -> None:
    before = process_state()
    pipe = autopipe.compile(Raises(function), devices=2, chunks=2)
    with pytest.raises(KeyboardInterrupt):
        pipe(X)
    assert list(differences(before, process_state())) == []


def test_only_interrupts_are_raised_below_code_that_catches_errors() -> None:
    def expired(signum: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, expired)
    with deferred():
        signal.raise_signal(signal.SIGALRM)
        raise_interrupt()
        with pytest.raises(TimeoutError):
            raise_deferred()
    with deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_interrupt()
    assert fx.Graph().create_node("placeholder", "x").name == "x"
