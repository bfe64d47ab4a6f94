"""The two ways in, at their edges; what they do, other tests say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopipe
from autopipe.errors import OptionError
from tests.support.phased import Layers

X = torch.randn(8, 6)


def test_what_is_no_module_is_refused() -> None:
    for call in (autopipe.compile, autopipe.plan):
        with pytest.raises(OptionError, match="model is not a module") as caught:
            call(lambda x: x, ["cpu"], 2, args=(X,))
        assert "function" in str(caught.value)


def test_example_inputs_compile_at_once() -> None:
    assert autopipe.compile(Layers(2), ["cpu"] * 2, 2, args=(X,)).captured.outputs
    with pytest.raises(OptionError, match="nothing has been compiled yet"):
        _ = autopipe.compile(Layers(2), ["cpu"] * 2, 2).captured


def test_a_plan_or_its_file(tmp_path: Path) -> None:
    plan = autopipe.plan(Layers(4), ["cpu"] * 2, 2, args=(X,))
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        pipe = autopipe.compile(Layers(4), plan=given, args=(X,))
        assert pipe.plan.starts == plan.starts
        assert len(pipe.options.devices) == 2


def test_planning_an_exported_program() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    plan = autopipe.plan(program, ["cpu"] * 2, 2, args=(X,))
    assert plan.sizes == (4, 4)


def test_a_pipeline_is_no_model() -> None:
    pipe = autopipe.compile(Layers(2), ["cpu"] * 2, 2)
    for model in (pipe, nn.Sequential(pipe, nn.Linear(6, 6))):
        for call in (autopipe.compile, autopipe.plan):
            with pytest.raises(OptionError, match=r"pipe\.model") as caught:
                call(model, ["cpu"] * 2, 2, args=(X,))
            assert "Pipeline(Layers" in str(caught.value.found)
    assert autopipe.compile(pipe.model, ["cpu"] * 2, 2, args=(X,)).captured.outputs
    assert autopipe.compile(pipe.install(), ["cpu"] * 2, 2, args=(X,)).captured.outputs


@pytest.mark.parametrize("given", [{"args": X}, {"kwargs": [X]}, {"kwargs": {1: X}}])
def test_examples_that_are_none(given: dict[str, Any]) -> None:
    for call in (autopipe.compile, autopipe.plan):
        with pytest.raises(OptionError, match=next(iter(given))):
            call(Layers(2), ["cpu"] * 2, 2, **given)


def test_replicated_models_are_compiled_inside() -> None:
    with pytest.raises(OptionError, match=r"DistributedDataParallel\(pipe\)"):
        autopipe.compile(Replicated(nn.Linear(3, 3)), ["cpu"], 1)


class Replicated(nn.parallel.DistributedDataParallel):
    """One that needs no group of processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module
