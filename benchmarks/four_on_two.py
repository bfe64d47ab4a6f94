"""Four devices on two cores: order, numbers, memory and time of every schedule.

    python -m benchmarks.four_on_two
    python -m benchmarks.four_on_two --only gpipe zb-v --layers 4 --width 64 --repeats 3

The pre-norm transformer of `benchmarks.models` with its loss (8 layers, d 512, sequence 128,
vocabulary 8192, batch 16), four CPU devices, M = 8, one thread per operator, nothing
rematerialized. By schedule:

- order: whether the actions of all profiled steps ran in the schedule's order;
- numbers: whether loss and gradients are gpipe's, bit by bit;
- in flight: by device, the most pairs of stage and micro-batch between F and its last W (until its
  B, for zb-h1) in a profiled step, beside the published bound;
- saved: by device, the most MiB between phases, measured and planned; whether all stages have saved
  what was planned;
- time: the step that a simulation predicts in which four workers share two cores
  (`benchmarks.shared_cores`), calibrated with the processor time of each action, over the measured
  median (bar: within 10 %).

Then, with M = 16, what stage 0 saves with 1f1b beside gpipe (bar: half).
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import autopipe
from autopipe.passes.codegen import verb
from autopipe.passes.schedule import KINDS, Action, Scheduled, Span
from autopipe.planning.measured_data import MeasuredSteps
from benchmarks.rounds import (
    Side,
    alternate,
    gradients,
    machine,
    medians,
    stepper,
    table,
    two_cores,
    watching_others,
)
from benchmarks.shared_cores import shared_makespan
from benchmarks.step_cases import Case, transformer_case

K = 4
ACTION = re.compile(r"^(forward|recompute|gradients|weights|backward)_\d+$")
MIB = 2**20

BOUNDS: dict[str, Callable[[int, int], int]] = {
    "gpipe": lambda k, M: M,
    "1f1b": lambda k, M: min(K - k, M),
    "interleaved": lambda k, M: min(K + 2 * (K - 1 - k) + 1, 2 * M),
    "zb-h1": lambda k, M: min(K - k, M),
    "zb-h2": lambda k, M: min(2 * (K - k) - 1, M),
    "zb-v": lambda k, M: 2 * min(K, M),
    "v-half": lambda k, M: 2 * ((K + 2) // 2),
    "v-min": lambda k, M: 2 * ((K + 4) // 3),
}
"""Kind → (device, M) → pairs of stage and micro-batch that it has in flight at most, as published.

A stage of interleaved and of the V kinds is half of a device's share. Where a stage's W is late
(zb-h1, zb-h2) the bound is of those between F and B.
"""


def build(case: Case, kind: str, chunks: int) -> autopipe.Pipeline:
    """A pipeline on four CPU workers."""
    return autopipe.compile(
        case.model,
        ["cpu"] * K,
        chunks,
        schedule=kind,  # type: ignore[arg-type]
        remat="none",
    )


def in_flight(rows: Sequence[Sequence[Span]], until: str) -> list[int]:
    """By device, the most pairs of stage and micro-batch between F and another phase."""
    found = []
    for row in rows:
        now = most = 0
        for span in row:
            now += (span.action.phase == "F") - (until in span.action.phase)
            most = max(most, now)
        found.append(most)
    return found


@contextmanager
def processor_seconds(pipe: autopipe.Pipeline) -> Iterator[dict[tuple[str, int], list[float]]]:
    """By generated function of a stage and micro-batch, seconds of its thread in each call."""
    _, ready = pipe._programs.last
    program = ready.program
    names = (program.step or program.forward)[0].__globals__
    originals = {n: f for n, f in names.items() if ACTION.match(n)}
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)

    def timed(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def run(run: Any, m: int, compute: Any) -> None:
            start = time.thread_time()
            function(run, m, compute)
            spent[name, m].append(time.thread_time() - start)

        return run

    names.update({name: timed(name, f) for name, f in originals.items()})
    try:
        yield spent
    finally:
        names.update(originals)


def predicted(pipe: autopipe.Pipeline, side: Side, steps: int) -> tuple[float, float]:
    """The step on two shared cores that actions' processor time gives, and the measured one."""
    _, ready = pipe._programs.last
    with processor_seconds(pipe) as spent:
        measured = [side() for _ in range(steps)]
    scheduled: Scheduled = ready.lowered.scheduled
    work = {key: statistics.median(times) for key, times in spent.items()}
    queues = ready.program.queues

    def capacity(letter: str, to: int) -> int:
        sizes = [
            size
            for (value, stage), size in queues.items()
            if stage == to and value.startswith("grad ") == (letter == "B")
        ]
        return min(sizes, default=scheduled.chunks)

    def seconds(action: Action) -> float:
        return work[f"{verb(action.phase)}_{action.stage}", action.microbatch]

    return shared_makespan(scheduled, seconds, capacity), statistics.median(measured)


