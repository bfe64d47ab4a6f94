"""Rooflines, links and the table of devices, by hand and by comparison."""

from __future__ import annotations

import dataclasses
import math

import pytest

from autopipe.errors import OptionError
from autopipe.passes.cost.node_costs import call_seconds
from autopipe.passes.devices import (
    DEVICES,
    KINDS,
    PRECISIONS,
    Device,
    Fractions,
    Link,
    device_named_in_torch,
    device_of,
)
from autopipe.passes.ir.captured import NodeCost
from autopipe.passes.ir.values import B

ROUND = Device(
    name="round figures",
    fp32_flops=1e12,
    tf32_flops=4e12,
    half_flops=8e12,
    gbytes_per_second=100,
    memory_bytes=10**9,
    link=Link(10, 1e-3),
    fractions=Fractions(matmul=0.5, convolution=0.25, attention=0.125, bandwidth=0.5),
    launch_seconds=0.0,
)


def test_a_roofline_by_hand() -> None:
    # 1e12 operations at half of 1e12 a second; 1e11 bytes at half of 1e11 a second
    assert ROUND.seconds(1e12, 0, "matmul", "fp32") == pytest.approx(2)
    assert ROUND.seconds(0, 1e11, "memory", "fp32") == pytest.approx(2)
    assert ROUND.seconds(1e12, 2e11, "matmul", "fp32") == pytest.approx(4)  # the larger
    assert ROUND.seconds(1e12, 0, "convolution", "fp32") == pytest.approx(4)
    assert ROUND.seconds(1e12, 0, "attention", "fp32") == pytest.approx(8)
    assert ROUND.seconds(1e12, 0, "matmul", "half") == pytest.approx(0.25)
    quick = dataclasses.replace(ROUND, tf32=True)
    assert quick.seconds(1e12, 0, "matmul", "fp32") == pytest.approx(0.5)


def test_launches_cost_but_views_do_not() -> None:
    slow = dataclasses.replace(ROUND, launch_seconds=1e-3)
    assert slow.seconds(0, 0, "memory", "fp32") == 0
    assert slow.seconds(0, 1, "memory", "fp32") == pytest.approx(1e-3 + 1 / 5e10)


def test_seconds_of_a_node() -> None:
    cost = NodeCost(
        forward_flops=1e12 * B,
        forward_bytes=1 * B,
        backward_flops=2e12 * B,
        backward_bytes=4e11 * B,
        kind="matmul",
    )
    found = call_seconds(cost, ROUND, 3)
    assert found.forward == found.recompute == pytest.approx(3 * 2)
    assert found.backward == pytest.approx(3 * 8)  # bound by memory
    assert call_seconds(NodeCost(), ROUND, 3) == (0, 0, 0)


def test_links() -> None:
    assert Link(10, 1e-3).seconds(0) == 1e-3
    assert Link(10, 1e-3).seconds(10**10) == pytest.approx(1.001)
    assert Link(math.inf).seconds(10**10) == 0


@pytest.mark.parametrize("name", DEVICES)
def test_devices_are_possible(name: str) -> None:
    device = device_of(name)
    assert device.name == name
    assert device.fp32_flops <= device.tf32_flops <= device.half_flops
    assert device.link.gbytes_per_second > 0
    assert device.link.gbytes_per_second <= device.gbytes_per_second or name == "cpu-core"
    for kind in KINDS:
        for precision in PRECISIONS:
            little, much = (device.seconds(n * 1e9, 1e6, kind, precision) for n in (1, 1000))
            assert 0 < little < much


def test_a_faster_device_is_faster() -> None:
    def product(name: str) -> float:
        return device_of(name).seconds(1e15, 1e9, "matmul", "half")

    names = ["h100", "a100-80gb", "rtx4090", "l4", "cpu-core"]
    assert sorted(names, key=product) == names
    moving = [device_of(n).seconds(0, 1e12, "memory", "half") for n in ("h200", "h100")]
    assert moving[0] < moving[1]


@pytest.mark.parametrize(("kind", "precision"), [("sorting", "fp32"), ("matmul", "fp8")])
def test_work_that_is_unknown(kind: str, precision: str) -> None:
    with pytest.raises(OptionError, match="unknown work") as caught:
        ROUND.seconds(1, 1, kind, precision)
    assert f"found: {kind} in {precision}" in str(caught.value)


def test_a_device_that_is_not_in_the_table() -> None:
    with pytest.raises(OptionError, match="no such device") as caught:
        device_of("abacus")
    assert "h100" in str(caught.value)


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090"),
        ("NVIDIA L40S", "h100"),
        ("", "h100"),
    ],
)
def test_gpus_are_recognized_by_their_names_in_torch(torch_name: str, name: str) -> None:
    assert device_named_in_torch(torch_name) == DEVICES[name]


def test_every_gpu_of_the_table_has_a_name_in_torch() -> None:
    for device in DEVICES.values():
        assert bool(device.names_in_torch) == (device.name != "cpu-core")
        assert all(device_named_in_torch(f"NVIDIA {n}") is device for n in device.names_in_torch)


@pytest.mark.parametrize(("bandwidth", "latency"), [(0, 0), (-1, 0), (math.nan, 0), (1, -1)])
def test_links_that_cannot_be(bandwidth: float, latency: float) -> None:
    with pytest.raises(OptionError, match="no such link"):
        Link(bandwidth, latency)


@pytest.mark.parametrize("field", ["matmul", "convolution", "attention", "bandwidth"])
@pytest.mark.parametrize("value", [0, 1.5, math.nan])
def test_fractions_that_cannot_be(field: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"fraction `{field}`"):
        dataclasses.replace(ROUND.fractions, **{field: value})
