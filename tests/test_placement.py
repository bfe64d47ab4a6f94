"""Where a model is after its capture, and what libraries are told of it.

The machine with several GPUs is emulated (`tests.support.several_gpus`): trainers decide by what
parameters and torch say. tests/system/test_gpu.py repeats the placement on real devices.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import autopipe
from autopipe.errors import OptionError
from autopipe.placement import device_map, mark, needs_map, unmark, unmarked
from tests.support.several_gpus import CPU, GPUS, SeveralGpus

pytestmark = pytest.mark.usefixtures("alike_models_once")


class Net(nn.Module):
    """A weight tied over both stages, running statistics, a buffer that is only read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(4))
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x * self.scale))
        return self.last(self.norm(x) * self.mask) @ self.first.weight


X = torch.randn(8, 4)


def compiled(**options: Any) -> autopipe.Pipeline:
    return autopipe.compile(Net(), ["cpu"] * 2, 2, **options)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SeveralGpus:
    return SeveralGpus(monkeypatch)


def emulated(pipe: autopipe.Pipeline, monkeypatch: pytest.MonkeyPatch) -> SeveralGpus:
    """Capture with real devices first: torch could not trace for a GPU that is none."""
    machine = SeveralGpus(monkeypatch)
    machine.spread(pipe, x=X)
    return machine


# ---------------------------------------------------------------------------------- placement


def test_a_capture_places_what_stages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = compiled(kwargs={"x": X})
    before = {name: id(p) for name, p in pipe.named_parameters()}
    machine = emulated(pipe, monkeypatch)
    held: dict[str | None, int] = {}
    for k, stage in enumerate(pipe._programs.last[0].split.stages):
        for item in stage.held:
            held.setdefault(item.target, k)
    assert {name: id(p) for name, p in pipe.named_parameters()} == before
    assert set(before) <= set(held)
    for name, parameter in pipe.named_parameters():
        assert parameter.device == GPUS[held[name]], name
    assert {p.device for p in pipe.parameters()} == set(GPUS[:2])
    assert machine.where(pipe.norm.running_mean) == GPUS[held["norm.running_mean"]]
    assert machine.where(pipe.mask) == CPU, "what a stage only reads is copied to it"


@pytest.mark.parametrize("how", ["args", "kwargs", "capture"])
def test_each_way_to_capture_places(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[Any] = []
    monkeypatch.setattr(autopipe.compiled.CompiledModel, "place", lambda *a: placed.append(a))
    pipe = compiled(**{"args": {"args": (X,)}, "kwargs": {"kwargs": {"x": X}}}.get(how, {}))
    if how == "capture":
        assert placed == []
        pipe.capture(X)
    assert placed == [pipe._programs.last]


# -------------------------------------------------------------------------- what libraries are told


def test_the_map_names_modules_and_parameters() -> None:
    net = Net()
    assert device_map(net) == dict.fromkeys(["scale", "first", "norm", "last"], CPU)
    net.first.bias = nn.Parameter(torch.ones(4, device="meta"))
    found = device_map(net)
    assert found == {
        "scale": CPU,
        "first.weight": CPU,
        "first.bias": torch.device("meta"),
        "norm": CPU,
        "last": CPU,
    }
    assert not {"cpu", "disk"} & set(found.values()), "for accelerate that would be offloaded"


def test_what_is_where_libraries_put_it_needs_no_map(gpus: SeveralGpus) -> None:
    assert not needs_map(GPUS[:1] * 3)
    assert needs_map(GPUS[:2])
    assert needs_map(GPUS[1:2] * 2)
    assert needs_map([CPU, CPU]), "the Trainer would move the model to the GPU"


def test_on_a_machine_without_gpus_there_is_no_map() -> None:
    """And no other mark costs a capture, here where torch's code may read all attributes."""
    pipe = autopipe.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), ["cpu"], 2, args=(X,))
    model = pipe.install()
    Accelerator(cpu=True).prepare_model(model)
    for module in (pipe, model):
        assert module.is_parallelizable is module.model_parallel is True
        assert not hasattr(module, "hf_device_map")
    pipe(X)
    assert autopipe.explain_captures(pipe).count == 1
    pipe.uninstall()
    pipe(X)
    assert autopipe.explain_captures(pipe).count == 1
    assert not {"is_parallelizable", "model_parallel"} & set(vars(model))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_marks_are_hidden_from_the_key_of_the_models_state() -> None:
    """Also their order: that of a set of names depends on which names were in it."""
    net: Any = Net()
    net.is_parallelizable, net.kind = False, "net"
    before = dict(vars(net))
    mark(net, GPUS)
    net._is_accelerate_prepared = True
    assert net.is_parallelizable is True
    assert unmarked(vars(net)) == before
    assert [*unmarked(vars(net))] == [*before]
    unmark(net)
    del net._is_accelerate_prepared
    assert vars(net) == before
    assert unmarked(vars(net)) is vars(net)


