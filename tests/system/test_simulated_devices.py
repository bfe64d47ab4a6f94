"""Steps on simulated devices: right numbers, and no access that nothing orders.

Covers the runtime's streams, events and copies; see `tests.support.simulated`. The truth is the
same pipeline on CPU workers.
"""

from __future__ import annotations

import gc

import pytest
import torch

import autopipe
from tests.support.simulated import Machine, simulated
from tests.support.simulated.failing import fail_and_go_on
from tests.support.simulated.nets import NETS
from tests.support.simulated.pairs import (
    CHUNKS,
    WIDTH,
    Found,
    Pair,
)

DEVICES = {
    "one": ["lazy:0"],
    "one twice": ["lazy:0"] * 2,
    "two": ["lazy:0", "lazy:1"],
    "four": [f"lazy:{k}" for k in range(4)],
    "the CPU last": ["lazy:0", "lazy:1", "cpu"],
    "the CPU first": ["cpu", "lazy:1", "lazy:0"],
}
PLACES = ("cpu", "pinned", "lazy:0", "lazy:5")
"""Where the caller's tensors are; the last is no stage's device."""


def check(machine: Machine, found: Found) -> None:
    """Values agree, and everything was ordered, frees included."""
    for what, ours, expected in found:
        torch.testing.assert_close(ours, expected, msg=lambda m, what=what: f"{what}: {m}")
    gc.collect()
    assert machine.races == []
    assert machine.counts["kernels"] > 0


STREAMS = ("default", "side", "forward on side")
REMATS = ("none", "full", "min-cut")
COMBINATIONS = [
    pytest.param(name, devices, place, REMATS[(i + j + k) % 3], STREAMS[(i + k) % 3])
    for i, name in enumerate(NETS)
    for j, devices in enumerate(DEVICES)
    for k, place in enumerate(PLACES)
]


@pytest.mark.few(16)
@pytest.mark.parametrize(("name", "devices", "place", "remat", "streams"), COMBINATIONS)
def test_steps_are_right_and_ordered(
    name: str,
    devices: str,
    place: str,
    remat: str,
    streams: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, name, DEVICES[devices], remat=remat)
        for _ in range(2):
            check(machine, pair.step(monkeypatch, place, streams))


@pytest.mark.few(3)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved", "zb-v"])
def test_schedules_are_ordered(
    schedule: str, streams: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "loss", ["lazy:0", "lazy:1"], schedule=schedule)
        for _ in range(2):
            check(machine, pair.step(monkeypatch, "lazy:5", streams))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("devices", ["one twice", "four", "the CPU last", "the CPU first"])
@pytest.mark.few(2)
def test_after_a_failed_step_the_caller_waits_for_what_was_queued(
    devices: str, place: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may overwrite its tensors and parameters at once, and call the pipeline again."""
    with simulated(monkeypatch, 6) as machine:
        torch.manual_seed(0)
        pipe = autopipe.compile(NETS["skip and mask"](WIDTH), DEVICES[devices], CHUNKS)
        fail_and_go_on(machine, pipe, place, direction, monkeypatch)
        check(machine, [])
