"""Threads that outlive a step: a worker of a pipeline keeps its own, and what ATen keeps in it.

    KeptThread ──take──▶ WorkerThread ──run──▶ Job, in a thread of its own
        ▲                     │
        └─────give_back───────┘ after a task that went well; otherwise the thread ends

Nobody ever waits for a thread that is in use: whoever finds none gets another, for this time only.
So two calls at once, or a call within a worker, cannot wait for each other. A thread refers to its
inbox and to nothing else. It ends when its `WorkerThread` is dropped, wherever that happens.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PATIENCE = 0.2
"""Seconds after which a waiting caller looks whether Ctrl-C was pressed just before it waited."""

AT_EXIT_SECONDS = 1.0
"""How long the end of the interpreter waits for threads that work."""


class Job:
    """A task that a thread runs, unless it is cancelled before.

    Args:
        task: raises nothing.
    """

    def __init__(self, task: Callable[[], None]) -> None:
        self._task: Callable[[], None] | None = task
        self._decided: dict[str, str] = {}
        self._is_over = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def run(self) -> None:
        """Run the task; called by the thread."""
        task, self._task = self._task, None
        try:
            if task is not None and self._is_decided("run"):
                task()
        finally:
            del task  # whoever waits may expect that nothing of it is left
            self._is_over = True
            self._lock.release()

    def cancel(self) -> None:
        """Let the task not run if it has not begun. Called by whoever waits, as often as wanted."""
        if self._is_decided("cancel"):
            self._is_over, self._task = True, None

    def wait(self) -> None:
        """Wait until the task has ended. It can be called again if an exception interrupted it."""
        while not self._is_over:
            self._lock.acquire(timeout=PATIENCE)

    def _is_decided(self, wanted: str) -> bool:
        """Decide, if nobody has, what becomes of the task: one operation, which nothing divides."""
        return self._decided.setdefault("", wanted) == wanted


class WorkerThread:
    """A thread that runs jobs, one after the other, until this object is dropped.

    Args:
        name: of the thread.

    Raises:
        RuntimeError: the system allows no more threads.
    """

    def __init__(self, name: str) -> None:
        self._thread = _Thread(name)
        # The callback is no Python code, so no signal handler can raise in it.
        self._thread.owner = weakref.ref(self, self._thread.inbox.put)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether it can run a job: a forked process has no thread but the one that forked it."""
        return self._thread.is_alive() and not self._thread.is_ending

    def run(self, job: Job) -> None:
        """Let the thread run a job; returns at once."""
        self._thread.inbox.put(job)

    def end(self) -> None:
        """End the thread, which has no job, and wait until it has ended."""
        self._thread.end()
        self._thread.join()


class KeptThread:
    """Keeps the thread of one worker between its tasks, and makes it when it is needed."""

    def __init__(self) -> None:
        self._idle: list[WorkerThread] = []
        self._is_kept = True

    def take(self, name: str) -> WorkerThread:
        """Return a thread without a job: the kept one, or a new one if that is in use.

        Args:
            name: of a new one.

        Raises:
            RuntimeError: the system allows no more threads.
        """
        try:
            found = self._idle.pop()
        except IndexError:
            return WorkerThread(name)
        return found if found.is_ready else WorkerThread(name)

    def give_back(self, thread: WorkerThread) -> None:
        """Keep a thread for the next task, unless there is one already; the caller drops it.

        Args:
            thread: without a job. What was not given back ends when it is dropped.
        """
        if not self._idle:
            self._idle.append(thread)
        if not self._is_kept:  # perhaps since just now
            self._idle.clear()

    def end(self) -> None:
        """End the thread as soon as it has no job; later ones end after their task."""
        self._is_kept = False
        self._idle.clear()


def end_threads(kept: Iterable[KeptThread]) -> None:
    """End all of some threads; does not wait.

    Args:
        kept: of the workers of a pipeline.
    """
    for one in kept:
        one.end()


class _Thread(threading.Thread):
    """Runs what it finds in its inbox.

    Attributes:
        inbox: jobs; whatever else is in it ends the thread.
        owner: who puts itself into the inbox when it is dropped.
        is_ending: whether jobs in the inbox may come too late.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.inbox: SimpleQueue[object] = SimpleQueue()
        self.owner: weakref.ref[WorkerThread] | None = None
        self.is_ending = False

    def run(self) -> None:
        while isinstance(job := self.inbox.get(), Job):
            job.run()
            del job

    def end(self) -> None:
        """Let the thread end after the jobs that it has."""
        self.is_ending = True
        self.inbox.put(None)


@atexit.register
def _end_threads() -> None:
    """End all threads before the interpreter does: torch's own libraries may be gone later.

    A thread whose job takes longer is left to itself. It is a daemon: the process does not wait.
    """
    threads = [t for t in threading.enumerate() if isinstance(t, _Thread) and t.is_alive()]
    for thread in threads:
        thread.end()
    deadline = time.monotonic() + AT_EXIT_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
