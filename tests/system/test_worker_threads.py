"""A pipeline's threads: the same ones for every step, none that stay, in every turn of its life."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import autopipe
from autopipe.errors import StageError
from autopipe.runtime.executor import Run
from tests.support.worker_threads import busy_threads, threads_left, workers

ROOT = Path(__file__).parents[2]
LIMIT = 30.0
X = torch.linspace(-1, 1, 64).reshape(8, 8)

Idents = list[dict[str, int]]
"""For each forward and backward, the threads of its workers by name."""


class OpError(Exception):
    """What the user's operator raises."""


BEFORE: set[threading.Thread] = set()
"""Threads that other tests' pipelines still keep."""

HOOK: list[Callable[[Tensor], object]] = []
"""What the operator below calls first."""


@torch.library.custom_op("autopipe_tests::hooked", mutates_args=(), tags=(torch.Tag.pointwise,))
def hooked(x: Tensor) -> Tensor:
    """A copy."""
    for hook in tuple(HOOK):
        hook(x)
    return x.clone()


@hooked.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Hooked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return hooked(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return hooked(gradient)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Hooked.apply(self.first(x).tanh())).square()


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_pipeline() -> Iterator[None]:
    HOOK.clear()
    BEFORE.clear()
    BEFORE.update(threading.enumerate())
    yield
    HOOK.clear()
    assert threads_left(BEFORE) == []


@pytest.fixture
def idents(monkeypatch: pytest.MonkeyPatch) -> Idents:
    found: Idents = []
    execute, work = Run.execute, Run._work

    def executing(self: Run, direction: str) -> None:
        found.append({})
        execute(self, direction)

    def working(self: Run, *args: Any) -> None:
        found[-1][threading.current_thread().name] = threading.get_ident()
        work(self, *args)

    monkeypatch.setattr(Run, "execute", executing)
    monkeypatch.setattr(Run, "_work", working)
    return found


def own_workers() -> list[threading.Thread]:
    """The threads of the test's pipelines."""
    return [t for t in workers() if t not in BEFORE]


def compiled(**options: Any) -> autopipe.Pipeline:
    return autopipe.compile(Net(), devices=2, chunks=2, **options)


def step(pipe: nn.Module) -> list[Tensor]:
    """The loss and the gradients."""
    pipe.zero_grad()
    loss = pipe(X).mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in pipe.parameters())]


def same(found: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, found, right))


def within_the_limit(function: Callable[[], Any]) -> None:
    """Call a function in a thread of its own; it must end soon, and well."""
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
    assert ended == [None]


# ------------------------------------------------------------------------------- step by step


def test_the_same_threads_serve_every_step(idents: Idents) -> None:
    pipe = compiled()
    for _ in range(3):
        step(pipe)
    with torch.no_grad():
        pipe(X)
    pipe.eval()(X[:6])  # another program
    assert set(idents[0]) == {"autopipe-worker-0", "autopipe-worker-1"}
    assert threading.get_ident() not in idents[0].values()
    assert idents == [idents[0]] * 8


def test_the_same_threads_serve_steps_in_one_go(idents: Idents) -> None:
    pipe = compiled(schedule="1f1b", loss_fn=lambda out, target: (out - target).square().mean())
    for _ in range(3):
        pipe.step(X, target=X)
    assert idents == [idents[0]] * 3
    assert len(set(idents[0].values())) == 2


def test_no_thread_before_the_first_step_nor_for_one_stage() -> None:
    pipe, single = compiled(), autopipe.compile(Net(), devices=1, chunks=2)
    pipe.capture(X)
    step(single)
    assert own_workers() == []
    step(pipe)
    assert len(own_workers()) == 2
    assert busy_threads(BEFORE) == []


def counts() -> tuple[int, int, int]:
    """Threads of Python, threads of the process, open files."""
    return threading.active_count(), *(len(os.listdir(f"/proc/self/{n}")) for n in ("task", "fd"))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.full)])
def test_many_steps_leave_nothing_more_than_one(steps: int) -> None:
    pipe = compiled()
    right = step(pipe)
    for _ in range(100):
        step(pipe)
    gc.collect()
    before, memory = counts(), resident_bytes()
    for n in range(steps):
        found = step(pipe)
        if n % 100 == 0:
            assert same(found, right)
    gc.collect()
    assert counts() == before
    assert resident_bytes() - memory < 8 << 20  # 10,000 steps that leave a kilobyte each: 10 MB


# ------------------------------------------------------------------------------- ends


def test_threads_end_with_their_pipeline_without_a_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        pipe = compiled()
        step(pipe)
        threads = own_workers()
        assert len(threads) == 2
        del pipe
        for thread in threads:
            thread.join(LIMIT)
        assert own_workers() == []
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_pipeline_that_is_dropped_after_a_failure(way: str) -> None:
    def fails(x: Tensor) -> None:
        raise OpError

    pipe = compiled()
    right = step(pipe)
    assert same(step(pipe), right)
    loss = pipe(X).mean()
    HOOK.append(fails)
    with pytest.raises(StageError):
        pipe(X) if way == "forward" else loss.backward()
    assert own_workers() == []
    HOOK.clear()
    assert same(step(pipe), right)
    HOOK.append(fails)
    with pytest.raises(StageError):
        pipe(X)
    threads = BEFORE
    del pipe, loss
    assert threads_left(threads) == []


def test_a_pipeline_that_is_dropped_in_the_middle_of_a_step() -> None:
    """The call itself holds it; once that has ended, nothing does."""
    begun, end = threading.Event(), threading.Event()

    def waits(x: Tensor) -> None:
        begun.set()
        assert end.wait(LIMIT)

    holder = [compiled()]
    step(holder[0])
    before = BEFORE
    HOOK.append(waits)
    user = threading.Thread(target=lambda: holder.pop()(X), daemon=True)
    user.start()
    assert begun.wait(LIMIT)
    assert holder == []
    gc.collect()
    assert len(own_workers()) == 2
    end.set()
    user.join(LIMIT)
    assert threads_left(before) == []


