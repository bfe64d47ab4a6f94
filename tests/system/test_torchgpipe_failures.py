"""torchgpipe's last promises: skipped values do not leak, and failures do not hang.

What is sent between stages is watched through weak references, whatever happens to the step: a
backward, none, or an exception. A failure surfaces once, in bounded time, and the next step is as
if nothing had been; nothing here waits for a time to pass.
"""

from __future__ import annotations

import copy
import functools
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import StageError
from autopipe.runtime.executor import Run
from autopipe.runtime.mailbox import Mailbox
from tests.support.agreement import assert_agrees
from tests.support.worker_threads import busy_threads, threads_left

pytestmark = pytest.mark.few(3)

STAGES, CHUNKS, BATCH = 3, 4, 8
LIMIT = 60.0
"""Seconds after which something counts as hanging; a step takes milliseconds."""


class Layered(nn.Module):
    """A layer and a look-up per stage; the first one's value is used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(STAGES))
        self.tables = nn.ModuleList(nn.Embedding(4, 16) for _ in range(STAGES))
        self.double()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        first = None
        for k, (layer, table) in enumerate(zip(self.layers, self.tables, strict=True)):
            x = torch.tanh(layer(x)) * table(index[:, k])
            first = x if first is None else first
        return x + first


X = torch.randn(BATCH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GOOD = torch.arange(BATCH * STAGES).view(BATCH, STAGES) % 4


def bad(*where: tuple[int, int]) -> Tensor:
    """Look-ups that fail in these (stage, micro-batch)es."""
    index = GOOD.clone()
    for stage, m in where:
        index[m * (BATCH // CHUNKS), stage] = 99
    return index


def fresh(remat: str = "full") -> autopipe.Pipeline:
    """A layer in each stage, traced."""
    pipe = autopipe.compile(Layered(), STAGES, CHUNKS, remat=remat)
    assert_agrees(pipe, X, GOOD)
    for k, stage in enumerate(pipe.stages):
        assert f"tables.{k}.weight" in stage.parameters
    skips = [b.name for b in pipe.stages[0].outputs if 2 in b.targets]
    assert len(skips) == 1, "the first layer's value crosses to the last stage"
    return pipe


compiled = functools.cache(fresh)
"""One for all tests: what happens to a step must not change the next."""


def within_the_limit(function: Callable[[], Any]) -> Any:
    """Call in a thread, so that a hang is a failure; what it raises is raised here."""
    ended: list[Any] = []

    def call() -> None:
        try:
            ended.append((function(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert ended, "it hangs"
    result, error = ended[0]
    if error is not None:
        raise error
    return result


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


# ------------------------------------------------------------------------------- lifetimes

Sent = dict[tuple[str, int, int], "weakref.ref[Tensor]"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """(value, to which stage, micro-batch) → every tensor that a stage sends to another."""
    seen: Sent = {}
    send = Run.send

    def watch(self: Run, what: str, source: int, to: int, m: int, tensor: Tensor) -> None:
        seen[what, to, m] = weakref.ref(tensor)
        send(self, what, source, to, m, tensor)

    monkeypatch.setattr(Run, "send", watch)
    return seen


def alive(sent: Sent) -> list[tuple[str, int, int]]:
    gc.collect()
    return [key for key, reference in sent.items() if reference() is not None]


def skip_of(pipe: autopipe.Pipeline) -> str:
    return next(b.name for b in pipe.stages[0].outputs if 2 in b.targets)


def test_without_gradients_a_skip_is_gone_after_its_last_use(
    sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last stage hands out micro-batch m, the skip of m-1 is no more."""
    pipe = compiled()
    skip, left, return_to_caller = skip_of(pipe), [], Run.return_to_caller
    sent.clear()

    def look(self: Run, what: str, m: int, tensor: Tensor) -> None:
        left.append(m and sent[skip, 2, m - 1]() is not None)
        return_to_caller(self, what, m, tensor)

    monkeypatch.setattr(Run, "return_to_caller", look)
    with torch.no_grad():
        pipe(X, GOOD)
    assert left == [0, False, False, False]
    assert alive(sent) == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_in_the_backward_a_skip_goes_with_its_micro_batch(
    remat: str, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the first stage has its gradients of micro-batch m, the skip of m-1 is no more."""
    pipe = compiled(remat)
    skip, left, accumulate = skip_of(pipe), {}, Run.accumulate
    sent.clear()
    result = pipe(X, GOOD)
    held = [sent[skip, 2, m]() is not None for m in range(CHUNKS)]
    assert held == [True] * CHUNKS, "the last stage keeps what it has received"

    def look(self: Run, name: str, stage: int, gradient: Tensor) -> None:
        if name.endswith("tables_0_weight"):
            m = len(left)  # gradients are accumulated in the order of the micro-batches
            left[m] = m and sent[skip, 2, m - 1]() is not None
        accumulate(self, name, stage, gradient)

    monkeypatch.setattr(Run, "accumulate", look)
    result.sum().backward()
    assert left == {0: 0, 1: False, 2: False, 3: False}
    assert alive(sent) == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_result_that_is_dropped_lets_go_of_all(remat: str, sent: Sent) -> None:
    pipe = compiled(remat)
    sent.clear()
    result = pipe(X, GOOD)
    assert alive(sent) != []
    del result
    assert alive(sent) == []


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_exception_that_is_kept_keeps_no_values(remat: str, stage: int, sent: Sent) -> None:
    """Its traceback leads through frames that had them."""
    pipe = compiled(remat)
    sent.clear()
    with pytest.raises(StageError) as caught:
        pipe(X, bad((stage, CHUNKS - 1)))
    assert sent
    assert alive(sent) == []
    assert caught.value.__cause__ is not None


def test_twenty_rounds_of_everything_leave_as_many_tensors() -> None:
    pipe = compiled()

    def everything() -> None:
        pipe(X, GOOD).sum().backward()
        pipe(X, GOOD)
        with torch.no_grad():
            pipe(X, GOOD)
        for stage in range(STAGES):
            with pytest.raises(StageError):
                pipe(X, bad((stage, 1)))
        pipe.zero_grad()

    counts = []
    for rounds in (1, 20):
        for _ in range(rounds):
            everything()
        gc.collect()
        counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("m", [0, CHUNKS - 1])
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_forward_fails_in_any_stage(stage: int, m: int) -> None:
    pipe = compiled()
    with pytest.raises(StageError) as caught:
        within_the_limit(lambda: pipe(X, bad((stage, m))))
    assert (caught.value.stage, caught.value.microbatch, caught.value.phase) == (stage, m, "F")
    assert isinstance(caught.value.__cause__, IndexError)
    assert [s.now for s in pipe.memory.stages] == [0] * STAGES
    assert_agrees(pipe, X, GOOD)


def backward_of(stage: int) -> str:
    """The function of its backward: all but the last stage recompute before."""
    return f"RBW_{stage}" if stage == STAGES - 1 else f"BW_{stage}"


def replace(
    pipe: autopipe.Pipeline, prefix: str, function: Callable[..., Any]
) -> Callable[[], Any]:
    """Replace a generated function until the returned one is called."""
    _, ready = pipe._programs.last
    names = ready.program.forward[0].__globals__
    (name,) = [n for n in names if n.startswith(f"{prefix}_b")]
    original = names[name]
    names[name] = lambda *args: function(original, *args)
    return lambda: names.update({name: original})


@pytest.mark.parametrize("call", [0, CHUNKS - 1])
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_backward_fails_in_any_stage(stage: int, call: int) -> None:
    pipe, calls = compiled(), []

    def fails(original: Callable[..., Any], *args: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            raise ArithmeticError("no")
        return original(*args)

    restore = replace(pipe, backward_of(stage), fails)
    loss = pipe(X, GOOD).sum()
    with pytest.raises(StageError, match="ArithmeticError: no") as caught:
        within_the_limit(loss.backward)
    assert (caught.value.stage, caught.value.microbatch) == (stage, call)
    assert [s.now for s in pipe.memory.stages] == [0] * STAGES
    restore()
    assert_agrees(pipe, X, GOOD)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_all_stages_fail_at_once_and_one_surfaces(way: str) -> None:
    """Each waits for the others before it fails. (The last stage is first in the backward: to have
    all of them at work, the first micro-batches pass.)"""
    pipe, barrier = compiled(), threading.Barrier(STAGES)
    restores, calls = [], [0] * STAGES

    def failing(stage: int) -> Callable[..., Any]:
        def fails(original: Callable[..., Any], *args: Any) -> Any:
            calls[stage] += 1
            distance = STAGES - 1 - stage if way == "forward" else stage
            if calls[stage] <= distance:  # those behind it need something to work on
                return original(*args)
            barrier.wait(LIMIT)
            raise ArithmeticError(f"of stage {stage}")

        return fails

    loss = pipe(X, GOOD).sum()
    for stage in range(STAGES):
        name = f"F_{stage}" if way == "forward" else backward_of(stage)
        restores.append(replace(pipe, name, failing(stage)))
    with pytest.raises(StageError, match=r"ArithmeticError: of stage \d") as caught:
        within_the_limit(partial(pipe, X, GOOD) if way == "forward" else loss.backward)
    assert f"of stage {caught.value.stage}" in str(caught.value)
    assert str(caught.value.__cause__) == f"of stage {caught.value.stage}"
    for restore in restores:
        restore()
    del loss
    assert [s.now for s in pipe.memory.stages] == [0] * STAGES
    assert_agrees(pipe, X, GOOD)


def test_bad_values_in_several_stages_and_micro_batches() -> None:
    pipe = compiled()
    wrong = [(0, 1), (1, 1), (2, 0), (2, 1)]
    with pytest.raises(StageError) as caught:
        within_the_limit(lambda: pipe(X, bad(*wrong)))
    assert (caught.value.stage, caught.value.microbatch) in wrong
    assert_agrees(pipe, X, GOOD)


class UsersError(Exception):
    """The user's own."""


def test_the_users_loss_fails() -> None:
    pipe = compiled()

    def step() -> None:
        result = pipe(X, GOOD)
        raise UsersError(f"a loss of {result.shape}")

    with pytest.raises(UsersError) as caught:
        within_the_limit(step)
    caught.value.__traceback__ = None  # which holds the frame that holds the result
    del caught
    gc.collect()
    assert [s.now for s in pipe.memory.stages] == [0] * STAGES
    assert_agrees(pipe, X, GOOD)


@pytest.mark.parametrize("where", ["loss", "parameter"])
def test_the_users_hook_fails_in_the_backward(where: str) -> None:
    """Of the loss: before the pipeline's backward; of a parameter: after it."""
    pipe = compiled()

    def hook(_: Tensor) -> None:
        raise UsersError(where)

    result = pipe(X, GOOD)
    loss = result.sum()
    handle = (result if where == "loss" else pipe.model.tables[1].weight).register_hook(hook)
    with pytest.raises(UsersError, match=where):
        within_the_limit(loss.backward)
    handle.remove()
    del result, loss
    gc.collect()
    assert [s.now for s in pipe.memory.stages] == [0] * STAGES
    assert_agrees(pipe, X, GOOD)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_an_interrupt_while_stages_run(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread, which waits; the middle stage goes on until it is told."""
    caller = threading.main_thread()
    if threading.current_thread() is not caller:
        pytest.skip("signals go to the main thread")
    told, abort = threading.Event(), Mailbox.abort
    waited: list[bool] = []

    def tells(self: Mailbox) -> None:
        abort(self)
        told.set()

    def interrupts(original: Callable[..., Any], *args: Any) -> Any:
        signal.pthread_kill(int(caller.ident or 0), signal.SIGINT)
        waited.append(told.wait(LIMIT))
        return original(*args)

    monkeypatch.setattr(Mailbox, "abort", tells)
    pipe = compiled()
    result = pipe(X, GOOD)
    restore = replace(pipe, "F_1" if way == "forward" else backward_of(1), interrupts)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pipe(X, GOOD) if way == "forward" else result.sum().backward()
    finally:
        signal.signal(signal.SIGINT, handler)
        told.set()
    assert waited == [True], "one call, ended by the abort"
    restore()
    del result
    assert [s.now for s in pipe.memory.stages] == [0] * STAGES
    assert_agrees(pipe, X, GOOD)


def test_a_step_after_a_failure_is_the_step_without_it() -> None:
    """Parameters, optimizer state and all."""
    runs = []
    for fails in (False, True):
        pipe = fresh()
        optimizer = torch.optim.AdamW(pipe.parameters(), 0.01)
        for _ in range(3):
            if fails:
                with pytest.raises(StageError):
                    pipe(X, bad((1, 2)))
            optimizer.zero_grad()
            pipe(X, GOOD).pow(2).mean().backward()
            optimizer.step()
        runs.append(copy.deepcopy(pipe.model.state_dict()))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
