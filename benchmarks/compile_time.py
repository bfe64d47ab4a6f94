"""From a module to a runnable pipeline, in units of torch.export alone.

    python -m benchmarks.compile_time

GPT-2 (d 256, sequence 128), two stages, M = 4, batch 8, remat full; torch.export with a symbolic
batch alternates with autopipe.compile in one process, medians of five. Bars: at most 3 exports for
12 layers; growth from 12 to 48 layers no faster than layers^1.15; identical stages traced once.
"""

from __future__ import annotations

import math
import statistics
import time

import torch

import autopipe
from autopipe.passes.phases import cut as phases
from benchmarks.models import gpt2


def export(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    dynamic = {name: {0: torch.export.Dim.AUTO} for name in batch}
    start = time.perf_counter()
    torch.export.export(model, (), batch, dynamic_shapes=dynamic, strict=False)
    return time.perf_counter() - start


def compile(model: torch.nn.Module, batch: dict[str, torch.Tensor], remat: str) -> float:
    start = time.perf_counter()
    autopipe.compile(model, ["cpu", "cpu"], 4, remat=remat, kwargs=batch)
    return time.perf_counter() - start


def traces(layers: int, stages: int) -> int:
    """How many joint graphs are traced for so many stages."""
    model, inputs = gpt2(layers, 256, 4, 128)
    counted, trace = [], phases.trace_joint

    def counting(*args: object, **kwargs: object) -> object:
        counted.append(1)
        return trace(*args, **kwargs)  # type: ignore[arg-type]

    phases.trace_joint = counting  # type: ignore[assignment]
    try:
        pipe = autopipe.compile(model, ["cpu"] * stages, 4, kwargs=inputs(8))
    finally:
        phases.trace_joint = trace
    same = len({s.fingerprint for s in pipe._programs.last[0].split.stages})
    print(f"{layers} layers in {stages} stages: {same} different, {len(counted)} traced")
    return len(counted)


def main() -> None:
    total = {}
    for layers in (12, 24, 48):
        model, inputs = gpt2(layers, 256, 4, 128)
        batch = inputs(8)
        export(model, batch)
        compile(model, batch, "full")
        alone, whole = [], []
        for _ in range(5):
            alone.append(export(model, batch))
            whole.append(compile(model, batch, "full"))
        a, b = statistics.median(alone), statistics.median(whole)
        total[layers] = b
        bar = " (bar 3.0)" if layers == 12 else ""
        print(f"{layers} layers: export {a:.2f} s, compile {b:.2f} s, ratio {b / a:.2f}{bar}")
    power = math.log(total[48] / total[12]) / math.log(4)
    print(f"growth from 12 to 48 layers: layers^{power:.2f} (bar 1.15)")
    model, inputs = gpt2(12, 256, 4, 128)
    print(f"12 layers with remat min-cut: {compile(model, inputs(8), 'min-cut'):.2f} s")
    traces(12, 14)


if __name__ == "__main__":
    main()
