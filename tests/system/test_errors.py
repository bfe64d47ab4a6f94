"""Promises 6 and 8: what cannot work is refused with a reason; what fails at run time surfaces
once, in bounded time, and leaves nothing behind."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe import errors


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


X = torch.randn(8, 4)

OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no chunks": ({"chunks": 0}, errors.OptionError, "at least 1"),
    "negative chunks": ({"chunks": -3}, errors.OptionError, "at least 1"),
    "half a chunk": ({"chunks": 2.5}, errors.OptionError, "an integer"),
    "no devices": ({"devices": 0}, errors.OptionError, "at least 1"),
    "empty list": ({"devices": []}, errors.OptionError, "at least 1"),
    "one name": ({"devices": "cpu"}, errors.OptionError, "a count or a list"),
    "no such GPU": ({"devices": ["cpu", "cuda:99"]}, errors.DeviceError, "cuda:99"),
    "no such kind": ({"devices": ["gpu:0"]}, errors.DeviceError, "gpu:0"),
    "meta device": ({"devices": ["meta", "meta"]}, errors.DeviceError, "meta"),
    "unknown schedule": ({"schedule": "pipedream"}, errors.OptionError, "gpipe"),
    "unknown remat": ({"remat": "some"}, errors.OptionError, "min-cut"),
    "remat above all": ({"remat": 1.5}, errors.OptionError, "from 0 to 1"),
    "remat of three stages": ({"remat": ["full"] * 3}, errors.OptionError, "values"),
    "memory in words": ({"memory": "much"}, errors.OptionError, "16GiB"),
    "no memory": ({"memory": 0}, errors.OptionError, "above 0"),
    "a memory of bits": ({"memory": "16Gib"}, errors.OptionError, "16GiB"),
    "unknown backend": ({"backend": "jax"}, errors.OptionError, "eager"),
    "a mode without inductor": ({"mode": "max-autotune"}, errors.OptionError, "inductor"),
    "unknown mode": ({"backend": "inductor", "mode": "slow"}, errors.OptionError, "autotune"),
    "too many stages": ({"devices": ["cpu"] * 9}, errors.PartitionError, "fewer devices"),
    "in_dims of nothing": ({"in_dims": {"y": 0}}, errors.OptionError, "'y'"),
    "in_dims too large": ({"in_dims": 5}, errors.InputError, "dimension 5"),
    "nothing batched": ({"in_dims": None}, errors.InputError, "batch dimension"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(case: str) -> None:
    wrong, kind, text = OPTIONS[case]
    options: dict[str, Any] = {"devices": ["cpu", "cpu"], "chunks": 2, "args": (X,)} | wrong
    with pytest.raises(kind, match=re.escape(text)) as caught:
        autopipe.compile(mlp(), **options)
    assert isinstance(caught.value, errors.AutopipeError)
    assert caught.value.expected or caught.value.remedy, "a reader must learn what to do"


def test_not_a_module() -> None:
    with pytest.raises(errors.OptionError, match=r"torch\.nn\.Module"):
        autopipe.compile(torch.tanh, 1, 1)  # type: ignore[arg-type]


STRUCTURES: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "one more": lambda: ((X, X), {}),
    "by name": lambda: ((), {"input": X}),
    "nested": lambda: (({"x": X},), {}),
    "other dtype": lambda: ((X.double(),), {}),
    "other rank": lambda: ((X[None],), {}),
    "no tensor": lambda: ((3,), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", STRUCTURES)
def test_another_structure_than_the_captured_one(case: str) -> None:
    """It is captured, too; what the model itself refuses is refused by an error of autopipe."""
    model = mlp()
    pipe = autopipe.compile(model, 2, 2, args=(X,))
    args, kwargs = STRUCTURES[case]()
    try:
        expected = model(*args, **kwargs)
    except Exception:
        with pytest.raises(errors.AutopipeError) as caught:
            pipe(*args, **kwargs)
        assert caught.value.remedy
    else:
        torch.testing.assert_close(pipe(*args, **kwargs), expected)
    torch.testing.assert_close(pipe(X), model(X))


def test_another_structure_can_be_added() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            x = self.layer(x)
            return torch.tanh(x if y is None else x * y)

    model = Scale()
    pipe = autopipe.compile(model, 2, 2, args=(X,))
    pipe.capture(X, X)
    assert torch.allclose(pipe(X, X), model(X, X))
    assert torch.allclose(pipe(X), model(X))


def test_samples_disagree() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(x + y)

    with pytest.raises(errors.InputError, match="number of samples"):
        autopipe.compile(Sum(), 1, 2)(X, X[:3])
    with pytest.raises(errors.InputError, match="without samples"):
        autopipe.compile(Sum(), 1, 2)(X[:0], X[:0])


def test_nothing_compiled_yet() -> None:
    pipe = autopipe.compile(mlp(), 2, 2)
    for look in (lambda: pipe.stages, lambda: pipe.code, pipe.explain, lambda: pipe.captured):
        with pytest.raises(errors.OptionError, match="call the pipeline once"):
            look()


class Lookup(nn.Module):
    """A table look-up in the last third, so that a bad index fails in stage 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.table = nn.Embedding(5, 16)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.table(index)


