"""``autopipe simulate``: the chart, its figures, and wrong arguments."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from autopipe import simulate
from autopipe.cli import main
from tests.support.command_line import ROOT, assert_refused, simulated


def test_simulate_prints_the_chart_and_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    times = "--forward 18.5 --backward 18.1 --weight 9.3 --recompute 1 --transfer 0.6"
    assert main(simulated(f"1f1b --stages 8 --chunks 24 {times}")) == 0
    lines = capsys.readouterr().out.splitlines()
    line = simulate(
        "1f1b", stages=8, chunks=24, forward=18.5, backward=18.1, weight=9.3, recompute=1.0,
        transfer=0.6,
    )  # fmt: skip
    assert lines[:9] == str(line).splitlines()
    work = 8 * 24 * (18.5 + 18.1 + 9.3 + 1)
    assert lines[9:] == [
        f"work {work:.6g}, busiest device {work / 8:.6g}",
        f"speed-up over one device {work / line.makespan:.3f}, of 8 at best",
    ]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("gpipe --early-recompute", {"early_recompute": True}),
        ("interleaved --virtual-stages 3", {"virtual_stages": 3}),
        ("zb-v --weight 1", {"weight": 1.0}),
        ("v-half --weight 1", {"weight": 1.0}),
        ("v-min --weight 1 --early-recompute", {"weight": 1.0, "early_recompute": True}),
    ],
)
def test_what_other_schedules_are_told(
    capsys: pytest.CaptureFixture[str], options: str, facts: dict[str, Any]
) -> None:
    assert main(simulated(f"{options} --stages 4 --chunks 8 --recompute 1")) == 0
    line = simulate(
        options.split()[0], stages=4, chunks=8, forward=1.0, backward=1.0, recompute=1.0, **facts
    )
    assert capsys.readouterr().out.startswith(f"{line}\nwork ")


def test_who_reads_may_stop_reading() -> None:
    command = [sys.executable, "-m", "autopipe", *simulated("gpipe --stages 2 --chunks 2")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_gpipes_speedup_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    """KM/(M + K - 1) for equal stages; the time of each may be given."""
    assert main(simulated("gpipe --stages 4 --chunks 32 --forward 1,1,1,1 --backward 2")) == 0
    assert f"speed-up over one device {4 * 32 / 35:.3f}, of 4" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["--forward one", "--forward 1,,2", "--chunks 2.5", "--transfer x"])
def test_what_is_no_number_is_argparses_error(capsys: pytest.CaptureFixture[str], bad: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(simulated(f"gpipe --stages 2 --chunks 2 --forward 1 --backward 1 {bad}"))
    assert caught.value.code == 2
    assert "invalid" in capsys.readouterr().err


WRONG = {
    "kind": (simulated("other --stages 2 --chunks 2"), "unknown schedule"),
    "stages": (simulated("gpipe --stages 0 --chunks 2"), "stages >= 1"),
    "times": (simulated("gpipe --stages 2 --chunks 2 --weight 1,2,3"), "`weight`"),
    "negative": (simulated("gpipe --stages 2 --chunks 2 --transfer -1"), "`transfer`"),
    "endless": (simulated("gpipe --stages 2 --chunks 2 --weight inf"), "`weight`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_code_2(capsys: pytest.CaptureFixture[str], case: str) -> None:
    assert_refused(capsys, *WRONG[case])
