"""Balance in practice: the busiest stage against the mean, as measured while a pipeline runs.

    python -m benchmarks.balance            UNet2D, T5 and Swin in 2 and 4 stages

Busy time is each worker's own CPU time in its stage's generated functions, forward and backward,
remat "none", one thread per operator: the median of five steps. Cuts compared: by calls that were
timed (`profile=True`), by the device table, into equal numbers of calls, into equal parameter
bytes; the last two move to the nearest position at which a stage may start.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

import autopipe
from autopipe.errors import PlanError
from autopipe.passes.graph.fx_utils import is_size
from benchmarks.models import Calls, swin, t5, unet
from benchmarks.predictions import loss_of

MODELS: dict[str, Callable[[], tuple[nn.Module, Calls]]] = {"UNet2D": unet, "T5": t5, "Swin": swin}
BATCH, CHUNKS = 8, 4


def busy(pipe: autopipe.Pipeline, call: tuple[Any, Any], rounds: int = 5) -> list[float]:
    """CPU seconds of each stage in a step."""
    args, kwargs = call
    _, ready = pipe._programs.last
    names = ready.program.forward[0].__globals__
    spent: dict[int, float] = defaultdict(float)

    def timed(function: Callable[..., Any], stage: int) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            start = time.thread_time()
            result = function(*given)
            spent[stage] += time.thread_time() - start
            return result

        return run

    for way in ("forward", "backward"):
        for k in range(len(ready.program.workers)):
            names[f"{way}_{k}"] = wrapped(names[f"{way}_{k}"], timed, k)
    steps = []
    for i in range(rounds + 1):
        spent.clear()
        loss_of(pipe(*args, **kwargs)).backward()
        if i:
            steps.append([spent[k] for k in sorted(spent)])
    return [statistics.median(column) for column in zip(*steps, strict=True)]


def wrapped(function: Callable[..., Any], timed: Callable[..., Any], stage: int) -> Any:
    """A stage's ``forward_k(run, m, compute)`` with its computation timed."""
    return lambda run, m, compute: function(run, m, timed(compute, stage))


def shares(plan: autopipe.Plan, weights: Sequence[float], names: Sequence[str]) -> list[list[str]]:
    """For each boundary the calls at which a K-th of the weight is reached, nearest first."""
    K, sums = len(plan.stages), list(accumulate(weights))
    found = []
    for k in range(1, K):
        at = next(i for i, s in enumerate(sums) if s >= sums[-1] * k / K)
        found.append(sorted(names, key=lambda name: abs(names.index(name) - at)))
    return found


def moved(
    model: nn.Module, plan: autopipe.Plan, wanted: Sequence[Sequence[str]], call: tuple[Any, Any]
) -> autopipe.Pipeline:
    """A pipeline that is cut as near as can be to where it is wanted."""
    starts: list[str] = []
    for k, names in enumerate(wanted):
        for name in names:
            rest = [n[0] for n in wanted[k + 1 :]]
            stages = [plan.stages[0]]
            for stage, first in zip(plan.stages[1:], [*starts, name, *rest], strict=True):
                stages.append(dataclasses.replace(stage, first=first))
            changed = dataclasses.replace(plan, stages=tuple(stages), segments=(), duplicated=())
            try:
                pipe = autopipe.compile(model, plan=changed, args=call[0], kwargs=call[1])
            except PlanError as error:
                if error.node != name:  # it is a later one
                    break
                continue
            break
        starts.append(name)
    return pipe


def main() -> None:
    torch.set_num_threads(1)
    asked = [n for n in MODELS if n in sys.argv[1:]] or list(MODELS)
    print("largest stage / mean           profiled   table   equal calls   equal parameters")
    for name in asked:
        for K in (2, 4):
            model, inputs = MODELS[name]()
            call = inputs(BATCH)

            table, profiled = (
                autopipe.plan(
                    model,
                    ["cpu"] * K,
                    CHUNKS,
                    remat="none",
                    args=call[0],
                    kwargs=call[1],
                    profile=profile,
                )
                for profile in (False, True)
            )
            pipes = [
                autopipe.compile(model, plan=p, args=call[0], kwargs=call[1])
                for p in (profiled, table)
            ]
            graph = pipes[1].captured.graph_module.graph
            nodes = [n for n in graph.nodes if n.op == "call_function" and not is_size(n)]
            names = [n.name for n in nodes]
            inputs_of = {i.name: i for i in pipes[1].captured.inputs}
            seen: set[str] = set()
            bytes_ = []
            for node in nodes:
                own = 0
                for source in node.all_input_nodes:
                    item = inputs_of.get(source.name)
                    if item is not None and item.kind == "parameter" and source.name not in seen:
                        seen.add(source.name)
                        own += int(item.spec.nbytes)
                bytes_.append(float(own))
            for weights in ([1.0] * len(nodes), bytes_):
                pipes.append(moved(model, table, shares(table, weights, names), call))
            ratios = []
            for pipe in pipes:
                times = busy(pipe, call)
                ratios.append(max(times) / statistics.mean(times))
            row = "   ".join(f"{r:8.3f}" for r in ratios)
            print(f"{name:8} K={K}                  {row}", flush=True)


if __name__ == "__main__":
    main()