def ran_in_order(found: MeasuredSteps) -> bool:
    """Whether every step ran the schedule's actions, on each device in its order."""
    return all(
        tuple(tuple(span.action for span in row) for row in line.spans) == found.scheduled.devices
        for line in found.steps
    )


def numbers(case: Case, pipe: autopipe.Pipeline) -> list[Tensor]:
    """Loss and gradients of a step."""
    case.model.zero_grad(set_to_none=True)
    loss = pipe(case.x, case.target)
    loss.backward()
    return [loss.detach(), *gradients(case.model.parameters())]


def checks(
    case: Case, pipes: dict[str, autopipe.Pipeline], chunks: int, profiled: int
) -> Iterator[tuple[object, ...]]:
    """Order, numbers and memory, a row for each schedule."""
    expected = numbers(case, pipes.get("gpipe") or build(case, "gpipe", chunks))
    for kind, pipe in pipes.items():
        equal = all(map(torch.equal, numbers(case, pipe), expected))
        with pipe.profile() as measured:
            for _ in range(profiled):
                numbers(case, pipe)
        until = "B" if kind in ("zb-h1", "zb-h2") else "W"
        held = in_flight(measured.timeline.spans, until)
        bounds = [BOUNDS[kind](k, chunks) for k in range(K)]
        ours = [part.peak for part in pipe.memory.devices]
        planned = [total.peak_saved_bytes for total in pipe.plan.totals]
        by_stage = [part.peak for part in pipe.memory.stages]
        same = by_stage == [stage.peak_saved_bytes for stage in pipe.plan.stages]
        yield (
            kind,
            "yes" if ran_in_order(measured.found) else "**no**",
            "equal" if equal else "**differ**",
            f"{listed(held)} until {until}",
            listed(bounds),
            "yes" if all(map(int.__le__, held, bounds)) else "**no**",
            listed([round(n / MIB, 1) for n in ours]),
            listed([round(n / MIB, 1) for n in planned]),
            "yes" if same else "**no**",
        )


def listed(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


def times(
    case: Case, pipes: dict[str, autopipe.Pipeline], options: argparse.Namespace
) -> Iterator[tuple[object, ...]]:
    """Predicted and measured steps, a row for each schedule."""

    def side(pipe: autopipe.Pipeline) -> Side:
        return stepper(case.model, lambda: pipe(case.x, case.target))

    sides = {kind: side(pipe) for kind, pipe in pipes.items()}
    found = medians(alternate(sides, options.repeats))
    for kind, pipe in pipes.items():
        ahead, same_steps = predicted(pipe, sides[kind], options.profiled)
        row = (ahead, same_steps, found[kind], ahead / same_steps, ahead / found[kind])
        yield kind, *row, "yes" if abs(ahead / found[kind] - 1) <= 0.1 else "**no**"


def stage_0_saves(case: Case, chunks: int) -> Iterator[tuple[object, ...]]:
    """MiB that stage 0 saves at most under gpipe and 1f1b."""
    peaks = {}
    for kind in ("gpipe", "1f1b"):
        pipe = build(case, kind, chunks)
        numbers(case, pipe)
        peaks[kind] = pipe.memory.stages[0].peak
        planned = pipe.plan.stages[0].peak_saved_bytes
        share = peaks[kind] / peaks["gpipe"]
        yield chunks, kind, peaks[kind] / MIB, planned / MIB, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profiled", type=int, default=7, help="steps in a profile")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    print(machine())
    cores = two_cores()
    case = transformer_case(options.layers, options.width)
    pipes = {kind: build(case, kind, options.chunks) for kind in options.only}
    print(f"\nfour devices, {options.layers} layers, d {options.width}, M = {options.chunks}\n")
    head = ("schedule", "in order", "numbers", "in flight, by device", "published", "within it")
    saved = ("MiB saved, by device", "planned", "stages as planned")
    print(table((*head, *saved), checks(case, pipes, options.chunks, options.profiled)))
    print("\ntime, s; the loss in the model, per micro-batch, in the last stage\n")
    head = ("schedule", "predicted", "measured with it", "in rounds", "share", "share of rounds")
    with watching_others(cores):
        rows = list(times(case, pipes, options))
    print(table((*head, "within 10 %"), rows))
    print("\nwhat stage 0 saves at most, MiB (bar: 1f1b at most half)\n")
    head = ("M", "schedule", "measured", "planned", "share of gpipe's")
    print(table(head, stage_0_saves(case, 16)))


if __name__ == "__main__":
    main()