def test_two_pipelines_of_one_model() -> None:
    first = compiled()
    second = autopipe.compile(first.install(), ["cpu"] * 3, 2)
    model = second.install()
    second.uninstall()
    assert not any("parallel" in name or "marks" in name for name in vars(model))


def test_uninstall_gives_back_what_the_model_had(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = compiled(kwargs={"x": X})
    emulated(pipe, monkeypatch)
    model: Any = pipe.model
    model.model_parallel, model.hf_device_map = False, {"": 0}
    assert pipe.install() is model is pipe.install()
    assert model.model_parallel is False, "its forward may read it"
    assert model.hf_device_map == pipe.hf_device_map == device_map(model)
    assert set(model.hf_device_map.values()) == set(GPUS[:2])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(pipe)))
    for each in (pipe, copied):
        model = each.uninstall()
        assert model.hf_device_map == {"": 0}
        assert model.model_parallel is False
        assert not hasattr(model, "is_parallelizable")


def test_before_a_capture_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = compiled()
    SeveralGpus(monkeypatch)
    assert pipe.options.devices == (CPU,) * 2, "but the Trainer would take a GPU"
    for ask in (pipe.install, lambda: getattr(pipe, "hf_device_map", None)):
        with pytest.raises(OptionError, match=r"pipe\.capture\(x\)"):
            ask()


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Iterator[autopipe.Pipeline]:
    """A pipeline on two of four GPUs that torch counts."""
    pipe = compiled(kwargs={"x": X})
    emulated(pipe, monkeypatch).tell_torch()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield pipe
    AcceleratorState._reset_state(reset_partial_state=True)


class Replicated(nn.Module):
    """`nn.DataParallel`, which itself looks for the GPUs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()


@pytest.mark.parametrize("kind", ["plain", "installed", "pipeline"])
def test_a_trainer_leaves_a_placed_model_alone(
    kind: str, spread: autopipe.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case "plain" shows what it does else: it moves the model and replicates it."""
    monkeypatch.setattr(nn, "DataParallel", Replicated)
    make = {"plain": spread.uninstall, "installed": spread.install, "pipeline": lambda: spread}
    arguments = TrainingArguments(str(tmp_path), report_to=[], optim="sgd")
    assert (arguments.device, arguments.n_gpu) == (GPUS[0], 4)
    trainer = Trainer(make[kind](), arguments)
    replicated = isinstance(trainer._wrap_model(trainer.model), Replicated)
    devices = {p.device for p in spread.parameters()}
    if kind == "plain":
        assert (trainer.is_model_parallel, replicated, devices) == (False, True, {GPUS[0]})
    else:
        assert (trainer.is_model_parallel, replicated, devices) == (True, False, {*GPUS[:2]})
        assert (arguments.n_gpu, trainer.place_model_on_device) == (1, False)


@pytest.mark.parametrize("kind", ["plain", "installed", "pipeline"])
def test_accelerate_leaves_a_placed_model_alone(kind: str, spread: autopipe.Pipeline) -> None:
    make = {"plain": spread.uninstall, "installed": spread.install, "pipeline": lambda: spread}
    model = make[kind]()
    assert Accelerator().prepare_model(model) is model
    indices = {p.device.index or 0 for p in spread.parameters()}
    assert indices == ({0} if kind == "plain" else {0, 1})
