"""Published bubble rates: Zero Bubble (arXiv 2401.10241), Table 9 in, Table 5 out."""

from __future__ import annotations

import pytest

from autopipe.passes.schedule.simulator import simulate
from benchmarks.schedules import PUBLISHED, Row


@pytest.mark.parametrize(("column", "kind"), [(0, "1f1b"), (2, "zb-h1"), (3, "zb-h2")])
@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"K{row[0]}-M{row[1]}-F{row[2][0]}")
def test_bubble_rates_of_the_zero_bubble_paper(row: Row, column: int, kind: str) -> None:
    K, M, (forward, backward, weight, transfer), rates, _ = row
    timeline = simulate(
        kind,
        stages=K,
        chunks=M,
        forward=forward,
        backward=backward,
        weight=weight,
        transfer=transfer,
    )
    assert round(timeline.bubble, 4) == rates[column]
    # The rate as the paper defines it, from the actions themselves.
    span = max(device[-1].end - device[0].start for device in timeline.spans)
    assert timeline.bubble == pytest.approx(1 - M * (forward + backward + weight) / span)
    assert max(timeline.device_spans) == span
