"""A training step on two cores: eager torch, torchgpipe, torch.distributed.pipelining, autopipe.

    python -m benchmarks.against_peers
    python -m benchmarks.against_peers --models transformer --chunks 8 --only gpipe --repeats 3

Two stages (two devices), one core and one thread per operator each; nothing is rematerialized. Two
models, batch 16, sequence 128, vocabulary 8192: the pre-norm transformer of `benchmarks.models`
(8 layers, d 512) and Hugging Face's GPT-2 (12 layers, d 512, its head not tied). The sides:

- plain: eager torch on one core, the whole batch, or the micro-batches one after the other;
- torchgpipe, which on the CPU computes in one thread at a time (see `benchmarks.gpipe_layers`);
- pipelining: torch.distributed.pipelining, two processes with gloo, each pinned to a core;
- ours: `autopipe.compile`, by schedule; the V kinds and interleaved have two stages per device.

What is cut by hand is cut between layers at the three places that balance best by the time of each
layer; the fastest in a short trial is kept. Gradients of each side are compared with eager's on the
whole batch first. Then one step of each side in every round; medians. The gradients of the step
before are freed outside of the time. A step of two processes is timed from the first start to the
last end, after a barrier.

`speed-up` is over the faster plain side; `of the ideal` is its share of KM/(M+K-1). Then, for each
schedule of ours, a profile of several steps: `simulated` is `measured.simulated.makespan`, the step
that the schedule gives with the phases' times of that run; `in profile` and `in rounds` are its
share of the steps timed there (bar 0.95). `benchmarks.losses` says what is lost in the profile.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial

import autopipe
from benchmarks.gloo_stages import GlooStages
from benchmarks.gpipe_layers import torchgpiped
from benchmarks.losses import losses_of
from benchmarks.rounds import (
    Side,
    alternate,
    check_gradients,
    fastest,
    gradients,
    machine,
    medians,
    on_core,
    stepper,
    table,
    two_cores,
    watching_others,
)
from benchmarks.step_cases import Case, accumulation, gpt2_case, transformer_case

OURS = ("gpipe", "1f1b", "zb-h1", "zb-h2", "interleaved", "zb-v", "v-half", "v-min")
CASES = {"transformer": (transformer_case, 8), "gpt2": (gpt2_case, 12)}
"""What builds the case, and with how many layers."""

INSIDE = "per micro-batch, in the last stage"


class Comparison:
    """All sides for one model and one number of micro-batches.

    Args:
        case: the model.
        stages: the processes of torch.distributed.pipelining; None: without that side.
        chunks: micro-batches.
        cores: two.
        options: of the command line.

    Attributes:
        sides: by name.
        loss_at: where each side computes the loss.
        cut: by name, how many layers the first stage of a side has that is cut by hand.
        pipes: ours, by schedule.
    """

    def __init__(
        self,
        case: Case,
        stages: GlooStages | None,
        chunks: int,
        cores: tuple[int, int],
        options: argparse.Namespace,
    ) -> None:
        self.case, self.stages, self.chunks, self.cores = case, stages, chunks, cores
        self.options = options
        self.sides: dict[str, Side] = {}
        self.loss_at: dict[str, str] = {}
        self.cut: dict[str, int] = {}
        self.pipes: dict[str, autopipe.Pipeline] = {}
        with on_core(cores[0]):
            splits = case.splits()
        self._add_plain()
        if options.wants("torchgpipe"):
            self._add_torchgpipe(splits)
        if stages is not None:
            self._add_pipelining(stages, splits)
        for kind in filter(options.wants, OURS):
            self._add_ours(kind)

    def _add(self, name: str, side: Side, loss_at: str, *, cut: int = 0) -> None:
        """Add a side, once its gradients are right."""
        side()
        if name.startswith("pipelining"):
            assert self.stages is not None
            found = self.stages.gradients(name)
        else:
            found = gradients(self.case.layers.parameters())
        if name == "plain, whole batch":
            self.expected = found
        check_gradients(name, found, self.expected)
        self.sides[name], self.loss_at[name] = side, loss_at
        if cut:
            self.cut[name] = cut

    def _add_plain(self) -> None:
        case = self.case
        whole = stepper(case.model, lambda: case.model(case.x, case.target))
        self._add("plain, whole batch", self._on_one_core(whole), "on the whole batch")
        parts = accumulation(case, self.chunks)
        self._add("plain, micro-batches", self._on_one_core(parts), "per micro-batch")

    def _on_one_core(self, side: Side) -> Side:
        def run() -> float:
            with on_core(self.cores[0]):
                return side()

        return run

    def _add_torchgpipe(self, splits: list[int]) -> None:
        for inside in (True, False):
            made = {s: torchgpiped(self.case, self.chunks, s, inside=inside) for s in splits}
            best = fastest(made)
            name = f"torchgpipe, loss {'inside' if inside else 'outside'}"
            self._add(name, made[best], INSIDE if inside else "on the whole batch", cut=best)

    def _add_pipelining(self, stages: GlooStages, splits: list[int]) -> None:
        for kind in ("ScheduleGPipe", "Schedule1F1B"):
            made = {}
            for split in splits:
                name = f"pipelining, {kind}, M {self.chunks}, {split} layers first"
                stages.prepare(name, kind, self.chunks, split)
                made[split] = partial(stages.step, name)
            best = fastest(made)
            name = f"pipelining, {kind}"
            stages.prepare(name, kind, self.chunks, best)
            self._add(name, partial(stages.step, name), INSIDE, cut=best)

    def _add_ours(self, kind: str) -> None:
        case = self.case
        pipe = self.pipes[kind] = autopipe.compile(
            case.model,
            ["cpu", "cpu"],
            self.chunks,
            schedule=kind,  # type: ignore[arg-type]
            remat="none",
            backend=self.options.backend,
            profile=self.options.profile,
        )
        side = stepper(case.model, lambda: pipe(case.x, case.target))
        self._add(f"ours, {kind}", side, INSIDE)

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Time all sides; a row each, and one that compares the best."""
        times = medians(alternate(self.sides, self.options.repeats))
        self.times = times
        plain = min(time for name, time in times.items() if name.startswith("plain"))
        ideal = 2 * self.chunks / (self.chunks + 1)
        for name, seconds in times.items():
            speed = plain / seconds
            yield (
                self.chunks,
                name,
                self.loss_at[name],
                self.cut.get(name, ""),
                seconds,
                speed,
                ("" if name.startswith("plain") else speed / ideal),
            )
        best: dict[str, str] = {}
        for side in ("ours", "torchgpipe", "pipelining"):
            found = [name for name in times if name.startswith(side)]
            if found:
                best[side] = min(found, key=times.__getitem__)
        for side, name in best.items():
            if side != "ours" and "ours" in best:
                ratio = times[name] / times[best["ours"]]
                yield self.chunks, f"**{best['ours']}** over {name}", "", "", "", ratio, ""

    def predictions(self) -> Iterator[tuple[object, ...]]:
        """Simulated steps beside measured ones, a row for each schedule of ours."""
        for kind, pipe in self.pipes.items():
            side = self.sides[f"ours, {kind}"]
            side()
            with pipe.profile() as measured:
                steps = [side() for _ in range(self.options.profiled)]
            simulated, timed = measured.simulated.makespan, statistics.median(steps)
            rounds = self.times[f"ours, {kind}"]
            row = (measured.step_seconds, timed, rounds, simulated / timed, simulated / rounds)
            lost = (f"{part / timed:.1%}" for part in losses_of(measured, timed))
            yield self.chunks, kind, simulated, *row, *lost


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--chunks", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--only", nargs="+", choices=("torchgpipe", "pipelining", *OURS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profiled", type=int, default=7, help="steps in a profile")
    parser.add_argument("--layers", type=int, help="of the model, for a quick run")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--profile", action="store_true", help="ours is cut by measured times")
    parser.add_argument("--backend", default="eager", choices=("eager", "inductor"))
    return parser.parse_args()


def compare(name: str, cores: tuple[int, int], options: argparse.Namespace) -> None:
    """Print both tables of one model."""
    build, layers = CASES[name]
    make = partial(build, options.layers or layers, options.width)
    case = make()
    stages = GlooStages(make, cores) if options.wants("pipelining") else None
    print(f"\n{name}, {options.layers or layers} layers, backend of ours {options.backend}")
    try:
        for chunks in options.chunks:  # each with tables of its own: a run takes long
            comparison = Comparison(case, stages, chunks, cores, options)
            with watching_others(cores):
                rows, predictions = [*comparison.rows()], [*comparison.predictions()]
            print_tables(rows, predictions)
    finally:
        if stages is not None:
            stages.close()


def print_tables(rows: list[tuple[object, ...]], predictions: list[tuple[object, ...]]) -> None:
    """Print what was measured for one number of micro-batches."""
    head = ("M", "side", "loss", "layers first", "step, s", "speed-up", "of the ideal")
    print(f"\n{table(head, rows)}\n\nsimulated with the measured phases, beside measured, s\n")
    columns = ("M", "schedule", "simulated", "first to last action", "step in profile")
    columns += ("step in rounds", "share in profile", "share in rounds")
    columns += ("lost: uneven phases", "waiting", "between actions", "outside")
    print(table(columns, predictions), flush=True)


def main() -> None:
    options = arguments()
    options.wants = lambda side: options.only is None or side in options.only
    print(machine())
    cores = two_cores()
    for name in options.models:
        compare(name, cores, options)


if __name__ == "__main__":
    main()
