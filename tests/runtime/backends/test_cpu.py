"""CPU workers: found, named, timed by the clock; no streams."""

from __future__ import annotations

import torch

from autopipe.runtime.backends import BACKENDS

CPU = torch.device("cpu")
BACKEND = BACKENDS["cpu"]


def test_the_cpu_is_one_device() -> None:
    assert BACKEND.devices() == (CPU,)
    assert BACKEND.find(torch.device("cpu", 0)) == CPU


def test_its_name_tells_model_and_threads() -> None:
    model, _, threads = BACKEND.name(CPU).rpartition(", ")
    assert model
    assert threads == f"{torch.get_num_threads()} threads"


def test_it_has_no_streams() -> None:
    assert BACKEND.new_stream(CPU) is None
    assert BACKEND.current_stream(CPU) is None
    assert BACKEND.default_stream(CPU) is None
    with BACKEND.use_device(CPU):
        BACKEND.synchronize(CPU)


def test_timing_returns_result_and_seconds() -> None:
    result, seconds = BACKEND.timed(CPU, lambda: "done")
    assert result == "done"
    assert 0 <= seconds < 10


def test_random_state_is_restored() -> None:
    before = torch.get_rng_state()
    with BACKEND.fork_rng(CPU):
        torch.rand(3)
        assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)
    assert BACKEND.default_generator(CPU) is torch.default_generator
