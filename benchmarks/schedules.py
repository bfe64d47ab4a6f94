"""Simulated schedules: published bubble rates, closed forms, memory, and simulation time.

    python -m benchmarks.schedules                    # four tables
    python -m benchmarks.schedules --trace DIR        # and a trace file per schedule, for Perfetto

No model and no device: everything is `autopipe.simulate`. The tables are

- rates: arXiv 2401.10241, times of its Table 9 (ms) in, bubble rates beside those of its Table 5;
- forms: the closed forms, over every K and M up to the limits in the docstring of `forms`;
- memory: the largest device's, in micro-batches of a device's whole share, K = 8, M = 24;
- speed: seconds to simulate K = 32, M = 96, memory included.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import autopipe
from autopipe.passes.schedule import KINDS

Row = tuple[int, int, tuple[float, ...], tuple[float, ...], int]

# K, M, then F, B, W and transfer in ms (Table 9); 1F1B, 1F1B-I, ZB-H1, ZB-H2 (Table 5); the model's
# stages per device with 1F1B-I, one layer each. The rows with M = 3K have been compared with the
# paper, but for 1F1B-I; that column and the other rows were written down without it at hand.
PUBLISHED: list[Row] = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1055, 0.1585, 0.1083), 3),
    (8, 32, (18.513, 18.086, 9.331, 0.626), (0.1985, 0.0818, 0.1242, 0.0837), 3),
    (8, 64, (18.546, 18.097, 9.321, 0.762), (0.1240, 0.0443, 0.0674, 0.0444), 3),
    (8, 24, (29.718, 29.444, 19.927, 0.527), (0.2347, 0.0808, 0.1323, 0.0698), 4),
    (8, 32, (29.802, 29.428, 19.530, 0.577), (0.1898, 0.0628, 0.1045, 0.0559), 4),
    (8, 64, (29.935, 29.621, 19.388, 0.535), (0.1091, 0.0320, 0.0554, 0.0294), 4),
    (16, 48, (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1104, 0.1397, 0.0672), 3),
    (16, 64, (11.307, 11.254, 8.101, 0.379), (0.2082, 0.0852, 0.1088, 0.0516), 3),
    (16, 128, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0445, 0.0576, 0.0266), 3),
    (32, 96, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1493, 0.1421, 0.0641), 2),
    (32, 128, (10.408, 10.204, 7.703, 0.408), (0.2168, 0.1164, 0.1106, 0.0490), 2),
    (32, 256, (10.402, 10.248, 7.698, 0.460), (0.1352, 0.0624, 0.0594, 0.0257), 2),
]

Form = tuple[str, str, dict[str, object], Callable[..., bool], Callable[..., float]]

FORMS: list[Form] = [
    (
        "gpipe, 1f1b: makespan (M+K-1)(F+B+W)",
        "gpipe 1f1b",
        {},
        lambda K, M, F, B, W: True,
        lambda K, M, F, B, W: (M + K - 1) * (F + B + W),
    ),
    (
        "gpipe, R = F run early: (M+K-1)F + M(R+B+W) + (K-1)(B+W)",
        "gpipe",
        {"early_recompute": True},
        lambda K, M, F, B, W: True,
        lambda K, M, F, B, W: (M + K - 1) * F + M * (F + B + W) + (K - 1) * (B + W),
    ),
    (
        "interleaved, v = 2, K divides M: span M(F+B+W) + (K-1)(F+B+W)/2",
        "interleaved",
        {},
        lambda K, M, F, B, W: M % K == 0,
        lambda K, M, F, B, W: (M + (K - 1) / 2) * (F + B + W),
    ),
    (
        "zb-h1, M >= K, W <= F: span M(F+B+W) + (K-1)(F+B-W)",
        "zb-h1",
        {},
        lambda K, M, F, B, W: M >= K and W <= F,
        lambda K, M, F, B, W: M * (F + B + W) + (K - 1) * (F + B - W),
    ),
    (
        "zb-h2, M >= 2K-1, W <= min(F, B): span M(F+B+W) + (K-1)(F+B-2W)",
        "zb-h2",
        {},
        lambda K, M, F, B, W: M >= 2 * K - 1 and F >= W <= B,
        lambda K, M, F, B, W: M * (F + B + W) + (K - 1) * (F + B - 2 * W),
    ),
    (
        "zb-v, M >= 2K-1, F = B = W: span M(F+B+W)",
        "zb-v",
        {},
        lambda K, M, F, B, W: M >= 2 * K - 1 and F == B == W,
        lambda K, M, F, B, W: M * (F + B + W),
    ),
    (
        "zb-h1, zb-h2, M <= K, W <= min(F, B): makespan (M+K-1)(F+B) + W",
        "zb-h1 zb-h2",
        {},
        lambda K, M, F, B, W: M <= K and F >= W <= B,
        lambda K, M, F, B, W: (M + K - 1) * (F + B) + W,
    ),
]
"""Text, kinds, their options, condition (K, M, F, B, W), and value (K, M, F, B, W)."""


def rates() -> Iterator[str]:
    """Bubble rates, ours beside the paper's."""
    yield f"{'K, M':>8}  {'kind':15} {'paper':>6} {'ours':>7}"
    for K, M, times, published, v in PUBLISHED:
        forward, backward, weight, transfer = times
        kinds = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
        for kind, paper in zip(kinds, (*published, None), strict=True):
            timeline = autopipe.simulate(
                kind,
                stages=K,
                chunks=M,
                forward=forward,
                backward=backward,
                weight=weight,
                transfer=transfer,
                virtual_stages=v if KINDS[kind].any_virtual_stages else None,
            )
            name = f"{kind} v={v}" if KINDS[kind].any_virtual_stages else kind
            head = f"{K:>3}, {M:>3}  {name:15}"
            if paper is None:
                yield f"{head}       {timeline.bubble:7.4f}"
                continue
            work = M * (forward + backward + weight)
            hops = (max(timeline.device_spans) - work / (1 - paper)) / transfer
            off = round(timeline.bubble, 4) - paper
            note = f"{off:+.4f}, {hops:+.1f} transfers in the span" if abs(off) > 1e-9 else "equal"
            yield f"{head} {paper:6.4f} {timeline.bubble:7.4f}  {note}"


