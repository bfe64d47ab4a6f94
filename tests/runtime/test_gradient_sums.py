"""`GradientSums`: micro-batches are added up by stage, then the stages' parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopipe.runtime.gradient_sums import GradientSums

CPU = torch.device("cpu")


def ones(factor: float = 1.0) -> Tensor:
    return torch.full((2,), factor)


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_of_stages_are_added_in_their_order(chunks: int) -> None:
    sums, given = GradientSums(), []
    for stage, factor in ((10, 2**-24), (2, 1.0), (3, 2**-24)):  # 1 + 2**-24 rounds to 1
        for m in range(chunks):
            given.append(ones(factor if m == 0 else 0.0))
            sums.add("w", stage, given[-1])
    sums.add("b", 2, ones(7.0))
    before = [g.clone() for g in given]
    w, none, b = sums.totals({"w": CPU, "other": CPU, "b": CPU})
    assert none is None
    assert torch.equal(w, ones())
    assert torch.equal(b, ones(7.0))
    assert all(map(torch.equal, given, before)), "the caller's tensors do not change"


def test_totals_can_be_asked_for_again() -> None:
    sums = GradientSums()
    for stage in (0, 1):
        for _ in range(2):
            sums.add("w", stage, ones())
    for _ in range(2):
        (total,) = sums.totals({"w": CPU})
        assert torch.equal(total, ones(4.0))
    assert len([*sums]) == 1, "the parts are freed"


def test_a_part_goes_to_the_device_of_its_parameter() -> None:
    sums = GradientSums()
    sums.add("w", 0, ones())
    sums.add("w", 1, ones())
    (total,) = sums.totals({"w": torch.device("meta")})
    assert total.is_meta


@pytest.mark.parametrize("sparse", [0, 1])
def test_a_sparse_and_a_dense_part(sparse: int) -> None:
    sums = GradientSums()
    for stage in (0, 1):
        part = torch.eye(3) * (stage + 1)
        sums.add("w", stage, part.to_sparse() if stage == sparse else part)
    (total,) = sums.totals({"w": CPU})
    assert torch.equal(total, torch.eye(3) * 3)


def test_clear() -> None:
    sums = GradientSums()
    sums.add("w", 0, ones())
    sums.clear()
    assert [*sums] == []
    assert sums.totals({"w": CPU}) == [None]
