"""One thread per worker, all at the same time: failures, leftovers, cores.

No test sleeps: tasks wait for one another through events.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from autopipe.runtime import workers
from autopipe.runtime.mailbox import AbortError, Mailbox
from autopipe.runtime.worker_threads import KeptThread, end_threads
from tests.support.worker_threads import threads_left

LIMIT = 10.0
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert threads_left(before) == []  # a thread of which nobody knows may take a moment to end


def nothing() -> None:
    """An abort that nobody needs."""


def test_every_task_runs_in_a_thread_of_its_own() -> None:
    together = threading.Barrier(3)
    seen: dict[int, str] = {}

    def task(index: int) -> None:
        together.wait(LIMIT)  # so all three are alive at once
        seen[index] = threading.current_thread().name

    workers.run_workers([lambda i=i: task(i) for i in range(3)], nothing, None)  # type: ignore[misc]
    assert seen == {i: f"autopipe-worker-{i}" for i in range(3)}


def test_a_single_task_needs_no_thread() -> None:
    seen: list[threading.Thread] = []
    workers.run_workers([lambda: seen.append(threading.current_thread())], nothing, None)
    assert seen == [threading.current_thread()]


@pytest.mark.parametrize("count", [1, 2])
def test_tasks_run_without_gradients_and_autocast(count: int) -> None:
    seen: list[tuple[bool, bool]] = []

    def task() -> None:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        workers.run_workers([task] * count, nothing, None)
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False)] * count


def test_tasks_use_as_many_threads_per_operator_as_their_caller() -> None:
    """Sums are split by that number: it is part of the numbers."""
    seen: list[int] = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            workers.run_workers([lambda: seen.append(torch.get_num_threads())] * 2, nothing, None)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 2, 2]


def test_the_first_failure_wins() -> None:
    """The second one comes of the abort that the first one caused."""
    aborted = threading.Event()

    def first() -> None:
        raise ValueError("the cause")

    def second() -> None:
        assert aborted.wait(LIMIT)
        raise RuntimeError("a consequence")

    for tasks in ([first, second], [second, first]):
        aborted.clear()
        with pytest.raises(ValueError, match="the cause"):
            workers.run_workers(tasks, aborted.set, None)


def test_a_failure_ends_everybody_who_waits() -> None:
    mailbox = Mailbox()
    ended: list[type[BaseException]] = []

    def waits(key: Any) -> None:
        try:
            mailbox.take(key)
        except AbortError:
            ended.append(AbortError)
            raise

    def fails() -> None:
        raise KeyError("gone")

    tasks = [lambda k=k: waits(("x", k, 0)) for k in range(3)]  # type: ignore[misc]
    with pytest.raises(KeyError, match="gone"):
        workers.run_workers([*tasks, fails], mailbox.abort, None)
    assert ended == [AbortError] * 3


def test_a_failure_keeps_its_traceback() -> None:
    def fails() -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here") as caught:
        workers.run_workers([fails, nothing], nothing, None)
    assert "fails" in [entry.name for entry in caught.traceback]


def test_a_task_that_exits_is_a_failure_too() -> None:
    def leaves() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        workers.run_workers([leaves, nothing], nothing, None)


def test_an_abort_alone_is_no_failure() -> None:
    """Whoever aborted knows why; the others just stop."""

    def stops() -> None:
        raise AbortError

    done: list[int] = []
    workers.run_workers([stops, lambda: done.append(1)], nothing, None)
    assert done == [1]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupted_caller_takes_its_workers_down() -> None:
    aborted = threading.Event()
    caller = threading.main_thread()
    if threading.current_thread() is not caller:
        pytest.skip("signals go to the main thread")

    def interrupts() -> None:
        signal.pthread_kill(int(caller.ident or 0), signal.SIGINT)
        assert aborted.wait(LIMIT)

    def waits() -> None:
        aborted.wait(LIMIT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run_workers([interrupts, waits], aborted.set, None)
        told = aborted.is_set()
    finally:
        signal.signal(signal.SIGINT, handler)
        aborted.set()
    assert told


# ------------------------------------------------------------------------------- kept threads


@pytest.fixture
def kept() -> Iterator[list[KeptThread]]:
    before = set(threading.enumerate())
    made = [KeptThread() for _ in range(3)]
    yield made
    end_threads(made)
    assert threads_left(before) == []


def threads_of(kept: list[KeptThread]) -> dict[int, threading.Thread]:
    """The threads that run the tasks of a call."""
    seen: dict[int, threading.Thread] = {}

    def task(index: int) -> None:
        seen[index] = threading.current_thread()

    tasks = [lambda i=i: task(i) for i in range(len(kept))]  # type: ignore[misc]
    workers.run_workers(tasks, nothing, None, kept)
    return seen


def test_a_worker_keeps_its_thread(kept: list[KeptThread]) -> None:
    first = threads_of(kept)
    assert len(set(first.values())) == 3
    assert threads_of(kept) == first
    some = threads_of(kept[1:])  # a program in which the first one has nothing to do
    assert some == {0: first[1], 1: first[2]}


def test_a_call_that_fails_ends_its_threads(kept: list[KeptThread]) -> None:
    first = threads_of(kept)

    def fails() -> None:
        raise ValueError("here")

    for _ in range(3):
        with pytest.raises(ValueError, match="here"):
            workers.run_workers([nothing, fails, nothing], nothing, None, kept)
        assert not any(t.is_alive() for t in first.values())
        first = threads_of(kept)
        assert threads_of(kept) == first


def test_a_call_that_is_aborted_keeps_them(kept: list[KeptThread]) -> None:
    first = threads_of(kept)

    def stops() -> None:
        raise AbortError

    workers.run_workers([stops] * 3, nothing, None, kept)
    assert threads_of(kept) == first


def test_a_call_within_a_worker_has_other_threads(kept: list[KeptThread]) -> None:
    inner: dict[int, threading.Thread] = {}
    outer: list[threading.Thread] = []
    barrier = threading.Barrier(3)

    def task(index: int) -> None:
        outer.append(threading.current_thread())
        barrier.wait(LIMIT)
        if index == 1:
            inner.update(threads_of(kept))
        barrier.wait(LIMIT)

    workers.run_workers([lambda i=i: task(i) for i in range(3)], nothing, None, kept)  # type: ignore[misc]
    assert len({*outer, *inner.values()}) == 6
    assert len(set(threads_of(kept).values())) == 3


def test_no_more_threads(kept: list[KeptThread], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks that have begun are aborted, the others do not run; the next call is as usual."""
    start, aborted, ran = threading.Thread.start, threading.Event(), list[int]()

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "autopipe-worker-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    def task(index: int) -> None:
        ran.append(index)
        assert aborted.wait(LIMIT)

    tasks = [lambda i=i: task(i) for i in range(3)]  # type: ignore[misc]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for places in (kept, None):
            aborted.clear()
            with pytest.raises(RuntimeError, match="can't start new thread"):
                workers.run_workers(tasks, aborted.set, None, places)
            assert aborted.is_set()
    assert 2 not in ran
    assert len(threads_of(kept)) == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("count", [50, pytest.param(5000, marks=pytest.mark.full)])
