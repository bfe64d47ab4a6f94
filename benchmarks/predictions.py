"""Predictions against reality on two CPU cores: step time, and what stages keep.

    python -m benchmarks.predictions                 GPT-2, UNet2D, T5 × full, none, min-cut × M
    python -m benchmarks.predictions GPT-2 none      one model, one policy

Two stages on two CPU workers, one thread per operator. `autopipe.plan(..., profile=True)` times
calls and stages; then the pipeline that it planned runs: the median of five steps after one that is
not counted. Saved bytes are those that the runtime counts while it holds them. Bars: step time
within 10 %, the peak of saved bytes per stage within 5 %.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import autopipe
from autopipe.passes.remat_policies import POLICIES
from benchmarks.models import Calls, gpt2, t5, unet

BATCH = 16
CHUNKS = (2, 4, 8)
NAMES = tuple(policy.name for policy in POLICIES)


def models() -> dict[str, Callable[[], tuple[nn.Module, Calls]]]:
    def gpt() -> tuple[nn.Module, Calls]:
        model, inputs = gpt2(layers=6, width=256, heads=4, sequence=128, vocabulary=4096)
        return model, lambda batch: ((), inputs(batch))

    return {"GPT-2": gpt, "UNet2D": unet, "T5": t5}


def loss_of(result: Any) -> Tensor:
    loss = getattr(result, "loss", None)
    found = result.sample.square().mean() if loss is None else loss
    assert isinstance(found, Tensor)
    return found


def measured(pipe: autopipe.Pipeline, call: tuple[Any, Any], rounds: int = 5) -> float:
    """Median seconds of a step, forward and backward."""
    args, kwargs = call
    times = []
    for i in range(rounds + 1):
        pipe.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss_of(pipe(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def compared(name: str, remat: str, chunks: int) -> tuple[float, float]:
    """One row; returns how far step time and saved bytes were off, as fractions."""
    model, inputs = models()[name]()
    call = inputs(BATCH)
    args, kwargs = call
    start = time.perf_counter()
    plan = autopipe.plan(
        model, ["cpu"] * 2, chunks, remat=remat, profile=True, args=args, kwargs=kwargs
    )
    planning = time.perf_counter() - start
    pipe = autopipe.compile(model, plan=plan, args=args, kwargs=kwargs)
    seconds = measured(pipe, call)
    off = plan.step_seconds / seconds - 1
    saved = [
        stage.peak_saved_bytes / counted.peak - 1
        for stage, counted in zip(plan.stages, pipe.memory.stages, strict=True)
    ]
    most = max(saved, key=abs)
    print(
        f"{name:8} {remat:8} M={chunks}: predicted {1e3 * plan.step_seconds:7.1f} ms,"
        f" measured {1e3 * seconds:7.1f} ms, {off:+6.1%}"
        f" (gathering {1e3 * plan.gather_seconds:.1f} ms); saved bytes {most:+.2%};"
        f" planned in {planning:.0f} s",
        flush=True,
    )
    return off, most


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:]
    names = [n for n in models() if n in asked] or list(models())
    policies = [p for p in NAMES if p in asked] or list(NAMES)
    rows = [compared(n, p, m) for n in names for p in policies for m in CHUNKS]
    times, saved = ([abs(row[i]) for row in rows] for i in (0, 1))
    print(
        f"{len(rows)} rows: step time off by {statistics.mean(times):.1%} on average,"
        f" {max(times):.1%} at most ({sum(t <= 0.10 for t in times)} within 10 %);"
        f" saved bytes off by {max(saved):.2%} at most"
    )


if __name__ == "__main__":
    main()
