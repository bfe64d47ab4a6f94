"""`backend="inductor"`: the numbers of eager execution up to rounding, under every option.

Covers autopipe/compiled_parts.py.

Where it is not the compiler that is tested, `interpreted` runs its graphs op by op instead.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import autopipe
from autopipe import compiled_parts
from autopipe.passes.inductor import CompiledPart, compile_part
from tests.support.models import MODELS

TOLERANCE = 1e-5  # relative to the largest entry


class Net(nn.Module):
    """Dropout, a norm, attention, and a parameter that both stages use."""

    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.last, self.dropout = nn.Linear(8, 8), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.gelu(self.norm(self.first(x))))
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return self.dropout(self.last(x) @ self.first.weight)


class Loss(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).pow(2).mean()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def sequences(batch: int = 8, length: int = 3) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length))


def step(run: Callable[..., Any], model: nn.Module, *args: Any, seed: int = 1) -> dict[str, Tensor]:
    """The output, gradients and buffers of a step."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = run(*args)
    output.float().pow(2).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"output": output.detach()} | {n: b.clone() for n, b in model.named_buffers()}


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(t.abs().max()) for t in expected.values() if t.is_floating_point())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=name)


def both(
    model: nn.Module, *args: Any, tolerance: float = TOLERANCE, chunks: int = 4, **options: Any
) -> autopipe.Pipeline:
    """Compare a step of both backends; return the compiled pipeline."""
    pipes = {
        backend: autopipe.compile(model, ["cpu", "cpu"], chunks, backend=backend, **options)
        for backend in ("eager", "inductor")
    }
    buffers = copy.deepcopy(dict(model.named_buffers()))
    found = {}
    for backend, pipe in pipes.items():
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        found[backend] = step(pipe, model, *args)
    assert_close(found["inductor"], found["eager"], tolerance)
    return pipes["inductor"]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Run what would be compiled op by op; the list has each graph."""
    graphs: list[fx.GraphModule] = []

    def compile_graph(module: fx.GraphModule, inputs: Sequence[Any], options: Any) -> Any:
        graphs.append(module)

        def call(arguments: list[Any]) -> Any:
            taken = tuple(arguments)
            arguments.clear()
            return module(*taken)

        return call

    gc.collect()
    monkeypatch.setattr("autopipe.passes.inductor.part_compilation.compile_graph", compile_graph)
    monkeypatch.setattr(compiled_parts, "_compiled", weakref.WeakValueDictionary())
    return graphs


@contextmanager
def counted() -> Iterator[list[CompiledPart]]:
    """Collects what is compiled."""
    found: list[CompiledPart] = []

    def counting(*args: Any, **kwargs: Any) -> CompiledPart:
        found.append(compile_part(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_parts, "compile_part", counting)
        yield found


@pytest.fixture(autouse=True)
def _no_fallback(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing runs eagerly that could be compiled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*runs without inductor.*")
        yield


# ------------------------------------------------------------------------------------ the compiler


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("schedule", "remat"),
    [
        *(("gpipe", r) for r in ("none", "full", "min-cut", 0.5)),
        *((s, r) for s in ("1f1b", "zb-h1", "zb-h2") for r in ("none", "full")),
    ],
)
def test_schedules_and_policies(schedule: str, remat: Any) -> None:
    """With dropout: the draws are those of the eager backend."""
    model = Loss()
    pipe = both(model, sequences(), schedule=schedule, remat=remat)
    eager = autopipe.compile(model, ["cpu", "cpu"], 4, schedule=schedule, remat=remat)
    step(eager, model, sequences())
    assert [s.peak for s in pipe.memory.stages] == [s.peak for s in eager.memory.stages]
    report = pipe.verify(sequences())
    assert report.ok
    assert report.backend == "inductor"
    assert "backend='inductor'" in str(report)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, inputs = MODELS[name].make()
    args, kwargs = inputs(4)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, backend="inductor", remat="none")
    assert pipe.verify(*args, **kwargs).ok


@pytest.mark.full
def test_batch_norm_updates_its_statistics() -> None:
    both(Normed(), torch.randn(8, 2, 5, 5), chunks=2)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode: Any) -> None:
    both_of = Net(0.0)
    pipe = autopipe.compile(both_of, ["cpu", "cpu"], 4, backend="inductor", mode=mode)
    assert_close(step(pipe, both_of, sequences()), step(both_of, both_of, sequences()))


@pytest.mark.full
def test_autocast() -> None:
    """Casts of autocast are part of the graph; sums in bfloat16 round at other places."""
    with torch.autocast("cpu", torch.bfloat16):
        both(Net(), sequences(), tolerance=3e-2)


@pytest.mark.full
def test_a_size_that_changes_is_a_symbol_of_the_compiled_code() -> None:
    model = Net(0.0)
    pipe = autopipe.compile(
        model, ["cpu", "cpu"], 2, backend="inductor", dynamic={"x": {1: "length"}}
    )
    with counted() as compiled:
        for length in (3, 5, 4, 7):
            x = sequences(length=length)
            assert_close(step(pipe, model, x), step(model, model, x))
    assert len(compiled) == 5  # F, R and BW of the first stage, F and RBW of the second
    assert all(part.symbols for part in compiled)


# ------------------------------------------------------------------------------ around the compiler


def test_identical_stages_are_compiled_once(interpreted: list[fx.GraphModule]) -> None:
    """Six stages: a forward, R and BW, BW of the first (it sends no gradient), RBW of the last."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)))
    x = torch.randn(8, 6)
    pipe = autopipe.compile(model, ["cpu"] * 6, 2, backend="inductor", cut_at="blocks")
    assert_close(step(pipe, model, x), step(model, model, x))
    assert len(interpreted) == 5 <= pipe.code.count("_part_1(ctx, args):")
    second = autopipe.compile(model, ["cpu"] * 6, 4, backend="inductor", cut_at="blocks")
    step(second, model, torch.randn(16, 6))  # micro-batches of the same size
    assert len(interpreted) == 5


