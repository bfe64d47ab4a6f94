"""Let a `TorchDispatchMode` around a call see the ops that workers run in their own threads."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from autopipe.passes._torch import TorchDispatchMode
from autopipe.passes._torch_modes import dispatch_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager


class _InWorker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes a worker's ops to a mode of the caller, for one worker at a time.

    A mode keeps state (`FlopCounterMode` adds up), which threads must not change together.
    """

    def __init__(self, mode: Any, lock: threading.RLock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode, self._lock = mode, lock

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with self._lock:
            return self._mode.__torch_dispatch__(func, types, args, kwargs or {})


def caller_modes() -> Callable[[], AbstractContextManager[None]]:
    """Return what enters, in a worker's thread, the modes that are active in this one.

    A mode of `torch.utils.checkpoint` is left out: it counts on the order of all ops.
    """
    modes = [m for m in dispatch_modes() if type(m).__module__ != "torch.utils.checkpoint"]
    return partial(_entered, modes, threading.RLock()) if modes else nullcontext


@contextmanager
def _entered(modes: Sequence[Any], lock: threading.RLock) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(_InWorker(mode, lock))
        yield