def test_an_interrupt_at_any_instant(kept: list[KeptThread], count: int) -> None:
    """Also while tasks are handed over: what was handed over ends, and the next call is right."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    instants, came = random.Random(0), 0
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(count):
            begun, ended = [], []  # type: ignore[var-annotated]

            def task(begun: list[int] = begun, ended: list[int] = ended) -> None:
                begun.append(1)
                ended.append(1)

            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, instants.random() * 4e-4))
                workers.run_workers([task] * 3, nothing, None, kept)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert len(ended) == 3
            except KeyboardInterrupt:
                came += 1
            assert len(begun) == len(ended)
            assert len(set(threads_of(kept).values())) == 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert came > 0


# ------------------------------------------------------------------------------- cores


def test_each_worker_runs_on_its_cores() -> None:
    own = os.sched_getaffinity(0)
    cores = [{core} for core in sorted(own)[:2]] * 2
    seen: dict[int, set[int]] = {}

    def task(index: int) -> None:
        seen[index] = os.sched_getaffinity(0)

    workers.run_workers([lambda i=i: task(i) for i in range(2)], nothing, cores)  # type: ignore[misc]
    assert seen == {0: cores[0], 1: cores[1]}
    assert os.sched_getaffinity(0) == own


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(cores: set[int], threads: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return make


@pytest.mark.parametrize(
    ("cores", "threads", "count", "expected"),
    [
        ({0, 1}, 1, 2, [{0}, {1}]),
        ({3, 5, 9}, 1, 2, [{3}, {5}]),
        ({0, 1, 2, 3}, 2, 2, [{0, 1}, {2, 3}]),
        ({0, 1, 2, 3, 4, 5}, 2, 3, [{0, 1}, {2, 3}, {4, 5}]),
        ({0}, 1, 2, None),  # too few: the system decides
        ({0, 1}, 2, 2, None),
        ({0, 1}, 1, 3, None),
        ({0, 1, 2, 3}, 1, 1, None),  # nobody to share with
    ],
)
def test_cores_are_shared_out_if_there_are_enough(
    machine: Any, cores: set[int], threads: int, count: int, expected: list[set[int]] | None
) -> None:
    machine(cores, threads)
    assert workers.cores_per_worker([CPU] * count) == expected


@pytest.mark.parametrize(
    ("cores", "current", "threads", "expected"),
    [
        ({0, 1}, 1, 1, {1}),
        ({0, 1, 2, 3}, 3, 2, {3, 0}),
        ({4, 5}, 0, 1, {4}),  # the caller has just been moved
        ({0}, 0, 1, {0}),
        ({0, 1}, 0, 3, None),
    ],
)
def test_workers_with_small_operators_share_the_callers_core(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    cores: set[int],
    current: int,
    threads: int,
    expected: set[int] | None,
) -> None:
    machine(cores, threads)
    monkeypatch.setattr(workers, "_current_core", lambda: current)
    found = workers.cores_per_worker([CPU] * 3, shared=True)
    assert found == (None if expected is None else [expected] * 3)
    assert workers.cores_per_worker([CPU], shared=True) is None


def test_the_system_tells_the_current_core() -> None:
    assert workers._current_core() in os.sched_getaffinity(0)


def test_cores_are_left_alone_where_a_gpu_works(machine: Any) -> None:
    machine({0, 1, 2, 3}, 1)
    assert workers.cores_per_worker([CPU, torch.device("cuda", 0)]) is None


def test_cores_are_left_alone_where_the_system_cannot_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers.cores_per_worker([CPU, CPU]) is None
