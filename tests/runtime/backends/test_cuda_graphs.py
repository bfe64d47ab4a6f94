"""Captures on a GPU; without one, that torch is asked for them as it should be."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from autopipe.runtime.backends import BACKENDS, cuda_graphs
from autopipe.runtime.backends.cuda_graphs import CudaGraphPool

GPU = torch.device("cuda", 0)


class FakeGraph:
    def __init__(self, fails: bool = False) -> None:
        self.calls: list[Any] = []
        self._fails = fails

    def capture_begin(self, **options: Any) -> None:
        self.calls.append(options)

    def capture_end(self) -> None:
        self.calls.append("end")
        if self._fails:
            raise RuntimeError("the capture is invalid")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> CudaGraphPool:
    fake = cuda_graphs.torch.cuda
    monkeypatch.setattr(fake, "empty_cache", lambda: None)
    monkeypatch.setattr(fake, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(fake, "device", lambda device: nullcontext())
    monkeypatch.setattr(fake, "stream", lambda stream: nullcontext())
    return CudaGraphPool(GPU, "a stream")


def test_only_what_the_capturing_thread_does_can_spoil_a_capture(pool: CudaGraphPool) -> None:
    graph = FakeGraph()
    with pool.capturing(graph):
        graph.calls.append("work")
    options = {"pool": "a pool", "capture_error_mode": "thread_local"}
    assert graph.calls == [options, "work", "end"]


@pytest.mark.parametrize("fails", [True, False])
def test_a_capture_that_fails_is_ended(fails: bool, pool: CudaGraphPool) -> None:
    graph = FakeGraph(fails)
    with pytest.raises(ZeroDivisionError), pool.capturing(graph):
        raise ZeroDivisionError
    assert graph.calls[1:] == ["end"]


def test_an_end_that_fails_is_seen(pool: CudaGraphPool) -> None:
    with pytest.raises(RuntimeError, match="invalid"), pool.capturing(FakeGraph(fails=True)):
        pass


def gpu_pool() -> Any:
    backend = BACKENDS["cuda"]
    stream = backend.new_capture_stream(GPU)
    assert stream is not None
    return backend.new_graph_pool(GPU, stream)


@pytest.mark.gpu
def test_a_replay_reads_the_same_memory_again() -> None:
    pool = gpu_pool()
    x = torch.ones(8, device=GPU)
    (x * 2).sum()
    torch.cuda.synchronize()
    graph = pool.new_graph()
    with pool.capturing(graph):
        y = x * 2
    for n in (3.0, 4.0):
        x.fill_(n)
        graph.replay()
        assert y.tolist() == [2 * n] * 8


@pytest.mark.gpu
@pytest.mark.parametrize("keyed", [True, False])
def test_draws_are_those_of_a_seeded_generator(keyed: bool) -> None:
    """Also of operators that take no generator; two draws in one graph have a seed each."""
    pool = gpu_pool()
    x = torch.full((1000,), 0.5, device=GPU)
    torch.bernoulli(x)
    default = torch.cuda.default_generators[0]
    generators = [torch.Generator(GPU) for _ in range(2)]
    graph = pool.new_graph()
    for generator in generators:
        graph.register_generator_state(generator)
    found = []
    torch.cuda.synchronize()
    with pool.capturing(graph):
        for generator in generators:
            if keyed:
                found.append(torch.bernoulli(x, generator=generator))
            else:
                with pool.drawing_from(generator):
                    found.append(torch.native_dropout(x, 0.5, True)[1])
    before = default.get_state()
    for seeds in ((1, 2), (3, 1), (1, 2)):
        for generator, seed in zip(generators, seeds, strict=True):
            generator.manual_seed(seed)
        graph.replay()
        for ours, seed in zip(found, seeds, strict=True):
            if keyed:
                expected = torch.bernoulli(x, generator=torch.Generator(GPU).manual_seed(seed))
            else:
                with torch.random.fork_rng(devices=[0]):
                    default.manual_seed(seed)
                    expected = torch.native_dropout(x, 0.5, True)[1]
            assert torch.equal(ours, expected)
    assert torch.equal(default.get_state(), before)


@pytest.mark.gpu
def test_the_gpu_can_be_used_after_a_capture_that_failed() -> None:
    pool = gpu_pool()
    x = torch.ones(8, device=GPU)
    with pytest.raises(RuntimeError), pool.capturing(pool.new_graph()):
        x.sum().item()
    assert x.sum().item() == 8
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    other = torch.zeros(1 << 20, device=GPU)
    other.record_stream(torch.cuda.Stream())
    del other
    torch.cuda.synchronize()
    torch.zeros(1, device=GPU)  # the allocator looks which memory is free
    assert torch.cuda.memory_stats()["active_bytes.all.current"] <= before + 512
    graph = pool.new_graph()
    with pool.capturing(graph):
        y = x + 1
    graph.replay()
    assert y.tolist() == [2] * 8
