"""Targets that are a list with an entry for each sample, as detectors have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import CouplingError, InputError
from tests.support.agreement import assert_close, pipelined

IMAGES = torch.randn(6, 3, 8, 8, dtype=torch.float64)


def targets(sizes: list[int]) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [{"boxes": torch.rand(n, 4).double(), "labels": torch.ones(n)} for n in sizes]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1).double()
        self.last = nn.Linear(4, 4).double()

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        found = self.last(self.first(images).mean((2, 3)))
        return found if targets is None else {"loss": loss(found, targets)}


def loss(found: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    each = [((found[i] - t["boxes"].mean(0)) ** 2).sum() for i, t in enumerate(targets)]
    return torch.stack(each).mean()


@pytest.mark.parametrize("sizes", [[1, 2, 3, 1, 2, 3], [1] * 6, [2] * 6])
def test_targets_for_each_sample_are_refused_with_the_way_out(sizes: list[int]) -> None:
    with pytest.raises(InputError, match="number of samples") as caught:
        pipelined(Detector())(IMAGES, targets(sizes))
    remedy = str(caught.value.remedy)
    assert "'targets' has an entry for each sample" in remedy
    assert "loss_fn" in remedy
    assert len(str(caught.value.found)) < 500


@pytest.mark.parametrize("options", [{}, {"in_dims": {"targets": None}}])
def test_targets_that_pass_for_a_batch_are_refused_where_they_are_read(
    options: dict[str, Any],
) -> None:
    with pytest.raises(CouplingError) as caught:
        pipelined(Detector(), **options)(IMAGES, targets=targets([6] * 6))
    assert "finish outside of the model" in str(caught.value.remedy)


def test_a_list_of_tensors_is_named() -> None:
    class Stacked(nn.Module):
        def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
            return x + torch.stack(more).sum(-1)

    with pytest.raises(InputError) as caught:
        pipelined(Stacked())(torch.randn(6, 4), [torch.randn(4, 2)] * 6)
    assert "'more' has an entry for each sample" in str(caught.value.remedy)
    assert "stack them" in str(caught.value.remedy)


@pytest.mark.parametrize("sizes", [[1, 2, 3, 1, 2, 3], [2] * 6])
def test_the_loss_of_targets_outside(sizes: list[int]) -> None:
    model, batch = Detector(), targets(sizes)
    expected = model(IMAGES, batch)["loss"]
    gradients = torch.autograd.grad(expected, [*model.parameters()])
    pipe = pipelined(model, loss_fn=loss)
    assert_close(pipe.step(IMAGES, target=batch), expected.detach(), "loss")
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        assert_close(p.grad, g, name)
