"""Faults under every schedule: one error in bounded time, nothing left, and a right next step."""

from __future__ import annotations

import functools
import gc
import random
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import StageError
from autopipe.passes.schedule import KINDS
from tests.support.worker_threads import busy_threads, threads_left

KINDS_OF_ALL = (*KINDS, "own")
LAYERS, DEVICES, CHUNKS, BATCH = 6, 3, 4, 8
FLAG = 99.0
LIMIT = 60.0
"""Seconds after which something counts as hanging; a step takes milliseconds."""


class UsersError(Exception):
    """The user's own."""


@torch.library.custom_op("autopipe_tests::refuses", mutates_args=(), tags=(torch.Tag.pointwise,))
def refuses(x: Tensor, flag: Tensor) -> Tensor:
    """A copy; an error where some flag is set."""
    if (flag == FLAG).any():
        raise UsersError("a flag is set")
    return x.clone()


@refuses.register_fake
def _(x: Tensor, flag: Tensor) -> Tensor:
    return torch.empty_like(x)


class Refusing(torch.autograd.Function):
    """Its backward fails where some flag is set."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flag: Tensor) -> Tensor:
        ctx.save_for_backward(flag)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (flag,) = ctx.saved_tensors
        return refuses(gradient, flag), None


class Model(nn.Module):
    """Layers with a look-up and a backward that can fail; the first one's value is used again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))
        self.tables = nn.ModuleList(nn.Embedding(4, 8) for _ in range(LAYERS))

    def forward(self, x: Tensor, index: Tensor, flags: Tensor) -> Tensor:
        first = None
        for k, (layer, table) in enumerate(zip(self.layers, self.tables, strict=True)):
            x = torch.tanh(layer(Refusing.apply(x, flags[:, k : k + 1]))) * table(index[:, k])
            first = x if first is None else first
        return F.dropout(x + first, 0.1).square().mean()


X = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(1))
GOOD = torch.arange(BATCH * LAYERS).view(BATCH, LAYERS) % 4
CALM = torch.zeros(BATCH, LAYERS)


def own(K: int, M: int) -> list[list[str]]:
    """Two stages per device, the last device first; each micro-batch before the next."""
    rows = []
    for down, up in ((k, 2 * K - 1 - k) for k in reversed(range(K))):
        turns = (("F", down), ("F", up), ("B", up), ("BW", down), ("W", up))
        rows.append([f"{letters}{stage}.{m}" for m in range(M) for letters, stage in turns])
    return rows


@functools.cache
def compiled(kind: str) -> tuple[autopipe.Pipeline, list[Tensor]]:
    """One for all tests of a kind (what happens to a step must not change the next); a step's loss
    and gradients."""
    schedule: Any = own if kind == "own" else kind
    pipe = autopipe.compile(Model(), devices=DEVICES, chunks=CHUNKS, schedule=schedule)
    return pipe, step(pipe)


def step(pipe: autopipe.Pipeline) -> list[Tensor]:
    pipe.zero_grad()
    torch.manual_seed(2)
    loss = pipe(X, GOOD, CALM)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in pipe.parameters())]  # later steps add to it


def assert_whole(kind: str) -> None:
    """Nothing is saved, and a step gives what it gave first."""
    pipe, expected = compiled(kind)
    gc.collect()
    assert [s.now for s in (*pipe.memory.stages, *pipe.memory.devices)] == [0] * (
        len(pipe.memory.stages) + DEVICES
    )
    for found, right in zip(step(pipe), expected, strict=True):
        assert torch.equal(found, right)


def within_the_limit(function: Callable[[], Any]) -> Any:
    """Call in a thread, so that a hang is a failure; what it raises is raised here."""
    ended: list[BaseException | None] = []

    def call() -> None:
        try:
            function()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert ended, "it hangs"
    if ended[0] is not None:
        raise ended[0]


@pytest.fixture(autouse=True)
def _nothing_works_on() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert busy_threads(before) == []


@pytest.fixture(scope="module", autouse=True)
def _threads_end_with_their_pipelines() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    compiled.cache_clear()
    assert threads_left(before) == []


def a_step(pipe: autopipe.Pipeline, index: Tensor = GOOD, flags: Tensor = CALM) -> None:
    pipe(X, index, flags).backward()


