"""Run the workers of a forward, a backward or a step: one thread each, all at the same time.

A pipeline's workers keep their threads from step to step (`worker_threads`): what ATen keeps per
thread, such as plans of cuDNN and workspaces of cuBLAS, serves all steps. A step that fails ends
its threads, so nothing that it left in them reaches another step; the next one makes new ones. A
single worker runs in the caller's thread.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from .backends import autocast_types
from .mailbox import AbortError
from .thread_settings import ThreadSettings, traced
from .worker_threads import Job, KeptThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .worker_threads import WorkerThread


def run_workers(
    tasks: Sequence[Callable[[], None]],
    abort: Callable[[], None],
    cores: Sequence[set[int]] | None,
    kept: Sequence[KeptThread] | None = None,
) -> None:
    """Run tasks at the same time and wait for all of them.

    Args:
        tasks: one per worker.
        abort: called when a task fails, or the caller is interrupted, perhaps more than once; must
            make all other tasks end soon, and raise nothing.
        cores: CPU cores for each worker; None: those of the caller.
        kept: of each worker, what keeps its thread; None: the threads end with this call.

    Raises:
        The exception of the task that failed first; or the one that interrupted the caller, once
        all tasks have ended.
    """
    if len(tasks) == 1:
        with _plain_execution(), suppress(AbortError):
            tasks[0]()
        return
    failures: list[BaseException] = []
    places = [KeptThread() for _ in tasks] if kept is None else kept
    jobs = []
    for i, task in enumerate(tasks):
        settings = ThreadSettings.of_caller(None if cores is None else cores[i])
        jobs.append(Job(partial(_work, task, settings, failures, abort)))
    threads: list[WorkerThread] = []
    stop = False
    try:
        for i, job in enumerate(jobs):
            threads.append(places[i].take(f"autopipe-worker-{i}"))
            threads[i].run(job)
    except BaseException as error:  # the system allows no more threads, or an interrupt
        failures.append(error)
        stop = True
    try:
        _wait(jobs, abort, failures, stop)
    except BaseException:  # Ctrl-C once more, just where the last one is dealt with: do not wait
        abort()
        raise
    if failures or kept is None:
        while threads:
            threads.pop().end()
    while threads:
        places[len(threads) - 1].give_back(threads.pop())
    if failures:
        first = failures[0]
        failures.clear()  # the frames of the exceptions refer to the list
        try:
            raise first
        finally:
            del first


def _wait(
    jobs: Sequence[Job], abort: Callable[[], None], failures: list[BaseException], stop: bool
) -> None:
    """Wait until all jobs have ended.

    Args:
        jobs: of all workers.
        abort: see `run_workers`.
        failures: an exception that interrupts the caller becomes the first.
        stop: whether to abort them at once, and to cancel those that have not begun.
    """
    while True:
        try:
            if stop:
                abort()
                for job in jobs:
                    job.cancel()  # a thread may not have got it
            for job in jobs:
                job.wait()
            return
        except BaseException as error:  # Ctrl-C in the caller: end the workers, and go on waiting
            failures.insert(0, error)
            stop = True


def _work(
    task: Callable[[], None],
    settings: ThreadSettings,
    failures: list[BaseException],
    abort: Callable[[], None],
) -> None:
    """Run a worker's task, in the worker's thread, as if the thread were new."""
    try:
        settings.apply()
        with traced(), _plain_execution():
            settings.variables.run(task)
    except AbortError:
        pass
    except BaseException as error:
        failures.append(error)
        abort()


@contextmanager
def _plain_execution() -> Iterator[None]:
    """Disable autograd and autocast: generated programs contain the ops that these would add."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in autocast_types():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def cores_per_worker(
    devices: Sequence[torch.device], shared: bool = False
) -> list[set[int]] | None:
    """Assign separate cores to each CPU worker, so that no two share one while another is idle.

    Each operator releases the interpreter's lock. Where operators are so small that workers mostly
    wait for that lock, handing it to a thread on another core takes longer than they do.

    Args:
        devices: one per worker.
        shared: whether operators are that small: all workers get the caller's core, which is idle
            while they work.

    Returns:
        `torch.get_num_threads()` cores for each worker. None, which lets the operating system
        decide, if there are too few cores, if some worker is not a CPU worker, or if there is only
        one worker.
    """
    if len(devices) < 2 or any(d.type != "cpu" for d in devices):
        return None
    if not hasattr(os, "sched_getaffinity"):
        return None
    available = sorted(os.sched_getaffinity(0))
    count = torch.get_num_threads()
    if shared and count <= len(available):
        first = available.index(core) if (core := _current_core()) in available else 0
        return [set((available[first:] + available[:first])[:count])] * len(devices)
    if count * len(devices) > len(available):
        return None
    return [set(available[i * count : (i + 1) * count]) for i in range(len(devices))]


def _current_core() -> int:
    """The core that the calling thread runs on; -1 where the system does not tell."""
    return int(_core_finder()())


@cache
def _core_finder() -> Callable[[], int]:
    """The system's function that tells a thread's core, looked up once."""
    found: Callable[[], int] = getattr(ctypes.CDLL(None), "sched_getcpu", lambda: -1)
    return found
