"""Measure how long the ops of a captured graph take on a real device; cache the times on disk.

Each distinct op (operator, sizes, strides, dtypes, which operands need gradients) is run alone,
forward and backward. The result is the median after a warm-up. The device's `Backend` does the
timing: by the host's clock on the CPU, between two events on a GPU. A pipeline's stages do not run
autograd's engine, so its time is measured on a backward without work and subtracted.
`profile_cache` keeps the times on disk.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.errors import DeviceError, InputError, UnsupportedError, describe
from autopipe.passes.cost import BoundCall, operand_values, tensor_leaves, work_key
from autopipe.passes.graph import source_line
from autopipe.planning.profile_cache import Timing, keep_times, kept_times
from autopipe.runtime.backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import fx

    from autopipe.passes.ir import Annotated, GradFlow

    Timer = Callable[[Callable[[], Any]], tuple[Any, float]]  # result and seconds of a function

WARM_UP, LEAST, MOST, ENOUGH_SECONDS = 2, 5, 30, 0.02
"""Untimed runs; then timed runs: at least, at most, and until they took this long in all."""


@dataclass(frozen=True)
class Profile:
    """Measured times of a captured graph.

    Attributes:
        batch: samples in the micro-batch.
        device: its name and, for a CPU, the number of threads.
        timings: by name of the node; nodes that run no op (sizes, unpacking) are left out.
        measured: how many distinct ops were run now; the others were in the cache.
    """

    batch: int
    device: str
    timings: Mapping[str, Timing]
    measured: int

    def seconds(self, node: str) -> float:
        """Forward and backward of a node together; 0 if it runs no op."""
        timing = self.timings.get(node, Timing(0.0, 0.0))
        return timing.forward_seconds + timing.backward_seconds


def profile(
    annotated: Annotated,
    batch: int,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
) -> Profile:
    """Time every distinct op of a captured graph.

    Args:
        annotated: the graph with costs.
        batch: samples in the micro-batch.
        device: where to run the ops.
        folder: of the cache files; None: ``~/.cache/autopipe``.

    Returns:
        The times, and how many were measured now.

    Raises:
        InputError: the batch has no samples.
        DeviceError: there is no such device here.
        UnsupportedError: an op fails on its own, on tensors of zeros and random numbers.
    """
    if batch < 1:
        raise InputError("a batch without samples", expected="at least 1", found=str(batch))
    torch_device = torch.device(device)
    backend = backend_of(torch_device)
    if backend.find(torch_device) is None:
        raise DeviceError("no such device here", expected='"cpu" or a GPU', found=repr(str(device)))
    name = device_name(torch_device)
    known = kept_times(name, folder)
    cached = dict(known or {})
    timer = partial(backend.timed, torch_device)
    engine: list[float] = []
    timings: dict[str, Timing] = {}
    measured = 0
    with backend.fork_rng(torch_device):
        for node in annotated.captured.graph_module.graph.nodes:
            flow = annotated.flows.get(node.name)
            if flow is None:
                continue
            key = work_key(node, batch, flow)
            if key not in cached:
                if not engine:
                    engine.append(_engine(torch_device, timer))
                cached[key] = _measure(node, batch, flow, torch_device, timer, engine[0])
                measured += 1
            timings[node.name] = cached[key]
    if measured and known is not None:
        keep_times(name, folder, cached)
    return Profile(batch, name, timings, measured)


def device_name(device: torch.device) -> str:
    """Name what times depend on: the device's model and, for a CPU, the number of threads."""
    return backend_of(device).name(device)


# ------------------------------------------------------------------------------- timing


def _measure(
    node: fx.Node,
    batch: int,
    flow: GradFlow,
    device: torch.device,
    timer: Timer,
    engine: float,
) -> Timing:
    """Time an op on random numbers, zeros for integers and True for booleans."""

    def fill(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return filled(shape, stride, dtype, device)

    try:
        with torch.enable_grad():
            ready = BoundCall(
                node, operand_values(node, batch, fill), flow.operands_need_grad, batch, device
            )
            return _medians(lambda: _once(ready, flow.results_get_grad, timer), engine)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedError(
            "a call cannot be timed by itself",
            node=node.name,
            source=source_line(node),
            found=f"{node.target}: {describe(error)}",
            remedy="use the estimates of the cost pass for this model",
        ) from error


def _once(ready: BoundCall, gets: Sequence[bool], timer: Timer) -> tuple[float, float | None]:
    """Seconds of one forward and of its backward, None if no gradient flows through the op."""
    args, kwargs, _, edges = ready.arguments()
    found, forward = timer(lambda: ready.target(*args, **kwargs))
    results = zip(tensor_leaves(found), gets, strict=True)
    roots = [r for r, wanted in results if wanted and r is not None and r.requires_grad]
    inputs = [e for of in edges for e in of if e is not None]
    if not roots or not inputs:
        return forward, None
    return forward, _backward(roots, inputs, timer)


def _backward(roots: Sequence[Tensor], inputs: Sequence[Any], timer: Timer) -> float:
    tangents = [torch.ones_like(r) for r in roots]

    def run() -> Any:
        return torch.autograd.grad(roots, inputs, tangents, allow_unused=True)

    return timer(run)[1]


def _medians(once: Callable[[], tuple[float, float | None]], engine: float) -> Timing:
    for _ in range(WARM_UP):
        once()
    forward: list[float] = []
    backward: list[float] = []
    while len(forward) < LEAST or (
        len(forward) < MOST and sum(forward) + sum(backward) < ENOUGH_SECONDS
    ):
        one, two = once()
        forward.append(one)
        backward += [] if two is None else [two]
    behind = statistics.median(backward) - engine if backward else 0.0
    return Timing(statistics.median(forward), max(0.0, behind))


def _engine(device: torch.device, timer: Timer) -> float:
    """Seconds that autograd's engine takes for a backward without work."""
    x = torch.zeros(1, device=device, requires_grad=True)
    runs = [_backward([x.view(1)], [x], timer) for _ in range(WARM_UP + MOST)]
    return statistics.median(runs[WARM_UP:])


def filled(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Create a tensor of random numbers; integers are 0, a valid index everywhere, booleans True.

    Args:
        shape: of the tensor.
        stride: of the tensor, in elements.
        dtype: of the tensor.
        device: of the tensor.
    """
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if n)
    result = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)
    memory = result.as_strided((extent,), (1,)) if result.numel() else result
    if dtype.is_floating_point or dtype.is_complex:
        memory.normal_()
    else:
        memory.fill_(dtype is torch.bool)
    return result
