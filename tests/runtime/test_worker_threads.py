"""Threads that are kept: who gets which, when they end, and what they keep.

No test sleeps: tasks wait for one another through events.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator

import pytest

from autopipe.runtime import worker_threads
from autopipe.runtime.worker_threads import Job, KeptThread, WorkerThread, end_threads
from tests.support.worker_threads import threads_left

LIMIT = 10.0


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert threads_left(before) == []


def thread_of(worker: WorkerThread) -> threading.Thread:
    """The thread in which a worker runs its jobs."""
    found: list[threading.Thread] = []
    job = Job(lambda: found.append(threading.current_thread()))
    worker.run(job)
    job.wait()
    return found[0]


# ------------------------------------------------------------------------------- jobs


def test_a_job_that_is_cancelled_does_not_run() -> None:
    ran: list[int] = []
    job = Job(lambda: ran.append(1))
    job.cancel()
    job.cancel()
    job.wait()
    job.run()  # the thread finds it later
    assert ran == []


def test_a_job_that_runs_is_not_cancelled() -> None:
    begun, end = threading.Event(), threading.Event()

    def task() -> None:
        begun.set()
        assert end.wait(LIMIT)

    job, worker = Job(task), WorkerThread("worker")
    worker.run(job)
    assert begun.wait(LIMIT)
    job.cancel()
    waiter = threading.Thread(target=job.wait, daemon=True)
    waiter.start()
    assert waiter.is_alive()
    end.set()
    waiter.join(LIMIT)
    assert not waiter.is_alive()


def test_whoever_waited_finds_nothing_of_the_task() -> None:
    class Tensor:
        pass

    worker = WorkerThread("worker")
    for _ in range(100):
        tensor = Tensor()
        kept = weakref.ref(tensor)
        job = Job(lambda tensor=tensor: None)  # type: ignore[misc]
        del tensor
        worker.run(job)
        job.wait()
        assert kept() is None


# ------------------------------------------------------------------------------- keeping


def test_a_thread_is_used_again() -> None:
    kept = KeptThread()
    worker = kept.take("first")
    thread = thread_of(worker)
    kept.give_back(worker)
    assert thread.name == "first"
    assert thread.daemon
    assert kept.take("second") is worker
    assert thread_of(worker) is thread


def test_who_finds_none_gets_another_for_once() -> None:
    kept = KeptThread()
    one, other = kept.take("one"), kept.take("other")
    threads = [thread_of(one), thread_of(other)]
    assert threads[0] is not threads[1]
    kept.give_back(other)
    kept.give_back(one)
    del one, other
    threads[0].join(LIMIT)
    assert not threads[0].is_alive()
    assert thread_of(kept.take("again")) is threads[1]


def test_a_thread_ends_when_it_is_dropped() -> None:
    kept = KeptThread()
    worker = kept.take("worker")
    thread = thread_of(worker)
    del worker
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert thread_of(kept.take("next")) is not thread


def test_a_thread_that_is_dropped_ends_after_its_task() -> None:
    begun, end, ended = threading.Event(), threading.Event(), threading.Event()

    def task() -> None:
        begun.set()
        assert end.wait(LIMIT)
        ended.set()

    worker, job = WorkerThread("worker"), Job(task)
    worker.run(job)
    assert begun.wait(LIMIT)
    del worker
    end.set()
    job.wait()
    assert ended.is_set()


def test_no_thread_is_kept_after_the_end() -> None:
    kept, other = KeptThread(), KeptThread()
    idle, busy = kept.take("idle"), other.take("busy")
    threads = [thread_of(idle), thread_of(busy)]
    kept.give_back(idle)
    del idle
    end_threads([kept, other])
    threads[0].join(LIMIT)
    assert not threads[0].is_alive()
    other.give_back(busy)
    del busy
    threads[1].join(LIMIT)
    assert not threads[1].is_alive()
    thread = thread_of(kept.take("afterwards"))  # for a loss that outlives its pipeline
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_what_keeps_threads_is_freed_without_a_collection() -> None:
    gc.disable()
    try:
        kept = KeptThread()
        worker = kept.take("worker")
        thread = thread_of(worker)
        kept.give_back(worker)
        dropped = [weakref.ref(kept), weakref.ref(worker)]
        del kept, worker
        assert [r() for r in dropped] == [None, None]
        thread.join(LIMIT)
        assert not thread.is_alive()
    finally:
        gc.enable()


def test_a_thread_that_has_died_is_replaced() -> None:
    kept = KeptThread()
    worker = kept.take("worker")
    worker.end()
    kept.give_back(worker)
    assert kept.take("another") is not worker


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has threads: yes
def test_a_forked_process_makes_its_own() -> None:
    kept = KeptThread()
    worker = kept.take("worker")
    thread_of(worker)
    kept.give_back(worker)
    del worker
    child = os.fork()
    if not child:
        code = 1
        try:
            thread_of(kept.take("child's"))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert thread_of(kept.take("new")).name == "worker"


def test_the_end_of_the_interpreter_waits_for_who_ends_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_threads, "AT_EXIT_SECONDS", 0.1)
    kept, end = KeptThread(), threading.Event()
    idle, busy = kept.take("idle"), WorkerThread("busy")
    thread, job = thread_of(idle), Job(lambda: end.wait(LIMIT) and None)
    kept.give_back(idle)
    busy.run(job)
    worker_threads._end_threads()
    assert not thread.is_alive()
    end.set()
    job.wait()
    assert kept.take("another") is not idle  # a handler at exit calls a pipeline
