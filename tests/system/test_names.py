"""The names of a model's parts are its own affair: none disturbs the pipeline.

A name that both have is the pipeline's on the pipeline, and the model's on ``pipe.model``; but a
value of the model hides a method that every module has (``model.type = "bert"``) on both.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import UnsupportedError
from autopipe.module import Pipeline

pytestmark = pytest.mark.few(4)

PUBLIC = sorted(
    {n for n in dir(Pipeline) if not n.startswith("_")} - set(dir(nn.Module))
    | {"memory", "options", "model"}
)
"""What a pipeline has beyond a module."""

NAMES = [*PUBLIC, "_last", "_programs", "_devices", "_keep", "_kept", "ctx", "state", "torch"]

KINDS = ("module", "parameter", "buffer", "value")


class Named(nn.Module):
    """A model with a part of some kind and name, which its forward uses."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.part = kind, name
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        parts: dict[str, Callable[[], Any]] = {
            "module": lambda: nn.Linear(4, 4),
            "parameter": lambda: nn.Parameter(torch.randn(4)),
            "value": lambda: 3.0,
        }
        if kind == "buffer":
            self.register_buffer(name, torch.randn(4))
        else:
            setattr(self, name, parts[kind]())

    def forward(self, x: Tensor) -> Tensor:
        part = getattr(self, self.part)
        x = torch.tanh(self.first(x))
        return self.second(part(x) if self.kind == "module" else x * part)


def test_the_public_names_are_those_that_the_readme_lists() -> None:
    assert {"memory", "options", "model", "plan", "stages", "code", "captured"} < set(PUBLIC)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_any_name_trains_as_in_eager(name: str, kind: str) -> None:
    model = Named(kind, name)
    twin, pipe = copy.deepcopy(model), autopipe.compile(model, 2, 2)
    x = torch.randn(6, 4)
    pipe(x).sum().backward()
    twin(x).sum().backward()
    assert [*pipe.state_dict()] == [*twin.state_dict()]
    expected = dict(twin.named_parameters())
    assert [n for n, _ in pipe.named_parameters()] == [*expected]
    for n, p in pipe.named_parameters():
        assert pipe.get_parameter(n) is p
        torch.testing.assert_close(p.grad, expected[n].grad)
    assert pipe.model is model
    assert pipe.model.get_submodule("") is model
    assert len(pipe.stages) == len(pipe.memory.stages) == len(pipe.plan.stages) == 2
    assert "def " in pipe.code
    assert pipe.options.devices == (torch.device("cpu"),) * 2
    assert pipe.captured.graph_module.graph.nodes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["memory", "options", "plan", "model", "_last", "_programs"])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies_keep_the_two_apart(copied: Callable[[Any], Any], name: str, kind: str) -> None:
    pipe = autopipe.compile(Named(kind, name), 2, 2)
    twin, x = copied(pipe), torch.randn(4, 4)
    assert torch.equal(twin(x), pipe(x))
    assert twin.memory is not pipe.memory
    state = {n: torch.zeros_like(t) for n, t in pipe.state_dict().items()}
    assert twin.load_state_dict(state).missing_keys == []
    assert not any(p.any() for p in twin.model.parameters())


@pytest.mark.parametrize("name", PUBLIC)
def test_the_pipelines_own_names_are_not_set_on_it(name: str) -> None:
    """Where it went to the pipeline, the model would not have it; and the other way round."""
    pipe = autopipe.compile(Named("value", "other"), 2, 2)
    for value in (3, nn.Linear(4, 4), nn.Parameter(torch.ones(4))):
        with pytest.raises(UnsupportedError, match=rf"pipe\.model\.{name}"):
            setattr(pipe, name, value)
    with pytest.raises(UnsupportedError, match=rf"pipe\.model\.{name}"):
        delattr(pipe, name)
    pipe.register_buffer(name, torch.ones(4))
    assert torch.equal(pipe.get_buffer(name), torch.ones(4))
    assert torch.equal(getattr(pipe.model, name), torch.ones(4))
    assert name in pipe.state_dict()


def test_methods_of_modules_know_the_models_names() -> None:
    model = Named("module", "memory")
    pipe = autopipe.compile(model, 2, 2)
    assert pipe.get_submodule("memory") is model.memory
    assert pipe.get_submodule("") is pipe
    assert dict(pipe.named_children()) == dict(model.named_children())
    assert [n for n, _ in pipe.named_modules()] == [n for n, _ in model.named_modules()]
    pipe.add_module("stages", nn.Linear(4, 4))
    pipe.register_module("plan", nn.Linear(4, 4))
    pipe.register_parameter("code", nn.Parameter(torch.ones(2)))
    assert {"stages.weight", "plan.weight", "code"} < set(model.state_dict())
    pipe.zero_grad()
    pipe.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    seen: list[nn.Module] = []
    pipe.apply(seen.append)
    assert seen[-1] is pipe
    assert seen[:-1] == [*model.modules()][1:]


MODULES = ["type", "half", "float", "double", "cuda", "share_memory", "T_destination"]
"""Names that every module has, which a model may use for something else and still train."""


class Typed(nn.Module):
    """Values by names that every module has: of the object, its class, a property, a method."""

    cpu = "a value of the class"

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.name = name
        setattr(self, name, value)

    @property
    def xpu(self) -> str:
        return self.name

    def bfloat16(self) -> Typed:
        return self

    def forward(self, x: Tensor) -> Tensor:
        value = getattr(self, self.name)
        scale = value if isinstance(value, float) else 2.0
        return self.second(torch.tanh(self.first(x)) * scale)


@pytest.mark.parametrize("name", MODULES)
def test_a_value_hides_a_method_of_modules(name: str) -> None:
    model = Typed(name, 0.5)
    twin, pipe, x = copy.deepcopy(model), autopipe.compile(model, 2, 2), torch.randn(6, 4)
    assert getattr(pipe, name) == getattr(model, name) == 0.5
    assert torch.equal(pipe(x), twin(x))
    setattr(pipe, name, 3.0)
    assert vars(model)[name] == getattr(pipe, name) == 3.0
    setattr(twin, name, 3.0)
    assert torch.equal(pipe(x), twin(x))
    assert getattr(pickle.loads(pickle.dumps(pipe)), name) == 3.0
    delattr(pipe, name)
    assert name not in vars(model)
    assert getattr(pipe, name) == getattr(nn.Module, name) or callable(getattr(pipe, name))


@pytest.mark.parametrize("value", ["bert", None, ["a", "list"], nn.Linear, torch.float16])
def test_values_of_any_kind(value: Any) -> None:
    model = Typed("type", value)
    pipe = autopipe.compile(model, 2, 2)
    assert pipe.type is model.type is value
    assert (pipe.cpu, pipe.xpu) == ("a value of the class", "type")


def test_methods_of_modules_stay_the_pipelines() -> None:
    """They would move or cast the model behind the pipeline's back."""
    model = Typed("type", "bert")
    model.to = lambda *_: model  # type: ignore[method-assign]
    pipe = autopipe.compile(model, 2, 2)
    assert pipe.to("cpu") is pipe.cuda.__self__ is pipe
    with pytest.raises(UnsupportedError, match="on the devices of its stages"):
        pipe.bfloat16()
    pipe.to = stay = lambda *_: pipe
    assert pipe.to is stay
    assert model.to is not stay
    del pipe.to
    assert pipe.to("cpu") is pipe
