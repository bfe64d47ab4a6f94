"""`benchmarks.gpu` works apart from the GPU: each part runs on the CPU with tiny sizes."""

from __future__ import annotations

import pytest

from benchmarks import gpu
from benchmarks.gpu_predictions import StageTimes
from benchmarks.gpu_setting import Setting

SHORT = ["tests", "actions"]


@pytest.mark.parametrize(
    "part", [p if p in SHORT else pytest.param(p, marks=pytest.mark.full) for p in gpu.PARTS]
)
def test_a_part_runs(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--part", part]) == 0
    assert f"== {part}: " in capsys.readouterr().out


def test_a_part_that_fails_does_not_lose_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(setting: Setting) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setitem(gpu.PARTS, "plain", fails)
    assert gpu.main(["--device", "cpu", "--tiny", "--part", "plain", "tests"]) == 1
    printed = capsys.readouterr().out
    assert "plain: FAILED: RuntimeError: no more memory" in printed
    assert "failed: plain" in printed
    assert "== tests: " in printed


def test_equal_stages_give_what_the_formula_says() -> None:
    """KM/(M+K-1) against K = 2 with M = 1, without rematerialization."""
    K, M = 4, 32
    times = StageTimes((1.0,) * K, (0.0,) * K, (2.0,) * K, (0.0,) * K, 0.0)
    assert times.step("gpipe", M).makespan == 3 * (M + K - 1)
