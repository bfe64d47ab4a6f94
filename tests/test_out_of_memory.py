"""A device without free memory, and errors that a device reports late."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import StageError
from autopipe.formatting import format_bytes
from autopipe.runtime.backends.cuda import CudaBackend
from autopipe.runtime.executor import Run

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16 GiB."


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, at: str = "") -> None:
    """Stage 1 raises when it receives a value whose name begins so."""
    receive = Run.receive

    def raising(self: Run, value: str, stage: int, m: int) -> Tensor:
        if stage == 1 and value.startswith(at):
            raise error
        return receive(self, value, stage, m)

    monkeypatch.setattr(Run, "receive", raising)


@pytest.fixture
def pipe() -> autopipe.Pipeline:
    torch.manual_seed(0)
    return autopipe.compile(nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), ["cpu"] * 2, 2)


@pytest.mark.parametrize("at", ["", "grad"])
def test_the_plan_of_the_device_stands_beside_it(
    pipe: autopipe.Pipeline, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 8)
    expected = pipe(x).detach()
    with monkeypatch.context() as patch:
        failing(patch, torch.OutOfMemoryError(TEXT), at)
        with pytest.raises(StageError) as caught:
            pipe(x).sum().backward()
    error = caught.value
    assert (error.stage, error.microbatch) == (1, 0)
    planned = format_bytes(pipe.plan.stages[1].memory_bytes)
    assert error.expected == f"{planned}, planned for stage 1 on cpu"
    assert error.found == TEXT
    assert "memory=" in str(error.remedy)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert torch.equal(pipe(x), expected)  # it can be called again


def test_stages_of_one_device_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    pipe = autopipe.compile(model, ["cpu"] * 2, 2, schedule="interleaved", virtual_stages=2)
    failing(monkeypatch, torch.OutOfMemoryError(TEXT))
    with torch.no_grad(), pytest.raises(StageError) as caught:
        pipe(torch.randn(4, 8))
    assert "planned for stages 1, 3 on cpu" in str(caught.value.expected)


def test_other_errors_stay_as_they_are(
    pipe: autopipe.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, ValueError("no memory of it"))
    with pytest.raises(StageError) as caught:
        pipe(torch.randn(4, 8))
    assert caught.value.expected is None
    assert "can be called again" in str(caught.value.remedy)


def test_a_late_error_says_that_another_kernel_may_have_failed(
    pipe: autopipe.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, torch.AcceleratorError("CUDA error: device-side assert triggered"))
    with pytest.raises(StageError, match="device-side assert") as caught:
        pipe(torch.randn(4, 8))
    remedy = str(caught.value.remedy)
    assert "one of any stage" in remedy
    assert "restart the process" in remedy
    assert "can be called again" not in remedy


def test_the_variable_of_cuda_is_named(
    pipe: autopipe.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(torch.randn(4, 8))
    for worker in pipe._programs.last[0].workers:
        monkeypatch.setattr(worker, "backend", CudaBackend())
    failing(monkeypatch, torch.AcceleratorError("CUDA error: an illegal memory access"))
    with pytest.raises(StageError) as caught:
        pipe(torch.randn(4, 8))
    assert "run again with CUDA_LAUNCH_BLOCKING=1, and" in str(caught.value.remedy)