def test_what_cannot_be_compiled_runs_eagerly_after_one_warning(
    interpreted: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(part: Any, *args: Any, **kwargs: Any) -> CompiledPart:
        if "B" in part.phase:
            raise RuntimeError("no such kernel\nsecond line")
        return compile_part(part, *args, **kwargs)

    monkeypatch.setattr(compiled_parts, "compile_part", refused)
    model = Net(0.0)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, backend="inductor")
    with pytest.warns(UserWarning, match="runs without inductor") as caught:
        found = step(pipe, model, sequences())
    assert_close(found, step(model, model, sequences()))
    pipe(sequences(batch=6))  # other micro-batches: other programs
    (warning,) = (w for w in caught if "inductor" in str(w.message))
    assert "phase BW of stage 0: RuntimeError: no such kernel (and 1 more)" in str(warning.message)
    assert "second line" not in str(warning.message)
    assert warning.filename == __file__
    assert len(interpreted) >= 2


def test_draws_and_sums_of_gradients_stand_outside_of_parts(
    interpreted: list[fx.GraphModule],
) -> None:
    pipe = both(Loss(), sequences(), chunks=2)
    parts = [f for f in pipe.code.split("\n\n\n") if "_part_" in f.split("(")[0]]
    assert parts
    assert not any("ctx." in part for part in parts)
    assert "ctx.draw" in pipe.code
    assert "ctx.accumulate" in pipe.code
    assert not any(n.op == "call_method" for g in interpreted for n in g.graph.nodes)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_steps_with_a_loss_function(schedule: Any) -> None:
    model, x, y = Net(), sequences(), torch.randn(8, 3, 8)
    found = {}
    for backend in ("eager", "inductor"):
        pipe = autopipe.compile(
            model, ["cpu", "cpu"], 4, backend=backend, schedule=schedule, loss_fn=F.mse_loss
        )
        model.zero_grad()
        torch.manual_seed(1)
        loss = pipe.step(x, target=y)
        found[backend] = {n: p.grad.clone() for n, p in model.named_parameters()} | {"loss": loss}
    assert_close(found["inductor"], found["eager"])


@pytest.mark.usefixtures("interpreted")
def test_evaluation() -> None:
    model = Net().eval()
    pipe = autopipe.compile(model, ["cpu", "cpu"], 4, backend="inductor")
    x = sequences()
    with torch.no_grad():
        torch.testing.assert_close(pipe(x), model(x))
    torch.testing.assert_close(pipe(x), model(x))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["tied", "two_inputs", "integer_boundary"])
def test_shared_parameters_and_several_inputs(name: str) -> None:
    model, inputs = MODELS[name].make()
    args, kwargs = inputs(4)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, backend="inductor")
    assert pipe.verify(*args, **kwargs).ok


@pytest.mark.usefixtures("interpreted")
def test_a_parameter_with_other_strides_is_copied() -> None:
    """Compiled code reads memory by the strides that it was compiled for."""
    model = Net(0.0)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, backend="inductor")
    step(pipe, model, sequences())
    model.last.weight.data = model.last.weight.data.t().contiguous().t()
    assert_close(step(pipe, model, sequences()), step(model, model, sequences()))


def test_copies_and_pickles(interpreted: list[fx.GraphModule]) -> None:
    model = Net(0.0)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, backend="inductor", args=(sequences(),))
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other.options.backend == "inductor"
        expected = step(other.model, other.model, sequences())
        assert_close(step(other, other.model, sequences()), expected)
    assert interpreted


def test_compiled_code_is_freed_with_its_program(interpreted: list[fx.GraphModule]) -> None:
    model = Net(0.0)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 1, backend="inductor", cache_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(pipe, model, sequences(batch=4))
        first = [weakref.ref(part) for part in compiled_parts._compiled.values()]
        step(pipe, model, sequences(batch=6))
    gc.collect()
    assert first
    assert not any(ref() for ref in first)
    del pipe
    gc.collect()
    assert not compiled_parts._compiled