@pytest.mark.parametrize("kind", KINDS_OF_ALL)
def test_a_forward_fails_in_any_stage(kind: str) -> None:
    pipe, _ = compiled(kind)
    for layer in range(LAYERS):
        m = (layer + len(kind)) % CHUNKS
        index = GOOD.clone()
        index[m * (BATCH // CHUNKS), layer] = 99
        kept = weakref.ref(index)
        with pytest.raises(StageError) as caught:
            within_the_limit(functools.partial(a_step, pipe, index))
        stage = next(
            k for k, s in enumerate(pipe.stages) if f"tables.{layer}.weight" in s.parameters
        )
        assert (caught.value.stage, caught.value.microbatch) == (stage, m)
        del caught, index
        gc.collect()
        assert kept() is None
    assert_whole(kind)


@pytest.mark.parametrize("kind", KINDS_OF_ALL)
def test_a_backward_fails_in_any_stage(kind: str) -> None:
    pipe, _ = compiled(kind)
    for layer in range(1, LAYERS):  # the batch itself gets no gradient
        m = (layer + len(kind)) % CHUNKS
        flags = CALM.clone()
        flags[m * (BATCH // CHUNKS), layer] = FLAG
        with pytest.raises(StageError, match="a flag is set") as caught:
            within_the_limit(functools.partial(a_step, pipe, GOOD, flags))
        assert caught.value.microbatch == m
        assert isinstance(caught.value.__cause__, UsersError)
        del caught
    assert_whole(kind)


def replaced(
    pipe: autopipe.Pipeline, letter: str, stage: int, function: Callable[..., Any]
) -> Callable[[], None]:
    """Replace the generated functions with a phase of a stage until the returned one is called."""
    _, ready = pipe._programs.last
    names = (*ready.program.step, *ready.program.forward)[0].__globals__
    pattern = re.compile(rf"F?R?B?W?_{stage}_b")
    wanted = [n for n in names if pattern.match(n) and letter in n.split("_")[0]]
    assert wanted
    before = {n: names[n] for n in wanted}
    for n in wanted:
        names[n] = functools.partial(function, before[n])
    return lambda: names.update(before)


@pytest.mark.few(6)
@pytest.mark.parametrize("letter", "FRBW")
@pytest.mark.parametrize("kind", KINDS_OF_ALL)
def test_any_phase_fails_at_any_call(kind: str, letter: str) -> None:
    pipe, _ = compiled(kind)
    for stage in range(len(pipe.stages)):
        calls: list[int] = []

        def fails(original: Callable[..., Any], *args: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 1 + len(kind) % CHUNKS:
                raise ArithmeticError("no")
            return original(*args)

        restore = replaced(pipe, letter, stage, fails)
        try:
            with pytest.raises(StageError, match="ArithmeticError: no") as caught:
                within_the_limit(lambda: a_step(pipe))
        finally:
            restore()
        assert caught.value.stage == stage
        del caught
    assert_whole(kind)


@pytest.mark.parametrize("where", ["loss", "parameter"])
@pytest.mark.parametrize("kind", KINDS_OF_ALL)
def test_a_users_hook_fails(kind: str, where: str) -> None:
    pipe, _ = compiled(kind)

    def hook(_: Tensor) -> None:
        raise UsersError(where)

    loss = pipe(X, GOOD, CALM)
    handle = (loss if where == "loss" else pipe.model.layers[2].weight).register_hook(hook)
    with pytest.raises(UsersError, match=where):
        within_the_limit(loss.backward)
    handle.remove()
    del loss
    assert_whole(kind)


@pytest.mark.parametrize("kind", KINDS_OF_ALL)
def test_a_loss_that_is_dropped_leaves_nothing(kind: str) -> None:
    pipe, _ = compiled(kind)
    pipe(X, GOOD, CALM)
    assert_whole(kind)


# ----------------------------------------------------------------------------------- interrupts


@pytest.fixture
def _an_alarm_is_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def steps_for(pipe: autopipe.Pipeline, seconds: float) -> None:
    """Steps until an alarm interrupts them."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while True:
        a_step(pipe)


@pytest.mark.usefixtures("_an_alarm_is_ctrl_c")
@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", KINDS_OF_ALL)
def test_an_interrupt_at_any_instant_of_a_step(kind: str, count: int) -> None:
    pipe, _ = compiled(kind)
    instants = random.Random(kind)
    for _ in range(count):
        with pytest.raises(KeyboardInterrupt):
            steps_for(pipe, 10 ** instants.uniform(-4.5, -1.5))
        assert_whole(kind)


@pytest.mark.usefixtures("_an_alarm_is_ctrl_c")
@pytest.mark.parametrize("kind", KINDS_OF_ALL)
def test_an_interrupt_ends_stages_that_wait(kind: str) -> None:
    """It comes while the stage in the middle computes and all others wait for it."""
    pipe, _ = compiled(kind)
    caller = threading.main_thread().ident or 0
    calls: list[int] = []

    def interrupts(original: Callable[..., Any], *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.pthread_kill(caller, signal.SIGALRM)
        return original(*args)

    restore = replaced(pipe, "B", 1, interrupts)
    try:
        with pytest.raises(KeyboardInterrupt):
            a_step(pipe)
    finally:
        restore()
    assert_whole(kind)
