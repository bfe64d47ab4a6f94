"""``remat="offload"``: the numbers of "none", fewer bytes on the device, and what the program says.

Covers runtime/saved_values.py and cost/offloaded.py. On CPU workers nothing is copied, so most
tests here let them copy, and overwrite what has left (`copy_on_cpu`).
"""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopipe
from autopipe.errors import OptionError, StageError
from autopipe.runtime.saved_values import SavedValues
from tests.support.models import MODELS
from tests.support.offloading import copy_on_cpu, offload_all
from tests.support.reference import objective

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-h2", "interleaved", "zb-v", "v-half", "v-min")


class Net(nn.Module):
    """A skip over all layers, a shared weight, dropout, batch norm, views, two inputs; a loss."""

    def __init__(self, width: int = 8, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width)
        self.shared = nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first = x = torch.tanh(x @ self.shared)
        for layer in self.layers:
            a, b, c = layer(x).chunk(3, -1)
            x = (
                x
                + F.dropout(torch.sigmoid(a) * torch.tanh(b), 0.2, self.training) * c.t().t() * mask
            )
        x = self.norm(x + first) @ self.shared.t()
        spectrum = torch.view_as_complex(x.reshape(x.shape[0], -1, 2)).conj() * 2
        return (spectrum * spectrum).real.square().mean()


