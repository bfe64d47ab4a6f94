"""What a user writes for devices (policies and sizes: `planning/test_choice.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopipe.errors import DeviceError, OptionError
from autopipe.option_parsing import parse_devices, size

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


def test_a_list_of_indices_names_gpus(gpus: Any) -> None:
    gpus(2)
    assert parse_devices([1, 0, "cpu", 1], elsewhere=False) == (GPUS[1], GPUS[0], CPU, GPUS[1])


@pytest.mark.parametrize(
    ("count", "value", "expected"),
    [
        (2, 2, '"cpu", or an index from 0 to 1'),
        (2, -1, '"cpu", or an index from 0 to 1'),
        (0, 0, 'devices=2, or ["cpu"] * 2: CPU workers (there is no GPU)'),
    ],
)
def test_an_index_without_gpu(gpus: Any, count: int, value: int, expected: str) -> None:
    gpus(count)
    with pytest.raises(DeviceError, match="no GPU with this index here") as caught:
        parse_devices([value, value], elsewhere=False)
    assert (caught.value.expected, caught.value.found) == (expected, str(value))


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


@pytest.mark.parametrize("value", ["tpu0", 3.5, None, True])
def test_a_name_that_torch_does_not_know(value: Any) -> None:
    with pytest.raises(DeviceError, match="no such device"):
        parse_devices([value], elsewhere=False)


@pytest.mark.parametrize("value", [0, -1, True, "cpu", {}, [], ()])
def test_what_is_neither_a_count_nor_a_list(value: Any) -> None:
    with pytest.raises(
        OptionError, match=r"a pipeline needs a device|devices is a count or a list"
    ):
        parse_devices(value, elsewhere=False)


class Unprintable:
    """A value of a user's whose text fails."""

    def __repr__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("devices", [10**30, 10**5000, 1025], ids=["31 digits", "more", "1025"])
def test_too_many_devices(devices: int) -> None:
    with pytest.raises(OptionError, match="at most 1024"):
        parse_devices(devices, elsewhere=True)


@pytest.mark.parametrize("devices", [Unprintable(), [Unprintable()]])
def test_a_failing_text_does_not_mask_the_error(devices: Any) -> None:
    with pytest.raises((OptionError, DeviceError), match="<Unprintable>"):
        parse_devices(devices, elsewhere=False)


@pytest.mark.parametrize(
    "value",
    [
        "9" * 400 + "TiB",
        "0GiB",
        "0.0000001KiB",
        "1" * 31 + "B",
        "16Gib",
        0,
        True,
        1.5,
        -1e9,
        0.0,
        float("inf"),
        float("nan"),
        None,
    ],
)
def test_no_sizes(value: Any) -> None:
    with pytest.raises(OptionError, match="bytes above 0"):
        size(value)
    with pytest.raises(OptionError, match="<Unprintable>"):
        size(Unprintable())


def test_sizes_are_exact() -> None:
    assert size(16e9) == 16 * 10**9
    assert type(size(16e9)) is int
    assert size("9999999999999999TiB") == 9999999999999999 * 1024**4
    assert size(" 1.5 kB ") == 1500
    assert size("0.1TB") == 10**11
