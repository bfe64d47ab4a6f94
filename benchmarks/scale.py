"""Planning time and memory against the depth of a model: Transformer-L (GPipe, Table 1) on meta.

    python -m benchmarks.scale                      L = 12, 24, 48, 96, 192; the growth exponent
    python -m benchmarks.scale 1663 128             one depth in so many stages
    python -m benchmarks.scale parameters           parameter memory of Table 1
    python -m benchmarks.scale gpt2-xl 8            GPT-2 XL's shape (48 layers, d 1600)

Each depth runs in a process of its own; time is the process's CPU time (the machine is shared),
memory its peak. Bars: time grows no faster than L^1.3; L = 1663 in 128 stages in 15 minutes and
8 GB; GPT-2 XL in 60 s and 2 GB.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from autopipe.batch_dims import batch_of
from autopipe.call_signature import flatten
from autopipe.options import parse_options
from autopipe.passes._torch import lazy_graph_code
from autopipe.passes.capture.model import capture
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.cost.stage_cost import cost_of_stage
from autopipe.passes.driver import cut_into_stages, phases_by_size
from autopipe.passes.split.objective import objective_of
from autopipe.planning.make_plan import make_plan
from autopipe.planning.stage_timers import modeled_timers
from autopipe.tensor_meta import training_request
from benchmarks.models import gpt2
from benchmarks.transformer_l import on_meta

SAMPLES = 8
"""Of the batch; micro-batches of one."""
PASSES = ("capture", "annotate", "split", "trace", "plan")
DEPTHS = (12, 24, 48, 96, 192)
TABLE_1 = {3: (1, 3.15), 13: (1, 8.78), 103: (8, 59.40), 415: (32, 234.9), 1663: (128, 936.9)}
"""L → partitions and GiB of parameter memory in the paper's Table 1."""


def planned(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stages: int
) -> dict[str, float]:
    """As `autopipe.plan`, pass by pass: CPU seconds of each, and the bytes of all parameters."""
    options = parse_options(
        devices=["cpu"] * stages,
        chunks=SAMPLES,
        schedule="gpipe",
        remat="full",
        memory=None,
        in_dims=0,
        out_reduce=None,
        batch_norm="deferred",
    )
    leaves, spec = flatten(args, kwargs)
    dims, _ = batch_of(0, model, args, kwargs)
    remat = options.resolved.remat
    models = options.device_models
    marks = [time.process_time()]
    with lazy_graph_code():
        captured = capture(CaptureRequest(model, leaves, spec, dims))
        marks.append(time.process_time())
        annotated = annotate(captured)
        marks.append(time.process_time())
    objective = objective_of(models, 1, remat=remat, in_flight=(SAMPLES,) * stages)
    cut = cut_into_stages(annotated, objective)
    marks.append(time.process_time())
    phased = phases_by_size(training_request(model, cut, leaves, [1], options.devices, remat))
    marks.append(time.process_time())
    plan = make_plan(model, cut, phased, [1] * SAMPLES, options, modeled_timers(models))
    marks.append(time.process_time())
    costs = [cost_of_stage(cut, stage, 1) for stage in cut.stages]
    names = PASSES
    found = {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)}
    return found | {
        "total": marks[-1] - marks[0],
        "balance": plan.balance,
        "bytes": sum(c.parameter_bytes + c.optimizer_bytes for c in costs),
        "gradients": sum(c.gradient_bytes for c in costs),
    }


def report(what: str, stages: int) -> float:
    """Plan one model in this process and print a line; returns CPU seconds."""
    torch.set_num_threads(1)
    if what == "gpt2-xl":
        with torch.device("meta"):
            model, inputs = gpt2(48, 1600, 25, 1024, 50257)
            args, kwargs = (), inputs(SAMPLES)
    else:
        model, args = on_meta(int(what), SAMPLES)
        kwargs = {}
    start = time.perf_counter()
    found = planned(model, args, kwargs, stages)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parts = ", ".join(f"{n} {found[n]:.2f}" for n in PASSES)
    print(
        f"{what} in {stages} stages: {found['total']:.2f} CPU s ({parts}),"
        f" {time.perf_counter() - start:.1f} s on the clock, peak {peak:.2f} GiB,"
        f" balance {found['balance']:.3f}, parameters and Adam's state"
        f" {found['bytes'] / 2**30:.2f} GiB, gradients {found['gradients'] / 2**30:.2f} GiB",
        flush=True,
    )
    return found["total"]


def alone(what: str, stages: int) -> str:
    """The line of `report`, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", what, str(stages)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout, end="", flush=True)
    return done.stdout


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of the least-squares line through the logarithms."""
    xs, ys = ([math.log(p[i]) for p in points] for i in range(2))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def main() -> None:
    if sys.argv[1:] == ["parameters"]:
        for layers, (partitions, published) in TABLE_1.items():
            line = alone(str(layers), partitions)
            gib = float(line.split("state ")[1].split()[0])
            print(f"  L = {layers}: {gib:.2f} GiB, published {published}")
    elif sys.argv[1:]:
        report(sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else 4)
    else:
        points = []
        for layers in DEPTHS:
            line = alone(str(layers), 4)
            points.append((layers, float(line.split(": ")[1].split()[0])))
        print(f"growth from {DEPTHS[0]} to {DEPTHS[-1]} layers: L^{exponent(points):.2f} (bar 1.3)")
        last = math.log(points[-1][1] / points[-2][1]) / math.log(DEPTHS[-1] / DEPTHS[-2])
        print(f"the last doubling: L^{last:.2f}")


if __name__ == "__main__":
    main()