def trained(
    model: nn.Module, inputs: tuple[Tensor, ...], steps: int, precision: Any, **options: Any
) -> list[Tensor]:
    """Losses, gradients, buffers and parameters after some steps."""
    pipe = autopipe.compile(copy.deepcopy(model), ["cpu"] * options.pop("devices", 2), **options)
    found = []
    torch.manual_seed(1)
    for step in range(steps):
        given = [t[step:].clone().requires_grad_(t.is_floating_point()) for t in inputs]
        with torch.autocast("cpu", enabled=precision is not None, dtype=precision):
            loss = pipe(*given)
        loss.backward()
        found += [loss.detach(), *(t.grad for t in given if t.grad is not None)]
        found += [p.grad for p in pipe.parameters() if p.grad is not None]
        pipe.zero_grad()
    assert [s.now for s in (*pipe.memory.stages, *pipe.memory.hosts)] == [0] * 2 * len(pipe.stages)
    return found + [b.clone() for b in pipe.buffers()]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 5
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.few(5)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bits_are_those_of_none(
    schedule: str, devices: int, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 22 and 21 samples: micro-batches of three and of two."""
    offload_all(monkeypatch)
    copy_on_cpu(monkeypatch)
    torch.manual_seed(0)
    model, inputs = Net(), (torch.randn(22, 8), (torch.rand(22, 8) > 0.2).float())
    one = {"devices": devices, "chunks": 8, "schedule": schedule}
    none = trained(model, inputs, 2, precision, remat="none", **one)
    assert_same(trained(model, inputs, 2, precision, remat="offload", **one), none)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offload_all(monkeypatch)
    copy_on_cpu(monkeypatch)
    found = []
    for remat in ("none", "offload"):
        torch.manual_seed(0)
        model, inputs = MODELS[name].make()
        args, kwargs = inputs(9)
        pipe = autopipe.compile(model, ["cpu"] * 2, 5, remat=remat)
        torch.manual_seed(1)
        result = pipe(*args, **kwargs)
        loss = objective(result)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_same(*found)
    assert sum(s.peak for s in pipe.memory.hosts) > 0


@pytest.mark.few(4)
@pytest.mark.parametrize("remat", ["offload", ["offload", "full"] * 2, ["none", "offload"] * 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_plan_knows_the_bytes(
    schedule: str, remat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On devices at most, by stage and device, micro-batches of two sizes; and on the host."""
    offload_all(monkeypatch, 100)
    pipe = autopipe.compile(Net(), ["cpu"] * 4, 13, remat=remat, schedule=schedule)
    pipe(torch.randn(30, 8), torch.ones(30, 8)).backward()
    plan, memory = pipe.plan, pipe.memory
    assert [s.peak for s in memory.stages] == [s.peak_saved_bytes for s in plan.stages]
    assert [d.peak for d in memory.devices] == [t.peak_saved_bytes for t in plan.totals]
    assert [max(s.per_microbatch.values(), default=0) for s in memory.stages] == [
        s.saved_bytes for s in plan.stages
    ]
    for stage, host in zip(plan.stages, memory.hosts, strict=True):
        assert (host.peak > 0) <= (stage.remat == "offload")
        assert host.peak <= stage.offloaded_bytes * stage.in_flight
    if schedule == "gpipe":
        assert [h.peak > 0 for h in memory.hosts] == [s.offloaded_bytes > 0 for s in plan.stages]
        assert sum(h.peak for h in memory.hosts) > 0


def test_bytes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers: x is the caller's, the result goes to it; tanh's result leaves."""
    offload_all(monkeypatch)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 30))
    pipe = autopipe.compile(model, 1, 6, remat="offload")
    result = pipe(torch.randn(24, 10))
    x, tanh = 4 * 10 * 4, 4 * 20 * 4
    (stage,), (host,) = pipe.memory.stages, pipe.memory.hosts
    assert stage.per_microbatch == {4: x + tanh}
    assert (stage.now, host.now) == (6 * x, 6 * tanh)
    assert stage.peak == 6 * x + tanh
    result.sum().backward()
    assert (stage.now, host.now, host.peak) == (0, 0, 6 * tanh)
    assert stage.peak == 6 * x + 2 * tanh
    assert pipe.plan.stages[0].offloaded_bytes == tanh
    assert "peak on the host" in pipe.memory._repr_html_()


def test_small_tensors_stay() -> None:
    """The smallest that leaves has 256 KiB."""
    model = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 1023), nn.Tanh())
    pipe = autopipe.compile(nn.Sequential(model, nn.Linear(1023, 1)), 1, 4, remat="offload")
    pipe(torch.randn(4 * 64, 64)).sum().backward()
    assert pipe.memory.hosts[0].peak == 4 * 64 * 1024 * 4


def calls(code: str, function: str) -> list[str]:
    """What a device's function calls: ``F0.1``, ``B0.1``, ``out 0.1``, ``in 0.1``."""
    body = code[code.index(f"def {function}(") :].split("\n\n\n")[0]
    short = {"forward_": "F", "backward_": "B", "run.offload": "out ", "run.fetch": "in "}
    found = re.findall(
        r"(forward_|backward_|run\.offload|run\.fetch)(?:(\d+)\(run, |\((\d+), )(\d+)", body
    )
    return [f"{short[verb]}{a or b}.{m}" for verb, a, b, m in found]


def test_the_program_shows_it() -> None:
    pipe = autopipe.compile(Net(), ["cpu"] * 2, 4, remat="offload")
    pipe(torch.randn(8, 8), torch.ones(8, 8)).backward()
    assert calls(pipe.code, "device_0_forward") == [
        *("F0.0", "out 0.0", "F0.1", "out 0.1", "F0.2", "out 0.2", "F0.3", "out 0.3")
    ]
    assert calls(pipe.code, "device_0_backward") == [
        *("in 0.0", "in 0.1", "B0.0", "in 0.2", "B0.1", "in 0.3", "B0.2", "B0.3")
    ]
    pipe = autopipe.compile(Net(), ["cpu"] * 3, 5, remat="offload", schedule="1f1b")
    pipe(torch.randn(10, 8), torch.ones(10, 8)).backward()
    assert calls(pipe.code, "device_0_step") == [
        *("F0.0", "F0.1", "out 0.1", "F0.2", "out 0.2", "B0.0", "in 0.1", "F0.3", "out 0.3"),
        *("B0.1", "in 0.2", "F0.4", "in 0.3", "B0.2", "B0.3", "B0.4"),
    ]
    assert "run.offload(2" not in pipe.code
    with torch.no_grad():
        pipe(torch.randn(10, 8), torch.ones(10, 8))
    assert "run.offload" not in pipe.code


def test_a_failed_step_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    offload_all(monkeypatch)
    copy_on_cpu(monkeypatch)
    pipe = autopipe.compile(Net(), ["cpu"] * 2, 4, remat="offload")
    inputs = torch.randn(8, 8), torch.ones(8, 8)
    pipe(*inputs).backward()
    for method in ("offload", "fetch"):
        original: Callable[..., None] = getattr(SavedValues, method)

        def failing(self: SavedValues, k: int, m: int, original: Any = original) -> None:
            original(self, k, m)
            if (k, m) == (1, 2):
                raise RuntimeError("as asked")

        with monkeypatch.context() as patch:
            patch.setattr(SavedValues, method, failing)
            with pytest.raises(StageError, match=r"stage 1, micro-batch 2 failed.*as asked"):
                pipe(*inputs).backward()
        gc.collect()
        assert [s.now for s in (*pipe.memory.stages, *pipe.memory.hosts)] == [0] * 4
    pipe(*inputs).backward()


def test_a_forward_without_backward_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    offload_all(monkeypatch)
    pipe = autopipe.compile(Net(), ["cpu"] * 2, 4, remat="offload")
    loss = pipe(torch.randn(8, 8), torch.ones(8, 8))
    assert all(s.now > 0 for s in pipe.memory.hosts)
    del loss
    gc.collect()
    assert [s.now for s in (*pipe.memory.stages, *pipe.memory.hosts)] == [0] * 4


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    offload_all(monkeypatch)
    copy_on_cpu(monkeypatch)
    found = []
    for remat in ("none", "offload"):
        torch.manual_seed(0)
        pipe = autopipe.compile(
            nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), 1, 4, remat=remat
        )
        x = torch.linspace(-1, 1, 32).view(8, 4).requires_grad_()
        (g,) = torch.autograd.grad(pipe(x).sum(), x, create_graph=True)
        g.square().sum().backward()
        found.append([x.grad, *(p.grad for p in pipe.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_messages_name_it() -> None:
    with pytest.raises(OptionError, match="offload"):
        autopipe.compile(Net(), 2, remat="offloaded")


class Conjugates(nn.Module):
    """Saves conjugates and negatives, which are flags of tensors and not numbers in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            z = torch.view_as_complex(layer(x).view(-1, 4, 2)).conj()
            x = torch.view_as_real((z * z.imag.neg()).resolve_conj()).flatten(1)
        return x.square().mean()


def test_the_plan_knows_that_conjugates_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    offload_all(monkeypatch)
    pipe = autopipe.compile(Conjugates(), ["cpu"] * 2, 6, remat="offload")
    pipe(torch.randn(12, 8)).backward()
    plan, memory = pipe.plan.stages, pipe.memory
    assert [s.peak for s in memory.stages] == [s.peak_saved_bytes for s in plan]
    assert [h.peak for h in memory.hosts] == [6 * s.offloaded_bytes for s in plan]


def test_a_profile_knows_what_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy back that is late is no work of the backward: it is one more wait."""
    offload_all(monkeypatch)
    counts = {}
    for remat in ("none", "offload"):
        pipe = autopipe.compile(Net(), ["cpu"] * 2, 4, remat=remat)
        with pipe.profile() as measured:
            pipe(torch.randn(8, 8), torch.ones(8, 8)).backward()
        (line,) = measured.steps
        spans = [s for row in line.spans for s in row if "B" in s.action.phase]
        counts[remat] = {(s.action.stage, s.action.microbatch): len(s.waits) for s in spans}
    assert counts["offload"] == {key: count + 1 for key, count in counts["none"].items()}
