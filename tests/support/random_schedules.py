"""Valid schedules at random."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from autopipe.passes.schedule import Action, Scheduled

Rows = list[list[Action]]
CUTS = [("RBW",), ("RB", "W"), ("R", "BW"), ("R", "B", "W")]


@st.composite
def valid_schedules(
    draw: st.DrawFn, least_devices: int = 1, least_chunks: int = 1
) -> tuple[Scheduled, random.Random]:
    """Any placement, any order that could run, with a limit on what a stage keeps."""
    K = draw(st.integers(least_devices, 4))
    stages = draw(st.integers(K, 2 * K + 1))
    M, limit = draw(st.integers(least_chunks, 5)), draw(st.integers(1, 5))
    rng = random.Random(draw(st.integers(0, 2**32)))
    home = [*range(K), *(rng.randrange(K) for _ in range(stages - K))]
    rng.shuffle(home)
    left: dict[tuple[int, str], list[Action]] = {}
    for k in range(stages):
        left[k, "F"] = [Action("F", k, m) for m in range(M)]
        cuts = [rng.choice(CUTS) for _ in range(M)]
        for letter in "RBW":
            left[k, letter] = [
                Action(phase, k, m) for m in range(M) for phase in cuts[m] if phase[0] == letter
            ]
    done: set[tuple[str, int, int]] = set()
    rows: Rows = [[] for _ in range(K)]
    while any(left.values()):
        ready = [
            queue for queue in left.values() if queue and _may_run(queue[0], stages, limit, done)
        ]
        action = rng.choice(ready).pop(0)
        rows[home[action.stage]].append(action)
        done |= {(letter, action.stage, action.microbatch) for letter in action.phase}
    return Scheduled("drawn", stages, M, tuple(map(tuple, rows))), rng


def _may_run(action: Action, stages: int, limit: int, done: set[tuple[str, int, int]]) -> bool:
    """Its inputs are there, the micro-batch before it is done, and the stage keeps few."""
    k, m = action.stage, action.microbatch
    needs = {
        "F": [("F", k - 1, m), ("W", k, m - limit)],
        "R": [("F", k, m)],
        "B": [("F", k, m), ("R", k, m), ("B", k + 1, m), ("B", k, m - 1)],
        "W": [("B", k, m), ("W", k, m - 1)],
    }
    return all(
        one in done or (one[0] in action.phase and one[1:] == (k, m))
        for letter in action.phase
        for one in needs[letter]
        if 0 <= one[1] < stages and one[2] >= 0
    )
