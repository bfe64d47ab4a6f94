"""What a process has set up, in torch and in Python, that a call must leave as it was."""

from __future__ import annotations

import logging
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, fx
from torch.overrides import _get_current_function_mode_stack

from tests.support.worker_threads import busy_threads

PATCHED: tuple[tuple[Any, str], ...] = (
    *((torch.autograd.Function, name) for name in ("apply",)),
    *((Tensor, name) for name in ("register_hook", "__len__", "__torch_function__")),
    *((torch.autograd, name) for name in ("grad", "backward")),
    *((torch.inference_mode, name) for name in ("__enter__",)),
    *((fx.Graph, name) for name in ("create_node",)),
    *((logging.Logger, name) for name in ("callHandlers",)),
    *((warnings, name) for name in ("warn", "warn_explicit", "showwarning")),
    *((random, name) for name in ("random", "randint", "shuffle")),
    *((numpy.random, name) for name in ("rand", "randn", "random", "normal", "permutation")),
    *((torch.nn.Module, name) for name in ("__call__", "__setattr__", "__getattr__")),
)
"""(owner, name) of functions that tracing replaces, or might."""


def process_state() -> dict[str, Any]:
    """By name, everything that must be the same before and after; values compare with ``==``."""
    names = {f"{getattr(o, '__name__', o)}.{n}": vars(o).get(n) for o, n in PATCHED}
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1)
    return names | {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autocast": [torch.is_autocast_enabled(d) for d in ("cpu", "cuda")],
        "anomaly": torch.is_anomaly_enabled(),
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
        "logging": logging.root.manager.disable,
        "level of torch's logger": logging.getLogger("torch").level,
        "filters": list(warnings.filters),
        "stderr": sys.stderr,
        "stdout": sys.stdout,
        "profiler": sys.getprofile(),
        "tracer": sys.gettrace(),
        "handlers": [signal.getsignal(s) for s in signals],
        "threads": [t.name for t in busy_threads()],
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """A text for each entry that is no longer the same."""
    for name, value in before.items():
        if after[name] != value:
            yield f"{name}: {after[name]!r}, before {value!r}"