def test_a_loss_that_outlives_its_pipeline() -> None:
    """Its backward runs, and it keeps no thread, neither before nor after."""
    pipe = compiled()
    right = step(pipe)
    model, before = pipe.model, BEFORE
    loss, other = pipe(X).mean(), pipe(X).mean()
    del pipe
    assert threads_left(before) == []
    model.zero_grad()
    loss.backward()
    assert same([loss.detach(), *(p.grad for p in model.parameters())], right)
    assert threads_left(before) == []
    assert other.grad_fn is not None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_threads_of_their_own(how: str, idents: Idents) -> None:
    pipe = compiled()
    right = step(pipe)
    other = copy.deepcopy(pipe) if how == "deepcopy" else pickle.loads(pickle.dumps(pipe))
    assert len(own_workers()) == 2
    assert same(step(other), right)
    assert len(own_workers()) == 4
    assert set(idents[0].values()).isdisjoint(idents[-1].values())
    del pipe
    assert same(step(other), right)
    assert idents[-1] == idents[-3]


# ------------------------------------------------------------------------------- several callers


def test_two_threads_call_one_pipeline(idents: Idents) -> None:
    """Both are in the same stage at once, so neither waits for the other's threads."""
    pipe = compiled()
    right = pipe(X).detach()
    both = threading.Barrier(2)

    def calls() -> None:
        for _ in range(5):
            with torch.no_grad():
                assert torch.equal(pipe(X), right)

    with torch.no_grad():  # compiles what the threads call
        pipe(X)
    HOOK.append(lambda x: both.wait(LIMIT))
    users = [threading.Thread(target=within_the_limit, args=(calls,)) for _ in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join(LIMIT)
    assert not both.broken
    HOOK.clear()
    assert torch.equal(pipe(X), right)
    assert threads_left({*BEFORE, *pipeline_threads(idents)}) == []


def pipeline_threads(idents: Idents) -> list[threading.Thread]:
    """The threads of the last call."""
    return [t for t in workers() if t.ident in idents[-1].values()]


def test_a_pipeline_that_is_called_within_its_own_worker(idents: Idents) -> None:
    pipe, depth = compiled(), threading.local()
    right = step(pipe)
    with torch.no_grad():
        inner = pipe(X)
    nested: list[bool] = []

    def calls(x: Tensor) -> None:
        if not getattr(depth, "inside", False) and not nested:
            nested.append(True)
            with torch.no_grad():
                nested.append(torch.equal(pipe(X), inner))

    HOOK.append(calls)
    within_the_limit(lambda: step(pipe))
    assert nested == [True, True]
    HOOK.clear()
    assert same(step(pipe), right)
    assert threads_left({*BEFORE, *pipeline_threads(idents)}) == []


# ------------------------------------------------------------------------------- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_data_loader_forks_beside_the_threads(idents: Idents) -> None:
    pipe = compiled()
    right = step(pipe)
    loader: DataLoader[Any] = DataLoader(
        [X] * 4, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=LIMIT
    )
    for batch in loader:
        assert torch.equal(batch, X)
        assert same(step(pipe), right)
    assert idents == [idents[0]] * 10


def script(text: str) -> tuple[int, str, list[str]]:
    """Run a script that begins with a pipeline that has made a step.

    Returns:
        Its exit status, what it printed, and the lines of errors and warnings.
    """
    head = (
        "import gc, os, sys, threading, torch\n"
        "from tests.system.test_worker_threads import HOOK, X, compiled, same, step, workers\n"
        "torch.set_num_threads(1)\n"
        "pipe = compiled()\n"
        "right = step(pipe)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", head + text],
        env=environment,
        capture_output=True,
        text=True,
        timeout=4 * LIMIT,
        check=False,
    )
    progress = "autopipe: "  # printed where a capture takes long
    wrong = [line for line in done.stderr.splitlines() if not line.startswith(progress)]
    return done.returncode, done.stdout, wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    done = script(
        """
child = os.fork()
if not child:
    code = 1
    try:
        assert workers() == []
        assert same(step(pipe), right) and same(step(pipe), right)
        code = len(workers()) - 2
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert same(step(pipe), right)
assert len(workers()) == 2
"""
    )
    assert done == (0, "", [])


EXITS = {
    "idle": "",
    "idle, in a user's thread": """
user = threading.Thread(target=step, args=(pipe,))
user.start()
""",
    "in a step": """
begun = threading.Event()
def waits(x):
    begun.set()
    threading.Event().wait()
HOOK.append(waits)
threading.Thread(target=step, args=(pipe,), daemon=True).start()
begun.wait()
""",
    "in a handler at exit": """
import atexit
import autopipe.runtime.worker_threads as threads
def last():
    assert same(step(pipe), right)
    print("stepped")
atexit.register(last)
atexit.unregister(threads._end_threads)
atexit.register(threads._end_threads)  # runs before `last`
""",
    "by an exception in a step": """
import signal
def leave(signum, frame):
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
def kills(x):
    HOOK.clear()
    os.kill(os.getpid(), signal.SIGTERM)
HOOK.append(kills)
step(pipe)
raise AssertionError
""",
}


@pytest.mark.parametrize("when", EXITS)
def test_the_interpreter_ends(when: str) -> None:
    printed = "stepped\n" if when == "in a handler at exit" else ""
    assert script(EXITS[when]) == (0, printed, [])
