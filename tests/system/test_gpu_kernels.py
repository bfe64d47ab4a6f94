"""The kernels of plans made elsewhere are those of the GPU: each case of `benchmarks.gpu_kernels`.

The truth is the trace on fake CUDA tensors, and what plain autograd calls and a pipeline saves on
the GPU. Without one, the same comparison with the CPU's own kernels shows that it compares.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from autopipe.passes.devices import H100
from benchmarks.gpu_kernels import CASES, counted, model_of, that_runs
from benchmarks.gpu_setting import Setting

HERE = replace(H100, compute_capability=None)


def _autocast(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(kind, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_plan_made_elsewhere_has_the_gpu_s_kernels(name: str) -> None:
    device = torch.device("cuda:0")
    setting = Setting(device, tiny=True)
    case = CASES[name](setting)
    with _autocast("cpu", case.autocast):
        table = counted(case, ["cpu"], model_of(setting))
    case.model.to(device)
    here = case._replace(call={n: x.to(device) for n, x in case.call.items()})
    with _autocast("cuda", case.autocast):
        assert table == counted(here, [device], None)
        runs = that_runs(here, device)
    assert table.calls == runs.calls
    # What cuDNN reserves for a batch norm is not known to a plan; a kernel without dropout may
    # leave out the seed and offset.
    attention = sum(n for op, n in table.calls.items() if op.endswith("attention"))
    assert abs(table.saved - runs.saved) <= 24 * attention or "images" in name


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_s_own_kernels_are_counted_as_they_run(name: str) -> None:
    device = torch.device("cpu")
    case = CASES[name](Setting(device, tiny=True))
    with _autocast("cpu", case.autocast):
        assert counted(case, [device], HERE) == that_runs(case, device)
