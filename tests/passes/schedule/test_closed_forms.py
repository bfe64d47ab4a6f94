"""Closed forms of the literature as properties, over all small K, M, F, B, W, and their limits.

Where a form holds under conditions alone, the same test looks at the other side of the boundary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from autopipe.passes.schedule.kinds import KINDS
from autopipe.passes.schedule.simulator import simulate
from autopipe.passes.schedule.timeline import Timeline

TIMES = (0, 2, 3)


def sizes(K: int, M: int) -> Iterator[tuple[int, int]]:
    """All (stages, micro-batches) up to those."""
    return itertools.product(range(1, K + 1), range(1, M + 1))


def costs() -> list[tuple[int, int, int]]:
    """(F, B, W), of which the forward takes time: a pipeline without work has no bubble."""
    return [c for c in itertools.product(TIMES, repeat=3) if c[0]]


def run(kind: str, K: int, M: int, F: float, B: float, W: float, **more: object) -> Timeline:
    times = {"forward": F, "backward": B, "weight": W, **more}
    return simulate(kind, stages=K, chunks=M, **times)  # type: ignore[arg-type]


def idle(timeline: Timeline, work: float) -> float:
    """Bubble as a time: the longest device's span without what each device has to do."""
    return max(timeline.device_spans) - work


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b_wait_for_k_minus_1_micro_batches(kind: str) -> None:
    """(M + K - 1)(F + R + B + W), whatever M: a share (K - 1)/(M + K - 1) is idle."""
    for (K, M), (F, B, W) in itertools.product(sizes(5, 11), costs()):
        whole = F + B + W + 1
        timeline = run(kind, K, M, F, B, W, recompute=1)
        assert timeline.makespan == (M + K - 1) * whole
        assert idle(timeline, M * whole) == (K - 1) * whole
        assert timeline.bubble == pytest.approx((K - 1) / (M + K - 1))


def test_gpipe_with_rematerialization_while_waiting() -> None:
    """(M + K - 1)F + M(R + b) + (K - 1)b with b = B + W, whatever the times."""
    for (K, M), (F, B, W), R in itertools.product(sizes(4, 8), costs(), TIMES):
        timeline = run("gpipe", K, M, F, B, W, recompute=R, early_recompute=True)
        b = B + W
        assert timeline.makespan == (M + K - 1) * F + M * (R + b) + (K - 1) * b


@pytest.mark.parametrize("kind", KINDS)
def test_early_rematerialization_never_takes_longer(kind: str) -> None:
    gains = 0
    for (K, M), (F, B, W) in itertools.product(sizes(4, 7), costs()):
        late = run(kind, K, M, F, B, W, recompute=F).makespan
        early = run(kind, K, M, F, B, W, recompute=F, early_recompute=True).makespan
        assert early <= late
        gains += early < late
    assert gains


@pytest.mark.parametrize("v", [1, 2, 3, 4])
def test_interleaving_divides_the_bubble_by_v(v: int) -> None:
    """(K - 1)(F + B + W)/v if M is a multiple of K."""
    for (K, groups), (F, B, W) in itertools.product(sizes(5, 3), costs()):
        timeline = run("interleaved", K, K * groups, F, B, W, virtual_stages=v)
        bubble = idle(timeline, K * groups * (F + B + W))
        assert bubble == pytest.approx((K - 1) * (F + B + W) / v)


def test_interleaving_with_other_numbers_of_micro_batches_gains_less() -> None:
    """More is idle than the form says; the step is no longer than with the next multiple of K."""
    for K, M in sizes(5, 12):
        if M % K:
            work, form = M * 3, (K - 1) * 3 / 2
            timeline = run("interleaved", K, M, 1, 1, 1)
            assert idle(timeline, work) > form
            assert timeline.makespan <= run("interleaved", K, M + -M % K, 1, 1, 1).makespan


def test_zb_h1() -> None:
    """(K - 1)(F + B - W) if M >= K, exactly where W <= F."""
    for (K, M), (F, B, W) in itertools.product(sizes(5, 9), costs()):
        if M >= K > 1:
            bubble = idle(run("zb-h1", K, M, F, B, W), M * (F + B + W))
            assert (bubble == (K - 1) * (F + B - W)) == (W <= F)


def test_zb_h2() -> None:
    """(K - 1)(F + B - 2W) if W <= min(F, B), exactly where M >= 2K - 1; not where W > F."""
    for (K, M), (F, B, W) in itertools.product(sizes(5, 11), costs()):
        same = idle(run("zb-h2", K, M, F, B, W), M * (F + B + W)) == (K - 1) * (F + B - 2 * W)
        if K > 1 and 0 < W <= min(F, B):
            assert same == (M >= 2 * K - 1)
        if K > 1 and W > F:
            assert not same


def test_zb_v_has_no_bubble_where_all_times_are_equal() -> None:
    """F = B = W, exactly from M = 2K - 1 on."""
    for (K, M), time in itertools.product(sizes(8, 20), (1, 3)):
        bubble = idle(run("zb-v", K, M, time, time, time), 3 * time * M)
        assert (bubble == 0) == (M >= 2 * K - 1)
    for F, B, W in [(2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 3, 2)]:
        assert idle(run("zb-v", 4, 12, F, B, W), 12 * (F + B + W)) > 0


def test_few_micro_batches() -> None:
    """M <= K: (M + K - 1)(F + B) + W if W <= min(F, B), where 1F1B takes all of W each time."""
    for (K, M), (F, B, W) in itertools.product(sizes(6, 7), costs()):
        zero_bubble = (M + K - 1) * (F + B) + W
        if F < W or B < W:
            continue
        for kind in ("zb-h1", "zb-h2"):
            makespan = run(kind, K, M, F, B, W).makespan
            if M <= K:
                assert makespan == zero_bubble
            elif W and (kind == "zb-h1" or M > 2 * K - 1):
                assert makespan > zero_bubble  # a device is busy throughout, with W's too
        if M <= K:
            makespan = run("zb-v", K, M, F, B, W).makespan
            assert makespan <= zero_bubble
            assert makespan == zero_bubble or not F == B == W


@pytest.mark.parametrize(
    ("kind", "v", "held"),
    [
        # on device k, in units of what one device's stages save of a micro-batch; M large enough
        ("gpipe", 1, lambda K, k, M: M),
        ("1f1b", 1, lambda K, k, M: K - k),
        ("interleaved", 2, lambda K, k, M: (2 * (K - 1 - k) + K + 1) / 2),
        ("interleaved", 4, lambda K, k, M: (2 * (K - 1 - k) + 3 * K + 1) / 4),
        ("zb-h1", 1, lambda K, k, M: K),
        ("zb-h2", 1, lambda K, k, M: 2 * K - 1),
        ("zb-v", 2, lambda K, k, M: K),
    ],
)
def test_peak_memory(kind: str, v: int, held: object) -> None:
    """1F1B's is K - k; ZB-H1 and ZB-V have its largest on all devices, ZB-H2 2K - 1; interleaving
    takes 1 + (K - 1)/vK times 1F1B's (arXiv 2205.05198, section 4.2.3)."""
    for K in range(1, 7):
        M = 4 * K
        timeline = run(kind, K, M, 1, 1, 1, virtual_stages=v, saved_bytes=64)
        assert timeline.peak_bytes == tuple(64 * held(K, k, M) for k in range(K))  # type: ignore[operator]
        if kind == "interleaved":
            assert timeline.peak_bytes[0] == pytest.approx(64 * K * (1 + (K - 1) / (v * K)))
