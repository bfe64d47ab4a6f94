"""What `benchmarks.gpu` asks of `torch.cuda`, where there is none; and how its failures end."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import autopipe
from autopipe.errors import StageError
from benchmarks import gpu_tests
from benchmarks.gpu_device import CudaCard
from benchmarks.gpu_failures import faults_of_memory
from benchmarks.gpu_setting import Setting


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Calls of torch.cuda by name, with their own signatures, where there is no GPU."""
    calls: dict[str, list[Any]] = {}
    results = {"get_sync_debug_mode": 0, "memory_reserved": 2**30, "mem_get_info": (1, 2**33)}
    results |= {"memory_allocated": 2**20, "max_memory_allocated": 3}
    names = [
        "set_sync_debug_mode",
        "reset_peak_memory_stats",
        "empty_cache",
        "synchronize",
        "_sleep",
    ]
    for name in (*results, *names, "set_per_process_memory_fraction"):
        real = getattr(torch.cuda, name)

        def stand_in(*args: Any, name: str = name, real: Any = real) -> Any:
            bound = inspect.signature(real).bind(*args)
            calls.setdefault(name, []).append(tuple(bound.arguments.values()))
            return results.get(name)

        monkeypatch.setattr(torch.cuda, name, stand_in)
    return calls


def test_waits_are_errors_only_within_the_context(cuda: dict[str, list[Any]]) -> None:
    card = CudaCard(torch.device("cuda:0"))
    before = torch.cuda.Event.synchronize, torch.cuda.Stream.synchronize, torch.cuda.synchronize
    with card.waits_are_errors():
        assert cuda["set_sync_debug_mode"] == [("error",)]
        for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda):
            with pytest.raises(RuntimeError, match="the host waits"):
                owner.synchronize(None)  # type: ignore[attr-defined]
    assert cuda["set_sync_debug_mode"] == [("error",), (0,)]
    assert before == (
        torch.cuda.Event.synchronize,
        torch.cuda.Stream.synchronize,
        torch.cuda.synchronize,
    )


def test_memory_is_limited_only_within_the_context(cuda: dict[str, list[Any]]) -> None:
    card = CudaCard(torch.device("cuda:0"))
    with card.short_of_memory():
        ((fraction, device),) = cuda["set_per_process_memory_fraction"]
        assert fraction == (2**30 + 2**26) / 2**33
        assert device == card.device
    assert cuda["set_per_process_memory_fraction"][1][0] == 1.0
    assert card.peak(lambda: None) == 3
    assert (card.allocated(), card.reserved()) == (2**20, 2**30)


def test_a_setting_prints_what_fails_and_frees(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where freeing fails, as after an error of a kernel."""
    setting = Setting(torch.device("cpu"))

    def lost() -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore")

    setting.card.empty_cache = lost  # type: ignore[method-assign]
    with setting.guarded("a row"):
        raise ValueError("wrong")
    assert setting.failed == ["a row"]
    printed = capsys.readouterr().out
    assert "a row: FAILED: ValueError: wrong" in printed
    assert "cannot free memory: CUDA error: device-side assert triggered\n" in printed


def test_out_of_memory_of_the_cpu_is_as_asked() -> None:
    setting = Setting(torch.device("cpu"))
    pipe = autopipe.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["cpu"] * 2, 2)
    x = torch.ones(4, 2)
    with setting.card.short_of_memory(), pytest.raises(StageError) as caught:
        pipe(x)
    assert faults_of_memory(caught.value, 2) == []
    pipe(x)


@pytest.mark.full
def test_tests_that_hang_are_ended_and_what_they_printed_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "test_hangs.py"
    file.write_text(
        "import pytest, threading\n\n"
        "@pytest.mark.gpu\n"
        "def test_hangs():\n"
        "    print('hangs', flush=True)\n"
        "    threading.Event().wait()\n"
    )
    monkeypatch.setattr(gpu_tests, "FILES", (str(file),))
    setting = Setting(torch.device("cpu"), end=time.monotonic() + 25)  # 10 s before it they end
    with mock.patch.dict("os.environ", {"PYTEST_ADDOPTS": "-c /dev/null -s"}):
        gpu_tests.tests(setting)
    assert setting.failed == ["tests"]
    printed = capsys.readouterr().out
    assert "hangs" in printed
    assert "pytest ended with -9" in printed
