"""What a thread takes over from the one that starts it; one that is kept gets it for each task."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALLEST = sys.float_info.min
"""Half of it is 0 in a thread that flushes denormals (`torch.set_flush_denormal`)."""


class ThreadSettings(NamedTuple):
    """The settings of a thread that other threads take over.

    Attributes:
        per_operator: threads of an operator. OpenMP's setting is per thread. It splits sums, so
            results depend on it.
        flushes: whether denormal numbers are 0. The processor's setting is per thread, too.
        cores: on which it may run; None: the system does not tell.
        variables: context variables; a task has them for itself.
    """

    per_operator: int
    flushes: bool
    cores: set[int] | None
    variables: Context

    @staticmethod
    def of_caller(cores: set[int] | None = None) -> ThreadSettings:
        """The settings of a new thread that the calling thread starts.

        Args:
            cores: on which it will run; None: where the calling thread may.
        """
        if cores is None and hasattr(os, "sched_getaffinity"):
            cores = os.sched_getaffinity(0)
        inherits = getattr(sys.flags, "thread_inherit_context", False)  # from Python 3.14
        variables = copy_context() if inherits else Context()
        return ThreadSettings(torch.get_num_threads(), SMALLEST / 2 == 0, cores, variables)

    def apply(self) -> None:
        """Give them to the calling thread, as far as it has others."""
        if self.cores is not None and self.cores != os.sched_getaffinity(0):
            os.sched_setaffinity(0, self.cores)
        if self.per_operator != torch.get_num_threads():
            torch.set_num_threads(self.per_operator)
        if self.flushes != (SMALLEST / 2 == 0):
            torch.set_flush_denormal(self.flushes)


@contextmanager
def traced() -> Iterator[None]:
    """Trace and profile a task as `threading.settrace` and `setprofile` ask for new threads."""
    trace, profile = threading.gettrace(), threading.getprofile()
    if trace is not None:
        sys.settrace(trace)
    if profile is not None:
        sys.setprofile(profile)
    try:
        yield
    finally:
        nothing: Any = None
        if sys.getprofile() is not None:
            sys.setprofile(nothing)
        if sys.gettrace() is not None:
            sys.settrace(nothing)
