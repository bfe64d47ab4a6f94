"""What torch's profiler shows of a step.

Covers runtime/actions.py.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import autopipe
from autopipe.pipeline_call import PipelineCall
from autopipe.runtime.executor import Run
from tests.support.early_schedules import Layers, batch

M = 3


def labels(step: Any) -> Counter[str]:
    """How often each range of ours stands in a trace of a step."""
    # Workers' threads are shown on demand only.
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=every_thread) as found:
        step()
    ours = re.compile(r"[FRBW]+ stage \d|send |receive ")
    return Counter(e.name for e in found.events() if ours.match(e.name))


@pytest.mark.parametrize("devices", [1, 2])
def test_each_action_has_a_range(devices: int) -> None:
    pipe = autopipe.compile(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), devices, M)
    x = torch.randn(6, 4)
    pipe(x).sum().backward()
    found = labels(lambda: pipe(x).sum().backward())
    actions = {n: count for n, count in found.items() if "micro-batch" in n}
    assert set(actions.values()) == {1}
    places = {f"stage {k} micro-batch {m}" for k in range(devices) for m in range(M)}
    assert {n for n in actions if n[0] == "F"} == {f"F {place}" for place in places}
    assert {n for n in actions if n.startswith("RBW ")} == {f"RBW {place}" for place in places}
    assert {n.partition(" ")[0] for n in actions} <= {"F", "R", "RBW"}  # R while a device waits
    received = [n for n in found if n.startswith("receive ") and n.endswith(" at stage 0")]
    assert len(received) == 2  # the input, and the gradient of what it computes
    assert all(found[n] == M for n in received)
    sent = [n for n in found if n.startswith("send ")]
    assert len(sent) == 2 * (devices - 1)  # a value forward, its gradient back
    assert all(found[n] == M for n in sent)


def test_w_apart_has_a_range_of_its_own() -> None:
    model, inputs = Layers(4), batch()
    pipe = autopipe.compile(model, 2, 4, schedule="zb-h1")
    pipe(*inputs).backward()
    found = labels(lambda: pipe(*inputs).backward())
    assert all(found[f"F stage {k} micro-batch {m}"] == 1 for k in range(2) for m in range(4))
    assert any(n.startswith("W stage 0") for n in found)


def test_without_a_profiler_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = PipelineCall.__init__

    def noting(self: PipelineCall, *args: Any) -> None:
        init(self, *args)
        made.append(self.make_run)

    monkeypatch.setattr(PipelineCall, "__init__", noting)
    pipe = autopipe.compile(nn.Linear(4, 4), 1, 2)
    pipe(torch.randn(4, 4))
    assert made == [Run]
