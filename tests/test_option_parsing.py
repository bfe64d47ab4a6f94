"""What a user writes for devices (policies and sizes: `planning/test_choice.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopipe.errors import DeviceError, OptionError
from autopipe.option_parsing import parse_devices

CPU = torch.device("cpu")
GPUS = (torch.device("cuda", 0), torch.device("cuda", 1))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def present(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return present


def test_a_count_means_gpus_where_there_are_some(gpus: Any) -> None:
    gpus(2)
    assert parse_devices(2, elsewhere=False) == GPUS
    assert parse_devices(1, elsewhere=False) == GPUS[:1]
    assert parse_devices(3, elsewhere=True) == (CPU,) * 3
    with pytest.raises(DeviceError, match=r'devices=\["cuda:0", "cuda:0"\]') as caught:
        parse_devices(3, elsewhere=False)
    assert caught.value.found == "2 GPUs"
    gpus(0)
    assert parse_devices(3, elsewhere=False) == (CPU,) * 3


def test_a_list_names_devices_with_or_without_index(gpus: Any) -> None:
    gpus(2)
    found = parse_devices(["cuda", "cpu", torch.device("cuda:1"), "cpu:0"], elsewhere=False)
    assert found == (GPUS[0], CPU, GPUS[1], CPU)


@pytest.mark.parametrize(
    ("count", "value", "expected"),
    [
        (2, "cuda:2", '"cpu" or "cuda:0" … "cuda:1"'),
        (0, "cuda:0", '"cpu" (there is no GPU)'),
        (0, "meta", '"cpu" (there is no GPU)'),
    ],
)
def test_a_device_that_is_not_here(gpus: Any, count: int, value: str, expected: str) -> None:
    gpus(count)
    with pytest.raises(DeviceError, match="no such device here") as caught:
        parse_devices([value], elsewhere=False)
    assert (caught.value.expected, caught.value.found) == (expected, repr(value))


@pytest.mark.parametrize("value", ["tpu0", 3.5, None])
def test_a_name_that_torch_does_not_know(value: Any) -> None:
    with pytest.raises(DeviceError, match="no such device"):
        parse_devices([value], elsewhere=False)


@pytest.mark.parametrize("value", [0, -1, True, "cpu", {}, [], ()])
def test_what_is_neither_a_count_nor_a_list(value: Any) -> None:
    with pytest.raises(
        OptionError, match=r"a pipeline needs a device|devices is a count or a list"
    ):
        parse_devices(value, elsewhere=False)
