"""Two stages on two CPU cores, beside torchgpipe and the limits.

    python -m benchmarks.two_cores

The pre-norm transformer of `benchmarks.models` (8 layers, d 512, sequence 128, vocabulary 8192),
batch 16, M = 8 micro-batches, one thread per operator. Everything alternates in one process; the
plain model runs on one pinned core, over the whole batch and over the same micro-batches one after
the other (which is the faster: they fit the cache); speed-up is the median of the *faster* of the
two over the other's median. Limits:

    remat none   KM/(M+K-1) × balance, where balance is measured: mean / largest busy time
    remat full   the same × (f+b)/(f+b+r), measured: busy time without / with rematerialization

Two independent processes, each pinned to a core, show what the cores really give at once.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autopipe
from benchmarks.models import transformer

CHUNKS, BATCH, VOCABULARY, SEQUENCE = 8, 16, 8192, 128


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def stepper(model: Callable[[Any], Any], ids: torch.Tensor) -> Callable[[], float]:
    def step() -> float:
        start = time.perf_counter()
        loss(model(ids), ids).backward()
        return time.perf_counter() - start

    return step


def chunked(model: Callable[[Any], Any], ids: torch.Tensor) -> Callable[[], float]:
    """The same step as gradient accumulation over the micro-batches."""

    def step() -> float:
        start = time.perf_counter()
        for chunk in ids.tensor_split(CHUNKS):
            (loss(model(chunk), chunk) / CHUNKS).backward()
        return time.perf_counter() - start

    return step


def busy_times(pipe: autopipe.Pipeline, step: Callable[[], float]) -> list[float]:
    """Seconds that each stage computes in one step, timed around its generated functions."""
    _, ready = pipe._programs.last
    spent: dict[int, float] = defaultdict(float)
    names = ready.program.forward[0].__globals__
    originals = {n: f for n, f in names.items() if n.startswith(("F_", "RBW_"))}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        stage = int(name.split("_")[1])

        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            spent[stage] += time.perf_counter() - start
            return result

        return run

    for name, function in originals.items():
        names[name] = timed(name, function)
    rounds = []
    for _ in range(5):
        spent.clear()
        step()
        rounds.append([spent[k] for k in sorted(spent)])
    names.update(originals)
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def alone(core: int, barrier: Any, queue: Any) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    step = stepper(transformer(), torch.randint(0, VOCABULARY, (BATCH, SEQUENCE)))
    step()
    barrier.wait()
    queue.put(statistics.median(step() for _ in range(3)))


def processes(count: int) -> float:
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(count)
    workers = [context.Process(target=alone, args=(i, barrier, queue)) for i in range(count)]
    for worker in workers:
        worker.start()
    times = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return max(times)


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    one, two = processes(1), processes(2)
    print(f"two independent processes: {2 * one / two:.2f}x the work of one")
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    model = transformer()
    everything = os.sched_getaffinity(0)
    steps: dict[str, Callable[[], float]] = {
        "plain": stepper(model, ids),
        "plain, micro-batches": chunked(model, ids),
    }
    pipes = {}
    for remat in ("none", "full"):
        pipes[remat] = autopipe.compile(
            transformer(), ["cpu", "cpu"], CHUNKS, remat=remat, args=(ids,)
        )
        steps[remat] = stepper(pipes[remat], ids)
    try:
        from torchgpipe import GPipe

        for checkpoint in ("never", "always"):
            theirs = GPipe(
                transformer(), [5, 6], devices=["cpu", "cpu"], chunks=CHUNKS, checkpoint=checkpoint
            )
            steps[f"torchgpipe {checkpoint}"] = stepper(theirs, ids)
    except ImportError:
        print("torchgpipe is not installed: pip install -e .[bench] -c constraints.txt")
    times: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            os.sched_setaffinity(0, {min(everything)} if name.startswith("plain") else everything)
            seconds = step()
            if round_:
                times[name].append(seconds)
    whole, parts = (statistics.median(times[n]) for n in ("plain", "plain, micro-batches"))
    plain = min(whole, parts)
    print(f"plain model on one core: {whole:.3f} s whole, {parts:.3f} s in micro-batches")
    speed = {name: plain / statistics.median(t) for name, t in times.items()}
    busy = {remat: busy_times(pipes[remat], steps[remat]) for remat in pipes}
    ideal = 2 * CHUNKS / (CHUNKS + 1)
    for remat, pipe in pipes.items():
        balance = sum(busy[remat]) / 2 / max(busy[remat])
        factor = sum(busy["none"]) / sum(busy[remat])
        limit = ideal * balance * factor
        print(
            f"remat {remat}: speed-up {speed[remat]:.2f}; limit {limit:.2f}"
            f" (ideal {ideal:.2f} x balance {balance:.3f} x recompute {factor:.3f});"
            f" {speed[remat] / limit:.2f} of it (bar 0.90)"
        )
        del pipe
    for name in times:
        if name.startswith("torchgpipe"):
            ours = "none" if name.endswith("never") else "full"
            print(
                f"{name}: speed-up {speed[name]:.2f};"
                f" ours ({ours}) {speed[ours] / speed[name]:.2f}x as fast (bar 1.3)"
            )


if __name__ == "__main__":
    main()
