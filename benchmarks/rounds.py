"""What the comparisons of steps share: cores, alternating rounds, gradients, tables."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopipe.runtime.backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDING = 1e-5
"""Of the model's largest gradient: what float32 may be off by, and no mistake would be."""

Side = Callable[[], float]
"""Runs one training step and returns its seconds."""


def pin(cores: Iterable[int]) -> None:
    """Keep all threads of the process on some cores, and so those that they start."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), set(cores))


def two_cores() -> tuple[int, int]:
    """The first two cores that the process may use, once it may use no others.

    Raises:
        SystemExit: there is one core only.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise SystemExit("this needs two cores")
    pin((first, others[0]))
    torch.set_num_threads(1)
    return first, others[0]


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Keep the calling thread on one core while the context is open."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Side:
    """A side that computes a loss and its gradients; old ones are freed outside of the time."""

    def step() -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss().backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - start

    return step


def alternate(sides: Mapping[str, Side], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each side's steps, one step of each side in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, side in sides.items():
            found = side()
            if turn >= warm_up:
                seconds[name].append(found)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def fastest(candidates: Mapping[Any, Side], rounds: int = 3) -> Any:
    """The key of the candidate with the shortest median step."""
    named = {str(key): side for key, side in candidates.items()}
    found = medians(alternate(named, rounds, warm_up=1))
    return min(candidates, key=lambda key: found[str(key)])


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the gradients, in order."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]


def check_gradients(side: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, over the largest gradient.

    Raises:
        AssertionError: it is above `ROUNDING`.
    """
    largest = max(float(g.abs().max()) for g in expected)
    pairs = zip(found, expected, strict=True)
    off = max(float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs) / largest
    assert off <= ROUNDING, f"{side}: gradients are off by {off:.1e} of the largest"
    return off


@contextmanager
def watching_others(cores: Iterable[int]) -> Iterator[None]:
    """Print at the end how much of some cores went to other processes meanwhile."""

    def spent() -> tuple[float, float]:
        """Seconds since the machine started that the cores worked, and that this benchmark did."""
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        wanted = {f"cpu{core}" for core in cores}
        busy = sum(sum(map(int, (*w[1:4], *w[6:9]))) for w in lines if w[0] in wanted)
        children = [child.pid for child in multiprocessing.active_children()]
        own = 0
        for process in ("self", *children):
            text = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own += int(text[11]) + int(text[12])
        ticks = os.sysconf("SC_CLK_TCK")
        return busy / ticks, own / ticks

    start, (busy, own) = time.perf_counter(), spent()
    yield
    busy, own = (after - before for after, before in zip(spent(), (busy, own), strict=True))
    seconds = time.perf_counter() - start
    print(f"\nmeanwhile other work took {max(0.0, busy - own) / seconds:.2f} cores of the two")


def machine() -> str:
    """The processor, the versions and what else the machine does now."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{backend_of(torch.device('cpu')).name(torch.device('cpu'))} per operator, {cores} cores,"
        f" Python {platform.python_version()}, torch {torch.__version__}; load when it began"
        f" {load:.1f}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are written with four digits."""

    def text(cell: object) -> str:
        return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(text, line))} |" for line in lines)
