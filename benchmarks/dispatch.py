"""What a pipeline's own work costs per action: two stages with next to nothing to compute.

    python -m benchmarks.dispatch
    python -m benchmarks.dispatch --actions 200 --repeats 3 --only gpipe

Each stage multiplies one number by a weight; the last one has a loss of two operators. A
micro-batch has one sample, and there are so many that a step has about 1,000 actions (a forward, a
backward, or a part of one, of one micro-batch at one stage). One side in every round, medians.
`plain` runs the same micro-batches one after the other in one thread, forward and backward.

- `µs per action`: the step over the number of its actions;
- `less plain`: the same without the time of `plain`, which computes what the actions compute.

torch.distributed.pipelining runs in two processes with gloo, torchgpipe and autopipe in threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor

import autopipe
from autopipe.passes.schedule import schedule
from benchmarks.gloo_stages import GlooStages
from benchmarks.gpipe_layers import torchgpiped
from benchmarks.rounds import (
    Side,
    alternate,
    check_gradients,
    gradients,
    machine,
    medians,
    on_core,
    stepper,
    table,
    two_cores,
    watching_others,
)
from benchmarks.step_cases import Case, accumulation, tiny_case

OURS = ("gpipe", "1f1b", "zb-h1")
THEIRS = ("ScheduleGPipe", "Schedule1F1B")


class Timed(NamedTuple):
    """A side that is compared.

    Attributes:
        step: the side.
        chunks: micro-batches of a step.
        actions: of a step.
    """

    step: Side
    chunks: int
    actions: int


def ours(kind: str, actions: int) -> tuple[Timed, Case]:
    """A schedule of autopipe with about so many actions."""
    of_one = sum(map(len, schedule(kind, 2, 4).devices)) / 4  # of one micro-batch, at both stages
    chunks = round(actions / of_one)
    case = tiny_case(chunks)
    pipe = autopipe.compile(
        case.model,
        ["cpu", "cpu"],
        chunks,
        schedule=kind,  # type: ignore[arg-type]
        remat="none",
        cut_at=["model.1"],
    )
    side = stepper(case.model, lambda: pipe(case.x, case.target))
    side()
    _, ready = pipe._programs.last
    count = sum(map(len, ready.lowered.scheduled.devices))
    return Timed(side, chunks, count), case


def check(name: str, case: Case, timed: Timed, found: Callable[[], list[Tensor]]) -> None:
    """Compare a side's gradients with those of plain micro-batches."""
    accumulation(case, timed.chunks)()
    expected = gradients(case.layers.parameters())
    timed.step()
    check_gradients(name, found(), expected)


def rows(
    timed: dict[str, Timed], cores: tuple[int, int], repeats: int
) -> Iterator[tuple[object, ...]]:
    """Time all sides; a row each."""

    def plain(chunks: int) -> Side:
        loop = accumulation(tiny_case(chunks), chunks)

        def run() -> float:
            with on_core(cores[0]):
                return loop()

        return run

    sides = {name: side.step for name, side in timed.items()}
    plains = {f"plain, M = {c}": plain(c) for c in sorted({t.chunks for t in timed.values()})}
    found = medians(alternate(plains | sides, repeats))
    for name, (_, chunks, actions) in timed.items():
        step, loop = found[name], found[f"plain, M = {chunks}"]
        micro = 1e6 / actions
        yield name, chunks, actions, step * 1e3, loop * 1e3, step * micro, (step - loop) * micro


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("torchgpipe", "pipelining", *OURS))
    parser.add_argument("--actions", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    wanted = set(options.only or ("torchgpipe", "pipelining", *OURS))
    print(machine())
    cores = two_cores()
    timed: dict[str, Timed] = {}
    for kind in (kind for kind in OURS if kind in wanted):
        timed[f"ours, {kind}"], case = ours(kind, options.actions)
        own = partial(gradients, list(case.layers.parameters()))
        check(f"ours, {kind}", case, timed[f"ours, {kind}"], own)
    chunks, stages = options.actions // 4, None
    case = tiny_case(chunks)
    if "torchgpipe" in wanted:
        side = torchgpiped(case, chunks, 1, inside=True)
        timed["torchgpipe"] = Timed(side, chunks, 4 * chunks)
        own = partial(gradients, list(case.layers.parameters()))
        check("torchgpipe", case, timed["torchgpipe"], own)
    try:
        if "pipelining" in wanted:
            stages = GlooStages(partial(tiny_case, chunks), cores)
            for kind in THEIRS:
                name = f"pipelining, {kind}"
                stages.prepare(name, kind, chunks, 1)
                timed[name] = Timed(partial(stages.step, name), chunks, 4 * chunks)
                check(name, case, timed[name], partial(stages.gradients, name))
        with watching_others(cores):
            found = list(rows(timed, cores, options.repeats))
    finally:
        if stages is not None:
            stages.close()
    head = ("side", "M", "actions", "step, ms", "plain, ms", "µs per action", "less plain")
    print(f"\n{table(head, found)}")


if __name__ == "__main__":
    main()
