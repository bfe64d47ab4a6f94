"""`benchmarks.gpu` works apart from the GPU: its parts run on the CPU, and on simulated devices.

That the checks of its parts can fail is in `test_gpu_checks.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_predictions import StageTimes
from benchmarks.gpu_setting import Setting
from tests.support.gpu_script import script, simulated_script
from tests.support.tiers import full_unless

ON_CPU = ["actions"]
SIMULATED = ["side-streams", "trace", "sync", "calls", "leaks", "failures", "actions", "remat"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=full_unless(p in ON_CPU)) for p in gpu.PARTS]
)
def test_a_part_runs(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("cpu", part) == 0
    printed = capsys.readouterr().out
    assert f"== {part}: " in printed
    assert "failed: nothing" in printed


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=full_unless(p in SIMULATED[:1])) for p in SIMULATED]
)
def test_a_part_runs_on_a_simulated_device(
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with simulated_script(monkeypatch) as machine:
        assert script("lazy:0", part) == 0, capsys.readouterr().out
        assert machine.races == []
    assert (tmp_path / "trace.json.gz").exists() == (part == "trace")


def test_what_is_refused_is_no_failure_and_a_failed_part_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(setting: Setting) -> None:
        with setting.guarded("a row"):
            gpu.gpu_steps.pipelined(setting, *small(setting), 1, 1, remat="unheard of")
        raise RuntimeError("no more memory")

    def small(setting: Setting) -> tuple[gpu.torch.nn.Module, dict[str, gpu.torch.Tensor]]:
        return gpu.torch.nn.Linear(2, 2), {"input": gpu.torch.ones(2, 2)}

    def works(setting: Setting) -> None:
        print("a row of the other part")

    monkeypatch.setitem(gpu.PARTS, "plain", gpu.Part(fails, 1, 2))
    monkeypatch.setitem(gpu.PARTS, "calls", gpu.Part(works, 1, 2))
    assert script("cpu", "plain", "calls") == 1
    printed = capsys.readouterr().out
    assert "a row: refused: unknown remat" in printed
    assert "plain: FAILED: RuntimeError: no more memory" in printed
    assert "a row of the other part" in printed
    assert "refused: a row\nfailed: plain" in printed


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_process_that_dies_or_hangs_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    for name, limit in (("sync", 9), ("calls", 1), ("trace", 9)):
        monkeypatch.setitem(gpu.PARTS, name, gpu.PARTS[name]._replace(limit=limit))
    programs = {
        "sync": "import os; print('lost', flush=True); os.abort()",
        "calls": "import threading; print('hangs', flush=True); threading.Event().wait()",
        "trace": "print('well'); print('failed: nothing')",
    }
    names = ["sync", "calls", "trace"]
    assert gpu.apart(names, 5, gpu.Log(tmp_path), lambda name: python(programs[name])) == 1
    written = (tmp_path / "gpu.log").read_text()
    assert "3 parts, about" in written
    assert [word for word in ("lost", "hangs", "well") if f"\n{word}\n" in written] == [
        *("lost", "hangs", "well")
    ]
    assert re.findall(r"^(\w+) +\d+ s  (.+)$", written, re.M) == [
        ("sync", "status -6"),
        ("calls", "status 124"),
        ("trace", "failed: nothing"),
    ]


@pytest.mark.full
def test_the_process_of_a_part_runs_it(tmp_path: Path) -> None:
    where = argparse.Namespace(device="cpu", tiny=True)
    assert gpu.apart(["actions"], 5, gpu.Log(tmp_path), lambda n: gpu.of_part(n, where)) == 0
    written = (tmp_path / "gpu.log").read_text()
    assert "4 stages, zb-h1: " in written
    assert "=== actions: " in written


def test_a_part_that_does_not_fit_is_left(tmp_path: Path) -> None:
    names = ["tests", "actions"]
    minutes = (gpu.PARTS["actions"].seconds + gpu.START + 5) / 60
    assert gpu.apart(names, minutes, gpu.Log(tmp_path), lambda name: python("print('ran')")) == 1
    written = (tmp_path / "gpu.log").read_text()
    assert "no time was left for: python -m benchmarks.gpu --part tests\n" in written
    assert "\nran\n" in written


def test_a_limit_shows_the_stacks_of_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 120)
    command = [*("benchmarks.gpu", "--together", "--device", "cpu", "--tiny", "--part", "trace")]
    status, verdict = gpu.run([sys.executable, "-m", *command], 0.3, gpu.Log(tmp_path))
    written = (tmp_path / "gpu.log").read_text()
    assert (status, verdict) == (1, "")
    assert "Timeout (0:00:00.300000)!" in written
    assert "(most recent call first):" in written  # its frames are the innermost hundred


def test_the_parts_fit_into_half_an_hour() -> None:
    """All but the tests of the full tier, which take what is left."""
    *parts, last = gpu.PARTS.values()
    assert last is gpu.PARTS["all-tests"]
    assert sum(part.seconds + gpu.START for part in parts) <= 30 * 60
    assert all(part.seconds < part.limit <= 5 * 60 for part in gpu.PARTS.values())


def test_every_part_is_in_the_table() -> None:
    assert gpu.__doc__ is not None
    rows = [line.split("|")[1] for line in gpu.__doc__.splitlines() if line.startswith("| ")]
    assert [name.strip() for row in rows[2:] for name in row.split(",")] == list(gpu.PARTS)


def test_equal_stages_give_what_the_formula_says() -> None:
    """KM/(M+K-1) against K = 2 with M = 1, without rematerialization."""
    K, M = 4, 32
    times = StageTimes((1.0,) * K, (0.0,) * K, (2.0,) * K, (0.0,) * K, 0.0)
    assert times.step("gpipe", M).makespan == 3 * (M + K - 1)
