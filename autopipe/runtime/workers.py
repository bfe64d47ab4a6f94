"""One thread per device, for the length of one program.

Threads are started for each forward and each backward and are gone when it returns: starting one
costs less than 0.1 ms, and in exchange nothing outlives a step: there is nothing to shut down, to
copy or to pickle, and an exception leaves no thread behind. One device needs no thread at all.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from .mailbox import AbortError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def run(
    tasks: Sequence[Callable[[], None]], abort: Callable[[], None], cores: Sequence[set[int]] | None
) -> None:
    """Run `tasks` side by side and wait for all of them.

    Args:
        tasks: one per worker.
        abort: called once when a task fails; must make every other task end soon.
        cores: CPU cores for each worker, or None to leave that to the system.

    Raises:
        The exception of the task that failed first.
    """
    if len(tasks) == 1:
        with _bare():
            tasks[0]()
        return
    failures: list[BaseException] = []
    threads_per_call = torch.get_num_threads()

    def work(index: int) -> None:
        try:
            if cores is not None:
                os.sched_setaffinity(0, cores[index])
            # OpenMP counts per thread; sums are split by that count, so it is part of the numbers.
            torch.set_num_threads(threads_per_call)
            with _bare():
                tasks[index]()
        except AbortError:
            pass
        except BaseException as error:
            failures.append(error)
            abort()

    threads = [
        threading.Thread(target=work, args=(i,), name=f"autopipe-worker-{i}", daemon=True)
        for i in range(len(tasks))
    ]
    started = []
    try:
        for thread in threads:
            started.append(thread)
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C in the caller: take the workers down with it
        abort()
        for thread in started:
            if thread.ident is not None:
                thread.join()
        raise
    if failures:
        raise failures[0]


@contextmanager
def _bare() -> Iterator[None]:
    """No autograd and no autocast: generated programs spell out what these would do."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def cores_for(devices: Sequence[torch.device]) -> list[set[int]] | None:
    """A share of the CPU for each CPU worker, if there are enough cores for all of them.

    Workers on cores of their own stand in for devices: they do not take turns on one core while
    another is idle. With fewer cores than `workers × torch.get_num_threads()` the system decides.
    """
    if len(devices) < 2 or any(d.type != "cpu" for d in devices):
        return None
    if not hasattr(os, "sched_getaffinity"):
        return None
    available = sorted(os.sched_getaffinity(0))
    share = torch.get_num_threads()
    if share * len(devices) > len(available):
        return None
    return [set(available[i * share : (i + 1) * share]) for i in range(len(devices))]
