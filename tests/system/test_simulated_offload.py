"""Offloading on simulated devices: right numbers, everything ordered, little memory, no lost time.

Covers runtime/offload.py and runtime/saved_values.py; see `tests.support.simulated`.
"""

from __future__ import annotations

import gc

import pytest
import torch

import autopipe
from tests.support.offloading import offload_all
from tests.support.simulated import simulated
from tests.support.simulated.nets import NETS
from tests.support.simulated.pairs import CHUNKS, Pair

DEVICES = {
    "one": ["lazy:0"],
    "one twice": ["lazy:0"] * 2,
    "two": ["lazy:0", "lazy:1"],
    "four": [f"lazy:{k}" for k in range(4)],
    "the CPU last": ["lazy:0", "lazy:1", "cpu"],
}
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-h2", "interleaved", "zb-v", "v-half", "v-min")
STREAMS = ("default", "side", "forward on side")


@pytest.mark.few(8)
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("net", NETS)
def test_steps_are_right_and_ordered(
    net: str, devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload_all(monkeypatch)
    streams = STREAMS[(len(net) + len(devices)) % 3]
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, net, DEVICES[devices], remat="offload")
        for place in ("cpu", "pinned", "lazy:0"):
            for what, ours, expected in pair.step(monkeypatch, place, streams):
                torch.testing.assert_close(ours, expected, msg=lambda m, w=what: f"{w}: {m}")
        gc.collect()
        assert machine.races == []
        assert sum(s.peak for s in pair.pipes[1].memory.hosts) > 0


@pytest.mark.few(4)
@pytest.mark.parametrize("devices", ["two", "four"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_ordered(
    schedule: str, devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload_all(monkeypatch)
    with simulated(monkeypatch, 6) as machine:
        pair = Pair(machine, "loss", DEVICES[devices], schedule=schedule, remat="offload")
        for _ in range(2):
            for what, ours, expected in pair.step(monkeypatch, "lazy:5", "side"):
                torch.testing.assert_close(ours, expected, msg=lambda m, w=what: f"{w}: {m}")
        gc.collect()
        assert machine.races == []
