"""What a caller of a GPU may do, and reads when something fails; also on simulated devices.

Covers what `test_gpu.py` does not: side streams, pinned inputs, waits of the host, no memory and
then the same step again, labels in a trace, errors of kernels, scaled losses, several threads.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import autopipe
from autopipe.errors import StageError
from autopipe.runtime.caller_streams import CallerStreams
from benchmarks import gpu_failures, gpu_remat
from benchmarks.gpu_device import failing_receive
from benchmarks.gpu_order import (
    CHUNKS,
    PLACES,
    SCHEDULES,
    STREAMS,
    Layers,
    Way,
    blocked,
    deterministic,
    slow_stages,
    step,
    unlike,
    waits,
)
from benchmarks.gpu_setting import Setting, pipelined, training
from tests.support.gpu_script import SimulatedSetting, simulated_script

WIDTH = 8
GPU = torch.device("cuda:0")
WAYS = [Way(p, s, t) for p in PLACES for s in STREAMS for t in (True, False)]
WAYS = [way for way in WAYS if way[:2] != ("device", "default")]


@pytest.fixture(params=[pytest.param("cuda:0", marks=pytest.mark.gpu), "lazy:0"])
def setting(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Setting]:
    if request.param == "cuda:0":
        yield Setting(GPU, tiny=True, folder=tmp_path)
        return
    with simulated_script(monkeypatch):
        yield SimulatedSetting(torch.device("lazy:0"), tiny=True, folder=tmp_path)


def layers(setting: Setting) -> autopipe.Pipeline:
    torch.manual_seed(0)
    model = Layers(WIDTH)
    setting.card.place(model)
    return autopipe.compile(model, [setting.device] * 4, CHUNKS, remat="full")


def data() -> list[Tensor]:
    return [torch.randn(2 * CHUNKS, WIDTH), (torch.rand(2 * CHUNKS, WIDTH) > 0.3).float()]


@pytest.mark.few(6)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_any_place_and_any_stream_give_the_bits_of_the_default_stream(
    setting: Setting, way: Way
) -> None:
    card, inputs = setting.card, data()
    with deterministic():
        pipe = layers(setting)
        truth = step(card, pipe, inputs, Way("device", "default", way.trains))
        with slow_stages(card, lambda: 0.3):
            assert [unlike(step(card, pipe, inputs, way), truth) for _ in range(3)] == [[]] * 3
    assert card.races() == []


def test_a_step_returns_before_the_device_has_finished(setting: Setting) -> None:
    pipe = layers(setting)
    inputs = [setting.card.put(t) for t in data()]
    assert blocked(setting.card, lambda: pipe(*inputs).sum().backward()) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_operator_makes_the_host_wait(setting: Setting, schedule: str) -> None:
    model, inputs = setting.gpt2(layers=2)
    batch = inputs(CHUNKS)
    pipe = pipelined(setting, model, batch, 2, CHUNKS, schedule=schedule, remat="none")
    train = training(pipe, model, batch)
    train()
    train()
    assert waits(setting.card, train) == []


def test_without_memory_the_stage_is_named_and_the_pipeline_goes_on(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.tiny = not setting.card.is_gpu
    gpu_failures.no_memory(setting)
    assert setting.failed == [], capsys.readouterr().out


def test_a_kernel_that_fails_is_told_with_what_to_do(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_failures.kernel_fails(setting)
    assert setting.failed == [], capsys.readouterr().out


def test_a_trace_has_the_labels_of_actions_and_their_kernels(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_remat.trace(setting)
    assert setting.failed == [], capsys.readouterr().out


# ------------------------------------------------------------------------------------ on GPUs only


@pytest.mark.gpu
def test_a_scaled_loss_in_half_precision() -> None:
    """`torch.amp.GradScaler`, which looks for infinities in the gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(GPU)
    twin, x = copy.deepcopy(model), torch.randn(8, 8, device=GPU)
    pipe = autopipe.compile(model, [GPU] * 2, 2)
    for module, own in ((pipe, model), (twin, twin)):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda")
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = module(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_gradients_are_differentiated_again() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double().to(GPU)
    pipe = autopipe.compile(model, [GPU] * 2, 2)
    x = torch.randn(4, 4, dtype=torch.double, device=GPU, requires_grad=True)
    found = []
    for module in (pipe, model):
        (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append((first, second))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.gpu
def test_two_pipelines_in_two_threads() -> None:
    """Each on a stream of its own, at the same time."""
    inputs = [torch.randn(8, WIDTH, device=GPU) for _ in range(2)]
    mask = torch.ones(8, WIDTH, device=GPU)
    models = [Layers(WIDTH).to(GPU) for _ in range(2)]
    pipes = [autopipe.compile(m, [GPU] * 2, 4, args=(inputs[0], mask)) for m in models]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]

    def train(i: int) -> None:
        stream: Any = torch.cuda.Stream(GPU)
        with torch.cuda.stream(stream):
            for _ in range(10):
                models[i].zero_grad()
                pipes[i](inputs[i], mask).square().sum().backward()
            found[i] = [p.grad.clone() for p in models[i].parameters() if p.grad is not None]
        stream.synchronize()

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, x, ours in zip(models, inputs, found, strict=True):
        model.zero_grad()
        model(x, mask).square().sum().backward()
        for gradient, parameter in zip(ours, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_and_a_dropped_pipeline_leave_no_memory(remat: str) -> None:
    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream
        return torch.cuda.memory_allocated(GPU)

    before = used()
    model = Layers(256).to(GPU)
    x, mask = (torch.randn(64, 256, device=GPU) for _ in range(2))
    pipe = autopipe.compile(model, [GPU] * 2, 4, remat=remat, args=(x, mask))
    held = []
    for _ in range(4):
        pipe(x, mask).square().sum().backward()
        model.zero_grad(set_to_none=True)
        held.append(used())
    assert held[1:] == [held[1]] * 3
    del pipe, model, x, mask
    assert used() <= before + 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [["cuda:0", "cpu"], ["cpu", "cuda:0", "cpu"]])
def test_stages_on_the_host_before_and_after_a_gpu(devices: list[str]) -> None:
    torch.manual_seed(0)
    model, inputs = Layers(WIDTH), data()
    truth = copy.deepcopy(model)
    result = truth(*inputs)
    result.square().sum().backward()
    pipe = autopipe.compile(model, devices, CHUNKS)
    found = pipe(*inputs)
    found.square().sum().backward()
    assert found.device == inputs[0].device
    torch.testing.assert_close(found, result, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(model.parameters(), truth.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_memory_format_is_kept_by_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(8, 8, 3), nn.SiLU())))
    model.to(GPU, memory_format=torch.channels_last)
    x = torch.randn(4, 8, 16, 16, device=GPU).to(memory_format=torch.channels_last)
    pipe = autopipe.compile(model, [GPU] * 2, 2)
    found, expected = pipe(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # TF32
    assert found.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------- late errors


@pytest.mark.parametrize("where", ["__init__", "wait_on_host"])
def test_an_error_of_a_device_that_comes_beside_the_stages_is_explained(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event recorded at the beginning, or waited for at the end, reports an earlier kernel's.

    For results that go to the host the wait at the end is where the error usually comes.
    """
    pipe = autopipe.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["cpu"] * 2, 2)
    x = torch.ones(4, 2)
    pipe(x)

    def lost(_: CallerStreams, given: Any, *__: Any) -> None:
        if given:  # devices, or results; else no device is touched
            raise torch.AcceleratorError(gpu_failures.TEXT)

    monkeypatch.setattr(CallerStreams, where, lost)
    with pytest.raises(StageError) as caught:
        pipe(x)
    assert "restart the process" in str(caught.value.remedy)


def test_an_error_of_a_kernel_keeps_its_stage_where_every_later_call_fails() -> None:
    """After an error of a kernel an event cannot be recorded either.

    Then ``CUDA_LAUNCH_BLOCKING=1``, which the message recommends, does not name the op.
    """
    pipe = autopipe.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["cpu"] * 2, 2)
    x = torch.ones(4, 2)
    pipe(x)
    first, later = (torch.AcceleratorError(gpu_failures.TEXT) for _ in range(2))
    with (
        failing_receive(first),
        mock.patch.object(CallerStreams, "wait_for", side_effect=later),
        pytest.raises(StageError) as caught,
    ):
        pipe(x)
    assert caught.value.stage == 1
