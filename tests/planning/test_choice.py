"""What is left to the planner, as a user meets it: `compile` and `plan` with something open."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import MemoryLimitError, OptionError, UnsupportedError
from autopipe.options import models_of
from autopipe.passes.devices import H100, L4
from autopipe.planning import choice
from tests.support.models import gpt2, unet
from tests.support.once import pure_passes_once

pytestmark = [pytest.mark.few(2), pytest.mark.usefixtures("alike_models_once")]


class Deep(nn.Module):
    """Layers whose results are large beside their weights."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


X = torch.randn(64, 32, 16, generator=torch.Generator().manual_seed(0))


def need(**options: Any) -> int:
    """What the largest stage of a plan takes."""
    plan = autopipe.plan(Deep(), ["cpu"] * 2, args=(X,), **options)
    return max(s.memory_bytes for s in plan.stages)


# ------------------------------------------------------------------------------- compile


def test_what_is_chosen_is_what_runs() -> None:
    most, least = need(chunks=8, remat="none"), need(chunks=8, remat="full")
    assert least < most
    limit = (most + least) // 2
    pipe = autopipe.compile(Deep(), ["cpu"] * 2, remat="auto", memory=limit)
    pipe(X).backward()
    plan = pipe.plan
    assert all(s.memory_bytes <= s.limit_bytes == limit for s in plan.stages)
    for stage, counted in zip(plan.stages, pipe.memory.stages, strict=True):
        assert counted.peak == stage.peak_saved_bytes
    assert pipe.verify(X).ok
    assert f"chunks={plan.chunks}" in repr(pipe)


def test_without_limit_nothing_is_run_again() -> None:
    plan = autopipe.plan(Deep(), ["cpu"] * 2, args=(X,), remat="auto")
    assert plan.remat == "none"
    assert all(s.limit_bytes is None for s in plan.stages)


@pytest.mark.full
def test_a_larger_batch_that_does_not_fit_is_refused_before_it_runs() -> None:
    limit = int(need(chunks=8, remat="full") * 1.05)
    pipe = autopipe.compile(Deep(), ["cpu"] * 2, remat="auto", memory=limit)
    pipe(X).backward()
    pipe(X[:10]).backward()
    with pytest.raises(MemoryLimitError, match="with this batch") as caught:
        pipe(torch.cat([X] * 4))
    assert caught.value.missing_bytes is not None
    with torch.no_grad():
        pipe(torch.cat([X] * 4))  # which keeps nothing
    pipe(X).backward()


def test_eval_keeps_to_the_cut_of_training() -> None:
    pipe = autopipe.compile(Deep(), ["cpu"] * 2, memory="1GiB", remat="auto")
    pipe(X).backward()
    held = [s.parameters for s in pipe.stages]
    pipe.eval()
    with torch.no_grad():
        assert torch.allclose(pipe(X), Deep()(X))
    assert [s.parameters for s in pipe.stages] == held


@pytest.mark.parametrize("again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_chooses_for_itself(again: Any) -> None:
    pipe = autopipe.compile(Deep(), ["cpu"] * 2, remat="auto", memory="1GiB")
    pipe(X).backward()
    other = again(pipe)
    other(X[:8]).backward()
    assert sum(other.plan.sizes) == 8


def test_profile_in_compile(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = autopipe.compile(Deep(), ["cpu"] * 2, 4, remat="auto", profile=True)
    assert pipe.verify(X).ok
    assert all(s.speeds.startswith("measured") for s in pipe.plan.stages)


# ------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("make", [gpt2, pytest.param(unet, marks=pytest.mark.full)])
def test_any_policy_trains_as_eager(make: Any) -> None:
    model, inputs = make()
    args, kwargs = inputs(4)
    with pure_passes_once():
        for remat in (0.0, 0.3, 0.7, 1, "0.5", ["full", "none"], [0.5, "min-cut"]):
            pipe = autopipe.compile(model, ["cpu"] * 2, 2, remat=remat)
            assert pipe.verify(*args, **kwargs).ok, remat


@pytest.mark.full
def test_a_fraction_keeps_between_nothing_and_min_cut() -> None:
    model, inputs = gpt2(layers=4)
    _, kwargs = inputs(4)
    with pure_passes_once():
        kept = [
            autopipe.plan(model, ["cpu"], 2, remat=remat, kwargs=kwargs).stages[0].saved_bytes
            for remat in ("full", 0.0, 0.25, 0.5, 0.75, 1.0, "min-cut")
        ]
    assert kept[0] == kept[1]
    assert kept[-1] == kept[-2]
    assert kept == sorted(kept)
    assert kept[0] < kept[3] < kept[-1]


# ------------------------------------------------------------------------------- devices


def test_stages_on_devices_that_differ() -> None:
    """The faster one gets more of the work, and each has its own limit."""
    with torch.device("meta"):
        model, x = Deep(12), torch.zeros(4096, 256, 16)
    plan = autopipe.plan(
        model, 2, 4, args=(x,), remat="none", device=[H100, "l4"], memory=["80GB", "24GB"]
    )
    assert [s.speeds for s in plan.stages] == ["h100", "l4"]
    assert [s.limit_bytes for s in plan.stages] == [80 * 10**9, 24 * 10**9]
    assert plan.stages[0].calls > 2 * plan.stages[1].calls
    assert plan.stages[1].times[0].receive == pytest.approx(L4.link.seconds(1024 * 256 * 16 * 4))
    assert plan.timeline.makespan > max(4 * s.seconds for s in plan.stages)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "h100"),
        ("some other", "h100"),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu, cpu = models_of([torch.device("cuda", 0), torch.device("cpu")])
    assert (gpu.name, cpu.name) == (model, "cpu-core")


def test_more_devices_than_are_here_can_be_planned() -> None:
    plan = autopipe.plan(Deep(), 6, 2, args=(X,), device="a100-80gb")
    assert len(plan.stages) == 6


@pytest.mark.parametrize(
    ("text", "count"), [("16GiB", 16 * 2**30), ("1.5 GB", 1_500_000_000), ("4096kB", 4_096_000)]
)
def test_sizes_in_words(text: str, count: int) -> None:
    (stage,) = autopipe.plan(Deep(), 1, 64, args=(X,), memory=text).stages
    assert stage.limit_bytes == count


@pytest.mark.parametrize("text", ["2tib", "16", "-1GB", "1e9B", "GiB", "16 GiB of it"])
def test_words_that_are_no_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="memory"):
        autopipe.plan(Deep(), 1, 1, args=(X,), memory=text)


def test_calls_are_timed_on_one_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with two kinds: what stages would be balanced by holds for one of them."""
    kinds = iter(["NVIDIA L4", "NVIDIA H100"])
    monkeypatch.setattr(choice, "device_name", lambda device: next(kinds))
    with pytest.raises(UnsupportedError, match="one kind of device") as error:
        autopipe.plan(Deep(), ["cpu"] * 2, 2, args=(X,), profile=True)
    assert "device=[...]" in str(error.value)