def test_a_stage_that_fails() -> None:
    torch.manual_seed(0)
    model = Lookup()
    x, good = torch.randn(8, 16), torch.zeros(8, dtype=torch.long)
    pipe = autopipe.compile(model, 3, 4, args=(x, good))
    bad = good.clone()
    bad[6] = 77  # in micro-batch 3 of 4
    threads = set(threading.enumerate())
    start = time.monotonic()
    with pytest.raises(errors.StageError) as caught:
        pipe(x, bad)
    assert time.monotonic() - start < 5
    assert (caught.value.stage, caught.value.microbatch) == (2, 3)
    assert caught.value.phase == "F"
    assert caught.value.node == "embedding"
    assert __file__ in str(caught.value.source)
    assert isinstance(caught.value.__cause__, IndexError)
    assert set(threading.enumerate()) == threads
    assert all(s.now == 0 for s in pipe.memory.stages)
    assert torch.allclose(pipe(x, good), model(x, good), atol=1e-6)


def test_a_backward_that_fails() -> None:
    torch.manual_seed(0)
    model, x = Lookup(), torch.randn(8, 16)
    pipe = autopipe.compile(model, 3, 4)
    index = torch.zeros(8, dtype=torch.long)
    out = pipe(x, index)
    _, ready = pipe._programs.last
    names = ready.program.backward[0].__globals__
    original = names["BW_1_b2"]

    def failing(*_: Any) -> Any:
        raise ArithmeticError("no")

    names["BW_1_b2"] = failing
    with pytest.raises(errors.StageError, match="ArithmeticError: no") as caught:
        out.sum().backward()
    names["BW_1_b2"] = original
    assert caught.value.stage == 1
    assert caught.value.microbatch == 0
    assert all(s.now == 0 for s in pipe.memory.stages)
    pipe(x, index).sum().backward()
    assert model.table.weight.grad is not None


def test_backward_twice() -> None:
    out = autopipe.compile(mlp(), 2, 2)(X).sum()
    out.backward(retain_graph=True)
    with pytest.raises(errors.StageError, match="second time"):
        out.backward()


def test_parameters_changed_before_backward() -> None:
    model = mlp()
    out = autopipe.compile(model, 2, 2)(X).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(errors.StageError, match="changed in place"):
        out.backward()


def test_meta_parameters_need_values() -> None:
    with torch.device("meta"):
        model = mlp()
    pipe = autopipe.compile(model, 2, 2, args=(X,))
    assert len(pipe.stages) == 2
    with pytest.raises(errors.DeviceError, match=r"load_state_dict\(..., assign=True\)"):
        pipe(X)
    values = mlp()
    pipe.load_state_dict(values.state_dict(), assign=True)
    assert torch.allclose(pipe(X), values(X), atol=1e-6)


def test_moving_a_pipeline_is_refused() -> None:
    with pytest.raises(errors.UnsupportedError, match=r"before autopipe\.compile"):
        autopipe.compile(mlp(), 2, 2).to(torch.float64)


def test_more_devices_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(errors.DeviceError, match=r'devices=\["cuda:0", "cuda:0"\]'):
        autopipe.compile(mlp(), 2, 2)


def test_meta_buffers_need_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    pipe = autopipe.compile(model, 1, 2, args=(X,))
    for module in model:
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(torch.ones(parameter.shape)))
    with pytest.raises(errors.DeviceError, match="a buffer is on the meta device") as caught:
        pipe(X)
    assert caught.value.node == "1.running_mean"
