"""The checks of `benchmarks.gpu` can fail: each gets what it has to find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autopipe.errors import StageError
from autopipe.runtime.caller_streams import CallerStreams
from autopipe.runtime.transfer import Lane
from benchmarks import gpu_device, gpu_order
from benchmarks.gpu_failures import VARIABLE, faults_of_assert, faults_of_memory
from benchmarks.gpu_order import blocked, unlike, waits, where
from benchmarks.gpu_remat import kernels_by_stream, missing
from benchmarks.gpu_steady import Held, beside_the_plan, grown, growth
from benchmarks.gpu_tests import faults_of_tests, races
from tests.support.gpu_script import SimulatedSetting, script, simulated_script

# ------------------------------------------------------------------------------------------- order


def test_a_wait_of_the_host_is_found_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_script(monkeypatch):
        card = SimulatedSetting(torch.device("lazy:0"), tiny=True).card
        x = card.put(torch.ones(2))

        def reads_a_value() -> None:
            (x * 2).sum().item()

        assert waits(card, lambda: x * 2) == []
        (found,) = waits(card, reads_a_value)
        assert "the host waits for the device" in found
        assert "reads_a_value" in found
        assert waits(card, lambda: x * 2) == []  # only while it is looked for


def test_the_first_cause_is_named() -> None:
    def inner() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    def outer() -> None:
        try:
            inner()
        except RuntimeError as error:
            raise stage_error(1) from error

    with pytest.raises(StageError) as caught:
        outer()
    assert where(caught.value).startswith("called a synchronizing CUDA operation, at\n")
    assert " inner" in where(caught.value)


def test_a_call_that_waits_for_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_script(monkeypatch):
        card = SimulatedSetting(torch.device("lazy:0"), tiny=True).card
        x = card.put(torch.ones(2))
        assert blocked(card, lambda: x * 2) == []
        assert blocked(card, lambda: (x * 2).sum().item()) != []


@pytest.mark.few(1)
@pytest.mark.parametrize("missing", ["the caller's events", "the caller waits", "a copy's order"])
def test_an_order_that_is_missing_is_found_by_side_streams(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with simulated_script(monkeypatch):
        if missing == "the caller's events":
            monkeypatch.setattr(CallerStreams, "events", lambda *_: ())
        elif missing == "the caller waits":
            monkeypatch.setattr(CallerStreams, "wait_for", lambda *_: None)
        else:
            copy = Lane.copy
            monkeypatch.setattr(
                Lane, "copy", lambda self, t, _: copy(self, t, ())._replace(ready=None)
            )
        monkeypatch.setattr(gpu_order, "blocked", lambda *_: [])
        assert script("lazy:0", "side-streams") == 1
        assert gpu_device.CARDS["lazy"].naps > 100  # type: ignore[attr-defined]
    assert "while" in capsys.readouterr().out


def test_values_that_differ_are_found() -> None:
    truth = {"result": torch.tensor([1.0, 2.0]), "gradient of x": torch.ones(2)}
    assert unlike(truth, truth) == []
    off = {**truth, "result": torch.tensor([1.0, 2.0 + 1e-6])}
    assert unlike(off, truth) == ["result differs: 1 of 2 values"]
    assert unlike(off, truth, 1e-5) == []
    assert unlike(off, truth, 1e-8) != []
    lost = {**truth, "result": torch.tensor([1.0, torch.nan])}
    assert unlike(lost, truth) != []
    assert unlike(lost, truth, 1e-5) != []
    assert unlike({}, truth) != []


# ------------------------------------------------------------------------------------------ steady

HELD = Held(allocated=100 << 20, reserved=1 << 30, threads=5, files=9)


@pytest.mark.parametrize(
    ("late", "last", "expected"),
    [
        (HELD, 1.0, ""),
        (HELD._replace(allocated=102 << 20), 1.0, "allocated memory grew by 2048 KiB"),
        (HELD._replace(reserved=2 << 30), 1.0, "reserved memory grew by 1024 MiB"),
        (HELD._replace(threads=7), 1.0, "2 more threads"),
        (HELD._replace(files=10), 1.0, "1 more open files"),
        (HELD, 1.3, "steps became slower: 1000.0 ms, then 1300.0 ms"),
    ],
)
def test_what_grows_is_found(late: Held, last: float, expected: str) -> None:
    assert "; ".join(growth(HELD, late, 1.0, last)) == expected


def test_tensors_that_are_kept_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_script(monkeypatch):
        setting = SimulatedSetting(torch.device("lazy:0"), tiny=True)
        kept: list[Tensor] = []
        x = setting.card.put(torch.ones(2**19))

        def leaking() -> None:
            kept.append(x * 2)

        assert grown(setting, lambda: torch.relu(x)) == []
        (found,) = grown(setting, leaking)
        assert found.startswith("allocated memory grew by")


def test_a_call_is_judged_by_the_plan_s_figure() -> None:
    assert beside_the_plan(7.5e-6) == "the plan's figure holds"
    assert beside_the_plan(14e-6) == "the plan's figure is off by a factor 2.00"
    assert beside_the_plan(2e-6) == "the plan's figure is off by a factor 0.29"


# ---------------------------------------------------------------------------------------- failures

GOOD = (
    "StageError: stage 0, micro-batch 1 failed: AcceleratorError: CUDA error: device-side assert\n"
    "  node: embedding\n"
    "  what to do: the device reports an error some time after the kernel that failed, which may be"
    " one of any stage, or one before this call: run again with CUDA_LAUNCH_BLOCKING=1, and the"
    " error names the op; after an error of this kind the device cannot be used: restart the"
    " process\n"
)


def stage_error(stage: int | None, remedy: str | None = None) -> StageError:
    return StageError("a step failed", stage=stage, microbatch=0, phase="forward", remedy=remedy)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", []),
        ("StageError", "AcceleratorError", ["a StageError", "the step", "stage 0"]),
        ("which may be one of any stage", "which", ["that an earlier kernel"]),
        ("restart the process", "the pipeline can be called again", ["restarted", "called again"]),
        (VARIABLE, "ELSE", ["the variable"]),
        ("stage 0", "stage 1", ["stage 0"]),
        ("embedding", "linear", ["the op"]),
    ],
)
def test_a_message_that_lacks_something_is_found(old: str, new: str, expected: list[str]) -> None:
    found = faults_of_assert(GOOD.replace(old, new), blocking=True, is_gpu=True)
    assert len(found) == len(expected)
    assert all(part in fault for part, fault in zip(expected, found, strict=True))


def test_an_error_without_a_plan_is_found() -> None:
    bare = stage_error(1, "the pipeline can be called again")
    bare.__cause__ = torch.OutOfMemoryError("no memory")
    assert [f.removeprefix("does not say: ") for f in faults_of_memory(bare, 2)] == [
        *("what its plan says", "memory=", "remat")
    ]


# ------------------------------------------------------------------------------------------- trace


def test_labels_and_kernels_that_are_missing_are_found() -> None:
    events: list[dict[str, Any]] = [
        {"name": f"{letter} stage {k} micro-batch {m}", "cat": "user_annotation"}
        for letter in ("F", "RBW")
        for k in range(2)
        for m in range(3)
    ]
    assert missing(events, 2, 3, kernels=False) == []
    assert missing(events, 2, 3, kernels=True) == ["kernels on 0 streams only"]
    kernels = [{"name": "gemm", "cat": "kernel", "args": {"stream": s}} for s in (13, 17, 17)]
    assert missing(events + kernels, 2, 3, kernels=True) == []
    assert kernels_by_stream(kernels) == {13: 1, 17: 2}
    assert missing(events[1:], 2, 3, kernels=False) == ["no F stage 0 micro-batch 0"]


# ------------------------------------------------------------------------------------------- tests

RACE = """============================
CSAN detected a possible data race on tensor with data pointer 140
Access by stream 1001 during kernel:
aten::mul.out(Tensor self, Tensor other, *, Tensor(a!) out) -> Tensor(a!)
writing to argument(s) self, out, and to the output
With stack trace:
  File "example.py", line 12
Previous access by stream 0 during kernel:
aten::randn(int[] size, *, ScalarType? dtype=None) -> Tensor
writing to the output
"""


def test_races_of_the_sanitizer_are_counted() -> None:
    assert races("12 passed in 3 s") == {}
    assert races("E   " + RACE + RACE.replace("140", "150")) == {
        "aten::mul.out after aten::randn": 2
    }


@pytest.mark.parametrize(
    ("status", "text", "is_gpu", "good"),
    [
        (0, "12 passed, 3 skipped in 9 s\n", True, True),
        (0, "15 skipped in 9 s\n", False, True),
        (0, "15 skipped in 9 s\n", True, False),
        (1, "1 failed, 12 passed in 9 s\n", True, False),
        (124, "", True, False),
        (0, RACE + "12 passed in 9 s\n", True, False),
    ],
)
def test_what_pytest_reports_is_judged(status: int, text: str, is_gpu: bool, good: bool) -> None:
    assert (faults_of_tests(status, text, is_gpu) == []) == good
