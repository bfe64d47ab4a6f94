"""The interface to device types: a new one is one entry of `BACKENDS`, and a pipeline uses it.

Covers backends/base.py; the registered type is `tests.support.recording.RecordingBackend`.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.runtime import backends
from autopipe.runtime.backends import BACKENDS, Backend, accelerators, autocast_types, backend_of
from tests.support.recording import RecordingBackend

X = torch.randn(6, 5)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 5), nn.Tanh()]
    return nn.Sequential(*layers)


def step(devices: int) -> tuple[autopipe.Pipeline, Tensor, list[Tensor]]:
    """Result and gradients of one step in three micro-batches."""
    x = X.clone().requires_grad_()
    pipe = autopipe.compile(model(), ["cpu"] * devices, 3)
    torch.manual_seed(1)
    result = pipe(x)
    result.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in pipe.parameters())]
    return pipe, result.detach(), [g for g in gradients if g is not None]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_pipeline_runs_through_a_registered_type(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, gradients = step(devices)
    backend = RecordingBackend()
    monkeypatch.setitem(BACKENDS, "cpu", backend)
    _, found, others = step(devices)
    assert torch.equal(found, expected)
    assert len(others) == len(gradients) == 5
    assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))
    computes = [f"stream {k}" for k in range(devices)]
    # The caller waits for every worker after the forward and after the backward.
    assert backend.streams["default"].waited_for() == computes * 2
    for k, name in enumerate(computes):
        others_ = [c for c in computes if c != name]
        # A worker waits for the caller first; then for each of 3 activations or gradients.
        expected_waits = ["default"] + (others_ * 3 if k == 1 else [])
        expected_waits += ["default"] + (others_ * 3 if k == 0 else [])
        assert backend.streams[name].waited_for() == expected_waits
    # Between workers on one device nothing is copied.
    assert len(backend.streams) == 1 + devices


def test_what_the_caller_reads_is_recorded_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RecordingBackend()
    monkeypatch.setitem(BACKENDS, "cpu", backend)
    step(2)
    used = [t for what, t in backend.streams["default"].entries if what == "use"]
    shapes = [tuple(t.shape) for t in used]
    assert shapes.count((2, 5)) == 6  # three parts of the result, three of the input's gradient
    assert sorted(shapes)[:4] == [(2, 5)] * 4
    assert sorted(s for s in shapes if s != (2, 5)) == [(5,), (5,), (5, 5), (5, 5)]


def test_a_missing_type_is_left_to_torch() -> None:
    """A tensor of the caller's may be on a device where no worker can run."""
    backend = backend_of(torch.device("meta"))
    assert type(backend) is Backend
    assert backend.devices() == ()
    assert backend.find(torch.device("meta")) is None
    assert backend.new_stream(torch.device("meta")) is None
    assert backend.default_stream(torch.device("meta")) is None


def test_a_type_without_streams_says_so() -> None:
    backend = Backend("meta")
    with pytest.raises(NotImplementedError, match="meta has no streams"):
        backend.record_use(X, RecordingBackend().streams["default"])
    with pytest.raises(NotImplementedError, match="meta has no streams"):
        backend.use_stream(RecordingBackend().streams["default"])


def test_accelerators_are_those_of_the_first_type_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": BACKENDS["cpu"]})
    assert accelerators() == ()
    backends.BACKENDS["xpu"] = Backend("xpu")
    assert accelerators() == ()
    backends.BACKENDS["meta"] = RecordingBackend("meta")
    assert accelerators() == (torch.device("meta"),)


def test_autocast_types_follow_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert autocast_types() == ("cpu", "cuda")
    monkeypatch.setitem(BACKENDS, "xpu", RecordingBackend("xpu"))
    assert autocast_types() == ("cpu", "cuda", "xpu")
    monkeypatch.setitem(BACKENDS, "lazy", RecordingBackend("lazy"))  # torch.autocast refuses it
    assert autocast_types() == ("cpu", "cuda", "xpu")


def test_every_type_answers_every_question() -> None:
    """No backend renames an argument or leaves a method of the interface out."""
    public = [n for n, _ in inspect.getmembers(Backend, inspect.isfunction) if n[0] != "_"]
    for backend in (*BACKENDS.values(), RecordingBackend()):
        for name in public:
            own = inspect.signature(getattr(type(backend), name)).parameters
            assert list(own) == list(inspect.signature(getattr(Backend, name)).parameters), name
