"""The simulator against a clock that ticks: unequal stages, transfers, every kind of schedule."""

from __future__ import annotations

import random
from typing import Any

import pytest

from autopipe.passes.schedule.actions import Scheduled
from autopipe.passes.schedule.build import schedule
from autopipe.passes.schedule.kinds import KINDS
from autopipe.passes.schedule.simulator import peak_bytes, simulate, simulate_schedule

EVERY = [(kind, None) for kind in KINDS] + [("interleaved", 1), ("interleaved", 3)]
Costs = dict[str, list[int]]


def ticks(scheduled: Scheduled, costs: Costs, transfer: int) -> list[list[tuple[int, int]]]:
    """Per device the (start, end) of its actions, found by looking at every device at every tick.

    Knows nothing of the simulator's: what must be done before what is written out below.
    """
    last = scheduled.stages - 1
    home = {a.stage: d for d, row in enumerate(scheduled.devices) for a in row}
    finished: dict[tuple[str, int, int], int] = {}
    spans: list[list[tuple[int, int]]] = [[] for _ in scheduled.devices]

    def there(letter: str, stage: int, m: int, device: int, now: int) -> bool:
        end = finished.get((letter, stage, m))
        way = 0 if home[stage] == device else transfer
        return end is not None and end + way <= now

    def can_start(device: int, now: int) -> bool:
        action = scheduled.devices[device][len(spans[device])]
        k, m, phase = action.stage, action.microbatch, action.phase
        if phase == "F":
            return k == 0 or there("F", k - 1, m, device, now)
        before = {"R": "F", "B": "R", "W": "B"}[phase[0]]
        gradient = "B" not in phase or k == last or there("B", k + 1, m, device, now)
        return gradient and there(before, k, m, device, now)

    now = 0
    while any(len(s) < len(row) for s, row in zip(spans, scheduled.devices, strict=True)):
        changed = True
        while changed:  # actions that take no time may follow one another within a tick
            changed = False
            for device, row in enumerate(scheduled.devices):
                done = spans[device]
                free = not done or done[-1][1] <= now
                if free and len(done) < len(row) and can_start(device, now):
                    action = row[len(done)]
                    end = now + sum(costs[letter][action.stage] for letter in action.phase)
                    done.append((now, end))
                    for letter in action.phase:
                        finished[letter, action.stage, action.microbatch] = end
                    changed = True
        now += 1
        assert now < 10_000, "a deadlock"
    return spans


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("kind", "v"), EVERY)
def test_unequal_stages_agree_with_a_clock(kind: str, v: int | None, early: bool) -> None:
    draw = random.Random(f"{kind} {v} {early}")
    for _ in range(25):
        K, M, transfer = draw.randint(1, 6), draw.randint(1, 9), draw.randint(0, 3)
        made = schedule(kind, K, M, virtual_stages=v, early_recompute=early)
        costs = {letter: [draw.randint(0, 6) for _ in range(made.stages)] for letter in "FRBW"}
        timeline = simulate_schedule(
            made,
            forward=costs["F"],
            recompute=costs["R"],
            backward=costs["B"],
            weight=costs["W"],
            transfer=transfer,
        )
        timeline.verify(made)
        expected = ticks(made, costs, transfer)
        assert [[(s.start, s.end) for s in row] for row in timeline.spans] == expected
        assert timeline.makespan == max(row[-1][1] for row in expected)
        lengths = [row[-1][1] - row[0][0] for row in expected]
        assert timeline.device_spans == tuple(lengths)
        work = max(sum(end - start for start, end in row) for row in expected)
        if max(lengths):
            assert timeline.bubble == pytest.approx(1 - work / max(lengths))


@pytest.mark.parametrize(("kind", "v"), EVERY)
def test_memory_agrees_with_a_list_of_what_is_kept(kind: str, v: int | None) -> None:
    """Every phase of every action, the sets of saved values written down one by one."""
    draw = random.Random(f"{kind} {v} memory")
    for early in (False, True):
        K, M = draw.randint(1, 6), draw.randint(1, 9)
        made = schedule(kind, K, M, virtual_stages=v, early_recompute=early)
        saved, remade, left = ([draw.randint(0, 9) for _ in range(made.stages)] for _ in range(3))
        expected = []
        for row in made.devices:
            kept: dict[tuple[int, int], int] = {}
            most = 0
            for action in row:
                one, k = (action.stage, action.microbatch), action.stage
                for letter in action.phase:
                    before = dict(kept)
                    sizes = {"F": saved[k], "R": saved[k] + remade[k], "B": left[k], "W": 0}
                    kept[one] = sizes[letter]
                    most = max(most, sum(before.values()), sum(kept.values()))
            expected.append(most)
        assert peak_bytes(made, saved, remade, left) == tuple(expected)


def test_memory_of_one_micro_batch_by_hand() -> None:
    """F saves 5, R adds 8, B leaves 3 of them or whatever W is said to need."""
    made = schedule("zb-h1", 1, 1)
    assert peak_bytes(made, 5, 8, 3) == (13,)
    assert peak_bytes(made, 5, 8, 20) == (20,)  # B may leave more than it finds
    assert peak_bytes(made, 5) == (5,)
    late = schedule("zb-h1", 2, 2)  # device 1: F0 B0 F1 B1 W0 W1
    assert " ".join(map(str, late.devices[1])) == "F1.0 RB1.0 F1.1 RB1.1 W1.0 W1.1"
    assert peak_bytes(late, 5, 0, 3)[1] == 3 + 5
    assert peak_bytes(late, 5, 0, 0)[1] == 5
    assert peak_bytes(late, 5)[1] == 5 + 5  # all is kept until W
    assert peak_bytes(schedule("gpipe", 2, 4, backward=False), 5) == (0, 0)


COMMON: dict[str, Any] = {"stages": 3, "chunks": 6, "backward": 2, "weight": 1, "transfer": 1}


@pytest.mark.parametrize("kind", ["interleaved", "zb-v"])
def test_times_of_devices_are_shared_out_among_their_stages(kind: str) -> None:
    homes = {"interleaved": [0, 1, 2, 0, 1, 2], "zb-v": [0, 1, 2, 2, 1, 0]}[kind]
    by_device = [2.0, 4.0, 6.0]
    by_stage = [by_device[device] / 2 for device in homes]
    one = simulate(kind, forward=by_device, saved_bytes=by_device, **COMMON)
    two = simulate(kind, forward=by_stage, saved_bytes=by_stage, **COMMON)
    assert one == two
    assert simulate(kind, forward=[4.0] * 6, **COMMON) == simulate(kind, forward=8.0, **COMMON)


def test_the_same_arguments_are_the_same_work_for_every_kind() -> None:
    for kind in KINDS:
        timeline = simulate(kind, forward=4, **COMMON)
        for row in timeline.spans:
            assert sum(span.end - span.start for span in row) == 6 * (4 + 2 + 1)


@pytest.mark.parametrize("v", [2, 3])
def test_a_wrong_number_of_times_names_both_right_ones(v: int) -> None:
    with pytest.raises(ValueError, match=f"`forward`\n  expected: one value, or 3 or {3 * v}"):
        simulate("interleaved", forward=[1.0] * 4, virtual_stages=v, **COMMON)
    with pytest.raises(ValueError, match="one value, or 3\n"):
        simulate("zb-h1", forward=[1.0] * 6, **COMMON)
