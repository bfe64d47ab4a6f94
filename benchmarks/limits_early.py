"""Full rematerialization while a device waits, beside its limit.

    python -m benchmarks.limits_early [steps]

The transformer of `benchmarks.two_cores` (8 layers, d 512, sequence 128, vocabulary 8192), batch
16, in two stages on two cores, M = 4 micro-batches, one thread per operator; the loss is in the
model, and the cut is planned with the times of a few steps before. With R in the bubble and equal
stages a step takes

    (M+K-1) f + M (r+b) + (K-1) b

f, r and b are the seconds that a stage computes for one micro-batch, without waiting, measured in
the same step (`pipe.profile`): the mean over micro-batches and stages. Where R is no action of its
own, its time is taken for that of a forward. Beside it: the step that is simulated with each
stage's own times, which adds what their imbalance costs. Variants alternate, one step each. Bar:
0.95 of the limit, R early.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import autopipe
from autopipe.passes.schedule import DeviceSchedule, simulate_actions
from autopipe.planning.measured import Measured
from benchmarks.models import transformer

K, M, BATCH, VOCABULARY, SEQUENCE = 2, 4, 16, 8192, 128


class WithLoss(nn.Module):
    """The transformer and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = transformer()

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.body(ids).flatten(0, 1), ids.flatten())


class Times(NamedTuple):
    """Seconds of one micro-batch, the mean over the stages: F; R; B and W together."""

    f: float
    r: float
    b: float

    @property
    def limit(self) -> float:
        return (M + K - 1) * self.f + M * (self.r + self.b) + (K - 1) * self.b


class Variant:
    """A pipeline of the model, and its steps."""

    def __init__(
        self, kind: str, early: bool, ids: Tensor, profile: Measured | None = None
    ) -> None:
        self.name = f"{kind}, R {'early' if early else 'with its B'}"
        self.ids = ids
        never = mock.patch.object(DeviceSchedule, "waiting", return_value=())
        with nullcontext() if early else never:
            self.pipe = autopipe.compile(
                WithLoss(),
                ["cpu"] * K,
                M,
                schedule=kind,
                remat="full",
                profile=profile or False,
                kwargs={"ids": ids},
            )
            self.step()
        phases = {a.phase for row in self.pipe.scheduled.devices for a in row}
        assert ("R" in phases) == early, phases

    def step(self) -> float:
        self.pipe.zero_grad()
        start = time.perf_counter()
        self.pipe(ids=self.ids).backward()
        return time.perf_counter() - start


class Found(NamedTuple):
    """One step: how long it took, the mean times of its stages, and what these would allow."""

    seconds: float
    times: Times
    simulated: float
    balance: float


def found_in(seconds: float, measured: Measured) -> Found:
    """Means within a step: other processes slow down single actions."""
    (line,) = measured.steps
    spans: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in line.spans:
        for span in row:
            spans[span.action.stage, span.action.phase].append(span.busy)
    mean = {key: statistics.mean(found) for key, found in spans.items()}
    work = [sum(t for (stage, _), t in mean.items() if stage == k) for k in range(K)]
    f = statistics.mean(mean[k, "F"] for k in range(K))
    r = statistics.mean(mean.get((k, "R"), mean[k, "F"]) for k in range(K))
    times = Times(f, r, statistics.mean(work) - f - r)
    own = simulate_actions(
        measured.found.scheduled, lambda phase, k, m: mean[k, phase], lambda *message: 0.0
    )
    return Found(seconds, times, own.makespan, statistics.mean(work) / max(work))


def report(name: str, steps: list[Found]) -> None:
    def median(of: Callable[[Found], float]) -> float:
        return statistics.median(map(of, steps))

    f, r, b = (1e3 * statistics.median(step.times[i] for step in steps) for i in range(3))
    print(
        f"{name:20} {median(lambda s: s.times.limit / s.seconds):.3f} of the limit,"
        f" {median(lambda s: s.simulated / s.seconds):.3f} of what its own stages allow;"
        f" step {1e3 * median(lambda s: s.seconds):.0f} ms, f {f:.1f}, r {r:.1f}, b {b:.1f} ms,"
        f" balance {median(lambda s: s.balance):.3f}; medians of {len(steps)} steps"
    )


def main(steps: int = 9) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    first = Variant("gpipe", True, ids)
    with first.pipe.profile() as before:
        for _ in range(3):
            first.step()
    variants = [Variant(kind, e, ids, before) for kind in ("gpipe", "1f1b") for e in (True, False)]
    rows: dict[str, list[Found]] = {v.name: [] for v in variants}
    for round_ in range(steps + 2):
        for variant in variants:
            with variant.pipe.profile() as measured:
                seconds = variant.step()
            if round_ > 1:
                rows[variant.name].append(found_in(seconds, measured))
    for name, found in rows.items():
        report(name, found)
    for early, late in (variants[:2], variants[2:]):
        pairs = zip(rows[late.name], rows[early.name], strict=True)
        ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
        print(f"{early.name}: {ratio:.3f} times as fast as with its B")
    print("bar: 0.95 of the limit, R early")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
