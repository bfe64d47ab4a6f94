"""GPUs: which there are (with torch.cuda's answers replaced); the rest needs one."""

from __future__ import annotations

import pytest
import torch

from autopipe.runtime.backends import BACKENDS, accelerators

BACKEND = BACKENDS["cuda"]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_devices_have_an_index() -> None:
    gpus = (torch.device("cuda", 0), torch.device("cuda", 1))
    assert BACKEND.devices() == accelerators() == gpus
    assert BACKEND.find(torch.device("cuda")) == gpus[0]
    assert BACKEND.find(torch.device("cuda", 1)) == gpus[1]
    assert BACKEND.find(torch.device("cuda", 2)) is None


def test_without_a_gpu_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKEND.devices() == accelerators() == ()
    assert BACKEND.find(torch.device("cuda")) is None


def test_default_generators_go_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = (torch.Generator(), torch.Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert BACKEND.default_generator(torch.device("cuda", 0)) is generators[0]
    assert BACKEND.default_generator(torch.device("cuda")) is generators[1]


@pytest.mark.gpu
def test_streams_and_timing_on_a_gpu() -> None:
    gpu = torch.device("cuda", 0)
    stream = BACKEND.new_stream(gpu)
    assert stream is not None
    assert BACKEND.current_stream(gpu) == BACKEND.default_stream(gpu)
    with BACKEND.use_device(gpu), BACKEND.use_stream(stream):
        assert BACKEND.current_stream(gpu) == stream
        x = torch.randn(500, 500, device=gpu)
        BACKEND.record_use(x, stream)
    product, seconds = BACKEND.timed(gpu, lambda: x @ x)
    assert seconds > 0
    BACKEND.synchronize(gpu)
    assert product.shape == (500, 500)
    state = torch.cuda.get_rng_state(gpu)
    with BACKEND.fork_rng(gpu):
        torch.rand(3, device=gpu)
    assert torch.equal(torch.cuda.get_rng_state(gpu), state)


@pytest.mark.gpu
def test_marks_are_times_of_the_gpu() -> None:
    gpu = torch.device("cuda", 0)
    stream = BACKEND.new_stream(gpu)
    assert stream is not None
    with BACKEND.use_device(gpu), BACKEND.use_stream(stream):
        x = torch.randn(2000, 2000, device=gpu)
        first = BACKEND.mark(stream)
        for _ in range(10):
            x = x @ x
        second = BACKEND.mark(stream)
    assert 0 < BACKEND.seconds_between(first, second) == -BACKEND.seconds_between(second, first)
