"""The kinds of models that a user may pass; a new kind is one entry of `FRONTENDS`.

Covers capture/request.py: each kind goes through one `CaptureRequest`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import autopipe
from autopipe import target
from autopipe.batch_dims import batch_of
from autopipe.call_signature import flatten
from autopipe.errors import AutopipeError, OptionError
from autopipe.passes.capture import frontends
from autopipe.passes.capture.frontends import Frontend, argument_names, as_module, is_model
from autopipe.passes.capture.model import capture
from autopipe.passes.capture.request import CaptureRequest
from tests.support.agreement import assert_agrees, assert_close, pipelined
from tests.support.capturing import D, batch

pytestmark = pytest.mark.usefixtures("double")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"input": {0: torch.export.Dim("batch")}}
    return torch.export.export(model, (batch(),), dynamic_shapes=shapes)


def test_graph_modules_and_exported_programs_are_models_too() -> None:
    model, x = mlp(), batch()
    assert_agrees(pipelined(fx.symbolic_trace(model)), x)
    pipe = pipelined(exported(model))
    assert_close(pipe(x).detach(), model(x).detach())
    other = batch(3)
    assert_close(pipe(other).detach(), model(other).detach())


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.nn.Module": lambda model: model,
    "torch.fx.GraphModule": fx.symbolic_trace,
    "torch.export.ExportedProgram": exported,
}


def test_every_kind_of_model_is_tried() -> None:
    assert {frontend.name for frontend in frontends.FRONTENDS} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_means_a_module_with_the_same_parameters(name: str) -> None:
    model = mlp()
    given = KINDS[name](model)
    assert is_model(given)
    module = as_module(given)
    assert as_module(module) is module, "a front end accepts the module that it makes"
    assert argument_names(given) == ["input"]
    mine = dict(module.named_parameters())
    assert mine.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, mine[n]) for n, p in model.named_parameters())
    assert batch_of({"input": 0}, given, (batch(),), {}) == ((0,), len(batch()))
    leaves, spec = flatten((batch(),), {})
    captured = capture(CaptureRequest(given, leaves, spec, [0]))
    assert [str(s) for s in captured.outputs[0].spec.shape] == ["B", str(D)]


def test_an_exported_program_with_a_fixed_batch_is_refused() -> None:
    program = torch.export.export(nn.Linear(D, D), (batch(),))
    with pytest.raises(AutopipeError) as caught:
        pipelined(program, devices=1)(batch())
    assert "dynamic batch dimension" in str(caught.value)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(OptionError, match="not a module") as caught:
        pipelined(F.relu)  # type: ignore[arg-type]
    assert caught.value.expected == (
        "torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram"
    )
    assert caught.value.found == "function"
    with pytest.raises(OptionError, match="not a module"):
        autopipe.plan(F.relu, 1, 2, args=(batch(),))  # type: ignore[arg-type]
    assert not is_model(F.relu)


class Loss(nn.Module):
    """The module of a `Quadratic`."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, points: Tensor, shift: Tensor) -> Tensor:
        return ((points - shift) * self.scale).square()


class Quadratic:
    """A model that is no module, as another library may have them."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


def test_a_new_kind_of_model_is_one_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def trace(flat: Any, *args: Any) -> Any:
        traced.append(type(flat.model))
        return frontends.export_and_normalize(flat, *args)

    frontend = Frontend(
        "Quadratic",
        lambda model: isinstance(model, (Quadratic, Loss)),
        module=lambda model: model if isinstance(model, Loss) else Loss(model.scale),
        trace=trace,
    )
    monkeypatch.setattr(frontends, "FRONTENDS", (frontend, *frontends.FRONTENDS))
    model, x, shift = Quadratic(torch.rand(D)), batch(), torch.rand(D)
    pipe = autopipe.compile(model, 1, 3, in_dims={"shift": None})  # type: ignore[arg-type]
    assert_close(pipe(x, shift).detach(), ((x - shift) * model.scale).square())
    assert traced == [Loss]
    options: dict[str, Any] = {"args": (x, shift), "in_dims": {"shift": None}}
    plan = autopipe.plan(model, 1, 3, **options)  # type: ignore[arg-type]
    assert len(plan.stages) == 1
    assert target._checked((model, (x,)), "m:f")[0] is model
    with pytest.raises(OptionError) as caught:
        as_module("no model")  # type: ignore[arg-type]
    assert str(caught.value.expected).startswith("Quadratic, torch.nn.Module, ")
