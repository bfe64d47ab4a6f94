"""One thread per worker, started for each forward and each backward.

Starting a thread costs less than 0.1 ms. In exchange, no thread outlives a step: there is nothing
to shut down, copy or pickle, and an exception leaves no thread behind. A single worker runs in the
caller's thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

import torch

from .backends import autocast_types
from .mailbox import AbortError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def run_workers(
    tasks: Sequence[Callable[[], None]], abort: Callable[[], None], cores: Sequence[set[int]] | None
) -> None:
    """Run tasks at the same time and wait for all of them.

    Args:
        tasks: one per worker.
        abort: called when a task fails, or the caller is interrupted; must make all other tasks
            end soon.
        cores: CPU cores for each worker; None: the operating system decides.

    Raises:
        The exception of the task that failed first; or the one that interrupted the caller, once
        all tasks have ended.
    """
    if len(tasks) == 1:
        with _plain_execution(), suppress(AbortError):
            tasks[0]()
        return
    failures: list[BaseException] = []
    threads_per_call = torch.get_num_threads()

    def work(index: int, latch: _Latch) -> None:
        try:
            if cores is not None:
                os.sched_setaffinity(0, cores[index])
            # OpenMP's setting is per thread. It splits sums, so results depend on it.
            torch.set_num_threads(threads_per_call)
            with _plain_execution():
                tasks[index]()
        except AbortError:
            pass
        except BaseException as error:
            failures.append(error)
            abort()
        finally:
            latch.open()

    running: list[tuple[threading.Thread, _Latch]] = []
    try:
        for i in range(len(tasks)):
            latch = _Latch()
            name = f"autopipe-worker-{i}"
            thread = threading.Thread(target=work, args=(i, latch), name=name, daemon=True)
            running.append((thread, latch))
            thread.start()
    except BaseException as error:
        if isinstance(error, RuntimeError):  # the system allows no more threads
            running.pop()
        failures.append(error)
        abort()
    while running:
        try:
            thread, latch = running[-1]
            latch.wait()
            thread.join()
            running.pop()
        except BaseException as error:  # Ctrl-C in the caller: end the workers, and go on waiting
            failures.insert(0, error)
            abort()
    if failures:
        first = failures[0]
        failures.clear()  # the frames of the exceptions refer to the list
        try:
            raise first
        finally:
            del first


class _Latch:
    """Tells the caller that a worker has ended.

    (An interrupted `Thread.join` of CPython 3.11 takes a running thread for one that has ended.)
    """

    def __init__(self) -> None:
        self._is_open = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        self._is_open = True
        self._lock.release()

    def wait(self) -> None:
        """Wait until it is open. It can be called again if an exception interrupted it."""
        while not self._is_open:
            self._lock.acquire(timeout=60)


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