def forms(stages: int = 8, chunks: int = 20) -> Iterator[str]:
    """K <= 8, M <= 20, times (F, B, W) out of {1, 2, 3}, no transfers: how many cases are met."""
    for text, kinds, options, holds, value in FORMS:
        cases = met = 0
        sizes = itertools.product(range(1, stages + 1), range(1, chunks + 1))
        for (K, M), times in itertools.product(sizes, itertools.product((1, 2, 3), repeat=3)):
            if not holds(K, M, *times):
                continue
            for kind in kinds.split():
                F, B, W = times
                timeline = autopipe.simulate(
                    kind,
                    stages=K,
                    chunks=M,
                    forward=F,
                    backward=B,
                    weight=W,
                    recompute=F if options else 0,
                    **options,  # type: ignore[arg-type]
                )
                span = "span" in text
                ours = max(timeline.device_spans) if span else timeline.makespan
                cases += 1
                met += abs(ours - value(K, M, *times)) < 1e-6
        yield f"{text:66} {met} of {cases}"


def memory(stages: int = 8, chunks: int = 24) -> Iterator[str]:
    """Everything kept from F to W; and, as an example, with B freeing half of it."""
    yield f"{'kind':12} kept until W   half freed by B"
    for kind in KINDS:
        peaks = []
        for left in (None, 0.5):
            timeline = autopipe.simulate(
                kind,
                stages=stages,
                chunks=chunks,
                forward=1,
                backward=1,
                weight=1,
                saved_bytes=1,
                weight_bytes=left,
            )
            peaks.append(max(timeline.peak_bytes or (0,)))
        yield f"{kind:12} {peaks[0]:12g} {peaks[1]:17g}"


def speed(stages: int = 32, chunks: int = 96) -> Iterator[str]:
    """The slowest of five runs: wall time and processor time."""
    yield f"{'kind':12}   wall   processor"
    for kind in KINDS:
        wall, processor = [], []
        for _ in range(5):
            start, spent = time.perf_counter(), time.process_time()
            autopipe.simulate(
                kind, stages=stages, chunks=chunks, forward=2, backward=2, weight=1, saved_bytes=1
            )
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - spent)
        yield f"{kind:12} {max(wall):.2f} s      {max(processor):.2f} s"


def traces(folder: Path) -> Iterator[str]:
    """A trace per schedule: K = 4, M = 8, in ms."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        timeline = autopipe.simulate(kind, stages=4, chunks=8, forward=2, backward=2, weight=2)
        path = folder / f"{kind}.json"
        path.write_text(timeline.to_chrome_trace(microseconds=1e3))
        yield str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="folder for trace files")
    folder = parser.parse_args().trace
    for title, table in [
        ("bubble rates (arXiv 2401.10241, Tables 9 and 5)", rates),
        ("closed forms", forms),
        ("largest device's memory, in micro-batches; K = 8, M = 24", memory),
        ("time to simulate K = 32, M = 96", speed),
    ]:
        print(f"\n{title}\n")
        for line in table():
            print(line)
    for line in traces(folder) if folder else ():
        print("wrote", line)


if __name__ == "__main__":
    main()
