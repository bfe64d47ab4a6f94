"""The passes in order: what is dumped, what progress reports, what the cache saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autopipe.call_signature import flatten
from autopipe.passes.capture.request import CaptureRequest
from autopipe.passes.driver import (
    capture_with_costs,
    cut_into_stages,
    lower_to_code,
    phases_by_size,
)
from autopipe.passes.phases import TraceCache
from autopipe.passes.remat_policies import LADDER
from autopipe.tensor_meta import training_request
from tests.support.phased import Layers
from tests.support.programs import CPU, objective_for

X = torch.randn(6, 6)


def test_from_a_model_to_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPIPE_DUMP", str(tmp_path / "dump"))
    model, steps = Layers(2), list[str]()
    leaves, spec = flatten((X,), {})
    annotated = capture_with_costs(CaptureRequest(model, leaves, spec, (0,)), steps.append)
    split = cut_into_stages(annotated, objective_for(2, 3), progress=steps.append)
    request = training_request(model, split, leaves, [3, 3], [CPU, CPU], LADDER[-1:] * 2)
    cache = TraceCache()
    phased = phases_by_size(request, cache, steps.append)
    lowered = lower_to_code(phased, [3, 3], [CPU, CPU], kind="gpipe", progress=steps.append)
    traced = ["tracing stage 1", "tracing stage 0"]
    assert steps == ["capturing", "costing", "splitting", *traced, "writing the program"]
    assert phases_by_size(request, cache, steps.append)[3].stages[0].graph is (
        phased[3].stages[0].graph
    )
    assert len(steps) == 6
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert [n.split("-")[1] for n in files] == [
        *("captured.txt", "annotated.txt", "split.txt", "phased.txt"),
        *("scheduled.txt", "generated.py"),
    ]
    assert (tmp_path / "dump" / files[-1]).read_text() == f"{lowered.generated}\n"
    assert lowered.phased is phased
