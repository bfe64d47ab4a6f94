"""How long the calls of a captured graph take on a real device, measured, and remembered on disk.

Each distinct call (operator, sizes, strides, types, the gradients it takes part in) is run by
itself, forward and backward, warmed up, and the median taken: on the CPU by the clock, on a GPU
between two events of its stream. Autograd's engine, which no stage of a pipeline runs, is not
counted: what it takes for a backward without work is measured and subtracted.

Results are kept as JSON, one file per torch version, device and number of threads. A file that is
not such a file is left alone, with a warning.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipe.errors import DeviceError, InputError, UnsupportedError
from autopipe.passes.cost import BoundCall, operand_values, tensor_leaves, work_key
from autopipe.passes.graph import source_line
from autopipe.runtime.backends import backend_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

    from autopipe.passes.ir import Annotated, GradFlow

    Clock = Callable[[Callable[[], Any]], tuple[Any, float]]

FORMAT = 1
"""Of the files: raised when what a key or a figure means changes."""

WARM_UP, LEAST, MOST, ENOUGH_SECONDS = 2, 5, 30, 0.02
"""Runs before any is timed; timed runs: at least, at most, and until they took so long together."""


@dataclass(frozen=True)
class Timing:
    """Median times of one call, in seconds; a backward that does not happen takes none."""

    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True)
class Profile:
    """Measured times of a captured graph.

    Attributes:
        batch: samples in the micro-batch.
        device: its name and, for a CPU, the number of threads.
        timings: by name of the call; what is not run (sizes, views of results) is left out.
        measured: how many distinct calls were run now; the others were known.
    """

    batch: int
    device: str
    timings: Mapping[str, Timing]
    measured: int

    def seconds(self, node: str) -> float:
        """Forward and backward of a call by its name; 0 for what is not run."""
        timing = self.timings.get(node, Timing(0.0, 0.0))
        return timing.forward_seconds + timing.backward_seconds


def profile(
    annotated: Annotated,
    batch: int,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
) -> Profile:
    """Time every distinct call of a captured graph.

    Args:
        annotated: the graph, costed.
        batch: samples in the micro-batch.
        device: where to run.
        folder: where results are kept; None: ``~/.cache/autopipe``.

    Returns:
        A `Profile`.

    Raises:
        InputError: the batch has no samples.
        DeviceError: the device is not there.
        UnsupportedError: a call cannot be run by itself, on tensors of zeros and random numbers.
    """
    if batch < 1:
        raise InputError("a batch without samples", expected="at least 1", found=str(batch))
    torch_device = torch.device(device)
    backend = backend_of(torch_device)
    if backend.find(torch_device) is None:
        raise DeviceError("no such device here", expected='"cpu" or a GPU', found=repr(str(device)))
    name = device_name(torch_device)
    path = cache_file(name, folder)
    known = load(path, name)
    cached = dict(known or {})
    clock = partial(backend.timed, torch_device)
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
                    engine.append(_engine(torch_device, clock))
                cached[key] = _measure(node, batch, flow, torch_device, clock, engine[0])
                measured += 1
            timings[node.name] = cached[key]
    if measured and known is not None:
        save(path, name, cached)
    return Profile(batch, name, timings, measured)


# ------------------------------------------------------------------------------- on disk


def device_name(device: torch.device) -> str:
    """What measurements hold for: the device's model and, for a CPU, the number of threads."""
    return backend_of(device).name(device)


def cache_file(device: str, folder: str | Path | None = None) -> Path:
    """Where the measurements of a device are kept, for this version of torch."""
    base = Path.home() / ".cache" / "autopipe" if folder is None else Path(folder)
    slug = re.sub(r"[^0-9A-Za-z.]+", "-", f"{torch.__version__} {device}")
    return base / f"profile-{slug}.json"


def load(path: Path, device: str) -> dict[str, Timing] | None:
    """What a file knows; nothing if there is none; None, with a warning, if it is not ours."""
    if not path.exists():
        return {}
    try:
        return _read(json.loads(path.read_text()), device)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        warnings.warn(
            f"{path} does not hold measurements of this device and this torch ({error}); it is"
            " ignored and left as it is: delete it to keep new ones",
            stacklevel=3,
        )
        return None


def _read(content: Any, device: str) -> dict[str, Timing]:
    head = {n: content[n] for n in ("format", "torch", "device")}
    if head != _head(device):
        raise ValueError(f"it says {head}")
    found = {}
    for key, pair in content["calls"].items():
        forward, backward = map(float, pair)
        if not (0 <= forward < math.inf and 0 <= backward < math.inf):
            raise ValueError(f"times {pair}")
        found[str(key)] = Timing(forward, backward)
    return found


def save(path: Path, device: str, timings: Mapping[str, Timing]) -> None:
    """Write all measurements of a device, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    calls = {k: [t.forward_seconds, t.backward_seconds] for k, t in timings.items()}
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({**_head(device), "calls": calls}, indent=0))
    part.replace(path)


def _head(device: str) -> dict[str, Any]:
    return {"format": FORMAT, "torch": str(torch.__version__), "device": device}


# ------------------------------------------------------------------------------- timing


def _measure(
    node: fx.Node,
    batch: int,
    flow: GradFlow,
    device: torch.device,
    clock: Clock,
    engine: float,
) -> Timing:
    """Time a call; its arguments are random numbers, zeros for integers, True for booleans."""

    def fill(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return filled(shape, stride, dtype, device)

    try:
        with torch.enable_grad():
            ready = BoundCall(
                node, operand_values(node, batch, fill), flow.operands_need_grad, batch, device
            )
            return _medians(lambda: _once(ready, flow.results_get_grad, clock), engine)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedError(
            "a call cannot be timed by itself",
            node=node.name,
            source=source_line(node),
            found=f"{node.target}: {str(error).splitlines()[0]}",
            remedy="use the estimates of the cost pass for this model",
        ) from error


def _once(ready: BoundCall, gets: Sequence[bool], clock: Clock) -> tuple[float, float | None]:
    args, kwargs, _, edges = ready.arguments()
    found, forward = clock(lambda: ready.target(*args, **kwargs))
    results = zip(tensor_leaves(found), gets, strict=True)
    roots = [r for r, wanted in results if wanted and r is not None and r.requires_grad]
    inputs = [e for of in edges for e in of if e is not None]
    if not roots or not inputs:
        return forward, None
    return forward, _backward(roots, inputs, clock)


def _backward(roots: Sequence[Tensor], inputs: Sequence[Any], clock: Clock) -> float:
    tangents = [torch.ones_like(r) for r in roots]

    def run() -> Any:
        return torch.autograd.grad(roots, inputs, tangents, allow_unused=True)

    return clock(run)[1]


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


def _engine(device: torch.device, clock: Clock) -> float:
    """What autograd takes for a backward that does nothing."""
    x = torch.zeros(1, device=device, requires_grad=True)
    runs = [_backward([x.view(1)], [x], clock) for _ in range(WARM_UP + MOST)]
    return statistics.median(runs[WARM_UP:])


def filled(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of this look; an index of zero is right everywhere."""
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if n)
    made = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)
    memory = made.as_strided((reach,), (1,)) if made.numel() else made
    if dtype.is_floating_point or dtype.is_complex:
        memory.normal_()
    else:
        memory.fill_(dtype is torch.bool)
    return made
